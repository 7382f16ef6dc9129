"""Output folders. Every verb that writes one does it the same way: check it, claim it, write the
new files beside the old ones, record them, move them into place.

    with claimed(output_dir, inputs, overwrite=overwrite) as output:
        with output.staged(record) as folder:
            ...  # write the files into `folder`

`ar2diff.json` lists the files that belong to a model of ours. Nothing else in the folder is ever
replaced or deleted, and no symbolic link is followed. A killed process leaves at most `LEFTOVERS`
and files that its record lists, so that the same command can be run again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.errors import Ar2DiffError, option
from .files import ADAPTER_CONFIG, DRAFT_CONFIG, RUN_FILE, check_path

LAST = (
    "config.json",
    ADAPTER_CONFIG,
    DRAFT_CONFIG,
)  # a folder holds a model once it has one of these
CHECKPOINTS = "checkpoints"  # training checkpoints, and the record of a run that has not ended
LOG = "log"  # what a run tells of itself: metrics, pictures, recipe, command
PICTURES = ("loss", "bound", "acceptance", "reward")  # drawn there, each light and dark
LOGGED = (
    "metrics.jsonl", "metrics.jsonl.partial", "recipe.yaml", "command.txt",
    *(f"{name}{shade}.svg" for name in PICTURES for shade in ("", "-dark")),
)  # fmt: skip
TENSORBOARD = "tensorboard"  # in `LOG`: the event files of that tracker
LOCK, PARTIAL = ".ar2diff.lock", ".partial"
LEFTOVERS = (LOCK, PARTIAL)  # what a killed process may leave behind
FULL = 1 << 22  # if fewer bytes are free, a failed write means a full disk
# What a verb may write at the top of a folder; a user's file with such a name is in the way.
WRITTEN = re.compile(
    r"(config|generation_config|adapter_config|diffusion|draft|ar2diff|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|vocab|model\.safetensors\.index)\.json"
    r"|(model|model-\d{5}-of-\d{5}|adapter_model|draft|diffusion_head|noise)\.safetensors"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|additional_chat_templates"
    r"|configuration_\w+\.py|custom_generate|checkpoints|log"
)
_held: set[int] = set()  # file descriptors of locks


def _forget_locks() -> None:
    """In a forked child (a worker of a data loader), which must not keep the lock of a parent that
    was killed: close it once, as the number may become that of another file."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


class Output:
    """A folder that this process alone may write. Made by `claimed`.

    Attributes:
        folder: the output folder.
    """

    def __init__(self, folder: Path, resume: bool):
        self.folder = folder
        self._trains = resume and (folder / CHECKPOINTS / RUN_FILE).is_file()

    def begin_run(self, record: dict[str, Any]) -> None:
        """Note that a training run works in the folder. A complete model stays until the run's own
        replaces it; log and checkpoints of an earlier run go."""
        _remove_log(self.folder)
        _remove_run(self.folder)
        with disk_errors(self.folder):
            beside = self.folder / PARTIAL / RUN_FILE
            write_json(beside, record)
            (self.folder / CHECKPOINTS).mkdir(exist_ok=True)
            beside.replace(self.folder / CHECKPOINTS / RUN_FILE)
        self._trains = True

    @contextmanager
    def staged(self, record: dict[str, Any]) -> Iterator[Path]:
        """A folder to write the new files into. When the block ends without an error they take the
        place of the files that an earlier record lists, and `record` is written with the list of
        the new ones; else nothing changes.

        Raises:
            Ar2DiffError: the disk is full or not writable; a file that is not ours is in the way.
        """
        partial = self.folder / PARTIAL
        try:
            with disk_errors(self.folder):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                self._publish(partial, record)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, record: dict[str, Any]) -> None:
        mask = os.umask(0)
        os.umask(mask)
        staged = [file for file in partial.rglob("*") if file.is_file()]
        for file in staged:
            file.chmod(0o666 & ~mask)  # safetensors' are readable by their owner alone
            sync(file)
        new = sorted({RUN_FILE, *(f.relative_to(partial).as_posix() for f in staged)})
        old = recorded_files(self.folder) or []
        for name in new:
            _check_free(self.folder, name, old)
        # From here on a kill leaves files that the record lists, and no config that loads them.
        self._write_record(record, sorted({*old, *new}))
        for name in {*old, *new} & {*LAST}:
            (self.folder / name).unlink(missing_ok=True)
        for name in set(old) - set(new):
            _remove_file(self.folder, name)
        for name in set(new) - {RUN_FILE, *LAST}:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(self.folder / name)
        self._write_record(record, new)
        for name in set(new) & {*LAST}:
            (partial / name).replace(self.folder / name)
        if self._trains:  # not before: until then the run can be resumed
            (self.folder / CHECKPOINTS / RUN_FILE).unlink(missing_ok=True)
            _remove_if_empty(self.folder / CHECKPOINTS)
        else:
            _remove_log(self.folder)
            _remove_run(self.folder)

    def _write_record(self, record: dict[str, Any], files: list[str]) -> None:
        beside = self.folder / PARTIAL / RUN_FILE
        write_json(beside, record | {"files": files})
        beside.replace(self.folder / RUN_FILE)


