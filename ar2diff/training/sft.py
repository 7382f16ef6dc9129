"""`sft`: a converted model and conversations in, a model that answers out. trl prepares the data
and our loss trains on it. With `objective.kind: ar`, a control: the AR base tuned on the same
rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ..checkpoint.model import Checkpoint
from ..checkpoint.towers import part_of
from ..config.recipe import Recipe, with_values
from ..conversion.convert import end_token
from ..core.errors import Ar2DiffError, option
from ..core.spec import Spec
from ..data.chat_template import chat_template, turn_end
from ..data.conversations import (
    Conversations,
    TokenRows,
    conversations_of,
    packed,
    read_conversations,
    tokenize_conversations,
)
from ..data.rows import from_arrow
from ..data.turns import Answers
from ..diffusion.task import columns_before, reading, turn_task
from ..distributed.ranks import check_rows, world_size
from ..evaluation.answers import collator_for
from ..evaluation.held_out import judged_answers
from ..evaluation.score import check_length
from .arguments import training_arguments
from .loss import Denoising, LossTask
from .modules import unwrapped
from .plan import Plan, Verb, check_kind, freeze_blind
from .request import requested
from .results import DataSize, RunPlan, RunResult, SftExample, SftPlan
from .run import run

TEMPLATE_FIX = (
    f"see {option('data.assistant_only')} and {option('data.chat_template')} in "
    "'ar2diff config schema data'"
)


def sft(
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
    """Tune a converted model (or, with `objective.kind: ar`, an AR one) on conversations.

    Args:
        model: folder or Hub id of the model, with an optional `@revision`.
        data: files of conversations, in place of the recipe's `data.sources`.
        recipe, output_dir, text_field, max_steps, overrides, resume, overwrite, dry_run: as for
            `adapt`, but with at least one step.

    Returns:
        A description of the run; with `dry_run`, an `SftPlan` of the run as it would be.

    Raises:
        Ar2DiffError: for anything the user can fix; nothing has been written.
    """
    request = requested(
        "sft", model, recipe, output_dir, data=data, text_field=text_field, max_steps=max_steps,
        overrides=overrides,
    )  # fmt: skip
    return run(SFT, request, resume=resume, overwrite=overwrite, dry_run=dry_run)


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse settings that sft cannot use with a model, and fill in those it implies."""
    check_kind(path, spec, recipe)
    return check_settings(recipe)


def check_settings(recipe: Recipe) -> Recipe:
    """Refuse settings that conversations have no use for, and fill in those they imply."""
    if recipe.objective.weight == "cart":
        raise Ar2DiffError(
            f"{option('objective.weight', 'cart')} only works with adapt: sft does not weight "
            "tokens by their context",
            f"set {option('objective.weight')} to uniform or 1/t",
        )
    for name in recipe.noise.of_adapt:
        raise Ar2DiffError(
            f"{option(name)} only works with adapt",
            f"leave out {option(name)}",
        )
    if recipe.data.overlong == "split":
        recipe = with_values(recipe, data={"overlong": "truncate"})
    if recipe.objective.kind == "ar":
        recipe = with_values(recipe, objective={"ar_weight": 1.0})
    return recipe


def read(recipe: Recipe) -> Conversations:
    """The conversations from a recipe's sources."""
    conversations = read_conversations(recipe)
    check_rows(len(conversations.rows))
    return conversations


def make_plan(checkpoint: Checkpoint, recipe: Recipe, conversations: Conversations) -> Plan:
    """The plan for a run on conversations. Sets the run's chat template on the tokenizer."""
    if recipe.objective.kind == "ar":
        check_length(checkpoint, recipe.data.max_length, "data.max_length")
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token(checkpoint))
    if conversations.chat:
        if checkpoint.sees_images and not tokenizer.chat_template:
            tokenizer.chat_template = checkpoint.processor.chat_template
        images = bool(len(conversations.shots))
        tokenizer.chat_template = chat_template(tokenizer, recipe, conversations.tools, images)
        stop_at(checkpoint, turn_end(tokenizer, tokenizer.chat_template))
    rows = tokenize_conversations(conversations, tokenizer, recipe, checkpoint.album)
    if len(conversations.shots) and checkpoint.noise.vectors:
        raise Ar2DiffError(
            f"the noise {checkpoint.noise.kind} puts vectors in place of tokens, as images do, and "
            "the two cannot be combined",
            f"use rows without images, or another {option('noise.kind')}",
        )
    freeze_blind(checkpoint)
    judged = judged_answers(checkpoint, recipe, conversations, rows)
    size = DataSize("conversations", len(rows), sum(map(len, rows.ids)), True, len(judged.held_out))
    return Plan(
        checkpoint, recipe, rows, make_trainer, size, judged.rows, judged.questions,
        judge=lambda _plan: judged.judge(), preview=preview, held_out=judged.held_out,
    )  # fmt: skip


