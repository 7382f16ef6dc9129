"""Divergences from an AR model's distribution, and the loss that distils it."""

import math

import pytest
import torch

from ar2diff.diffusion.distillation import acceptance, divergence, mixed_divergence

KINDS = ["ce", "kl", "tv", "lk"]
SUPPRESSED = (3, 6)


def logits_pair(rows=5, vocabulary=8, dtype=torch.double):
    """Two sets of logits without the suppressed ids, and the targets."""
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, rows, vocabulary, dtype=torch.double, generator=generator) * 2
    q[:, SUPPRESSED], p[:, SUPPRESSED] = -math.inf, -math.inf
    return q.to(dtype), p.to(dtype), torch.arange(rows) % 3


def by_loops(kind, q_logits, p_logits, target):
    """A divergence of one position, from its formula."""
    q, p = (
        [math.exp(x) / sum(map(math.exp, row)) for x in row]
        for row in (q_logits.tolist(), p_logits.tolist())
    )
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    tv = sum(abs(a - b) for a, b in zip(p, q, strict=True))
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    share = math.exp(-3 * accepted)
    ce = -math.log(q[target])
    return {"ce": ce, "kl": kl, "tv": tv, "lk": share * kl + (1 - share) * tv}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_their_formulas(kind):
    q, p, target = logits_pair()
    want = [by_loops(kind, *row) for row in zip(q, p, target.tolist(), strict=True)]
    torch.testing.assert_close(divergence(kind, q, p, target), torch.tensor(want).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences_and_flows_into_q_alone(kind):
    q, p, target = logits_pair(rows=1)
    q.requires_grad_(), p.requires_grad_()
    divergence(kind, q, p, target).sum().backward()
    assert p.grad is None and q.grad.isfinite().all()
    share = None
    if kind == "lk":  # lambda is a constant of the gradient
        accepted = float(acceptance(q.detach(), p.detach()))
        share = math.exp(-3 * accepted)

    def value(logits):
        if share is None:
            return by_loops(kind, logits, p[0].detach(), int(target[0]))
        kl, tv = (by_loops(k, logits, p[0].detach(), int(target[0])) for k in ("kl", "tv"))
        return share * kl + (1 - share) * tv

    for v in range(8):
        if v in SUPPRESSED:
            assert q.grad[0, v] == 0
            continue
        up, down = (q[0].detach().clone() for _ in range(2))
        up[v] += 1e-6
        down[v] -= 1e-6
        slope = (value(up) - value(down)) / 2e-6
        assert float(q.grad[0, v]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "tv", "lk"])
def test_equal_distributions_have_no_divergence(kind):
    q, _, target = logits_pair(dtype=torch.float32)
    shifted = q + 5  # the same distribution
    q.requires_grad_()
    found = divergence(kind, q, shifted, target)
    torch.testing.assert_close(found, torch.zeros(5), atol=1e-6, rtol=0)
    found.sum().backward()
    assert q.grad.abs().max() < 1  # finite; tv has a kink here


def test_the_acceptance_is_one_minus_half_of_tv():
    q, p, target = logits_pair()
    torch.testing.assert_close(acceptance(q, p), 1 - divergence("tv", q, p, target) / 2)


def test_a_mixture_is_the_weighted_sum():
    q, p, target = logits_pair()
    want = 0.1 * divergence("ce", q, p, target) + 0.9 * divergence("tv", q, p, target)
    torch.testing.assert_close(mixed_divergence({"ce": 0.1, "tv": 0.9}, q, p, target), want)


def test_bfloat16_logits_are_compared_in_float32():
    q, p, target = logits_pair(dtype=torch.bfloat16)
    for kind in KINDS:
        found = divergence(kind, q, p, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, divergence(kind, q.float(), p.float(), target), atol=0, rtol=0
        )