@contextmanager
def claimed(
    output_dir: Path,
    inputs: Sequence[Path] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    needed: int = 0,
) -> Iterator[Output]:
    """Check an output folder, and hold it for as long as the block runs. The lock dies with the
    process. Where the block fails before anything was written, nothing of it stays.

    Args:
        inputs: what the verb reads: never overwritten.
        resume: go on with a run that has not ended. overwrite: replace the model that is there.
        needed: bytes that will be written.

    Raises:
        Ar2DiffError: as `check_output` and `check_disk`; another process writes there.
    """
    check_output(output_dir, inputs, resume, overwrite)
    check_disk(output_dir, needed)
    fresh = not output_dir.exists()
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(output_dir)
    try:
        check_output(output_dir, inputs, resume, overwrite, locked=True)
        yield Output(output_dir, resume)
    finally:
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        if not _has_checkpoints(output_dir):  # nothing to resume from
            if (output_dir / CHECKPOINTS / RUN_FILE).is_file():  # a run that has not ended
                _remove_log(output_dir)
            _remove_run(output_dir)
        (output_dir / LOCK).unlink(missing_ok=True)
        _held.discard(lock)
        os.close(lock)
        if fresh:
            _remove_if_empty(output_dir)


def check_output(
    output_dir: Path,
    inputs: Sequence[Path] = (),
    resume: bool = False,
    overwrite: bool = False,
    locked: bool = False,
) -> None:
    """Refuse a folder that a verb must not write to. Changes nothing.

    Args:
        inputs: what the verb reads: never overwritten.
        locked: this process holds the folder.

    Raises:
        Ar2DiffError: the folder holds an input, files that are not ours or a model that is not to
            be replaced; it is a file, is not writable, or another process writes there.
    """
    check_path(output_dir)
    elsewhere = f"choose another {option('output_dir')}"
    target = output_dir.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise Ar2DiffError(f"output folder {output_dir} contains the input {path}", elsewhere)
    if output_dir.exists() and not output_dir.is_dir():
        raise Ar2DiffError(f"output folder {output_dir} is not a folder", elsewhere)
    if not os.access(_existing(target), os.W_OK):
        raise Ar2DiffError(f"folder {_existing(target)} is not writable", elsewhere)
    if not locked:
        check_not_locked(output_dir)
    if _is_free(output_dir):
        return
    files = recorded_files(output_dir)
    running = (output_dir / CHECKPOINTS / RUN_FILE).is_file()
    complete = holds_model(output_dir)
    if files is None and not running:
        raise Ar2DiffError(
            f"output folder {output_dir} is not empty, and ar2diff did not write its files (no "
            f"{RUN_FILE} lists them)",
            f"{elsewhere}, or empty the folder yourself",
        )
    # Files without a config are those of a killed verb, unless they belong to a run.
    if not (resume or overwrite) and (running or complete):
        state = "holds an unfinished run" if running else "already holds a complete model"
        go_on = f"continue it with {option('resume', True)}, " if running else ""
        replace = f"replace it with {option('overwrite', True)}"
        raise Ar2DiffError(
            f"output folder {output_dir} {state}", f"{go_on}{replace}, or {elsewhere}"
        )
    for entry in sorted(output_dir.iterdir()):
        if WRITTEN.fullmatch(entry.name):
            _check_free(output_dir, entry.name, files or [])


def check_disk(output_dir: Path, needed: int) -> None:
    """Refuse a disk that has fewer bytes free than will be written.

    Raises:
        Ar2DiffError: the disk is too full.
    """
    parent = _existing(output_dir.resolve())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise Ar2DiffError(
            f"{parent}: the disk is full ({free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB "
            "are needed)",
            f"free some space, or choose another {option('output_dir')}",
        )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a complete model, adapter or draft adapter."""
    return any((folder / name).is_file() for name in LAST)


def run_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run that works in a folder, else of the model there; None without one."""
    record = _read_record(folder / CHECKPOINTS / RUN_FILE)
    return _read_record(folder / RUN_FILE) if record is None else record


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder whose last run has ended; None of any other."""
    if not holds_model(folder) or (folder / CHECKPOINTS / RUN_FILE).is_file():
        return None
    return record_of(folder)


def record_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's record says of its model, without the list of files; None without one."""
    record = _read_record(folder / RUN_FILE)
    return record and {name: value for name, value in record.items() if name != "files"}


