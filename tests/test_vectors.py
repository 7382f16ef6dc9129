"""Noise `embedding` is exact: against Gaussian densities and quadrature that are written here, and
against forwards of stock classes whose embeddings are built by hand."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from conftest import build_model, tiny_spec
from test_likelihood import own_mask
from test_noises import COUNTS, IDS, MASK, NEVER, SUPPRESSED, TABLE, TIMES, V, close, double, edges

from ar2diff.config.rl import Rl
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.fitted import Fitted, carry
from ar2diff.core.options import Options, resolve
from ar2diff.core.spec import format_of
from ar2diff.core.vectors import Embedding, normal
from ar2diff.diffusion.corruption import bound_times
from ar2diff.diffusion.draws import draw
from ar2diff.diffusion.likelihood import bound
from ar2diff.training import estimators
from ar2diff.training.estimators import score
from ar2diff.training.rollouts import Rollout

LINE = double([-1.6], [0.1], [7.0], [1.4], [9.0])  # embeddings of one number
ROWS = 20_000


def fitted(table, noise=None, counts=COUNTS, suppressed=SUPPRESSED, mask=MASK):
    noise = noise or Embedding()
    kept = noise.fit(table, counts, ~suppressed)
    return replace(noise, fitted=Fitted(None, kept)).on(mask, suppressed)


PLANE, FLAT = fitted(TABLE), fitted(LINE)


def scaled(table):
    """The rows as long as the noise, which are kept in float32."""
    length = sum(float(table[i].norm()) for i in IDS) / len(IDS) / table.shape[1] ** 0.5
    return (table / length).float().double()


def scales(noise, t):
    """sqrt(abar) and 1 - abar, from the knots of the schedule."""
    if t in (0, 1):
        return (1.0, 0.0) if t == 0 else (0.0, 1.0)
    x, y = noise.fitted["knots"].tolist()
    at = math.log(t / (1 - t))
    k = max(0, min(len(x) - 2, sum(value < at for value in x) - 1))
    level = y[k] + (y[k + 1] - y[k]) / (x[k + 1] - x[k]) * (at - x[k])
    return (1 / (1 + math.exp(level))) ** 0.5, 1 / (1 + math.exp(-level))


def full(value, count):
    return torch.full((count,), value, dtype=torch.double)


# What slots show


def test_the_normal_numbers_of_seeds_are_independent_and_always_the_same():
    x = normal(torch.arange(ROWS), 4)
    assert torch.equal(normal(torch.arange(ROWS), 4), x)
    assert torch.equal(normal(torch.arange(7, 9), 2), x[7:9, :2])
    far = normal(torch.arange(ROWS) * (1 << 27) + 3, 4)
    beside = torch.cat([x[:-1], x[1:], far[1:]], 1)  # columns, the next seeds, distant seeds
    close(beside.mean(0), torch.zeros(12).double(), atol=5 / ROWS**0.5)
    close(beside.T.cov(), torch.eye(12).double(), atol=5 * (2 / ROWS) ** 0.5)
    grid = (torch.arange(ROWS).double() + 0.5) / ROWS
    for column in (*x.T, *far.T):  # Kolmogorov and Smirnov
        assert (torch.special.ndtr(column).sort().values - grid).abs().max() < 2 / ROWS**0.5


@pytest.mark.parametrize(("noise", "table"), [(PLANE, TABLE), (FLAT, LINE)])
def test_slots_show_their_row_among_noise_which_a_step_removes(noise, table):
    rows, u = scaled(table), (torch.arange(ROWS).double() + 0.5) / ROWS
    width = rows.shape[1]
    for t in (*TIMES, 1.0):
        kept, var = scales(noise, t)
        x = noise.noised(full(1, ROWS).long(), full(t, ROWS), torch.stack([u, u]))
        z = noise.state(x, full(1, ROWS).long(), full(t, ROWS))
        assert (x < 0).all() and len(x.unique()) == ROWS
        close(z.mean(0), kept * rows[1], atol=5 * (var / ROWS) ** 0.5)
        close(z.T.cov().view(width, width), var * torch.eye(width).double(), atol=0.05 * var)
        close(noise.embedded(z), z * float(table[1].norm() / rows[1].norm()), atol=1e-6)
    close(noise.state(x), noise.state(x, full(1, ROWS).long(), full(1, ROWS)))
    for s, t in ((0.0, 0.3), (0.05, 0.62), (0.62, 0.97), (0.3, 1.0)):
        (k_s, v_s), (k_t, v_t) = scales(noise, s), scales(noise, t)
        for i in range(width):  # condition z(s) on z(t) in their joint law, a column at a time
            z = double(-0.7, 2.0)
            mean, cov = torch.stack([k_s * rows[3, i], k_t * rows[3, i]]), k_t / k_s * v_s
            want = mean[0] + cov / v_t * (z - mean[1])
            state = torch.zeros(2, width).double()
            state[:, i] = z
            found, spread = noise.between_steps(
                state, rows[3].expand(2, -1), full(t, 2), full(s, 2)
            )
            close(found[:, i], want, atol=1e-6)  # rows are kept in float32
            close(spread, full(max(0, v_s - cov**2 / v_t) ** 0.5, 2)[:, None], atol=1e-6)
        state = torch.full((ROWS, width), -0.7).double()
        mean, spread = (
            x[0] for x in noise.between_steps(state[:1], rows[3:4], full(t, 1), full(s, 1))
        )
        after = noise.step(state, full(3, ROWS).long(), full(t, ROWS), full(s, ROWS), u)
        close(after.mean(0), mean, atol=5 * float(spread) / ROWS**0.5 + 1e-9)
        wanted = float(spread) ** 2 * torch.eye(width).double()
        close(after.T.cov().view(width, width), wanted, atol=0.05 * float(spread) ** 2 + 1e-9)


def test_guesses_lie_beside_what_slots_show():
    """And are not part of what a slot says of its token."""
    noise = replace(PLANE, guessed=0.5)
    x, v = torch.tensor([-5, -9]), torch.tensor([0, 3])
    plain, both = PLANE.state(x, v, double(0.3, 0.3)), noise.state(x, v, double(0.3, 0.3))
    rows = PLANE.fitted["rows"]
    close(both, torch.cat([plain, 0 * plain], 1))
    guessed = noise.with_guesses(both, torch.tensor([1, 1]), torch.tensor([True, False]))
    close(guessed[:, 2:], torch.stack([rows[1], 0 * rows[1]]).double())
    close(noise.embedded(guessed), PLANE.embedded(plain + guessed[:, 2:]))
    close(noise.log_likely(guessed, double(0.3, 0.3)), PLANE.log_likely(plain, double(0.3, 0.3)))
    after = noise.step(guessed, v, double(0.3, 0.3), double(0.1, 0.1), double(0.2, 0.7))
    close(after[:, :2], PLANE.step(plain, v, double(0.3, 0.3), double(0.1, 0.1), double(0.2, 0.7)))
    close(after[:, 2:], rows[v].double())


# Evidence


@pytest.mark.parametrize(("noise", "table"), [(PLANE, TABLE), (FLAT, LINE)])
def test_a_prediction_from_the_others_and_the_evidence_are_the_posterior(noise, table):
    rows, others = scaled(table), double([0.2, 0.5, 0.0, 0.3, 0.0])
    z = 2 * torch.randn(6, rows.shape[1], generator=torch.Generator().manual_seed(0)).double()
    for t in (*TIMES, 1.0):
        kept, var = scales(noise, t)
        likely = -((z[:, None] - kept * rows) ** 2).sum(-1) / (2 * var)
        found = noise.added(z, full(t, 6)).add_(others.log().expand(6, -1).clone())
        close(found.softmax(-1), (others.log() + likely).softmax(-1))
        back = replace(noise, logits="posterior")
        assert back.added(z, full(t, 6)) is None
        again = back.others(found + 3, z, full(t, 6)).softmax(-1)
        close(again, others.expand(6, -1), atol=1e-8)


def test_the_schedule_loses_what_is_known_of_a_token_at_an_even_pace():
    """By quadrature, at the knots."""
    p, z = (COUNTS[[*IDS]] + 1).double(), torch.linspace(-9, 9, 2001, dtype=torch.double)
    p, rows = p / p.sum(), scaled(LINE)[[*IDS], 0]
    entropy = -float((p * p.log()).sum())
    for x, level in FLAT.fitted["knots"].T[::8].tolist():
        snr = math.exp(-level / 2)  # in units of the noise
        own = -((z[:, None] * (1 + snr) - snr * rows) ** 2) / 2
        joint = p * (own - math.log(2 * math.pi) / 2).exp() * (1 + snr)
        lost = -(joint * (joint / joint.sum(1, keepdim=True)).clamp(min=1e-300).log()).sum()
        share = float(lost * (z[1] - z[0])) / entropy
        assert share == pytest.approx(1 / (1 + math.exp(-x)), abs=0.03)  # of 1,024 draws


# The bound, by quadrature over the vectors of a slot

NODES = torch.linspace(-7, 7, 281, dtype=torch.double)  # of a normal variable
WEIGHTS = (-(NODES**2) / 2).exp() / (-(NODES**2) / 2).exp().sum()


def network(z):
    """[N, V] logits that depend on what a slot shows, with no likelihood behind them."""
    slope = double(1.5, -0.8, 0.0, 0.4, 0.0)
    return (slope * torch.tanh(z + 0.3) + double(0.2, -0.4, 0.0, 0.1, 0.0)).masked_fill(
        SUPPRESSED, NEVER
    )


def log_posterior(logits, z, t):
    kept, var = scales(FLAT, t)
    return (logits - (z - kept * scaled(LINE)[:, 0]) ** 2 / (2 * var)).log_softmax(-1)


def log_normal(z, mean, var):
    return -((z - mean) ** 2) / (2 * var) - math.log(2 * math.pi * var) / 2


def back(z, t, s):
    """Means [N, V] and variance of z(s), given z(t) [N] and each x0."""
    (k_s, v_s), (k_t, v_t) = scales(FLAT, s), scales(FLAT, t)
    rows, cov = scaled(LINE)[:, 0], k_t / k_s * v_s
    return k_s * rows + cov / v_t * (z[:, None] - k_t * rows), v_s - cov**2 / v_t


def bound_of_steps(token, times):
    total, rows = 0.0, scaled(LINE)[:, 0]
    for t, s in pairwise(times):
        kept, var = scales(FLAT, t)
        z = kept * rows[token] + var**0.5 * NODES
        post = log_posterior(network(z[:, None]), z[:, None], t)
        if s == 0:
            return total - float(WEIGHTS @ post[:, token])
        mean, var = back(z, t, s)
        after = mean[:, token, None] + var**0.5 * NODES
        own = log_normal(after, mean[:, token, None], var)
        every = log_normal(after[..., None], mean[:, None], var) + post[:, None]
        total += float(WEIGHTS @ (own - every.logsumexp(-1)) @ WEIGHTS)


def integral(token, logits, points=300):
    t, weight = bound_times((torch.arange(points) + 0.5) / points)
    kept, var = torch.tensor([scales(FLAT, x) for x in t.tolist()]).double().T
    z = kept[:, None] * scaled(LINE)[token, 0] + var[:, None] ** 0.5 * NODES
    x, x0 = z.flatten()[:, None], torch.full((z.numel(),), token)
    nats = FLAT.nats(logits(x), x0, x, t.repeat_interleave(len(NODES))).view_as(z)
    return float((weight * (nats @ WEIGHTS)).mean())


def test_the_bound_of_an_ideal_model_is_the_entropy():
    """The integral over time of a squared error is an information (Guo, Shamai and Verdu 2005)."""
    p = double(0.2, 0.5, 0.0, 0.3, 0.0)
    found = sum(float(p[i]) * integral(i, lambda z: p.log().expand(len(z), -1), 600) for i in IDS)
    assert found == pytest.approx(-sum(float(p[i] * p[i].log()) for i in IDS), abs=2e-3)


def test_the_bound_is_above_the_likelihood_of_the_sampler_and_tends_to_the_integral():
    times, z = (1, 0.75, 0.5, 0.25, 0), torch.linspace(-9, 9, 1001, dtype=torch.double)
    step, density = z[1] - z[0], log_normal(z, 0.0, 1.0).exp()
    for t, s in pairwise(times[:-1]):
        post = log_posterior(network(z[:, None]), z[:, None], t)
        mean, var = back(z, t, s)
        moved = sum(
            post[:, i, None].exp() * log_normal(z, mean[:, i, None], var).exp() for i in IDS
        )
        density = density @ moved * step
    last = log_posterior(network(z[:, None]), z[:, None], times[-2]).exp()
    chance = density @ last * step
    assert float(chance.sum()) == pytest.approx(1, abs=1e-9)
    for token in IDS:
        assert bound_of_steps(token, times) > -math.log(chance[token])
    for token in (1, 3):
        few, many = (bound_of_steps(token, edges(n)) for n in (30, 60))
        assert few > many
        limit = integral(token, network)
        assert 2 * many - few == pytest.approx(limit, abs=5e-3)  # errors fall like 1 / T
    x0, z = torch.tensor([*IDS]), double(0.3, -1.0, 0.8)[:, None]

    def value(logits):
        return FLAT.nats(logits.masked_fill(SUPPRESSED, NEVER), x0, z, double(0.2, 0.5, 0.8))

    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(value, logits.requires_grad_())


# Through a model


def spec_of(noise, attention="causal_context", prediction="shift", size=2):
    spec = replace(tiny_spec(attention, size, prediction, MASK), ar_mode=False)
    return replace(spec, format=format_of(noise, None), noise=noise)


@cache
def tiny(guessed=0.0):
    """A model of five tokens, and its noise."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 1.0}
    model = build_model("llama", vocab_size=V, **shape, **heads)
    table = model.get_input_embeddings().weight.detach()
    noise = fitted(table, Embedding(guessed=guessed))
    carry(model, noise)
    return model, noise


