"""Folders of converted models, written; and what they carry so that they denoise where ar2diff is
not installed.

`custom_generate/` holds byte copies of the modules below. transformers runs them for whoever loads
the folder with `trust_remote_code=True`; ar2diff itself never does. `save_pretrained` drops them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import RUN_FILE, Checkpoint, staged, write_json
from .convert import write_spec

FOLDER = "custom_generate"
MODULES = (  # generate.py and all that it imports, which is torch, transformers and each other
    "attention", "cache", "canvas", "denoise", "errors", "forward", "generate", "options", "probe",
    "readers", "samplers", "seeds", "spec", "speculation",
)  # fmt: skip
REQUIREMENTS = "transformers>=5.2\n"  # older ones ignore is_causal, and would decode nonsense


@dataclass(frozen=True)
class CustomGenerate:
    """The decoding code in a folder.

    Attributes:
        state: `ok`, byte for byte this version's; `differs`; `missing`.
        sha256: of its files' bytes in the order of their names, as `cat custom_generate/* |
            sha256sum` has it; None where it is missing.
    """

    state: str
    sha256: str | None


def custom_generate() -> dict[str, bytes]:
    """This version's decoding code: {file name: bytes}."""
    here = Path(__file__).parent
    files = {f"{name}.py": (here / f"{name}.py").read_bytes() for name in MODULES}
    return files | {"requirements.txt": REQUIREMENTS.encode()}


def write_custom_generate(folder: Path) -> None:
    """Put the decoding code beside a checkpoint's weights."""
    (folder / FOLDER).mkdir()
    for name, code in custom_generate().items():
        (folder / FOLDER / name).write_bytes(code)


def read_custom_generate(folder: Path) -> CustomGenerate:
    """Compare the decoding code in a folder to this version's. Runs none of it."""
    found = {
        str(file.relative_to(folder / FOLDER)): file.read_bytes()
        for file in (folder / FOLDER).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    if "generate.py" not in found:
        return CustomGenerate("missing", None)
    return CustomGenerate("ok" if found == custom_generate() else "differs", digest(found))


def digest(files: dict[str, bytes]) -> str:
    """What `CustomGenerate.sha256` says of files."""
    return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()


@torch.no_grad()
def save(
    checkpoint: Checkpoint,
    output_dir: Path,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the converted checkpoint in the base's stored dtypes, config.json last, and the code
    that denoises it; of a wrapped one the adapter alone. (Checkpoints of training have no such
    code: they are there to resume from.)

    Args:
        weights: by name, where the model does not hold them whole.
    """
    if checkpoint.base is not None:
        from .adapters import save_adapter

        save_adapter(checkpoint, output_dir, record, weights)
        return
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.spec is not None:
        write_spec(checkpoint, checkpoint.spec)
    for name, parameter in model.named_parameters():
        dtype = stored_dtype(checkpoint, name)
        parameter.data = parameter.data.to(dtype)
        if weights is not None:
            weights[name] = weights[name].to(dtype)
    with staged(output_dir) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        if checkpoint.spec is not None:
            write_custom_generate(folder)
        write_json(folder / RUN_FILE, record)


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a parameter is written: the base's; for a new one, the most common."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    common = max(set(checkpoint.stored.values()), key=list(checkpoint.stored.values()).count)
    return dtypes.get(checkpoint.stored.get(name, common), torch.float32)
