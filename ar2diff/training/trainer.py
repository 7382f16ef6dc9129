"""The adaptation trainer: `transformers.Trainer` with our loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..attention import lay_out, reading_slot, reveal_edges
from ..checkpoint import Checkpoint
from ..config import Recipe, Train
from ..data import Collator, Rows, block_length_at
from ..ranks import world_size
from .denoising import Denoising, Task, disable_dropout
from .sharding import training_kwargs


class AdaptTrainer(Denoising, Trainer):
    """Trains a converted checkpoint on whole documents; noise, anneal and block length come with
    the batch."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: TrainingArguments, **kwargs: Any
    ):
        self.set_up(checkpoint, recipe, args)
        super().__init__(model=checkpoint.model, args=args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch of the collator."""
        attention, block_length, reveal = self.attention_at(int(inputs["step"]))
        x0, masked, pos, doc = (inputs[name] for name in ("x0", "masked", "pos", "doc"))
        input_ids, slots = lay_out(inputs["xt"], x0, doc, pos, attention)
        row = torch.arange(len(x0), device=x0.device)[:, None] * input_ids.shape[1]
        slot = reading_slot(pos, attention, block_length, self.spec.prediction)
        own = torch.arange(x0.shape[1], device=x0.device).expand_as(x0)
        ar = inputs["ar"] if self.recipe.objective.ar_weight > 0 else torch.zeros_like(masked)
        task = Task(
            input_ids=input_ids,
            slots=slots,
            attention=attention,
            block_length=block_length,
            reveal=reveal,
            index=(row + slot)[masked],
            target=x0[masked],
            coef=inputs["coef"][masked],
            t=inputs["t"][masked],
            eos=inputs["eos"][masked],
            ar_index=(row + x0.shape[1] + own - 1)[ar],
            ar_target=x0[ar],
            tokens=inputs["tokens"],
        )
        return self.denoising_loss(model, task, num_items_in_batch)

    def attention_at(self, step: int) -> tuple[str, int | None, Tensor | None]:
        """Attention, block length and revealed edges of an optimiser step: the anneal."""
        attention, anneal = self.spec.attention, self.recipe.anneal
        block_length = block_length_at(self.recipe, step)
        if attention == "full" and block_length is not None:
            attention = "block_causal"  # growing: blocks until the goal
        if attention == "block_causal" and block_length >= self.recipe.data.max_length:
            attention = "full"  # one block: nothing reads the clean copy
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


def training_arguments(
    recipe: Recipe, run_dir: Path, kind: type = TrainingArguments, **more: Any
) -> Any:
    """The recipe's `train` section as transformers' arguments, of a class of them, with `more`."""
    train = recipe.train
    cuda = torch.cuda.is_available()
    bf16 = train.precision == "bf16" or (
        train.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return kind(
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
        **training_kwargs(),
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
        gradient_checkpointing=train.gradient_checkpointing,
        **more,
    )


def rows_per_step(train: Train) -> int:
    """Rows of one optimiser step over all ranks and accumulation steps."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size()


def make_collator(recipe: Recipe, mask_token_id: int) -> Collator:
    """The collator of a run."""
    return Collator(recipe, mask_token_id, rows_per_step(recipe.train))


def make_trainer(
    checkpoint: Checkpoint, recipe: Recipe, rows: Rows, run_dir: Path, callbacks: list[Any]
) -> AdaptTrainer:
    """A trainer for a converted checkpoint on a stream of rows."""
    disable_dropout(checkpoint.model)
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
