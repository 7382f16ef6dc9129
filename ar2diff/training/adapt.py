"""`adapt`: a checkpoint and a recipe in, a diffusion checkpoint out. With `objective.kind: ar`, a
control: the AR base trained on the same documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..checkpoint.files import read_spec
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..conversion.convert import end_token
from ..core.errors import Ar2DiffError, option
from ..core.noise import Noise
from ..data.documents import (
    Collator,
    PackedDocuments,
    attention_of,
    block_length_at,
    document_parts,
    tokenize,
)
from ..data.sources import Documents, no_data
from ..diffusion.likelihood import ar_nll
from ..diffusion.task import clean_task, columns_before, masked_task, reading
from ..distributed.ranks import check_rows
from ..distributed.sharding import holds_shards
from ..evaluation.held_out import held_out_rows
from .adapting import check, measure
from .arguments import rows_per_step, training_arguments
from .conversation_rows import are_conversations
from .loss import Denoising, LossTask
from .own_text import Found, OwnText, read_prompts
from .plan import Plan, Verb, freeze_blind
from .request import requested
from .results import DataSize, RunPlan, RunResult
from .run import run
from .trajectories import is_on_policy, own_states

COUNTED = 2000  # documents whose tokens a noise is fitted to
SAMPLED, SAMPLED_LENGTH = 64, 2000  # documents that are counted, and how much of each


def adapt(
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
    """Convert a checkpoint and train it until it denoises.

    Args:
        model: folder or Hub id, with an optional `@revision`; an AR model, or a converted one.
        recipe: a `Recipe`, the name of one that ships with ar2diff, or a YAML file; None means the
            defaults.
        output_dir: a new or empty folder; None means a folder in `runs` named after the model.
        data: files or Hub data sets, in place of the recipe's `data.sources`.
        text_field: the field that holds the text of a row; None leaves it to the recipe.
        max_steps: optimizer steps; 0 converts without training; None leaves it to the recipe.
        overrides: further fields of the recipe, `{"train.learning_rate": 1e-3}` or
            `["train.learning_rate=1e-3"]`.
        resume: continue from the newest checkpoint in `output_dir`, or start if there is none.
        overwrite: replace what an earlier run of ar2diff left in `output_dir`.
        dry_run: check everything and write nothing.

    Returns:
        A description of the run; with `dry_run`, of the run as it would be.

    Raises:
        Ar2DiffError: for anything the user can fix; nothing has been written.
    """
    request = requested(
        "adapt", model, recipe, output_dir, data=data, text_field=text_field, max_steps=max_steps,
        overrides=overrides,
    )  # fmt: skip
    return run(ADAPT, request, resume=resume, overwrite=overwrite, dry_run=dry_run)


def read_rows(recipe: Recipe) -> Found | None:
    """An endless stream of documents from the recipe's sources, and the prompts of `data.self`;
    None if the run does not train."""
    if not recipe.train.max_steps:
        return None
    data, own = recipe.data, recipe.data.self
    prompts = None if own is None else read_prompts(own, data.text_field)
    if not data.sources and own is None:
        raise no_data()
    streams = data.streaming and bool(data.sources)
    documents = Documents(data.sources, data.text_field, recipe.train.seed, streams)
    if data.sources:
        check_rows(documents.size)
    return Found(documents, prompts)


def with_own_text(
    checkpoint: Checkpoint,
    recipe: Recipe,
    found: Found,
    plan: Callable[[Checkpoint, Recipe, Documents], Plan],
) -> Plan:
    """The plan for a run on what was found. If the model writes some of the documents itself, it
    does so when the plan is completed."""
    if found.prompts is None:
        return plan(checkpoint, recipe, found.documents)
    own = OwnText(checkpoint, recipe.data.self, found.prompts)
    checkpoint.notes += own.notes()

    def complete() -> Plan:
        found.documents.add(own.documents(), recipe.data.self.weight)
        return plan(checkpoint, recipe, found.documents)

    return Plan(checkpoint, recipe, None, lambda *_: None, complete=complete)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, found: Found | None) -> Plan:
    """The plan for a run on whole documents, some of which are held out for evaluation."""
    if found is None:
        return Plan(checkpoint, recipe, None, make_trainer)
    return with_own_text(checkpoint, recipe, found, _with_documents)


def _with_documents(checkpoint: Checkpoint, recipe: Recipe, documents: Documents) -> Plan:
    freeze_blind(checkpoint)
    eos = end_token(checkpoint)
    eval_rows, held_out = held_out_rows(checkpoint, recipe, documents, eos)
    size = size_of(documents, checkpoint.tokenizer, len(held_out))
    rows = PackedDocuments(documents, checkpoint.tokenizer, eos, recipe, held_out)
    collate = make_collator(recipe, checkpoint.noise)
    collate([next(iter(rows))])  # raises if no row is usable
    return Plan(
        checkpoint, recipe, rows, make_trainer, size, eval_rows, measure=measure,
        base_logs=base_logs,
    )  # fmt: skip


def base_logs(plan: Plan) -> dict[str, float]:
    """The AR NLL of the base on the evaluation rows, where the conversion gives up the AR mode that
    else tells it. The weights must still be those of the base."""
    checkpoint = plan.checkpoint
    if checkpoint.is_masked_lm or checkpoint.spec_or_causal.ar_mode:
        return {}
    if read_spec(checkpoint.path) is not None:
        return {}
    return {
        "base_ar_nll": ar_nll(checkpoint.model, plan.eval_rows, checkpoint.suppressed, "kept").mean
    }


def size_of(documents: Documents, tokenizer: Any, held_out: int) -> DataSize:
    """How many documents there are, and about how many tokens they have, by a sample of them."""
    texts = documents.known()
    if texts is None:
        return DataSize("documents", None, None, exact=False, held_out=held_out)
    some = texts[:: max(1, len(texts) // SAMPLED)]
    cut = [text[:SAMPLED_LENGTH] for text in some]
    share = sum(map(len, texts)) / max(1, sum(map(len, cut)))
    tokens = sum(len(tokenize(tokenizer, text, 0)) for text in cut)
    return DataSize("documents", len(texts), round(share * tokens), False, held_out)


def some_texts(found: Found) -> Iterator[Any]:
    """Some documents of all sources."""
    return (document for document, _ in islice(found.documents, COUNTED))


def instead(path: Path, recipe: Recipe) -> Verb | None:
    """How conversations are trained on, if the data are such and the model sees images."""
    from .conversing import CONVERSING  # which loads trl

    return CONVERSING if recipe.train.max_steps and are_conversations(path, recipe) else None


ADAPT = Verb("adapt", check, read_rows, make_plan, texts=some_texts, instead=instead)


class AdaptTrainer(Denoising, Trainer):
    """Trains a converted checkpoint on whole documents. Each batch carries its noise, anneal state
    and block length. With `objective.kind: ar`, the control, it trains an AR model on the same
    documents, with the AR loss.

    `evaluate` and `predict` take rows, each of which is one document: a text, token ids,
    `{"input_ids": [...]}`, or `{"text": ...}` (the recipe's `data.text_field`).
    """

    def task_of(self, inputs: dict[str, Tensor]) -> LossTask:
        """The loss task for a batch from the collator."""
        x0, places = inputs["x0"], inputs["scored_at"]
        if self.recipe.objective.kind == "ar":
            task = clean_task(x0, inputs["doc"], inputs["pos"])
            return self.loss_task(task, inputs, x0, columns_before(x0))
        block_length = block_length_at(self.recipe, inputs["step"])
        task = masked_task(
            x0, inputs["xt"], inputs["scored"], inputs["doc"], inputs["pos"], self.spec,
            attention=attention_of(self.recipe, block_length), block_length=block_length,
            reveal=inputs.get("reveal"), drawn=inputs["drawn"], places=places,
        )  # fmt: skip
        # The clean copy comes after the noisy one; each of its tokens is read one slot before.
        length = x0.shape[1]
        ar_columns = torch.arange(length - 1, 2 * length - 1, device=x0.device).expand_as(x0)
        if self.recipe.objective.distil is None:
            return self.loss_task(task, inputs, x0, ar_columns)
        distilled = places[inputs["chosen"]]
        if self.teacher is None:
            source = reading(task, ar_columns, distilled, x0)
        else:  # the AR model reads the documents themselves
            source = clean_task(x0, inputs["doc"], inputs["pos"])
            source = reading(source, columns_before(x0), distilled, x0)
        return self.loss_task(task, inputs, x0, ar_columns, source)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The batches of an optimizer step, some of them with the model's own text, and their
        divisors."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches and is_on_policy(self.recipe, batches[0]["step"]):
            eos = end_token(self.checkpoint)
            batches = [own_states(self.checkpoint, self.data_collator, b, eos) for b in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def fixed_rows(self, dataset: Any) -> list[Any]:
        """Each document as one or more rows of its own, with the noise of the first epoch and the
        attention that the anneal ends with."""
        recipe, eos = self.recipe, end_token(self.checkpoint)
        last = recipe.anneal.steps * rows_per_step(recipe.train)
        rows = []
        for item in dataset:
            if isinstance(item, Mapping):
                ids = item.get("input_ids")
                item = item[recipe.data.text_field] if ids is None else ids
            ids = tokenize(self.checkpoint.tokenizer, item, eos) if isinstance(item, str) else item
            parts = document_parts(list(ids), 0, eos, recipe, recipe.train.seed)
            rows += [(last, [piece]) for piece in parts]
        return rows


def make_collator(recipe: Recipe, noise: Noise) -> Collator:
    """The collator for a run."""
    return Collator(recipe, noise, rows_per_step(recipe.train))


def make_trainer(plan: Plan, run_dir: Path, callbacks: list[Any]) -> AdaptTrainer:
    """The trainer for a plan, on its stream of rows.

    Raises:
        Ar2DiffError: the model is to write texts, but no process has all of it.
    """
    trainer = AdaptTrainer(
        plan.checkpoint,
        plan.recipe,
        training_arguments(plan.recipe, run_dir),
        train_dataset=plan.rows,
        data_collator=make_collator(plan.recipe, plan.checkpoint.noise),
        callbacks=callbacks,
    )
    if plan.recipe.noise.on_policy and holds_shards(trainer):
        raise Ar2DiffError(
            f"{option('noise.on_policy')} cannot be used where each process holds only a part of "
            "the weights",
            f"use {option('launch')} ddp or zero2, or leave out {option('noise.on_policy')}",
        )
    return trainer
