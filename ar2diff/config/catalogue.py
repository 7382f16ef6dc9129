"""What the recipes that ship with ar2diff are for, as the comments at their beginning say."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from .recipe import load_recipe, recipe_names, recipe_text

HARDWARE = re.compile(r"(?:Hardware: (?:meant for )?|Needs: )(.+?)(?:[,.]| \(| for | and )")
PROGRAMS = ("ar2diff", "make", "python")  # how a line of a header begins that is a command


@dataclass(frozen=True)
class Entry:
    """A recipe that ships.

    Attributes:
        verb: the verb to use it with. model: the model that it is meant for. hardware: what it is
            meant to run on. measured: whether it was run as it is, with the result in its header.
        description: the recipe's own.
    """

    verb: str
    model: str
    hardware: str
    measured: bool
    description: str


def catalogue() -> dict[str, Entry]:
    """The recipes that ship, by name."""
    return {name: _entry(name) for name in recipe_names()}


def _entry(name: str) -> Entry:
    text = header(name)
    named = [line[1] for line in commands(name) if line[0] == "ar2diff" and name in line]
    model = re.search(r"^Model: (.+?)\.$", text, re.MULTILINE)
    hardware = HARDWARE.search(text)
    return Entry(
        verb=named[0] if named else "adapt",  # make and the demo adapt
        model=model[1] if model else "",
        hardware=hardware[1] if hardware else "",
        measured="Not run" not in text,
        description=load_recipe(name).description,
    )


def header(name: str) -> str:
    """The comment that a recipe begins with."""
    lines = recipe_text(name).splitlines()
    first = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:first])


def commands(name: str) -> list[list[str]]:
    """The commands in the header of a recipe, each as its words."""
    lines = re.sub(r"\\\n\s*", " ", header(name)).splitlines()
    indented = [shlex.split(line) for line in lines if line.startswith("  ")]
    return [words for words in indented if words[0] in PROGRAMS]
