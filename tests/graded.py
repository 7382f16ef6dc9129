"""A reward that a process of `test_processes.py` writes down: what it judged, in files by rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def graded(completion_ids: list[list[int]], folder: str | None, **_: Any) -> list[float]:
    """Of the completions' tokens alone. `folder`: where it writes, if anywhere."""
    rewards = [sum(ids) % 7 / 7 for ids in completion_ids]
    if folder is not None:
        rank = os.environ.get("RANK", "0")
        with (Path(folder) / f"judged-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([completion_ids, rewards]) + "\n")
    return rewards
