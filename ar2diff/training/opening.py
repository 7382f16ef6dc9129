"""What a run is about to do, in a few lines before its first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config.recipe import Recipe
from ..distributed.launch import strategy_of
from ..distributed.precision import computes_in_bf16
from ..distributed.ranks import chosen, world_size
from .memory import ESTIMATED, held, measure
from .results import RunPlan
from .wording import amount, gigabytes

UNITS = {"draft": "rows", "rl": "completions"}  # of a step; rows, where it is not said


def needed_memory(path: Path, recipe: Recipe) -> int | None:
    """Bytes that each process of this run needs, as `ar2diff memory` estimates them; None if there
    is no estimate for such a run. Called before the trainer is made: after that, DeepSpeed would
    shard the model that is built for the estimate."""
    how = chosen() or "one"
    if how.endswith(".json"):
        how = strategy_of(how)[0]
    if how not in ESTIMATED:
        return None
    try:
        return sum(held(measure(path, recipe), recipe, how, world_size()).values())
    except Exception:  # an adapter, or an unusual model: no estimate is worth a run
        return None


def opening(
    verb: str,
    model: str,
    plan: RunPlan,
    recipe: Recipe,
    memory: int | None,
    details: Sequence[str] = (),
) -> list[str]:
    """The lines that describe a run.

    Args:
        model: as it was named. memory: of `needed_memory`. details: lines about the data.
    """
    lines = [f"{verb}: {model}, {_parameters(plan)}"]
    if verb == "draft":
        draft = recipe.draft
        said = f"drafts of {draft.block_length - 1} tokens, rank {draft.rank}"
        said += f", head of rank {draft.head_rank}" if draft.head_rank else ""
        lines.append(f"  adapter {said}; the model itself stays as it is")
    else:
        lines.append(f"  spec    {_spec(plan.diffusion)}")
    if plan.data is not None:
        lines.append(f"  data    {_data(plan)}")
    lines += details
    unit = UNITS.get(verb, "rows")
    lines += [
        f"  budget  {plan.steps:,} steps of {plan.rows_per_step:,} {unit}, at most "
        f"{amount(plan.tokens_at_most)} tokens",
        f"  output  {plan.output_dir}",
        f"  memory  {_memory(memory, recipe)}",
    ]
    total = memory_of_device()
    if memory is not None and total is not None and memory > total:
        lines.append(
            "warning: that is more than there is; lower train.per_device_train_batch_size, or set "
            "train.gradient_checkpointing=true"
        )
    return lines


def memory_of_device() -> int | None:
    """Bytes of memory of the device that training runs on; None if they are not known."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _parameters(plan: RunPlan) -> str:
    whole, trained = plan.parameters, plan.trainable_parameters
    if trained == whole:
        return f"{amount(whole)} parameters, all of them trained"
    return f"{amount(whole)} parameters, {amount(trained)} of them ({trained / whole:.1%}) trained"


def _spec(spec: dict[str, Any] | None) -> str:
    if spec is None:
        return "autoregressive (a control run)"
    blocks = f", blocks of {spec['block_length']}" if spec.get("block_length") else ""
    mode = "with" if spec["ar_mode"] else "without"
    return f"{spec['attention']} attention{blocks}, prediction {spec['prediction']}, {mode} AR mode"


def _data(plan: RunPlan) -> str:
    data = plan.data
    if data.count is None:
        said = f"{data.kind}, streamed"
    else:
        about = "" if data.exact else "about "
        said = f"{data.count:,} {data.kind}, {about}{amount(data.tokens)} tokens"
    if plan.eval_rows:
        source = " held out" if data.held_out else " of another file"
        said += f"; evaluated on {plan.eval_rows} rows{source}"
    return said


def _memory(memory: int | None, recipe: Recipe) -> str:
    if memory is None:
        return "not estimated for a run like this one"
    total = memory_of_device()
    of = f" of {gigabytes(total)}" if total is not None else ""
    each = " in each process" if world_size() > 1 else ""
    kind = "bfloat16" if computes_in_bf16(recipe.train.precision) else "float32"
    return f"about {gigabytes(memory)}{of}{each} (estimated), computing in {kind}"