def logits_by_hand(model, embeds, start, noisy, attention, prediction):
    """Logits [R, n, V] of the tokens from `start` to the end, where slots from `noisy` on are a
    block, in embeddings [R, end, H]."""
    end = embeds.shape[1]
    mask = own_mask(end, noisy, attention, 2)[None, None]
    at = {"attention_mask": mask, "position_ids": torch.arange(end)[None]}
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, use_cache=False, **at).logits
    shift = int(prediction == "shift")
    return logits[:, start - shift : end - shift].masked_fill(SUPPRESSED, NEVER)


def filled(model, noise, ids, hidden, first, attention, prediction, generator):
    """Texts [R, L] whose hidden slots [L], in a block from `first` on, are decided in two steps."""
    own = model.get_input_embeddings().weight.detach()
    length = sum(float(own[i].norm()) for i in IDS) / len(IDS) / 8**0.5
    rows, places = own / length, hidden.nonzero()[:, 0]
    z = torch.randn(len(ids), len(places), 8, generator=generator, dtype=torch.double)
    guess = 0 * z
    for t, s in ((1, 0.5), (0.5, 0)):
        (k_t, v_t), (k_s, v_s) = scales(noise, t), scales(noise, s)
        embeds = own[ids]
        embeds[:, places] = (z + guess) * length
        start = int(places[0])
        logits = logits_by_hand(model, embeds, start, first, attention, prediction)
        logits = logits[:, places - start]
        logits = logits - ((z[:, :, None] - k_t * rows) ** 2).sum(-1) / (2 * v_t)
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        drawn = drawn.view(len(ids), -1)
        cov = k_t / k_s * v_s
        mean = k_s * rows[drawn] + cov / v_t * (z - k_t * rows[drawn])
        fresh = torch.randn(z.shape, generator=generator, dtype=torch.double)
        z = mean + (v_s - cov**2 / v_t) ** 0.5 * fresh
        guess = rows[drawn] if noise.guesses else guess
    ids = ids.clone()
    ids[:, places] = drawn
    return ids


