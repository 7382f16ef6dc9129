"""The part of the GPU programme that decodes: see gpu.py."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from gpu_training import model_of

from ar2diff.checkpoint.layers import draft_layers
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.draft import FORMAT, DraftSpec, new_draft
from ar2diff.core.options import resolve
from ar2diff.core.spec import Spec
from ar2diff.core.tree import Tree

PROMPT = 128  # tokens
ACCEPTED = (0, 2, 4)  # candidates that every forward accepts, set by hand
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
COMPILED = ("ar", "chain of 7, 4 accepted", "diffusion, four", "tree of 31, 4 accepted")
FIRST = (  # what earlier runs did not reach, in case the time runs out
    ("diffusion, four, compiled", 8), ("tree of 31, 4 accepted, compiled", 8),
    ("tree of 31, 4 accepted, compiled", 1), ("transformers", 8),
)  # fmt: skip
DIFFUSION = {"one a forward": 32, "two": 16, "four": 8}  # steps for a block of 32
REPEATS = 3
FEW = 8  # tokens of an eager decode whose launches are counted: the profiler is slow


@dataclass(frozen=True)
class Decoding:
    """A way of decoding: its options, and how many candidates are accepted."""

    settings: dict[str, Any]
    accepted: int = 0


def ways() -> dict[str, Decoding]:
    found = {"ar": Decoding({"mode": "ar"})}
    found["ar, static cache"] = Decoding({"mode": "ar", "cache_implementation": "static"})
    for accepted in ACCEPTED:
        chain = {"mode": "speculative", "draft_length": 7}
        found[f"chain of 7, {accepted} accepted"] = Decoding(chain, accepted)
    for nodes in (15, 31):
        tree = {"mode": "speculative", "draft_length": 7, "draft_nodes": nodes}
        found[f"tree of {nodes}, 4 accepted"] = Decoding(tree, 4)
    for name, steps in DIFFUSION.items():
        found[f"diffusion, {name}"] = Decoding({"mode": "diffusion", "steps_per_block": steps})
    static = {"mode": "diffusion", "steps_per_block": 8, "cache_implementation": "static"}
    found["diffusion, four, static cache"] = Decoding(static)
    for name in COMPILED:
        way = found[name]
        found[f"{name}, compiled"] = Decoding({**way.settings, "compile": True}, way.accepted)
    return found


def speeds(machine: Any) -> Iterator[dict[str, Any]]:
    """Every mode at batch 1 and 8, in bfloat16, eager and in graphs: tokens a second, milliseconds
    of a forward, and how often the device is waited for. Weights are random, so that what is
    accepted is set by hand."""
    gc.collect()
    model = model_of(machine).to(torch.bfloat16).eval()
    vocabulary, new = model.config.vocab_size, 32 if machine.small else 64
    spec = Spec(
        format=1, noise="mask", mask_token_id=vocabulary - 1, attention="causal_context",
        prediction="shift", ar_mode=True, block_length=32, local_window=None, max_length=1024,
    )  # fmt: skip
    draft = _draft_of(model, machine)
    every = ways()
    rest = [pair for pair in product(("transformers", *every), (1, 8)) if pair not in FIRST]
    for name, rows in (*FIRST, *rest):
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, vocabulary - 1, (rows, PROMPT), generator=generator)
        way = every.get(name)
        run = (
            partial(_stock, model, ids.to(machine.device))
            if way is None
            else partial(_ours, model, spec, draft, ids.tolist(), way)
        )
        with patch.object(Tree, "walk", walk_of(way.accepted if way else 0)):
            yield {"rows": rows, "way": name} | _measured(
                machine, run, rows, new, name.endswith("compiled")
            )


def walk_of(accepted: int) -> Callable[[Tree, list[int]], int]:
    """A walk that accepts so many candidates, whatever they hold: the likeliest of their depth."""

    def walk(tree: Tree, _tokens: list[int]) -> int:
        depth = min(accepted, max(tree.depths, default=0))
        return tree.depths.index(depth) if depth else -1

    return walk


def _draft_of(model: Any, machine: Any) -> Any:
    """An untrained draft adapter of the size of the recipe draft-qwen3-0.6b."""
    table = model.get_input_embeddings().weight
    wanted = DraftSpec(
        format=FORMAT, base="", revision=None, weights_sha256="", vocabulary=table.shape[0],
        hidden_size=table.shape[1], block_length=8,
        targets=tuple(draft_layers(model, "attention-output", "targets")), rank=128, head_rank=128,
    )  # fmt: skip
    draft = new_draft(model, wanted, torch.Generator().manual_seed(0))
    return draft.to(device=machine.device, dtype=table.dtype).eval()


def _stock(model: Any, ids: torch.Tensor, new: int) -> int:
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        min_new_tokens=new, pad_token_id=0,
    )  # fmt: skip
    return new


def _ours(
    model: Any, spec: Spec, draft: Any, prompts: list[list[int]], way: Decoding, new: int
) -> int:
    """Decode; the number of forwards of a row."""
    speculates = way.settings["mode"] == "speculative"
    read_as = draft.spec_for(None) if speculates else spec
    options = resolve(
        read_as, {"max_new_tokens": new, "eos_token_id": [], **way.settings}, drafts=speculates
    )
    grid = spec.block_length if way.settings["mode"] == "diffusion" else 1
    canvas = Canvas.of_prompts(prompts, read_as.mask_token_id, max_new_tokens=new, grid=grid)
    for _ in denoise(model, read_as, canvas, options, draft=draft if speculates else None):
        pass
    return int(canvas.forwards.max())


def _measured(
    machine: Any, run: Callable[[int], int], rows: int, new: int, replayed: bool
) -> dict[str, Any]:
    first, _ = _timed(machine, run, new)  # warms up, and compiles
    machine.forget_peak()
    times = [_timed(machine, run, new) for _ in range(REPEATS)]
    seconds, forwards = statistics.median(t for t, _ in times), times[0][1]
    peak = machine.peak_memory()
    return {
        "tokens_per_second": round(rows * new / seconds, 1),
        "forwards": forwards,
        "ms_per_forward": round(1e3 * seconds / forwards, 3),
        "first_seconds": round(first, 2),
        "peak_gb": None if peak is None else round(peak / 1e9, 2),
        **(_calls(machine, run, new if replayed else FEW) if rows == 1 else {}),
    }


def _timed(machine: Any, run: Callable[[int], int], new: int) -> tuple[float, int]:
    """Seconds and forwards."""
    start = time.perf_counter()
    forwards = run(new)
    machine.wait()
    return time.perf_counter() - start, forwards


def _calls(machine: Any, run: Callable[[int], int], new: int) -> dict[str, float]:
    """Launches of kernels and waits of the host, of each forward; only on CUDA."""
    if machine.device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        forwards = run(new)
    counts = {event.key: event.count for event in seen.key_averages()}
    return {
        name: round(sum(counts.get(key, 0) for key in keys) / forwards, 2)
        for name, keys in (("launches", LAUNCHES), ("waits", WAITS))
    }