def recorded_files(folder: Path) -> list[str] | None:
    """Relative paths of the files that a folder's record lists as ours; None without a list, or
    with one that names anything outside of the folder."""
    names = (_read_record(folder / RUN_FILE) or {}).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    paths = [PurePosixPath(name) for name in names]
    if any(not p.parts or p.is_absolute() or ".." in p.parts or "\0" in str(p) for p in paths):
        return None
    return [path.as_posix() for path in paths]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate file system errors into what they mean for the user.

    safetensors and torch wrap a full disk in classes of their own, so the disk is asked too.
    """
    full = Ar2DiffError(
        f"{path}: the disk is full",
        f"free some space; a training run continues with {option('resume', True)}",
    )
    try:
        yield
    except Ar2DiffError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            raise full from error
        if isinstance(error, OSError):
            fix = f"choose another {option('output_dir')}"
            raise Ar2DiffError(f"{path}: {error.strerror or error}", fix) from error
        if shutil.disk_usage(_existing(path.resolve())).free < FULL:
            raise full from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text to a file beside and rename that, so that no reader sees half a file."""
    beside = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Have the system write a file to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _take(lock, fcntl.LOCK_EX, folder)
            # Whoever held it before may have removed the file since we opened it.
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                _held.add(lock)
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def check_not_locked(folder: Path) -> None:
    """Refuse a folder that another process is writing.

    Raises:
        Ar2DiffError: one is.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # no lock
        return
    try:
        _take(lock, fcntl.LOCK_SH, folder)
    finally:
        os.close(lock)


def _take(lock: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Ar2DiffError(
            f"another run is writing to {folder}",
            f"wait until it has finished, or choose another {option('output_dir')}",
        ) from None
    except OSError:  # a file system without locks
        pass


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_free(folder: Path) -> bool:
    """Whether a folder is new, or empty but for what a killed process left."""
    if not folder.is_dir():
        return True
    left = [p for p in folder.iterdir() if p.name not in LEFTOVERS]
    return all(p.name in (CHECKPOINTS, LOG) and p.is_dir() and not any(p.iterdir()) for p in left)


def _check_free(folder: Path, name: str, ours: Sequence[str]) -> None:
    """Refuse to write where there is something that ar2diff did not write.

    Args:
        name: relative path. ours: paths that the record lists.
    """
    top, *inside = PurePosixPath(name).parts
    path = folder / name
    known = name in ours or name in (RUN_FILE, CHECKPOINTS, LOG) or any(
        owned.startswith(f"{name}/") for owned in ours
    )  # fmt: skip
    places = [
        folder / top,
        *((folder / top).joinpath(*inside[: i + 1]) for i in range(len(inside))),
    ]
    link = next((place for place in places if place.is_symlink()), None)
    if link is not None or (path.exists() and not known):
        what = "is a symbolic link" if link else "was not written by ar2diff"
        raise Ar2DiffError(
            f"{link or path} {what}, but ar2diff would have to write there",
            f"move it elsewhere, or choose another {option('output_dir')}",
        )


def _remove_file(folder: Path, name: str) -> None:
    """Remove a recorded file, and folders that it leaves empty. What has become something else, or
    lies behind a link, is left alone."""
    path = folder / name
    inside = [parent for parent in path.parents if parent.is_relative_to(folder)][:-1]
    if path.is_symlink() or not path.is_file() or any(p.is_symlink() for p in inside):
        return
    path.unlink()
    for parent in inside:
        _remove_if_empty(parent)


def _remove_log(folder: Path) -> None:
    """Remove what a run told of itself. Goes before the run's record, without which a folder that
    holds nothing else would not be known as ours."""
    log = folder / LOG
    if log.is_symlink() or not log.is_dir():
        return
    with disk_errors(folder):
        for name in LOGGED:
            (log / name).unlink(missing_ok=True)
        if (events := log / TENSORBOARD).is_dir() and not events.is_symlink():
            shutil.rmtree(events)
        _remove_if_empty(log)


def _remove_run(folder: Path) -> None:
    """Remove the checkpoints of a training run, and last the record of one that has not ended: the
    folder would not be known as ours without it, and a kill may come at any moment."""
    run = folder / CHECKPOINTS
    if run.is_symlink() or not run.is_dir():
        return
    with disk_errors(folder):
        stage = run / PARTIAL
        for entry in [stage, *run.glob("checkpoint-*")]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry.replace(stage))  # no checkpoint-N is ever incomplete
        (run / RUN_FILE).unlink(missing_ok=True)
        _remove_if_empty(run)


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("checkpoint-*"))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _existing(path: Path) -> Path:
    return next(p for p in [path, *path.parents] if p.is_dir())
