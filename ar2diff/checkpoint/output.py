"""Output folders: checked before a run, written whole or not at all, cleared of what is ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError
from .files import ADAPTER_CONFIG, DIFFUSION, RUN_FILE

LAST = ("config.json", ADAPTER_CONFIG)  # what a folder is known by is put there last


FULL = 1 << 22  # bytes free under which a failed write is put down to a full disk


OURS = [  # what a run of ours leaves in its folder, and --overwrite takes away
    RUN_FILE, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates", "custom_generate", "checkpoints",
    ADAPTER_CONFIG, DIFFUSION, "configuration_*.py",
    "*.partial",
]  # fmt: skip


@contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """A folder inside `output_dir` to write a checkpoint into. On success its files move into
    place, each by one rename and those of `LAST` last; on failure nothing of it stays.

    Raises:
        Ar2DiffError: the disk is full, or not writable.
    """
    partial = output_dir / ".partial"
    mask = os.umask(0)
    os.umask(mask)
    existed = output_dir.is_dir()
    try:
        with disk_errors(output_dir):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~mask)  # safetensors' are readable by their owner alone
                    sync(file)
            for entry in sorted(partial.iterdir(), key=lambda f: f.name in LAST):
                if (output_dir / entry.name).is_dir():
                    shutil.rmtree(output_dir / entry.name)
                entry.replace(output_dir / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what an error of the file system means to the user.

    safetensors and torch wrap a full disk in classes of their own, so the disk is asked too.
    """
    full = Ar2DiffError(f"{path}: the disk is full", "free some space; a run goes on with --resume")
    try:
        yield
    except Ar2DiffError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            raise full from error
        if isinstance(error, OSError):
            fix = "give another --output-dir"
            raise Ar2DiffError(f"{path}: {error.strerror or error}", fix) from error
        if shutil.disk_usage(_existing(path.resolve())).free < FULL:
            raise full from error
        raise


def check_output(output_dir: Path, inputs: list[Path], resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a run must not write to. Changes nothing.

    Args:
        inputs: what the run reads: never to be overwritten.

    Raises:
        Ar2DiffError: it holds something, holds an input, is no folder, or is not writable.
    """
    target = output_dir.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise Ar2DiffError(
                f"output folder {output_dir} holds the input {path}", "give another --output-dir"
            )
    if output_dir.exists() and not output_dir.is_dir():
        raise Ar2DiffError(f"output folder {output_dir} is a file", "give another --output-dir")
    # A run killed while it wrote its first file leaves a .partial one, which is nobody's loss.
    if output_dir.is_dir() and any(p.suffix != ".partial" for p in output_dir.iterdir()):
        ours = (output_dir / RUN_FILE).is_file()
        if not (resume or overwrite):
            raise Ar2DiffError(
                f"output folder {output_dir} is not empty",
                "go on with --resume, replace it with --overwrite, or give another --output-dir",
            )
        if not ours:
            raise Ar2DiffError(
                f"output folder {output_dir} holds files that ar2diff did not write",
                "give another --output-dir",
            )
    if not os.access(_existing(target), os.W_OK):
        raise Ar2DiffError(f"{_existing(target)}: not writable", "give another --output-dir")


def check_disk(output_dir: Path, needed: int) -> None:
    """Refuse a disk that has fewer bytes free than a run will write."""
    parent = _existing(output_dir.resolve())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise Ar2DiffError(
            f"{parent}: the disk is full ({free / 1e6:,.0f} of {needed / 1e6:,.0f} MB free)",
            "free some space, or give another --output-dir",
        )


def _existing(path: Path) -> Path:
    return next(p for p in [path, *path.parents] if p.is_dir())


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename, so that no reader sees half a file."""
    beside = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(value, indent=2) + "\n")
            sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def clear_output(output_dir: Path) -> None:
    """Remove what a run of ours left in a folder, and nothing else."""
    with disk_errors(output_dir):
        for pattern in OURS:
            for entry in output_dir.glob(pattern):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def sync(file: Path) -> None:
    """Have the system write a file to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
