"""Checkpoint folders on disk or on the Hub: finding them, and the checks before anything is loaded.

A downloaded folder is untrusted: its JSON is parsed within limits, and no file outside of it is
read. This module imports no torch, so that a bad folder is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config.safe_json import parse_json
from ..core.errors import Ar2DiffError, first_line, shortened
from ..core.spec import Spec

RUN_FILE = "ar2diff.json"  # provenance; only a folder that has it may be overwritten
CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DRAFT_CONFIG, DRAFT_WEIGHTS = "draft.json", "draft.safetensors"
DIFFUSION = "diffusion.json"  # for an adapter what the block in config.json is for a whole model
PROCESSOR = [  # the files of a vision-language model's processor
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
]  # fmt: skip
EXAMPLE = "ar2diff-example.png"  # the picture on the card of such a model
PROCESSOR_TEMPLATE = "chat_template.json"  # of older ones, whose tokenizers have none

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # downloaded from the Hub
CODE = ["custom_generate/*"]  # read and compared, never run
SUBFOLDERS = ("additional_chat_templates", "custom_generate")  # whose files are read as well

AGAIN = "download the checkpoint again"
MOST_JSON = 100 << 20  # bytes of a JSON file or a header, as in the safetensors library
MOST_CONFIG = 16 << 20  # bytes of any JSON file but the index

LAYERS, EXPERTS = re.compile(r".*layers?"), re.compile(r"(.*_)?(n|num)_.*experts?")  # keys
MOST_LAYERS = 256  # of a model that has fewer tensors than layers, because layers share them
MOST_EXPERTS = 1 << 14  # as many as Doge has by default
MOST_LABELS = 100_000
MOST_RANK = 1024  # of an adapter whose weights need not be looked at
PATTERNS = ("layers_pattern", "layers_to_transform", "rank_pattern", "alpha_pattern")
MOST_REPEATS = 10_000_000  # some configs repeat a list as often as an integer inside it says


IDS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


def find_checkpoint(reference: str, code: bool = False, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local folder, or a Hub id with an optional `@revision`.

    Args:
        code: whether to download the decoding code too.
        weights: whether to download the weights.

    Raises:
        Ar2DiffError: there is no such folder or Hub id, or a file in the folder leads out of it.
    """
    quoted = shortened(reference)[1:-1] if len(reference) > 200 else reference
    try:
        folder = Path(reference).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, not readable
        raise Ar2DiffError(
            f"model {quoted}: {first_line(error)}", "give a folder or a Hub id"
        ) from None
    if is_folder:
        check_entries(folder)
        return folder
    if is_file or reference.startswith(("/", ".", "~")) or reference.count("/") > 1:
        raise Ar2DiffError(f"model {quoted} does not exist", "give a folder or a Hub id")
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
    except Exception as error:  # from huggingface_hub, httpx or the OS: it is not there
        raise Ar2DiffError(
            f"model {quoted} is not a local folder, and cannot be downloaded from the Hub "
            f"({first_line(error)})",
            "check the name and the connection, or give a local folder",
        ) from error


def check_path(path: Path) -> None:
    """Refuse a path that the system cannot even look up.

    Raises:
        Ar2DiffError: a name in it is too long, or a folder on the way is not readable.
    """
    try:
        path.exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise Ar2DiffError(f"{shortened(str(path))}: {reason}", "check the name") from None


def inside(folder: Path, name: Any) -> Path:
    """The path of a file of a checkpoint folder, by the name that the folder itself gives it.

    A link may lead to another place in the folder, and in the Hub's cache to the blobs beside it.

    Raises:
        Ar2DiffError: the name or a link leads out of the folder, or to something that is no file.
    """
    outside = Ar2DiffError(
        f"model {folder}: {shortened(name)} is not a file inside the folder",
        "download the checkpoint again, or copy the file into the folder",
    )
    if not isinstance(name, str) or not name or "\\" in name:
        raise outside
    try:
        home, path = folder.resolve(), folder / name
        real = path.resolve()
        homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        if not any(real.is_relative_to(place) for place in homes):
            if path.is_symlink():
                raise Ar2DiffError(
                    f"model {folder}: {shortened(name)} is a symbolic link that leads out of the "
                    "folder",
                    "copy the file into the folder in place of the link, or give the folder that "
                    "the link leads to",
                )
            raise outside
        if real.exists() and not real.is_file():
            raise outside
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        raise outside from None
    return path


