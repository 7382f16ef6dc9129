"""The precision that training computes in on this machine."""

from __future__ import annotations

import torch

# Whether `auto` is bfloat16 on a CPU that has it natively: the bound loses nothing, and a step of
# stories3M takes 1.4 times less (benchmarks/precision.py).
ON_CPU = True
NATIVE = ("avx512_bf16", "amx_bf16")  # what a CPU may have it by


def resolved_precision(precision: str) -> str:
    """`bf16` or `fp32`: what a recipe's precision means on this machine.

    Args:
        precision: `bf16`, `fp32`, or `auto`, which is bfloat16 on a GPU that supports it, and on a
            CPU that multiplies in it natively.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if gpu_has_bf16() else "fp32"
    return "bf16" if ON_CPU and cpu_has_bf16() else "fp32"


def computes_in_bf16(precision: str = "auto") -> bool:
    """Whether training computes in bfloat16, over float32 master weights. Argument as of
    `resolved_precision`."""
    return resolved_precision(precision) == "bf16"


def gpu_has_bf16() -> bool:
    """Whether there is a GPU, and it computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16. Others emulate it, which is slower than float32. A
    torch that is too old to know says no."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in NATIVE)
