"""From requests to rows: prompts, gaps, numbers of tokens, and jobs for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.conflicts import CONSTRAINTS
from ..core.errors import Ar2DiffError
from ..core.generate import room_of
from ..data.album import Album
from ..generation.complete import settings_of
from ..generation.prompts import Segments
from .answers import Answers, out_of_time
from .jobs import Job, job_of
from .limits import SMALL
from .log import Account
from .protocol import Request
from .refusal import Refusal, refused
from .service import Service

TOO_LONG = "context_length_exceeded"  # the word that OpenAI's clients look for
FEW = 4  # rows that are prepared in no time
SUFFIX = 16  # tokens of a gap whose length is not said: OpenAI's number


@dataclass(frozen=True)
class Names:
    """How a kind of request calls things.

    Attributes:
        prompt: the field of what is answered.
        field_of: the field for an option of `generate`.
    """

    prompt: str
    field_of: Callable[[str], str]


@dataclass(frozen=True)
class Prompt:
    """What a row begins with.

    Attributes:
        ids: with masks for gaps, and codes for images. segments: what they encode, if they have
            gaps.
        album: of the images.
    """

    ids: list[int]
    segments: Segments | None = None
    album: Album | None = None


async def ask(
    service: Service,
    request: Request,
    account: Account,
    prepare: Callable[[], list[Job]],
    slow: bool,
    whole: bool = False,
) -> Answers:
    """Prepare rows, and have them written.

    Args:
        prepare: makes the jobs. slow: which may take long, for a constraint or images.
        whole: as of `Answers`.

    Raises:
        Refusal: the request cannot be answered, or not now.
    """
    limit = service.limits.seconds
    if not slow and account.size < SMALL and request.rows <= FEW:
        jobs = prepare()  # in less time than another thread would take to begin
    else:
        try:
            async with asyncio.timeout(max(0.0, limit - account.seconds)):
                lane = service.slow if slow else service.plain
                jobs = await lane.run(prepare)
        except TimeoutError:
            raise out_of_time(limit) from None
    answers = Answers(service, jobs, account, whole)
    rows = answers.rows[:: request.n or 1]
    account.prompt_tokens = sum(len(row.before) for row in rows)
    for row in answers.rows:
        row.reason = "length" if row.job.canvas.over[0] else None  # nothing is to be written
    answers.submit()
    return answers


def jobs_of(
    service: Service,
    request: Request,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    tokens: int | None,
    usual: int | None,
    names: Names,
) -> list[Job]:
    """The jobs of prompts, `n` of each.

    Args:
        tokens: that an answer may have at most; None: `usual`, or as many as there is room for.
        usual: None: as many as `generate` writes unless told.

    Raises:
        Refusal: one of them cannot be written.
    """
    _check_bias(service, request)
    settings = {**service.base, **settings}
    drafts, found = bool(request.drafts and request.stream), []
    # Else the text that the engine tells at the end is all that is asked for.
    named = request.logprobs is not None and request.logprobs is not False
    streams = bool(request.stream or request.stop or named)
    seen: dict[tuple[int, ...], int] = {}
    try:
        for prompt in prompts:
            own = {**settings, "max_new_tokens": 0}
            if prompt.segments is None:
                own["max_new_tokens"] = _tokens(service, settings, prompt, tokens, usual, names)
            for _ in range(request.n or 1):
                number = seen.get(key := tuple(prompt.ids), 0)
                seen[key] = number + 1
                found.append(
                    job_of(service.checkpoint, prompt.ids, own, segments=prompt.segments,
                           number=number, streams=streams, drafts=drafts,
                           alternatives=request.alternatives, album=prompt.album)
                )  # fmt: skip
    except Ar2DiffError as error:
        constraint = next((name for name in CONSTRAINTS if settings.get(name)), None)
        subject = names.field_of(constraint) if constraint else names.prompt
        raise refused(error, names.field_of, subject) from None
    return found


def _tokens(
    service: Service,
    settings: dict[str, Any],
    prompt: Prompt,
    tokens: int | None,
    usual: int | None,
    names: Names,
) -> int:
    """Tokens that an answer may have.

    Raises:
        Refusal: the context has no room for the prompt, or for so many.
    """
    spec, options = settings_of(service.checkpoint, settings)
    room, count = room_of(service.checkpoint.model, spec, options), len(prompt.ids)
    if tokens is None:
        most = min(options.max_new_tokens if usual is None else usual, service.limits.tokens)
        tokens = most if room is None else max(1, min(most, room - count))
    if room is None or count + tokens <= room:
        return tokens
    if count + min(tokens, 1) > room:
        told = f"{names.prompt} has {count} tokens, but the model's context has only {room}"
        raise Refusal(400, f"{told}; shorten it", names.prompt, TOO_LONG)
    told = f"{count} tokens of {names.prompt} and {tokens} new ones exceed the context of {room}"
    name = names.field_of("max_new_tokens")
    raise Refusal(400, f"{told}; lower {name} to {room - count}", name, TOO_LONG)


def check_length(service: Service, texts: Iterable[str], name: str) -> None:
    """Refuse a text that cannot fit into the context, before it takes long to find that out.

    Raises:
        Refusal: it cannot.
    """
    size, most = sum(map(len, texts)), service.longest
    if most is not None and size > most:
        told = f"{name} has {size:,} characters, far more than the model's context has room for"
        raise Refusal(400, f"{told}; shorten it", name, TOO_LONG)


def _check_bias(service: Service, request: Request) -> None:
    """Refuse biases of tokens that there are not.

    Raises:
        Refusal: there is one.
    """
    known = service.checkpoint.token_ids
    for token in request.logit_bias or ():
        if token.isdecimal() and (len(token) > 9 or int(token) not in known):
            told = f"logit_bias names {token[:20]}, which is no token; use ids of the tokenizer"
            raise Refusal(400, told, "logit_bias")


def check_count(service: Service, request: Request, prompts: int) -> None:
    """Refuse more answers than a request may ask for.

    Raises:
        Refusal: it asks for more.
    """
    rows, most = prompts * (request.n or 1), service.limits.rows
    if rows > most:
        param = "n" if prompts <= most else "prompt"
        told = f"{rows} answers are asked for, but a request may have {most} at most"
        raise Refusal(400, f"{told}; send several requests", param)


def check_alternatives(count: int, most: int, name: str) -> None:
    """Refuse more alternatives of each token than OpenAI's interface has.

    Raises:
        Refusal: it is more.
    """
    if count > most:
        raise Refusal(400, f"{name} is {count}; set it to a number from 0 to {most}", name)


def check_tokens(service: Service, tokens: int | None, name: str, least: int = 1) -> None:
    """Refuse answers that are too long, or none.

    Raises:
        Refusal: the number is out of range.
    """
    most = service.limits.tokens
    if tokens is not None and not least <= tokens <= most:
        raise Refusal(400, f"{name} is {tokens}; set it to a number from {least} to {most}", name)
