"""The identities of the bound, against raw forwards that are enumerated here: float64, to 1e-10."""

import math
from functools import cache
from itertools import combinations, permutations, product

import pytest
import torch
from conftest import CLASSES, MASK, MASKS, WINDOW, build_model, tiny_spec, with_head
from numpy.polynomial.legendre import leggauss

from ar2diff.core.attention import lay_out, model_mask, reading_slot, reveal_edges
from ar2diff.core.forward import logits_at
from ar2diff.core.seeds import keyed_generator
from ar2diff.diffusion.corruption import open_slots
from ar2diff.diffusion.cross_entropy import cross_entropy
from ar2diff.diffusion.draws import draw
from ar2diff.diffusion.estimate import difference_of, total_of
from ar2diff.diffusion.likelihood import ar_nll, bound, masked_nll, scored
from ar2diff.diffusion.objective import suppressed_ids, time_weights

BLOCK = 4
SUPPRESSED = suppressed_ids(MASK, range(64), 64)
BLOCKWISE = ("causal_context", "block_causal")
PREDICTIONS = ("same", "shift")
EXACT = {"rtol": 0, "atol": 1e-10}
ROW = [1, 17, 42, 5, 33, 8]  # position 0 is given: five tokens, 32 masks
LONG = [1, 17, 42, 5, 33, 8, 60, 21, 9, 50]  # blocks of 3, 4 and 2 maskable tokens


def spec(attention="full", block_length=BLOCK, prediction="shift", mask_token_id=MASK):
    return tiny_spec(attention, block_length, prediction, mask_token_id)


# The oracle: raw forwards of [clean prefix | noisy block] under a mask written here


def own_mask(end, start, attention, block_length, window=None):
    """[end, end] bool: clean tokens before `start`, a noisy block from there."""
    mask = torch.zeros(end, end, dtype=torch.bool)
    for q, k in product(range(end), repeat=2):
        if q >= start:
            mask[q, k] = True
        elif attention == "causal_context":
            mask[q, k] = k <= q
        else:
            mask[q, k] = k // block_length <= q // block_length
        if window is not None and abs(q - k) > (window if attention == "full" else window - 1):
            mask[q, k] = False
    return mask


def raw_logits(model, ids, mask):
    """`mask` [L, L] bool; eager adds its mask, so it gets a float one."""
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -1e30)
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=mask[None, None],
            use_cache=False,
            position_ids=torch.arange(ids.shape[1])[None],
        ).logits


def table(model, row, start, end, attention, block_length, prediction, mask_id=MASK, words=MASK):
    """{masked positions: {position: -log p}} for every subset of a block's maskable tokens."""
    positions = range(max(start, 1), end)
    subsets = [s for k in range(len(positions) + 1) for s in combinations(positions, k)]
    ids = torch.tensor([row[:end]]).repeat(len(subsets), 1)
    for line, subset in zip(ids, subsets, strict=True):
        line[list(subset)] = mask_id
    logits = raw_logits(model, ids, own_mask(end, start, attention, block_length))
    if (head := getattr(model, "diffusion_head", None)) is not None:
        back = int(prediction == "shift")
        for n, i in product(range(len(subsets)), positions):
            if i - 1 not in subsets[n]:  # the bias of a left neighbour that is not masked
                logits[n, i - back] += (head.before[row[i - 1]] @ head.after).detach()
    logp = logits[:, :, :words].log_softmax(-1)  # the mask, and what comes behind it, is impossible
    back = 1 if prediction == "shift" else 0
    return {
        subset: {i: -float(logp[n, i - back, row[i]]) for i in subset}
        for n, subset in enumerate(subsets)
    }


def size_of(nll):
    return max(map(len, nll))


def mean_of_k(nll, k):
    return sum(sum(nll[s].values()) for s in nll if len(s) == k) / math.comb(size_of(nll), k)


