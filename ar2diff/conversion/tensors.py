"""Stored tensors under other names: planned from the headers of safetensors files, checked against
the stock class, copied as bytes. No tensor is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint.files import WEIGHTS
from ..checkpoint.output import write_json
from ..core.errors import Ar2DiffError
from .families import QKV, Family

CHUNK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Piece:
    """Where the bytes of a stock tensor lie in a foreign safetensors file."""

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


def pieces_of(file: Path, family: Family, model: Any) -> Iterable[Piece]:
    """What of a foreign file the stock class takes, under its names.

    Args:
        model: of the stock class, without storage.
    """
    config = model.config
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        renamed, shape = family.rename(name), tuple(entry["shape"])
        if renamed in tied or renamed.endswith("rotary_emb.inv_freq"):
            continue  # made anew by the class
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        parts = _rows(config) if QKV in renamed else {"": shape[0] if shape else 1}
        if QKV in renamed and shape[0] != sum(parts.values()):
            raise Ar2DiffError(
                f"model {file}: {name} has {shape[0]} rows, its config.json means "
                f"{sum(parts.values())}",
                "check that config.json and the weights belong together",
            )
        row = (end - start) // max(sum(parts.values()), 1)
        for part, rows in parts.items():
            cut = (rows, *shape[1:]) if shape else shape
            full = renamed.replace(QKV, part)
            yield Piece(full, entry["dtype"], cut, file, start, rows * row)
            start += rows * row


def _rows(config: Any) -> dict[str, int]:
    """Rows of query, key and value in a tensor that holds all three."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    return {"q": config.num_attention_heads * head, "k": keys, "v": keys}


def check_pieces(shards: list[list[Piece]], model: Any, path: Path) -> None:
    """Refuse tensors that are not those of the stock class, by name and by shape.

    Args:
        model: of the stock class, without storage.
    """
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    wanted = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}
    found = {piece.name: piece.shape for shard in shards for piece in shard}
    stock, fix = type(model).__name__, "check that config.json and the weights belong together"
    for names, what in (
        (wanted.keys() - found.keys(), f"lack {{}}, which {stock} needs"),
        (found.keys() - wanted.keys(), f"hold {{}}, which {stock} has no place for"),
    ):
        if names:
            raise Ar2DiffError(f"model {path}: its weights {what.format(min(names))}", fix)
    for name, shape in wanted.items():
        if found[name] != shape:
            raise Ar2DiffError(
                f"model {path}: {name} has shape {list(found[name])}, {stock} needs {list(shape)}",
                fix,
            )


def write_shards(folder: Path, shards: list[list[Piece]]) -> None:
    """Copy the tensors into as many files as they come from, and an index of more than one."""
    if len(shards) == 1:
        _write_weights(folder / WEIGHTS, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_weights(folder / name, shard)
        places |= {piece.name: name for piece in shard}
    size = sum(piece.size for shard in shards for piece in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{WEIGHTS}.index.json", index)


def _write_weights(target: Path, pieces: list[Piece]) -> None:
    """A safetensors file of bytes that lie in others: the widest numbers first, so that each tensor
    starts at a multiple of its own."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, pieces = 0, sorted(pieces, key=lambda piece: (-piece.itemsize, piece.name))
    for piece in pieces:
        ends = [offset, offset := offset + piece.size]
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            with piece.file.open("rb") as stream:
                stream.seek(piece.start)
                for left in range(piece.size, 0, -CHUNK):
                    out.write(stream.read(min(left, CHUNK)))
