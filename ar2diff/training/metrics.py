"""What training logs besides the loss: sums over micro-batches and ranks since the last log."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

T_BINS = 4  # masked cross-entropy is logged for each quarter of t
SUMS = (
    "right", "eos_loss", "loss", "tokens", "ar_loss", "ar_tokens", "divergence", "distilled",
)  # fmt: skip


class Meter:
    """Accumulates sums on the device. `drain` reduces them over ranks, returns logs and starts
    over."""

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.ce, self.count = torch.zeros(2, T_BINS, dtype=torch.double, device=self.device)
        self.sums = {name: self.ce.new_zeros(()) for name in SUMS}
        self.start = time.monotonic()

    @torch.no_grad()
    def add(self, task: Any, right: Tensor, ce: Tensor) -> None:
        """Add the masked tokens of a micro-batch.

        Args:
            task: the `LossTask` of the micro-batch.
            right: [N] bool, whether the likeliest token is the right one.
            ce: [N] cross-entropy of the masked tokens, in nats.
        """
        ce = ce.double()
        bins = (task.t * T_BINS).ceil().long().clamp(1, T_BINS) - 1
        self.ce.index_add_(0, bins, ce)
        self.count.index_add_(0, bins, torch.ones_like(ce))
        loss = task.coef * ce
        self.sums["right"] += right.sum()
        self.sums["eos_loss"] += (loss * task.eos).sum()
        self.sums["loss"] += loss.sum()
        self.sums["tokens"] += task.tokens

    @torch.no_grad()
    def add_ar(self, ce: Tensor) -> None:
        """Add the cross-entropy [M] of the tokens of the AR co-loss."""
        self.sums["ar_loss"] += ce.sum()
        self.sums["ar_tokens"] += len(ce)

    @torch.no_grad()
    def add_divergence(self, divergence: Tensor) -> None:
        """Add the divergences [D] of the distilled tokens from their targets."""
        self.sums["divergence"] += divergence.sum()
        self.sums["distilled"] += len(divergence)

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Logs since the last call: `ce_t*` for each quarter of t, accuracy on masked tokens, the
        share of EOS tokens in the diffusion loss, the AR loss in nats, the mean divergence of
        distilled tokens, and tokens per second."""
        seconds = time.monotonic() - self.start
        packed = torch.cat([self.ce, self.count, torch.stack(list(self.sums.values()))])
        values = accelerator.reduce(packed, "sum").tolist()
        ce, count = values[:T_BINS], values[T_BINS : 2 * T_BINS]
        sums = dict(zip(SUMS, values[2 * T_BINS :], strict=True))
        self._reset()
        logs = {f"ce_t{(i + 1) / T_BINS:g}": ce[i] / count[i] for i in range(T_BINS) if count[i]}
        if sum(count):
            logs["masked_accuracy"] = sums["right"] / sum(count)
            logs["eos_share"] = sums["eos_loss"] / sums["loss"] if sums["loss"] else 0.0
        if sums["ar_tokens"]:
            logs["ar_loss"] = sums["ar_loss"] / sums["ar_tokens"]
        if sums["distilled"]:
            logs["divergence"] = sums["divergence"] / sums["distilled"]
        return {**logs, "tokens_per_second": sums["tokens"] / max(seconds, 1e-9)}


class DraftMeter:
    """Accumulates what `Drafting` counts. `drain` reduces it over ranks, returns logs and starts
    over."""

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None
        self.tokens = torch.zeros((), dtype=torch.double, device=self.device)
        self.start = time.monotonic()

    @torch.no_grad()
    def add(self, sums: Tensor, batch: Any) -> None:
        """Add the sums of a micro-batch, as `Drafting` returns them."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += batch["tokens"]

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Logs since the last call. For each draft of a block, in order: `accepted_*`, the
        probability that the model accepts it, and `right_*`, how often it is the model's likeliest
        token. `tokens_per_forward`: tokens that are right in a row in blocks of masks alone, the
        model's own first token included. And tokens per second."""
        seconds = time.monotonic() - self.start
        logs: dict[str, float] = {}
        if self.sums is not None:
            *slots, _, blocks, runs = accelerator.reduce(self.sums, "sum").tolist()
            width = len(slots) // 3
            for k in range(width):
                count, accepted, right = slots[k::width]
                if count:
                    logs |= {f"accepted_{k + 1}": accepted / count, f"right_{k + 1}": right / count}
            if blocks:
                logs["tokens_per_forward"] = runs / blocks
        tokens = accelerator.reduce(self.tokens, "sum").item()
        self._reset()
        return {**logs, "tokens_per_second": tokens / max(seconds, 1e-9)}
