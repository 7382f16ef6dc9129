"""One driver of all training verbs: claim the output folder, resume, train, save."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.adapters import check_base
from ..checkpoint.files import find_checkpoint, is_adapter
from ..checkpoint.io import check_saving, save
from ..checkpoint.model import Checkpoint, count_parameters
from ..checkpoint.output import (
    Output,
    check_disk,
    check_output,
    claimed,
    finished_record,
    run_record,
)
from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, first_line
from ..core.forward import context_length
from ..core.spec import Spec
from ..data.sources import find_file
from ..distributed.builds import check_compiler
from ..distributed.ranks import is_main
from ..distributed.sharding import sharding, whole_weights
from ..evaluation.score import score
from .arguments import rows_per_step
from .base import checkpoints
from .callbacks import Watch

STATE_BYTES = 12  # a parameter's bytes in a training checkpoint: weight and two moments, float32


@dataclass(frozen=True)
class Plan:
    """All that is known before the first step.

    Attributes:
        rows: what is trained on, as the trainer of the verb takes it; None trains nothing.
        make_trainer: makes the trainer of (this plan, run folder, callbacks).
        eval_rows: token ids of the rows that are judged during the run and after it.
        preview: what a dry run says besides.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    rows: Any
    make_trainer: Callable[[Plan, Path, list[Any]], Any]
    eval_rows: list[list[int]] = field(default_factory=list)
    preview: Callable[[Plan], dict[str, Any]] | None = None

    @property
    def parameters(self) -> int:
        """How many parameters the converted model has."""
        return count_parameters(self.checkpoint.model)[1]

    def bytes_needed(self) -> int:
        """Bytes that the run will write: the result, and its training checkpoints."""
        files = self.checkpoint.path.glob("*.safetensors")
        trainable = count_parameters(self.checkpoint.model)[0]
        result = int(1.1 * sum(file.stat().st_size for file in files))
        if self.checkpoint.base is not None:
            result = 4 * trainable
        if not self.recipe.train.max_steps:
            return result
        return result + STATE_BYTES * trainable * (self.recipe.train.save_total_limit + 1)

    def summary(self) -> dict[str, Any]:
        """What the run will be, for people and for `--json`."""
        train, spec = self.recipe.train, self.checkpoint.spec
        step = rows_per_step(train) * (2 if self.recipe.noise.complementary else 1)
        return {
            "parameters": self.parameters,
            "trainable_parameters": count_parameters(self.checkpoint.model)[0],
            "diffusion": spec.to_dict() if spec else None,
            "mask_token": self.checkpoint.tokenizer.mask_token,
            "pad_token": self.checkpoint.tokenizer.pad_token,
            "steps": train.max_steps,
            "rows_per_step": step,
            "tokens_at_most": train.max_steps * step * self.recipe.data.max_length,
            "eval_rows": len(self.eval_rows),
            **({"notes": self.checkpoint.notes} if self.checkpoint.notes else {}),
        }


