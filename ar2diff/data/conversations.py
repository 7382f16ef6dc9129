"""Rows of conversations: read from the sources of a recipe, then tokenized, with labels that say
which tokens are learned."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, first_line, option
from .album import Album
from .chat_template import asked_otherwise, check_options, dropped_by, in_form, template_name
from .columns import arranged, columns_read
from .images import Shots, shot_of
from .parts import PLACEHOLDER, PLACES, image_parts
from .shapes import columns_of_shape, conversation_of
from .sources import folder_of, no_data, read_source
from .turns import IGNORED, PackedConversations, runs_of

FORMATS = ("messages", "prompt and completion", "text")


@dataclass(frozen=True)
class Conversations:
    """The rows of a run, all of one form.

    Attributes:
        rows: each with `messages` (and `tools`, `chat_template_kwargs`), or with `prompt` and
            `completion`, or with a text.
        where: what an error calls each of them.
        unread: columns that rows have and nothing reads.
        shots: the images in them, which name them by their keys.
    """

    rows: list[dict[str, Any]]
    where: list[str]
    unread: tuple[str, ...]
    shots: Shots = field(default_factory=Shots)

    @property
    def chat(self) -> bool:
        """Whether the rows are messages."""
        return "messages" in self.rows[0]

    def chosen(self, numbers: Sequence[int]) -> Conversations:
        """Some of them."""
        rows, where = ([given[n] for n in numbers] for given in (self.rows, self.where))
        return replace(self, rows=rows, where=where)

    @property
    def tools(self) -> bool:
        """Whether a conversation has tools, calls of them or their results."""
        return any(
            row.get("tools")
            or any(m.get("tool_calls") or m.get("role") == "tool" for m in row.get("messages", ()))
            for row in self.rows
        )


@dataclass(frozen=True)
class TokenRows:
    """Conversations as token ids.

    Attributes:
        ids: int32, of each row; lists would take ten times the memory. Where there are images
            int64, since the codes of their placeholders are below -2 ** 31.
        labels: as the ids, of each token, its id where it is learned, else `IGNORED`.
        notes: lines for the user: what of the data is not used, what may be wrong with it.
    """

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def dataset(self) -> Any:
        """The rows as a data set that trl's trainer takes as tokenized."""
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.ids, "labels": self.labels})


