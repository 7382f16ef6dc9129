"""What a call of `generate` asks for: argument > generation_config > spec > default.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import Ar2DiffError
from .spec import Spec

MODES = ("diffusion", "speculative", "ar")
ORDERS = ("prob", "margin", "entropy", "random")
CACHES = ("dynamic", "static", "prefix", "dual", "none")
THRESHOLD = 0.9
DRAFTS = 3
RULE = ("threshold", "steps", "entropy_bound")  # which tokens a step decides
MAX_NEW_TOKENS = 128
LARGE = 1e6  # logits times this are still numbers
MANY = 2**31 - 1  # more than a row has of anything

# Options of transformers that read a left context, or several beams: not of a denoiser. Their
# neutral values pass.
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
# Options that change nothing here, or nothing that this loop does.
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
        max_new_tokens, min_new_tokens: tokens after the prompt.
        mode: `diffusion`; `speculative`: drafts that the AR mode verifies; `ar`: one by one.
        block_length: tokens denoised together, at most the trained ones; None: all (`full`).
        threshold: decide tokens surer than this (default 0.9, alone or with `steps` as a quota).
        steps: forwards a block; decides by `order` (prob, margin, entropy, random).
        entropy_bound: decide while the joint entropy may exceed the largest by this, in nats.
        remask: share of a block's decided tokens that each of the `steps` gives back.
        cfg_scale: classifier-free guidance, l_u + (1 + w)(l_c - l_u); 0 is none.
        draft_length: speculative: tokens drafted after each candidate, fewer than a block (3).
        cache_implementation: `dynamic`, `static`, `none`; for `full` `none`, `prefix`, `dual`.
        check_cache: read each step without the cache too, and keep what differs in `Canvas.drift`.
        temperature: 0 is greedy. repetition_penalty, filters, bias: as in transformers.
        seed: of the draws; a row's depend on it and on the row's own prompt alone.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0
    mode: str = "diffusion"
    block_length: int | None = None
    threshold: float | None = None
    steps: int | None = None
    entropy_bound: float | None = None
    order: str = "prob"
    remask: float = 0.0
    cfg_scale: float = 0.0
    draft_length: int | None = None
    cache_implementation: str = "dynamic"
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
    max_time: float | None = None
    seed: int | tuple[int, ...] | None = None

    @property
    def filler(self) -> int:
        """The id behind a short answer: the pad token, else an end token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0


OWN = tuple(field.name for field in fields(Options) if field.name not in ("filters",))
KNOWN = (
    *OWN, *FILTERS, "do_sample", "max_length", "use_cache", *REFUSED, *IGNORED,
)  # fmt: skip


class _Source:
    """Reads a name from the first place that sets it."""

    def __init__(self, kwargs: Mapping[str, Any], configs: Sequence[Any]):
        for config in configs:
            if config is not None and not hasattr(config, "__dict__"):
                raise Ar2DiffError(
                    f"generate: generation_config is {type(config).__name__}",
                    "give a GenerationConfig of transformers",
                )
        self.places = [kwargs, *(vars(config) for config in configs if config is not None)]

    def __call__(self, name: str, default: Any = None) -> Any:
        for place in self.places:
            if place.get(name) is not None:
                return place[name]
        return default

    def above(self, name: str, other: str) -> bool:
        """Whether `name` is set nearer to the call than `other`."""
        for place in self.places:
            if place.get(name) is not None:
                return place.get(other) is None
            if place.get(other) is not None:
                return False
        return False


