"""rl on answers about images: scores against forwards written here, rollouts, gradients, whole
runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vision import llava_folder, picture
from vision_classes import IMAGE, MASK, VisionClass, vision_class

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.config.rl import Rl
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.images import Images, Picture, codes_of, input_names
from ar2diff.core.sight import has_places, own_places
from ar2diff.core.spec import IMAGE_FORMAT, Spec
from ar2diff.data.images import Shot
from ar2diff.training import rl as rl_module
from ar2diff.training import rollouts as rollouts_module
from ar2diff.training.estimators import score, views
from ar2diff.training.grpo import DiffusionGRPOTrainer
from ar2diff.training.prompts import coded_ids, readable
from ar2diff.training.rl import RL
from ar2diff.training.rollouts import Rollout, of_canvas, sample

BLOCK = 4
CLASSES = ("llava", "qwen2_vl", "gemma3", "paligemma")  # plain; 3-D positions; other reaches
NEVER = (0, 1, 2, *range(57, 64))
SUPPRESSED = torch.isin(torch.arange(64), torch.tensor(NEVER))
ANSWER = [20, 21, 22, 23, 24, 25]
# A picture, two of other sizes, none; prompts that end within a block, and one at its end.
ROWS = [[1, ("image", 0), 9, 10], [1, 8, ("image", 1), 11, ("image", 2), 12], [1, 13, 14, 15]]


@cache
def exact_class(name: str) -> VisionClass:
    seen = vision_class(name)
    seen.model.double()
    return seen


def spec_of(seen: VisionClass, attention: str = "causal_context", prediction: str = "same") -> Spec:
    typed = getattr(seen.model.config.get_text_config(), "sliding_window", None)
    window = None if typed is None else "kept"
    return Spec(
        IMAGE_FORMAT, "mask", MASK, attention, None if attention == "full" else BLOCK, prediction,
        attention == "causal_context", window, 128, images=seen.reach,
    )  # fmt: skip


def picture_of(seen: VisionClass, number: int, key: int | None = None) -> Picture:
    names = input_names(seen.model)
    inputs = {k: x for k, x in seen.pixels([number]).items() if k in names}
    size = seen.size(number)
    return Picture(
        number if key is None else key, size, inputs, *own_places(seen.model, inputs, size)
    )


def coded(seen: VisionClass, row: list) -> list[int]:
    """The ids of a row, in which images have their codes."""
    found = []
    for part in row:
        found += codes_of(part[1], seen.size(part[1])) if isinstance(part, tuple) else [part]
    return found


def rollout_of(seen: VisionClass, row: list, seed: int = 5) -> Rollout:
    """A row with the answer, decided in three steps, and what stands behind it."""
    prompt = coded(seen, row)
    fill = -(len(prompt) + len(ANSWER)) % BLOCK
    ids = torch.tensor([*prompt, *ANSWER, *[MASK] * fill])
    step = torch.zeros_like(ids)
    step[len(prompt) : len(prompt) + len(ANSWER)] = torch.tensor([1, 2, 1, 3, 2, 3])
    return Rollout(ids, len(prompt), len(ANSWER), step, seed)


def scored(seen, rl, spec, rollouts, pictures):
    with torch.no_grad():
        return score(
            seen.model, rollouts, rl, spec, SUPPRESSED, images=Images(pictures)
        )  # fmt: skip


# The oracle: features placed among embeddings, and the text model alone under a mask written here


def positions(seen: VisionClass, row: list, length: int) -> torch.Tensor:
    """[3, length] as the class itself counts."""
    inputs = seen.inputs([[*row, *[5] * length]])
    ids = inputs["input_ids"][:, :length]
    if not has_places(seen.model):
        return torch.arange(length).expand(3, -1)
    grid = {k: x for k, x in inputs.items() if k == "image_grid_thw"}
    found, _ = seen.model.model.get_rope_index(ids, mm_token_type_ids=(ids == IMAGE).int(), **grid)
    return found[:, 0]


def reads(seen: VisionClass, rollout: Rollout) -> torch.Tensor:
    """[T, T] bool, which clean tokens read which, where the base is causal."""
    place = torch.arange(len(rollout.ids))
    found = place[None] <= place[:, None]
    if seen.reach == "prefix":
        prompt = place < rollout.prompt
        return found | (prompt[None] & prompt[:, None])
    if seen.reach == "image":
        images = (rollout.ids >= 0).cumsum(0).masked_fill(rollout.ids >= 0, -1)  # runs, numbered
        return found | ((images[None] == images[:, None]) & (images >= 0)[None])
    return found


def own_logits(
    seen: VisionClass, spec: Spec, row: list, rollout: Rollout, shown: torch.Tensor, start: int
) -> torch.Tensor:
    """[end, V] of [clean | block], by position: of the block's own copy from `start` on."""
    model, count = seen.model, len(rollout.ids)
    end = count if spec.attention == "full" else min(count, start + BLOCK)
    pos = torch.cat([torch.arange(start), torch.arange(start, end)])
    noisy = torch.arange(end) >= start
    ids = torch.where(noisy, shown[pos], rollout.ids[pos])
    if spec.attention != "full":  # an image that the block cuts through is read to its end
        ahead = torch.arange(start, max(start, rollout.prompt))
        pos, noisy = torch.cat([pos, ahead]), torch.cat([noisy, ahead < 0])
        ids = torch.cat([ids, rollout.ids[ahead]])
    clean = rollout.ids < 0
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in pixels(seen, row).items()}
    x = model.get_input_embeddings()(ids.clamp(min=0))[None]
    if inputs:
        out = model.get_image_features(**inputs, return_dict=True).pooler_output
        features = torch.cat(list(out)) if isinstance(out, list | tuple) else out.flatten(0, -2)
        number = clean.long().cumsum(0) - 1
        x[0, ids < 0] = features[number[pos[ids < 0]]]
    block = pos // BLOCK
    edges = reads(seen, rollout)[pos][:, pos]
    if spec.attention == "block_causal":
        edges = edges | (block[None] <= block[:, None])
    edges = torch.where(noisy[:, None], pos[None] < start, edges)
    edges = torch.where(noisy[None], noisy[:, None], edges)
    if spec.attention == "full":
        edges = edges | True
    mask = edges[None, None]
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    places = positions(seen, row, count)[:, pos][:, None]
    hidden = model.get_decoder()(
        inputs_embeds=x,
        attention_mask=dict.fromkeys(layers, mask) if len(layers) > 1 else mask,
        position_ids=places if has_places(model) else places[0],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)[0, :end]


