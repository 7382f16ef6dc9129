"""Comparing two copies of one model: the logits of fixed rows, and the answer to a prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint.adapters import load_adapter
from ..checkpoint.compare import MERGED, far, fixed_logits
from ..checkpoint.custom_generate import read_custom_generate
from ..checkpoint.files import ADAPTER_CONFIG, is_adapter, read_json
from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError
from ..generation.complete import load
from .card import Sample, measure
from .client import download
from .origin import Origin


def load_local(folder: Path, origin: Origin) -> Checkpoint:
    """Load the model to be published; an adapter is put on its original base, if that is here."""
    if not is_adapter(folder):
        return load(str(folder))
    named = str(read_json(folder / ADAPTER_CONFIG, "").get("base_model_name_or_path"))
    published = f"{origin.name}@{origin.commit}" if origin.commit else origin.name
    return load_adapter(folder, device="auto", base=named if Path(named).is_dir() else published)


def check_published_base(folder: Path, origin: Origin, logits: Any) -> None:
    """Refuse an adapter that behaves differently on its published base than on its original one.

    Args:
        logits: the result of `fixed_logits` on its original base.

    Raises:
        Ar2DiffError: it behaves differently.
    """
    hub = load_adapter(folder, device="auto", base=f"{origin.name}@{origin.commit}")
    _compare(logits, fixed_logits(hub), f"adapter {folder}: with the base {origin.name} it")


def verify(name: str, commit: str, logits: Any, golden: Sample, prompt: str) -> float:
    """Download a commit to a fresh folder and compare it with the local model.

    Args:
        logits: the result of `fixed_logits` for the local model. golden: its answer to `prompt`.

    Returns:
        The largest difference in the logits, relative to the largest logit.

    Raises:
        Ar2DiffError: the two models differ.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = download(name, commit, Path(place) / "model")
        checkpoint = load(str(folder))
        difference = _compare(logits, fixed_logits(checkpoint), f"{name}: the download")
        again = measure(checkpoint, prompt, every=False)[0]
        code = read_custom_generate(folder).state if checkpoint.base is None else "ok"
        if again != golden or code != "ok":
            what = "its decoding code" if code != "ok" else f"its answer to {prompt!r}"
            raise Ar2DiffError(
                f"{name}: the downloaded model differs from the local one in {what}", "push again"
            )
    return difference


def _compare(before: Any, after: Any, what: str) -> float:
    difference = far(before, after) if before.shape == after.shape else float("inf")
    if not difference <= MERGED:
        raise Ar2DiffError(
            f"{what} has different logits than the local model, by {difference:.1e} of the largest",
            "push again; if the logits still differ, compare the files",
        )
    return difference
