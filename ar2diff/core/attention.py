"""The only place that decides which slot may read which: masks for every mode.

A row is laid out in *slots*. A slot has a document, a logical position in it, and belongs to the
noisy or to the clean copy. From these three the predicate of `allowed_edges` follows:

    query   key     may read if, in the same document,
    noisy   noisy   same block
    noisy   clean   the key's block comes before
    clean   clean   causal_context: the key is not later; block_causal: its block is not later
    clean   noisy   never
    (full: one copy, every slot reads every slot)

Where the base reads an image, or its prompt, in both directions, a clean slot also reads the keys
up to the end of that.

Where several continuations of a text are read at once, a clean key must also be on the query's own
branch.

Training lays out [noisy | clean] (BD3LM, Arriola et al. 2025, section 3.2), decoding
[clean context | noisy block], the AR mode only clean slots, and speculation several noisy blocks
that start anywhere: one rule serves them all.
This file is copied into converted folders: it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Predicate = Callable[[Any, Any, Any, Any], Tensor]
PADDING = -1  # the document of a slot that holds no token
CLEAN = "clean_from"  # attribute of a mask: the column at which the clean copy begins


@dataclass(frozen=True)
class Slots:
    """Layout of a batch of rows.

    Attributes:
        doc: [B, S] int, the document a slot belongs to; `PADDING` for none.
        pos: [B, S] int, logical position in the document (its first real token is 0).
        noisy: [B, S] bool, slot of the copy that is being denoised.
        start: [B, S] int, first position of a noisy slot's block; None: blocks lie on the grid.
        block: [B, S] int, which noisy slots are of one block; None: those with the same `start`.
        enter, leave: [B, S] int, where texts branch: a depth-first walk over the tree of tokens
            enters a clean slot as number `enter` and leaves what follows it before `leave`, and a
            slot reads those that are open when it is entered. None: no text branches.
        until: [B, S] int, the last position that a clean slot reads; None: its own.
        clean: the column from which on every slot is of the clean copy, where all columns before it
            are of the noisy one; None: rows are laid out in another way.
    """

    doc: Tensor
    pos: Tensor
    noisy: Tensor
    start: Tensor | None = None
    block: Tensor | None = None
    enter: Tensor | None = None
    leave: Tensor | None = None
    until: Tensor | None = None
    clean: int | None = None


def lay_out(
    xt: Tensor, x0: Tensor, doc: Tensor, pos: Tensor, attention: str
) -> tuple[Tensor, Slots]:
    """Input ids [B, S] and slots of the training forward: S = L for `full`, else 2L.

    Args:
        xt, x0, doc, pos: [B, L] noised ids, clean ids, documents, logical positions.
        attention: the attention in the spec.
    """
    noisy = torch.ones_like(doc, dtype=torch.bool)
    if attention == "full":
        return xt, Slots(doc, pos, noisy)
    return torch.cat([xt, x0], 1), Slots(
        torch.cat([doc, doc], 1),
        torch.cat([pos, pos], 1),
        torch.cat([noisy, ~noisy], 1),
        clean=doc.shape[1],
    )


def reading_slot(
    pos: Tensor,
    attention: str,
    block_length: int | None,
    prediction: str,
    own: Tensor | None = None,
    clean: Tensor | None = None,
) -> Tensor:
    """Slot at which the token of each position is predicted.

    `same`: its own noisy slot. `shift`: the slot before it; the first token of a block b >= 1
    is read at the clean copy's last position before the block, since the noisy copy of block
    b - 1 does not exist when decoding.

    Args:
        pos: [B, L] logical positions (any shape where `own` and `clean` are given).
        own: slot of each token's noisy copy. The default is the layout of `lay_out`.
        clean: slot of each token's clean copy; pass `own` where the clean context lies directly
            before the block, as in decoding.

    Returns:
        int slots in the shape of `pos`; meaningless at position 0, which is never predicted.
    """
    if own is None:
        own = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
        clean = own + pos.shape[1]
    if prediction == "same":
        return own
    before = own - 1
    if attention != "full":
        before = torch.where((pos % block_length == 0) & (pos > 0), clean - 1, before)
    return before.clamp(min=0)


def allowed_edges(
    slots: Slots,
    attention: str,
    block_length: int | None,
    reveal: Tensor | None = None,
    window: int | None = None,
) -> Predicate:
    """The predicate `(b, h, q, k) -> bool` over slot indices that every back end uses.

    Args:
        slots: layout of the rows.
        attention, block_length: the goal (`full` has no block length).
        reveal: [P, W] bool or None: an edge that a causal model lacks, from position p to p',
            exists only where `reveal[p, p' % W]`; W is the block length (P for `full`). None: all.
        window: sliding window of the layer, in logical positions.
    """
    doc, pos, noisy = slots.doc, slots.pos, slots.noisy
    if slots.start is not None:
        start = slots.start
    else:
        start = pos if attention == "full" else pos // block_length * block_length
    block = start if slots.block is None else slots.block

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Tensor:
        pos_q, pos_k = pos[b, q], pos[b, k]
        if attention == "full":
            edge = torch.ones_like(pos_q == pos_k)
        else:
            start_q = start[b, q]
            until_q = pos_q if slots.until is None else slots.until[b, q]
            past = pos_k <= until_q
            if attention == "block_causal":
                past = past | (pos_k < start_q + block_length)
            to_clean = torch.where(noisy[b, q], pos_k < start_q, past)
            if slots.enter is not None:
                enter_q = slots.enter[b, q]
                to_clean = to_clean & (slots.enter[b, k] <= enter_q) & (enter_q < slots.leave[b, k])
            edge = torch.where(noisy[b, k], noisy[b, q] & (block[b, q] == block[b, k]), to_clean)
        backward = pos_k <= pos_q if slots.until is None else pos_k <= slots.until[b, q]
        if window is not None:
            # transformers' causal window holds `window` tokens, its bidirectional one reaches
            # `window` tokens either way; `full` must equal the latter, blocks extend the former.
            backward = backward & (pos_q - pos_k < window)
            reach = window if attention == "full" else window - 1
            near = (pos_q - pos_k).abs() <= reach
            if slots.until is not None:  # an image is read to its end, however far that is
                near = near | (backward & (pos_k > pos_q))
            edge = edge & near
        if reveal is not None:
            edge = edge & (backward | reveal[pos_q, pos_k % reveal.shape[1]])
        # Documents and padding are ANDed last: the anneal must not reopen them.
        edge = edge & (doc[b, q] == doc[b, k]) & (doc[b, q] != PADDING)
        return edge | (q == k)  # a row with nothing to read is NaN under eager

    return allowed


def reveal_edges(
    ratio: float, length: int, width: int, seed: int, step: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Which look-ahead edges exist while annealing: Bernoulli(ratio) per edge (DiffuGPT, Gong et
    al. 2024), drawn from (seed, step) over logical positions, so that ranks, packing and resume
    change nothing.

    Returns:
        [length, width] bool for `allowed_edges`; None once ratio reaches 1.
    """
    if ratio >= 1:
        return None
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return (torch.rand(length, width, generator=generator) < ratio).to(device)


