"""Images in the rows of a vision-language model: which feature stands behind which placeholder, at
which positions the model sees it, and how far its placeholders read.

An image stands in a text as a run of placeholder tokens, one for each of its features. Ids say
which: below 0, -1 is the first feature of a batch's images, -2 the second. So features go with
their tokens into any copy of a text, in any order; the tower runs once for a batch, and each
forward picks the rows that it needs. A text's *logical* positions count its tokens; what the model
calls them may be three numbers each (M-RoPE, Wang et al. 2024, Qwen2-VL).
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError, option

PLACE_BITS = 20  # of a code: the number of the feature in its image; the others are the image's key
SEEN = "_ar2diff_sees_images"  # attribute of a model whose forwards take such ids
_LOCAL = threading.local()  # what the forwards of a thread see


def image_token_of(config: Any) -> int | None:
    """The id of the placeholders of images; None for a model of text alone."""
    found = getattr(config, "image_token_id", None)
    return found if type(found) is int and hasattr(config, "vision_config") else None


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

    def joined(self, other: Images) -> Images:
        """The images of both, those of the other last."""
        both = Images([*self.pictures, *other.pictures])
        for kind in self._features.keys() | other._features.keys():
            parts = [own._features.get(kind) for own in (self, other) if own.pictures]
            if None not in parts:  # else they are computed anew
                first, *more = parts
                both._features[kind] = first.joined(more[0]) if more else first
        return both


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
        out = model.get_image_features(**_placed(inputs, model), return_dict=True)
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


def _placed(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        name: x.to(model.device, kind) if x.is_floating_point() else x.to(model.device)
        for name, x in inputs.items()
    }


@dataclass(frozen=True)
class Sight:
    """What the rows of a canvas see.

    Attributes:
        images: of all rows.
        ids: [R, P] of the prompts; those of placeholders are numbers of features, below 0.
        places: [R, P, 3] the model's positions, which go on as in a text behind the prompts; None:
            logical ones.
        until: [R, P] the last position that each token reads in its clean copy; None: its own.
    """

    images: Images
    ids: Tensor
    places: Tensor | None = None
    until: Tensor | None = None

    def put(self, ids: Tensor) -> Tensor:
        """The ids [R, T] of a canvas with those of the features."""
        width = min(self.ids.shape[1], ids.shape[1])
        own = self.ids[:, :width]
        return torch.cat([torch.where(own < 0, own, ids[:, :width]), ids[:, width:]], 1)

    def reach(self, rows: Tensor | list[int]) -> Tensor | None:
        """[R, P] `until` of some of the rows."""
        return None if self.until is None else self.until[torch.as_tensor(rows)]

    def selected(self, rows: Tensor) -> Sight:
        """That of some of the rows."""
        return replace(
            self,
            ids=self.ids[rows],
            places=None if self.places is None else self.places[rows],
            until=None if self.until is None else self.until[rows],
        )

    def joined(self, other: Sight) -> Sight:
        """That of the rows of both, those of the other last."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        theirs = torch.where(other.ids < 0, other.ids - self.images.count, other.ids)

        def cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return first if first is None else torch.cat([wide(first, width), wide(second, width)])

        return Sight(
            self.images.joined(other.images),
            torch.cat([_filled(ids, width) for ids in (self.ids, theirs)]),
            cat(self.places, other.places),
            cat(self.until, other.until),
        )

    def blank(self, rows: int) -> Sight:
        """That of rows of the same model which see nothing."""
        place = torch.arange(1).expand(rows, 1)
        return Sight(
            Images(()),
            place,
            None if self.places is None else place[..., None].expand(-1, -1, 3),
            None if self.until is None else place,
        )

    @classmethod
    def of_rows(
        cls,
        model: Any,
        images: Images,
        ids: Sequence[Tensor],
        reach: str,
        places: Sequence[Tensor] | None = None,
    ) -> Sight:
        """That of prompts.

        Args:
            ids: [P] of each row, numbered. reach: as of `until_of`.
            places: [P, 3] of each row; None: those of `places_of`, where the model has any.
        """
        width = max(map(len, ids))
        until = None
        if places is None and has_places(model):
            places = [places_of(row, images) for row in ids]
        if places is not None:
            places = torch.stack([wide(row, width, 0) for row in places])
        if reach != "causal":
            until = torch.stack([wide(until_of(row, reach), width, 0) for row in ids])
        return cls(images, torch.stack([_filled(row, width) for row in ids]), places, until)


def joined(first: Sight | None, rows: int, second: Sight | None, more: int) -> Sight | None:
    """What the rows of two canvases see, of which one may see nothing."""
    if first is None and second is None:
        return None
    one = first if first is not None else second.blank(rows)
    return one.joined(second if second is not None else one.blank(more))


def _filled(ids: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[-1]))


