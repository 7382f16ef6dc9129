"""Images in the rows of a vision-language model: which feature stands behind which placeholder.

An image stands in a text as a run of placeholder tokens, one for each of its features. Ids say
which: below 0, -1 is the first feature of a batch's images, -2 the second. So features go with
their tokens into any copy of a text, in any order; the tower runs once for a batch, and each
forward picks the rows that it needs.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError

PLACE_BITS = 20  # of a code: the number of the feature in its image; the others are the image's key
SEEN = "_ar2diff_sees_images"  # attribute of a model whose forwards take such ids
OF_TEXT = ("bos_", "eos_", "pad_", "mask_", "sep_", "unk_", "decoder_start_")
_LOCAL = threading.local()  # what the forwards of a thread see


def image_token_of(config: Any) -> int | None:
    """The id of the placeholders of images; None for a model of text alone."""
    found = getattr(config, "image_token_id", None)
    return found if type(found) is int and hasattr(config, "vision_config") else None


def marks_of(config: Any) -> set[int]:
    """The ids that a vision-language model's texts mark images and videos with: placeholders, and
    what stands around them. No text means them."""
    if image_token_of(config) is None:
        return set()
    found = {
        value
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and not name.startswith(("_", *OF_TEXT))
    }
    return {image_token_of(config), *(value for value in found if type(value) is int)}


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as its processor prepared it.

    Attributes:
        key: of its content, an integer below 2 ** 42.
        size: the number of its features, and of its placeholders.
        inputs: arguments of the model's `get_image_features`, of this image alone.
        places: [size, 3] positions of the placeholders, less that of the first; None: each is one
            more than the one before it, as in a text.
        advance: by how much the position of the token after it exceeds that of the first; 0: by its
            size.
    """

    key: int
    size: int
    inputs: dict[str, Tensor]
    places: Tensor | None = None
    advance: int = 0


def codes_of(key: int, size: int) -> list[int]:
    """The ids of an image's placeholders in data, before images are numbered in their batch."""
    return [-1 - (key << PLACE_BITS | place) for place in range(size)]


def keys_in(ids: Tensor) -> list[int]:
    """The keys of the images whose codes are among ids of any shape, in order of appearance."""
    codes = -1 - ids[ids < 0]
    return list(dict.fromkeys((codes >> PLACE_BITS).tolist()))


