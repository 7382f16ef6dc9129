"""The precision that training computes in on this machine."""

from __future__ import annotations

import torch


def computes_in_bf16(precision: str = "auto") -> bool:
    """Whether training computes in bfloat16, over float32 master weights.

    Args:
        precision: `bf16`, `fp32`, or `auto`, which is bfloat16 on an accelerator that supports it.
    """
    if precision != "auto":
        return precision == "bf16"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
