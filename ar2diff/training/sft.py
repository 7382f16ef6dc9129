"""`sft`: a converted model and conversations in, a model that answers out. trl prepares the data,
our loss trains on it; `objective.kind: ar` is the control, the AR base tuned on the same rows."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Json, List, Value
from jinja2 import TemplateError
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..conversion.convert import end_token
from ..core.attention import Slots
from ..core.errors import Ar2DiffError, first_line, option
from ..core.spec import Spec
from ..data.conversations import (
    asked_otherwise,
    chat_template,
    read_conversations,
    turn_end,
    uses_tools,
)
from ..data.turns import Answers, Conversations, TurnCollator
from ..diffusion.task import Task, slots_at
from ..distributed.ranks import check_rows
from ..evaluation.score import check_length
from .arguments import training_arguments
from .loss import Denoising, LossTask
from .plan import Plan, Verb, check_kind
from .request import requested
from .results import RunPlan, RunResult, SftExample, SftPlan
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
        model: folder or Hub id of the model, `@revision` allowed.
        data: files of conversations, in place of the recipe's `data.sources`.
        recipe, output_dir, text_field, max_steps, overrides, resume, overwrite, dry_run: as of
            `adapt`; at least one step.

    Returns:
        What the run was; with `dry_run` an `SftPlan` of what it will be.

    Raises:
        Ar2DiffError: something the user can fix; nothing was written.
    """
    request = requested(
        "sft", model, recipe, output_dir, data=data, text_field=text_field, max_steps=max_steps,
        overrides=overrides,
    )  # fmt: skip
    return run(SFT, request, resume=resume, overwrite=overwrite, dry_run=dry_run)


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse what sft cannot do with a model, and set what it implies."""
    check_kind(path, spec, recipe)
    if recipe.objective.weight == "cart":
        raise Ar2DiffError(
            f"{option('objective.weight', 'cart')} is for adapt: sft does not weight tokens by "
            "their context",
            f"set {option('objective.weight')} to uniform or 1/t",
        )
    if recipe.data.overlong == "split":
        recipe = with_values(recipe, data={"overlong": "truncate"})
    if recipe.objective.kind == "ar":
        recipe = with_values(recipe, objective={"ar_weight": 1.0})
    return recipe


def read(recipe: Recipe) -> list[dict[str, Any]]:
    """The conversations of a recipe's sources."""
    rows = read_conversations(recipe)
    check_rows(len(rows))
    return rows


def make_plan(checkpoint: Checkpoint, recipe: Recipe, rows: list[dict[str, Any]]) -> Plan:
    """The plan of a run on conversations; gives the tokenizer the chat template of the run."""
    if recipe.objective.kind == "ar":
        check_length(checkpoint, recipe.data.max_length, "data.max_length")
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token(checkpoint))
    if "messages" in rows[0]:
        tokenizer.chat_template = chat_template(tokenizer, recipe, uses_tools(rows))
        stop_at(checkpoint, turn_end(tokenizer, tokenizer.chat_template))
    return Plan(checkpoint, recipe, rows, make_trainer, preview=preview)


SFT = Verb("sft", check, read, make_plan)


