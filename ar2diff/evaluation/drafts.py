"""How well a draft adapter drafts, on text that the model itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..checkpoint.model import Checkpoint
from ..config.draft import Draft
from ..core.forward import context_length, logits_at
from ..core.tree import Guesses
from ..data.blocks import BlockCollator
from ..data.documents import DocumentPart
from ..diffusion.cross_entropy import PART, has_plain_head
from ..diffusion.drafting import Drafting
from .score import NegativeLogLikelihood, score

ROWS = 64  # that are written together
PROMPT = 4  # one token in so many of an evaluation row is its prompt


@dataclass(frozen=True)
class Drafted:
    """Drafts of blocks on the model's own greedy text.

    Attributes:
        tokens_per_forward: tokens of a block that are right in a row, the model's own first token
            included: those that one forward of a chain of drafts yields.
        right: for each draft of a block, the share of blocks in which it is right, whatever came
            before it.
        blocks: number of blocks. ar_nll: that of the held-out rows themselves.
    """

    tokens_per_forward: float
    right: tuple[float, ...]
    blocks: int
    ar_nll: NegativeLogLikelihood

    def logs(self) -> dict[str, float]:
        """What a training run logs of it."""
        return {
            "eval_tokens_per_forward": self.tokens_per_forward,
            **{f"eval_right_{k}": share for k, share in enumerate(self.right, 1)},
        }

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**vars(self), "right": list(self.right), "ar_nll": vars(self.ar_nll)}


class DraftJudge:
    """Judges the draft adapter of a checkpoint on continuations of held-out rows. The model's own
    text and its AR NLL do not change while the adapter is trained: they are computed once.

    Args:
        collator: that of the run. rows: [R] token ids of equal length.
        drafting: computes the predictions of the adapter.
        ar_nll: that of the rows, if it is known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        drafting: Drafting,
        collator: BlockCollator,
        rows: Sequence[Sequence[int]],
        ar_nll: NegativeLogLikelihood | None = None,
    ):
        self.checkpoint, self.drafting, self.rows = checkpoint, drafting, rows
        first = len(rows[0]) // PROMPT or 1
        self.collator = BlockCollator(
            collator.draft.model_copy(update={"visible": 0.0, "decay": None}),
            collator.mask_token_id, collator.suppressed, context=collator.context, first=first,
        )  # fmt: skip
        self.first = first
        self.ar_nll = ar_nll
        self._known: tuple[list[list[int]], NegativeLogLikelihood] | None = None

    @torch.no_grad()
    def __call__(self) -> Drafted:
        """Draft the blocks that follow each prompt, one after the other."""
        if self._known is None:
            together = [self.rows[n : n + ROWS] for n in range(0, len(self.rows), ROWS)]
            texts = [
                t for rows in together for t in greedy_texts(self.checkpoint, rows, self.first)
            ]
            nll = self.ar_nll or score(self.checkpoint, list(self.rows), samples=1).ar_nll
            self._known = texts, nll
        texts, nll = self._known
        device = self.checkpoint.model.device
        size = self.drafting.draft.spec.block_length - 1
        per_row = -(-len(texts[0]) // (size + 1)) * size * len(self.collator.suppressed)
        step = max(1, PART // per_row)
        found = []
        for start in range(0, len(texts), step):
            parts = [DocumentPart(t, len(t), 0, 0, 0) for t in texts[start : start + step]]
            batch = self.collator([(0, [part]) for part in parts])
            found.append(self._right({name: x.to(device) for name, x in batch.items()}))
        right = torch.cat(found).cpu()
        runs = right.long().cumprod(1).sum(1) + 1
        shares = tuple(right.double().mean(0).tolist())
        return Drafted(runs.double().mean().item(), shares, len(right), nll)

    def _right(self, batch: dict[str, Tensor]) -> Tensor:
        """[M, K - 1] bool, which drafts are the text, for blocks that end within it."""
        found, head = self.drafting.predictions(batch), self.drafting.draft.head
        logits = self.drafting.logits(found.q).view(*found.target.shape, -1)
        drawn = Guesses(
            logits, found.previous[:, 0], head,
            None if head is None else head.gates(found.hidden), 1.0,
        ).chain(logits.shape[1])  # fmt: skip
        drawn = torch.tensor([tree.tokens for tree in drawn], device=found.target.device)
        return (drawn == found.target)[(found.weight > 0).all(1)]


@torch.no_grad()
def greedy_texts(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]], prompt: int
) -> list[list[int]]:
    """Rows whose tokens after the first `prompt` are those that the model finds likeliest, in AR
    mode and past any end token."""
    model = checkpoint.model
    suppressed = checkpoint.suppressed.to(model.device)
    ids = torch.tensor([row[:prompt] for row in rows], device=model.device)
    cache, new = DynamicCache(), ids
    last = torch.arange(len(ids), device=model.device)
    while ids.shape[1] < len(rows[0]):
        seen = torch.ones_like(ids)
        place = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1], device=model.device)
        logits = logits_at(
            model, last * new.shape[1] + new.shape[1] - 1, cache=cache, input_ids=new,
            attention_mask=seen, position_ids=place.expand_as(new),
        )  # fmt: skip
        new = logits.masked_fill(suppressed, float("-inf")).argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids.tolist()


def collator_for(checkpoint: Checkpoint, draft: Any, seed: int) -> BlockCollator:
    """The collator of blocks for a checkpoint with a draft adapter.

    Args:
        draft: the section of the recipe.
    """
    return BlockCollator(
        draft, checkpoint.draft.mask_token_id, checkpoint.suppressed.cpu(), seed,
        context_length(checkpoint.model),
    )  # fmt: skip


def drafts_of(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]], ar_nll: NegativeLogLikelihood
) -> Drafted:
    """How well the draft adapter of a loaded checkpoint drafts on its own text.

    Args:
        rows: [R] token ids of equal length, whose first quarter is continued. ar_nll: theirs.
    """
    model, draft = checkpoint.model, checkpoint.draft
    drafting = Drafting(
        model, draft, checkpoint.read_as, checkpoint.suppressed.to(model.device), {},
        plain=has_plain_head(model),
    )  # fmt: skip
    section = Draft(block_length=draft.spec.block_length)
    return DraftJudge(checkpoint, drafting, collator_for(checkpoint, section, 0), rows, ar_nll)()