def check_entries(folder: Path) -> None:
    """Refuse a folder in which a file that the libraries would read is a link that leads out of the
    folder, a device, a pipe or a folder. What is read here may be published later.

    Raises:
        Ar2DiffError: as `inside`.
    """
    try:
        entries = [entry for entry in folder.iterdir() if any(map(entry.match, FILES))]
        for name in SUBFOLDERS:
            if (folder / name).is_symlink():
                inside(folder, name)
            entries += [e for e in (folder / name).rglob("*") if e.is_symlink() or not e.is_dir()]
    except OSError as error:
        raise Ar2DiffError(
            f"model {folder}: {error.strerror or error}",
            "make sure that the folder and its files are readable",
        ) from None
    for entry in entries:
        inside(folder, str(entry.relative_to(folder)))


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder.

    Raises:
        Ar2DiffError: as `read_json`.
    """
    return read_json(path / CONFIG, "give a checkpoint folder, which has a config.json")


def read_spec(path: Path) -> Spec | None:
    """The spec of a folder; None for an unconverted model. That of a draft adapter is its base's.

    Raises:
        Ar2DiffError: the spec is not one that this version honours.
    """
    if is_draft(path):
        return read_spec(draft_base(path))
    if is_adapter(path):
        return adapter_spec(path)
    return _spec(path / CONFIG, read_config(path))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter. One that has a config.json as well is an adapter to the
    libraries too."""
    return (path / ADAPTER_CONFIG).is_file()


def is_draft(path: Path) -> bool:
    """Whether a folder holds a draft adapter."""
    return (path / DRAFT_CONFIG).is_file()


def draft_base(path: Path, base: str | None = None) -> Path:
    """The folder of the model that a draft adapter drafts for.

    Args:
        base: folder or Hub id to use instead of the one that the adapter names.

    Raises:
        Ar2DiffError: there is none, or it is an adapter itself.
    """
    fix = "move it there, or give the model that the adapter was trained for as its base"
    values = read_json(path / DRAFT_CONFIG, AGAIN)
    named, revision = values.get("base"), values.get("revision")
    if not isinstance(named, str) or not isinstance(revision, str | None):
        raise Ar2DiffError(f"{path / DRAFT_CONFIG} does not name a base", AGAIN)
    beside = path / named
    if base is not None:
        named, revision = base, None
    elif not Path(named).is_absolute() and beside.is_dir():
        named = str(beside)
    try:
        folder = find_checkpoint(f"{named}@{revision}" if revision else named)
    except Ar2DiffError as error:
        what = f"draft adapter {path}: its base was not found: {error.what}"
        raise Ar2DiffError(what, fix) from None
    if is_adapter(folder) or is_draft(folder):
        raise Ar2DiffError(f"draft adapter {path}: its base {folder} is an adapter itself", fix)
    return folder


def refuse_draft(path: Path, why: str) -> None:
    """Refuse a draft adapter, naming the model that it drafts for.

    Args:
        why: what cannot be done with one, with the reason.

    Raises:
        Ar2DiffError: the folder holds one.
    """
    if is_draft(path):
        base = read_json(path / DRAFT_CONFIG, AGAIN).get("base")
        raise Ar2DiffError(
            f"model {path} is a draft adapter, {why}", f"use its base model, {shortened(base)}"
        )


def adapter_spec(path: Path) -> Spec:
    """The spec of an adapter on its base.

    Raises:
        Ar2DiffError: it is not an adapter of a diffusion model, or its spec is not one that this
            version honours.
    """
    if not (path / DIFFUSION).is_file():
        raise Ar2DiffError(
            f"adapter {path} is not an adapter for a diffusion model, because it has no "
            f"{DIFFUSION}",
            "train one on a converted model, with a recipe that has a peft section",
        )
    _check_adapter(path)
    block = read_json(path / DIFFUSION, AGAIN).get("diffusion")
    if not isinstance(block, dict):
        raise Ar2DiffError(
            f"{path / DIFFUSION}: diffusion is {shortened(block)}, but must be a JSON object",
            "train the adapter again",
        )
    mask_token_id = block.get("mask_token_id")
    return _spec(path / DIFFUSION, {"diffusion": block, "mask_token_id": mask_token_id})


def _check_adapter(path: Path) -> None:
    """Refuse an adapter whose config would cost too much: names of layers given as regular
    expressions, which may backtrack forever, and matrices of a rank that no stored one has."""
    file, weights = path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS
    values = read_json(file, AGAIN)
    fix = "download the adapter again, or merge it into its base with peft first"
    for name in PATTERNS:
        if values.get(name):
            raise Ar2DiffError(f"{file}: {name} is set, which ar2diff does not support", fix)
    for name in ("target_modules", "exclude_modules"):
        if not isinstance(values.get(name), list | None):
            raise Ar2DiffError(
                f"{file}: {name} is {shortened(values[name])}, but must be a list of names", fix
            )
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise Ar2DiffError(
            f"{file}: bias is {shortened(values['bias'])}, which peft does not know", fix
        )
    tokens = values.get("trainable_token_indices")
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        if not isinstance(ids, list) or not all(type(n) is int and n >= 0 for n in ids):
            raise Ar2DiffError(
                f"{file}: trainable_token_indices is {shortened(tokens)}, but must be token ids",
                fix,
            )
    rank = values.get("r")
    if type(rank) is not int or rank < 1:
        raise Ar2DiffError(f"{file}: r is {shortened(rank)}, but must be a rank of at least 1", fix)
    if rank > MOST_RANK and weights.is_file():
        try:
            with safe_open(weights, framework="np") as stored:
                shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]
        except (SafetensorError, OSError):
            return  # reported when the weights are read
        if not any(rank in shape for shape in shapes):
            raise Ar2DiffError(f"{file}: r is {rank}, but no stored matrix has that rank", fix)


