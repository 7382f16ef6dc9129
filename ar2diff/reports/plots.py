"""The pictures of a report, each for a light and a dark page. Bars are two standard errors, so that
what they do not separate is no difference."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from .drawing import (
    BARS,
    LONG,
    MARKERS,
    NEUTRAL,
    Curve,
    Looks,
    Plot,
    drawn,
    lines,
    note_on,
    ticks,
    with_unit,
)
from .figures import Figure, Order, Report
from .pairs import SURE, marks, quality_at, written
from .svg import LIGHT, can_draw
from .words import capital, label, name_of, scale_of


def plots(report: Report) -> dict[str, list[Plot]]:
    """The pictures of each question, of what was measured; none without matplotlib."""
    if not can_draw():
        return {}
    looks = Looks(report)
    return {
        "speed": [*_by_batch(report, looks), *_trade_offs(report, looks), *_slots(report, looks)],
        "quality": _heat(report, looks),
        "length": [*_by_length(report, looks), *_by_position(report, looks)],
        "control": [
            _order(order, n) for n, order in enumerate(report.orders) if order.tokens
        ],
    }  # fmt: skip


def _by_batch(report: Report, looks: Looks) -> list[Plot]:
    figures = [f for f in report.of("speed", "tokens_per_second") if "batch" in f.at]
    batches = sorted({f.at["batch"] for f in figures})
    return lines(
        "by-batch", figures, looks.curves(figures), "batch", "Speed by batch",
        lambda axes: ticks(axes, batches, log=True),
    )  # fmt: skip


def _slots(report: Report, looks: Looks) -> list[Plot]:
    """Acceptance by slot, at the smallest batch."""
    every = [f for f in report.of("speed", "acceptance") if "slot" in f.at]
    batch = min((f.at.get("batch", 1) for f in every), default=1)
    figures = [f for f in every if f.at.get("batch", 1) == batch]
    slots = sorted({f.at["slot"] for f in figures})
    return lines(
        "slots", figures, looks.curves(figures), "slot", f"Drafts accepted by slot, batch {batch}",
        lambda axes: ticks(axes, slots),
    )  # fmt: skip


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For points (speed, quality), both better when higher, whether another one is at least as good
    in both and better in one."""
    return [
        any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points
    ]  # fmt: skip


def _trade_offs(report: Report, looks: Looks) -> list[Plot]:
    """Speed against quality, at the smallest and at the largest batch."""
    figures = [f for f in report.of("speed", "tokens_per_second") if "batch" in f.at]
    batches = sorted({f.at["batch"] for f in figures})
    made = []
    for metric in written(report)[:1]:
        for batch in batches if len(batches) < 2 else (batches[0], batches[-1]):
            points = [
                (f, quality) for f in figures if f.at["batch"] == batch
                and (quality := quality_at(report, metric, f.subject, f.setting))
            ]  # fmt: skip
            if len(points) > 1:
                made.append(_trade_off(report, looks, points, batch))
    return made


