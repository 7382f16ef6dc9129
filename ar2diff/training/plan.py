"""Planning a training run before its first step: the model is loaded and converted, the rows are
read, and anything that would make the run fail later is refused. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.adapters import add_adapter, check_base
from ..checkpoint.files import is_adapter, read_spec, refuse_draft
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint, count_parameters
from ..checkpoint.towers import PARTS, freeze
from ..config.recipe import Recipe, contradictions_of, with_values
from ..conversion.convert import convert, end_token
from ..conversion.images import image_problems
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..core.forward import context_length
from ..core.head import ATTRIBUTE
from ..core.probe import probe
from ..core.spec import CAUSAL, Spec
from ..data.documents import tokenize
from ..distributed.ranks import is_main
from ..evaluation.score import score
from .arguments import check_optimizer, rows_per_step
from .masked_lm import for_masked_lm
from .results import DataSize, RunPlan

TRACKERS = ("tensorboard", "wandb", "trackio")  # of the extra
ROOM = 1.3  # what a probe needs on an accelerator, in sizes of the weights
PROMPTS, PROMPT_TOKENS = 3, 16  # of the prompts that a run's record keeps for its card
STATE_BYTES = 12  # bytes per parameter in a training checkpoint: weight and two moments, float32


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step.

    Attributes:
        rows: the training data, as the verb's trainer takes it; None if the run does not train.
        make_trainer: makes the trainer from (this plan, run folder, callbacks).
        data: how much data there is; None if it is not known, or nothing is trained.
        eval_rows: token ids of the rows on which the model is evaluated during and after the run.
        questions: what a model card shows answers to; None: beginnings of the evaluation rows.
        judge: evaluates the model on them; returns an object with `logs` and `to_dict`.
        base_logs: logs about the model that the run starts from, before the first step, which
            `judge` does not give.
        preview: adds details that only this verb's dry run shows; None adds nothing.
        measure: measures the trained model before it is saved, where it holds all of its weights,
            and chooses what depends on that; returns what to add to the record.
        held_out: numbers of the rows that are kept out of training, where they are numbered.
        complete: makes the rest of the plan, which takes long: a dry run does without it. None:
            there is no rest.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    rows: Any
    make_trainer: Callable[[Plan, Path, list[Any]], Any]
    data: DataSize | None = None
    eval_rows: list[list[int]] = field(default_factory=list)
    questions: Sequence[str] | None = None
    judge: Callable[[Plan], Any] = lambda plan: score(
        plan.checkpoint, plan.eval_rows, samples=plan.recipe.eval.samples
    )
    base_logs: Callable[[Plan], dict[str, float]] = lambda plan: {}
    preview: Callable[[Plan, RunPlan], RunPlan] | None = None
    measure: Callable[[Plan], dict[str, Any]] = lambda plan: {}
    held_out: frozenset[int] = frozenset()
    complete: Callable[[], Plan] | None = None

    def bytes_needed(self) -> int:
        """Bytes that the run will write: the result and its training checkpoints."""
        files = self.checkpoint.path.glob("*.safetensors")
        trainable = count_parameters(self.checkpoint)[0]
        result = int(1.1 * sum(file.stat().st_size for file in files))
        head = getattr(self.checkpoint.model, ATTRIBUTE, None)
        result += len(head.to_bytes()) if head is not None else 0
        if self.checkpoint.base is not None or self.checkpoint.draft is not None:
            result = 4 * trainable
        if not self.recipe.train.max_steps:
            return result
        return result + STATE_BYTES * trainable * (self.recipe.train.save_total_limit + 1)

    @property
    def prompts(self) -> list[str]:
        """What a model card shows answers to: some of the questions, or different beginnings of
        evaluation rows."""
        found: dict[str, None] = dict.fromkeys(self.questions or ())
        for row in self.eval_rows if self.questions is None else ():
            ids = row[:PROMPT_TOKENS]
            text = self.checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
            whole = text.rpartition(" ")[0].strip()  # the last word may be cut
            found[whole or text.strip().rstrip("\ufffd")] = None
        return [text for text in found if text][:PROMPTS]

    def summary(self, output_dir: Path) -> RunPlan:
        """A summary of the run, without details that only the verb's own dry run shows."""
        train, spec = self.recipe.train, self.checkpoint.spec
        trainable, parameters = count_parameters(self.checkpoint)
        step = rows_per_step(train) * (2 if self.recipe.noise.complementary else 1)
        return RunPlan(
            output_dir=str(output_dir),
            parameters=parameters,
            trainable_parameters=trainable,
            diffusion=spec.to_dict() if spec else None,
            mask_token=self.checkpoint.tokenizer.mask_token,
            pad_token=self.checkpoint.tokenizer.pad_token,
            steps=train.max_steps,
            rows_per_step=step,
            tokens_at_most=train.max_steps * step * self.recipe.data.max_length,
            eval_rows=len(self.eval_rows),
            notes=self.checkpoint.notes,
            data=self.data,
        )