class DiffusionSFTTrainer(Denoising, SFTTrainer):
    """trl's SFTTrainer with the denoising loss: its data preparation, PEFT, accelerate, logging and
    saving; our noise, masks, packing and loss. With `objective.kind: ar` the rows have their clean
    copies alone, and the loss is that of the AR mode: the control, on the same stream of rows.

    `evaluate` and `predict` take conversations as trl takes them, as a data set or a list.

    Args:
        rows: conversations as trl takes them, or with `input_ids` and `labels`.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: SFTConfig, rows: Dataset, **kwargs: Any
    ):
        collator = TurnCollator(recipe, checkpoint.spec_or_causal.mask_token_id)
        super().__init__(
            checkpoint, recipe, args, train_dataset=rows, processing_class=checkpoint.tokenizer,
            data_collator=collator, **kwargs,
        )  # fmt: skip
        self._loss_shifts_labels = False  # nothing here is counted by labels
        self.train_dataset = self._conversations(self.train_dataset)
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

    def task_of(self, inputs: dict[str, Tensor]) -> LossTask:
        """What a batch of `TurnCollator` asks for."""
        masked, target = inputs["masked"], inputs["target"]
        task = Task(
            input_ids=inputs["input_ids"],
            slots=Slots(*(inputs[name] for name in ("doc", "pos", "noisy", "start", "block"))),
            attention=self.spec.attention,
            block_length=self.spec.block_length,
            index=slots_at(inputs["reads"], masked, target.shape[1]),
            target=target[masked],
        )
        before = torch.arange(-1, target.shape[1] - 1, device=target.device).expand_as(target)
        return self.loss_task(task, inputs, labels=target, ar_columns=before)

    def fixed_rows(self, dataset: Any) -> list[Any]:
        """Each conversation that teaches something as rows of its own, in the first epoch's
        noise."""
        rows = self._conversations(self._prepared(dataset))
        parts = [part for n in range(len(rows.rows)) for part in rows.parts(n, epoch=0)]
        return [(number, [part]) for number, part in enumerate(parts)]

    def _conversations(self, prepared: Any) -> Conversations:
        tokenizer = self.checkpoint.tokenizer
        return Conversations(prepared, self.checkpoint.end_ids, self.recipe, blanks(tokenizer))

    def _prepared(self, dataset: Any) -> Dataset:
        """Rows with `input_ids` and `labels`, as trl prepares them."""
        if not isinstance(dataset, Dataset):
            dataset = table(list(dataset))
        return self._prepare_dataset(
            dataset, self.checkpoint.tokenizer, self.args, False, None, "eval"
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """trl's preparation, whose failures are put down to the row at fault."""
        try:
            return super()._prepare_dataset(dataset, *args, **kwargs)
        except (ValueError, RuntimeError, TypeError, KeyError, TemplateError) as error:
            raise unprepared(self.checkpoint.tokenizer, dataset, error) from error


def unprepared(tokenizer: Any, rows: Any, error: Exception) -> Ar2DiffError:
    """What a failure to render or tokenize rows means: names the first row that does not render."""
    for number, row in enumerate(rows, 1):
        if "messages" not in row:
            break
        try:
            tokenizer.apply_chat_template(row["messages"], row.get("tools"), tokenize=False)
        except Exception as cause:  # a template raises what it likes
            return Ar2DiffError(
                f"the chat template does not render row {number}: {first_line(cause)}",
                f"fix the row, or set {option('data.chat_template')} to another template",
            )
    return Ar2DiffError(f"the rows cannot be tokenized: {first_line(error)}", TEMPLATE_FIX)


def stop_at(checkpoint: Checkpoint, end: int | None) -> None:
    """Let an answer's end token end a text: those of a base may be for documents only."""
    known = checkpoint.end_ids
    if end is not None and end not in known:
        checkpoint.model.generation_config.eos_token_id = [*known, end]


def make_trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DiffusionSFTTrainer:
    """The trainer of a plan on rows of `read_conversations`.

    Raises:
        Ar2DiffError: the rows cannot be rendered, or teach nothing.
    """
    checkpoint, recipe, rows = plan.checkpoint, plan.recipe, plan.rows
    args = training_arguments(
        recipe,
        run_dir,
        kind=SFTConfig,
        max_length=None,  # longer rows are treated by our own rule
        packing=False,  # rows are packed by us
        assistant_only_loss="messages" in rows[0] and recipe.data.assistant_only,
        dataset_text_field=recipe.data.text_field,
    )
    datasets.disable_progress_bars()
    trainer = DiffusionSFTTrainer(checkpoint, recipe, args, table(rows), callbacks=callbacks)
    check_answers(trainer.answers, len(rows), recipe)
    if trainer.is_world_process_zero():
        print(described(trainer.answers, recipe), file=sys.stderr)
        if "messages" in rows[0] and (count := asked_otherwise(checkpoint.tokenizer, rows)):
            print(
                f"warning: in a chat, {count} of the first answers follow other tokens than those "
                "that they are trained to follow: compare what the chat template writes with and "
                "without add_generation_prompt",
                file=sys.stderr,
            )
    return trainer


