"""What every trainer of ours shares: the loss, its divisors over the global batch, learning rates
by kind of parameter, whole checkpoints, and what is logged. A mixin over `transformers.Trainer`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import Slots, model_mask
from ..checkpoint import Checkpoint, disk_errors, sync
from ..decoding import causal_spec
from ..evaluation import suppressed_of
from ..forward import logits_at
from ..objective import cross_entropy
from ..ranks import STOPPED
from .callbacks import Stopping
from .meter import Meter
from .sharding import check_engine


@dataclass(frozen=True)
class Task:
    """A forward and what is asked of it.

    Attributes:
        input_ids: [B, S]. slots: their layout. attention, block_length, reveal: of the mask.
        index: [N] slots of the flattened [B * S] at which masked tokens are read.
        target, coef, t, eos: [N] of each, the token, its factor in the loss, its time, whether it
            is of an EOS run.
        ar_index, ar_target: [M] likewise for the AR loss of the clean copy.
        tokens: scalar, real tokens of the batch.
    """

    input_ids: Tensor
    slots: Slots
    attention: str
    block_length: int | None
    reveal: Tensor | None
    index: Tensor
    target: Tensor
    coef: Tensor
    t: Tensor
    eos: Tensor
    ar_index: Tensor
    ar_target: Tensor
    tokens: Tensor


class Denoising:
    """Trains a converted checkpoint to denoise.

    The loss is a sum over the global batch divided by a divisor of the global batch, so neither
    accumulation nor ranks scale it; what is random comes with the batch.
    """

    loss_is_scaled_for_ga = True

    def set_up(self, checkpoint: Checkpoint, recipe: Any, args: Any) -> None:
        """Call before the trainer's own `__init__`."""
        self.recipe, self.spec = recipe, checkpoint.spec or causal_spec(checkpoint.model)
        self.suppressed = suppressed_of(checkpoint).to(args.device)
        self._seen = Meter(args.device)

    def denoising_loss(self, model: Any, task: Task, divisors: Tensor) -> Tensor:
        """Masked cross-entropy of the noisy copy plus the AR loss of the clean one.

        Args:
            divisors: [2] of the diffusion and the AR loss, over the global batch.
        """
        inner = self.accelerator.unwrap_model(model)
        mask = model_mask(
            inner, task.slots, task.attention, task.block_length, self.spec.local_window,
            task.reveal,
        )  # fmt: skip
        # Logits are computed where they are wanted: masked tokens, then tokens of the AR loss.
        logits = logits_at(
            model,
            torch.cat([task.index, task.ar_index]),
            head=inner.get_output_embeddings(),
            input_ids=task.input_ids,
            attention_mask=mask,
            position_ids=task.slots.pos,
        )
        count, (divisor, ar_divisor) = len(task.index), divisors
        ce = cross_entropy(logits[:count], task.target, self.suppressed)
        loss = (task.coef * ce).sum() / divisor
        if len(task.ar_index):  # the AR mode keeps the whole vocabulary
            ar_ce = cross_entropy(logits[count:], task.ar_target)
            loss = loss + self.recipe.objective.ar_weight * ar_ce.sum() / ar_divisor
            self._seen.add_ar(ar_ce)
        self._seen.add(task, logits[:count], ce)
        return loss * self.accelerator.num_processes  # gradients are averaged over ranks

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[2] divisors of the diffusion and the AR loss, over all accumulation steps and ranks."""
        names = ("divisor", "ar_divisor", "tokens")
        totals = (
            torch.stack(
                [torch.stack([batch[name].double() for name in names]) for batch in batch_samples]
            )
            .sum(0)
            .to(device)
        )
        totals = self.accelerator.reduce(totals, "sum")
        self.state.num_input_tokens_seen += int(totals[2])
        return totals[:2].clamp(min=torch.finfo(torch.float32).tiny).to(torch.get_default_dtype())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with the recipe's factors on the learning rate of kinds of parameters."""
        optimizer = super().create_optimizer(model)
        scales = self.recipe.train.lr_scale.model_dump()
        if len(optimizer.param_groups) and any(scale != 1 for scale in scales.values()):
            kinds = parameter_kinds(self.model)
            groups = []
            for group in optimizer.param_groups:
                for scale in sorted({scales.get(kinds[p], 1.0) for p in group["params"]}):
                    params = [p for p in group["params"] if scales.get(kinds[p], 1.0) == scale]
                    groups.append({**group, "params": params, "lr": group["lr"] * scale})
            optimizer.param_groups[:] = groups
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. A SIGTERM saves a checkpoint and ends the process, with exit code 143."""
        check_engine(self.accelerator)
        stopping = Stopping(self.accelerator)
        self.add_callback(stopping)
        with stopping.listening():
            result = super().train(*args, **kwargs)
        if stopping.agreed and self.state.global_step < self.state.max_steps:
            if self.is_world_process_zero():
                print(
                    f"stopped by SIGTERM after step {self.state.global_step}, which is saved: "
                    "go on with --resume",
                    file=sys.stderr,
                )
            raise SystemExit(STOPPED)
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside and rename it: whatever is called checkpoint-N is whole."""
        run_dir = Path(self.args.output_dir)
        stage = run_dir / ".partial"
        self.args.output_dir = str(stage)
        try:
            with disk_errors(run_dir):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(run_dir, self.state.global_step, self.recipe.train.save_total_limit)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last log: CE by t, accuracy, EOS share, tokens/s."""
        if "loss" in logs:
            seen = self._seen.drain(self.accelerator)
            logs = {**logs, **seen, "tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)


def publish_checkpoint(run_dir: Path, step: int, keep: int) -> None:
    """Move `.partial/checkpoint-<step>` into place and retire all but the newest `keep`."""
    stage, name = run_dir / ".partial", f"checkpoint-{step}"
    for file in (stage / name).rglob("*"):
        if file.is_file():
            sync(file)
    if (run_dir / name).exists():
        (run_dir / name).replace(stage / f"old-{name}")
    (stage / name).replace(run_dir / name)
    for old in checkpoints(run_dir)[:-keep]:
        old.replace(stage / f"old-{old.name}")  # renamed first: never half there by its name
    shutil.rmtree(stage)


def checkpoints(run_dir: Path) -> list[Path]:
    """Training checkpoints of a run, oldest first."""
    found = run_dir.glob("checkpoint-*") if run_dir.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def parameter_kinds(model: Any) -> dict[Tensor, str]:
    """Kind of each parameter: attention, mlp, embeddings or other (norms, biases).

    Attention modules are those that say whether they are causal, as all of transformers' do.
    """
    kinds: dict[Tensor, str] = {}
    attention = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for kind, modules in (
        ("embeddings", [*embeddings, model.get_input_embeddings(), model.get_output_embeddings()]),
        ("attention", attention),
    ):
        for module in modules:
            for parameter in module.parameters():
                kinds.setdefault(parameter, kind if parameter.ndim > 1 else "other")
    for parameter in model.parameters():
        kinds.setdefault(parameter, "mlp" if parameter.ndim > 1 else "other")
    return kinds


def disable_dropout(model: Any) -> None:
    """Dropout is noise that no seed of ours governs; masking regularises enough. An adapter's is
    there because the recipe asks for it."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
