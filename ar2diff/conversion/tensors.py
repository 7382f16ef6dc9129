"""Stored tensors under other names: planned from the headers of safetensors files, checked against
the stock class, copied as bytes. No tensor is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint.files import WEIGHTS
from ..checkpoint.output import write_json
from ..checkpoint.stored import StoredTensor, file_tensors
from ..core.errors import Ar2DiffError
from .families import QKV, Family

CHUNK = 1 << 24  # bytes copied at a time
BELONG = "check that config.json and the weights belong together"


def renamed_tensors(file: Path, family: Family, model: Any) -> Iterable[StoredTensor]:
    """The tensors of a foreign file that the stock class takes, under its names.

    Args:
        model: of the stock class, without storage.

    Raises:
        Ar2DiffError: as `file_tensors`; a tensor has other rows than the config implies.
    """
    config = model.config
    for tensor in file_tensors(file):
        renamed, shape = family.rename(tensor.name), tensor.shape
        if renamed in _tied(model) or renamed.endswith("rotary_emb.inv_freq"):
            continue  # computed by the class itself
        parts = {"": shape[0] if shape else 1}
        if QKV in renamed:
            parts = _rows(config)
            if not shape or shape[0] != sum(parts.values()):
                raise Ar2DiffError(
                    f"model {file}: {tensor.name} has shape {list(shape)}, but its config.json "
                    f"implies {sum(parts.values())} rows",
                    BELONG,
                )
        start, row = tensor.start, tensor.size // max(sum(parts.values()), 1)
        for part, rows in parts.items():
            yield replace(
                tensor,
                name=renamed.replace(QKV, part),
                shape=(rows, *shape[1:]) if shape else shape,
                start=start,
                size=rows * row,
            )
            start += rows * row


def _rows(config: Any) -> dict[str, int]:
    """How many rows query, key and value have in a tensor that holds all three."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    return {"q": config.num_attention_heads * head, "k": keys, "v": keys}


def check_tensors(
    tensors: Iterable[StoredTensor], model: Any, path: Path, others: bool = False
) -> None:
    """Refuse tensors that are not those of the stock class, by name and by shape.

    Args:
        model: of the stock class, without storage.
        path: named in errors.
        others: accept further tensors, as transformers does when it loads a checkpoint.

    Raises:
        Ar2DiffError: a tensor is missing, has another shape, or has no place in the class.
    """
    state = {name: t for name, t in model.state_dict().items() if name not in _tied(model)}
    wanted = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}
    found = {tensor.name: tensor.shape for tensor in tensors}
    stock = type(model).__name__
    if missing := wanted.keys() - found.keys():
        raise Ar2DiffError(
            f"model {path}: {min(missing)} is missing from its weights, but {stock} needs it",
            BELONG,
        )
    if not others and (more := found.keys() - wanted.keys()):
        raise Ar2DiffError(
            f"model {path}: its weights contain {min(more)}, which is not part of {stock}", BELONG
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise Ar2DiffError(
                f"model {path}: {name} has shape {list(found[name])}, but {stock} needs "
                f"{list(shape)}",
                BELONG,
            )


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers in the same dtype."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def write_shards(folder: Path, shards: Sequence[Sequence[StoredTensor]]) -> None:
    """Copy the tensors into as many files as they come from, with an index if there are several."""
    if len(shards) == 1:
        _write_weights(folder / WEIGHTS, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_weights(folder / name, shard)
        places |= {tensor.name: name for tensor in shard}
    size = sum(tensor.size for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{WEIGHTS}.index.json", index)


def _tied(model: Any) -> Iterable[str]:
    """Names of the tensors that the class takes from others, so that no file has to hold them."""
    return model.all_tied_weights_keys if model.config.tie_word_embeddings else ()


def _write_weights(target: Path, tensors: Sequence[StoredTensor]) -> None:
    """A safetensors file of bytes that lie in others. The widest numbers come first, so that each
    tensor starts at a multiple of its own width."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, tensors = 0, sorted(tensors, key=lambda tensor: (-tensor.itemsize, tensor.name))
    for tensor in tensors:
        ends = [offset, offset := offset + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            out.writelines(_chunks(tensor))


def _chunks(tensor: StoredTensor) -> Iterable[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for left in range(tensor.size, 0, -CHUNK):
            yield stream.read(min(left, CHUNK))
