"""Text in, text out: what `generate`, `chat`, the demo and the Python API share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoint.files import (
    CONFIG,
    DRAFT_CONFIG,
    GENERATION,
    find_checkpoint,
    is_draft,
    read_config,
    read_json,
    read_spec,
)
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint, no_ar_mode, refuse_unconverted
from ..core.canvas import Canvas
from ..core.denoise import denoise
from ..core.draft import read_draft_spec
from ..core.errors import Ar2DiffError, option
from ..core.generate import canvas_of, check_model
from ..core.masked_lm import is_masked_lm
from ..core.options import Options, resolve
from ..core.pattern import check_constraint, constraint_of, validates
from ..core.spec import CAUSAL, Spec
from ..core.stopping import finished_of
from ..data.album import Album
from .images import album_of, blind, check_files, check_placeholders, encode_prompt
from .prompts import Request, Segments, split_gaps
from .results import Candidate, Completion, Drift
from .steering import steered
from .tokens import spaced_gaps, text_after, with_gaps_filled


def complete(checkpoint: Checkpoint, prompt: str, **settings: Any) -> Completion:
    """Complete one prompt, or fill its gaps; see `complete_all`."""
    return next(complete_all(checkpoint, [prompt], **settings))[1]


def complete_all(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    images: Sequence[Sequence[Any]] = (),
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[tuple[int, Completion]]:
    """Complete prompts in batches of similar length, yielding (index of the prompt, completion) as
    the batches finish.

    Args:
        prompts: texts; `{mask:N}` stands for a gap of N tokens. A prompt with gaps is filled and
            not continued, unless `max_new_tokens` is among the settings.
        images: of each prompt, as of `encode_prompt`; none of any by default.
        settings: options of `generate`, and those of `steered`; mode `ar` also works on
            unconverted models.

    Raises:
        Ar2DiffError: an option is wrong, the model lacks the mode, or a prompt does not fit. All
            prompts are checked before any is decoded.
    """
    filling = {"max_new_tokens": 0, **settings}
    spec, options = settings_of(checkpoint, settings)
    asked = {False: options}
    album = album_of(checkpoint) if any(images) else None
    groups: dict[bool, list[tuple[int, Segments, list[int]]]] = {False: [], True: []}
    for number, prompt in enumerate(prompts):
        try:
            segments = split_gaps(prompt)
            gaps = len(segments) > 1
            own = images[number] if images else ()
            ids = encode_prompt(checkpoint, spec, segments, own, album if own else None)
            if gaps not in asked:
                asked[gaps] = settings_of(checkpoint, filling, gaps)[1]
            drawn(checkpoint, spec, asked[gaps], [ids], [segments], album)
        except Ar2DiffError as error:
            raise error if len(prompts) == 1 else error.about(f"prompt {number + 1}") from None
        groups[gaps].append((number, segments, ids))
    for gaps, rows in groups.items():
        rows.sort(key=lambda row: len(row[2]))
        for first in range(0, len(rows), batch_size):
            numbers, texts, batch = zip(*rows[first : first + batch_size], strict=True)
            results = decode_rows(checkpoint, spec, asked[gaps], batch, texts, album)
            for number, result in zip(numbers, results, strict=True):
                yield number, replace(result, prompt=prompts[number])


def infill(
    checkpoint: Checkpoint,
    prefix: str,
    suffix: str,
    lengths: Sequence[int],
    *,
    images: Sequence[Any] = (),
    **settings: Any,
) -> Completion:
    """Fill the gap between two texts. Of several lengths the one is chosen whose tokens have the
    highest mean log-probability, each taken when it was decided; `candidates` holds them all.

    Raises:
        Ar2DiffError: as `complete_all`.
    """
    settings = {"max_new_tokens": 0, **settings}
    spec, options = settings_of(checkpoint, settings, gaps=True)
    album = album_of(checkpoint) if images else None
    texts: list[Segments] = [[prefix, length, suffix] for length in lengths]
    rows = [encode_prompt(checkpoint, spec, segments, images, album) for segments in texts]
    start = time.monotonic()
    canvas, states = begin(checkpoint, spec, options, rows, texts, album)
    for _ in states:
        pass
    seconds = time.monotonic() - start
    found = []
    for place, length in enumerate(lengths):
        result = result_of(checkpoint, spec, options, canvas, place, seconds, texts[place])
        gap = ~canvas.given[place, : int(canvas.prompt[place])]
        mean = canvas.logprob[place, : len(gap)][gap].mean().item()
        found.append((Candidate(length, mean, result.filled[0]), result))
    found.sort(key=lambda pair: -pair[0].mean_logprob)
    best, result = found[0]
    return replace(
        result,
        prompt=f"{prefix}{{mask:{best.length}}}{suffix}",
        length=best.length,
        mean_logprob=best.mean_logprob,
        candidates=tuple(candidate for candidate, _ in found),
    )


def begin(
    checkpoint: Checkpoint,
    spec: Spec,
    options: Options,
    rows: Sequence[Sequence[int]],
    texts: Sequence[Segments] | None = None,
    album: Album | None = None,
) -> tuple[Canvas, Iterator[Canvas]]:
    """The canvas of some rows, and the iterator that decides it, one state for each forward.

    Args:
        spec, options: of `settings_of`.
        rows: token ids, with masks for gaps, and codes for the features of images.
        texts: what the rows encode, if it has gaps.
        album: of the images; None: that of the checkpoint.

    Raises:
        Ar2DiffError: a prompt does not fit, or no text that matches the constraint.
    """
    model = checkpoint.model
    canvas = drawn(checkpoint, spec, options, rows, texts, album)
    finished = finished_of(model, options, None, checkpoint.tokenizer, constraint=canvas.constraint)
    states = denoise(model, spec, canvas, options, finished=finished, draft=checkpoint.draft)
    return canvas, states


def drawn(
    checkpoint: Checkpoint,
    spec: Spec,
    options: Options,
    rows: Sequence[Sequence[int]],
    texts: Sequence[Segments] | None = None,
    album: Album | None = None,
) -> Canvas:
    """The canvas of some rows, with their images and the constraint that the options ask for;
    arguments and errors as of `begin`."""
    check_placeholders(checkpoint, rows)
    images = None
    if any(token < 0 for row in rows for token in row):
        album = album or checkpoint.album
        images = album.images_in(torch.tensor([token for row in rows for token in row]))
    canvas = canvas_of(checkpoint.model, spec, rows, options, images=images)
    return constrained(checkpoint, options, canvas, texts)


def constrained(
    checkpoint: Checkpoint, options: Options, canvas: Canvas, texts: Sequence[Segments] | None
) -> Canvas:
    """A canvas with the constraint that the options ask for; arguments as of `begin`."""
    tokenizer = checkpoint.tokenizer
    spaced = [spaced_gaps(tokenizer, text) for text in texts or ()] or None
    canvas.constraint = constraint_of(checkpoint.model, tokenizer, options, canvas, spaced)
    return canvas


def load(reference: str, dtype: str = "float32", device: str | None = "auto") -> Checkpoint:
    """A checkpoint to decode with.

    Args:
        dtype: of the weights in memory, as for `load_model`.
        device: `auto` is the accelerator if there is one; None the CPU.

    Raises:
        Ar2DiffError: as `load_checkpoint`; or its attention is not what its spec says.
    """
    checkpoint = load_checkpoint(reference, device=device, dtype=dtype)
    refuse_unconverted(checkpoint)
    if checkpoint.spec is not None or checkpoint.draft is not None:
        check_model(checkpoint.model, checkpoint.read_as, checkpoint.draft)
    return checkpoint


def check_request(
    reference: str, request: Request | None, settings: dict[str, Any], compare: bool = False
) -> None:
    """Refuse what a model cannot do, before it is loaded.

    Args:
        reference: folder or Hub id.
        request: None checks the settings alone.
        compare: the AR mode is to write the same.

    Raises:
        Ar2DiffError: an option is wrong, or the model lacks the mode.
    """
    path = find_checkpoint(reference)
    spec, drafts = read_spec(path), is_draft(path)
    if drafts:
        spec = read_draft_spec(path / DRAFT_CONFIG).spec_for(spec)
    else:
        _check_converted(path, spec, settings)
    config = path / CONFIG  # an adapter has none; its base is asked once it is loaded
    if request is not None and config.is_file():
        if "vision_config" in read_config(path):
            request.check_places()
        elif request.sees:
            raise blind(path)
        check_files(request)
    settings, gaps = steered(settings), request is not None and request.has_gap
    configs = (SimpleNamespace(mode=_stored_mode(path, spec)),)
    options = resolve(spec or CAUSAL, settings, configs, drafts=drafts, gaps=gaps)
    check_constraint(options)
    if gaps and options.mode != "diffusion":
        raise Ar2DiffError(
            f"{option('mode', options.mode)} cannot fill gaps in a prompt",
            f"use {option('mode', 'diffusion')}",
        )
    if compare:
        check_compare(spec or CAUSAL, options, gaps)


def check_compare(spec: Spec, options: Options, gaps: bool = False) -> None:
    """Refuse to compare with an AR mode that is not there.

    Raises:
        Ar2DiffError: the model has none, or it cannot write what is asked for.
    """
    compare = option("compare")
    if gaps:
        told = f"{compare} writes the text in the AR mode too, which cannot fill gaps"
        raise Ar2DiffError(told, f"leave out {compare}")
    if not spec.writes_ar:
        raise Ar2DiffError(
            f"{compare} needs an AR mode, which this model ({spec.attention} attention) does not "
            "have",
            f"leave out {compare}",
        )
    if options.mode == "ar":
        raise Ar2DiffError(
            f"{compare} shows the AR mode beside another one, but the mode is already ar",
            f"choose {option('mode', 'speculative')} or {option('mode', 'diffusion')}",
        )


def _stored_mode(path: Path, spec: Spec | None) -> Any:
    """The mode in a folder's generation config; for an adapter, without one, that of its spec."""
    file = path / GENERATION
    stored = read_json(file, "correct it, or remove it").get("mode") if file.is_file() else None
    return stored or ("speculative" if spec is not None and spec.lossless else None)


