"""Cross-entropy of logits and through the head against torch's, and who takes which."""

import copy

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from conftest import MASK, build_model

from ar2diff.core.forward import output_at
from ar2diff.diffusion import cross_entropy as module
from ar2diff.diffusion.cross_entropy import (
    cross_entropy,
    has_plain_head,
    loss_of_hidden,
    loss_of_logits,
)
from ar2diff.diffusion.objective import suppressed_ids

PARTS = [1, 2 * 64, 1 << 22]  # logits at a time: a row, two, all


def words(*size, seed=0):
    return torch.randint(3, MASK, size, generator=torch.Generator().manual_seed(seed))


def test_suppressing_ids_is_a_smaller_vocabulary_and_changes_nothing_else():
    logits = torch.randn(9, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    target, suppressed = words(9) % 60, suppressed_ids(61, range(63), 64)  # 61 and 63 go
    keep = (~suppressed).nonzero()[:, 0]
    want = torch.nn.functional.cross_entropy(
        logits[:, keep], torch.searchsorted(keep, target), reduction="none"
    )
    got = cross_entropy(logits, target, suppressed)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    nothing = torch.zeros(64, dtype=torch.bool)
    assert torch.equal(cross_entropy(logits, target, nothing), cross_entropy(logits, target))


def test_cross_entropy_is_at_least_float32():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    target = words(4)
    for dtype, out in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        ce = cross_entropy(logits.to(dtype), target)
        assert ce.dtype == out
        want = -logits.to(dtype).double().log_softmax(-1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(ce.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_cross_entropy_and_its_gradient_are_those_of_torch(monkeypatch, part):
    monkeypatch.setattr(module, "PART", part)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 64, dtype=torch.double, generator=generator, requires_grad=True)
    target, suppressed = words(9) % 60, suppressed_ids(61, range(63), 64)
    coef = torch.rand(9, dtype=torch.double, generator=generator)
    want = torch.nn.functional.cross_entropy(
        logits.masked_fill(suppressed, float("-inf")), target, reduction="none"
    )
    got = cross_entropy(logits, target, suppressed)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((coef * ce).sum(), logits)[0] for ce in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_keeps_nothing_of_the_logits_size_but_them(dtype):
    logits = torch.randn(64, 512).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy(logits, words(64), suppressed_ids(MASK, range(512), 512)).sum()
    large = [x for x in kept if x.numel() >= 512 * 8]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]


# Through the head


def random(*size, seed=0):
    return torch.randn(*size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def weighted(way, head, hidden, *rest):
    """The loss through the head, or of its logits."""
    if way == "hidden":
        return loss_of_hidden(head, hidden, *rest)
    return loss_of_logits(head(hidden), *rest)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [0, 4, 9])
@pytest.mark.parametrize("part", PARTS)
def test_through_the_head_all_is_as_with_torchs_logits(monkeypatch, part, first, bias):
    """The first rows lack the suppressed ids, the others have all."""
    monkeypatch.setattr(module, "PART", part)
    head = torch.nn.Linear(8, 64, bias=bias, dtype=torch.double)
    hidden = random(9, 8).requires_grad_()
    inputs = [hidden, *head.parameters()]
    target, suppressed, coef = words(9) % 60, suppressed_ids(61, range(63), 64), random(9, seed=1)
    logits = head(hidden).masked_fill(
        suppressed & (torch.arange(9) < first)[:, None], float("-inf")
    )
    want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    right = [torch.autograd.grad(7 * (coef * want).sum(), inputs), want, logits.argmax(1) == target]
    for way in ("hidden", "logits"):
        loss = weighted(way, head, hidden, target, coef, suppressed, first)
        found = [torch.autograd.grad(7 * loss.total, inputs), loss.ce, loss.right]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        assert not loss.ce.requires_grad


def test_the_likeliest_is_right():
    hidden, head = random(5, 8), torch.nn.Linear(8, 64, bias=False, dtype=torch.double)
    likeliest = head(hidden).argmax(1)
    target = torch.where(torch.arange(5) < 3, likeliest, (likeliest + 1) % 64)
    loss = loss_of_hidden(head, hidden, target, torch.ones(5), None, 0)
    assert loss.right.tolist() == [True] * 3 + [False] * 2


def test_a_frozen_head_gets_no_gradient_and_its_inputs_get_theirs():
    head = torch.nn.Linear(8, 64, bias=False, dtype=torch.double).requires_grad_(False)
    hidden = random(9, 8).requires_grad_()
    loss_of_hidden(head, hidden, words(9), torch.ones(9), None, 9).total.backward()
    assert head.weight.grad is None
    want = cross_entropy(head(hidden), words(9)).sum()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(want, hidden)[0])


