"""Text in, text out: what `generate` and `chat`, the demo and the panels share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import find_checkpoint, read_spec
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..core.canvas import Canvas
from ..core.denoise import denoise
from ..core.errors import Ar2DiffError
from ..core.generate import canvas_of, check_model, finished_of
from ..core.options import Options, resolve
from ..core.spec import CAUSAL, Spec
from .prompts import Pieces, Request, split_gaps


def complete(checkpoint: Checkpoint, prompt: str, **settings: Any) -> dict[str, Any]:
    """Complete one prompt; `complete_all` says what comes back."""
    return next(complete_all(checkpoint, [prompt], **settings))[1]


def complete_all(
    checkpoint: Checkpoint, prompts: Sequence[str], *, batch_size: int = 8, **settings: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Complete prompts in batches of like length, yielding (its number, result) as they come.

    Args:
        prompts: texts; `{mask:N}` in one stands for N tokens to fill in. What has a gap is filled
            and not gone on from, unless `max_new_tokens` is among the settings.
        settings: options of `generate`; `mode` ar is there for unconverted models too.

    Returns:
        Results with text, token_ids, new_tokens, forwards, tokens_per_forward, seconds (a row's
        share of its batch's); for a prompt with gaps `filled` (a text each), `suffix_tokens` (given
        ones behind the last gap) and `unread_tokens` (those that the model does not read when it
        fills the gap) too, and `text` is the whole.

    Raises:
        Ar2DiffError: the model does not have the mode, or a prompt does not fit.
    """
    spec, plain = settings_of(checkpoint, settings)
    _, filling = settings_of(checkpoint, {"max_new_tokens": 0, **settings})
    groups: dict[bool, list[tuple[int, list[int]]]] = {False: [], True: []}
    for number, prompt in enumerate(prompts):  # all are checked before any is decoded
        pieces = split_gaps(prompt)
        gaps = len(pieces) > 1
        try:
            ids = encode(checkpoint, spec, pieces)
            canvas_of(checkpoint.model, spec, [ids], filling if gaps else plain)
        except Ar2DiffError as error:
            if len(prompts) == 1:
                raise
            what = error.what.removeprefix("generate: ")
            raise Ar2DiffError(f"prompt {number + 1}: {what}", error.fix) from None
        groups[gaps].append((number, ids))
    for gaps, rows in groups.items():
        rows.sort(key=lambda row: len(row[1]))
        options = filling if gaps else plain
        for first in range(0, len(rows), batch_size):
            numbers, batch = zip(*rows[first : first + batch_size], strict=True)
            yield from zip(numbers, _decode(checkpoint, spec, options, batch), strict=True)


