"""`draft`: a frozen AR model in, a draft adapter out, with which it writes the same text in fewer
forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..conversion.convert import end_token
from ..core.errors import Ar2DiffError, option
from ..core.spec import Spec
from ..data.documents import PackedDocuments
from ..data.sources import Documents
from ..distributed.ranks import chosen
from ..evaluation.drafts import DraftJudge, collator_for
from ..evaluation.held_out import held_out_rows
from ..evaluation.score import check_length
from .adapt import read_rows, size_of, with_own_text
from .arguments import training_arguments
from .base import Running
from .conversation_rows import are_conversations
from .drafting import add_draft, drafting_for
from .metrics import DraftMeter
from .own_text import Found
from .plan import Plan, Verb, probed
from .request import requested
from .results import RunPlan, RunResult
from .run import run

TINY = torch.finfo(torch.float32).tiny
UNUSED = ("convert", "anneal", "noise", "objective", "peft", "quantization", "rl")  # sections
NEEDLESS = {  # fields that cannot be used, and why
    "train.lr_scale": "all parameters of a draft adapter have the same learning rate",
    "train.gradient_checkpointing": "a layer that is recomputed would not see the adapter",
    "train.compile": "compiled layers do not see the adapter",
    "eval.panel_steps": "a draft adapter does not denoise",
    "data.cut_share": "it only works with adapt and attention full",
}


def draft(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    text_field: str | None = None,
    max_steps: int | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> RunResult | RunPlan:
    """Train a draft adapter for a model that stays as it is.

    Args:
        model: folder or Hub id, with an optional `@revision`; an AR model, or a converted one with
            causal_context attention and an AR mode.
        recipe: as for `adapt`; None means the recipe `draft`.
        output_dir, data, text_field, max_steps, overrides, resume, overwrite, dry_run: as for
            `adapt`, but with at least one step.

    Returns:
        A description of the run; with `dry_run`, of the run as it would be.

    Raises:
        Ar2DiffError: for anything the user can fix; nothing has been written.
    """
    request = requested(
        "draft", model, recipe, output_dir, data=data, text_field=text_field, max_steps=max_steps,
        overrides=overrides,
    )  # fmt: skip
    return run(DRAFT, request, resume=resume, overwrite=overwrite, dry_run=dry_run)


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse a model without an AR mode, and settings that would have no effect."""
    if spec is not None and (spec.attention != "causal_context" or not spec.ar_mode):
        lacks = (
            "has no AR mode"
            if spec.attention == "causal_context"
            else (f"has {spec.attention} attention, and no AR mode")
        )
        raise Ar2DiffError(
            f"model {path} {lacks}: there is nothing that drafts could be verified by",
            "use the AR model that it was converted from, or one with causal_context attention",
        )
    for name in UNUSED:
        if name in recipe.model_fields_set and getattr(recipe, name) is not None:
            raise Ar2DiffError(
                f"the recipe sets {option(name)}, which draft does not use: the model stays as it "
                "is",
                "remove it",
            )
    for key, why in NEEDLESS.items():
        section, name = key.split(".")
        given = getattr(recipe, section)
        if getattr(given, name) != type(given).model_fields[name].get_default():
            raise Ar2DiffError(f"{option(key)} cannot be used with draft: {why}", "leave it out")
    if not recipe.train.max_steps:
        raise Ar2DiffError(
            f"{option('train.max_steps', 0)} trains nothing; only a conversion can use it",
            f"set {option('train.max_steps')} to 1 or more, or preview the run with "
            f"{option('dry_run', True)}",
        )
    if are_conversations(path, recipe):
        raise Ar2DiffError(
            "the data are conversations, but draft trains on documents, of text alone for a "
            "vision-language model too",
            f"give documents, and name their column with {option('text_field')}",
        )
    how = chosen() or ""
    if how.startswith(("zero3", "fsdp")):
        raise Ar2DiffError(
            f"{option('launch', how)} cannot be used with draft: it shards what is trained, and "
            "a draft adapter is small",
            f"use {option('launch', 'ddp')} or {option('launch', 'zero2')}",
        )
    return recipe


