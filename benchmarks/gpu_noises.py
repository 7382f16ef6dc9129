"""The parts of the GPU programme that concern noises and adapters in 4 bits: see gpu.py."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu import Machine, Row, failure
from safetensors.torch import load_file

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.fitted import NOISE_FILE
from ar2diff.demo.__main__ import MODEL
from ar2diff.demo.answers import write_answers
from ar2diff.demo.corpus import corpus, prompt, write_stories
from ar2diff.generation.complete import decode_rows, settings_of
from ar2diff.generation.tokens import encode

QUESTIONS, NEW, STEPS = 8, 24, 6  # prompts, tokens of an answer, forwards of a block
SHORT = {
    "data.max_length": 96, "data.overlong": "truncate", "train.per_device_train_batch_size": 8,
    "train.logging_steps": 1, "train.precision": "fp32", "train.warmup_steps": 0, "eval.steps": 0,
    "train.learning_rate": 5e-4,
}  # fmt: skip
REWARDED = {  # answers without a letter
    "rl.rewards": [{"name": "regex", "args": {"pattern": "^[^h]*$"}}],
    "rl.num_generations": 4, "rl.max_completion_length": 16,
    "train.per_device_train_batch_size": 16,
}  # fmt: skip
FEW = {"rl.max_completion_length": 8, "train.per_device_train_batch_size": 4}  # for a trial


@dataclass(frozen=True)
class Case:
    """A noise: the recipe that has it, and what is tried with it.

    Attributes:
        changes: of the recipe.
        estimator: of `rl`.
        more: options of a third way of decoding, beside the greedy one and samples.
        masked: whether the base is a masked language model.
    """

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    estimator: str = "elbo"
    more: dict[str, Any] | None = None
    masked: bool = False


def likes(p: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A classifier: log p(the answer has token 50)."""
    behind = torch.arange(p.shape[1], device=p.device) >= lengths[:, None]
    own = p[..., 50].clamp(max=1 - 1e-6) * behind
    return (-torch.expm1(torch.log1p(-own).sum(1))).clamp(min=1e-30).log()


EDITS = {"edit_threshold": 0.3, "corrector_steps": 1}
CASES = {
    "gaussian": Case("d3pm-gaussian"),
    "embedding": Case("diffusion-lm", more={"classifier": likes}),
    "nearest": Case("d3pm-nearest"),
    "spindle": Case("diffusionbert"),
    "uniform": Case("d3pm-uniform"),
    "mask_uniform": Case("gidd"),
    "self": Case("self-correct", {}, "one_step", EDITS),
    "embedding, guessed": Case("sed", more={"cfg_scale": 1.0}),
    "mask, edited": Case("seed-diffusion", {}, "coupled", EDITS),
    "uniform, tracked": Case("self-correct", {"noise.kind": "uniform"}, "one_step", EDITS),
    "spindle of a masked LM": Case("diffusionbert", masked=True),
}
TRIED = ("nearest", "self", "embedding, guessed", "spindle of a masked LM")  # where models are tiny


@contextmanager
def _held(device: str) -> Iterator[None]:
    from fakedev.verbs import accelerated

    with ExitStack() as stack:
        if device == "cpu":  # where there may be a GPU
            stack.enter_context(patch("torch.cuda.is_available", lambda: False))
        stack.enter_context(accelerated(torch.device(device)))
        yield


def on(device: str) -> AbstractContextManager[None]:
    """Everything that takes an accelerator if there is one takes this device."""
    return nullcontext() if device == "cuda" else _held(device)


