"""How the pictures of a report are drawn: what each subject and setting looks like, a picture with
its legend, and values over an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import Figure, Report
from .pairs import SURE
from .svg import LIGHT, canvas, to_html
from .words import AXES, UNITS, label, name_of, scale_of

WIDTH, HEIGHT = 4.6, 3.1  # inches; at this width letters can be read on a phone
LETTERS = {"svg.fonttype": "none", "font.size": 10, "legend.fontsize": 9, "lines.markersize": 5}
LONG = 30  # letters of a legend's entry, of which two do not fit beside each other, and of a line
MARKERS = "osD^vPX*"
BARS = {"elinewidth": 1.0, "capsize": 2.5}
# Subjects that are compared with are drawn in the colour of the letters.
NEUTRAL = {"base": "--", "control": ":"}


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: of the picture, as a part of an id. title: what it shows.
        note: how to read it. svg: an element of an HTML page.
    """

    name: str
    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """A named series of figures."""

    name: str
    look: dict[str, Any]
    points: list[Figure]


class Looks:
    """Colour, marker and line of every subject and setting: the same in all pictures."""

    def __init__(self, report: Report):
        self._known: dict[Any, dict[str, Any]] = {}
        pairs = dict.fromkeys((f.subject, f.setting) for f in report.figures)
        own = 0
        for subject, setting in pairs:
            neutral = next((dash for who, dash in NEUTRAL.items() if who == subject), None)
            marker = MARKERS[len(self._known) % len(MARKERS)]
            color = LIGHT.text if neutral else LIGHT.colors[own % len(LIGHT.colors)]
            dash = neutral or ("-" if own < len(LIGHT.colors) else "-.")
            own += neutral is None
            self._known[subject, setting] = {"color": color, "marker": marker, "linestyle": dash}

    def of(self, subject: str, setting: str | None) -> dict[str, Any]:
        """The look of a subject at a setting, as arguments of matplotlib."""
        return self._known[subject, setting]

    def curves(self, figures: Sequence[Figure]) -> list[Curve]:
        """Figures as curves, one for each subject and setting."""
        pairs = dict.fromkeys((f.subject, f.setting) for f in figures)
        return [
            Curve(label(*pair), self.of(*pair),
                  [f for f in figures if (f.subject, f.setting) == pair])
            for pair in pairs
        ]  # fmt: skip


def drawn(
    name: str, title: str, note: str, draw: Callable[[Any], None], legend: Sequence[str] = ()
) -> Plot:  # fmt: skip
    """A picture of one panel with its legend below.

    Args:
        draw: draws into matplotlib's axes. legend: the names of what it draws there.
    """
    columns = 2 if max(map(len, legend), default=0) <= LONG else 1
    rows = -(-len(legend) // columns)
    with canvas(WIDTH, HEIGHT + 0.19 * rows, looks=LETTERS) as figure:
        axes = figure.subplots()
        draw(axes)
        if len(legend) > 1:  # of the lines alone, without their bars
            drawn = axes.get_legend_handles_labels()
            handles = [handle.lines[0] for handle in drawn[0]]
            figure.legend(handles, drawn[1], loc="outside lower center", ncols=columns,
                          handlelength=2.6, columnspacing=1.2)  # fmt: skip
        return Plot(name, title, note, to_html(figure, name, f"{title}. {note}"))


def lines(
    name: str, figures: Sequence[Figure], curves: Sequence[Curve], axis: str, title: str,
    more: Callable[[Any], None] = lambda axes: None, note: str = "",
) -> list[Plot]:  # fmt: skip
    """Values over an axis, a line for each curve; nothing if no line has two points."""
    if not any(len(curve.points) > 1 for curve in curves):
        return []
    divisor, unit = scale_of(figures[0].unit, [f.value for f in figures])

    def draw(axes: Any) -> None:
        for curve in curves:
            points = sorted(curve.points, key=lambda f: f.at[axis])
            errors = [SURE * (f.error or 0) / divisor for f in points]
            axes.errorbar([f.at[axis] for f in points], [f.value / divisor for f in points],
                          errors, label=curve.name, **curve.look, **BARS)  # fmt: skip
        axes.set_xlabel(with_unit(AXES.get(axis, axis), UNITS.get(axis, "")))
        axes.set_ylabel(with_unit(name_of(figures[0].metric), unit))
        if unit != "nats/token":
            axes.set_ylim(bottom=0)
        more(axes)

    return [drawn(name, title, note or note_on(figures[0]), draw, [curve.name for curve in curves])]


def with_unit(name: str, unit: str) -> str:
    """`speed (tokens/s)`: the label of an axis or a column; `tokens per forward` says it itself."""
    return name if not unit or name.startswith("tokens per") else f"{name} ({unit})"


def note_on(figure: Figure) -> str:
    """How to read a picture of figures like this one."""
    better = {"high": "Higher is better. ", "low": "Lower is better. ", None: ""}[figure.better]
    return f"{better}Bars are two standard errors."


def ticks(axes: Any, values: Sequence[float], log: bool = False) -> None:
    """Mark these values on the horizontal axis alone, which may be logarithmic."""
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
