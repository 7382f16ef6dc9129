"""The automaton of a regular expression over the tokens of a tokenizer, made by outlines-core.

An expression of a few characters may have an automaton of millions of states. So it is made in a
process of its own, whose time and memory are limited: this file, run as a script.
This file is copied into converted folders: it imports numpy and its neighbours alone, and
outlines-core only in the other process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

MOST_STATES = 50_000
SECONDS = 60
MEMORY = 8 << 30  # bytes
TOO_MANY = "too many states"
# What ends a text while an index is made: a character that is none. The library stops reading where
# the first of several alternatives matches, so that "a|ab" would never be "ab", and drops a token
# that ends one byte behind a place where a text may end, such as `1.` on the way from 1 to 1.5.
# With something to follow, it has to go on.
TERMINATOR = "\U0010ffff"
KEPT = 64  # automata of a tokenizer that are kept, the last ones made
FOUND: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def automaton_of(
    patterns: Sequence[str],
    tokenizer: Any,
    vocabulary: int,
    end_ids: Collection[int],
    impossible: Collection[int],
) -> Any:
    """The automaton of regular expressions, one start for each, which a whole text has to match. As
    long as the tokenizer is kept, so are the last ones made.

    Args:
        vocabulary, end_ids, impossible: as of `Automaton.of_edges`.

    Raises:
        Ar2DiffError: an expression is not valid, its automaton is too large, or no text that the
            tokenizer can write matches it; outlines-core is not installed.
    """
    from .automaton import Automaton
    from .errors import Ar2DiffError

    known = FOUND.setdefault(tokenizer, {})
    key = (*patterns,), vocabulary, frozenset(end_ids), frozenset(impossible)
    if key not in known:
        starts, accepting, edges = [], [], []
        for pattern in patterns:
            start, final, own = _made(pattern, tokenizer, vocabulary, key[2] | key[3])
            shift = 1 + max(
                (int(max(e[0].max(), e[2].max())) for e in edges if len(e[0])), default=-1
            )
            starts.append(start + shift)
            accepting += [state + shift for state in final]
            edges.append((own[0] + shift, own[1], own[2] + shift))
        joined = tuple(np.concatenate(column) for column in zip(*edges, strict=True))
        known[key] = Automaton.of_edges(
            joined, starts, accepting, vocabulary, end_ids=end_ids, impossible=impossible
        )
        while len(known) > KEPT:
            del known[next(iter(known))]
    if known[key] is None:
        raise Ar2DiffError(
            "no text that the tokenizer can write matches the constraint",
            "use an expression for characters that its tokens have",
        )
    return known[key]


def check_installed(*modules: str) -> None:
    """Refuse a constraint if a library that it needs is missing.

    Raises:
        Ar2DiffError: it names the extra.
    """
    from .errors import Ar2DiffError

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Ar2DiffError(
                f"a constraint needs {module.replace('_', '-')}, which is not installed",
                "install it with: pip install 'ar2diff[constraints]'",
            )


def _made(pattern: str, tokenizer: Any, vocabulary: int, barred: Collection[int]) -> Any:
    """Start, accepting states and edges (states, tokens, next states) of an automaton, from the
    other process."""
    from .errors import Ar2DiffError, shortened
    from .vocabulary import token_bytes

    check_installed("outlines_core")
    tokens: dict[bytes, list[int]] = {}
    for token, text in token_bytes(tokenizer).items():
        if token < vocabulary and token not in barred:
            tokens.setdefault(text, []).append(token)
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            input=pickle.dumps((MEMORY, pattern, tokens, vocabulary, MOST_STATES)),
            capture_output=True,
            timeout=SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise _too_large(f"{SECONDS} seconds") from None
    if done.returncode < 0 or b"MemoryError" in done.stderr:
        raise _too_large(f"{MEMORY >> 20:,} MB of memory")
    if done.returncode:
        raise Ar2DiffError(
            f"the automaton cannot be made ({done.stderr.decode(errors='replace').strip()[-200:]})",
            "install numpy and outlines-core again: pip install 'ar2diff[constraints]'",
        )
    found = pickle.loads(done.stdout)
    if found == TOO_MANY:
        raise _too_large(f"{MOST_STATES:,} states")
    if isinstance(found, str):
        raise Ar2DiffError(
            f"the regular expression {shortened(pattern)} cannot be used ({found})",
            "correct it; it is matched as a whole, without ^ and $, and cannot look around",
        )
    return found


def _too_large(limit: str) -> Any:
    from .errors import Ar2DiffError

    return Ar2DiffError(
        f"the constraint needs an automaton that takes more than {limit}",
        "use a simpler expression or schema, with smaller counts, lengths and nesting",
    )


def _make() -> None:
    """What the other process does: read an expression and tokens, write edges or what is wrong."""
    import resource

    memory, *asked = pickle.load(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is out of memory aborts
    sys.stdout.buffer.write(pickle.dumps(_answer(*asked)))


def _answer(
    pattern: str, tokens: dict[bytes, list[int]], beyond: int, most: int = MOST_STATES
) -> Any:
    library, last, end = importlib.import_module("outlines_core"), beyond + 1, TERMINATOR.encode()
    vocabulary = library.Vocabulary(beyond, {**tokens, end: [*tokens.get(end, ()), last]})
    try:
        if _closes_early(pattern):
            library.Index(pattern, vocabulary)  # which has to be an expression by itself
        index = library.Index(f"(?:{pattern}){TERMINATOR}", vocabulary)
    except ValueError as error:
        return " ".join(str(error).split()).replace(TERMINATOR, "")[:200]
    found = index.get_transitions()
    if len(found) > most:
        return TOO_MANY
    final = index.get_final_states()
    accepting = sorted(state for state, after in found.items() if after.get(last) in final)
    count = [len(after) for after in found.values()]
    source = np.repeat(np.fromiter(found, np.int64, len(found)), count)
    token, target = (
        np.fromiter(
            (value for after in found.values() for value in of(after)), np.int64, sum(count)
        )
        for of in (dict.keys, dict.values)
    )
    text = token < beyond  # a final state leads to itself by the token that ends a text
    edges = tuple(values[text] for values in (source, token, target))
    return index.get_initial_state(), accepting, edges


def _closes_early(pattern: str) -> bool:
    """Whether an expression may close a bracket that it has not opened, as "a)|(b" does."""
    depth = 0
    for mark in re.findall(r"\\.|[()]", pattern, re.DOTALL):
        depth += (mark == "(") - (mark == ")")
        if depth < 0:
            return True
    return False


if __name__ == "__main__":
    _make()
