"""The noises in what comes after a conversion: what a conversation shows, what rl scores, adapters,
kills, rows that come and go, folders without ar2diff, and edits of decided tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MASK, tiny_spec
from safetensors.torch import load_file
from test_turns import END, ENDS, IDS, LABELS

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.noise import MaskUniform, Noise, SelfGuess, Uniform
from ar2diff.core.spec import NOISE_FORMAT
from ar2diff.data.conversations import TokenRows
from ar2diff.data.turns import IGNORED, TurnCollator, conversation_parts
from ar2diff.training.journal import read_metrics
from ar2diff.training.loss import divisors_of, totals_of
from ar2diff.training.plan import Plan
from ar2diff.training.sft import DiffusionSFTTrainer, make_trainer, sft

NOISES = {
    "uniform": Uniform(),
    "uniform free": Uniform("free"),
    "mask_uniform": MaskUniform(),
    "self": SelfGuess(),
}
FREE = [name for name, noise in NOISES.items() if noise.free]
TRACKED = [name for name in NOISES if name not in FREE]
ATTENTIONS = ("causal_context", "block_causal", "full")
SUPPRESSED = torch.arange(64) == MASK
BLOCK = 4


def on(noise: Noise) -> Noise:
    """The noise over the vocabulary of the tiny models."""
    return noise.on(MASK, SUPPRESSED)


def spec_of(noise, attention="causal_context", prediction="shift"):
    return replace(tiny_spec(attention, BLOCK, prediction), noise=noise, format=NOISE_FORMAT)


def overrides_of(noise: Noise) -> list[str]:
    """How a recipe names a noise."""
    return [f"noise.kind={noise.kind}", f"noise.form={noise.form}"]


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
            gain = noise.evidence(batch["shown"], batch["t"][scored])
            assert torch.equal(batch["evidence"], gain.float())
            assert not gain[batch["shown"] == MASK].any() and (gain >= 0).all()
        else:
            assert "shown" not in batch and "evidence" not in batch
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
        if "evidence" in batch:
            place = batch["scored"].flatten().cumsum(0).view_as(batch["scored"]) - 1
            values.append(batch["evidence"][place[row, here & batch["scored"][row]]].tolist())
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
def noisy_base(convert_tiny):
    """Factory: the tiny checkpoint converted with a noise. Never write to it."""
    return lambda name: convert_tiny("convert.block_length=4", *overrides_of(NOISES[name]))


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
                assert not (after[places] == checkpoint.spec.mask_token_id).any()
                guessed += after[batch["scored"]].tolist()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        found.append((loss, gradient))
        shows.append(guessed)
    (one, grad), (two, other) = found
    assert one == pytest.approx(two, rel=1e-5) and one > 1
    assert (grad - other).norm() < 1e-4 * grad.norm()
    assert shows[0] == shows[1] and bool(shows[0]) == (name == "self")


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
    tuned = load_checkpoint(str(tmp_path / "whole"))
    assert tuned.spec == load_checkpoint(base).spec and tuned.spec.noise == NOISES[name]
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