def test_no_token_is_no_loss_and_a_gradient_of_0():
    head = torch.nn.Linear(8, 64, bias=False)
    suppressed = suppressed_ids(61, range(63), 64)
    loss = loss_of_hidden(head, torch.zeros(0, 8), words(0), torch.ones(0), suppressed, 0).total
    loss.backward()  # a rank without masked tokens must not leave the others waiting
    assert loss == 0 and not head.weight.grad.any()


def test_autocast_computes_as_it_does_with_logits():
    head = torch.nn.Linear(64, 64, bias=True)
    hidden = random(40, 64).float().requires_grad_()
    inputs, found = [hidden, *head.parameters()], []
    for way in ("hidden", "logits"):
        asked = words(40), torch.ones(40) / 40, suppressed_ids(61, range(63), 64), 20
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = weighted(way, head, hidden, *asked)
        assert loss.total.dtype == torch.float32
        found.append([loss.total, loss.ce, *torch.autograd.grad(loss.total, inputs)])
    assert [x.dtype for x in found[0]] == [torch.float32] * 5
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("first", [0, 20])
def test_nothing_of_the_logits_size_is_kept(first):
    head, hidden, kept = torch.nn.Linear(8, 512), random(300, 8).float().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        asked = words(300), torch.ones(300), suppressed_ids(MASK, range(512), 512), first
        loss_of_hidden(head, hidden, *asked)
    assert max(x.numel() for x in kept) == 512 * 8


@pytest.mark.parametrize(
    ("kind", "plain"),
    [("llama", True), ("qwen3", True), ("gpt2", True), ("gemma2", False), ("granite", False)],
)
def test_a_head_with_a_cap_or_a_scale_is_not_plain(kind, plain):
    for dtype in (torch.float64, torch.bfloat16):
        assert has_plain_head(build_model(kind, "eager", dtype)) is plain


def test_a_head_of_zeros_with_a_scale_is_not_plain():
    model = copy.deepcopy(build_model("granite"))
    model.lm_head.weight.data.zero_()
    assert not has_plain_head(model)


def test_a_head_is_plain_under_autocast_whose_outputs_are_widened_again():
    """As accelerate wraps a model in mixed precision."""
    model = build_model("llama", "eager", torch.float32)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    assert has_plain_head(model)


def test_an_adapter_on_the_head_is_not_passed_by():
    from peft import LoraConfig, get_peft_model

    def adapted(target):
        model = copy.deepcopy(build_model("llama", dtype=torch.float32))
        return get_peft_model(model, LoraConfig(r=2, target_modules=target))

    assert has_plain_head(adapted(["q_proj"]))
    assert not has_plain_head(adapted(["lm_head"]))
    assert not has_plain_head(adapted(["q_proj", "lm_head"]))


@pytest.mark.parametrize("tied", [False, True])
def test_in_the_heads_place_the_whole_models_gradient_is_the_same(tied):
    model = copy.deepcopy(build_model("llama", tie_word_embeddings=tied))
    ids, index = words(2, 7), torch.tensor([0, 3, 3, 12])
    asked, found = (words(4, seed=1), random(4, seed=2), suppressed_ids(MASK, range(64), 64), 2), []
    for way in ("hidden", "logits"):
        output = output_at(
            model, index, input_ids=ids, attention_mask=None,
            instead=(lambda head, hidden: loss_of_hidden(head, hidden, *asked).total.view(1, 1, 1))
            if way == "hidden" else None,
        )  # fmt: skip
        assert output.logits.shape == ((1, 1, 1) if way == "hidden" else (1, 4, 64))
        made = output.logits[0]
        loss = made[0, 0] if way == "hidden" else loss_of_logits(made, *asked).total
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_a_gpu_takes_a_thousand_rows_at_a_time_however_wide_they_are():
    assert module.rows_at_once(151_936, "cpu", module.PART) == 55
    assert module.rows_at_once(151_936, "cuda", module.PART) == 1024
    assert module.rows_at_once(512, "cuda", module.PART) == module.rows_at_once(512, "cpu", 1 << 23)
