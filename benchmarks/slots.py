"""Milliseconds of a forward by its slots: what drafts and candidates cost on this machine.

    OMP_NUM_THREADS=1 python benchmarks/slots.py FOLDER [--context 32]

FOLDER is a converted model or a draft adapter. A forward reads so many new tokens after a cached
context; the fastest of thirty counts. What the drafts bring is in a report:

    OMP_NUM_THREADS=1 ar2diff report FOLDER --base BASE --only speed
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

SLOTS = (1, 2, 4, 8, 12, 20, 40, 72)
TRIES = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=32, help="cached tokens before the new ones")
    asked = parser.parse_args()
    from drafts import load

    from ar2diff.checkpoint.files import is_draft
    from ar2diff.checkpoint.io import load_checkpoint

    found = (load if is_draft(Path(asked.folder)) else load_checkpoint)(asked.folder)
    milliseconds = by_slots(found.model.eval(), asked.context)
    about = {"folder": Path(asked.folder).name, "context": asked.context}
    print(json.dumps({**about, "threads": torch.get_num_threads(), "ms_by_slots": milliseconds}))


def by_slots(model: Any, context: int) -> dict[int, float]:
    """Milliseconds of a forward of so many slots; every slot reads the context and all slots."""
    from transformers import DynamicCache

    cache, found = DynamicCache(), {}
    with torch.no_grad():
        model(input_ids=torch.ones(1, context, dtype=torch.long), past_key_values=cache,
              use_cache=True)  # fmt: skip
        for slots in SLOTS:
            times = []
            mask = torch.ones(1, 1, slots, context + slots, dtype=torch.bool)
            for _ in range(TRIES):
                start = time.perf_counter()
                model(
                    input_ids=torch.ones(1, slots, dtype=torch.long),
                    position_ids=torch.full((1, slots), context), attention_mask=mask,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                times.append(time.perf_counter() - start)
                cache.crop(-slots)
            found[slots] = round(1e3 * min(times), 2)
    return found


if __name__ == "__main__":
    main()
