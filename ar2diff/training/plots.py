"""Pictures of the metrics of runs, as SVG, each for a light and a dark page. matplotlib is imported
where something is drawn; the same metrics give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.output import LOG, disk_errors
from ..core.errors import Ar2DiffError
from ..reports.svg import DARK, INSTALL, LIGHT, Shade, can_draw, canvas, to_svg
from .journal import read_metrics

# Each picture is a column of panels: the name of its axis, and metrics with their labels.
PANELS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "loss": [("loss", {"loss": "loss", "ar_loss": "AR loss"})],
    "bound": [("nats per token", {"eval_bound": "bound", "eval_ar_nll": "AR NLL"})],
    "acceptance": [("tokens per forward", {"eval_tokens_per_forward": "tokens per forward"})],
    "reward": [
        ("reward", {"reward": "reward"}),
        ("share of completions", {"stop_rate": "end by themselves"}),
    ],
}
SHADES = {"": LIGHT, "-dark": DARK}  # by the suffix of the file
SPARSE = 40  # points of a curve up to which each is marked

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of metrics by the name of the run


def draw_log(output_dir: Path) -> list[Path]:
    """Draw the pictures of a run into its log; none without matplotlib. Returns the light ones."""
    rows = read_metrics(output_dir)
    if not rows or not can_draw():
        return []
    return draw({output_dir.name: rows}, output_dir / LOG)


def pictures_in(output_dir: Path) -> list[str] | None:
    """The names of the pictures for a light page in a run's log; None if there are none because
    matplotlib is not installed."""
    found = [name for name in PANELS if (output_dir / LOG / f"{name}.svg").is_file()]
    return [f"{name}.svg" for name in found] if found or can_draw() else None


def draw(runs: Runs, folder: Path, only: str | None = None) -> list[Path]:
    """Draw every picture for which there are metrics, with the runs laid over each other.

    Args:
        runs: the rows of metrics of each run, by a name for it.
        only: the name of a single picture.

    Returns:
        The pictures for a light page.

    Raises:
        Ar2DiffError: matplotlib is not installed, or a file cannot be written.
    """
    if not can_draw():
        raise Ar2DiffError("matplotlib, which draws the plots, is not installed", f"run {INSTALL}")
    made = []
    for name in PANELS if only is None else [only]:
        panels = [panel for axis in PANELS[name] if (panel := _curves(runs, *axis))]
        if not panels:
            continue
        for suffix, shade in SHADES.items():
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{name}{suffix}.svg"
                file.write_bytes(_drawn(panels, shade))
            made += [] if suffix else [file]
    return made


def _curves(runs: Runs, axis: str, metrics: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """The axis and the curves of a panel; of several runs, only the first metric they have."""
    curves: dict[str, Any] = {}
    for run, rows in runs.items():
        for name, label in metrics.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                curves[label if len(runs) == 1 else run] = points
                if len(runs) > 1:
                    axis = axis if axis.startswith(label) else f"{label}, {axis}"
                    break
    return (axis, curves) if curves else None


def _drawn(panels: list[tuple[str, dict[str, Any]]], shade: Shade) -> bytes:
    with canvas(6.4, 1.0 + 2.4 * len(panels), shade) as figure:
        grids = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, curves) in zip(grids, panels, strict=True):
            for number, (name, points) in enumerate(curves.items()):
                steps, values = zip(*points, strict=True)
                marker = "o" if len(points) <= SPARSE else None
                color = shade.colors[number % len(shade.colors)]
                axes.plot(steps, values, label=name, marker=marker, color=color)
            axes.set_ylabel(label)
            axes.legend(loc="best")
        grids[-1].set_xlabel("step")
        return to_svg(figure)
