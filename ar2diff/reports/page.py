"""A report as one HTML file that needs nothing else: no network, no other file, and no script to be
read. Whatever the report holds is escaped; a policy in the page forbids what would get through."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..checkpoint.output import write_text
from .figures import QUESTIONS, Difference, Figure, Order, Reply, Report, Seen, check
from .pairs import SURE
from .plots import plots, with_unit
from .sentences import claims, not_measured
from .serving import serve_command
from .svg import DARK, INSTALL, LIGHT, can_draw, css
from .words import AXES, UNITS, label, name_of, number, scale_of, with_error

TITLES = {
    "speed": "Is it fast enough?",
    "quality": "Is it as good?",
    "length": "Up to which length?",
    "control": "What can it do besides?",
}
WAITING = ("seconds_to_first_text", "seconds_per_token_p50", "seconds_per_token_p95")
SMALLEST, LARGEST = 128, 224  # pixels of a picture's width on the page
SHADES = 8  # of tokens, from decided early to decided late


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Attributes:
        value: to sort by. text: as it is shown.
        beside: how far it is from another subject's, and `verdict` in a word; empty if unknown.
    """

    value: float
    text: str
    beside: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """Figures of a question that lie on the same axes.

    Attributes:
        name: of the table, as a part of an id. axes: headings of the places. heads: headings of the
            metrics.
        rows: [(whose they are, places, cells)], where a cell is None if it was not measured.
    """

    name: str
    caption: str
    axes: list[str]
    heads: list[str]
    rows: list[tuple[str, list[float | str], list[Cell | None]]] = field(default_factory=list)


def write(report: Report, path: Path) -> Path:
    """Write the page of a report; never half of it. Returns its path.

    Raises:
        Ar2DiffError: a figure would mislead, or the disk refuses.
    """
    check(report, "the report")
    drawn = plots(report)
    return write_page(
        path,
        "report",
        report=report,
        questions=QUESTIONS,
        claims=claims(report),
        plots=drawn,
        tables={question: tables(report, question) for question in QUESTIONS},
        texts=_side_by_side(report),
        orders=[_tokens_of(order) for order in report.orders],
        seen=[_pictured(seen) for seen in report.seen],
        missing=not_measured(report),
        serve=serve_command(report, report.subjects["model"].name),
    )


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page from the template of that name.

    Args:
        values: what the template shows.
    """
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"title_of": TITLES.get, "lines": _lines}
    folder = Path(__file__).with_name("templates")
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = environment.get_template(f"{template}.html.jinja").render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        light=Markup(css(LIGHT)), dark=Markup(css(DARK)),
        script=Markup(script), digest=digest, install=None if can_draw() else INSTALL, **values,
    )  # fmt: skip
    write_text(path, html)
    return path


# Tables -------------------------------------------------------------------------------------------


def tables(report: Report, question: str) -> list[Table]:
    """The figures of a question: a table for each combination of axes, of what was scored and what
    was written, and of what a single reader waits for."""
    groups: dict[tuple[str, tuple[str, ...]], list[Figure]] = {}
    for figure in report.figures:
        if figure.question == question:
            kind = "" if figure.setting is not None else "scored"
            kind = "waiting" if figure.metric in WAITING else kind
            groups.setdefault((kind, tuple(figure.at)), []).append(figure)
    return [_table(report, question, *group, figures) for group, figures in groups.items()]


def _table(
    report: Report, question: str, kind: str, axes: tuple[str, ...], figures: list[Figure]
) -> Table:
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    scales = {}
    for metric in metrics:
        chosen = [figure for figure in figures if figure.metric == metric]
        scales[metric] = scale_of(chosen[0].unit, [figure.value for figure in chosen])
    where = " and ".join(AXES.get(axis, axis) for axis in axes)
    what = {"scored": "Scored on given text", "waiting": "What a reader waits for"}.get(kind)
    table = Table(
        "-".join(part for part in ("table", question, kind, *axes) if part),
        f"{what or question.capitalize()}{f' by {where}' if where else ''}",
        [with_unit(AXES.get(axis, axis), UNITS.get(axis, "")) for axis in axes],
        [with_unit(name_of(metric), scales[metric][1]) for metric in metrics],
    )
    rows: dict[tuple[Any, ...], dict[str, Figure]] = {}
    for figure in figures:
        places = tuple(figure.at[axis] for axis in axes)
        rows.setdefault((figure.subject, figure.setting, places), {})[figure.metric] = figure
    order = list(report.subjects)
    for (subject, setting, places), found in sorted(
        rows.items(), key=lambda row: order.index(row[0][0])
    ):
        cells = [_cell(report, found[m], scales[m][0]) if m in found else None for m in metrics]
        table.rows.append((label(subject, setting), list(places), cells))
    return table


def _cell(report: Report, figure: Figure, divisor: float) -> Cell:
    text = with_error(figure.value / divisor, figure.error and figure.error / divisor)
    if figure.difference is None:
        return Cell(figure.value, text)
    beside, verdict = _beside(figure, figure.difference, divisor)
    alike = report.of(figure.question, figure.metric, subject=figure.difference.to)
    # A bound beside an exact NLL: the distance is known, but not which of the two is better.
    return Cell(
        figure.value, text, beside, verdict if alike or "bound" not in figure.metric else ""
    )


def _beside(figure: Figure, apart: Difference, divisor: float) -> tuple[str, str]:
    none, scale = (1.0, 1.0) if apart.ratio else (0.0, divisor)
    text = with_error(apart.value / scale, apart.error / scale, sign=not apart.ratio)
    text += f" × {apart.to}" if apart.ratio else f" to {apart.to}"
    if abs(apart.value - none) <= SURE * apart.error:
        return text, "none"
    if figure.better is None:
        return text, ""
    return text, "better" if (apart.value > none) == (figure.better == "high") else "worse"


# Texts --------------------------------------------------------------------------------------------


def _side_by_side(report: Report) -> dict[str, dict[str, dict[str, str]]]:
    """{question: {prompt: {text: who wrote it}}}."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for text in report.texts:
        written = found.setdefault(text.question, {}).setdefault(text.prompt, {})
        written.setdefault(text.text, []).append(label(text.subject, text.setting))
    return {
        question: {
            prompt: {text: ", ".join(who) for text, who in written.items()}
            for prompt, written in prompts.items()
        }
        for question, prompts in found.items()
    }


