"""The parts of the GPU programme that train: see gpu.py."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from train_speed import QWEN3, STORIES3M, Tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import Recipe, load_recipe
from ar2diff.core.spec import Spec
from ar2diff.data.documents import DocumentPart
from ar2diff.diffusion import cross_entropy
from ar2diff.training.adapt import AdaptTrainer, make_collator
from ar2diff.training.arguments import training_arguments
from ar2diff.training.memory import estimate

STEPS, WARM = 6, 3  # of a run, and those of them that are not timed
TOKENS = 8192  # of a step
ESTIMATED = ("sdpa", "sdpa, 8-bit optimizer")  # flex saves what sdpa does
NO_FLEX = "flex_attention has a backward pass on CUDA alone"
# What is changed in a run; `head parts` and `fused` are taken away to see what they are worth.
SDPA = {"train.attn_implementation": "sdpa"}
FLEX = {"train.attn_implementation": "flex_attention"}
WAYS: dict[str, dict[str, Any]] = {
    "sdpa": SDPA,
    "flex": FLEX,
    "flex, compiled": FLEX | {"train.compile": True},
    "sdpa, all logits at once": SDPA,
    "sdpa, optimizer not fused": SDPA,
    "sdpa, 8-bit optimizer": SDPA | {"train.optimizer": "adamw8bit"},
}


def shape_of(machine: Any) -> tuple[dict[str, Any], int]:
    """The shape of a model and its vocabulary."""
    return (STORIES3M, 1024) if machine.small else (QWEN3, 151_936)


def recipe_of(length: int, rows: int, changes: dict[str, Any]) -> Recipe:
    return load_recipe(
        None,
        [
            "convert.attention=causal_context", "convert.block_length=32",
            "objective.ar_weight=0.3", f"data.max_length={length}", "eval.steps=0",
            f"train.per_device_train_batch_size={rows}", f"train.max_steps={STEPS}",
            "train.logging_steps=1000", "train.save_steps=1000",
            *(f"{key}={value}" for key, value in changes.items()),
        ],
    )  # fmt: skip


def model_of(machine: Any, layers: int | None = None) -> Any:
    """A model of random weights in float32, made on the device."""
    shape, vocabulary = shape_of(machine)
    config = AutoConfig.for_model(**shape, vocab_size=vocabulary)
    if layers is not None:
        config.num_hidden_layers = layers
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def trainer_of(
    machine: Any, model: Any, recipe: Recipe, folder: Path, callbacks: list[Any]
) -> tuple[AdaptTrainer, list[Any]]:
    """The trainer of `adapt`, and rows of one document each that fill them."""
    vocabulary, length = model.config.vocab_size, recipe.data.max_length
    spec = Spec(
        format=1, noise="mask", mask_token_id=vocabulary - 1, attention="causal_context",
        prediction="shift", ar_mode=True, block_length=recipe.convert.block_length,
        local_window=None, max_length=length,
    )  # fmt: skip
    model.set_attn_implementation(recipe.train.attn_implementation)
    checkpoint = Checkpoint(folder, model, Tokens(vocabulary), spec, {})
    count = recipe.train.per_device_train_batch_size * STEPS
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary - 1, (count, length), generator=generator).tolist()
    rows = [(n, [DocumentPart(row, length, 1, 0, n)]) for n, row in enumerate(ids)]
    trainer = AdaptTrainer(
        checkpoint, recipe, training_arguments(recipe, folder), train_dataset=rows,
        data_collator=make_collator(recipe, checkpoint.noise), callbacks=callbacks,
    )  # fmt: skip
    return trainer, rows


class Clock(TrainerCallback):
    """The seconds of each optimizer step, the device's work included."""

    def __init__(self, machine: Any):
        self.machine, self.seconds, self.start = machine, [], 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.machine.wait()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.machine.wait()
        self.seconds.append(time.perf_counter() - self.start)


def steps(machine: Any) -> Iterator[dict[str, Any]]:
    """A training step of `adapt`: milliseconds, share of the peak FLOP/s, and peak memory beside
    the estimate of `ar2diff memory`."""
    for length in (64, 128) if machine.small else (1024, 4096):
        rows = 2 if machine.small else TOKENS // length
        for name, changes in WAYS.items():
            if "flex" in name and machine.device != "cuda":
                yield {"length": length, "way": name, "left_out": NO_FLEX}
                continue
            recipe = recipe_of(length, rows, changes)
            with tempfile.TemporaryDirectory() as folder:
                yield {"length": length, "rows": rows, "way": name} | _timed(
                    machine, recipe, Path(folder), name
                )


def _timed(machine: Any, recipe: Recipe, folder: Path, way: str) -> dict[str, Any]:
    gc.collect()
    machine.forget_peak()
    clock, model = Clock(machine), model_of(machine)
    trainer, _ = trainer_of(machine, model, recipe, folder / "run", [clock])
    if way.endswith("not fused"):
        trainer.args.optim = "adamw_torch"
    part = 1 << 62 if way.endswith("at once") else cross_entropy.PART
    with patch.object(cross_entropy, "PART", part):
        trainer.train()
    seconds = statistics.median(clock.seconds[WARM:])
    tokens = recipe.train.per_device_train_batch_size * recipe.data.max_length
    peak = machine.peak_memory()
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(_flops(model, tokens) / seconds / machine.peak, 3),
        "peak_gb": None if peak is None else round(peak / 1e9, 2),
        **(
            {"estimated_gb": round(_estimated(model, recipe, folder / "base") / 1e9, 2)}
            if way in ESTIMATED
            else {}
        ),
    }


def _flops(model: Any, tokens: int) -> float:
    """Of a step: 6 a parameter for each slot of the layers, the noisy copy and the clean one, and
    for each logit of the head (all of the AR loss, half of the others); attention is left out."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.parameters()) - head
    return 6.0 * tokens * (2 * layers + 1.5 * head)


def _estimated(model: Any, recipe: Recipe, folder: Path) -> int:
    """Bytes, by `ar2diff memory` of a folder that holds no weights."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0",
        eos_token="w1", bos_token="w2",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return estimate(str(folder), recipe).bytes["one"].total


def flex(machine: Any) -> Iterator[dict[str, Any]]:
    """Loss and gradient of flex_attention against a dense mask, two layers in float32."""
    if machine.device != "cuda":
        yield {"left_out": NO_FLEX}
        return
    length = 128 if machine.small else 1024
    found = {}
    for kind in ("sdpa", "flex_attention"):
        recipe = recipe_of(
            length, 2, {"train.attn_implementation": kind, "train.precision": "fp32"}
        )
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(machine, layers=2)
            trainer, rows = trainer_of(machine, model, recipe, Path(folder), [])
            batch = trainer.data_collator(rows[:2])
            batch = trainer._prepare_inputs(batch)
            divisors = torch.stack([batch["divisor"], batch["ar_divisor"]]).float()
            loss = trainer.compute_loss(model, batch, num_items_in_batch=divisors)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found[kind] = loss.item(), gradient.cpu()
    (dense, right), (sparse, got) = found.values()
    yield {
        "length": length,
        "loss": dense,
        "loss_difference": abs(dense - sparse),
        "gradient_difference": ((got - right).norm() / right.norm()).item(),
    }
