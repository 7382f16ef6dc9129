"""What a report says on a question, and what it calls its subjects."""

from __future__ import annotations

from dataclasses import dataclass, field

from .figures import Report
from .pairs import Verdict


@dataclass(frozen=True)
class Claim:
    """What a report says on a question.

    Attributes:
        first: the sentence to decide by. more: those that qualify it.
        verdicts: of the model against the base, by what was compared.
    """

    question: str
    first: str
    more: list[str] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def named(report: Report, subject: str = "model") -> str:
    """The name of a subject, as the user gave it."""
    return report.subjects[subject].name