def make_plan(checkpoint: Checkpoint, recipe: Recipe, found: Found) -> Plan:
    """The plan for a run on whole documents. Gives the checkpoint its untrained draft adapter. If
    the model writes some of the documents itself, it does so when the plan is completed."""
    check_length(checkpoint, recipe.data.max_length, "data.max_length")
    add_draft(checkpoint, recipe)
    with checkpoint.draft.applied(checkpoint.model, slice(0, 0)):  # which embeds the mask
        problems = probed(checkpoint.model, checkpoint.read_as)
    if problems:
        kind = checkpoint.model.config.model_type
        raise Ar2DiffError(
            f"model {checkpoint.path}: a {kind} model cannot have a draft adapter: {problems[0]}",
            f"try another {option('train.attn_implementation')}",
        )
    return with_own_text(checkpoint, recipe, found, _with_documents)


def _with_documents(checkpoint: Checkpoint, recipe: Recipe, documents: Documents) -> Plan:
    eos = end_token(checkpoint)
    eval_rows, held_out = held_out_rows(checkpoint, recipe, documents, eos)
    whole = with_values(recipe, convert={"block_length": 1})  # documents are not filled to a grid
    rows = PackedDocuments(documents, checkpoint.tokenizer, eos, whole, held_out)
    collate = collator_for(checkpoint, recipe.draft, recipe.train.seed)
    collate([next(iter(rows))])  # raises if no row is usable
    drafting = drafting_for(checkpoint, recipe)

    def make(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DraftTrainer:
        return DraftTrainer(
            checkpoint,
            plan.recipe,
            training_arguments(plan.recipe, run_dir),
            module=drafting,
            train_dataset=rows,
            data_collator=collate,
            callbacks=callbacks,
        )

    judge = DraftJudge(checkpoint, drafting, collate, eval_rows) if eval_rows else None
    size = size_of(documents, checkpoint.tokenizer, len(held_out))
    return Plan(checkpoint, recipe, rows, make, size, eval_rows, judge=lambda _plan: judge())


DRAFT = Verb("draft", check, read_rows, make_plan, converts=False)


class DraftTrainer(Running, Trainer):
    """Trains the draft adapter of a checkpoint on whole documents. The model itself is frozen, and
    belongs to neither the optimizer nor the training checkpoints.

    The loss is a sum over the global batch, divided by the weights of its drafts, so neither
    gradient accumulation nor the number of ranks scales it. All randomness comes with the batch.
    """

    loss_is_scaled_for_ga = True
    figures: ClassVar[dict[str, str]] = {
        "loss": "loss {:.3f}", "accepted_1": "accepted {:.1%}",
        "tokens_per_forward": "{:.2f} tokens/forward",
    }  # fmt: skip

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, args: Any, **kwargs: Any):
        checkpoint.model.to(args.device)
        kwargs["module"].to_device(args.device)
        self._seen = DraftMeter(args.device)
        super().__init__(checkpoint, recipe, args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One with the same learning rate for all parameters."""
        return Trainer.create_optimizer(self, model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss on a batch from `BlockCollator`.

        Args:
            num_items_in_batch: the divisor, over the global batch; None means that of this batch.

        Returns:
            The loss; with `return_outputs` also an empty dict.
        """
        if num_items_in_batch is None:
            num_items_in_batch = inputs["divisor"].clamp(min=TINY).to(torch.get_default_dtype())
        loss, sums = model(inputs, num_items_in_batch)
        self._seen.add(sums, inputs)
        loss = loss * self.accelerator.num_processes  # ranks average their gradients
        return (loss, {}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The divisor, over all accumulation steps and ranks."""
        names = ("divisor", "tokens")
        sums = [torch.stack([b[name].double() for name in names]) for b in batch_samples]
        divisor, tokens = self.accelerator.reduce(torch.stack(sums).sum(0).to(device), "sum")
        self.count_tokens(tokens)
        return divisor.clamp(min=TINY).to(torch.get_default_dtype())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter saw since the last log."""
        if "loss" in logs:
            seen = self._seen.drain(self.accelerator)
            logs = {**logs, **seen, "tokens": self.tokens_seen()}
        super().log(logs, start_time)
