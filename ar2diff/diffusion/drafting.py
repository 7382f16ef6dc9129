"""What a draft adapter is trained on: two forwards of a frozen model, and the divergence between
what they predict.

The first forward reads the clean rows. It gives p, the model's own prediction of every token, and
the keys that the second one reads: blocks of masks with the adapter on, which give q. No clean slot
reads a noisy one, so the two are the same as one forward of [noisy | clean] rows; but gradients and
their memory are needed for the blocks alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import DynamicCache

from ..core.attention import Slots, model_mask
from ..core.draft import Draft
from ..core.forward import output_at
from ..core.spec import Spec
from .cross_entropy import PART, rows_at_once
from .distillation import LEAST, weighted_divergence

FLOOR = 0.5  # dpace: a draft that is certainly wrong still leaves this share to the later ones


@dataclass(frozen=True)
class Predictions:
    """The second and later tokens of M blocks of K tokens, N = M * (K - 1) predictions in all.

    Attributes:
        q, p: [N, H] the states that the output head maps to logits, or the logits [N, V], of the
            adapter (without its head) and of the model.
        hidden: [M, K - 1, H] the states behind q.
        target, previous: [M, K - 1] the tokens, and the tokens before them.
        weight: [M, K - 1] of each in the loss.
    """

    q: Tensor
    p: Tensor
    hidden: Tensor
    target: Tensor
    previous: Tensor
    weight: Tensor


class Drafting(torch.nn.Module):
    """Computes the loss of a draft adapter, which is its only submodule: the frozen model is not
    one, so that whatever saves, moves, shards or synchronizes this module sees the adapter alone.

    Args:
        base: the frozen model, on the device of the batches.
        draft: the adapter. spec: how the model is read with it.
        suppressed: [V] bool, ids that no position can hold: both distributions lack them.
        loss: {divergence: weight}. dpace: whether the weights of positions are learned.
        plain: whether the model satisfies `has_plain_head`: logits are then made a part at a time.
    """

    def __init__(
        self,
        base: Any,
        draft: Draft,
        spec: Spec,
        suppressed: Tensor,
        loss: Mapping[str, float],
        dpace: bool = False,
        plain: bool = True,
    ):
        super().__init__()
        self.draft = draft
        self._base = (base, suppressed)  # in a tuple, which torch does not look into
        self.spec, self.loss, self.dpace = spec, dict(loss), dpace
        self.plain = plain
        self.config = base.config  # DeepSpeed looks up the hidden size for its buffers

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._base[0]

    def to_device(self, device: torch.device) -> None:
        """Move what this module holds beside the adapter, except for the model."""
        self._base = (self.base, self._base[1].to(device))

    def forward(self, batch: Mapping[str, Tensor], divisor: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch of `BlockCollator`, and what `Tally` counts.

        Returns:
            sum of weight * divergence / divisor; and [3 * (K - 1) + 3] sums: for each slot the
            predictions, their acceptance and how many are right; the sum of the losses; the blocks
            of masks alone that end within their document, and the tokens right in a row in them.
        """
        found = self.predictions(batch)
        width = found.weight.shape[1]
        bias = found.q.new_zeros(len(found.q), 0)
        after = bias.new_zeros(0, len(self._base[1]))
        if self.draft.head is not None:
            bias = self.draft.head.along(found.previous, found.hidden).flatten(0, 1)
            after = self.draft.head.after
        rows = rows_at_once(len(self._base[1]), found.q.device.type, PART, LEAST)
        total, stats = _InParts.apply(
            found.q, bias, after, found, self._judge, max(1, rows // width)
        )
        return total / divisor, stats

    def predictions(self, batch: Mapping[str, Tensor]) -> Predictions:
        """Run both forwards on a batch. Blocks in which nothing is predicted are left out."""
        column, slots = batch["column"], batch["noisy_ids"].shape[1]
        rows, length = batch["x0"].shape
        kept = batch["kept"]
        row = torch.arange(rows, device=column.device)[:, None, None]
        own = torch.arange(slots, device=column.device).view(column.shape[1:])
        places = row * length + column, row * slots + own
        before = [place.flatten(0, 1)[kept] for place in places]
        p, q, hidden = self.read(batch, *(index[:, :-1].flatten() for index in before))
        ids, weight = batch["x0"].flatten()[before[0]], batch["weight"].flatten(0, 1)[kept]
        return Predictions(q, p, hidden.view(*weight.shape, -1), ids[:, 1:], ids[:, :-1], weight)

    def read(
        self, batch: Mapping[str, Tensor], clean: Tensor, noisy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both forwards: p of `Predictions` at some slots of the clean rows, and q and the states
        [N, H] behind it at some slots of the blocks. (Slots are those of the flattened batch.)"""
        doc, pos = batch["doc"], batch["pos"]
        length, cache = doc.shape[1], DynamicCache()
        shown = Slots(doc, pos, torch.zeros_like(doc).bool())
        with torch.no_grad():
            p, _ = self._read(
                clean, cache, input_ids=batch["x0"], attention_mask=self._mask(shown),
                position_ids=pos,
            )  # fmt: skip
        blocks = torch.ones_like(batch["noisy_doc"]).bool()
        slots = Slots(
            torch.cat([doc, batch["noisy_doc"]], 1),
            torch.cat([pos, batch["noisy_pos"]], 1),
            torch.cat([shown.noisy, blocks], 1),
            torch.cat([pos, batch["start"]], 1),
        )
        mask = self._mask(slots, range(length, length + blocks.shape[1]))
        with self.draft.applied(self.base, slice(0, None)):
            q, hidden = self._read(
                noisy, cache, input_ids=batch["noisy_ids"], attention_mask=mask,
                position_ids=batch["noisy_pos"],
            )  # fmt: skip
        return p, q, hidden

    def _mask(self, slots: Slots, queries: range | None = None) -> Any:
        spec = self.spec
        return model_mask(
            self.base, slots, spec.attention, spec.block_length, spec.local_window,
            queries=queries,
        )  # fmt: skip

    def _read(self, index: Tensor, cache: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The inputs of the output head at some slots, or its logits if it is not a plain one; and
        these inputs."""
        states: list[Tensor] = []
        instead = (lambda _head, _states: None) if self.plain else None
        output = output_at(self.base, index, cache=cache, instead=instead, read=states, **inputs)
        return states[0] if self.plain else output.logits[0], states[0]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] of states of `Predictions`, without the suppressed ids."""
        if self.plain:
            head = self.base.get_output_embeddings()
            states = linear(states, head.weight, head.bias)
        return states.masked_fill(self._base[1], float("-inf"))

    def _judge(
        self, q: Tensor, bias: Tensor, after: Tensor, found: Predictions, blocks: slice
    ) -> tuple[Tensor, Tensor]:
        """Loss and statistics of some blocks, whose states are q."""
        target, weight = found.target[blocks], found.weight[blocks]
        width = weight.shape[1]
        p_logits = self.logits(found.p[blocks.start * width : blocks.stop * width])
        q_logits = self.logits(q)
        if self.draft.head is not None:
            q_logits = q_logits + bias @ after
        dtype = torch.promote_types(q_logits.dtype, torch.float32)
        log_q, p = q_logits.to(dtype).log_softmax(-1), p_logits.to(dtype).softmax(-1)
        apart = weighted_divergence(self.loss, log_q, p, target.flatten()).view(weight.shape)
        counted, likely = weight > 0, log_q.detach().exp()
        if self.dpace:
            right = likely.gather(1, target.reshape(-1, 1)).view(weight.shape)
            weight = weight * pace(right, counted)
        loss = (weight * torch.where(counted, apart, 0.0)).sum()
        with torch.no_grad():
            accepted = torch.minimum(likely, p).sum(-1).view(weight.shape)
            same = (likely.argmax(-1) == p.argmax(-1)).view(weight.shape)
            whole = counted.all(1)
            runs = same.long().cumprod(1).sum(1) + 1
            per_slot = torch.stack([counted.double(), accepted * counted, same & counted]).sum(1)
            sums = (loss.double(), whole.double().sum(), (runs * whole).double().sum())
        return loss, torch.cat([per_slot.flatten(), torch.stack(sums)])


def pace(right: Tensor, counted: Tensor) -> Tensor:
    """Weights of the drafts of blocks [M, K]: how many of the drafts from each on are kept, if each
    is right with probability s = 0.5 + 0.5 q(token): sum over j >= k of the product of s_1 .. s_j
    (D-PACE, 2605.18810).

    Args:
        right: [M, K] q(token). counted: [M, K] bool, which drafts there are.
    """
    share = torch.where(counted, FLOOR + (1 - FLOOR) * right, 1.0)
    kept = share.cumprod(1) * counted
    return kept.flip(1).cumsum(1).flip(1) * counted


class _InParts(torch.autograd.Function):
    """Sums a loss over parts of the blocks, and computes its gradients in the same pass: logits and
    what derives from them exist for one part at a time. The backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, bias: Tensor, after: Tensor, found: Predictions, judge: Any, step: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        given = (q, bias, after)
        needed = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(x) if need else None for x, need in zip(given, needed, strict=True)
        ]
        width, count = found.weight.shape[1], len(found.weight)
        total = stats = None
        for start in range(0, count, step):
            blocks = slice(start, min(start + step, count))
            rows = slice(blocks.start * width, blocks.stop * width)
            part = [q[rows].detach(), bias[rows].detach(), after.detach()]
            leaves = [x.requires_grad_() for x, need in zip(part, needed, strict=True) if need]
            with torch.enable_grad():
                loss, counted = judge(*part, found, blocks)
            made = iter(torch.autograd.grad(loss, leaves) if leaves else ())
            for n in range(3):
                if needed[n] and n < 2:
                    grads[n][rows] = next(made)
                elif needed[n]:
                    grads[n] += next(made)
            total = loss.detach() if total is None else total + loss.detach()
            stats = counted if stats is None else stats + counted
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(stats)
        return total, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, _: Any) -> tuple[Any, ...]:
        grads = ctx.saved_tensors
        return *(None if x is None else x * given.to(x.dtype) for x in grads), None, None, None
