"""`rl`: a converted model, prompts and rewards in, a model that earns more out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from trl import GRPOConfig

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..core.forward import context_length
from ..core.options import resolve
from ..core.spec import CAUSAL, Spec
from ..data.chat_template import chat_template
from ..data.columns import likely_prompt
from ..data.conversations import read_rows
from ..data.rows import as_dataset
from ..data.sources import columns_of
from ..distributed.ranks import check_rows, world_size
from ..generation.tokens import prompt_ids
from ..rewards.loading import PASSED, make_rewards
from .arguments import training_arguments
from .grpo import DiffusionGRPOTrainer
from .plan import Plan, Verb, check_kind
from .request import requested
from .results import Prompt, RlPlan, RunPlan, RunResult
from .run import run

RESERVED = (*PASSED, "image", "images", "environments")  # what a column may not be called


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
    """Tune a converted model (or, with `objective.kind: ar`, an AR one) by its rewards.

    Args:
        model: folder or Hub id of the model, `@revision` allowed.
        recipe: with a section `rl`; else as of `adapt`.
        data: files of prompts, in place of the recipe's `data.sources`.
        output_dir, text_field, max_steps, overrides, resume, overwrite, dry_run: as of `adapt`; at
            least one step.

    Returns:
        What the run was; with `dry_run` an `RlPlan` of what it will be.

    Raises:
        Ar2DiffError: something the user can fix; nothing was written.
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
    check_settings(recipe, spec)
    return recipe


@dataclass(frozen=True)
class Judged:
    """Rows with prompts, and the rewards that judge their completions."""

    rows: list[dict[str, Any]]
    rewards: list[Any]


def read(recipe: Recipe) -> Judged:
    """The rewards of a recipe, and the prompts of its sources."""
    rewards = make_rewards(recipe.rl.rewards)
    rows = read_prompts(recipe)
    check_rows(len(rows))
    return Judged(rows, rewards)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, judged: Judged) -> Plan:
    """The plan of a run on prompts; gives the tokenizer the chat template of the run."""
    rows, rewards = judged.rows, judged.rewards
    if not isinstance(rows[0]["prompt"], str):
        # What the assistant says need not be marked: nothing is learned from given answers.
        plain = with_values(recipe, data={"assistant_only": False})
        checkpoint.tokenizer.chat_template = chat_template(checkpoint.tokenizer, plain)
    check_lengths(checkpoint, recipe, rows)

    def make(plan: Plan, run_dir: Path, callbacks: list[Any]) -> DiffusionGRPOTrainer:
        return make_trainer(plan, rewards, run_dir, callbacks)

    def preview(plan: Plan, summary: RunPlan) -> RlPlan:
        tokenizer = plan.checkpoint.tokenizer
        ids = prompt_ids(tokenizer, rows[0]["prompt"])
        return RlPlan(
            **asdict(summary),
            prompts=len(rows),
            first_prompt=Prompt(tokenizer.decode(ids), len(ids)),
            rewards=tuple(getattr(reward, "__name__", reward) for reward in rewards),
        )

    return Plan(checkpoint, recipe, rows, make, preview=preview)


RL = Verb("rl", check, read, make_plan, converts=False)


def make_trainer(
    plan: Plan, rewards: list[Any], run_dir: Path, callbacks: list[Any]
) -> DiffusionGRPOTrainer:
    """The trainer of a plan on rows of `read_prompts`."""
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
        reward_weights=[reward.weight for reward in rl.rewards],
        disable_dropout=True,  # else two scores of one policy differ, and the ratio is noise
    )
    return DiffusionGRPOTrainer(
        plan.checkpoint, plan.recipe, args, as_dataset(plan.rows), rewards, callbacks=callbacks
    )


