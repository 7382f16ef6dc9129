"""Where the tokens that enter a loss lie in a batch. Collators find them on the CPU: picking tokens
by a boolean mask would make the host wait for the GPU in every micro-step."""

from __future__ import annotations

from torch import Tensor

from ..config.sections import Distil
from ..core.noise import Noise
from ..diffusion.distillation import later_visible
from ..diffusion.task import places_of


def chosen_places(scored: Tensor, ar: Tensor, distilled: Tensor | None) -> dict[str, Tensor]:
    """What a trainer needs of a batch to pick tokens from it without waiting for the device.

    Args:
        scored, ar, distilled: [B, L] bool, the tokens with a diffusion loss, those with an AR loss,
            and the scored tokens that are distilled; None: the recipe does not distil.

    Returns:
        scored_at, ar_at: [N], [M] their places in the flattened batch; and, if it distils,
        distilled: [N] bool, which scored tokens are distilled; chosen: [D] their numbers.
    """
    found = {"scored_at": places_of(scored), "ar_at": places_of(ar)}
    if distilled is not None:
        found["distilled"] = distilled[scored]
        found["chosen"] = places_of(found["distilled"])
    return found


def shown_at(noise: Noise, xt: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """What scored tokens show in the free form, `shown` [N], in row-major order.

    Args:
        xt, scored: [B, L] ids and bool.
    """
    return {"shown": xt[scored]} if noise.free else {}


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
