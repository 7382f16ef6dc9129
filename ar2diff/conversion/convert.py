"""AR checkpoint, or masked language model -> diffusion checkpoint, in memory: mask token, pad
token, configs. No weight but a new mask token's own row changes. `probe` tells whether the model
then does what its spec says.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model import Checkpoint, load_tokenizer, put_head, write_spec
from ..config.recipe import Convert
from ..core.attention import layer_windows
from ..core.errors import Ar2DiffError, option, shortened
from ..core.fitted import Fitted, carry
from ..core.forward import context_length
from ..core.head import ATTRIBUTE, BigramHead
from ..core.images import marks_of
from ..core.noise import Noise
from ..core.noises import Mask
from ..core.options import FILTERS, IGNORED, REFUSED
from ..core.spec import Head, Spec, format_of
from ..diffusion.objective import suppressed_ids
from .images import reach_in

MASK_TOKEN = "<|mask|>"
RESERVED = re.compile(r"reserved|unused|extra_id|extra_token|placeholder", re.IGNORECASE)
ROW_NOISE = 0.02  # of the spread of the embeddings: equal rows would stay equal


def convert(
    checkpoint: Checkpoint,
    wanted: Convert,
    max_length: int,
    ar_mode: bool,
    seed: int,
    noise: Noise | None = None,
    counts: Callable[[], Tensor] | None = None,
) -> Spec:
    """Turn the loaded model, tokenizer and configs into those of a diffusion model, in place. What
    cannot be kept is noted in `checkpoint.notes`.

    A model that was converted before keeps its spec, except that its blocks may grow.

    Args:
        max_length: longest row that will be trained on, in tokens.
        ar_mode: whether the AR mode is alive at the end (trained along, or nothing trained).
        seed: of the noise in the mask token's row.
        noise: the forward process; None: that of a converted model, else the mask.
        counts: counts tokens [V] in the texts that will be trained on; None: there are none.

    Raises:
        Ar2DiffError: a length exceeds the model's context; a converted model has another attention
            or prediction; the mask token is a word; a masked language model has none of its own,
            or is to have another.
    """
    model, old = checkpoint.model, checkpoint.spec
    _check_lengths(model, wanted, max_length)
    checkpoint.notes += _without_unusable(model.generation_config)
    if old is None:
        _keep_head(model)
        if checkpoint.is_masked_lm:
            mask_token_id = _own_mask_token(checkpoint, wanted)
        else:
            mask_token_id = _add_mask_token(checkpoint, wanted.mask_token, seed)
        set_pad(checkpoint, mask_token_id)
    else:
        _check_continuation(old, wanted)
        mask_token_id, max_length = old.mask_token_id, max(old.max_length, max_length)
        ar_mode = ar_mode and old.ar_mode
    local_window = _local_window(model, old, wanted, max_length)
    head = _make_head(model, old, wanted.head_rank, seed)
    noise = noise or (old.noise if old else Mask())
    if noise.fits and noise.fitted is None:
        noise = fitted_noise(checkpoint, noise, mask_token_id, counts)
    carry(model, noise)
    images = old.images if old is not None else reach_in(checkpoint)
    spec = Spec(
        format=format_of(noise, head, images),
        noise=noise,
        mask_token_id=mask_token_id,
        attention=wanted.attention,
        block_length=wanted.block_length,
        prediction=wanted.prediction,
        ar_mode=ar_mode,
        local_window=local_window,
        max_length=max_length,
        head=head,
        images=images,
    )
    write_spec(checkpoint, spec)
    return spec


def _make_head(model: Any, old: Spec | None, rank: int | None, seed: int) -> Head | None:
    """What the spec says of the diffusion head: of the one that a converted model has, or of a new
    one, whose bias is zero."""
    if rank is None:
        if hasattr(model, ATTRIBUTE):
            delattr(model, ATTRIBUTE)
        return None
    if old is None or old.head is None or old.head.rank != rank:
        generator = torch.Generator().manual_seed(seed)
        put_head(model, BigramHead(model.config.get_text_config().vocab_size, rank, generator))
    return getattr(model, ATTRIBUTE).described()


def fitted_noise(
    checkpoint: Checkpoint, noise: Noise, mask_token_id: int, counts: Callable[[], Tensor] | None
) -> Noise:
    """The noise, fitted to the embeddings and to the texts; as it was, if a converted model has it
    already."""
    model, old = checkpoint.model, checkpoint.spec
    if old is not None and old.noise.kind == noise.kind:
        if all(getattr(old.noise, name) == getattr(noise, name) for name in noise.fitted_by):
            return replace(noise, fitted=old.noise.fitted)
    if counts is None:
        raise Ar2DiffError(
            f"{option('noise.kind', noise.kind)} is fitted to the texts that adapt trains on, and "
            "here are none",
            f"run 'ar2diff adapt' with {option('data', 'FILE')} and at least one step",
        )
    rows = model.config.get_text_config().vocab_size
    allowed = ~suppressed_ids(mask_token_id, checkpoint.token_ids, rows)
    with torch.no_grad():
        table = model.get_input_embeddings()(torch.arange(rows, device=model.device)).cpu()
    return replace(noise, fitted=Fitted(None, noise.fit(table, counts(), allowed)))


def end_token(checkpoint: Checkpoint) -> int:
    """The id that ends a document: the first of `generation_config.eos_token_id`."""
    if checkpoint.end_ids:
        return checkpoint.end_ids[0]
    raise Ar2DiffError(
        f"model {checkpoint.path} has no end token",
        "set eos_token_id in its generation_config.json",
    )


def _without_unusable(generation: Any) -> list[str]:
    """Unset what a denoiser cannot honour, and sampling settings that have no effect because
    `do_sample` is not set, with which transformers writes no file.

    Returns:
        A note on each.
    """
    notes, set_here = [], {n: v for n, v in vars(generation).items() if v is not None}
    for name, value in set_here.items():
        if name in IGNORED or (name in REFUSED and value != REFUSED[name]):
            why = "it has no meaning unless tokens are written from left to right"
        elif not generation.do_sample and name in (*FILTERS, "temperature"):
            why = "it has no effect without do_sample"
        elif name == "cache_implementation" and generation.use_cache is False:
            why = "it has no effect without use_cache"
        else:
            continue
        setattr(generation, name, None)
        notes.append(f"{name}={shortened(value)} in generation_config.json is dropped: {why}")
    return notes


def _keep_head(model: Any) -> None:
    """Where the weights hold a head of its own although the config ties it to the embeddings, the
    weights are right: tying the two, as a resize does, would lose the head."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs.weight is not inputs.weight:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def _local_window(model: Any, old: Spec | None, wanted: Convert, max_length: int) -> str | None:
    """What becomes of the base's sliding window: `local_window` of the spec. A dropped window is
    removed from the config, so that a stock forward has none either.

    If layers have types, these may decide more than the window (a layer's rotary base, its heads),
    so they stay, and the window becomes as long as the context.
    """
    config, before = model.config.get_text_config(), old.local_window if old else None
    if before == "dropped":
        return before
    sizes = [size for size in layer_windows(config, "kept").values() if size]
    if not sizes:
        return None
    fitting = "kept" if max_length > min(sizes) else "dropped"
    if (wanted.local_window or before or fitting) == "kept":
        return "kept"
    typed = getattr(config, "layer_types", None)
    config.sliding_window = (context_length(model) or max_length) if typed else None
    return "dropped"


