"""`sft`: a converted model and conversations in, a model that answers out. trl prepares the data,
our loss trains on it; `objective.kind: ar` is the control, the AR base tuned on the same rows."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..checkpoint.adapters import add_adapter
from ..checkpoint.files import read_spec
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..conversion.convert import convert, end_token
from ..core.attention import Slots
from ..core.errors import Ar2DiffError
from ..data.chat_template import chat_template, turn_end
from ..data.conversations import TokenRows, read_conversations, tokenize_conversations
from ..data.turns import Answers, PackedConversations, TurnCollator
from ..distributed.ranks import check_rows
from ..evaluation.score import check_length
from .arguments import training_arguments
from .base import weights_kept
from .loss import Denoising, Task, disable_dropout
from .run import Plan, check_kind, continued, fitted, keeps_ar, run


class DiffusionSFTTrainer(Denoising, SFTTrainer):
    """trl's SFTTrainer with the denoising loss: its data preparation, PEFT, accelerate, logging and
    saving; our noise, masks, packing and loss. With `objective.kind: ar` the rows have their clean
    copies alone, and the loss is that of the AR mode: the control, on the same stream of rows.

    Args:
        rows: conversations as trl takes them, or with `input_ids` and `labels`.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: SFTConfig, rows: Dataset, **kwargs: Any
    ):
        self.set_up(checkpoint, recipe, args)
        with weights_kept(checkpoint.model):
            SFTTrainer.__init__(
                self,
                model=checkpoint.model,
                args=args,
                train_dataset=rows,
                processing_class=checkpoint.tokenizer,
                data_collator=TurnCollator(recipe, self.spec.mask_token_id),
                **kwargs,
            )
        self._loss_shifts_labels = False  # nothing here is counted by labels
        self.train_dataset = PackedConversations(
            self.train_dataset, checkpoint.end_ids, recipe, blanks(checkpoint.tokenizer)
        )
        self.answers = self.train_dataset.answers()

    def facts(self) -> dict[str, Any]:
        """What the run's record says of the answers."""
        answers, lengths = self.answers, sorted(self.answers.lengths)
        return {
            "answers": {
                "turns": answers.turns,
                "ended": answers.ended,
                "rows_over_max_length": answers.cut,
                "rows_that_teach_nothing": answers.barren,
                "mean_length": sum(lengths) / len(lengths),
                "median_length": lengths[len(lengths) // 2],
                "longest": lengths[-1],
            }
        }

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch of `TurnCollator`."""
        masked, target = inputs["masked"], inputs["target"]
        slots = Slots(*(inputs[name] for name in ("doc", "pos", "noisy", "start", "block")))
        place = torch.arange(target.numel(), device=target.device).view_as(target)
        row = place[:, :1]
        ar = inputs["ar"] if self.recipe.objective.ar_weight > 0 else masked & ~masked
        task = Task(
            input_ids=inputs["input_ids"],
            slots=slots,
            attention=self.spec.attention,
            block_length=self.spec.block_length,
            reveal=None,
            index=(row + inputs["reads"])[masked],
            target=target[masked],
            coef=inputs["coef"][masked],
            t=inputs["t"][masked],
            eos=inputs["eos"][masked],
            ar_index=(place - 1)[ar],
            ar_target=target[ar],
            tokens=inputs["tokens"],
        )
        return self.denoising_loss(model, task, num_items_in_batch)


def sft(
    model: str,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Tune a converted model (or, with `objective.kind: ar`, an AR one) on conversations.

    Args:
        model, recipe, output_dir, resume, overwrite, dry_run: as of `adapt`.

    Raises:
        Ar2DiffError: something the user can fix; nothing was written.
    """
    flags = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run}
    return run(make_sft_plan, model, recipe, output_dir, **flags)


def make_sft_plan(path: Path, recipe: Recipe) -> Plan:
    """Check and read the rows, load the model. Writes nothing."""
    spec, control = read_spec(path), recipe.objective.kind == "ar"
    check_kind(path, spec, recipe)
    if recipe.objective.weight == "cart":
        raise Ar2DiffError(
            "objective.weight cart is for adapt: sft does not weigh by context",
            "use uniform or 1/t",
        )
    recipe = continued(recipe, spec)
    if recipe.data.overlong == "split":
        recipe = with_values(recipe, data={"overlong": "truncate"})
    data = read_conversations(recipe)
    check_rows(len(data.rows))
    checkpoint = load_checkpoint(
        str(path), recipe.train.attn_implementation, quantization=recipe.quantization
    )
    recipe = fitted(recipe, checkpoint)
    if control:
        check_length(checkpoint, recipe.data.max_length, "data.max_length")
        recipe = with_values(recipe, objective={"ar_weight": 1.0})
    else:
        convert(
            checkpoint, recipe.convert, recipe.data.max_length, keeps_ar(recipe), recipe.train.seed
        )
    add_adapter(checkpoint, recipe)
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token(checkpoint))
    if data.chat:
        tokenizer.chat_template = chat_template(tokenizer, recipe, data.tools)
        stop_at(checkpoint, turn_end(tokenizer, tokenizer.chat_template))
    rows = tokenize_conversations(data, tokenizer, recipe)
    return Plan(checkpoint, recipe, rows, make_sft_trainer, preview=preview)