SFT = Verb("sft", check, read, make_plan)


class DiffusionSFTTrainer(Denoising, SFTTrainer):
    """trl's SFTTrainer with the denoising loss. PEFT, accelerate, logging and saving are trl's;
    data preparation, noise, masks, packing and loss are ours. With `objective.kind: ar`, the
    control, it trains on the same stream of rows, but on the clean copies alone and with the AR
    loss.

    `evaluate` and `predict` take conversations as a data set or a list of rows.

    Args:
        rows: rows with `input_ids` and `labels`, as `TokenRows.dataset` makes them.
        held_out: numbers of those that are kept out of training.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        args: SFTConfig,
        rows: Dataset,
        held_out: frozenset[int] = frozenset(),
        **kwargs: Any,
    ):
        collator = collator_for(recipe, checkpoint, ghost_of(checkpoint))
        super().__init__(
            checkpoint, recipe, args, train_dataset=rows, processing_class=checkpoint.tokenizer,
            data_collator=collator, **kwargs,
        )  # fmt: skip
        self._loss_shifts_labels = False  # we count no tokens by their labels
        self.train_dataset = packed(
            self.train_dataset, checkpoint.end_ids, checkpoint.tokenizer, recipe, held_out
        )
        self.answers = self.train_dataset.answers()

    def details(self) -> list[str]:
        """The number and lengths of the answers."""
        lengths = sorted(self.answers.lengths)
        median, longest = lengths[len(lengths) // 2], lengths[-1]
        count = f"{self.answers.turns:,}"
        return [f"  answers {count}, with a median of {median:,} tokens and at most {longest:,}"]

    def facts(self) -> dict[str, Any]:
        """What the run's record says about the answers."""
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

    def task_of(self, inputs: dict[str, Tensor]) -> LossTask:
        """The loss task for a batch from `TurnCollator`."""
        task, target = turn_task(inputs, self.spec), inputs["target"]
        before = columns_before(target)
        if self.recipe.objective.distil is None:
            return self.loss_task(task, inputs, target, before)
        chosen = inputs["scored_at"][inputs["chosen"]]
        source = reading(task, inputs["before"], chosen, target)
        return self.loss_task(task, inputs, target, before, source)

    def fixed_rows(self, dataset: Any) -> list[Any]:
        """Each conversation with supervised tokens, as rows of its own with the noise of the first
        epoch."""
        ends, tokenizer = self.checkpoint.end_ids, self.checkpoint.tokenizer
        rows = packed(self._tokenized(dataset), ends, tokenizer, self.recipe)
        parts = [part for n in range(len(rows.rows)) for part in rows.parts(n, epoch=0)]
        return [(number, [part]) for number, part in enumerate(parts)]

    def _tokenized(self, dataset: Any) -> Dataset:
        """Conversations as rows with `input_ids` and `labels`; rows that have these are kept as
        is."""
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            return dataset
        rows = enumerate(dataset, 1)
        found = conversations_of(
            ((f"row {number}", from_arrow(row), Path()) for number, row in rows), self.recipe
        )
        album, tokenizer = self.checkpoint.album, self.checkpoint.tokenizer
        return tokenize_conversations(found, tokenizer, self.recipe, album).dataset()


def ghost_of(checkpoint: Checkpoint) -> int | None:
    """The image of batches without one, for several processes that train what sees images: each
    waits for the gradients of all. None: none is needed."""
    if world_size() == 1 or not checkpoint.sees_images:
        return None
    model = unwrapped(checkpoint.model)
    parts, trained = part_of(model), [n for n, p in model.named_parameters() if p.requires_grad]
    sees = any(parts[name] != "language_model" for name in trained)
    return next(iter(checkpoint.album.shots), None) if sees else None