def run(
    make_plan: Callable[[Path, Recipe], Plan],
    model: str,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run a training verb: plan, claim the output folder, train, save.

    Args:
        make_plan: what the verb is; loads and checks everything, writes nothing.
        model, recipe, output_dir, resume, overwrite, dry_run: as of `adapt`.

    Returns:
        What `ar2diff.json` holds: base, recipe, tokens, versions, bound and AR NLL.

    Raises:
        Ar2DiffError: something the user can fix; nothing was written.
    """
    output_dir = Path(output_dir)
    if recipe.train.compile:
        check_compiler()
    path = find_checkpoint(model)  # once: a Hub id is a download
    inputs = [path, *(p for s in recipe.data.sources if (p := find_file(s.path)))]
    main = is_main()
    if main:
        check_output(output_dir, inputs, resume, overwrite)
    plan = make_plan(path, recipe)
    recipe = plan.recipe
    check_disk(output_dir, plan.bytes_needed())
    check_saving(plan.checkpoint)
    if dry_run:
        return plan.summary() | (plan.preview(plan) if plan.preview else {})
    record = {
        "ar2diff": __version__,
        "base_model": model.rstrip("/"),
        "base_commit": plan.checkpoint.commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "recipe": recipe.model_dump(mode="json"),
        "sharding": sharding(),
        **plan.summary(),
    }
    flags = {"resume": resume, "overwrite": overwrite}
    with claimed(output_dir, inputs, **flags) if main else nullcontext() as output:
        if output is not None:
            _begin(output, record, resume)
        if resume and (ended := finished_record(output_dir)):
            return ended
        weights = None
        if recipe.train.max_steps:
            trained, weights = _train(plan, output_dir, resume)
            record |= trained
        if output is not None:
            save(plan.checkpoint, output, record, weights)
    return record


def check_kind(path: Path, spec: Spec | None, recipe: Recipe) -> None:
    """Refuse to tune an unconverted model, or to make a control of a converted one."""
    control = recipe.objective.kind == "ar"
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


def continued(recipe: Recipe, spec: Spec | None) -> Recipe:
    """The recipe with what it leaves open taken from the spec of a model converted before."""
    if spec is None:
        return recipe
    chosen = recipe.convert.model_fields_set
    names = ["attention", "block_length", "prediction"]
    names += ["local_window"] if spec.local_window else []
    return with_values(recipe, convert={n: getattr(spec, n) for n in names if n not in chosen})


def fitted(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with rows no longer than the model's context, where it does not ask for longer."""
    context, grid = context_length(checkpoint.model.config), recipe.convert.block_length or 1
    if context is None or "max_length" in recipe.data.model_fields_set:
        return recipe
    fits = min(recipe.data.max_length, context // grid * grid)
    return with_values(recipe, data={"max_length": fits}) if fits > 1 else recipe


def keeps_ar(recipe: Recipe) -> bool:
    """Whether the AR mode is alive after a run: trained along, or nothing trained."""
    return recipe.convert.attention == "causal_context" and (
        recipe.objective.ar_weight > 0 or not recipe.train.max_steps
    )


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that is not installed or does not start, before anything expensive."""
    from transformers.integrations import get_reporting_integration_callbacks

    if report_to in ("none", "all"):
        return
    try:
        for callback in get_reporting_integration_callbacks([report_to]):
            callback()
    except (ValueError, RuntimeError, ImportError, KeyError) as error:
        raise Ar2DiffError(
            f"train.report_to {report_to}: {first_line(error)}", "install it, or set none"
        ) from None


def _begin(output: Output, record: dict[str, Any], resume: bool) -> None:
    """Begin a run in its folder, or check that the one to resume is the same."""
    old = run_record(output.folder) if resume else None
    if old is None:
        if record["steps"]:
            output.begin_run(record)
        return
    for name in ("recipe", "base_model", "rows_per_step", "sharding"):
        if old.get(name) != json.loads(json.dumps(record[name])):
            raise Ar2DiffError(
                f"{output.folder} was started with another {name}{_difference(old, record, name)}",
                "resume with the command it was started with, or use --overwrite",
            )


def _difference(old: dict[str, Any], new: dict[str, Any], name: str) -> str:
    if name != "recipe" or not isinstance(old.get("recipe"), dict):
        return f": {old.get(name)}, now {new[name]}"
    for section, values in new["recipe"].items():
        before = old["recipe"].get(section)
        if before != values and isinstance(values, dict) and isinstance(before, dict):
            keys = [k for k in values if before.get(k) != values[k]]
            if keys:
                return f": {section}.{keys[0]} was {before.get(keys[0])!r}, now {values[keys[0]]!r}"
    return ""


def _train(
    plan: Plan, output_dir: Path, resume: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the record gains, and the weights where the model does not hold them whole."""
    run_dir = output_dir / "checkpoints"
    use_cache = plan.checkpoint.model.config.use_cache  # which the Trainer turns off
    watch = Watch(plan.checkpoint, plan.recipe, plan.eval_rows)
    trainer = plan.make_trainer(plan, run_dir, [watch])
    watch.trainer = trainer
    if trainer.is_world_process_zero():
        shutil.rmtree(run_dir / ".partial", ignore_errors=True)  # of a killed run
    done = checkpoints(run_dir)
    trainer.train(resume_from_checkpoint=str(done[-1]) if resume and done else None)
    plan.checkpoint.model.config.use_cache = use_cache
    plan.checkpoint.model.eval()
    record: dict[str, Any] = {"tokens": trainer.state.num_input_tokens_seen, **trainer.facts()}
    if plan.eval_rows:
        record["eval"] = score(plan.checkpoint, plan.eval_rows, samples=plan.recipe.eval.samples)
    return record, whole_weights(trainer)
