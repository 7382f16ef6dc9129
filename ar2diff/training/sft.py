"""`sft`: a converted model and conversations in, a model that answers out. trl prepares the data,
our loss trains on it; `objective.kind: ar` is the control, the AR base tuned on the same rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..adapters import add_adapter, check_base
from ..attention import Slots
from ..checkpoint import Checkpoint, is_adapter, load_checkpoint, read_spec
from ..columns import arranged
from ..config import Recipe, with_values
from ..convert import convert, end_token
from ..errors import Ar2DiffError, first_line
from ..ranks import check_rows
from ..sources import find_file, read_lines
from ..turns import Answers, Conversations, TurnCollator
from .adapt import Plan, adapt, continued, fitted, keeps_ar
from .denoising import Denoising, Task, disable_dropout
from .trainer import training_arguments

TEMPLATES = Path(__file__).parents[1] / "templates"
FORMATS = ("messages", "prompt and completion", "text")


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
        self.train_dataset = Conversations(self.train_dataset, checkpoint.end_ids, recipe)

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


def sft(model: str, recipe: Recipe, output_dir: str | Path, **flags: bool) -> dict[str, Any]:
    """Tune a converted model (or, with `objective.kind: ar`, an AR one) on conversations.

    Args:
        model, recipe, output_dir, flags: as of `adapt`.

    Raises:
        Ar2DiffError: something the user can mend; nothing was written.
    """
    return adapt(model, recipe, output_dir, prepare=make_sft_plan, **flags)


def make_sft_plan(path: Path, recipe: Recipe) -> Plan:
    """Check and read the rows, load the model. Writes nothing."""
    spec, control = read_spec(path), recipe.objective.kind == "ar"
    if spec is None and not control:
        raise Ar2DiffError(
            f"model {path} is not converted", f"run 'ar2diff adapt {path} --output-dir DIR' first"
        )
    if spec is not None and control:
        raise Ar2DiffError(
            f"model {path} is converted: the control tunes the AR base",
            "name the base, or leave objective.kind out",
        )
    if recipe.peft is not None or is_adapter(path):
        check_base(path, spec)
    recipe = continued(recipe, spec)
    if recipe.data.overlong == "split":
        recipe = with_values(recipe, data={"overlong": "truncate"})
    rows = read_conversations(recipe)
    check_rows(len(rows))
    checkpoint = load_checkpoint(
        str(path), recipe.train.attn_implementation, quantization=recipe.quantization
    )
    recipe = fitted(recipe, checkpoint)
    if control:
        recipe = with_values(recipe, objective={"ar_weight": 1.0})
    else:
        convert(
            checkpoint, recipe.convert, recipe.data.max_length, keeps_ar(recipe), recipe.train.seed
        )
    add_adapter(checkpoint, recipe)
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_token(checkpoint))
    if "messages" in rows[0]:
        tokenizer.chat_template = chat_template(tokenizer, recipe)

    def trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> Any:
        return make_sft_trainer(plan.checkpoint, plan.recipe, rows, run_dir, callbacks)

    return Plan(checkpoint, recipe, None, [], trainer)


def make_sft_trainer(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    run_dir: Path,
    callbacks: list[Any],
) -> Any:
    """The trainer of a run on rows of `read_conversations`."""
    disable_dropout(checkpoint.model)
    args = training_arguments(
        recipe,
        run_dir,
        kind=SFTConfig,
        max_length=None,  # the policy on longer rows is ours
        packing=False,  # and so is packing
        assistant_only_loss="messages" in rows[0] and recipe.data.assistant_only,
        dataset_text_field=recipe.data.text_field,
    )
    datasets.disable_progress_bars()
    data = Dataset.from_list(list(rows))
    try:
        trainer = DiffusionSFTTrainer(checkpoint, recipe, args, data, callbacks=callbacks)
    except (ValueError, RuntimeError) as error:
        raise Ar2DiffError(
            f"the rows cannot be prepared: {first_line(error)}",
            "see data.assistant_only and data.chat_template in 'ar2diff config schema'",
        ) from error
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        print(described(trainer.train_dataset.answers(), recipe), file=sys.stderr)
    return trainer


def described(answers: Answers, recipe: Recipe) -> str:
    """What the supervised turns are like, in a line."""
    lengths = sorted(answers.lengths) or [0]
    over = {"drop": "left out", "truncate": "cut"}[recipe.data.overlong]
    return (
        f"{answers.turns} turns of {lengths[len(lengths) // 2]} tokens in the middle, "
        f"{lengths[-1]} at most; {answers.turns - answers.ended} without an end token; "
        f"{answers.cut} rows over data.max_length {recipe.data.max_length} are {over}"
    )


def chat_template(tokenizer: Any, recipe: Recipe) -> str:
    """The template to render conversations with: the recipe's, else the tokenizer's.

    Raises:
        Ar2DiffError: there is none, or it cannot tell what the assistant says.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    name = recipe.data.chat_template
    if name is not None:
        path = TEMPLATES / f"{name}.jinja" if not name.endswith((".jinja", ".j2")) else Path(name)
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise Ar2DiffError(
                f"data.chat_template {name}: no such template", f"{shipped}, or a .jinja file"
            )
        template = path.read_text(encoding="utf-8")
    else:
        template = tokenizer.chat_template
    if not template:
        raise Ar2DiffError(
            "the tokenizer has no chat template", "set data.chat_template, for example to plain"
        )
    if not recipe.data.assistant_only or has_generation_markers(template):
        return template
    tokenizer.chat_template = template
    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError:
        raise Ar2DiffError(
            "the chat template does not mark what the assistant says ({% generation %})",
            "set data.chat_template to one that does, or data.assistant_only=false",
        ) from None


