"""The loss: divisors and weights by hand, logits at a few slots, what a gradient may touch."""

import copy

import pytest
import torch
from conftest import CLASSES, MASK, MASKS, tiny_spec

from ar2diff.core.attention import PADDING, lay_out, model_mask, reading_slot
from ar2diff.core.forward import logits_at
from ar2diff.core.seeds import content_key
from ar2diff.data.documents import Collator, DocumentPart
from ar2diff.diffusion.cross_entropy import cross_entropy
from ar2diff.diffusion.likelihood import masked_nll
from ar2diff.diffusion.objective import (
    cart_weights,
    coefficients,
    joint_divisors,
    suppressed_ids,
    time_weights,
)

ATTENTIONS = ("causal_context", "block_causal", "full")


def words(*size, seed=0):
    return torch.randint(3, MASK, size, generator=torch.Generator().manual_seed(seed))


# Divisors. One row of two documents: A has 2 scored tokens, one masked (t = 1/2, cross-entropy 2);
# B has 4, one masked (t = 1/4, cross-entropy 3).

SEQ = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, PADDING]])
WEIGHT = torch.tensor([[0.0, 1, 1, 0, 1, 1, 1, 1, 0]])
MASKED = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0, 0]]).bool()
T = torch.tensor([[0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0]])
CE = torch.tensor([[0.0, 2, 0, 0, 0, 0, 3, 0, 0]])


def loss(kind, normaliser, masked=MASKED, weight=WEIGHT):
    coef, divisor = coefficients(masked, weight, SEQ, time_weights(T, kind), normaliser)
    return float((coef * CE).sum() / divisor)


@pytest.mark.parametrize(
    ("kind", "normaliser", "value"),
    [
        ("uniform", "tokens", 5 / 6),  # (2 + 3) / 6 scored tokens
        ("uniform", "masked", 5 / 2),  # (2 + 3) / 2 masked tokens
        ("uniform", "sequence", 7 / 8),  # (2/2 + 3/4) / 2 documents
        ("1/t", "tokens", 8 / 3),  # (2*2 + 4*3) / 6
        ("1/t", "masked", 8.0),  # (2*2 + 4*3) / 2
        ("1/t", "sequence", 5 / 2),  # (4/2 + 12/4) / 2
    ],
)
def test_the_normalisers_are_the_numbers_computed_by_hand(kind, normaliser, value):
    assert loss(kind, normaliser) == pytest.approx(value, rel=1e-6)


def test_the_joint_divisor_is_the_number_of_masked_tokens_plus_that_of_ar_tokens():
    coef, divisor = coefficients(MASKED, WEIGHT, SEQ, time_weights(T, "uniform"), "masked+ar")
    divisors = joint_divisors("masked+ar", divisor, torch.tensor(6))
    assert [float(d) for d in divisors] == [8.0, 8.0] and float((coef * CE).sum()) == 5.0
    for normaliser in ("tokens", "masked", "sequence"):
        assert joint_divisors(normaliser, divisor, torch.tensor(6)) == (divisor, torch.tensor(6))


@pytest.mark.parametrize("kind", ["uniform", "1/t"])
def test_the_three_normalisers_are_three_different_functionals(kind):
    assert len({round(loss(kind, n), 6) for n in ("tokens", "masked", "sequence")}) == 3


def test_an_eos_run_of_any_length_weighs_as_one_token():
    """B's last two tokens are one EOS run: 3 scored tokens, and its EOS weighs a half."""
    weight = WEIGHT.clone()
    weight[0, 6:8] = 0.5
    assert loss("uniform", "tokens", weight=weight) == pytest.approx((2 + 3 / 2) / 5)
    assert loss("uniform", "masked", weight=weight) == pytest.approx((2 + 3 / 2) / 1.5)
    assert loss("uniform", "sequence", weight=weight) == pytest.approx((2 / 2 + 1.5 / 3) / 2)


@pytest.mark.parametrize("normaliser", ["tokens", "masked", "sequence"])
def test_only_masked_tokens_have_a_coefficient(normaliser):
    coef, _ = coefficients(MASKED, WEIGHT, SEQ, time_weights(T, "1/t"), normaliser)
    assert (coef[MASKED] > 0).all() and not coef[~MASKED].any()


