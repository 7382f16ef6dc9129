"""The driver for all training verbs: plan, claim the output folder, resume, train, save."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.files import find_checkpoint
from ..checkpoint.io import check_saving, save
from ..checkpoint.output import (
    Output,
    check_disk,
    check_output,
    claimed,
    finished_record,
    run_record,
)
from ..config.recipe import dump_recipe, with_values
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..data.sources import find_file
from ..distributed.builds import check_compiler
from ..distributed.precision import resolved_precision
from ..distributed.ranks import is_main
from ..distributed.sharding import sharding, whole_weights
from .base import checkpoints, step_of
from .callbacks import Watch, peak_memory
from .findings import findings, reached
from .identity import identity
from .journal import Journal, command_line, tracked
from .opening import needed_memory, opening
from .plan import Plan, Verb
from .plots import draw_log
from .request import Request
from .results import RunPlan, RunResult
from .screen import Screen

DECISIVE = {  # record keys that must match when a run is resumed, in words
    "recipe": "recipe", "base_model": "model", "inputs": "content",
    "rows_per_step": "number of rows per step", "sharding": "sharding",
}  # fmt: skip
INPUTS = {
    "model": "the model", "data": "the data or the chat template", "images": "the images",
}  # fmt: skip


def run(
    verb: Verb,
    request: Request,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> RunResult | RunPlan:
    """Run a training verb. Arguments and results are those of `adapt`.

    Raises:
        Ar2DiffError: for anything the user can fix; nothing has been written.
    """
    recipe, output_dir = request.recipe, request.output_dir
    if resume and overwrite:
        raise Ar2DiffError(
            f"{option('resume', True)} and {option('overwrite', True)} cannot be combined",
            "choose one of them",
        )
    if recipe.train.compile:
        check_compiler()
    path = find_checkpoint(request.model)  # only once: a Hub id means a download
    named = [source.path for source in recipe.data.sources]
    named += [recipe.data.self.prompts] if recipe.data.self and recipe.data.self.prompts else []
    inputs = [path, *(p for name in named if (p := find_file(name)))]
    if is_main():
        check_output(output_dir, inputs, resume, overwrite)
    plan = verb.prepare(path, recipe)
    check_disk(output_dir, plan.bytes_needed())
    check_saving(plan.checkpoint)  # before training, not after it
    summary = plan.summary(output_dir)
    if dry_run:
        return plan.preview(plan, summary) if plan.preview else summary
    if plan.complete is not None:
        plan = plan.complete()
        summary = plan.summary(output_dir)
    record = _record(verb, plan, request, path, summary)
    begun = run_record(output_dir) if resume else None
    if begun is not None and begun.get("precision") in ("bf16", "fp32"):
        record["precision"] = begun["precision"]  # another machine may resolve `auto` otherwise
    plan = replace(plan, recipe=with_values(plan.recipe, train={"precision": record["precision"]}))
    flags = {"resume": resume, "overwrite": overwrite}
    with claimed(output_dir, inputs, **flags) if is_main() else nullcontext() as output:
        if output is not None:
            _begin(output, record, resume)
        if resume and (finished := finished_record(output_dir)):
            return RunResult.of(finished, output_dir)
        weights = None
        if plan.recipe.train.max_steps:
            with tracked(output_dir):
                trained, weights = _train(verb, plan, request, path, summary, resume)
            record |= trained
        if output is not None:
            if plan.recipe.train.max_steps and weights is None:
                record |= plan.measure(plan)
            save(plan.checkpoint, output, record, weights)
            if plan.recipe.train.max_steps:
                _draw(output_dir)
    return RunResult.of(record, output_dir)


def _record(
    verb: Verb, plan: Plan, request: Request, path: Path, summary: RunPlan
) -> dict[str, Any]:
    """The content of `ar2diff.json` for a run that has not begun."""
    known = asdict(summary)
    del known["output_dir"], known["dry_run"]
    return {
        "ar2diff": __version__,
        "base_model": request.model.rstrip("/"),
        "base_commit": plan.checkpoint.commit,
        "verb": verb.name,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "recipe": plan.recipe.model_dump(mode="json"),
        "precision": resolved_precision(plan.recipe.train.precision),
        "inputs": identity(path, plan.recipe) | _images_of(plan) if is_main() else None,
        "prompts": plan.prompts,
        "sharding": sharding(),
        **known,
    }


def _images_of(plan: Plan) -> dict[str, str]:
    """A digest of the images in the data, which do not lie in its files."""
    album = plan.checkpoint.album
    return {"images": album.shots.fingerprint()} if album is not None and len(album.shots) else {}


def _begin(output: Output, record: dict[str, Any], resume: bool) -> None:
    """Begin a run in its folder, or check that the run to be resumed is the same."""
    old = run_record(output.folder) if resume else None
    if old is None:
        if record["steps"]:
            output.begin_run(record)
        return
    new = json.loads(json.dumps(record))
    for name in DECISIVE:
        if old.get(name) != new[name]:
            changed = _difference(name, old.get(name), new[name])
            raise Ar2DiffError(
                f"the run in {output.folder} cannot be resumed: {changed}",
                "resume it with the command and files that it was started with, or start over with "
                f"{option('overwrite', True)}",
            )


def _difference(name: str, old: Any, new: Any) -> str:
    """How a decisive part of a run's record differs from that of its resumption."""
    if name in ("recipe", "inputs") and isinstance(old, dict):
        for key, value in new.items():
            if old.get(key) == value:
                continue
            if name == "inputs":
                return f"the content of {INPUTS[key]} has changed since the run was started"
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                names = (*value, *old[key])  # an older version may have had more of them
                inner = next(k for k in names if old[key].get(k) != value.get(k))
                before, now = old[key].get(inner), value.get(inner)
                return f"{key}.{inner} was {shortened(before)}, but is now {shortened(now)}"
            return f"{key} was {shortened(old.get(key))}, but is now {shortened(value)}"
    return f"its {DECISIVE[name]} was {shortened(old)}, but is now {shortened(new)}"


