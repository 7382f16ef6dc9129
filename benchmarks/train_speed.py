"""Speed and memory of a step of `adapt` against the two ways in which others do it.

    OMP_NUM_THREADS=1 python benchmarks/train_speed.py              # stories3M's shape, 32k rows
    python benchmarks/train_speed.py --vocabulary 4096 --rows 8     # quicker
    python benchmarks/train_speed.py --gpu                          # Qwen3 0.6B's shape; needs CUDA

A model of random weights, and rows of one document that fills them; a step is loss, backward pass,
the gradient's norm and AdamW. The ways compute the same loss of the same noise, and the same
gradient, to 1e-5: the learning rate is 0, so that every step is checked.

    ours          the loss of masked tokens, and of those of the AR loss, through the head in parts
    compiled      the same with train.compile
    all logits    logits at all positions; without an AR loss, cross-entropy of the noisy copy
    dense masks   ours, but masks are written out as others do; on CPUs ours are dense too
    both          of these

Every repeat runs a step of every way, interleaved, in one process; ratios are taken within a
repeat, figures are medians. Seconds on CPUs are those of the process, so that other load counts
little; with one thread they are a quiet core's. A token counts once, however many copies of it are
computed. Memory is the peak above the loaded model over a step (gradients and optimizer included)
in a fresh process for each way. Prediction is `same`, so that the noisy copy alone is enough for
the others, and no id is suppressed, as they do not. Results replace
benchmarks/results/train_speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from ar2diff.cli.output import quiet
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.attention import PADDING, Slots, model_mask
from ar2diff.core.spec import Spec
from ar2diff.data.documents import DocumentPart
from ar2diff.diffusion import task as task_module
from ar2diff.training.adapt import AdaptTrainer, make_collator
from ar2diff.training.arguments import training_arguments

RESULTS = Path(__file__).parent / "results" / "train_speed.jsonl"
IGNORED = -100
STORIES3M = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
CASES = (("full", 0.0), ("block_causal", 0.0), ("causal_context", 0.0), ("causal_context", 0.3))


class Way(NamedTuple):
    """Logits at all positions? Masks as others write them? `train.compile`?"""

    everywhere: bool = False
    rebuilt: bool = False
    compiled: bool = False


WAYS = {
    "ours": Way(),
    "compiled": Way(compiled=True),
    "all logits": Way(everywhere=True),
    "dense masks": Way(rebuilt=True),
    "both": Way(everywhere=True, rebuilt=True),
}


@dataclass(frozen=True)
class Job:
    """What is measured; `peak` is the device's FLOP/s, None on CPUs."""

    shape: dict[str, Any]
    vocabulary: int
    rows: int
    length: int
    peak: float | None

    @property
    def device(self) -> str:
        return "cuda" if self.peak else "cpu"


def dense(_model: Any, slots: Slots, attention: str, block: int | None, *_: Any) -> Tensor:
    """[B, 1, S, S] bool, from the layout of a row and the padding, as BD3LM's code does it."""
    real, index = slots.doc != PADDING, torch.arange(slots.doc.shape[1], device=slots.doc.device)
    if attention == "full":
        edges = torch.ones(len(index), len(index), dtype=torch.bool, device=index.device)
        return edges & real[:, None, None, :]
    half = len(index) // 2
    q, k = index[:, None], index[None, :]
    of_q, of_k, clean_q, clean_k = q % half // block, k % half // block, q >= half, k >= half
    inside = (of_q == of_k) & ~clean_q & ~clean_k
    before = (of_q > of_k) & ~clean_q & clean_k
    past = q >= k if attention == "causal_context" else of_q >= of_k
    return (inside | before | (past & clean_q & clean_k)) & real[:, None, None, :]


@dataclass(frozen=True)
class Tokens:
    """What a trainer asks of a tokenizer."""

    size: int

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}


