"""The prompts of rl: rows with a text or messages, their images, and their token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, first_line, option
from ..core.forward import context_length
from ..core.images import PLACE_BITS, image_token_of
from ..data.chat_template import in_form
from ..data.columns import likely_prompt
from ..data.conversations import read_rows
from ..data.images import Shots, shot_of
from ..data.parts import COLUMNS, PLACEHOLDER, content_of, image_parts, images_of, with_images
from ..data.sources import columns_of
from ..generation.tokens import closing_tokens, prompt_ids
from ..rewards.loading import IMAGES, PASSED

RESERVED = (*PASSED, "environments")  # names that a column must not have
ANSWERS = ("completion", "messages", "completion_ids")  # columns that are not handed on


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        rows: each with `prompt` (a text or messages) and the columns that the rewards read; if it
            has any, with the keys of its images in the column `images`, in the order of their
            places: `<image>` in a text, `{"type": "image"}` in messages.
        shots: the images.
    """

    rows: list[dict[str, Any]]
    shots: Shots

    def of(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """The rows for a model, whose album gets the images.

        Raises:
            Ar2DiffError: there are images for a model of text.
        """
        if not len(self.shots):
            return self.rows
        if checkpoint.album is None:
            number = next(n for n, row in enumerate(self.rows, 1) if IMAGES in row)
            raise Ar2DiffError(
                f"prompt {number} has an image, but model {checkpoint.path} reads text alone",
                "use a vision-language model, or remove the images from the data",
            )
        known = checkpoint.album.include(self.shots)
        return [
            {**row, IMAGES: [known[key] for key in row[IMAGES]]} if IMAGES in row else row
            for row in self.rows
        ]


def read_prompts(recipe: Recipe) -> Prompts:
    """The rows of all sources, with `prompt` (a text or messages; `rl.chat` turns a text into the
    user's message) and the columns that the rewards read. Images are read.

    Raises:
        Ar2DiffError: naming the file and row without a prompt, or whose image cannot be read.
    """
    shots = Shots()
    rows = [_prompt(row, where, recipe, shots, folder) for where, row, folder in read_rows(recipe)]
    if len({type(row["prompt"]) for row in rows}) > 1:
        raise Ar2DiffError(
            "some prompts are texts and some are lists of messages",
            f"set {option('rl.chat', True)}, or make all prompts of one kind",
        )
    return Prompts(rows, shots)


def _prompt(
    row: dict[str, Any], where: str, recipe: Recipe, shots: Shots, folder: Path
) -> dict[str, Any]:
    prompt = row.get("prompt")
    chat = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not chat and not (isinstance(prompt, str) and prompt):
        likely = option("data.columns.prompt", likely_prompt(row) or "COLUMN")
        raise Ar2DiffError(
            f"{where} has no prompt that is text or messages (it has {columns_of(row)})",
            f"correct the row, or name the column of the prompt with {likely}",
        )
    kept = {k: v for k, v in row.items() if k not in (*ANSWERS, *COLUMNS)}
    for name in RESERVED:
        if name in kept:
            raise Ar2DiffError(
                f"{where}: the column name {name!r} is reserved by trl",
                "rename the column",
            )
    if recipe.rl.chat and not chat:
        prompt, chat = [{"role": "user", "content": prompt}], True
    if chat:
        prompt = [_read(message, f"{where}: prompt[{n}]") for n, message in enumerate(prompt)]
    prompt, images = _placed(prompt, images_of(row), where)
    if images:
        kept[IMAGES] = [shots.add(shot_of(image, where, folder), where) for image in images]
    return {**kept, "prompt": prompt}


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str | list)
    )


