"""The `train` section of a recipe as arguments for a transformers trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..config.recipe import Recipe, Train
from ..core.errors import Ar2DiffError, option
from ..distributed.precision import computes_in_bf16
from ..distributed.ranks import world_size
from ..distributed.sharding import training_kwargs


def training_arguments(
    recipe: Recipe, run_dir: Path, kind: type = TrainingArguments, **more: Any
) -> Any:
    """The `train` section as an instance of a TrainingArguments class, with `more` added."""
    train = recipe.train
    cuda = torch.cuda.is_available()
    more = {"per_device_eval_batch_size": train.per_device_train_batch_size, **more}
    return kind(
        output_dir=str(run_dir),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        lr_scheduler_kwargs={"num_decay_steps": train.decay_steps}
        if train.schedule == "warmup_stable_decay"
        else {},
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=0.9,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        optim=optimizer_name(train.optimizer, cuda),
        bf16=computes_in_bf16(train.precision),
        use_cpu=not cuda,
        **training_kwargs(),
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=train.save_steps,
        report_to=train.report_to,
        run_name=run_dir.parent.name,  # what trackers call it
        remove_unused_columns=False,
        # Every rank reads the whole stream and takes its own batches; nothing is broadcast.
        accelerator_config={"dispatch_batches": False, "non_blocking": cuda},
        dataloader_pin_memory=cuda,
        # One worker prepares the batches to come while a GPU computes. The rows are one stream,
        # which several workers would each read whole.
        dataloader_num_workers=int(cuda and recipe.rl is None),
        # The filter would read the loss of every micro-step; `Running.log` reports a bad one.
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        gradient_checkpointing=train.gradient_checkpointing,
        **more,
    )


def optimizer_name(optimizer: str, cuda: bool) -> str:
    """What transformers calls an optimizer of a recipe."""
    fast = "adamw_torch_fused" if cuda else "adamw_torch"
    return {"adamw": fast, "adamw8bit": "adamw_bnb_8bit", "sgd": "sgd"}[optimizer]


def check_optimizer(optimizer: str) -> None:
    """Refuse an optimizer whose library is not installed."""
    if optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise Ar2DiffError(
            f"{option('train.optimizer', 'adamw8bit')} needs bitsandbytes, which is not installed",
            f"pip install 'ar2diff[optim8bit]', or set {option('train.optimizer', 'adamw')}",
        )


def rows_per_step(train: Train) -> int:
    """Rows per optimizer step, over all ranks and accumulation steps."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size()
