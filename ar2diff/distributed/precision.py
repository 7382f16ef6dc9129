"""The precision that this machine computes in."""

from __future__ import annotations

import torch


def computes_in_bf16(precision: str = "auto") -> bool:
    """Whether training computes in bfloat16, over float32 master weights.

    Args:
        precision: `bf16`, `fp32`, or `auto`: bfloat16 on an accelerator that has it.
    """
    if precision != "auto":
        return precision == "bf16"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
