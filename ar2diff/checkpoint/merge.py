"""Merging an adapter into its base: a whole converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import Ar2DiffError
from .adapters import load_adapter
from .compare import MERGED, far, fixed_logits
from .files import ADAPTER_CONFIG, RUN_FILE, find_checkpoint, is_adapter, read_json
from .io import save
from .model import count_parameters, stored_dtype
from .output import check_output, clear_output


@torch.no_grad()
def merge(
    adapter: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Make a whole converted model of an adapter and its base, in the base's stored dtype.

    Args:
        base: folder or Hub id, where the base is elsewhere than the adapter says.

    Returns:
        adapter, base, parameters; difference: of logits before and after, the largest over the
        largest logit; rounding: what storing it in the base's dtype adds.

    Raises:
        Ar2DiffError: as `load_adapter`; the folder is not free; the merged model is another.
    """
    path, output_dir = find_checkpoint(adapter), Path(output_dir)
    if not is_adapter(path):
        raise Ar2DiffError(f"{path} is no adapter: it has no {ADAPTER_CONFIG}", "give an adapter")
    check_output(output_dir, [path], False, overwrite)
    checkpoint = load_adapter(path, device="auto", base=base)
    name = checkpoint.base.reference
    check_output(output_dir, [path, Path(name)], False, overwrite)
    before = fixed_logits(checkpoint)
    checkpoint.model, checkpoint.base = checkpoint.model.merge_and_unload(), None
    merged = fixed_logits(checkpoint)
    difference = far(before, merged)
    if not difference <= MERGED:
        raise Ar2DiffError(
            f"adapter {path}: merging changes the logits by {difference:.1e}, over {MERGED:.0e}",
            "use the adapter as it is",
        )
    for key, parameter in checkpoint.model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(checkpoint, key)).to(parameter.dtype)
    result = {
        "adapter": adapter,
        "base_model": name,
        "parameters": count_parameters(checkpoint.model)[1],
        "difference": difference,
        "rounding": far(merged, fixed_logits(checkpoint)),
    }
    if dry_run:
        return result
    if overwrite and output_dir.is_dir():
        clear_output(output_dir)
    run = path / RUN_FILE
    record = {"ar2diff": __version__, **result, "diffusion": checkpoint.spec.to_dict()}
    save(checkpoint, output_dir, record | {"run": read_json(run, "") if run.is_file() else None})
    return result
