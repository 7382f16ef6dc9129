"""Where text comes from: local files and Hub data sets, mixed by weight, endlessly and in an order
that depends on the seed alone."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.recipe import Source
from ..core.errors import Ar2DiffError, first_line
from ..core.seeds import keyed_generator

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")
SHUFFLE_BUFFER = 10_000


def find_file(path: str) -> Path | None:
    """The local file that a source names: a file, a name without its suffix, a folder with one data
    file; looked for from here and from $AR2DIFF_DATA. None: it must be a Hub data set."""
    roots = [Path(), *([Path(os.environ["AR2DIFF_DATA"])] if "AR2DIFF_DATA" in os.environ else [])]
    for root in roots:
        base = root / Path(path).expanduser()
        if base.is_file():
            return base
        named = [p for s in SUFFIXES if (p := Path(f"{base}{s}")).is_file()]
        if named:
            return named[0]
        if base.is_dir():
            inside = sorted(p for p in base.iterdir() if p.name.endswith(SUFFIXES))
            if len(inside) == 1:
                return inside[0]
            raise Ar2DiffError(
                f"data {path}: the folder holds {len(inside)} data files, wanted one",
                f"name one of {', '.join(p.name for p in inside) or SUFFIXES}",
            )
    if path.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise Ar2DiffError(
            f"data {path}: no such file", f"give a {', '.join(SUFFIXES)} file or a Hub data set"
        )
    return None


def read_texts(path: Path, field: str) -> list[str]:
    """All texts of a local file.

    Raises:
        Ar2DiffError: naming the row, where one cannot be read; or the file holds no row.
    """
    if path.name.endswith(".parquet"):
        texts = _parquet(path, field)
    else:
        if not path.name.endswith(SUFFIXES):
            raise Ar2DiffError(f"data {path}: unknown kind of file", f"give {', '.join(SUFFIXES)}")
        lines = read_lines(path, f"data {path}")
        if ".jsonl" in path.name:
            texts = [
                _text(_json(line, path, row), field, path, row)
                for row, line in enumerate(lines, 1)
                if line.strip()
            ]
        else:
            texts = [line.rstrip("\n") for line in lines if line.strip()]
    if not texts:
        raise Ar2DiffError(f"data {path}: the file is empty", "give a file with rows")
    return texts


def read_lines(path: Path, name: str) -> list[str]:
    """The lines of a text file, unpacked where it is a .gz.

    Args:
        name: what an error calls the file.
    """
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            return list(file)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise Ar2DiffError(f"{name}: {first_line(error)}", "check the file") from None


def count_rows(path: Path) -> int:
    """Rows of a local file, whatever they hold; 0 of a parquet file that cannot be read."""
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (OSError, pyarrow.ArrowInvalid):
            return 0
    return sum(bool(line.strip()) for line in read_lines(path, f"data {path}"))


def _parquet(path: Path, field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise Ar2DiffError(f"data {path}: {str(error).splitlines()[0]}", "check the file") from None
    return [_text(row, field, path, number) for number, row in enumerate(table.to_pylist(), 1)]


def _json(line: str, path: Path, row: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise Ar2DiffError(
            f"data {path}: row {row} is not JSON ({error.msg} at column {error.colno})",
            "mend or remove the row",
        ) from None


def _text(row: Any, field: str, path: Path | str, number: int) -> str:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise Ar2DiffError(
            f"data {path}: row {number} has no field {field!r} (it has {has})",
            "name the field with --text-field",
        )
    if not isinstance(row[field], str):
        raise Ar2DiffError(
            f"data {path}: row {number}: {field!r} is {type(row[field]).__name__}, wanted text",
            "name another field with --text-field",
        )
    try:
        row[field].encode()
    except UnicodeEncodeError:
        raise Ar2DiffError(
            f"data {path}: row {number}: {field!r} is not valid Unicode", "mend or remove the row"
        ) from None
    return row[field]


@dataclass
class Documents:
    """Endless (text, epoch) pairs from all sources. The next document comes from the source that is
    furthest behind its share, so that each share holds at any time, without a draw.

    Args:
        sources: of the recipe. A source without a weight weighs its number of rows.
        field: the text field.
        seed: order within a source.
        streaming: read Hub data sets as they come.
    """

    sources: Sequence[Source]
    field: str
    seed: int
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise Ar2DiffError("no data is named", "give --data, or data.sources in the recipe")
        self._texts = [self._open(i) for i in range(len(self.sources))]
        sizes = [len(texts) if isinstance(texts, list) else None for texts in self._texts]
        self.size = sum(size or 0 for size in sizes)
        weights = [s.weight or size for s, size in zip(self.sources, sizes, strict=True)]
        if len(weights) > 1 and None in weights:
            path = self.sources[weights.index(None)].path
            raise Ar2DiffError(
                f"data {path}: a streamed source in a mixture needs a weight",
                "give each source {path, weight} in the recipe",
            )
        self.weights = [weight or 1.0 for weight in weights]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        streams = [self._stream(i) for i in range(len(self.sources))]
        taken, total = [0] * len(streams), sum(self.weights)
        while True:
            due = [weight * (sum(taken) + 1) / total for weight in self.weights]
            i = max(range(len(streams)), key=lambda i: due[i] - taken[i])
            taken[i] += 1
            yield next(streams[i])

    def first(self, count: int) -> list[str]:
        """The first texts of the first source, in its own order."""
        texts = self._texts[0]
        if isinstance(texts, list):
            return texts[:count]
        return [self._field(row, 0, n) for n, row in enumerate(texts.take(count), 1)]

    def _open(self, i: int) -> Any:
        source = self.sources[i]
        path = find_file(source.path)
        if path is not None:
            return read_texts(path, self.field)
        import datasets

        try:
            data = datasets.load_dataset(
                source.path, source.name, split=source.split, streaming=self.streaming
            )
        except Exception as error:  # any of a dozen classes of datasets, huggingface_hub, httpx
            raise Ar2DiffError(
                f"data {source.path}: {first_line(error)}",
                "check the name and the connection, or give a local file",
            ) from error
        if self.streaming:
            return data
        return [self._field(row, i, number) for number, row in enumerate(data, 1)]

    def _field(self, row: Any, source: int, number: int) -> str:
        return _text(row, self.field, self.sources[source].path, number)

    def _stream(self, i: int) -> Iterator[tuple[str, int]]:
        texts, epoch = self._texts[i], 0
        while True:
            if isinstance(texts, list):
                generator = keyed_generator(self.seed, epoch, i)
                for row in torch.randperm(len(texts), generator=generator).tolist():
                    yield texts[row], epoch
            else:
                shuffled = texts.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
                shuffled.set_epoch(epoch)
                number = 0
                for number, row in enumerate(shuffled, 1):
                    yield self._field(row, i, number), epoch
                if number == 0:
                    raise Ar2DiffError(
                        f"data {self.sources[i].path}: the stream is empty", "check its split"
                    )
            epoch += 1