def pixels(seen: VisionClass, row: list) -> dict[str, torch.Tensor]:
    found = seen.pixels([part[1] for part in row if isinstance(part, tuple)])
    return {k: x for k, x in found.items() if k in input_names(seen.model)}


def own_scores(seen, spec, row, rollout, rl) -> dict[tuple[int, int], float]:
    """{(view, position): log p} of the scored tokens."""
    masked, weight = views(rollout, rl, spec)
    back, found = int(spec.prediction == "shift"), {}
    for view, (hidden, wanted) in enumerate(zip(masked, weight > 0, strict=True)):
        shown = rollout.ids.masked_fill(hidden & (rollout.ids >= 0), MASK)
        if rl.estimator == "ar":
            start, back, shown = len(rollout.ids), 1, rollout.ids
            logits = own_logits(seen, replace(spec, block_length=BLOCK), row, rollout, shown, start)
        for i in wanted.nonzero()[:, 0].tolist():
            if rl.estimator != "ar":
                start = 0 if spec.attention == "full" else i // BLOCK * BLOCK
                logits = own_logits(seen, spec, row, rollout, shown, start)
            logp = logits[i - back].masked_fill(SUPPRESSED, -torch.inf).log_softmax(-1)
            found[view, i] = float(logp[rollout.ids[i]])
    return found


def found_in(scores, rollout, number):
    columns = (scores.row, scores.view, scores.place, scores.logp)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(view, place + rollout.prompt): logp for r, view, place, logp in rows if r == number}


CASES = [
    ("one_step", "causal_context", "same"), ("one_step", "block_causal", "shift"),
    ("elbo", "causal_context", "shift"), ("elbo", "full", "same"),
    ("trajectory", "causal_context", "same"), ("trajectory", "full", "shift"),
    ("ar", "causal_context", "same"),
]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("estimator, attention, prediction", CASES)
def test_every_view_is_a_forward_written_here(name, estimator, attention, prediction):
    seen, spec = exact_class(name), spec_of(exact_class(name), attention, prediction)
    hidden = 0.5 * (estimator == "one_step" and attention == "full")  # of the prompt's words
    rl = Rl(estimator=estimator, prompt_mask=hidden)
    rollouts = [rollout_of(seen, row, seed) for seed, row in enumerate(ROWS)]
    scores = scored(seen, rl, spec, rollouts, [picture_of(seen, n) for n in (2, 0, 1)])
    for number, (row, rollout) in enumerate(zip(ROWS, rollouts, strict=True)):
        with torch.no_grad():
            want = own_scores(seen, spec, row, rollout, rl)
        assert found_in(scores, rollout, number) == pytest.approx(want, rel=0, abs=1e-9)


