"""The sampler's options, which `generate` and `chat` have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..core.options import CACHES, MODES, ORDERS

Pause = Annotated[
    float, typer.Option(min=0, help="Seconds to pause after each forward pass, to watch it.")
]
Mode = StrEnum("Mode", {name: name for name in MODES})
Order = StrEnum("Order", {name: name for name in ORDERS})
Cache = StrEnum("Cache", {name: name for name in CACHES})

# setting: (type, flag, default, help). A default is only shown: what the user does not give is left
# to the model's generation_config.
OPTIONS: dict[str, tuple[Any, str, Any, str]] = {
    "mode": (
        Mode,
        "--mode",
        "the model's own: speculative if it has an AR mode, unless an option or a gap needs "
        "diffusion",
        "How to decode: diffusion denoises blocks; speculative drafts blocks and verifies them, "
        "which writes the text of ar in fewer forward passes; ar writes one token after another.",
    ),
    "max_new_tokens": (
        int, "--max-new-tokens", "128; 0 for prompts with gaps", "Maximum number of tokens to "
        "write.",
    ),
    "block_length": (
        int, "--block-length", "as trained", "Number of tokens to denoise together.",
    ),
    "threshold": (
        float,
        "--threshold",
        "the model's own",
        "In each forward pass, decide all tokens whose probability is above this.",
    ),
    "steps_per_block": (
        int,
        "--steps-per-block",
        None,
        "Instead of a threshold: finish each block in this many forward passes.",
    ),
    "entropy_bound": (
        float,
        "--entropy-bound",
        None,
        "Instead of a threshold: in each forward pass, decide as many tokens as keep their joint "
        "entropy within this bound, in nats.",
    ),
    "order": (
        Order, "--order", "prob", "With --steps-per-block: which tokens are decided first.",
    ),
    "remask": (
        float,
        "--remask",
        "0",
        "With --steps-per-block: share of the decided tokens that each forward pass masks again.",
    ),
    "edit_threshold": (
        float,
        "--edit-threshold",
        None,
        "Replace decided tokens of a block, as long as it is denoised, where another token's "
        "probability is above this.",
    ),
    "corrector_steps": (
        int,
        "--corrector-steps",
        "0",
        "With --edit-threshold: forward passes for a block after it is decided.",
    ),
    "edit_blocks": (
        int,
        "--edit-blocks",
        "0",
        "With --edit-threshold and a shorter --block-length: earlier blocks that may change too.",
    ),
    "cfg_scale": (float, "--cfg-scale", "0", "Strength of classifier-free guidance."),
    "draft_length": (
        int,
        "--draft-length",
        "as many as pay",
        "With --mode speculative: number of tokens drafted in each forward pass.",
    ),
    "draft_nodes": (
        int,
        "--draft-nodes",
        None,
        "With --mode speculative: verify a tree of this many candidates instead of a chain.",
    ),
    "cache_implementation": (
        Cache,
        "--cache",
        None,
        "How to cache keys and values: dynamic, static or none; for full attention prefix or dual, "
        "which are approximate, or none.",
    ),
    "compile": (
        bool,
        "--compile",
        None,
        "Compile the forward passes whose shapes recur; on a GPU, as CUDA graphs. The first text "
        "takes about a minute longer. With mode speculative, set --draft-length too.",
    ),
    "check_cache": (
        bool,
        "--check-cache",
        None,
        "Compute each forward pass without the cache too, and report the difference.",
    ),
    "temperature": (
        float, "--temperature", "0", "Sampling temperature; at 0, the likeliest token is chosen.",
    ),
    "top_k": (int, "--top-k", None, "Sample only from this many of the likeliest tokens."),
    "top_p": (
        float, "--top-p", None, "Sample only from the likeliest tokens, up to this total "
        "probability.",
    ),
    "min_p": (
        float,
        "--min-p",
        None,
        "Sample only from tokens with at least this fraction of the likeliest token's probability.",
    ),
    "repetition_penalty": (
        float,
        "--repetition-penalty",
        "1",
        "Above 1, make tokens that have occurred before less likely.",
    ),
    "logit_bias": (
        list[str],
        "--logit-bias",
        None,
        "Add a bias to a token's logit, as TOKEN=BIAS; TOKEN is an id, or a text that is one "
        "token. Can be repeated.",
    ),
    "guide": (
        str,
        "--guide",
        None,
        "Add to all logits what this function of yours returns, as file.py:function.",
    ),
    "classifier": (
        str,
        "--classifier",
        None,
        "With a noise of vectors: move them by the gradient of this function of yours, as "
        "file.py:function.",
    ),
    "fluency": (
        float,
        "--fluency",
        "0.01",
        "With --classifier: how strongly the vectors are held where they were drawn.",
    ),
    "stop_strings": (
        list[str], "--stop", None, "End the answer after this text. Can be repeated.",
    ),
    "seed": (
        int,
        "--seed",
        None,
        "Random seed. A prompt has the same answer whatever batch it is in.",
    ),
}  # fmt: skip


def with_sampler(
    function: Callable[..., None], without: Collection[str] = ()
) -> Callable[..., None]:
    """Give a verb the sampler options; those that the user set are passed as `settings`.

    Args:
        without: options that mean nothing to it.
    """
    own = inspect.signature(function, eval_str=True)
    options = {name: option for name, option in OPTIONS.items() if name not in without}
    parameters = [p for p in own.parameters.values() if p.name != "settings"]
    for name, (kind, flag, default, text) in options.items():
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
        given = {name: values.pop(name) for name in options}
        settings = {
            name: value.value if isinstance(value, StrEnum) else value
            for name, value in given.items()
            if value is not None and value != []
        }
        if "logit_bias" in settings:
            from ..generation.steering import biases_of

            settings["logit_bias"] = biases_of(settings["logit_bias"])
        function(**values, settings=settings)

    verb.__signature__ = own.replace(parameters=parameters)
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    del verb.__wrapped__
    return verb
