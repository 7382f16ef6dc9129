"""rl on answers about images: scores against forwards written here, rollouts, gradients, whole
runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from vision_classes import IMAGE, MASK, VisionClass, vision_class

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.rl import Rl
from ar2diff.core.images import Images, Picture, codes_of, input_names
from ar2diff.core.sight import has_places, own_places
from ar2diff.core.spec import IMAGE_FORMAT, Spec
from ar2diff.training import rollouts as rollouts_module
from ar2diff.training.estimators import score, views
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
    seen, rl = exact_class(name), Rl(estimator=estimator)
    spec = spec_of(seen, attention, prediction)
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


def written(seen: VisionClass, spec: Spec, rows, pictures, seeds=None, **settings):
    """The rollouts of rows."""
    checkpoint = Checkpoint(Path("tiny"), seen.model, Words(), spec, {})
    seen.model.generation_config.eos_token_id = None
    settings = {"temperature": 1.0, "max_new_tokens": 7, "threshold": 0.1, **settings}
    prompts = [coded(seen, row) for row in rows]
    return sample(checkpoint, prompts, seeds or range(len(rows)), settings, 8, Images(pictures))


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
    (alone,) = written(seen, spec, ROWS[1:2], pictures[1:], seeds=[1], mode="diffusion")
    assert torch.equal(alone.ids, rollouts[1].ids) and torch.equal(alone.step, rollouts[1].step)


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
