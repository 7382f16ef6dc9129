"""Judging a model on held-out text: the bound of the diffusion mode, the NLL of the AR mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError
from ..core.forward import context_length
from ..data.sources import read_texts
from ..diffusion.likelihood import ar_nll, bound, scored

LN2 = 0.6931471805599453


def windows(
    texts: Sequence[str], tokenizer: Any, length: int, limit: int | None
) -> list[list[int]]:
    """The first `length` tokens of each text that has as many, at most `limit` of them; the
    tokenizer's own BOS included, no EOS."""
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) >= length:
            rows.append(ids[:length])
            if limit is not None and len(rows) == limit:
                break
    return rows


def check_length(checkpoint: Checkpoint, length: int, name: str) -> None:
    """Refuse windows longer than the model's context."""
    context = context_length(checkpoint.model.config)
    if context is not None and length > context:
        raise Ar2DiffError(
            f"{name} {length} is over the model's context of {context} tokens",
            f"give at most {context}",
        )


def evaluate(
    checkpoint: Checkpoint,
    data: str,
    *,
    field: str = "text",
    length: int = 128,
    samples: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Bound and AR NLL of a checkpoint on windows of a file, in nats per token and bits per byte.

    Raises:
        Ar2DiffError: the data cannot be read, or no text is long enough.
    """
    check_length(checkpoint, length, "--length")
    rows = windows(read_texts(data, field), checkpoint.tokenizer, length, limit)
    if not rows:
        raise Ar2DiffError(f"data {data}: no text has {length} tokens", "give a lower --length")
    return {
        "data": data,
        "rows": len(rows),
        "length": length,
        "samples": samples,
        "seed": seed,
        **score(checkpoint, rows, samples=samples, seed=seed),
    }


def score(
    checkpoint: Checkpoint, rows: list[list[int]], *, samples: int, seed: int = 0
) -> dict[str, Any]:
    """Bound (of a converted model) and AR NLL (where the AR mode is alive) of token rows."""
    model, spec, tokenizer = checkpoint.model, checkpoint.spec, checkpoint.tokenizer
    suppressed = checkpoint.suppressed
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
    result: dict[str, Any] = {
        "tokens": sum(int(scored(row, suppressed).sum()) for row in rows),
        "bytes": size,
    }
    if spec is not None:
        estimate = bound(model, spec, rows, suppressed, samples, seed)
        result["bound"] = {
            "nats_per_token": estimate.mean,
            "standard_error": estimate.error if samples > 1 else None,
            "bits_per_byte": estimate.nats.sum().item() / size / LN2,
        }
    if spec is None or spec.ar_mode:
        window = spec.local_window if spec else "kept"
        estimate = ar_nll(model, rows, suppressed, window)
        result["ar_nll"] = {
            "nats_per_token": estimate.mean,
            "bits_per_byte": estimate.nats.sum().item() / size / LN2,
        }
    return result
