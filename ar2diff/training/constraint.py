"""The constraint of rollouts, where `rl.sampler` has one: it is tried before the weights are
loaded, and says what the AR mode could not write where its likelihood is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from ..checkpoint.files import GENERATION, read_json
from ..checkpoint.kinds import outline_of
from ..checkpoint.model import Checkpoint, load_config, load_tokenizer
from ..config.recipe import Recipe, with_values
from ..config.rl import Rl
from ..core.errors import Ar2DiffError, option
from ..core.generate import canvas_of
from ..core.options import Options
from ..core.pattern import pattern_of
from ..core.spec import CAUSAL, Spec
from ..generation.complete import constrained, settings_of
from ..generation.prompts import read_schema
from ..generation.tokens import prompt_ids
from .prompts import with_placeholders
from .rollouts import Rollout, sampler_settings


@contextmanager
def as_in_recipe() -> Iterator[None]:
    """Errors about options of the sampler name them as a recipe of rl does."""
    try:
        yield
    except Ar2DiffError as error:
        names = {"rl.sampler.max_new_tokens": "rl.max_completion_length"}
        raise error.within("rl.sampler").named(
            lambda name, value: option(names.get(name, name), value)
        ) from None


@as_in_recipe()
def with_schema(recipe: Recipe) -> Recipe:
    """The recipe with a JSON schema in place of the name of its file, so that the run's record
    holds what the completions were held to.

    Raises:
        Ar2DiffError: the file cannot be read.
    """
    named = recipe.rl.sampler.get("json_schema")
    if not isinstance(named, str) or named.lstrip().startswith("{"):
        return recipe
    return with_values(
        recipe, rl={"sampler": {**recipe.rl.sampler, "json_schema": read_schema(Path(named))}}
    )


@as_in_recipe()
def check_constraint(path: Path, spec: Spec | None, options: Options) -> None:
    """Refuse a constraint that completions cannot be held to, without loading the weights.

    Args:
        path: folder of the model.

    Raises:
        Ar2DiffError: a library is missing, the expression or schema cannot be used, or no text that
            matches fits the room.
    """
    if pattern_of(options) is None and options.grammar is None:
        return
    config, tokenizer = load_config(path), load_tokenizer(path)
    stored = read_json(path / GENERATION, "") if (path / GENERATION).is_file() else {}
    model = outline_of(config)
    model.generation_config = SimpleNamespace(eos_token_id=stored.get("eos_token_id"))
    checkpoint = Checkpoint(path, model, tokenizer, spec, {})
    barred = checkpoint.suppressed.nonzero()[:, 0].tolist()
    options = replace(
        options,
        eos_token_id=options.eos_token_id or tuple(checkpoint.end_ids),
        suppress_tokens=(*options.suppress_tokens, *barred),
    )
    no_mask = replace(CAUSAL, mask_token_id=len(checkpoint.suppressed))
    canvas = canvas_of(model, spec or no_mask, [prompt_ids(tokenizer, "a")], options)
    constrained(checkpoint, options, canvas, None)


def barred_tokens(
    checkpoint: Checkpoint, rl: Rl, rollouts: Sequence[Rollout], suppressed: Tensor
) -> Tensor:
    """Which tokens the sampler could not write: [V] bool, or [N, V] for each of the N tokens of the
    rollouts' answers, one answer after the other, where the AR mode was held to a constraint. There
    the tokens before decide what is allowed, and the estimator `ar` scores what was drawn from.

    Args:
        suppressed: [V] bool, those that it writes nowhere.
    """
    if rl.estimator != "ar":
        return suppressed
    spec, options = settings_of(checkpoint, sampler_settings(rl))
    prompts = [
        with_placeholders(checkpoint, rollout.ids[: rollout.prompt].tolist())
        for rollout in rollouts
    ]
    canvas = canvas_of(checkpoint.model, spec, prompts, options)
    constraint = constrained(checkpoint, options, canvas, None).constraint
    if constraint is None:
        return suppressed
    rows, positions, states = [], [], []
    for row, rollout in enumerate(rollouts):
        state = constraint.state(row, rollout.prompt)
        for position, token in enumerate(rollout.answer_ids, rollout.prompt):
            rows.append(row)
            positions.append(position)
            states.append(state)
            state = constraint.step(state, token)
    allowed = constraint.tokens(constraint.allowed(rows, positions, states))
    return ~allowed.to(suppressed.device)
