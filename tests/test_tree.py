"""Candidates: the likeliest nodes are those of brute force, and a walk ends where tokens differ."""

import math
from itertools import product

import pytest
import torch

from ar2diff.core.head import DraftHead
from ar2diff.core.pace import Cost, MeasuredPace, slots_of
from ar2diff.core.tree import Guesses, Tree

VOCABULARY, DRAFTS = 5, 3


def guesses(temperature=1.0, seed=0, headed=True):
    generator = torch.Generator().manual_seed(seed)
    head = DraftHead(VOCABULARY, 4, 6, generator)
    for parameter in (head.after, head.gate, head.fade):
        torch.nn.init.normal_(parameter, std=1.0, generator=generator)
    head.before.data.mul_(20)
    scores = torch.randn(2, DRAFTS, VOCABULARY, generator=generator)
    gates = head.gates(torch.randn(2, DRAFTS, 6, generator=generator))
    head, gates = (head, gates) if headed else (None, None)
    return Guesses(scores, torch.tensor([1, 3]), head, gates, temperature)


def chance(guess, row, path):
    """Probability that each token of a path is drawn after the one before it."""
    total, head = 0.0, guess.head
    for place, token in enumerate(path):
        scores = guess.scores[row, place].clone()
        for back, before in enumerate(reversed([int(guess.newest[row]), *path[:place]])):
            if head is not None:
                memory = head.before[before] * head.fade.tanh() ** back
                bias = (memory * guess.gates[row, place]) @ head.after
                scores = scores + bias.detach() / guess.temperature
        total += scores.log_softmax(-1)[token].item()
    return math.exp(total)


def paths_of(tree):
    return [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "nodes", [5, 9]
)  # as many paths are followed as there are tokens, at least
def test_the_likeliest_nodes_are_those_of_all_paths(nodes, temperature, headed):
    guess = guesses(temperature, headed=headed)
    for row, tree in enumerate(guess.likeliest(nodes)):
        every = [p for n in range(1, DRAFTS + 1) for p in product(range(VOCABULARY), repeat=n)]
        best = sorted(every, key=lambda path: -chance(guess, row, path))[:nodes]
        assert sorted(paths_of(tree)) == sorted(best)
        assert tree.chances == pytest.approx(
            [chance(guess, row, p) for p in paths_of(tree)], rel=1e-4
        )
        assert tree.chances == sorted(tree.chances, reverse=True)
        assert [len(path) for path in paths_of(tree)] == tree.depths


@pytest.mark.parametrize("headed", [True, False])
def test_a_chain_follows_the_likeliest_token_after_each_token(headed):
    guess = guesses(headed=headed)
    for row, tree in enumerate(guess.chain(DRAFTS)):
        path = ()
        for _ in range(DRAFTS):
            path = max(((*path, t) for t in range(VOCABULARY)), key=lambda p: chance(guess, row, p))
        assert tuple(tree.tokens) == path
        assert tree.is_chain


def forked():
    """a - (b - d), (c); e"""
    tree = Tree()
    for token, parent, depth, likely in (
        (10, -1, 1, 0.6), (11, 0, 2, 0.3), (12, 0, 2, 0.2), (13, 1, 3, 0.2), (14, -1, 1, 0.1),
    ):  # fmt: skip
        tree.add(token, parent, depth, likely)
    return tree


def test_a_node_is_open_while_those_that_follow_it_are_entered():
    tree = forked()
    enter, leave = tree.branches()
    for node in range(len(tree)):
        for other in range(len(tree)):
            follows = node in tree.path(other)
            assert follows == (enter[node] <= enter[other] < leave[node])
    assert min(enter) == 1  # the newest token is entered before them all


@pytest.mark.parametrize(
    "tokens,end",
    [
        ([10, 11, 13, 0, 0, 0], 3),
        ([10, 12, 0, 0, 0, 0], 2),
        ([14, 11, 0, 0, 0, 7], 4),
        ([9, 11, 13, 0, 0, 0], -1),
    ],
)
def test_a_walk_goes_to_the_node_that_holds_the_models_own_token(tokens, end):
    assert forked().walk(tokens) == end


def test_a_walk_ends_somewhere():
    ends = forked().ends()
    assert sum(ends) == pytest.approx(1)
    assert ends == pytest.approx([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])


def paced(cost, right=0.7):
    """A pace after many forwards in which each draft was right in `right` of them."""
    pace = MeasuredPace(cost, 7)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(4, 7, 50, generator=generator)
    for _ in range(300):
        drafts = pace.drafts()
        if drafts:
            guess = Guesses(scores[:, :drafts], torch.zeros(4).long(), None, None, 1.0)
            trees = pace.grown(guess)
            pace.plan(trees, drafts)
            drawn = torch.rand(4, drafts, generator=generator) < right
            pace.saw(trees, drawn.long().cumprod(1).sum(1).tolist())
    return pace, trees, drafts


def test_slots_that_cost_nothing_are_used_and_dear_ones_are_not():
    pace, trees, drafts = paced(Cost(1.0, 1.0, 0.0))
    assert drafts == 7 and pace.nodes > 50 and len(trees[0].blocks) == len(trees[0]) + 1 > 50
    pace, trees, drafts = paced(Cost(1.0, 1.2, 0.03, tree=1.0))
    assert 1 < drafts < 7 and pace.nodes is None and trees[0].is_chain
    assert len(trees[0]) == drafts and trees[0].blocks == list(range(-1, drafts))


def test_one_more_draft_is_added_as_long_as_the_speed_grows():
    cost = Cost(1.0, 1.2, 0.03, tree=1.0)
    pace, _, drafts = paced(cost)
    speed = [(1 + sum(pace.right[:n])) / cost.of(n, n) for n in range(1, len(pace.right) + 1)]
    assert speed[:drafts] == sorted(speed[:drafts])
    assert pace.right[0] == pytest.approx(0.7, abs=0.1)
    assert pace.right[1] == pytest.approx(0.49, abs=0.15)


def test_worse_drafts_are_shorter_and_hopeless_ones_are_not_made():
    cost = Cost(1.0, 1.2, 0.03, tree=1.0)
    assert paced(cost, 0.3)[2] < paced(cost, 0.9)[2]
    pace, _, drafts = paced(Cost(1.0, 5.0, 0.5))
    assert drafts == 0 and pace.resting


def test_the_cost_goes_through_what_was_measured():
    few, many = slots_of(2, 2), slots_of(5, 5)
    assert (few, many) == (2 + 3 * 2, 5 + 6 * 5)
    cost = Cost.through(1.0, (1 + few, 2.0), (1 + many, 3.0))
    assert (cost.of(2, 2), cost.of(5, 5)) == pytest.approx((2.0, 3.0))