class Step(AdaptTrainer):
    """Our trainer, or our trainer with its loss as others compute it."""

    way = "ours"

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        mask_of, divisors = dense if WAYS[self.way].rebuilt else model_mask, num_items_in_batch
        if not WAYS[self.way].everywhere:
            with patch.object(task_module, "model_mask", mask_of):
                return super().compute_loss(model, inputs, return_outputs, divisors)
        wanted = self.task_of(inputs)
        task = wanted.task
        mask = mask_of(model, task.slots, task.attention, task.block_length, None)
        logits = model(
            input_ids=task.input_ids, attention_mask=mask, position_ids=task.slots.pos,
            use_cache=False,
        ).logits  # fmt: skip
        weight = torch.zeros(task.input_ids.numel(), device=logits.device)
        labels = torch.full_like(weight, IGNORED, dtype=torch.long)
        labels[task.index], weight[task.index] = task.target, wanted.coef / divisors[0]
        ar_weight = self.recipe.objective.ar_weight
        labels[wanted.ar_index] = wanted.ar_target
        weight[wanted.ar_index] = ar_weight / divisors[1]
        labels, weight = labels.view_as(task.input_ids), weight.view_as(task.input_ids)
        if task.attention != "full" and not len(wanted.ar_index):  # the noisy copy alone
            half = labels.shape[1] // 2
            logits, labels, weight = logits[:, :half], labels[:, :half], weight[:, :half]
        ce = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return (weight.flatten() * ce).sum()


class Bench:
    """One model, its optimizer and one noised batch, that any way may take a step with; compiled
    ways have one of their own."""

    def __init__(self, job: Job, attention: str, ar_weight: float, folder: str, compiled: bool):
        self.job = job
        recipe = load_recipe(
            None,
            [
                f"convert.attention={attention}", "convert.prediction=same",
                f"objective.ar_weight={ar_weight}", f"data.max_length={job.length}",
                f"train.per_device_train_batch_size={job.rows}", f"train.compile={compiled}",
            ],
        )  # fmt: skip
        torch.manual_seed(0)
        config = AutoConfig.for_model(**job.shape, vocab_size=job.vocabulary)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(job.device)
        mask = job.vocabulary - 1
        spec = Spec(
            format=1, noise="mask", mask_token_id=mask, attention=attention, prediction="same",
            ar_mode=ar_weight > 0, block_length=recipe.convert.block_length,
            local_window=None, max_length=job.length,
        )  # fmt: skip
        checkpoint = Checkpoint(Path(folder), self.model, Tokens(job.vocabulary), spec, {})
        collator = make_collator(recipe, checkpoint.noise)
        arguments = training_arguments(recipe, Path(folder))
        self.trainer = Step(checkpoint, recipe, arguments, data_collator=collator)
        self.trainer.suppressed[:] = False
        ids = torch.randint(3, mask, (job.rows, job.length)).tolist()
        batch = collator(
            [(i, [DocumentPart(row, job.length, 1, 0, i)]) for i, row in enumerate(ids)]
        )
        step = batch.pop("step")
        self.batch = {name: value.to(job.device) for name, value in batch.items()}
        self.batch["step"] = step
        self.logits = int(batch["scored"].sum() + (ar_weight > 0) * batch["ar"].sum())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)  # every step is alike

    def step(self, way: str) -> tuple[float, Tensor]:
        """Seconds of a training step, and its loss and gradient in one."""
        self.trainer.way = way
        if self.job.peak:
            self.model.set_attn_implementation("sdpa" if WAYS[way].rebuilt else "flex_attention")
        clock = time.perf_counter if self.job.peak else time.process_time
        start = clock()
        divisors = torch.stack([self.batch["divisor"], self.batch["ar_divisor"]]).float()
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, self.batch, num_items_in_batch=divisors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        self.optimizer.step()
        if self.job.peak:
            torch.cuda.synchronize()
        seconds = clock() - start
        found = [loss.detach()[None], *(p.grad.flatten() for p in self.model.parameters())]
        self.optimizer.zero_grad()
        return seconds, torch.cat(found)

    def make_state(self) -> None:
        """The optimizer's, by a step without gradients."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def flops(self) -> float:
        """Of our step: 6 a parameter for each slot of the layers and each wanted logit of the head,
        attention left out."""
        head = self.model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for p in self.model.parameters()) - head
        copies = 1 if self.trainer.spec.attention == "full" else 2
        return 6.0 * (layers * copies * self.batch["x0"].numel() + head * self.logits)


def measure(job: Job, attention: str, ar_weight: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of results of all ways."""
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(job, attention, ar_weight, folder, on) for on in (False, True)]
        for bench in benches:
            bench.make_state()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        right, tolerance = None, 1e-2 if job.peak else 1e-5  # bf16
        for way in WAYS:
            benches[WAYS[way].compiled].step(way)
        for repeat in range(repeats):
            turn = repeat % len(WAYS)
            for way in [*WAYS][turn:] + [*WAYS][:turn]:
                taken, found = benches[WAYS[way].compiled].step(way)
                seconds[way].append(taken)
                right = found if right is None else right
                torch.testing.assert_close(found, right, rtol=0, atol=tolerance)
        flops, tokens = benches[0].flops, benches[0].batch["x0"].numel()
    for way in WAYS:
        yield {
            "attention": attention, "ar_weight": ar_weight, "way": way,
            "tokens_per_second": [round(tokens / s, 1) for s in seconds[way]],
            "mfu": flops / statistics.median(seconds[way]) / job.peak if job.peak else None,
            "model": job.shape["model_type"], "vocabulary": job.vocabulary, "rows": job.rows,
            "length": job.length, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if job.peak else "cpu",
        }  # fmt: skip