class Words:
    """As much of a tokenizer as rollouts need."""

    sep_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(64) if token not in NEVER}

    def __len__(self) -> int:
        return 64


class AlbumOf:
    def __init__(self, pictures):
        self.pictures = pictures

    def images_in(self, ids: torch.Tensor) -> Images:
        return Images(self.pictures)


def written(seen: VisionClass, spec: Spec, rows, pictures, seeds=None, **settings):
    """The rollouts of rows."""
    checkpoint = Checkpoint(Path("tiny"), seen.model, Words(), spec, {})
    seen.model.generation_config.eos_token_id = None
    settings = {"temperature": 1.0, "max_new_tokens": 7, "threshold": 0.1, **settings}
    prompts = [coded(seen, row) for row in rows]
    return sample(checkpoint, prompts, seeds or range(len(rows)), settings, 8, AlbumOf(pictures))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("attention, prediction", [
    ("causal_context", "same"), ("block_causal", "shift"), ("full", "same"),
])  # fmt: skip
def test_a_trajectory_is_scored_as_it_was_written(name, attention, prediction, monkeypatch):
    """Beside rows with other pictures and with none, and alone."""
    seen, rl, plain, recorded = exact_class(name), Rl(estimator="trajectory"), of_canvas, {}

    def noted(canvas, row, spec, seed):
        recorded[seed] = canvas.logprob[row]
        return plain(canvas, row, spec, seed)

    monkeypatch.setattr(rollouts_module, "of_canvas", noted)
    spec = spec_of(seen, attention, prediction)
    pictures = [picture_of(seen, n) for n in range(3)]
    rollouts = written(seen, spec, ROWS, pictures, mode="diffusion")
    got = scored(seen, rl, spec, rollouts, pictures).per_token()
    for number, (rollout, row) in enumerate(zip(rollouts, ROWS, strict=True)):
        assert rollout.ids[: rollout.prompt].tolist() == coded(seen, row)
        assert (rollout.ids[rollout.prompt :] >= 0).all() and rollout.answer == 7
        want = recorded[number][rollout.prompt :][:7].double()
        torch.testing.assert_close(got[number], want, rtol=0, atol=1e-5)
    for number in (1, 2):
        row = ROWS[number : number + 1]
        (alone,) = written(seen, spec, row, pictures[1:], seeds=[number], mode="diffusion")
        assert torch.equal(alone.ids, rollouts[number].ids)
        assert torch.equal(alone.step, rollouts[number].step)


@pytest.mark.parametrize("name", CLASSES)
def test_only_what_reads_a_picture_or_a_token_moves_with_it(name):
    seen, spec = exact_class(name), spec_of(exact_class(name))
    rollouts = [rollout_of(seen, row, seed) for seed, row in enumerate(ROWS)]
    pictures = [picture_of(seen, n) for n in range(3)]
    # Of the same size, under the same key: other pixels.
    swapped = [*pictures[:1], picture_of(seen, 4, key=1), pictures[2]]
    assert swapped[1].size == pictures[1].size
    for estimator in ("one_step", "elbo", "trajectory", "ar"):
        rl = Rl(estimator=estimator)

        def moved(others=pictures, change=None, rl=rl):
            rows = [r if change is None else changed(r, *change) for r in rollouts]
            one, two = (
                scored(seen, rl, spec, *of) for of in ((rollouts, pictures), (rows, others))
            )
            return ((one.per_token() - two.per_token()).abs() > 1e-9).tolist()

        assert moved() == [[False] * 6] * 3
        assert moved(swapped) == [[False] * 6, [True] * 6, [False] * 6]
        assert moved(change=(2, 50)) == [[False] * 6, [False] * 6, [True] * 6]
        last = moved(
            change=(rollouts[0].prompt + 5, 50)
        )  # of its row: itself, and at most its block
        assert last[0][5] and not any(last[0][:2])


def changed(rollout: Rollout, place: int, token: int) -> Rollout:
    """The rollout with another token, unless an image is there."""
    ids = rollout.ids.clone()
    if len(ids) > place and ids[place] >= 0:
        ids[place] = token
    return replace(rollout, ids=ids)


# Runs of a tiny Llava


def said(*parts) -> list[dict]:
    """A prompt of one message: a text is itself, None an image of a column, a number a file."""
    shown = [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image"} if part is None else {"type": "image", "path": f"{part}.png"}
        for part in parts
    ]  # fmt: skip
    return [{"role": "user", "content": shown}]