def check_settings(recipe: Recipe, spec: Any) -> None:
    """Refuse settings that would give a wrong run, before anything is loaded.

    Raises:
        Ar2DiffError: naming the setting.
    """
    rl, spec = recipe.rl, spec or CAUSAL
    if not rl.rewards:
        raise Ar2DiffError(
            f"{option('rl.rewards')} is empty",
            "name at least one reward; see 'ar2diff config schema rl'",
        )
    modes = ("ar", "speculative") if rl.estimator == "ar" else ("diffusion",)
    mode = rl.sampler.get("mode", modes[0])
    if mode not in modes:
        raise Ar2DiffError(
            f"{option('rl.sampler.mode')} {shortened(mode)} does not write completions that "
            f"{option('rl.estimator')} {rl.estimator} can score",
            f"set it to {modes[0]}",
        )
    if rl.estimator == "ar" and not spec.ar_mode:
        raise Ar2DiffError(
            f"{option('rl.estimator', 'ar')} needs an AR mode, which the model does not have",
            "choose another estimator",
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
            "set it to 0; it is for full attention",
        )
    grid = spec.block_length
    if grid is not None and rl.sampler.get("block_length", grid) != grid:
        raise Ar2DiffError(
            f"{option('rl.sampler.block_length')} differs from the model's {grid}: completions "
            "would be scored on another grid than they are written on",
            "leave it out",
        )
    if rl.sampler.get("remask") and rl.estimator == "trajectory":
        raise Ar2DiffError(
            f"{option('rl.sampler.remask')} lets a token be decided twice, and the trajectory "
            "estimator scores each token in the one step that decided it",
            f"leave it out, or set {option('rl.estimator', 'elbo')}",
        )
    if rl.estimator == "spg" and rl.beta:
        raise Ar2DiffError(
            f"{option('rl.beta')} cannot be used with the spg estimator, whose bound for bad "
            "completions has no KL",
            "set it to 0",
        )
    if rl.loss_type == "cispo" and (rl.epsilon_high or rl.epsilon) < 1:
        raise Ar2DiffError(
            f"{option('rl.epsilon_high')} is the largest ratio itself in the cispo loss; below 1 "
            "it cuts every ratio",
            "set it, for example to 5",
        )
    if recipe.peft is not None and recipe.peft.dropout:
        raise Ar2DiffError(
            f"{option('peft.dropout')} makes two scores of one policy differ, and their ratio "
            "noise",
            "set it to 0",
        )
    try:
        resolve(spec, {**rl.sampler, "mode": mode, "max_new_tokens": rl.max_completion_length})
    except Ar2DiffError as error:
        raise error.within("rl.sampler") from None
    train = recipe.train
    steps = rl.steps_per_generation or train.gradient_accumulation_steps
    completions = train.per_device_train_batch_size * steps * world_size()
    if completions % rl.num_generations:
        raise Ar2DiffError(
            f"a generation has {completions} completions, which is not a multiple of "
            f"{option('rl.num_generations')} {rl.num_generations}",
            f"change {option('train.per_device_train_batch_size')} or "
            f"{option('rl.num_generations')}",
        )
    if train.gradient_accumulation_steps % steps and steps % train.gradient_accumulation_steps:
        raise Ar2DiffError(
            f"with {option('rl.steps_per_generation')} {steps} and "
            f"{option('train.gradient_accumulation_steps')} {train.gradient_accumulation_steps}, "
            "an update would mix generations",
            "make one a multiple of the other",
        )
    if rl.num_iterations > 1 and steps % train.gradient_accumulation_steps:
        raise Ar2DiffError(
            f"{option('rl.num_iterations')} is {rl.num_iterations}, but with "
            f"{option('rl.steps_per_generation')} {steps} below "
            f"{option('train.gradient_accumulation_steps')} {train.gradient_accumulation_steps} "
            "several iterations would be one update",
            f"set {option('rl.steps_per_generation')} to a multiple of it, or leave it out",
        )


def check_lengths(checkpoint: Checkpoint, recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    """Refuse prompts that leave no room for a completion.

    Raises:
        Ar2DiffError: naming the first row.
    """
    tokenizer, longest = checkpoint.tokenizer, context_length(checkpoint.model.config)
    for number, row in enumerate(rows, 1):
        try:
            count = len(prompt_ids(tokenizer, row["prompt"]))
        except (ValueError, TypeError, TemplateError) as error:
            raise Ar2DiffError(
                f"the chat template does not render prompt {number}: {first_line(error)}",
                f"fix the prompt, or set {option('data.chat_template')} to another template",
            ) from error
        if longest is not None and count + recipe.rl.max_completion_length > longest:
            raise Ar2DiffError(
                f"prompt {number} has {count} tokens; with {option('rl.max_completion_length')} "
                f"{recipe.rl.max_completion_length} that exceeds the model's context of {longest}",
                f"remove the prompt, or lower {option('rl.max_completion_length')}",
            )


def read_prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of all sources with `prompt` (a text, or with `rl.chat` what the user says in it) and
    the columns that rewards read.

    Raises:
        Ar2DiffError: naming the file and the row that has none.
    """
    rows = [_prompt(row, where, recipe) for where, row in read_rows(recipe)]
    if len({type(row["prompt"]) for row in rows}) > 1:
        raise Ar2DiffError(
            "some prompts are texts and some are lists of messages",
            f"set {option('rl.chat', True)}, or give prompts of one kind",
        )
    return rows


def _prompt(row: dict[str, Any], where: str, recipe: Recipe) -> dict[str, Any]:
    prompt = row.get("prompt")
    chat = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not chat and not (isinstance(prompt, str) and prompt):
        likely = option("data.columns.prompt", likely_prompt(row) or "COLUMN")
        raise Ar2DiffError(
            f"{where} has no prompt that is text or messages (it has {columns_of(row)})",
            f"correct the row, or name its column with {likely}",
        )
    row = {k: v for k, v in row.items() if k not in ("completion", "messages", "completion_ids")}
    for name in RESERVED:
        if name in row:
            raise Ar2DiffError(
                f"{where}: trl itself uses the name {name!r}, so no column may have it",
                "rename the column",
            )
    if recipe.rl.chat and not chat:
        row["prompt"] = [{"role": "user", "content": prompt}]
    return row


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
