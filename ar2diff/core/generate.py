"""`generate`: what `model.generate` does in a converted folder, with the arguments of transformers.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process
from transformers.utils import ModelOutput, cached_file

from .canvas import Canvas
from .denoise import denoise
from .draft import CONFIG, WEIGHTS, Draft, load_draft
from .errors import Ar2DiffError, first_line, option, shortened
from .fitted import read_beside
from .forward import context_length
from .images import Images, image_token_of, prepare
from .inputs import check_tensors, has_gaps, read_prompts
from .masked_lm import is_masked_lm
from .options import Options, resolve
from .pattern import constraint_of
from .probe import probe
from .sight import Sight, given_images, numbered_prompts
from .spec import Spec
from .stopping import finished_of

# Processors of transformers that look at each position alone.
ROW_WISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper",
        "SuppressTokensLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    )
)  # fmt: skip
DRAFTS: WeakKeyDictionary[Any, dict[str, Draft]] = WeakKeyDictionary()
PROBED: WeakKeyDictionary[Any, Spec] = WeakKeyDictionary()
PROBING = Lock()  # the probe shortens the windows in the config while it looks


@dataclass
class DiffusionOutput(ModelOutput):
    """The result of `generate(..., return_dict_in_generate=True)`.

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
    """How many tokens a row may have: the context in whole blocks; None if it has no limit."""
    context = context_length(model)
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
    images: Images | None = None,
    places: Sequence[Tensor] | None = None,
) -> Canvas:
    """The canvas that answers prompts, which may hold masks.

    Args:
        images: those whose codes are among the ids of the prompts; places: as of `Sight.of_rows`.
        cut: if the context has no room for `max_new_tokens`, write fewer and warn instead of
            raising an error.

    Raises:
        Ar2DiffError: a prompt that is empty, starts with a mask, or exceeds the model's context.
    """
    rows = model.config.get_text_config().vocab_size
    context, most = context_length(model), room_of(model, spec, options)
    longest = max(map(len, prompts))
    new = options.max_new_tokens
    if options.cache_implementation in ("prefix", "dual") and is_masked_lm(
        model.config.architectures
    ):
        raise Ar2DiffError(
            f"{option('cache_implementation', options.cache_implementation)} needs a model that "
            "keeps keys and values, and a masked language model does not",
            f"use {option('cache_implementation', 'none')}",
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt) or prompt[0] == spec.mask_token_id:
            raise Ar2DiffError(
                f"row {number} starts with a mask, but the first token of a text cannot be "
                "predicted",
                "start it with another token, for example the BOS token",
            )
    if any(spec.mask_token_id in prompt for prompt in prompts) and options.mode != "diffusion":
        raise Ar2DiffError(
            f"{option('mode', options.mode)} cannot fill gaps in a prompt",
            f"use {option('mode', 'diffusion')}",
        )
    if spec.images == "prefix" and any(spec.mask_token_id in prompt for prompt in prompts):
        raise Ar2DiffError(
            "this model cannot fill gaps: it reads its whole prompt in both directions, gaps and "
            "all",
            "continue a prompt instead",
        )
    if not spec.noise.fills and any(spec.mask_token_id in prompt for prompt in prompts):
        raise Ar2DiffError(
            f"this model cannot fill gaps: its noise, {spec.noise.kind}, looks like text, so the "
            "tokens after a gap cannot be told from it",
            "continue a prompt instead, or convert the base with another noise.kind",
        )
    room = new if most is None else most - longest
    if room < min(new, 1):
        raise Ar2DiffError(
            f"the prompt has {longest} tokens, which leaves no room for an answer in the model's "
            f"context of {context} tokens",
            f"shorten the prompt to at most {max(0, most - 1)} tokens",
        )
    if room < new and not cut:
        raise Ar2DiffError(
            f"{longest} prompt tokens plus {new} new ones exceed the model's context of {context}",
            f"lower {option('max_new_tokens')} to {room}",
        )
    if room < new:
        warnings.warn(
            f"max_new_tokens is reduced from {new} to {room}, because the context has only "
            f"{context} tokens",
            stacklevel=3,
        )
        new = room
    sight = None
    if images is None and spec.images == "prefix":  # of texts alone, too
        images = Images(())
    if images is not None:
        seen = [images.numbered(torch.as_tensor(prompt)) for prompt in prompts]
        sight = Sight.of_rows(model, images, seen, spec.images or "causal", places)
        token = image_token_of(model.config)
        prompts = [ids.masked_fill(ids < 0, token).tolist() for ids in seen]
    canvas = Canvas.of_prompts(
        prompts,
        spec.mask_token_id,
        max_new_tokens=new,
        grid=_grid(spec, options),
        end_ids=[i for i in options.eos_token_id if 0 <= i < rows],
        min_new_tokens=min(options.min_new_tokens, new),
    )
    canvas.sight = sight
    return canvas


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
    draft: Any = None,
    **kwargs: Any,
) -> Tensor | DiffusionOutput:
    """Continue prompts, or fill the mask tokens in them. Takes the arguments of transformers'
    `generate` that a denoiser can honour, and refuses the others by name.

    A model with an AR mode continues prompts with that mode's text, in fewer forwards (mode
    `speculative`). It denoises (mode `diffusion`) where the call says so, sets an option of that
    mode such as `threshold`, or has gaps to fill; a model without an AR mode always does.

    Args:
        inputs, input_ids: [R, P] prompts, padded on the left or right where `attention_mask` is 0.
            None starts from the BOS token.
        streamer: of transformers; gets tokens once all before them are decided, and the drafts of
            each step if it has a method `put_draft`.
        tokenizer: needed for `stop_strings`, `regex`, `json_schema`, `choice` and
            `grammar`.
        draft: folder or Hub id of a draft adapter for the model, or a loaded one. The text is then
            the one that the model itself writes, in fewer forwards: in float32 up to near-ties.
        kwargs: fields of `Options`, `do_sample`, `max_length`. An argument takes precedence over
            `generation_config`, that over the model's own, and that over the spec.

    Returns:
        [R, P + N] the prompts as given, then the answers, padded on the right; N is at most
        `max_new_tokens`. A `DiffusionOutput` with `return_dict_in_generate`.

    Raises:
        Ar2DiffError: the call, or the model, cannot be honoured.
    """
    draft = find_draft(draft, model)
    spec = spec_of(model, draft)
    check_model(model, spec, draft)
    given = inputs if inputs is not None else input_ids
    if inputs is not None and input_ids is not None:
        raise Ar2DiffError(
            f"{option('inputs')} and {option('input_ids')} are both given", "use only one of them"
        )
    check_tensors(given, attention_mask)
    width = 0 if given is None else given.shape[-1]
    inputs, places = {}, None
    if image_token_of(model.config) is not None:
        inputs, places = given_images(model, *_with_padding(given, attention_mask), kwargs)
    configs = (generation_config, _own_config(model))
    gaps = has_gaps(given, attention_mask, spec.mask_token_id)
    options = resolve(spec, kwargs, configs, width, draft is not None, gaps)
    vocabulary = model.config.get_text_config().vocab_size
    given, real, prompts = read_prompts(given, attention_mask, options, vocabulary)
    images = None
    if inputs:
        prompts, images = numbered_prompts(prompts, image_token_of(model.config), inputs)
    if options.num_return_sequences > 1:
        given = given.repeat_interleave(options.num_return_sequences, 0)
        real = real.repeat_interleave(options.num_return_sequences, 0)
        prompts = [p for p in prompts for _ in range(options.num_return_sequences)]
        if places is not None:
            places = [p for p in places for _ in range(options.num_return_sequences)]
    canvas = canvas_of(model, spec, prompts, options, cut=True, images=images, places=places)
    if spec.attention != "full" and options.mode == "diffusion":
        unread = int(canvas.unread(options.block_length).max())
        if unread:
            warnings.warn(
                f"{unread} tokens after the gap lie in later blocks, which {spec.attention} "
                "attention does not read when it fills the gap",
                stacklevel=2,
            )
    if streamer is not None and len(prompts) > 1:
        raise Ar2DiffError(
            f"{option('streamer')} only works with a single row", "leave it out, or use one prompt"
        )
    padding = [given.shape[1] - len(prompt) for prompt in prompts]
    canvas.constraint = constraint_of(model, tokenizer, options, canvas)
    finished = finished_of(model, options, stopping_criteria, tokenizer, padding, canvas.constraint)
    states = denoise(
        model, spec, canvas, options, processors=_processors(logits_processor),
        finished=finished, draft=draft,
    )  # fmt: skip
    with evaluating(model):
        if streamer is None:
            for _ in states:
                pass
        else:
            _stream(states, canvas, prompts[0], streamer, options.revised)
    return _output(canvas, given, real, options)