def _draw(output_dir: Path) -> None:
    """Draw the pictures of a run that is complete, which no failure of theirs may change."""
    try:
        draw_log(output_dir)
    except Exception as error:  # fonts, caches and settings of matplotlib; a full disk
        print(f"note: no plots were drawn: {first_line(error)}", file=sys.stderr)


def _train(
    verb: Verb, plan: Plan, request: Request, path: Path, summary: RunPlan, resume: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train, and tell what happens. Returns what to add to the record, and the weights if the model
    does not hold them whole."""
    output_dir = request.output_dir
    run_dir = output_dir / "checkpoints"
    config = plan.checkpoint.model.config
    use_cache = getattr(config, "use_cache", None)  # the Trainer turns it off
    done = checkpoints(run_dir) if resume else []
    screen, journal, memory = Screen(is_main()), None, None
    if is_main():
        memory = needed_memory(path, plan.recipe)
        journal = Journal(output_dir, step_of(done[-1]) if done else 0)
        command = command_line(verb.name, request.model, output_dir)
        journal.describe(dump_recipe(plan.recipe), command)
    watch = Watch(verb.name, plan, screen, journal)
    trainer = plan.make_trainer(plan, run_dir, [watch])
    watch.trainer = trainer
    if trainer.is_world_process_zero():
        shutil.rmtree(run_dir / ".partial", ignore_errors=True)  # left by a killed run
    facts, size = trainer.facts(), plan.data
    known = facts and {"conversations": size.count, "max_length": plan.recipe.data.max_length}
    warnings = findings(verb.name, [], False, **facts, **known).values()
    screen.say(*opening(verb.name, request.model, summary, plan.recipe, memory, trainer.details()))
    screen.say(*trainer.notes, *summary.notes, *(f"warning: {text}" for text in warnings))
    if done:
        screen.say(f"going on from step {step_of(done[-1])}")
    with screen.bar(verb.name, plan.recipe.train.max_steps):
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    if use_cache is None:  # which only the text config of a vision-language model has
        vars(config).pop("use_cache", None)
    else:
        config.use_cache = use_cache
    plan.checkpoint.model.eval()
    record: dict[str, Any] = {"tokens": trainer.state.num_input_tokens_seen, **facts}
    if plan.eval_rows:
        step, judged = watch.judged or (None, None)
        fresh = step == plan.recipe.train.max_steps  # not if the run had already ended
        record["eval"] = (judged if fresh else plan.judge(plan)).to_dict()
    if journal is not None:
        before, after = reached(journal.rows, [*trainer.figures])
        warnings = findings(verb.name, journal.rows, True, **facts, **known).values()
        record |= {
            "before": before,
            "after": after,
            "seconds": round(journal.seconds(), 1),
            "peak_memory": peak_memory(),
            "warnings": list(warnings),
        }
    return record, whole_weights(trainer)