def k_form(nll):
    return sum(mean_of_k(nll, k) / k for k in range(1, size_of(nll) + 1))


def scheduled(nll, alpha, slope):
    """Integral over t of -alpha'/(1 - alpha) * E[sum of -log p], by Gauss-Legendre."""
    n, total = size_of(nll), 0.0
    for node, weight in zip(*leggauss(60), strict=True):
        t = (node + 1) / 2
        a = alpha(t)
        expected = sum(
            math.comb(n, k) * (1 - a) ** k * a ** (n - k) * mean_of_k(nll, k) for k in range(n + 1)
        )
        total += weight / 2 * -slope(t) / (1 - a) * expected
    return total


def one_over_t(nll):
    return scheduled(nll, lambda t: 1 - t, lambda t: -1.0)


def cosine(nll):
    return scheduled(
        nll, lambda t: math.cos(math.pi * t / 2), lambda t: -math.pi / 2 * math.sin(math.pi * t / 2)
    )


def quadratic(nll):
    return scheduled(nll, lambda t: 1 - t**2, lambda t: -2 * t)


def over_orders(nll):
    """Mean over all orders of the chain rule: each token given those before it in the order."""
    n = size_of(nll)
    positions = next(s for s in nll if len(s) == n)
    orders = list(permutations(positions))
    total = sum(
        nll[tuple(sorted(order[step:]))][order[step]] for order in orders for step in range(n)
    )
    return total / len(orders)


@cache
def full_table(prediction):
    return table(build_model("llama"), ROW, 0, len(ROW), "full", None, prediction)


def blocks(row, block_length):
    return [(s, min(s + block_length, len(row))) for s in range(0, len(row), block_length)]


# ar2diff's side: its own forwards and weights over every draw there is


def expectation(model, contract, row):
    """E of the exact-k estimator of a one-block row: sum over S of P(S) n/k sum of -log p."""
    n = len(row) - 1
    subsets = [s for k in range(1, n + 1) for s in combinations(range(1, n + 1), k)]
    masked = torch.zeros(len(subsets), n + 1, dtype=torch.bool)
    for line, subset in zip(masked, subsets, strict=True):
        line[list(subset)] = True
    x0 = torch.tensor([row]).repeat(len(subsets), 1)
    pos = torch.arange(n + 1).expand_as(x0)
    with torch.no_grad():
        nll = masked_nll(model, contract, x0, masked, torch.zeros_like(x0), pos, SUPPRESSED)
    k = masked.sum(1).double()
    weight = time_weights(k / n, "1/t") / torch.tensor([n * math.comb(n, len(s)) for s in subsets])
    return float((weight[:, None].expand_as(masked)[masked] * nll).sum())


@pytest.fixture
def every_draw():
    """Factory: `bound` of a row over all masks there are, as it is if it may draw as many."""

    def exact(model, contract, row, suppressed=SUPPRESSED):
        most = max(end - max(start, 1) for start, end in blocks(row, contract.block_length or 99))
        estimate = bound(model, contract, [row], suppressed, 2**most)
        assert estimate.error == 0
        return float(estimate.nats)

    return exact


