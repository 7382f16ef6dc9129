"""`report`: measures what a decision for or against a model needs, and writes it down.

DIR/report.json     the figures, the texts, and how they were measured
DIR/report.html     the page that shows them
DIR/rows/           what they were made from; a report that was stopped goes on from these
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import find_checkpoint
from ..core.errors import Ar2DiffError, first_line, nearest, option, shortened
from . import constrained, control, length, quality, speed, tasks
from .figures import OWN, QUESTIONS, STOCK, Missing, Report, write_report
from .journal import PLAN, ROWS, Journal, Part, Row, check_plan
from .material import material_for
from .page import write as write_page
from .pictures import show
from .session import QUICK, Found, Session, Sizes
from .subjects import base_of, identity_of, load_subjects
from .writing import Clock

PAGE = "report.html"
SEEN = (
    "its run did not hold out the same texts, so it may have been trained on some of them; use the "
    "same eval.data in both runs, or name a file with --data"
)
TOWER = (
    "each call looks at its images anew, so the vision tower's time is in that of every way of "
    "writing, in all alike; pixels are prepared before the clock starts"
)
RIGHT = "an answer that is the one of the data, up to white space around it"
MEASURES = {"speed": speed, "quality": quality, "length": length, "control": control}
Steps = Callable[[Sequence[Part]], Iterable[Part]]


@dataclass(frozen=True)
class Asked:
    """What a report is asked to measure; the fields are arguments of `report`."""

    model: str
    base: str | None = None
    control: str | None = None
    against: tuple[str, ...] = ()
    data: str | None = None
    text_field: str = "text"
    tasks: tuple[str, ...] = ()
    quick: bool = False
    only: tuple[str, ...] = ()
    dtype: str = "auto"
    seed: int = 0


def report(
    model: str | Path,
    output_dir: str | Path | None = None,
    *,
    base: str | Path | None = None,
    control: str | Path | None = None,
    against: Sequence[str | Path] = (),
    data: str | Path | None = None,
    text_field: str = "text",
    tasks: Sequence[str] = (),
    quick: bool = False,
    only: Sequence[str] = (),
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    command: str = "",
    steps: Steps = iter,
) -> tuple[Path, Report]:
    """Measure whether a converted model, or a draft adapter, is worth using, beside its base; write
    `report.json` and `report.html`.

    Args:
        model: folder or Hub id. output_dir: folder of the report; None: beside the model.
        base: the AR model to compare it with; None: the one that it was made from, if that is here.
        control: the base, trained further on the same data without being converted.
        against: other converted models.
        data: file with held-out text, or of a vision-language model with conversations about
            images; None: what the run that made the model held out from its
            training, else the embedded stories. text_field: field of a row that holds it.
        tasks: names of tasks of lm-evaluation-harness. quick: measure less.
        only: of `speed`, `quality`, `length` and `control`, those to measure; none: all.
        dtype: number type to compute in. seed: of all draws.
        overwrite, command, steps: as of `make_report`.

    Returns:
        The folder, and what is in its `report.json`.

    Raises:
        Ar2DiffError: as of `make_report`.
    """
    asked = Asked(
        str(model), _text(base), _text(control), tuple(map(str, against)), _text(data), text_field,
        tuple(tasks), quick, tuple(only), dtype, seed,
    )  # fmt: skip
    folder = None if output_dir is None else Path(output_dir)
    return make_report(asked, folder, overwrite=overwrite, command=command, steps=steps)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def make_report(
    asked: Asked,
    output_dir: Path | None = None,
    *,
    overwrite: bool = False,
    command: str = "",
    sizes: Sizes | None = None,
    clock: Clock = time.perf_counter,
    steps: Steps = iter,
) -> tuple[Path, Report]:
    """Measure a model, and write the report. What an earlier call has measured is not measured
    again; what fails is listed in the report, which has all else.

    Args:
        asked: who is measured, on what. Without a base, the one that the model's record names is
            taken, if it is here.
        output_dir: folder of the report; by default beside the model, or in `runs`.
        overwrite: drop what the folder holds of another report.
        command: for the report.
        sizes: how much is measured; by default by `asked.quick`.
        clock: seconds.
        steps: goes through the parts that are left to measure, as a progress bar does.

    Returns:
        The folder, and what is in its `report.json`.

    Raises:
        Ar2DiffError: a subject does not load or does not fit, there is no text to measure on, or
            the folder holds something else.
    """
    _check(asked)
    asked = replace(asked, base=asked.base or base_of(asked.model))
    folder = output_dir or folder_for(asked.model)
    _check_folder(folder)
    sizes = sizes or _sizes(asked)
    plan = _plan(asked, sizes)
    if not overwrite:
        check_plan(folder, plan)
    subjects = load_subjects(asked.model, asked.base, asked.control, asked.against, asked.dtype)
    material = material_for(
        find_checkpoint(asked.model), subjects["model"].checkpoint, asked.data,
        asked.text_field, max(sizes.questions, sizes.texts),
    )  # fmt: skip
    if material.shots is not None:
        show([*subjects.values()], material.shots)
    session = Session(subjects, material, sizes, clock, asked.seed)
    journal = Journal(folder, plan | {"texts": material.digest}, overwrite)
    failed = _measure(session, journal, asked, steps)
    found = _report(session, journal, asked, failed)
    found.protocol["command"] = command
    found.protocol["seconds"] = round(journal.seconds, 1)
    write_report(found, folder)
    write_page(found, folder / PAGE)
    return folder, found


def folder_for(model: str) -> Path:
    """Where the report on a model goes by default."""
    folder = Path(model).expanduser()
    if folder.is_dir() and os.access(folder.resolve().parent, os.W_OK):
        return folder.with_name(f"{folder.resolve().name}-report")
    return Path("runs") / f"{Path(model.partition('@')[0]).name}-report"


def _sizes(asked: Asked) -> Sizes:
    """How much is measured by default; larger batches where there is a GPU to fill."""
    if asked.quick:
        return QUICK
    sizes = Sizes()
    if torch.cuda.is_available():
        return replace(sizes, batches=(*sizes.batches, 32, 64), timed=64)
    return sizes


def _check(asked: Asked) -> None:
    for name in asked.only:
        if name not in QUESTIONS:
            raise Ar2DiffError(
                f"{option('only')} {shortened(name)} is not a question{nearest(name, QUESTIONS)}",
                f"use one of {', '.join(QUESTIONS)}",
            )
    tasks.check(asked.tasks)


def _check_folder(folder: Path) -> None:
    """Refuse a folder with something else in it."""
    if folder.is_file():
        raise Ar2DiffError(
            f"{option('output_dir')} {folder} is a file", "choose a folder that holds a report, "
            "or does not exist yet",
        )  # fmt: skip
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ROWS / PLAN).exists():
        raise Ar2DiffError(
            f"{option('output_dir')} {folder} is not empty, and holds no report",
            f"choose another {option('output_dir')}",
        )


def _plan(asked: Asked, sizes: Sizes) -> dict[str, Any]:
    """What rows must have in common to be in one report."""
    named = {"base": asked.base, "control": asked.control}
    named |= {f"against {n}": name for n, name in enumerate(asked.against, 1)}
    subjects = {key: identity_of(name) for key, name in named.items() if name is not None}
    return {
        "model": identity_of(asked.model), **subjects, "data": asked.data,
        "text_field": asked.text_field, "dtype": asked.dtype, "seed": asked.seed,
        "size": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(sizes).items()},
    }  # fmt: skip


def _measure(session: Session, journal: Journal, asked: Asked, steps: Steps) -> list[Missing]:
    """Measure the parts that are left; those that fail as a whole are returned, and tried again
    next time."""
    failed = []
    wanted = [name for name in QUESTIONS if not asked.only or name in asked.only]
    parts = [part for name in wanted for part in MEASURES[name].parts(session)]
    if "quality" in wanted:
        parts += tasks.parts(session, asked.tasks)
    left = [part for part in parts if not journal.has(part)]
    for part in steps(left):
        session.failed.clear()
        start = time.monotonic()
        try:
            rows = list(part.run())
        except Exception as error:
            why = first_line(error)
            failed.append(Missing(question=part.question, what=part.name, why=why))
            continue
        rows += [{"missing": missing.what, "why": missing.why} for missing in session.failed]
        journal.write(part, rows, time.monotonic() - start)
    return failed


def _report(session: Session, journal: Journal, asked: Asked, failed: Sequence[Missing]) -> Report:
    """The report that the rows make."""
    found, missing = Found(), list(failed)
    for name in QUESTIONS:
        rows = journal.of(name)
        if not rows:
            if not any(miss.question == name for miss in failed):
                missing.append(Missing(question=name, what="all of it", why="it was not asked for"))
            continue
        session.failed.clear()
        new = session.attempt(name, "its figures", partial(_figures, session, name, rows))
        if new is not None:
            found.figures += new.figures
            found.texts += new.texts
            found.orders += new.orders
            found.seen += new.seen
        missing += [
            Missing(question=name, what=row["missing"], why=row["why"])
            for row in rows
            if "missing" in row
        ]
        missing += session.failed
    missing += _lacks(session)
    settings, callables = {}, {}
    written = [*session.ways(), *(tasks.ways(session) if asked.tasks else ())]
    for way in written:
        settings[way.setting] = way.arguments
        callables[way.setting] = STOCK if way.stock else OWN
    more, called = control.settings(session)
    return Report(
        title=asked.model,
        quick=asked.quick,
        subjects={key: held.described() for key, held in session.subjects.items()},
        figures=found.figures,
        texts=found.texts,
        orders=found.orders,
        seen=found.seen,
        missing=[miss for n, miss in enumerate(missing) if miss not in missing[:n]],
        settings=settings | more,
        protocol=_protocol(session, asked)
        | constrained.protocol(found.figures)
        | {"callable": callables | called},
    )


def _lacks(session: Session) -> Iterator[Missing]:
    """What the subjects and the texts do not allow to be measured well, or at all."""
    if session.base is None:
        why = "no base was given, and the one that the model's record names is not here"
        yield Missing(question="speed", what="the comparison with the base", why=why)
    if short := session.material.lack(session.sizes.texts):
        yield Missing(question="quality", what="more texts", why=short)
    for key, held in session.subjects.items():
        if key in ("model", "base"):
            continue
        if not session.material.unknown_to(find_checkpoint(held.name), held.checkpoint):
            yield Missing(question="quality", what=f"{held.name} on equal terms", why=SEEN)


def _figures(session: Session, name: str, rows: Sequence[Row]) -> Found:
    """What the rows of a question say."""
    found = MEASURES[name].figures(session, [row for row in rows if "missing" not in row])
    if name == "quality":
        tasks.add_figures(session, found, rows)
    return found


def _protocol(session: Session, asked: Asked) -> dict[str, Any]:
    dtype = str(session.model.checkpoint.model.dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    names = ("ar2diff", "torch", "transformers")
    return {
        "hardware": {
            "processor": _processor(), "cores": os.cpu_count(), "gpu": gpu,
            "system": platform.platform(terse=True),
        },
        "versions": {name: version(name) for name in names}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seed": asked.seed,
        "data": session.material.data,
        **({"images": TOWER, "right": RIGHT} if session.sees else {}),
        "when": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