def stop_at(checkpoint: Checkpoint, end: int | None) -> None:
    """Add what ends an answer to what ends a text: that of a base may know documents alone."""
    known = checkpoint.end_ids
    if end is not None and end not in known:
        checkpoint.model.generation_config.eos_token_id = [*known, end]


def make_sft_trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DiffusionSFTTrainer:
    """The trainer of a plan on rows of `tokenize_conversations`.

    Raises:
        Ar2DiffError: nothing would be learned of the rows.
    """
    checkpoint, recipe = plan.checkpoint, plan.recipe
    rows: TokenRows = plan.rows
    disable_dropout(checkpoint.model)
    args = training_arguments(
        recipe,
        run_dir,
        kind=SFTConfig,
        max_length=None,  # the policy on longer rows is ours
        packing=False,  # and so is packing
    )
    datasets.disable_progress_bars()
    trainer = DiffusionSFTTrainer(checkpoint, recipe, args, rows.dataset(), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    check_answers(trainer.answers, len(rows), recipe)
    if trainer.is_world_process_zero():
        print(described(trainer.answers, recipe), file=sys.stderr)
        for note in rows.notes:
            print(note, file=sys.stderr)
    return trainer


def blanks(tokenizer: Any) -> Any:
    """Tells of an id whether its text is white space alone."""
    return functools.cache(lambda token: tokenizer.decode([token]).isspace())


def check_answers(answers: Answers, rows: int, recipe: Recipe) -> None:
    """Refuse rows that would teach nothing, or nothing of stopping."""
    data = recipe.data
    if answers.turns and not answers.ended and data.assistant_only:
        raise Ar2DiffError(
            "no answer has its end token among what is learned: nothing would teach to stop",
            "move the end token into {% generation %} of the chat template",
        )
    if answers.barren == rows:
        if answers.cut:
            over = {"drop": "left out", "truncate": "cut before an answer is whole"}[data.overlong]
            raise Ar2DiffError(
                f"nothing to learn: {answers.cut} of {rows} rows are over data.max_length "
                f"{data.max_length} and {over}",
                "raise data.max_length, or give shorter rows",
            )
        raise Ar2DiffError(
            f"nothing to learn: none of the {rows} rows has a supervised token",
            "see data.assistant_only and data.chat_template in 'ar2diff config schema'",
        )


def described(answers: Answers, recipe: Recipe) -> str:
    """What the supervised turns are like, in a line."""
    lengths = sorted(answers.lengths) or [0]
    over = {"drop": "left out", "truncate": "cut"}[recipe.data.overlong]
    barren = f"; {answers.barren} rows teach nothing" if answers.barren else ""
    return (
        f"{answers.turns} turns of {lengths[len(lengths) // 2]} tokens in the middle, "
        f"{lengths[-1]} at most; {answers.turns - answers.ended} without an end token; "
        f"{answers.cut} rows over data.max_length {recipe.data.max_length} are {over}{barren}"
    )


def preview(plan: Plan) -> dict[str, Any]:
    """What a dry run says of the rows: what the turns are like, and the first of them with what is
    learned between ⟦ and ⟧. It makes the trainer of the run, in a folder that is gone behind it."""
    with tempfile.TemporaryDirectory() as folder, _one_process():
        trainer = plan.make_trainer(plan, Path(folder), [])
    ids, learned = trainer.train_dataset.example()
    return {
        "turns": described(trainer.answers, plan.recipe),
        "example": {
            "text": marked(plan.checkpoint.tokenizer, ids, learned),
            "tokens": len(ids),
            "supervised_tokens": sum(learned),
        },
    }


def marked(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> str:
    """The text of the ids, what is learned between ⟦ and ⟧."""
    text, before = "", ""
    for start, (now, last) in enumerate(zip(learned, [False, *learned[:-1]], strict=True)):
        if now != last:
            upto = tokenizer.decode(ids[:start])
            text, before = text + upto[len(before) :] + ("⟦" if now else "⟧"), upto
    return text + tokenizer.decode(ids)[len(before) :] + ("⟧" if learned[-1] else "")


@contextmanager
def _one_process() -> Iterator[None]:
    """A dry run plans for several processes and is one: no library is to look for the others."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before
