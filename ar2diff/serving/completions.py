"""/v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from ..core.conflicts import CONSTRAINTS
from ..core.errors import Ar2DiffError
from ..generation.complete import settings_of
from ..generation.prompts import Segments
from ..generation.tokens import encode, opened_at
from .answers import Answers, Row
from .echo import Echo, read_prompts
from .jobs import Job
from .log import Account
from .protocol import CompletionRequest, field_of
from .refusal import Refusal, refused
from .replies import Reply
from .rows import (
    SUFFIX,
    Names,
    Prompt,
    ask,
    check_alternatives,
    check_count,
    check_length,
    check_tokens,
    jobs_of,
)
from .service import Service

NAMES = Names("prompt", field_of)
MOST_ALTERNATIVES = 5  # of each token, in OpenAI's interface


async def complete(service: Service, request: CompletionRequest, account: Account) -> Completions:
    """The answers to a request, which are being written.

    Raises:
        Refusal: the request cannot be answered, or not now.
    """
    _check(service, request)
    settings = request.settings()
    if request.echo:
        settings = _of_ar_mode(service, settings)
    prepare = partial(_jobs, service, request, settings)
    held = any(name in settings for name in CONSTRAINTS)
    answers = await ask(service, request, account, prepare, held, request.revise is not None)
    try:
        echoes = await read_prompts(service, request, answers) if request.echo else []
    except BaseException:
        answers.cancel()
        raise
    return Completions(service, request, answers, echoes)


def _check(service: Service, request: CompletionRequest) -> None:
    """Refuse what contradicts itself, or is too much.

    Raises:
        Refusal: it does, or is.
    """
    service.check_model(request.model, request.mode)
    check_count(service, request, len(request.prompt))
    check_tokens(service, request.max_tokens, "max_tokens", 0 if request.echo else 1)
    check_alternatives(request.alternatives, MOST_ALTERNATIVES, "logprobs")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise Refusal(400, "best_of is not n; leave it out", "best_of")
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    for text in texts:
        check_length(service, [text, request.suffix or ""], "prompt")
    gaps = "revise" if request.revise is not None else "suffix" if request.suffix else None
    against = ["stop", "echo", "min_tokens"] if gaps else []
    against += ["suffix", "max_tokens", "logprobs"] if gaps == "revise" else []
    for name in against:
        if getattr(request, name):
            raise Refusal(400, f"{name} cannot be combined with {gaps}; leave it out", name)
    if gaps and len(texts) < len(request.prompt):
        raise Refusal(400, f"{gaps} needs a prompt that is a text, not token ids", "prompt")
    if gaps == "revise" and len(request.prompt) > 1:
        raise Refusal(400, "revise needs a single prompt; send several requests", "revise")


def _of_ar_mode(service: Service, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an answer that begins with its prompt's log-probabilities.

    Raises:
        Refusal: the model has no AR mode, or the request asks for another one.
    """
    if not service.lossless:
        told = "echo needs a model with an AR mode, which this one does not have"
        raise Refusal(400, f"{told}; leave it out", "echo")
    try:
        mode = settings_of(service.checkpoint, {**service.base, **settings})[1].mode
    except Ar2DiffError as error:
        raise refused(error, field_of) from None
    if mode != "diffusion":
        return settings
    if settings.get("mode"):
        told = "echo is answered by the AR mode, not by mode diffusion"
        raise Refusal(400, f"{told}; leave out mode", "mode")
    return {**settings, "mode": "ar"}


def _jobs(service: Service, request: CompletionRequest, settings: dict[str, Any]) -> list[Job]:
    prompts = [_prompt(service, request, given) for given in request.prompt]
    tokens = None if request.suffix else request.max_tokens
    return jobs_of(service, request, prompts, settings, tokens, None, NAMES)


