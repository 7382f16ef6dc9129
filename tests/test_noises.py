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
from ar2diff.diffusion import cross_entropy, likelihood
from ar2diff.diffusion.corruption import bound_times, corrupt
from ar2diff.diffusion.draws import Draws, draw
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
        if noise.logits == "posterior":  # a prediction from the others is what it has less
            q = torch.stack([dense(law, float(time)) for time in t])[number]
            own = q[range(len(x)), :, x].masked_fill(SUPPRESSED, 1.0)
            logits = logits - own.clamp(min=1e-300).log()
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
    chances = written(law, logits, times)
    assert sum(chances.values()) == pytest.approx(1, rel=0, abs=1e-12)
    for text, chance in chances.items():
        end = states_of(2).tolist().index([*text])
        close(shown_at(law, text, 1), prior)  # nothing of the text is left at t = 1
        q = shown_at(law, text, 0.3)[:, None, None]  # axes: what is shown at 0.3, 0.7 and 1
        q = q * forwards(law, 0.3, 0.7)[:, :, None] * forwards(law, 0.7, 1)
        p = prior * back[0].T * back[1].T[:, :, None] * back[2][:, end, None, None]
        possible = q > 1e-14
        paths = float((q * (q / p).log())[possible].sum())
        found = bound_of_steps(noise, law, logits, text, times)
        assert found == pytest.approx(paths, rel=0, abs=1e-9)
        assert found >= -math.log(chance)


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


# Through a model: blocks of one and of two open slots behind the first token


def spec_of(noise, prediction="shift", attention="causal_context"):
    return Spec(
        format=format_of(noise, None), noise=noise, mask_token_id=MASK, attention=attention,
        block_length=None if attention == "full" else 2, prediction=prediction,
        ar_mode=attention == "causal_context", local_window=None, max_length=64,
    )  # fmt: skip


@cache
def tiny():
    shape = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 1.0}
    return build_model("llama", vocab_size=V, **shape, **heads)


@cache
def read(prefix, slots, prediction):
    """[S, n, V] logits of the slots behind a text, in every state of theirs."""
    states = states_of(slots)
    ids = torch.cat([torch.tensor([prefix]).expand(len(states), -1), states], 1)
    end = ids.shape[1]
    logits = raw_logits(tiny(), ids, own_mask(end, end - 2, "causal_context", 2))
    first = len(prefix) - (prediction == "shift")
    return logits[:, first : first + slots].masked_fill(SUPPRESSED, NEVER)


def blocks_of(text, prediction):
    """The tokens of each block of a text of four tokens, and the logits there."""
    for prefix, block in ((text[:1], text[1:2]), (text[:2], text[2:])):
        yield block, read(tuple(prefix), len(block), prediction)


def tokens_of(noise, logits):
    """{text: probability} of a block of a tracked noise that decides its surer token first."""
    p, states, slots = logits.softmax(-1), states_of(logits.shape[1]).tolist(), logits.shape[1]
    fillers = [MASK] if noise.starts_masked else IDS
    found = Counter()
    for shown in product(fillers, repeat=slots):
        chance, at = len(fillers) ** -slots, states.index([*shown])
        for drawn in product(IDS, repeat=slots):
            likely = [float(p[at, i, token]) for i, token in enumerate(drawn)]
            if slots == 1:
                found[drawn] += chance * likely[0]
                continue
            kept = int(likely[1] > likely[0])
            again = drawn[1 - kept : 2 - kept] if noise.guesses else fillers
            for filler, other in product(again, IDS):
                state, text = [filler, filler], [other, other]
                state[kept] = text[kept] = drawn[kept]
                last = float(p[states.index(state), 1 - kept, other]) / len(again)
                found[tuple(text)] += chance * likely[0] * likely[1] * last
    return found


