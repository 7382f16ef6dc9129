"""Decoding: a batch is each row alone, where an answer ends, what is never written."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import CLASSES, MASK, build_model, tiny_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_likelihood import own_mask, raw_logits

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.options import resolve

PROMPT = [1, 17, 42, 5, 9]
EVERY_ATTENTION = ("causal_context", "block_causal", "full")


def run(prompts, attention="causal_context", prediction="shift", kind="llama", **kwargs):
    """The states of a decoding: a canvas, and its ids after each forward."""
    model, spec = build_model(kind), tiny_spec(attention, 4, prediction)
    finished = kwargs.pop("finished", None)
    options = resolve(spec, kwargs)
    blockwise = options.mode == "diffusion" and attention != "full"
    canvas = Canvas.of_prompts(
        prompts,
        MASK,
        max_new_tokens=options.max_new_tokens,
        grid=options.block_length if blockwise else 1,
        end_ids=options.eos_token_id,
        min_new_tokens=min(options.min_new_tokens, options.max_new_tokens),
    )
    states = [canvas.ids.clone()]
    for state in denoise(model, spec, canvas, options, finished=finished):
        states.append(state.ids.clone())
    return canvas, states


def answers(canvas):
    """Each row as it came out, its filled prompt included."""
    return [canvas.ids[row, : int(canvas.end[row])].tolist() for row in range(len(canvas.ids))]


def first_end(row, start, ends):
    return next((i + 1 for i in range(start, len(row)) if row[i] in ends), len(row))


# A batch is each row alone


@st.composite
def prompts_of(draw, gaps):
    length = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12]))
    ids = draw(st.lists(st.integers(3, MASK - 1), min_size=length, max_size=length))
    if gaps and draw(st.booleans()):
        for place in draw(st.sets(st.integers(1, length), max_size=4)):
            ids[place % length] = MASK
    ids[0] = 1
    return ids


RULES = [
    {},
    {"threshold": 0.05},
    {"threshold": 0.2},
    {"steps_per_block": 1},
    {"steps_per_block": 3},
    {"steps_per_block": 3, "threshold": 0.1},
    {"steps_per_block": 2, "order": "margin"},
    {"steps_per_block": 3, "order": "entropy"},
    {"steps_per_block": 3, "order": "random"},
    {"steps_per_block": 3, "remask": 0.5},
    {"steps_per_block": 2, "remask": 0.7, "order": "random"},
    {"entropy_bound": 0.5},
    {"entropy_bound": 4.0},
]
WARPS = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 8},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.6},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.4, "temperature": 1.0},
]


@st.composite
def calls(draw):
    attention = draw(st.sampled_from(EVERY_ATTENTION))
    mode = "diffusion"
    if attention == "causal_context":
        mode = draw(st.sampled_from(["diffusion", "diffusion", "speculative", "ar"]))
    kwargs = {
        "attention": attention,
        "prediction": draw(st.sampled_from(["same", "shift"])),
        "kind": draw(st.sampled_from(CLASSES)),
        "mode": mode,
        "max_new_tokens": draw(st.integers(0, 9)),
        "min_new_tokens": draw(st.sampled_from([0, 0, 3])),
        "eos_token_id": draw(st.sets(st.integers(3, MASK - 1), max_size=12).map(sorted)),
        "seed": draw(st.integers(0, 9)),
        **draw(st.sampled_from(WARPS)),
    }
    caches = ["dynamic", "static", "none"] if attention != "full" else ["none", "prefix", "dual"]
    kwargs["cache_implementation"] = draw(st.sampled_from(caches))
    if mode == "diffusion":
        kwargs |= draw(st.sampled_from(RULES))
        kwargs["block_length"] = draw(st.sampled_from([None, 3, 4]))
        kwargs["cfg_scale"] = draw(st.sampled_from([0.0, 0.0, 1.5]))
    elif mode == "speculative":
        kwargs["draft_length"] = draw(st.sampled_from([1, 2, 3]))  # None: depends on the machine
    gaps = mode == "diffusion"
    prompts = draw(st.lists(prompts_of(gaps), min_size=1, max_size=6, unique_by=tuple))
    return prompts, kwargs


def assert_a_batch_is_each_row_alone(prompts, kwargs):
    together, _ = run(prompts, **kwargs)
    assert bool(together.done.all())
    for row, prompt in enumerate(prompts):
        alone, _ = run([prompt], **kwargs)
        end = int(alone.end)
        assert answers(together)[row] == answers(alone)[0]
        assert int(together.forwards[row]) == int(alone.forwards)
        assert together.step[row, :end].tolist() == alone.step[0, :end].tolist()
        torch.testing.assert_close(together.logprob[row, :end], alone.logprob[0, :end])


BEYOND = {"kind": "gpt2", "mode": "speculative", "max_new_tokens": 4, "draft_length": 3}


@settings(max_examples=50, deadline=None)
@given(calls())
# The first row ends with candidates beyond the canvas, and the others go on.
@example(([[1], [1, 3], [1, 8, 28]], {**BEYOND, "repetition_penalty": 1.7, "eos_token_id": []}))
def test_a_batch_is_each_row_alone(call):
    assert_a_batch_is_each_row_alone(*call)


@pytest.mark.parametrize(
    "rule", [*RULES[-2:], {"steps_per_block": 3, "order": "entropy", "cfg_scale": 1.5}]
)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_positions_that_read_masks_alone_are_decided_alike_in_every_batch(prediction, rule):
    """They tie: with windows of 3, rounding alone tells the middle ones of nine from each other."""
    kwargs = {"attention": "full", "prediction": prediction, "kind": "mistral_window", **rule}
    assert_a_batch_is_each_row_alone([[1], [1, 3]], {**kwargs, "max_new_tokens": 9})


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(calls())
def test_a_batch_is_each_row_alone_many_times(call):
    assert_a_batch_is_each_row_alone(*call)


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_equal_prompts_get_other_draws_and_the_same_seed_the_same(mode):
    kwargs = {"mode": mode, "temperature": 1.0, "max_new_tokens": 8, "eos_token_id": []}
    one, two, other = (
        answers(run([PROMPT, PROMPT, PROMPT[:3]], seed=seed, **kwargs)[0]) for seed in (5, 5, 6)
    )
    assert one == two
    assert len({*map(tuple, one[:2]), *map(tuple, other[:2])}) == 4
    assert one[2] != other[2]


def test_a_seed_for_each_row_is_the_rows_own():
    kwargs = {"temperature": 1.0, "max_new_tokens": 8}
    together = answers(run([PROMPT, PROMPT, PROMPT], seed=(4, 9, 4), **kwargs)[0])
    assert together[0] == together[2] != together[1]
    assert together[1] == answers(run([PROMPT], seed=(9,), **kwargs)[0])[0]


def test_without_a_seed_torch_decides():
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(answers(run([PROMPT], temperature=1.0, max_new_tokens=8)[0]))
    assert texts[0] == texts[1] != texts[2]


# Where an answer ends


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_an_answer_ends_with_its_first_end_token(mode):
    prompts = [[1, a, b] for a in (9, 33, 17) for b in (4, 5, 6, 7)]
    kwargs = {"mode": mode, "max_new_tokens": 12, "block_length": 1}  # from left to right
    free = answers(run(prompts, **kwargs)[0])
    ends = [word for word, _ in Counter(w for row in free for w in row[4:9]).most_common(3)]
    canvas, _ = run(prompts, eos_token_id=ends, **kwargs)
    early = 0
    for row, got in enumerate(answers(canvas)):
        assert got == free[row][: first_end(free[row], 3, ends)]
        assert canvas.new_ids(row) == got[3:]
        early += len(got) < 15
    assert early > 3


@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_an_end_token_stops_a_row_once_all_before_it_is_decided_and_not_before(attention):
    ends = range(3, 40)
    ahead, stopped = 0, 0
    prompts = [[1, a, 9][: 1 + a % 3] for a in range(3, 15)]
    canvas, states = run(
        prompts,
        attention,
        steps_per_block=8,
        max_new_tokens=12,
        eos_token_id=ends,
        block_length=None,
    )
    for row, prompt in enumerate(prompts):
        start, total = len(prompt), len(prompt) + 12
        last = int(canvas.forwards[row])
        for number, state in enumerate(states[: last + 1]):
            decided = state[row, :total].tolist()
            decided = decided[: decided.index(MASK)] if MASK in decided else decided
            over = any(word in ends for word in decided[start:]) or len(decided) == total
            assert over == (number == last)
            seen = any(word in ends for word in state[row, start:total].tolist())
            ahead += seen and not over
        got = canvas.ids[row, : int(canvas.end[row])].tolist()
        assert len(got) == first_end(canvas.ids[row, :total].tolist(), start, ends)
        stopped += len(got) < total
    assert ahead > 2 and stopped > 2


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_no_end_token_comes_before_min_new_tokens(mode):
    ends = list(range(3, 50))
    kwargs = {"mode": mode, "max_new_tokens": 9, "eos_token_id": ends, "temperature": 1.0}
    canvas, _ = run([[1, a] for a in range(3, 23)], min_new_tokens=5, seed=0, **kwargs)
    lengths = [len(row) - 2 for row in answers(canvas)]
    assert min(lengths) == 6  # five tokens that are no end, and it
    assert all(set(row[2:7]).isdisjoint(ends) for row in answers(canvas))
    canvas, _ = run([[1, 3]] * 10, min_new_tokens=99, seed=0, **kwargs)
    assert {len(row) for row in answers(canvas)} == {11}


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
@pytest.mark.parametrize("new", [0, 1, 3, 4, 5, 8])
def test_every_row_gets_exactly_max_new_tokens_without_an_end(mode, new):
    prompts = [PROMPT[:n] for n in (1, 2, 3, 4, 5)]
    canvas, _ = run(prompts, mode=mode, max_new_tokens=new)
    assert [len(row) for row in answers(canvas)] == [len(prompt) + new for prompt in prompts]
    assert not any(MASK in row for row in answers(canvas))
    for row, prompt in zip(answers(canvas), prompts, strict=True):
        assert row[: len(prompt)] == prompt


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_more_reasons_to_stop_are_asked_once_for_each_new_token_in_turn(mode):
    prompts = [PROMPT, PROMPT[:2]]
    free = answers(run(prompts, mode=mode, max_new_tokens=10)[0])
    asked = [[], []]

    def finished(row, ids):
        asked[row].append(ids.tolist())
        return len(ids) == len(prompts[row]) + 6

    canvas, _ = run(prompts, mode=mode, max_new_tokens=10, finished=finished)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        assert asked[row] == [free[row][:end] for end in range(n + 1, n + 7)]
        assert answers(canvas)[row] == free[row][: n + 6]


# Gaps


GAPS = [
    [1, MASK, 42, 5, MASK, MASK, 9, 12, 30, 31, MASK],
    [1, 17, MASK],
    [1, MASK, MASK, MASK, MASK, MASK, 7],
    [1, 2, 3],
]


@pytest.mark.parametrize(
    "rule", [{}, {"steps_per_block": 2, "remask": 0.5}, {"entropy_bound": 1.0}]
)
@pytest.mark.parametrize("new", [0, 5])
@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_gaps_are_filled_without_an_end_and_fixed_tokens_stay(attention, new, rule):
    ends = list(range(4, 50))
    canvas, states = run(
        GAPS, attention, max_new_tokens=new, eos_token_id=ends, temperature=2.0, seed=0, **rule
    )
    assert bool(canvas.done.all())
    for row, prompt in enumerate(GAPS):
        gaps = [place for place, word in enumerate(prompt) if word == MASK]
        for state in states:
            fixed = [i for i in range(len(prompt)) if i not in gaps]
            assert state[row, fixed].tolist() == [prompt[i] for i in fixed]
        filled = canvas.ids[row, gaps].tolist()
        assert MASK not in filled and not set(filled) & set(ends)
        assert len(canvas.new_ids(row)) <= new


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
def test_an_end_token_among_the_given_ones_ends_nothing(cached):
    canvas, _ = run(
        [[1, 2, MASK, 2, 2]],
        max_new_tokens=4,
        eos_token_id=[2],
        suppress_tokens=[2],
        cache_implementation=cached,
    )
    assert canvas.end.tolist() == [9]


def test_a_full_model_reads_what_stands_behind_a_gap_and_a_block_model_does_not():
    """... in a later block."""
    one, two = [1, 17, MASK, 5, 9, 12], [1, 17, MASK, 5, 33, 40]
    kwargs = {"max_new_tokens": 0, "steps_per_block": 1}
    for attention, reads in (("full", True), ("block_causal", False), ("causal_context", False)):
        values = [float(run([row], attention, **kwargs)[0].logprob[0, 2]) for row in (one, two)]
        assert (values[0] != values[1]) == reads


def test_the_answer_does_not_depend_on_how_far_the_canvas_is_filled():
    """A grid of 4 denoises 3, 2, 1 or 0 tokens behind the answer; all of them are cut."""
    longest = answers(run([PROMPT], max_new_tokens=7)[0])[0]
    for new in (4, 5, 6):
        assert answers(run([PROMPT], max_new_tokens=new)[0])[0] == longest[: 5 + new]


# Guidance


def test_guidance_of_scale_w_is_the_extrapolation_from_the_blanked_prompt():
    model, mask = build_model("llama"), own_mask(8, 4, "causal_context", 4)
    ids = torch.tensor([[1, 17, 42, 5, *[MASK] * 4], [1, *[MASK] * 7]])
    conditional, unconditional = raw_logits(model, ids, mask)[:, 3:7]
    logits = unconditional + 2.5 * (conditional - unconditional)
    logits[:, MASK] = float("-inf")
    canvas, _ = run([[1, 17, 42, 5]], max_new_tokens=4, steps_per_block=1, cfg_scale=1.5)
    assert canvas.ids[0, 4:].tolist() == logits.argmax(-1).tolist()
    want = logits.log_softmax(-1).max(-1).values.float()
    torch.testing.assert_close(canvas.logprob[0, 4:], want)


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
def test_guided_rows_keep_to_their_own_prompts(cached):
    kwargs = {"max_new_tokens": 9, "cfg_scale": 2.0, "cache_implementation": cached}
    prompts = [PROMPT, PROMPT[:2], [1, 33, 9, 40]]
    want = [answers(run([prompt], **kwargs)[0])[0] for prompt in prompts]
    assert answers(run(prompts, **kwargs)[0]) == want


@pytest.mark.parametrize("attention", EVERY_ATTENTION)
def test_an_end_token_that_is_given_back_ends_nothing_and_takes_no_more_steps(attention):
    prompts = [[1, a, b, 5] for a in range(3, 18) for b in (17, 33)]
    ends = list(range(3, 14))
    lost = []
    for steps in (2, 3, 4):
        kwargs = {
            "steps_per_block": steps,
            "remask": 0.7,
            "order": "random",
            "temperature": 2.0,
            "seed": 0,
        }
        canvas, states = run(prompts, attention, max_new_tokens=8, eos_token_id=ends, **kwargs)
        most = min(steps, 8) if attention == "full" else 2 * min(steps, 4)
        assert int(canvas.forwards.max()) <= most
        for row, got in enumerate(answers(canvas)):
            assert len(got) == first_end(canvas.ids[row, :12].tolist(), 4, ends)
            assert MASK not in got
        for one, two in pairwise(states):
            back = (one[:, :12] != MASK) & (two[:, :12] == MASK)
            lost += [word for word in one[:, :12][back].tolist() if word in ends]
    assert lost
