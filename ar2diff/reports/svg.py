"""Drawings by matplotlib, as SVG: one look for all of them, the same bytes for the same data.
matplotlib is imported where something is drawn."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

INSTALL = "pip install 'ar2diff[plot]'"


@dataclass(frozen=True)
class Shade:
    """The colours of a page, as `#rrggbb`.

    Attributes:
        page, text, grid: of the background, of letters and axes, and of the lines of a grid.
        colors: of curves. Neighbours differ for readers who are colour blind, too, and each has a
            contrast of at least 3 to the page.
    """

    page: str
    text: str
    grid: str
    colors: tuple[str, ...]


LIGHT = Shade(
    "#ffffff", "#1f2328", "#d8dee4",
    ("#0072b2", "#b94d00", "#007a5a", "#a8458f", "#8a6d00", "#4a4ec4"),
)  # fmt: skip
DARK = Shade(
    "#0d1117", "#e6edf3", "#30363d",
    ("#56b4e9", "#ff9a52", "#3fcf9f", "#eba0d8", "#e3c53a", "#a3a6ff"),
)  # fmt: skip


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def canvas(
    width: float, height: float, shade: Shade = LIGHT, looks: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """A matplotlib figure to draw into, within the style that all drawings share.

    Args:
        width, height: in inches.
        looks: further values of matplotlib's rcParams.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    own = {
        "svg.hashsalt": "ar2diff", "svg.fonttype": "path", "font.size": 9,
        "text.color": shade.text, "text.parse_math": False, "axes.facecolor": shade.page,
        "axes.edgecolor": shade.grid, "axes.labelcolor": shade.text, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": shade.grid, "grid.linewidth": 0.6,
        "xtick.color": shade.text, "ytick.color": shade.text, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.6,
        "lines.markersize": 3.5,
    }  # fmt: skip
    with style.context(["default", own | dict(looks or {})]):
        figure = Figure((width, height), facecolor=shade.page, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        yield figure


def to_svg(figure: Any) -> bytes:
    """A figure as an SVG file. To be called within its `canvas`."""
    drawn = BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def to_html(figure: Any, name: str, title: str) -> str:
    """A figure as an element of an HTML page: it scales, its letters are the page's, and its
    colours are the CSS variables of `css`. To be called within its `canvas`, of shade `LIGHT`.

    Args:
        name: of the drawing, unlike that of any other on the page; a valid beginning of an id.
        title: what a screen reader says.
    """
    drawn = to_svg(figure).decode()
    drawn = drawn[drawn.index("<svg") :].replace("xlink:href", "href")
    drawn = re.sub(r"<(metadata|style)\b.*?</\1>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # nothing refers to groups
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    drawn = re.sub(r"\s*\n\s*", "\n", drawn)
    for variable, color in _variables(LIGHT):
        drawn = drawn.replace(color, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', drawn)[0]
    head = f'<svg {box} role="img" aria-labelledby="{name}-title"><title id="{name}-title">'
    return head + f"{escape(title)}</title>" + drawn[drawn.index(">") + 1 :].strip()


def css(shade: Shade) -> str:
    """The declarations of the variables that `to_html` uses."""
    return " ".join(f"{variable}: {color};" for variable, color in _variables(shade))


def _variables(shade: Shade) -> list[tuple[str, str]]:
    named = [("--page", shade.page), ("--text", shade.text), ("--grid", shade.grid)]
    return named + [(f"--curve-{n}", color) for n, color in enumerate(shade.colors)]
