"""Batches for a draft adapter: clean rows of documents, and the blocks of masks that follow some of
their tokens.

A block begins anywhere in a document, as it does in decoding, where it follows the newest token.
Its first token is the model's own prediction; the adapter predicts the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.draft import Draft
from ..core.attention import PADDING
from ..core.seeds import content_key, keyed_generator
from ..diffusion.task import places_of
from .documents import DocumentPart


@dataclass(frozen=True)
class BlockCollator:
    """Turns rows of parts into a batch. Where blocks begin, and what they show, depends only on the
    seed, the epoch and the ids of a part.

    Attributes:
        draft: the section of the recipe. mask_token_id: the id of a mask.
        suppressed: [V] bool, ids that no position can hold: they are not predicted.
        context: positions that the model has; None: no limit.
        first: position at which the first block of each part begins; None: 1 to `block_length`,
            drawn for each part.
    """

    draft: Draft
    mask_token_id: int
    suppressed: Tensor
    seed: int = 0
    context: int | None = None
    first: int | None = None

    def __call__(self, numbered: Sequence[tuple[int, Sequence[DocumentPart]]]) -> dict[str, Tensor]:
        """A batch of B rows of L tokens with A blocks of K slots each.

        Returns:
            x0, doc, pos: [B, L] ids, documents and positions of the clean rows.
            noisy_ids, noisy_doc, noisy_pos: [B, A * K] those of the blocks.
            start: [B, A * K] position at which the block of each slot begins.
            column: [B, A, K] the column in the clean row of the token at each slot.
            kept: [M] the blocks, of the flattened [B * A], in which something is predicted; one
                block without weight if there are none, so that there is a gradient.
            weight: [B, A, K - 1] of the predictions of the second and later tokens of each block
                in the loss, not yet decayed by dpace; 0 for those that count for nothing.
            divisor, tokens: scalars, the sum of the weights, and the number of tokens.
        """
        rows = [parts for _, parts in numbered]
        size, length = self.draft.block_length, max(sum(len(p.ids) for p in r) for r in rows)
        x0 = torch.zeros(len(rows), length, dtype=torch.long)
        doc, pos = torch.full_like(x0, PADDING), torch.zeros_like(x0)
        blocks: list[list[tuple[int, ...]]] = []  # of each row: document, start, column, end, shown
        for r, row in enumerate(rows):
            blocks.append([])
            begin = 0
            for number, part in enumerate(row):
                end = begin + len(part.ids)
                x0[r, begin:end] = torch.tensor(part.ids)
                doc[r, begin:end], pos[r, begin:end] = number, torch.arange(len(part.ids))
                blocks[r] += [
                    (number, start, begin + start, end, shown)
                    for start, shown in self._starts(part)
                ]
                begin = end
        most = max(1, *map(len, blocks))
        nothing = (PADDING, 0, 0, 0, 0)
        laid = torch.tensor([row + [nothing] * (most - len(row)) for row in blocks])
        number, start, column, end, shown = laid[..., None].unbind(2)
        step = torch.arange(size)
        weight = self._weights(step[1:] - shown.clamp(min=1))
        column = column + step
        weight = weight * (column[..., 1:] < end)
        column = column.clamp(max=length - 1)
        ids = x0.gather(1, column.flatten(1)).view_as(column)
        weight = weight * ~self.suppressed[ids[..., 1:]]
        kept = (weight > 0).any(-1)
        kept[0, 0] |= ~kept.any()
        return {
            "x0": x0,
            "doc": doc,
            "pos": pos,
            "noisy_ids": torch.where(step < shown, ids, self.mask_token_id).flatten(1),
            "noisy_doc": number.expand_as(column).flatten(1),
            "noisy_pos": (start + step).flatten(1),
            "start": start.expand_as(column).flatten(1),
            "column": column,
            "weight": weight,
            "kept": places_of(kept),
            "divisor": weight.double().sum(),
            "tokens": (doc != PADDING).sum(),
        }

    def _starts(self, part: DocumentPart) -> list[tuple[int, int]]:
        """(position at which it begins, number of tokens that it shows) of each block of a part."""
        size, count = self.draft.block_length, len(part.ids)
        last = count - 1 if self.context is None else min(count - 1, self.context - size + 1)
        generator = keyed_generator(self.seed, part.epoch, content_key(part.ids))
        first = self.first or 1 + int(torch.randint(size, (), generator=generator))
        starts = range(first, last, size)
        if not self.draft.visible:
            return [(start, 0) for start in starts]
        law = self.draft.visible ** torch.arange(size, dtype=torch.double)
        shown = torch.multinomial(law, len(starts), True, generator=generator) if starts else ()
        return list(zip(starts, map(int, shown), strict=True))

    def _weights(self, before: Tensor) -> Tensor:
        """Weights of drafts, given how many drafts of their block come before each of them (fewer
        than 0: it is not drafted)."""
        decay = self.draft.decay
        weight = torch.ones(before.shape)
        if isinstance(decay, float):
            weight = torch.exp(-before.clamp(min=0) / decay)
        return weight * (before >= 0)