@pytest.mark.parametrize("normaliser", ["tokens", "masked", "sequence"])
@pytest.mark.parametrize("kind", ["uniform", "1/t", "cart"])
def test_a_draw_without_masks_is_a_finite_zero(kind, normaliser):
    none = torch.zeros_like(MASKED)
    weights = (
        cart_weights(none, SEQ != PADDING, SEQ, SEQ * 0, 0.3)
        if kind == "cart"
        else time_weights(torch.zeros_like(T), kind)
    )
    coef, divisor = coefficients(none, WEIGHT, SEQ, weights, normaliser)
    assert not coef.any() and coef.isfinite().all() and divisor.isfinite()


def piece(length, seed=0, run=1):
    ids = words(length, seed=seed).tolist()
    return DocumentPart(ids, length - run + 1, run, 0, content_key(ids))


@pytest.mark.parametrize(
    ("normaliser", "weight"), [("tokens", "1/t"), ("masked", "uniform"), ("sequence", "cart")]
)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_gradient_does_not_depend_on_the_batch_split(
    tiny_model, make_recipe, attention, normaliser, weight
):
    """One batch of four ragged rows, or four micro-batches over one global divisor."""
    recipe = make_recipe(
        attention, objective={"normaliser": normaliser, "weight": weight}, data={"max_length": 24}
    )
    rows = [(i, [piece(4 * (1 + i), seed=i, run=1 + i % 3)]) for i in range(4)]
    model = copy.deepcopy(tiny_model("llama"))
    contract = tiny_spec(attention, recipe.convert.block_length)

    def gradient(parts):
        batches = [Collator(recipe, MASKS, rows_per_step=4)(part) for part in parts]
        divisor = sum(batch["divisor"] for batch in batches)
        model.zero_grad()
        for batch in batches:
            nll = nll_of(model, contract, batch)
            ((batch["coef"][batch["scored"]] * nll).sum() / divisor).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([rows])
    assert whole.abs().max() > 1e-3
    for parts in ([[row] for row in rows], [rows[:1], rows[1:]]):
        torch.testing.assert_close(gradient(parts), whole, rtol=0, atol=1e-6)


def nll_of(model, contract, batch):
    # doc and pos of a batch are all that masked_nll needs: its index is that of training
    return masked_nll(
        model,
        contract,
        batch["x0"],
        batch["scored"],
        batch["doc"],
        batch["pos"],
        suppressed_ids(MASK, range(64), 64),
    )


# Weights


def test_weight_1_over_t_is_the_reciprocal_and_0_where_nothing_was_masked():
    t = torch.tensor([0.25, 1.0, 0.0])
    assert time_weights(t, "1/t").tolist() == [4.0, 1.0, 0.0]
    assert time_weights(t, "uniform").tolist() == [1.0, 1.0, 1.0]


def cart(length, masked, p=0.5, seq=None, block=None, context=None):
    hidden = torch.zeros(1, length, dtype=torch.bool)
    hidden[0, masked] = True
    zero = torch.zeros(1, length, dtype=torch.long)
    context = torch.ones_like(hidden) if context is None else context
    return cart_weights(
        hidden, context, zero if seq is None else seq, zero if block is None else block, p
    )[0]


def test_cart_by_hand():
    # the token in the middle of five, p = 1/2: 1/2 * (1/2 + 1/4) on each side
    assert float(cart(5, [2])[2]) == pytest.approx(0.75)
    # its left neighbour is masked too: 1/4 remains of that side
    assert float(cart(5, [1, 2])[2]) == pytest.approx(0.5 * (0.25 + 0.5 + 0.25))
    # p = 0.3: neighbours at distance 1 weigh 0.3, at distance 2 0.21
    assert float(cart(5, [2], p=0.3)[2]) == pytest.approx(0.5 * 2 * (0.3 + 0.3 * 0.7))


def test_cart_tends_to_1_inside_a_clean_text_and_to_a_half_at_its_edge():
    assert float(cart(201, [100], p=0.3)[100]) == pytest.approx(1.0, abs=1e-6)
    assert float(cart(201, [0], p=0.3)[0]) == pytest.approx(0.5, abs=1e-6)
    assert float(cart(201, [200], p=0.3)[200]) == pytest.approx(0.5, abs=1e-6)