def answer(
    checkpoint: Checkpoint,
    request: Request,
    batch_size: int,
    settings: dict[str, Any],
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Results of a request in its order, each with its `prompt`.

    Args:
        advance: called after each prompt.
    """
    if request.infill is not None:
        prefix, suffix, lengths = request.infill
        result = infill(checkpoint, prefix, suffix, lengths, **settings)
        return [{"prompt": f"{prefix}{{mask:{result['length']}}}{suffix}", **result}]
    results: dict[int, dict[str, Any]] = {}
    for number, result in complete_all(
        checkpoint, request.prompts, batch_size=batch_size, **settings
    ):
        results[number] = {"prompt": request.prompts[number], **result}
        advance()
    return [results[number] for number in range(len(request.prompts))]


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A line on what was decoded and how fast."""
    tokens, forwards, seconds = (
        sum(r[name] for r in results) for name in ("new_tokens", "forwards", "seconds")
    )
    many = f"{len(results)} prompts, " if len(results) > 1 else ""
    drifts = [r["drift"] for r in results if "drift" in r]
    drift = ""
    if drifts:
        mean, same = (sum(d[n] for d in drifts) / len(drifts) for n in ("mean", "same_token"))
        largest = max(d["largest"] for d in drifts)
        drift = (
            f"; the cache moves logits by {mean:.1e} (at most {largest:.1e}) of the largest, "
            f"{100 * same:.1f} % of the likeliest tokens stay"
        )
    return (
        f"{many}{tokens} tokens, {forwards} forwards, {tokens / max(forwards, 1):.2f} tokens per "
        f"forward, {tokens / max(seconds, 1e-9):.0f} tokens/s, {seconds:.2f} s{drift}"
    )


def stream(
    checkpoint: Checkpoint, prompt: str, **settings: Any
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Complete one prompt, yielding (more text, None) as soon as all before it is decided, from the
    prompt on; at last (the rest, the result of `complete`)."""
    pieces = split_gaps(prompt)
    if len(pieces) > 1:
        settings = {"max_new_tokens": 0, **settings}
    spec, options = settings_of(checkpoint, settings)
    row = encode(checkpoint, spec, pieces)
    start, shown = time.monotonic(), ""
    canvas, states = begin(checkpoint, spec, options, [row])
    for _ in states:
        certain = canvas.ids[0, : canvas.certain(0, bool(options.remask))].tolist()
        text = _decode_ids(checkpoint.tokenizer, certain)
        # Half a character decodes to a replacement mark; what is shown must stay as it is.
        if not text.endswith("\ufffd") and text.startswith(shown):
            yield text[len(shown) :], None
            shown = text
    result = _result(checkpoint, spec, options, canvas, 0, time.monotonic() - start)
    ids = canvas.ids[0, : int(canvas.prompt[0])].tolist()
    text = _decode_ids(checkpoint.tokenizer, [*ids, *result["token_ids"]])
    yield text[len(shown) if text.startswith(shown) else 0 :], result


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
    rows = [encode(checkpoint, spec, [prefix, length, suffix]) for length in lengths]
    start = time.monotonic()
    canvas, states = begin(checkpoint, spec, options, rows)
    for _ in states:
        pass
    seconds = time.monotonic() - start
    candidates = []
    for place, length in enumerate(lengths):
        result = _result(checkpoint, spec, options, canvas, place, seconds)
        gap = ~canvas.given[place, : int(canvas.prompt[place])]
        mean = canvas.logprob[place, : len(gap)][gap].mean().item()
        candidates.append({"length": length, "mean_logprob": mean, **result})
    candidates.sort(key=lambda c: -c["mean_logprob"])
    shown = [
        {"length": c["length"], "mean_logprob": c["mean_logprob"], "text": c["filled"][0]}
        for c in candidates
    ]
    return {**candidates[0], "candidates": shown}


def begin(
    checkpoint: Checkpoint, spec: Spec, options: Options, rows: Sequence[Sequence[int]]
) -> tuple[Canvas, Iterator[Canvas]]:
    """The canvas of some rows, and the iterator that decides it, a state a forward.

    Args:
        spec, options: of `settings_of`.
        rows: token ids, masks for gaps.
    """
    model = checkpoint.model
    canvas = canvas_of(model, spec, rows, options)
    finished = finished_of(model, options, None, checkpoint.tokenizer)
    return canvas, denoise(model, spec, canvas, options, finished=finished)


def load(reference: str) -> Checkpoint:
    """A checkpoint to decode with, on the accelerator if there is one.

    Raises:
        Ar2DiffError: as `load_checkpoint`; or its attention is not what its spec says.
    """
    checkpoint = load_checkpoint(reference, device="auto")
    if checkpoint.spec is not None:
        check_model(checkpoint.model, checkpoint.spec)
    return checkpoint


def check_request(reference: str, request: Request | None, settings: dict[str, Any]) -> None:
    """Refuse what a model cannot do before it is loaded.

    Args:
        reference: folder or Hub id.
        request: None checks the settings alone.

    Raises:
        Ar2DiffError: an option, or a mode that the model does not have.
    """
    path = find_checkpoint(reference)
    spec = read_spec(path)
    _check_converted(path, spec, settings)
    options = resolve(spec or CAUSAL, settings)
    if request is not None and request.has_gap and options.mode != "diffusion":
        raise Ar2DiffError(
            f"generate: mode {options.mode} cannot fill masks in a prompt", "use mode diffusion"
        )


def settings_of(checkpoint: Checkpoint, settings: dict[str, Any]) -> tuple[Spec, Options]:
    """The spec to decode with and the options of a call, checked.

    Raises:
        Ar2DiffError: an option, or a mode that the model does not have.
    """
    spec = checkpoint.spec
    _check_converted(checkpoint.path, spec, settings)
    spec = checkpoint.spec_or_causal
    suppressed = checkpoint.suppressed.nonzero()[:, 0].tolist()
    settings = {
        **settings,
        "suppress_tokens": [*suppressed, *(settings.get("suppress_tokens") or ())],
        "eos_token_id": settings.get("eos_token_id") or checkpoint.end_ids,
    }
    return spec, resolve(spec, settings, (checkpoint.model.generation_config,))


def encode(checkpoint: Checkpoint, spec: Spec, pieces: Pieces) -> list[int]:
    """Ids of texts, and of gaps as that many mask tokens.

    Raises:
        Ar2DiffError: a prompt without a token, or one that spells the mask token.
    """
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += [spec.mask_token_id] * piece
            continue
        new = _ids_behind(checkpoint.tokenizer, piece) if number else None
        if new is None:
            new = checkpoint.tokenizer(
                piece, add_special_tokens=number == 0, verbose=False
            ).input_ids
        if spec.mask_token_id in new:
            raise Ar2DiffError("the prompt spells the mask token", "write {mask:N} for a gap")
        ids += new
    if not ids:
        raise Ar2DiffError("the prompt has no token", "give a longer prompt")
    return ids


def unread_note(spec: Spec | None, results: Sequence[dict[str, Any]]) -> str | None:
    """A line about given text that a block model does not read when it fills the gap before it;
    None where it reads all."""
    unread = [r for r in results if r.get("unread_tokens")]
    if spec is None or not unread:
        return None
    count, of = (sum(r[n] for r in unread) for n in ("unread_tokens", "suffix_tokens"))
    where = "" if len(results) == 1 else f" (in {len(unread)} of {len(results)} prompts)"
    return (
        f"{count} of the {of} suffix tokens lie in later blocks than the gap, which "
        f"{spec.attention} attention does not read{where}"
    )


def draw_tokens(tokenizer: Any, ids: Sequence[int], mask_token_id: int) -> list[str]:
    """The text of each token of a canvas, for a screen: an undecided one is a dot, and a character
    that several tokens spell stands at the last of them."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids  # keeps a first token's space
    skip = len(_decode_ids(tokenizer, anchor, False))
    pieces: list[str] = []
    open_: list[int] = []
    for token in ids:
        if token == mask_token_id:
            pieces.append("·")
            open_ = []
            continue
        open_.append(token)
        text = _decode_ids(tokenizer, [*anchor, *open_], False)[skip:]
        half = text.endswith("\ufffd") and len(open_) < 4  # UTF-8 has at most four bytes
        pieces.append("" if half else text)
        open_ = open_ if half else []
    return pieces


def text_behind(tokenizer: Any, ids: list[int], new: list[int]) -> str:
    """The text that new tokens add to others. Decoded with them and cut: a tokenizer may drop the
    space in front of the first token."""
    return _decode_ids(tokenizer, [*ids, *new])[len(_decode_ids(tokenizer, ids)) :]


def _decode(
    checkpoint: Checkpoint, spec: Spec, options: Options, rows: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    start = time.monotonic()
    canvas, states = begin(checkpoint, spec, options, rows)
    for _ in states:
        pass
    seconds = (time.monotonic() - start) / len(rows)
    return [_result(checkpoint, spec, options, canvas, n, seconds) for n in range(len(rows))]


def _result(
    checkpoint: Checkpoint, spec: Spec, options: Options, canvas: Canvas, row: int, seconds: float
) -> dict[str, Any]:
    tokenizer, prompt = checkpoint.tokenizer, int(canvas.prompt[row])
    new, ids = canvas.new_ids(row), canvas.ids[row, :prompt].tolist()
    gaps = ~canvas.given[row, :prompt]
    forwards = int(canvas.forwards[row])
    decided = len(new) + int(gaps.sum())
    whole = bool(gaps.any())
    result: dict[str, Any] = {
        "text": _decode_ids(tokenizer, [*ids, *new]) if whole else text_behind(tokenizer, ids, new),
        "token_ids": new,
        "new_tokens": decided,
        "forwards": forwards,
        "tokens_per_forward": decided / forwards if forwards else 0.0,
        "seconds": seconds,
    }
    if canvas.drift:
        errors, same = zip(*canvas.drift, strict=True)
        result["drift"] = {
            "mean": sum(errors) / len(errors),
            "largest": max(errors),
            "same_token": sum(same) / len(same),
        }
    if whole:
        result["filled"] = _filled(tokenizer, ids, gaps.tolist())
        result["suffix_tokens"] = prompt - 1 - int(gaps.nonzero().max())
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
            texts.append(text_behind(tokenizer, ids[:start], ids[start:place]))
            start = None
    return texts


def _decode_ids(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _ids_behind(tokenizer: Any, text: str) -> list[int] | None:
    """Ids of a text in the middle of another: some tokenizers put a space in front of a text that
    stands alone. None where they cannot be told from the ids of what stands before."""
    before = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False, verbose=False).input_ids
    return ids[len(before) :] if ids[: len(before)] == before else None


def _check_converted(path: Path, spec: Spec | None, settings: dict[str, Any]) -> None:
    if spec is None and settings.get("mode", "diffusion") != "ar":
        raise Ar2DiffError(
            f"model {path} is not converted",
            f"run 'ar2diff adapt {path} --output-dir DIR', or use --mode ar",
        )