def _with_padding(
    given: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Prompts [R, P], and where they are not padding."""
    if given is None:
        return None, None
    given = given if given.dim() == 2 else given[None]
    fits = attention_mask is not None and attention_mask.numel() == given.numel()
    real = attention_mask.view_as(given) != 0 if fits else torch.ones_like(given, dtype=torch.bool)
    return given, real


def _own_config(model: Any) -> Any:
    """The generation config of a model. The classes of masked language models load none, so theirs
    is read from their folder."""
    if not hasattr(model, "generation_config"):
        try:
            model.generation_config = GenerationConfig.from_pretrained(model.config.name_or_path)
        except OSError:  # there is none
            model.generation_config = GenerationConfig()
    return model.generation_config


def find_draft(given: Any, model: Any) -> Draft | None:
    """The draft adapter that a call names, loaded once for each model.

    Raises:
        Ar2DiffError: it is not there, is damaged, or does not fit the model.
    """
    if given is None or isinstance(given, Draft):
        return given
    held = DRAFTS.setdefault(model, {})
    if str(given) not in held:
        try:
            files = [cached_file(str(given), name) for name in (CONFIG, WEIGHTS)]
        except OSError as error:
            raise Ar2DiffError(
                f"{option('draft')} {shortened(given)} is not a draft adapter "
                f"({first_line(error)})",
                "pass the folder or Hub id that 'ar2diff draft' wrote",
            ) from error
        held[str(given)] = load_draft(Path(files[0]).parent, model)
    return held[str(given)]


def spec_of(model: Any, draft: Draft | None = None) -> Spec:
    """The spec in a model's config, or the one with which it is read beside a draft adapter.

    Raises:
        Ar2DiffError: it has none.
    """
    spec = Spec.from_config(model.config.to_dict())
    if draft is not None:
        return draft.spec_for(spec)
    if spec is None:
        raise Ar2DiffError(
            "the model is not converted: its config has no 'diffusion' block",
            "convert it with 'ar2diff adapt MODEL --output-dir DIR'",
        )
    read_beside(model, spec.noise)
    prepare(model)
    return spec


def check_model(model: Any, spec: Spec, draft: Draft | None = None) -> None:
    """Check, once for each model, that its attention does what the spec says: an older transformers
    would run it causally and write nonsense without an error.

    Raises:
        Ar2DiffError: it does not.
    """
    with PROBING:
        if PROBED.get(model) == spec:
            return
        masks = nullcontext() if draft is None else draft.applied(model, slice(0, 0))
        with evaluating(model), masks:  # the adapter embeds the mask, and adds nothing
            problems = probe(model, spec)
        if not problems:
            PROBED[model] = spec
    if problems:
        raise Ar2DiffError(
            f"the model does not do what its spec says: {problems[0]}",
            "upgrade transformers, or load the model with attn_implementation='sdpa' or 'eager'",
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run the model without dropout, and without gradient checkpointing, which drops the cache."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _processors(given: Any) -> list[Any]:
    for processor in given or ():
        if not isinstance(processor, ROW_WISE):
            raise Ar2DiffError(
                f"{option('logits_processor')}: {type(processor).__name__} may read the tokens to "
                "the left, which a denoiser has not written yet",
                "use generate options instead, or a processor that looks at each position alone",
            )
    return list(given or ())


def _stream(
    states: Iterator[Canvas], canvas: Canvas, prompt: list[int], streamer: Any, revised: int | None
) -> None:
    streamer.put(torch.tensor(prompt))
    sent = len(prompt)
    for _ in states:
        if hasattr(streamer, "put_draft") and not canvas.done[0]:
            streamer.put_draft(canvas.ids[0, sent : int(canvas.total[0])])
        certain = canvas.certain(0, revised)
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
    """Put the tokens that fill gaps into the prompt's part of the output."""
    masked = (given.to("cpu") == canvas.mask_token_id) & real  # padding may be anything
    for row, here in enumerate(masked):
        holes = here.nonzero()[:, 0]
        if len(holes):
            prompt = canvas.ids[row, : int(canvas.prompt[row])]
            filled = prompt[~canvas.given[row, : len(prompt)]]
            sequences[row, holes] = filled