def read_rows(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(what an error calls it, row, folder of its file) of all sources, its columns arranged as the
    recipe says.

    Raises:
        Ar2DiffError: naming the row that cannot be read.
    """
    if not recipe.data.sources:
        raise no_data()
    for source in recipe.data.sources:
        folder = folder_of(source)
        for where, row in read_source(source):
            yield where, arranged(row, recipe.data.columns, where), folder


def read_conversations(recipe: Recipe) -> Conversations:
    """The conversations of all sources of a recipe; errors as of `conversations_of`."""
    return conversations_of(read_rows(recipe), recipe)


def conversations_of(
    found: Iterable[tuple[str, dict[str, Any], Path]], recipe: Recipe
) -> Conversations:
    """The conversations that rows of any of the common shapes hold. Their images are read.

    Args:
        found: (what an error calls it, row, folder of its file), its columns arranged as the recipe
            says.

    Raises:
        Ar2DiffError: naming the row that is none; or the rows are of several formats.
    """
    shots = Shots()
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    unread: dict[str, None] = {}
    mapped, field = columns_read(recipe.data.columns), recipe.data.text_field
    for where, row, folder in found:
        rows.append(_with_keys(conversation_of(row, where, field), shots, where, folder))
        places.append(where)
        if not row.keys() <= unread.keys():
            read = columns_of_shape(row, field) | mapped
            unread |= dict.fromkeys(name for name in row if name not in read)
        if _format(rows[-1]) != _format(rows[0]):
            raise Ar2DiffError(
                f"{where} has a different format than {places[0]}, but all rows must have the same",
                f"use one of these formats for all rows: {', '.join(FORMATS)}",
            )
    return Conversations(rows, places, tuple(unread), shots)


def names_of(data: Conversations) -> list[str]:
    """What tells the conversations apart, wherever they are read."""
    return [json.dumps(row, sort_keys=True, default=str) for row in data.rows]


def _with_keys(row: dict[str, Any], shots: Shots, where: str, folder: Path) -> dict[str, Any]:
    """The row with the keys of its images in place of what names them."""

    def key(image: Any) -> int:
        return shots.add(shot_of(image, where, folder), where)

    for part in image_parts(row):
        part["image"] = key(part["image"])
    return {**row, "images": [key(image) for image in row["images"]]} if "images" in row else row


def tokenize_conversations(
    data: Conversations, tokenizer: Any, recipe: Recipe, album: Album | None = None
) -> TokenRows:
    """Tokenize conversations with the tokenizer's chat template, or as texts.

    Args:
        album: of a vision-language model, which gets the images.

    Raises:
        Ar2DiffError: naming the row that the template refuses, in the template's own words; or
            there are images for a model of text.
    """
    notes = []
    rename, kind = _known_images(data, album), np.int64 if len(data.shots) else np.int32
    if data.unread:
        names = ", ".join(data.unread[:8]) + (" ..." if len(data.unread) > 8 else "")
        notes.append(f"note: these columns of the data are not used: {names}")
    if data.chat:
        pairs = [
            np.array(_chat(row, where, tokenizer, recipe, album, rename), dtype=kind)
            for row, where in zip(data.rows, data.where, strict=True)
        ]
        dropped = dropped_by(tokenizer, tokenizer.chat_template, data.rows)
        name = template_name(recipe)
        notes += [f"note: {name} drops {what}" for what in dropped]
        if count := asked_otherwise(tokenizer, data.rows):
            notes.append(
                f"warning: {count} of the first answers follow different tokens in training "
                "than they would in a chat; compare what the chat template renders with and "
                "without add_generation_prompt"
            )
    else:
        pairs = [
            np.array(_text(row, where, tokenizer, album, rename), dtype=kind)
            for row, where in zip(data.rows, data.where, strict=True)
        ]
    return TokenRows([ids for ids, _ in pairs], [labels for _, labels in pairs], tuple(notes))


def _known_images(data: Conversations, album: Album | None) -> dict[int, int]:
    """Put the images into the album. Returns {their keys in the rows: those in the album}.

    Raises:
        Ar2DiffError: there are images for a model of text, or images that stand nowhere.
    """
    for row, where in zip(data.rows, data.where, strict=True):
        if album is None and (image_parts(row) or row.get("images")):
            raise Ar2DiffError(
                f"{where} has an image, but the model reads text alone",
                "use a vision-language model, or remove the row",
            )
        if album is not None and "unplaced" in row:
            raise Ar2DiffError(
                f"{where} has {row['unplaced']} images in its columns, but no place for one", PLACES
            )
    return {} if album is None else album.include(data.shots)


def packed(
    rows: Any,
    ends: Iterable[int],
    tokenizer: Any,
    recipe: Recipe,
    held_out: frozenset[int] = frozenset(),
) -> PackedConversations:
    """Tokenized rows as training packs them; arguments as of `PackedConversations`."""
    blank = functools.cache(lambda token: tokenizer.decode([token]).isspace())
    return PackedConversations(rows, ends, recipe, blank, held_out)


def _format(row: dict[str, Any]) -> str:
    return next((name for name in ("messages", "prompt") if name in row), "text")


def _text(
    row: dict[str, Any], where: str, tokenizer: Any, album: Album | None, rename: dict[int, int]
) -> tuple[list[int], list[int]]:
    """Ids and labels of a text, or of a prompt and a completion, of which only the latter is
    learned. It begins where prompt and whole text diverge, as tokens may join across."""
    end = tokenizer.eos_token
    texts = {k: v for k, v in row.items() if k not in ("images", "unplaced")}
    *prompt, last = (row["prompt"], row["completion"]) if "prompt" in row else texts.values()
    whole = "".join(prompt) + (last if last.endswith(end) else last + end)
    keys = [rename[key] for key in row.get("images", ())]

    def coded(text: str) -> list[int]:
        if not keys:
            return _ids(tokenizer, text)
        some = keys[: text.count(PLACEHOLDER)]
        found = album.read(text.replace(PLACEHOLDER, album.mark), some, where)
        return _once(tokenizer, found)

    ids = coded(whole)
    start, close = 0, ids[::-1].index(tokenizer.eos_token_id) if keys else 0
    if close:  # what a processor writes behind a text (PaliGemma a line break) closes the prompt
        ids = ids[: len(ids) - close]
        if prompt:
            before = coded(prompt[0])
            start = len(before)
            own = tokenizer(text=whole[len(prompt[0]) :], add_special_tokens=False, verbose=False)
            ids = [*before, *own["input_ids"]]
    elif prompt:
        before = coded(prompt[0])
        pairs = zip(before, ids, strict=False)
        start = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids)))
    return ids, [IGNORED] * start + [one if one >= 0 else IGNORED for one in ids[start:]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text. Of a tokenizer that appends its end token, one at most."""
    return _once(tokenizer, tokenizer(text=text, verbose=False)["input_ids"])


def _once(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids[:-1] if ids[-2:] == [end, end] else ids


def _chat(
    row: dict[str, Any],
    where: str,
    tokenizer: Any,
    recipe: Recipe,
    album: Album | None,
    rename: dict[int, int],
) -> tuple[list[int], list[int]]:
    """Ids and labels of messages: all tokens, or with `assistant_only` those that the template
    marks; never those of an answer whose weight is 0."""
    options, marked = row.get("chat_template_kwargs", {}), recipe.data.assistant_only
    check_options(tokenizer, options, where)
    weights = [m.get("weight", 1) for m in row["messages"] if m["role"] == "assistant"]
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
    messages = in_form(tokenizer.chat_template, messages)
    try:
        if album is not None:
            ids, masks = album.chat(
                messages, tokenizer.chat_template, where, rename, row.get("tools"), marked, options
            )
        else:
            encoded = tokenizer.apply_chat_template(
                messages,
                tools=row.get("tools"),
                return_dict=True,
                return_assistant_tokens_mask=marked,
                tokenizer_kwargs={"verbose": False},
                **options,
            )
            ids, masks = list(encoded["input_ids"]), encoded.get("assistant_masks")
    except Ar2DiffError:
        raise
    except Exception as error:  # a template raises what it likes
        raise Ar2DiffError(
            f"{where}: {template_name(recipe)} cannot render it: {first_line(error)}",
            f"correct or remove the row, or set another {option('data.chat_template')}",
        ) from None
    learned = masks if marked else [1] * len(ids)
    labels = [one if keep and one >= 0 else IGNORED for one, keep in zip(ids, learned, strict=True)]
    unlearned = {m["role"] for m in row["messages"] if m.get("weight") == 0}
    if "assistant" in unlearned or (unlearned and not marked):
        _forget(labels, weights, where, marked)
    return ids, labels


def _forget(labels: list[int], weights: Sequence[int], where: str, marked: bool) -> None:
    """Ignore the labels of answers whose weight is 0."""
    runs = list(runs_of(labels))
    if not marked or len(runs) != len(weights):
        raise Ar2DiffError(
            f"{where}: a message is excluded from learning, but the chat template does not mark "
            "each answer separately",
            f"set {option('data.assistant_only', 'true')} and a template that does, for example "
            f"{option('data.chat_template', 'plain')}",
        )
    for (start, end), weight in zip(runs, weights, strict=True):
        if weight == 0:
            labels[start:end] = [IGNORED] * (end - start)
