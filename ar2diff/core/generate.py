"""`generate`: what `model.generate` is in a converted folder, with the arguments of transformers.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria
from transformers.utils import ModelOutput

from .canvas import Canvas, Finished
from .denoise import denoise
from .errors import Ar2DiffError
from .forward import context_length
from .options import Options, resolve
from .probe import probe
from .spec import Spec

# Processors of transformers that look at each position alone.
ROW_WISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper",
        "SuppressTokensLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    )
)  # fmt: skip
PROBED: WeakKeyDictionary[Any, Spec] = WeakKeyDictionary()
PROBING = Lock()  # the probe shortens the windows in the config while it looks


@dataclass
class DiffusionOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: [R, L] prompts and answers, as without it.
        forwards: [R] forwards that each row took part in; tokens_per_forward: [R].
        logprobs: [R, L - prompt] of the new tokens, when they were decided; 0 in the padding.
        steps: [R, L - prompt] the forward at which each was decided, from 1; 0 in the padding.
    """

    sequences: Tensor | None = None
    forwards: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    logprobs: Tensor | None = None
    steps: Tensor | None = None


def room_of(model: Any, spec: Spec, options: Options) -> int | None:
    """Tokens that a row may have: the context, in whole blocks; None where it has no limit."""
    context = context_length(model.config)
    return None if context is None else context // _grid(spec, options) * _grid(spec, options)


def _grid(spec: Spec, options: Options) -> int:
    blocks = options.mode == "diffusion" and spec.attention != "full"
    return options.block_length if blocks else 1


def canvas_of(
    model: Any,
    spec: Spec,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    cut: bool = False,
) -> Canvas:
    """The canvas that answers prompts, which may hold masks.

    Args:
        cut: write less than `max_new_tokens` where the context has no room for it, with a warning,
            instead of an error.

    Raises:
        Ar2DiffError: a prompt that is empty, starts with a mask, or is over the model's context.
    """
    rows = model.config.get_text_config().vocab_size
    context, most = context_length(model.config), room_of(model, spec, options)
    longest = max(map(len, prompts))
    new = options.max_new_tokens
    for number, prompt in enumerate(prompts):
        if not len(prompt) or prompt[0] == spec.mask_token_id:
            raise Ar2DiffError(
                f"generate: row {number} has no token that its text can start from",
                "start it with a token, the BOS for one",
            )
    if any(spec.mask_token_id in prompt for prompt in prompts) and options.mode != "diffusion":
        raise Ar2DiffError(
            f"generate: mode {options.mode} cannot fill masks in a prompt", "use mode diffusion"
        )
    room = new if most is None else most - longest
    if room < min(new, 1):
        raise Ar2DiffError(
            f"generate: the prompt has {longest} tokens, the model's context {context}",
            f"shorten it to {max(0, most - 1)} tokens or fewer",
        )
    if room < new and not cut:
        raise Ar2DiffError(
            f"{longest} prompt and {new} new tokens exceed the context of {context}",
            f"lower --max-new-tokens to {room}",
        )
    if room < new:
        warnings.warn(
            f"max_new_tokens {new} is cut to {room}: the context has {context} tokens",
            stacklevel=3,
        )
        new = room
    return Canvas.of_prompts(
        prompts,
        spec.mask_token_id,
        max_new_tokens=new,
        grid=_grid(spec, options),
        end_ids=[i for i in options.eos_token_id if 0 <= i < rows],
        min_new_tokens=min(options.min_new_tokens, new),
    )


