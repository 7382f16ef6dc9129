"""What is to be generated: prompts with gaps, and files of prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import check_path
from ..config.safe_json import parse_json
from ..core.errors import Ar2DiffError, option, shortened

IMAGE = "{image}"  # in a prompt, where an image stands
GAP = re.compile(r"\{mask(?::([^{}]*))?\}")
FIRST_UNSPACED = "\u0e00"  # Thai; scripts before it set words apart by spaces
LONGEST = 10_000_000  # tokens of a gap, more than any context has

Segments = list[str | int]  # of a prompt: texts, and gaps as their number of tokens


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        prompts: texts to continue, or whose gaps are to be filled.
        many: they come from a file.
        infill: prefix, suffix and the lengths to try for the gap between them, instead of prompts.
        revise: parts of the one prompt that are to be written anew.
        images: files of each prompt's images, or of those between prefix and suffix.
    """

    prompts: tuple[str, ...] = ()
    many: bool = False
    infill: tuple[str, str, tuple[int, ...]] | None = None
    revise: tuple[str, ...] = ()
    images: tuple[tuple[str, ...], ...] = ()

    @property
    def sees(self) -> bool:
        """Whether there is any image."""
        return any(self.images)

    def check_places(self) -> None:
        """Refuse prompts with more places for images than images, or fewer.

        Raises:
            Ar2DiffError: there is one; of several, it is named.
        """
        texts = [split_gaps(prompt) for prompt in self.prompts]
        if self.infill is not None:
            texts = [[*self.infill[:2]]]
        for number, (segments, images) in enumerate(zip(texts, self.images, strict=True), 1):
            try:
                with_places(segments, len(images))
            except Ar2DiffError as error:
                raise error.about(f"prompt {number}") if self.many else error from None

    @property
    def has_gap(self) -> bool:
        """Whether any gap is to be filled."""
        if self.infill is not None or self.revise:
            return True
        return any(len(split_gaps(text)) > 1 for text in self.prompts)


def request_of(
    prompt: str | None,
    file: Path | None,
    prefix: str | None,
    suffix: str | None,
    lengths: Sequence[str],
    revise: Sequence[str] = (),
    images: Sequence[str] = (),
) -> Request:
    """The request that the command line arguments describe.

    Args:
        images: files of the images in the one prompt, or in prefix and suffix.

    Raises:
        Ar2DiffError: they contradict each other, or one of them is not valid.
    """
    infilling = prefix is not None or suffix is not None or bool(lengths)
    if revise and prompt is None:
        raise Ar2DiffError(
            f"{option('revise')} only works together with {option('prompt')}",
            f"give the text as {option('prompt')}",
        )
    if (prompt is not None) + (file is not None) + infilling != 1:
        names = f"{option('prompt')}, {option('prompts_file')} and {option('prefix')}"
        given = "more than one" if prompt is not None or file is not None else "none"
        example = option("prompt", '"Once upon a time"')
        raise Ar2DiffError(
            f"{given} of {names} is given", f"give exactly one of them, for example {example}"
        )
    if infilling:
        if prefix is None or not lengths:
            given = "suffix" if suffix is not None else "length" if lengths else "prefix"
            missing = "prefix" if prefix is None else "length"
            raise Ar2DiffError(
                f"{option(given)} only works together with {option(missing)}",
                f"set {option('prefix')}, {option('suffix')} and {option('length')}, the number "
                "of tokens in the gap between them",
            )
        texts = prefix, _apart(suffix or "")
        return Request(infill=(*texts, tuple(lengths_of(lengths))), images=(tuple(images),))
    if file is not None:
        if images:
            raise Ar2DiffError(
                f"{option('image')} is given beside {option('prompts_file')}",
                "give each row a column 'image' or 'images' with its files",
            )
        prompts, files = zip(*read_prompts(file), strict=True)
        return Request(prompts, many=True, images=files)
    split_gaps(prompt or "")
    places_of(prompt or "", revise)
    return Request((prompt or "",), revise=tuple(revise), images=(tuple(images),))


def _apart(suffix: str) -> str:
    """A suffix set apart from the gap if it begins with a word, in a script that has spaces: a
    shell's arguments are often written without their outer ones."""
    spaced = suffix[:1].isalnum() and suffix[0] < FIRST_UNSPACED
    return " " + suffix if spaced else suffix


def check_stream(request: Request, elsewhere: bool, asked: str) -> None:
    """Refuse to stream anything but one text to the screen.

    Args:
        elsewhere: the results go to a file, or are printed as JSON.
        asked: the option that asks for it.
    """
    if request.many or request.infill:
        gaps = ", with {mask:N} for a gap" if asked == "stream" else ""
        raise Ar2DiffError(
            f"{option(asked)} only works with a single prompt",
            f"use {option('prompt')}{gaps}, or leave out {option(asked)}",
        )
    if elsewhere:
        raise Ar2DiffError(
            f"{option(asked)} prints text, so it cannot be combined with {option('as_json')} or "
            f"{option('output')}",
            "use only one of them",
        )


