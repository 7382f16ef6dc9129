"""Parts of a model that training looks up or changes: layers, dropout, kinds of parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def disable_dropout(model: Any) -> None:
    """Set every dropout to 0, except an adapter's, which the recipe asks for: dropout is noise
    that none of our seeds controls, and masking regularizes enough."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def frozen_copy(model: Any) -> Any:
    """A copy of a model in eval mode, without gradients. It has a config of its own, because a
    forward writes on the config for the time of the call."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def layers_of(model: Any) -> list[Any]:
    """The decoder layers: the longest module list that is a direct child of the decoder."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = [m for m in inner.get_decoder().children() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place with torch.compile: one graph serves all layers, weights
    keep their names, and whatever surrounds the layers (hooks on the head) is untouched."""
    for layer in layers_of(model):
        layer.compile()


def parameter_kinds(model: Any) -> dict[Tensor, str]:
    """The kind of each parameter: attention, mlp, embeddings or other (norms, biases).

    Attention modules are those that say whether they are causal, as all of transformers' do.
    """
    kinds: dict[Tensor, str] = {}
    attention = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for kind, modules in (
        ("embeddings", [*embeddings, model.get_input_embeddings(), model.get_output_embeddings()]),
        ("attention", attention),
    ):
        for module in modules:
            for parameter in module.parameters():
                kinds.setdefault(parameter, kind if parameter.ndim > 1 else "other")
    for parameter in model.parameters():
        kinds.setdefault(parameter, "mlp" if parameter.ndim > 1 else "other")
    return kinds


def unwrapped(model: Any) -> Any:
    """The causal LM under peft's wrapper, in which the adapters act all the same."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
