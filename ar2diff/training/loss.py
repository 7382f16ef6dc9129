"""What trainers that denoise share: the loss, its divisors over the global batch, and what is
logged. A mixin over `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model import Checkpoint
from ..core.attention import PADDING, Slots, model_mask
from ..core.forward import output_at, router_loss
from ..diffusion.cross_entropy import WeightedLoss, has_plain_head
from .base import Running
from .metrics import Meter


@dataclass(frozen=True)
class Task:
    """A forward and what is asked of it.

    Attributes:
        input_ids: [B, S]. slots: their layout. attention, block_length, reveal: of the mask.
        index: [N] slots of the flattened [B * S] at which masked tokens are read.
        target, coef, t, eos: [N] of each, the token, its factor in the loss, its time, whether it
            is of an EOS run.
        ar_index, ar_target: [M] likewise for the AR loss of the clean copy.
        tokens: scalar, real tokens of the batch.
    """

    input_ids: Tensor
    slots: Slots
    attention: str
    block_length: int | None
    reveal: Tensor | None
    index: Tensor
    target: Tensor
    coef: Tensor
    t: Tensor
    eos: Tensor
    ar_index: Tensor
    ar_target: Tensor
    tokens: Tensor


class Denoising(Running):
    """Trains a converted checkpoint to denoise.

    The loss is a sum over the global batch divided by a divisor of the global batch, so neither
    accumulation nor ranks scale it; what is random comes with the batch.
    """

    loss_is_scaled_for_ga = True

    def set_up(self, checkpoint: Checkpoint, recipe: Any, args: Any) -> None:
        """Call before the trainer's own `__init__`."""
        self.recipe, self.spec = recipe, checkpoint.spec_or_causal
        self.suppressed = checkpoint.suppressed.to(args.device)
        self._seen = Meter(args.device)
        self._plain: bool | None = None  # the head, once it is where it trains
        self.current_gradient_accumulation_steps = 1  # until `train` counts

    def facts(self) -> dict[str, Any]:
        """What the run's record says of the data."""
        return {}

    def denoising_loss(self, model: Any, task: Task, divisors: Tensor) -> Tensor:
        """Masked cross-entropy of the noisy copy plus the AR loss of the clean one, and the loss
        of the routers of a mixture of experts where its config asks for it.

        Args:
            divisors: [2] of the diffusion and the AR loss, over the global batch.
        """
        inner = self.accelerator.unwrap_model(model)
        mask = model_mask(
            inner, task.slots, task.attention, task.block_length, self.spec.local_window,
            task.reveal,
        )  # fmt: skip
        # Masked tokens, then tokens of the AR loss, whose mode keeps the whole vocabulary.
        count, (divisor, ar_divisor) = len(task.index), divisors
        ar_coef = self.recipe.objective.ar_weight / ar_divisor
        weighted = WeightedLoss(
            torch.cat([task.target, task.ar_target]),
            torch.cat([task.coef / divisor, ar_coef.expand(len(task.ar_index))]),
            self.suppressed,
            count,
        )
        if self._plain is None:
            self._plain = has_plain_head(inner)
            if self.recipe.train.compile:  # not before: that was a forward of another shape
                compile_layers(inner)
        output = output_at(
            model,
            torch.cat([task.index, task.ar_index]),
            inner=inner,
            real=task.slots.doc != PADDING,
            instead=weighted if self._plain else None,
            input_ids=task.input_ids,
            attention_mask=mask,
            position_ids=task.slots.pos,
        )
        if not self._plain:
            weighted.of_logits(output.logits[0])
        self._seen.add(task, weighted.right[:count], weighted.ce[:count])
        self._seen.add_ar(weighted.ce[count:])
        # Gradients are averaged over ranks. The routers' loss is a mean over each micro-batch.
        routers = router_loss(inner, output) / self.current_gradient_accumulation_steps
        return weighted.loss * self.accelerator.num_processes + routers

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[2] divisors of the diffusion and the AR loss, over all accumulation steps and ranks."""
        names = ("divisor", "ar_divisor", "tokens")
        totals = (
            torch.stack(
                [torch.stack([batch[name].double() for name in names]) for batch in batch_samples]
            )
            .sum(0)
            .to(device)
        )
        totals = self.accelerator.reduce(totals, "sum")
        self.state.num_input_tokens_seen += int(totals[2])
        return totals[:2].clamp(min=torch.finfo(torch.float32).tiny).to(torch.get_default_dtype())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last log: CE by t, accuracy, EOS share, tokens/s."""
        if "loss" in logs:
            seen = self._seen.drain(self.accelerator)
            logs = {**logs, **seen, "tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)


def disable_dropout(model: Any) -> None:
    """Dropout is noise that no seed of ours governs; masking regularises enough. An adapter's is
    there because the recipe asks for it."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def layers_of(model: Any) -> list[Any]:
    """The decoder layers: the longest list of modules directly in the decoder."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = [m for m in inner.get_decoder().children() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def compile_layers(model: Any) -> None:
    """torch.compile of each decoder layer, in place: one graph serves all, names of weights stay,
    and what lies around the layers (hooks on the head) is as ever."""
    for layer in layers_of(model):
        layer.compile()
