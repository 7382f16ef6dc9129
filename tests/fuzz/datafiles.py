"""Rows in every format, and what is done to them."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostile import dumps, mutate_bytes, mutate_tree, shown, value

if TYPE_CHECKING:
    from cases import Case

FORMATS = (
    "jsonl",
    "jsonl",
    "jsonl",
    "jsonl",
    "parquet",
    "parquet",
    "jsonl.gz",
    "json",
    "csv",
    "txt",
)


def write_rows(work: Path, rows: list[Any], draw: random.Random, flat: bool) -> Path:
    """Rows in one of the formats that are read; `flat`: each is a text, as a line of a file is."""
    kind = draw.choice(FORMATS if flat else FORMATS[:-1])
    file = work / f"rows.{kind}"
    file.write_bytes(_rows(rows, kind))
    return file


def _rows(rows: list[Any], kind: str) -> bytes:
    if kind == "json":
        return dumps(rows)
    if kind == "txt":
        return "\n".join(
            str(next(iter(row.values()), "")) for row in rows if isinstance(row, dict)
        ).encode()
    if kind == "csv":
        text = io.StringIO()
        names = list(dict.fromkeys(str(n) for row in rows if isinstance(row, dict) for n in row))
        writer = csv.DictWriter(text, names or ["text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(
            {n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in row.items()}
            for row in rows
            if isinstance(row, dict)
        )
        return text.getvalue().encode("utf-8", "backslashreplace")
    if kind == "parquet":
        return _parquet(rows)
    lines = b"".join(dumps(row) + b"\n" for row in rows)
    return gzip.compress(lines, mtime=0) if kind.endswith("gz") else lines


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        parquet.write_table(table, stream)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return b"PAR1" + dumps(rows) + b"PAR1"  # not to be had in parquet: a file that is none
    return stream.getvalue()


def _typed(draw: random.Random) -> bytes:
    """Parquet with a column of a type that JSON does not have."""
    import pyarrow
    from pyarrow import parquet

    now = datetime.datetime(2020, 1, 2)
    columns = {
        "date": [now.date()] * 4, "time": [now] * 4, "decimal": [decimal.Decimal("1.50")] * 4,
        "bytes": [b"\xff\x00"] * 4, "null": [None] * 4, "lists": [[["a"]]] * 4, "bool": [True] * 4,
        "float": [float("nan")] * 4, "struct": [{"a": {"b": 1}}] * 4, "none": [],
        "span": [now - now] * 4,
    }  # fmt: skip
    kind = draw.choice(sorted(columns))
    names = draw.choice((["text"], ["messages"], ["prompt", "completion", "answer"], ["x"]))
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({name: columns[kind] for name in names}), stream)
    return stream.getvalue()


def row_file(case: Case, draw: random.Random, file: Path) -> str:
    """Rows of every type, and files that hold none."""
    if not file.is_file() or file.is_symlink():
        return ""
    kind = file.name.partition(".")[2]
    act = draw.choice(
        ["value"] * 5 + ["bytes", "bytes", "row", "empty", "odd", "typed", "long", "suffix"]
    )
    data = file.read_bytes()
    match act:
        case "bytes":
            data, note = mutate_bytes(draw, data)
            file.write_bytes(data)
            return f"{file.name} {note}"
        case "odd":
            file.unlink()
            note = draw.choice(["folder", "device", "pipe", "gone", "secret"])
            if note == "folder":
                file.mkdir()
            elif note == "device":
                file.symlink_to("/dev/zero")
                case.patient = True  # the user's own path
            elif note == "pipe":
                os.mkfifo(file)
                case.patient = True
            return f"{file.name} {note}"
        case "suffix":
            new = file.with_name(
                "rows" + draw.choice([".jsonl", ".parquet", ".gz", "", ".csv", ".txt.gz", ".xlsx"])
            )
            file.rename(new)
            case.files["rows"] = new
            case.words = [new.name if w == file.name else w for w in case.words]
            return f"{file.name} as {new.name}"
        case "typed":
            if not kind.startswith("parquet"):
                return ""
            file.write_bytes(_typed(draw))
            return f"{file.name} typed"
    rows = _read(data, kind)
    if rows is None:
        return ""
    if act == "empty":
        rows, note = draw.choice(
            [([], "no rows"), ([{}], "empty row"), ([{"text": ""}] * 8, "empty texts")]
        )
    elif act == "long":
        text = draw.choice(
            ["<|mask|>" * 40, "a" * 100_000, "\u0301" * 3000, "</s>" * 20, " " * 500, "<s>", "\x00"]
        )
        names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
        rows = [dict.fromkeys(names, text) for _ in range(8)]
        note = f"all texts {shown(text)}"
    elif act == "row":
        new = value(draw, rows[0] if rows else None)
        rows, note = [*rows[:2], new, *rows[2:]], f"a row {shown(new)}"
    else:
        every = draw.random() < 0.4
        one, note = mutate_tree(draw, json.loads(json.dumps(rows[0] if rows else {})))
        rows = [one] * 8 if every else [*rows[:1], one, *rows[1:]]
        note = f"{'every' if every else 'a'} row: {note}"
    with contextlib.suppress(UnicodeError, ValueError):
        file.write_bytes(_rows(rows, kind))
        return f"{file.name} {note}"
    return ""


def _read(data: bytes, kind: str) -> list[Any] | None:
    with contextlib.suppress(ValueError, OSError, RecursionError, EOFError, csv.Error):
        if kind == "json":
            return json.loads(data)
        if kind in ("jsonl", "jsonl.gz"):
            lines = gzip.decompress(data) if kind.endswith("gz") else data
            return [json.loads(line) for line in lines.decode().splitlines()]
        if kind == "csv":
            return list(csv.DictReader(io.StringIO(data.decode())))
        if kind == "parquet":
            import pyarrow
            from pyarrow import parquet

            with contextlib.suppress(pyarrow.ArrowException):
                return parquet.read_table(io.BytesIO(data)).to_pylist()
        if kind == "txt":
            return [{"text": line} for line in data.decode().splitlines()]
    return None