def resolve(
    spec: Spec,
    kwargs: Mapping[str, Any],
    configs: Sequence[Any] = (),
    prompt_length: int = 0,
) -> Options:
    """Settings of one call.

    Args:
        kwargs: what the call names; an unknown name is refused.
        configs: generation configs, the nearer first.
        prompt_length: tokens of the (padded) prompt, which `max_length` counts.

    Raises:
        Ar2DiffError: an option that is unknown, out of range, or that a denoiser cannot honour.
    """
    for name in kwargs:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1)
            raise Ar2DiffError(
                f"generate: unknown option {name!r}",
                f"did you mean {near[0]!r}?" if near else "see the model card for its options",
            )
    get = _Source(kwargs, configs)
    for name, neutral in REFUSED.items():
        value = get(name)
        if value is not None and value != neutral:
            raise Ar2DiffError(
                f"generate: {name} does not work where tokens are not written left to right",
                f"leave {name} out",
            )
    options = Options(
        max_new_tokens=_max_new_tokens(get, prompt_length),
        min_new_tokens=_integer(get, "min_new_tokens", 0, 0),
        mode=_one_of(get, "mode", MODES, "diffusion"),
        block_length=_block_length(get, spec),
        **_rule(get),
        order=_one_of(get, "order", ORDERS, "prob"),
        remask=_number(get, "remask", 0.0, 0, 1),
        cfg_scale=_number(get, "cfg_scale", 0.0, 0, LARGE),
        draft_length=_integer(get, "draft_length", None, 1),
        cache_implementation=_cache(get, spec),
        check_cache=bool(get("check_cache", False)),
        temperature=_temperature(get),
        repetition_penalty=_number(get, "repetition_penalty", 1.0, 1 / LARGE, LARGE),
        filters=tuple(_filters(get)),
        sequence_bias=_bias(get("sequence_bias")),
        eos_token_id=_ids(get, "eos_token_id"),
        suppress_tokens=tuple(
            i for p in get.places for i in _ids_of("suppress_tokens", p.get("suppress_tokens"))
        ),
        pad_token_id=_id(get, "pad_token_id"),
        bos_token_id=_id(get, "bos_token_id"),
        num_return_sequences=_integer(get, "num_return_sequences", 1, 1),
        return_dict_in_generate=bool(get("return_dict_in_generate", False)),
        stop_strings=_strings(get("stop_strings")),
        max_time=_number(get, "max_time", None, 0),
        seed=_seed(get("seed")),
    )  # fmt: skip
    _check(options, spec)
    return options


def _check(options: Options, spec: Spec) -> None:
    if options.entropy_bound is not None and (options.steps or options.threshold is not None):
        raise Ar2DiffError(
            "generate: entropy_bound decides alone, without threshold and steps",
            "leave all but one of them out",
        )
    if options.remask and not options.steps:
        raise Ar2DiffError("generate: remask works on a fixed number of steps", "set steps too")
    if options.order != "prob" and not options.steps:
        raise Ar2DiffError(f"generate: order {options.order} needs steps", "set steps too")
    if options.mode != "diffusion":
        if not spec.ar_mode or spec.attention != "causal_context":
            raise Ar2DiffError(
                f"generate: mode {options.mode} needs an AR mode, and this model has none "
                f"({spec.attention})",
                "use mode diffusion, or convert with causal_context and objective.ar_weight > 0",
            )
        for name in ("steps", "entropy_bound", "cfg_scale", "check_cache"):
            if getattr(options, name):
                raise Ar2DiffError(
                    f"generate: {name} belongs to mode diffusion, not {options.mode}",
                    f"leave {name} out",
                )
    if options.draft_length is not None and options.mode != "speculative":
        raise Ar2DiffError("generate: draft_length needs mode speculative", "leave it out")
    if options.draft_length is not None and options.draft_length >= spec.block_length:
        raise Ar2DiffError(
            f"generate: draft_length {options.draft_length} is not below the block length "
            f"{spec.block_length}",
            f"give at most {spec.block_length - 1}",
        )


def _rule(get: _Source) -> dict[str, Any]:
    """threshold, steps and entropy_bound belong together: the nearest place that sets one decides,
    so that a call's `steps` does not meet the threshold of a config."""
    for place in get.places:
        if any(place.get(name) is not None for name in RULE):
            near = _Source(place, ())
            return {
                "threshold": _number(near, "threshold", None, 0),
                "steps": _integer(near, "steps", None, 1),
                "entropy_bound": _number(near, "entropy_bound", None, 0),
            }
    return {"threshold": THRESHOLD}


def _max_new_tokens(get: _Source, prompt_length: int) -> int:
    if get("max_length") is not None and get.above("max_length", "max_new_tokens"):
        length = _integer(get, "max_length", 0, 0)
        if length <= prompt_length:
            raise Ar2DiffError(
                f"generate: the prompt has {prompt_length} tokens, max_length is {length}",
                "set max_new_tokens instead",
            )
        return length - prompt_length
    return _integer(get, "max_new_tokens", MAX_NEW_TOKENS, 0)


def _block_length(get: _Source, spec: Spec) -> int | None:
    size = _integer(get, "block_length", spec.block_length, 1)
    if spec.block_length is not None and size > spec.block_length:
        raise Ar2DiffError(
            f"generate: block_length {size} is above the {spec.block_length} trained",
            f"give at most {spec.block_length}",
        )
    if spec.block_length is not None and size < spec.block_length:
        warnings.warn(
            f"block_length {size} is below the {spec.block_length} trained: blocks that the model "
            "has not seen",
            stacklevel=2,
        )
    return size