def settings_of(
    checkpoint: Checkpoint, settings: dict[str, Any], gaps: bool = False
) -> tuple[Spec, Options]:
    """The spec to decode with, and the checked options of a call.

    Args:
        gaps: the call has gaps to fill.

    Raises:
        Ar2DiffError: an option is wrong, or the model lacks the mode.
    """
    drafts = checkpoint.draft is not None
    if not drafts:
        _check_converted(checkpoint.path, checkpoint.spec, settings)
    spec, settings = checkpoint.read_as, steered(settings, checkpoint.tokenizer)
    suppressed = checkpoint.suppressed.nonzero()[:, 0].tolist()
    settings = {
        **settings,
        "suppress_tokens": [*suppressed, *(settings.get("suppress_tokens") or ())],
    }
    if settings.get("eos_token_id") is None:
        settings["eos_token_id"] = checkpoint.end_ids
    configs = (checkpoint.model.generation_config,)
    return spec, resolve(spec, settings, configs, drafts=drafts, gaps=gaps)


def decode_rows(
    checkpoint: Checkpoint,
    spec: Spec,
    options: Options,
    rows: Sequence[Sequence[int]],
    texts: Sequence[Segments] | None = None,
    album: Album | None = None,
) -> list[Completion]:
    """Completions of some rows, decoded together; arguments as of `begin`."""
    start = time.monotonic()
    canvas, states = begin(checkpoint, spec, options, rows, texts, album)
    for _ in states:
        pass
    seconds = (time.monotonic() - start) / len(rows)
    return [
        result_of(checkpoint, spec, options, canvas, n, seconds, texts[n] if texts else ())
        for n in range(len(rows))
    ]


