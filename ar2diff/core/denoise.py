"""The decoding loop: `denoise` decides all tokens of a canvas and yields its state as it goes.

Everything that decodes uses it: the command line, chat, rollouts, the code in a converted folder.
A state is the canvas after a forward, so that a screen can draw each one.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from .canvas import Canvas, Finished
from .compiled import check_compiles
from .denoiser import Denoiser
from .draft import Draft
from .errors import Ar2DiffError, option
from .guide import guided
from .options import Options
from .pace import Pace
from .samplers import Chooser, Context
from .seeds import keyed_generator
from .spec import Spec
from .speculation import Speculation, measured_pace
from .transfer import upload

FILTERS = {
    "top_h": logits_process.TopHLogitsWarper, "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper, "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
}  # fmt: skip


@torch.no_grad()
def denoise(
    model: Any,
    spec: Spec,
    canvas: Canvas,
    options: Options,
    *,
    processors: Sequence[Any] = (),
    finished: Finished | None = None,
    draft: Draft | None = None,
) -> Iterator[Canvas]:
    """Decide all tokens of a canvas, yielding it after every forward.

    Args:
        model: in eval mode.
        canvas: from `canvas_of`; changed in place.
        options: from `resolve`.
        processors: additional processors of transformers that look at each position alone.
        finished: additional reasons to stop a row, from `finished_of`.
        draft: the draft adapter, if the model has one; `spec` is then that of `spec_for`.

    Raises:
        Ar2DiffError: as `check_decodes`; the diffusion head that the spec names is not there.
    """
    yield from decoder_of(
        model, spec, canvas, options, processors=processors, finished=finished, draft=draft
    ).run()


def decoder_of(
    model: Any,
    spec: Spec,
    canvas: Canvas,
    options: Options,
    *,
    processors: Sequence[Any] = (),
    finished: Finished | None = None,
    draft: Draft | None = None,
    generators: list[torch.Generator] | None = None,
) -> Speculation | Denoiser:
    """What decides the tokens of a canvas, a forward at each `step`; arguments as of `denoise`.

    Args:
        generators: of the rows; None: those of `generators_of`.
    """
    check_decodes(model, spec, canvas, options)
    vocabulary = model.config.get_text_config().vocab_size
    suppressed = torch.tensor(sorted(_impossible(spec, options, vocabulary)), dtype=torch.long)
    readers = _readers(options)
    chooser = Chooser(
        options,
        *upload(model.device, suppressed),
        generators_of(spec, canvas, options) if generators is None else generators,
        [*_warpers(options, readers, model.device), *processors],
        readers,
    )
    if options.mode == "diffusion":
        return Denoiser(model, spec, canvas, options, chooser, finished)
    return Speculation(
        model, spec, canvas, chooser, partial(_pace, model, spec, chooser, draft),
        draft=draft, cache=options.cache_implementation, finished=finished,
    )  # fmt: skip


def check_decodes(model: Any, spec: Spec, canvas: Canvas, options: Options) -> None:
    """Refuse what `denoise` cannot do, before anything is computed.

    Raises:
        Ar2DiffError: the options leave no token to write, or name one that the model lacks; it
            cannot be compiled.
    """
    rows = model.config.get_text_config().vocab_size
    impossible = _impossible(spec, options, rows)
    if len(impossible | (canvas.ends if canvas.held else set())) >= rows:
        raise Ar2DiffError(
            f"{option('suppress_tokens')} and {option('eos_token_id')} together leave no token "
            "that could be written",
            f"remove tokens from {option('suppress_tokens')}",
        )
    if any(token >= rows for (token,) in options.sequence_bias or ()):
        raise Ar2DiffError(
            f"{option('sequence_bias')} or {option('logit_bias')} names a token id that is out of "
            f"range for the model, which has {rows} tokens",
            "use ids of its tokenizer",
        )
    if options.compile:
        check_compiles(model)


def _impossible(spec: Spec, options: Options, vocabulary: int) -> set[int]:
    """Ids that no position can hold."""
    barred = spec.mask_token_id, *options.suppress_tokens
    return {token for token in barred if 0 <= token < vocabulary}


def _pace(model: Any, spec: Spec, chooser: Chooser, draft: Draft | None, canvas: Canvas) -> Pace:
    """How many tokens the options ask to draft for the rows of a canvas; if they do not say, as
    many as pay."""
    options = chooser.options
    if options.mode == "ar" or spec.block_length == 1:
        return Pace(0)
    if options.draft_length is None and options.draft_nodes is None:
        return measured_pace(model, spec, canvas, chooser.suppressed, draft)
    return Pace(options.draft_length or spec.block_length - 1, options.draft_nodes)


def generators_of(
    spec: Spec, canvas: Canvas, options: Options, number: int = 0
) -> list[torch.Generator]:
    """One for each row, keyed by the seed, the prompt, and the number of earlier rows with the same
    prompt: a row's draws do not depend on its batch, and equal prompts get different ones. Without
    a seed, torch's draws it; but greedy tokens are the same in every call, also where a noise is
    drawn.

    Args:
        number: how many rows of the same call have the prompts of the canvas already.
    """
    rows = len(canvas.ids)
    greedy, seed = options.greedy and options.order != "random", options.seed
    if greedy and not spec.noise.random:
        return []
    if greedy and seed is None:
        seed = 0
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # torch.manual_seed governs it
    if isinstance(seed, tuple):
        if len(seed) != rows:
            raise Ar2DiffError(
                f"{option('seed')} is a list of {len(seed)}, but there are {rows} rows",
                "use one seed, or a list with one for each row",
            )
        return [keyed_generator(s) for s in seed]
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for row in range(rows):
        prompt = tuple(canvas.ids[row, : int(canvas.prompt[row])].tolist())
        generators.append(keyed_generator(seed, number + seen[prompt], *prompt))
        seen[prompt] += 1
    return generators


def _warpers(options: Options, readers: Sequence[Any], device: Any) -> list[Any]:
    """The processors that the options ask for, in the order of transformers; a guide follows the
    penalty."""
    warpers: list[Any] = []
    if options.sequence_bias:
        warpers.append(logits_process.SequenceBiasLogitsProcessor(options.sequence_bias))
    warpers += readers
    if options.greedy:
        return warpers
    if options.temperature != 1:
        warpers.append(logits_process.TemperatureLogitsWarper(options.temperature))
    for name, value in options.filters:
        if name == "eta_cutoff":
            warpers.append(logits_process.EtaLogitsWarper(value, device=str(device)))
        else:
            warpers.append(FILTERS[name](value))
    return warpers


def _readers(options: Options) -> list[Callable[[Context, Tensor], Tensor]]:
    """Those of the processors that look at what stands around a position."""
    readers: list[Callable[[Context, Tensor], Tensor]] = []
    if options.repetition_penalty != 1:
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
        readers.append(lambda context, scores: penalty(context.ids, scores))
    if options.guide is not None:
        readers.append(partial(guided, options.guide))
    return readers
