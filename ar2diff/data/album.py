"""The images of a run: each is kept where it is, and prepared by the model's processor when a batch
needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import Ar2DiffError, first_line
from ..core.images import (
    PLACE_BITS,
    Images,
    Picture,
    codes_of,
    image_token_of,
    input_names,
    keys_in,
)
from ..core.sight import has_places, own_places, places_of
from .images import Shots, digest_of

MOST_BYTES = 256 << 20  # of prepared images that are kept
KINDS = ("token_type_ids", "mm_token_type_ids")  # what some processors call a placeholder


@dataclass(frozen=True)
class Header:
    """What of a picture decides over texts: attributes as of `Picture`."""

    size: int
    places: Tensor | None
    advance: int


class Album:
    """Images of rows, for a vision-language model. Workers of a data loader get copies.

    Args:
        processor: of the model, which is needed only as long as images are added.

    Attributes:
        token: the id of placeholders.
        moves: whether the model's positions of a text with images are not logical ones.
    """

    def __init__(self, processor: Any, model: Any):
        model = getattr(model, "get_base_model", lambda: model)()  # under an adapter
        self.processor, self._model = processor, model
        self.token, self.moves = image_token_of(model.config), has_places(model)
        self.shots = Shots()
        self.kinds: dict[str, int] = {}  # of a placeholder, once an image is prepared
        self._names = input_names(model)
        self._headers: dict[tuple[int, int], Header] = {}  # by the size in pixels, which decides
        self._kept: OrderedDict[int, Picture] = OrderedDict()
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None, "_kept": OrderedDict(), "_bytes": 0}

    def include(self, shots: Shots) -> dict[int, int]:
        """Add images; as of `Shots.include`."""
        return self.shots.include(shots)

    def pixels(self, key: int) -> Any:
        """An image, in RGB.

        Raises:
            Ar2DiffError: it is not there any more, or another one is there.
        """
        shot = self.shots.shots[key]
        found = shot.pixels()
        if digest_of(found) != self.shots.content(key):
            raise Ar2DiffError(
                f"{shot.name} has changed since it was read first",
                "leave the images as they are while a run reads them, and start it again",
            )
        return found

    def header(self, key: int) -> Header:
        """The header of an image."""
        size = self.shots.sizes[key]
        if size not in self._headers:
            self.picture(key)
        return self._headers[size]

    def picture(self, key: int) -> Picture:
        """An image as its processor prepares it.

        Raises:
            Ar2DiffError: it is no longer there, or the processor refuses it.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        inputs, count = self._prepared(key)
        header = self._headers.get(self.shots.sizes[key])
        if header is None:
            header = Header(count, *own_places(self._model, inputs, count))
            self._headers[self.shots.sizes[key]] = header
        picture = Picture(key, count, inputs, header.places, header.advance)
        self._kept[key] = picture
        self._bytes += _bytes(picture)
        while self._bytes > MOST_BYTES and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return picture

    def _prepared(self, *keys: int) -> tuple[dict[str, Tensor], int]:
        """Arguments of `get_image_features`, and the number of placeholders."""
        try:
            out = self.processor(
                text=self.processor.image_token * len(keys),
                images=[self.pixels(key) for key in keys],
                return_tensors="pt",
            )
        except Ar2DiffError:
            raise
        except Exception as error:  # each processor raises what it likes
            raise Ar2DiffError(
                f"{self.shots.shots[keys[0]].name}: the model's processor refuses it "
                f"({first_line(error)})",
                "remove the image",
            ) from error
        inputs = {name: x for name, x in out.items() if name in self._names}
        here = out["input_ids"] == self.token
        self.kinds = {name: int(out[name][here][0]) for name in KINDS if name in out}
        return inputs, int(here.sum())

    def given(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the model's processor makes of a batch: the ids [R, P] with placeholders in place of
        codes, and all else that the `generate` of transformers takes of images."""
        codes = -1 - ids[ids < 0]
        keys = [code >> PLACE_BITS for code in codes.tolist() if not code % (1 << PLACE_BITS)]
        pictures = [self.picture(key) for key in keys]
        here, inputs = ids < 0, {}
        if pictures:
            inputs = {name: [p.inputs[name] for p in pictures] for name in pictures[0].inputs}
            if any(len({x.shape[1:] for x in parts}) > 1 for parts in inputs.values()):
                inputs, _ = self._prepared(*keys)  # which pads them
            else:
                inputs = {name: torch.cat(parts) for name, parts in inputs.items()}
            inputs |= {name: here.long() * kind for name, kind in self.kinds.items()}
        return ids.masked_fill(here, self.token), inputs

    def images_in(self, ids: Tensor) -> Images | None:
        """The images whose codes are among ids of any shape; None if there are none."""
        keys = keys_in(ids)
        return Images([self.picture(key) for key in keys]) if keys else None

    @property
    def mark(self) -> str:
        """What the processor takes for an image in a text."""
        return self.processor.image_token

    def read(self, text: str, keys: Sequence[int], where: str) -> list[int]:
        """Ids of a text with marks of images, as the processor has them, with codes.

        Raises:
            Ar2DiffError: as `coded`.
        """
        images = [self.pixels(key) for key in keys] or None
        try:
            (ids,) = self.processor(text=[text], images=images)["input_ids"]
        except Exception as error:  # each processor raises what it likes
            raise Ar2DiffError(
                f"{where}: the model's processor refuses it ({first_line(error)})",
                "correct it, or the files of the processor",
            ) from error
        return self.coded(ids, keys, where)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        template: str | None,
        where: str,
        rename: Mapping[int, int],
        tools: Any = None,
        marked: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[int] | None]:
        """Ids of messages as the processor has them, with codes; and, if they are to be `marked`,
        which of them the assistant says.

        Args:
            messages: in the form that the template takes, with images as `{"image": key}`.
            rename: the keys in the album of those in the messages.
            options: variables for the template.

        Raises:
            Ar2DiffError: as `coded`; and whatever a template or processor raises.
        """
        keys, shown = [], []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                parts = [dict(part) for part in content]
                for part in parts:
                    if part["type"] == "image":
                        keys.append(rename[part["image"]])
                        part["image"] = self.pixels(keys[-1])
                message = {**message, "content": parts}
            shown.append(message)
        encoded = self.processor.apply_chat_template(
            shown,
            chat_template=template,
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            processor_kwargs={"verbose": False},
            **options or {},
        )
        (ids,) = encoded["input_ids"]
        masks = encoded["assistant_masks"][0] if marked else None
        return self.coded(ids, keys, where), masks

    def coded(self, ids: Sequence[int], keys: Sequence[int], where: str) -> list[int]:
        """The ids of a text with the codes of its images in place of their placeholders.

        Args:
            where: what an error calls the text.

        Raises:
            Ar2DiffError: there are more placeholders than the images have, or fewer.
        """
        codes = [code for key in keys for code in codes_of(key, self.header(key).size)]
        count = list(ids).count(self.token)
        if count != len(codes):
            raise Ar2DiffError(
                f"{where}: the text has {count} placeholder tokens, but its {len(keys)} images "
                f"need {len(codes)}",
                "name one image for each place of one, and write no placeholder tokens yourself",
            )
        ordered = iter(codes)
        return [next(ordered) if one == self.token else one for one in ids]

    def places(self, ids: Tensor) -> Tensor:
        """[L, 3] the model's positions of a text whose ids [L] hold codes."""
        bare = []
        for key in keys_in(ids):
            header = self.header(key)
            bare.append(Picture(key, header.size, {}, header.places, header.advance))
        images = Images(bare)
        return places_of(images.numbered(ids), images)


def _bytes(picture: Picture) -> int:
    return sum(x.numel() * x.element_size() for x in picture.inputs.values())
