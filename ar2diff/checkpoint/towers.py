"""The parts of a vision-language model: the tower that sees images, the projector that turns what
it sees into embeddings, and the language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..core.images import image_token_of

PARTS = ("tower", "projector", "language_model")


def part_of(model: Any) -> dict[str, str]:
    """The part of each parameter, by name; of a model of text all are the language model's.

    The tower is the module around the longest list of layers outside of the decoder; the projector
    is what else lies outside, and what in that module comes after the layers and reads several of
    their states at once (as the patch merger of Qwen2-VL does).
    """
    names = [name for name, _ in model.named_parameters()]
    if image_token_of(model.config) is None:
        return dict.fromkeys(names, "language_model")
    own = _inside(model, model.get_decoder()) | _inside(model, model.get_output_embeddings())
    own |= _inside(model, model.get_input_embeddings())
    parts = {name: "language_model" if name in own else "projector" for name in names}
    stack = max(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and not _within(model, name, own)
        ),
        key=lambda found: len(found[1]),
        default=None,
    )
    if stack is None:
        return parts
    path, layers = stack
    tower, merged = _tower_of(model, path, own), _reading_several(model, path, layers)
    for name in names:
        if name not in own and name.startswith(tower):
            parts[name] = "projector" if name.startswith(merged) else "tower"
    return parts


def freeze(model: Any, parts: tuple[str, ...]) -> None:
    """Keep the parameters of some parts as they are. Adapters on them are trained all the same."""
    found = part_of(model)
    for name, parameter in model.named_parameters():
        if found[name] in parts:
            parameter.requires_grad_(False)


def trains_images(model: Any) -> bool:
    """Whether anything is trained that makes the features of images."""
    parts = part_of(model)
    return any(p.requires_grad and parts[n] != PARTS[-1] for n, p in model.named_parameters())


def _inside(model: Any, part: Any) -> set[str]:
    held = {*map(id, part.parameters())} if part is not None else set()
    return {name for name, p in model.named_parameters() if id(p) in held}


def _within(model: Any, path: str, names: set[str]) -> bool:
    """Whether the parameters of a module, or those around it, are among some names."""
    return any(name.startswith(f"{path}.") for name in names)


def _tower_of(model: Any, path: str, own: set[str]) -> str:
    """The beginning of the names in the largest module around a list of layers that holds nothing
    of the language model, nor a sibling of the tower."""
    names = [name for name, _ in model.named_parameters()]
    parents = path.split(".")
    for depth in range(1, len(parents) + 1):
        prefix = ".".join(parents[:depth]) + "."
        if not any(name.startswith(prefix) for name in own) and any(
            name.startswith(prefix) for name in names
        ):
            return prefix
    raise ValueError(f"{path} has no parameters")


def _reading_several(model: Any, path: str, layers: Any) -> tuple[str, ...]:
    """The beginnings of the names of modules after a list of layers, beside it, whose first linear
    layer reads several of the layers' states at once."""
    around, _, own = path.rpartition(".")
    width = next(m.in_features for m in layers.modules() if isinstance(m, torch.nn.Linear))
    found, after = [], False
    for name, module in model.get_submodule(around).named_children():
        if after and any(x > width and x % width == 0 for x in _first_width(module)):
            found.append(f"{around}.{name}.")
        after |= name == own
    return tuple(found)


def _first_width(module: Any) -> Iterator[int]:
    """What the first linear layer in a module reads, if it has any."""
    linear = (m.in_features for m in module.modules() if isinstance(m, torch.nn.Linear))
    yield from [width for width, _ in zip(linear, range(1), strict=False)]