def _spec(file: Path, config: dict[str, Any]) -> Spec | None:
    try:
        return Spec.from_config(config)
    except Ar2DiffError as error:
        raise error.about(str(file)) from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names.

    Raises:
        Ar2DiffError: there are none (pickled ones are never opened), the index is damaged, or it
            names a file outside of the folder.
    """
    names: list[Any] = [WEIGHTS]
    if (path / INDEX).is_file():
        found = read_json(path / INDEX, AGAIN, MOST_JSON).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise Ar2DiffError(f"{path / INDEX} has no weight_map", AGAIN)
        for name in (name for name in found.values() if not isinstance(name, str)):
            raise Ar2DiffError(
                f"{path / INDEX}: weight_map names {shortened(name)}, which is not a file name",
                AGAIN,
            )
        names = sorted(set(found.values()))
        if WEIGHTS not in names and (path / WEIGHTS).exists():
            raise Ar2DiffError(
                f"model {path} has both a {WEIGHTS} and an {INDEX} that names other files",
                "remove the one that does not belong to the model",
            )
    files = [inside(path, name) for name in names]
    for name in names:
        if not name.endswith(".safetensors"):
            raise Ar2DiffError(
                f"{path / INDEX}: {shortened(name)} is not a safetensors file",
                "convert the weights to safetensors first",
            )
    if not files[0].is_file():
        pickled = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickled:
            raise Ar2DiffError(
                f"model {path}: its weights are pickled ({pickled[0]}), and loading a pickle "
                "can run code",
                "convert them to safetensors first, with transformers' save_pretrained",
            )
        raise Ar2DiffError(f"model {path} has a {CONFIG} but no {names[0]}", AGAIN)
    return files


def check_counts(path: Path, config: dict[str, Any], tensors: int | None = None) -> None:
    """Refuse a config whose counts would keep the libraries busy for hours, or fill the memory,
    before any weight is read: they build a list or a module for each layer, expert and label.

    Args:
        tensors: the number of stored tensors, of which each layer has at least one; None if there
            are no weights.

    Raises:
        Ar2DiffError: naming the key.
    """
    for key, value, depth in _integers(config):
        most = None
        if key.startswith("num_labels"):
            most, of = MOST_LABELS, "labels"
        elif EXPERTS.fullmatch(key) and depth == 0:
            most, of = MOST_EXPERTS, "experts"
        elif LAYERS.fullmatch(key) and depth == 0:
            most, of = max(MOST_LAYERS, tensors or 0), "layers, for which there are no weights"
        elif depth > 1:
            most, of = MOST_REPEATS, "repetitions"
        if most is not None and value > most:
            raise Ar2DiffError(
                f"{path / CONFIG}: {shortened(key)} is {value}, which is more than {most} {of}",
                "download the checkpoint again, or correct the file",
            )
    if "transformers_weights" in config:
        raise Ar2DiffError(
            f"{path / CONFIG}: transformers_weights names a file other than {WEIGHTS}",
            f"rename that file to {WEIGHTS}, and remove the key",
        )


def check_ids(path: Path) -> None:
    """Refuse configs in which a token id is not an id. (-1 is how the first LLaMA said "none".)

    Raises:
        Ar2DiffError: naming file and key.
    """
    for name in (CONFIG, GENERATION):
        file = path / name
        values = read_json(file, AGAIN) if file.is_file() else {}
        for holder in (values, *(v for v in values.values() if isinstance(v, dict))):
            for key in IDS & holder.keys():
                given = [] if holder[key] is None else holder[key]
                for value in given if isinstance(given, list) else [given]:
                    if type(value) is not int or value < -1:
                        raise Ar2DiffError(
                            f"{file}: {key} is {shortened(value)}, which is not a token id",
                            "correct or remove the key",
                        )


def _integers(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, int, int]]:
    """Each integer in a parsed JSON value, the key of the object that it belongs to, and how many
    lists it lies in."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _integers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, key, depth + 1)
    elif type(value) is int:
        yield key, value, depth


def read_json(file: Path, fix: str, most: int = MOST_CONFIG) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        fix: advice for the case that the file is missing.
        most: bytes that the file may have.

    Raises:
        Ar2DiffError: the file is missing, too large, or not a JSON object within the limits of
            `parse_json`.
    """
    try:
        if file.exists() and not file.is_file():  # reading from a pipe might never end
            raise Ar2DiffError(f"{file} is not a regular file", AGAIN)
        with file.open("rb") as stream:
            text = stream.read(most + 1)
        if len(text) > most:
            raise Ar2DiffError(f"{file} is larger than {most >> 20} MB", AGAIN)
        value = parse_json(text)
    except FileNotFoundError:
        raise Ar2DiffError(f"{file} does not exist", fix) from None
    except OSError as error:
        raise Ar2DiffError(f"{file}: {error.strerror or error}", AGAIN) from None
    except ValueError as error:
        raise Ar2DiffError(f"{file} is not JSON: {error}", AGAIN) from None
    if not isinstance(value, dict):
        raise Ar2DiffError(f"{file} is not a JSON object", AGAIN)
    return value
