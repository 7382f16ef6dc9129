"""What a context-free grammar lets modes `ar` and `speculative` write, by llguidance.

There every token follows all before it, so the parser that has read them knows which may come next.
Mode `diffusion` has no such parser: whether undecided positions can still be filled so that the
whole text is derived, in the room that is left, is not a question of each token.
This file is copied into converted folders: it imports numpy, torch and its neighbours alone, and
llguidance where a grammar is given.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .automaton import DEAD
from .canvas import Canvas
from .errors import Ar2DiffError, first_line, option
from .index import check_installed
from .samplers import HIDDEN
from .transfer import upload
from .vocabulary import token_bytes

# Else what has to come is one token, the one that the tokenizer makes of it, and no other spelling.
HEADER = '%llguidance {"no_forcing": true}\n'
UNSPELT = "NoExtensionBias"  # what llguidance says where no token spells what has to come
KNOWN: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


@lru_cache(16)
def check_grammar(text: str) -> None:
    """Refuse a grammar before a model is there.

    Args:
        text: rules in the form of Lark that llguidance reads, of which one is `start`.

    Raises:
        Ar2DiffError: llguidance is not installed, or the grammar is not valid.
    """
    check_installed("llguidance")
    matcher = importlib.import_module("llguidance").LLMatcher
    wrong = matcher.validate_grammar(matcher.grammar_from_lark(text))  # it names the lines as given
    if wrong:
        raise _unusable(wrong)


def _unusable(wrong: str) -> Ar2DiffError:
    return Ar2DiffError(
        f"{option('grammar')} cannot be used ({first_line(wrong)})",
        "correct it: rules in Lark's form, of which one is 'start'",
    )


class Grammar:
    """A grammar that the answers of a canvas have to match. States are parsers that have read a
    part of an answer; none is ever changed.

    Args:
        vocabulary: number of ids of the model. impossible: ids that cannot be written.

    Raises:
        Ar2DiffError: no token ends a text, or the grammar names what the tokenizer does not have.
    """

    def __init__(
        self,
        text: str,
        canvas: Canvas,
        tokenizer: Any,
        vocabulary: int,
        impossible: Collection[int],
    ):
        ends = canvas.ends - {*impossible}
        if not ends:
            raise Ar2DiffError(
                f"{option('grammar')} needs a token that ends a text, and the model has none that "
                "can be written",
                f"set {option('eos_token_id')}, or take it out of {option('suppress_tokens')}",
            )
        self.canvas, self.vocabulary = canvas, vocabulary
        words = _words(tokenizer, vocabulary, ends, impossible)
        matcher = importlib.import_module("llguidance").LLMatcher
        self.start = matcher(words, matcher.grammar_from_lark(HEADER + text), log_level=0)
        if self.start.is_error():  # what `check_grammar`, without a tokenizer, cannot see
            raise _unusable(self.start.get_error())
        self.known: dict[int, tuple[int, Any]] = {}  # by row: a position, and the state before it

    def joins(self, other: Any) -> bool:
        """Whether rows of the other one can be read beside these; both are of the same options."""
        return isinstance(other, Grammar)

    def joined(self, _other: Grammar, canvas: Canvas) -> Grammar:
        """The grammar on a canvas that holds the rows of both."""
        own = copy(self)
        own.canvas, own.known = canvas, {}
        return own

    def selected(self, _rows: Sequence[int], canvas: Canvas) -> Grammar:
        """The grammar on a canvas that holds some of the rows."""
        return self.joined(self, canvas)

    def state(self, row: int, front: int) -> Any:
        """The parser after the first tokens of a row, as many as `front`; `DEAD` if they are not
        the beginning of a text that matches."""
        begin = int(self.canvas.prompt[row]), self.start
        at, state = self.known.get(row, begin)
        if at > front:  # a row that is over has read more than its text
            at, state = begin
        for token in self.canvas.ids[row, at:front].tolist():
            state = self.step(state, token)
        self.known[row] = front, state
        return state

    def step(self, state: Any, token: int) -> Any:
        """The parser after one more token; `DEAD` if it does not fit. An end token leaves the
        parser of a text that matches as it is."""
        if state != DEAD and token in self.canvas.ends:
            return state if state.is_accepting() else DEAD
        if state == DEAD or not state.validate_tokens([token]):
            return DEAD
        state = state.deep_copy()
        state.consume_token(token)
        return state

    def allowed(
        self, rows: Sequence[int], positions: Sequence[int], states: Sequence[Any]
    ) -> Tensor:
        """[N, V] bool, the tokens that may come after states; any after `DEAD`, about which nobody
        asks."""
        return torch.stack([self._after(state) for state in states])

    def reachable(self, row: int, front: int, count: int) -> Tensor:
        """[count, V] bool, the tokens that may come next, then any."""
        found = torch.ones(count, self.vocabulary, dtype=torch.bool)
        found[:1] = self._after(self.state(row, front))
        return found

    def masked(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Logits [N, V] without the tokens that are not allowed [N, V]."""
        (fits,) = upload(logits.device, allowed)
        return logits.masked_fill(~fits, HIDDEN)

    def tokens(self, allowed: Tensor) -> Tensor:
        """The same, [N, V]: what `allowed` gives are tokens."""
        return allowed

    def whole(self, row: int, end: int) -> bool:
        """Whether what stands in a row up to a position matches."""
        state = self.state(row, end)
        return state != DEAD and state.is_accepting()

    def _after(self, state: Any) -> Tensor:
        """[V] bool, the tokens that may come after a parser's. Where there is none, because no
        token of the vocabulary spells what has to come, it allows an end token."""
        if state == DEAD:
            return torch.ones(self.vocabulary, dtype=torch.bool)
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        if state.is_error() and first_line(state.get_error()) != UNSPELT:
            raise Ar2DiffError(
                f"{option('grammar')} takes too much to parse ({first_line(state.get_error())})",
                "use a simpler grammar",
            )
        fits = np.unpackbits(bits, count=self.vocabulary, bitorder="little")
        return torch.from_numpy(fits.astype(bool))


class _Words:
    """A vocabulary in the form that llguidance asks for."""

    def __init__(self, tokens: list[bytes], ends: Collection[int]):
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, min(ends), None
        self.special_token_ids = [token for token, text in enumerate(tokens) if not text]
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("nothing is forced, so nothing is tokenized")


def _words(
    tokenizer: Any, vocabulary: int, ends: Collection[int], impossible: Collection[int]
) -> Any:
    """The tokens that can be written, as llguidance reads them; kept as long as the tokenizer."""
    known = KNOWN.setdefault(tokenizer, {})
    key = vocabulary, frozenset(ends), frozenset(impossible)
    if key not in known:
        tokens = [b""] * vocabulary
        for token, text in token_bytes(tokenizer).items():
            if token < vocabulary and token not in key[1] and token not in key[2]:
                tokens[token] = text
        library = importlib.import_module("llguidance")
        known[key] = library.LLTokenizer(
            _Words(tokens, ends), n_vocab=vocabulary, eos_token=sorted(ends)
        )
    return known[key]
