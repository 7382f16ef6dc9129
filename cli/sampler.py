"""The sampler's options, which `generate` and `chat` have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..core.options import CACHES, MODES, ORDERS

Mode = StrEnum("Mode", {name: name for name in MODES})
Order = StrEnum("Order", {name: name for name in ORDERS})
Cache = StrEnum("Cache", {name: name for name in CACHES})

# setting: (type, flag, default, help). A default is only shown: what the user does not give is left
# to the model's generation_config.
OPTIONS: dict[str, tuple[Any, str, Any, str]] = {
    "mode": (
        Mode,
        "--mode",
        "diffusion",
        "How to decode: denoise blocks; draft blocks and verify them left to right, with the text "
        "of the AR mode; or one token after the other.",
    ),
    "max_new_tokens": (
        int, "--max-new-tokens", "128; 0 for prompts with gaps", "Number of tokens to write.",
    ),
    "block_length": (
        int, "--block-length", "as trained", "Number of tokens that are denoised together.",
    ),
    "threshold": (
        float,
        "--threshold",
        "0.9",
        "Decide all tokens whose probability is above this at each forward.",
    ),
    "steps_per_block": (
        int,
        "--steps-per-block",
        None,
        "Instead of a threshold: finish each block in this many forwards.",
    ),
    "entropy_bound": (
        float,
        "--entropy-bound",
        None,
        "Instead of a threshold: decide tokens at each forward while their joint entropy, in nats, "
        "stays within this bound.",
    ),
    "order": (
        Order, "--order", "prob", "With --steps-per-block: which tokens are decided first.",
    ),
    "remask": (
        float,
        "--remask",
        "0",
        "With --steps-per-block: share of the decided tokens that each forward masks again.",
    ),
    "cfg_scale": (float, "--cfg-scale", "0", "Strength of classifier-free guidance."),
    "draft_length": (
        int, "--draft-length", "3", "With --mode speculative: number of tokens in a draft.",
    ),
    "cache_implementation": (
        Cache,
        "--cache",
        None,
        "How keys and values are kept. For full attention prefix and dual, which are approximate, "
        "or none; otherwise dynamic, static or none.",
    ),
    "check_cache": (
        bool,
        "--check-cache",
        None,
        "Compute each forward without the cache as well, and report the difference.",
    ),
    "temperature": (
        float, "--temperature", "0", "Temperature of the draws; at 0 the likeliest token is taken.",
    ),
    "top_k": (int, "--top-k", None, "Draw from this many of the likeliest tokens."),
    "top_p": (
        float, "--top-p", None, "Draw from the likeliest tokens up to this total probability.",
    ),
    "min_p": (
        float,
        "--min-p",
        None,
        "Draw from the tokens with at least this fraction of the likeliest token's probability.",
    ),
    "repetition_penalty": (
        float,
        "--repetition-penalty",
        "1",
        "Above 1, tokens that have occurred before become less likely.",
    ),
    "stop_strings": (
        list[str], "--stop", None, "End the answer after this text. Can be given several times.",
    ),
    "seed": (
        int,
        "--seed",
        None,
        "Seed of the draws. A prompt gets the same answer in every batch.",
    ),
}  # fmt: skip


def with_sampler(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the sampler's options: it gets those that the user gave as `settings`."""
    own = inspect.signature(function, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.name != "settings"]
    for name, (kind, flag, default, text) in OPTIONS.items():
        shown = default or False
        info = typer.Option(flag, help=text, show_default=shown, rich_help_panel="Sampler")
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, info],
            )
        )

    @functools.wraps(function)
    def verb(**values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        settings = {
            name: value.value if isinstance(value, StrEnum) else value
            for name, value in given.items()
            if value is not None and value != []
        }
        function(**values, settings=settings)

    verb.__signature__ = own.replace(parameters=parameters)
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    del verb.__wrapped__
    return verb
