"""Everything that has to be seen on a GPU, in nine minutes on one bare machine: `make gpu`.

    python benchmarks/gpu.py                          # needs CUDA; the shape of Qwen3 0.6B
    python benchmarks/gpu.py --device cpu --small     # the same programme in small, to try it
    python benchmarks/gpu.py --device fakedev --small # and on the pretended device of the tests

Each row is appended to benchmarks/results/gpu.jsonl (or --output) as soon as it is known, so that
a machine that goes away costs nothing but the rest. Parts, in this order:

    versions     of the machine and of every library
    probe        whether the masks do what the spec says, in float32 and bfloat16
    tokens       the demo model, its conversion and its draft adapter against their texts on the CPU
    noises       every noise in adapt, sft and rl on the device and on the CPU, and its texts
                 (gpu_noises.py)
    vision       every vision-language class by the probes; the embedded one in adapt, sft and rl,
                 and its answers about pictures (gpu_vision.py)
    qlora        an adapter on a model in 4 bits
    verbs        adapt, sft, rl and generate one after the other on the demo model
    launched     runs of one process under FSDP2, ZeRO-2 and ZeRO-3
    flex         loss and gradient of flex_attention against a dense mask
    step         a training step at rows of 1,024 and 4,096 tokens (gpu_training.py)
    decode       every mode at batch 1 and 8, chains and trees of a draft adapter (gpu_decoding.py)

A part is left out, with a row that says so, once nine minutes are spent; so is what a part has not
done by then. A part that fails is a row too, and the exit status is 1. Weights of the 0.6B shape
are random and made on the device; TF32 is off.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
SECONDS = 540.0
LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes",
    "triton",
)  # fmt: skip
QUESTIONS, NEW = 16, 48  # of the demo model, and tokens of an answer
Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where the programme runs.

    Attributes:
        device: `cuda`, `cpu`, or another device of torch.
        small: whether models are tiny, for a trial on a CPU.
        peak: FLOP/s in bfloat16, for the share of them that is used.
    """

    device: str
    small: bool
    peak: float

    @property
    def module(self) -> Any:
        """torch.cuda or its like; None on a CPU."""
        return None if self.device == "cpu" else getattr(torch, self.device)

    def wait(self) -> None:
        """Until everything that was launched is done."""
        if self.module is not None:
            self.module.synchronize()

    def forget_peak(self) -> None:
        """Begin to measure the peak of memory."""
        if self.module is not None:
            self.module.empty_cache()
            self.module.reset_peak_memory_stats()

    def peak_memory(self) -> int | None:
        """Bytes since `forget_peak`; None on a CPU."""
        return None if self.module is None else self.module.max_memory_allocated()


Part = Callable[[Machine], Iterable[Row]]


def programme(
    parts: dict[str, Part],
    machine: Machine,
    write: Callable[[Row], None],
    clock: Callable[[], float] = time.monotonic,
    limit: float = SECONDS,
) -> bool:
    """Run the parts in turn until the limit, and write their rows.

    Returns:
        whether no part failed.
    """
    start, whole = clock(), True
    for name, part in parts.items():
        if clock() - start >= limit:
            write({"part": name, "left_out": f"{limit:.0f} seconds are spent"})
            continue
        begun = clock()
        try:
            for row in part(machine):
                write({"part": name, **row, "at_seconds": round(clock() - start, 1)})
                whole &= "error" not in row
                if clock() - start >= limit:
                    write({"part": name, "left_out": f"its rest: {limit:.0f} seconds are spent"})
                    break
            write({"part": name, "seconds": round(clock() - begun, 1)})
        except Exception as error:  # the parts after it may still work
            whole = False
            write({"part": name, **failure(error)})
    return whole


