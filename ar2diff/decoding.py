"""Text in, text out: what `generate` and `chat`, the demo and the panels share."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .attention import layer_windows
from .canvas import Canvas
from .checkpoint import Checkpoint
from .denoise import denoise
from .errors import Ar2DiffError
from .evaluation import suppressed_of
from .forward import context_length
from .generate import canvas_of
from .options import Options, resolve
from .spec import FORMAT, Spec

GAP = re.compile(r"\{mask(?::([^{}]*))?\}")


def complete(checkpoint: Checkpoint, prompt: str, **settings: Any) -> dict[str, Any]:
    """Complete one prompt; `complete_all` says what comes back."""
    return next(complete_all(checkpoint, [prompt], **settings))[1]


def complete_all(
    checkpoint: Checkpoint, prompts: Sequence[str], *, batch_size: int = 8, **settings: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Complete prompts in batches of like length, yielding (its number, result) as they come.

    Args:
        prompts: texts; `{mask:N}` in one stands for N tokens to fill in.
        settings: options of `generate`; `mode` ar is there for unconverted models too.

    Returns:
        Results with text, token_ids, new_tokens, forwards, tokens_per_forward, seconds (a row's
        share of its batch's); for a prompt with gaps `filled` (a text each) and `unread_tokens`
        too, and `text` is the whole.

    Raises:
        Ar2DiffError: the model does not have the mode, or a prompt does not fit.
    """
    spec, options = settings_of(checkpoint, settings)
    rows = [encode(checkpoint, spec, prompt) for prompt in prompts]
    for row in rows:  # all are checked before any is decoded
        canvas_of(checkpoint.model, spec, [row], options)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        canvas = canvas_of(checkpoint.model, spec, [rows[n] for n in numbers], options)
        start = time.monotonic()
        for _ in denoise(checkpoint.model, spec, canvas, options):
            pass
        seconds = (time.monotonic() - start) / len(numbers)
        for place, number in enumerate(numbers):
            yield number, _result(checkpoint, spec, options, canvas, place, seconds)


def infill(
    checkpoint: Checkpoint, prefix: str, suffix: str, lengths: Sequence[int], **settings: Any
) -> dict[str, Any]:
    """Fill the gap between two texts; of several lengths the one whose tokens have the highest
    mean log-probability, each taken when it was decided.

    Returns:
        As `complete`, and `candidates` [{length, mean_logprob, text}], the best first.

    Raises:
        Ar2DiffError: as `complete_all`.
    """
    settings = {"max_new_tokens": 0, **settings}
    spec, options = settings_of(checkpoint, settings)
    rows = [encode(checkpoint, spec, f"{prefix}{{mask:{n}}}{suffix}") for n in lengths]
    canvas = canvas_of(checkpoint.model, spec, rows, options)
    start = time.monotonic()
    for _ in denoise(checkpoint.model, spec, canvas, options):
        pass
    seconds = time.monotonic() - start
    candidates = []
    for place, length in enumerate(lengths):
        result = _result(checkpoint, spec, options, canvas, place, seconds)
        gap = (canvas.step[place] > 0).nonzero()[:, 0]
        gap = gap[gap < canvas.prompt[place]]
        mean = canvas.logprob[place, gap].mean().item()
        candidates.append({"length": length, "mean_logprob": mean, **result})
    candidates.sort(key=lambda c: -c["mean_logprob"])
    shown = [
        {"length": c["length"], "mean_logprob": c["mean_logprob"], "text": c["filled"][0]}
        for c in candidates
    ]
    return {**candidates[0], "candidates": shown}


