"""Samplers against their definitions, written out in plain Python."""

import math
from collections import Counter
from copy import deepcopy
from itertools import pairwise, product

import pytest
import torch
from conftest import MASK, build_model, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_likelihood import own_mask, raw_logits
from transformers import GenerationConfig

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.options import resolve
from ar2diff.core.samplers import (
    Choice,
    Chooser,
    commits,
    draw,
    over_threshold,
    quota_of,
    top,
    within_entropy,
)

PROMPT = [1, 17, 42, 5]
WORDS = (0, 1, 2)  # of the model of three words; row 3 is the mask
numbers = st.integers(1, 64).map(lambda n: n / 64)  # sums of them are exact
ragged = st.lists(
    st.lists(st.none() | numbers, min_size=5, max_size=5),
    min_size=1,
    max_size=4,
)  # a value for each masked position, None where a token stands


def tensors(rows, default=0.0):
    masked = torch.tensor([[value is not None for value in row] for row in rows])
    values = [[default if value is None else value for value in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64), masked


def sets(commit):
    return [set(row.nonzero()[:, 0].tolist()) for row in commit]


def known(row):
    return {place: value for place, value in enumerate(row) if value is not None}


def decode(prompts, model=None, spec=None, new=4, grid=None, **kwargs):
    """The canvas after each forward, copied: (ids, step, start)."""
    model, spec = model or build_model("llama"), spec or tiny_spec()
    options = resolve(spec, kwargs)
    canvas = Canvas.of_prompts(
        prompts,
        spec.mask_token_id,
        max_new_tokens=new,
        grid=grid or spec.block_length or 1,
        end_ids=options.eos_token_id,
    )
    states = [canvas.ids.clone()]
    for state in denoise(model, spec, canvas, options):
        states.append(state.ids.clone())
    return canvas, states


# Which positions are decided


@given(ragged, st.integers(-1, 128).map(lambda n: (n + 0.5) / 128))
def test_threshold_takes_all_that_are_surer_and_at_least_one_of_each_row(rows, threshold):
    probability, masked = tensors(rows)
    commit = over_threshold(probability.log(), masked, threshold)
    for row, got in zip(rows, sets(commit), strict=True):
        sure = {i for i, p in known(row).items() if p > threshold}
        if known(row) and not sure:
            assert len(got) == 1 and row[got.pop()] == max(known(row).values())
        else:
            assert got == sure


def test_a_token_as_sure_as_the_threshold_is_not_surer():
    logprob = torch.tensor([[0.5, 1.0], [1.0, 0.5]]).log()
    assert sets(over_threshold(logprob, torch.ones(2, 2).bool(), 0.5)) == [{1}, {0}]


@given(ragged, st.integers(0, 256).map(lambda n: n / 64))
def test_entropy_bound_takes_the_largest_prefix_within_it(rows, bound):
    entropy, masked = tensors(rows)
    for row, got in zip(rows, sets(within_entropy(entropy, masked, bound)), strict=True):
        order = sorted(known(row), key=row.__getitem__)
        sizes = [
            k
            for k in range(1, len(order) + 1)
            if sum(row[i] for i in order[:k]) - max(row[i] for i in order[:k]) <= bound
        ]
        best = max([*sizes, 1]) if order else 0
        values = sorted(row[i] for i in got)
        assert values == pytest.approx(sorted(row[i] for i in order[:best]), abs=1e-9)


@given(ragged, st.data())
def test_top_ranks_within_the_row(rows, data):
    score, masked = tensors(rows)
    counts = [data.draw(st.integers(0, 6)) for _ in rows]
    for row, count, got in zip(
        rows, counts, sets(top(score, masked, torch.tensor(counts))), strict=True
    ):
        ordered = sorted(known(row).values(), reverse=True)
        assert sorted((row[i] for i in got), reverse=True) == ordered[:count]


# Ties


few = st.integers(1, 4).map(lambda n: n / 8)  # many of them alike


@given(
    st.lists(st.lists(st.none() | few, min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.integers(1, 4),
)
def test_rounding_decides_nothing(rows, seed, count):
    """Neither between positions as sure as each other, nor at a threshold or a bound."""
    exact, masked = tensors(rows, 0.5)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed)).double() - 0.5
    noisy, counts = exact + 1e-5 * noise, torch.full((len(rows),), count)
    assert torch.equal(top(noisy, masked, counts), top(exact, masked, counts))
    for bound in (0.125, 0.5):
        assert torch.equal(*(within_entropy(e, masked, bound) for e in (noisy, exact)))
        assert torch.equal(*(over_threshold(p.log(), masked, bound) for p in (noisy, exact)))


def test_ties_go_to_the_earlier_position():
    masked = torch.tensor([[False, True, True, True, True, False, True]])
    score = torch.tensor([[9.0, 0.1, 0.7, 0.7 + 4e-5, 0.7 + 8e-5, 9.0, 0.7 + 3e-4]])
    assert sets(top(score, masked, torch.tensor([2]))) == [{6, 2}]
    assert sets(top(score, masked, torch.tensor([3]))) == [{6, 2, 3}]
    assert sets(within_entropy(-score + 2, masked, 1.0)) == [{6}]
    assert sets(within_entropy(-score + 2, masked, 1.5)) == [{6, 2}]
    assert sets(over_threshold(score - 1, masked, 0.99)) == [{6}]
    assert sets(over_threshold(score[:, :5] - 1, masked[:, :5], 0.99)) == [{2}]


def test_draws_of_a_random_order_never_tie():
    masked = torch.ones(1, 3).bool()
    draws = torch.tensor([[0.5, 0.5 + 1e-9, 0.1]], dtype=torch.float64)
    assert sets(top(draws, masked, torch.tensor([1]), 0.0)) == [{1}]
    chooser = Chooser(resolve(tiny_spec(), {"steps_per_block": 3, "order": "random"}), None, [])
    chooser.uniform = lambda rows: draws[0]
    choice = Choice(torch.zeros(3), torch.zeros(3))
    commit = commits(chooser.options, choice, masked, torch.tensor([1]), chooser, torch.tensor([0]))
    assert sets(commit) == [{1}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equally_likely_tokens_go_to_the_lowest_id(dtype):
    logits = torch.zeros(3, 200, dtype=dtype)
    logits[0, [41, 77, 150]], logits[1, 199] = 2.0, 1.0
    chooser = Chooser(resolve(tiny_spec(), {}), None, [])
    assert chooser.choose(logits, torch.zeros(3).long()).tokens.tolist() == [41, 199, 0]


@given(st.integers(1, 40), st.integers(1, 40))
def test_quotas_are_those_of_llada_and_sum_to_n(n, steps):
    left, quotas = n, []
    while left:
        quota = quota_of(
            *(torch.tensor([x]) for x in (n,)),
            steps,
            *(torch.tensor([x]) for x in (len(quotas), left)),
        )
        quotas.append(int(quota))
        left -= quotas[-1]
    want = [n // steps + (step < n % steps) for step in range(steps)]
    assert quotas == [q for q in want if q]
    assert len(quotas) == min(steps, n)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_a_block_takes_exactly_its_steps(steps):
    for prompt, blocks in ((PROMPT, [4, 4, 4]), (PROMPT[:3], [1, 4, 4, 4])):
        canvas, _ = decode([prompt], new=sum(blocks), steps_per_block=steps)
        assert int(canvas.forwards) == sum(min(steps, size) for size in blocks)


# Orders, against the distributions of raw forwards


def distributions(ids, row, span=range(4, 8), temperature=1.0):
    """Log-probabilities [positions, V] of a block of causal_context, read with shift."""
    logits = raw_logits(
        build_model("llama"), ids[row : row + 1], own_mask(8, 4, "causal_context", 4)
    )
    logits = logits[0, [i - 1 for i in span]]
    logits[:, MASK] = -math.inf
    return (logits / temperature).log_softmax(-1)


def scores_of(order, logp):
    p = logp.exp()
    if order == "margin":
        best = p.sort(-1, descending=True).values
        return best[:, 0] - best[:, 1]
    if order == "entropy":
        return (p * logp.clamp(min=-1e9)).sum(-1)
    return p.max(-1).values


@pytest.mark.parametrize("order", ["prob", "margin", "entropy"])
def test_orders_take_the_best_of_each_row_of_the_models_own_distribution(order):
    prompts = [[1, a, b, 5] for a, b in product((17, 33, 9), (42, 7))]
    canvas, states = decode(prompts, steps_per_block=2, order=order)
    for row in range(len(prompts)):
        logp = distributions(states[0], row)
        best = scores_of(order, logp).topk(2).indices + 4
        decided = (states[1][row] != MASK).nonzero()[:, 0][4:]
        assert decided.tolist() == sorted(best.tolist())
        assert states[1][row, decided].tolist() == logp.argmax(-1)[decided - 4].tolist()
        torch.testing.assert_close(
            canvas.logprob[row, decided], logp.max(-1).values[decided - 4].float()
        )
    orders = [
        tuple(sorted(scores_of(o, distributions(states[0], r)).topk(2).indices.tolist()))
        for o in ("prob", "margin", "entropy")
        for r in range(len(prompts))
    ]
    assert len(set(orders)) > 3


def test_the_orders_are_not_all_alike():
    prompts = [[1, a, b, 5] for a, b in product((17, 33, 9), (42, 7))]
    _, states = decode(prompts, steps_per_block=4)
    best = {
        order: [int(scores_of(order, distributions(states[0], row)).argmax()) for row in range(6)]
        for order in ("prob", "margin", "entropy")
    }
    assert best["prob"] != best["entropy"] != best["margin"]


def test_random_order_takes_every_set_equally_often():
    prompts, rows = [PROMPT] * 600, range(600)
    _, states = decode(prompts, steps_per_block=2, order="random", seed=0)
    counts = Counter(tuple((states[1][row, 4:] != MASK).nonzero()[:, 0].tolist()) for row in rows)
    assert len(counts) == 6
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 25.7  # chi-square, 5 df, p = 1e-4


@pytest.mark.parametrize(("threshold", "most"), [(0.02, 4), (0.99, 2)])
def test_threshold_or_quota_takes_the_sure_ones_if_they_are_enough(threshold, most):
    _, states = decode([PROMPT], steps_per_block=2, threshold=threshold)
    p = distributions(states[0], 0).max(-1).values.exp()
    sure = (p > threshold).nonzero()[:, 0]
    want = sure if len(sure) >= 2 else p.topk(2).indices
    decided = (states[1][0, 4:] != MASK).nonzero()[:, 0]
    assert decided.tolist() == sorted(want.tolist()) and len(decided) == most


@pytest.mark.parametrize("sure", [1, 2, 3])
def test_threshold_or_quota_is_never_both(sure):
    """In an order by other than probability the two sets differ."""
    prompts = [PROMPT] * 20
    p = distributions(decode([PROMPT], steps_per_block=2)[1][0], 0).max(-1).values.exp()
    threshold = float(p.sort(descending=True).values[sure - 1 : sure + 1].mean())
    _, states = decode(prompts, steps_per_block=2, order="random", threshold=threshold, seed=0)
    decided = sets(states[1][:, 4:] != MASK)
    if sure < 2:
        assert {len(places) for places in decided} == {2} and len(set(map(tuple, decided))) > 2
    else:
        assert all(places == set(p.topk(sure).indices.tolist()) for places in decided)


@pytest.mark.parametrize("bound", [0.0, 2.0, 4.5, 100.0])
def test_the_entropy_bound_reads_the_models_own_entropy(bound):
    _, states = decode([PROMPT], entropy_bound=bound, temperature=0.01, seed=0)
    logp = distributions(states[0], 0)
    entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
    order = entropy.argsort()
    count = max(k for k in range(1, 5) if k == 1 or entropy[order[: k - 1]].sum() <= bound)
    decided = (states[1][0, 4:] != MASK).nonzero()[:, 0]
    assert decided.tolist() == sorted(order[:count].tolist())


@pytest.mark.parametrize("temperature", [0.05, 3.0])
def test_confidence_is_of_the_untempered_unfiltered_distribution(temperature):
    canvas, states = decode([PROMPT], threshold=0.3, temperature=temperature, top_k=5, seed=3)
    logp, new = distributions(states[0], 0), states[1][0, 4:]
    decided = (new != MASK).nonzero()[:, 0]
    torch.testing.assert_close(canvas.logprob[0, decided + 4], logp[decided, new[decided]].float())
    p = logp[decided, new[decided]].exp()
    assert len(decided) == 1 or bool((p > 0.3).all())


def test_tempering_and_filters_decide_no_more_tokens_at_a_step():
    """Nearly greedy draws: the tokens are the same ones, and so must their number be."""
    _, plain = decode([PROMPT], threshold=0.2)
    _, tempered = decode([PROMPT], threshold=0.2, temperature=1e-3, top_k=1, seed=0)
    assert len(plain) > 2
    assert [s.tolist() for s in plain] == [s.tolist() for s in tempered]


# Remask


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("remask", [0.3, 0.5, 1.0])
def test_remask_gives_back_the_least_sure_and_still_ends_in_its_steps(steps, remask):
    spec = tiny_spec(block_length=8)
    canvas, states = decode(
        [PROMPT], spec=spec, new=12, grid=8, steps_per_block=steps, remask=remask
    )
    sizes = [4, 8]
    assert int(canvas.forwards) == sum(min(steps, size) for size in sizes)
    assert not (states[-1] == MASK).any()
    decided = [int((s != MASK).sum()) for s in states]
    counts = pairwise(decided)
    for size in sizes:
        open_ = size
        for step in range(min(steps, size)):
            planned = sum(size // steps + (s < size % steps) for s in range(step + 1))
            back = 0 if planned == size else math.floor(remask * planned)
            before, after = next(counts)
            assert size - (open_ := open_ - (after - before)) == planned - back
    assert torch.equal(states[-1][0, :4], torch.tensor(PROMPT))


def test_remask_gives_back_by_the_probability_at_which_a_token_was_decided():
    _, states = decode([PROMPT], steps_per_block=3, remask=0.5)
    logp = distributions(states[0], 0)
    surest = logp.max(-1).values.topk(2).indices  # 4 tokens in 3 steps: 2, and 1 goes back
    assert (states[1][0, 4:] != MASK).nonzero()[:, 0].tolist() == [int(surest[0])]


# Tokens


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda p: sum(p) > 0.01))
def test_draw_inverts_the_cumulative_distribution(weights):
    grid = 1000
    u = (torch.arange(grid) + 0.5) / grid
    p = torch.tensor([weights], dtype=torch.float64)
    counts = draw(p.repeat(grid, 1), u.double()).bincount(minlength=len(weights))
    for weight, count in zip(weights, counts.tolist(), strict=True):
        assert count / grid == pytest.approx(weight / sum(weights), abs=1.5 / grid)
        assert weight > 0 or count == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_draw_takes_a_possible_token_at_both_ends(u):
    p = torch.tensor([[0.0, 0.3, 0.7, 0.0]], dtype=torch.float32)
    assert draw(p, torch.tensor([u], dtype=torch.float64)).tolist() == [1 if u == 0 else 2]


FILTERS = {
    "top_h": 0.4,
    "top_k": 7,
    "top_p": 0.6,
    "min_p": 0.1,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.03,
    "eta_cutoff": 0.03,
}


@pytest.fixture
def scored(monkeypatch):
    """What the choosers choose from: (possible logits, context, scores) of each call."""
    seen = []
    original = Chooser.warp

    def warp(self, logits, context):
        scores = original(self, logits, context)
        seen.append((logits.clone(), None if context is None else context.ids.clone(), scores))
        return scores

    monkeypatch.setattr(Chooser, "warp", warp)
    return seen


def transformers_pipeline(kwargs):
    """What transformers itself makes of the same options, in its own order."""
    config = GenerationConfig(do_sample="temperature" in kwargs, **kwargs)
    return build_model("llama")._get_logits_processor(config, input_ids_seq_length=4, device="cpu")


@pytest.mark.parametrize(
    "kwargs",
    [{"temperature": 0.7, name: value} for name, value in FILTERS.items()]
    + [
        {"temperature": 1.3, "repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"temperature": 0.7, "sequence_bias": [[[17], 2.5], [[9], -4.0]]},
        {"sequence_bias": [[[17], 2.5], [[9], -4.0]], "repetition_penalty": 1.8},
        {"temperature": 0.9, "repetition_penalty": 1.2} | FILTERS,
        {"temperature": 2.0, "top_h": 0.4, "top_k": 40, "top_p": 0.9},
    ],
    ids=lambda kwargs: "+".join(kwargs),
)
def test_scores_are_those_of_transformers_at_each_position_alone(scored, kwargs):
    given_ids = [[1, 17, 42, 5, 9], [1, 17], [1, 9, 9, 33, 60, 21]]
    decode(given_ids, new=5, steps_per_block=2, seed=0, **kwargs)
    pipeline = transformers_pipeline(kwargs)
    assert len(scored) > 2
    for logits, context, scores in scored:
        if "repetition_penalty" in kwargs:
            assert len(context) == len(logits)
        for n, row in enumerate(logits):
            ids = torch.tensor([[0]]) if context is None else context[n : n + 1]
            torch.testing.assert_close(scores[n], pipeline(ids, row[None].clone())[0])


def test_the_repetition_penalty_reads_the_rows_own_decided_tokens(scored):
    given_ids = [[1, 17, 42, 5, 9], [1, 9, 9, 33]]
    _, states = decode(given_ids, new=4, steps_per_block=4, repetition_penalty=2.0)
    for (_, context, _), state in zip(scored, states, strict=False):
        rows = [row for row in context if int(row[1]) == 17]
        for row in rows:
            assert set(row.tolist()) - {MASK} == set(state[0].tolist()) - {MASK}


def test_suppressed_ids_are_never_chosen():
    allowed = [9, 33, 60]
    suppressed = [i for i in range(64) if i not in allowed]
    prompts = [[1, a] for a in range(20)]
    for kwargs in ({"temperature": 5.0, "seed": 0}, {"steps_per_block": 1}, {"cfg_scale": 2.0}):
        canvas, _ = decode(prompts, new=6, suppress_tokens=suppressed, **kwargs)
        assert set(canvas.ids[:, 2:8].flatten().tolist()) <= set(allowed)


def test_the_mask_is_never_chosen_where_the_model_likes_it_best():
    model = deepcopy(build_model("llama"))
    model.lm_head.weight.data[MASK] = 100 * model.lm_head.weight.data.abs().max()
    model.lm_head.weight.data[MASK, ::2] *= -1
    for kwargs in ({"temperature": 1.0, "seed": 0}, {"steps_per_block": 2}, {"entropy_bound": 1.0}):
        canvas, _ = decode([[1, a] for a in range(3, 15)], model, new=6, **kwargs)
        assert bool((canvas.end > 0).all()) and not (canvas.ids[:, :8] == MASK).any()


# The ancestral sampler, enumerated


def three_words():
    return build_model("llama", vocab_size=4, initializer_range=0.15, hidden_size=32)


def conditional(ids, position):
    """[3] probabilities of a `full` model of three words, read in place."""
    logits = raw_logits(three_words(), torch.tensor([ids]), torch.ones(len(ids), len(ids)).bool())
    return logits[0, position, :3].softmax(-1).tolist()


def ancestral(positions):
    """{words: probability}: one position after another, in an order drawn uniformly."""
    result = Counter()

    def go_on(ids, left, weight):
        if not left:
            result[tuple(ids[1:])] += weight
            return
        for position in left:
            for word, p in zip(WORDS, conditional(ids, position), strict=True):
                rest = [i for i in left if i != position]
                go_on([*ids[:position], word, *ids[position + 1 :]], rest, weight * p / len(left))

    go_on([0] + [3] * positions, list(range(1, positions + 1)), 1.0)
    return result


def sample(rows, positions, seed=0, **kwargs):
    spec = tiny_spec("full", prediction="same", mask_token_id=3)
    canvas, _ = decode([[0]] * rows, three_words(), spec, new=positions, seed=seed, **kwargs)
    return Counter(map(tuple, canvas.ids[:, 1:].tolist()))


def chi_square(counts, want):
    total = sum(counts.values())
    assert set(counts) <= set(want) and sum(want.values()) == pytest.approx(1)
    return sum((counts[w] - total * p) ** 2 / (total * p) for w, p in want.items())


RANDOM = {"order": "random", "temperature": 1.0}


def test_random_order_one_by_one_is_the_ancestral_sampler():
    rows = 8_000
    want = ancestral(3)
    assert chi_square(sample(rows, 3, steps_per_block=3, **RANDOM), want) < 62  # 26 df, p = 1e-4
    for wrong in (
        {"order": "prob", "temperature": 1.0, "steps_per_block": 3},
        {**RANDOM, "steps_per_block": 1},
    ):
        assert chi_square(sample(rows, 3, **wrong), want) > 100


def test_random_order_over_a_grid_of_draws_is_the_ancestral_sampler(monkeypatch):
    """Two positions: every draw that there is, in place of random ones."""
    cells = 16
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    # the first forward: two tokens, two places in the order; the second: one of each
    order = torch.tensor([[0.2, 0.7], [0.7, 0.2]], dtype=torch.float64)
    grid = torch.cartesian_prod(centres, centres, centres)
    rows = 2 * len(grid)
    first = torch.cat([grid[:, :2], grid[:, :2]])
    turn = order.repeat_interleave(len(grid), 0)
    second = torch.cat([grid[:, 2], grid[:, 2]])
    calls = iter([first.flatten(), turn.flatten(), second, torch.full((rows,), 0.5).double()])
    monkeypatch.setattr(Chooser, "uniform", lambda self, row: next(calls))
    counts = sample(rows, 2, steps_per_block=2, **RANDOM)
    for words, p in ancestral(2).items():
        assert counts[words] / rows == pytest.approx(p, abs=2 / cells)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 5))
def test_a_row_draws_the_same_whatever_batch_it_is_in(seed, others):
    batch = [[1, other + 20] for other in range(others)]
    alone, _ = decode([PROMPT], new=4, temperature=1.0, seed=seed)
    together, _ = decode([*batch, PROMPT], new=4, temperature=1.0, seed=seed)
    assert together.new_ids(others) == alone.new_ids(0)


# Options


def test_blocks_shorter_than_the_trained_ones_are_warned_of():
    with pytest.warns(
        UserWarning, match="block_length 2 is below the 4 that the model was trained with"
    ):
        assert resolve(tiny_spec(), {"block_length": 2}).block_length == 2


def test_a_generation_config_of_another_kind_is_refused():
    with pytest.raises(Ar2DiffError, match="generation_config is of type str"):
        resolve(tiny_spec(), {}, ["greedy"])
