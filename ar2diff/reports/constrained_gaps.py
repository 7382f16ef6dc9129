"""Held-out texts with gaps that have to match: what is left out, and under which constraint."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..generation.prompts import Segments
from ..generation.tokens import encode, prompt_ids
from .questions import Question
from .session import Session

KINDS = {"number": "[0-9]+", "word": "[a-z]+"}  # of what is left out, the first that texts have
BEFORE, AFTER, WITHIN = 12, 8, 96  # words before and after a gap, and of a text that is read
SHOWN = 16  # words before a gap, where it is shown


@dataclass(frozen=True)
class Form:
    """What gaps have to match.

    Attributes:
        name: `regex` or `JSON schema`. kind: a key of `KINDS`.
        arguments: of `generate`.
    """

    name: str
    kind: str
    arguments: dict[str, Any]

    @classmethod
    def named(cls, name: str, kind: str) -> Form:
        """The constraint of a name on a kind of text."""
        if name == "regex":
            return cls(name, kind, {"regex": KINDS[kind]})
        value = {"type": "integer"}
        if kind == "word":
            value = {"type": "string", "pattern": KINDS[kind]}
        schema = {"type": "object", "properties": {kind: value}, "required": [kind]}
        return cls(name, kind, {"json_schema": schema})

    @property
    def label(self) -> str:
        """What the report calls it."""
        return f"{self.name} for a {self.kind}"

    def written(self, value: str) -> str:
        """How a number or a word is written in this form."""
        if "regex" in self.arguments:
            return value
        return json.dumps({self.kind: int(value) if self.kind == "number" else value})

    def read(self, text: str) -> Any:
        """What a text in this form says."""
        return text if "regex" in self.arguments else json.loads(text)


@dataclass(frozen=True)
class Case:
    """A text with a gap.

    Attributes:
        segments: what precedes the gap, its number of tokens, and what follows.
        left, gap, right: token ids of the text as it was written, the question before it included.
        true: the text of the gap. asked: the question, if it is to be shown.
    """

    segments: Segments
    left: list[int]
    gap: list[int]
    right: list[int]
    true: str
    asked: str = ""

    @property
    def shown(self) -> str:
        """The text around the gap, cut short."""
        words = self.segments[0].split(" ")
        cut = "… " if len(words) > SHOWN else ""
        return f"{self.asked}{cut}{' '.join(words[-SHOWN:])}[…]{self.segments[2]}"


def cases_of(session: Session, name: str) -> tuple[Form, list[Case]]:
    """Held-out texts with gaps, and what those have to match: numbers where half of the texts have
    one, else words.

    Raises:
        ValueError: fewer than two texts have either.
    """
    texts: Sequence[str | Question] = session.material.texts or session.material.questions
    for kind in KINDS:
        form, rng = Form.named(name, kind), random.Random(session.seed)
        found = [case for text in texts if (case := _case(session, form, text, rng))]
        if len(found) >= (len(texts) / 2 if kind == "number" else 2):
            return form, found[: session.sizes.infills]
    raise ValueError("fewer than 2 texts have a number or a word that can be left out")


def _case(session: Session, form: Form, given: str | Question, rng: random.Random) -> Case | None:
    """A text, or the right answer to a question, with a gap at a random place, of those where its
    tokens are its own; None without."""
    asked, text = (None, given) if isinstance(given, str) else (given, given.answer)
    ends = [word.end() for word in re.finditer(r"\S+", text)][:WITHIN]
    opening = r"(?<=\s)" if asked is None else r"(?<![\w'])"
    places = list(re.finditer(rf"{opening}{KINDS[form.kind]}(?![\w'])", text))
    rng.shuffle(places)
    for place in places:
        before = sum(end <= place.start() for end in ends)
        if (asked is None and before < BEFORE) or place.end() > ends[-1]:
            continue
        after = text[place.end() : ends[min(before + AFTER, len(ends) - 1)]]
        if case := _tokenized(session, form, asked, text[: place.start()], place[0], after):
            return case
    return None


def _tokenized(
    session: Session, form: Form, asked: Question | None, left: str, value: str, right: str
) -> Case | None:
    checkpoint, true = session.model.checkpoint, form.written(value)
    tokenizer, spec = checkpoint.tokenizer, checkpoint.read_as
    holed = encode(tokenizer, spec, [left, 1, right])
    whole = prompt_ids(tokenizer, left + true + right)
    at = holed.index(spec.mask_token_id)
    before, after = holed[:at], holed[at + 1 :]
    end = len(whole) - len(after)
    if end <= at or (whole[:at], whole[end:]) != (before, after):
        return None
    gap, shown = whole[at:end], ""
    if asked is not None:  # what opens a text does not open an answer
        opening = prompt_ids(tokenizer, "")
        if before[: len(opening)] != opening:
            return None
        before, shown = [*asked.ids, *before[len(opening) :]], f"{asked.prompt} "
    contexts = [held.context for held in session.subjects.values() if held.context]
    if len(before) + len(gap) + len(after) > min(contexts, default=10**9):
        return None
    return Case([left, len(gap), right], before, gap, after, true, shown)