def settings_of(checkpoint: Checkpoint, settings: dict[str, Any]) -> tuple[Spec, Options]:
    """The spec to decode with and the options of a call, checked.

    Raises:
        Ar2DiffError: an option, or a mode that the model does not have.
    """
    spec = checkpoint.spec
    if spec is None and settings.get("mode", "diffusion") != "ar":
        raise Ar2DiffError(
            f"model {checkpoint.path} is not converted", "run 'ar2diff adapt', or use --mode ar"
        )
    spec = spec or _causal_spec(checkpoint.model)
    suppressed = suppressed_of(checkpoint).nonzero()[:, 0].tolist()
    settings = {
        **settings,
        "suppress_tokens": [*suppressed, *(settings.get("suppress_tokens") or ())],
        "eos_token_id": settings.get("eos_token_id") or checkpoint.end_ids,
    }
    return spec, resolve(spec, settings, (checkpoint.model.generation_config,))


def encode(checkpoint: Checkpoint, spec: Spec, prompt: str) -> list[int]:
    """Ids of a prompt, `{mask:N}` as N mask tokens.

    Raises:
        Ar2DiffError: a gap without a length, an empty prompt, or one that spells the mask token.
    """
    tokenizer, ids, end = checkpoint.tokenizer, [], 0
    for gap in [*GAP.finditer(prompt), None]:
        piece = prompt[end : gap.start() if gap else len(prompt)]
        pieces = tokenizer(piece, add_special_tokens=end == 0, verbose=False).input_ids
        if spec.mask_token_id in pieces:
            raise Ar2DiffError("the prompt spells the mask token", "write {mask:N} for a gap")
        ids += pieces
        if gap is not None:
            if not (gap[1] or "").isdecimal() or int(gap[1]) < 1:
                raise Ar2DiffError(f"{gap[0]}: a gap of no tokens", "write {mask:N}, N from 1 on")
            ids += [spec.mask_token_id] * int(gap[1])
            end = gap.end()
    if not ids:
        raise Ar2DiffError("the prompt has no token", "give a longer prompt")
    return ids


def _result(
    checkpoint: Checkpoint, spec: Spec, options: Options, canvas: Canvas, row: int, seconds: float
) -> dict[str, Any]:
    tokenizer, prompt = checkpoint.tokenizer, int(canvas.prompt[row])
    new, ids = canvas.new_ids(row), canvas.ids[row, :prompt].tolist()
    gaps = ~canvas.given[row, :prompt]
    forwards = int(canvas.forwards[row])
    decided = len(new) + int(gaps.sum())
    # Decoded with the prompt and cut: a tokenizer may drop the space in front of the first token.
    text = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    if not gaps.any():
        text = text[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
    result: dict[str, Any] = {
        "text": text,
        "token_ids": new,
        "new_tokens": decided,
        "forwards": forwards,
        "tokens_per_forward": decided / forwards if forwards else 0.0,
        "seconds": seconds,
    }
    if gaps.any():
        result["filled"] = _filled(tokenizer, ids, gaps.tolist())
        result["unread_tokens"] = 0
        if spec.attention != "full":
            result["unread_tokens"] = int(canvas.unread(options.block_length)[row])
    return result


def _filled(tokenizer: Any, ids: list[int], gaps: list[bool]) -> list[str]:
    """The text of each gap."""
    texts, start = [], None
    for place, gap in enumerate([*gaps, False]):
        if gap and start is None:
            start = place
        elif not gap and start is not None:
            before = tokenizer.decode(ids[:start], skip_special_tokens=True)
            texts.append(tokenizer.decode(ids[:place], skip_special_tokens=True)[len(before) :])
            start = None
    return texts


def _causal_spec(model: Any) -> Spec:
    """What an unconverted model is: its AR mode alone, and no token is a mask."""
    config = model.config.get_text_config()
    return Spec(
        format=FORMAT,
        noise="mask",
        mask_token_id=model.get_input_embeddings().weight.shape[0],
        attention="causal_context",
        block_length=1,
        prediction="shift",
        ar_mode=True,
        local_window="kept" if any(layer_windows(config, "kept").values()) else None,
        max_length=context_length(model.config) or 0,
    )
