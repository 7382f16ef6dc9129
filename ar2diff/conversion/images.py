"""What a base does with images, found with a small one before anything is converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model import Checkpoint, causal_spec
from ..core.errors import Ar2DiffError
from ..core.probe import tolerance
from ..core.spec import Spec
from .image_probe import probe_images, reach_of

SIZE = (48, 40)  # pixels of the image that is tried
WORDS = "a b c d e f g h i j k l m n o p"  # more tokens than two blocks of the probe


def sample_image() -> Any:
    """An image of noise."""
    from PIL import Image

    pixels = torch.rand(SIZE[1], SIZE[0], 3, generator=torch.Generator().manual_seed(0))
    return Image.fromarray((255 * pixels).byte().numpy())


def image_sample(processor: Any) -> dict[str, Tensor]:
    """What a processor makes of an image of noise and a few words behind it, one row."""
    text = f"{processor.image_token} {WORDS}"
    return dict(processor(text=text, images=sample_image(), return_tensors="pt"))


def reach_in(checkpoint: Checkpoint) -> str | None:
    """The `images` of the spec of a base; None for a model of text.

    Raises:
        Ar2DiffError: none of our masks reads images as the base does; or its processor cannot be
            loaded.
    """
    if not checkpoint.sees_images:
        return None
    model = checkpoint.model
    if model.device.type == "meta":  # it has no weights, and will read nothing
        return "causal"
    reach, error = reach_of(model, causal_spec(model), image_sample(checkpoint.processor))
    if error > tolerance(model):
        raise Ar2DiffError(
            f"model {checkpoint.path}: no mask reads images as {type(model).__name__} does; "
            f"with {reach}, the nearest, logits are off by {error:.0e} of the largest",
            "use a vision-language model of another class",
        )
    return reach


def image_problems(checkpoint: Checkpoint, spec: Spec) -> list[str]:
    """What `probe_images` finds; nothing for a model of text."""
    if not checkpoint.sees_images:
        return []
    return probe_images(checkpoint.model, spec, image_sample(checkpoint.processor))
