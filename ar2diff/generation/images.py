"""Images in prompts and messages: `{image}` in a prompt says where each of them stands, a part of a
message that it is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, option
from ..core.images import image_token_of
from ..core.spec import Spec
from ..data.album import Album
from ..data.images import check_pillow, shot_of
from ..data.parts import content_of, image_parts
from .prompts import IMAGE, Request, Segments, with_places
from .tokens import closing_tokens, encode

SEEN = ("image", "image_url", "input_image")  # types of parts of messages


def album_of(checkpoint: Checkpoint) -> Album:
    """A new album for a model. It is let go of with the texts that it is for, so that a server does
    not keep what its users send.

    Raises:
        Ar2DiffError: the model reads text alone, or its processor cannot be loaded.
    """
    if not checkpoint.sees_images:
        raise blind(checkpoint.path)
    return Album(checkpoint.processor, checkpoint.model)


def blind(path: Any) -> Ar2DiffError:
    """The error for images that are given to a model of text."""
    return Ar2DiffError(
        f"there is an image, but model {path} reads text alone",
        f"leave out {option('image')}, or use a vision-language model",
    )


def key_of(album: Album, image: Any, where: str) -> int:
    """The key of an image in an album, which takes it in.

    Args:
        image: a file, bytes, a data URI, or an image of PIL.
        where: what an error calls the text.

    Raises:
        Ar2DiffError: it cannot be read.
    """
    if isinstance(image, Path):
        image = str(image)
    return album.shots.add(shot_of(image, where, Path()), where)


def check_files(request: Request) -> None:
    """Refuse images that cannot be read, before a model is loaded; of the many in a file of prompts
    those that are not there.

    Raises:
        Ar2DiffError: there is one.
    """
    for number, images in enumerate(request.images, 1):
        where = f"prompt {number}" if request.many else "the prompt"
        for image in images:
            shot = shot_of(image, where, Path())
            if not request.many or (isinstance(shot.place, Path) and not shot.place.is_file()):
                check_pillow()
                shot.pixels(where)


def encode_prompt(
    checkpoint: Checkpoint,
    spec: Spec,
    segments: Segments,
    images: Sequence[Any] = (),
    album: Album | None = None,
) -> list[int]:
    """Ids of a prompt: as many mask tokens as each gap has, and the codes of each image's features.

    Args:
        images: as of `key_of`, in their order. album: that takes them in.

    Raises:
        Ar2DiffError: as `encode`, `key_of` and `with_places`.
    """
    if album is None:
        return encode(checkpoint.tokenizer, spec, segments)
    check_marks(album, (text for text in segments if isinstance(text, str)))
    tokenizer, segments = checkpoint.tokenizer, with_places(segments, len(images))
    keys = [key_of(album, image, "the prompt") for image in images]
    if len(segments) == 1:
        ids = album.read(str(segments[0]).replace(IMAGE, album.mark), keys, "the prompt")
        ids = ids[: len(ids) - closing_tokens(tokenizer)]
        if spec.mask_token_id in ids:
            raise Ar2DiffError(
                "the prompt contains the mask token", "write {mask:N} for a gap of N tokens"
            )
        return ids
    shown = iter([_shown(album, key) for key in keys])
    texts = [_expanded(s, shown) if isinstance(s, str) else s for s in segments]
    return album.coded(encode(tokenizer, spec, texts), keys, "the prompt")


def _shown(album: Album, key: int) -> str:
    """What a processor writes into a text for an image."""
    out = album.processor(
        text=[album.mark], images=[album.pixels(key)], return_text_replacement_offsets=True
    )
    return out["text_replacement_offsets"][0][0]["replacement"]


def _expanded(text: str, shown: Iterator[str]) -> str:
    """A text with what its processor writes for each image."""
    first, *others = text.split(IMAGE)
    return first + "".join(next(shown) + other for other in others)


def with_keys(
    messages: Sequence[dict[str, Any]], album: Album | None, path: Any
) -> list[dict[str, Any]]:
    """Messages whose images are their keys in an album.

    Args:
        album: None for a model of text. path: of the model.

    Raises:
        Ar2DiffError: there is an image for a model of text, or one that cannot be read.
    """
    if album is None:
        if any(part.get("type") in SEEN for message in messages for part in _parts(message)):
            raise blind(path)
        return list(messages)
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message = {**message, "content": content_of(message["content"], where)}
            for part in image_parts({"messages": [message]}):
                part["image"] = key_of(album, part["image"], where)
        check_marks(album, (part.get("text", "") for part in _parts(message)))
        found.append(message)
    return found


def _parts(message: Any) -> list[dict[str, Any]]:
    """The parts of a message; a template refuses what is none."""
    content = message.get("content") if isinstance(message, dict) else None
    given = content if isinstance(content, list) else [content]
    parts = ({"text": part} if isinstance(part, str) else part for part in given)
    return [part for part in parts if isinstance(part, dict)]


def check_marks(album: Album, texts: Iterable[str]) -> None:
    """Refuse texts in which a processor would look for an image.

    Raises:
        Ar2DiffError: there is one.
    """
    if any(album.mark in text for text in texts):
        raise _unseen(album.mark)


def check_placeholders(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> None:
    """Refuse prompts with placeholders that no image stands behind.

    Raises:
        Ar2DiffError: there is one: a text names the token.
    """
    token = image_token_of(checkpoint.model.config)
    if token is not None and any(token in row for row in rows):
        raise _unseen(checkpoint.tokenizer.convert_ids_to_tokens(token))


def _unseen(name: str) -> Ar2DiffError:
    return Ar2DiffError(
        f"the text itself contains {name}, which stands for an image", "remove it from the text"
    )