def wide(values: Tensor, width: int, dim: int = 1) -> Tensor:
    """Positions that go on one by one, up to `width`."""
    size = values.shape[dim]
    if size >= width:
        return values
    shape = [1] * values.dim()
    shape[dim] = width - size
    last = values.narrow(dim, size - 1, 1)
    return torch.cat([values, last + torch.arange(1, width - size + 1).view(shape)], dim)


def places_of(ids: Tensor, images: Images) -> Tensor:
    """[L, 3] the model's positions of a text whose ids [L] are numbered: those of a text, but those
    of an image's placeholders are in its own grid."""
    places = torch.arange(len(ids))[:, None].expand(-1, 3).clone()
    first = {
        start: picture for picture in images.pictures if (start := images.first[picture.key]) >= 0
    }
    numbers, at = (-1 - ids).tolist(), 0
    while at < len(numbers):
        picture = first.get(numbers[at]) if numbers[at] >= 0 else None
        if picture is None or picture.places is None:
            at += 1
            continue
        end, begin = at + picture.size, int(places[at, 0])
        places[at:end] = begin + picture.places[: len(numbers) - at]
        after = begin + (picture.advance or picture.size)
        places[end:] = after + torch.arange(max(0, len(ids) - end))[:, None]
        at = end
    return places


def until_of(ids: Tensor, reach: str, prompt: int | None = None) -> Tensor:
    """[L] the last position that each token reads in the clean copy of a text.

    Args:
        ids: [L]; those of placeholders are below 0.
        reach: `causal`: up to itself; `image`: a placeholder reads all that it adjoins, as in
            Gemma 3; `prefix`: the whole prompt reads all of itself, as in PaliGemma.
        prompt: tokens of the prompt; None: all are.
    """
    until = torch.arange(len(ids))
    if reach == "prefix":
        until[: prompt if prompt is not None else len(ids)] = (prompt or len(ids)) - 1
    elif reach == "image":
        last = len(ids) - 1
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] >= 0:
                last = at - 1
            else:
                until[at] = last if last >= at else at
    return until


def has_places(model: Any) -> bool:
    """Whether a model has three positions for each token."""
    return hasattr(getattr(model, "model", None), "get_rope_index")


def own_places(model: Any, inputs: dict[str, Tensor], size: int) -> tuple[Tensor | None, int]:
    """`Picture.places` and `Picture.advance` of an image, as its class counts."""
    if not has_places(model):
        return None, 0
    ids = torch.tensor([[image_token_of(model.config)] * size + [0]])
    found, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=torch.tensor([[1] * size + [0]], dtype=torch.int),
        **{name: value for name, value in inputs.items() if name.startswith("image_grid")},
    )  # fmt: skip
    places = found[:, 0].T
    return places[:size] - places[0], int(places[size, 0] - places[0, 0])


def given_images(
    model: Any, given: Tensor | None, real: Tensor | None, kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """Take what a processor made of images out of the arguments of `generate`.

    Args:
        given: [R, P] prompts; real: [R, P] bool, where they are not padding.

    Returns:
        The arguments of `get_image_features`, empty if there are none; and, for a model that has
        any, [P, 3] the positions of each row.

    Raises:
        Ar2DiffError: there are images without placeholders, or placeholders without images.
    """
    token = image_token_of(model.config)
    inputs = {name: kwargs.pop(name) for name in list(kwargs) if name in input_names(model)}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    for name in ("token_type_ids", "mm_token_type_ids"):  # which the ids tell as well
        kwargs.pop(name, None)
    there = bool(given is not None and (given == token).any())
    if there != bool(inputs):
        have, lack = ("placeholders", "image") if there else ("images", "placeholder")
        raise Ar2DiffError(
            f"the call has {have} in {option('input_ids' if there else 'pixel_values')}, but no "
            f"{lack}",
            "pass all that the model's processor makes of the messages and their images",
        )
    if not inputs or not has_places(model):
        return inputs, None
    places, _ = model.model.get_rope_index(
        given, mm_token_type_ids=(given == token).int(), attention_mask=real.to(given),
        **{name: x for name, x in inputs.items() if name.startswith("image_grid")},
    )  # fmt: skip
    return inputs, [places[:, row, keep].T.cpu() for row, keep in enumerate(real.to(given.device))]


def numbered_prompts(
    prompts: Sequence[Sequence[int]], token: int, inputs: dict[str, Tensor]
) -> tuple[list[list[int]], Images]:
    """Prompts whose placeholders, from the first row to the last, are those of images that a
    processor prepared together."""
    count, rows = 0, []
    for prompt in prompts:
        numbers = iter(range(count, count + list(prompt).count(token)))
        rows.append([-1 - next(numbers) if one == token else one for one in prompt])
        count += list(prompt).count(token)
    return rows, Images([Picture(0, count, inputs)])


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


@contextmanager
def looking(sight: Sight | None, rows: Tensor | list[int]) -> Iterator[None]:
    """`seeing` for forwards of some rows [B] of a canvas."""
    if sight is None:
        yield
        return
    places = None if sight.places is None else sight.places[torch.as_tensor(rows)]
    with seeing(sight.images, places):
        yield


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
