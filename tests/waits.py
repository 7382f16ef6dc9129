"""What would make the host wait for a GPU, found on a CPU: operations whose result the host reads,
or whose result has a size that depends on values."""

from __future__ import annotations

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READ = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.masked_select, aten.nonzero,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """Within this context, notes such operations in `found`, each with the lines of ours that led
    there. Copies between devices are not seen: there is one device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in INDEXED and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if packet in READ or by_mask:
            self.found.append(f"{func} at {_ours()}")
        return func(*args, **(kwargs or {}))


def _ours() -> str:
    lines = [f for f in traceback.extract_stack() if "/ar2diff/" in f.filename]
    return f"{lines[-1].filename}:{lines[-1].lineno}" if lines else "nowhere"