@over(KINDS)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_the_sampler_writes_what_its_steps_say(noise, law, prediction):
    """Three tokens in two blocks of two steps, ten thousand times."""
    rows, generator = 10_000, torch.Generator().manual_seed(0)
    canvas = Canvas.of_prompts([[0]] * rows, MASK, max_new_tokens=3, grid=2)
    options = Options(
        max_new_tokens=3, block_length=2, steps_per_block=2, temperature=1.0, suppress_tokens=(2,)
    )
    decoder = decoder_of(
        tiny(), spec_of(noise, prediction), canvas, options, generators=[generator] * rows
    )
    with torch.no_grad():
        for state in decoder.run():
            assert (state.read[:, 0] == 0).all() and not (state.read == 2).any()
    texts = Counter(map(tuple, canvas.ids.tolist()))
    for text in product([0], IDS, IDS, IDS):
        p = 1.0
        for block, logits in blocks_of(text, prediction):
            of = written(law, logits, (1, 0.5, 0)) if noise.free else tokens_of(noise, logits)
            p *= of[block]
        assert abs(texts[text] - rows * p) <= 5 * math.sqrt(rows * p * (1 - p)) + 1


@over(FREE)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_the_bound_of_a_text_is_the_integral_and_above_the_likelihood(
    monkeypatch, noise, law, prediction
):
    """Over all states of both blocks, at a few times, in place of the draws."""
    text, points = (0, 1, 3, 0), 12
    t, weight = bound_times((torch.arange(points) + 0.5) / points)
    first, second = states_of(1).repeat(4, 1), states_of(2)
    xt = torch.cat([torch.zeros(16, 1).long(), first, second], 1).repeat(points, 1)
    chance = [dense(law, float(x))[text, xt[:16]] for x in t]
    chance = torch.stack(
        [torch.stack([0 * c[:, 0], c[:, 1] / 4, *2 * [c[:, 2] * c[:, 3]]], 1) for c in chance]
    )
    drawn = Draws(
        xt.where(chance.flatten(0, 1) > 0, 0),
        (torch.arange(4) > 0).expand_as(xt),
        (weight[:, None, None] / points * chance).flatten(0, 1),
        torch.ones(2).bool(),
        2,
        t.repeat_interleave(16)[:, None].expand(-1, 4),
    )
    monkeypatch.setattr(likelihood, "draw", lambda *_: drawn)
    for reads in (noise, replace(noise, logits="posterior")):
        if reads.logits == "posterior" and prediction == "shift":
            continue
        exact = sum(
            integral(reads, law, x, block, points) for block, x in blocks_of(text, prediction)
        )
        found = bound(tiny(), spec_of(reads, prediction), [text], SUPPRESSED, len(xt))
        assert float(found.nats) == pytest.approx(exact, rel=0, abs=1e-9)
    exact, wrote = 0.0, 0.0
    for block, logits in blocks_of(text, prediction):
        exact += integral(noise, law, logits, block)
        wrote += math.log(written(law, logits, edges(100))[block])
    assert exact > -wrote


@over(FREE)
def test_draws_of_a_bound_are_integrals_over_time(noise, law):
    text, count = (0, 1, 3, 0), 4000
    drawn = draw(noise, text, 2, torch.arange(4) > 0, count, 0, 1)
    assert (drawn.t[:, 1:].diff(dim=0) >= 0).all()  # in the order of their strata
    assert (drawn.t[:, 1] != drawn.t[:, 2]).any() and (drawn.xt[:, 0] == 0).all()
    for power in (0, 1, 3):
        found = (drawn.weight * drawn.t**power).sum(0)
        close(found, double(0, 1, 1, 1) / (power + 1), atol=1e-3)
    u = (torch.arange(400).double() + 0.5) / 400
    for i, x in product((1, 2, 3), range(V)):
        wanted = sum(float(dense(law, float(t))[text[i], x]) for t in u) / 400
        found = float((drawn.weight[:, i] * (drawn.xt[:, i] == x)).sum())
        assert found == pytest.approx(wanted, abs=5 / count**0.5)