def simulated(model, noise, prediction, generator):
    """[R, 4] texts of two blocks, of one and two tokens."""
    ids = torch.zeros(ROWS // 2, 1).long()
    for size in (1, 2):
        first = ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, size))
        hidden = torch.arange(ids.shape[1]) >= first
        how = "causal_context", prediction, generator
        ids = filled(model, noise, ids, hidden, first, *how)
    return ids


def alike(found, other):
    """Two samples of texts, of one law."""
    found, other = (Counter(map(tuple, ids.tolist())) for ids in (found, other))
    for text in {*found, *other}:
        assert abs(found[text] - other[text]) <= 5 * (found[text] + other[text]) ** 0.5 + 1
    return found


SETTINGS = {"block_length": 2, "steps_per_block": 2, "temperature": 1.0, "suppress_tokens": (2,)}


@pytest.mark.parametrize(("prediction", "guessed"), [("same", 0.0), ("shift", 0.5)])
def test_the_sampler_writes_what_its_steps_say(prediction, guessed):
    """Ten thousand texts, beside as many of a sampler that is written here."""
    model, noise = tiny(guessed)
    generator, count = torch.Generator().manual_seed(0), ROWS // 2
    canvas = Canvas.of_prompts([[0]] * count, MASK, max_new_tokens=3, grid=2)
    options = Options(max_new_tokens=3, **SETTINGS)
    spec, generators = spec_of(noise, prediction=prediction), [generator] * count
    for _ in decoder_of(model, spec, canvas, options, generators=generators).run():
        pass
    texts = alike(canvas.ids, simulated(model, noise, prediction, generator))
    assert {*texts} <= {*product([0], IDS, IDS, IDS)}
    assert len(texts) > 9 and max(texts.values()) < count / 2


