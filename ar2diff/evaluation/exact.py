"""How many answers of conversations a model writes word for word."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..config.recipe import load_recipe
from ..core.errors import Ar2DiffError, option
from ..data.album import Album
from ..data.conversations import Conversations, read_conversations
from ..data.parts import PLACEHOLDER, image_parts
from ..generation.complete import decode_rows, load, settings_of
from ..generation.images import album_of, blind, encode_prompt, with_keys
from ..generation.prompts import IMAGE
from ..generation.tokens import encode_messages

ROOM = 8  # tokens more than the longest answer has


@dataclass(frozen=True)
class ExactAnswers:
    """Answers that were compared with those of a file.

    Attributes:
        model: folder or Hub id. data: the file.
        rows: number of questions. exact: answers that are those of the file, but for spaces at
            their ends.
        share: of the rows. standard_error: of the share, over the rows.
        mode: that wrote them. tokens_per_forward: over all answers.
    """

    model: str
    data: str
    rows: int
    exact: int
    share: float
    standard_error: float
    mode: str
    tokens_per_forward: float

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def exact_answers(
    model: str | Path | Checkpoint,
    data: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    **settings: Any,
) -> ExactAnswers:
    """Have a model answer the last question of each conversation in a file, and compare.

    Args:
        data: rows with `messages`, of which the last is the assistant's, or with `prompt` and
            `completion`; with images or without.
        limit: rows, from the first; None: all.
        settings: options of `generate`; an answer has as many tokens as the longest in the file,
            and some to spare, unless `max_new_tokens` says otherwise.

    Raises:
        Ar2DiffError: the file cannot be read, or a row of it has no answer; or as `load`.
    """
    rows = read_conversations(load_recipe(None, [f"data.sources=[{data}]"]))
    answers = [_answer(rows, number) for number in range(len(rows.rows[:limit]))]
    checkpoint = model if isinstance(model, Checkpoint) else load(str(model), dtype)
    if len(rows.shots) and not checkpoint.sees_images:
        raise blind(checkpoint.path)
    if "max_new_tokens" not in settings:
        lengths = [len(checkpoint.tokenizer(answer).input_ids) for answer in answers]
        settings = {**settings, "max_new_tokens": max(lengths) + ROOM}
    spec, options = settings_of(checkpoint, settings)
    album = album_of(checkpoint) if checkpoint.sees_images else None
    asked = [_ids(checkpoint, rows, number, album) for number in range(len(answers))]
    order = sorted(range(len(asked)), key=lambda number: len(asked[number]))
    exact = tokens = forwards = 0
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = [asked[number] for number in numbers]
        for number, found in zip(
            numbers, decode_rows(checkpoint, spec, options, batch, album=album), strict=True
        ):
            exact += found.text.strip() == answers[number].strip()
            tokens, forwards = tokens + found.new_tokens, forwards + found.forwards
    share = exact / len(answers)
    error = (share * (1 - share) / len(answers)) ** 0.5
    name = checkpoint.path if isinstance(model, Checkpoint) else model
    return ExactAnswers(
        str(name), str(data), len(answers), exact, share, error, options.mode,
        tokens / max(forwards, 1),
    )  # fmt: skip


def _answer(data: Conversations, number: int) -> str:
    """The text that a row wants."""
    row = data.rows[number]
    if "completion" in row:
        return row["completion"]
    last = row["messages"][-1] if "messages" in row else {}
    if last.get("role") == "assistant" and isinstance(last["content"], str):
        return last["content"]
    raise Ar2DiffError(
        f"{data.where[number]} does not end with what the assistant says",
        f"give conversations with their answers to {option('answers')}",
    )


def _ids(
    checkpoint: Checkpoint, data: Conversations, number: int, album: Album | None
) -> list[int]:
    """The ids of a row's question."""
    row, spec = data.rows[number], checkpoint.read_as
    try:
        if "completion" in row:
            places = [data.shots.shots[key].place for key in row.get("images", ())]
            text = row["prompt"].replace(PLACEHOLDER, IMAGE) if places else row["prompt"]
            own = album if places else None
            return encode_prompt(checkpoint, spec, [text], places, own)
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"][:-1]]
        for part in image_parts({"messages": messages}):
            part["image"] = data.shots.shots[part["image"]].place
        messages = with_keys(messages, album, checkpoint.path)
        tools = row.get("tools")
        return encode_messages(checkpoint.tokenizer, spec, messages, tools, album)
    except Ar2DiffError as error:
        raise error.about(data.where[number]) from None
