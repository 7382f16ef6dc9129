"""Scoring a model on held-out text: the bound of the diffusion mode and the NLL of the AR mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, option
from ..core.forward import context_length
from ..data.sources import Document
from ..diffusion.estimate import Estimate
from ..diffusion.likelihood import ar_nll, bound, scored
from ..generation.tokens import closing_tokens


@dataclass(frozen=True)
class Bound:
    """Upper bound on the negative log-likelihood in the diffusion mode.

    Attributes:
        standard_error: standard error of `nats_per_token`, due to the noise draws alone; None for a
            single draw.
    """

    nats_per_token: float
    standard_error: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Exact negative log-likelihood in the AR mode."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class Score:
    """Likelihood of token rows.

    Attributes:
        tokens: number of scored tokens, which excludes mask tokens and the first token of each row.
        bytes: UTF-8 length of the text of the rows.
        bound: None for an unconverted model.
        ar_nll: None if the AR mode was not trained.
    """

    tokens: int
    bytes: int
    bound: Bound | None
    ar_nll: NegativeLogLikelihood | None

    def logs(self) -> dict[str, float]:
        """What a training run logs of it."""
        found = {"eval_bound": self.bound, "eval_ar_nll": self.ar_nll}
        return {name: value.nats_per_token for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, without modes that the model lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def windows(
    texts: Sequence[Document], tokenizer: Any, length: int, limit: int | None
) -> list[list[int]]:
    """The first `length` tokens of each text that has as many, for at most `limit` texts; with the
    tokenizer's own BOS, but without an EOS. A text may also be given as its token ids."""
    rows: list[list[int]] = []
    closing = closing_tokens(tokenizer)
    for text in texts:
        ids = text
        if isinstance(text, str):
            ids = tokenizer(text, verbose=False).input_ids
            ids = ids[: len(ids) - closing]
        if len(ids) >= length:
            rows.append(ids[:length])
            if limit is not None and len(rows) == limit:
                break
    return rows


def check_length(checkpoint: Checkpoint, length: int, name: str) -> None:
    """Refuse rows that are longer than the model's context.

    Args:
        name: the option that sets the length.
    """
    context = context_length(checkpoint.model)
    if context is not None and length > context:
        raise Ar2DiffError(
            f"{option(name, length)} exceeds the model's context of {context} tokens",
            f"set it to {context} or less",
        )


def score(checkpoint: Checkpoint, rows: list[list[int]], *, samples: int, seed: int = 0) -> Score:
    """Bound (for a converted model) and AR NLL (if there is an AR mode) of token rows.

    Raises:
        Ar2DiffError: no token of the rows can be scored.
    """
    model, spec, tokenizer = checkpoint.model, checkpoint.spec, checkpoint.tokenizer
    suppressed = checkpoint.suppressed
    tokens = sum(int(scored(row, suppressed).sum()) for row in rows)
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
    if not tokens:
        raise Ar2DiffError(
            "no token can be scored: the text consists of special tokens", "use other text"
        )

    def bits_per_byte(estimate: Estimate) -> float:
        return estimate.nats.sum().item() / size / log(2) if size else float("nan")

    diffusion = autoregressive = None
    if spec is not None:
        estimate = bound(model, spec, rows, suppressed, samples, seed)
        error = estimate.error if samples > 1 else None
        diffusion = Bound(estimate.mean, error, bits_per_byte(estimate))
    if spec is None or spec.ar_mode:
        window = checkpoint.spec_or_causal.local_window
        estimate = ar_nll(model, rows, suppressed, window)
        autoregressive = NegativeLogLikelihood(estimate.mean, bits_per_byte(estimate))
    return Score(tokens, size, diffusion, autoregressive)
