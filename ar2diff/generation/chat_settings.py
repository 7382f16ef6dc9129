"""Sampler options as a user types them in a chat: `key=value key=value`."""

from __future__ import annotations

import shlex
from typing import Any

from ..core.errors import Ar2DiffError, as_keyword, first_line, nearest, shortened
from ..core.options import FILTERS

ALIASES = {"cache": "cache_implementation", "stop": "stop_strings"}
SHORT = {name: alias for alias, name in ALIASES.items()}
SETTINGS = (
    "mode", "max_new_tokens", "min_new_tokens", "block_length", "threshold", "steps_per_block",
    "entropy_bound", "order", "remask", "edit_threshold", "corrector_steps", "edit_blocks",
    "cfg_scale", "draft_length", "draft_nodes", "cache", "temperature",
    *FILTERS, "repetition_penalty", "stop", "max_time", "seed",
)  # fmt: skip
EXAMPLE = "type /set threshold=0.8, for example"


def as_setting(name: str, value: str | None) -> str:
    """How the chat writes an option."""
    return as_keyword(SHORT.get(name, name), value)


def parse_settings(text: str) -> dict[str, Any]:
    """Options by their names in `generate`, from "key=value key=value"; None for an empty value.

    Raises:
        Ar2DiffError: a key that does not exist, or a word without a value.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Ar2DiffError(
            f"/set {shortened(text)} cannot be read ({first_line(error)})", "close the quotes"
        ) from None
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise Ar2DiffError(f"{shortened(word)} is not of the form key=value", EXAMPLE)
        if name not in SETTINGS and name not in ALIASES.values():
            raise Ar2DiffError(
                f"there is no option {shortened(name)}{nearest(name, SETTINGS)}",
                "type /show to see the options",
            )
        name = ALIASES.get(name, name)
        values[name] = value_of(name, value)
    if not values:
        raise Ar2DiffError("/set needs key=value", EXAMPLE)
    return values


def value_of(name: str, text: str) -> Any:
    """The value of an option, from its text; None if that is empty."""
    if not text:
        return None
    if name == "stop_strings":
        return [text.replace("\\n", "\n")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text  # an option that takes a number will refuse it