def _cache(get: _Source, spec: Spec) -> str:
    full = spec.attention == "full"
    value = get("cache_implementation", "none" if full else "dynamic")
    if get("use_cache") is False:
        value = "none"
    allowed = ("none", "prefix", "dual") if full else ("dynamic", "static", "none")
    if value not in allowed and get.places[0].get("cache_implementation") is None:
        value = allowed[0]  # a config's (Gemma's says hybrid); only a call's own is an error
    if value not in allowed:
        raise Ar2DiffError(
            f"generate: cache_implementation {value!r} is not for {spec.attention} attention",
            f"one of {', '.join(allowed)}",
        )
    return value


def _bias(value: Any) -> dict[tuple[int, ...], float] | None:
    """{(token,): what is added to its logit}, from either form that transformers takes."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else value or ()
        bias = {tuple(key): float(added) for key, added in pairs}
    except (TypeError, ValueError):
        bias = {(): 0.0}
    if any(len(key) > 1 for key in bias):
        raise Ar2DiffError(
            "generate: sequence_bias on several tokens reads a left context",
            "bias single tokens only",
        )
    if not all(key and _whole(key[0]) and key[0] >= 0 and b <= LARGE for key, b in bias.items()):
        raise Ar2DiffError(f"generate: sequence_bias is {value!r}", "give {(token,): bias}")
    return bias or None


def _temperature(get: _Source) -> float:
    temperature = _number(get, "temperature", None, 0, LARGE)
    sample = get("do_sample")
    if sample is None:  # a call that sets one asks for sampling; a config that does, does not
        sample = any(get.places[0].get(name) is not None for name in ("temperature", *FILTERS))
    if not sample or (temperature is not None and temperature < 1 / LARGE):
        return 0.0
    return 1.0 if temperature is None else temperature


def _filters(get: _Source) -> Any:
    for name, neutral in FILTERS.items():
        value = get(name)
        if value is None or value == neutral:
            continue
        if name == "top_k":
            yield name, _integer(get, name, None, 1)
        else:
            number = _number(get, name, None, 0, 1, above=True)
            if number == 1 and name in ("epsilon_cutoff", "eta_cutoff"):
                raise Ar2DiffError(f"generate: {name} is {value!r}", "give a number below 1")
            yield name, number


def _one_of(get: _Source, name: str, allowed: Sequence[str], default: str) -> str:
    value = get(name, default)
    if value not in allowed:
        raise Ar2DiffError(f"generate: {name} {value!r} is unknown", f"one of {', '.join(allowed)}")
    return value


def _integer(get: _Source, name: str, default: int | None, least: int) -> Any:
    value = get(name, default)
    if value is not None and not (_whole(value) and value >= least):
        raise Ar2DiffError(f"generate: {name} is {value!r}", f"give a whole number from {least} on")
    return None if value is None else min(int(value), MANY)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0


def _number(
    get: _Source,
    name: str,
    default: float | None,
    least: float,
    most: float | None = None,
    above: bool = False,
) -> Any:
    value = get(name, default)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and math.isfinite(value)
    low = number and (value < least or (above and value == least))
    if not number or low or (most is not None and value > most):
        limit = f"{'above' if above else 'from'} {least:g}" + (
            "" if most is None else f" to {most:g}"
        )
        raise Ar2DiffError(f"generate: {name} is {value!r}", f"give a number {limit}")
    return float(value)


def _ids(get: _Source, name: str) -> tuple[int, ...]:
    return _ids_of(name, get(name))


def _ids_of(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: none, one or several."""
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(value, Iterable) and not isinstance(value, str)
    ids = tuple(i for i in (value if several else [value]) if i is not None)
    if not all(_whole(i) for i in ids):
        raise Ar2DiffError(f"generate: {name} is {value!r}", "give a token id, or several")
    return tuple(map(int, ids))


def _id(get: _Source, name: str) -> int | None:
    ids = _ids(get, name)
    if len(ids) > 1:
        raise Ar2DiffError(f"generate: {name} is {get(name)!r}", "give one token id")
    return ids[0] if ids else None


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value or ()
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise Ar2DiffError(f"generate: stop_strings is {value!r}", "give a text, or several")
    return tuple(strings)


def _seed(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, int):
        return value
    seeds = () if isinstance(value, (str, float)) else tuple(value)
    if not seeds or not all(_whole(seed) for seed in seeds):
        raise Ar2DiffError(
            f"generate: seed is {value!r}", "give a whole number, or one for each row"
        )
    return tuple(int(seed) for seed in seeds)
