"""The noises in what comes after a conversion: what a conversation shows, what rl scores, adapters,
kills, rows that come and go, folders without ar2diff, and edits of decided tokens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MASK, build_model, tiny_spec
from safetensors.torch import load_file
from test_custom_generate import BLOCKER
from test_joining import alone, together
from test_likelihood import own_mask, raw_logits
from test_turns import END, ENDS, IDS, LABELS

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.merge import merge
from ar2diff.config.recipe import load_recipe
from ar2diff.config.rl import Rl
from ar2diff.conversion.convert import fitted_noise
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.fitted import NOISE_FILE, Fitted, carry
from ar2diff.core.forward import logits_at
from ar2diff.core.generate import generate
from ar2diff.core.noise import Noise
from ar2diff.core.noises import MaskUniform, SelfGuess, Uniform
from ar2diff.core.options import resolve
from ar2diff.core.spec import NOISE_FORMAT
from ar2diff.core.spindle import Spindle
from ar2diff.core.vectors import Embedding, normal
from ar2diff.core.walks import Nearest
from ar2diff.data.conversations import TokenRows
from ar2diff.data.documents import Collator, document_parts, tokenize
from ar2diff.data.turns import IGNORED, TurnCollator, conversation_parts
from ar2diff.diffusion.likelihood import bound
from ar2diff.training import estimators
from ar2diff.training.adapt import adapt
from ar2diff.training.estimators import score, views
from ar2diff.training.journal import read_metrics
from ar2diff.training.loss import divisors_of, totals_of
from ar2diff.training.plan import Plan
from ar2diff.training.rollouts import Rollout, of_canvas
from ar2diff.training.sft import DiffusionSFTTrainer, make_trainer, sft

NOISES = {
    "uniform": Uniform(),
    "uniform free": Uniform("free"),
    "mask_uniform": MaskUniform(),
    "self": SelfGuess(),
    "embedding": Embedding(guessed=0.5),
}
FREE = [name for name, noise in NOISES.items() if noise.free]
TRACKED = [name for name in NOISES if name not in FREE]
FITTED = {"nearest": Nearest(neighbours=20), "spindle": Spindle()}
ATTENTIONS = ("causal_context", "block_causal", "full")
SUPPRESSED = torch.arange(64) == MASK
BLOCK = 4


@cache
def fitted(noise: Noise) -> Noise:
    """The noise, fitted to the tiny models if its kind is."""
    if not noise.fits:
        return noise
    table = build_model("llama").get_input_embeddings().weight.detach()
    counts = torch.arange(64) % 7
    return replace(noise, fitted=Fitted(None, noise.fit(table, counts, ~SUPPRESSED)))


def on(noise: Noise) -> Noise:
    """The noise over the vocabulary of the tiny models."""
    return fitted(noise).on(MASK, SUPPRESSED)


def spec_of(noise, attention="causal_context", prediction="shift"):
    spec = tiny_spec(attention, BLOCK, prediction)
    return replace(spec, noise=fitted(noise), format=NOISE_FORMAT)


def overrides_of(noise: Noise) -> list[str]:
    """How a recipe names a noise."""
    own = [f"noise.kind={noise.kind}", f"noise.form={noise.form}"]
    if noise.kind == "embedding":
        own.append(f"noise.parameters={{guessed: {noise.guessed}}}")
    return own + ["noise.parameters={neighbours: 20}"] * (noise.kind == "nearest")


# What a conversation shows in training

CHATS = [
    (IDS, LABELS),
    ([1, 10, 20, END], [IGNORED] * 2 + [20, END]),
    ([1, 14, 13, 12, 11, 25, 26, END], [IGNORED] * 5 + [25, 26, END]),
]


def parts_of(recipe, epoch=0, chats=CHATS):
    return [
        p for ids, labels in chats for p in conversation_parts(ids, labels, epoch, ENDS, recipe)
    ]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", NOISES)
def test_only_supervised_tokens_are_noisy_and_scored(sft_recipe, attention, name):
    recipe, noise = sft_recipe(attention), on(NOISES[name])
    collator, shown, counts = TurnCollator(recipe, noise), set(), 0
    for epoch in range(40):
        parts = parts_of(recipe, epoch)
        batch = collator([(n, [part]) for n, part in enumerate(parts)])
        ids, target, scored = batch["input_ids"], batch["target"], batch["scored"]
        learned = batch["noisy"] & ~torch.isin(target, torch.tensor([1, *range(10, 15)]))
        if attention == "full":  # a row with one turn, behind those before it
            first = torch.tensor([part.turns[0].start for part in parts])
            learned &= batch["pos"] >= first[:, None]
        assert torch.equal(ids[~scored], target[~scored]) and not (scored & ~learned).any()
        if noise.free:  # any of them may have changed, and they are in the loss either way
            assert torch.equal(scored, learned)
        shown |= set(ids[scored].tolist())
        counts += int((ids != target)[scored].sum())
        assert (batch["coef"] > 0).equal(scored) and not batch["coef"][~scored].any()
        if noise.free:
            assert torch.equal(batch["shown"], ids[scored])
        else:
            assert "shown" not in batch
        assert ("guess" in batch) == noise.guesses
    assert counts > 100
    if noise.kind == "self":
        assert shown == {MASK}
    else:
        assert len(shown) > 30 and (MASK in shown) == noise.starts_masked


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", NOISES)
def test_a_conversation_shows_the_same_whatever_is_beside_it(sft_recipe, attention, name):
    """Packed, in a batch, in a batch with longer rows; another epoch and another seed do not."""
    recipe = sft_recipe(attention)
    names = ["input_ids", "target", "t", "scored", "pos", "eos"]
    names += ["guess"] if NOISES[name].guesses else []

    def slots(batch, row, doc):
        here = (batch["doc"][row] == doc) & batch["noisy"][row]
        values = [batch[key][row, here].tolist() for key in names]
        return values

    def each(epoch, seed=0):
        made = sft_recipe(attention, train={"seed": seed})
        collator = TurnCollator(made, on(NOISES[name]))
        return [slots(collator([(0, [part])]), 0, 0) for part in parts_of(made, epoch)]

    parts, collator = parts_of(recipe, 3), TurnCollator(recipe, on(NOISES[name]))
    packed, batch = collator([(0, parts)]), collator([(n, [p]) for n, p in enumerate(parts)])
    assert [slots(packed, 0, doc) for doc in range(len(parts))] == each(3)
    assert [slots(batch, row, 0) for row in range(len(parts))] == each(3)
    assert each(3) != each(4) and each(3) != each(3, seed=1)


@pytest.mark.parametrize("name", NOISES)
def test_complementary_views_are_for_slots_that_are_known_to_be_open(sft_recipe, name):
    noise = NOISES[name]
    wanted = {"complementary": True, "kind": noise.kind, "form": noise.form}
    if noise.free or noise.guesses:
        with pytest.raises(ValueError, match="complementary cannot be used with"):
            sft_recipe(noise=wanted)
        return
    recipe = sft_recipe(noise=wanted)
    batch = TurnCollator(recipe, on(noise))([(0, parts_of(recipe, 3, CHATS[:1]))])
    one, two = batch["scored"]
    assert not (one & two).any() and int((one | two).sum()) == 4 + 7
    assert torch.equal(batch["input_ids"][~batch["scored"]], batch["target"][~batch["scored"]])


PAIRS = [{"prompt": f"what is {n}?", "completion": f" it is {n}{'!' * (n % 4)}."} for n in range(8)]
SHORT = [
    "data.max_length=32", "convert.block_length=4", "train.per_device_train_batch_size=2",
    "train.learning_rate=1e-2", "train.warmup_steps=0", "train.logging_steps=1",
]  # fmt: skip


@pytest.fixture
def short(write_jsonl):
    """Factory: a short run of `sft` on a few pairs."""

    def make(*overrides):
        data = write_jsonl("pairs.jsonl", PAIRS)
        return load_recipe(None, [*SHORT, f"data.sources=[{data}]", *overrides])

    return make


@pytest.fixture
def noisy_base(convert_tiny, tmp_path_factory):
    """Factory: the tiny checkpoint converted with a noise, which sees a text if it is fitted to
    texts. Never write to it."""
    texts = tmp_path_factory.getbasetemp() / "fitted.jsonl"
    rows = [{"text": "the cat sat on the mat and saw a dog. " * 4}, {"text": ""}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name):
        noise = (NOISES | FITTED)[name]
        own = ["train.max_steps=1", "train.per_device_train_batch_size=1", "data.max_length=32"]
        own += [f"data.sources=[{texts}]", "train.learning_rate=1e-4"]
        return convert_tiny("convert.block_length=4", *overrides_of(noise), *own * noise.fits)

    return make


def test_what_was_fitted_stays_while_nothing_that_it_depends_on_changes(noisy_base):
    checkpoint = load_checkpoint(str(noisy_base("embedding")))
    again = fitted_noise(checkpoint, Embedding(guessed=0.5), 0, None)
    assert again.fitted is checkpoint.spec.noise.fitted and again.guesses
    checkpoint = load_checkpoint(str(noisy_base("nearest")))
    with pytest.raises(Ar2DiffError, match="is fitted to the texts"):
        fitted_noise(checkpoint, Nearest(neighbours=3), 0, None)


@pytest.mark.parametrize("name", [*FREE, *FITTED])
def test_the_loss_weighs_tokens_by_what_their_slots_show(noisy_base, short, tmp_path, name):
    checkpoint = load_checkpoint(str(noisy_base(name)))
    rows = TokenRows(*(list(map(np.array, x)) for x in zip(*CHATS, strict=True)), ())
    recipe, noise, bars = short("objective.ar_weight=0"), checkpoint.noise, checkpoint.suppressed
    trainer = make_trainer(Plan(checkpoint, recipe, rows, None), tmp_path, [])
    batch = trainer.data_collator([(n, [p]) for n, p in enumerate(parts_of(recipe))])
    wanted, every = trainer.task_of(batch), torch.eye(len(bars)).double()
    if wanted.guess is not None:
        wanted = trainer._with_guesses(trainer.model, trainer.model, wanted)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        logits = logits_at(
            trainer.model, wanted.task.index, **wanted.task.inputs(trainer.model, None)
        )
    for line, (x, t) in enumerate(zip(wanted.task.shown, wanted.t, strict=True)):
        if noise.vectors:
            kept, spread = noise._scales(t[None])
            apart = (x[: noise.fitted["rows"].shape[1]] - kept * noise.fitted["rows"]).norm(dim=1)
            logits[line] -= ((apart / spread[0]) ** 2 / 2).float()
            continue
        likely = noise.marginal(every, t.expand(len(bars)))[:, x]
        logits[line] += likely.clamp(min=1e-30).log().float()
    logits = logits.masked_fill(bars, -torch.inf)
    nll = torch.nn.functional.cross_entropy(logits, wanted.task.target, reduction="none")
    total = (wanted.coef * nll).sum() / batch["divisor"]
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    likeliest = wanted.at_masked(logits.argmax(-1))
    assert torch.equal(outputs["predictions"], likeliest)


@pytest.mark.parametrize("name", NOISES)
def test_guesses_and_noise_are_the_same_in_every_split_of_a_batch(
    noisy_base, short, tmp_path, name
):
    """Loss and gradient of a batch, and of its parts one after the other, as accumulation and ranks
    have them; the tokens that the model guesses too."""
    checkpoint = load_checkpoint(str(noisy_base(name)))
    plan = Plan(checkpoint, short(), None, None)
    rows = TokenRows(*(list(map(np.array, x)) for x in zip(*CHATS, strict=True)), ())
    trainer = make_trainer(replace(plan, rows=rows), tmp_path, [])
    numbered = [(n, [p]) for n, p in enumerate(parts_of(plan.recipe))]
    whole = trainer.data_collator(numbered)
    divisors, found, shows = divisors_of(totals_of([whole])), [], []
    for batches in ([whole], [trainer.data_collator([row]) for row in numbered]):
        trainer.model.zero_grad()
        loss, guessed = 0.0, []
        for batch in batches:
            wanted = trainer.task_of(batch)
            part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=divisors)
            part.backward()
            loss += float(part)
            if wanted.guess is not None:
                made = trainer._with_guesses(trainer.model, trainer.model, wanted)
                before, after = wanted.task.input_ids, made.task.input_ids
                places = batch["scored"] & (batch["guess"] >= 0)
                assert torch.equal(before[~places], after[~places])
                if checkpoint.noise.vectors:
                    ids, rows = before.flatten()[wanted.own], checkpoint.noise.fitted["rows"]
                    moved = (made.task.vectors - wanted.task.vectors)[-1 - ids]
                    moved = moved / checkpoint.noise.fitted["length"]
                    assert not moved[wanted.guess < 0].any() and len(moved) == len(ids)
                    apart, after = torch.cdist(moved, rows.double()).min(1)
                    assert (apart[wanted.guess >= 0] < 1e-5).all()
                    guessed += after[wanted.guess >= 0].tolist()
                    continue
                assert not (after[places] == checkpoint.spec.mask_token_id).any()
                guessed += after[batch["scored"]].tolist()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        found.append((loss, gradient))
        shows.append(guessed)
    (one, grad), (two, other) = found
    assert one == pytest.approx(two, rel=1e-5) and one > 1
    assert (grad - other).norm() < 1e-4 * grad.norm()
    assert shows[0] == shows[1] and bool(shows[0]) == checkpoint.noise.guesses


def test_the_share_of_texts_that_show_guesses_is_the_recipes(sft_recipe):
    """Also of texts that look alike: those that are masked whole."""
    recipe, shares = sft_recipe(), {}
    for guessed in (0.25, 1.0):
        collator = TurnCollator(recipe, on(SelfGuess(guessed=guessed)))
        texts = [[1, 10, 11, n, n, END] for n in range(3, 60)]
        labels = [IGNORED] * 4
        batch = collator(
            [
                (row, conversation_parts(ids, [*labels, *ids[4:]], row % 3, ENDS, recipe))
                for row, ids in enumerate(texts * 3)
            ]
        )
        own = [(batch["guess"][row][batch["noisy"][row]] >= 0) for row in range(len(texts) * 3)]
        assert all(row.all() or not row.any() for row in own)
        shares[guessed] = sum(bool(row.any()) for row in own) / len(own)
    assert shares[1.0] == 1 and 0.13 < shares[0.25] < 0.37


TEXTS = ["the cat sat on the mat and saw a dog", "ab", "one two three four", "x y z", "ab cd ef"]


@pytest.mark.parametrize("attention", ["causal_context", "full"])
@pytest.mark.parametrize("name", NOISES)
def test_a_document_shows_the_same_whatever_is_beside_it(
    make_recipe, tiny_tokenizer, name, attention
):
    recipe, noise = make_recipe(attention, data={"max_length": 64}), fitted(NOISES[name])
    noise = noise.on(259, torch.arange(260) == 259)
    collator, names = Collator(recipe, noise), ["x0", "xt", "t", "scored", "pos"]
    names += ["guess"] if noise.guesses else []

    def slots(batch, row, doc):
        here = batch["doc"][row] == doc
        values = [batch[key][row, here].tolist() for key in names]
        return values

    ids = [tokenize(tiny_tokenizer, text, END) for text in TEXTS]
    parts = [p for own in ids for p in document_parts(own, 2, END, recipe, 0)]
    found = [slots(collator([(0, [part])]), 0, 0) for part in parts]
    batch = collator([(0, parts[:3]), (1, parts[3:])])
    assert [slots(batch, n // 3, n % 3) for n in range(len(parts))] == found
    for values in found:  # the first token is given
        assert not values[3][0] and values[0][0] == values[1][0]


# Kills


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", NOISES)
def test_sft_trains_and_goes_on_to_the_same_bits_after_a_kill(
    noisy_base, short, tmp_path, monkeypatch, name
):
    base, recipe = str(noisy_base(name)), short("train.max_steps=4", "train.save_steps=2")
    sft(base, recipe, tmp_path / "whole")
    losses = [row["loss"] for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    tuned, noise = load_checkpoint(str(tmp_path / "whole")), load_checkpoint(base).noise
    assert tuned.spec == load_checkpoint(base).spec and tuned.spec.noise == NOISES[name]
    if noise.fits:  # what it was fitted to stays, though the model moves
        assert tuned.noise.fitted.sha256 == noise.fitted.sha256
        assert (tmp_path / "whole" / NOISE_FILE).read_bytes() == (
            Path(base) / NOISE_FILE
        ).read_bytes()
    step = DiffusionSFTTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionSFTTrainer, "training_step", killed)
    with pytest.raises(Killed):
        sft(base, recipe, tmp_path / "cut")
    monkeypatch.setattr(DiffusionSFTTrainer, "training_step", step)
    sft(base, recipe, tmp_path / "cut", resume=True)
    whole, cut, old = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "whole", tmp_path / "cut", Path(base))
    )
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert any(not torch.equal(whole[key], old[key]) for key in whole)


# Rewards

# Six tokens of prompt, seven of answer (2, 4 and 1 of their blocks), behind it one and two masks.
ROLLOUT = [1, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 25, 2, 45, MASK, MASK]


def rollout_of(seed=5, step=None):
    ids = torch.tensor(ROLLOUT)
    return Rollout(ids, 6, 7, torch.zeros_like(ids) if step is None else step, seed)


def spans(spec):
    size = spec.block_length or len(ROLLOUT)
    return [(start, start + size) for start in range(0, len(ROLLOUT), size)]


@torch.no_grad()
def raw(model, spec, shown, start, end):
    """Logits [end - start, V] of a block, given what it shows and the clean tokens before it."""
    row = torch.tensor(ROLLOUT[:start] + shown[start:end].tolist())
    if spec.attention == "full":
        row = shown
    mask = own_mask(end, start, spec.attention, BLOCK)
    if spec.noise.vectors:
        embeds = model.get_input_embeddings()(row.clamp(min=0))
        own = normal(-1 - row, embeds.shape[1]) * spec.noise.fitted["length"]
        row = torch.where(row[:, None] < 0, own, embeds)
        at = {"attention_mask": mask[None, None], "position_ids": torch.arange(end)[None]}
        logits = model(inputs_embeds=row[None], use_cache=False, **at).logits[0]
    else:
        logits = raw_logits(model, row[None], mask)[0]
    logits = logits[torch.arange(start, end) - int(spec.prediction == "shift")]
    return logits.masked_fill(SUPPRESSED, float("-inf"))


POSTERIOR = Uniform("free", logits="posterior")


@pytest.mark.parametrize(
    ("noise", "attention", "prediction"),
    [
        (Uniform("free"), "causal_context", "shift"),
        (Uniform("free", schedule="cosine"), "block_causal", "same"),
        (MaskUniform(), "causal_context", "shift"),
        (MaskUniform(), "full", "same"),
        (POSTERIOR, "full", "shift"),
        (POSTERIOR, "causal_context", "same"),
    ],
)
def test_the_elbo_of_a_free_noise_is_the_nats_of_its_draws(noise, attention, prediction):
    model, spec = build_model("llama"), spec_of(noise, attention, prediction)
    rl, rollout, whole = Rl(estimator="elbo", samples=3), rollout_of(), on(noise)
    shown, weight, t = estimators._shown(rollout, rl, spec, whole)
    place = torch.arange(len(ROLLOUT))
    answer = (place >= 6) & (place < 13)
    assert torch.equal(shown[:, :6], rollout.ids[:6].expand(3, -1))
    prior = {MASK} if noise.starts_masked else set(range(64)) - {MASK}
    assert set(shown[:, 13:].flatten().tolist()) <= prior
    assert (weight[:, answer] > 0).all() and not weight[:, ~answer].any()
    want = torch.zeros(3, len(ROLLOUT), dtype=torch.double)
    for view, (start, end) in ((v, s) for v in range(3) for s in spans(spec)):
        at = (slice(start, end),)
        if not answer[at].any():
            continue
        x0, x, times = rollout.ids[at].clamp(max=62), shown[view][at], t[view][at]
        logits = raw(model, spec, shown[view], start, end)
        want[view][at] = -whole.nats(whole.others(logits, x, times), x0, x, times)
    want = (weight * want.masked_fill(~answer, 0.0)).sum(0)[answer]
    with torch.no_grad():
        found = [score(model, [rollout], rl, spec, SUPPRESSED) for _ in range(2)]
        beside = score(model, [rollout_of(9), rollout], rl, spec, SUPPRESSED).per_token()[1]
    torch.testing.assert_close(found[0].per_token()[0], want, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0].logp, found[1].logp)  # the same draws for another policy
    torch.testing.assert_close(beside, found[0].per_token()[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(estimators._shown(rollout_of(6), rl, spec, whole)[0], shown)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", FREE)
def test_the_elbo_of_a_free_noise_is_on_average_the_bound(name, attention):
    model, spec = build_model("llama"), spec_of(NOISES[name], attention)
    ids = ROLLOUT[:12] if attention != "full" else ROLLOUT[:13]
    whole = Rollout(torch.tensor(ids), 6, len(ids) - 6, torch.zeros(len(ids)).long(), 0)
    exact = bound(model, spec, [ids], SUPPRESSED, 200, starts=[6])
    rl, found = Rl(estimator="elbo", samples=20), []
    with torch.no_grad():
        for seed in range(10):
            scores = score(model, [replace(whole, seed=seed)], rl, spec, SUPPRESSED)
            found.append(float(scores.per_token().sum()))
    mean, error = sum(found) / 10, torch.tensor(found).std() / 10**0.5
    error = float((error**2 + exact.variance[0]).sqrt())
    assert abs(mean + float(exact.nats)) < 4 * error and error < 0.25 * abs(mean)


@pytest.mark.parametrize("estimator", ["one_step", "elbo", "ar"])
@pytest.mark.parametrize("name", NOISES)
def test_gradients_flow_through_every_estimate(name, estimator):
    model, spec = copy.deepcopy(build_model("llama")), spec_of(NOISES[name])
    rl = Rl(estimator=estimator)
    per_token = score(model, [rollout_of(), rollout_of(3)], rl, spec, SUPPRESSED).per_token()
    per_token.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    weight, total = model.lm_head.weight, 0.0
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    slope = float((weight.grad * direction).sum())
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * 1e-5 * direction
            value = score(model, [rollout_of(), rollout_of(3)], rl, spec, SUPPRESSED)
            total += (1 if sign == 1 else -1) * float(value.per_token().sum())
    assert slope == pytest.approx(total / 2e-5, rel=1e-4)


@pytest.mark.parametrize("attention", ["causal_context", "full"])
@pytest.mark.parametrize("name", NOISES)
def test_one_step_shows_what_the_sampler_begins_with(name, attention):
    model, spec, noise = build_model("llama"), spec_of(NOISES[name], attention), on(NOISES[name])
    rl, rollout = Rl(estimator="one_step"), rollout_of()
    ((shown,), _, _) = estimators._shown(rollout, rl, spec, noise)
    assert torch.equal(shown[:6], rollout.ids[:6])
    assert ((shown[6:] == MASK) == noise.starts_masked).all()
    want = torch.zeros(7, dtype=torch.double)
    for start, end in spans(spec):
        inside = range(max(start, 6), min(end, 13))
        logp = raw(model, spec, shown, start, end).log_softmax(-1)
        for i in inside:
            want[i - 6] = logp[i - start, ROLLOUT[i]]
    with torch.no_grad():
        got = score(model, [rollout], rl, spec, SUPPRESSED).per_token()[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["coupled", "elbo", "spg", "trajectory"])
def test_tracked_noises_are_scored_in_the_views_of_masks(estimator):
    """The same tokens are open; a uniform noise shows fillers there, the guesses begin as masks."""
    step = torch.tensor([0] * 6 + [1, 1, 2, 3, 3, 2, 4, 4, 0, 0])
    rollout, rl = rollout_of(step=step), Rl(estimator=estimator)
    masked, _ = views(rollout, rl, tiny_spec())
    for name in TRACKED:
        spec = spec_of(NOISES[name])
        shown, weight, _ = estimators._shown(rollout, rl, spec, on(NOISES[name]))
        same, (where, plain) = rollout.ids.expand_as(shown), views(rollout, rl, spec)
        assert torch.equal(where, masked) and torch.equal(weight, plain)
        assert torch.equal(shown[~masked], same[~masked])
        assert ((shown[masked] == MASK) == (name == "self")).all()
        with torch.no_grad():
            first, second = (
                score(build_model("llama"), [rollout], rl, spec, SUPPRESSED) for _ in "ab"
            )
        assert torch.equal(first.logp, second.logp) and first.logp.isfinite().all()


@pytest.mark.parametrize("attention", ["causal_context", "full"])
@pytest.mark.parametrize("name", NOISES)
def test_a_rollout_says_when_its_tokens_were_decided(name, attention):
    model, spec = build_model("llama"), spec_of(NOISES[name], attention)
    options = resolve(
        spec, {"temperature": 1.0, "steps_per_block": 3, "seed": 3, "max_new_tokens": 9}
    )
    prompts, grid = [[1, 17, 42], [1, 8, 9, 10, 11, 12]], spec.block_length or 1
    canvas = Canvas.of_prompts(prompts, MASK, max_new_tokens=9, grid=grid, end_ids=[2, 3, 4])
    for _ in decoder_of(model, spec, canvas, options).run():
        pass
    for row, prompt in enumerate(prompts):
        rollout = of_canvas(canvas, row, spec, 0)
        step, ids = rollout.step, rollout.ids
        written = torch.arange(len(ids)) >= len(prompt)
        assert torch.equal(step > 0, written & (ids != MASK)) and not step[: len(prompt)].any()
        assert int(step.max()) <= rollout.forwards
        size, last = spec.block_length or len(ids), 0
        for start in range(len(prompt) // size * size, len(ids), size):
            own = step[start : start + size]
            own = own[own > 0]
            assert (own > last).all() and len(own.unique()) <= 3
            if spec.noise.free:  # the whole block at once, in the third of its steps
                assert own.unique().tolist() == [last + 3]
            last = int(own.max())


REWARD = {"name": "regex", "args": {"pattern": "[0-9]{2,5}!"}}


@pytest.fixture
def rewarded(noisy_base, write_jsonl, tmp_path):
    """Factory: an update of `rl` on a model with a noise."""

    def run(name, **rl):
        data = write_jsonl("prompts.jsonl", [{"prompt": f"say {n}"} for n in range(4)])
        settings = {"rewards": [REWARD], "num_generations": 4, "max_completion_length": 8}
        train = {"per_device_train_batch_size": 8, "logging_steps": 1, "max_steps": 1}
        train |= {"learning_rate": 1e-3, "warmup_steps": 0}
        ar2diff.rl(
            noisy_base(name), output_dir=tmp_path / "out", data=data, overwrite=True,
            overrides={"rl": settings | rl, "train": train},
        )  # fmt: skip
        return [row for row in read_metrics(tmp_path / "out") if "reward" in row]

    return run


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("uniform free", "elbo"), ("mask_uniform", "ar"), ("uniform", "trajectory"),
        ("self", "one_step"), ("embedding", "elbo"),
    ],
)  # fmt: skip
def test_rl_runs_and_keeps_to_a_regex(rewarded, tmp_path, name, estimator):
    """Under a noise of whose tokens none is decided before the last step, too."""
    (row,) = rewarded(
        name, estimator=estimator, sampler={"regex": REWARD["args"]["pattern"]}, beta=0.1
    )
    assert row["reward"] == 1
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.parametrize("name", FREE)
def test_estimates_that_need_open_slots_are_refused_before_a_free_model_is_loaded(
    noisy_base, run_both, write_jsonl, tmp_path, monkeypatch, name
):
    data = write_jsonl("prompts.jsonl", [{"prompt": "a"}])
    model, line = noisy_base(name), ["--data", data, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    reward = "rl.rewards=[{name: exact}]"
    for estimator in ("coupled", "spg", "trajectory"):
        code, out, said = run_both("rl", model, *line, reward, f"rl.estimator={estimator}")
        first, second = said.splitlines()
        assert (code, out) == (2, "") and second.startswith("  fix: ")
        assert first.startswith("error: model ") and "in the free form" in first
        assert f"rl.estimator {estimator} cannot be used with noise.kind" in first
    refused = {
        "rl": [reward, "rl.estimator=elbo", "noise.kind=self"],
        "sft": ["objective.weight=1/t"],
    }
    for verb, overrides in refused.items():
        code, _, said = run_both(verb, model, *line, *overrides)
        assert code == 2 and len(said.splitlines()) == 2, said
    assert not (tmp_path / "out").exists()


# Adapters


@pytest.mark.parametrize("name", ["embedding", "self"])
def test_an_adapter_on_a_noisy_base_trains_loads_and_merges(
    noisy_base, short, write_jsonl, tmp_path, name
):
    base = noisy_base(name)
    texts = write_jsonl("texts.jsonl", [{"text": row["prompt"] * 3} for row in PAIRS])
    lora = ["train.max_steps=3", "peft.r=2", "peft.alpha=4", "train.learning_rate=5e-2"]
    adapt(str(base), load_recipe(None, [*SHORT, *lora, f"data.sources=[{texts}]"]), tmp_path / "a")
    merge(str(tmp_path / "a"), tmp_path / "merged")
    sft(str(tmp_path / "merged"), short(*lora), tmp_path / "s")
    ids, plain = torch.tensor([[1, 40, 41, 42]]), load_checkpoint(str(base))
    call = {"mode": "diffusion", "max_new_tokens": 12, "seed": 5, "temperature": 1.0}
    call |= {"edit_threshold": 0.5} if name == "self" else {}
    said = {}
    for folder in ("a", "merged", "s"):
        made = load_checkpoint(str(tmp_path / folder))
        assert made.spec.noise == NOISES[name] == plain.spec.noise
        logits, before = (x.model(ids).logits for x in (made, plain))
        assert (logits - before).abs().max() > 1e-3
        said[folder] = logits, generate(ids, model=made.model, **call).tolist()
    (adapted, text), (merged, same) = said["a"], said["merged"]
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert text == same


@pytest.mark.parametrize(("base", "other"), [("uniform", "uniform free"), ("self", "uniform")])
def test_an_adapter_that_would_change_the_noise_is_refused(
    noisy_base, short, tmp_path, base, other
):
    asked = "train.max_steps=1", "peft.r=2", *overrides_of(NOISES[other])
    for verb, recipe in ((adapt, short(*asked, "data.text_field=prompt")), (sft, short(*asked))):
        with pytest.raises(Ar2DiffError, match="cannot change the noise of its base") as error:
            verb(str(noisy_base(base)), recipe, tmp_path / "out")
        assert "max_steps" in error.value.fix
    assert not (tmp_path / "out").exists()


# Rows that come and go, batches, streams

CALLS = [  # noise, options
    ("uniform", {"threshold": 0.2, "seed": 5}),
    ("uniform", {"threshold": 0.1, "temperature": 1.2, "seed": 5}),
    ("uniform", {"steps_per_block": 4, "remask": 0.4, "seed": 5}),
    ("uniform", {"threshold": 0.3, "edit_threshold": 0.1, "corrector_steps": 2, "seed": 5}),
    ("uniform free", {"steps_per_block": 3, "seed": 5}),
    ("uniform free", {"temperature": 1.0, "seed": 5}),
    ("mask_uniform", {"steps_per_block": 3, "temperature": 0.9, "seed": 5}),
    ("embedding", {"steps_per_block": 3, "temperature": 0.9, "seed": 5}),
    ("nearest", {"steps_per_block": 3, "temperature": 0.9, "seed": 5}),
    ("spindle", {"steps_per_block": 3, "temperature": 0.9, "seed": 5}),
    ("self", {"threshold": 0.2}),
    ("self", {"steps_per_block": 3, "order": "random", "seed": 1}),
    ("self", {"threshold": 0.1, "temperature": 1.2, "seed": 5, "edit_threshold": 0.2}),
    (
        "self",
        {"steps_per_block": 2, "temperature": 1.5, "seed": 5, "edit_threshold": 0.1,
         "corrector_steps": 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "call", "attention"),
    [(*call, ATTENTIONS[(n + k) % 3]) for n, call in enumerate(CALLS) for k in (0, 1)],
)
def test_rows_that_join_and_leave_write_what_they_write_alone(name, call, attention):
    model, spec = build_model("llama"), spec_of((NOISES | FITTED)[name], attention)
    call = {"mode": "diffusion", **call}
    one = alone(model, spec, call, (7, 12, 25))
    assert together(model, spec, call, (7, 12, 25)) == one
    assert any(row[0] for row in one)


@pytest.fixture
def saying():
    """Factory: a tiny model that says what it is in its config."""

    def make(name, attention="causal_context"):
        noise = (NOISES | FITTED)[name]
        model, spec = copy.deepcopy(build_model("llama")), spec_of(noise, attention)
        model.config.diffusion, model.config.mask_token_id = spec.to_dict(), MASK
        carry(model, spec.noise)
        return model

    return make


class Streamer:
    """Keeps what it gets."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_a_batch_is_each_row_alone_and_a_stream_is_the_text(saying, name, call):
    model, call = saying(name), {"mode": "diffusion", "max_new_tokens": 13, **call}
    call |= {"eos_token_id": [7, 12, 25], "pad_token_id": 0}
    prompts = [[1, 17, 42, 5, 9, 60, 33], [1, 8], [1, 33, 21, 4]]
    ids, mask = torch.zeros(2, len(prompts), 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 7 - len(prompt) :], mask[row, 7 - len(prompt) :] = torch.tensor(prompt), 1
    batch = generate(ids, attention_mask=mask, model=model, **call)[:, 7:].tolist()
    for prompt, new in zip(prompts, batch, strict=True):
        streamer = Streamer()
        own = generate(torch.tensor([prompt]), model=model, streamer=streamer, **call)[0].tolist()
        assert own[len(prompt) :] == new[: len(own) - len(prompt)]
        assert not any(new[len(own) - len(prompt) :]) and MASK not in own
        assert streamer.ids == own and streamer.ended


