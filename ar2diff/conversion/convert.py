"""AR checkpoint -> diffusion checkpoint, in memory: mask token, pad token, config. No weight but
the mask's own row changes; what the model then can and cannot do is for `probe` to say."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..checkpoint.model import Checkpoint, write_spec
from ..config.recipe import Convert
from ..core.attention import layer_windows
from ..core.errors import Ar2DiffError
from ..core.forward import context_length
from ..core.spec import FORMAT, Spec

MASK_TOKEN = "<|mask|>"
RESERVED = re.compile(r"reserved|unused|extra_id|extra_token|placeholder", re.IGNORECASE)
ROW_NOISE = 0.02  # of the embeddings' own spread: rows that are equal would stay equal


def convert(
    checkpoint: Checkpoint, wanted: Convert, max_length: int, ar_mode: bool, seed: int
) -> Spec:
    """Turn the loaded model, tokenizer and configs into those of a diffusion model, in place.

    A model that is one already continues from its spec; its block may grow, no more.

    Args:
        max_length: longest row that will be trained on.
        ar_mode: whether the AR mode is alive at the end (trained along, or nothing trained).

    Raises:
        Ar2DiffError: lengths over the model's context; another attention or prediction than the
            converted model has; a mask token that is a word.
    """
    model, tokenizer, old = checkpoint.model, checkpoint.tokenizer, checkpoint.spec
    config = model.config
    _check_lengths(config, wanted, max_length)
    if old is None:
        mask_token_id = _add_mask_token(model, tokenizer, wanted.mask_token, seed)
        set_pad(model, tokenizer, mask_token_id)
    else:
        _check_continuation(old, wanted)
        mask_token_id, max_length = old.mask_token_id, max(old.max_length, max_length)
        ar_mode = ar_mode and old.ar_mode
    local_window = _local_window(config.get_text_config(), old, wanted, max_length)
    spec = Spec(
        format=FORMAT,
        noise="mask",
        mask_token_id=mask_token_id,
        attention=wanted.attention,
        block_length=wanted.block_length,
        prediction=wanted.prediction,
        ar_mode=ar_mode,
        local_window=local_window,
        max_length=max_length,
    )
    write_spec(checkpoint, spec)
    return spec


def end_token(checkpoint: Checkpoint) -> int:
    """The id that ends a document: the first of `generation_config.eos_token_id`."""
    if checkpoint.end_ids:
        return checkpoint.end_ids[0]
    raise Ar2DiffError(
        f"model {checkpoint.path}: no end-of-text token is named",
        "set eos_token_id in its generation_config.json",
    )


def _local_window(config: Any, old: Spec | None, wanted: Convert, max_length: int) -> str | None:
    """What becomes of the base's sliding window, `local_window` of the spec. A dropped one is taken
    out of the config: a stock forward must not see what ours does not have.

    Layers keep their types, which may decide more than the window (a layer's rotary base, its
    heads): their window gets as long as the context.
    """
    before = old.local_window if old else None
    if before == "dropped":
        return before
    sizes = [size for size in layer_windows(config, "kept").values() if size]
    if not sizes:
        return None
    fitting = "kept" if max_length > min(sizes) else "dropped"
    if (wanted.local_window or before or fitting) == "kept":
        return "kept"
    typed = getattr(config, "layer_types", None)
    config.sliding_window = (context_length(config) or max_length) if typed else None
    return "dropped"


def _check_lengths(config: Any, wanted: Convert, max_length: int) -> None:
    context = context_length(config)
    if context is None:
        return
    for name, length in (
        ("convert.block_length", wanted.block_length),
        ("data.max_length", max_length),
    ):
        if length is not None and length > context:
            raise Ar2DiffError(
                f"{name} {length} is over the model's context of {context} tokens",
                f"set {name} to at most {context}",
            )


def _check_continuation(old: Spec, wanted: Convert) -> None:
    if wanted.reconvert:
        return
    windowed = old.local_window and wanted.local_window
    names = ["attention", "prediction", *(["local_window"] if windowed else [])]
    for name in names:
        if getattr(old, name) != getattr(wanted, name):
            raise Ar2DiffError(
                f"the model is converted already, with {name} {getattr(old, name)}, "
                f"and the recipe asks for {getattr(wanted, name)}",
                f"set convert.{name}={getattr(old, name)}, or convert.reconvert=true",
            )
    if old.block_length is not None and wanted.block_length < old.block_length:
        raise Ar2DiffError(
            f"the model was trained with blocks of {old.block_length}, the recipe asks for "
            f"{wanted.block_length}",
            f"set convert.block_length={old.block_length} or more",
        )


def _add_mask_token(model: Any, tokenizer: Any, wanted: str | None, seed: int) -> int:
    """Choose the mask's row: a reserved special token that nothing uses, else an unused row of a
    padded vocabulary, else a new row. Never a word."""
    rows = model.get_input_embeddings().weight.shape[0]
    token = wanted or tokenizer.mask_token or _reserved_token(model, tokenizer)
    if token is None:
        token = MASK_TOKEN
    known = tokenizer.get_vocab().get(token)
    if known is not None and known not in tokenizer.added_tokens_decoder:
        raise Ar2DiffError(
            f"convert.mask_token {token!r} is a word of the vocabulary",
            "name a special token, or null to let one be chosen",
        )
    busy = {*_as_list(model.generation_config.eos_token_id), tokenizer.pad_token_id}
    busy |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if known is not None and known in busy:
        raise Ar2DiffError(
            f"convert.mask_token {token!r} has another use (begin, end, pad or unknown)",
            "name a special token that has none, or null to let one be chosen",
        )
    tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id = tokenizer.mask_token_id
    if mask_token_id >= rows:
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    _init_row(model, mask_token_id, len(tokenizer), seed)
    return mask_token_id


def _reserved_token(model: Any, tokenizer: Any) -> str | None:
    template = str(tokenizer.chat_template or "")
    used = {getattr(tokenizer, name, None) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    used |= {tokenizer.decode([i]) for i in _as_list(model.generation_config.eos_token_id)}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = token.content
        if token.special and RESERVED.search(text) and text not in template and text not in used:
            return text
    return None


@torch.no_grad()
def _init_row(model: Any, row: int, tokens: int, seed: int) -> None:
    """Set the mask's row to the mean embedding plus small noise: a zero row under RMSNorm has an
    exploding gradient. An untied head gets its own mean; its bias the mean bias."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [inputs.weight]
    if outputs.weight.data_ptr() != inputs.weight.data_ptr():
        weights.append(outputs.weight)

    def mean_of_others(values: torch.Tensor) -> torch.Tensor:
        return (values[:tokens].sum(0) - values[row]) / (tokens - 1)

    for weight in weights:
        weight[row] = 0
        noise = torch.randn(weight.shape[1], generator=generator)
        noise = noise.to(weight)
        weight[row] = mean_of_others(weight) + ROW_NOISE * weight[:tokens].std() * noise
    if getattr(outputs, "bias", None) is not None:
        outputs.bias[row] = mean_of_others(outputs.bias)


def set_pad(model: Any, tokenizer: Any, mask_token_id: int) -> None:
    """Pad is the tokenizer's own if it is no EOS, else a reserved token, else unk, else one more
    row: a pad that is the EOS cannot be told from an end."""
    ends = {*_as_list(model.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)}
    ends.add(mask_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        reserved = _reserved_token(model, tokenizer)
        if reserved is not None:
            tokenizer.add_special_tokens({"pad_token": reserved})
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
                _init_row(model, tokenizer.pad_token_id, len(tokenizer), 0)
    model.config.pad_token_id = tokenizer.pad_token_id


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
