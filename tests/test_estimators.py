"""Estimators against raw forwards under masks written here, over all masks and all orders."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations, product

import pytest
import torch
from conftest import MASK, build_model, tiny_spec
from test_likelihood import own_mask, raw_logits

from ar2diff.config.rl import Rl
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.options import resolve
from ar2diff.training import estimators
from ar2diff.training.estimators import score, views
from ar2diff.training.rollouts import Rollout, of_canvas

BLOCK = 4
BLOCKWISE = ("causal_context", "block_causal")
ATTENTIONS = (*BLOCKWISE, "full")
PREDICTIONS = ("same", "shift")
PAIRED = ("coupled", "elbo", "spg")
SUPPRESSED = torch.arange(64) == MASK
EXACT = {"rel": 0, "abs": 1e-10}
# Six tokens of prompt, seven of answer (2, 4 and 1 of their blocks), behind it one and two masks.
IDS = [1, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 25, 2, 45, MASK, MASK]
PROMPT, ANSWER = 6, 7


def rollout_of(ids=IDS, prompt=PROMPT, answer=ANSWER, seed=5, step=None):
    ids = torch.tensor(ids)
    return Rollout(ids, prompt, answer, torch.zeros_like(ids) if step is None else step, seed)


def recipe_of(estimator, **settings):
    return Rl(estimator=estimator, **settings)


def scored(spec, rl, rollouts, model=None, **settings):
    with torch.no_grad():
        return score(model or build_model("llama"), rollouts, rl, spec, SUPPRESSED, **settings)


def answer_of(rollout):
    return range(rollout.prompt, rollout.prompt + rollout.answer)


def spans(spec, length):
    size = spec.block_length or length
    return [(start, start + size) for start in range(0, length, size)]


# The oracle: a forward of [clean | noisy block] for each block


def own_logp(model, spec, rollout, masked, temperature=1.0, words=MASK):
    """{position: log p} of the answer's tokens among `masked`, a list of positions."""
    ids, found, back = rollout.ids, {}, int(spec.prediction == "shift")
    for start, end in spans(spec, len(ids)):
        here = [i for i in masked if start <= i < end]
        wanted = [i for i in here if i in answer_of(rollout)]
        if not wanted:
            continue
        row = ids[:end].clone()
        row[here] = MASK
        logits = raw_logits(model, row[None], own_mask(end, start, spec.attention, BLOCK))[0]
        logp = (logits[:, :words] / temperature).log_softmax(-1)
        found |= {i: float(logp[i - back, ids[i]]) for i in wanted}
    return found


def found_in(scores, rollout, row=0):
    """{(view, position): log p} of a row."""
    columns = (scores.row, scores.view, scores.place, scores.logp)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(view, place + rollout.prompt): logp for r, view, place, logp in rows if r == row}


def own_weight(estimator, masked, spec, samples):
    """{(view, position): weight} from the masks alone."""
    found, extra = {}, int(estimator != "coupled")
    for view, where in enumerate(masked):
        for start, end in spans(spec, len(IDS)):
            block = [i for i in range(start, end) if PROMPT <= i < PROMPT + ANSWER]
            here = [i for i in block if where[i]]
            for i in here:
                found[view, i] = (len(block) + extra) / len(here) / (2 * samples)
                if estimator == "coupled" and view == 0:
                    found[view, i] = 0.5
    return found


# Each view


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("estimator", ["one_step", *PAIRED])
def test_each_view_is_a_raw_forward_of_its_mask(estimator, attention, prediction):
    model, spec, rollout = (
        build_model("llama"),
        tiny_spec(attention, BLOCK, prediction),
        rollout_of(),
    )
    samples = 2 if estimator in PAIRED else 1
    rl = recipe_of(estimator, samples=samples)
    masked, _ = views(rollout, rl, spec)
    got, want = found_in(scored(spec, rl, [rollout]), rollout), {}
    for view, where in enumerate(masked):
        own = own_logp(model, spec, rollout, where.nonzero()[:, 0].tolist())
        want |= {(view, i): logp for i, logp in own.items()}
    assert len(want) >= ANSWER * samples
    assert got == pytest.approx(want, **EXACT)


