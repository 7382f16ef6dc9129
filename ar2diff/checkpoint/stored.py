"""Tensors as stored in safetensors files, found and checked by the headers alone. Nothing is
loaded, and torch is not imported."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config.safe_json import parse_json
from ..core.errors import Ar2DiffError, first_line
from .files import weight_files

SAMPLES, SAMPLE = 4, 1024  # places in a tensor and bytes at each that its fingerprint reads


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor are stored.

    Attributes:
        name, dtype, shape: as the header gives them (`F32`, `BF16` ...).
        file: the safetensors file.
        start, size: in bytes, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.size // max(math.prod(self.shape), 1)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of all weight files of a folder.

    Raises:
        Ar2DiffError: as `weight_files` and `file_tensors`.
    """
    return [tensor for file in weight_files(path) for tensor in file_tensors(file)]


def stored_dtypes(path: Path) -> dict[str, str]:
    """The dtype of each stored tensor of a folder, by name.

    Raises:
        Ar2DiffError: as `stored_tensors`.
    """
    return {tensor.name: tensor.dtype for tensor in stored_tensors(path)}


def file_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        Ar2DiffError: the file is missing or cut, or its header is not valid: an unknown dtype,
            bytes that overlap, leave a gap or do not fit the shape.
    """
    if not file.is_file():
        raise Ar2DiffError(f"{file}: this weight file is missing", "download the checkpoint again")
    try:
        with safe_open(file, framework="np"):  # which checks all of the above
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise Ar2DiffError(
            f"{file} is incomplete or damaged ({first_line(error)[:100]})",
            "download the checkpoint again",
        ) from None
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(name, entry["dtype"], shape, file, start, end - start))
    return sorted(tensors, key=lambda tensor: tensor.start)


def fingerprint(path: Path) -> str:
    """sha256 of the names, dtypes and shapes of all tensors of a folder, and of up to 4 KiB of
    each, however they are split into files.

    Reading all of the weights would take as long as loading them. Training moves every number of
    a tensor that it trains, so a few places in each tensor tell a base from a retrained one.

    Raises:
        Ar2DiffError: as `stored_tensors`.
    """
    digest = hashlib.sha256()
    for tensor in sorted(stored_tensors(path), key=lambda tensor: tensor.name):
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb", buffering=0) as stream:
            for place in _places(tensor.size):
                stream.seek(tensor.start + place)
                digest.update(stream.read(min(SAMPLE, tensor.size - place)))
    return digest.hexdigest()


def _places(size: int) -> Iterable[int]:
    """Where the samples of a tensor begin: evenly spread, its first and last bytes among them."""
    if size <= SAMPLES * SAMPLE:
        return range(0, size, SAMPLE)
    return [i * (size - SAMPLE) // (SAMPLES - 1) for i in range(SAMPLES)]