@dataclass(frozen=True)
class Verb:
    """How a training verb differs from the others. All functions raise `Ar2DiffError` when the user
    made a mistake.

    Attributes:
        name: the name of the API function and of the command.
        check: refuses settings that do not fit the model; called with (folder, spec, recipe), it
            returns the recipe with the settings that the verb implies. Reads nothing else.
        read: reads and checks all rows that a recipe names; returns None if the run does not train.
        plan: makes the plan from (a checkpoint that is ready to train, recipe, rows).
        converts: whether the recipe's `convert` section applies to a diffusion model.
        texts: some of the documents (texts or token ids) among the rows, to which a noise is
            fitted; None: the verb fits none.
        instead: the verb that does it in place of this one, by (folder, recipe); None: this one.
    """

    name: str
    check: Callable[[Path, Spec | None, Recipe], Recipe]
    read: Callable[[Recipe], Any]
    plan: Callable[[Checkpoint, Recipe, Any], Plan]
    converts: bool = True
    texts: Callable[[Any], Iterator[Any]] | None = None
    instead: Callable[[Path, Recipe], Verb | None] = lambda path, recipe: None

    def prepare(self, path: Path, recipe: Recipe) -> Plan:
        """Check everything, read the rows, load the model in a folder and convert it in memory.

        Cheap checks come first: a bad row is found before the model is loaded.
        """
        refuse_draft(path, f"and {self.name} trains whole models and their adapters")
        if (other := self.instead(path, recipe)) is not None:
            return other.prepare(path, recipe)
        spec = read_spec(path)
        if recipe.draft is not None and self.name != "draft":
            raise Ar2DiffError(
                f"the recipe has a {option('draft')} section, which {self.name} does not use",
                "remove it, or run 'ar2diff draft'",
            )
        if recipe.data.self is not None and self.name not in ("adapt", "draft"):
            raise Ar2DiffError(
                f"{option('data.self')} only works with adapt and draft, not with {self.name}",
                f"leave it out, and give {option('data', 'FILE')}",
            )
        if is_adapter(path) or (recipe.peft is not None and recipe.draft is None):
            check_base(path, spec)
        recipe = for_masked_lm(path, spec, recipe)
        recipe = continued(self.check(path, spec, recipe), spec)
        check_target(path, spec, recipe)
        check_noise(path, spec, recipe, self.converts)
        check_trackers(recipe.train.report_to)
        check_optimizer(recipe.train.optimizer)
        rows = self.read(recipe)
        checkpoint = load_checkpoint(
            str(path), recipe.train.attn_implementation, quantization=recipe.quantization
        )
        recipe = fitted(recipe, checkpoint)
        if self.converts and (spec is not None or recipe.objective.kind == "diffusion"):
            convert_for(checkpoint, recipe, self._counts(checkpoint, rows))
        freeze_parts(checkpoint, recipe)
        add_adapter(checkpoint, recipe)
        return self.plan(checkpoint, recipe, rows)

    def _counts(self, checkpoint: Checkpoint, rows: Any) -> Callable[[], Tensor] | None:
        """Counts the tokens [V] of some documents."""
        if rows is None or self.texts is None:
            return None

        def count() -> Tensor:
            size = checkpoint.model.config.get_text_config().vocab_size
            counts, eos = torch.zeros(size, dtype=torch.long), end_token(checkpoint)
            for text in self.texts(rows):
                ids = tokenize(checkpoint.tokenizer, text, eos)
                counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=size)
            return counts

        return count