def with_memory(job: Job, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of results, each with what a fresh process needs."""
    for row in rows:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            of = (row["attention"], row["ar_weight"], row["way"])
            yield row | {"memory_mb": round(fresh.submit(peak_memory, job, *of).result() / 1e6)}


def peak_memory(job: Job, attention: str, ar_weight: float, way: str) -> int:
    """Bytes above the loaded model over a step, of this process or of its GPU."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(job, attention, ar_weight, folder, WAYS[way].compiled)
        if job.peak:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what there is
            before = status("VmRSS")
        bench.make_state()
        bench.step(way)
        return (torch.cuda.max_memory_allocated() if job.peak else status("VmHWM")) - before


def status(name: str) -> int:
    """Bytes, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| attention | AR loss | way | tokens/s | ours is | memory above the model | ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    ours: dict[str, Any] = {}
    for row in results:
        ours = row if row["way"] == "ours" else ours
        pairs = zip(ours["tokens_per_second"], row["tokens_per_second"], strict=True)
        faster = statistics.median(a / b for a, b in pairs)
        mfu = f" (MFU {row['mfu']:.0%})" if row["mfu"] else ""
        lines.append(
            f"| {row['attention']} | {'yes' if row['ar_weight'] else 'no'} | {row['way']} "
            f"| {statistics.median(row['tokens_per_second']):,.0f}{mfu} | {faster:.2f}x "
            f"| {row['memory_mb']:,} MB | {ours['memory_mb'] / row['memory_mb']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="Qwen3 0.6B's shape, bf16, BlockMask")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the GPU in bf16")
    parser.add_argument("--vocabulary", type=int, help="32000; with --gpu 151936")
    parser.add_argument("--rows", type=int, help="of a step: 32; with --gpu 8")
    parser.add_argument("--length", type=int, help="tokens of a row: 128; with --gpu 512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.output.read_text().splitlines()]))
        return
    if args.gpu and not torch.cuda.is_available():
        print("error: --gpu: torch finds no CUDA device", file=sys.stderr)
        print("  fix: run it where there is one, or leave --gpu out", file=sys.stderr)
        sys.exit(2)
    quiet()
    job = Job(
        QWEN3 if args.gpu else STORIES3M,
        args.vocabulary or (151_936 if args.gpu else 32_000),
        args.rows or (8 if args.gpu else 32),
        args.length or (512 if args.gpu else 128),
        args.peak_tflops * 1e12 if args.gpu else None,
    )
    args.output.write_text("")
    results = []
    for case in CASES:
        results += with_memory(job, list(measure(job, *case, args.repeats)))
        args.output.write_text("".join(f"{json.dumps(row)}\n" for row in results))
    print(table(results))


if __name__ == "__main__":
    main()