def _prompt(service: Service, request: CompletionRequest, given: str | list[int]) -> Prompt:
    """A prompt's tokens.

    Raises:
        Refusal: it has none, or some that the model does not know.
    """
    checkpoint = service.checkpoint
    if not isinstance(given, str):
        spec = checkpoint.read_as
        if any(token not in checkpoint.token_ids for token in given):
            raise Refusal(
                400, "prompt has ids that are no token; use those of the tokenizer", "prompt"
            )
        if spec.mask_token_id in given:
            raise Refusal(400, "prompt has the mask token; use suffix for a gap", "prompt")
        return Prompt(given)
    segments: Segments = [given]
    try:
        with service.encoding:
            if request.revise is not None:
                segments = opened_at(checkpoint.tokenizer, given, _spans(request, given))
            elif request.suffix:
                segments = [given, request.max_tokens or SUFFIX, request.suffix]
            ids = encode(checkpoint.tokenizer, checkpoint.read_as, segments)
    except Ar2DiffError as error:
        fix = "use suffix or revise for gaps" if "mask" in error.what else error.fix
        raise Refusal(400, f"{error.what}; {fix}", "prompt") from None
    return Prompt(ids, segments if len(segments) > 1 else None)


def _spans(request: CompletionRequest, text: str) -> list[tuple[int, int]]:
    """What is to be written anew, in order; parts that touch are one.

    Raises:
        Refusal: a span is empty, or reaches beyond the text.
    """
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((begin, end) for begin, end in request.revise or ()):
        if not begin < end <= len(text):
            told = (
                f"revise has [{begin}, {end}], which is no part of a text of {len(text)} characters"
            )
            raise Refusal(400, f"{told}; count code points from 0", "revise")
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    if not merged:
        raise Refusal(400, "revise is empty; give spans as [start, end]", "revise")
    return merged


class Completions(Reply):
    """Answers of /v1/completions.

    Args:
        echoes: what stands before the answers to each prompt, if it is to be repeated.
    """

    kind = part = "text_completion"
    prefix = "cmpl"
    request: CompletionRequest

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        answers: Answers,
        echoes: Sequence[Echo] = (),
    ):
        super().__init__(service, request, answers)
        self.echoes = echoes

    def choice(self, row: Row) -> dict[str, Any]:
        """See `Reply`."""
        echo = self._echo(row)
        logprobs = self._logprobs(row)
        if echo and echo.logprobs and logprobs:
            logprobs = {name: echo.logprobs[name] + logprobs[name] for name in logprobs}
        text = (echo.text if echo else "") + row.text.shown
        return {**self.empty(row), "text": text, "logprobs": logprobs,
                "finish_reason": row.finish_reason}  # fmt: skip

    def opening(self, row: Row) -> list[dict[str, Any]]:
        """See `Reply`."""
        echo = self._echo(row)
        return [{**self.empty(row), "text": echo.text, "logprobs": echo.logprobs}] if echo else []

    def parts(self, row: Row, text: str) -> list[dict[str, Any]]:
        """See `Reply`."""
        logprobs = self._logprobs(row)
        if not text and not (logprobs and logprobs["tokens"]):
            return []
        return [{**self.empty(row), "text": text, "logprobs": logprobs}]

    def empty(self, row: Row) -> dict[str, Any]:
        """See `Reply`."""
        return {"index": row.index, "text": "", "logprobs": None, "finish_reason": None}

    def _echo(self, row: Row) -> Echo | None:
        return self.echoes[row.index // (self.request.n or 1)] if self.echoes else None

    def _logprobs(self, row: Row) -> dict[str, list[Any]] | None:
        """Of the tokens that were shown since the last call."""
        if self.request.logprobs is None:
            return None
        echo, new = self._echo(row), row.fresh()
        start = row.offset + (len(echo.text) if echo else 0)
        row.offset += sum(len(token.text) for token in new)
        lengths = [0, *(len(token.text) for token in new)][: len(new)]
        return {
            "tokens": [token.name for token in new],
            "token_logprobs": [token.logprob for token in new],
            "top_logprobs": [
                {**dict(token.likeliest[: self.request.logprobs]), token.name: token.logprob}
                for token in new
            ],
            "text_offset": [start + end for end in accumulate(lengths)],
        }
