"""`adapt`: a checkpoint and a recipe in, a diffusion checkpoint out. What costs nothing
is checked first, the folder is touched last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..checkpoint.adapters import add_adapter, check_base
from ..checkpoint.files import is_adapter, read_spec
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..conversion.convert import convert, end_token
from ..core.attention import lay_out, reading_slot, reveal_edges
from ..core.errors import Ar2DiffError
from ..core.probe import probe
from ..core.seeds import content_key
from ..data.documents import Collator, PackedDocuments, block_length_at, tokenize
from ..data.sources import Documents, find_file, read_texts
from ..distributed.ranks import check_rows
from ..evaluation.score import check_length, windows
from .arguments import rows_per_step, training_arguments
from .loss import Denoising, Task, disable_dropout
from .run import Plan, check_trackers, continued, fitted, keeps_ar, run


def adapt(
    model: str,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint and train it until it denoises.

    Args:
        model: folder or Hub id, `@revision` allowed; an AR model, or one converted before.
        recipe: the run; `train.max_steps` 0 converts without training.
        output_dir: a new or empty folder.
        resume: go on from the newest checkpoint in `output_dir` (from the start if there is none).
        overwrite: replace what an earlier run of ours left there.
        dry_run: check everything, write nothing.

    Returns:
        What `ar2diff.json` holds: base, recipe, tokens, versions, bound and AR NLL.

    Raises:
        Ar2DiffError: something the user can fix; nothing was written.
    """
    flags = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run}
    return run(make_plan, model, recipe, output_dir, **flags)


def make_plan(path: Path, recipe: Recipe) -> Plan:
    """Load a folder, convert in memory, probe, open the data. Writes nothing."""
    found = read_spec(path)
    if recipe.peft is not None or is_adapter(path):
        check_base(path, found)
    recipe = continued(recipe, found)
    check_trackers(recipe.train.report_to)
    documents = None
    if recipe.train.max_steps:  # a bad row is found before the model is loaded
        documents = Documents(
            recipe.data.sources, recipe.data.text_field, recipe.train.seed, recipe.data.streaming
        )
        check_rows(documents.size)
    checkpoint = load_checkpoint(
        str(path), recipe.train.attn_implementation, quantization=recipe.quantization
    )
    recipe = fitted(recipe, checkpoint)
    spec = convert(
        checkpoint, recipe.convert, recipe.data.max_length, keeps_ar(recipe), recipe.train.seed
    )
    problems = probe(checkpoint.model, spec)
    if problems:
        raise Ar2DiffError(
            f"model {path}: {checkpoint.model.config.model_type} cannot be converted to "
            f"{spec.attention} attention: {problems[0]}",
            "try another attention, or train.attn_implementation",
        )
    add_adapter(checkpoint, recipe)
    if documents is None:
        return Plan(checkpoint, recipe, None, make_trainer)
    eos = end_token(checkpoint)
    eval_rows, held_out = _eval_rows(checkpoint, recipe, documents, eos)
    rows = PackedDocuments(documents, checkpoint.tokenizer, eos, recipe, held_out)
    make_collator(recipe, spec.mask_token_id)([next(iter(rows))])  # raises if no row is usable
    return Plan(checkpoint, recipe, rows, make_trainer, eval_rows)


def _eval_rows(
    checkpoint: Checkpoint, recipe: Recipe, documents: Documents, eos: int
) -> tuple[list[list[int]], frozenset[int]]:
    """The fixed evaluation rows, and keys of the documents that training must not see for it."""
    wanted, tokenizer = recipe.eval, checkpoint.tokenizer
    if not wanted.steps:
        return [], frozenset()
    check_length(checkpoint, wanted.length, "eval.length")
    if wanted.data is not None:
        path = find_file(wanted.data)
        if path is None:
            raise Ar2DiffError(f"eval.data {wanted.data}: no such file", "give a local file")
        rows = windows(
            read_texts(path, recipe.data.text_field), tokenizer, wanted.length, wanted.rows
        )
        return _some(rows, wanted.length), frozenset()
    texts = [
        text
        for text in documents.first(20 * wanted.rows)
        if len(tokenizer(text).input_ids) >= wanted.length
    ][: wanted.rows]
    keys = frozenset(content_key(tokenize(tokenizer, text, eos)) for text in texts)
    rows = windows(texts, tokenizer, wanted.length, wanted.rows)
    return _some(rows, wanted.length), keys


def _some(rows: list[list[int]], length: int) -> list[list[int]]:
    if not rows:
        raise Ar2DiffError(
            f"eval: no text has the {length} tokens of eval.length", "lower eval.length"
        )
    return rows


class AdaptTrainer(Denoising, Trainer):
    """Trains a converted checkpoint on whole documents; noise, anneal and block length come with
    the batch."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: TrainingArguments, **kwargs: Any
    ):
        self.set_up(checkpoint, recipe, args)
        super().__init__(model=checkpoint.model, args=args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch of the collator."""
        attention, block_length, reveal = self.attention_at(int(inputs["step"]))
        x0, masked, pos, doc = (inputs[name] for name in ("x0", "masked", "pos", "doc"))
        input_ids, slots = lay_out(inputs["xt"], x0, doc, pos, attention)
        row = torch.arange(len(x0), device=x0.device)[:, None] * input_ids.shape[1]
        slot = reading_slot(pos, attention, block_length, self.spec.prediction)
        own = torch.arange(x0.shape[1], device=x0.device).expand_as(x0)
        ar = inputs["ar"] if self.recipe.objective.ar_weight > 0 else torch.zeros_like(masked)
        task = Task(
            input_ids=input_ids,
            slots=slots,
            attention=attention,
            block_length=block_length,
            reveal=reveal,
            index=(row + slot)[masked],
            target=x0[masked],
            coef=inputs["coef"][masked],
            t=inputs["t"][masked],
            eos=inputs["eos"][masked],
            ar_index=(row + x0.shape[1] + own - 1)[ar],
            ar_target=x0[ar],
            tokens=inputs["tokens"],
        )
        return self.denoising_loss(model, task, num_items_in_batch)

    def attention_at(self, step: int) -> tuple[str, int | None, Tensor | None]:
        """Attention, block length and revealed edges of an optimiser step: the anneal."""
        attention, anneal = self.spec.attention, self.recipe.anneal
        block_length = block_length_at(self.recipe, step)
        if attention == "full" and block_length is not None:
            attention = "block_causal"  # growing: blocks until the goal
        if attention == "block_causal" and block_length >= self.recipe.data.max_length:
            attention = "full"  # one block: nothing reads the clean copy
        reveal = None
        if anneal.kind == "reveal":
            length = self.recipe.data.max_length
            reveal = reveal_edges(
                step / anneal.steps,
                length,
                block_length or length,
                self.recipe.train.seed,
                step,
                self.args.device,
            )
        return attention, block_length, reveal


def make_collator(recipe: Recipe, mask_token_id: int) -> Collator:
    """The collator of a run."""
    return Collator(recipe, mask_token_id, rows_per_step(recipe.train))


def make_trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> AdaptTrainer:
    """The trainer of a plan, on its stream of rows."""
    checkpoint, recipe = plan.checkpoint, plan.recipe
    disable_dropout(checkpoint.model)
    trainer = AdaptTrainer(
        checkpoint,
        recipe,
        training_arguments(recipe, run_dir),
        train_dataset=plan.rows,
        data_collator=make_collator(recipe, checkpoint.spec.mask_token_id),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, which is for results
    return trainer
