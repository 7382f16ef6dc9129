"""Candidates: the likeliest nodes are those of brute force, and a walk ends where tokens differ."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from ar2diff.core.head import DraftHead
from ar2diff.core.pace import Cost, MeasuredPace, Timing, slots_of
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


def paced(cost, right=0.7, sharp=2.0):
    """A pace after many forwards in which each best guess was right in `right` of them, whatever
    it promised."""
    pace = MeasuredPace(cost, 7)
    generator = torch.Generator().manual_seed(0)
    scores = sharp * torch.randn(4, 7, 50, generator=generator)
    for _ in range(300):
        drafts = pace.drafts()
        if drafts:
            guess = Guesses(scores[:, :drafts], torch.zeros(4).long(), None, None, 1.0)
            trees = pace.grown(guess)
            pace.plan(trees, drafts)
            drawn = torch.rand(4, 7, generator=generator) < right
            kept = drawn.long().cumprod(1).sum(1).tolist()
            pace.saw(trees, [best_path(tree)[:n] for tree, n in zip(trees, kept, strict=True)])
    return pace, trees, drafts


def best_path(tree):
    path = []
    while found := [n for n, parent in enumerate(tree.parents) if [parent] == (path or [-1])[-1:]]:
        path.append(found[0])
    return path


def test_slots_that_cost_nothing_are_used_and_dear_ones_are_not():
    pace, trees, drafts = paced(Cost(1.0, 1.0, 0.0))
    assert drafts == 7 and pace.nodes > 50 and len(trees[0].blocks) == len(trees[0]) + 1 > 50
    pace, trees, drafts = paced(Cost(1.0, 1.2, 0.03, tree=1.0))
    assert 1 < drafts < 7 and pace.nodes is None and trees[0].is_chain
    assert 1 <= len(trees[0].blocks) < len(trees[0]) + 1


def test_masks_stand_behind_the_candidates_at_which_a_walk_may_well_end():
    pace = MeasuredPace(Cost(1.0, 1.0, 0.02), 4)
    tree = Tree()
    for depth, likely in enumerate((0.99, 0.98, 0.4, 0.39, 0.001), 1):
        tree.add(depth, depth - 2, depth, likely)
    pace.plan([tree], 4)
    assert len(tree) == 4  # the last one is not worth its slot
    assert tree.blocks == [1, 3]  # after the second token, or after all
    sure = Tree([5], [-1], [1], [1.0])
    pace.plan([sure], 4)
    assert sure.blocks == [0]
    pace.plan([sure], 0)
    assert sure.blocks == []


def test_best_guesses_are_trusted_as_far_as_they_were_right():
    """They promised 0.3 to 0.6 each; siblings share the rest."""
    for right in (0.3, 0.9):
        pace, _, _ = paced(Cost(1.0, 1.2, 0.01, tree=9.0), right)
        guess = Guesses(2 * torch.randn(4, 7, 50), torch.zeros(4).long(), None, None, 1.0)
        plain, trusted = (
            replace(guess, trust=trust).chain(1)[0].chances[0] for trust in (0.0, pace.trust)
        )
        assert (trusted > plain) == (right == 0.9)
        assert sum(replace(guess, trust=pace.trust).likeliest(50)[0].ends()) == pytest.approx(1)
    everything = replace(guess, scores=guess.scores[:, :1], trust=1.0).likeliest(8)[0]
    wanted = guess.scores[0, 0].clone()
    wanted[wanted.argmax()] += 1
    assert everything.chances == pytest.approx(wanted.softmax(-1).topk(8).values.tolist())


def test_a_chain_stops_where_it_is_not_worth_a_slot():
    guess = guesses()
    whole = guess.chain(DRAFTS)
    least = max(tree.chances[1] for tree in whole) * 1.01
    for tree, long in zip(guess.chain(DRAFTS, least), whole, strict=True):
        assert tree.tokens == long.tokens[:2] and tree.chances == long.chances[:2]
        assert long.chances == pytest.approx(
            [chance(guess, whole.index(long), tuple(long.tokens[:n])) for n in (1, 2, 3)], rel=1e-4
        )


def test_one_more_draft_is_added_as_long_as_the_speed_grows():
    pace, _, drafts = paced(Cost(1.0, 1.2, 0.03, tree=1.0))
    speed = [
        (1 + sum(pace.right[:n])) / pace.cost.of(1 + n + n * pace.blocks, n)
        for n in range(1, len(pace.right) + 1)
    ]
    assert speed[:drafts] == sorted(speed[:drafts])
    assert pace.right[0] == pytest.approx(0.7, abs=0.1)
    assert pace.right[1] == pytest.approx(0.49, abs=0.15)


def test_what_was_learned_of_longer_drafts_is_forgotten():
    """Else a bad start would keep drafts short for ever."""
    pace = MeasuredPace(Cost(1.0, 1.2, 0.01), 7)
    pace.right, pace.guessed = [0.5, 0.2, 0.1, 0.05, 0.01], 2
    chain = Tree([5, 6], [-1, 0], [1, 2], [0.9, 0.8], [1])
    for _ in range(100):
        pace.saw([chain], [[0, 1]])
    assert len(pace.right) == 2 and pace.right[1] > 0.99
    assert pace.length == 7


def test_worse_drafts_are_shorter_and_hopeless_ones_are_not_made():
    cost = Cost(1.0, 1.2, 0.03, tree=1.0)
    assert paced(cost, 0.3)[2] < paced(cost, 0.9)[2]
    pace, _, drafts = paced(Cost(1.0, 5.0, 0.5))
    assert drafts == 0 and pace.resting


def test_drafting_rests_briefly_until_the_first_timings_are_corrected():
    """A plain forward that seemed fast is timed again while drafting rests."""
    pace, drafted = MeasuredPace(Cost(0.4, 1.2, 0.01), 7), 0
    chain = Tree([5, 6], [-1, 0], [1, 2], [0.9, 0.8], [1])
    for _ in range(80):
        drafts = pace.drafts()
        drafted += bool(drafts)
        if drafts:
            pace.saw([chain], [[0]])
        pace.took(1.25 if drafts else 1.0, 10 if drafts else 1, drafts)
    assert pace.rest == 8 and 60 < drafted < 75


def test_tries_of_drafts_that_do_not_pay_cost_a_small_share_of_the_time():
    pace, chain, seconds = (
        MeasuredPace(Cost(1.0, 4.0, 0.1), 7),
        Tree([5], [-1], [1], [0.9], [1]),
        [],
    )
    for _ in range(4000):
        drafts = pace.drafts()
        if drafts:
            pace.saw([chain], [[]])
        seconds.append(4.5 if drafts else 1.0)
        pace.took(seconds[-1], 5 if drafts else 1, drafts)
    assert 1500 < sum(seconds[-1500:]) < 1.03 * 1500  # drafts were tried again


def test_trees_that_do_not_keep_their_promise_are_given_up_and_must_promise_more():
    pace = MeasuredPace(Cost(1.0, 1.2, 0.05, tree=0.5), 7)
    chain = Tree([5, 6], [-1, 0], [1, 2], [0.9, 0.8], [1])
    pace.chained, pace.nodes = pace.seconds, 15
    for _ in range(30):
        pace.saw([chain], [[]])  # nothing of it is accepted
    assert pace.nodes is None and pace.margin > 1.3


def test_the_cost_goes_through_what_was_measured():
    assert slots_of(2, 2) == 2 + 3 * 2
    timings = Timing(9, 2, 2.0), Timing(36, 5, 3.5), Timing(6, 5, 2.3)
    cost = Cost.through(1.0, *timings)
    for timing in timings:
        assert cost.of(timing.slots, timing.drafts) == pytest.approx(timing.seconds)
    assert cost.slot == pytest.approx(1.2 / 30)


def test_the_cost_follows_the_forwards_that_are_made():
    pace = MeasuredPace(Cost(1.0, 1.2, 0.03), 7)
    for _ in range(200):
        pace.took(2.0, 1, 0)
        pace.took(4.0, 20, 3)
    assert pace.cost.plain == pytest.approx(2.0, abs=0.01)
    assert pace.cost.of(20, 3) == pytest.approx(4.0, abs=0.01)
    pace.took(1e6, 1, 0)  # the machine was asleep
    assert pace.cost.plain < 2.2