# One block: the bound is its other forms


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "form",
    [k_form, one_over_t, over_orders, cosine, quadratic],
    ids=["k-form", "1/t integral", "all orders", "cosine", "quadratic"],
)
def test_the_bound_equals_its(every_draw, form, prediction):
    value = form(full_table(prediction))
    got = every_draw(build_model("llama"), spec(prediction=prediction), ROW)
    assert value > 5
    assert got == pytest.approx(value, rel=0, abs=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_exact_k_estimator_is_unbiased(kind, prediction):
    model = build_model(kind)
    window = WINDOW if kind == "mistral_window" else None
    subsets = [s for k in range(1, 6) for s in combinations(range(1, 6), k)]
    total = 0.0
    for subset in subsets:  # the definition, one forward a mask
        ids = torch.tensor([[MASK if i in subset else t for i, t in enumerate(ROW)]])
        logits = raw_logits(model, ids, own_mask(6, 0, "full", None, window))
        logp = logits[0, :, :MASK].log_softmax(-1)
        back = int(prediction == "shift")
        nll = -sum(float(logp[i - back, ROW[i]]) for i in subset)
        total += nll / (len(subset) * math.comb(5, len(subset)))
    got = expectation(model, spec(prediction=prediction), ROW)
    assert got == pytest.approx(total, rel=0, abs=1e-10)


def test_a_block_as_long_as_the_row_is_full_attention(every_draw):
    model = build_model("llama")
    for prediction in PREDICTIONS:
        whole = every_draw(model, spec(prediction=prediction), ROW)
        for attention in BLOCKWISE:
            one_block = every_draw(model, spec(attention, 8, prediction), ROW)
            assert one_block == pytest.approx(whole, rel=0, abs=1e-10)


def test_the_bound_of_one_token_is_its_cross_entropy():
    model, row = build_model("llama"), [1, 17]
    logits = raw_logits(model, torch.tensor([[1, MASK]]), torch.ones(2, 2).bool())[0, :, :MASK]
    for prediction, slot in (("same", 1), ("shift", 0)):
        estimate = bound(model, spec(prediction=prediction), [row], SUPPRESSED, samples=2)
        want = -float(logits[slot].log_softmax(-1)[17])
        assert float(estimate.nats) == pytest.approx(want, rel=0, abs=1e-10)
        assert estimate.error == 0


def test_the_weights_of_the_bound_are_exact():
    maskable, block = torch.ones(5).bool(), torch.zeros(5, dtype=torch.long)
    for k in range(1, 6):
        masked, t = open_slots(maskable, block, torch.tensor([(k - 0.5) / 5]), keyed_generator(0))
        assert float(time_weights(t, "1/t")[0]) == pytest.approx(5 / int(masked.sum()), rel=1e-12)


WORDS = suppressed_ids(
    4, range(3), 5
)  # a model of five rows: row 3 has no token, row 4 is the mask
SEQUENCES = [[0, *words] for words in product(range(3), repeat=3)]  # all there are


def model_of_three_words():
    return build_model("llama", vocab_size=5, initializer_range=0.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_exp_of_minus_the_bound_sums_to_at_most_1_over_all_sequences(
    every_draw, attention, prediction
):
    model, contract = model_of_three_words(), spec(attention, 2, prediction, mask_token_id=4)
    total = sum(math.exp(-every_draw(model, contract, row, WORDS)) for row in SEQUENCES)
    assert 0.5 < total < 1 - 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_is_above_the_likelihood_of_the_mixture_of_orders(every_draw, prediction):
    model, total = model_of_three_words(), 0.0
    for row in SEQUENCES:
        nll = table(model, row, 0, 4, "full", None, prediction, mask_id=4, words=3)
        orders = list(permutations((1, 2, 3)))
        likelihood_of = [
            math.exp(-sum(nll[tuple(sorted(o[step:]))][o[step]] for step in range(3)))
            for o in orders
        ]
        mixture = sum(likelihood_of) / len(orders)
        total += mixture
        contract = spec(prediction=prediction, mask_token_id=4)
        assert every_draw(model, contract, row, WORDS) >= -math.log(mixture)
    assert total == pytest.approx(1, rel=0, abs=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_the_bound_with_a_head_is_that_of_drawing_one_token_at_a_step(
    every_draw, attention, prediction
):
    plain, contract = model_of_three_words(), spec(attention, 2, prediction, mask_token_id=4)
    model, contract = with_head(plain, contract)
    total = moved = 0.0
    for row in SEQUENCES:
        spans = [(0, 4)] if attention == "full" else blocks(row, 2)
        tables = [
            table(model, row, *span, attention, 2, prediction, mask_id=4, words=3) for span in spans
        ]
        got = every_draw(model, contract, row, WORDS)
        assert got == pytest.approx(sum(map(over_orders, tables)), rel=0, abs=1e-10)
        moved += abs(got - every_draw(plain, spec(attention, 2, prediction, 4), row, WORDS))
        total += math.exp(-got)
    assert moved > 1 and 0 < total < 1 - 1e-6


def test_the_bias_reads_no_token_that_is_masked():
    model, contract = with_head(build_model("llama"), spec("causal_context", 4))
    x0 = torch.tensor([LONG])
    masked = torch.zeros(1, 10, dtype=torch.bool)
    masked[0, [2, 3, 4, 7, 8]] = True
    pos = torch.arange(10)[None]

    def nll(ids):
        return masked_nll(model, contract, ids, masked, 0 * ids, pos, SUPPRESSED)

    # Of tokens 2, 3 | 4, 7 | 8 each but 3 has a left neighbour that is visible or in the clean half
    for number, at in enumerate(masked[0].nonzero()[:, 0].tolist()):
        changed = x0.clone()
        changed[0, at - 1] = 44
        same = torch.equal(nll(changed)[number], nll(x0)[number])
        assert same == (at == 3)


def test_block_length_1_and_the_ar_nll_are_likelihoods_that_sum_to_1():
    model, contract = model_of_three_words(), spec("causal_context", 1, "shift", mask_token_id=4)
    for exact in (ar_nll(model, SEQUENCES, WORDS), bound(model, contract, SEQUENCES, WORDS, 1)):
        assert float(exact.nats.neg().exp().sum()) == pytest.approx(1, rel=0, abs=1e-10)


# Blocks


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_the_block_bound_is_the_sum_of_the_bounds_of_its_blocks(every_draw, attention, prediction):
    model = build_model("llama")
    tables = [
        table(model, LONG, start, end, attention, BLOCK, prediction)
        for start, end in blocks(LONG, BLOCK)
    ]
    assert [size_of(nll) for nll in tables] == [3, 4, 2]
    got = every_draw(model, spec(attention, prediction=prediction), LONG)
    assert got == pytest.approx(sum(map(k_form, tables)), rel=0, abs=1e-10)


def run_both_halves(model, attention, xt, x0, window="kept", reveal=None):
    doc, pos = torch.zeros_like(x0), torch.arange(x0.shape[1]).expand_as(x0)
    ids, slots = lay_out(xt, x0, doc, pos, attention)
    mask = model_mask(model, slots, attention, BLOCK, window, reveal)
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, position_ids=slots.pos, use_cache=False
        ).logits


def noised(length, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(3, MASK, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < 0.5
    masked[:, 0] = False
    return torch.where(masked, MASK, x0), x0, masked


def close(implementation):
    """Stock eager attention takes its softmax in float32 whatever it is given."""
    return EXACT if implementation == "sdpa" else {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", BLOCKWISE)
@pytest.mark.parametrize("kind", CLASSES)
def test_noisy_half_logits_are_those_of_each_block_alone(kind, attention, implementation):
    model = build_model(kind, implementation)
    window = WINDOW if kind == "mistral_window" else None
    xt, x0, _ = noised(11)
    together = run_both_halves(model, attention, xt, x0)
    for start, end in blocks(range(11), BLOCK):
        ids = torch.cat([x0[:, :start], xt[:, start:end]], 1)
        alone = raw_logits(model, ids, own_mask(end, start, attention, BLOCK, window))
        torch.testing.assert_close(
            together[:, start:end], alone[:, start:end], **close(implementation)
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_the_clean_half_of_causal_context_is_the_ar_model(kind, implementation):
    model = build_model(kind, implementation)
    xt, x0, _ = noised(11)
    with torch.no_grad():
        ar = model(input_ids=x0, use_cache=False).logits
    clean = run_both_halves(model, "causal_context", xt, x0)[:, 11:]
    torch.testing.assert_close(clean, ar, **close(implementation))


def test_the_clean_half_of_block_causal_is_not_the_ar_model():
    model, (xt, x0, _) = build_model("llama"), noised(11)
    with torch.no_grad():
        ar = model(input_ids=x0, use_cache=False).logits
    clean = run_both_halves(model, "block_causal", xt, x0)[:, 11:]
    assert (clean - ar).abs().max() > 1


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_the_clean_half_does_not_change_with_the_noise(attention):
    model, (xt, x0, _) = build_model("llama"), noised(11)
    one = run_both_halves(model, attention, xt, x0)[:, 11:]
    other = run_both_halves(model, attention, torch.full_like(x0, MASK), x0)[:, 11:]
    assert torch.equal(one, other)


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_the_noise_of_a_block_does_not_move_another_blocks_loss(attention):
    model, (xt, x0, _) = build_model("llama"), noised(12)
    other = xt.clone()
    other[:, 4:8] = torch.where(other[:, 4:8] == MASK, x0[:, 4:8], MASK)
    one, two = (run_both_halves(model, attention, x, x0)[:, :12] for x in (xt, other))
    assert torch.equal(one[:, :4], two[:, :4]) and torch.equal(one[:, 8:], two[:, 8:])
    assert not torch.allclose(one[:, 4:8], two[:, 4:8])


# The AR model inside


def ar_by_hand(model, row):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :, :MASK]
    logp = logits.log_softmax(-1)
    return torch.stack([-logp[i - 1, row[i]] for i in range(1, len(row))])


@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_the_ar_nll_is_the_stock_models(kind):
    model, rows = build_model(kind), [LONG, ROW, [1, 5], LONG[:7]]
    estimate = ar_nll(model, rows, SUPPRESSED, "kept")
    want = torch.stack([ar_by_hand(model, row).sum() for row in rows])
    torch.testing.assert_close(estimate.nats, want, **EXACT)
    assert estimate.tokens.tolist() == [9, 5, 1, 6] and estimate.error == 0
    assert estimate.mean == pytest.approx(float(want.sum()) / 21)


@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_block_length_1_read_across_the_boundary_is_the_ar_loss(kind):
    model, rows = build_model(kind), [LONG, LONG[::-1]]
    estimate = bound(model, spec("causal_context", 1), rows, SUPPRESSED, samples=1)
    torch.testing.assert_close(estimate.nats, ar_nll(model, rows, SUPPRESSED).nats, **EXACT)
    want = torch.stack([ar_by_hand(model, row).sum() for row in rows])
    torch.testing.assert_close(estimate.nats, want, **EXACT)


def test_block_length_1_read_in_the_noisy_half_is_not_the_ar_loss():
    model = build_model("llama")
    estimate = bound(model, spec("causal_context", 1, "same"), [LONG], SUPPRESSED, samples=1)
    assert abs(float(estimate.nats) - float(ar_nll(model, [LONG], SUPPRESSED).nats)) > 1


def suffix_masks(row):
    """One line for each token: it and all behind it masked."""
    masked = torch.arange(len(row))[None] >= torch.arange(1, len(row))[:, None]
    x0 = torch.tensor([row]).repeat(len(row) - 1, 1)
    return torch.where(masked, MASK, x0), x0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_at_step_0_the_full_shift_model_is_the_ar_model_bit_for_bit(kind, implementation):
    """Anneal 0 and suffix masks: each first masked token's logits are the AR model's."""
    model = build_model(kind, implementation)
    xt, x0 = suffix_masks(LONG)
    reveal = reveal_edges(0.0, len(LONG), len(LONG), seed=0, step=0)
    logits = run_both_halves(model, "full", xt, x0, reveal=reveal)
    slot = reading_slot(torch.arange(len(LONG))[None], "full", None, "shift")[0]
    with torch.no_grad():
        ar = model(input_ids=x0, use_cache=False).logits
    first = torch.arange(1, len(LONG))
    lines = first - 1
    assert torch.equal(logits[lines, slot[first]], ar[lines, first - 1])


@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
@pytest.mark.parametrize("kind", CLASSES)
def test_at_step_0_the_first_masked_tokens_loss_is_its_ar_nll(kind, attention):
    model, (xt, x0) = build_model(kind), suffix_masks(LONG)
    doc, pos = torch.zeros_like(x0), torch.arange(len(LONG)).expand_as(x0)
    ids, slots = lay_out(xt, x0, doc, pos, attention)
    width = len(LONG) if attention == "full" else BLOCK
    reveal = reveal_edges(0.0, len(LONG), width, seed=0, step=0)
    mask = model_mask(model, slots, attention, BLOCK, "kept", reveal)
    lines, first = torch.arange(len(xt)), torch.arange(1, len(LONG))
    slot = reading_slot(pos, attention, BLOCK, "shift")[lines, first]
    with torch.no_grad():
        logits = logits_at(
            model,
            lines * ids.shape[1] + slot,
            input_ids=ids,
            attention_mask=mask,
            position_ids=slots.pos,
        )
    nll = cross_entropy(logits, x0[lines, first], SUPPRESSED)
    torch.testing.assert_close(nll, ar_by_hand(model, LONG), **EXACT)


def test_at_step_0_a_block_start_is_the_ar_prediction_without_any_anneal():
    """It is read in the clean half: no noise reaches it, whatever its block holds."""
    model = build_model("llama")
    masked = torch.arange(len(LONG))[None] >= 1
    x0 = torch.tensor([LONG])
    pos = torch.arange(len(LONG))[None]
    with torch.no_grad():
        nll = masked_nll(model, spec("causal_context"), x0, masked, 0 * x0, pos, SUPPRESSED)
    want = ar_by_hand(model, LONG)
    torch.testing.assert_close(nll[[3, 7]], want[[3, 7]], **EXACT)  # tokens 4 and 8
    assert abs(float(nll[4] - want[4])) > 1e-3


# Monte Carlo


@pytest.mark.parametrize(
    ("attention", "samples", "count"),
    [("full", 3, 1), ("full", 4, 2), ("block_causal", 3, 2), ("causal_context", 3, 2),
     ("causal_context", 8, 1)],
)  # fmt: skip
def test_the_monte_carlo_mean_and_its_error_are_right(every_draw, attention, samples, count):
    """Brute force lies within three standard errors of the mean over 200 seeds, and within 1.96 of
    the reported ones in about 95 % of them, however few the draws and the rows are."""
    model, seeds = build_model("llama"), 200
    contract = spec(attention, 8)
    rows = [LONG, [1, *LONG[:0:-1]]][:count] if attention != "full" else [ROW, LONG[:7]][:count]
    exact = sum(every_draw(model, contract, row) for row in rows)
    estimates = [bound(model, contract, rows, SUPPRESSED, samples, seed) for seed in range(seeds)]
    values = torch.stack([estimate.nats.sum() for estimate in estimates])
    assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / seeds**0.5
    errors = torch.tensor([e.error * e.tokens.sum() for e in estimates])
    covered = float(((values - exact).abs() <= 1.96 * errors).double().mean())
    assert 0.9 <= covered <= 0.99


def test_continuations_of_one_context_share_their_draws():
    def masks(row):
        return draw(MASKS, row, 4, scored(row, SUPPRESSED, start), 4, 0, start).masked

    model, contract, start = build_model("llama"), spec("causal_context"), 6  # within a block
    long = [*LONG, *LONG[1:5]]
    rows = [long, [*long[:-1], 7]]
    assert torch.equal(masks(long), masks(rows[1])) and not masks(long)[:, :start].any()
    assert torch.equal(masks(long)[:, :12], masks(long[:12]))  # a shorter one
    assert not torch.equal(masks(long), masks([2, *long[1:]]))  # another context
    both = bound(model, contract, rows, SUPPRESSED, 4, starts=[start, start])
    apart, error = difference_of(both.row(0), both.row(1))
    assert apart == pytest.approx(float(both.nats[0] - both.nats[1]))
    assert error < 0.7 * math.sqrt(float(both.variance.sum()))
    assert difference_of(both.row(0), both.row(0)) == (0, 0)


@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_a_continuation_is_bounded_given_its_context(attention):
    """The oracle masks tokens from the start alone."""
    model, start, contract = build_model("llama"), 6, spec(attention)
    total = 0.0
    spans = [(0, 10)] if attention == "full" else [(4, 8), (8, 10)]
    for first, end in spans:
        nll = table(model, LONG, first, end, attention, BLOCK, "shift")
        kept = {subset: nll[subset] for subset in nll if all(i >= start for i in subset)}
        total += k_form(kept)
    got = bound(model, contract, [LONG], SUPPRESSED, 16, starts=[start])
    assert float(got.nats) == pytest.approx(total, rel=0, abs=1e-10)
    assert got.error == 0 and got.tokens.tolist() == [4]


def test_the_error_of_a_mean_is_that_of_its_rows_together():
    model, rows = build_model("llama"), [LONG, ROW]
    both = bound(model, spec("full"), rows, SUPPRESSED, samples=4)
    assert both.mean == pytest.approx(float(both.nats.sum()) / 14)
    parts = total_of([both.row(0), both.row(1)])
    assert (both.mean, both.error) == pytest.approx((parts.mean, parts.error))
    assert both.error > math.sqrt(float(both.variance.sum())) / 14  # few draws


def test_one_draw_has_no_error():
    estimate = bound(build_model("llama"), spec("full"), [ROW], SUPPRESSED, samples=1)
    assert math.isnan(estimate.error) and math.isfinite(estimate.mean)


def test_a_mask_token_in_a_row_is_scored_by_neither_mode():
    model, row = build_model("llama"), [1, 17, MASK, 5, 33]
    estimate = bound(model, spec("causal_context", 1), [row], SUPPRESSED, samples=1)
    ar = ar_nll(model, [row], SUPPRESSED)
    assert estimate.tokens.tolist() == ar.tokens.tolist() == [3]
    torch.testing.assert_close(estimate.nats, ar.nats, **EXACT)


def test_what_draws_give_is_split_where_the_blocks_are():
    """A drawn block of seven tokens, and an enumerated one of one: no halves of nine."""
    row = torch.arange(1, 10).tolist()
    found = draw(MASKS, row, 8, torch.arange(9) > 0, 4, 0, 1)
    enumerated, drawn = found.sums(found.masked.double(), 4)
    assert float(enumerated) == pytest.approx(1)
    torch.testing.assert_close(drawn, torch.tensor([[7.0, 0.0]] * 4).double())


def test_the_draws_are_a_function_of_the_seed():
    def run(seed):
        return bound(build_model("llama"), spec("full"), [ROW], SUPPRESSED, 2, seed).nats

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_the_bound_does_not_depend_on_the_batch_split(attention):
    model, rows = build_model("llama"), [LONG, LONG[::-1], [*LONG[2:], 4, 4]]
    one, all_at_once = (
        bound(model, spec(attention), rows, SUPPRESSED, samples=4, batch_size=size).nats
        for size in (1, 64)
    )
    torch.testing.assert_close(one, all_at_once, **EXACT)


@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_the_bound_of_ragged_rows_is_that_of_each_alone(attention):
    model, rows = build_model("llama"), [LONG, ROW, LONG[:8]]
    contract = spec(attention)
    together = bound(model, contract, rows, SUPPRESSED, samples=4, batch_size=64).nats
    alone = torch.cat([bound(model, contract, [r], SUPPRESSED, samples=4).nats for r in rows])
    torch.testing.assert_close(together, alone, **EXACT)
