"""What a run keeps out of its training data, to evaluate the model on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, option
from ..core.forward import context_length
from ..core.seeds import content_key
from ..data.conversations import (
    Conversations,
    TokenRows,
    packed,
    read_conversations,
    tokenize_conversations,
)
from ..data.documents import tokenize
from ..data.sources import Document, Documents, find_file, read_texts
from .answers import AnswerJudge
from .score import check_length, windows

SPARED = 20  # documents for each evaluation row, without which none is held out unasked


def held_out_rows(
    checkpoint: Checkpoint, recipe: Recipe, documents: Documents, eos: int
) -> tuple[list[list[int]], frozenset[int]]:
    """The fixed evaluation rows, and the keys of the documents that must be kept out of
    training."""
    wanted, tokenizer = recipe.eval, checkpoint.tokenizer
    if wanted.steps == 0:
        return [], frozenset()
    if wanted.data is None:
        texts, length = held_out_documents(checkpoint, recipe, documents, eos)
        if not texts and wanted.steps is None:
            return [], frozenset()
    else:
        check_length(checkpoint, wanted.length, "eval.length")
        path = find_file(wanted.data)
        if path is None:
            raise Ar2DiffError(
                f"{option('eval.data')} {wanted.data} does not exist", "set it to a local file"
            )
        texts, length = read_texts(path, recipe.data.text_field), wanted.length
    rows = windows(texts, tokenizer, length, wanted.rows)
    if not rows:
        raise Ar2DiffError(
            f"no text has {length} tokens, as {option('eval.length')} requires",
            f"lower {option('eval.length')}",
        )
    own = [] if wanted.data is not None else texts
    return rows, frozenset(content_key(tokenize(tokenizer, text, eos)) for text in own)


def held_out_documents(
    checkpoint: Checkpoint, recipe: Recipe, documents: Documents, eos: int
) -> tuple[list[Document], int]:
    """The documents that a run keeps out of its training data, and how many tokens of each it
    evaluates the model on. They depend on the recipe and the data alone.

    With `eval.steps`, these are the first ones that are long enough. Without, nobody asked for
    them: then they are those that training would read last, so that a run which does not come that
    far trains on the same rows as without them, and there are none if they would be a noticeable
    part of the data, or if too few are long enough.
    """
    wanted, tokenizer = recipe.eval, checkpoint.tokenizer
    if wanted.steps is not None:
        check_length(checkpoint, wanted.length, "eval.length")
        length, texts = wanted.length, documents.first(20 * wanted.rows)
    else:
        context = context_length(checkpoint.model) or wanted.length
        length = min(wanted.length, recipe.data.max_length, context)
        few = documents.size < SPARED * wanted.rows
        texts = [] if few else documents.last(2 * wanted.rows) or []
    long = [text for text in texts if len(tokenize(tokenizer, text, eos)) > length][: wanted.rows]
    return (long if wanted.steps is not None or len(long) == wanted.rows else []), length


@dataclass(frozen=True)
class Judged:
    """Conversations on whose answers a run is evaluated.

    Attributes:
        judge: scores the model on them; None: there are none.
        rows: their token ids. questions: what they begin with, as a user would type it.
        held_out: numbers of the training rows that are kept out of training.
        data: the conversations as they were read.
    """

    judge: Callable[[], Any] | None = None
    rows: list[list[int]] = field(default_factory=list)
    questions: tuple[str, ...] = ()
    held_out: frozenset[int] = frozenset()
    data: Conversations | None = None


def judged_answers(
    checkpoint: Checkpoint, recipe: Recipe, data: Conversations, rows: TokenRows
) -> Judged:
    """The conversations to evaluate a run on: of `eval.data`, else those that training would read
    last. None is held out unasked if they would be a noticeable part of the data.

    Raises:
        Ar2DiffError: `eval.data` has nothing to judge; too few conversations would be left.
    """
    wanted = recipe.eval
    few = len(rows) < SPARED * wanted.rows
    if wanted.steps == 0 or (few and wanted.steps is None and wanted.data is None):
        return Judged()
    tokenizer, ends = checkpoint.tokenizer, checkpoint.end_ids
    if wanted.data is not None:
        own = with_values(recipe, data={"sources": [{"path": wanted.data}]})
        data = read_conversations(own)
        rows = tokenize_conversations(data, tokenizer, own, checkpoint.album)
    pool = packed(rows.dataset(), ends, tokenizer, recipe)
    if wanted.data is not None:
        teaching = (n for n in range(len(rows)) if pool.parts(n, 0))
        numbers, held = list(islice(teaching, wanted.rows)), frozenset()
    else:
        numbers = pool.last(wanted.rows)
        same = {rows.ids[n].tobytes() for n in numbers}  # a conversation may occur more than once
        held = frozenset(n for n, ids in enumerate(rows.ids) if ids.tobytes() in same)
    if not numbers or len(held) == len(rows):
        raise Ar2DiffError(
            f"no conversation is left to {'train on' if held else 'evaluate the model on'}, with "
            f"{option('eval.rows')} {wanted.rows}",
            f"lower {option('eval.rows')}, or set {option('eval.data')} to another file",
        )
    judge = AnswerJudge(checkpoint, pool, numbers, wanted.samples)
    if judge.unmeasured:
        checkpoint.notes.append(f"note: {judge.unmeasured}")
    data = data.chosen(numbers)
    return Judged(judge, judge.rows, _questions(data.rows), held, data)


def _questions(conversations: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What a user would type to get the first answers; nothing for those that follow a system
    prompt or use tools."""
    found = []
    for row in conversations:
        first = row["messages"][0] if row.get("messages") else {}
        text = first.get("content") if first.get("role") == "user" else row.get("prompt")
        if isinstance(text, str) and not row.get("tools"):
            found.append(text)
    return tuple(found)
