"""Checkpoints in and out: whole models, and adapters on their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .adapters import load_adapter, save_adapter
from .custom_generate import write_custom_generate
from .files import RUN_FILE, find_checkpoint, is_adapter
from .model import Checkpoint, load_model, stored_dtype, write_spec
from .output import staged, write_json


def load_checkpoint(
    reference: str,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load a checkpoint, or an adapter on its base. The other arguments and the errors are those of
    `model.load_model`.

    Args:
        reference: a folder, or a Hub id with an optional `@revision`.
    """
    path = find_checkpoint(reference)
    load = load_adapter if is_adapter(path) else load_model
    return load(path, attn_implementation, device, quantization, dtype=dtype)


@torch.no_grad()
def save(
    checkpoint: Checkpoint,
    output_dir: Path,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the converted checkpoint in the base's stored dtypes, config.json last, and the code
    that denoises it; of a wrapped one the adapter alone. (Checkpoints of training have no such
    code: they are there to resume from.)

    Args:
        weights: by name, where the model does not hold them whole.
    """
    if checkpoint.base is not None:
        save_adapter(checkpoint, output_dir, record, weights)
        return
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.spec is not None:
        write_spec(checkpoint, checkpoint.spec)
    for name, parameter in model.named_parameters():
        dtype = stored_dtype(checkpoint, name)
        parameter.data = parameter.data.to(dtype)
        if weights is not None:
            weights[name] = weights[name].to(dtype)
    with staged(output_dir) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        if checkpoint.spec is not None:
            write_custom_generate(folder)
        write_json(folder / RUN_FILE, record)
