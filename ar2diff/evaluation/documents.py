"""The documents of the shipped tasks of lm-evaluation-harness: files beside their YAML, or data
that `$AR2DIFF_DATA` names the folder of."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError

TASKS = Path(__file__).parent / "tasks"  # for --include_path
DATA = "AR2DIFF_DATA"  # the environment variable


def documents(file: str, train: str | None = None, **_: Any) -> dict[str, Any]:
    """The splits of a task, which its YAML names as `custom_dataset`.

    Args:
        file: JSON lines of split `test`: a file beside the YAML, else below `$AR2DIFF_DATA`; it may
            be compressed (`.gz`).
        train: those of split `train`, for examples in the prompt.

    Raises:
        Ar2DiffError: a file is in neither place.
    """
    from datasets import Dataset

    names = {"test": file, "train": train}
    return {split: Dataset.from_list(_rows(name)) for split, name in names.items() if name}


def _rows(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get(DATA)
    path = TASKS / name
    if not path.is_file() and folder:
        path = Path(folder) / name
    if not path.is_file():
        raise Ar2DiffError(
            f"the task's data, {name}, was not found"
            + (f" in {folder}" if folder else f", because {DATA} is not set"),
            f"set the environment variable {DATA} to the folder that contains it",
        )
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
