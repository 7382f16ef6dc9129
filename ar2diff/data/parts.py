"""Messages whose content is a list of parts, and where in a conversation its images stand.

{"type": "text", "text": ...}
{"type": "image", "image" | "path" | "url" | "base64" | "bytes": ...}     transformers, trl
{"type": "image_url", "image_url": {"url": ...}}                         OpenAI
{"type": "image"}, or `<image>` in a text     an image of the columns `images` or `image`, in
                                              their order (trl, LLaVA)
"""

from __future__ import annotations

import re
from typing import Any

from ..core.errors import Ar2DiffError, shortened
from .images import of_base64
from .rows import FIX, kind_of

PLACEHOLDER = "<image>"
COLUMNS = ("images", "image")  # of a row
NAMES = ("image", "path", "url", "base64", "bytes")  # keys of a part that say which image it is
AROUND = re.compile(rf"\n?{re.escape(PLACEHOLDER)}\n?")  # templates write what stands around it
PLACES = (
    f'put {PLACEHOLDER} into the text, or {{"type": "image"}} among the parts of a message, once '
    "for each image"
)

Content = str | list[dict[str, Any]]


def content_of(parts: list[Any], where: str) -> Content:
    """Parts of a message: one text if that is all they are, else each as `{"type": "text", "text"}`
    or `{"type": "image", "image"}`, whose image is None where a column has it.

    Args:
        where: what an error calls the message.

    Raises:
        Ar2DiffError: a part is something else.
    """
    found = [_part(part, f"{where}.content[{n}]") for n, part in enumerate(parts)]
    if all(part["type"] == "text" for part in found):
        return "".join(part["text"] for part in found)
    return found


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise Ar2DiffError(f"{where} is {kind_of(part)}, but must be a part of a message", FIX)
    named = next((n for n in NAMES if part.get(n) is not None), None)
    kind = part.get("type") or ("text" if named is None else "image")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "input_image"):
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, dict) else value
        if value is None:
            raise Ar2DiffError(f"{where} names no image", FIX)
        return {"type": "image", "image": value}
    if kind == "image":
        value = None if named is None else part[named]
        return {"type": "image", "image": of_base64(value, where) if named == "base64" else value}
    raise Ar2DiffError(
        f"{where} is a part of type {shortened(kind)}, but ar2diff only reads text and images", FIX
    )


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images in the columns of a row."""
    for name in COLUMNS:
        value = row.get(name)
        if value is not None and not (isinstance(value, (list, tuple, str)) and not len(value)):
            return list(value) if isinstance(value, (list, tuple)) else [value]
    return []


def with_images(row: dict[str, Any], given: list[Any], where: str) -> dict[str, Any]:
    """A conversation with the images of the columns at their places. One that has images and no
    place for them gets the key `unplaced`, as only some models would read them.

    Args:
        row: of `conversation_of`. given: the images of the columns.

    Raises:
        Ar2DiffError: there are more places than images, or fewer.
    """
    if "messages" in row:
        messages = [{**m, "content": _split(m["content"], given)} for m in row["messages"]]
        places = [
            part
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image" and part["image"] is None
        ]
        found = {**row, "messages": messages}
    else:
        count = sum(text.count(PLACEHOLDER) for text in row.values()) if given else 0
        places = [{} for _ in range(count)]
        found = {**row, "images": given} if places else row
    if given and not places:
        return {**found, "unplaced": len(given)}
    if len(given) != len(places):
        raise Ar2DiffError(
            f"{where} has {len(given)} images in its columns, but {len(places)} places for them",
            PLACES,
        )
    for part, image in zip(places, given, strict=True):
        part["image"] = image
    return found


def _split(content: Any, given: list[Any]) -> Any:
    """The content with its placeholders as parts, copied."""
    if isinstance(content, list):
        return [dict(part) for part in content]
    if not given or not isinstance(content, str) or PLACEHOLDER not in content:
        return content
    first, *rest = AROUND.split(content)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image", "image": None}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def image_parts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a conversation that are images, in order."""
    return [
        part
        for message in row.get("messages", ())
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
