"""A forward pass that computes logits at chosen slots only, and the longest row that a model
accepts.

This file is copied into converted folders: it imports torch, the standard library and its
neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from .masked_lm import first_position

FACTORS = ("router_aux_loss_coef", "aux_loss_coef")  # names of the factor of the routers' loss


def context_length(model: Any) -> int | None:
    """The longest row that a model accepts, in tokens; None if its config does not say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - first_position(model)


def positions_of(model: Any, pos: Tensor) -> Tensor:
    """What the class of a model calls the positions of a text, which begin at 0."""
    first = first_position(model)
    return pos + first if first else pos


def rope_switches(config: Any) -> tuple[int, ...]:
    """Lengths at which a model changes its rotary factors (longrope, as in Phi-3): a forward that
    reaches beyond one of them turns all its keys by other factors, those of the longest row in it.
    Factors of type `dynamic` change beyond the context alone, where no row goes."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    found = {
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    }
    return tuple(sorted(length for length in found if length is not None))


def rope_regime(length: Tensor, switches: tuple[int, ...]) -> Tensor:
    """[R] which factors are used to read rows of the given lengths [R]: how many switches each
    exceeds."""
    return (length[:, None] > torch.tensor(switches, dtype=length.dtype)).sum(1)


def without_gradients(model: Any, compiled: bool = False) -> Any:
    """The context manager under which a model is read: `torch.inference_mode`, which takes an
    eighth less time than `torch.no_grad` where a token costs 1.5 ms. Not for models that may make
    tensors of their own in a forward and be trained after it: those with sharded or quantized
    weights, and those whose rotary factors change; nor for compiled ones, whose graphs and caches
    serve every caller."""
    if compiled:
        return torch.no_grad
    plain = all(
        type(p) is torch.nn.Parameter and not hasattr(p, "ds_id") for p in model.parameters()
    )
    fast = plain and not rope_switches(model.config)
    return torch.inference_mode if fast else torch.no_grad


def quiet_routers(model: Any) -> dict[str, bool]:
    """Arguments of a forward that computes no loss of its routers (mixtures of experts). A model
    whose config asks for that loss computes it in every forward, and needs a 2-D mask for it."""
    return {"output_router_logits": False} if _judges_routers(model) else {}


def router_loss(model: Any, output: Any) -> Tensor | float:
    """The router loss in an output of `output_at`, times the factor in the config; 0 if there is
    none."""
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return 0.0
    config = model.config.get_text_config()
    return loss * next(getattr(config, name) for name in FACTORS if hasattr(config, name))


def logits_at(
    model: Any, index: Tensor, inner: Any = None, cache: Any = None, **inputs: Any
) -> Tensor:
    """Logits [N, V] at the chosen slots only, from a head in float32 or better; arguments as of
    `output_at`."""
    return output_at(model, index, inner, cache, exact=True, **inputs).logits[0]


def output_at(
    model: Any,
    index: Tensor,
    inner: Any = None,
    cache: Any = None,
    real: Tensor | None = None,
    instead: Callable[[Any, Tensor], Tensor | None] | None = None,
    read: list[Tensor] | None = None,
    exact: bool = False,
    vectors: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """A forward's output whose logits [1, N, V] are those at the chosen slots only; the
    [B * S, V] tensor is never built.

    A pre-hook on the output embeddings picks the rows, so that the model's own soft caps and scales
    apply. The hooks do not touch the forwards of other threads.

    Args:
        model: a causal LM, wrapped (DDP) or not.
        index: [N] int, slots of the flattened [B * S].
        inner: the causal LM, if `model` is a wrapper that hides it.
        cache: a cache of transformers that holds the keys before the slots; theirs are added.
        real: [B, S] bool, True where a slot is not padding: the slots that count in the routers'
            loss, if the config asks for one.
        instead: called with the output embeddings and their input [N, H], while these are whole
            even where weights are sharded. The logits are then what it returns, of three
            dimensions, or of no slot if it returns None.
        read: gets the input [N, H] of the output embeddings.
        exact: whether a plain linear head computes in float32 although its inputs or weights have
            16 bits: logits that are rounded to 8 bits of precision have many ties.
        vectors: as of `showing`.
        inputs: input_ids [B, S], attention_mask, position_ids (which begin at 0).
    """
    inner, own = inner or model, get_ident()
    head, given = inner.get_output_embeddings(), []
    if "position_ids" in inputs:
        inputs["position_ids"] = positions_of(inner, inputs["position_ids"])

    def pick(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if get_ident() != own:
            return None
        states = args[0].flatten(0, 1)[index]
        if read is not None:
            read.append(states)
        if instead is not None or (exact and _rounds(module, states)):
            given.append(states)
            states = states[:0]  # the head itself computes nothing
        return (states.unsqueeze(0),)

    def compute(module: Any, _args: Any, _output: Tensor) -> Tensor | None:
        if get_ident() != own or not given:
            return None
        if instead is not None:
            return instead(module, given.pop())
        return _exact_product(module, given.pop()).unsqueeze(0)

    # Before the hooks of whatever shards the weights, which release them after the forward, and
    # gather them again when the gradient of what the module returned arrives.
    hooks = [head.register_forward_pre_hook(pick)]
    if instead is not None or exact:
        hooks.append(head.register_forward_hook(compute, prepend=True))
    if real is None:
        inputs |= quiet_routers(inner)
    elif _judges_routers(inner):
        # The causal LM computes the routers' loss by a 2-D mask; the layers below it get ours.
        mask, inputs["attention_mask"] = inputs["attention_mask"], real

        def swap(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            return (args, kwargs | {"attention_mask": mask}) if get_ident() == own else None

        hooks.append(inner.get_decoder().register_forward_pre_hook(swap, with_kwargs=True))
    try:
        with showing(inner, vectors):
            if cache is None:
                return model(**inputs, use_cache=False)
            return model(**inputs, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def showing(model: Any, vectors: Tensor | None) -> Iterator[None]:
    """Ids below 0 have embeddings of their own: -1 has the first of `vectors` [M, H]. The forwards
    of other threads are not touched. None changes nothing."""
    if vectors is None:
        yield
        return
    own, embeddings, ids = get_ident(), model.get_input_embeddings(), []

    def take(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if get_ident() != own:
            return None
        ids.append(args[0])
        return (args[0].clamp(min=0), *args[1:])

    def put(_module: Any, _args: Any, found: Tensor) -> Tensor | None:
        if get_ident() != own:
            return None
        given = ids.pop()
        at = (-1 - given).clamp(min=0)
        return torch.where((given < 0)[..., None], vectors.to(found)[at], found)

    hooks = [embeddings.register_forward_pre_hook(take), embeddings.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounds(model: Any) -> bool:
    """Whether a plain call of a model gives logits of 16 bits where `logits_at` does not."""
    return _rounds(model.get_output_embeddings(), model.get_input_embeddings().weight)


def _rounds(head: Any, states: Tensor) -> bool:
    """Whether a head is one linear layer, held whole, whose product would have 16 bits."""
    weight, kind = getattr(head, "weight", None), states.device.type
    if type(head) is not torch.nn.Linear or type(weight) is not torch.nn.Parameter:
        return False
    under = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    sizes = {dtype.itemsize for dtype in (weight.dtype, states.dtype, under)}
    return min(sizes) < 4 and weight.is_floating_point() and not hasattr(weight, "ds_id")


def _exact_product(head: Any, states: Tensor) -> Tensor:
    """The product of a linear layer in float32. A GPU multiplies numbers of 16 bits exactly, and
    sums in float32 anyway; a CPU has to widen them."""
    weight, bias = head.weight, head.bias
    with torch.autocast(states.device.type, enabled=False):
        if states.is_cuda and states.dtype == weight.dtype and not torch.is_grad_enabled():
            found = torch.mm(states, weight.T, out_dtype=torch.float32)
            return found if bias is None else found + bias
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(states.float(), weight.float(), bias)


def _judges_routers(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))