def test_gaps_are_filled_between_tokens_that_are_read_as_they_are():
    model, noise = tiny()
    generator, count = torch.Generator().manual_seed(0), ROWS // 4
    prompt, hidden = [0, MASK, 3, MASK, 1], torch.tensor([False, True, False, True, False])
    canvas = Canvas.of_prompts([prompt] * count, MASK, max_new_tokens=0)
    options = Options(max_new_tokens=0, **SETTINGS | {"block_length": None})
    spec, generators = spec_of(noise, "full", "same"), [generator] * count
    decoder = decoder_of(model, spec, canvas, options, generators=generators)
    assert torch.equal(canvas.read[0] < 0, hidden)
    for _ in decoder.run():
        assert torch.equal(canvas.read[:, ~hidden][0], torch.tensor([0, 3, 1]))
    ids = torch.tensor([[0, 0, 3, 0, 1]]).expand(count, -1)
    texts = alike(canvas.ids, filled(model, noise, ids, hidden, 0, "full", "same", generator))
    assert len(texts) > 4


@pytest.mark.parametrize("guessed", [0.0, 0.5])
@pytest.mark.parametrize("attention", ["causal_context", "full"])
def test_guidance_reads_a_copy_without_the_prompt_and_without_guesses(attention, guessed):
    model, noise = tiny(guessed)
    canvas = Canvas.of_prompts([[0, 1, 3]] * 2, MASK, max_new_tokens=3, grid=2)
    settings = SETTINGS | {"block_length": 2 if attention != "full" else None}
    options = Options(max_new_tokens=3, cfg_scale=1.5, seed=3, **settings)
    decoder = decoder_of(model, spec_of(noise, attention), canvas, options)
    own, length = model.get_input_embeddings().weight.detach(), float(noise.fitted["length"])
    first = 0 if attention == "full" else 2
    for _ in range(2):
        z = canvas.shown.unflatten(-1, (-1, 8))
        end = first + 2 if first else canvas.ids.shape[1]
        embeds = own[canvas.ids[:, :end]]
        null = own[[0, *[MASK] * (end - 1)]].expand(2, -1, -1).clone()
        hidden = canvas.open[:, :end]
        embeds[hidden] = z[:, :end][hidden].sum(-2) * length
        null[hidden] = z[:, :end][hidden][:, 0] * length
        with torch.no_grad():
            found = decoder._read(decoder.masked)
        both = [
            logits_by_hand(model, x, 3, first, attention, "shift")[hidden[:, 3:]]
            for x in (embeds, null)
        ]
        want = both[1] + 2.5 * (both[0] - both[1])
        allowed = torch.tensor([*IDS])
        close(found[:, allowed], want[:, allowed], atol=1e-8)
        decoder.step()


