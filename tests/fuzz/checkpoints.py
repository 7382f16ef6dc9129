"""What is done to the folder of a checkpoint: one thing a call, and what it was."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hostile
import keys as known
from hostile import dumps, mutate_bytes, mutate_tree, shown, value

if TYPE_CHECKING:
    from cases import Case

CANARY = "what is in here belongs to nobody else: 7f3a9c"
CODE = """import os, pathlib
pathlib.Path(os.environ["HOME"], "ran").write_text("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Evil(LlamaConfig):
    model_type = "evil"
"""
KEYS = {  # file: keys that its readers know, with values that they do not expect
    "config.json": known.CONFIG,
    "generation_config.json": known.GENERATION,
    "tokenizer_config.json": known.TOKENIZER_CONFIG,
    "adapter_config.json": known.ADAPTER,
}
RENDERING = ("sft", "chat", "card", "push")  # their verbs render the chat template
OWN = ("ar2diff.json", "diffusion.json")


def folder(case: Case, draw: random.Random, path: Path) -> str:
    acts = [keys] * 5 + [tree] * 4 + [own] * 2 + [raw] * 2 + [weights] * 4 + [cost]
    acts += [template] * (10 if case.verb in RENDERING else 1)
    acts += [code] * 2 + [odd_file] * 2 + [shards] * 2 + [spec] * 2
    act = draw.choice([*acts, extra])
    note = act(case, draw, path)
    return f"{path.name} {act.__name__}: {note}" if note else ""


def _json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size < 200_000:
            return json.loads(path.read_text())
    return None


def _put(file: Path, data: bytes) -> None:
    """Write a file, unless a link or something that is no file is there: it would lead elsewhere,
    or never end."""
    if not file.is_symlink() and (file.is_file() or not file.exists()):
        file.write_bytes(data)


def _files(path: Path, suffix: str = "") -> list[Path]:
    return sorted(f for f in path.rglob(f"*{suffix}") if f.is_file() and not f.is_symlink())


def keys(case: Case, draw: random.Random, path: Path) -> str:
    """A key that its readers know."""
    name = draw.choice(["config.json"] * 3 + [n for n in KEYS if (path / n).is_file()])
    content = _json(path / name)
    if not isinstance(content, dict):
        return ""
    key = draw.choice(sorted(KEYS[name]))
    content[key] = draw.choice(KEYS[name][key]) if draw.random() < 0.8 else value(draw)
    (path / name).write_bytes(dumps(content))
    if "evil." in repr(content[key]):
        (path / "evil.py").write_text(CODE)
    return f"{name} {key} = {shown(content[key])}"


def cost(case: Case, draw: random.Random, path: Path) -> str:
    """A model that would take hours, or all memory."""
    content = _json(path / "config.json")
    if not isinstance(content, dict):
        return ""
    key = draw.choice(["num_hidden_layers", "num_labels", "vocab_size", "max_position_embeddings"])
    content[key] = draw.choice([10**6, 10**9])
    (path / "config.json").write_bytes(dumps(content))
    return f"{key} = {content[key]}"


def spec(case: Case, draw: random.Random, path: Path) -> str:
    """The spec that ar2diff left in config.json or diffusion.json."""
    file = path / ("diffusion.json" if (path / "diffusion.json").is_file() else "config.json")
    content = _json(file)
    part = content.get("diffusion") if isinstance(content, dict) else None
    if not isinstance(part, dict):
        return ""
    key = draw.choice(sorted(known.DIFFUSION))
    part[key] = draw.choice(known.DIFFUSION[key])
    file.write_bytes(dumps(content))
    return f"{file.name} diffusion.{key} = {shown(part[key])}"


def tree(case: Case, draw: random.Random, path: Path) -> str:
    """Any place of any JSON file."""
    files = _files(path, ".json")
    return _tree(draw, draw.choice(files)) if files else ""


def own(case: Case, draw: random.Random, path: Path) -> str:
    """Any place of the files that ar2diff reads besides."""
    files = [path / name for name in OWN if (path / name).is_file()]
    return _tree(draw, draw.choice(files)) if files else ""


def _tree(draw: random.Random, file: Path) -> str:
    content = _json(file)
    if content is None:
        return ""
    content, note = mutate_tree(draw, content)
    file.write_bytes(dumps(content))
    return f"{file.name} {note}"


def raw(case: Case, draw: random.Random, path: Path) -> str:
    """The bytes of any file."""
    files = [f for f in _files(path) if f.suffix != ".py"]
    if not files:
        return ""
    file = draw.choice(files)
    data, note = mutate_bytes(draw, file.read_bytes())
    file.write_bytes(data)
    return f"{file.name} {note}"


def _split(file: Path) -> tuple[dict, bytes] | None:
    """Header and data of a safetensors file."""
    with contextlib.suppress(OSError, ValueError, struct.error, RecursionError, MemoryError):
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        if isinstance(header, dict) and len(header) > 1:
            return header, data[8 + size :]
    return None


def weights(case: Case, draw: random.Random, path: Path) -> str:
    """A tensor's name, shape, type, place or values; the header of its file."""
    files = _files(path, ".safetensors")
    found = _split(draw.choice(files)) if files else None
    if found is None:
        return ""
    file, (header, data) = files[0] if len(files) == 1 else draw.choice(files), found
    found = _split(file)
    if found is None:
        return ""
    header, data = found
    name = draw.choice(sorted(n for n in header if n != "__metadata__"))
    entry = header[name] if isinstance(header[name], dict) else {}
    kind = draw.choice(
        [
            "shape",
            "dtype",
            "offsets",
            "name",
            "drop",
            "add",
            "values",
            "meta",
            "entry",
            "size",
            "cut",
        ]
    )
    size, note = None, kind
    match kind:
        case "shape":
            shape = entry.get("shape") or [1]
            entry["shape"] = draw.choice(
                [[], [2**40, 2**40], [-1], shape[::-1], [1, *shape], [*shape[:-1], shape[-1] + 1],
                 "x", ["3"], [2**63], None, [0], [1.5]]
            )  # fmt: skip
            note = f"shape {entry['shape']}"
        case "dtype":
            entry["dtype"] = draw.choice(
                ["Z9", "F16", "I64", "BOOL", "F64", 5, None, "F8_E4M3", "U8", "BF16", "F4"]
            )
            note = f"dtype {entry['dtype']}"
        case "offsets":
            entry["data_offsets"] = draw.choice(
                [
                    [0, 4],
                    [4, 0],
                    [0, 2**62],
                    [-8, 0],
                    [0],
                    "x",
                    None,
                    [0.5, 4],
                    [len(data), len(data) + 4],
                ]
            )
            note = f"offsets {entry['data_offsets']}"
        case "name":
            new = draw.choice(
                ["", "x", "lm_head.weight", name + ".x", "../x", "x" * 5000, "model.layers.999.x"]
            )
            header[new] = header.pop(name)
            note = f"name {shown(new)}"
        case "drop":
            header.pop(name)
        case "add":
            header["extra.weight"] = {
                "dtype": "F32",
                "shape": [2],
                "data_offsets": [len(data), len(data) + 8],
            }
            data += bytes(8)
        case "values":
            data = draw.choice([b"\xff", b"\x00", b"\x7f"]) * len(data)
        case "meta":
            header["__metadata__"] = draw.choice(
                [None, 5, {"format": 5}, {"format": "tf"}, {}, [], {"a": {}}]
            )
            note = f"metadata {header['__metadata__']}"
        case "entry":
            header[name] = value(draw, header[name])
            note = f"entry {shown(header[name])}"
        case "size":
            size = draw.choice([0, 1, 2**63, 2**40, 2**64 - 1])
            note = f"header of {size}"
        case "cut":
            data = data[: draw.randrange(len(data) + 1)]
    text = dumps(header)
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    if kind in ("shape", "dtype", "offsets", "cut") and case.verb in ("export", "merge", "import"):
        note += f" of {name}"
    return f"{file.name} {note}"


def template(case: Case, draw: random.Random, path: Path) -> str:
    """The chat template, which is a program."""
    text = draw.choice(hostile.TEMPLATES)
    if draw.random() < 0.3 and isinstance(settings := _json(path / "tokenizer_config.json"), dict):
        with contextlib.suppress(OSError):
            (path / "chat_template.jinja").unlink()
        settings["chat_template"] = text
        (path / "tokenizer_config.json").write_bytes(dumps(settings))
    else:
        _put(path / "chat_template.jinja", text.encode("utf-8", "surrogatepass"))
    return shown(text)


def code(case: Case, draw: random.Random, path: Path) -> str:
    """Python that a careless loader runs."""
    if not isinstance(content := _json(path / "config.json"), dict):
        return ""
    settings = _json(path / "tokenizer_config.json")
    (path / "evil.py").write_text(CODE)
    kind = draw.choice(["config", "model", "tokenizer", "generate", "pickle", "setup"])
    if kind == "config":
        content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    elif kind == "model":
        content["auto_map"] = {"AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    elif kind == "tokenizer" and isinstance(settings, dict):
        settings |= {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        }
        (path / "tokenizer_config.json").write_bytes(dumps(settings))
    elif kind == "generate":
        (path / "custom_generate").mkdir(exist_ok=True)
        for name in {"generate.py", *(f.name for f in (path / "custom_generate").glob("*.py"))}:
            (path / "custom_generate" / name).write_text(CODE)
    elif kind == "pickle":
        for file in _files(path, ".safetensors"):
            file.unlink()
        shot = b"cposix\nsystem\n(S'touch ../home/ran'\ntR."
        (path / draw.choice(["pytorch_model.bin", "adapter_model.bin"])).write_bytes(shot)
    else:
        for name in ("setup.py", "__init__.py", "modeling_evil.py", "sitecustomize.py", "torch.py"):
            (path / name).write_text(CODE)
    (path / "config.json").write_bytes(dumps(content))
    return kind


def odd_file(case: Case, draw: random.Random, path: Path) -> str:
    """A file that is none, is not there, or lies elsewhere."""
    files = _files(path)
    if not files:
        return ""
    file = draw.choice([f for f in files if f.parent == path] or files)
    kind = draw.choice(["gone", "folder", "device", "pipe", "loop", "outside", "broken"])
    if kind == "outside":
        target = case.work.parent / "secret" / file.name
        shutil.copy(file, target)
        with target.open("ab") as stream:
            stream.write(b"" if file.suffix in (".json", ".safetensors") else CANARY.encode())
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "device":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "loop":
            file.symlink_to(file.name)
        case "outside":
            file.symlink_to(f"../../secret/{file.name}")
        case "broken":
            file.symlink_to("nowhere")
    return f"{file.name} {kind}"


def shards(case: Case, draw: random.Random, path: Path) -> str:
    """An index, sound or not."""
    file = path / "model.safetensors"
    found = _split(file) if file.is_file() else None
    if found is None:
        return ""
    names = [name for name in found[0] if name != "__metadata__"]
    shard, kind = (
        "model-00001-of-00001.safetensors",
        draw.choice(["outside", "absolute", "map", "all", "name"]),
    )
    index: Any = {
        "metadata": {"total_size": len(found[1])},
        "weight_map": dict.fromkeys(names, shard),
    }
    if kind in ("outside", "absolute"):
        place = case.work.parent / "secret" / "weights.safetensors"
        file.rename(place)
        there = str(place) if kind == "absolute" else "../../secret/weights.safetensors"
        index["weight_map"] = dict.fromkeys(names, there)
        case.refusal = "the index names weights outside of the folder"
    else:
        file.rename(path / shard)
        if kind == "map":
            index["weight_map"] = draw.choice(
                [None, 5, [], ["a"], {"a": 5}, {}, "x", {"a": None}, "a" * 5000]
            )
        elif kind == "all":
            index, _ = mutate_tree(draw, index)
        else:
            new = draw.choice(
                ["", ".", "..", "x" * 300, "a\x00b", "\ud800", "nowhere.safetensors", "evil.py", 5]
            )
            index["weight_map"][names[0]] = new
            kind = f"name {shown(new)}"
    _put(path / "model.safetensors.index.json", dumps(index))
    return kind


def extra(case: Case, draw: random.Random, path: Path) -> str:
    """A file more, or another kind of tokenizer."""
    kind = draw.choice(["readme", "model", "vocab", "index", "link", "large", "map"])
    match kind:
        case "readme":
            (path / "README.md").write_bytes(b"---\nlicense: [\xff\n---\n" + b"a: &a [*a]\n")
        case "model":
            with contextlib.suppress(OSError):
                (path / "tokenizer.json").unlink()
            _put(path / "tokenizer.model", b"\x0a\x0e\x0a\x05<unk>\x15\x00")
        case "vocab":
            with contextlib.suppress(OSError):
                (path / "tokenizer.json").unlink()
            _put(path / "vocab.json", dumps(value(draw)))
            _put(path / "merges.txt", b"#version\na b c\n\xff")
        case "index":
            _put(path / "model.safetensors.index.json", dumps(value(draw)))
        case "link":
            for name in ("tokenizer_x", "checkpoints", "notes.safetensors"):
                with contextlib.suppress(FileExistsError):
                    (path / name).symlink_to("../../secret/diary.txt")
        case "large":
            _put(path / "special_tokens_map.json", dumps({"bos_token": "@@deep@@"}))
        case "map":
            values = draw.choice([{"x": 10**9}, {"x": -1}, [], {"x": "y"}])
            _put(path / "added_tokens.json", dumps(values))
    return kind
