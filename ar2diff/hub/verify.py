"""Comparing two copies of one model: the logits of fixed rows, and the answer to a prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.adapters import load_adapter
from ..checkpoint.compare import MERGED, far, fixed_logits
from ..checkpoint.custom_generate import read_custom_generate
from ..checkpoint.draft import load_drafting
from ..checkpoint.files import (
    ADAPTER_CONFIG,
    DRAFT_CONFIG,
    EXAMPLE,
    is_adapter,
    is_draft,
    read_json,
)
from ..checkpoint.model import Checkpoint
from ..checkpoint.stored import fingerprint
from ..conversion.images import image_sample
from ..core.errors import Ar2DiffError, option
from ..core.images import placed
from ..data.images import Shot
from ..generation.complete import load
from .card import Sample, measure
from .client import download
from .origin import Origin


def load_local(folder: Path, origin: Origin) -> Checkpoint:
    """Load the model to be published; an adapter or a draft adapter is put on its original base, if
    that is here."""
    if is_draft(folder):
        named, load_on = str(read_json(folder / DRAFT_CONFIG, "").get("base")), load_drafting
        here = next((p for p in (Path(named), folder / named) if p.is_dir()), None)
    elif is_adapter(folder):
        config, load_on = read_json(folder / ADAPTER_CONFIG, ""), load_adapter
        named = str(config.get("base_model_name_or_path"))
        here = Path(named) if Path(named).is_dir() else None
    else:
        return load(str(folder))
    published = f"{origin.name}@{origin.commit}" if origin.commit else origin.name
    return load_on(folder, device="auto", base=published if here is None else str(here))


def check_published_base(folder: Path, origin: Origin, logits: Any) -> None:
    """Refuse an adapter that behaves differently on its published base than on its original one, or
    a draft adapter that would not load on it.

    Args:
        logits: the result of `fixed_logits` on its original base.

    Raises:
        Ar2DiffError: it behaves differently.
    """
    load_on = load_drafting if is_draft(folder) else load_adapter
    hub = load_on(folder, device="auto", base=f"{origin.name}@{origin.commit}")
    if hub.draft is not None and fingerprint(hub.path) != hub.draft.spec.weights_sha256:
        raise Ar2DiffError(
            f"draft adapter {folder}: the weights of {origin.name} are not the ones it was trained "
            "for",
            f"publish its base as it is, and name that repository with {option('base')}",
        )
    _compare(logits, fixed_logits(hub), f"adapter {folder}: with the base {origin.name} it")


@torch.no_grad()
def seen_logits(checkpoint: Checkpoint) -> Any:
    """[S, V] logits of an image of noise and a few words, as its processor prepares them; None for
    a model of text, and for a draft adapter, whose base is another repository."""
    if not checkpoint.sees_images or checkpoint.draft is not None:
        return None
    inputs = placed(image_sample(checkpoint.processor), checkpoint.model)
    return checkpoint.model(**inputs, use_cache=False).logits[0].cpu()


def verify(
    name: str, commit: str, logits: Any, golden: dict[str, Sample], seen: Any = None
) -> float:
    """Download a commit to a fresh folder and compare it with the local model.

    Args:
        logits: the result of `fixed_logits` for the local model. golden: its answers, by
            prompt. seen: the result of `seen_logits`.

    Returns:
        The largest difference in the logits, relative to the largest logit.

    Raises:
        Ar2DiffError: the two models differ.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = download(name, commit, Path(place) / "model")
        checkpoint = load(str(folder))
        difference, picture = (
            _compare(logits, fixed_logits(checkpoint), f"{name}: the download"),
            None,
        )
        if seen is not None:
            what = f"{name}: the download, shown an image,"
            difference = max(difference, _compare(seen, seen_logits(checkpoint), what))
            picture = Shot(folder / EXAMPLE).pixels(name)
        code = read_custom_generate(folder).state if checkpoint.base is None else "ok"
        wrong = ["its decoding code"] if code != "ok" else []
        for prompt, answer in golden.items():
            if measure(checkpoint, prompt, False, picture)[0] != answer:
                wrong.append(f"its answer to {prompt!r}")
        if wrong:
            what = wrong[0]
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
