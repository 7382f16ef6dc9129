"""Parts of a model that training looks up or changes: layers, dropout, kinds of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..checkpoint.towers import part_of
from ..core.attention import CLEAN
from ..core.head import ATTRIBUTE

FLEX_LENGTH = 1024  # tokens in a row from which flex attention pays


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


def flex_in_one_dtype() -> None:
    """Have flex attention get queries, keys and values of one dtype. Under autocast the rotary
    factors turn queries and keys to float32, and flex is not among the functions that autocast
    casts for."""
    AttentionInterface.register("flex_attention", _flex_in_one_dtype)


def _flex_in_one_dtype(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    value = args[0] if args else kwargs["value"]
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention.flex_attention_forward(module, query, key, *args, **kwargs)


def sdpa_in_parts() -> None:
    """Have sdpa attend in two calls where the mask tells at which slot the clean copy begins."""
    AttentionInterface.register("sdpa", sdpa_of_parts)


def sdpa_of_parts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, but noisy and clean slots attend in a call each, the latter to the clean
    copy alone: a quarter of the products, all of which the mask forbids, is left out. Both masks
    are parts of the one that was built.

    Args:
        query, key, value: [B, heads, S, D]. attention_mask: [B, 1, S, S] of `model_mask`.

    Returns:
        [B, S, heads, D], and None for the weights.
    """

    def attend(queries: slice, keys: slice) -> Tensor:
        read, mask = (key[:, :, keys], value[:, :, keys]), attention_mask[:, :, queries, keys]
        return sdpa_attention_forward(module, query[:, :, queries], *read, mask, **kwargs)[0]

    # A model that changes the mask makes a new tensor, which lacks the attribute. A graph that is
    # compiled for rows of any length would fix the strides of the parts to those of one length.
    clean = getattr(attention_mask, CLEAN, None)
    if clean is None or torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    halves = attend(slice(clean), slice(None)), attend(slice(clean, None), slice(clean, None))
    return torch.cat(halves, 1), None


def flex_pays(model: Any, length: int, device: torch.device) -> bool:
    """Whether rows of `length` tokens are trained faster with flex attention, which skips the
    blocks of [noisy | clean] that the mask forbids, and which a model can use in place of sdpa."""
    known = getattr(model, "_supports_flex_attn", False)
    stock = model.config.get_text_config()._attn_implementation == "sdpa"
    return device.type == "cuda" and length >= FLEX_LENGTH and known and stock


@contextmanager
def attending_with(model: Any, kind: str | None) -> Iterator[None]:
    """Have a model use another attention implementation meanwhile; None: its own."""
    config = model.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation = kind or own
    try:
        yield
    finally:
        config._attn_implementation = own


def parameter_kinds(model: Any) -> dict[Tensor, str]:
    """The kind of each parameter: attention, mlp, embeddings, diffusion_head or other (norms,
    biases), and of a vision-language model tower and projector.

    Attention modules are those that say whether they are causal, as all of transformers' do.
    """
    inner = unwrapped(model)
    head = getattr(inner, ATTRIBUTE, None)
    kinds = {} if head is None else dict.fromkeys(head.parameters(), "diffusion_head")
    parts, named = part_of(inner), inner.named_parameters()
    kinds |= {p: parts[name] for name, p in named if parts[name] != "language_model"}
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