def _check_lengths(model: Any, wanted: Convert, max_length: int) -> None:
    context = context_length(model)
    if context is None:
        return
    for name, length in (
        ("convert.block_length", wanted.block_length),
        ("data.max_length", max_length),
    ):
        if length is not None and length > context:
            raise Ar2DiffError(
                f"{option(name)} is {length}, more than the model's context of {context} tokens",
                f"set {option(name)} to at most {context}",
            )


def _check_continuation(old: Spec, wanted: Convert) -> None:
    if wanted.reconvert:
        return
    windowed = old.local_window and wanted.local_window
    names = ["attention", "prediction", *(["local_window"] if windowed else [])]
    for name in names:
        if getattr(old, name) != getattr(wanted, name):
            raise Ar2DiffError(
                f"the model was converted with {name} {getattr(old, name)}, but the recipe asks "
                f"for {getattr(wanted, name)}",
                f"set {option(f'convert.{name}', getattr(old, name))}, or "
                f"{option('convert.reconvert', 'true')} to convert it anew",
            )
    if old.head is not None and wanted.head_rank != old.head.rank:
        raise Ar2DiffError(
            f"the model has a diffusion head of rank {old.head.rank}, but the recipe asks for "
            f"{'none' if wanted.head_rank is None else f'rank {wanted.head_rank}'}",
            f"set {option('convert.head_rank', old.head.rank)}, or "
            f"{option('convert.reconvert', 'true')} to convert it anew",
        )
    if old.block_length is not None and wanted.block_length < old.block_length:
        raise Ar2DiffError(
            f"the model was trained with blocks of {old.block_length} tokens, but the recipe asks "
            f"for {wanted.block_length}",
            f"set {option('convert.block_length', old.block_length)} or higher",
        )