class Images:
    """The images of a batch. Their features are computed once, by the first forward that needs
    them, and serve all forwards of the batch."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = tuple(pictures)
        self.first, count = {}, 0
        for picture in self.pictures:
            self.first[picture.key] = count
            count += picture.size
        self.count = count
        self._features: dict[Any, Features] = {}

    def numbered(self, ids: Tensor) -> Tensor:
        """Ids on the host whose codes are replaced by the numbers of the features, -1 - m."""
        at = ids < 0
        if not at.any():
            return ids
        codes = -1 - ids[at]
        first = [self.first[key] for key in (codes >> PLACE_BITS).tolist()]
        numbers = torch.tensor(first) + (codes & (1 << PLACE_BITS) - 1)
        return ids.masked_scatter(at, -1 - numbers)

    def features(self, model: Any) -> Features:
        """The features, computed unless the model has done it with the same gradients."""
        kind = id(model), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if kind not in self._features:
            self._features[kind] = features_of(model, self.pictures)
        return self._features[kind]

    def compute(self, model: Any) -> None:
        """Compute the features for all forwards of a model that does not train what makes them,
        with gradients and without."""
        if not self.pictures:
            return
        with torch.inference_mode(False), torch.no_grad():
            found = features_of(model, self.pictures)
        for gradients in (True, False):
            for inference in (True, False):
                self._features[id(model), gradients, inference] = found

    def joined(self, other: Images) -> Images:
        """The images of both, those last that only the other has."""
        new = [p for p in other.pictures if not any(p is own for own in self.pictures)]
        more, both = other.kept(new), Images([*self.pictures, *new])
        for kind in self._features.keys() | more._features.keys():
            parts = [own._features.get(kind) for own in (self, more) if own.pictures]
            if None not in parts:  # else they are computed anew
                both._features[kind] = reduce(Features.joined, parts)
        return both

    def kept(self, pictures: Sequence[Picture]) -> Images:
        """Some of the images, with what was computed of them."""
        some = Images(pictures)
        at = self._numbers(some.pictures)
        some._features = {kind: found.picked(at) for kind, found in self._features.items()}
        return some if len(some.pictures) < len(self.pictures) else self

    def seen(self, ids: Tensor) -> list[Picture]:
        """Those whose numbers are among ids of any shape."""
        there = set((-1 - ids[ids < 0]).tolist())
        starts = accumulate([0, *(picture.size for picture in self.pictures)])
        return [
            picture
            for picture, start in zip(self.pictures, starts, strict=False)
            if not there.isdisjoint(range(start, start + picture.size))
        ]

    def moved(self, ids: Tensor, to: Images) -> Tensor:
        """Ids of any shape with numbers of these images, with those that others have for them."""
        at = ids < 0
        numbers = torch.full((self.count,), -1)
        some = [p for p in self.pictures if any(p is other for other in to.pictures)]
        numbers[self._numbers(some)] = to._numbers(some)
        return ids.masked_scatter(at, -1 - numbers[-1 - ids[at]])

    def _numbers(self, pictures: Sequence[Picture]) -> Tensor:
        """The numbers of the features of some images, in their order."""
        starts = accumulate([0, *(picture.size for picture in self.pictures)])
        first = {id(p): start for p, start in zip(self.pictures, starts, strict=False)}
        own = [torch.arange(p.size) + first[id(p)] for p in pictures]
        return torch.cat(own) if own else torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Features:
    """Features of images.

    Attributes:
        levels: tensors [M, H]: what replaces the placeholders' embeddings, then what is added to
            the states of the first layers (DeepStack, in Qwen3-VL).
        name: of the first in the output of `get_image_features`.
        listed: whether each level is a list there, with a tensor for each image.
        dims: the dimensions of the first if it is not.
        kind: the class of that output.
    """

    levels: tuple[Tensor, ...]
    name: str
    listed: tuple[bool, ...]
    dims: int
    kind: type

    def at(self, index: Tensor) -> Any:
        """The output of `get_image_features` for the features of placeholders [K], in order."""
        first, *deeper = (
            (level[index],) if listed else level[index]
            for level, listed in zip(self.levels, self.listed, strict=True)
        )
        if not self.listed[0]:
            first = first.view(*[1] * (self.dims - 2), *first.shape)
        more = {"deepstack_features": deeper} if deeper else {}
        return self.kind(**{self.name: first}, **more)

    def picked(self, index: Tensor) -> Features:
        """Some of them."""
        index = index.to(self.levels[0].device)
        return replace(self, levels=tuple(level[index] for level in self.levels))

    def joined(self, other: Features) -> Features:
        """Those of both."""
        pairs = zip(self.levels, other.levels, strict=True)
        return replace(self, levels=tuple(torch.cat(pair) for pair in pairs))


def input_names(model: Any) -> set[str]:
    """What a class needs of a processor's output to see an image."""
    return {*inspect.signature(model.get_image_features).parameters}


