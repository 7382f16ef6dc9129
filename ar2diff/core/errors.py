"""The one error that users are meant to see: what is wrong, and what to do about it.

This file is copied into converted folders: it imports the standard library alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

LONGEST = 400  # characters per line of an error; input quoted in it may have millions

# An option within a message. The two control characters occur in no text that a user gives us
# unescaped, so that nothing but `option` makes a mention.
_OPTION = re.compile("\x02([^\x02\x03=]*)(?:=([^\x02\x03]*))?\x03")


def option(name: str, value: object = None) -> str:
    """A mention of an option in a message. Each surface writes it in its own way: `--top-k 5` on
    the command line, `top_k=5` in Python, `rl.sampler.top_k=5` in a recipe.

    Args:
        name: a keyword of the API (`top_k`), or the dotted key of a recipe (`data.max_length`).
        value: a value to set it to; None mentions the name alone.
    """
    return f"\x02{name}\x03" if value is None else f"\x02{name}={value}\x03"


def as_keyword(name: str, value: str | None) -> str:
    """How Python writes an option."""
    return name if value is None else f"{name}={value}"


class Ar2DiffError(Exception):
    """A mistake that the user can fix. The command line prints two lines and exits with 2.

    Args:
        what: what is wrong, naming the file, key or row. Options are mentioned with `option`.
        fix: what to do about it, likewise.

    Attributes:
        what, fix: one printable line each, with options as Python writes them; `named` writes them
            differently. Overlong lines are shortened in the middle.
        option: the name of the option that the error is about, which is the first that `what`
            mentions, or None.
    """

    def __init__(self, what: str, fix: str):
        self._what, self._fix = what, fix
        self.what, self.fix = (_line(_written(text, as_keyword)) for text in (what, fix))
        mention = _OPTION.search(what)
        self.option = mention[1] if mention else None
        super().__init__(
            f"{self.what} (fix: {self.fix})"
        )  # one line, because servers quote it in their own messages

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self._what, self._fix)

    def named(self, write: Callable[[str, str | None], str]) -> Ar2DiffError:
        """The same error with every option written by `write(name, value)`."""
        return Ar2DiffError(_written(self._what, write), _written(self._fix, write))

    def within(self, section: str) -> Ar2DiffError:
        """The same error, about options in a section of a recipe."""
        return self.named(lambda name, value: option(f"{section}.{name}", value))

    def about(self, subject: str) -> Ar2DiffError:
        """The same error, prefixed with the row, file or other thing that it is about."""
        return Ar2DiffError(f"{subject}: {self._what}", self._fix)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message; its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Whether an error is a crash inside of the tokenizers library: the class is no `Exception`,
    and cannot be imported."""
    return type(error).__name__ == "PanicException"


def check_text(text: str, what: str) -> None:
    """Refuse a text with bytes that are not UTF-8 (Python keeps them as halves of surrogate pairs),
    which no tokenizer takes and no file holds.

    Args:
        what: what the text is, as the error calls it: "the argument".

    Raises:
        Ar2DiffError: it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Ar2DiffError(
            f"{what} {shortened(text)} is not valid UTF-8", "encode it as UTF-8"
        ) from None


def shortened(value: object, most: int = 80) -> str:
    """The repr of a value that may be huge, in at most `most` characters."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]
    elif isinstance(value, int) and value.bit_length() > 4 * most:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print long ones
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or holds such an integer
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?`, to follow a name that is not among `names`; empty if none is close."""
    found = difflib.get_close_matches(name[:100], list(names), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _written(text: str, write: Callable[[str, str | None], str]) -> str:
    return _OPTION.sub(lambda mention: write(mention[1], mention[2]), text)


def _line(text: str) -> str:
    """The text in one line that is safe to print, of at most `LONGEST` characters and escapes."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 100]} ... {text[-90:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
