"""Conversations with images as held-out material: their questions, and what the data answer.

A question is a conversation up to its first answer, as the model's processor and chat template have
it. All subjects get the same ids; below 0 they are codes of images, which each subject's own
processor prepares.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, first_line, option
from ..core.images import image_token_of, keys_in
from ..data.chat_template import in_form
from ..data.conversations import (
    Conversations,
    conversations_of,
    names_of,
    read_rows,
    tokenize_conversations,
)
from ..data.images import Shots
from ..data.parts import PLACEHOLDER
from .figures import MOST_PICTURE, PNG, Picture
from .questions import Question

SIDE = 224  # pixels of the longer side of a picture on the page


def conversations_in(data: str, text_field: str, count: int) -> Conversations | None:
    """The first conversations of a file; None if it holds texts.

    Raises:
        Ar2DiffError: it cannot be read.
    """
    recipe = with_values(Recipe(), data={"sources": [{"path": data}], "text_field": text_field})
    found = conversations_of(islice(read_rows(recipe), count), recipe)
    return found if {"messages", "prompt"} & found.rows[0].keys() else None


def asked_in(checkpoint: Checkpoint, data: Conversations) -> list[Question]:
    """The questions of conversations. The model's album gets their images.

    Raises:
        Ar2DiffError: a row cannot be rendered.
    """
    return list((_asked_in_chat if data.chat else _asked_in_text)(checkpoint, data))


def _asked_in_chat(checkpoint: Checkpoint, data: Conversations) -> Iterator[Question]:
    tokenizer, album, ends = checkpoint.tokenizer, checkpoint.album, checkpoint.end_ids
    rename = album.include(data.shots)
    for row, where, name in zip(data.rows, data.where, names_of(data), strict=True):
        messages, template = row["messages"], tokenizer.chat_template
        last = next((n for n, m in enumerate(messages) if m["role"] == "assistant"), 0)
        answer = _text_of(messages[last]) if last else ""
        if not answer:
            continue
        shaped, options = in_form(template, messages), row.get("chat_template_kwargs", {})

        def rendered(part: Sequence[dict[str, Any]], **more: Any) -> list[int]:
            given = template, where, rename, row.get("tools")  # noqa: B023 (called at once)
            return album.chat(part, *given, options=options | more)[0]  # noqa: B023

        try:
            prompt = rendered(shaped[:last], add_generation_prompt=True)
            whole = rendered(shaped[: last + 1])
        except Ar2DiffError:
            raise
        except Exception as error:  # a template raises what it likes
            raise Ar2DiffError(
                f"{where}: the chat template of the tokenizer cannot render it: "
                f"{first_line(error)}",
                "correct or remove the row",
            ) from None
        reply = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:  # the template writes past turns in another way
            reply = tokenizer(answer, add_special_tokens=False).input_ids
        asked = [m for m in messages[:last] if m["role"] == "user"][-1:]
        yield _question(_shown(asked), answer, prompt, _ended(reply, ends), name)


def _asked_in_text(checkpoint: Checkpoint, data: Conversations) -> Iterator[Question]:
    """Of prompts and completions."""
    rows = tokenize_conversations(data, checkpoint.tokenizer, Recipe(), checkpoint.album)
    for row, name, ids, labels in zip(
        data.rows, names_of(data), rows.ids, rows.labels, strict=True
    ):
        start = int((labels >= 0).argmax())
        ids, shown = ids.tolist(), row["prompt"].replace(PLACEHOLDER, "").strip()
        if start:
            reply = _ended(ids[start:], checkpoint.end_ids)
            yield _question(shown, row["completion"], ids[:start], reply, name)


def _text_of(message: dict[str, Any]) -> str:
    """What a message says."""
    content = message["content"]
    if isinstance(content, str):
        return content.strip()
    return "".join(part["text"] for part in content or () if part["type"] == "text").strip()


def _shown(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(filter(None, map(_text_of, messages)))


def _ended(reply: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """A reply up to its end token, which it gets if it has none."""
    stop = next((n for n, token in enumerate(reply) if token in ends), len(reply))
    return (*reply[:stop], *ends[:1])


def _question(
    prompt: str, answer: str, ids: list[int], reply: tuple[int, ...], name: str
) -> Question:
    right = answer.strip()
    return Question(
        prompt, right, lambda text: text.strip() == right, tuple(ids), reply,
        tuple(keys_in(torch.tensor(ids))), name,
    )  # fmt: skip


def show(subjects: Sequence[Any], shots: Shots) -> None:
    """Put the images of questions into the albums of all subjects (`Held`).

    Raises:
        Ar2DiffError: one of them does not see images, or marks them with another token.
    """
    token = image_token_of(subjects[0].checkpoint.model.config)
    for held in subjects:
        if image_token_of(held.checkpoint.model.config) != token:
            raise Ar2DiffError(
                f"{held.key} {held.name} does not read the images of the data as the model does",
                f"compare with a vision-language model of the same family, or leave out "
                f"{option(held.key.partition(' ')[0])}",
            )
        held.checkpoint.album.include(shots)


def thumbnail(image: Any) -> Picture:
    """A picture for the page: its pixels alone, made small, as PNG. Small ones stay as they are."""
    from PIL import Image

    width, height = image.size
    small = Image.frombytes("RGB", image.size, image.tobytes())  # and nothing that is known of it
    for side in (SIDE, SIDE // 2, SIDE // 4):
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        coded = io.BytesIO()
        small.save(coded, "PNG", optimize=True)
        if len(coded.getvalue()) * 4 < MOST_PICTURE * 3 - 99:
            break
    uri = PNG + base64.b64encode(coded.getvalue()).decode()
    return Picture(data=uri, width=width, height=height)