def read_conversations(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of all sources: `messages`, or `prompt` and `completion`, or a text; all of one format.

    Raises:
        Ar2DiffError: naming the file and the row that is not.
    """
    if not recipe.data.sources:
        raise Ar2DiffError("no data is named", "give --data, or data.sources in the recipe")
    rows: list[dict[str, Any]] = []
    for source in recipe.data.sources:
        path = find_file(source.path)
        if path is None:
            raise Ar2DiffError(f"data {source.path}: no such file", "sft reads local jsonl files")
        for number, line in enumerate(read_lines(path, f"data {path}"), 1):
            if line.strip():
                rows.append(_conversation(line, f"data {path}: row {number}", recipe))
    if not rows:
        raise Ar2DiffError("the data is empty", "give a file with rows")
    kinds = {tuple(sorted(row)) for row in rows}
    if len({kind[0] for kind in kinds}) > 1:
        raise Ar2DiffError("the rows are of several formats", f"one of {', '.join(FORMATS)} alone")
    return rows


def _conversation(line: str, where: str, recipe: Recipe) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Ar2DiffError(f"{where} is not JSON ({error.msg})", "mend or remove it") from None
    row = arranged(row if isinstance(row, dict) else {}, recipe.data.columns, where)
    if "messages" in row:
        messages = row["messages"]
        said = [
            isinstance(m, dict) and isinstance(m.get("role"), str) and (
                isinstance(m.get("content"), str) or m.get("tool_calls")
            )
            for m in (messages if isinstance(messages, list) else [])
        ]  # fmt: skip
        if not said or not all(said):
            raise Ar2DiffError(
                f"{where}: a message without role or content", "mend or remove the row"
            )
        if all(message["role"] != "assistant" for message in messages):
            raise Ar2DiffError(f"{where}: the assistant says nothing", "mend or remove the row")
        return {k: row[k] for k in ("messages", "tools") if row.get(k) is not None}
    if "prompt" in row and "completion" in row:
        if not all(isinstance(row[k], str) and row[k] for k in ("prompt", "completion")):
            raise Ar2DiffError(
                f"{where}: prompt or completion is empty or no text", "mend or remove the row"
            )
        return {"prompt": row["prompt"], "completion": row["completion"]}
    field = recipe.data.text_field
    if isinstance(row.get(field), str) and row[field]:
        return {field: row[field]}
    raise Ar2DiffError(
        f"{where} has neither messages nor prompt and completion nor {field!r} "
        f"(it has {', '.join(row) or 'nothing'})",
        "see data.columns in 'ar2diff config schema data'",
    )
