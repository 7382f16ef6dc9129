"""Keys of a recipe by the names that other trainers give them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# A value is part of a synonym where the name already implies it.
SYNONYMS = {
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "warmup": "train.warmup_steps",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "steps": "train.max_steps",
    "optim": "train.optimizer",
    "clip": "train.max_grad_norm",
    "bf16": "train.precision=bf16",
    "fp32": "train.precision=fp32",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "mixed_precision": "train.precision",
    "attn_impl": "train.attn_implementation",
    "torch_compile": "train.compile",
    "wandb": "train.report_to=wandb",
    "eval_steps": "eval.steps",
    "eval_dataset": "eval.data",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "mask_token": "convert.mask_token",
    "block_size": "convert.block_length",
    "lora": "peft.method=lora",
    "use_peft": "peft.method=lora",
    "use_lora": "peft.method=lora",
    "lora_r": "peft.r",
    "lora_rank": "peft.r",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "lora_target_modules": "peft.targets",
    "target_modules": "peft.targets",
    "qlora": "quantization.bits=4",
    "load_in_4bit": "quantization.bits=4",
    "use_4bit": "quantization.bits=4",
    "group_size": "rl.num_generations",
    "kl_coef": "rl.beta",
}


def key_named(word: str, keys: Iterable[str], section: str = "") -> str | None:
    """The key that a word names: the key itself, its last part, or another trainer's name for it;
    `KEY=VALUE` if that name implies the value. None if it names none.

    Args:
        keys: dotted names of all keys. section: where to look first for a last part that several
            sections have.
    """
    # Of several keys, the one inserted last stays: that of the section, else the first.
    ordered = sorted(reversed(list(keys)), key=lambda key: key.startswith(f"{section}."))
    last = {key.split(".")[-1]: key for key in ordered}
    return {**last, **SYNONYMS, **{key: key for key in ordered}}.get(word)


def key_meant(word: str, keys: Iterable[str], section: str = "") -> str | None:
    """What `key_named` finds for a word that may be misspelt."""
    keys = list(keys)
    names = {*keys, *(key.split(".")[-1] for key in keys), *SYNONYMS}
    for name in (word, *difflib.get_close_matches(word[:100], sorted(names), 1, 0.8)):
        if found := key_named(name, keys, section):
            return found
    return None
