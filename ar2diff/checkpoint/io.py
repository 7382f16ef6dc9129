"""Checkpoints in and out: whole models, and adapters and draft adapters on their bases."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import Ar2DiffError
from ..core.fitted import NOISE_FILE
from ..core.head import ATTRIBUTE
from ..core.spec import HEAD_FILE
from .adapters import load_adapter, save_adapter, save_adapter_config
from .custom_generate import write_custom_generate
from .draft import load_drafting, save_draft, save_draft_config
from .files import find_checkpoint, is_adapter, is_draft
from .model import Checkpoint, load_model, load_tokenizer, stored_dtype, write_spec
from .output import Output
from .processor import copy_processor

IN_HEAD = f"{ATTRIBUTE}."  # how the names of a diffusion head's parameters begin


def load_checkpoint(
    reference: str,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load a checkpoint, or an adapter or draft adapter on its base. The other arguments and the
    errors are those of `model.load_model`.

    Args:
        reference: a folder, or a Hub id with an optional `@revision`.
    """
    path = find_checkpoint(reference)
    load = load_drafting if is_draft(path) else load_adapter if is_adapter(path) else load_model
    return load(path, attn_implementation, device, quantization, dtype=dtype)


@torch.no_grad()
def save(
    checkpoint: Checkpoint,
    output: Output,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write a converted checkpoint in the stored dtypes of its base, with the code that denoises
    it; for a checkpoint with an adapter or a draft adapter, only that. (Training checkpoints do not
    contain the code: they are only for resuming.)

    Args:
        record: content of `ar2diff.json`; the hash of a trained diffusion head is put into it.
        weights: {parameter name: tensor}, if the model itself does not hold them whole.

    Raises:
        Ar2DiffError: as for `Output.staged`.
    """
    if checkpoint.draft is not None:
        save_draft(checkpoint, output, record, weights)
        return
    if checkpoint.base is not None:
        save_adapter(checkpoint, output, record, weights)
        return
    if weights is not None:
        weights = _without_tied(checkpoint.model, weights)
    for name, parameter in checkpoint.model.named_parameters():
        if name.startswith(IN_HEAD):
            continue
        dtype = stored_dtype(checkpoint, name)
        parameter.data = parameter.data.to(dtype)
        if weights is not None:
            weights[name] = weights[name].to(dtype)
    weights, head = _without_head(checkpoint, weights)
    if head is not None:
        record["diffusion"] = checkpoint.spec.to_dict()
    if checkpoint.spec is not None:
        write_spec(checkpoint, checkpoint.spec)
    with output.staged(record) as folder:
        checkpoint.model.save_pretrained(folder, state_dict=weights)
        if head is not None:
            (folder / HEAD_FILE).write_bytes(head)
        save_beside(checkpoint, folder)


def _without_tied(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights that were gathered from shards, without the second names of tied ones: each name was
    gathered for itself, so a file would hold the tensor twice, and once in float32."""
    again = {
        name
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if name in weights and source in weights and torch.equal(weights[name], weights[source])
    }
    return {name: x for name, x in weights.items() if name not in again}


def _without_head(
    checkpoint: Checkpoint, weights: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, bytes | None]:
    """The weights of the stock class, and the content of the diffusion head's file, whose SHA-256
    goes into the spec. Without a head, the weights as given, and None."""
    head = getattr(checkpoint.model, ATTRIBUTE, None)
    if head is None:
        return weights, None
    weights = checkpoint.model.state_dict() if weights is None else weights
    own = {name for name in weights if name.startswith(IN_HEAD)}
    head.float().load_state_dict({name.removeprefix(IN_HEAD): weights[name] for name in own})
    checkpoint.spec = replace(checkpoint.spec, head=head.described())
    return {name: x for name, x in weights.items() if name not in own}, head.to_bytes()


def check_saving(checkpoint: Checkpoint) -> None:
    """Write everything but the weights to a scratch folder, so that anything the libraries refuse
    to write is found before a run trains, not after it.

    Raises:
        Ar2DiffError: a config, generation config or tokenizer cannot be written, or the mask token
            does not keep its id.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if checkpoint.draft is not None:
                save_draft_config(checkpoint, Path(scratch))
            elif checkpoint.base is None:
                save_beside(checkpoint, Path(scratch))
            else:
                save_adapter_config(checkpoint, Path(scratch))
            again = load_tokenizer(Path(scratch))
        except Ar2DiffError:
            raise
        except Exception as error:  # each library raises classes of its own
            said = " ".join(str(error).split())[:200]
            raise Ar2DiffError(
                f"model {checkpoint.path}: the result could not be written ({said})",
                "correct its config.json, generation_config.json or tokenizer files",
            ) from error
    spec = checkpoint.spec
    if spec is not None and again.mask_token_id != spec.mask_token_id:
        raise Ar2DiffError(
            f"model {checkpoint.path}: its mask token has id {spec.mask_token_id}, but "
            f"{again.mask_token_id} after the tokenizer is saved and loaded again",
            "use a tokenizer without gaps in its ids",
        )


def save_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what lies beside the weights of a whole model: configs, tokenizer, processor, decoding
    code."""
    checkpoint.model.config.save_pretrained(folder)
    checkpoint.model.generation_config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    if checkpoint.sees_images:
        copy_processor(checkpoint.processor_path or checkpoint.path, folder)
    if checkpoint.spec is not None:
        if (fitted := checkpoint.spec.noise.fitted) is not None:
            (folder / NOISE_FILE).write_bytes(fitted.to_bytes())
        write_custom_generate(folder)