def _tokens_of(order: Order) -> dict[str, Any]:
    """The tokens of an answer, each with its forward and a shade from early to late."""
    last = max(order.forward, default=1)
    tokens = [
        {"text": text, "forward": forward, "sure": round(100 * sure),
         "shade": (forward - 1) * (SHADES - 1) // max(last - 1, 1)}
        for text, forward, sure in zip(order.tokens, order.forward, order.confidence, strict=False)
    ]  # fmt: skip
    return {"prompt": order.prompt, "tokens": tokens, "forwards": last}


def _pictured(seen: Seen) -> dict[str, Any]:
    """A question about images, with those who gave the same answer together."""
    replies: dict[str, list[Reply]] = {}
    for reply in seen.replies:
        replies.setdefault(reply.text, []).append(reply)
    answers = [
        {
            "text": text, "right": alike[0].right,
            "pace": "; ".join(f"{label(r.subject, r.setting)}, {_pace(r)}" for r in alike),
        }
        for text, alike in replies.items()
    ]  # fmt: skip
    pictures = []
    for picture in seen.pictures:
        size = f"{picture.width} x {picture.height} pixels"
        pictures.append(
            {"data": picture.data, "alt": f"{seen.prompt} ({size})", "size": size,
             "shown": max(SMALLEST, min(picture.width, LARGEST)),
             "dots": max(picture.width, picture.height) < SMALLEST}
        )  # fmt: skip
    return {"prompt": seen.prompt, "answer": seen.answer, "pictures": pictures, "answers": answers}


def _pace(reply: Reply) -> str:
    return f"{number(reply.tokens / max(reply.forwards, 1), 0.05)} tokens per forward"


def _lines(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of whatever a part of the protocol holds, nested names joined by blanks."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _lines(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, str(value)