def _trade_off(
    report: Report, looks: Looks, points: list[tuple[Figure, Figure]], batch: float
) -> Plot:
    up = 1 if points[0][1].better != "low" else -1
    beaten = dominated([(speed.value, up * quality.value) for speed, quality in points])

    def draw(axes: Any) -> None:
        for (speed, quality), lost in zip(points, beaten, strict=True):
            look = looks.of(speed.subject, speed.setting) | {"linestyle": "none"}
            fill = LIGHT.page if lost else look["color"]
            name = label(speed.subject, speed.setting)
            axes.errorbar(speed.value, quality.value, SURE * (quality.error or 0),
                          SURE * (speed.error or 0), label=name, markerfacecolor=fill,
                          alpha=0.75 if lost else 1, **look, **BARS)  # fmt: skip
        best = [pair for pair, lost in zip(points, beaten, strict=True) if not lost]
        front = sorted((speed.value, quality.value) for speed, quality in best)
        axes.plot(*zip(*front, strict=True), color=LIGHT.grid, zorder=0, linewidth=2.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(with_unit(f"speed at batch {batch}", points[0][0].unit))
        what = with_unit(name_of(points[0][1].metric), points[0][1].unit)
        axes.set_ylabel("\n".join(wrap(what, LONG)))

    return drawn(
        f"trade-off-{batch}", f"Speed against quality at batch {batch}",
        f"The best are at the {'upper' if up > 0 else 'lower'} right, joined by the line. Hollow "
        "points are dominated: another is at least as fast and as good. Bars are two standard "
        "errors.",
        draw, [label(speed.subject, speed.setting) for speed, _ in points],
    )  # fmt: skip


def _heat(report: Report, looks: Looks) -> list[Plot]:
    """NLL under the base against entropy, along the temperature."""
    nll = [f for f in report.of("quality", "base_nll") if "temperature" in f.at]
    pairs: list[tuple[Figure, Figure]] = []
    for figure in nll:
        pairs += [(entropy, figure) for entropy in
                  report.of("quality", "entropy", subject=figure.subject, setting=figure.setting)
                  if entropy.at == figure.at]  # fmt: skip
    curves = [c for c in looks.curves([figure for _, figure in pairs]) if len(c.points) > 1]
    if not curves:
        return []

    def draw(axes: Any) -> None:
        for curve in curves:
            points = sorted((p for p in pairs if p[1] in curve.points),
                            key=lambda p: p[0].at["temperature"])  # fmt: skip
            x, y = ([p[side].value for p in points] for side in (0, 1))
            across, along = ([SURE * (p[side].error or 0) for p in points] for side in (0, 1))
            axes.errorbar(x, y, along, across, label=curve.name, **curve.look, **BARS)
        for x, y in pairs:
            if y in curves[0].points:
                axes.annotate(f"{y.at['temperature']:g}", (x.value, y.value), fontsize=8,
                              xytext=(5, -9), textcoords="offset points")  # fmt: skip
        axes.set_xlabel(with_unit("entropy of the text", pairs[0][0].unit))
        axes.set_ylabel(with_unit("NLL under the base", pairs[0][1].unit))

    return [drawn(
        "temperature", "How likely its text is to the base, against how varied it is",
        "Compare at equal entropy: low entropy alone makes a text likely. The points of a line are "
        "temperatures, the numbers beside one of them. Bars are two standard errors.",
        draw, [curve.name for curve in curves],
    )]  # fmt: skip


def _by_length(report: Report, looks: Looks) -> list[Plot]:
    """Time per token by the length of the answer, a picture for each length of the prompt."""
    made = []
    every = [
        f for f in report.of("length", "seconds_per_token") if {"prompt", "answer"} <= f.at.keys()
    ]
    for prompt in sorted({f.at["prompt"] for f in every}):
        figures = [f for f in every if f.at["prompt"] == prompt]
        answers = sorted({f.at["answer"] for f in figures})
        made += lines(
            f"length-{prompt}", figures, looks.curves(figures), "answer",
            f"Time per token after a prompt of {prompt} tokens",
            lambda axes, answers=answers: ticks(axes, answers, log=True),
        )  # fmt: skip
    return made


def _by_position(report: Report, looks: Looks) -> list[Plot]:
    """Bound and exact NLL by position, with the end of the training rows."""
    figures = [
        f for metric in ("bound", "ar_nll") for f in report.of("length", metric)
        if "position" in f.at
    ]  # fmt: skip
    trained = report.subjects["model"].trained_length if "model" in report.subjects else None
    pairs = dict.fromkeys((f.subject, f.metric) for f in figures)
    own = iter(LIGHT.colors)
    curves = []
    for n, (subject, metric) in enumerate(pairs):
        neutral = NEUTRAL.get(subject)
        look = {"marker": MARKERS[n % len(MARKERS)], "linestyle": neutral or "-",
                "color": LIGHT.text if neutral else next(own)}  # fmt: skip
        points = [f for f in figures if (f.subject, f.metric) == (subject, metric)]
        curves.append(Curve(label(subject, None, name_of(metric)), look, points))

    def mark(axes: Any) -> None:
        axes.set_ylabel("NLL or its bound (nats/token)")
        if trained and any(f.at["position"] > trained for f in figures):
            axes.axvline(trained, color=LIGHT.text, linewidth=1)
            axes.annotate("training rows end", (trained, 1), xycoords=("data", "axes fraction"),
                          xytext=(-4, -3), textcoords="offset points", ha="right", va="top",
                          fontsize=8)  # fmt: skip

    return lines(
        "position", figures, curves, "position", "Likelihood by position in the text", mark,
        "Lower is better. A bound lies above the NLL. Bars are two standard errors.",
    ) if figures else []  # fmt: skip


def _order(order: Order, number: int) -> Plot:
    """Which forward decided each token of an answer."""
    places = range(1, len(order.tokens) + 1)

    def draw(axes: Any) -> None:
        sizes = [8 + 60 * max(0.0, surety - 0.3) for surety in order.confidence]
        axes.scatter(places, order.forward, sizes, color=LIGHT.colors[0], zorder=3)
        axes.set_xlabel(with_unit("place in the answer", "tokens"))
        axes.set_ylabel(with_unit("decided in forward", "number"))
        axes.yaxis.get_major_locator().set_params(integer=True)

    return drawn(
        f"order-{number}", f"Order in which {len(order.tokens)} tokens were decided",
        "Tokens at one height were decided together; the larger the point, the surer. One written "
        "from left to right would be a straight line.",
        draw,
    )  # fmt: skip


def by_report(report: Report, names: Sequence[str]) -> dict[str, list[Plot]]:
    """The figures that stand for a question, one below the other for several reports, in the order
    in which they were named.

    Args:
        report: of `compare.merged`, with one setting of each. names: its subjects that are models.
    """
    if not can_draw():
        return {}
    batch = min((f.at["batch"] for f in report.of("speed", "tokens_per_second")), default=1)
    rows = {
        "speed": report.of("speed", "tokens_per_second", batch=batch),
        "quality": [f for metric in written(report)[:1] for f in marks(report, metric)],
        "likelihood": report.of("quality", "bound", setting=None),
        "control": report.of("control", "infill_exact_match"),
    }
    made: dict[str, list[Plot]] = {}
    for name, figures in rows.items():
        own = [(n, f) for n, who in enumerate(names) for f in figures if f.subject == who]
        if len({n for n, _ in own}) > 1:
            question = "quality" if name == "likelihood" else name
            made.setdefault(question, []).append(_rows(f"reports-{name}", names, own))
    return made


def _rows(name: str, names: Sequence[str], own: Sequence[tuple[int, Figure]]) -> Plot:
    first = own[0][1]
    what = name_of(first.metric) + (f" at batch {first.at['batch']}" if "batch" in first.at else "")
    divisor, unit = scale_of(first.unit, [figure.value for _, figure in own])

    def draw(axes: Any) -> None:
        for n, figure in own:
            error = SURE * (figure.error or 0) / divisor
            axes.errorbar(figure.value / divisor, n, None, error, marker="o", **BARS,
                          color=LIGHT.colors[0])  # fmt: skip
        axes.set_yticks(range(len(names)), [_short(who) for who in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(with_unit(what, unit))

    return drawn(name, capital(f"{what} by report"), note_on(first), draw)


def _short(name: str, most: int = 24) -> str:
    """A name of which the end is kept, as folders differ there."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
