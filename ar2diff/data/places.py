"""Where the tokens that enter a loss lie in a batch. Collators find them on the CPU: picking tokens
by a boolean mask would make the host wait for the GPU in every micro-step."""

from __future__ import annotations

from torch import Tensor

from ..config.sections import Distil
from ..diffusion.distillation import later_visible
from ..diffusion.task import places_of


def chosen_places(masked: Tensor, ar: Tensor, distilled: Tensor | None) -> dict[str, Tensor]:
    """What a trainer needs of a batch to pick tokens from it without waiting for the device.

    Args:
        masked, ar, distilled: [B, L] bool, the tokens with a diffusion loss, those with an AR loss,
            and the masked tokens that are distilled; None: the recipe does not distil.

    Returns:
        masked_at, ar_at: [N], [M] their places in the flattened batch; and, if it distils,
        distilled: [N] bool, which masked tokens are distilled; chosen: [D] their numbers.
    """
    found = {"masked_at": places_of(masked), "ar_at": places_of(ar)}
    if distilled is not None:
        found["distilled"] = distilled[masked]
        found["chosen"] = places_of(found["distilled"])
    return found


def distilled_tokens(
    distil: Distil, masked: Tensor, written: Tensor, visible: Tensor, block: Tensor, clean: Tensor
) -> Tensor:
    """[B, L] bool, the masked tokens that are distilled as a recipe says.

    Args:
        masked: [B, L] bool.
        written: [B, L] bool, tokens that an AR model writes: none beyond the end of a text.
        visible, block: as for `later_visible`.
        clean: [B, L] bool, tokens that are predicted at a clean slot, which sees nothing of
            their block. If the target is the AR mode being trained, their prediction is the
            target itself, and they keep their cross-entropy.
    """
    chosen = masked & written
    if distil.visible == "left":
        chosen &= clean | ~later_visible(visible, block)
    return chosen & ~clean if distil.target == "clean" else chosen