def features_of(model: Any, pictures: Sequence[Picture]) -> Features:
    """The features of images in their order. Those whose inputs have the same shapes go through the
    tower together.

    Raises:
        Ar2DiffError: an image has another number of features than of placeholders.
    """
    groups: dict[Any, list[int]] = {}
    for number, picture in enumerate(pictures):
        shapes = tuple((name, tuple(x.shape[1:])) for name, x in sorted(picture.inputs.items()))
        groups.setdefault(shapes, []).append(number)
    parts: dict[int, list[Tensor]] = {}
    for numbers in groups.values():
        some = [pictures[number] for number in numbers]
        inputs = {name: torch.cat([p.inputs[name] for p in some]) for name in some[0].inputs}
        out = model.get_image_features(**placed(inputs, model), return_dict=True)
        name = "pooler_output" if out.pooler_output is not None else "last_hidden_state"
        given = [getattr(out, name), *(getattr(out, "deepstack_features", None) or ())]
        listed = tuple(isinstance(level, list | tuple) for level in given)
        levels = [
            torch.cat([_rows(x) for x in level]) if several else _rows(level)
            for level, several in zip(given, listed, strict=True)
        ]
        sizes = [picture.size for picture in some]
        if len(levels[0]) != sum(sizes):
            raise Ar2DiffError(
                f"the model makes {len(levels[0])} features of images that have {sum(sizes)} "
                "placeholders in the text",
                "prepare texts and images together, with the model's own processor",
            )
        for number, *own in zip(numbers, *(level.split(sizes) for level in levels), strict=True):
            parts[number] = own
    ordered = [parts[number] for number in range(len(pictures))]
    return Features(
        levels=tuple(torch.cat(level) for level in zip(*ordered, strict=True)),
        name=name,
        listed=listed,
        dims=2 if listed[0] else given[0].dim(),
        kind=type(out),
    )


def _rows(features: Tensor) -> Tensor:
    return features.reshape(-1, features.shape[-1])


def placed(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What a processor made of images, where a model is and in its number type."""
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        name: x.to(model.device, kind) if x.is_floating_point() else x.to(model.device)
        for name, x in inputs.items()
    }


@dataclass
class _Seen:
    """What the forwards of a thread see now; `rows` are those of the sight in their batch."""

    images: Images
    places: Tensor | None = None
    mask: Any = field(default=None)


@contextmanager
def seeing(images: Images | None, places: Tensor | None = None) -> Iterator[None]:
    """Have the forwards of this thread see images: ids below 0 are their features.

    Args:
        places: [B, P, 3] the model's positions of the rows in the forwards, by logical position.
    """
    if images is None:
        yield
        return
    before, _LOCAL.seen = getattr(_LOCAL, "seen", None), _Seen(images, places)
    try:
        yield
    finally:
        _LOCAL.seen = before


def prepare(model: Any) -> None:
    """Have the forwards of a vision-language model take ids below 0, and masks by layer type, which
    some classes refuse. Nothing changes for other calls; models of text stay as they are."""
    if image_token_of(model.config) is None or getattr(model, SEEN, False):
        return
    setattr(model, SEEN, True)
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.get_decoder().register_forward_pre_hook(_below, with_kwargs=True)


def _enter(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    seen, mask = getattr(_LOCAL, "seen", None), kwargs.get("attention_mask")
    changed = {}
    if isinstance(mask, dict):
        _LOCAL.mask, changed["attention_mask"] = mask, next(iter(mask.values()))
    if seen is not None:
        ids = kwargs["input_ids"]
        at = ids < 0
        index = -1 - ids[at]
        if len(index):
            changed["input_ids"] = ids.masked_fill(at, image_token_of(model.config))
            changed["mm_encoder_outputs"] = {"image": seen.images.features(model).at(index)}
        pos = kwargs.get("position_ids")
        if seen.places is not None and pos is not None and pos.dim() == 2:
            changed["position_ids"] = _moved(pos, seen.places.to(pos.device))
    return (args, kwargs | changed) if changed else None


def _moved(pos: Tensor, places: Tensor) -> Tensor:
    """[3, B, S] the model's positions of logical ones [B, S]."""
    pos = pos.expand(len(places), -1)
    known = pos.clamp(max=places.shape[1] - 1)
    found = places.gather(1, known[..., None].expand(-1, -1, 3)) + (pos - known)[..., None]
    return found.permute(2, 0, 1)


def _below(_decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask, _LOCAL.mask = getattr(_LOCAL, "mask", None), None
    return None if mask is None else (args, kwargs | {"attention_mask": mask})