def stop_at(checkpoint: Checkpoint, end: int | None) -> None:
    """Make the end token of answers a stop token: the base may only know those of documents."""
    known = checkpoint.end_ids
    if end is not None and end not in known:
        checkpoint.model.generation_config.eos_token_id = [*known, end]


def make_trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DiffusionSFTTrainer:
    """The trainer for a plan, on rows from `tokenize_conversations` but those held out.

    Raises:
        Ar2DiffError: there is nothing to learn in the rows.
    """
    recipe: Recipe = plan.recipe
    rows: TokenRows = plan.rows
    args = training_arguments(
        recipe,
        run_dir,
        kind=SFTConfig,
        max_length=None,  # we handle longer rows ourselves
        packing=False,  # we pack rows ourselves
    )
    datasets.disable_progress_bars()
    trainer = DiffusionSFTTrainer(
        plan.checkpoint, recipe, args, rows.dataset(), plan.held_out, callbacks=callbacks
    )
    check_answers(trainer.answers, len(rows) - len(plan.held_out), recipe)
    trainer.notes = rows.notes
    if trainer.answers.torn:
        trainer.notes += (
            f"note: {trainer.answers.torn} rows are left out, because data.max_length "
            f"{recipe.data.max_length} would cut their images",
        )
    return trainer


def check_answers(answers: Answers, rows: int, recipe: Recipe) -> None:
    """Refuse rows that would teach the model nothing, or would never teach it to stop."""
    data = recipe.data
    if answers.turns and not answers.ended and data.assistant_only:
        raise Ar2DiffError(
            "no supervised answer includes its end token, so nothing would teach the model to stop",
            "move the end token inside {% generation %} in the chat template",
        )
    if answers.barren == rows:
        if answers.cut:
            over = "dropped" if data.overlong == "drop" else "cut before an answer is complete"
            if answers.torn == answers.cut:
                over = "cut in or before an image"
            raise Ar2DiffError(
                f"there is nothing to learn: {answers.cut} of {rows} rows are longer than "
                f"{option('data.max_length')} {data.max_length} and are {over}",
                f"raise {option('data.max_length')}, or use shorter rows",
            )
        raise Ar2DiffError(
            f"there is nothing to learn: no token in the {rows} rows is supervised",
            TEMPLATE_FIX,
        )


def described(answers: Answers, recipe: Recipe) -> str:
    """The number and lengths of the supervised turns, in one line."""
    lengths = sorted(answers.lengths) or [0]
    over = "dropped" if recipe.data.overlong == "drop" else "cut"
    barren = f"; {answers.barren} rows have no supervised token" if answers.barren else ""
    return (
        f"{answers.turns} supervised turns with a median length of {lengths[len(lengths) // 2]} "
        f"tokens, the longest {lengths[-1]}; {answers.turns - answers.ended} without an end token; "
        f"{answers.cut} rows longer than data.max_length {recipe.data.max_length} are "
        f"{over}{barren}"
    )


def preview(plan: Plan, summary: RunPlan) -> SftPlan:
    """A dry run's plan, with the turns described and the first one shown. Makes the run's trainer
    in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, _one_process():
        trainer = plan.make_trainer(plan, Path(folder), [])
    ids, learned = trainer.train_dataset.example()
    return SftPlan(
        **vars(summary),
        turns=described(trainer.answers, plan.recipe),
        example=SftExample(
            text=marked(plan.checkpoint.tokenizer, plan.checkpoint.words_of(ids), learned),
            tokens=len(ids),
            supervised_tokens=sum(learned),
        ),
    )


def marked(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> str:
    """The text of the ids, with the learned parts between ⟦ and ⟧."""
    text, before = "", ""
    for start, (now, last) in enumerate(zip(learned, [False, *learned[:-1]], strict=True)):
        if now != last:
            upto = tokenizer.decode(ids[:start])
            text, before = text + upto[len(before) :] + ("⟦" if now else "⟧"), upto
    return text + tokenizer.decode(ids)[len(before) :] + ("⟧" if learned[-1] else "")


@contextmanager
def _one_process() -> Iterator[None]:
    """Hide the other processes from the libraries: a dry run plans for several, but is only one."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before
