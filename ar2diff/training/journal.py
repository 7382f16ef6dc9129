"""The files in which a run tells what it did: `log/` in its output folder. Imports nothing heavy.

metrics.jsonl   a line for every log: step, seconds of training so far, and what was logged
recipe.yaml     the resolved recipe
command.txt     the command, and those that resumed it
*.svg           pictures of the metrics (`plots`)
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.output import LOG, TENSORBOARD, disk_errors

METRICS, RECIPE, COMMAND = "metrics.jsonl", "recipe.yaml", "command.txt"
COMMAND_VARIABLE = "AR2DIFF_COMMAND"  # what was typed, for the processes of a launch


class Journal:
    """The log folder of a run that is going on.

    Args:
        output_dir: the output folder of the run.
        step: the step that the run goes on from; what was logged after it is done again.
    """

    def __init__(self, output_dir: Path, step: int = 0):
        self.folder = output_dir / LOG
        self.rows = [row for row in read_metrics(output_dir) if row["step"] <= step] if step else []
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            beside = self.folder / f"{METRICS}.partial"
            beside.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            beside.replace(self.folder / METRICS)
        before = self.rows[-1]["seconds"] if self.rows else 0.0
        self._start = time.monotonic() - before

    def write(self, step: int, logs: dict[str, Any]) -> None:
        """Append a line for what was logged at a step."""
        row = _known({"step": step, "seconds": round(self.seconds(), 3), **logs})
        self.rows.append(row)
        with disk_errors(self.folder), (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def seconds(self) -> float:
        """Seconds of training so far, without the time between a stop and its resumption."""
        return time.monotonic() - self._start

    def describe(self, recipe: str, command: str) -> None:
        """Write the resolved recipe, as YAML, and add the command to those that the run had."""
        with disk_errors(self.folder):
            (self.folder / RECIPE).write_text(recipe, encoding="utf-8")
            with (self.folder / COMMAND).open("a", encoding="utf-8") as file:
                file.write(f"{command}\n")


@contextmanager
def tracked(output_dir: Path) -> Iterator[None]:
    """A context in which trackers write into the run's log, unless the environment says where."""
    log = output_dir / LOG
    places = {"TENSORBOARD_LOGGING_DIR": str(log / TENSORBOARD), "WANDB_DIR": str(log)}
    unset = [name for name in places if name not in os.environ]
    os.environ.update({name: places[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without one that a kill cut off; none if there is no file."""
    try:
        text = (output_dir / LOG / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({"seconds": 0.0, **row})
    return rows


def command_line(verb: str, model: str, output_dir: Path) -> str:
    """What was typed to start this run; for a call from Python, a command that does the same."""
    if typed := os.environ.get(COMMAND_VARIABLE):
        return typed
    if Path(sys.argv[0]).name in ("ar2diff", "__main__.py") and verb in sys.argv:
        return shlex.join(["ar2diff", *sys.argv[1:]])
    recipe = output_dir / LOG / RECIPE
    return shlex.join(
        ["ar2diff", verb, model, "--recipe", str(recipe), "--output-dir", str(output_dir)]
    )


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