def failure(error: Exception) -> Row:
    """What an exception says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-6:]
    return {"error": f"{type(error).__name__}: {error}"[:600], "at": where}


def versions(machine: Machine) -> Iterator[Row]:
    """The machine and its libraries."""
    found: Row = {"python": platform.python_version(), "device": machine.device}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if machine.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "sdpa": {
                "flash": torch.backends.cuda.flash_sdp_enabled(),
                "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
                "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            },
        }
    yield found


def converted(machine: Machine, dtype: str) -> Any:
    """The demo model, converted without training, on the device."""
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.config.recipe import load_recipe
    from ar2diff.demo.__main__ import MODEL, adapt_without_training

    checkpoint = load_checkpoint(str(MODEL), dtype=dtype)
    adapt_without_training(checkpoint, load_recipe("demo"))
    checkpoint.model.to(machine.device).eval()
    return checkpoint


def probes(machine: Machine) -> Iterator[Row]:
    """Perturb a token, and see which logits move: on the device, in both precisions."""
    from ar2diff.core.generate import check_model

    for dtype in ("float32", "bfloat16"):
        checkpoint, start = converted(machine, dtype), time.monotonic()
        check_model(checkpoint.model, checkpoint.spec)
        yield {"dtype": dtype, "exact": True, "probe_seconds": round(time.monotonic() - start, 2)}


def tokens(machine: Machine) -> Iterator[Row]:
    """Texts in float32 on the device and on the CPU, in every mode."""
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.demo.__main__ import DRAFT
    from ar2diff.demo.corpus import corpus, prompt
    from ar2diff.generation.complete import decode_rows, settings_of

    cases = {
        "ar": ("draft", {"mode": "ar"}),
        "draft adapter": ("draft", {"mode": "speculative"}),
        "draft adapter, chain of 7": ("draft", {"mode": "speculative", "draft_length": 7}),
        "draft adapter, tree of 15": (
            "draft", {"mode": "speculative", "draft_length": 7, "draft_nodes": 15},
        ),
        "draft adapter, static cache": (
            "draft",
            {"mode": "speculative", "draft_length": 7, "cache_implementation": "static"},
        ),
        "ar, compiled": ("draft", {"mode": "ar", "compile": True}),
        "draft adapter, compiled": (
            "draft", {"mode": "speculative", "draft_length": 7, "compile": True},
        ),
        "diffusion, compiled": (
            "converted", {"mode": "diffusion", "threshold": 0.9, "compile": True},
        ),
        "lossless": ("converted", {"mode": "speculative", "draft_length": 7}),
        "diffusion": ("converted", {"mode": "diffusion", "threshold": 0.9}),
        "diffusion, sampled": ("converted", {"mode": "diffusion", "temperature": 0.8, "seed": 1}),
        "diffusion, guided": ("converted", {"mode": "diffusion", "cfg_scale": 1.0}),
        "diffusion, a guide": ("converted", {"mode": "diffusion", "guide": _dislikes}),
        "diffusion, regex": (
            "converted", {"mode": "diffusion", "regex": " [A-Z][a-z]+ has [0-9]+ apples\\."},
        ),
    }  # fmt: skip
    models = {
        (kind, device): make()
        for device, there in (("cpu", Machine("cpu", True, 0.0)), ("device", machine))
        for kind, make in (
            ("draft", lambda there=there: _moved(load_checkpoint(str(DRAFT)), there)),
            ("converted", lambda there=there: converted(there, "float32")),
        )
    }
    tokenizer = models["draft", "cpu"].tokenizer
    rows = [tokenizer(prompt(e)).input_ids for e in corpus(QUESTIONS, 2, (1, 2), "valid")]
    for name, (kind, settings) in cases.items():
        texts = {}
        for device in ("cpu", "device"):
            checkpoint = models[kind, device]
            asked = {"max_new_tokens": NEW, **settings}
            if device == "cpu":
                asked.pop("compile", None)
            wanted = settings_of(checkpoint, asked)
            texts[device] = [f.token_ids for f in decode_rows(checkpoint, *wanted, rows)]
        pairs = zip(texts["cpu"], texts["device"], strict=True)
        yield {"case": name, "texts": len(rows), "different": sum(a != b for a, b in pairs)}


def _dislikes(logprob: torch.Tensor, ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """A guide: less of tokens that a row [N, L] has already."""
    return torch.zeros_like(logprob).scatter(1, ids.to(logprob.device), -0.5)


def _moved(checkpoint: Any, machine: Machine) -> Any:
    checkpoint.model.to(machine.device).eval()
    if checkpoint.draft is not None:
        checkpoint.draft.to(machine.device)
    return checkpoint


def verbs(machine: Machine) -> Iterator[Row]:
    """adapt, sft, rl and generate on the demo model, a few steps each."""
    import ar2diff
    from ar2diff.demo.__main__ import MODEL
    from ar2diff.demo.answers import write_answers
    from ar2diff.demo.corpus import write_stories

    steps = 3 if machine.small else 20
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_stories(folder / "stories.jsonl", 400)
        write_answers(folder / "easy.jsonl", 200, 5, (1,), "train", (0, 10))
        write_answers(folder / "hard.jsonl", 200, 7, (2,), "train", (11, 20))
        calls = {
            "adapt": lambda: ar2diff.adapt(
                str(MODEL), "demo", folder / "adapt", data=folder / "stories.jsonl",
                max_steps=steps, overrides=["eval.steps=0"],
            ),
            "sft": lambda: ar2diff.sft(
                folder / "adapt", "demo-easy", folder / "sft", data=folder / "easy.jsonl",
                max_steps=steps,
            ),
            "rl": lambda: ar2diff.rl(
                folder / "sft", "demo-rl", folder / "rl", data=folder / "hard.jsonl",
                max_steps=2, overrides=["train.per_device_train_batch_size=16"],
            ),
            "generate": lambda: ar2diff.load(folder / "rl").generate(
                "One day Mia was in the garden.", max_new_tokens=16
            ),
        }  # fmt: skip
        for verb, call in calls.items():
            start = time.monotonic()
            result = call()
            more = {"text": result.text} if verb == "generate" else {"tokens": result.tokens}
            yield {"verb": verb, "seconds": round(time.monotonic() - start, 1), **more}


def launched(machine: Machine) -> Iterator[Row]:
    """Runs in one process under FSDP2 and ZeRO, of a noise that is fitted to embeddings too."""
    if machine.device != "cuda":
        yield {"left_out": "FSDP2 needs a GPU"}
        return
    from ar2diff.demo.__main__ import MODEL
    from ar2diff.demo.corpus import write_stories

    runs = (("zero2", "demo"), ("zero3", "diffusion-lm"), ("fsdp2", "d3pm-gaussian"))
    with tempfile.TemporaryDirectory() as scratch:
        write_stories(Path(scratch) / "stories.jsonl", 400)
        for strategy, recipe in runs:
            start = time.monotonic()
            done = subprocess.run(
                [
                    sys.executable, "-m", "ar2diff", "adapt", str(MODEL), "--recipe", recipe,
                    "--data", f"{scratch}/stories.jsonl", "--max-steps", "5", "--output-dir",
                    f"{scratch}/{strategy}", "--launch", strategy, "--num-processes", "1",
                    "--json", "eval.steps=0",
                ],
                capture_output=True, text=True, timeout=150, check=False,
            )  # fmt: skip
            said = (done.stderr or done.stdout).strip()[-600:]
            found: Row = {"strategy": strategy, "recipe": recipe, "exit": done.returncode}
            found["seconds"] = round(time.monotonic() - start, 1)
            yield found | ({"end": said} if done.returncode == 0 else {"error": said})


def main() -> None:
    import gpu_decoding
    import gpu_noises
    import gpu_training
    import gpu_vision

    parts: dict[str, Part] = {
        "versions": versions, "probe": probes, "tokens": tokens, "noises": gpu_noises.noises,
        "qlora": gpu_noises.qlora, "vision": gpu_vision.vision, "verbs": verbs,
        "launched": launched,
        "flex": gpu_training.flex, "step": gpu_training.steps, "decode": gpu_decoding.speeds,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, for a trial")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the GPU in bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device", file=sys.stderr)
        print("  fix: run this where there is one, or give --device cpu --small", file=sys.stderr)
        sys.exit(2)
    if asked.device == "fakedev":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from fakedev.device import install

        install()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    name = {"gpu": torch.cuda.get_device_name()} if asked.device == "cuda" else {}

    def write(row: Row) -> None:
        row = name | row
        print(json.dumps(row), flush=True)
        with asked.output.open("a") as out:
            out.write(json.dumps(row) + "\n")

    machine = Machine(asked.device, asked.small, asked.peak_tflops * 1e12)
    whole = programme({name: parts[name] for name in asked.only}, machine, write)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    from ar2diff.cli.output import quiet

    quiet()
    main()
