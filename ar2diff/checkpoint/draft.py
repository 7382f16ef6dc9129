"""Folders of draft adapters: what is trained beside a frozen model, and which model that is.

A folder holds `draft.json`, `draft.safetensors`, the tokenizer, the base's generation config, the
decoding code and the record of the run. It has no config.json and no adapter_config.json: no other
library may take it for a model, or for an adapter without a gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..core.draft import CONFIG, WEIGHTS, load_draft, read_draft_spec
from ..core.errors import Ar2DiffError
from .adapters import name_of
from .custom_generate import write_custom_generate
from .files import draft_base
from .model import Checkpoint, load_model, load_tokenizer
from .output import Output, write_json
from .stored import file_tensors, fingerprint


def base_of(path: Path) -> tuple[str, str | None, str]:
    """How a `draft.json` names the model in a folder: reference, revision and fingerprint."""
    return *name_of(path), fingerprint(path)


def load_drafting(
    path: Path,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    base: str | None = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load the model that a draft adapter was trained for, with the adapter as its `draft`. The
    other arguments are those of `load_model`.

    Args:
        path: folder of the draft adapter.
        base: folder or Hub id to use instead of the model that the adapter names. Its weights may
            differ: drafts are verified, so only their acceptance suffers.

    Raises:
        Ar2DiffError: the base is missing, or is not the one that the adapter was trained for; the
            adapter is damaged or does not fit.
    """
    spec = read_draft_spec(path / CONFIG)
    file_tensors(path / WEIGHTS)
    folder = draft_base(path, base)
    if base is None and fingerprint(folder) != spec.weights_sha256:
        raise Ar2DiffError(
            f"draft adapter {path}: the weights of its base {folder} are not the ones it was "
            "trained for",
            "restore the base, or load the adapter with another base explicitly: its text is then "
            "that of the other model",
        )
    checkpoint = load_model(folder, attn_implementation, device, quantization, dtype)
    checkpoint.draft = load_draft(path, checkpoint.model)
    if (path / "tokenizer_config.json").is_file():
        checkpoint.tokenizer = load_tokenizer(path)
    return checkpoint


def save_draft(
    checkpoint: Checkpoint,
    output: Output,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the draft adapter of a checkpoint. Nothing of its base is written.

    Args:
        record: content of `ar2diff.json`.
        weights: {parameter name: tensor} of the trainer's module, if the adapter itself does not
            hold them whole.

    Raises:
        Ar2DiffError: as for `Output.staged`.
    """
    draft = checkpoint.draft
    if weights is not None:
        draft.load_state_dict({name.removeprefix("draft."): t for name, t in weights.items()})
    with output.staged(record) as folder:
        save_file(draft.tensors(), folder / WEIGHTS, metadata={"format": "pt"})
        save_draft_config(checkpoint, folder)


def save_draft_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files of a draft adapter except the weights and the record."""
    checkpoint.model.generation_config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    write_custom_generate(folder)
    write_json(folder / CONFIG, checkpoint.draft.spec.to_dict())
