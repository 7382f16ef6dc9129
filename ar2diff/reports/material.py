"""The held-out text on which a report measures: that of the embedded stories, or a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..checkpoint.output import record_of
from ..core.errors import Ar2DiffError, option
from ..data.sources import find_file, read_texts
from ..demo import corpus

EMBEDDED = Path(corpus.__file__).parent / "model"
WORDS = 12  # of a text that is to be continued
LEAST = 8  # texts, below which no error means much
LEVELS = (1, 2)  # of the embedded questions
QUESTION_SEED, TEXT_SEED = 2, 0


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is right or wrong.

    Attributes:
        answer: a right one, in full.
        score: whether a completion answers it correctly.
    """

    prompt: str
    answer: str
    score: Callable[[str], bool]


@dataclass(frozen=True)
class Material:
    """What is measured on.

    Attributes:
        data: where it is from, for the protocol.
        texts: whole documents that no subject was trained on.
        questions: none if the data has no answers.
    """

    data: str
    texts: Sequence[str]
    questions: Sequence[Question] = ()

    def starts(self, count: int) -> list[str]:
        """Beginnings of texts, to be continued."""
        return [" ".join(text.split()[:WORDS]) for text in self.texts[:count]]


def material_for(
    model: Path, tokenizer: Any, data: str | None, text_field: str, count: int
) -> Material:
    """Held-out text for a model: the file, if there is one; else the embedded stories, if the model
    is the embedded one or was made from it; else the file that its run was evaluated on.

    Args:
        model: folder of the model. count: texts, and questions, at most.

    Raises:
        Ar2DiffError: there is none, or too little.
    """
    if data is None and knows_the_stories(tokenizer):
        return embedded(count)
    if data is None:
        data = _evaluated_on(model)
    if data is None:
        raise Ar2DiffError(
            f"there is no held-out text to measure {model} on",
            f"name a file with {option('data', 'FILE')}",
        )
    texts = [text for text in read_texts(data, text_field) if len(text.split()) > WORDS][:count]
    if len(texts) < LEAST:
        raise Ar2DiffError(
            f"{option('data')} {data}: {len(texts)} texts have more than {WORDS} words, but a "
            f"report needs at least {LEAST}",
            "use a file with more, or longer, texts",
        )
    return Material(data, texts)


def embedded(count: int) -> Material:
    """Stories and questions of the embedded corpus that are in no training data of it."""
    stories = corpus.corpus(count, TEXT_SEED, corpus.PRETRAIN_LEVELS, "valid")
    asked = corpus.corpus(count, QUESTION_SEED, LEVELS, "valid")
    return Material(
        "the embedded stories and questions",
        [corpus.text(story) for story in stories],
        [_question(example) for example in asked],
    )


def _question(example: dict[str, Any]) -> Question:
    return Question(
        corpus.prompt(example),
        example["answer_work"],
        lambda completion: bool(corpus.score(example, completion)),
    )


def knows_the_stories(tokenizer: Any) -> bool:
    """Whether a tokenizer is that of the embedded model, up to tokens that a conversion adds."""
    known = read_json(EMBEDDED / "tokenizer.json", "install ar2diff again")["model"]["vocab"]
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(token) == place for token, place in known.items())


def _evaluated_on(model: Path) -> str | None:
    """The evaluation file of the run that made a model, if it is still there."""
    recipe = (record_of(model) or {}).get("recipe") or {}
    data = (recipe.get("eval") or {}).get("data") if isinstance(recipe, dict) else None
    return data if isinstance(data, str) and find_file(data) is not None else None