@torch.no_grad()
def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    *,
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | DiffusionOutput:
    """Write after prompts, or fill the mask tokens in them, by denoising. Takes the arguments of
    transformers' `generate` that a denoiser can honour, and refuses the others by name.

    Args:
        inputs, input_ids: [R, P] prompts, padded left or right where `attention_mask` is 0. None
            starts from the BOS token.
        streamer: of transformers; gets tokens once all before them are decided, and the drafts of
            each step where it has `put_draft`.
        tokenizer: needed for `stop_strings`.
        kwargs: fields of `Options`, `do_sample`, `max_length`. An argument wins over
            `generation_config`, that over the model's own, that over the spec.

    Returns:
        [R, P + N] the prompts as given, then the answers, padded on the right; N is at most
        `max_new_tokens`. A `DiffusionOutput` with `return_dict_in_generate`.

    Raises:
        Ar2DiffError: the call, or the model, is not one that can be honoured.
    """
    spec = spec_of(model)
    check_model(model, spec)
    given = inputs if inputs is not None else input_ids
    if inputs is not None and input_ids is not None:
        raise Ar2DiffError("generate: inputs and input_ids are both given", "give one of them")
    for name, ids in (("input_ids", given), ("attention_mask", attention_mask)):
        if ids is not None and not (isinstance(ids, Tensor) and ids.dim() in (1, 2)):
            raise Ar2DiffError(f"generate: {name} is no tensor of rows", "give a tensor [R, P]")
    width = 0 if given is None else given.shape[-1]
    options = resolve(spec, kwargs, (generation_config, model.generation_config), width)
    if attention_mask is None and given is not None:
        attention_mask = _real(given, options)
    given, real, prompts = _prompts(given, attention_mask, options)
    _check_ids(model, prompts)
    if options.num_return_sequences > 1:
        given = given.repeat_interleave(options.num_return_sequences, 0)
        real = real.repeat_interleave(options.num_return_sequences, 0)
        prompts = [p for p in prompts for _ in range(options.num_return_sequences)]
    canvas = canvas_of(model, spec, prompts, options, cut=True)
    if spec.attention != "full" and options.mode == "diffusion":
        unread = int(canvas.unread(options.block_length).max())
        if unread:
            warnings.warn(
                f"{unread} tokens behind the gap lie in later blocks: {spec.attention} attention "
                "does not read them",
                stacklevel=2,
            )
    if streamer is not None and len(prompts) > 1:
        raise Ar2DiffError("generate: a streamer takes one row", "leave it out, or give one prompt")
    padding = [given.shape[1] - len(prompt) for prompt in prompts]
    finished = finished_of(model, options, stopping_criteria, tokenizer, padding)
    states = denoise(
        model, spec, canvas, options, processors=_processors(logits_processor), finished=finished
    )
    with evaluating(model):
        if streamer is None:
            for _ in states:
                pass
        else:
            _stream(states, canvas, prompts[0], streamer, bool(options.remask))
    return _output(canvas, given, real, options)


def spec_of(model: Any) -> Spec:
    """The spec in a model's config.

    Raises:
        Ar2DiffError: it has none.
    """
    spec = Spec.from_config(model.config.to_dict())
    if spec is None:
        raise Ar2DiffError(
            "generate: the model's config has no 'diffusion' block: it is not converted",
            "convert it with 'ar2diff adapt MODEL --output-dir DIR'",
        )
    return spec


