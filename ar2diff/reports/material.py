"""The held-out text on which a report measures: a file, what the model's run held out, or the
embedded stories."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, option
from ..data.images import Shots
from ..data.sources import read_texts
from ..demo import corpus
from .own_texts import own_texts
from .pictures import asked_in, conversations_in
from .questions import Question

EMBEDDED = Path(corpus.__file__).parent / "model"
WORDS = 12  # of a text that is to be continued
LEAST = 8  # texts, below which no error means much
LEVELS = (1, 2)  # of the embedded questions
QUESTION_SEED, TEXT_SEED = 2, 0


@dataclass(frozen=True)
class Material:
    """What is measured on.

    Attributes:
        data: where it is from, for the protocol.
        texts: whole documents that no subject was trained on.
        questions: none if the data has no answers.
        spared: whether the texts are what the model's own run kept out of its training data.
        shots: images of the questions, of which there are then no other texts.
    """

    data: str
    texts: Sequence[str]
    questions: Sequence[Question] = ()
    spared: bool = False
    shots: Shots | None = None

    @property
    def read(self) -> list[str]:
        """What tells this material from other."""
        return [*self.texts] if self.shots is None else [q.name for q in self.questions]

    @property
    def digest(self) -> str:
        """Of the texts: what was measured on others cannot stand in the same report."""
        return hashlib.sha256("\0".join(self.read).encode()).hexdigest()

    def lack(self, wanted: int) -> str:
        """Why there are fewer texts than a report would read; empty if there are not."""
        if not self.spared or len(self.read) >= wanted:
            return ""
        return (
            f"the run held out only {len(self.read)} that are long enough; for smaller errors, "
            f"train with eval.rows={wanted}, or name a file with --data"
        )

    def unknown_to(self, path: Path, checkpoint: Checkpoint) -> bool:
        """Whether the run that made another model has kept the same texts out of its training, as
        far as that must be asked: of a file that is none of the training data, it need not be."""
        return not self.spared or set(self.read) <= set(own_texts(path, checkpoint).texts)

    def starts(self, count: int) -> list[str]:
        """Beginnings of texts, to be continued."""
        return [" ".join(text.split()[:WORDS]) for text in self.texts[:count]]


def material_for(
    model: Path, checkpoint: Checkpoint, data: str | None, text_field: str, count: int
) -> Material:
    """Held-out text for a model: the file, if there is one; else what its run held out from its
    training; else the embedded stories, if the model is the embedded one or was made from it. The
    embedded questions go with a model's own texts, too.

    Args:
        model: folder of the model. checkpoint: the same, loaded. count: texts, and questions, at
            most.

    Raises:
        Ar2DiffError: there is none, or too little.
    """
    if data is not None:
        return _of_file(model, checkpoint, data, text_field, count)
    own = own_texts(model, checkpoint)
    if own.chats is not None and len(own.texts) >= LEAST:
        asked = asked_in(checkpoint, own.chats)[:count]
        return Material(own.data, (), asked, own.spared, own.chats.shots)
    texts = _usable(own.texts)[:count]
    known = embedded(count) if knows_the_stories(checkpoint.tokenizer) else None
    if len(texts) >= LEAST:
        asked = known.questions if known else ()
        data = own.data + (", and the embedded questions" if asked else "")
        return Material(data, texts, asked, own.spared)
    if known is not None:
        return known
    lack = own.lack or f"only {len(texts)} texts in {own.data} have more than {WORDS} words"
    raise Ar2DiffError(
        f"there is no held-out text to measure {model} on: {lack}",
        f"name a file with {option('data', 'FILE')}",
    )


def _of_file(
    model: Path, checkpoint: Checkpoint, data: str, text_field: str, count: int
) -> Material:
    chats = conversations_in(data, text_field, count) if checkpoint.sees_images else None
    if chats is not None:
        asked = asked_in(checkpoint, chats)
        if len(asked) < LEAST:
            raise Ar2DiffError(
                f"{option('data')} {data}: {len(asked)} conversations have an answer, "
                f"but a report needs at least {LEAST}",
                "use a file with more of them",
            )
        return Material(data, (), asked, shots=chats.shots)
    texts = _usable(read_texts(data, text_field))[:count]
    if len(texts) < LEAST:
        raise Ar2DiffError(
            f"{option('data')} {data}: {len(texts)} texts have more than {WORDS} words, but a "
            f"report needs at least {LEAST}",
            "use a file with more, or longer, texts",
        )
    return Material(data, texts)


def _usable(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if len(text.split()) > WORDS]


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
