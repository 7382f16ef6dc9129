"""Amounts in words, as a run tells them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"))  # below 10,000 a count is written out
WIDTH = 80  # columns that a line of a run fits in


def amount(count: float) -> str:
    """A count in at most five characters: `1,638`, `16.4k`, `1.64M`, `7.62B`."""
    for least, unit in UNITS:
        if count >= least:
            return f"{count / (1e3 if unit == 'k' else least):.3g}{unit}"
    return f"{count:,.0f}"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9: `0.08 GB`, `16.3 GB`."""
    return f"{size / 1e9:.{1 if size >= 1e9 else 2}f} GB"


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fitted_line(parts: Iterator[str] | list[str], room: int = WIDTH) -> str:
    """Parts of a line, two spaces between them; those at the end that do not fit are left out."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > room:
            break
        line = longer
    return line
