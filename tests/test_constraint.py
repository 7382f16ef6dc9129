"""Constraints against enumeration: allowed answers and no other, with the stated probability."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import build_model, tiny_spec
from transformers.generation.logits_process import TopKLogitsWarper

from ar2diff.core.automaton import Automaton
from ar2diff.core.canvas import Canvas
from ar2diff.core.constraint import Constraint, Span
from ar2diff.core.denoise import denoise
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.lattice import Lattice
from ar2diff.core.options import Options, resolve
from ar2diff.core.samplers import Chooser
from ar2diff.core.tree import Tree

A, B, C, BB, X, EOS, MASK = range(7)
# (ab*c | cab)+ over tokens of one letter and one of two; x occurs in no text.
EDGES = [
    (0, A, 1), (1, B, 1), (1, BB, 1), (1, C, 2), (0, C, 3), (3, A, 4), (4, B, 2), (2, A, 1),
    (2, C, 3),
]  # fmt: skip
VOCABULARY = 7


def automaton(edges=EDGES, final=(2,), **given) -> Automaton:
    columns = tuple(np.array(column) for column in zip(*edges, strict=True))
    given = {"end_ids": [EOS], "impossible": [MASK], **given}
    return Automaton.of_edges(columns, [0], final, VOCABULARY, **given)


def canvas_of(rows: int, room: int, held: int = 0, ends=(EOS,), prompt=(X,)) -> Canvas:
    return Canvas.of_prompts(
        [list(prompt)] * rows, MASK, max_new_tokens=room, min_new_tokens=held, end_ids=ends
    )


def chooser_of(**options) -> Chooser:
    return Chooser(Options(**options), torch.tensor([MASK]), [])


def matches(text, edges=EDGES, final=(2,)) -> bool:
    """Whether tokens are an allowed text; the simplest reading of the edges."""
    table = {(state, token): after for state, token, after in edges}
    state = 0
    for token in text:
        state = table.get((state, token))
    return state in final


def fits(line, held: int) -> bool:
    """Whether what stands in the room of an answer is one, with its end."""
    text = list(itertools.takewhile(lambda token: token != EOS, line))
    return matches(text) and (len(text) == len(line) or len(text) >= held)


def enumerated(logits: torch.Tensor, held: int, fixed: dict[int, int]) -> dict[tuple, float]:
    """The product of the positions' distributions, of allowed answers alone."""
    p = logits.double().softmax(-1)
    found = {}
    for line in itertools.product(range(MASK), repeat=len(logits)):
        if fits(line, held) and all(line[i] == token for i, token in fixed.items()):
            free = [i for i in range(len(line)) if i not in fixed]
            found[line] = float(np.prod([p[i, line[i]] for i in free]))
    total = sum(found.values())
    return {line: mass / total for line, mass in found.items()}


def choose(canvas: Canvas, logits: torch.Tensor, u, chooser=None, own=None, width=None, first=1):
    """One choice for all undecided positions of the answers, from the same logits [W, V]."""
    rows, width = len(canvas.ids), width or len(logits)
    position = (first + torch.arange(width)).expand(rows, width)
    row = torch.arange(rows)[:, None].expand(rows, width)
    masked = canvas.ids[row, position] == MASK
    given = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    given = given.expand(rows, *given.shape[-2:])[masked]
    own = own or Constraint(automaton(), canvas)
    choice, sure = own.choose(chooser or chooser_of(), row, position, masked, given, None, u)
    lines = canvas.ids[row, position].clone()
    lines[masked] = choice.tokens
    return lines, choice, sure, masked


LOGITS = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 1.5
CASES = [(0, {}), (3, {}), (0, {0: A, 3: A}), (0, {2: C}), (0, {4: EOS})]


def chance(seen, expected):
    """Of counts that lie as far from those expected, or farther: Pearson's chi-square test."""
    square = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    half = torch.tensor([(len(seen) - 1) / 2, square / 2], dtype=torch.double)
    return float(torch.special.gammaincc(*half))


