"""The decoding code that folders of converted models contain, so that they denoise even where
ar2diff is not installed.

`custom_generate/` holds byte copies of the modules of `core`. transformers runs them for anyone who
loads the folder with `trust_remote_code=True`; ar2diff itself never runs them. `save_pretrained` of
a loaded model does not write them again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = "custom_generate"
CORE = Path(__file__).resolve().parents[1] / "core"  # generate.py and all that it imports
REQUIREMENTS = "transformers>=5.2\n"  # older versions ignore is_causal and would decode nonsense


@dataclass(frozen=True)
class CustomGenerate:
    """The decoding code in a folder.

    Attributes:
        state: `ok` (identical to the code of this version), `differs` or `missing`.
        sha256: SHA-256 of its files, concatenated in the order of their names, as printed by
            `cat custom_generate/* | sha256sum`; None if it is missing.
    """

    state: str
    sha256: str | None


def custom_generate() -> dict[str, bytes]:
    """The decoding code of this version, as {file name: bytes}."""
    modules = (file for file in sorted(CORE.glob("*.py")) if file.name != "__init__.py")
    files = {file.name: file.read_bytes() for file in modules}
    return files | {"requirements.txt": REQUIREMENTS.encode()}


def write_custom_generate(folder: Path) -> None:
    """Write the decoding code into a checkpoint folder."""
    (folder / FOLDER).mkdir()
    for name, code in custom_generate().items():
        (folder / FOLDER / name).write_bytes(code)


def read_custom_generate(folder: Path) -> CustomGenerate:
    """Compare the decoding code in a folder with that of this version. None of it is run."""
    found = {
        str(file.relative_to(folder / FOLDER)): file.read_bytes()
        for file in (folder / FOLDER).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    if "generate.py" not in found:
        return CustomGenerate("missing", None)
    return CustomGenerate("ok" if found == custom_generate() else "differs", digest(found))


def digest(files: dict[str, bytes]) -> str:
    """`CustomGenerate.sha256` of {file name: bytes}."""
    return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