def result_of(
    checkpoint: Checkpoint,
    spec: Spec,
    options: Options,
    canvas: Canvas,
    row: int,
    seconds: float,
    segments: Segments | tuple[()] = (),
) -> Completion:
    """The completion in a row of a canvas: as much as is decided without a gap, if it was stopped.

    Args:
        segments: the prompt that the row holds, if it has gaps.
    """
    tokenizer, prompt = checkpoint.tokenizer, int(canvas.prompt[row])
    new, ids = canvas.new_ids(row), canvas.ids[row, :prompt].tolist()
    gaps = ~canvas.given[row, :prompt]
    forwards = int(canvas.forwards[row])
    whole = bool(gaps.any())
    decided = len(new) + int((gaps & ~canvas.open[row, :prompt]).sum())
    places = gaps.nonzero()[:, 0].tolist()
    ids = ids[: canvas.front[row]]
    texts = with_gaps_filled(tokenizer, segments, ids, places) if whole else []
    result = Completion(
        text="".join(texts) + text_after(tokenizer, ids, new),
        token_ids=new,
        new_tokens=decided,
        forwards=forwards,
        tokens_per_forward=decided / forwards if forwards else 0.0,
        seconds=seconds,
        drift=_drift(canvas),
    )
    if canvas.constraint is not None:
        fits = canvas.constraint.whole(row, canvas.front[row])
        valid = fits and all(validates(options, text) for text in texts[1::2] or [result.text])
        result = replace(result, matches=valid)
    if not whole:
        return result
    unread = 0 if spec.attention == "full" else int(canvas.unread(options.block_length)[row])
    return replace(
        result,
        filled=tuple(texts[1::2]),
        filled_at=tuple(accumulate(map(len, texts[:-1])))[::2],
        suffix_tokens=prompt - 1 - places[-1],
        unread_tokens=unread,
    )


def _drift(canvas: Canvas) -> Drift | None:
    if not canvas.drift:
        return None
    errors, same = zip(*canvas.drift, strict=True)
    return Drift(sum(errors) / len(errors), max(errors), sum(same) / len(same))


def _check_converted(path: Path, spec: Spec | None, settings: dict[str, Any]) -> None:
    if spec is None and is_masked_lm(read_config(path).get("architectures")):
        raise no_ar_mode(path)
    if spec is None and settings.get("mode", "diffusion") != "ar":
        raise Ar2DiffError(
            f"model {path} is not converted",
            f"convert it with 'ar2diff adapt {path} --output-dir DIR', or use "
            f"{option('mode', 'ar')}",
        )
