"""From text to token ids and back: prompts, gaps, answers, and the tokens on a screen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..core.errors import Ar2DiffError, check_text, first_line
from ..core.spec import Spec
from .prompts import Segments, places_of

if TYPE_CHECKING:
    from ..data.album import Album

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that is one byte, where there is byte fallback
UNKNOWN = "\ufffd"  # what bytes that are no character decode to
DRAWN: WeakKeyDictionary[Any, dict[tuple[int, ...], str]] = WeakKeyDictionary()


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[dict[str, Any]], tools: Sequence[Any] | None = None
) -> list[int]:
    """Ids of a prompt that is to be continued: a text, with the tokenizer's BOS but without the EOS
    or SEP that some tokenizers append; or messages, as the chat template renders them before an
    answer.

    Args:
        tools: descriptions of functions that the answer may call.

    Raises:
        Exception: whatever a chat template raises.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False).input_ids
        return ids[: len(ids) - closing_tokens(tokenizer)]
    rendered = tokenizer.apply_chat_template(
        list(prompt), tools=tools, add_generation_prompt=True, return_dict=True
    )
    return rendered["input_ids"]


def closing_tokens(tokenizer: Any) -> int:
    """How many special tokens the tokenizer appends to every text."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for opening in range(len(whole) - len(text) + 1):
        if whole[opening : opening + len(text)] == text:
            return len(whole) - len(text) - opening
    return 0


def encode(tokenizer: Any, spec: Spec, segments: Segments) -> list[int]:
    """Ids of the texts, and as many mask tokens as each gap has. The space before a gap is left to
    its first token where the tokenizer joins spaces and words: a space of its own would be read as
    one that no word follows.

    Raises:
        Ar2DiffError: the prompt is empty or contains the mask token.
    """
    ids: list[int] = []
    for number, segment in enumerate(segments):
        if isinstance(segment, int):
            ids += [spec.mask_token_id] * segment
            continue
        check_text(segment, "the prompt")
        ids_of = ids_after_text if number else prompt_ids
        new = ids_of(tokenizer, segment)
        if number + 1 < len(segments) and _leaves_space(tokenizer, segment, ids_of):
            new = ids_of(tokenizer, segment[:-1])
        if spec.mask_token_id in new:
            raise Ar2DiffError(
                "the prompt contains the mask token", "write {mask:N} for a gap of N tokens"
            )
        ids += new
    if not ids:
        raise Ar2DiffError("the prompt has no tokens", "use a longer prompt")
    return ids


def spaced_gaps(tokenizer: Any, segments: Segments) -> list[bool]:
    """Which gaps of a prompt begin with a space that the text before them has, as in `encode`."""
    return [
        _leaves_space(tokenizer, segment, ids_after_text if number else prompt_ids)
        for number, segment in enumerate(segments[:-1])
        if isinstance(segment, str)
    ]


def opened(tokenizer: Any, text: str, parts: Sequence[str]) -> str:
    """The text with gaps in place of some parts, each of as many tokens as the part has, with the
    space that `encode` leaves to a gap.

    Args:
        parts: as of `places_of`.

    Raises:
        Ar2DiffError: as `places_of`.
    """
    segments = opened_at(tokenizer, text, places_of(text, parts))
    return "".join(s if isinstance(s, str) else f"{{mask:{s}}}" for s in segments)


def opened_at(tokenizer: Any, text: str, places: Sequence[tuple[int, int]]) -> Segments:
    """The text with gaps in place of some parts, as `opened`.

    Args:
        places: where the parts begin and end, in order; no two touch.
    """
    segments: Segments = []
    at, ids_of = 0, prompt_ids
    for begin, end in places:
        before = text[at:begin]
        space = " " * _leaves_space(tokenizer, before, ids_of)
        if begin:
            count = len(ids_after_text(tokenizer, space + text[begin:end]))
        else:  # some tokenizers put a space before a whole text
            count = len(prompt_ids(tokenizer, text[:end])) - len(prompt_ids(tokenizer, ""))
        segments += [before, count]
        at, ids_of = end, ids_after_text
    return [*segments, text[at:]]


def _leaves_space(tokenizer: Any, text: str, ids_of: Callable[[Any, str], list[int]]) -> bool:
    """Whether a text ends with a space that its tokenizer would join to a word behind it."""
    if not text.endswith(" ") or not text.strip():
        return False
    return ids_of(tokenizer, text + "a")[:-1] == ids_of(tokenizer, text[:-1])


def encode_messages(
    tokenizer: Any,
    spec: Spec,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None = None,
    album: Album | None = None,
) -> list[int]:
    """Ids of a conversation up to the answer that is to be written.

    Args:
        messages: images in them are keys in the `album`, which a vision-language model needs.
        tools: as of `prompt_ids`.

    Raises:
        Ar2DiffError: the tokenizer has no chat template, the template refuses the messages, or they
            contain the mask token.
    """
    if not tokenizer.chat_template:
        raise Ar2DiffError(
            "the tokenizer has no chat template, so messages cannot be rendered",
            "pass the conversation as one text",
        )
    template = tokenizer.chat_template
    try:
        if album is None:
            ids = prompt_ids(tokenizer, messages, tools)
        else:
            from ..data.chat_template import in_form  # the command line imports this file early

            keys, asked = {key: key for key in album.shots}, {"add_generation_prompt": True}
            shaped = in_form(template, messages)
            ids, _ = album.chat(shaped, template, "the conversation", keys, tools, options=asked)
    except Ar2DiffError:
        raise
    except Exception as error:  # a template may raise anything
        raise Ar2DiffError(
            f"the chat template rejects the conversation ({first_line(error)})",
            "change the messages, for example their roles or their order",
        ) from error
    if spec.mask_token_id in ids:
        raise Ar2DiffError(
            "the conversation contains the mask token", "remove it from the messages"
        )
    return ids


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ids. Where a tokenizer falls back to bytes, bytes that are no whole character
    become one replacement mark each run; transformers would replace the whole characters that
    stand next to them, too."""
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    if UNKNOWN not in text:
        return text
    if skip_special_tokens:
        special = set(tokenizer.all_special_ids)
        ids = [token for token in ids if token not in special]
    broken = _broken_bytes(tokenizer.convert_ids_to_tokens(ids))
    if not any(broken):
        return text
    whole = [token for token, bad in zip(ids, broken, strict=True) if not bad]
    text, written, shift, count = tokenizer.decode(whole), [], 0, 0
    for number, bad in enumerate(broken):
        if not bad:
            count += 1
        elif not number or not broken[number - 1]:
            end = len(tokenizer.decode(whole[:count]))
            written += [text[shift:end], UNKNOWN]
            shift = end
    return "".join([*written, text[shift:]])


