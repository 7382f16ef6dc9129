"""Figures in words: names of metrics and settings, and numbers with as many digits as they have."""

from __future__ import annotations

import math
from collections.abc import Sequence

NAMES = {
    "tokens_per_second": "speed",
    "tokens_per_forward": "tokens per forward",
    "seconds_to_first_text": "time to first text",
    "seconds_per_token": "time per token",
    "seconds_per_token_p50": "time per token, median",
    "seconds_per_token_p95": "time per token, 95th percentile",
    "p_cache": "tokens per row processed",
    "peak_bytes": "peak memory",
    "acceptance": "drafts accepted",
    "bound": "bound on the NLL",
    "ar_nll": "exact NLL",
    "bits_per_byte": "exact NLL per byte",
    "bound_bits_per_byte": "bound on the NLL per byte",
    "exact_match": "exact match",
    "base_nll": "NLL of its text under the base",
    "entropy": "entropy of its text",
    "distinct_2": "distinct pairs",
    "repeated_4grams": "repeated 4-grams",
    "same_as_ar": "same text as AR mode",
    "stopped": "ended by themselves",
    "answer_tokens": "length of the answer",
    "infill_exact_match": "gaps filled exactly",
    "infill_base_nll": "NLL of the filled text under the base",
    "infill_ar_nll": "NLL of the true middle, left side given",
    "infill_bound": "bound on the NLL of the true middle, both sides given",
    "forced_kept": "forced tokens kept",
    "revision_exact_match": "exact match after an edit",
    "revision_forwards": "forwards for a revision",
    "constrained_matches": "match",
    "constrained_exact_match": "right content",
    "constrained_base_nll": "NLL of the filled text under the base",
    "constrained_forwards": "forwards a gap",
    "constrained_seconds": "time a gap",
}
AXES = {"batch": "batch", "slot": "slot", "prompt": "prompt", "answer": "answer",
        "temperature": "temperature", "position": "position",
        "constraint": "constraint"}  # fmt: skip
UNITS = {
    "batch": "rows",
    "slot": "draft",
    "prompt": "tokens",
    "answer": "tokens",
    "position": "tokens",
}
SCALES = {  # unit: [(smallest value, divisor, name)]
    "s": [(1, 1, "s"), (1e-3, 1e-3, "ms"), (0, 1e-6, "µs")],
    "bytes": [(1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (0, 1e3, "kB")],
}
MINUS = "\u2212"
SPACE = "\u00a0"  # between a number and its unit or its error, which stay on one line


def name_of(metric: str) -> str:
    """What a metric is called in a sentence."""
    return NAMES.get(metric) or metric.removeprefix("task:").replace("_", " ")


def scale_of(unit: str, values: Sequence[float]) -> tuple[float, str]:
    """The divisor and the unit with which values are shown together, by the largest of them."""
    largest = max(map(abs, values), default=0.0)
    for smallest, divisor, shown in SCALES.get(unit, ()):
        if largest >= smallest:
            return divisor, shown
    return 1, unit


def number(value: float, error: float | None = None, sign: bool = False) -> str:
    """A value with the decimals that matter: one digit of its standard error, two if the first is 1
    or 2; without an error, three digits of its own.

    Args:
        sign: write a plus, too.
    """
    digits = 3 if not error else 2 if f"{error:e}"[0] in "12" else 1
    decimals = min(max(_decimals(error or value, digits), 0), 6)
    if not error and value == int(value):
        decimals = 0
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    if not float(text.replace(",", "")):
        text = text.lstrip("-+")
    return text.replace("-", MINUS)


def quantity(value: float, error: float | None = None, unit: str = "", sign: bool = False) -> str:
    """A value with its standard error and its unit: `812 ± 9 tokens/s`."""
    divisor, shown = scale_of(unit, [value])
    return f"{with_error(value / divisor, error and error / divisor, sign)}{SPACE}{shown}".strip()


def with_error(value: float, error: float | None, sign: bool = False) -> str:
    """A value with its standard error: `812.0 ± 9.1`."""
    text = number(value, error, sign)
    return f"{text}{SPACE}±{SPACE}{number(error, error)}" if error else text


def joined(parts: Sequence[str], word: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = parts
    return f"{', '.join(most)} {word} {last}" if most else last


def in_turn(runs: list[str]) -> str:
    """Runs one after the other; a comma keeps apart those that are lists themselves."""
    if len(runs) == 2 and " and " not in "".join(runs):
        return " and ".join(runs)
    return ", ".join([*runs[:-1], f"and {runs[-1]}"]) if runs[1:] else runs[0]


def label(subject: str, setting: str | None, metric: str | None = None) -> str:
    """The name of a curve or row: the setting for the model itself, and whose it is for others."""
    parts = [None if subject == "model" and (setting or metric) else subject, setting, metric]
    return ": ".join(part for part in parts if part)


def capital(text: str) -> str:
    """A text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _decimals(value: float, digits: int = 2) -> int:
    """Decimals that show so many digits of a value."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else 0
