"""What a call of `generate` asks for: argument > generation_config > spec > default.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .conflicts import DENOISING, check
from .errors import Ar2DiffError, nearest, option, shortened
from .spec import Spec
from .values import (
    LARGE,
    Source,
    bad,
    integer,
    json_text,
    number,
    one_of,
    seeds,
    strings,
    text,
    token_bias,
    token_id,
    token_ids,
)

MODES = ("diffusion", "speculative", "ar")
ORDERS = ("prob", "margin", "entropy", "random")
CACHES = ("dynamic", "static", "prefix", "dual", "none")
THRESHOLD = 0.9
SAFE_THRESHOLD = 0.99  # of a model without AR mode whose text at 0.9 is worse, or was not measured
RULE = ("threshold", "steps_per_block", "entropy_bound")  # which tokens a forward decides
MAX_NEW_TOKENS = 128
STEPS = 64  # of a noise in the free form with full attention

# Options of transformers that need the text to the left of a token, or several beams: a denoiser
# has neither. Their neutral values pass.
REFUSED: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "bad_words_ids": None,
    "constraints": None, "force_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "begin_suppress_tokens": None, "guidance_scale": None,
    "watermarking_config": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "exponential_decay_length_penalty": None, "token_healing": False, "diversity_penalty": 0.0,
    "prefix_allowed_tokens_fn": None, "assistant_model": None, "negative_prompt_ids": None,
    "negative_prompt_attention_mask": None, "min_length": 0, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False,
    "past_key_values": None, "inputs_embeds": None, "position_ids": None, "use_mtp": None,
}  # fmt: skip
# Options that make no difference to this loop.
IGNORED = (
    "synced_gpus", "early_stopping", "length_penalty", "renormalize_logits",
    "remove_invalid_values", "low_memory", "disable_compile", "compile_config", "max_cache_len",
    "cache_config", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_model_defaults",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "target_lookbehind", "is_assistant", "max_matching_ngram_size",
    "speculation_type", "prefill_chunk_size", "continuous_batching_config", "logits_to_keep",
    "decoder_start_token_id", "token_type_ids", "generation_mode",
)  # fmt: skip
# Row-wise filters of transformers, in its order, and the values at which they do nothing.
FILTERS: dict[str, Any] = {
    "top_h": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Settings of the sampler.

    Attributes:
        max_new_tokens, min_new_tokens: number of tokens after the prompt.
        mode: `diffusion` denoises; `speculative` drafts and lets the AR mode verify, which writes
            the AR mode's text in fewer forwards; `ar` writes one token after the other. Without
            it, the mode in the generation config (`speculative` for a model with an AR mode), or
            `diffusion` if the call sets an option that only this mode has, or a prompt has gaps.
        block_length: tokens denoised together, at most as many as trained; None: all (`full`).
        threshold: decide tokens whose probability exceeds it (0.9 by default; alone, or together
            with `steps_per_block` as a minimum).
        steps_per_block: forwards for each block; `order` says which tokens come first (prob,
            margin, entropy, random).
        entropy_bound: decide tokens while the sum of their entropies exceeds the largest of them by
            no more than this, in nats.
        remask: share of a block's decided tokens that each of its `steps_per_block` forwards masks
            again.
        edit_threshold: replace decided tokens of the block being denoised where another token's
            probability exceeds it; None: never.
        corrector_steps: with `edit_threshold`, forwards that a block may have after it is decided,
            as long as they replace tokens.
        edit_blocks: with `edit_threshold`, earlier blocks that are read anew along with the one
            being denoised, and whose tokens may be replaced too; together they may have as many
            tokens as a trained block.
        cfg_scale: classifier-free guidance, l_u + (1 + w)(l_c - l_u); 0 is none.
        draft_length: in mode speculative, tokens drafted behind each candidate; fewer than a block.
        draft_nodes: in mode speculative, verify a tree of so many candidates instead of a chain.
            Without these two, as many are drafted and verified as pay on this device.
        cache_implementation: `dynamic`, `static` or `none`; for `full` attention `none`, `prefix`
            or `dual`.
        compile: call the decoder through torch.compile where the shape of a forward recurs; a GPU
            then replays CUDA graphs. The cache is static.
        check_cache: also read each step without the cache, and note the differences in
            `Canvas.drift`.
        temperature: 0 is greedy. repetition_penalty, filters, sequence_bias: as in transformers.
        regex, json_schema, choice: the whole answer, or each gap, matches this regular expression,
            is JSON of this schema (a JSON text, in an order and with spaces that are fixed), or is
            one of these texts.
        grammar: the whole answer is derived from this context-free grammar, in the form of Lark
            that llguidance reads; only in modes `ar` and `speculative`.
        guide: a function that steers the choice of tokens, called with log-probabilities [N, V] of
            N positions, the tokens [N, L] of their rows (the mask where undecided) and the
            positions [N]; what it returns, [N, V], is added to the logits before temperature and
            filters.
        classifier: a function that says how well texts fit what is wanted, whose gradient moves the
            vectors of a noise `embedding` (`core/guidance.py`). It is called with probabilities
            [R, L, V] of R rows, one-hot where a token is decided, 0 where a block has not begun,
            and the lengths [R] of their prompts; it returns log p(c | x) [R] with a gradient, each
            row's of its own probabilities alone.
        fluency: with a classifier: how strongly the vectors are held where they were drawn.
        classifier_steps: with a classifier: gradient steps after each forward of a block but the
            last one.
        seed: seeds the draws; those of a row depend on it and on the row's own prompt alone.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0
    mode: str = "diffusion"
    block_length: int | None = None
    threshold: float | None = None
    steps_per_block: int | None = None
    entropy_bound: float | None = None
    order: str = "prob"
    remask: float = 0.0
    edit_threshold: float | None = None
    corrector_steps: int = 0
    edit_blocks: int = 0
    cfg_scale: float = 0.0
    draft_length: int | None = None
    draft_nodes: int | None = None
    cache_implementation: str = "dynamic"
    compile: bool = False
    check_cache: bool = False
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    filters: tuple[tuple[str, float], ...] = ()
    sequence_bias: dict[tuple[int, ...], float] | None = None
    eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    stop_strings: tuple[str, ...] = ()
    regex: str | None = None
    json_schema: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    guide: Callable[[Any, Any, Any], Any] | None = None
    classifier: Callable[[Any, Any], Any] | None = None
    fluency: float = 0.01
    classifier_steps: int = 3
    max_time: float | None = None
    seed: int | tuple[int, ...] | None = None

    @property
    def filler(self) -> int:
        """The id that fills the row after a short answer: pad token, else an end token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def revised(self) -> int | None:
        """How many tokens before the block being denoised may still change, beside those of the
        block; None: what is decided stays."""
        if not self.remask and self.edit_threshold is None:
            return None
        return self.edit_blocks * (self.block_length or 0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


OWN = tuple(field.name for field in fields(Options) if field.name not in ("filters",))
KNOWN = (
    *OWN, *FILTERS, "do_sample", "max_length", "use_cache", *REFUSED, *IGNORED,
)  # fmt: skip


def resolve(
    spec: Spec,
    kwargs: Mapping[str, Any],
    configs: Sequence[Any] = (),
    prompt_length: int = 0,
    drafts: bool = False,
    gaps: bool = False,
) -> Options:
    """The settings for one call.

    Args:
        kwargs: keyword arguments of the call; unknown ones are refused.
        configs: generation configs, in order of precedence.
        prompt_length: tokens of the (padded) prompt, which `max_length` counts.
        drafts: the model has a draft adapter; it is decoded in mode speculative unless told not to.
        gaps: a prompt has gaps, which only mode diffusion fills.

    Raises:
        Ar2DiffError: an option that is unknown, out of range, or that a denoiser cannot honour.
    """
    for name in kwargs:
        if name not in KNOWN:
            shown = option(name) if name.isidentifier() and len(name) < 80 else shortened(name)
            raise Ar2DiffError(
                f"{shown} is not an option of generate{nearest(name, KNOWN)}",
                "see the model card for its options",
            )
    get = Source(kwargs, configs)
    for name, neutral in REFUSED.items():
        value = get(name)
        if value is not None and value != neutral:
            raise Ar2DiffError(
                f"{option(name)} only works if tokens are written from left to right",
                f"leave out {option(name)}",
            )
    options = Options(
        max_new_tokens=_max_new_tokens(get, prompt_length),
        min_new_tokens=integer(get, "min_new_tokens", 0, 0),
        mode=_mode(get, drafts, gaps),
        block_length=_block_length(get, spec),
        **_rule(get, spec),
        order=one_of(get, "order", ORDERS, "prob"),
        remask=number(get, "remask", 0.0, 0, 1),
        edit_threshold=number(get, "edit_threshold", None, 0),
        corrector_steps=integer(get, "corrector_steps", 0, 0),
        edit_blocks=integer(get, "edit_blocks", 0, 0),
        cfg_scale=number(get, "cfg_scale", 0.0, 0, LARGE),
        draft_length=integer(get, "draft_length", None, 1),
        draft_nodes=integer(get, "draft_nodes", None, 1),
        cache_implementation=_cache(get, spec),
        compile=bool(get("compile", False)),
        check_cache=bool(get("check_cache", False)),
        temperature=_temperature(get),
        repetition_penalty=number(get, "repetition_penalty", 1.0, 1 / LARGE, LARGE),
        filters=tuple(_filters(get)),
        sequence_bias=token_bias("sequence_bias", get("sequence_bias")),
        eos_token_id=token_ids("eos_token_id", get("eos_token_id")),
        suppress_tokens=tuple(
            token
            for place in get.places
            for token in token_ids("suppress_tokens", place.get("suppress_tokens"))
        ),
        pad_token_id=token_id(get, "pad_token_id"),
        bos_token_id=token_id(get, "bos_token_id"),
        num_return_sequences=integer(get, "num_return_sequences", 1, 1),
        return_dict_in_generate=bool(get("return_dict_in_generate", False)),
        stop_strings=strings("stop_strings", get("stop_strings")),
        regex=text("regex", get("regex")),
        json_schema=json_text("json_schema", get("json_schema")),
        choice=strings("choice", get("choice")),
        grammar=text("grammar", get("grammar")),
        guide=_function(get, "guide", "log-probabilities, tokens and positions"),
        classifier=_function(get, "classifier", "probabilities and lengths of prompts"),
        fluency=number(get, "fluency", 0.01, 0, LARGE),
        classifier_steps=integer(get, "classifier_steps", 3, 1),
        max_time=number(get, "max_time", None, 0),
        seed=seeds("seed", get("seed")),
    )  # fmt: skip
    check(options, spec, get.places[0])
    return options


def _mode(get: Source, drafts: bool, gaps: bool) -> str:
    """The mode that the call names, else the default one; a default that cannot do what the call
    asks for gives way to mode diffusion."""
    called, allowed = get.places[0], MODES[1:] if drafts else MODES
    if called.get("mode") is not None:
        return one_of(get, "mode", allowed, MODES[drafts])
    chosen = one_of(get, "mode", MODES, MODES[drafts])
    if drafts:
        return chosen if chosen in allowed else MODES[1]
    denoises = any(called.get(name) not in (None, none) for name, none in DENOISING.items())
    return "diffusion" if denoises or gaps else chosen


def _function(get: Source, name: str, arguments: str) -> Any:
    value = get(name)
    if value is not None and not callable(value):
        raise bad(name, value, f"a function of {arguments}")
    return value


def _rule(get: Source, spec: Spec) -> dict[str, Any]:
    """The options of `RULE` belong together: the nearest place that sets one of them decides, so
    that a call's `steps_per_block` is not combined with the threshold of a config. A noise in the
    free form has steps alone, by default one for each token of a block."""
    if spec.noise.free:
        return {"steps_per_block": integer(get, "steps_per_block", spec.block_length or STEPS, 1)}
    for place in get.places:
        if any(place.get(name) is not None for name in RULE):
            near = Source(place)
            return {
                "threshold": number(near, "threshold", None, 0),
                "steps_per_block": integer(near, "steps_per_block", None, 1),
                "entropy_bound": number(near, "entropy_bound", None, 0),
            }
    return {"threshold": THRESHOLD}


def _max_new_tokens(get: Source, prompt_length: int) -> int:
    if get("max_length") is not None and get.above("max_length", "max_new_tokens"):
        length = integer(get, "max_length", 0, 0)
        if length <= prompt_length:
            raise Ar2DiffError(
                f"{option('max_length', length)} leaves no room for an answer: the prompt has "
                f"{prompt_length} tokens",
                f"set {option('max_new_tokens')} instead",
            )
        return length - prompt_length
    return integer(get, "max_new_tokens", MAX_NEW_TOKENS, 0)


def _block_length(get: Source, spec: Spec) -> int | None:
    size = integer(get, "block_length", spec.block_length, 1)
    if spec.block_length is not None and size > spec.block_length:
        raise Ar2DiffError(
            f"{option('block_length', size)} is above the model's block length of "
            f"{spec.block_length}",
            f"set it to {spec.block_length} or less",
        )
    blocks = 1 + integer(get, "edit_blocks", 0, 0)  # read together
    if spec.block_length is not None and size * blocks < spec.block_length:
        warnings.warn(
            f"block_length {size} is below the {spec.block_length} that the model was trained "
            "with; it has never seen blocks of this length",
            stacklevel=2,
        )
    return size


def _cache(get: Source, spec: Spec) -> str:
    full = spec.attention == "full"
    if get("compile", False):
        return _static_cache(get, full)
    value = get("cache_implementation", "none" if full else "dynamic")
    if get("use_cache") is False:
        value = "none"
    allowed = ("none", "prefix", "dual") if full else ("dynamic", "static", "none")
    if value not in allowed and get.places[0].get("cache_implementation") is None:
        value = allowed[0]  # a config's (Gemma's says hybrid); only a call's own is an error
    if value not in allowed:
        raise Ar2DiffError(
            f"{option('cache_implementation')} {shortened(value)} does not work with "
            f"{spec.attention} attention",
            f"use one of {', '.join(allowed)}",
        )
    return value


def _static_cache(get: Source, full: bool) -> str:
    """The cache of compiled forwards, unless the call asks for another."""
    needs = f"{option('compile')} needs a static cache"
    if full:
        raise Ar2DiffError(
            f"{needs}, which does not work with full attention", f"leave out {option('compile')}"
        )
    if get("use_cache") is False:
        raise Ar2DiffError(
            f"{needs}, but {option('use_cache', False)} asks for none",
            f"leave out {option('compile')}",
        )
    asked = get.places[0].get("cache_implementation")
    if asked not in (None, "static"):
        raise Ar2DiffError(
            f"{needs}, not {shortened(asked)}",
            f"leave out {option('cache_implementation')}",
        )
    return "static"


def _temperature(get: Source) -> float:
    temperature = number(get, "temperature", None, 0, LARGE)
    sample = get("do_sample")
    if sample is None:  # a call that sets one asks for sampling; a config that does, does not
        sample = any(get.places[0].get(name) is not None for name in ("temperature", *FILTERS))
    if not sample or (temperature is not None and temperature < 1 / LARGE):
        return 0.0
    return 1.0 if temperature is None else temperature


def _filters(get: Source) -> Iterator[tuple[str, float]]:
    for name, neutral in FILTERS.items():
        value = get(name)
        if value is None or value == neutral:
            continue
        if name == "top_k":
            yield name, integer(get, name, None, 1)
        else:
            share = number(get, name, None, 0, 1, above=True)
            if share == 1 and name in ("epsilon_cutoff", "eta_cutoff"):
                raise bad(name, value, "a number below 1")
            yield name, share
