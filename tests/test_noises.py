"""The kinds of noise are exact: laws, steps, bounds and samplers against dense matrices that are
written here, in float64, over all states of a few tokens."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product

import pytest
import torch
from conftest import ROOT, build_model, tiny_spec
from test_cross_entropy import PARTS
from test_likelihood import own_mask, raw_logits

from ar2diff.config.rl import Rl
from ar2diff.core import noises as module
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.fitted import Fitted
from ar2diff.core.forward import logits_at
from ar2diff.core.noise import LOGITS, OwnEvidence
from ar2diff.core.noises import Gaussian, Mask, MaskUniform, Nearest, SelfGuess, Spindle, Uniform
from ar2diff.core.options import Options
from ar2diff.core.spec import format_of
from ar2diff.core.vectors import Embedding
from ar2diff.data.documents import Collator, DocumentPart
from ar2diff.diffusion import cross_entropy, likelihood
from ar2diff.diffusion.corruption import bound_times, corrupt
from ar2diff.diffusion.draws import Draws, draw
from ar2diff.diffusion.likelihood import bound, masked_nll
from ar2diff.diffusion.task import masked_task, places_of, seen
from ar2diff.training import estimators
from ar2diff.training.estimators import score
from ar2diff.training.rollouts import Rollout

V, IDS, MASK = 5, (0, 1, 3), 4  # row 2 has no token
K = len(IDS)
SUPPRESSED = torch.tensor([i not in IDS for i in range(V)])
NEVER = -torch.inf
TIMES = (0.05, 0.3, 0.62, 0.97)
EYE = torch.eye(V, dtype=torch.double)
GRID = (torch.arange(3000).double() + 0.5) / 3000


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


def slow(t):
    return 1 - t**2, 0.0


def of_the_guide():
    """The kind that the guide adds as an example."""
    text = (ROOT / "docs/guides/noises.md").read_text()
    code = text[: text.index("```", text.index("class Slow"))].rsplit("```python\n")[-1]
    names = {"__name__": "guide"}
    exec(code, names)
    return names["Slow"]


def gidd(p_u, gamma):
    def law(t):
        c = 2**gamma * p_u / (1 - p_u) * (t * (1 - t)) ** (gamma / 2)
        return (1 - t) / (1 + c), t / (1 + c)

    return law


COUNTS = torch.tensor([6, 1, 0, 2, 0])
TABLE = double([1.0, 0.0], [0.9, 0.3], [5.0, 5.0], [0.6, -0.7], [9.0, 9.0])


def fitted(noise, counts=COUNTS):
    return replace(noise, fitted=Fitted(None, noise.fit(TABLE, counts, ~SUPPRESSED)))


def spindle(t):
    p = [(int(COUNTS[i]) + 1) / (9 + K) for i in IDS]
    nats = [-math.log(x) for x in p]
    mean, found = sum(x * n for x, n in zip(p, nats, strict=True)), EYE.clone()
    for i, own in zip(IDS, nats, strict=True):
        slope = max(0.3 * math.pi * (1 - mean / own), -0.95)
        hidden = t + slope * math.sin(math.pi * t) / math.pi
        found[i, i], found[i, MASK] = 1 - hidden, hidden
    return found


def walk(noise, rates):
    """Along the schedule, which has a test of its own."""

    def law(t):
        own = torch.tensor(rates, dtype=torch.double)
        length = float(noise._length(double(t)))
        found = EYE.clone()
        found[torch.tensor(IDS)[:, None], IDS] = (
            torch.ones(K, K).double() / K
            if length > 1e6
            else torch.matrix_exp(length * (own - own.sum(1).diag()))
        )
        return found

    return law


NEAR, FAR = math.exp(-1 / 2), math.exp(-4 / 2)  # of three ids, with jumps at least one id wide
ORDERED = [[0, NEAR, FAR], [NEAR, 0, NEAR], [FAR, NEAR, 0]]
LINKED = [[0, 1, 0.5], [1, 0, 0], [0.5, 0, 0]]  # 0 and 1 are each other's nearest; that of 3 is 0

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
    "slow free": (of_the_guide()("free"), slow),
    "spindle": (fitted(Spindle()), spindle),
}
for name, noise, rates in (
    ("gaussian", Gaussian(order="ids"), [[x / 2 / (NEAR + FAR) for x in row] for row in ORDERED]),
    ("nearest", Nearest(neighbours=1), [[x / 2 * 2 for x in row] for row in LINKED]),
):
    KINDS[name] = (fitted(noise), walk(fitted(noise), rates))
KINDS["embedding"] = (fitted(Embedding()), None)  # whose vectors test_vectors.py is about
KINDS = {name: (noise.on(MASK, SUPPRESSED), law) for name, (noise, law) in KINDS.items()}
FREE = [name for name, (noise, law) in KINDS.items() if noise.free and law]
TRACKED = [name for name, (noise, _) in KINDS.items() if not noise.free]
LAWFUL = [name for name, (_, law) in KINDS.items() if law]
IN_IDS = [name for name, (noise, _) in KINDS.items() if not noise.vectors]


def over(names):
    """The test for each of some kinds."""
    return pytest.mark.parametrize(("noise", "law"), [KINDS[n] for n in names], ids=names)


def dense(law, t):
    """[V, V] q(xt | x0)."""
    shares = law(t)
    if isinstance(shares, torch.Tensor):
        return shares
    a, m = shares
    found = a * EYE
    found[:, MASK] += m
    found[:, IDS] += round(1 - a - m, 15) / K
    return found


def jump(law, s, t):
    """[V, V] q(xt | xs): what makes the marginal at t of that at s."""
    return torch.linalg.solve(dense(law, s), dense(law, t))


MIXED = random(V).masked_fill(SUPPRESSED, NEVER).softmax(-1)


def bayes(law, v, x, t, s):
    """[V] q(xs | xt = x), where x0 is drawn from v [V]."""
    joint = v @ dense(law, s) * jump(law, s, t)[:, x]
    return joint / joint.sum()


def test_every_kind_and_form_is_tested():
    tested = {(type(noise), noise.form) for noise, _ in KINDS.values()}
    assert tested >= {(kind, form) for kind in module.KINDS for form in kind.forms}


# The process


@over(LAWFUL)
def test_a_noise_is_a_markov_chain_with_the_marginals_of_its_law(noise, law):
    states = [*IDS, *([MASK] if noise.starts_masked else [])]
    every = torch.tensor(states)
    for s, t in pairwise((0.0, *TIMES, 1.0)):
        own, before = (noise.marginal(EYE, double(x).expand(V))[states] for x in (t, s))
        close(own, dense(law, t)[states])
        close(own.sum(1), torch.ones(len(states)).double())
        between = torch.linalg.solve(before[:, states], own[:, states])
        assert between.min() > -1e-12
        found = noise.between(every, *double(t, s)[:, None].expand(2, len(states)))
        close(found[:, states], between.T)
    for t in TIMES:  # q(t)' = q(t) R(t)
        slope = (dense(law, t + 1e-6) - dense(law, t - 1e-6)) / 2e-6
        rates = torch.linalg.solve(dense(law, t), slope)[states][:, states]
        found = noise.into(every, double(t).expand(len(states)))
        found = found.expand(-1, V)[:, states].T
        close(found.fill_diagonal_(0), rates.fill_diagonal_(0), atol=1e-6)
    close(noise.marginal(EYE, double(0).expand(V))[states], EYE[states])
    shown = torch.bincount(noise.prior(GRID), minlength=V) / double(len(GRID))
    close(dense(law, 1)[states], shown.expand(len(states), V), atol=1 / len(GRID))


@over(LAWFUL)
def test_a_step_backwards_is_bayes_rule(noise, law):
    for s, t in pairwise((0.0, *TIMES, 1.0)):
        for v, x in product((EYE[0], EYE[1], MIXED), range(V)):
            if v @ dense(law, t)[:, x] > 0:
                found = noise.log_q(torch.tensor([x]), double(t), double(s), v[None])[0].exp()
                close(found, bayes(law, v, x, t, s), atol=1e-9)


@over(FREE)
def test_steps_are_drawn_from_bayes_rule(noise, law):
    """Over a grid of the number that decides, which leaves shares an error of a few points."""
    for (s, t), v, x in product(pairwise((0.0, *TIMES, 1.0)), IDS, (*IDS, MASK)):
        if dense(law, t)[v, x] > 0:
            at = (torch.full(GRID.shape, i) for i in (x, v))
            shown = noise.step(*at, *double(t, s)[:, None].expand(2, len(GRID)), GRID)
            shares = torch.bincount(shown, minlength=V) / double(len(GRID))
            close(shares, bayes(law, EYE[v], x, t, s), atol=4 / len(GRID))


@over(TRACKED)
def test_what_a_tracked_slot_shows_says_nothing_of_its_token(noise, law):
    x, v = torch.arange(len(GRID)) % 2, torch.arange(len(GRID)) % 3
    assert noise.added(x, GRID) is None
    assert torch.equal(
        noise.step(x, v, GRID, GRID, GRID), v if noise.guesses else noise.prior(GRID)
    )
    drawn = noise.guesses_for(9, torch.Generator()) if noise.guesses else GRID
    assert len({*drawn.sign().tolist()}) == 1  # a row shows guesses in all slots or in none


@over(KINDS)
def test_noise_shows_no_id_without_a_token_and_touches_nothing_that_is_given(noise, law):
    generator, seen = torch.Generator().manual_seed(0), set()
    x0 = torch.tensor(IDS).repeat(2000)
    maskable, block = torch.arange(len(x0)) % 4 > 0, torch.arange(len(x0)) // 60
    for times in (torch.rand(100, generator=generator), torch.ones(100)):
        xt, scored, t = corrupt(noise, x0, maskable, block, times, generator)
        changed = xt != x0
        assert not (changed & ~scored).any() and not (scored & ~maskable).any()
        if noise.free:
            assert torch.equal(scored[0], maskable) and torch.equal(t[0], times.double()[block])
        if noise.vectors:  # of which ids below 0 are the seeds
            assert changed[0].equal(maskable) and not (xt[changed] >= 0).any()
            continue
        seen |= {*xt[changed].tolist()}
    drawn = IDS if noise.visible and noise.kind not in ("self", "spindle") else ()
    assert seen == {*drawn, *([MASK] if noise.starts_masked else [])} or noise.vectors


@over(["gaussian", "nearest"])
def test_walks_lose_what_is_known_of_a_token_at_an_even_pace(noise, law):
    """H(x0 | xt) / H(x0) at the knots of the schedule, from the joint law."""
    p = (COUNTS + 1).double().masked_fill(SUPPRESSED, 0.0)
    p = p / p.sum()
    for t in noise.fitted["knots"][0].sigmoid().tolist()[::5]:
        joint = p[:, None] * dense(law, t)
        among = joint / joint.sum(0).clamp(min=1e-300)
        share = torch.special.xlogy(joint, among).sum() / torch.special.xlogy(p, p).sum()
        assert float(share) == pytest.approx(t, abs=1e-6)


def test_a_spindle_masks_as_much_information_as_there_are_masks():
    """Where no token is so frequent that its masks would shrink."""
    counts = torch.tensor([6, 4, 0, 5, 0])
    noise = fitted(Spindle(), counts).on(MASK, SUPPRESSED)
    p = (counts + 1).double().masked_fill(SUPPRESSED, 0.0)
    own = -torch.special.xlogy(p / p.sum(), p / p.sum())
    assert noise.growth(double(0)).max() > 0
    close(noise.masked(GRID) @ own / own.sum(), GRID)


DAMAGES = [  # a kind, and what its file holds instead
    *product(
        ["spindle", "nearest"], [{"ids": torch.tensor(ids)} for ids in ([0, 1, 5], [1, 0, 3])]
    ),
    ("nearest", {"knots": double([1, 2], [2, 1])}),
    ("nearest", {"graph": torch.tensor([[1], [0], [3]])}),
    ("gaussian", {"graph": double(0, 1, 2)}),
    ("spindle", {"information": double(0.1, 0.2)}),
    ("spindle", {"information": double(0.1, 0.2, 1.0)}),
    ("embedding", {"rows": torch.ones(V, 3)}),
    ("embedding", {"length": double(0)}),
    ("embedding", {"rows": torch.ones(V, 2).long()}),
    ("embedding", {"rows": torch.full((V, 2), torch.nan)}),
    ("embedding", {"knots": double([1, 2], [1, torch.inf])}),
    ("embedding", {"knots": double([[1], [2]], [[1], [2]])}),
    ("spindle", {"ids": double(0, 1, 3)}),
    ("nearest", {"graph": torch.tensor([[False], [True], [True]])}),
    ("nearest", {"graph": torch.tensor([[0], [1], [2]])}),
    ("nearest", {"graph": torch.tensor([[1, 2, 1, 2]] * 3)}),
]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES, ids=lambda value: str(value)[:40])
def test_what_fits_no_model_of_this_size_is_damaged(kind, damage):
    noise, size = KINDS[kind][0], (V, 2)
    noise.check(noise.fitted.tensors, size)
    with pytest.raises(ValueError):
        noise.check(noise.fitted.tensors | damage, size)
    (name,) = damage
    with pytest.raises(KeyError):
        noise.check({n: x for n, x in noise.fitted.tensors.items() if n != name}, size)


# Evidence


@over(FREE)
def test_a_prediction_from_the_others_and_the_evidence_are_the_posterior(noise, law):
    """Of the first of two tokens with any joint law, by an ideal model."""
    joint = random(V, V).exp() * (~SUPPRESSED).outer(~SUPPRESSED)
    reads = None if noise.kind == "spindle" else replace(noise, logits="posterior")
    for t, x, y in product((*TIMES, 1.0), (*IDS, MASK), (*IDS, MASK)):
        q, at = dense(law, t), (torch.tensor([x]), double(t))
        if min(q[0, x], q[0, y]) == 0:
            continue
        others = joint @ q[:, y]
        posterior = others * q[:, x]
        logits = others.log()[None]
        bumped = noise.added(*at).add_(logits.clone())
        close(bumped.softmax(-1)[0], posterior / posterior.sum())
        assert torch.equal(noise.others(logits, *at), logits)
        if reads is None:
            continue
        back = reads.others((posterior.log() + 3)[None], *at)
        close(back.softmax(-1)[0], others / others.sum(), atol=1e-8)
        assert reads.added(*at) is None


# The bound, with a network that is a table of logits for each state of a block


def states_of(slots):
    """[S, n]"""
    return torch.tensor([*product((*IDS, MASK), repeat=slots)])


@cache
def table():
    """[S, n, V] logits."""
    return 1.5 * random((K + 1) ** 2, 2, V).masked_fill(SUPPRESSED, NEVER)


def together(slots):
    """[..., S] probabilities of states, from those of what their slots show [..., n, V]."""
    states = states_of(slots.shape[-2])
    return torch.stack([slots[..., i, states[:, i]] for i in range(states.shape[1])]).prod(0)


def shown_at(law, text, t):
    """[S] q(xt | x0)."""
    return together(dense(law, t)[list(text)])


def reverse(law, logits, t, s):
    """[S, S] p(xs | xt): a token is drawn from the posterior, and then q(xs | xt, token)."""
    q_s, q_t, between = dense(law, s), dense(law, t), jump(law, s, t)
    shown = states_of(logits.shape[1])
    drawn = logits.softmax(-1) * q_t.T[shown]
    drawn = (drawn / drawn.sum(-1, keepdim=True))[..., None]
    step = q_s * between.T[shown][:, :, None] / q_t.T[shown][..., None]
    return together((drawn * step).where(drawn > 0, 0.0).sum(2))


def written(law, logits, times):
    """{text: probability}, of what the sampler writes."""
    states = states_of(logits.shape[1])
    p = shown_at(law, states[0].tolist(), 1)
    for t, s in pairwise(times):
        p = p @ reverse(law, logits, t, s).nan_to_num(0)  # nan in states that never occur
    return {tuple(x): float(p[n]) for n, x in enumerate(states.tolist()) if MASK not in x}


def expected(law, logits, text, times, value):
    """[T] the expected sum over the slots of value(logits, x0, x, number of the time)."""
    states, number = states_of(logits.shape[1]), torch.arange(len(times))
    weight = torch.stack([shown_at(law, text, float(t)) for t in times])
    number = number[:, None, None].expand(-1, *states.shape)
    x0, x = (y.expand(number.shape).flatten() for y in (torch.tensor(text), states))
    found = value(logits.expand(*number.shape, V).flatten(0, 2), x0, x, number.flatten())
    return (weight * found.view(number.shape).sum(-1)).where(weight > 0, 0.0).sum(1)


def bound_of_steps(noise, law, logits, text, times):
    t, s = double(*times[:-1]), double(*times[1:])

    def value(logits, x0, x, number):
        return noise.step_nats(logits, x0, x, t[number], s[number])

    return float(expected(law, logits, text, t, value).sum())


def integral(noise, law, logits, text, points=1000):
    t, weight = bound_times((torch.arange(points) + 0.5) / points)
    q = torch.stack([dense(law, float(x)) for x in t])

    def value(logits, x0, x, number):
        if noise.logits == "posterior":  # the others predict what it has but the evidence
            logits = logits - q[number, :, x].clamp(min=1e-300).log()
        return noise.nats(logits, x0, x, t[number])

    return float((weight * expected(law, logits, text, t, value)).mean())


def edges(steps):
    """Times from 1 to 0, more of them at both ends."""
    return [math.sin(math.pi / 2 * k / steps) ** 2 for k in range(steps, -1, -1)]


@over(LAWFUL)
def test_the_bound_of_t_steps_is_the_sum_over_paths_and_above_the_likelihood(noise, law):
    times, states = (1, 0.7, 0.3, 0), states_of(2)
    back = [reverse(law, table(), t, s) for t, s in pairwise(times)]
    forth = [together(jump(law, s, t)[states]) for s, t in ((0.3, 0.7), (0.7, 1))]
    prior, chances = shown_at(law, (0, 0), 1), written(law, table(), times)
    assert sum(chances.values()) == pytest.approx(1, rel=0, abs=1e-12)
    for text, chance in chances.items():
        close(shown_at(law, text, 1), prior)  # nothing of the text is left at t = 1
        end = states.tolist().index([*text])
        q = shown_at(law, text, 0.3)[:, None, None] * forth[0][:, :, None] * forth[1]
        p = prior * back[0].T * back[1].T[:, :, None] * back[2][:, end, None, None]
        paths = float((q * (q / p).log())[q > 1e-14].sum())  # by what shows at 0.3, 0.7 and 1
        found = bound_of_steps(noise, law, table(), text, times)
        assert found == pytest.approx(paths, rel=0, abs=1e-9)
        assert found >= -math.log(chance)


@over(LAWFUL)
def test_the_bound_of_many_steps_is_the_integral(noise, law):
    for text in ((0, 1), (3, 3)):
        few, many = (bound_of_steps(noise, law, table(), text, edges(n)) for n in (60, 120))
        limit = integral(noise, law, table(), text)
        assert 2 * many - few == pytest.approx(limit, abs=5e-3)  # errors fall like 1 / T


@over(LAWFUL)
def test_the_bound_has_a_gradient(noise, law):
    """Where the logits of ids without a token are -inf: it trains policies."""
    x0, x, t = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 3]), double(0.2, 0.5, 0.8)
    x = x if noise.kind == "mask" else x.roll(1)

    def value(logits):
        return noise.nats(logits.masked_fill(SUPPRESSED, NEVER), x0, x, t)

    assert torch.autograd.gradcheck(value, random(3, V).requires_grad_())


@pytest.mark.parametrize("text", [(0, 1), (3, 3)])
def test_with_hardly_any_ids_mask_uniform_is_the_mask(text):
    noise, law = MaskUniform(p_u=1e-9).on(MASK, SUPPRESSED), gidd(1e-9, 1.0)
    logits, x0, t = table()[:4, 0], torch.tensor([0, 1, 3, 1]), double(*TIMES)
    hidden, none = torch.full((4,), MASK), torch.zeros(4).double()
    ce = torch.nn.functional.cross_entropy(logits, x0, reduction="none")
    for kind in (KINDS["mask"][0], noise):
        close(kind.nats(logits, x0, hidden, t), ce / t, atol=1e-6)
        close(kind.nats(logits, x0, x0, t), none, atol=1e-6)
    close(noise.evidence(hidden, t).gain, none)
    bumped = noise.evidence(x0, t).add_(logits.clone())
    close(bumped.softmax(-1), EYE[x0], atol=1e-6)  # a visible token stays
    p = dict(zip(map(tuple, states_of(2).tolist()), table().softmax(-1), strict=True))
    both, right, left = (
        p[state][[0, 1], text].log() for state in ((MASK, MASK), (MASK, text[1]), (text[0], MASK))
    )
    exact = -float(both.sum() + right[0] + left[1]) / 2  # the mean over both orders
    assert integral(*KINDS["mask"], table(), text) == pytest.approx(exact, abs=1e-5)
    assert integral(noise, law, table(), text) == pytest.approx(exact, abs=1e-5)


# Through a model: blocks of one and of two open slots behind the first token


def spec_of(noise, prediction="shift", attention="causal_context"):
    spec = replace(tiny_spec(attention, 2, prediction, MASK), ar_mode=False)
    return replace(spec, format=format_of(noise, None), noise=noise)


@cache
def tiny():
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 1.0}
    return build_model("llama", vocab_size=V, **shape, **heads)


@cache
def read(prefix, slots, prediction):
    """[S, n, V] logits of the slots behind a text, in every state of theirs."""
    states = states_of(slots)
    ids = torch.cat([torch.tensor([prefix]).expand(len(states), -1), states], 1)
    end, first = ids.shape[1], len(prefix) - (prediction == "shift")
    logits = raw_logits(tiny(), ids, own_mask(end, end - 2, "causal_context", 2))
    return logits[:, first : first + slots].masked_fill(SUPPRESSED, NEVER)


def blocks_of(text, prediction):
    """The open tokens of each block of a text of four tokens, and their logits."""
    for first in (1, 2):
        block = text[first : first * 2]
        yield block, read(text[:first], len(block), prediction)


def by_sureness(noise, logits):
    """{text: probability}, of what a block of a tracked noise becomes that decides its surer token
    at the first of two steps."""
    p, states, slots = logits.softmax(-1), states_of(logits.shape[1]).tolist(), logits.shape[1]
    fillers, found = [MASK] if noise.starts_masked else IDS, Counter()
    for shown, drawn in product(product(fillers, repeat=slots), product(IDS, repeat=slots)):
        likely = [float(p[states.index([*shown]), i, token]) for i, token in enumerate(drawn)]
        kept, chance = likely.index(max(likely)), math.prod(likely) / len(fillers) ** slots
        again = [drawn[1 - kept]] if noise.guesses and slots == 2 else fillers
        for filler, other in product(again, IDS) if slots == 2 else ():
            state, text = [filler, filler], [other, other]
            state[kept] = text[kept] = drawn[kept]
            last = float(p[states.index(state), 1 - kept, other]) / len(again)
            found[tuple(text)] += chance * last
        if slots == 1:
            found[drawn] += chance
    return found


@over(IN_IDS)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_the_sampler_writes_what_its_steps_say(noise, law, prediction):
    """Three tokens in two blocks of two steps, ten thousand times."""
    rows, generator = 10_000, torch.Generator().manual_seed(0)
    canvas = Canvas.of_prompts([[0]] * rows, MASK, max_new_tokens=3, grid=2)
    settings = {"max_new_tokens": 3, "block_length": 2, "steps_per_block": 2, "temperature": 1.0}
    options = Options(**settings, suppress_tokens=(2,))
    spec, generators = spec_of(noise, prediction), [generator] * rows
    decoder = decoder_of(tiny(), spec, canvas, options, generators=generators)
    with torch.no_grad():
        for state in decoder.run():
            assert not state.read[:, 0].any() and not (state.read == 2).any()
    texts = Counter(map(tuple, canvas.ids.tolist()))
    for text in product([0], IDS, IDS, IDS):
        p = 1.0
        for block, logits in blocks_of(text, prediction):
            free = noise.free and written(law, logits, (1, 0.5, 0))
            p *= (free or by_sureness(noise, logits))[block]
        assert abs(texts[text] - rows * p) <= 5 * math.sqrt(rows * p * (1 - p)) + 1


@over(FREE)
@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_bounds_through_a_model_are_integrals(monkeypatch, noise, law, prediction):
    """Over all states of both blocks, at a few times, in place of the draws; and above the
    likelihood."""
    text, points = (0, 1, 3, 0), 12
    t, weight = bound_times((torch.arange(points) + 0.5) / points)
    xt = torch.cat([torch.zeros(16, 1).long(), states_of(1).repeat(4, 1), states_of(2)], 1)
    chance = torch.stack([dense(law, float(x))[text, xt] for x in t])
    chance[..., 1] /= 4
    chance[..., 2:] = chance[..., 2:].prod(-1, keepdim=True)
    chance *= weight[:, None, None] / points * double(0, 1, 1, 1)
    chance, t = chance.flatten(0, 1), t.repeat_interleave(16)[:, None].expand(-1, 4)
    xt = xt.repeat(points, 1).where(chance > 0, 0)
    drawn = Draws(xt, (torch.arange(4) > 0).expand_as(xt), chance, torch.ones(2).bool(), 2, t)
    monkeypatch.setattr(likelihood, "draw", lambda *_: drawn)
    monkeypatch.setattr(estimators, "_shown", lambda *_: (xt, chance, t))
    rollout = Rollout(torch.tensor(text), 1, 3, torch.zeros(4).long(), 0)
    for way in LOGITS[: 1 + (prediction == "same" and noise.kind != "spindle")]:
        reads = replace(noise, logits=way)
        spec, each = spec_of(reads, prediction), [*blocks_of(text, prediction)]
        exact = sum(integral(reads, law, logits, block, points) for block, logits in each)
        found = bound(tiny(), spec, [text], SUPPRESSED, len(xt)).nats
        assert float(found) == pytest.approx(exact, rel=1e-9, abs=1e-9)
        found = score(tiny(), [rollout], Rl(estimator="elbo"), spec, SUPPRESSED).per_token().sum()
        assert float(found.detach()) == pytest.approx(-exact, rel=1e-9, abs=1e-9)
    for block, logits in blocks_of(text, prediction):
        wrote = written(law, logits, edges(100))[block]
        assert integral(noise, law, logits, block) > -math.log(wrote)


@over(FREE)
def test_draws_of_a_bound_are_integrals_over_time(noise, law):
    text, count = (0, 1, 3, 0), 2000
    drawn = draw(noise, text, 2, torch.arange(4) > 0, count, 0, 1)
    assert (drawn.t[:, 1:].diff(dim=0) >= 0).all()  # in the order of their strata
    rollout = Rollout(torch.tensor(text), 1, 3, torch.zeros(4).long(), 0)
    rl = Rl(estimator="elbo", samples=count)
    answered = estimators._shown(rollout, rl, spec_of(noise), noise)
    law_at = torch.stack([dense(law, float(t)) for t in GRID[15::30]])
    for xt, weight, t in ((drawn.xt, drawn.weight, drawn.t), answered):
        assert not xt[:, 0].any() and not weight[:, 0].any()
        assert (t[:, 1] != t[:, 2]).any() and torch.equal(t[:, 2], t[:, 3])  # each block's own
        for i, x, power in product((1, 2, 3), range(V), (0, 1)):
            wanted = (law_at[:, text[i], x] * GRID[15::30] ** power).mean()
            found = (weight[:, i] * (xt[:, i] == x) * t[:, i] ** power).sum()
            close(found, wanted, atol=5 / count**0.5 / 2)


@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_exp_of_minus_the_bound_of_open_ids_sums_to_at_most_1(prediction):
    """Over all texts of three tokens, all subsets of them, and all ids that those may show."""
    spec, total = spec_of(Uniform(), prediction, "full"), 0.0
    subsets = [x for k in (1, 2, 3) for x in combinations((1, 2, 3), k)]
    shown = [(x, filler) for x in subsets for filler in product(IDS, repeat=len(x))]
    for text in product([0], IDS, IDS, IDS):
        x0 = torch.tensor([text]).repeat(len(shown), 1)
        xt, masked, pos = x0.clone(), x0 < 0, torch.arange(4).expand_as(x0)
        for row, (subset, filler) in enumerate(shown):
            masked[row, list(subset)], xt[row, list(subset)] = True, torch.tensor(filler)
        k = masked.sum(1)
        weight = (1 / (k * torch.tensor([0, 3, 3, 1])[k] * K**k).double())[:, None]
        with torch.no_grad():
            nll = masked_nll(tiny(), spec, x0, masked, 0 * pos, pos, SUPPRESSED, xt)
        exact = float((weight.expand_as(masked)[masked] * nll).sum())
        total += math.exp(-exact)
        if text == (0, 1, 3, 0):  # the draws, also where no more subsets would fit
            found = bound(tiny(), spec, [text], SUPPRESSED, samples=2000)
            assert 0 < abs(float(found.nats) - exact) <= 5 * 3 * found.error < 1
    assert 0.2 < total <= 1


@pytest.mark.parametrize("prediction", ["same", "shift"])
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
@pytest.mark.parametrize("vectors", [False, True])
def test_what_a_block_shows_moves_no_other_block_and_no_clean_token(attention, prediction, vectors):
    """Two texts in a row; the second shows other ids, or vectors, in its second block of two."""
    model, noise = build_model("llama"), Uniform("free")
    if vectors:
        table, allowed = model.get_input_embeddings().weight.detach(), torch.arange(64) != 63
        noise = Embedding()
        noise = replace(noise, fitted=Fitted(None, noise.fit(table, torch.ones(64), allowed)))
    spec = spec_of(noise, prediction, attention)
    doc, pos = torch.tensor([[0] * 4 + [1] * 8]), torch.tensor([[*range(4), *range(8)]])
    x0 = torch.randint(5, 60, doc.shape, generator=torch.Generator().manual_seed(0))
    scored, slots = pos > 0, []
    before = torch.where(scored, -1 - pos - 100 * doc if vectors else x0, x0)
    after = before.clone()
    after[0, 6:8] += -1000 if vectors else 1
    for shown in (before, after):
        task = masked_task(x0, shown, scored, doc, pos, spec)
        places = places_of(scored)
        if vectors:
            task = seen(task, noise, places, shown.flatten()[places], double(0.6).expand(10))
        every = torch.arange(task.input_ids.numel())
        with torch.no_grad():
            slots.append(logits_at(model, every, **task.inputs(model, None)))
    moved, changed = (slots[0] != slots[1]).any(-1), torch.zeros(12).bool()
    changed[scored[0]] = moved[task.index]
    assert not moved[12:].any()
    first = 6 + (prediction == "shift")  # the first token of a block is then read before it
    first, last = (5, 12) if attention == "full" else (first, 8)
    assert changed.nonzero()[:, 0].tolist() == [*range(first, last)]


# The loss


@over(FREE)
def test_a_batch_has_the_evidence_of_what_it_shows(make_recipe, noise, law):
    recipe, ids = make_recipe(data={"max_length": 64}), [0, *IDS] * 16
    row = [DocumentPart(ids, len(ids), 0, 0, 7)]
    batch = Collator(recipe, noise)([(0, row)])
    scored, x = batch["scored"], batch["xt"][batch["scored"]]
    assert scored.sum() == 63 and torch.equal(batch["shown"], x)
    likely = torch.stack([dense(law, float(t)) for t in batch["t"][scored]]).log()
    own = x.where(x != MASK, 0)
    lines, other = torch.arange(63), (own == 0).long()
    wanted = likely[lines, own, x] - likely[lines, other, x]
    found = noise.added(batch["shown"], batch["t"][scored]).add_(torch.zeros(63, V).double())
    close(found[lines, own] - found[lines, other], wanted, atol=1e-5)


@pytest.mark.parametrize("way", ["hidden", "logits"])
@pytest.mark.parametrize("part", PARTS)
def test_the_loss_with_evidence_is_that_of_logits_with_it(monkeypatch, part, way):
    """The first rows have evidence; the others are an AR mode's."""
    monkeypatch.setattr(cross_entropy, "PART", part)
    hidden, coef, head = random(9, 8).requires_grad_(), random(9, seed=1), torch.nn.Linear(8, V)
    inputs = [hidden, *head.double().parameters()]
    target, first = torch.tensor([0, 1, 3, 3, 1, 0, 2, 4, 0]), torch.arange(9) < 6
    shown, gain = torch.tensor([0, 1, 1, 4, 0, 3]), double(3.0, 25.0, 1.0, 0.0, -0.5, 2.0)
    bump = torch.zeros(9, V).double().index_put((torch.arange(6), shown), gain)
    logits = (head(hidden) + bump).masked_fill(SUPPRESSED & first[:, None], NEVER)
    wanted = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    asked, evidence = (target, coef, SUPPRESSED, 6), OwnEvidence(shown, gain)
    if way == "hidden":
        loss = cross_entropy.loss_of_hidden(head, hidden, *asked, evidence=evidence)
    else:
        loss = cross_entropy.loss_of_logits(head(hidden), *asked, evidence)
    close(loss.ce, wanted.detach())
    assert torch.equal(loss.right, logits.argmax(-1) == target)
    totals = loss.total, (coef * wanted).sum()
    close(*(torch.autograd.grad(total, inputs) for total in totals))
