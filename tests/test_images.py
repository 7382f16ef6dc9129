"""Every vision-language class: its forward, our masks, positions and caches, and what it decodes,
against the stock class."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from vision_classes import CONFIGS, IMAGE, MASK, VisionClass, vision_class

from ar2diff.checkpoint.layers import named_layers
from ar2diff.checkpoint.model import causal_spec
from ar2diff.checkpoint.towers import PARTS, freeze, part_of
from ar2diff.conversion.image_probe import probe_images, reach_of
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import generate
from ar2diff.core.images import Images, Picture, codes_of, input_names, keys_in, marks_of
from ar2diff.core.probe import probe
from ar2diff.core.sight import has_places, own_places, places_of, until_of
from ar2diff.core.spec import IMAGE_FORMAT, Spec

NEW = 10
WORDS = [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]


@pytest.fixture(scope="module", params=list(CONFIGS))
def seen(request) -> VisionClass:
    return vision_class(request.param)


def spec_of(seen: VisionClass, attention: str, prediction: str = "same") -> Spec:
    typed = getattr(seen.model.config.get_text_config(), "sliding_window", None)
    window = None if typed is None else "dropped" if seen.reach == "prefix" else "kept"
    return Spec(
        IMAGE_FORMAT, "mask", MASK, attention, None if attention == "full" else 4, prediction,
        attention == "causal_context", window, 128, images=seen.reach,
    )  # fmt: skip


def converted(seen: VisionClass, attention: str, prediction: str = "same"):
    model, spec = copy.deepcopy(seen.model), spec_of(seen, attention, prediction)
    model.config.diffusion, model.config.mask_token_id = spec.to_dict(), MASK
    if attention != "causal_context":
        model.config.get_text_config().is_causal = False
    generation = model.generation_config
    generation.suppress_tokens, generation.eos_token_id = [0, 1, 2, *range(57, 64)], None
    return model, spec


def prompts(seen: VisionClass) -> dict[str, torch.Tensor]:
    """Rows with one image, with two of other sizes, and with none."""
    rows = [
        [1, ("image", 0), *WORDS[:3]],
        [1, 8, ("image", 1), 21, ("image", 2), *WORDS[:2]],
        [1, *WORDS[:5]],
    ]
    return seen.inputs(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_mode_is_exact_with_images(name, attention):
    seen = vision_class(name, attention)
    inputs = seen.inputs([[1, ("image", 0), *WORDS]])
    reach, error = reach_of(seen.model, causal_spec(seen.model), inputs)
    assert (reach, error < 1e-5) == (seen.reach, True)
    for kind, prediction in (
        ("causal_context", "same"), ("causal_context", "shift"), ("block_causal", "same"),
        ("full", "same"),
    ):  # fmt: skip
        model, spec = converted(seen, kind, prediction)
        assert Spec.from_config(model.config.to_dict()) == spec
        assert [*probe(model, spec), *probe_images(model, spec, inputs)] == []


def test_a_wrong_reach_or_position_is_found():
    seen = vision_class("gemma3")
    inputs = seen.inputs([[1, ("image", 0), *WORDS]])
    model, spec = converted(seen, "causal_context")
    (problem,) = probe_images(model, replace(spec, images="causal"), inputs)
    assert "the clean half differs from the base" in problem
    flat = vision_class("qwen2_vl")
    model, spec = converted(flat, "causal_context")
    inputs = flat.inputs([[1, ("image", 0), *WORDS]])
    inputs["image_grid_thw"] = torch.tensor([[1, 8, 4]])  # as many patches, another grid
    stock = model(**inputs, use_cache=False).logits
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 8]])
    assert not torch.allclose(stock, model(**inputs, use_cache=False).logits, atol=1e-3)
    assert probe_images(model, spec, inputs) == []


def test_decoding_is_the_stock_ar_text_and_the_same_in_every_batch_and_cache(seen):
    model, _ = converted(seen, "causal_context", "shift")
    inputs = prompts(seen)
    if seen.reach == "prefix":  # stock PaliGemma forgets the types of padded rows in a batch
        inputs = seen.inputs([[1, ("image", 0), *WORDS[:3]]])
    size = inputs["input_ids"].shape[1]
    stock = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, size:]

    def ours(given=inputs, **options):
        given = {name: x.clone() for name, x in given.items()}
        found = generate(model=model, **given, max_new_tokens=NEW, **options)
        return found[:, given["input_ids"].shape[1] :]

    assert torch.equal(ours(mode="ar"), stock)
    assert torch.equal(ours(mode="speculative"), stock)
    assert torch.equal(ours(mode="speculative", use_cache=False), stock)
    denoised = ours(mode="diffusion", threshold=0.2)
    assert torch.equal(ours(mode="diffusion", threshold=0.2, use_cache=False), denoised)
    assert torch.equal(
        ours(mode="diffusion", threshold=0.2, cache_implementation="static"), denoised
    )
    several = ours(mode="diffusion", threshold=0.2, num_return_sequences=2)
    assert torch.equal(several[::2], denoised)
    (alone,) = ours(seen.inputs([[1, ("image", 0), *WORDS[:3]]]), mode="diffusion", threshold=0.2)
    assert torch.equal(alone, denoised[0])
    other = ours(seen.inputs([[1, ("image", 3), *WORDS[:3]]]), mode="ar")
    assert not torch.equal(other[0], stock[0])


def test_blocks_that_cut_through_an_image_read_all_of_it(seen):
    """The grid of blocks does not know where an image ends: with 4 tokens a block, `BOS image a`
    has its last image tokens in the block that is denoised."""
    model, spec = converted(seen, "block_causal")
    rows = [[1, ("image", 0), 9], [1, 5, ("image", 1), 9]]
    inputs = seen.inputs(rows)
    if spec.images == "prefix":
        inputs = seen.inputs(rows[:1])
    found = [
        generate(
            model=model, **{name: x.clone() for name, x in inputs.items()}, max_new_tokens=NEW,
            threshold=0.2, **options,
        )
        for options in ({}, {"use_cache": False})
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_the_class(name):
    seen = vision_class(name)
    assert has_places(seen.model) and not has_places(vision_class("llava").model)
    inputs = seen.inputs([[1, 8, ("image", 1), 21, ("image", 2), *WORDS[:2]]])
    names = input_names(seen.model)
    pictures = []
    for number in (1, 2):
        own = {k: x for k, x in seen.pixels([number]).items() if k in names}
        size = seen.size(number)
        pictures.append(Picture(number, size, own, *own_places(seen.model, own, size)))
    images = Images(pictures)
    codes = [code for picture in pictures for code in codes_of(picture.key, picture.size)]
    ids = inputs["input_ids"][0]
    coded = ids.masked_scatter(ids == IMAGE, torch.tensor(codes))
    assert keys_in(coded) == [1, 2]
    stock, _ = seen.model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
    )  # fmt: skip
    assert torch.equal(places_of(images.numbered(coded), images), stock[:, 0].T)


def test_how_far_tokens_read():
    ids = torch.tensor([1, -1, -2, 5, -3, -4, -5, 6])
    assert until_of(ids, "causal").tolist() == [*range(8)]
    assert until_of(ids, "image").tolist() == [0, 2, 2, 3, 6, 6, 6, 7]
    assert until_of(ids, "prefix", 6).tolist() == [5] * 6 + [6, 7]


def test_the_tower_runs_once_for_a_batch_and_again_with_gradients(monkeypatch):
    seen = vision_class("llava")
    picture = Picture(3, 16, seen.pixels([0]))
    images, calls = Images([picture]), []
    stock = seen.model.get_image_features
    monkeypatch.setattr(
        seen.model, "get_image_features", lambda **kw: calls.append(1) or stock(**kw)
    )
    with torch.no_grad():
        first, again = images.features(seen.model), images.features(seen.model)
    assert first is again and len(calls) == 1
    assert images.features(seen.model).levels[0].requires_grad and len(calls) == 2


def test_calls_that_cannot_be_honoured_are_refused():
    seen = vision_class("llava")
    model, _ = converted(seen, "causal_context")
    inputs = seen.inputs([[1, ("image", 0), 5, 6]])
    text, pixels = {"input_ids": torch.tensor([[1, 5, 6]])}, {"pixel_values"}
    for given, said in (
        ({k: v for k, v in inputs.items() if k not in pixels}, "placeholders in --input-ids"),
        (text | seen.pixels([0]), "images in --pixel-values, but no placeholder"),
        (inputs | {"input_ids": inputs["input_ids"][:, 4:], "attention_mask": None}, "16 features"),
    ):
        with pytest.raises(Ar2DiffError, match=said.replace("--", "").split(" in ")[0]):
            generate(model=model, **given, max_new_tokens=4)


PROJECTORS = {
    "qwen2_vl": {"visual.merger"}, "qwen2_5_vl": {"visual.merger"},
    "qwen3_vl": {"visual.merger", "visual.deepstack_merger_list"},
    "idefics3": {"connector"}, "smolvlm": {"connector"},
    "llava_next": {"multi_modal_projector", "image_newline"},
    "llava_onevision": {"multi_modal_projector", "image_newline"},
}  # fmt: skip


def test_the_parts_of_a_model_are_found(seen):
    parts = part_of(seen.model)
    wanted = PROJECTORS.get(seen.name, {"multi_modal_projector"})
    for name, part in parts.items():
        inner = name.removeprefix("model.")
        if inner.startswith(("language_model.", "text_model.", "lm_head.")):
            assert part == "language_model"
        else:
            projects = any(f"{inner}.".startswith(f"{one}.") for one in wanted)
            assert part == ("projector" if projects else "tower"), name
    assert {*parts.values()} == {*PARTS}
    adapted = named_layers(seen.model, "all-linear", "peft.targets")
    assert adapted and all(parts[f"{name}.weight"] == "language_model" for name in adapted)
    frozen = copy.deepcopy(seen.model)
    freeze(frozen, ("tower",))
    kept = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert kept == {name for name, part in parts.items() if part == "tower"}
    marks = {60, 57, 58, 59} if seen.is_qwen else {60, 57, 58} if seen.name == "gemma3" else {60}
    assert marks_of(seen.model.config) - {59} == marks - {59}