@pytest.mark.parametrize(("held", "fixed"), CASES)
def test_a_path_is_drawn_from_the_steps_product_among_allowed_answers(held, fixed):
    rows = 4000
    canvas = canvas_of(rows, 5, held)
    for place, token in fixed.items():
        canvas.ids[:, 1 + place] = token
    logits = LOGITS.clone()
    logits[:held, EOS] = -torch.inf
    u = torch.rand(rows * (5 - len(fixed)), generator=torch.Generator().manual_seed(0)).double()
    lines, *_ = choose(canvas, logits, u, chooser_of(temperature=1.0))
    check_distribution(lines, enumerated(logits, held, fixed))


def check_distribution(lines, stated):
    drawn = [tuple(line) for line in lines.tolist()]
    assert set(drawn) <= stated.keys(), "an answer is not allowed"
    often = [line for line, mass in stated.items() if mass * len(drawn) >= 5]
    assert set(often) <= set(drawn), "an answer that is allowed is never drawn"
    seen = [drawn.count(line) for line in often]
    mass = [stated[line] * len(drawn) for line in often]
    seen, mass = [*seen, len(drawn) - sum(seen)], [*mass, len(drawn) - sum(mass)]
    if mass[-1] < 5:
        seen[-2:], mass[-2:] = [sum(seen[-2:])], [sum(mass[-2:])]
    assert len(seen) > 1 and chance(seen, mass) > 1e-4


@pytest.mark.parametrize(("held", "fixed"), CASES)
def test_the_greedy_path_is_the_likeliest_answer_and_is_measured_among_what_can_stand(held, fixed):
    canvas = canvas_of(1, 5, held)
    for place, token in fixed.items():
        canvas.ids[:, 1 + place] = token
    logits = LOGITS.clone()
    logits[:held, EOS] = logits[:, MASK] = -torch.inf
    stated = enumerated(logits, held, fixed)
    lines, choice, sure, masked = choose(canvas, logits, None)
    assert tuple(lines[0].tolist()) == max(stated, key=stated.get)
    places = masked[0].nonzero()[:, 0].tolist()
    for place, token, own, given in zip(
        places, choice.tokens.tolist(), choice.logprob, sure.logprob, strict=True
    ):
        there = [*{line[place] for line in stated}]
        alone = logits[place, there].log_softmax(-1)[there.index(token)]
        assert given.item() == pytest.approx(alone.item(), abs=1e-4)
        assert own.item() == pytest.approx(logits[place].log_softmax(-1)[token].item(), abs=1e-4)


@functools.cache
def allowed_answers(room: int) -> list[tuple]:
    return [line for line in itertools.product((A, B, C, BB, EOS), repeat=room) if fits(line, 0)]


def test_filters_choose_among_the_tokens_that_can_stand_at_a_position():
    canvas = canvas_of(50, 5)
    canvas.ids[:, 2] = BB  # so that only a can stand before it
    logits = LOGITS.clone()
    logits[0, A] = -20.0
    logits[2, C] = logits[3, EOS] = logits[4, B] = 9.0
    options = Options(temperature=1.0, filters=(("top_k", 1),))
    chooser = Chooser(options, torch.tensor([MASK]), [], [TopKLogitsWarper(1)])
    lines, *_ = choose(canvas, logits, torch.rand(200).double(), chooser)
    assert lines.unique(dim=0).tolist() == [[A, BB, C, EOS, B]]


def decide(rows: int, seed: int, *, room: int, width: int, greedy: bool, fixed: int = 0) -> list:
    """Answers of canvases that are decided block by block in random order, from new logits at each
    step; some tokens of an allowed answer stand there from the start."""
    g = torch.Generator().manual_seed(seed)
    canvas = canvas_of(rows, room)
    answers = allowed_answers(room) if fixed else []
    for row in range(rows if fixed else 0):
        given = answers[int(torch.randint(len(answers), (), generator=g))]
        for place in torch.randperm(room, generator=g)[:fixed].tolist():
            canvas.ids[row, 1 + place] = given[place]
    own, chooser = Constraint(automaton(), canvas), chooser_of(temperature=float(not greedy))
    for first in range(0, room, width):
        size = min(width, room - first)
        place = slice(1 + first, 1 + first + size)
        while (canvas.ids[:, place] == MASK).any():
            logits = 4 * torch.randn(rows, size, VOCABULARY, generator=g)
            count = int((canvas.ids[:, place] == MASK).sum())
            u = None if greedy else torch.rand(count, generator=g).double()
            lines, *_, masked = choose(canvas, logits, u, chooser, own, size, 1 + first)
            chosen = masked & (torch.rand(rows, size, generator=g) < 0.4)
            chosen[:, 0] |= masked[:, 0]
            canvas.ids[:, place] = torch.where(chosen, lines, canvas.ids[:, place])
    return canvas.ids[:, 1:].tolist()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(("width", "fixed"), [(7, 2), (3, 0)])
