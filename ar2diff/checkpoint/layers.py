"""The linear layers of a model, by name and by what they do: where adapters add to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..core.errors import Ar2DiffError, nearest, option, shortened
from ..core.forward import quiet_routers
from .towers import part_of


def named_layers(model: Any, wanted: str | tuple[str, ...], key: str) -> list[str]:
    """Full names of the linear layers that a recipe names, which never include the output head. Of
    a vision-language model, those of its language model; a name that matches none of them may be
    one of the tower or the projector.

    Args:
        wanted: `all-linear`, or the last parts of names. key: the field of the recipe.

    Raises:
        Ar2DiffError: a name matches no linear layer, or the output head.
    """
    head = model.get_output_embeddings()
    linear = {
        name: module is head
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    layers = [name for name, is_head in linear.items() if not is_head]
    parts = part_of(model)
    reads = {name for name in linear if parts.get(f"{name}.weight") == "language_model"}
    if wanted == "all-linear":
        return [name for name in layers if name in reads]
    found: set[str] = set()
    for target in wanted:
        matched = [name for name in linear if f".{name}".endswith(f".{target}")]
        matched = [name for name in matched if name in reads] or matched
        if any(linear[name] for name in matched):
            raise Ar2DiffError(
                f"{option(key)}: {target} is the output head, to which adapters are not applied",
                "leave it out; the embedding of the mask token is trained separately",
            )
        if not matched:
            names = sorted({name.rpartition(".")[2] for name in layers})
            raise Ar2DiffError(
                f"{option(key)}: {target} does not match any linear layer in the model"
                f"{nearest(target, names)}",
                f"choose from {', '.join(names)}, or use all-linear for all of them",
            )
        found.update(matched)
    return [name for name in layers if name in found]


def draft_layers(model: Any, wanted: str | tuple[str, ...], key: str) -> list[str]:
    """Full names of the layers that a draft adapter adds to. Finds out by a forward pass which
    layers read a row slot by slot, as the gate needs, and which one each attention module calls
    last.

    Args:
        wanted: as for `named_layers`, or `attention-output`. key: the field of the recipe.

    Raises:
        Ar2DiffError: as `named_layers`; a layer does not read slot by slot; or there is no
            attention module with a linear layer.
    """
    by_slot, last = _called(model)
    if wanted == "attention-output":
        if not last:
            raise Ar2DiffError(
                f"{option(key, wanted)} finds no attention module that calls a linear layer",
                f"set {option(key)} to all-linear, or to a list of names",
            )
        return last
    layers = named_layers(model, wanted, key)
    if wanted != "all-linear":
        for name in layers:
            if name not in by_slot:
                raise Ar2DiffError(
                    f"{option(key)}: {shortened(name)} does not read a row slot by slot, so a "
                    "draft adapter cannot skip the clean slots there",
                    "leave it out",
                )
    return [name for name in layers if name in by_slot]


@torch.no_grad()
def _called(model: Any) -> tuple[set[str], list[str]]:
    """Names of the linear layers that see [B, S, inputs] exactly once in a forward; and, in order,
    the one that each attention module calls last."""
    slots = 3
    calls: list[tuple[str, bool]] = []
    last: dict[str, str] = {}
    head = model.get_output_embeddings()
    attention = [
        name for name, m in model.named_modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]

    def note(name: str) -> Any:
        around = max((a for a in attention if name.startswith(f"{a}.")), key=len, default=None)

        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args else None
            fits = isinstance(given, Tensor) and given.shape[:-1] == (1, slots)
            calls.append((name, fits))
            if around is not None and fits:
                last[around] = name

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]
    try:
        ids = torch.zeros(1, slots, dtype=torch.long, device=model.device)
        model(input_ids=ids, use_cache=False, **quiet_routers(model))
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in calls]
    return {name for name, fits in calls if fits and names.count(name) == 1}, list(last.values())
