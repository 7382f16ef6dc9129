"""Between the host and a device: many small tensors in one copy.

A host that waits for a GPU at every copy keeps it idle for most of a small model's forward. So what
a forward needs is uploaded at once, without waiting, and what the host has to know of it comes back
at once: the one wait of a forward, which may be put off until the next one is launched. On a CPU
both are the tensors themselves.
This file is copied into converted folders: it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 8  # bytes, so that a part of the buffer can be read as any dtype


def upload(device: Any, *tensors: Tensor) -> list[Tensor]:
    """Tensors on a device: those of the host in one copy for which it does not wait, those that
    are not as they are."""
    device = torch.device(device)
    here = [tensor for tensor in tensors if tensor.is_cpu]
    if device.type == "cpu" or not here:
        return list(tensors)
    pinned = device.type == "cuda"  # the copy of pageable memory may wait
    held = torch.empty(sum(map(_bytes, here)), dtype=torch.uint8, pin_memory=pinned)
    for part, tensor in zip(_parts(held, here), here, strict=True):
        part.copy_(tensor)
    moved = _parts(held.to(device, non_blocking=True), here)
    return [next(moved) if tensor.is_cpu else tensor for tensor in tensors]


def download(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device on the host, in one copy for which the host waits."""
    return downloading(*tensors)()


def downloading(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors of one device to the host. The function that is returned waits for them
    and returns them; on a GPU, not for what was launched after this call."""
    if all(tensor.is_cpu for tensor in tensors):
        return lambda: list(tensors)
    held = tensors[0].new_empty(sum(map(_bytes, tensors)), dtype=torch.uint8)
    for part, tensor in zip(_parts(held, tensors), tensors, strict=True):
        part.copy_(tensor)
    if not held.is_cuda:
        return lambda: list(_parts(held.cpu(), tensors))
    copy = torch.empty(held.shape, dtype=held.dtype, pin_memory=True)
    copy.copy_(held, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(held.device))

    def wait() -> list[Tensor]:
        copied.synchronize()
        return list(_parts(copy, tensors))

    return wait


def _bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED


def _parts(held: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The places in a buffer [bytes] that hold the tensors, in their shapes and dtypes."""
    start = 0
    for tensor in tensors:
        part = held[start : start + tensor.numel() * tensor.element_size()]
        yield part.view(tensor.dtype).view(tensor.shape)
        start += _bytes(tensor)
