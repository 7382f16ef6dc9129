"""Quality where the questions are about images: how likely the right answers are, and some of the
pictures beside what was answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config.recipe import Recipe, with_values
from ..core.spec import Spec
from ..data.conversations import packed
from ..data.turns import IGNORED
from ..diffusion.likelihood import ar_nll
from ..evaluation.answers import AnswerJudge
from .figures import AR, BASELINE, Reply, Seen
from .journal import Row
from .pictures import thumbnail
from .questions import Question
from .session import Found, Session, cells_of
from .subjects import LOSSLESS, USUAL, Held

QUESTION = "quality"
SHOWN = 4  # questions that are shown with their pictures
WRONG = "no answer of anybody is the data's to the letter, so the data has no one right answer"


def answers_scored(session: Session, held: Held) -> list[Row]:
    """Nats of each right answer after its question, in every mode that the subject has."""
    questions = session.material.questions[: session.sizes.texts]
    checkpoint = held.checkpoint
    found: list[Row] = [
        {
            "subject": held.key, "text": n, "score_tokens": len(question.reply),
            "bytes": max(1, len(question.answer.encode())),
        }
        for n, question in enumerate(questions)
    ]  # fmt: skip
    if held.has_ar_mode:
        rows = [[*question.ids, *question.reply] for question in questions]
        window = checkpoint.spec.local_window if checkpoint.spec else "kept"
        starts = [len(question.ids) for question in questions]
        nats = ar_nll(
            checkpoint.model, rows, checkpoint.suppressed, window, starts=starts,
            **held.seen_in(rows),
        ).nats.tolist()  # fmt: skip
        found = [row | {"ar_nats": value} for row, value in zip(found, nats, strict=True)]
    if held.denoises and not held.free:
        judged = bounds_of(held, questions, session.sizes.draws, session.seed)
        found = [
            row | {"bound_nats": value, "draw_variance": spread**2}
            for row, (value, spread) in zip(found, judged, strict=True)
        ]
    return found


def bounds_of(
    held: Held, questions: Sequence[Question], draws: int, seed: int
) -> list[tuple[float, float]]:
    """For each right answer, the bound on its nats, and the standard error of the draws."""
    checkpoint = held.checkpoint
    rows = [
        {
            "input_ids": [*question.ids, *question.reply],
            "labels": [*[IGNORED] * len(question.ids), *question.reply],
        }
        for question in questions
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    recipe = _recipe_of(checkpoint.spec, longest, seed)
    pool = packed(rows, checkpoint.end_ids, checkpoint.tokenizer, recipe)
    found = []
    for number, question in enumerate(questions):
        bound = AnswerJudge(checkpoint, pool, [number], draws)().bound
        size = len(question.reply)
        found.append((bound.nats_per_token * size, (bound.standard_error or 0.0) * size))
    return found


def _recipe_of(spec: Spec, length: int, seed: int) -> Recipe:
    """A recipe whose batches are what the model reads."""
    convert = {
        "attention": spec.attention, "block_length": spec.block_length,
        "prediction": spec.prediction, "head_rank": spec.head and spec.head.rank,
    }  # fmt: skip
    grid = spec.block_length or 1
    sections: dict[str, Any] = {
        "convert": convert,
        "data": {"max_length": -(-length // grid) * grid},
    }
    return with_values(Recipe(), **sections, train={"seed": seed})


def seen_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    """Add some questions with their pictures and what was answered."""
    asked = cells_of(rows, "asked")
    questions = session.material.questions[: session.sizes.questions]
    shown = [n for n, question in enumerate(questions) if question.images][:SHOWN]
    for number in shown:
        replies = [
            Reply(
                subject=way.held.key, setting=way.setting, text=row["text"], right=row["right"],
                tokens=row["tokens"], forwards=row["row_forwards"],
            )
            for way in session.ways(BASELINE, AR, LOSSLESS, USUAL)
            for row in asked.get((way.held.key, way.setting), ())
            if row["asked"] == number
        ]  # fmt: skip
        question = questions[number]
        album = session.model.checkpoint.album
        found.seen.append(
            Seen(
                question=QUESTION, prompt=question.prompt, answer=question.answer,
                pictures=[thumbnail(album.pixels(key)) for key in question.images[:SHOWN]],
                replies=replies,
            )
        )  # fmt: skip
    if session.model.free:
        session.miss(
            QUESTION, "the bound on right answers about images",
            "it is not computed for a noise in the free form",
        )  # fmt: skip
