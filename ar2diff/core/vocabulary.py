"""The bytes that each token of a tokenizer stands for.

This file is copied into converted folders: it imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from .errors import Ar2DiffError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that is one byte, where there is byte fallback
SPACE = "\u2581"  # what stands for a space in tokens of SentencePiece
PROBE = "a b"


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of the tokens that are text, by their ids; special tokens are not.

    Raises:
        Ar2DiffError: the tokenizer does not write texts as the bytes of its tokens.
    """
    byte_level = _is_byte_level(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    found = {}
    for token, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if number in added:
            found[number] = token.encode()
        elif byte_level:
            found[number] = _raw(token)
        elif byte := BYTE.fullmatch(token):
            found[number] = bytes([int(byte[1], 16)])
        else:
            found[number] = token.replace(SPACE, " ").encode()
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    if b"".join(found.get(i, b"") for i in ids).strip() != PROBE.encode():
        raise Ar2DiffError(
            "the tokenizer does not write a text as the bytes of its tokens, so that no constraint "
            "can be held to",
            "use a model with a byte-level tokenizer, or one with SentencePiece",
        )
    return {number: text for number, text in found.items() if text}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _raw(token: str) -> bytes:
    """The bytes that a byte-level token spells; those of the text itself if it spells none."""
    table = _letters()
    if all(letter in table for letter in token):
        return bytes(table[letter] for letter in token)
    return token.encode()


@cache
def _letters() -> dict[str, int]:
    """The byte that each letter stands for in byte-level tokens: printable ones for themselves, the
    others, in order, for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + number): byte for number, byte in enumerate(others)},
    }
