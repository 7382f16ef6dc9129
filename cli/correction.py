"""What to type instead of a wrong command line."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from ..core.errors import Ar2DiffError, shortened
from .habits import NO_OPTION, NO_VERB, OPTIONS, VERBS
from .usage import USAGE

MOST = 10  # mistakes that are corrected in one line
BOOLEANS = ("true", "false", "True", "False")


@dataclass(frozen=True)
class Correction:
    """Of one mistake.

    Attributes:
        what: what is wrong.
        line: the arguments without the mistake; None if only a person can say what was meant.
        fix: what to do if there is no such line.
    """

    what: str
    line: list[str] | None
    fix: str = ""


def explain(error: USAGE, arguments: list[str]) -> Ar2DiffError:
    """The error for a command line that does not parse: what is wrong with it and, where that can
    be told, the line to type instead, with its other mistakes corrected too.

    Args:
        arguments: those of the command line, without the name of the program.
    """
    first = correct(error, arguments)
    line = first.line
    for _ in range(MOST):
        if line is None or {"-h", "--help"} & set(line):
            break
        try:
            parse(error.ctx.find_root().command, line)
            break
        except USAGE as later:
            further = correct(later, line).line
            if further is None:
                break
            line = further
    if line is None:
        return Ar2DiffError(first.what, first.fix)
    return Ar2DiffError(first.what, f"type this instead: {shlex.join(['ar2diff', *line])}")


def parse(command: Any, line: list[str]) -> None:
    """Parse a command line without running it."""
    context, name = None, "ar2diff"
    while isinstance(command, TyperGroup):
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        if not line or line[0].startswith("-"):
            return
        name, command, line = command.resolve_command(context, line)
    command.make_context(name, list(line), parent=context)


def correct(error: USAGE, arguments: list[str]) -> Correction:
    """The correction of the mistake that an error is about."""
    by_name = {
        "UnknownVerb": _verb,
        "NoSuchOption": _option,
        "MissingParameter": _missing,
        "BadOptionUsage": _usage,
        "ExtraWords": _extra,
        "BadParameter": _value,
    }
    found = by_name.get(type(error).__name__, _other)
    return found(error, list(arguments))


def _verb(error: Any, line: list[str]) -> Correction:
    group, depth, name = error.ctx.command, _depth(error.ctx), error.name
    what = f"{' '.join(['ar2diff', *line[:depth]])} has no verb {shortened(name)}"
    rest = line[depth + 1 :]
    if name == "help" and rest:
        return Correction(what, [*line[:depth], *rest, "--help"])
    for words in (verb.split() for verb in VERBS.get(name.lower(), ())):
        if words[0] in group.commands or words[0].startswith("--"):
            return Correction(what, [*line[:depth], *words, *rest])
        if words[0] in error.ctx.find_root().command.commands:
            return Correction(what, [*words, *rest])
    if not depth and name.lower() in NO_VERB:
        return Correction(what, None, NO_VERB[name.lower()])
    if near := difflib.get_close_matches(name[:100], group.commands, 1, 0.6):
        return Correction(what, [*line[:depth], near[0], *rest])
    verbs = ", ".join(group.commands)
    if not depth and name.endswith((".yaml", ".yml")):
        return Correction(what, ["adapt", "MODEL", "--recipe", *line])
    if not depth and ("/" in name or Path(name[:100]).exists()):
        return Correction(what, None, f"put a verb before it, one of {verbs}")
    return Correction(what, None, f"use one of {verbs}")


def _option(error: Any, line: list[str]) -> Correction:
    context, given = error.ctx, error.option_name
    place = next((n for n, token in enumerate(line) if token.startswith(given)), None)
    if place is None:
        return _other(error, line)
    flag, _, inline = line[place].partition("=")
    word = flag.lstrip("-").replace("-", "_")
    word = word if word in OPTIONS else word.lower()
    depth = _depth(context)
    verb = " ".join(line[:depth]) or "ar2diff"
    what = f"{verb} has no option {flag}"
    if isinstance(context.command, TyperGroup):
        if "version" in OPTIONS.get(word, ()) and not depth:
            return Correction(what, ["--version"])
        return Correction(what, None, "put the verb first, as in: ar2diff adapt MODEL --data FILE")
    before, rest = line[:place], line[place + 1 :]
    value = inline or None
    if value is None and rest and not re.match(r"-[^\d.]|--", rest[0]):
        value, rest = rest[0], rest[1:]
    parameters = _parameters(context.command)
    for name in (word, *OPTIONS.get(word, ())):
        if name in parameters:
            return Correction(what, _with(context, parameters[name], value, before, rest))
    if word in NO_OPTION:
        return Correction(what, None, NO_OPTION[word])
    if "overrides" in parameters:
        setting = _setting(word, value, verb)
        if setting is not None:
            return Correction(what, _appended([*before, *rest], setting))
    if near := difflib.get_close_matches(word[:100], parameters, 1, 0.7):
        return Correction(what, _with(context, parameters[near[0]], value, before, rest))
    keys = " and 'ar2diff config schema' the keys of a recipe" if "overrides" in parameters else ""
    return Correction(what, None, f"'ar2diff {verb} --help' lists its options{keys}")


def _setting(word: str, value: str | None, verb: str) -> str | None:
    """The override of a recipe that an option stands for."""
    from ..config.recipe import Recipe
    from ..config.schema import describe_fields
    from ..config.synonyms import key_meant

    kinds = {name: kind for name, kind, _, _ in describe_fields(Recipe)}
    key = key_meant(word, kinds, verb)
    if key is None or "=" in key:
        return key
    if value is None:
        value = "true" if kinds[key] == "bool" else "VALUE"
    return f"{key}={value}"


def _with(
    context: Any, parameter: Any, value: str | None, before: list[str], rest: list[str]
) -> list[str]:
    """The line with a parameter set to a value, where another option was."""
    flag = _flag(parameter)
    if getattr(parameter, "is_flag", False):
        # A flag has no value: what follows it is an argument, unless --resume was to name a folder.
        kept = [] if value in (None, *BOOLEANS) or flag == "--resume" else [value]
        return [*before, flag, *kept, *rest]
    value = _placeholder(parameter) if value is None else value
    if flag.startswith("--"):
        return [*before, flag, value, *rest]
    arguments = [p for p in context.command.params if not _flag(p).startswith("--")]
    if parameter is not arguments[0]:
        return _appended([*before, *rest], value)
    depth = _depth(context)
    return [*before[:depth], value, *before[depth:], *rest]


def _missing(error: Any, line: list[str]) -> Correction:
    parameter, verb = error.param, " ".join(line[: _depth(error.ctx)])
    name = parameter.opts[0] if _flag(parameter).startswith("--") else _placeholder(parameter)
    told = (parameter.help or "").rstrip(".")
    what = f"{verb} needs {name}" + (f": {told[0].lower()}{told[1:]}" if told else "")
    if name.startswith("--"):
        return Correction(what, [*line, name, _placeholder(parameter)])
    return Correction(what, _with(error.ctx, parameter, None, line, []))


def _usage(error: Any, line: list[str]) -> Correction:
    """An option without its value, or a flag with one."""
    flag = error.option_name
    parameter = next(p for p in error.ctx.command.params if flag in p.opts)
    if getattr(parameter, "is_flag", False):
        bare = [flag if token.startswith(f"{flag}=") else token for token in line]
        return Correction(f"{flag} takes no value", bare)
    return Correction(f"{flag} needs a value", [*line, _placeholder(parameter)])


def _extra(error: Any, line: list[str]) -> Correction:
    words, context = error.words, error.ctx
    verb, parameters = " ".join(line[: _depth(context)]), _parameters(context.command)
    shown = ", ".join(map(shortened, words))
    what = f"{verb} takes no argument{'s' if len(words) > 1 else ''} {shown}"
    kept = [token for token in line if token not in words]
    settings = [word.partition("=") for word in words]
    if all(equals and name in parameters for name, equals, _ in settings):
        for name, _, value in settings:
            kept = _with(context, parameters[name], value, kept, [])
        return Correction(f"{verb} takes options, not recipe keys: {shown}", kept)
    if "prompt" in parameters:
        return Correction(what, [*kept, "--prompt", " ".join(words)])
    if verb == "chat":
        return Correction(what, ["generate", *kept[1:], "--prompt", " ".join(words)])
    return Correction(what, kept)


def _value(error: Any, line: list[str]) -> Correction:
    """A value of the wrong type."""
    flag = _flag(error.param)
    kinds = {"valid integer": "a whole number", "valid number": "a number"}
    kind = next((kind for words, kind in kinds.items() if words in error.message), None)
    verb = " ".join(line[: _depth(error.ctx)])
    fix = f"'ar2diff {verb} --help' says what it may be"
    if kind is None:
        told = error.message.removeprefix("Value error, ").rstrip(".")  # pydantic's words
        return Correction(f"{flag}: {told}", None, fix)
    given = [token for at, token in enumerate(line) if line[at - 1] == flag or flag in token]
    value = given[-1].removeprefix(f"{flag}=")
    return Correction(f"{flag} takes {kind}, not {shortened(value)}", None, fix)


def _other(error: Any, line: list[str]) -> Correction:
    verb = " ".join(["ar2diff", *line[: _depth(error.ctx) if error.ctx else 0]])
    return Correction(error.format_message(), None, f"run '{verb} --help' to see the usage")


def _depth(context: Any) -> int:
    """How many words of the line name the command."""
    depth = 0
    while context.parent is not None:
        context, depth = context.parent, depth + 1
    return depth


def _parameters(command: Any) -> dict[str, Any]:
    """The parameters of a command by their names and flags."""
    named = {_flag(p).removeprefix("--").replace("-", "_"): p for p in command.params}
    return {**named, **{p.name: p for p in command.params}}


def _flag(parameter: Any) -> str:
    """The flag of an option, or the name of an argument."""
    return max(parameter.opts, key=len)


def _placeholder(parameter: Any) -> str:
    return (parameter.metavar or parameter.name).upper()


def _appended(line: list[str], word: str) -> list[str]:
    """The line with one more argument, before what is for the launcher."""
    end = line.index("--") if "--" in line else len(line)
    return [*line[:end], word, *line[end:]]