# Edits


@pytest.mark.parametrize(
    ("attention", "blocks"), [*((a, 0) for a in ATTENTIONS), ("causal_context", 1)]
)
@pytest.mark.parametrize("name", TRACKED)
def test_edits_keep_the_canvas_consistent(name, attention, blocks):
    """After every forward, against front and end that are found again from the ids alone."""
    model, spec = build_model("llama"), spec_of(NOISES[name], attention)
    prompts = [[1, *range(10, 10 + n % 6)] for n in range(12)]
    ends, seen = range(2, 10), dict.fromkeys(("began", "dropped", "earlier"), 0)
    call = {"temperature": 1.6, "threshold": 0.3, "edit_threshold": 0.15, "corrector_steps": 2}
    call |= {"seed": 3, "max_new_tokens": 17, "min_new_tokens": 2, "mode": "diffusion"}
    if blocks:
        call |= {"block_length": BLOCK // 2, "edit_blocks": blocks}
    options = resolve(spec, call)
    canvas = Canvas.of_prompts(
        prompts, MASK, max_new_tokens=17, grid=options.block_length or 1, end_ids=list(ends),
        min_new_tokens=2,
    )  # fmt: skip
    canvas.alternatives = 1
    given, corrections = canvas.ids.clone(), {}
    decoder = decoder_of(model, spec, canvas, options)
    before, over, counted = canvas.ids.clone(), [False] * len(prompts), [0] * len(prompts)
    while canvas.unfinished:
        start, length = canvas.start.tolist(), canvas.length.tolist()
        for row in range(len(prompts)):
            block = before[row, start[row] : min(start[row] + decoder.size, length[row])]
            if not over[row] and not (block == MASK).any():
                key = row, start[row]
                corrections[key] = corrections.get(key, 0) + 1
        decoder.step()
        for row, prompt in enumerate(prompts):
            old, new = before[row].tolist(), canvas.ids[row].tolist()
            changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            assert not over[row] or not changed
            assert all(i >= len(prompt) for i in changed)
            edited = [i for i in changed if old[i] != MASK]
            assert MASK not in [new[i] for i in edited]
            reached = start[row] - blocks * decoder.size
            assert all(reached <= i < start[row] + decoder.size for i in changed)
            seen["earlier"] += sum(i < start[row] for i in changed)
            for i in changed:
                assert canvas.step[row, i] == canvas.forwards[row]
            for i in edited:  # to what the model found likeliest there
                assert canvas.likeliest[row][i][0] == (
                    new[i],
                    pytest.approx(float(canvas.logprob[row, i])),
                )
                seen["began"] += new[i] in ends
                seen["dropped"] += old[i] in ends
            counted[row] += len(edited)
            front, end = 0, -1
            for i in range(int(canvas.total[row])):
                if new[i] == MASK:
                    break
                front = i + 1
                if (front > len(prompt) + 2 and new[i] in ends) or front == canvas.total[row]:
                    end = front
                    break
            assert (canvas.front[row], int(canvas.end[row])) == (front, end)
            assert canvas.over[row] == (end >= 0)
            assert not set(new[len(prompt) : len(prompt) + 2]) & set(ends)
        before, over = canvas.ids.clone(), [*canvas.over]
        assert canvas.unfinished == over.count(False)
    assert torch.equal(canvas.ids[canvas.given], given[canvas.given])
    assert canvas.edits.tolist() == counted and bool(seen["earlier"]) == bool(blocks)
    assert min(counted) < max(counted) and seen["began"] and (blocks or seen["dropped"])
    # The last block of an answer, here the only one of full attention, ends it.
    assert set(corrections.values()) == (set() if attention == "full" else {1, 2})


def test_an_edit_keeps_to_biases_and_penalties():
    """A token that is biased away is not written by an edit, and a penalty that reads the row does
    not count the token that is to be replaced."""
    model, spec = build_model("llama"), spec_of(SelfGuess())

    def written(**call):
        call = {"temperature": 1.6, "threshold": 0.3, "edit_threshold": 0.05, "seed": 3, **call}
        options = resolve(spec, {"mode": "diffusion", "max_new_tokens": 40, **call})
        canvas = Canvas.of_prompts([[1, 17, 42]], MASK, max_new_tokens=40, grid=BLOCK)
        for _ in decoder_of(model, spec, canvas, options).run():
            pass
        return canvas.new_ids(0), int(canvas.edits[0])

    ids, edits = written()
    assert edits > 5
    common = max(set(ids), key=ids.count)
    banned, edits = written(sequence_bias={(common,): -100.0})
    assert edits > 5 and common not in banned
    varied, edits = written(repetition_penalty=50.0)
    assert edits and len(set(varied)) > len(set(ids))


# Where ar2diff is not installed

ELSEWHERE = """
import json, sys
try:
    import ar2diff
except ImportError:
    from transformers import AutoModelForCausalLM
    import torch
torch.set_num_threads(1)
found = {}
for name, (folder, calls) in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[0, 0, 1, 40], [1, 50, 51, 52]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found[name] = [model.generate(ids, attention_mask=mask, **call).tolist() for call in calls]
    code = {"custom_generate": folder, "trust_remote_code": True}
    found[name + " named"] = plain.generate(ids, attention_mask=mask, **code, **calls[0]).tolist()
print(json.dumps(found))
"""


def test_a_folder_denoises_alike_where_ar2diff_is_not(noisy_base, tmp_path):
    common = {"max_new_tokens": 12, "seed": 7, "mode": "diffusion"}
    drawn = common | {"do_sample": True, "temperature": 0.8}
    calls = {
        "uniform free": [common, drawn, common | {"steps_per_block": 2}],
        "self": [common, drawn, drawn | {"edit_threshold": 0.1, "corrector_steps": 1}],
        "embedding": [common, drawn, common | {"steps_per_block": 2}],
    }
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    asked = {name: [str(noisy_base(name)), own] for name, own in calls.items()}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(asked)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ids = torch.tensor([[0, 0, 1, 40], [1, 50, 51, 52]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for name, own in calls.items():
        model = load_checkpoint(str(noisy_base(name))).model
        want = [generate(ids, attention_mask=mask, model=model, **call).tolist() for call in own]
        assert found[name] == want and found[f"{name} named"] == want[0]
        assert want[0] != want[1]


@pytest.mark.parametrize("name", ["uniform", "mask_uniform", "embedding"])
def test_greedy_tokens_are_the_same_in_every_call_though_the_noise_is_drawn(saying, name):
    model, ids = saying(name), torch.tensor([[1, 17, 42]])
    call = {"max_new_tokens": 24, "mode": "diffusion"}
    calls = [(call, call), (call, call | {"seed": 0}), (call, call | {"seed": 1})]
    calls += [(call | {"temperature": 1.0},) * 2]
    same = []
    for pair in calls:
        one, two = (generate(ids, model=model, **own).tolist() for own in pair)
        same.append(one == two)
    assert same == [True, True, False, False]
    many = generate(ids, model=model, num_return_sequences=2, **call)
    assert many[0].tolist() == generate(ids, model=model, **call)[0].tolist()
    assert not torch.equal(many[0], many[1])