def test_cart_is_0_where_nothing_is_visible():
    assert float(cart(6, range(6))[3]) == 0.0


def test_cart_counts_no_eos_fill_no_padding_and_no_other_document():
    context = torch.tensor([[1, 1, 1, 0, 0]]).bool()  # two slots of fill behind
    assert float(cart(5, [2], context=context)[2]) == pytest.approx(0.5 * (0.5 + 0.25))
    seq = torch.tensor([[0, 0, 0, 1, 1]])
    assert float(cart(5, [2], seq=seq)[2]) == pytest.approx(0.5 * (0.5 + 0.25))


def test_cart_counts_earlier_blocks_as_clean_and_later_ones_not_at_all():
    block = torch.tensor([[0, 0, 1, 1, 2, 2]])
    weights = cart(6, range(1, 6), block=block)
    # token 3: block 0 stands at distances 3 and 2, its neighbour 2 is masked, block 2 is not there
    assert float(weights[3]) == pytest.approx(0.5 * (0.125 + 0.25))
    assert float(cart(6, [3], block=block)[3]) == pytest.approx(0.5 * (0.125 + 0.25 + 0.5))


def test_the_collator_gives_cart_the_real_tokens_alone(make_recipe):
    recipe = make_recipe("full", objective={"weight": "cart", "cart_p": 0.5})
    ids = words(8).tolist()
    batch = Collator(recipe, MASKS)([(0, [DocumentPart(ids, 5, 4, 0, content_key(ids))])])
    real = torch.arange(8)[None] < 5
    zero = torch.zeros(1, 8, dtype=torch.long)
    want = cart_weights(batch["scored"], real, zero, zero, 0.5)[0]
    want[-4:] /= 4  # an EOS run of four
    assert torch.allclose(batch["coef"][0], want * batch["scored"][0])


# Logits


@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed", "gemma2", "granite"])
def test_logits_at_a_slot_are_those_of_the_whole_forward(tiny_model, kind):
    model = tiny_model(kind, "eager" if kind == "gemma2" else "sdpa")
    ids = words(3, 7)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        for index in ([0], [20, 3, 3, 11], list(range(21)), []):
            index = torch.tensor(index, dtype=torch.long)
            some = logits_at(model, index, input_ids=ids)
            assert some.shape == (len(index), 64)
            torch.testing.assert_close(some, full[index], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_bfloat16_the_head_of_the_wanted_rows_computes_in_float32(tiny_model, kind):
    model, ids = tiny_model(kind, "eager", torch.bfloat16), words(2, 9)
    index, states = torch.tensor([3, 11, 17]), []
    with torch.no_grad():
        logits = logits_at(model, index, input_ids=ids, read=states)
        want = states[0].float() @ model.lm_head.weight.float().T
        if kind == "gemma2":
            want = 2 * (want / 2).tanh()  # the model's own soft cap
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)
    under = tiny_model(kind, "eager", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = logits_at(under, index, input_ids=ids, read=states)
    want = states[1].float() @ under.lm_head.weight.T
    want = 2 * (want / 2).tanh() if kind == "gemma2" else want
    torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)


def test_the_soft_cap_is_the_models_own(tiny_model):
    model, ids = tiny_model("gemma2", "eager"), words(1, 9)
    with torch.no_grad():
        logits = logits_at(model, torch.arange(9), input_ids=ids)
        raw = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)[0]
    assert raw.abs().max() > 2.0 > logits.abs().max()  # the cap is 2


def test_a_forward_afterwards_is_a_whole_one_again(tiny_model):
    model, ids = tiny_model("llama"), words(1, 5)
    with torch.no_grad():
        logits_at(model, torch.tensor([2]), input_ids=ids)
        assert model(input_ids=ids).logits.shape == (1, 5, 64)
        with pytest.raises(IndexError):
            logits_at(model, torch.tensor([99]), input_ids=ids)
        assert model(input_ids=ids).logits.shape == (1, 5, 64)


