"""What all questions of a report share: its subjects, text, sizes, clock and ways of writing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import first_line
from ..generation.tokens import prompt_ids
from .estimates import Value
from .figures import AR, BASELINE, LOOKUP, METRICS, Difference, Figure, Missing, Order, Seen, Text
from .journal import Row
from .material import Material
from .questions import Question
from .subjects import USUAL, Held
from .writing import Clock, Way, Written


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        batches: batch sizes of which speed is measured. timed: prompts, in each repeat.
        repeats: of a timing. answer: tokens of an answer, at most.
        questions: whose answers are checked. texts: held-out texts that are scored or continued.
        draws: noise draws of a bound. temperatures: at which texts are continued.
        prompts, answers: lengths. positions: tokens of a stretch of positions.
        infills: gaps. edits: answers to revise. documents: of a task of the harness, at most.
    """

    batches: tuple[int, ...] = (1, 4, 8, 16)
    timed: int = 32
    repeats: int = 7
    answer: int = 64
    questions: int = 400
    texts: int = 200
    draws: int = 16
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    prompts: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096)
    answers: tuple[int, ...] = (16, 64, 256, 1024)
    length_repeats: int = 5
    long_rows: int = 32
    infills: int = 200
    edits: int = 100
    documents: int | None = None


QUICK = Sizes(
    batches=(1, 8), timed=16, repeats=5, answer=48, questions=64, texts=48, draws=8,
    temperatures=(0.7, 1.0), prompts=(16, 96), answers=(16, 96), length_repeats=3, long_rows=12,
    infills=48, edits=32, documents=32,
)  # fmt: skip


@dataclass
class Session:
    """A report that is being made.

    Attributes:
        failed: what could not be measured.
    """

    subjects: dict[str, Held]
    material: Material
    sizes: Sizes
    clock: Clock = time.perf_counter
    seed: int = 0
    failed: list[Missing] = field(default_factory=list)

    @property
    def model(self) -> Held:
        """The model that the report is about."""
        return self.subjects["model"]

    @property
    def base(self) -> Held | None:
        """Its base, if there is one."""
        return self.subjects.get("base")

    def ways(self, *settings: str) -> list[Way]:
        """Every subject at each of its settings, or at those that are named, where the usual one of
        the diffusion mode stands for that of each."""
        return [
            Way(held, name, arguments)
            for held in self.subjects.values()
            for name, arguments in held.settings().items()
            if not settings or name in settings or (USUAL in settings and name == held.usual)
        ]

    def left_to_right(self) -> list[Way]:
        """The autoregressive subjects, decoded by us instead of by transformers."""
        plain = {"do_sample": False, "mode": "ar"}
        return [Way(held, AR, plain) for held in self.subjects.values() if held.kind == "ar"]

    def main_ways(self) -> list[Way]:
        """Every subject at the settings that users would choose: one of each mode."""
        return self.ways(BASELINE, "lossless", USUAL)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts, which are the same for all subjects."""
        return [prompt_ids(self.model.checkpoint.tokenizer, text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, or of a prompt without its images."""
        ids = [token for token in ids if token >= 0]
        return self.model.checkpoint.tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """A token as it stands within a text, with the space before it."""
        tokenizer = self.model.checkpoint.tokenizer
        around = tokenizer("a", add_special_tokens=False).input_ids
        before, both = tokenizer.decode(around), tokenizer.decode([*around, token])
        return both[len(before) :]

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts to answer: questions, or the starts of texts."""
        questions = self.material.questions[:count]
        return self.asked(questions) or self.encode(self.material.starts(count))

    @property
    def sees(self) -> bool:
        """Whether the material is questions about images."""
        return self.material.shots is not None

    def asked(self, questions: Sequence[Question]) -> list[list[int]]:
        """Ids of questions."""
        return [list(q.ids) or self.encode([q.prompt])[0] for q in questions]

    def openings(self, count: int) -> list[str]:
        """What free text is to follow: beginnings of texts, or questions about images."""
        if self.sees:
            return [question.prompt for question in self.material.questions[:count]]
        return self.material.starts(count)

    def opened(self, count: int) -> list[list[int]]:
        """Ids of the same."""
        return self.prompts(count) if self.sees else self.encode(self.material.starts(count))

    def attempt(self, question: str, what: str, call: Callable[[], Any]) -> Any:
        """The result of a call; None if it fails, which costs no more than what it measures."""
        try:
            return call()
        except Exception as error:
            self.miss(question, what, error)
            return None

    def miss(self, question: str, what: str, why: BaseException | str) -> None:
        """Note what could not be measured."""
        why = why if isinstance(why, str) else first_line(why)
        missing = Missing(question=question, what=what, why=why)
        if missing not in self.failed:
            self.failed.append(missing)


@dataclass
class Found:
    """What the rows of a question say."""

    figures: list[Figure] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def add(
        self,
        question: str,
        metric: str,
        subject: str,
        value: Value,
        *,
        setting: str | None = None,
        at: dict[str, Any] | None = None,
        difference: Difference | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure; unit and direction are those of its metric."""
        unit, better = METRICS[question][metric]
        self.figures.append(
            Figure(
                question=question, metric=metric, unit=unit, subject=subject, setting=setting,
                at=at or {}, value=float(value.value), error=value.error, n=value.n,
                difference=difference, better=better, evidence=evidence or {},
            )
        )  # fmt: skip


def cells_of(rows: Sequence[Row], mark: str) -> dict[tuple[str, str], list[Row]]:
    """The rows that have a field, by (subject, setting)."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if mark in row:
            cells.setdefault((row["subject"], row["setting"]), []).append(row)
    return cells


def apart(to: str, setting: str | None, value: Value, ratio: bool = False) -> Difference:
    """A difference, or a quotient, as a figure states it."""
    return Difference(
        to=to, setting=setting, value=float(value.value), error=value.error, ratio=ratio
    )


def taken(written: Written) -> dict[str, int]:
    """What a row says of the forwards behind an answer."""
    return {
        "forwards": written.forwards, "tokens": written.tokens, "steps": written.longest,
        "rows": written.rows,
    }  # fmt: skip


def only_alone(setting: str, batch: int) -> bool:
    """Whether a setting works for single prompts only, as the lookup of transformers does."""
    return setting == LOOKUP and batch > 1