def _read(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = content_of(content, where)
    return {**message, "content": content}


def _placed(prompt: Any, given: list[Any], where: str) -> tuple[Any, list[Any]]:
    """A prompt with a place for each of its images, and these in their order. Those of the columns
    stand before all else that the user says, as in trl, unless places are marked.

    Raises:
        Ar2DiffError: as of `with_images`.
    """
    if isinstance(prompt, str):
        found = with_images({"prompt": prompt}, given, where)
        marks = PLACEHOLDER * found.get("unplaced", 0)
        return marks + prompt, given
    found = with_images({"messages": prompt}, given, where)
    messages, parts = found["messages"], image_parts(found)
    if "unplaced" in found:
        said = next((m for m in messages if m["role"] == "user"), messages[0])
        said["content"] = [{"type": "image"} for _ in given] + [
            {"type": "text", "text": said["content"]}
        ]
        return messages, given
    return messages, [part.pop("image") for part in parts]


def coded_ids(checkpoint: Checkpoint, prompt: Any, keys: Sequence[int]) -> list[int]:
    """The token ids of a prompt, with the codes of its images.

    Args:
        prompt, keys: of a row of `Prompts.of`.

    Raises:
        Exception: whatever a chat template or a processor raises.
    """
    tokenizer, album = checkpoint.tokenizer, checkpoint.album
    if isinstance(prompt, str):
        if not keys:
            ids = prompt_ids(tokenizer, prompt)
            return ids if album is None else album.coded(ids, (), "the prompt")
        ids = album.read(prompt.replace(PLACEHOLDER, album.mark), keys, "the prompt")
        return ids[: len(ids) - closing_tokens(tokenizer)]
    messages = in_form(tokenizer.chat_template, prompt)
    if album is None:
        return prompt_ids(tokenizer, messages)
    ordered = iter(keys)
    messages = [
        {**message, "content": [_with_key(part, ordered) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
    ids, _ = album.chat(
        messages, tokenizer.chat_template, "the prompt", {key: key for key in keys},
        options={"add_generation_prompt": True},
    )  # fmt: skip
    return ids


def _with_key(part: dict[str, Any], keys: Any) -> dict[str, Any]:
    return {**part, "image": next(keys)} if part["type"] == "image" else part


def check_lengths(checkpoint: Checkpoint, recipe: Recipe, rows: list[dict[str, Any]]) -> int:
    """Refuse prompts that leave no room for a completion.

    Returns:
        The number of tokens in all prompts.

    Raises:
        Ar2DiffError: naming the first row.
    """
    longest, tokens = context_length(checkpoint.model), 0
    for number, row in enumerate(rows, 1):
        try:
            count = len(coded_ids(checkpoint, row["prompt"], row.get(IMAGES) or ()))
        except Ar2DiffError as error:
            raise error.about(f"prompt {number}") from None
        except (ValueError, TypeError, TemplateError) as error:
            raise Ar2DiffError(
                f"the chat template cannot render prompt {number}: {first_line(error)}",
                f"fix the prompt, or set {option('data.chat_template')} to another template",
            ) from error
        tokens += count
        if longest is not None and count + recipe.rl.max_completion_length > longest:
            raise Ar2DiffError(
                f"prompt {number} has {count} tokens, which with "
                f"{option('rl.max_completion_length')} {recipe.rl.max_completion_length} exceeds "
                f"the model's context of {longest} tokens",
                f"remove the prompt, or lower {option('rl.max_completion_length')}",
            )
    return tokens


def with_placeholders(checkpoint: Checkpoint, ids: Sequence[int]) -> list[int]:
    """The ids that a tokenizer knows, with placeholders in place of codes."""
    token = image_token_of(checkpoint.model.config)
    return [token if one < 0 else one for one in ids]


def readable(checkpoint: Checkpoint, ids: Sequence[int]) -> str:
    """The text of a prompt, in which one placeholder stands for all of an image."""
    first = (1 << PLACE_BITS) - 1  # the bits of a code that are zero in an image's first
    shown = [one for one in ids if one >= 0 or not -1 - one & first]
    return checkpoint.tokenizer.decode(with_placeholders(checkpoint, shown))
