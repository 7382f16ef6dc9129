"""The adaptation trainer: `transformers.Trainer` with our loss, divisor and whole checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..attention import lay_out, model_mask, reading_slot, reveal_edges
from ..checkpoint import Checkpoint, disk_errors, sync
from ..config import Recipe, Train
from ..data import Collator, Rows, block_length_at
from ..evaluation import suppressed_of
from ..forward import logits_at
from ..objective import cross_entropy
from .meter import Meter


class AdaptTrainer(Trainer):
    """Trains a converted checkpoint to denoise.

    The loss is a sum over the global batch divided by a divisor of the global batch, so neither
    accumulation nor ranks scale it; noise, anneal and block length come with the batch.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: TrainingArguments, **kwargs: Any
    ):
        self.recipe, self.spec = recipe, checkpoint.spec
        self.suppressed = suppressed_of(checkpoint).to(args.device)
        self._seen = Meter(args.device)
        super().__init__(model=checkpoint.model, args=args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Masked cross-entropy of the noisy copy plus the AR loss of the clean one."""
        attention, block_length, reveal = self.attention_at(int(inputs["step"]))
        x0, masked, pos, doc = (inputs[name] for name in ("x0", "masked", "pos", "doc"))
        input_ids, slots = lay_out(inputs["xt"], x0, doc, pos, attention)
        inner = self.accelerator.unwrap_model(model)
        mask = model_mask(inner, slots, attention, block_length, self.spec.local_window, reveal)

        # Logits are computed where they are wanted: masked tokens, then tokens of the AR loss.
        row = torch.arange(len(x0), device=x0.device)[:, None] * input_ids.shape[1]
        slot = reading_slot(pos, attention, block_length, self.spec.prediction)
        own = torch.arange(x0.shape[1], device=x0.device).expand_as(x0)
        ar = inputs["ar"] if self.recipe.objective.ar_weight > 0 else torch.zeros_like(masked)
        index = torch.cat([(row + slot)[masked], (row + x0.shape[1] + own - 1)[ar]])
        logits = logits_at(
            model,
            index,
            head=inner.get_output_embeddings(),
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=slots.pos,
        )
        count = int(masked.sum())
        ce = cross_entropy(logits[:count], x0[masked], self.suppressed)
        divisor, ar_divisor = num_items_in_batch
        loss = (inputs["coef"][masked] * ce).sum() / divisor
        if ar.any():
            ar_ce = cross_entropy(logits[count:], x0[ar])  # the AR mode keeps the whole vocabulary
            loss = loss + self.recipe.objective.ar_weight * ar_ce.sum() / ar_divisor
            self._seen.add_ar(ar_ce)
        self._seen.add(inputs, logits[:count], ce)
        return loss * self.accelerator.num_processes  # gradients are averaged over ranks

    def attention_at(self, step: int) -> tuple[str, int | None, Tensor | None]:
        """Attention, block length and revealed edges of an optimiser step: the anneal."""
        attention, anneal = self.spec.attention, self.recipe.anneal
        block_length = block_length_at(self.recipe, step)
        if attention == "full" and block_length is not None:
            attention = "block_causal"  # growing: blocks until the goal
        reveal = None
        if anneal.kind == "reveal":
            length = self.recipe.data.max_length
            reveal = reveal_edges(
                step / anneal.steps,
                length,
                block_length or length,
                self.recipe.train.seed,
                step,
                self.args.device,
            )
        return attention, block_length, reveal

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


def training_arguments(recipe: Recipe, run_dir: Path) -> TrainingArguments:
    """The recipe's `train` section as transformers' arguments."""
    train = recipe.train
    cuda = torch.cuda.is_available()
    bf16 = train.precision == "bf16" or (
        train.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return TrainingArguments(
        output_dir=str(run_dir),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "wsd": "warmup_stable_decay"}.get(
            train.schedule, "constant_with_warmup"
        ),
        lr_scheduler_kwargs={"num_decay_steps": train.decay_steps}
        if train.schedule == "wsd"
        else {},
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=0.9,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        optim="sgd" if train.optimizer == "sgd" else "adamw_torch",
        bf16=bf16,
        use_cpu=not cuda,
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=train.save_steps,
        report_to=train.report_to,
        remove_unused_columns=False,
        # Every rank reads the stream and takes its own batches of it; nothing is broadcast.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
    )


def rows_per_step(train: Train) -> int:
    """Rows of one optimiser step over all ranks and accumulation steps."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world


def make_collator(recipe: Recipe, mask_token_id: int) -> Collator:
    """The collator of a run."""
    return Collator(recipe, mask_token_id, rows_per_step(recipe.train))


def make_trainer(
    checkpoint: Checkpoint, recipe: Recipe, rows: Rows, run_dir: Path, callbacks: list[Any]
) -> AdaptTrainer:
    """A trainer for a converted checkpoint on a stream of rows."""
    _disable_dropout(checkpoint.model)
    trainer = AdaptTrainer(
        checkpoint,
        recipe,
        training_arguments(recipe, run_dir),
        train_dataset=rows,
        data_collator=make_collator(recipe, checkpoint.spec.mask_token_id),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, which is for results
    return trainer


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
        ("embeddings", [*embeddings, model.get_output_embeddings()]),
        ("attention", attention),
    ):
        for module in modules:
            for parameter in module.parameters():
                kinds.setdefault(parameter, kind if parameter.ndim > 1 else "other")
    for parameter in model.parameters():
        kinds.setdefault(parameter, "mlp" if parameter.ndim > 1 else "other")
    return kinds


def _disable_dropout(model: Any) -> None:
    """Dropout is noise that no seed of ours governs; masking regularises enough."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