@over([name for name in TRACKED if name != "mask"])
def test_exp_of_minus_the_bound_of_what_is_open_sums_to_at_most_1(noise, law):
    """Over all texts of three tokens, all subsets of them, and all that those may show."""
    spec, total = spec_of(noise, attention="full"), 0.0
    fillers = [MASK] if noise.starts_masked else IDS
    shown = [
        (subset, filler)
        for k in (1, 2, 3)
        for subset in combinations((1, 2, 3), k)
        for filler in product(fillers, repeat=k)
    ]
    for text in product([0], IDS, IDS, IDS):
        xt, masked = torch.tensor([text]).repeat(len(shown), 1), torch.zeros(len(shown), 4).bool()
        for row, (subset, filler) in enumerate(shown):
            masked[row, list(subset)] = True
            xt[row, list(subset)] = torch.tensor(filler)
        k = masked.sum(1)
        weight = 1 / k.double() / double(3, 3, 1)[k - 1] / len(fillers) ** k.double()
        x0, pos = torch.tensor([text]).expand_as(xt), torch.arange(4).expand_as(xt)
        with torch.no_grad():
            nll = masked_nll(tiny(), spec, x0, masked, 0 * pos, pos, SUPPRESSED, xt)
        exact = float((weight[:, None].expand_as(masked)[masked] * nll).sum())
        total += math.exp(-exact)
        if text == (0, 1, 3, 0):
            found = bound(tiny(), spec, [text], SUPPRESSED, samples=2000)
            assert abs(float(found.nats) - exact) <= 5 * 3 * found.error + 1e-9
    assert 0.2 < total <= 1


@pytest.mark.parametrize("prediction", ["same", "shift"])
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_what_a_block_shows_moves_no_other_block_and_no_clean_token(attention, prediction):
    """Rows of two texts, whose second has blocks of four tokens."""
    spec = replace(spec_of(Uniform("free"), prediction, attention))
    if attention != "full":
        spec = replace(spec, block_length=4)
    doc = torch.tensor([[0] * 4 + [1] * 12])
    pos = torch.tensor([[*range(4), *range(12)]])
    x0 = torch.randint(5, 60, doc.shape, generator=torch.Generator().manual_seed(0))
    xt, scored = x0.clone(), (pos > 0) & (doc >= 0)
    xt[0, 9:11] += 1  # in the second block of the second text
    logits = []
    for shown in (x0, xt):
        task = masked_task(x0, shown, scored, doc, pos, spec)
        inputs = task.inputs(build_model("llama"), None)
        index = torch.arange(task.input_ids.numel())
        with torch.no_grad():
            slots = logits_at(build_model("llama"), index, **inputs)
        logits.append((slots[task.index], slots[16:]))
    (own, clean), (moved, still) = logits
    changed = torch.zeros_like(scored)
    changed[scored] = (own != moved).any(-1)
    if attention == "full":
        assert torch.equal(changed, scored & (doc == 1))
        return
    assert len(clean) == 16 and torch.equal(clean, still)
    first = 8 + (prediction == "shift")  # the first token of a block is then read before it
    assert changed.nonzero()[:, 1].tolist() == [*range(first, 12)]


# The loss


@pytest.mark.parametrize("way", ["hidden", "logits"])
@pytest.mark.parametrize("part", PARTS)
def test_the_loss_with_evidence_is_that_of_logits_with_it(monkeypatch, part, way):
    monkeypatch.setattr(cross_entropy, "PART", part)
    rows, first = 9, 6  # the first rows have evidence, the others are an AR model's
    hidden, coef = random(rows, 8).requires_grad_(), random(rows, seed=1)
    head = torch.nn.Linear(8, V, dtype=torch.double)
    target = torch.tensor([0, 1, 3, 3, 1, 0, 2, 4, 0])
    shown, gain = torch.tensor([0, 1, 1, 4, 0, 3]), double(3.0, 25.0, 1.0, 0.0, -0.5, 2.0)
    inputs = [hidden, *head.parameters()]
    logits = head(hidden)
    bump = torch.zeros(rows, V, dtype=torch.double)
    bump[range(first), shown] = gain
    barred = SUPPRESSED & (torch.arange(rows) < first)[:, None]
    wanted = torch.nn.functional.cross_entropy(
        (logits + bump).masked_fill(barred, NEVER), target, reduction="none"
    )
    asked = target, coef, SUPPRESSED, first
    if way == "hidden":
        loss = cross_entropy.loss_of_hidden(head, hidden, *asked, evidence=(shown, gain))
    else:
        loss = cross_entropy.loss_of_logits(head(hidden), *asked, (shown, gain))
    close(loss.ce, wanted.detach())
    total = (coef * wanted).sum()
    close(torch.autograd.grad(loss.total, inputs), torch.autograd.grad(total, inputs))