def noises(machine: Machine) -> Iterator[Row]:
    """Each noise in a few steps of adapt, sft and rl, on the device and on the CPU from the same
    weights, and its texts on both."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_stories(work / "stories.jsonl", 200)
        write_answers(work / "easy.jsonl", 60, 5, (1,), "train", (0, 10))
        for name in TRIED if machine.small else CASES:
            case = CASES[name]
            for row in _seen(machine, case, work, work / name.replace(" ", "-")):
                yield {"noise": name, **row}


def _seen(machine: Machine, case: Case, work: Path, out: Path) -> Iterator[Row]:
    """Rows of one noise. A verb that fails leaves the weights of the one before it."""
    steps, folder = 2 if machine.small else 5, masked_lm(work) if case.masked else MODEL
    rewarded = REWARDED | {"rl.estimator": case.estimator} | (FEW if machine.small else {})

    def train(verb: str, data: str, recipe: str | None, more: dict[str, Any]) -> Callable[..., Any]:
        run = getattr(ar2diff, verb)
        return lambda start, to: run(
            start, recipe, to, data=work / data, max_steps=steps, overrides=SHORT | more
        )

    calls = {
        "adapt": train("adapt", "stories.jsonl", case.recipe, case.changes),
        "sft": train("sft", "easy.jsonl", None, {}),
        "rl": train("rl", "easy.jsonl", None, rewarded),
    }
    for verb, call in calls.items():
        row = tried(lambda c=call, v=verb, f=folder: _trained(machine, c, f, out / v))
        yield {"verb": verb, **row}
        if (out / verb / "device" / "config.json").exists():
            folder = out / verb / "device"
    if folder in (MODEL, work / "masked-lm"):
        return
    ways: dict[str, Row] = {"greedy": {}, "sampled": {"temperature": 0.8, "seed": 1}}
    ways |= {} if case.more is None else {"+".join(case.more): {**ways["sampled"], **case.more}}
    for name, settings in ways.items():
        yield {"decoded": name, **tried(lambda s=settings, f=folder: _decoded(machine, f, s))}


def tried(call: Callable[[], Row]) -> Row:
    """What a call found, or how it failed, and its seconds."""
    start = time.monotonic()
    try:
        found = call()
    except Exception as error:  # what comes after it may still work
        found = failure(error)
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def _trained(machine: Machine, call: Callable[..., Any], start: Path, out: Path) -> Row:
    """How far the weights are apart that a verb makes on the device and on the CPU: the norm of
    that, over the norm of what was moved since the start; and the largest of either. (Where a
    gradient is all rounding, AdamW makes a whole step in either direction of it.)"""
    for name, device in (("device", machine.device), ("cpu", "cpu")):
        with on(device):
            call(start, out / name)
    there, here, before = (_weights(folder) for folder in (out / "device", out / "cpu", start))
    known = [n for n, x in here.items() if n in before and before[n].shape == x.shape]
    apart, moved = (
        torch.cat([(other[n].double() - here[n].double()).flatten() for n in known])
        for other in (there, before)
    )
    found = {
        "difference": float(f"{apart.norm() / moved.norm():.3g}"),
        "largest": float(f"{apart.abs().max():.3g}"), "moved": float(f"{moved.abs().max():.3g}"),
        "finite": all(bool(x.isfinite().all()) for x in there.values()),
    }  # fmt: skip
    files = [out / name / NOISE_FILE for name in ("device", "cpu")]
    if files[0].exists():
        found["same_fit"] = files[0].read_bytes() == files[1].read_bytes()
    return found


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = (f for f in sorted(folder.glob("*.safetensors")) if f.name != NOISE_FILE)
    return {name: x for file in files for name, x in load_file(file).items()}


def _decoded(machine: Machine, folder: Path, settings: Row) -> Row:
    """How many texts differ from those of the CPU, and, if some do, how many of the CPU's differ
    where rows are read alone, which changes nothing but the rounding."""
    cpu, there = (load_checkpoint(str(folder), dtype="float32") for _ in range(2))
    there.model.to(machine.device).eval()
    asked = {"mode": "diffusion", "max_new_tokens": NEW, "steps_per_block": STEPS, **settings}
    if "threshold" in settings or "edit_threshold" in settings:
        asked |= {"threshold": 0.5, "steps_per_block": None}
    stories = corpus(QUESTIONS, 2, (1, 2), "valid")
    rows = [encode(cpu.tokenizer, cpu.spec, [prompt(e)]) for e in stories]

    def texts(checkpoint: Any, some: list[list[int]]) -> list[list[int]]:
        found = decode_rows(checkpoint, *settings_of(checkpoint, asked), some)
        return [[*f.token_ids] for f in found]

    one, two = texts(cpu, rows), texts(there, rows)
    different = [n for n, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]]
    found: Row = {"texts": len(rows), "different": len(different)}
    if different:
        found["different_alone"] = sum(texts(cpu, [rows[n]])[0] != one[n] for n in different)
    return found


def masked_lm(work: Path) -> Path:
    """A folder with a small BERT of random weights and a vocabulary of the stories."""
    from masked_lm import SHAPE, train_tokenizer
    from transformers import BertConfig, BertForMaskedLM

    folder = work / "masked-lm"
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = train_tokenizer((work / "stories.jsonl").read_text().splitlines(), folder)
        tokenizer.save_pretrained(folder)
        BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    return folder


def qlora(machine: Machine) -> Iterator[Row]:
    """An adapter on a converted model in 4 bits: steps of sft, and a text."""
    if machine.device != "cuda":
        yield {"left_out": "only a GPU has 4-bit layers of the demo model's sizes"}
        return
    quantized = {
        "train.precision": "bf16", "peft.r": 4, "peft.alpha": 8, "quantization.kind": "nf4",
        "train.gradient_checkpointing": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_stories(work / "stories.jsonl", 100)
        write_answers(work / "easy.jsonl", 60, 5, (1,), "train", (0, 10))
        for recipe in ("demo", "d3pm-gaussian"):
            base, out = work / recipe, work / f"{recipe}-4"
            ar2diff.adapt(
                MODEL, recipe, base, data=work / "stories.jsonl", max_steps=1, overrides=SHORT
            )

            def tune(base: Path = base, out: Path = out) -> Row:
                ar2diff.sft(
                    base, None, out, data=work / "easy.jsonl", max_steps=2,
                    overrides=SHORT | quantized,
                )  # fmt: skip
                asked = {"mode": "diffusion", "max_new_tokens": 8}
                return {"text": ar2diff.load(out).generate("One day Mia was", **asked).text}

            yield {"recipe": recipe, **tried(tune)}
