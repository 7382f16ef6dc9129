"""The denoising loss, with divisors over the global batch, and its logging and evaluation. A mixin
over `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.attention import PADDING
from ..core.errors import Ar2DiffError, option
from ..core.forward import output_at, router_loss
from ..core.head import ATTRIBUTE, UNKNOWN
from ..core.images import seeing
from ..core.noise import EARLIEST, Evidence, OwnEvidence
from ..core.samplers import draw
from ..diffusion.cross_entropy import (
    WeightedLoss,
    has_plain_head,
    loss_of_hidden,
    loss_of_logits,
)
from ..diffusion.distillation import Readout, distillation_loss
from ..diffusion.task import Task, guessing, seen, slots_at
from ..distributed.sharding import holds_shards
from .base import Running
from .metrics import Meter
from .modules import (
    attending_with,
    compile_layers,
    flex_in_one_dtype,
    flex_pays,
    frozen_copy,
    sdpa_in_parts,
    unwrapped,
)

IGNORED = -100  # the label of a token that is not predicted, as in transformers


@dataclass(frozen=True)
class LossTask:
    """A forward pass and the tokens in its loss: N masked tokens, and M tokens of the AR co-loss.

    Attributes:
        task: the forward pass and the masked tokens it predicts.
        places: [N] those of the masked tokens in the flattened [B * L].
        labels: [B, L] all tokens of the batch.
        coef, t, eos: [N] each token's factor in the loss, its time, and whether it is in an EOS
            run.
        ar_index, ar_target: [M] the slots that predict the tokens of the AR loss, and those tokens.
        tokens: scalar, the number of real tokens in the batch.
        distilled: [N] bool, which masked tokens are distilled; None: none.
        chosen: [D] the numbers of these.
        guess: [N] the draws of guesses that tokens show instead, as `Noise.guesses_for` has them;
            None: none do.
        source: the forward pass, and the slots of it (`index` [D]), in which the AR model predicts
            these tokens: the teacher's, or that of `task`.
    """

    task: Task
    places: Tensor
    labels: Tensor
    coef: Tensor
    t: Tensor
    eos: Tensor
    ar_index: Tensor
    ar_target: Tensor
    tokens: Tensor
    distilled: Tensor | None = None
    chosen: Tensor | None = None
    source: Task | None = None
    guess: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """[N] the masked tokens' own slots, in the flattened input: the noisy copy is first."""
        length, width = self.labels.shape[1], self.task.input_ids.shape[1]
        return self.places // length * width + self.places % length

    def at_masked(self, values: Tensor) -> Tensor:
        """Scatter values [N] of the masked tokens to their places, [B, L], with `IGNORED`
        elsewhere."""
        placed = torch.full_like(self.labels, IGNORED).flatten()
        placed[self.places] = values
        return placed.view_as(self.labels)


