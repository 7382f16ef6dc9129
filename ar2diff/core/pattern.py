"""What a text has to match, as the options say it: a regular expression, a JSON schema, choices, a
grammar.

This file is copied into converted folders: it imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .canvas import Canvas
from .constraint import Constraint
from .errors import Ar2DiffError, option
from .expression import escaped, expression_of
from .grammar import Grammar, check_grammar
from .index import automaton_of, check_installed
from .options import Options
from .schema import carried


def check_constraint(options: Options) -> None:
    """Refuse a constraint that cannot be held to, as far as that is seen without a model.

    Raises:
        Ar2DiffError: a library is missing, a schema has a keyword that is not carried, or the
            expression or grammar is not valid.
    """
    if options.grammar is not None:
        check_grammar(options.grammar)
    if pattern_of(options) is not None:
        check_installed("outlines_core")


def pattern_of(options: Options) -> str | None:
    """The regular expression that a whole text has to match; None: there is none.

    Raises:
        Ar2DiffError: as `check_constraint`.
    """
    if options.choice:
        return "|".join(map(escaped, options.choice))
    return options.regex if options.json_schema is None else _of_schema(options.json_schema)


@lru_cache(16)
def _of_schema(text: str) -> str:
    check_installed("outlines_core", "jsonschema")
    try:
        return expression_of(carried(json.loads(text)))
    except RecursionError:
        raise Ar2DiffError(
            f"{option('json_schema')} has schemas too deep within one another", "nest fewer"
        ) from None


def constraint_of(
    model: Any,
    tokenizer: Any,
    options: Options,
    canvas: Canvas,
    spaced: Sequence[Sequence[bool]] | None = None,
) -> Constraint | Grammar | None:
    """The constraint of a call on a canvas; None without one.

    Args:
        spaced: for each row, which of its gaps begin with a space that belongs to the prompt.

    Raises:
        Ar2DiffError: as `check_constraint`; or no text that matches fits the room.
    """
    pattern = pattern_of(options)
    if pattern is None and options.grammar is None:
        return None
    if tokenizer is None:
        raise Ar2DiffError("a constraint needs a tokenizer", f"pass {option('tokenizer')}")
    vocabulary = model.config.get_text_config().vocab_size
    barred = (canvas.mask_token_id, *options.suppress_tokens)
    impossible = {token for token in barred if 0 <= token < vocabulary}
    if pattern is None:
        check_grammar(options.grammar)
        return Grammar(options.grammar, canvas, tokenizer, vocabulary, impossible)
    patterns = [pattern, f" (?:{pattern})"] if any(map(any, spaced or ())) else [pattern]
    automaton = automaton_of(patterns, tokenizer, vocabulary, canvas.ends - impossible, impossible)
    return Constraint(automaton, canvas, spaced=spaced)


def validates(options: Options, text: str) -> bool:
    """Whether a text that is finished is JSON of the schema of the options; True without one."""
    if options.json_schema is None:
        return True
    library = importlib.import_module("jsonschema")
    schema = json.loads(options.json_schema)
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kind = library.validators.validator_for(schema, library.Draft202012Validator)
    return bool(kind(schema).is_valid(value))
