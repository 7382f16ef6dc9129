"""The prompts in a call of `generate`: what its tensors mean, row by row.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError, option, shortened
from .options import Options


def check_tensors(input_ids: Any, attention_mask: Any) -> None:
    """Refuse inputs that are not tensors [P] or [R, P].

    Raises:
        Ar2DiffError: naming the argument.
    """
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if value is not None and not (isinstance(value, Tensor) and value.dim() in (1, 2)):
            raise Ar2DiffError(
                f"{option(name)} is not a tensor with one or two dimensions",
                "pass a tensor [rows, tokens]",
            )


def has_gaps(given: Tensor | None, attention_mask: Tensor | None, mask_token_id: int) -> bool:
    """Whether there is a mask token among prompts [P] or [R, P], outside of their padding."""
    if given is None:
        return False
    masks = given == mask_token_id
    if attention_mask is not None and attention_mask.shape == given.shape:
        masks = masks & (attention_mask.to(given.device) != 0)
    return bool(masks.any())


def read_prompts(
    given: Tensor | None, attention_mask: Tensor | None, options: Options, vocabulary: int
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The input [R, P], a bool tensor [R, P] that is False at its padding, and the rows without
    padding; a BOS if there is nothing.

    Args:
        vocabulary: tokens of the model.

    Raises:
        Ar2DiffError: there are no rows, or no BOS; the mask has another shape, or a hole; an id is
            out of range.
    """
    if attention_mask is None and given is not None:
        attention_mask = _padding(given, options)
    if given is None or given.shape[-1] == 0:
        if options.bos_token_id is None:
            raise Ar2DiffError(
                "there is no prompt, and the model has no BOS token to start from", "pass a prompt"
            )
        rows = 1 if given is None or given.dim() == 1 else len(given)
        given = torch.full((rows, 1), options.bos_token_id)
        attention_mask = None
    if given.dim() == 1:
        given = given[None]
        attention_mask = attention_mask[None] if attention_mask is not None else None
    if attention_mask is None:
        real, prompts = torch.ones(given.shape, dtype=torch.bool), given.tolist()
    else:
        real = attention_mask.to("cpu").bool()
        _check_mask(real, given)
        prompts = [row[keep].tolist() for row, keep in zip(given.to("cpu"), real, strict=True)]
    _check_ids(prompts, vocabulary)
    return given, real, prompts


def _check_mask(real: Tensor, given: Tensor) -> None:
    if real.shape != given.shape:
        raise Ar2DiffError(
            f"{option('attention_mask')} has shape {list(real.shape)}, but "
            f"{option('input_ids')} has shape {list(given.shape)}",
            "pass a mask of the same shape as the input ids",
        )
    edges = (real[:, 1:] != real[:, :-1]).sum(1)
    if (edges > 2).any() or ((edges == 2) & real[:, 0]).any():
        raise Ar2DiffError(
            f"{option('attention_mask')} has a 0 between two 1s", "pad only on the left or right"
        )


def _padding(given: Tensor, options: Options) -> Tensor | None:
    """[R, P] bool, False where the rows of a batch are padded at their ends, as transformers infers
    it if no mask is given: by a pad token that is set and is not an end token."""
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_id or given.dim() == 1 or len(given) == 1:
        return None
    word = given != pad
    return (word.cumsum(1) > 0) & (word.flip(1).cumsum(1).flip(1) > 0)


def _check_ids(prompts: list[list[int]], vocabulary: int) -> None:
    if not prompts:
        raise Ar2DiffError(f"{option('input_ids')} has no rows", "pass a prompt")
    for number, prompt in enumerate(prompts):
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise Ar2DiffError(
                    f"row {number} contains token id {shortened(token)}, but the model has only "
                    f"{vocabulary} tokens",
                    "use the model's own tokenizer",
                )
