"""Checkpoint folders on disk or on the Hub: found, and checked before anything is loaded. This
module imports no torch, so that a bad folder is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, first_line
from ..core.spec import Spec, SpecError

RUN_FILE = "ar2diff.json"  # provenance; its presence marks a folder as ours to overwrite


WEIGHTS = "model.safetensors"


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


DIFFUSION = "diffusion.json"  # of an adapter: what config.json's block is to a whole model


FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what a Hub id is asked for


CODE = ["custom_generate/*"]  # and what is read, never run, by those who compare it


def find_checkpoint(reference: str, code: bool = False, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local folder, or a Hub id with an optional `@revision`.

    Args:
        code: download the decoding code too. weights: and the weights.

    Raises:
        Ar2DiffError: neither is there.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or reference.startswith(("/", ".", "~")) or reference.count("/") > 1:
        raise Ar2DiffError(f"model {reference}: no such folder", "give a folder or a Hub id")
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=FILES + (CODE if code else []),
                ignore_patterns=[*([] if code else CODE), *([] if weights else ["*.safetensors"])],
            )
        )
    except Exception as error:  # huggingface_hub, httpx and OS errors alike mean: not to be had
        raise Ar2DiffError(
            f"model {reference}: no folder, and not to be had from the Hub ({first_line(error)})",
            "check the name and the connection, or give a local folder",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    return read_json(path / "config.json", "a checkpoint folder has a config.json")


def read_spec(path: Path) -> Spec | None:
    """The spec of a folder; None where it is an unconverted model.

    Raises:
        Ar2DiffError: the spec is not one that this version honours.
    """
    if is_adapter(path):
        return adapter_spec(path)
    try:
        return Spec.from_config(read_config(path))
    except SpecError as error:
        raise Ar2DiffError(f"{path}: {error.what}", error.fix) from None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter; the libraries take one with a config.json for one too."""
    return (path / ADAPTER_CONFIG).is_file()


def adapter_spec(path: Path) -> Spec:
    """What an adapter folder makes of its base.

    Raises:
        Ar2DiffError: it is not an adapter of ours, or its spec is not one we honour.
    """
    if not (path / DIFFUSION).is_file():
        raise Ar2DiffError(
            f"adapter {path}: it has no {DIFFUSION}, so it is none of a diffusion model",
            "train one with a peft section, on a converted model",
        )
    block = read_json(path / DIFFUSION, "").get("diffusion") or {"format": 0}
    try:
        return Spec.from_config({"diffusion": block, "mask_token_id": block.get("mask_token_id")})
    except SpecError as error:
        what = error.what.replace("config.json", DIFFUSION)
        raise Ar2DiffError(f"adapter {path}: {what}", error.fix) from None


def stored_dtypes(path: Path) -> dict[str, str]:
    """Dtype of each stored tensor, read from the safetensors headers; checks that no file is cut.

    Raises:
        Ar2DiffError: as `weight_files`; a missing shard, a cut file.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(path):
        dtypes |= tensor_dtypes(file)
    return dtypes


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names.

    Raises:
        Ar2DiffError: there are none (pickles are never opened).
    """
    index = path / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = read_json(index, "").get("weight_map")
        if not isinstance(names, dict) or not names:
            raise Ar2DiffError(f"{index}: it has no weight_map", "download the checkpoint again")
        shards = sorted(set(names.values()))
    else:
        shards = [WEIGHTS]
    if not (path / shards[0]).is_file():
        pickled = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickled:
            raise Ar2DiffError(
                f"model {path}: its weights are pickled ({pickled[0]}), which can run code",
                "convert them to safetensors first",
            )
        raise Ar2DiffError(
            f"model {path}: config.json is there but {shards[0]} is not",
            "download the checkpoint again",
        )
    return [path / shard for shard in shards]


def tensor_dtypes(file: Path) -> dict[str, str]:
    """Dtype of each tensor of a safetensors file.

    Raises:
        Ar2DiffError: it is missing, or cut.
    """
    cut = Ar2DiffError(f"model {file}: the file is cut short or damaged", "download it again")
    if not file.is_file():
        raise Ar2DiffError(f"model {file}: this shard is missing", "download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise cut
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise cut from None
    try:
        header.pop("__metadata__", None)
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
        dtypes = {name: entry["dtype"] for name, entry in header.items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise cut from None
    if any(end > size for end in ends):
        raise cut
    return dtypes


def read_json(file: Path, fix: str) -> Any:
    """The JSON object in a file.

    Raises:
        Ar2DiffError: it is not there, or none.
    """
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise Ar2DiffError(f"{file}: no such file", fix) from None
    except (OSError, ValueError) as error:
        raise Ar2DiffError(f"{file}: {error}", "download the checkpoint again") from None
    if not isinstance(value, dict):
        raise Ar2DiffError(f"{file}: not a JSON object", "download the checkpoint again")
    return value