def freeze_parts(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Keep the parts of a vision-language model as they are that the recipe names.

    Raises:
        Ar2DiffError: it is none, or nothing is left to train.
    """
    frozen = recipe.train.frozen
    if not frozen:
        return
    named = option("train.frozen", ",".join(frozen))
    if not checkpoint.sees_images:
        raise Ar2DiffError(
            f"{named} names parts of a vision-language model, but model {checkpoint.path} is one "
            "of text",
            f"leave out {option('train.frozen')}",
        )
    if {*frozen} >= {*PARTS} and recipe.peft is None:
        raise Ar2DiffError(
            f"{named} leaves nothing to train", f"leave a part out of {option('train.frozen')}"
        )
    freeze(checkpoint.model, frozen)


def freeze_blind(checkpoint: Checkpoint) -> None:
    """Keep tower and projector as they are where no row has an image: they have no gradients."""
    if checkpoint.sees_images and checkpoint.base is None and not len(checkpoint.album.shots):
        freeze(checkpoint.model, ("tower", "projector"))


def check_kind(path: Path, spec: Spec | None, recipe: Recipe) -> None:
    """Refuse to tune an unconverted model, to make an AR control from a converted one, and to run
    without steps, which would tune nothing."""
    control = recipe.objective.kind == "ar"
    if spec is None and not control:
        raise Ar2DiffError(
            f"model {path} is not converted", f"run 'ar2diff adapt {path} --output-dir DIR' first"
        )
    if spec is not None and control:
        raise Ar2DiffError(
            f"model {path} is converted, but {option('objective.kind', 'ar')} tunes an AR model",
            "give the AR model that it was converted from, or leave out "
            f"{option('objective.kind')}",
        )
    if recipe.convert.head_rank is not None and (spec is None or spec.head is None):
        raise Ar2DiffError(
            f"{option('convert.head_rank')} only works with adapt, which adds the diffusion head",
            f"leave it out, or convert the model with {option('convert.head_rank')} first",
        )
    if not recipe.train.max_steps:
        raise Ar2DiffError(
            f"{option('train.max_steps', 0)} trains nothing; only a conversion can use it",
            f"set {option('train.max_steps')} to 1 or more, or preview the run with "
            f"{option('dry_run', True)}",
        )


def check_target(path: Path, spec: Spec | None, recipe: Recipe) -> None:
    """Refuse to distil from the AR mode of a model that has none."""
    if recipe.objective.distil is not None and spec is not None and not spec.ar_mode:
        raise Ar2DiffError(
            f"model {path} has no AR mode, which {option('objective.distil')} learns from",
            f"leave out {option('objective.distil')}, or convert the AR model with attention "
            f"causal_context and {option('objective.ar_weight')} above 0",
        )


def check_noise(path: Path, spec: Spec | None, recipe: Recipe, converts: bool) -> None:
    """Refuse what the noise of a converted model, or the one that the recipe puts in its place,
    cannot do.

    Args:
        converts: whether the run may put another in its place.
    """
    known = (spec or CAUSAL).noise
    noise = recipe.noise.process or known
    if noise != known and not converts:
        raise Ar2DiffError(
            f"{option('noise.kind')} is {noise.kind} in the {noise.form} form, but the noise of "
            f"model {path} is {known.kind} in the {known.form} form, which the run does not change",
            f"leave out {option('noise.kind')}, or convert the model with it first",
        )
    for problem in contradictions_of(noise, recipe):
        raise Ar2DiffError(
            f"model {path}: {problem}",
            f"change the recipe, or convert the model with another {option('noise.kind')} first",
        )


def continued(recipe: Recipe, spec: Spec | None) -> Recipe:
    """The recipe, with what it leaves open filled in from the spec of an already converted
    model."""
    if spec is None:
        return recipe
    chosen = recipe.convert.model_fields_set
    names = ["attention", "block_length", "prediction"]
    names += ["local_window"] if spec.local_window else []
    values = {name: getattr(spec, name) for name in names}
    if spec.head is not None:
        values["head_rank"] = spec.head.rank
    return with_values(recipe, convert={n: v for n, v in values.items() if n not in chosen})


def fitted(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe, with rows limited to the model's context unless it asks for a length."""
    context, grid = context_length(checkpoint.model), recipe.convert.block_length or 1
    if context is None or "max_length" in recipe.data.model_fields_set:
        return recipe
    fits = min(recipe.data.max_length, context // grid * grid)
    return with_values(recipe, data={"max_length": fits}) if fits > 1 else recipe


def convert_for(
    checkpoint: Checkpoint, recipe: Recipe, counts: Callable[[], Tensor] | None = None
) -> None:
    """Convert a loaded model as the recipe says, and run a few forward passes to check that it does
    what its new spec says.

    Args:
        counts: as of `convert`.

    Raises:
        Ar2DiffError: it does not, or it cannot be converted.
    """
    # The AR mode survives the run if it is trained too, or if nothing is trained.
    ar_mode = recipe.convert.attention == "causal_context" and (
        recipe.objective.ar_weight > 0 or not recipe.train.max_steps
    )
    spec = convert(
        checkpoint, recipe.convert, recipe.data.max_length, ar_mode, recipe.train.seed,
        recipe.noise.process, counts,
    )  # fmt: skip
    problems = probed(checkpoint.model, spec) or image_problems(checkpoint, spec)
    if problems:
        raise Ar2DiffError(
            f"model {checkpoint.path}: {checkpoint.model.config.model_type} cannot be converted to "
            f"{spec.attention} attention: {problems[0]}",
            f"try another {option('train.attn_implementation')}"
            if checkpoint.is_masked_lm
            else f"try another {option('convert.attention')}, or another "
            f"{option('train.attn_implementation')}",
        )


def probed(model: Any, spec: Spec) -> list[str]:
    """What the probe finds, on the accelerator if the model fits. Of several processes only the
    main one probes: they all hold the same model."""
    if not is_main():
        return []
    device, held = next(model.parameters()).device, weight_bytes(model)
    moves = device.type == "cpu" and torch.cuda.is_available()
    if moves and held * ROOM < torch.cuda.mem_get_info()[0]:
        try:
            return probe(model.to("cuda"), spec)
        finally:
            model.to(device)  # a trainer that shards the weights moves them itself
    return probe(model, spec)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that is not installed or does not start."""
    from transformers.integrations import get_reporting_integration_callbacks

    if report_to in ("none", "all"):
        return
    try:
        for callback in get_reporting_integration_callbacks([report_to]):
            callback()
    except (ValueError, RuntimeError, ImportError, KeyError) as error:
        install = "run pip install 'ar2diff[trackers]', or " if report_to in TRACKERS else ""
        raise Ar2DiffError(
            f"{option('train.report_to')} {shortened(report_to)} cannot be started: "
            f"{first_line(error)}",
            f"{install}set {option('train.report_to', 'none')}",
        ) from None