def check_model(model: Any, spec: Spec) -> None:
    """Once for each model: that its attention does what the spec says (an older transformers would
    run it causally, and write nonsense without an error).

    Raises:
        Ar2DiffError: it does not.
    """
    with PROBING:
        if PROBED.get(model) == spec:
            return
        with evaluating(model):
            problems = probe(model, spec)
        if not problems:
            PROBED[model] = spec
    if problems:
        raise Ar2DiffError(
            f"generate: the model does not do what its spec says: {problems[0]}",
            "upgrade transformers, or load it with attn_implementation='sdpa' or 'eager'",
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and without gradient checkpointing, which drops the cache."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _prompts(
    given: Tensor | None, attention_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The input [R, P], where it is no padding, and its rows without; a BOS if there is nothing."""
    if given is None or given.shape[-1] == 0:
        if options.bos_token_id is None:
            raise Ar2DiffError("generate: no prompt, and the model has no BOS", "give a prompt")
        rows = 1 if given is None or given.dim() == 1 else len(given)
        given = torch.full((rows, 1), options.bos_token_id)
        attention_mask = None
    if given.dim() == 1:
        given = given[None]
        attention_mask = attention_mask[None] if attention_mask is not None else None
    if attention_mask is None:
        return given, torch.ones(given.shape, dtype=torch.bool), given.tolist()
    real = attention_mask.to("cpu").bool()
    if real.shape != given.shape:
        raise Ar2DiffError(
            f"generate: attention_mask is {list(real.shape)}, input_ids {list(given.shape)}",
            "give one mask entry a token",
        )
    if (real[:, 1:] != real[:, :-1]).sum(1).gt(2).any() or (
        ((real[:, 1:] != real[:, :-1]).sum(1) == 2) & real[:, 0]
    ).any():
        raise Ar2DiffError("generate: attention_mask has a hole", "pad on the left or on the right")
    ids = given.to("cpu")
    return given, real, [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def _real(given: Tensor, options: Options) -> Tensor | None:
    """[R, P] bool, False where the rows of a batch are padded at their ends, as transformers takes
    it where no mask is given: by a pad token that is named and is no end token."""
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_id or given.dim() == 1 or len(given) == 1:
        return None
    word = given != pad
    return (word.cumsum(1) > 0) & (word.flip(1).cumsum(1).flip(1) > 0)


def _check_ids(model: Any, prompts: list[list[int]]) -> None:
    rows = model.config.get_text_config().vocab_size
    if not prompts:
        raise Ar2DiffError("generate: no rows", "give a prompt")
    for number, prompt in enumerate(prompts):
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < rows:
                raise Ar2DiffError(
                    f"generate: row {number} holds {token!r}, the model has {rows} tokens",
                    "tokenize with the model's own tokenizer",
                )


def _processors(given: Any) -> list[Any]:
    for processor in given or ():
        if not isinstance(processor, ROW_WISE):
            raise Ar2DiffError(
                f"generate: {type(processor).__name__} may read the tokens to the left, which a "
                "denoiser has not written yet",
                "use the options of generate instead, or a processor of a single position",
            )
    return list(given or ())


def finished_of(
    model: Any,
    options: Options,
    given: Any,
    tokenizer: Any,
    padding: Sequence[int] | None = None,
) -> Finished | None:
    """Stop strings, time limits and stopping criteria, asked for every new token in turn.

    Args:
        given: stopping criteria of transformers, or None.
        tokenizer: for stop strings.
        padding: of each row's prompt, which a criterion may count as part of it; None: none.
    """
    criteria = list(given or [])
    if options.stop_strings:
        if tokenizer is None:
            raise Ar2DiffError("generate: stop_strings need a tokenizer", "pass tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, list(options.stop_strings)))
    if options.max_time is not None:
        criteria.append(MaxTimeCriteria(options.max_time))
    if not criteria:
        return None
    rows = len(padding or ())
    own = [[_of_row(criterion, row, rows) for criterion in criteria] for row in range(rows)]

    def finished(row: int, ids: Tensor) -> bool:
        pads = ids.new_full((padding[row] if padding else 0,), options.filler)
        ids = torch.cat([pads, ids])[None].to(model.device)
        asked = own[row] if rows else criteria
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in asked)

    return finished


def _of_row(criterion: Any, row: int, rows: int) -> Any:
    """A criterion that is asked about one row alone: of the flags that it may keep for each row of
    a batch (lm-eval's do) it has that row's."""
    own = copy(criterion) if rows > 1 else criterion
    for name, value in vars(own).items() if rows > 1 else ():
        if isinstance(value, list) and [type(flag) for flag in value] == [bool] * rows:
            setattr(own, name, value[row : row + 1])
    return own


def _stream(
    states: Iterator[Canvas], canvas: Canvas, prompt: list[int], streamer: Any, remask: bool
) -> None:
    streamer.put(torch.tensor(prompt))
    sent = len(prompt)
    for _ in states:
        if hasattr(streamer, "put_draft") and not canvas.done[0]:
            streamer.put_draft(canvas.ids[0, sent : int(canvas.total[0])])
        certain = canvas.certain(0, remask)
        if certain > sent:
            streamer.put(canvas.ids[0, sent:certain].clone())
            sent = certain
    streamer.end()


def _output(
    canvas: Canvas, given: Tensor, real: Tensor, options: Options
) -> Tensor | DiffusionOutput:
    rows = range(len(canvas.ids))
    new = (canvas.end - canvas.prompt).clamp(min=0)
    size = int(new.max())
    sequences = torch.full((len(rows), given.shape[1] + size), options.filler)
    logprobs, steps = torch.zeros(len(rows), size), torch.zeros(len(rows), size, dtype=torch.long)
    sequences[:, : given.shape[1]] = given.to("cpu")
    for row in rows:
        prompt, n = int(canvas.prompt[row]), int(new[row])
        place = slice(prompt, prompt + n)
        sequences[row, given.shape[1] : given.shape[1] + n] = canvas.ids[row, place]
        logprobs[row, :n], steps[row, :n] = canvas.logprob[row, place], canvas.step[row, place]
    if not bool(canvas.given[:, :].all()):
        _fill(sequences, given, real, canvas)
    sequences = sequences.to(given.device)
    if not options.return_dict_in_generate:
        return sequences
    decided = ((canvas.step > 0) & (torch.arange(canvas.ids.shape[1]) < canvas.end[:, None])).sum(1)
    return DiffusionOutput(
        sequences=sequences,
        forwards=canvas.forwards,
        tokens_per_forward=decided / canvas.forwards.clamp(min=1),
        logprobs=logprobs,
        steps=steps,
    )


def _fill(sequences: Tensor, given: Tensor, real: Tensor, canvas: Canvas) -> None:
    """Put what was filled in into the prompt's part of the output."""
    masked = (given.to("cpu") == canvas.mask_token_id) & real  # padding may be anything
    for row, here in enumerate(masked):
        holes = here.nonzero()[:, 0]
        if len(holes):
            prompt = canvas.ids[row, : int(canvas.prompt[row])]
            filled = prompt[~canvas.given[row, : len(prompt)]]
            sequences[row, holes] = filled
