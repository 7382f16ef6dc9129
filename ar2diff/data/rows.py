"""The one reader of rows: JSON lines, JSON, Parquet, CSV and text, from files and standard input.

Every value keeps the type and the exact content that it has in the file: "007" stays text, 7 stays
a number. A row that cannot be read is named in the error.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from ..config.safe_json import parse_json
from ..core.errors import Ar2DiffError, first_line, shortened

STDIN = "-"
BOM = b"\xef\xbb\xbf"  # that some programs begin a UTF-8 file with
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
SUFFIXES = tuple(f"{kind}{gz}" for kind in KINDS for gz in ("", ".gz"))
LONGEST_INTEGER = 4300  # digits; longer ones Python itself does not read
FIX = "correct or remove it"
LARGEST_CELL = 2**31 - 1  # characters of a CSV cell; the csv module's default is 131,072

Row = tuple[str, dict[str, Any]]  # what an error calls the row, and its values by column


def read_file(path: Path, line_as: str = "text", what: str = "data") -> Iterator[Row]:
    """Rows of a file, by its suffix.

    Args:
        line_as: the column that a line of a text file becomes.
        what: what an error calls the file: `data`, `prompts`.

    Raises:
        Ar2DiffError: naming the file and the row that cannot be read.
    """
    name = f"{what} {path}"
    kind = next((kind for kind in KINDS if path.name.endswith((kind, f"{kind}.gz"))), None)
    if kind is None:
        raise Ar2DiffError(
            f"{name} has an unknown file type", f"use one of these file types: {', '.join(KINDS)}"
        )
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            yield from _READERS[kind](file, name, line_as)
    except (OSError, EOFError, zlib.error) as error:
        raise Ar2DiffError(
            f"{name} cannot be read: {first_line(error)}",
            "check that the file is complete and readable",
        ) from None


def read_stdin(line_as: str = "text", what: str = "data") -> Iterator[Row]:
    """Rows of standard input: JSON lines if the first line begins like one, else lines of text.
    It may be read several times; arguments and errors as of `read_file`."""
    content = stdin_bytes(sys.stdin)
    start = content.removeprefix(BOM).lstrip()[:1000]
    kind = ".txt"
    if re.match(rb'\{\s*["}]', start):
        kind = ".jsonl"
    elif re.match(rb"\[\s*\{", start):
        kind = ".json"
    yield from _READERS[kind](io.BytesIO(content), f"{what} from standard input", line_as)


@lru_cache(maxsize=1)
def stdin_bytes(stdin: Any) -> bytes:
    """All that standard input holds; it is read once and kept."""
    return stdin.buffer.read() if hasattr(stdin, "buffer") else stdin.read().encode()


def parse_value(text: str) -> Any:
    """A JSON value of a row; errors as of `parse_json`."""
    return parse_json(text, longest_integer=LONGEST_INTEGER, constants=False)


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """The rows as a data set of trl's kind that hands them out as they are. They stay outside
    Arrow, which has one type per column and whose JSON columns turn the text "007" into 7."""
    from datasets import Dataset

    names = sorted({name for row in rows for name in row})

    def pick(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {name: [rows[n].get(name) for n in batch["row"]] for name in names}

    numbers = Dataset.from_dict({"row": range(len(rows))})
    numbers.set_transform(pick)
    return numbers


def _json_lines(file: BinaryIO, name: str, line_as: str) -> Iterator[Row]:
    for where, line in _lines(file, name):
        try:
            row = parse_value(line)
        except ValueError as error:
            raise Ar2DiffError(f"{where} is not JSON: {error}", FIX) from None
        yield where, _mapping(row, where)


def _json(file: BinaryIO, name: str, line_as: str) -> Iterator[Row]:
    """A list of rows, or a mapping that holds one; or JSON lines, which often have this suffix."""
    content = file.read().removeprefix(BOM)
    try:
        value = parse_value(_decoded(content, name))
    except ValueError as error:
        if "Extra data" in str(error):
            yield from _json_lines(io.BytesIO(content), name, line_as)
            return
        raise Ar2DiffError(f"{name} is not JSON: {error}", "correct the file") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise Ar2DiffError(
            f"{name} holds {kind_of(value)}, but must hold a list of rows",
            "write a list of objects, or a .jsonl file with one object per line",
        )
    for number, row in enumerate(value, 1):
        where = f"{name}: row {number}"
        yield where, _mapping(row, where)


def _csv(file: BinaryIO, name: str, line_as: str) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_CELL)
    text = io.StringIO(_decoded(file.read().removeprefix(BOM), name), newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header) or "" in header:
                    raise Ar2DiffError(
                        f"{name}: the header has an empty or repeated column name: "
                        f"{shortened(header)}",
                        "give each column a unique name in the first line",
                    )
                continue
            number += 1
            if len(cells) != len(header):
                raise Ar2DiffError(
                    f"{name}: row {number} has {len(cells)} cells, but the header has "
                    f"{len(header)} columns",
                    FIX,
                )
            yield f"{name}: row {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise Ar2DiffError(f"{name}: row {number + 1} is not CSV: {error}", FIX) from None


def _text(file: BinaryIO, name: str, line_as: str) -> Iterator[Row]:
    for where, line in _lines(file, name):
        yield where, {line_as: line}


def _parquet(file: BinaryIO, name: str, line_as: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        if isinstance(file, gzip.GzipFile):
            file = io.BytesIO(file.read())
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", from_arrow(row)
    except (pyarrow.ArrowException, ValueError) as error:  # a time that Python's types cannot hold
        raise Ar2DiffError(
            f"{name} cannot be read: {first_line(error)}",
            "check that the file is complete and readable",
        ) from None


_READERS: dict[str, Callable[[BinaryIO, str, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _text,
}


def from_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table, its messages and tools without nulls: Arrow gives each of them the
    keys of all others, and chat templates would write these."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict) and value.keys() & {"role", "from", "function"}:
        return _dropped(value)
    return value


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _dropped(v) for k, v in value.items() if v is not None or k == "content"}
    return [_dropped(item) for item in value] if isinstance(value, list) else value


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    """(what an error calls it, line without its end) of all lines that are not blank."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        where = f"{name}: row {number}"
        text = _decoded(line, where)
        if text.strip():
            yield where, text.rstrip("\r\n")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Ar2DiffError(
            f"{where} is not UTF-8 text: {error.reason} at byte {error.start + 1}",
            "save the file as UTF-8",
        ) from None


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise Ar2DiffError(
            f"{where} is {kind_of(row)}, but must be an object with columns",
            'write it like {"text": "..."}',
        )
    return row


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type, with its article."""
    names = {
        dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number",
        float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")
