"""The part of the GPU programme that concerns images: see gpu.py."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu import Machine, Row, failure

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import causal_spec
from ar2diff.conversion.image_probe import probe_images, reach_of
from ar2diff.core.probe import probe, tolerance
from ar2diff.core.spec import IMAGE_FORMAT, Spec
from ar2diff.demo.vision import scenes
from ar2diff.demo.vision.build import MODEL_DIR
from ar2diff.demo.vision.judge import answers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
WORDS = [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]
PICTURES, QUESTIONS = 400, 12
SHORT = {
    "train.logging_steps": 1, "train.warmup_steps": 0, "eval.steps": 0,
    "train.per_device_train_batch_size": 8,
}  # fmt: skip
REWARDED = {
    "rl.rewards": [{"name": "exact"}], "rl.num_generations": 4,
    "rl.max_completion_length": 24, "train.per_device_train_batch_size": 16,
    "rl.rollout_batch_size": 16, "data.max_length": 192,
}  # fmt: skip


def vision(machine: Machine) -> Iterator[Row]:
    """Every class by the probes; adapt, sft and rl of the embedded model, and its texts."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _classes(machine, dtype)
    with tempfile.TemporaryDirectory() as folder:
        yield from _verbs(machine, Path(folder))


def _classes(machine: Machine, dtype: torch.dtype) -> Iterator[Row]:
    from vision_classes import CONFIGS, MASK, vision_class

    for name in CONFIGS:
        seen = vision_class(name)
        model = seen.model.to(machine.device, dtype)
        inputs = seen.inputs([[1, ("image", 0), *WORDS]])
        row: Row = {"class": name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            reach, error = reach_of(model, causal_spec(model), inputs)
            typed = getattr(model.config.get_text_config(), "sliding_window", None)
            window = None if typed is None else "dropped" if reach == "prefix" else "kept"
            problems = []
            for attention in ("causal_context", "full"):
                other = copy.deepcopy(model)
                spec = Spec(
                    IMAGE_FORMAT, "mask", MASK, attention, None if attention == "full" else 4,
                    "same", attention == "causal_context", window, 128, images=reach,
                )  # fmt: skip
                other.config.diffusion = spec.to_dict()
                if attention == "full":
                    other.config.get_text_config().is_causal = False
                problems += [*probe(other, spec), *probe_images(other, spec, inputs)]
            right = reach == seen.reach and error <= tolerance(model)
            yield row | {"reach": reach, "error": error, "as_on_cpu": right, "problems": problems}
        except Exception as error:
            yield row | failure(error)


def _verbs(machine: Machine, folder: Path) -> Iterator[Row]:
    data = folder / "scenes.jsonl"
    scenes.write_scenes(data, PICTURES, 5, "train", scenes.KINDS, scenes.DIGITS, 3)
    questions = list(scenes.scenes(QUESTIONS, 1, "held_out"))
    before, base = str(MODEL_DIR), {**SHORT}
    asked = folder / "asked.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    asked.write_text(
        "".join(
            json.dumps({"prompt": r["messages"][:1], "answer": scenes.right_answer(r)}) + "\n"
            for r in rows
        )
    )
    for verb, recipe, changes in (
        ("adapt", "demo-vision", base),
        ("sft", "demo-vision", base | {"peft": {"r": 8}}),
        ("rl", "digits", base | REWARDED),
    ):
        started, out = time.perf_counter(), folder / verb
        row: Row = {"verb": verb}
        try:
            run = getattr(ar2diff, verb)
            steps = 3 if verb == "rl" or machine.small else 100
            machine.forget_peak()
            given = str(asked if verb == "rl" else data)
            run(before, recipe, out, data=given, max_steps=steps, overrides=changes)
            seconds, peak = time.perf_counter() - started, machine.peak_memory()
            yield row | {"seconds": round(seconds, 1), "steps": steps, "peak_bytes": peak}
        except Exception as error:
            yield row | failure(error)
            return
        if verb == "adapt":
            before = str(out)
            yield from _texts(machine, out, questions)


def _texts(machine: Machine, folder: Path, rows: list[Any]) -> Iterator[Row]:
    """Answers on the device against those on the CPU."""
    found: dict[str, Any] = {}
    for device in ("cpu", machine.device):
        checkpoint = load_checkpoint(str(folder))
        checkpoint.model.to(device)
        for way, settings in (
            ("ar", {"mode": "ar"}), ("lossless", {"mode": "speculative", "draft_length": 7}),
            ("diffusion", {"mode": "diffusion"}),
        ):  # fmt: skip
            texts = [text for text, *_ in answers(checkpoint, rows, settings)]
            found.setdefault(way, []).append(texts)
    for way, (here, there) in found.items():
        same = sum(a == b for a, b in zip(here, there, strict=True))
        yield {"texts": way, "same_as_cpu": same, "of": len(rows)}
    yield {"texts": "lossless", "same_as_ar": found["ar"][1] == found["lossless"][1]}
