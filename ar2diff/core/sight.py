"""What the rows of a canvas see: their images, the positions that the model knows their tokens by,
and how far these read.

A text's *logical* positions count its tokens; what the model calls them may be three numbers each
(M-RoPE, Wang et al. 2024, Qwen2-VL).
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError, option
from .images import Images, Picture, image_token_of, input_names, seeing


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
        """That of some of the rows, which holds no image that none of them sees."""
        ids = self.ids[rows]
        images = self.images.kept(self.images.seen(ids))
        return replace(
            self,
            images=images,
            ids=self.images.moved(ids, images),
            places=None if self.places is None else self.places[rows],
            until=None if self.until is None else self.until[rows],
        )

    def joined(self, other: Sight) -> Sight:
        """That of the rows of both, those of the other last."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        images = self.images.joined(other.images)
        theirs = other.images.moved(other.ids, images)

        def cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return first if first is None else torch.cat([wide(first, width), wide(second, width)])

        return Sight(
            images,
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
        prompts: Sequence[int] | None = None,
    ) -> Sight:
        """That of prompts.

        Args:
            ids: [P] of each row, numbered. reach: as of `until_of`.
            places: [P, 3] of each row; None: those of `places_of`, where the model has any.
            prompts: tokens of each row's prompt; None: all are.
        """
        width = max(map(len, ids))
        until = None
        if places is None and has_places(model):
            places = [places_of(row, images) for row in ids]
        if places is not None:
            places = torch.stack([wide(row, width, 0) for row in places])
        if reach != "causal":
            sizes = prompts or [None] * len(ids)
            reached = (until_of(row, reach, size) for row, size in zip(ids, sizes, strict=True))
            until = torch.stack([wide(row, width, 0) for row in reached])
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


@contextmanager
def looking(sight: Sight | None, rows: Tensor | list[int]) -> Iterator[None]:
    """`seeing` for forwards of some rows [B] of a canvas."""
    if sight is None:
        yield
        return
    places = None if sight.places is None else sight.places[torch.as_tensor(rows)]
    with seeing(sight.images, places):
        yield