def _own_mask_token(checkpoint: Checkpoint, wanted: Convert) -> int:
    """The mask token with which a masked language model was trained; its row stays as it is. Also
    has the model begin its texts as its tokenizer does."""
    path, tokenizer, generation = (
        checkpoint.path,
        checkpoint.tokenizer,
        checkpoint.model.generation_config,
    )
    own = tokenizer.mask_token_id
    if own is None or own >= checkpoint.model.get_input_embeddings().weight.shape[0]:
        raise Ar2DiffError(
            f"model {path} is a masked language model, but its tokenizer has no mask token",
            "set mask_token in its tokenizer_config.json to the token it was trained with",
        )
    if wanted.mask_token not in (None, tokenizer.mask_token):
        raise Ar2DiffError(
            f"{option('convert.mask_token')} is {shortened(wanted.mask_token)}, but model {path} "
            f"is a masked language model that was trained with {tokenizer.mask_token}",
            f"leave out {option('convert.mask_token')}",
        )
    if generation.bos_token_id is None:
        generation.bos_token_id = tokenizer.cls_token_id
    checkpoint.notes.append(
        "the base is a masked language model: attention is full, prediction same, and there is no "
        "AR mode"
    )
    return own


def _add_mask_token(checkpoint: Checkpoint, wanted: str | None, seed: int) -> int:
    """Choose the mask token: a reserved special token that nothing uses, else a new token in an
    unused row of a padded vocabulary, else in a new row. Never a word."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    rows = model.get_input_embeddings().weight.shape[0]
    token = wanted or tokenizer.mask_token or _reserved_token(model, tokenizer)
    if token is None:
        token = MASK_TOKEN
    known = tokenizer.get_vocab().get(token)
    if known is not None and known not in tokenizer.added_tokens_decoder:
        raise Ar2DiffError(
            f"{option('convert.mask_token')}: {shortened(token)} is an ordinary token of the "
            "vocabulary",
            "name a special token, or use null to have one chosen",
        )
    busy = {*_as_list(model.generation_config.eos_token_id), tokenizer.pad_token_id}
    busy |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    busy |= marks_of(model.config)
    if known is not None and known in busy:
        raise Ar2DiffError(
            f"{option('convert.mask_token')}: {shortened(token)} has another use (it begins or "
            "ends texts, pads them, or stands for unknown words or images)",
            "name a special token with no other use, or use null to have one chosen",
        )
    tokenizer = _add_token(checkpoint, "mask_token", token)
    mask_token_id = tokenizer.mask_token_id
    if mask_token_id >= rows:
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    _init_row(model, tokenizer, mask_token_id, seed)
    return mask_token_id


def _add_token(checkpoint: Checkpoint, role: str, token: str) -> Any:
    """Add a special token under the id that it has once the tokenizer is loaded again, which is
    another one than in memory where the vocabulary has holes.

    Returns:
        The tokenizer, which may be a new object.
    """
    tokenizer = checkpoint.tokenizer
    tokenizer.add_special_tokens({role: token})
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            tokenizer = load_tokenizer(Path(folder))
        tokenizer.name_or_path = checkpoint.tokenizer.name_or_path
        checkpoint.tokenizer = tokenizer
        ids = [*tokenizer.get_vocab().values()]
        if ids.count(tokenizer.convert_tokens_to_ids(token)) > 1:
            raise Ar2DiffError(
                f"model {checkpoint.path}: there are gaps in the ids of its tokenizer, so that "
                f"the new token {token} would share an id with another token",
                "use a tokenizer with a reserved special token, or without gaps in its ids",
            )
    return tokenizer


def _reserved_token(model: Any, tokenizer: Any) -> str | None:
    template = str(tokenizer.chat_template or "")
    used = {getattr(tokenizer, name, None) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    others = {*_as_list(model.generation_config.eos_token_id), *marks_of(model.config)}
    used |= {tokenizer.decode([i]) for i in others}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = token.content
        if token.special and RESERVED.search(text) and text not in template and text not in used:
            return text
    return None


@torch.no_grad()
def _init_row(model: Any, tokenizer: Any, row: int, seed: int) -> None:
    """Set a row to the mean embedding plus small noise: a zero row under RMSNorm has an exploding
    gradient. An untied head gets its own mean, and its bias the mean bias."""
    tokens = max(tokenizer.get_vocab().values()) + 1
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


def set_pad(checkpoint: Checkpoint, mask_token_id: int) -> None:
    """Choose the pad token: the tokenizer's own if it is no end token (from which it could not be
    told apart), else a reserved token, else the unknown token, else a new one."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    ends = {*_as_list(model.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)}
    ends.add(mask_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        reserved = _reserved_token(model, tokenizer)
        if reserved is not None:
            tokenizer.add_special_tokens({"pad_token": reserved})
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer = _add_token(checkpoint, "pad_token", "<|pad|>")
            if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
                _init_row(model, tokenizer, tokenizer.pad_token_id, 0)
    model.config.pad_token_id = tokenizer.pad_token_id


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
