"""Text in, text out: what `generate` on the command line, the demo and the panels share."""

from __future__ import annotations

import time
from typing import Any

import torch

from .checkpoint import Checkpoint
from .convert import context_length
from .errors import Ar2DiffError
from .evaluation import suppressed_of
from .generate import THRESHOLD, denoise


def complete(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int,
    mode: str = "diffusion",
    threshold: float = THRESHOLD,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Complete a prompt.

    Args:
        mode: `diffusion`, or `ar` where the model can still be read left to right.

    Returns:
        text, token_ids, new_tokens, forwards, tokens_per_forward, seconds.

    Raises:
        Ar2DiffError: the model does not have the mode, or the prompt does not fit.
    """
    spec, tokenizer = checkpoint.spec, checkpoint.tokenizer
    if mode == "diffusion" and spec is None:
        raise Ar2DiffError(
            f"model {checkpoint.path} is not converted", "run 'ar2diff adapt', or use --mode ar"
        )
    if mode == "ar" and spec is not None and not spec.ar_mode:
        raise Ar2DiffError(
            f"model {checkpoint.path} has no AR mode ({spec.attention}, AR loss not trained)",
            "use --mode diffusion, or convert with causal_context and objective.ar_weight > 0",
        )
    ids = tokenizer(prompt, verbose=False).input_ids
    context = context_length(checkpoint.model.config)
    if not ids:
        raise Ar2DiffError("the prompt has no token", "give a longer prompt")
    if spec is not None and spec.mask_token_id in ids:
        raise Ar2DiffError("the prompt spells the mask token", "take it out")
    block = (spec.block_length if spec and mode == "diffusion" else None) or 1
    if context is not None and -(-(len(ids) + max_new_tokens) // block) * block > context:
        raise Ar2DiffError(
            f"{len(ids)} prompt and {max_new_tokens} new tokens exceed the context of {context}",
            f"lower --max-new-tokens to {max(0, context // block * block - len(ids))}",
        )
    start = time.monotonic()
    decode = _diffusion if mode == "diffusion" else _left_to_right
    new, forwards = decode(checkpoint, ids, max_new_tokens, threshold, temperature, seed)
    seconds = time.monotonic() - start
    # Decoded with the prompt and cut: a tokenizer may drop the space in front of the first token.
    text = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    text = text[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
    return {
        "text": text,
        "token_ids": new,
        "new_tokens": len(new),
        "forwards": forwards,
        "tokens_per_forward": len(new) / forwards if forwards else 0.0,
        "seconds": seconds,
    }


def _diffusion(
    checkpoint: Checkpoint,
    ids: list[int],
    max_new_tokens: int,
    threshold: float,
    temperature: float,
    seed: int,
) -> tuple[list[int], int]:
    *_, state = denoise(
        checkpoint.model,
        checkpoint.spec,
        ids,
        max_new_tokens=max_new_tokens,
        suppressed=suppressed_of(checkpoint),
        eos=checkpoint.end_ids,
        threshold=threshold,
        temperature=temperature,
        seed=seed,
    )
    return state.new_ids, state.forwards


def _left_to_right(
    checkpoint: Checkpoint,
    ids: list[int],
    max_new_tokens: int,
    threshold: float,
    temperature: float,
    seed: int,
) -> tuple[list[int], int]:
    """The stock `generate` of transformers; one forward a token, whatever the threshold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        output = checkpoint.model.generate(
            torch.tensor([ids], device=checkpoint.model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=checkpoint.tokenizer.pad_token_id,
            **{"do_sample": False, **sampling},
        )
    new = output[0, len(ids) :].tolist()
    return new, len(new)
