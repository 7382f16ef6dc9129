"""What `generate` is asked for and where it goes: prompts with gaps, files of prompts, results."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError

GAP = re.compile(r"\{mask(?::([^{}]*))?\}")
HELP = "see 'ar2diff generate --help'"

Pieces = list[str | int]  # texts, and gaps as their number of tokens


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        prompts: texts to go on from, or to fill gaps in.
        many: they come from a file.
        infill: prefix, suffix and the lengths to try, instead of prompts.
    """

    prompts: tuple[str, ...] = ()
    many: bool = False
    infill: tuple[str, str, tuple[int, ...]] | None = None

    @property
    def has_gap(self) -> bool:
        """Whether some of it is to be filled in."""
        return self.infill is not None or any(len(split_gaps(text)) > 1 for text in self.prompts)


def request_of(
    prompt: str | None,
    file: Path | None,
    prefix: str | None,
    suffix: str | None,
    lengths: Sequence[str],
) -> Request:
    """The request that the command line's arguments make.

    Raises:
        Ar2DiffError: they contradict each other, or one of them cannot be read.
    """
    infilling = prefix is not None or suffix is not None or bool(lengths)
    if (prompt is not None) + (file is not None) + infilling != 1:
        raise Ar2DiffError("give one of --prompt, --prompts-file and --prefix", HELP)
    if infilling:
        if prefix is None or not lengths:
            given = "--suffix" if suffix is not None else "--length" if lengths else "--prefix"
            missing = "--prefix" if prefix is None else "--length"
            raise Ar2DiffError(
                f"{given} needs {missing} too", "give --prefix, --suffix and --length, the gap's"
            )
        return Request(infill=(prefix, suffix or "", tuple(lengths_of(lengths))))
    if file is not None:
        return Request(tuple(read_prompts(file)), many=True)
    split_gaps(prompt)
    return Request((prompt,))


def check_stream(request: Request, elsewhere: bool) -> None:
    """Refuse to stream what is no single text on the screen.

    Args:
        elsewhere: results go to a file, or are JSON.
    """
    if request.many or request.infill:
        raise Ar2DiffError(
            "--stream is for one prompt", "give --prompt (with {mask:N} for a gap), or leave it out"
        )
    if elsewhere:
        raise Ar2DiffError("--stream prints text, not --json or --output", "choose one")


def lengths_of(texts: Sequence[str]) -> list[int]:
    """Lengths of a gap, from "4,8,12" or one each."""
    words = [word.strip() for text in texts for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise Ar2DiffError(
                f"--length {word!r} is no number of tokens", 'give whole numbers from 1 on: "4,8"'
            )
    return list(dict.fromkeys(map(int, words)))


def split_gaps(prompt: str) -> Pieces:
    """Texts and gaps of a prompt, the texts first and last (empty ones too).

    Raises:
        Ar2DiffError: a gap without a length.
    """
    pieces: Pieces = []
    end = 0
    for gap in GAP.finditer(prompt):
        if not (gap[1] or "").isdecimal() or int(gap[1]) < 1:
            raise Ar2DiffError(f"{gap[0]}: a gap of no tokens", "write {mask:N}, N from 1 on")
        pieces += [prompt[end : gap.start()], int(gap[1])]
        end = gap.end()
    return [*pieces, prompt[end:]]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file (`-` for standard input): lines of text, or the column `prompt` of rows.

    Raises:
        Ar2DiffError: the file cannot be read, or a row of it; it names the row.
    """
    from ..config.sections import Source
    from ..data.sources import columns_of, read_source

    if str(path) != "-" and not path.is_file():
        raise Ar2DiffError(f"prompts {path}: there is no such file", "check the name")
    prompts = []
    for where, row in read_source(Source(path=str(path)), "prompt", "prompts"):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise Ar2DiffError(
                f"{where} has no text in column 'prompt' (it has {columns_of(row)})",
                'write {"prompt": "..."} on each line',
            )
        try:
            split_gaps(prompt)
        except Ar2DiffError as error:
            raise error.about(where) from None
        prompts.append(prompt)
    return prompts


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that results cannot go to. Changes nothing.

    Raises:
        Ar2DiffError: it exists, is a folder, or cannot be written.
    """
    if path.is_dir():
        raise Ar2DiffError(f"--output {path} is a folder", "name a file, for example out.jsonl")
    if path.exists() and not overwrite:
        raise Ar2DiffError(
            f"--output {path} exists", "replace it with --overwrite, or give another name"
        )
    if not path.parent.is_dir():
        raise Ar2DiffError(f"--output {path}: no such folder {path.parent}", "make it first")
    if not os.access(path.parent, os.W_OK):
        raise Ar2DiffError(f"--output {path}: {path.parent} is not writable", "give another place")


def write_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines beside and rename, so that no reader sees half a file.

    Raises:
        Ar2DiffError: the file system refuses.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(result, ensure_ascii=False)}\n" for result in results)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise Ar2DiffError(f"{path}: {error.strerror or error}", "give another place") from error
    finally:
        beside.unlink(missing_ok=True)
