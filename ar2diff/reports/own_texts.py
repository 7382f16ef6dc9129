"""The texts that the run which made a model kept out of its training, found again by its record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..checkpoint.model import Checkpoint
from ..checkpoint.output import record_of
from ..config.recipe import Recipe
from ..conversion.convert import end_token
from ..core.errors import Ar2DiffError
from ..data.conversations import (
    Conversations,
    names_of,
    read_conversations,
    tokenize_conversations,
)
from ..data.rows import STDIN
from ..data.sources import Documents, find_file, identity, read_texts
from ..evaluation.held_out import Judged, held_out_documents, judged_answers


@dataclass(frozen=True)
class OwnTexts:
    """Held-out texts of a run.

    Attributes:
        texts: in the order of the run. data: where they are from, as the report says it.
        spared: whether they are from the training data, where they were kept out.
        lack: why there are none, as a clause.
        chats: the same conversations, for a vision-language model; `texts` then tell them apart.
    """

    texts: list[str]
    data: str = ""
    spared: bool = False
    lack: str = ""
    chats: Conversations | None = None


def own_texts(model: Path, checkpoint: Checkpoint) -> OwnTexts:
    """The texts that a run kept out of its training data, or on which it was evaluated instead.

    Args:
        model: the folder that the run has written, with its record. checkpoint: the same, loaded.
    """
    record = record_of(model)
    if record is None:
        return OwnTexts([], lack="it has no record of the run that made it")
    try:
        recipe = Recipe.model_validate(record.get("recipe"))
    except ValidationError:
        return OwnTexts([], lack="its run was recorded by another version of ar2diff")
    verb, sources = record.get("verb"), recipe.data.sources
    held_out = (record.get("data") or {}).get("held_out")
    if verb not in ("adapt", "draft", "sft") or not (held_out or recipe.eval.data):
        return OwnTexts([], lack="the run that made it held out no data")
    try:
        if lack := _changed(record, recipe):
            return OwnTexts([], lack=lack)
        chats = verb == "sft" or record["data"]["kind"] == "conversations"
        judged = _judged(checkpoint, recipe) if chats else None
        texts = _documents(checkpoint, recipe) if judged is None else _texts(checkpoint, judged)
    except Ar2DiffError as error:
        return OwnTexts([], lack=f"its data cannot be read again ({error.what})")
    shown = judged.data if judged is not None and checkpoint.sees_images else None
    if recipe.eval.data is not None:
        data = f"{recipe.eval.data}, on which the run evaluated the model"
        return OwnTexts(texts, data, chats=shown)
    kind = "conversations" if chats else "documents"
    where = sources[0].path if not chats or len(sources) == 1 else "its data"
    data = f"{len(texts)} {kind} of {where} that the run held out from its training"
    return OwnTexts(texts, data, spared=True, chats=shown)


def _changed(record: dict[str, Any], recipe: Recipe) -> str:
    """Why the rows of a run cannot be told from its recipe; empty if they can."""
    if recipe.eval.data is not None:
        here = find_file(recipe.eval.data) is not None
        return "" if here else f"the data it was evaluated on, {recipe.eval.data}, are not here"
    if not recipe.data.sources:
        return "it was trained on text that its base wrote"
    paths = list(dict.fromkeys(source.path for source in recipe.data.sources))
    if STDIN in paths:
        return "its training data came from standard input"
    recorded = (record.get("inputs") or {}).get("data") or []
    if [*identity(recipe).values()][: len(paths)] != recorded[: len(paths)]:
        return f"its training data, {', '.join(paths)}, are not here, or have changed"
    return ""


def _documents(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    data = recipe.data
    if recipe.eval.data is not None:
        return read_texts(recipe.eval.data, data.text_field)
    documents = Documents(data.sources, data.text_field, recipe.train.seed, data.streaming)
    return held_out_documents(checkpoint, recipe, documents, end_token(checkpoint))[0]


def _judged(checkpoint: Checkpoint, recipe: Recipe) -> Judged:
    data = read_conversations(recipe)
    rows = tokenize_conversations(data, checkpoint.tokenizer, recipe, checkpoint.album)
    return judged_answers(checkpoint, recipe, data, rows)


def _texts(checkpoint: Checkpoint, judged: Judged) -> list[str]:
    """Conversations as the chat template writes them, without the BOS that a tokenizer adds; or
    their names, where there may be images."""
    if checkpoint.sees_images:
        return [] if judged.data is None else names_of(judged.data)
    tokenizer = checkpoint.tokenizer
    texts = [tokenizer.decode(ids) for ids in judged.rows]
    opening = tokenizer.decode(tokenizer("").input_ids)
    return [text.removeprefix(opening) for text in texts]