class Denoising(Running):
    """Trains a converted checkpoint to denoise.

    The loss is a sum over the global batch, divided by divisors of the global batch, so neither
    gradient accumulation nor the number of ranks scales it. All randomness comes with the batch.

    A subclass defines the task for a batch with `task_of`, and the rows of an evaluation with
    `fixed_rows`.
    """

    loss_is_scaled_for_ga = True
    figures: ClassVar[dict[str, str]] = {
        "loss": "loss {:.3f}", "masked_accuracy": "accuracy {:.1%}", "ar_loss": "AR loss {:.3f}",
    }  # fmt: skip

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, args: Any, **kwargs: Any):
        self.suppressed = checkpoint.suppressed.to(args.device)
        self.noise = checkpoint.noise
        self._seen = Meter(args.device)
        self._fused: bool | None = None  # unknown until the model is on its training device
        self.current_gradient_accumulation_steps = 1  # until `train` counts
        distil = recipe.objective.distil
        self.teacher, self._teacher_fuses = None, None
        if distil is not None and distil.target == "teacher":
            self.teacher = frozen_copy(checkpoint.model).to(args.device)
        super().__init__(checkpoint, recipe, args, **kwargs)
        flex_in_one_dtype()
        sdpa_in_parts()
        # For training alone: evaluation has rows of many lengths, and flex compiles for each.
        auto = recipe.train.attn_implementation == "auto"
        inner, length = unwrapped(checkpoint.model), recipe.data.max_length
        self.attention = (
            "flex_attention" if auto and flex_pays(inner, length, args.device) else None
        )
        if self.spec.head is not None and holds_shards(self):
            raise Ar2DiffError(
                f"{option('convert.head_rank')} cannot be used where each process holds a shard of "
                "the weights",
                "launch with ddp or zero2",
            )

    def task_of(self, inputs: dict[str, Tensor]) -> LossTask:
        """The loss task for a batch from the collator."""
        raise NotImplementedError

    def fixed_rows(self, dataset: Any) -> list[Any]:
        """Rows for the collator whose noise depends only on the seed and their tokens."""
        raise NotImplementedError

    def loss_task(
        self,
        task: Task,
        batch: dict[str, Tensor],
        labels: Tensor,
        ar_columns: Tensor,
        source: Task | None = None,
    ) -> LossTask:
        """The task of predicting the masked tokens, plus the AR co-loss if the recipe gives it a
        weight.

        Args:
            batch: from the collator: coef, t, eos and, with guesses, guess [B, L], those of
                `chosen_places`, and tokens, a scalar.
            labels: [B, L] all tokens. ar_columns: [B, L] the slots in the row that predict them
                from left to right.
            source: see `LossTask`.
        """
        places, ar = batch["scored_at"], batch["ar_at"]
        ar = ar if self.recipe.objective.ar_weight > 0 else ar[:0]
        coef, t, eos = (batch[name].flatten()[places] for name in ("coef", "t", "eos"))
        wanted = LossTask(
            task=task,
            places=places,
            labels=labels,
            coef=coef,
            t=t,
            eos=eos,
            ar_index=slots_at(ar_columns, ar, task.input_ids.shape[1]),
            ar_target=labels.flatten()[ar],
            tokens=batch["tokens"],
            distilled=batch.get("distilled"),
            chosen=batch.get("chosen"),
            source=source,
            guess=batch["guess"].flatten()[places] if "guess" in batch else None,
        )
        if "shown" not in batch:
            return wanted
        return replace(wanted, task=seen(task, self.noise, wanted.own, batch["shown"], t))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch, with the attention that pays in training."""
        with attending_with(unwrapped(self.checkpoint.model), self.attention):
            return super().training_step(*args, **kwargs)

    def losses(
        self, model: Any, wanted: LossTask, divisors: Tensor, logits: bool = False
    ) -> tuple[Tensor, WeightedLoss, Tensor]:
        """The loss of a micro-batch:

              sum over masked tokens    coef * term / divisor                     diffusion loss
            + sum over clean tokens     ar_weight * -log p(token) / ar_divisor    AR co-loss
            + the router loss of a mixture of experts, if its config asks for one

        The term of a masked token is -log p(token), or, where it is distilled with weight w,
        (1 - w) * -log p(token) + w * D, with its divergence D from the AR prediction; or, with
        `objective.weight: bound`, what `Noise.nats` says of it.

        Args:
            divisors: [2] for the diffusion loss and the AR loss, over the global batch.
            logits: whether to compute all logits, which the fused loss avoids.

        Returns:
            The loss; the first two sums, with the cross-entropy of each token (masked tokens
            first) and the terms; and the logits [N + M, V], if they were asked for.
        """
        inner = self.accelerator.unwrap_model(model)
        if wanted.guess is not None:
            wanted = self._with_guesses(model, inner, wanted)
        task, count, (divisor, ar_divisor) = wanted.task, len(wanted.coef), divisors
        own = wanted.coef / divisor
        in_nats = self.recipe.objective.weight == "bound"
        if in_nats:
            own = own * 0
        if wanted.distilled is not None:
            own = own * (1 - self.recipe.objective.distil.weight * wanted.distilled)
        ar_coef = self.recipe.objective.ar_weight / ar_divisor
        coef = torch.cat([own, ar_coef.expand(len(wanted.ar_target))])
        target = torch.cat([task.target, wanted.ar_target])
        # The AR mode keeps the whole vocabulary: only the masked tokens lack the suppressed ids.
        asked, index = (target, coef, self.suppressed, count), [task.index, wanted.ar_index]
        if wanted.distilled is not None and self.teacher is None:
            index.append(wanted.source.index)
        added = None
        if task.previous is not None:
            bigram = getattr(inner, ATTRIBUTE)
            none = torch.full_like(wanted.ar_target, UNKNOWN)  # the AR mode has no bias
            added = bigram.vectors(torch.cat([task.previous, none])), bigram.after
        evidence = self._evidence(wanted)
        fused: list[WeightedLoss] = []
        read: list[Readout] = []

        def fuse(head: Any, hidden: Tensor) -> Tensor:
            fused.append(loss_of_hidden(head, hidden[: len(target)], *asked, added, evidence))
            if wanted.distilled is not None:
                read.append(Readout.of_head(head, hidden))
            return fused[0].total.view(1, 1, 1)

        with seeing(task.images):
            output = output_at(
                model,
                torch.cat(index),
                inner=inner,
                real=task.slots.doc != PADDING,
                instead=fuse if self._fuses(inner) and not logits and not in_nats else None,
                **task.inputs(inner, self.spec.local_window),
            )
        made = output.logits[0]
        if added is not None and not fused:
            made = made + (added[0] @ added[1]).to(made.dtype)
        if fused:  # through what the head returned, which sharded weights wait for
            summed = replace(fused[0], total=made[0, 0])
        else:
            summed = loss_of_logits(made[: len(target)], *asked, evidence)
        if in_nats:
            summed = self._in_nats(summed, made[:count], wanted, divisor)
        if wanted.distilled is not None:
            readout = read[0] if read else Readout(made)
            summed = self._distilled(summed, readout, wanted, divisor)
        # The routers' loss is a mean over each micro-batch. Ranks average their gradients.
        routers = router_loss(inner, output) / self.current_gradient_accumulation_steps
        loss = summed.total * self.accelerator.num_processes + routers
        return loss, summed, made[: len(target)]

    def _in_nats(
        self, summed: WeightedLoss, logits: Tensor, wanted: LossTask, divisor: Tensor
    ) -> WeightedLoss:
        """The weighted loss with the bound of a free noise added to its sum, as its terms. Its
        memory is several times that of the logits [N, V] in double precision."""
        task, t = wanted.task, wanted.t.clamp(EARLIEST, 1 - EARLIEST)
        own = logits.double().masked_fill(self.suppressed, float("-inf"))
        own = self.noise.others(own, task.shown, t)
        nats = self.noise.nats(own, task.target, task.shown, t).to(summed.total.dtype)
        total = summed.total + (wanted.coef / divisor * nats).sum()
        return replace(summed, total=total, terms=nats.detach())

    def _evidence(self, wanted: LossTask) -> Evidence | OwnEvidence | None:
        """What the scored slots show adds to their logits; None: nothing."""
        shown = wanted.task.shown
        return None if shown is None else self.noise.added(shown, wanted.t)

    @torch.no_grad()
    def _with_guesses(self, model: Any, inner: Any, wanted: LossTask) -> LossTask:
        """The task with tokens that the model draws itself in some of the scored slots."""
        task = wanted.task
        inputs = task.inputs(inner, self.spec.local_window)
        with seeing(task.images):
            logits = output_at(model, task.index, inner=inner, **inputs).logits[0].float()
        if (evidence := self._evidence(wanted)) is not None:
            logits = evidence.add_(logits)
        probability = logits.masked_fill(self.suppressed, float("-inf")).softmax(-1)
        tokens = draw(probability, wanted.guess.clamp(min=0))
        return replace(
            wanted, task=guessing(task, self.noise, wanted.own, tokens, wanted.guess >= 0)
        )

    def _distilled(
        self, summed: WeightedLoss, readout: Readout, wanted: LossTask, divisor: Tensor
    ) -> WeightedLoss:
        """The weighted loss with the distillation added to its sum and its terms.

        Args:
            readout: of the masked tokens, those of the AR loss, and the AR predictions if these
                come from the same forward pass.
        """
        distil, chosen, source = self.recipe.objective.distil, wanted.chosen, wanted.source
        count = len(wanted.distilled)
        own = readout[count + len(wanted.ar_target) :]
        p = own if self.teacher is None else self._read_teacher(source)
        total, divergence = distillation_loss(
            distil.loss, readout[:count][chosen], p, source.target,
            distil.weight * wanted.coef[chosen] / divisor, self.suppressed,
        )  # fmt: skip
        terms = summed.ce[:count].clone()
        terms[chosen] = (1 - distil.weight) * terms[chosen] + distil.weight * divergence
        return replace(summed, total=summed.total + total, terms=terms, divergence=divergence)

    @torch.no_grad()
    def _read_teacher(self, source: Task) -> Readout:
        """The teacher's predictions at the slots of a task."""
        teacher, read = self.teacher, []
        if self._teacher_fuses is None:
            self._teacher_fuses = has_plain_head(teacher)
        with seeing(source.images):
            output = output_at(
                teacher,
                source.index,
                instead=(lambda head, hidden: read.append(Readout.of_head(head, hidden)))
                if self._teacher_fuses
                else None,
                **source.inputs(teacher, self.spec.local_window),
            )
        return read[0] if read else Readout(output.logits[0])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss on a batch from the collator.

        Args:
            num_items_in_batch: [2] divisors for the diffusion loss and the AR loss, over the global
                batch; None means those of this batch alone.

        Returns:
            The loss; with `return_outputs` also a dict with the `logits` [N, V] of the N masked
            tokens in row-major order, and `predictions` and `labels` [B, L], the likeliest and the
            right id of each masked token, with -100 elsewhere.
        """
        wanted = self.task_of(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = divisors_of(totals_of([inputs]))
        loss, summed, logits = self.losses(model, wanted, num_items_in_batch, return_outputs)
        count = len(wanted.coef)
        self._seen.add(wanted, summed.right[:count], summed.ce[:count])
        if summed.divergence is not None:
            self._seen.add_divergence(summed.divergence)
        self._seen.add_ar(summed.ce[count:])
        return (loss, self._outputs(wanted, logits)) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The denoising loss on rows with fixed noise: `eval_loss`, by the recipe's objective with
        divisors of the whole data set, and `eval_masked_accuracy`. Neither depends on batch sizes.

        Args:
            eval_dataset: rows as `fixed_rows` takes them; None means those passed to the trainer.
        """
        # Not super(): trl's would prepare the rows first, which `fixed_rows` does.
        return Trainer.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, predictions and labels for a batch, as `compute_loss` returns them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            wanted, totals = self.task_of(inputs), totals_of([inputs])
            loss, summed, logits = self.losses(model, wanted, divisors_of(totals), logits=True)
            outputs = self._outputs(wanted, logits)
        count = len(wanted.coef)
        ce, right = summed.ce.double(), summed.right[:count]
        terms = ce[:count] if summed.terms is None else summed.terms.double()
        own = [(wanted.coef * terms).sum(), ce[count:].sum(), right.sum(), right.numel()]
        self._judged += torch.cat([totals[:2], ce.new_tensor(own)])
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["predictions"], outputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run transformers' loop, but replace its mean over batches by the loss on the whole data
        set."""
        self._judged = torch.zeros(6, dtype=torch.double, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(self._judged, "sum")
        divisor, ar_divisor = divisors_of(sums).tolist()
        total, ar_total, right, count = sums[2:].tolist()
        loss = total / divisor + self.recipe.objective.ar_weight * ar_total / ar_divisor
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_masked_accuracy"] = right / max(count, 1)
        return output

    def _fuses(self, inner: Any) -> bool:
        if self._fused is None:
            # Distillation reads the head after the forward, when sharded weights are released.
            after = self.recipe.objective.distil is not None and holds_shards(self)
            self._fused = not after and has_plain_head(inner)
            if self.recipe.train.compile:  # not before: the earlier forward had another shape
                compile_layers(inner)
        return self._fused

    def _outputs(self, wanted: LossTask, logits: Tensor) -> dict[str, Tensor]:
        logits = logits[: len(wanted.coef)]
        if (evidence := self._evidence(wanted)) is not None:
            logits = evidence.add_(logits.clone())
        likeliest = logits.detach().masked_fill(self.suppressed, float("-inf")).argmax(-1)
        return {
            "logits": logits,
            "predictions": wanted.at_masked(likeliest),
            "labels": wanted.at_masked(wanted.task.target),
        }

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        rows = dataset if is_training else self.fixed_rows(dataset)
        return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[2] divisors for the diffusion and AR losses, over all accumulation steps and ranks."""
        totals = totals_of(batch_samples).to(device, non_blocking=True)
        totals = self.accelerator.reduce(totals, "sum")
        self.count_tokens(totals[2])
        return divisors_of(totals)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter saw since the last log: CE by t, accuracy, EOS share, tokens/s."""
        if "loss" in logs:
            seen = self._seen.drain(self.accelerator)
            logs = {**logs, **seen, "tokens": self.tokens_seen()}
        super().log(logs, start_time)


def totals_of(batches: list[dict[str, Tensor]]) -> Tensor:
    """[3] float64 totals over micro-batches: divisors of the diffusion and AR losses, and
    tokens."""
    names = ("divisor", "ar_divisor", "tokens")
    return torch.stack([torch.stack([b[name].double() for name in names]) for b in batches]).sum(0)


def divisors_of(totals: Tensor) -> Tensor:
    """[2] divisors for the diffusion and AR losses, never 0, from the totals over a batch."""
    tiny = torch.finfo(torch.float32).tiny
    return totals[:2].clamp(min=tiny).to(torch.get_default_dtype())