def dense_mask(allowed: Predicate, slots: Slots, queries: range | None = None) -> Tensor:
    """The predicate written out: [B, 1, Q, S] bool, True where the query may read the key.

    Args:
        queries: the slots that read; None: all. The others stand in a cache.
    """
    size, device = slots.doc.shape[1], slots.doc.device
    b = torch.arange(slots.doc.shape[0], device=device)[:, None, None]
    k = torch.arange(size, device=device)
    q = k if queries is None else k[queries.start : queries.stop]
    return allowed(b, 0, q[None, :, None], k[None, None, :]).unsqueeze(1)


def layer_windows(config: Any, local_window: str | None) -> dict[str | None, int | None]:
    """Sliding window of each kind of layer: {layer type: window}; {None: window} if all are alike.

    Args:
        config: the model's (text) config.
        local_window: the value in the spec; `dropped` ignores the windows of the base.
    """
    size = getattr(config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [None]))
    windows = {kind: size if kind is None or kind.startswith("sliding") else None for kind in kinds}
    if local_window == "dropped":
        windows = dict.fromkeys(windows)
    sizes = {*windows.values()}
    return windows if len(sizes) > 1 else {None: sizes.pop()}


def with_context(mask: Tensor, seen: Tensor, held: Tensor | None = None) -> Tensor:
    """The mask of slots that follow a cached context, from the mask of the slots alone: each slot
    reads all of the context, which is what every rule above says if there is no window.

    Args:
        mask: [B or 1, 1, Q, S] of `model_mask`, bool or to be added. seen: [B, C] bool.
        held: [B, 1, Q, C + S + ...] mask of a static cache, to be written in place; the columns
            after the slots are empty.
    """
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, blocked)
    if held is None:
        size = (len(seen), 1, mask.shape[2], seen.shape[1])
        mask = mask.expand(len(seen), -1, -1, -1)
        return torch.cat([seen[:, None, None].expand(size), mask], -1)
    columns = seen.shape[1]
    held[..., :columns] = seen[:, None, None]
    held[..., columns : columns + mask.shape[3]] = mask
    held[..., columns + mask.shape[3] :] = blocked
    return held


@cache
def _maker_of_block_masks(compiled: bool) -> Callable[..., Any]:
    """The function that makes a BlockMask. On a GPU it is compiled, once for each shape, so that
    the mask is never written out: of a row of 8,192 slots that would be 64 MB."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask


def model_mask(
    model: Any,
    slots: Slots,
    attention: str,
    block_length: int | None,
    local_window: str | None,
    reveal: Tensor | None = None,
    queries: range | None = None,
) -> Any:
    """`attention_mask` for the model's attention implementation, from the one predicate.

    sdpa takes the bool tensor; eager *adds* its mask, so it gets finfo.min (a bool there is +1
    and silently means full attention); flex takes a BlockMask. A model whose layers differ in
    their window gets a dict by layer type. Where the layout says at which column the clean copy
    begins, sdpa's tensor does so too, in its attribute `CLEAN`: no clean slot reads one before it.

    Raises:
        ValueError: an attention implementation that takes no mask of our own.
    """
    config = model.config.get_text_config()
    kind = config._attn_implementation

    def build(window: int | None) -> Any:
        allowed = allowed_edges(slots, attention, block_length, reveal, window)
        if kind == "flex_attention":
            batch, size = slots.doc.shape
            make = _maker_of_block_masks(slots.doc.is_cuda)
            first, read = (queries.start, len(queries)) if queries else (0, size)

            def of_queries(b: Any, h: Any, q: Any, k: Any) -> Tensor:
                return allowed(b, h, q + first, k)

            return make(of_queries, batch, None, read, size, device=slots.doc.device)
        mask = dense_mask(allowed, slots, queries)
        if kind == "sdpa":
            if queries is None and slots.clean is not None:
                setattr(mask, CLEAN, slots.clean)
            return mask
        if kind == "eager":
            dtype = model.get_input_embeddings().weight.dtype
            blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
            return torch.where(mask, torch.zeros_like(blocked), blocked)
        raise ValueError(
            f"attention implementation {kind!r} does not accept a mask; use sdpa, eager or flex"
        )

    masks = {name: build(window) for name, window in layer_windows(config, local_window).items()}
    return masks[None] if None in masks else masks