def test_no_canvas_ends_in_a_dead_end_in_whatever_order_it_is_decided(greedy, width, fixed):
    check_answers(decide(2500, 1, room=7, width=width, greedy=greedy, fixed=fixed))


def check_answers(lines):
    wrong = [line for line in lines if not fits(line, 0)]
    assert not wrong, f"{len(wrong)} of {len(lines)} answers do not match"


def one_by_one(monkeypatch):
    """Positions are masked each by itself, by what paths through it there are."""

    def paths(lattice, behind, u):
        labels = np.where(lattice.possible(behind), lattice.weights, -np.inf).argmax(2)
        return labels, np.zeros(lattice.inside.shape)

    monkeypatch.setattr(Lattice, "paths", paths)


def end_among_the_tokens(monkeypatch):
    """An end token leads from a final state to itself, as in an index of outlines-core."""
    honest = Automaton.of_edges.__func__

    def of_edges(cls, edges, starts, accepting, vocabulary, **given):
        source, token, target = edges
        accepting = list(accepting)
        edges = (
            np.append(source, accepting), np.append(token, [EOS] * len(accepting)),
            np.append(target, accepting),
        )  # fmt: skip
        return honest(cls, edges, starts, accepting, vocabulary, impossible=given["impossible"])

    monkeypatch.setattr(Automaton, "of_edges", classmethod(of_edges))
    monkeypatch.setattr(Automaton, "can_end", True)


def room_off_by_one(monkeypatch):
    """A block leaves its successors one token more than there is."""
    honest = Automaton.completable

    def completable(self, room, held):
        found = honest(self, room, held)
        return [*found[1:], found[-1]]

    monkeypatch.setattr(Automaton, "completable", completable)


@pytest.mark.parametrize("fault", [one_by_one, end_among_the_tokens, room_off_by_one])
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_answers(decide(300, 1, room=7, width=3, greedy=True))
        lines, *_ = choose(
            canvas_of(1000, 5), LOGITS, torch.rand(5000).double(), chooser_of(temperature=1.0)
        )
        check_distribution(lines, enumerated(LOGITS, 0, {}))


# Models


def small_model():
    """A random model of seven tokens."""
    return build_model("llama", vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None)


def write(prompts, *, spec=None, spans=None, seen=None, **settings) -> Canvas:
    spec = spec or tiny_spec(mask_token_id=MASK)
    settings = {"eos_token_id": [EOS], "max_new_tokens": 6, **settings}
    options = resolve(spec, settings)
    grid = options.block_length if options.mode == "diffusion" and options.block_length else 1
    canvas = Canvas.of_prompts(
        prompts, MASK, max_new_tokens=options.max_new_tokens, grid=grid, end_ids=[EOS],
        min_new_tokens=options.min_new_tokens,
    )  # fmt: skip
    canvas.constraint = Constraint(automaton(), canvas, spans)
    for _ in denoise(small_model(), spec, canvas, options):
        if seen is not None:
            seen.append(canvas.ids.clone())
    return canvas


def written(canvas: Canvas) -> list[tuple]:
    return [tuple(canvas.new_ids(row)) for row in range(len(canvas.ids))]


@functools.cache
def next_logits(ids: tuple) -> torch.Tensor:
    with torch.no_grad():
        return small_model()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def masked_ar(prompt, room: int, held: int = 0, temperature: float = 1.0) -> dict[tuple, float]:
    """Answers of AR decoding whose every token is drawn from the allowed ones, by enumeration."""
    answers = [
        (*itertools.takewhile(lambda token: token != EOS, line), EOS)[:room]
        for line in itertools.product(range(MASK), repeat=room)
        if fits(line, held)
    ]
    found = {}
    for answer in {*answers}:
        mass = 1.0
        for n, token in enumerate(answer):
            logits = next_logits((*prompt, *answer[:n]))
            after = {other[n] for other in answers if other[:n] == answer[:n] and len(other) > n}
            p = (logits / temperature).softmax(-1)
            mass *= float(p[token] / p[sorted(after)].sum())
        found[answer] = mass
    return found