def text_after(tokenizer: Any, ids: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add to others. They are decoded together and cut apart, since a
    tokenizer may drop the space before a first token."""
    return decode(tokenizer, [*ids, *new])[len(decode(tokenizer, ids)) :]


def with_gaps_filled(
    tokenizer: Any, segments: Segments, ids: Sequence[int], gaps: Sequence[int]
) -> list[str]:
    """Texts and fillings of a prompt in turn, as far as its ids go. A filling has no space at its
    ends where the text beside it has one.

    Args:
        segments: of `split_gaps`.
        ids: of the prompt, all or the first of them.
        gaps: places of the tokens of all gaps, in order.
    """
    texts, taken = [segments[0]], 0
    for size, after in zip(segments[1::2], segments[2::2], strict=True):
        first, end = gaps[taken], gaps[taken + size - 1] + 1
        text = text_after(tokenizer, ids[:first], ids[first:end])
        text = text.removeprefix(" ") if texts[-1].endswith(" ") else text
        if len(ids) < end:
            return [*texts, text.rstrip(" ")]
        texts += [text.removesuffix(" ") if after.startswith(" ") else text, after]
        taken += size
    return texts


def draw_tokens(tokenizer: Any, ids: Sequence[int], mask_token_id: int) -> list[str]:
    """The text of each token of a canvas, for a screen: a dot for an undecided one; a character
    that takes several tokens appears with the last of them. What has been looked up is kept, since
    a screen is drawn many times."""
    known = DRAWN.setdefault(tokenizer, {})
    pieces: list[str] = []
    open_: tuple[int, ...] = ()
    for token in ids:
        if token == mask_token_id:
            pieces.append("·")
            open_ = ()
            continue
        open_ = (*open_, token)
        if open_ not in known:
            known[open_] = _text_of(tokenizer, open_)
        text = known[open_]
        half = text.endswith(UNKNOWN) and len(open_) < 4  # UTF-8 has at most four bytes
        pieces.append("" if half else text)
        open_ = open_ if half else ()
    return pieces


def _text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """The text of tokens in the middle of a text."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids  # keeps a first token's space
    skip = len(decode(tokenizer, anchor, False))
    return decode(tokenizer, [*anchor, *ids], False)[skip:]


def ids_after_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in the middle of another: some tokenizers put a space before a text that stands
    alone. If the newline put before it merges with the text, the ids are those of the text alone.
    """
    before = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False, verbose=False).input_ids
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _broken_bytes(tokens: Sequence[str]) -> list[bool]:
    """Which tokens are bytes that belong to no whole character."""
    broken = [False] * len(tokens)
    start = 0
    while start < len(tokens):
        if not BYTE.fullmatch(tokens[start]):
            start += 1
            continue
        end = start
        while end < len(tokens) and BYTE.fullmatch(tokens[end]):
            end += 1
        run = bytes(int(token[3:5], 16) for token in tokens[start:end])
        while run:
            try:
                run.decode()
                break
            except UnicodeDecodeError as error:
                first, last = end - len(run) + error.start, end - len(run) + error.end
                broken[first:last] = [True] * (last - first)
                run = run[error.end :]
        start = end
    return broken
