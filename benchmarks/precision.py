"""Float32 against bfloat16 autocast on a CPU that has bfloat16 natively: what it saves and costs.

    AR2DIFF_DATA=path/to/data python benchmarks/precision.py [--seeds 0 1 2] [--core N]
    AR2DIFF_DATA=path/to/data python benchmarks/precision.py --speed [--core N]

For each seed, the recipe `stories260k` is trained in both precisions and judged in float32 by the
protocol of benchmarks/stories260k.py: the bound and the AR NLL. With --speed, the CPU time of a
training step (forward and backward, on one thread) of stories260K's and stories3M's recipes is
measured instead, in both precisions, with `train.compile`, and with attention in one call for noisy
and clean slots together, interleaved: medians of the ratios to the first way within a repeat. Some
of these are chosen with --models, --ways and --steps. Rows are appended to
benchmarks/results/precision.jsonl as they come; `--table` prints the means. The bound suffers if
its mean in bfloat16 is worse by more than the spread of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from stories260k import run

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"
PRECISIONS = ("fp32", "bf16")
MODELS = {"stories260k": "stories260K-hf", "stories3m": "stories3M-hf"}
WAYS = {
    "fp32": ["train.precision=fp32"],
    "bf16": ["train.precision=bf16"],
    "fp32, one call": ["train.precision=fp32"],
    "bf16, one call": ["train.precision=bf16"],
    "fp32, compiled": ["train.precision=fp32", "train.compile=true"],
    "bf16, compiled": ["train.precision=bf16", "train.compile=true"],
}
WARM = 3  # training steps of each way that are not timed


def step_ratios(recipe_name: str, folder: str, ways: list[str], steps: int) -> dict[str, Any]:
    """Seconds of a training step in each way on the same batches, and how many times as long one in
    the first way takes."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import ADAPT
    from ar2diff.training.modules import sdpa_of_parts

    base = Path(os.environ["AR2DIFF_DATA"]) / MODELS[recipe_name]
    trainers, batches = {}, []
    for way in ways:
        settings = ["data.sources=[tinystories/train]", "eval.steps=0", *WAYS[way]]
        plan = ADAPT.prepare(base, load_recipe(recipe_name, settings))
        trainers[way] = plan.make_trainer(plan, Path(folder) / way, [])
        trainers[way].model.train()
        if not batches:
            rows, size = iter(plan.rows), plan.recipe.train.per_device_train_batch_size
            for _ in range(steps + WARM):
                batches.append(trainers[way].data_collator([next(rows) for _ in range(size)]))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for batch in batches:
        for way, trainer in trainers.items():
            whole = way.endswith("one call")
            AttentionInterface.register("sdpa", sdpa_attention_forward if whole else sdpa_of_parts)
            start = time.process_time()
            # As accelerate does it, of which one process has one precision.
            with torch.autocast("cpu", torch.bfloat16, enabled=way.startswith("bf16")):
                loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            seconds[way].append(time.process_time() - start)
            trainer.model.zero_grad()
    timed = {way: values[WARM:] for way, values in seconds.items()}
    ratios = {
        way: statistics.median(a / b for a, b in zip(timed[ways[0]], values, strict=True))
        for way, values in timed.items()
    }
    return {
        "speed": recipe_name,
        "ratios": {way: round(ratio, 3) for way, ratio in ratios.items()},
        "step_seconds": {way: round(statistics.median(v), 4) for way, v in timed.items()},
    }


def append(row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for row in (row for row in rows if "speed" in row):
        found = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in row["ratios"].items())
        print(f"{row['speed']}: steps a second against the first way: {found}")
    print("| precision | seeds | bound | AR NLL |\n|---|---|---|---|")
    for precision in PRECISIONS:
        own = [row for row in rows if row.get("variant") == precision]
        if own:
            bound, ar = (statistics.mean(row[name] for row in own) for name in ("bound", "ar_nll"))
            print(f"| {precision} | {len(own)} | {bound:.4f} | {ar:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--speed", action="store_true", help="time steps instead of training")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--table", action="store_true", help="print the results so far")
    arguments = parser.parse_args()
    if arguments.table:
        return table()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    import torch

    torch.set_num_threads(1)
    if arguments.speed:
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.models:
                append(step_ratios(name, f"{folder}/{name}", arguments.ways, arguments.steps))
        return None
    for seed in arguments.seeds:
        for precision in PRECISIONS:
            append(run(precision, [f"train.precision={precision}"], seed))


if __name__ == "__main__":
    main()
