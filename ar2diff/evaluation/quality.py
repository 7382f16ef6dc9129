"""Whether the diffusion mode of a model writes text as good as its base's: the NLL of both texts
under the base, on the same prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import read_config, read_spec, weight_files
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, first_line
from ..core.masked_lm import is_masked_lm
from ..core.options import SAFE_THRESHOLD, THRESHOLD
from ..diffusion.likelihood import ar_nll
from ..generation.complete import decode_rows, settings_of

ROWS = 32  # held-out continuations
PROMPT = 4  # one token in so many of a row is its prompt
ERRORS = 2  # standard errors by which the text may be worse


@dataclass(frozen=True)
class TextQuality:
    """The text of the diffusion mode at the default threshold, compared with that of the base.

    Attributes:
        rows: number of continuations, of at most `tokens` tokens each.
        nll, base_nll: of the two texts under the base, in nats per token.
        difference, standard_error: mean over the rows of how much higher the first is, and its
            standard error.
    """

    rows: int
    tokens: int
    nll: float
    base_nll: float
    difference: float
    standard_error: float

    @property
    def good(self) -> bool:
        """Whether the text is as good, up to `ERRORS` standard errors."""
        return self.difference <= ERRORS * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"threshold": THRESHOLD, **asdict(self), "good": self.good}


def choose_threshold(
    checkpoint: Checkpoint, base: Path, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Set the threshold with which a model without an AR mode decodes by default: the usual one if
    its text at that one is as good as its base's, else the safe one. A rule in its generation
    config other than these two is its user's, and stays.

    Args:
        checkpoint: the trained model, which holds all of its weights.
        base: folder of the AR model that it was before.
        rows: held-out token ids.

    Returns:
        What was measured, or `{"not_measured": reason}`.
    """
    generation = checkpoint.model.generation_config
    try:
        reason = _reason_not_to(base, rows)
        found = None if reason else text_quality(checkpoint, _load(base, checkpoint), rows)
    except (Ar2DiffError, torch.OutOfMemoryError) as error:  # the trained model must be saved
        reason, found = first_line(error), None
    if getattr(generation, "threshold", None) in (THRESHOLD, SAFE_THRESHOLD):
        generation.threshold = THRESHOLD if found and found.good else SAFE_THRESHOLD
    return found.to_dict() if found else {"not_measured": reason}


def text_quality(
    checkpoint: Checkpoint, base: Checkpoint, rows: Sequence[Sequence[int]]
) -> TextQuality:
    """Compare continuations of the first quarter of each row. Both models decode as their
    generation configs say, the base in its AR mode."""
    rows = [list(row) for row in rows[:ROWS]]
    prompts = [row[: max(1, len(row) // PROMPT)] for row in rows]
    new = max(1, max(len(row) for row in rows) - max(len(prompt) for prompt in prompts))
    vocabulary, known = (c.model.config.get_text_config().vocab_size for c in (checkpoint, base))
    settings = {"max_new_tokens": new, "seed": 0}
    own = {"mode": "diffusion", "threshold": THRESHOLD, **settings}
    own["suppress_tokens"] = list(range(known, vocabulary))  # the base could not score them
    texts = [
        [result.token_ids for result in decode_rows(model, *settings_of(model, asked), prompts)]
        for model, asked in ((checkpoint, own), (base, {"mode": "ar", **settings}))
    ]
    ours, theirs = (_nll(base, prompts, text) for text in texts)
    apart = ours - theirs
    return TextQuality(
        rows=len(rows),
        tokens=new,
        nll=ours.mean().item(),
        base_nll=theirs.mean().item(),
        difference=apart.mean().item(),
        standard_error=(apart.std() / sqrt(len(rows))).item(),
    )


def _nll(
    base: Checkpoint, prompts: Sequence[list[int]], texts: Sequence[list[int]]
) -> torch.Tensor:
    """[R] nats per token of texts after their prompts."""
    window, suppressed = base.spec_or_causal.local_window, base.suppressed
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    nats = ar_nll(base.model, whole, suppressed, window).nats
    nats = nats - ar_nll(base.model, prompts, suppressed, window).nats
    return nats / torch.tensor([max(1, len(text)) for text in texts])


def _reason_not_to(base: Path, rows: Sequence[Any]) -> str | None:
    """Why the text cannot be measured; None if it can."""
    spec = read_spec(base)
    if is_masked_lm(read_config(base).get("architectures")):
        return "its base is a masked language model, which gives texts no probability"
    if spec is not None and not spec.writes_ar:
        return "the model that was trained has no AR mode"
    if len(rows) < ROWS:
        return f"that takes eval.steps above 0 and {ROWS} evaluation rows (eval.rows)"
    size = sum(file.stat().st_size for file in weight_files(base))
    if not torch.cuda.is_available() and 2 * size > _free_memory():
        return "the memory has no room for the base beside the model"
    return None


def _free_memory() -> int:
    """Bytes of memory that nothing uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load(base: Path, checkpoint: Checkpoint) -> Checkpoint:
    device = None if checkpoint.model.device.type == "cpu" else "auto"
    return load_checkpoint(str(base), device=device)