@pytest.mark.parametrize("held", [0, 4])
def test_ar_mode_draws_each_token_from_the_allowed_ones(held):
    rows = 500
    canvas = write(
        [[X, A]] * rows, mode="ar", max_new_tokens=4, min_new_tokens=held, temperature=0.8, seed=1
    )
    check_distribution(torch_like(written(canvas)), masked_ar([X, A], 4, held, 0.8))


def torch_like(lines):
    """Answers of several lengths, as `check_distribution` takes lines of one."""

    class Lines(list):
        def tolist(self):
            return self

    return Lines(lines)


@pytest.mark.parametrize("drafted", ["by the model", "by a fool"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_writes_the_text_of_constrained_ar_mode(temperature, drafted, monkeypatch):
    prompts = [[X, A], [X, B, C], [X, X, A, A], [X]]
    settings = {"temperature": temperature or None, "seed": 3, "max_new_tokens": 11}
    alone = written(write(prompts, mode="ar", **settings))
    if drafted == "by a fool":

        def draft(group, ends, found, after):
            group.trees = [Tree() for _ in group.rows]
            for tree in group.trees:
                for depth, token in enumerate((A, B, C)):
                    tree.add(token, depth - 1, depth + 1, 1.0)
            group.cut()
            group.pace.plan(group.trees, group.drafts)

        monkeypatch.setattr("ar2diff.core.group.Group._draft", draft)
    canvas = write(prompts, mode="speculative", draft_length=3, **settings)
    assert written(canvas) == alone
    assert all(matches([t for t in line if t != EOS]) for line in alone)
    if drafted == "by a fool":
        assert int(canvas.forwards.sum()) < sum(map(len, alone)), "no draft was accepted"


RULES = [
    {"threshold": 0.5}, {"threshold": 0.5, "temperature": 1.0, "seed": 1, "top_k": 2},
    {"steps_per_block": 2, "order": "entropy"}, {"entropy_bound": 0.5},
    {"steps_per_block": 3, "order": "margin", "temperature": 1.0, "seed": 0},
    {"steps_per_block": 3, "order": "random", "seed": 0, "remask": 0.4}, {"cfg_scale": 0.7},
    {"repetition_penalty": 1.8, "min_new_tokens": 5},
]  # fmt: skip


@pytest.mark.parametrize("attention", ["causal_context", "full"])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_every_rule_of_diffusion_keeps_to_the_constraint(settings, attention):
    spec = tiny_spec(attention, mask_token_id=MASK)
    caches = ("none", "prefix", "dual") if attention == "full" else ("dynamic",)
    for cache in caches:
        canvas = write(
            [[X, A], [X, B, C], [X]], spec=spec, mode="diffusion", max_new_tokens=9,
            cache_implementation=cache, **settings,
        )  # fmt: skip
        for line in written(canvas):
            held = settings.get("min_new_tokens", 0)
            assert fits(line, held), f"{line} does not match"


def test_gaps_match_each_by_itself_and_forced_tokens_are_kept():
    prompts = [[X, *[MASK] * 3, B, *[MASK] * 5, X], [X, X, MASK, MASK, MASK, MASK, X, X]]
    canvas = write(prompts, mode="diffusion", max_new_tokens=0)
    first, second = (canvas.ids[row].tolist() for row in range(2))
    assert matches(first[1:4]) and matches(first[5:10]) and matches(second[2:6])
    # One span over given tokens: abbc is all that has b, two tokens on, and c at the end.
    spans = [[Span(1, 5, 4, 0)]]
    canvas = write([[X, MASK, MASK, B, MASK]], mode="diffusion", max_new_tokens=0, spans=spans)
    assert canvas.ids[0].tolist()[1:5] in ([A, B, B, C], [A, BB, B, C])


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([X], {"max_new_tokens": 1}, "the shortest text that matches has 2 tokens"),
        ([X, MASK, X], {"max_new_tokens": 0}, "the shortest text that matches has 2 tokens"),
    ],
)
def test_too_little_room_is_refused_before_a_forward(prompt, settings, says):
    with pytest.raises(Ar2DiffError, match=says):
        write([prompt], mode="diffusion", **settings)