CALLS = [
    ({"compile": True}, "replays one forward of token ids"),
    ({"cache_implementation": "static"}, "replays one forward of token ids"),
    ({"threshold": 0.5}, "decides a block at its last step"),
    ({"mode": "speculative"}, "drafts in masks"),
]


@pytest.mark.parametrize(("call", "said"), CALLS, ids=str)
def test_what_vectors_cannot_do_is_refused(call, said):
    spec = replace(spec_of(tiny()[1], size=4), ar_mode=True)
    with pytest.raises(Ar2DiffError) as refused:
        resolve(spec, {"mode": "diffusion"} | call)
    assert said in refused.value.what and refused.value.fix
    for allowed in ({"cfg_scale": 2.0}, {"choice": ["a"]}, {"cache_implementation": "none"}):
        resolve(spec, {"mode": "diffusion"} | allowed)


@pytest.mark.parametrize("prediction", ["same", "shift"])
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
def test_bounds_through_a_model_are_the_nats_of_its_draws(attention, prediction):
    model, noise = tiny()
    spec, text = spec_of(noise, attention, prediction), (0, 1, 3, 0)
    own = model.get_input_embeddings().weight.detach()
    drawn = draw(noise, text, spec.block_length, torch.arange(4) > 0, 3, 0, 1)
    rollout = Rollout(torch.tensor(text), 1, 3, torch.zeros(4).long(), 5)
    rl = Rl(estimator="elbo", samples=3)
    answered = estimators._shown(rollout, rl, spec, noise)
    found = (
        bound(model, spec, [text], SUPPRESSED, 3).nats,
        -score(model, [rollout], rl, spec, SUPPRESSED).per_token().sum().detach(),
    )
    draws = (drawn.xt, drawn.weight, drawn.t), answered
    for (shown, weight, times), value in zip(draws, found, strict=True):
        total, size = 0.0, spec.block_length or 4
        for x, w, t in zip(shown, weight, times, strict=True):
            assert (x[1:] < 0).all() and x[0] == 0
            kept, var = torch.tensor([scales(noise, float(y)) for y in t]).T[..., None]
            z = kept * noise.fitted["rows"][[*text]] + var**0.5 * normal(-1 - x, 8)
            embeds = own[[*text]].clone()
            embeds[1:] = z[1:] * float(noise.fitted["length"])
            for first in range(0, 4, size):
                block, start = slice(max(first, 1), first + size), max(first, 1)
                row = torch.cat([own[[*text]][:first], embeds[first : first + size]])[None]
                (logits,) = logits_by_hand(model, row, start, first, attention, prediction)
                nats = noise.nats(logits, torch.tensor(text[block]), z[block], t[block])
                total += float((w[block] * nats).sum())
        assert float(value) == pytest.approx(total, rel=1e-6)
