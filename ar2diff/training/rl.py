"""`rl`: a converted model, prompts and rewards in, a model that earns more reward out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from ..checkpoint.files import DRAFT_CONFIG, find_checkpoint, is_draft
from ..checkpoint.kinds import sees_images
from ..checkpoint.model import Checkpoint, load_config
from ..config.recipe import Recipe, with_values
from ..conversion.images import reach_in
from ..core.draft import Draft, DraftSpec, load_draft, read_draft_spec
from ..core.errors import Ar2DiffError, option, shortened
from ..core.options import Options, resolve
from ..core.spec import CAUSAL, Spec
from ..data.chat_template import chat_template
from ..data.rows import as_dataset
from ..distributed.ranks import check_rows, chosen, world_size
from ..rewards.loading import make_rewards
from .arguments import training_arguments
from .constraint import as_in_recipe, check_constraint, with_schema
from .grpo import DiffusionGRPOTrainer
from .modules import unwrapped
from .plan import Plan, Verb, check_kind
from .prompts import IMAGES, Prompts, check_lengths, coded_ids, read_prompts, readable
from .request import requested
from .results import DataSize, Prompt, RlPlan, RunPlan, RunResult
from .rollouts import sampler_settings
from .run import run


def rl(
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
    """Tune a converted model (or, with `objective.kind: ar`, an AR one) with rewards.

    Args:
        model: folder or Hub id of the model, with an optional `@revision`.
        recipe: as for `adapt`, but with an `rl` section.
        data: files of prompts, in place of the recipe's `data.sources`.
        output_dir, text_field, max_steps, overrides, resume, overwrite, dry_run: as for `adapt`,
            but with at least one step.

    Returns:
        A description of the run; with `dry_run`, an `RlPlan` of the run as it would be.

    Raises:
        Ar2DiffError: for anything the user can fix; nothing has been written.
    """
    request = requested(
        "rl", model, recipe, output_dir, data=data, text_field=text_field, max_steps=max_steps,
        overrides=overrides,
    )  # fmt: skip
    return run(RL, request, resume=resume, overwrite=overwrite, dry_run=dry_run)


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse what rl cannot do with a model."""
    if recipe.rl is None:
        raise Ar2DiffError(
            f"the recipe has no {option('rl')} section", "see 'ar2diff config schema rl'"
        )
    check_kind(path, spec, recipe)
    sees = spec.images is not None if spec is not None else sees_images(load_config(path))
    if sees and "frozen" not in recipe.train.model_fields_set:
        # Rewards for texts say little of how to see, and features that stay are computed once.
        recipe = with_values(recipe, train={"frozen": ("tower", "projector")})
    if spec is not None and spec.head is not None:
        raise Ar2DiffError(
            f"model {path} has a diffusion head, which the estimators of rl do not know",
            f"use a model that was converted without {option('convert.head_rank')}",
        )
    recipe = with_schema(recipe)
    check_constraint(path, spec, check_settings(recipe, spec))
    return recipe


@dataclass(frozen=True)
class Judged:
    """Prompts, and the rewards that score their completions."""

    prompts: Prompts
    rewards: list[Any]


