"""What steers the choice of tokens: biases of single tokens, and a user's guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.functions import function_of
from ..core.errors import Ar2DiffError, option, shortened
from ..core.values import bad, token_bias
from .tokens import ids_after_text


def steered(settings: Mapping[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """Settings of `generate` as the sampler takes them: a guide or classifier that is named becomes
    a function, and `logit_bias` a `sequence_bias`.

    Args:
        settings: `guide` and `classifier` may be `file.py:function`, `logit_bias` a mapping from
            tokens, by id or text, to what is added to their logits.
        tokenizer: None leaves biases out, once their form is checked.

    Raises:
        Ar2DiffError: the guide cannot be found, or a bias is not valid.
    """
    settings = dict(settings)
    for name in ("guide", "classifier"):
        if isinstance(settings.get(name), str):
            settings[name] = function_of(settings[name], name)
    given = settings.pop("logit_bias", None)
    if given is None:
        return settings
    if not isinstance(given, Mapping):
        raise bad("logit_bias", given, "a mapping from tokens to biases")
    ids = {_id(token, tokenizer): value for token, value in given.items()}
    own = token_bias("logit_bias", {(token,): value for token, value in ids.items()}) or {}
    if tokenizer is not None:
        others = token_bias("sequence_bias", settings.get("sequence_bias")) or {}
        settings["sequence_bias"] = others | own
    return settings


def biases_of(texts: list[str]) -> dict[str, float]:
    """Biases from the command line, each as TOKEN=BIAS.

    Raises:
        Ar2DiffError: one has another form.
    """
    found = {}
    for text in texts:
        token, _, value = text.rpartition("=")
        try:
            found[token] = float(value)
        except ValueError:
            token = ""
        if not token:
            raise Ar2DiffError(
                f"{option('logit_bias')} {shortened(text)} is not a token and its bias",
                "write TOKEN=BIAS, for example ' yes=2.5' or 42=-5",
            )
    return found


def _id(token: Any, tokenizer: Any) -> Any:
    """The id of a token that is named by its id or its text; 0 for a text without a tokenizer."""
    if not isinstance(token, str):
        return token
    if token.isdecimal():
        return int(token)
    if tokenizer is None:
        return 0
    ids = ids_after_text(tokenizer, token)  # " yes" is one token for SentencePiece, too
    if len(ids) != 1:
        pieces = ", ".join(map(repr, map(tokenizer.decode, ids)))
        raise Ar2DiffError(
            f"{option('logit_bias')}: {shortened(token)} is {len(ids)} tokens ({pieces})",
            "name one token, by its text or its id",
        )
    return ids[0]
