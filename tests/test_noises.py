"""The kinds of noise are exact: laws, steps, bounds and samplers against dense matrices that are
written here, in float64, over all states of a few tokens."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product

import pytest
import torch
from conftest import build_model
from test_cross_entropy import PARTS
from test_likelihood import own_mask, raw_logits

from ar2diff.core import noise as module
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.forward import logits_at
from ar2diff.core.noise import Mask, MaskUniform, SelfGuess, Uniform
from ar2diff.core.options import Options
from ar2diff.core.spec import Spec, format_of
from ar2diff.diffusion import cross_entropy
from ar2diff.diffusion.corruption import bound_times, corrupt
from ar2diff.diffusion.likelihood import bound, masked_nll
from ar2diff.diffusion.task import masked_task

V, IDS, MASK = 5, (0, 1, 3), 4  # row 2 has no token
K = len(IDS)
SUPPRESSED = torch.tensor([i not in IDS for i in range(V)])
NEVER = -torch.inf
TIMES = (0.05, 0.3, 0.62, 0.97)


def double(*values):
    return torch.tensor(values, dtype=torch.double)


def random(*size, seed=0):
    return torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# The kinds, and their laws a second time


def masking(t):
    return 1 - t, t


def linear(t):
    return 1 - t, 0.0


def cosine(t):
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2), 0.0


def gidd(p_u, gamma):
    def law(t):
        c = 2**gamma * p_u / (1 - p_u) * (t * (1 - t)) ** (gamma / 2)
        return (1 - t) / (1 + c), t / (1 + c)

    return law


# A noise, and the shares of a token itself and of the mask at a time, the rest being any of the
# ids; None where no law tells what is shown. A new kind belongs here.
KINDS = {
    "mask": (Mask(), masking),
    "uniform": (Uniform(), linear),
    "uniform free": (Uniform("free"), linear),
    "cosine free": (Uniform("free", schedule="cosine"), cosine),
    "mask_uniform": (MaskUniform(p_u=0.3), gidd(0.3, 1.0)),
    "mask_uniform steep": (MaskUniform(p_u=0.15, gamma=1.6), gidd(0.15, 1.6)),
    "self": (SelfGuess(), None),
}
KINDS = {name: (noise.on(MASK, SUPPRESSED), law) for name, (noise, law) in KINDS.items()}
FREE = [name for name, (noise, _) in KINDS.items() if noise.free]
TRACKED = [name for name in KINDS if name not in FREE]
LAWFUL = [name for name, (_, law) in KINDS.items() if law]


def over(names):
    """The test for each of some kinds."""
    return pytest.mark.parametrize(("noise", "law"), [KINDS[n] for n in names], ids=names)


def dense(law, t):
    """[V, V] q(xt | x0)."""
    a, m = law(t)
    found = a * torch.eye(V, dtype=torch.double)
    found[:, MASK] += m
    found[:, IDS] += round(1 - a - m, 15) / K
    return found


def jump(law, s, t):
    """[V, V] q(xt | xs): what makes the marginal at t of that at s."""
    return torch.linalg.solve(dense(law, s), dense(law, t))


def bayes(law, v, x, t, s):
    """[V] q(xs | xt = x), where x0 is drawn from v [V]."""
    joint = v @ dense(law, s) * jump(law, s, t)[:, x]
    return joint / joint.sum()


def test_every_kind_and_form_is_tested():
    tested = {(type(noise), noise.form) for noise, _ in KINDS.values()}
    assert tested == {(kind, form) for kind in module.KINDS for form in kind.forms}


# The process


@over(LAWFUL)
def test_the_marginals_are_those_of_the_law(noise, law):
    eye = torch.eye(V, dtype=torch.double)
    for t in (0.0, *TIMES, 1.0):
        a, m, u = noise.shares(double(t))
        close(a + m + u, double(1))
        assert min(a, m, u) >= 0
        close(noise.marginal(eye, double(t).expand(V)), dense(law, t))
    close(dense(law, 0), eye)
    ends = torch.bincount(noise.prior(torch.arange(300).double() / 300), minlength=V)
    close(dense(law, 1), (ends.double() / 300).expand(V, V))


@over(LAWFUL)
def test_noise_between_two_times_is_a_markov_chain_with_the_rates(noise, law):
    eye = torch.eye(V, dtype=torch.double)
    for s, t in pairwise(TIMES):
        between = torch.linalg.solve(*(noise.marginal(eye, double(x).expand(V)) for x in (s, t)))
        assert between.min() > -1e-12
        close(between.sum(1), torch.ones(V, dtype=torch.double))
        instant = jump(law, t, t + 1e-6)[2] / 1e-6  # the rows differ on the diagonal alone
        into_mask, into_any = noise.rates(double(t))
        close(instant[MASK], into_mask[0], atol=1e-4 * float(into_mask) + 1e-8)
        close(instant[0], into_any[0] / K, atol=1e-4 * float(into_any) + 1e-8)


@over(LAWFUL)
def test_a_step_backwards_is_bayes_rule(noise, law):
    mixed = random(V).masked_fill(SUPPRESSED, NEVER).softmax(-1)
    for s, t in pairwise((0.0, *TIMES, 1.0)):
        for x in [i for i in range(V) if dense(law, t)[0, i] > 0]:
            for v in (mixed, torch.eye(V, dtype=torch.double)[0]):
                at = torch.tensor([x]), double(t), double(s)
                close(noise.log_q(*at, v[None])[0].exp(), bayes(law, v, x, t, s))


@over(FREE)
def test_steps_are_drawn_from_bayes_rule(noise, law):
    """Over a grid of the number that decides them, so that shares are exact to a few points."""
    n = 4000
    u = (torch.arange(n).double() + 0.5) / n
    for s, t in pairwise((0.0, *TIMES, 1.0)):
        for v, x in product(IDS, (*IDS, MASK)):
            if dense(law, t)[v, x] == 0:
                continue
            at = (torch.full((n,), i) for i in (x, v))
            shown = noise.step(*at, double(t).expand(n), double(s).expand(n), u)
            shares = torch.bincount(shown, minlength=V).double() / n
            wanted = bayes(law, torch.eye(V, dtype=torch.double)[v], x, t, s)
            close(shares, wanted, atol=4 / n)


@over(TRACKED)
def test_open_slots_of_the_tracked_form_say_nothing_of_their_token(noise, law):
    n = 300
    x, v, t, u = torch.randint(2, (n,)), torch.randint(2, (n,)), torch.ones(n), torch.rand(n)
    stepped = noise.step(x, v, t, t, u.double())
    assert torch.equal(stepped, v if noise.guesses else noise.prior(u.double()))
    assert noise.added(x, t) is None


@over(KINDS)
def test_no_noise_shows_an_id_without_a_token_or_touches_what_is_given(noise, law):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.tensor(IDS).repeat(2000)
    maskable, block = torch.arange(len(x0)) % 4 > 0, torch.arange(len(x0)) // 60
    seen, allowed = set(), {*IDS, *([MASK] if noise.kind != "uniform" else [])}
    for times in (torch.rand(100, generator=generator), torch.ones(100)):
        xt, scored, t = corrupt(noise, x0, maskable, block, times, generator)
        changed = xt[0] != x0
        assert not (changed & ~scored).any() and not (scored & ~maskable).any()
        assert (t > 0).all()
        assert torch.equal(scored[0], maskable) or not noise.free
        seen |= set(xt[changed[None]].tolist())
    assert seen == allowed if noise.visible and not noise.guesses else seen == {MASK}
    drawn = noise.guesses_for(4000, generator)
    if noise.guesses:
        assert set(noise.guesses_for(9, generator).sign().tolist()) in ({1.0}, {-1.0})
    else:
        assert drawn is None


@over(FREE)
def test_what_training_shows_follows_the_law(noise, law):
    generator, n, t = torch.Generator().manual_seed(0), 40_000, 0.62
    x0, all_ = torch.full((n,), 1), torch.ones(n, dtype=torch.bool)
    times = double(t).expand(n)
    xt, scored, at = noise.draw(x0, all_, ~all_, times, times, generator)
    assert scored.all() and (at == t).all()
    shares, wanted = torch.bincount(xt, minlength=V).double() / n, dense(law, t)[1]
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt()).all()


# Evidence


@over(FREE)
def test_a_prediction_from_the_others_and_the_evidence_are_the_posterior(noise, law):
    """Of two tokens with any joint law, by an ideal model of the first."""
    joint = random(V, V).exp() * (~SUPPRESSED).outer(~SUPPRESSED)
    reads = replace(noise, logits="posterior")
    for t in (*TIMES, 1.0):
        q = dense(law, t)
        for x, y in product((*IDS, MASK), repeat=2):
            if min(q[0, x], q[0, y]) == 0:
                continue
            others = joint @ q[:, y]
            posterior = others * q[:, x]
            at = torch.tensor([x]), double(t)
            logits = others.log()[None].scatter_add(1, at[0][:, None], noise.added(*at)[:, None])
            close(logits.softmax(-1)[0], posterior / posterior.sum())
            assert reads.added(*at) is None
            assert torch.equal(noise.others(logits, *at), logits)
            back = reads.others((posterior.log() + 3)[None], *at).softmax(-1)[0]
            close(back, others / others.sum())


# The bound, with a network that is a table of logits for each state of a block


def states_of(slots):
    return torch.tensor([*product((*IDS, MASK), repeat=slots)])


def texts_of(slots):
    return [*product(IDS, repeat=slots)]


def table(slots=2, seed=0):
    """[S, slots, V]"""
    logits = 1.5 * random((K + 1) ** slots, slots, V, seed=seed)
    return logits.masked_fill(SUPPRESSED, NEVER)


def product_of(slots):
    """[..., S] probabilities of states, from those of their slots [..., n, V]."""
    states = states_of(slots.shape[-2])
    return torch.stack([slots[..., i, states[:, i]] for i in range(states.shape[1])]).prod(0)


def forwards(law, s, t, slots=2):
    """[S, S] q(xt | xs) of states."""
    return product_of(jump(law, s, t)[states_of(slots)])


def shown_at(law, text, t):
    """[S] q(xt | x0)."""
    return product_of(dense(law, t)[list(text)])


def reverse(law, logits, t, s):
    """[S, S] p(xs | xt): a token is drawn from the posterior, and then q(xs | xt, token)."""
    q_s, q_t, between = dense(law, s), dense(law, t), jump(law, s, t)
    shown = states_of(logits.shape[1])
    drawn = logits.softmax(-1) * q_t.T[shown]
    drawn = drawn / drawn.sum(-1, keepdim=True)
    step = q_s * between.T[shown][:, :, None] / q_t.T[shown][..., None]
    return product_of((drawn[..., None] * step).where(drawn[..., None] > 0, 0.0).sum(2))


def written(law, logits, times):
    """[texts] the probabilities of what the sampler writes."""
    slots = logits.shape[1]
    p = shown_at(law, IDS[:1] * slots, 1)
    for t, s in pairwise(times):
        p = p @ reverse(law, logits, t, s).nan_to_num(0)  # nan in states that never occur
    where = states_of(slots).tolist()
    return {text: float(p[where.index([*text])]) for text in texts_of(slots)}


def expected(law, logits, text, times, value):
    """[T] the expected sum over the slots of value(logits, x0, x, number of the time)."""
    states, number = states_of(logits.shape[1]), torch.arange(len(times))
    weight = torch.stack([shown_at(law, text, t) for t in times])
    number = number[:, None, None].expand(-1, *states.shape)
    found = value(
        logits.expand(*number.shape, V).flatten(0, 2),
        torch.tensor(text).expand(number.shape).flatten(),
        states.expand(number.shape).flatten(), number.flatten(),
    ).view(number.shape).sum(-1)  # fmt: skip
    return (weight * found).where(weight > 0, 0.0).sum(1)


def bound_of_steps(noise, law, logits, text, times):
    t, s = double(*times[:-1]), double(*times[1:])

    def value(logits, x0, x, number):
        return noise.step_nats(logits, x0, x, t[number], s[number])

    return float(expected(law, logits, text, times[:-1], value).sum())


def integral(noise, law, logits, text, points=1000):
    t, weight = bound_times((torch.arange(points) + 0.5) / points)

    def value(logits, x0, x, number):
        return noise.nats(logits, x0, x, t[number])

    return float((weight * expected(law, logits, text, t.tolist(), value)).mean())


def edges(steps):
    """Times from 1 to 0, more of them at both ends."""
    return [math.sin(math.pi / 2 * k / steps) ** 2 for k in range(steps, -1, -1)]


@over(LAWFUL)
def test_the_bound_of_t_steps_is_the_sum_over_paths_and_above_the_likelihood(noise, law):
    times, logits = (1, 0.7, 0.3, 0), table()
    back = [reverse(law, logits, t, s) for t, s in pairwise(times)]
    prior = shown_at(law, (0, 0), 1)
    likelihoods = written(law, logits, times)
    assert sum(likelihoods.values()) == pytest.approx(1, rel=0, abs=1e-12)
    for text, likelihood in likelihoods.items():
        end = states_of(2).tolist().index([*text])
        close(shown_at(law, text, 1), prior)  # nothing of the text is left at t = 1
        q = shown_at(law, text, 0.3)[:, None, None]  # axes: what is shown at 0.3, 0.7 and 1
        q = q * forwards(law, 0.3, 0.7)[:, :, None] * forwards(law, 0.7, 1)
        p = prior * back[0].T * back[1].T[:, :, None] * back[2][:, end, None, None]
        possible = q > 1e-14
        paths = float((q * (q / p).log())[possible].sum())
        found = bound_of_steps(noise, law, logits, text, times)
        assert found == pytest.approx(paths, rel=0, abs=1e-9)
        assert found >= -math.log(likelihood)


@over(LAWFUL)
def test_the_bound_of_many_steps_is_the_integral(noise, law):
    for text in texts_of(2)[1::3]:
        limit = integral(noise, law, table(), text)
        few, many = (bound_of_steps(noise, law, table(), text, edges(n)) for n in (60, 120))
        assert 2 * many - few == pytest.approx(limit, abs=5e-3)  # errors fall like 1 / T


@over(FREE)
def test_the_bound_has_the_gradient_that_it_differs_by(noise, law):
    """Where the logits of some ids are -inf: policies are trained by it."""
    x0, x, t = torch.tensor([0, 1, 3]), torch.tensor([0, 3, 1]), double(0.2, 0.5, 0.8)

    def value(logits):
        return noise.nats(logits.masked_fill(SUPPRESSED, NEVER), x0, x, t)

    assert torch.autograd.gradcheck(value, random(3, V).requires_grad_())


# With no noise but masks, all is as with masks


def test_without_any_ids_mask_uniform_is_the_mask():
    mask, law = KINDS["mask"]
    noise = MaskUniform(p_u=1e-9).on(MASK, SUPPRESSED)
    logits, x0, t = table(1)[:, 0], torch.tensor([0, 1, 3, 1]), double(*TIMES)
    hidden = torch.full((4,), MASK)
    nll = -logits.log_softmax(-1)[range(4), x0]
    for kind in (mask, noise):
        close(kind.nats(logits, x0, hidden, t), nll / t, atol=1e-6)
        close(kind.nats(logits, x0, x0, t), torch.zeros(4).double(), atol=1e-6)
    shown = logits.scatter_add(1, x0[:, None], noise.evidence(x0, t)[:, None]).softmax(-1)
    close(shown, torch.eye(V, dtype=torch.double)[x0], atol=1e-6)  # a visible token stays
    assert not noise.evidence(hidden, t).any()
    for text in texts_of(2):
        exact = integral(mask, law, table(), text)
        near = integral(noise, gidd(1e-9, 1.0), table(), text)
        assert near == pytest.approx(exact, abs=1e-5)
        both, first, second = (
            -table().log_softmax(-1)[states_of(2).tolist().index(state), range(2), text]
            for state in ([MASK, MASK], [MASK, text[1]], [text[0], MASK])
        )
        assert exact == pytest.approx(float(both.sum() + first[0] + second[1]) / 2, abs=1e-5)