def table(rows: Sequence[dict[str, Any]]) -> Dataset:
    """The rows as a data set that does not change them. Arrow's own types would give each tool call
    the arguments of all others as nulls, which templates would write out."""
    names = sorted({name for row in rows for name in row})
    kinds = {
        name: List(Json()) if name in ("messages", "tools") else Value("string") for name in names
    }
    whole = [{name: row.get(name) for name in names} for row in rows]
    return Dataset.from_list(whole, features=Features(kinds))


def blanks(tokenizer: Any) -> Any:
    """A function that says whether the text of an id is white space only."""
    return functools.cache(lambda token: tokenizer.decode([token]).isspace())


def check_answers(answers: Answers, rows: int, recipe: Recipe) -> None:
    """Refuse rows that would teach nothing, or would never teach the model to stop."""
    data = recipe.data
    if answers.turns and not answers.ended and data.assistant_only:
        raise Ar2DiffError(
            "no supervised answer includes its end token, so nothing would teach the model to stop",
            "move the end token inside {% generation %} in the chat template",
        )
    if answers.barren == rows:
        if answers.cut:
            over = "left out" if data.overlong == "drop" else "cut before an answer is complete"
            raise Ar2DiffError(
                f"there is nothing to learn: {answers.cut} of {rows} rows are longer than "
                f"{option('data.max_length')} {data.max_length} and are {over}",
                f"raise {option('data.max_length')}, or give shorter rows",
            )
        raise Ar2DiffError(
            f"there is nothing to learn: none of the {rows} rows has a supervised token",
            TEMPLATE_FIX,
        )


def described(answers: Answers, recipe: Recipe) -> str:
    """The numbers and lengths of the supervised turns, in a line."""
    lengths = sorted(answers.lengths) or [0]
    over = "left out" if recipe.data.overlong == "drop" else "cut"
    barren = f"; {answers.barren} rows teach nothing" if answers.barren else ""
    return (
        f"{answers.turns} supervised turns, median length {lengths[len(lengths) // 2]} tokens, "
        f"longest {lengths[-1]}; {answers.turns - answers.ended} without an end token; "
        f"{answers.cut} rows longer than data.max_length {recipe.data.max_length} are "
        f"{over}{barren}"
    )


def preview(plan: Plan, summary: RunPlan) -> SftPlan:
    """A dry run's plan with the turns described and the first of them shown. Makes the trainer of
    the run, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, _one_process():
        trainer = plan.make_trainer(plan, Path(folder), [])
    ids, learned = trainer.train_dataset.example()
    return SftPlan(
        **asdict(summary),
        turns=described(trainer.answers, plan.recipe),
        example=SftExample(
            text=marked(plan.checkpoint.tokenizer, ids, learned),
            tokens=len(ids),
            supervised_tokens=sum(learned),
        ),
    )


def marked(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> str:
    """The text of the ids, with what is learned between ⟦ and ⟧."""
    text, before = "", ""
    for start, (now, last) in enumerate(zip(learned, [False, *learned[:-1]], strict=True)):
        if now != last:
            upto = tokenizer.decode(ids[:start])
            text, before = text + upto[len(before) :] + ("⟦" if now else "⟧"), upto
    return text + tokenizer.decode(ids)[len(before) :] + ("⟧" if learned[-1] else "")


@contextmanager
def _one_process() -> Iterator[None]:
    """Hide the other processes from the libraries: a dry run plans for several and is one."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before
