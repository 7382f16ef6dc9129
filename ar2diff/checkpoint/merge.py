"""Merging an adapter into its base: the result is a whole converted model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import __version__
from ..core.errors import Ar2DiffError, option
from .adapters import load_adapter
from .compare import MERGED, far, fixed_logits
from .files import ADAPTER_CONFIG, find_checkpoint, is_adapter, refuse_draft
from .io import check_saving, save
from .model import count_parameters, stored_dtype
from .output import check_output, claimed, record_of


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        adapter: the adapter as it was given. base_model: folder or Hub id of its base.
        parameters: number of parameters in the merged model.
        difference: largest difference in the logits, before and after, relative to the largest.
        rounding: the same, due to storing the merged weights in the dtype of the base.
    """

    adapter: str
    base_model: str
    parameters: int
    difference: float
    rounding: float


@torch.no_grad()
def merge(
    adapter: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Merged:
    """Make a whole converted model from an adapter and its base, in the stored dtypes of the base.

    Args:
        adapter: folder or Hub id.
        output_dir: a new or empty folder.
        base: folder or Hub id, if the base is not where the adapter says.
        overwrite: replace the model that ar2diff wrote to `output_dir`.
        dry_run: check and merge in memory, but write nothing.

    Raises:
        Ar2DiffError: as for `load_adapter` and `claimed`; or merging changes the logits.
    """
    path, output_dir = find_checkpoint(adapter), Path(output_dir)
    refuse_draft(path, "which cannot be merged: it acts on the slots of drafts alone")
    if not is_adapter(path):
        raise Ar2DiffError(
            f"{path} is not an adapter: it has no {ADAPTER_CONFIG}",
            f"give the folder of an adapter as {option('adapter')}",
        )
    check_output(output_dir, [path], overwrite=overwrite)
    checkpoint = load_adapter(path, device="auto", base=base)
    name = checkpoint.base.reference
    inputs = [path, Path(name)]
    check_output(output_dir, inputs, overwrite=overwrite)
    before = fixed_logits(checkpoint)
    checkpoint.model, checkpoint.base = checkpoint.model.merge_and_unload(), None
    merged = fixed_logits(checkpoint)
    difference = far(before, merged)
    if not difference <= MERGED:
        raise Ar2DiffError(
            f"adapter {path}: merging changes the logits by {difference:.1e} of the largest, more "
            f"than the {MERGED:.0e} allowed",
            "use the adapter without merging it",
        )
    needed = 0
    for key, parameter in checkpoint.model.named_parameters():
        dtype = stored_dtype(checkpoint, key)
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        needed += parameter.numel() * dtype.itemsize
    result = Merged(
        adapter=adapter,
        base_model=name,
        parameters=count_parameters(checkpoint)[1],
        difference=difference,
        rounding=far(merged, fixed_logits(checkpoint)),
    )
    check_saving(checkpoint)
    if dry_run:
        return result
    record = {
        "ar2diff": __version__,
        **asdict(result),
        "diffusion": checkpoint.spec.to_dict(),
        "run": record_of(path),
    }
    with claimed(output_dir, inputs, overwrite=overwrite, needed=needed) as output:
        save(checkpoint, output, record)
    return result