def constraints_of(
    regex: str | None, schema: Path | None, choices: Sequence[str] | None, grammar: Path | None
) -> dict[str, Any]:
    """The settings that the command line's constraints make.

    Raises:
        Ar2DiffError: the schema or the grammar cannot be read.
    """
    given = {"regex": regex, "choice": choices or None}
    if grammar is not None:
        given["grammar"] = _read(grammar, "grammar").decode(errors="replace")
    if schema is not None:
        given["json_schema"] = read_schema(schema)
    return {name: value for name, value in given.items() if value is not None}


def read_schema(path: Path) -> Any:
    """What a file of a JSON schema holds.

    Raises:
        Ar2DiffError: it cannot be read.
    """
    try:
        return parse_json(_read(path, "json_schema"))
    except ValueError as error:
        name = f"{option('json_schema')} {path}"
        raise Ar2DiffError(f"{name} is not JSON: {error}", "correct the file") from None


def _read(file: Path, asked: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Ar2DiffError(
            f"{option(asked)} {file} cannot be read: {error.strerror or error}", "check the path"
        ) from None


def places_of(text: str, parts: Sequence[str]) -> list[tuple[int, int]]:
    """Where parts of a text begin and end, in order; those that touch are one.

    Raises:
        Ar2DiffError: a part does not occur in the text, or more than once.
    """
    found: list[tuple[int, int]] = []
    for part in parts:
        count = text.count(part) if part else 0
        if count != 1:
            often = f"occurs {count} times in" if count else "does not occur in"
            raise Ar2DiffError(
                f"{option('revise')} {shortened(part)} {often} the text",
                "give words that occur once, with some of those around them",
            )
        begin = text.index(part)
        found.append((begin, begin + len(part)))
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def lengths_of(texts: Sequence[str]) -> list[int]:
    """Lengths of a gap, from "4,8,12" or from one text each."""
    words = [word.strip() for text in texts for word in text.split(",")]
    for word in words:
        if not _positive(word):
            raise Ar2DiffError(
                f"{option('length')} {shortened(word)} is not a number of tokens",
                f'use integers from 1 to {LONGEST:,}, for example "4,8"',
            )
    return list(dict.fromkeys(map(int, words)))


def split_gaps(prompt: str) -> Segments:
    """Texts and gaps of a prompt in turn; it starts and ends with a text, which may be empty.

    Raises:
        Ar2DiffError: a gap without a length.
    """
    segments: Segments = []
    end = 0
    for gap in GAP.finditer(prompt):
        if not _positive(gap[1] or ""):
            raise Ar2DiffError(
                f"the gap {shortened(gap[0])} does not say how many tokens it has",
                f"write {{mask:N}} for a gap of N tokens, with N from 1 to {LONGEST:,}",
            )
        segments += [prompt[end : gap.start()], int(gap[1])]
        end = gap.end()
    return [*segments, prompt[end:]]


def _positive(word: str) -> bool:
    """Whether a word is a number of tokens from 1 to `LONGEST`."""
    return word.isdecimal() and len(word) < 10 and 1 <= int(word) <= LONGEST


def with_places(segments: Segments, count: int) -> Segments:
    """A prompt in which each image has its place: before all else, unless `{image}` says where.

    Args:
        count: how many images there are.

    Raises:
        Ar2DiffError: there are more places than images, or fewer.
    """
    places = sum(text.count(IMAGE) for text in segments if isinstance(text, str))
    if not places and count:
        return [IMAGE * count + str(segments[0]), *segments[1:]]
    if places != count:
        images = "1 image" if count == 1 else f"{count or 'no'} images"
        raise Ar2DiffError(
            f"the prompt has {places} {IMAGE}, but there {'is' if count == 1 else 'are'} {images}",
            f"give {option('image')} once for each {IMAGE}; if there is none, the images stand "
            "before the text",
        )
    return segments


def read_prompts(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Prompts of a file (`-` for standard input), with the files of their images: lines of text, or
    the columns `prompt` and `image` or `images` of rows. A relative path starts at the file.

    Raises:
        Ar2DiffError: the file cannot be read, or a row of it; it names the row.
    """
    from ..config.sections import Source
    from ..data.sources import columns_of, read_source

    check_path(path)
    if str(path) != "-" and not path.is_file():
        raise Ar2DiffError(f"prompts file {path} does not exist", "check the path")
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
            images = _images_of(row, path)
        except Ar2DiffError as error:
            raise error.about(where) from None
        prompts.append((prompt, images))
    return prompts


def _images_of(row: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The files of a row's images."""
    given = row.get("images") or row.get("image") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Ar2DiffError(
            f"its images are {shortened(given)}",
            'name files, as in {"prompt": "...", "images": ["a.png", "b.png"]}',
        )
    folder = Path() if str(path) == "-" else path.parent
    return tuple(name if name.startswith("data:") else str(folder / name) for name in names)
