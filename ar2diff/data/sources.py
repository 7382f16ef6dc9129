"""Where rows come from: local files, standard input and Hub data sets; and the endless mixture of
documents that `adapt` trains on, in an order that depends on the seed alone."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.recipe import Recipe
from ..config.sections import Source
from ..core.errors import Ar2DiffError, first_line, nearest, option
from ..core.seeds import keyed_generator
from ..distributed.ranks import world_size
from .rows import STDIN, SUFFIXES, Row, from_arrow, kind_of, read_file, read_stdin, stdin_bytes

SHUFFLE_BUFFER = 10_000  # rows of a stream
Document = str | list[int]  # a text, or token ids
TEXT_COLUMNS = ("text", "content", "body", "document", "story", "article")  # often used names


def find_file(path: str) -> Path | None:
    """The local file that a source names: a file, a name without its suffix, or a folder with one
    data file. It is looked for in the working directory, then in $AR2DIFF_DATA.

    Returns:
        None for standard input (`-`), and for the id of a Hub data set.

    Raises:
        Ar2DiffError: it can only be a file, and there is none.
    """
    if path == STDIN:
        return None
    try:
        return _find_file(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, no such ~user
        raise Ar2DiffError(
            f"data {path}: {first_line(error)}",
            "give the path of a file, or the id of a Hub data set",
        ) from None


def _find_file(path: str) -> Path | None:
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
                f"data {path}: the folder contains {len(inside)} data files, but must contain one",
                f"give one of {', '.join(p.name for p in inside)}"
                if inside
                else f"give a file of one of these types: {', '.join(SUFFIXES)}",
            )
    if path.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise Ar2DiffError(
            f"data {path} does not exist",
            f"give a file ({', '.join(SUFFIXES)}), or the id of a Hub data set",
        )
    return None


def folder_of(source: Source) -> Path:
    """The folder to which paths in a source are relative: that of its file, else the current."""
    path = find_file(source.path)
    return Path() if path is None else path.parent


def no_data() -> Ar2DiffError:
    """The error for a run without data in its recipe or arguments."""
    return Ar2DiffError(
        f"there is no data: {option('data')} and data.sources are empty",
        f"give {option('data', 'FILE')}, or list data.sources in the recipe",
    )


def read_source(source: Source, line_as: str = "text", what: str = "data") -> Iterator[Row]:
    """Rows of a source of any kind, of which there is at least one.

    Args:
        line_as: the column that a line of a text file becomes.
        what: what an error calls the source: `data`, `prompts`.

    Raises:
        Ar2DiffError: it cannot be read, or is empty.
    """
    path, empty = find_file(source.path), True
    if path is not None:
        rows = read_file(path, line_as, what)
    elif source.path == STDIN:
        if world_size() > 1:
            raise Ar2DiffError(
                "standard input cannot be read by several processes",
                f"save it to a file, and read that with {option('data', 'FILE')}",
            )
        rows = read_stdin(line_as, what)
    else:
        data = open_hub(source)
        rows = (
            (f"{what} {source.path}: row {n}", from_arrow(row)) for n, row in enumerate(data, 1)
        )
    for row in rows:
        empty = False
        yield row
    if empty:
        raise Ar2DiffError(
            f"{what} {path or source.path} is empty", "use data with at least one row"
        )


def open_hub(source: Source, streaming: bool = False) -> Any:
    """A data set of the Hub, as `datasets` gives it. No code of the repository is run."""
    import datasets

    try:
        data = datasets.load_dataset(
            source.path, source.name, split=source.split, streaming=streaming
        )
        return _undecoded(data)
    except Exception as error:  # any of a dozen classes of datasets, huggingface_hub, httpx
        raise Ar2DiffError(
            f"data {source.path} is not a local file, and loading it from the Hub failed: "
            f"{first_line(error)}",
            "check the name and the connection, or give a local file",
        ) from error


def _undecoded(data: Any) -> Any:
    """The data set with its images as bytes and paths, which are checked before they are read."""
    import datasets

    for name, feature in (data.features or {}).items():
        kind = getattr(feature, "feature", feature)
        if isinstance(kind, datasets.Image):
            bare = datasets.Image(decode=False)
            data = data.cast_column(name, bare if kind is feature else datasets.List(bare))
    return data


def read_texts(path: Path | str, field: str) -> list[str]:
    """The texts of all rows of a source.

    Args:
        path: of a `Source`.
        field: the column that holds the text.

    Raises:
        Ar2DiffError: naming the row that cannot be read; or there is no row.
    """
    rows = read_source(Source(path=str(path)), field)
    return [text_of(row, field, where) for where, row in rows]


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in a column of a row.

    Args:
        where: what an error calls the row.

    Raises:
        Ar2DiffError: naming the row, and a column that holds text.
    """
    value = row.get(field)
    if isinstance(value, str):
        return value
    texts = [name for name, v in row.items() if isinstance(v, str) and v]
    likely = [name for name in TEXT_COLUMNS if name in texts] or texts
    wanted = option("text_field", likely[0] if likely else None)
    if field in row:
        raise Ar2DiffError(
            f"{where}: column {field!r} holds {kind_of(value)}, but must hold text",
            f"correct the row, or name another column with {wanted}",
        )
    raise Ar2DiffError(
        f"{where} has no column {field!r} (it has {columns_of(row)}){nearest(field, row)}",
        f"name the column that holds the text with {wanted}",
    )


def columns_of(row: dict[str, Any]) -> str:
    """The names of a row's columns, as an error lists them."""
    names = [name[:40] for name in row][:12]
    return ", ".join([*names, *(["..."] if len(row) > len(names) else [])]) or "none"