@pytest.mark.parametrize("kind", ["gpt2", "mistral_window"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_views_are_raw_forwards_of_other_classes(kind, attention):
    window = 3 if kind == "mistral_window" else None
    model, rollout = build_model(kind), rollout_of()
    spec = replace(tiny_spec(attention, BLOCK), local_window="kept" if window else None)
    got = found_in(scored(spec, recipe_of("one_step"), [rollout], model), rollout)
    for start, end in spans(spec, len(IDS)):
        row = rollout.ids[:end].clone()
        row[max(start, PROMPT) :] = MASK
        logits = raw_logits(model, row[None], own_mask(end, start, attention, BLOCK, window))[0]
        logp = logits[:, :MASK].log_softmax(-1)
        for i in range(max(start, PROMPT), min(end, PROMPT + ANSWER)):
            assert got[0, i] == pytest.approx(float(logp[i - 1, IDS[i]]), **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("estimator", ["one_step", *PAIRED])
def test_the_prompt_is_shown_and_what_stands_behind_the_answer_is_masked(estimator, attention):
    spec = tiny_spec(attention, BLOCK)
    for seed in range(20):
        masked, weight = views(rollout_of(seed=seed), recipe_of(estimator), spec)
        assert not masked[:, :PROMPT].any() and masked[:, PROMPT + ANSWER :].all()
        assert not weight[~masked].any() and not weight[:, PROMPT + ANSWER :].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("estimator", PAIRED)
def test_pairs_mask_each_token_once_and_weigh_it_by_the_masks_share(estimator, attention):
    spec, samples = tiny_spec(attention, BLOCK), 3
    for seed in range(10):
        rl = recipe_of(estimator, samples=samples)
        masked, weight = views(rollout_of(seed=seed), rl, spec)
        inside = masked[:, PROMPT : PROMPT + ANSWER]
        first = int(estimator == "coupled")
        assert len(inside) == 2 * samples + first and inside[:first].all()
        assert (inside[first::2] ^ inside[first + 1 :: 2]).all()
        got = {(v, i): float(weight[v, i]) for v, i in weight.nonzero().tolist()}
        assert got == pytest.approx(own_weight(estimator, masked, spec, samples))


@pytest.mark.parametrize("estimator", ["coupled", "elbo"])
def test_a_token_is_worth_its_weighted_views(estimator):
    spec, rollout, rl = tiny_spec("full"), rollout_of(), recipe_of(estimator, samples=2)
    masked, _ = views(rollout, rl, spec)
    weight, want = own_weight(estimator, masked, spec, 2), Counter()
    for (view, i), logp in found_in(scored(spec, rl, [rollout]), rollout).items():
        want[i] += weight[view, i] * logp
    got = scored(spec, rl, [rollout]).per_token()[0].tolist()
    got = dict(zip(answer_of(rollout), got, strict=True))
    assert got == pytest.approx(dict(want), **EXACT)


def test_spg_mixes_the_two_bounds_for_a_bad_answer_alone():
    spec, rollout, rl = tiny_spec("full"), rollout_of(), recipe_of("spg", samples=2)
    scores = scored(spec, rl, [rollout, rollout])
    weight = own_weight("spg", views(rollout, rl, spec)[0], spec, 2)
    lower, mean = Counter(), Counter()
    for (view, i), logp in found_in(scores, rollout).items():
        lower[i] += weight[view, i] * logp
        mean[i] += weight[view, i] * math.exp(1.5 * logp)
    got = scores.per_token(torch.tensor([True, False]))
    for place, i in enumerate(answer_of(rollout)):
        assert float(got[0, place]) == pytest.approx(lower[i], **EXACT)
        mixed = 0.5 * lower[i] + 0.5 * math.log(mean[i]) / 1.5
        assert float(got[1, place]) == pytest.approx(mixed, **EXACT)


def test_the_gradient_of_spg_is_finite_and_that_of_its_value():
    model, spec = deepcopy(build_model("llama")), tiny_spec("full")
    rollouts, rl = [rollout_of(), rollout_of(IDS[:8], 3, 5)], recipe_of("spg", samples=2)
    bad = torch.tensor([False, False])

    def value():
        return score(model, rollouts, rl, spec, SUPPRESSED).per_token(bad).sum()

    value().backward()
    weight = model.lm_head.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    slope = float((weight.grad * direction).sum())
    with torch.no_grad():
        weight += 1e-5 * direction
        above = float(value())
        weight -= 2e-5 * direction
        assert slope == pytest.approx((above - float(value())) / 2e-5, rel=1e-5)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_prompt_tokens_are_masked_at_the_rate_asked_for_and_never_the_first():
    model, spec, rl = (
        build_model("llama"),
        tiny_spec("full"),
        recipe_of("one_step", prompt_mask=0.3),
    )
    shares = torch.zeros(PROMPT)
    for seed in range(400):
        masked, weight = views(rollout_of(seed=seed), rl, spec)
        shares += masked[0, :PROMPT] / 400
        assert not weight[0, :PROMPT].any()
    assert shares[0] == 0
    assert shares[1:].sub(0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 400)
    where = masked[0].nonzero()[:, 0].tolist()
    rollout = rollout_of(seed=399)
    got = {i: logp for (_, i), logp in found_in(scored(spec, rl, [rollout]), rollout).items()}
    assert got == pytest.approx(own_logp(model, spec, rollout, where), **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_temperature_of_the_sampler_is_that_of_the_scores(attention):
    model, spec, rollout = build_model("llama"), tiny_spec(attention, BLOCK), rollout_of()
    rl = recipe_of("one_step", sampler={"temperature": 0.7})
    got = {i: v for (_, i), v in found_in(scored(spec, rl, [rollout]), rollout).items()}
    want = own_logp(model, spec, rollout, range(PROMPT, len(IDS)), temperature=0.7)
    assert got == pytest.approx(want, **EXACT)


def test_entropies_are_those_of_the_raw_distribution():
    model, spec, rollout = build_model("llama"), tiny_spec("full"), rollout_of()
    row = rollout.ids.clone()
    row[PROMPT:] = MASK
    logp = raw_logits(model, row[None], own_mask(len(row), 0, "full", None))[0, :, :MASK]
    logp = logp.log_softmax(-1)[PROMPT - 1 : PROMPT + ANSWER - 1]
    got = scored(spec, recipe_of("one_step"), [rollout]).entropies()[0]
    torch.testing.assert_close(got, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-10)


# The trajectory: the states in which the sampler decided


def decode(model, spec, prompts, new=9, ends=range(2, 7), seed=0, **settings):
    options = resolve(spec, {"temperature": 1.0, "threshold": 0.1, "seed": seed, **settings})
    grid = 1 if spec.attention == "full" else BLOCK
    canvas = Canvas.of_prompts(prompts, MASK, max_new_tokens=new, grid=grid, end_ids=list(ends))
    for _ in denoise(model, spec, canvas, options):
        pass
    return canvas, [of_canvas(canvas, row, spec, row) for row in range(len(prompts))]


def prompts_of(count):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(7, MASK, (2 + n % 5,), generator=generator).tolist() for n in range(count)
    ]


SAMPLERS = [
    {},
    {"threshold": None, "steps_per_block": 3},
    {"threshold": None, "steps_per_block": 2, "order": "random"},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["threshold", "steps", "random"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_trajectory_is_what_the_sampler_recorded(attention, prediction, sampler):
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    canvas, rollouts = decode(model, spec, prompts_of(12), **sampler)
    got = scored(spec, recipe_of("trajectory"), rollouts).per_token()
    for row, rollout in enumerate(rollouts):
        want = canvas.logprob[row, list(answer_of(rollout))].double()
        torch.testing.assert_close(got[row, : rollout.answer], want, rtol=0, atol=1e-5)
        assert not got[row, rollout.answer :].any()
    assert len({rollout.answer for rollout in rollouts}) > 2  # some ended early
    decided = [rollout.step[list(answer_of(rollout))] for rollout in rollouts]
    assert any(len(step.unique()) < len(step) for step in decided)  # several at once


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_trajectory_of_full_attention_in_blocks_is_what_was_recorded(prediction):
    model, spec = build_model("llama"), tiny_spec("full", None, prediction)
    canvas, rollouts = decode(model, spec, prompts_of(6), block_length=3)
    got = scored(spec, recipe_of("trajectory"), rollouts).per_token()
    for row, rollout in enumerate(rollouts):
        want = canvas.logprob[row, list(answer_of(rollout))].double()
        torch.testing.assert_close(got[row, : rollout.answer], want, rtol=0, atol=1e-5)


def own_states(rollout, spec, segments):
    """(positions masked in a state, positions scored in it), of each block."""
    step = rollout.step.tolist()
    for start, end in spans(spec, len(step)):
        inside = range(max(start, rollout.prompt), end)
        steps = sorted({step[i] for i in inside if step[i]})
        merged, groups = min(segments or len(steps), len(steps)), {}
        for number, value in enumerate(steps):
            groups.setdefault(number * merged // len(steps), []).append(value)
        for group in groups.values():
            hidden = [i for i in inside if not step[i] or step[i] >= group[0]]
            yield hidden, [i for i in inside if step[i] in group]


@pytest.mark.parametrize("segments", [None, 1, 2, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_merged_steps_are_scored_in_the_state_of_their_first(attention, prediction, segments):
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    _, rollouts = decode(model, spec, prompts_of(5))
    rl = recipe_of("trajectory", segments=segments)
    scores = scored(spec, rl, rollouts)
    assert scores.shape[1] <= (segments or 99)
    for row, rollout in enumerate(rollouts):
        want = {}
        for hidden, decided in own_states(rollout, spec, segments):
            own = own_logp(model, spec, rollout, hidden)
            want |= {i: logp for i, logp in own.items() if i in decided}
        got = found_in(scores, rollout, row)
        assert len(got) == rollout.answer
        assert {i: logp for (_, i), logp in got.items()} == pytest.approx(want, **EXACT)


def test_one_segment_of_all_steps_is_one_step_where_nothing_stands_behind():
    spec = tiny_spec("causal_context", BLOCK)
    _, rollouts = decode(build_model("llama"), spec, prompts_of(5), ends=())
    got, want = (
        scored(spec, rl, rollouts).per_token()
        for rl in (recipe_of("trajectory", segments=1), recipe_of("one_step"))
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_what_a_canvas_of_blocks_keeps_ends_with_the_block_of_the_last_token():
    spec = tiny_spec("block_causal", BLOCK)
    _, rollouts = decode(build_model("llama"), spec, prompts_of(12), new=17)
    for rollout in rollouts:
        assert len(rollout.ids) == -(-(rollout.prompt + rollout.answer) // BLOCK) * BLOCK
    _, rollouts = decode(build_model("llama"), tiny_spec("full"), prompts_of(12))
    assert all(len(rollout.ids) == rollout.prompt + 9 for rollout in rollouts)


# The AR mode


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ar_is_a_causal_forward(prediction):
    model, spec = build_model("llama"), tiny_spec("causal_context", BLOCK, prediction)
    rollouts = [rollout_of(), rollout_of(IDS[:8], 3, 5), rollout_of([1, 30, 2, MASK], 1, 2)]
    scores = scored(spec, recipe_of("ar"), rollouts)
    for row, rollout in enumerate(rollouts):
        logits = raw_logits(
            model, rollout.ids[None], own_mask(len(rollout.ids), 99, "causal_context", 1)
        )
        logp = logits[0, :, :MASK].log_softmax(-1)
        want = {(0, i): float(logp[i - 1, rollout.ids[i]]) for i in answer_of(rollout)}
        assert found_in(scores, rollout, row) == pytest.approx(want, **EXACT)


def test_ar_is_what_trl_computes(tmp_path, tiny_tokenizer):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from ar2diff.checkpoint.model import causal_spec

    model = deepcopy(build_model("llama", dtype=torch.float32, vocab_size=259))
    prompts, answers = [[1, 10, 11, 12], [1, 14]], [[20, 21, 2], [22, 23, 24, 25]]
    rows = zip(prompts, answers, strict=True)
    rollouts = [rollout_of(p + a, len(p), len(a)) for p, a in rows]
    none = torch.zeros(259, dtype=torch.bool)
    rl = recipe_of("ar", sampler={"temperature": 0.8})
    with torch.no_grad():
        ours = score(model, rollouts, rl, causal_spec(model), none)
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=2,
        per_device_train_batch_size=2, temperature=0.8, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args,
        Dataset.from_list([{"prompt": "a"}]), processing_class=tiny_tokenizer,
    )  # fmt: skip
    ids = torch.tensor([[1, 10, 11, 12, 20, 21, 2, 0], [0, 0, 1, 14, 22, 23, 24, 25]])
    real = torch.tensor([[1] * 7 + [0], [0] * 2 + [1] * 6])
    with torch.no_grad():
        logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, real, 4, compute_entropy=True
        )
    shown = real[:, -4:].bool()
    torch.testing.assert_close(ours.per_token()[shown], logp[shown], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.entropies()[shown], entropy[shown], rtol=0, atol=1e-5)
    assert not ours.per_token()[~shown].any()


# Expectations, over all masks there are


SHORT = [1, 17, 42, 5]  # three tokens of answer in one block, its end the canvas' end
LONGER = [1, 17, 42, 5, 33]  # a block of three, a block of one token and masks
DRAWS = 800


def share_of(estimator, n, k):
    """Probability that k of n tokens are in the first mask of a pair."""
    if estimator != "coupled":
        return 1 / (n + 1)
    low, high = max(0.2, (k - 1) / n), min(0.8, k / n)
    return max(0.0, high - low) / 0.6


def blocks_of(rollout, spec):
    for start, end in spans(spec, len(rollout.ids)):
        block = [i for i in range(start, end) if i in answer_of(rollout)]
        if block:
            yield block


def chances(rollout, spec, estimator):
    """{positions: probability} of the first masks of a pair."""
    parts = []
    for block in blocks_of(rollout, spec):
        n, part = len(block), {}
        for k in range(n + 1):
            for subset in combinations(block, k):
                part[subset] = share_of(estimator, n, k) / math.comb(n, k)
        parts.append({subset: p for subset, p in part.items() if p})
    return {
        tuple(i for subset in chosen for i in subset): math.prod(
            part[subset] for part, subset in zip(parts, chosen, strict=True)
        )
        for chosen in product(*parts)
    }


@cache
def seeds_of(ids, attention, estimator):
    """{positions: (how often, a seed)} of the first masks of pairs, over many seeds."""
    spec, rl, found = tiny_spec(attention, BLOCK), recipe_of(estimator), {}
    for seed in range(DRAWS):
        rollout = short(ids, attention, seed)
        masked = views(rollout, rl, spec)[0][int(estimator == "coupled")]
        key = tuple(i for i in masked.nonzero()[:, 0].tolist() if i in answer_of(rollout))
        found[key] = (found.get(key, (0, 0))[0] + 1, seed)
    return found


def short(ids, attention, seed=0):
    ids, answer = list(ids), len(ids) - 1
    if attention != "full":
        ids += [MASK] * (-len(ids) % BLOCK)
    return rollout_of(ids, 1, answer, seed)


@pytest.mark.parametrize("attention, ids", [("full", SHORT), ("block_causal", LONGER)])
@pytest.mark.parametrize("estimator", ["coupled", "elbo"])
def test_masks_come_as_often_as_they_should(estimator, attention, ids):
    """Every mask, none else, within 5 standard deviations."""
    found = seeds_of(tuple(ids), attention, estimator)
    want = chances(short(ids, attention), tiny_spec(attention, BLOCK), estimator)
    assert set(found) == set(want) and sum(want.values()) == pytest.approx(1)
    for key, p in want.items():
        assert abs(found[key][0] / DRAWS - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)


@cache
def expectation(estimator, attention, prediction, ids):
    """E of the estimate [C]: the code's value of each mask, at a probability written here."""
    spec, rl = tiny_spec(attention, BLOCK, prediction), recipe_of(estimator)
    found = seeds_of(ids, attention, estimator)
    rollouts = [short(ids, attention, seed) for _, seed in found.values()]
    values = scored(spec, rl, rollouts).per_token()
    p = chances(rollouts[0], spec, estimator)
    return sum(p[key] * value for key, value in zip(found, values, strict=True))


def subset_table(model, spec, rollout):
    """{masked positions of a block: {position: log p}}, what stands behind masked too."""
    found = {}
    for block in blocks_of(rollout, spec):
        behind = list(range(rollout.prompt + rollout.answer, len(rollout.ids)))
        for k in range(1, len(block) + 1):
            for subset in combinations(block, k):
                found[subset] = own_logp(model, spec, rollout, [*subset, *behind])
    return found


def over_orders(logp, block):
    """(mean, log of the mean probability) over all orders in which a block can be decided."""
    values = [
        sum(logp[tuple(sorted(order[n:]))][order[n]] for n in range(len(order)))
        for order in permutations(block)
    ]
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.logsumexp(0) - math.log(len(values)))


CASES = [(a, p, ids) for a in ATTENTIONS for p in PREDICTIONS for ids in (SHORT, LONGER)]


@pytest.mark.parametrize("attention, prediction, ids", CASES)
def test_the_expectation_of_elbo_is_the_bound_over_all_orders(attention, prediction, ids):
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    rollout = short(ids, attention)
    logp = subset_table(model, spec, rollout)
    bounds, exact = zip(*(over_orders(logp, b) for b in blocks_of(rollout, spec)), strict=True)
    got = float(expectation("elbo", attention, prediction, tuple(ids)).sum())
    assert got == pytest.approx(sum(bounds), **EXACT)
    assert got < sum(exact) - 0.01  # a bound, and not a tight one


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_expectation_of_elbo_is_the_bound_that_likelihood_computes(prediction):
    from ar2diff.diffusion.likelihood import bound

    model, spec = build_model("llama"), tiny_spec("full", None, prediction)
    estimate = bound(model, spec, [SHORT], SUPPRESSED, samples=512)
    got = float(expectation("elbo", "full", prediction, tuple(SHORT)).sum())
    assert got == pytest.approx(-float(estimate.nats), rel=0, abs=1e-10)  # both enumerate all masks


@pytest.mark.parametrize("attention, prediction, ids", CASES)
def test_the_expectation_of_coupled_is_half_of_one_step_and_half_of_both_masks(
    attention, prediction, ids
):
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    rollout, want = short(ids, attention), 0.0
    logp = subset_table(model, spec, rollout)
    for block in blocks_of(rollout, spec):
        n = len(block)
        mean = {  # of the sum over a mask of k tokens, in parts of the whole block
            k: sum(sum(logp[s].values()) * n / k for s in combinations(block, k)) / math.comb(n, k)
            for k in range(1, n + 1)
        }
        both = [share_of("coupled", n, k) * (mean[k] + mean.get(n - k, 0.0)) for k in mean]
        want += 0.5 * mean[n] + 0.5 * sum(both)
    got = float(expectation("coupled", attention, prediction, tuple(ids)).sum())
    assert got == pytest.approx(want, **EXACT)


@pytest.mark.parametrize("estimator", ["coupled", "elbo"])
def test_more_samples_have_the_same_expectation(estimator):
    """Four standard errors of 300 seeds; with four samples at most half of the spread."""
    ids, spec = tuple(SHORT), tiny_spec("full", None, "shift")
    want, spread = expectation(estimator, "full", "shift", ids).sum(), []
    for samples in (1, 4):
        rl = recipe_of(estimator, samples=samples)
        rollouts = [short(ids, "full", seed) for seed in range(300)]
        values = scored(spec, rl, rollouts).per_token().sum(1)
        assert abs(values.mean() - want) < 4 * values.std() / math.sqrt(300)
        spread.append(float(values.std()))
    assert 0 < spread[1] < 0.6 * spread[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_upper_bound_of_spg_is_above_the_lower_and_above_log_p(prediction):
    """Of many samples: sum of log E[p^1.5] / 1.5, which Jensen puts above the expectation of the
    lower bound; that it is above log p over all orders is no theorem, but so here."""
    model, spec = build_model("llama"), tiny_spec("full", None, prediction)
    rollout = short(SHORT, "full")
    logp, block = subset_table(model, spec, rollout), [1, 2, 3]
    want = 0.0
    for i in block:
        means = [
            sum(math.exp(1.5 * logp[s][i]) for s in combinations(block, k) if i in s)
            / math.comb(2, k - 1)
            for k in (1, 2, 3)
        ]
        want += math.log(sum(means) / 3) / 1.5
    scores = scored(spec, recipe_of("spg", samples=400), [rollout])
    lower, mixed = (float(scores.per_token(torch.tensor([good])).sum()) for good in (True, False))
    upper = 2 * mixed - lower
    assert upper == pytest.approx(want, abs=0.15)
    bound, exact = over_orders(logp, block)
    assert bound < exact < want


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_mean_probability_over_orders_is_how_often_the_sampler_writes_an_answer(attention):
    """Random order, a token a step, three tokens that can be written: all nine answers of two, each
    within 4.5 standard deviations of 1500 rollouts."""
    model, count = build_model("llama"), 1500
    spec, words = tiny_spec(attention, BLOCK), [17, 42, 5]
    hidden = [t for t in range(64) if t not in words]
    settings = {
        "threshold": None,
        "steps_per_block": 4,
        "order": "random",
        "suppress_tokens": hidden,
    }
    new = 2 if attention == "full" else 3
    settings["steps_per_block"] = new
    _, rollouts = decode(model, spec, [[1]] * count, new=new, ends=(), **settings)
    seen = Counter(tuple(r.ids.tolist()) for r in rollouts)
    suppressed = torch.ones(64, dtype=torch.bool)
    suppressed[words] = False
    total = 0.0
    for answer in product(words, repeat=new):
        rollout = rollout_of([1, *answer], 1, new)
        logp = {}
        for k in range(1, new + 1):
            for subset in combinations(range(1, new + 1), k):
                row = rollout.ids.clone()
                row[list(subset)] = MASK
                logits = raw_logits(model, row[None], own_mask(new + 1, 0, "full", None))[0]
                logits = logits.masked_fill(suppressed, -math.inf).log_softmax(-1)
                logp[subset] = {i: float(logits[i - 1, rollout.ids[i]]) for i in subset}
        p = math.exp(over_orders(logp, range(1, new + 1))[1])
        total += p
        close = 4.5 * math.sqrt(p * (1 - p) / count) + 1 / count
        assert abs(seen[tuple(rollout.ids.tolist())] / count - p) < close
    assert total == pytest.approx(1)


# UniGRPO: one view, whose share of masks grows from update to update


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_unigrpo_scores_what_one_view_masks_and_all_in_the_last_update(attention, prediction):
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    rl, shown = recipe_of("unigrpo", num_iterations=3), []
    mean = recipe_of("unigrpo", num_iterations=3, level="sequence")
    for update in range(3):
        rollout = replace(rollout_of(), update=update)
        (masked,), (weight,) = views(rollout, rl, spec)
        assert not masked[:PROMPT].any() and masked[PROMPT + ANSWER :].all()
        where = masked.nonzero()[:, 0].tolist()
        scores = scored(spec, rl, [rollout])
        want = own_logp(model, spec, rollout, where)
        assert {i: v for (_, i), v in found_in(scores, rollout).items()} == pytest.approx(
            want, **EXACT
        )
        assert [i for i in answer_of(rollout) if weight[i]] == sorted(want)
        tokens = scores.per_token()[0].tolist()
        assert sum(tokens) == pytest.approx(sum(want.values()), **EXACT)
        of_sequence = scored(spec, mean, [rollout]).per_token()[0]
        assert float(of_sequence.mean()) == pytest.approx(sum(want.values()) / len(want), **EXACT)
        shown.append(len(want))
    assert shown == sorted(shown) and shown[-1] == ANSWER > shown[0]


def test_unigrpo_draws_its_shares_as_algorithm_1_does():
    """Three tokens: of the first update every number of masks, each of its subsets, is as likely;
    of the second of three, whose share is above a half, two masks are with a chance of a third."""
    spec, draws, third = tiny_spec("full"), 1000, [1, 2, 3]
    rl, first = recipe_of("unigrpo", num_iterations=3), [rollout_of(seed=n) for n in range(20)]
    pairs = [[views(replace(r, update=u), rl, spec)[0] for u in (0, 1)] for r in first]
    assert any((one & ~two).any() for one, two in pairs)  # an update's masks are its own
    subsets = [s for k in third for s in combinations(third, k)]
    wanted = {
        (1, 0): {s: 1 / 3 / math.comb(3, len(s)) for s in subsets},
        (3, 1): {s: {1: 0, 2: 1 / 9, 3: 2 / 3}[len(s)] for s in subsets},
        (3, 2): {s: float(len(s) == 3) for s in subsets},
    }
    for (updates, update), chance in wanted.items():
        rl, found = recipe_of("unigrpo", num_iterations=updates), Counter()
        for seed in range(draws):
            (masked,), _ = views(replace(short(SHORT, "full", seed), update=update), rl, spec)
            found[tuple(masked.nonzero()[:, 0].tolist())] += 1
        for subset, p in chance.items():
            assert abs(found[subset] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws)
        assert sum(found.values()) == sum(found[s] for s in subsets)


def test_what_unigrpo_expects_is_a_sum_over_all_masks_below_the_bounds_size():
    """By enumeration, and by the mean of draws; with the weights 1/share of the bound, the same
    draws estimate the bound."""
    model, spec, draws = build_model("llama"), tiny_spec("full"), 800
    logp, block = subset_table(model, spec, short(SHORT, "full")), [1, 2, 3]
    chance = {s: 1 / 3 / math.comb(3, len(s)) for s in logp}
    want = torch.tensor([sum(p * logp[s].get(i, 0) for s, p in chance.items()) for i in block])
    bound = sum(p * sum(logp[s].values()) * 3 / len(s) for s, p in chance.items())
    rollouts = [short(SHORT, "full", seed) for seed in range(draws)]
    values = scored(spec, recipe_of("unigrpo"), rollouts).per_token()
    spread = values.std(0) / math.sqrt(draws)
    assert ((values.mean(0) - want).abs() < 4.5 * spread).all()
    masked = (values != 0).sum(1)
    weighted = values.sum(1) * 3 / masked
    assert abs(float(weighted.mean()) - bound) < 4.5 * float(weighted.std()) / math.sqrt(draws)
    assert bound < float(want.sum()) < 0


# Invariances

ALL = ["one_step", *PAIRED, "unigrpo", "trajectory", "ar"]


def some_rollouts(attention):
    return decode(build_model("llama"), tiny_spec(attention, BLOCK), prompts_of(6))[1]


def cases():
    return [(e, a) for a in ATTENTIONS for e in ALL if e != "ar" or a == "causal_context"]


@pytest.mark.parametrize("estimator, attention", cases())
def test_a_row_is_scored_alike_alone_shuffled_and_beside_others(estimator, attention):
    spec, rl, rollouts = tiny_spec(attention, BLOCK), recipe_of(estimator), some_rollouts(attention)
    width = max(rollout.answer for rollout in rollouts) + 3
    whole = scored(spec, rl, rollouts, width=width)
    for order in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        part = scored(spec, rl, [rollouts[n] for n in order], width=width)
        for name in ("per_token", "entropies"):
            got, want = getattr(part, name)(), getattr(whole, name)()[order]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert whole.per_token().shape == (len(rollouts), width)


@pytest.mark.parametrize("estimator, attention", cases())
def test_noise_is_of_the_seed_and_not_of_torchs(estimator, attention):
    spec, rl, rollouts = tiny_spec(attention, BLOCK), recipe_of(estimator), some_rollouts(attention)
    torch.manual_seed(1)
    one, state = scored(spec, rl, rollouts), torch.get_rng_state()
    torch.rand(7)
    two = scored(spec, rl, rollouts)
    assert torch.equal(one.per_token(), two.per_token())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    other = scored(spec, rl, [replace(rollout, seed=99) for rollout in rollouts])
    drawn = (*PAIRED, "unigrpo")
    assert torch.equal(one.per_token(), other.per_token()) == (estimator not in drawn)


def test_the_spread_is_that_of_what_each_view_gives_alone():
    spec, rollout, rl = tiny_spec("full"), rollout_of(), recipe_of("elbo", samples=2)
    scores, each = scored(spec, rl, [rollout]), Counter()
    weight = own_weight("elbo", views(rollout, rl, spec)[0], spec, 2)
    for (view, i), logp in found_in(scores, rollout).items():
        each[view] += 4 * weight[view, i] * logp
    want = torch.tensor([each[view] for view in range(4)], dtype=torch.float64).std()
    assert float(scores.spread()[0]) == pytest.approx(float(want), **EXACT)


# What a score must not know


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("estimator", ["one_step", *PAIRED])
def test_what_stands_behind_an_answer_moves_nothing(estimator, attention):
    spec, rl = tiny_spec(attention, BLOCK), recipe_of(estimator)
    end = PROMPT + ANSWER
    one = scored(spec, rl, [rollout_of()])
    two = scored(spec, rl, [rollout_of([*IDS[:end], 30, 31, 32])])
    assert torch.equal(one.per_token(), two.per_token())


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_later_blocks_of_a_canvas_move_nothing(attention):
    spec, rl = tiny_spec(attention, BLOCK), recipe_of("one_step")
    one = scored(spec, rl, [rollout_of()]).per_token()
    two = scored(spec, rl, [rollout_of([*IDS, 40, 41, MASK, MASK])]).per_token()
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_where_an_answer_ends_is_not_seen_before_it_ends():
    """Two answers on one canvas, one of which goes on: their common tokens score alike."""
    spec, rl = tiny_spec("full"), recipe_of("one_step")
    brief, long = [*IDS[:10], 2, *[MASK] * 5], IDS
    one = scored(spec, rl, [rollout_of(brief, PROMPT, 5)]).per_token()[0, :4]
    two = scored(spec, rl, [rollout_of(long)]).per_token()[0, :4]
    assert torch.equal(one, two)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("estimator", ["one_step", *PAIRED])
def test_a_masked_token_is_not_seen_by_its_view(estimator, attention):
    """Change one token: in views that mask it, no other score in its block moves."""
    spec, rl, place = tiny_spec(attention, BLOCK), recipe_of(estimator), 9
    one, two = rollout_of(), rollout_of([*IDS[:place], 50, *IDS[place + 1 :]])
    masked = views(one, rl, spec)[0]
    first, second = (found_in(scored(spec, rl, [r]), r) for r in (one, two))
    span = next(s for s in spans(spec, len(IDS)) if s[0] <= place < s[1])
    for (view, i), logp in first.items():
        if i < span[1] and i != place and (masked[view, place] or i < span[0]):
            assert second[view, i] == pytest.approx(logp, **EXACT)
    own = next(view for view, i in first if i == place)
    assert second[own, place] != pytest.approx(first[own, place])


def test_the_constants_of_spg_are_the_papers():
    assert (estimators.SPG_BETA, estimators.SPG_MIX) == (1.5, 0.5)