PROMPTS = [
    {"prompt": said("what is", None, "?"), "image": "0.png", "answer": "a"},
    {"prompt": [{"role": "user", "content": "how many ?"}], "images": ["1.png", "0.png"],
     "answer": "two"},
    {"prompt": said("what is in", 2), "answer": "c"},
    {"prompt": [{"role": "user", "content": "a b c"}], "answer": "d"},
]  # fmt: skip
RUN = {
    "rl.num_generations": 4, "rl.max_completion_length": 6, "train.max_steps": 4,
    "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2,
    "train.learning_rate": 0.01, "train.logging_steps": 1, "train.precision": "fp32",
    "rl.rewards": "[{name: length, args: {target: 3}}]",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A converted model, a file of prompts, and the pictures in them. Never write to it."""
    folder = tmp_path_factory.mktemp("llava")
    base = llava_folder(folder / "base")
    given = ["convert.block_length=4", "convert.mask_token=<|reserved_0|>", "train.max_steps=0"]
    ar2diff.adapt(base, load_recipe(None, given), folder / "model")
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return folder


def settings(folder: Path, **changed) -> list[str]:
    tree = RUN | {"data.sources": f"[{{path: {folder / 'rows.jsonl'}}}]"}
    tree |= {name.replace("__", "."): value for name, value in changed.items()}
    return [f"{name}={value}" for name, value in tree.items()]


def planned(folder: Path, **changed):
    """The plan of a run."""
    recipe = load_recipe(None, ["rl.estimator=trajectory", *settings(folder, **changed)])
    return RL.prepare(folder / "model", recipe)


def trainer_of(folder: Path, run: Path, **changed):
    plan = planned(folder, **changed)
    return plan.make_trainer(plan, run, [])


def watched(monkeypatch, trainer):
    """What each micro-step scores: old and new, and whether a row has an advantage."""
    seen, plain = [], trainer._compute_loss

    def noted(model, inputs):
        loss = plain(model, inputs)
        old, new = inputs["old_per_token_logps"], trainer._logps.detach()
        mask = inputs["completion_mask"].bool()
        seen.append(((new - old) * mask).abs().max().item())
        return loss

    monkeypatch.setattr(trainer, "_compute_loss", noted)
    return seen


def runs_of_tower(monkeypatch, model):
    """How many pictures each call of the tower saw."""
    seen, plain = [], model.get_image_features

    def noted(**given):
        seen.append(len(given["pixel_values"]))
        return plain(**given)

    monkeypatch.setattr(model, "get_image_features", noted)
    return seen


def test_features_are_computed_once_for_rollouts_scores_and_all_updates(
    folder, tmp_path, monkeypatch
):
    trainer = trainer_of(
        folder, tmp_path / "run", rl__num_iterations=3, train__max_steps=6, rl__beta=0.1,
    )  # fmt: skip
    trainer.args.learning_rate = 0.0
    tower, ratios = (f(monkeypatch, x) for f, x in (
        (runs_of_tower, trainer.checkpoint.model), (watched, trainer),
    ))  # fmt: skip
    of_reference = runs_of_tower(monkeypatch, trainer.ref_model)
    trainer.train()
    # Two generations of two prompts each, for three updates of two micro-batches.
    assert len(tower) == 2 and len(of_reference) == 2 and max(tower) <= 3
    assert len(ratios) == 12 and max(ratios) < 1e-5  # of other widths: other roundings


def test_a_trained_tower_is_read_anew_for_each_update(folder, tmp_path, monkeypatch):
    trainer = trainer_of(
        folder, tmp_path / "run", train__frozen="[]", rl__num_iterations=2, rl__beta=0.01
    )
    tower = runs_of_tower(monkeypatch, trainer.checkpoint.model)
    ratios = watched(monkeypatch, trainer)
    model = trainer.checkpoint.model
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer.train()
    assert len(tower) > len(ratios) == 8
    assert max(ratios[:2]) < 1e-5 and min(ratios[2:4]) > 1e-4
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in moved)


def test_a_run_that_is_killed_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch, capsys):
    """It is killed between the updates on one set of completions."""
    given = settings(
        folder, rl__num_iterations=2, train__save_steps=1, rl__show_steps=1, rl__estimator="unigrpo"
    )
    once = ar2diff.rl(folder / "model", load_recipe(None, given), tmp_path / "once")
    table = capsys.readouterr().err
    assert "what is<image>?" in table and "<image><image>how many ?" in table
    again, kept = tmp_path / "again", []

    def stop(trainer, folder):
        DiffusionGRPOTrainer.save_rank(trainer, folder)
        kept.append(folder)
        if len(kept) == 2:
            raise KeyboardInterrupt

    class Killed(DiffusionGRPOTrainer):
        save_rank = stop

    monkeypatch.setattr(rl_module, "DiffusionGRPOTrainer", Killed)
    with pytest.raises(KeyboardInterrupt):
        ar2diff.rl(folder / "model", load_recipe(None, given), again)
    assert [p.name for p in (again / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(rl_module, "DiffusionGRPOTrainer", DiffusionGRPOTrainer)
    ar2diff.rl(folder / "model", load_recipe(None, given), again, resume=True)
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "once", again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first = load_file(folder / "model" / "model.safetensors")
    moved = {name for name in first if not torch.equal(first[name], ours[name])}
    assert moved and all("language_model" in n or "lm_head" in n for n in moved)
    assert once.trainable_parameters < once.parameters


REWARD = """
def sees(completions, images, answer, prompts, **columns):
    assert set(columns) == {"completion_ids", "trainer_state", "log_extra", "log_metric"}
    sizes = {"a": [24], "two": [25, 24], "c": [26], "d": []}
    assert [[i.width for i in own] for own in images] == [sizes[a] for a in answer]
    assert all(i.mode == "RGB" for own in images for i in own)
    return [float(len(c[0]["content"]) % 5) for c in completions]

def plain(completions, **columns):
    assert "images" not in columns
    return [0.0] * len(completions)
"""


def test_rewards_get_the_images_and_evaluation_reads_them(folder, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(REWARD)
    names = ", ".join(f"{{name: '{tmp_path / 'judge.py'}:{f}'}}" for f in ("sees", "plain"))
    trainer = trainer_of(
        folder, tmp_path / "run", train__max_steps=1,
        rl__rewards=f"[{names}, {{name: exact}}]", peft__r=4, rl__beta=0.1,
    )  # fmt: skip
    trainer.train()
    rows = planned(folder).rows
    found = trainer.predict(rows[:3])
    assert len(found.predictions) == 12 and "test_rewards/exact/mean" in found.metrics
    tower = runs_of_tower(monkeypatch, trainer.checkpoint.model.get_base_model())
    logs = trainer.evaluate(rows[:2])
    assert logs["eval_reward"] >= 0 and sum(tower) > 0


@pytest.mark.parametrize("rows, message", [
    ([{"prompt": said("what"), "images": ["9.png"]}], "9.png does not exist"),
    ([{"prompt": said("what", None, None), "image": "0.png"}], "1 images in its columns, but 2"),
    ([{"prompt": said("what", None)}], "0 images in its columns, but 1"),
    ([{"prompt": "<image> what"}], "the text has 1 placeholder tokens"),
])  # fmt: skip
def test_prompts_that_cannot_be_read_are_refused(folder, tmp_path, rows, message):
    for number in range(3):
        shutil.copyfile(folder / f"{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]"
    with pytest.raises(Ar2DiffError, match=message):
        RL.prepare(folder / "model", load_recipe(None, [*settings(folder), source]))


def test_a_control_that_would_read_images_in_another_way_is_refused(folder, monkeypatch):
    recipe = load_recipe(None, [*settings(folder), "objective.kind=ar", "rl.estimator=ar"])
    assert RL.prepare(folder / "base", recipe).data.tokens > 60
    monkeypatch.setattr(rl_module, "reach_in", lambda _: "image")
    with pytest.raises(Ar2DiffError, match="reads images or prompts in both directions"):
        RL.prepare(folder / "base", recipe)


def test_a_model_of_text_refuses_images_and_a_text_prompt_may_have_them(folder, convert_tiny):
    with pytest.raises(Ar2DiffError, match="prompt 1 has an image, but model"):
        recipe = load_recipe(None, settings(folder))
        RL.prepare(convert_tiny("convert.block_length=4"), recipe)
    checkpoint = load_checkpoint(str(folder / "model"))
    key = checkpoint.album.shots.add(Shot(folder / "0.png"), "here")
    ids = coded_ids(checkpoint, "what <image> is", [key])
    what, is_ = (checkpoint.tokenizer.convert_tokens_to_ids(w) for w in ("what", "is"))
    assert [one for one in ids if one >= 0][-2:] == [what, is_]
    assert ids[-17:-1] == codes_of(key, 16)
    assert readable(checkpoint, ids).endswith("what <image> is")
