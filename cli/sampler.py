"""The sampler's options, which `generate` and `chat` have in common."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..core.errors import Ar2DiffError
from ..core.options import CACHES, MODES, ORDERS

Mode = StrEnum("Mode", {name: name for name in MODES})
Order = StrEnum("Order", {name: name for name in ORDERS})
Cache = StrEnum("Cache", {name: name for name in CACHES})

# setting: (type, flag, default, help). A default is shown alone: what the user does not give stays
# with the model's generation_config.
OPTIONS: dict[str, tuple[Any, str, Any, str]] = {
    "mode": (Mode, "--mode", "diffusion", "Denoise; draft and verify; or left to right."),
    "max_new_tokens": (int, "--max-new-tokens", "128; 0 with gaps", "Tokens after the prompt."),
    "block_length": (int, "--block-length", "as trained", "Tokens denoised together, at most."),
    "threshold": (float, "--threshold", "0.9", "Decide tokens surer than this."),
    "steps": (int, "--steps", None, "Instead: this many forwards a block."),
    "entropy_bound": (float, "--entropy-bound", None, "Instead: while the joint entropy allows."),
    "order": (Order, "--order", "prob", "With --steps: which tokens first."),
    "remask": (float, "--remask", "0", "With --steps: share of tokens that a step takes back."),
    "cfg_scale": (float, "--cfg-scale", "0", "Classifier-free guidance."),
    "draft_length": (int, "--draft-length", "3", "Mode speculative: tokens a draft."),
    "cache_implementation": (Cache, "--cache", None, "prefix, dual: for full attention."),
    "check_cache": (bool, "--check-cache", None, "Read without the cache too; say what differs."),
    "temperature": (float, "--temperature", "0", "0 is greedy."),
    "top_k": (int, "--top-k", None, "Sample among this many tokens."),
    "top_p": (float, "--top-p", None, "Sample among tokens of this probability together."),
    "min_p": (float, "--min-p", None, "Sample among tokens of this share of the likeliest's."),
    "repetition_penalty": (float, "--repetition-penalty", "1", "Above 1: repeat less."),
    "stop_strings": (list[str], "--stop", None, "End the answer behind this text; repeatable."),
    "seed": (int, "--seed", None, "Of the draws; those of a prompt do not depend on its batch."),
}


def with_sampler(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the sampler's options: it gets those that the user named as `settings`, and what
    it raises speaks of flags."""
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
        try:
            function(**values, settings=settings)
        except Ar2DiffError as error:
            raise Ar2DiffError(in_flags(error.what), in_flags(error.fix)) from error

    verb.__signature__ = own.replace(parameters=parameters)
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    del verb.__wrapped__
    return verb


def in_flags(message: str) -> str:
    """A message about settings, as one about flags."""
    flags = {name: flag for name, (_, flag, _, _) in OPTIONS.items()}
    long = "|".join(name for name in flags if "_" in name)
    short = "|".join(name for name in flags if "_" not in name)  # these are words, too
    for pattern in (
        rf"(?<![\w.-])({long})\b",
        rf"(?<=^generate: )({short})\b",
        rf"(?<=\bleave )({short})\b",
        rf"(?<=\bset )({short})\b",
        rf"(?<![-\w])(mode)(?= (?:{'|'.join(MODES)})\b)",
    ):
        message = re.sub(pattern, lambda match: flags[match[1]], message)
    return message.removeprefix("generate: ")