def test_a_wrapper_that_hides_its_model_can_name_it(tiny_model):
    model, ids = tiny_model("llama"), words(1, 5)

    class Wrapper(torch.nn.Module):
        def forward(self, **inputs):
            return model(**inputs)

    with torch.no_grad():
        got = logits_at(Wrapper(), torch.tensor([4]), inner=model, input_ids=ids)
        assert torch.equal(got, logits_at(model, torch.tensor([4]), input_ids=ids))


# Suppressed ids


def test_suppressed_ids_are_the_mask_and_the_rows_without_a_token():
    assert suppressed_ids(5, range(8), 10).nonzero()[:, 0].tolist() == [5, 8, 9]
    assert suppressed_ids(None, range(10), 10).sum() == 0


def batch_of(attention, seed=0):
    x0 = words(2, 11, seed=seed)
    masked = torch.zeros(2, 11, dtype=torch.bool)
    masked[0, [1, 4, 5, 10]], masked[1, [2, 3, 7]] = True, True
    pos = torch.arange(11).expand_as(x0)
    return x0, masked, torch.zeros_like(x0), pos


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_perturbing_the_mask_logit_changes_nothing(tiny_model, attention, prediction):
    """The head's row of the mask may say what it likes (the head is not tied)."""
    model = copy.deepcopy(tiny_model("llama"))
    batch, suppressed = batch_of(attention), suppressed_ids(MASK, range(64), 64)
    contract = tiny_spec(attention, prediction=prediction)
    with torch.no_grad():
        before = masked_nll(model, contract, *batch, suppressed)
        free = masked_nll(model, contract, *batch, torch.zeros(64, dtype=torch.bool))
        model.lm_head.weight[MASK] += 3.0
        after = masked_nll(model, contract, *batch, suppressed)
    assert torch.equal(before, after)
    assert not torch.allclose(before, free)


# Gradients


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_the_gradient_reaches_the_head_only_where_a_masked_token_is_read(
    tiny_model, attention, prediction
):
    model, contract = (
        copy.deepcopy(tiny_model("llama")),
        tiny_spec(attention, prediction=prediction),
    )
    x0, masked, doc, pos = batch_of(attention)
    hidden = []
    model.model.register_forward_hook(lambda _m, _a, out: hidden.append(out.last_hidden_state))
    xt = torch.where(masked, MASK, x0)
    ids, slots = lay_out(xt, x0, doc, pos, attention)
    slot = reading_slot(pos, attention, contract.block_length, prediction)
    index = (slot + torch.arange(2)[:, None] * ids.shape[1])[masked]
    mask = model_mask(model, slots, attention, contract.block_length, None)
    logits = logits_at(model, index, input_ids=ids, attention_mask=mask, position_ids=slots.pos)
    hidden[0].retain_grad()
    cross_entropy(logits, x0[masked], suppressed_ids(MASK, range(64), 64)).sum().backward()
    read = torch.zeros(ids.numel(), dtype=torch.bool)
    read[index] = True
    gradient = hidden[0].grad.flatten(0, 1)
    assert gradient[read].abs().amax(-1).min() > 0
    assert not gradient[~read].any()
    assert not model.lm_head.weight.grad[MASK].any()  # the mask is nothing that can be said


def test_the_gradient_of_an_unmasked_tokens_logits_is_zero(make_recipe):
    """The whole [B, L, V] logits, the loss as the collator weighs it."""
    batch = Collator(make_recipe("block_causal"), MASKS)(
        [(0, [piece(16)]), (1, [piece(8, seed=1)])]
    )
    logits = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ce = cross_entropy(logits.flatten(0, 1), batch["x0"].flatten()).view(2, 16)
    ((batch["coef"] * ce).sum() / batch["divisor"]).backward()
    moved = logits.grad.abs().amax(-1) > 0
    assert torch.equal(moved, batch["scored"])


def test_a_token_of_weight_0_leaves_no_gradient():
    logits = torch.randn(9, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = WEIGHT.clone()
    weight[0, 6] = 0  # masked, but not to be learned
    coef, divisor = coefficients(MASKED, weight, SEQ, time_weights(T, "1/t"), "tokens")
    ((coef[0] * cross_entropy(logits, words(9))).sum() / divisor).backward()
    assert not logits.grad[6].any() and logits.grad[1].any()