def read(recipe: Recipe) -> Judged:
    """The rewards of a recipe, and the prompts from its sources."""
    rewards = make_rewards(recipe.rl.rewards)
    prompts = read_prompts(recipe)
    check_rows(len(prompts.rows))
    return Judged(prompts, rewards)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, judged: Judged) -> Plan:
    """The plan for a run on prompts. Sets the run's chat template on the tokenizer."""
    if checkpoint.spec is None and (reach_in(checkpoint) or "causal") != "causal":
        raise Ar2DiffError(
            f"model {checkpoint.path} reads images or prompts in both directions, which "
            f"{option('objective.kind', 'ar')} does not",
            f"convert it, and train its AR mode with {option('rl.estimator', 'ar')} instead",
        )
    rows, rewards = judged.prompts.of(checkpoint), judged.rewards
    if not isinstance(rows[0]["prompt"], str):
        # The template need not mark what the assistant says: no given answers are learned.
        plain = with_values(recipe, data={"assistant_only": False})
        tokenizer = checkpoint.tokenizer
        if checkpoint.sees_images and not tokenizer.chat_template:
            tokenizer.chat_template = checkpoint.processor.chat_template
        tokenizer.chat_template = chat_template(tokenizer, plain)
    size = DataSize("prompts", len(rows), check_lengths(checkpoint, recipe, rows), exact=True)
    named, draft = recipe.rl.draft, None
    if named is not None:
        draft = load_draft(find_checkpoint(named), unwrapped(checkpoint.model))

    def make(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DiffusionGRPOTrainer:
        return make_trainer(plan, rewards, run_dir, callbacks, draft)

    def preview(plan: Plan, summary: RunPlan) -> RlPlan:
        ids = coded_ids(plan.checkpoint, rows[0]["prompt"], rows[0].get(IMAGES) or ())
        return RlPlan(
            **vars(summary),
            prompts=len(rows),
            first_prompt=Prompt(readable(plan.checkpoint, ids), len(ids)),
            rewards=tuple(getattr(reward, "__name__", reward) for reward in rewards),
        )

    return Plan(checkpoint, recipe, rows, make, size, preview=preview)


RL = Verb("rl", check, read, make_plan, converts=False)


def make_trainer(
    plan: Plan,
    rewards: list[Any],
    run_dir: Path,
    callbacks: list[Any],
    draft: Draft | None = None,
) -> DiffusionGRPOTrainer:
    """The trainer for a plan, on rows of `Prompts.of`."""
    rl = plan.recipe.rl
    args = training_arguments(
        plan.recipe,
        run_dir,
        kind=GRPOConfig,
        per_device_eval_batch_size=rl.num_generations,
        num_generations=rl.num_generations,
        max_completion_length=rl.max_completion_length,
        temperature=rl.sampler.get("temperature", 1.0),
        num_iterations=rl.num_iterations,
        steps_per_generation=rl.steps_per_generation,
        importance_sampling_level=rl.level,
        loss_type=rl.loss_type,
        epsilon=rl.epsilon,
        epsilon_high=rl.epsilon_high,
        scale_rewards=rl.scale_rewards,
        beta=rl.beta,
        use_bias_correction_kl=False,
        mask_truncated_completions=rl.mask_truncated_completions,
        reward_weights=[
            *(reward.weight for reward in rl.rewards),
            *([rl.fewer_forwards] if rl.fewer_forwards else []),
        ],
        disable_dropout=True,  # otherwise two scores of one policy differ, and ratios are noisy
    )
    return DiffusionGRPOTrainer(
        plan.checkpoint, plan.recipe, args, as_dataset(plan.rows), rewards, draft,
        callbacks=callbacks,
    )  # fmt: skip


def check_settings(recipe: Recipe, spec: Any) -> Options:
    """Refuse settings that would make a run wrong, before anything is loaded.

    Returns:
        The options with which completions are written.

    Raises:
        Ar2DiffError: naming the setting.
    """
    rl, spec = recipe.rl, spec or CAUSAL
    if not rl.rewards:
        raise Ar2DiffError(
            f"{option('rl.rewards')} is empty",
            "add a reward, for example {name: exact}; see 'ar2diff config schema rl'",
        )
    modes = ("ar", "speculative") if rl.estimator == "ar" else ("diffusion",)
    settings = sampler_settings(rl)
    mode = settings["mode"]
    if mode not in modes:
        raise Ar2DiffError(
            f"completions written with {option('rl.sampler.mode')} {shortened(mode)} cannot be "
            f"scored with {option('rl.estimator')} {rl.estimator}",
            f"set it to {modes[0]}",
        )
    if rl.estimator == "ar" and not spec.ar_mode:
        raise Ar2DiffError(
            f"{option('rl.estimator', 'ar')} needs an AR mode, which the model does not have",
            f"choose another estimator, for example {option('rl.estimator', 'elbo')}",
        )
    if recipe.objective.kind == "ar" and rl.estimator != "ar":
        raise Ar2DiffError(
            f"{option('rl.estimator')} {rl.estimator} needs a diffusion model, and this is an AR "
            "model",
            "set it to ar",
        )
    if rl.prompt_mask and spec.attention != "full":
        raise Ar2DiffError(
            f"{option('rl.prompt_mask')} has no effect with {spec.attention} attention, in which "
            "every block sees the clean prompt",
            "set it to 0; it is only for full attention",
        )
    grid = spec.block_length
    if grid is not None and rl.sampler.get("block_length", grid) != grid:
        raise Ar2DiffError(
            f"{option('rl.sampler.block_length')} differs from the model's {grid}, so completions "
            "would be scored on a different block grid than they were written on",
            "leave it out",
        )
    if rl.sampler.get("remask") and rl.estimator == "trajectory":
        raise Ar2DiffError(
            f"{option('rl.sampler.remask')} lets a token be decided twice, but the trajectory "
            "estimator scores each token in the single step that decided it",
            f"leave it out, or set {option('rl.estimator', 'elbo')}",
        )
    if rl.estimator == "spg" and rl.beta:
        raise Ar2DiffError(
            f"{option('rl.beta')} cannot be used with the spg estimator: its bound for bad "
            "completions does not define a KL",
            "set it to 0",
        )
    if rl.loss_type == "cispo" and (rl.epsilon_high or rl.epsilon) < 1:
        raise Ar2DiffError(
            f"{option('rl.epsilon_high')} must be at least 1 with the cispo loss, in which it "
            "is the largest ratio allowed; below 1, every ratio would be clipped",
            "set it to 5, for example",
        )
    if recipe.peft is not None and recipe.peft.dropout:
        raise Ar2DiffError(
            f"{option('peft.dropout')} makes two scores under the same policy differ, so their "
            "ratio would be noise",
            "set it to 0",
        )
    drafts = rl.draft is not None
    if drafts:
        spec = replace(spec, block_length=_draft_spec(rl.draft).block_length)
    with as_in_recipe():
        options = resolve(spec, settings, drafts=drafts)
    train = recipe.train
    steps = rl.steps_per_generation or train.gradient_accumulation_steps
    completions = train.per_device_train_batch_size * steps * world_size()
    if completions % rl.num_generations:
        raise Ar2DiffError(
            f"a generation step produces {completions} completions, which is not a multiple of "
            f"{option('rl.num_generations')} {rl.num_generations}",
            f"change {option('train.per_device_train_batch_size')} or "
            f"{option('rl.num_generations')}",
        )
    if train.gradient_accumulation_steps % steps and steps % train.gradient_accumulation_steps:
        raise Ar2DiffError(
            f"with {option('rl.steps_per_generation')} {steps} and "
            f"{option('train.gradient_accumulation_steps')} {train.gradient_accumulation_steps}, "
            "one update would mix completions from different generation steps",
            "make one a multiple of the other",
        )
    if rl.num_iterations > 1 and steps % train.gradient_accumulation_steps:
        raise Ar2DiffError(
            f"{option('rl.num_iterations')} is {rl.num_iterations}, but with "
            f"{option('rl.steps_per_generation')} {steps} below "
            f"{option('train.gradient_accumulation_steps')} {train.gradient_accumulation_steps}, "
            "several iterations would fall into one update",
            f"set {option('rl.steps_per_generation')} to a multiple of it, or leave it out",
        )
    return options


def _draft_spec(reference: str) -> DraftSpec:
    """The spec of the draft adapter that writes completions."""
    path, name = find_checkpoint(reference), option("rl.draft")
    if not is_draft(path):
        raise Ar2DiffError(
            f"{name} {reference} is not a draft adapter: it has no {DRAFT_CONFIG}",
            "give a folder that 'ar2diff draft' wrote",
        )
    how = chosen() or ""
    if how.startswith(("zero3", "fsdp")):
        raise Ar2DiffError(
            f"{option('launch', how)} cannot be used with {name}: a draft adapter acts on whole "
            "layers, and it shards them",
            f"use {option('launch', 'ddp')} or {option('launch', 'zero2')}, or leave out {name}",
        )
    return read_draft_spec(path / DRAFT_CONFIG)
