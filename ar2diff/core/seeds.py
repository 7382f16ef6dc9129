"""Keyed random generators: draws depend on the key alone, not on batches or devices.

This file is copied into converted folders: it imports torch and the standard library alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch


def content_key(ids: Sequence[int]) -> int:
    """A 64-bit key of a document: a hash of its token ids."""
    data = struct.pack(f"<{len(ids)}q", *ids)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone."""
    return torch.Generator().manual_seed(content_key([k & (2**63 - 1) for k in key]) % 2**63)
