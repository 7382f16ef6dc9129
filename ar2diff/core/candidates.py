"""The forward of self-speculation: logits after each candidate, and drafts of what may follow.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import layer_windows, model_mask, reading_slot, with_context
from .cache import ContextCache
from .forward import logits_at
from .readers import slots_of
from .spec import Spec


@dataclass(frozen=True)
class _CandidateSlots:
    """Where the slots of a forward stand: [clean | a noisy block after each candidate].

    With k drafts the clean slots end with the newest token and the drafts, at positions
    front - 1 .. front + k - 1; block j starts at front + j, as if j drafts were accepted.

    Attributes:
        pos: [R, S] positions less the row's front. start: [R, S] likewise. noisy: [S] bool.
        clean: how many slots are clean; wanted: [K] slots whose logits are read.
    """

    pos: Tensor
    start: Tensor
    noisy: Tensor
    clean: int
    wanted: Tensor

    @classmethod
    def of(cls, rows: int, certain: int, k: int, width: int, inside: Tensor) -> _CandidateSlots:
        """With `certain` tokens before the k drafts, and drafts read at `inside` [D] of a block."""
        candidate, clean = torch.arange(k + 1), certain + k
        start = candidate.repeat_interleave(width)
        ahead = start + torch.arange(width).repeat(k + 1)
        pos = torch.cat([torch.arange(clean) - certain, ahead]).expand(rows, -1)
        start = torch.cat([torch.arange(clean) - certain, start]).expand(rows, -1)
        drafted = clean + candidate[:, None] * width + inside
        wanted = torch.cat([certain - 1 + candidate, drafted.flatten()])
        return cls(pos, start, torch.arange(pos.shape[1]) >= clean, clean, wanted)


class CandidateReader:
    """Logits of the AR mode after each candidate, and of the drafts that may follow.

    Args:
        rows: how many rows; columns: tokens of the canvas.
        drafts: tokens drafted after each candidate; 0: none.
        cache: `dynamic`, `static`, or `none`: the context is read again at each forward.
        context: positions that the model has; drafts beyond it are not read.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        rows: int,
        columns: int,
        drafts: int,
        cache: str,
        context: int | None,
    ):
        self.model, self.spec, self.drafts = model, spec, drafts
        self.width = drafts + 1 if drafts else 0  # whole blocks draft no better, and cost more
        # The last accepted drafts may lie beyond the end of the canvas.
        static = columns + drafts + (drafts + 1) * (self.width + 1) if cache == "static" else None
        self.cache = None if cache == "none" else ContextCache(model, rows, static)
        self.last = (context or 1 << 60) - 1
        windows = layer_windows(model.config.get_text_config(), spec.local_window)
        self.uniform = not any(windows.values())  # all slots read the whole context
        self._steady: tuple[Any, _CandidateSlots, Any] | None = None

    def read(self, ids: Tensor, front: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, k + 1, V] after the newest token and each of k drafts, and
        [R, k + 1, drafts, V] of what may follow the token that comes next.

        Args:
            ids: [R, T] canvas. front: [R] tokens known. drafted: [R, k] tokens drafted after them.
        """
        rows, k, drafts, device = len(ids), drafted.shape[1], self.drafts, self.model.device
        length = self.cache.length if self.cache else torch.zeros_like(front)
        self.certain = front - length
        self.layout, mask = self._lay_out(front, length, k)
        layout, pos = self.layout, self.layout.pos + front[:, None]
        tokens = ids.new_full(pos.shape, self.spec.mask_token_id)
        first = layout.clean - k
        tokens[:, :first] = ids.gather(1, pos[:, :first].clamp(0, ids.shape[1] - 1))
        tokens[:, first : layout.clean] = drafted
        index = torch.arange(rows)[:, None] * pos.shape[1] + layout.wanted
        logits = logits_at(
            self.model,
            index.flatten().to(device),
            cache=self.cache.stock if self.cache else None,
            input_ids=tokens.to(device),
            attention_mask=mask,
            position_ids=pos.clamp(0, self.last).to(device),
        ).view(rows, layout.wanted.shape[0], -1)
        ahead = logits[:, k + 1 :].reshape(rows, k + 1, drafts, logits.shape[-1])
        return logits[:, : k + 1], ahead

    def keep(self, accepted: Tensor) -> None:
        """The tokens that were certain and the accepted drafts [R] become context."""
        if self.cache:
            layout = self.layout
            first = int((layout.pos[0, : layout.clean] < 0).sum()) - self.certain
            self.cache.keep(layout.pos.shape[1], first, self.certain + accepted)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the rows."""
        if self.cache:
            self.cache.select(rows)

    def _lay_out(self, front: Tensor, length: Tensor, k: int) -> tuple[_CandidateSlots, Any]:
        """The slots, and the mask over the context and them. Once each row has one certain token
        and as many drafts, only the context grows, and the slots after it are laid out once."""
        rows, certain = len(front), int(self.certain.max())
        beyond = int(front.max()) + k + self.width > self.last
        steady = self.uniform and not beyond and bool((self.certain == certain).all())
        key = (rows, certain, k)
        seen = torch.arange(self.cache.width if self.cache else 0) < length[:, None]
        if not steady or self._steady is None or self._steady[0] != key:
            drafted = 1 + torch.arange(self.drafts)  # the first of a block follows the candidate
            inside = reading_slot(drafted, "full", None, self.spec.prediction, drafted)
            layout = _CandidateSlots.of(rows, certain, k, self.width, inside)
            if not steady:
                return layout, self._mask(layout, front, length, seen)
            none = seen[:, :0]
            self._steady = (key, layout, self._mask(layout, front, length, none))
        _, layout, mask = self._steady
        if self.cache is None or self.cache.static is None:
            return layout, with_context(mask, seen.to(mask.device))
        return layout, self._mask(layout, front, length, seen)

    def _mask(self, layout: _CandidateSlots, front: Tensor, length: Tensor, seen: Tensor) -> Any:
        """The mask of the slots, which follow the columns `seen` [R, C] of the context."""
        pos, columns = layout.pos + front[:, None], seen.shape[1]
        slots = pos.shape[1]
        static = self.cache is not None and self.cache.static is not None
        built = slots_of(
            self.cache.static if static else columns + slots,
            seen,
            torch.arange(columns).expand(len(pos), -1),
            (pos >= length[:, None]) & (pos <= self.last),
            pos,
            layout.noisy.expand(len(pos), -1),
            self.model.device,
            layout.start + front[:, None],
        )
        return model_mask(
            self.model, built, "causal_context", self.spec.block_length, self.spec.local_window,
            queries=range(columns, columns + slots),
        )  # fmt: skip
