"""Tasks of lm-evaluation-harness as part of the quality: `measured` runs them, and `check` asks
before anything expensive whether they can be run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..core.errors import Ar2DiffError, option
from .estimates import Value, mean, share, share_difference
from .figures import AR, Difference, Figure
from .journal import Part, Row
from .session import Found, Session, apart
from .writing import Counter, Way

QUESTION = "quality"


def check(names: Sequence[str]) -> None:
    """Refuse tasks that cannot be run at all.

    Raises:
        Ar2DiffError: lm-eval is not installed, or a task is not known or has no data.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise Ar2DiffError(
            f"{option('tasks')} needs lm-evaluation-harness, which is not installed",
            "install it with: pip install 'ar2diff[eval]'",
        )
    from ..evaluation.task_results import load_tasks

    load_tasks(names, None)


def parts(session: Session, names: Sequence[str]) -> list[Part]:
    """Each task at each setting of each subject, one part each."""
    return [
        Part(QUESTION, f"task {name}, {way.name}", session.sizes.questions * 64, run)
        for name in names
        for way in ways(session)
        for run in (partial(measured, session, way, name),)
    ]


def ways(session: Session) -> list[Way]:
    """The settings of all subjects; what is not converted is read by our AR decoding, as the
    harness does not call the `generate` of transformers."""
    return [*(way for way in session.ways() if not way.stock), *session.left_to_right()]


def measured(session: Session, way: Way, name: str) -> list[Row]:
    """A row for each metric of a document, and one about the forwards."""
    from ..evaluation.task_results import run_tasks

    arguments = {key: value for key, value in way.arguments.items() if key != "do_sample"}
    counter = Counter()
    with counter.watching(way.held.checkpoint.model):
        results = run_tasks(
            way.held.checkpoint, [name], arguments, limit=session.sizes.documents,
            samples=session.sizes.draws, seed=session.seed,
        )  # fmt: skip
    rows: list[Row] = []
    for result in results:
        for metric in result.metrics:
            values = [row for row in result.rows if row["filter"] == metric.filter]
            rows += [
                {
                    "subject": way.held.key, "setting": way.setting, "task": result.task,
                    "metric": metric.name, "filter": metric.filter, "document": row["id"],
                    "value": float(row[metric.name]), "bound": result.bound,
                    "better": metric.better, "forwards": 0, "tokens": 0, "steps": 0,
                }
                for row in values
                if isinstance(row.get(metric.name), int | float)
            ]  # fmt: skip
    if not rows:
        raise ValueError("the task has no metric that is a mean over documents")
    rows[-1]["forwards"] = counter.forwards
    return rows


def add_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    """Add the figures of all tasks."""
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "task" in row:
            key = row["task"], row["metric"], row["filter"], row["subject"], row["setting"]
            cells.setdefault(key, []).append(row)
    for (task, metric, kept, subject, setting), cell in cells.items():
        base = cells.get((task, metric, kept, "base", AR)) if subject != "base" else None
        scale = 100.0 if metric.startswith(("acc", "exact_match", "pass")) else 1.0
        value = _mean([row["value"] for row in cell], scale)
        way = next(w for w in ways(session) if (w.held.key, w.setting) == (subject, setting))
        kind = " (bound)" if cell[0]["bound"] else ""
        found.figures.append(
            Figure(
                question=QUESTION, metric=f"task:{task} {metric}{kind}",
                unit="%" if scale == 100 else "", subject=subject, setting=setting,
                value=value.value, error=value.error, n=value.n,
                difference=_difference(cell, base, scale), better=cell[0]["better"],
                evidence=_evidence(way, cell),
            )
        )  # fmt: skip


def _mean(values: Sequence[float], scale: float) -> Value:
    """The mean of values, which may be hits and misses."""
    hits = all(value in (0, 1) for value in values)
    return (
        share([value == 1 for value in values], scale)
        if hits
        else mean([scale * v for v in values])
    )


def _evidence(way: Way, cell: Sequence[Row]) -> dict[str, Any]:
    estimator = {"estimator": "bound"} if cell[0]["bound"] else {}
    threads = torch.get_num_threads()
    return {**way.evidence(cell), "threads": threads, **estimator}


def _difference(cell: Sequence[Row], base: Sequence[Row] | None, scale: float) -> Difference | None:
    """From the documents that both have, paired."""
    if base is None:
        return None
    theirs = {row["document"]: row["value"] for row in base}
    both = [(r["value"], theirs[r["document"]]) for r in cell if r["document"] in theirs]
    if len(both) < 2:
        return None
    if all(value in (0, 1) for pair in both for value in pair):
        hits = ([value == 1 for value in values] for values in zip(*both, strict=True))
        return apart("base", AR, share_difference(*hits, scale))
    return apart("base", AR, mean([scale * (a - b) for a, b in both]))