def count_rows(source: Source) -> int | None:
    """Rows of a local file; None for standard input and Hub data sets.

    Raises:
        Ar2DiffError: the file cannot be read.
    """
    path = find_file(source.path)
    return None if path is None else sum(1 for _ in read_file(path))


def identity(recipe: Recipe) -> dict[str, str | None]:
    """What determines the rows of a run, by name in the recipe: the SHA-256 of each file, or the
    hash that `datasets` has for the files of a Hub data set. Two runs whose identities are equal
    read the same rows. A hash that is not available is None."""
    found: dict[str, str | None] = {}
    for source in recipe.data.sources:
        path = find_file(source.path)
        if path is not None:
            found[source.path] = _sha256(path)
        elif source.path == STDIN:
            found[source.path] = hashlib.sha256(stdin_bytes(sys.stdin)).hexdigest()
        else:
            found[source.path] = _hub_hash(source)
    judged, template, own = recipe.eval.data, recipe.data.chat_template, recipe.data.self
    if own is not None and own.prompts and (path := find_file(own.prompts)) is not None:
        found["data.self.prompts"] = _sha256(path)
    if judged is not None and (path := find_file(judged)) is not None:
        found["eval.data"] = _sha256(path)
    if template is not None and Path(template).is_file():
        found["data.chat_template"] = _sha256(Path(template))
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Ar2DiffError(
            f"{path} cannot be read: {first_line(error)}",
            "check that the file is complete and readable",
        ) from None


def _hub_hash(source: Source) -> str | None:
    import datasets

    try:
        return datasets.load_dataset_builder(source.path, source.name).hash
    except Exception:  # as of `open_hub`, which says why
        return None


@dataclass
class Documents:
    """Endless (document, epoch) pairs from all sources; a document is a text, or token ids. The
    next one comes from the source that is furthest below its share, so that the shares hold at any
    time without random draws.

    Args:
        sources: of the recipe. A source without a weight has its number of rows as its weight.
        field: the column that holds the text.
        seed: of the order within a source.
        streaming: stream Hub data sets instead of downloading them first.
    """

    sources: Sequence[Source]
    field: str
    seed: int
    streaming: bool = False

    def __post_init__(self) -> None:
        self._texts = [self._open(i) for i in range(len(self.sources))]
        self._chosen = [source.weight for source in self.sources]
        self._weigh()

    def add(self, own: list[list[int]], weight: float | None) -> None:
        """Add a source of documents that are token ids."""
        self._texts.append(own)
        self._chosen.append(weight)
        self._weigh()

    def _weigh(self) -> None:
        sizes = [len(texts) if isinstance(texts, list) else None for texts in self._texts]
        self.size = sum(size or 0 for size in sizes)
        weights = [weight or size for weight, size in zip(self._chosen, sizes, strict=True)]
        if len(weights) > 1 and None in weights:
            path = self.sources[weights.index(None)].path
            raise Ar2DiffError(
                f"data {path}: a streamed source needs a weight if there are several sources",
                "write each source in the recipe as {path: ..., weight: ...}",
            )
        self.weights = [weight or 1.0 for weight in weights]

    def __iter__(self) -> Iterator[tuple[Document, int]]:
        streams = [self._stream(i) for i in range(len(self._texts))]
        taken, total = [0] * len(streams), sum(self.weights)
        while True:
            due = [weight * (sum(taken) + 1) / total for weight in self.weights]
            i = max(range(len(streams)), key=lambda i: due[i] - taken[i])
            taken[i] += 1
            yield next(streams[i])

    def first(self, count: int) -> list[Document]:
        """The first documents of the first source, in its own order."""
        texts = self._texts[0]
        if isinstance(texts, list):
            return texts[:count]
        return [self._field(row, 0, n) for n, row in enumerate(texts.take(count), 1)]

    def last(self, count: int) -> list[Document] | None:
        """The documents of the first source that its first epoch ends with; None of a stream."""
        texts = self._texts[0]
        if not isinstance(texts, list):
            return None
        return [texts[row] for row in self._order(0, 0)[-count:]]

    def known(self) -> list[Document] | None:
        """All documents; None if one of the sources is a stream."""
        if not all(isinstance(texts, list) for texts in self._texts):
            return None
        return [document for texts in self._texts for document in texts]

    def _order(self, i: int, epoch: int) -> list[int]:
        generator = keyed_generator(self.seed, epoch, i)
        return torch.randperm(len(self._texts[i]), generator=generator).tolist()

    def _open(self, i: int) -> Any:
        source = self.sources[i]
        if self.streaming and find_file(source.path) is None and source.path != STDIN:
            return open_hub(source, streaming=True)
        rows = read_source(source, self.field)
        return [text_of(row, self.field, where) for where, row in rows]

    def _field(self, row: Any, source: int, number: int) -> str:
        where = f"data {self.sources[source].path}: row {number}"
        return text_of(row, self.field, where)

    def _stream(self, i: int) -> Iterator[tuple[Document, int]]:
        texts, epoch = self._texts[i], 0
        while True:
            if isinstance(texts, list):
                for row in self._order(i, epoch):
                    yield texts[row], epoch
            else:
                shuffled = texts.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
                shuffled.set_epoch(epoch)
                number = 0
                for number, row in enumerate(shuffled, 1):
                    yield self._field(row, i, number), epoch
                if number == 0:
                    raise Ar2DiffError(
                        f"data {self.sources[i].path}: the stream is empty",
                        "set another split for it",
                    )
            epoch += 1
