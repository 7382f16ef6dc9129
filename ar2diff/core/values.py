"""Reading and checking the value of each option of `generate`.

This file is copied into converted folders: it imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import Ar2DiffError, option, shortened

LARGE = 1e6  # logits times this are still finite
MANY = 2**31 - 1  # no row has more of anything


class Source:
    """Reads an option from the first place that sets it.

    Args:
        kwargs: arguments of the call.
        configs: generation configs, in order of precedence.

    Raises:
        Ar2DiffError: one of the configs is not a generation config.
    """

    def __init__(self, kwargs: Mapping[str, Any], configs: Sequence[Any] = ()):
        for config in configs:
            if config is not None and not hasattr(config, "__dict__"):
                raise Ar2DiffError(
                    f"{option('generation_config')} is of type {type(config).__name__}",
                    "pass a GenerationConfig from transformers",
                )
        self.places = [kwargs, *(vars(config) for config in configs if config is not None)]

    def __call__(self, name: str, default: Any = None) -> Any:
        """The value of an option; None counts as not set."""
        for place in self.places:
            if place.get(name) is not None:
                return place[name]
        return default

    def above(self, name: str, other: str) -> bool:
        """Whether `name` is set nearer to the call than `other`."""
        for place in self.places:
            if place.get(name) is not None:
                return place.get(other) is None
            if place.get(other) is not None:
                return False
        return False


def bad(name: str, value: Any, wanted: str) -> Ar2DiffError:
    """The error for an option with an invalid value."""
    return Ar2DiffError(f"{option(name)} is {shortened(value)}", f"set it to {wanted}")


def one_of(get: Source, name: str, allowed: Sequence[str], default: str) -> str:
    """One of a few words."""
    value = get(name, default)
    if value not in allowed:
        raise bad(name, value, f"one of {', '.join(allowed)}")
    return value


def integer(get: Source, name: str, default: int | None, least: int) -> Any:
    """An integer of at least `least`, or the default."""
    value = get(name, default)
    if value is not None and not (is_integer(value) and value >= least):
        raise bad(name, value, f"an integer of at least {least}")
    return None if value is None else min(int(value), MANY)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer; 2.0 is one, True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0


def number(
    get: Source,
    name: str,
    default: float | None,
    least: float,
    most: float | None = None,
    above: bool = False,
) -> Any:
    """A finite number from `least` to `most`, or the default.

    Args:
        above: `least` itself is not allowed.
    """
    value = get(name, default)
    if value is None:
        return None
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
    low = finite and (value < least or (above and value == least))
    if not finite or low or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most:g}"
        raise bad(name, value, f"a number {'above' if above else 'of at least'} {least:g}{upper}")
    return float(value)


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: none, one or several."""
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(value, Iterable) and not isinstance(value, str)
    ids = tuple(i for i in (value if several else [value]) if i is not None)
    if not all(is_integer(i) for i in ids):
        raise bad(name, value, "a token id or a list of token ids")
    return tuple(map(int, ids))


def token_id(get: Source, name: str) -> int | None:
    """One token id, or none."""
    ids = token_ids(name, get(name))
    if len(ids) > 1:
        raise bad(name, get(name), "a single token id")
    return ids[0] if ids else None


def text(name: str, value: Any) -> str | None:
    """A text, or None."""
    if value is not None and not isinstance(value, str):
        raise bad(name, value, "a text")
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Texts: none, one or several."""
    found = (value,) if isinstance(value, str) else value or ()
    if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise bad(name, value, "a text or a list of texts")
    return tuple(found)


def json_text(name: str, value: Any) -> str | None:
    """A JSON object as a text, from one or from a mapping."""
    if value is None:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(found)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise bad(name, value, "a JSON object, as a dictionary or a text")
    return text


def seeds(name: str, value: Any) -> int | tuple[int, ...] | None:
    """A seed for all rows, or one for each."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, int):
        return value
    found = () if isinstance(value, (str, float)) else tuple(value)
    if not found or not all(is_integer(seed) for seed in found):
        raise bad(name, value, "an integer or a list with one for each row")
    return tuple(int(seed) for seed in found)


def token_bias(name: str, value: Any) -> dict[tuple[int, ...], float] | None:
    """{(token,): what is added to its logit}, from either form that transformers takes."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else value or ()
        bias = {tuple(key): float(added) for key, added in pairs}
    except (TypeError, ValueError, OverflowError):
        bias = {(): 0.0}
    if any(len(key) > 1 for key in bias):
        raise Ar2DiffError(
            f"{option(name)} for a sequence of several tokens needs the text to their left, "
            "which a denoiser has not written yet",
            "set biases for single tokens only",
        )
    if not all(
        key and is_integer(key[0]) and key[0] >= 0 and added <= LARGE for key, added in bias.items()
    ):
        raise bad(name, value, f"{{(token,): bias}}, with biases of at most {LARGE:g}")
    return bias or None
