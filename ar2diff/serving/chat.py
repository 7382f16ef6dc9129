"""/v1/chat/completions."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from ..core.conflicts import CONSTRAINTS
from ..core.errors import Ar2DiffError
from ..generation.images import with_keys
from ..generation.tokens import encode_messages, ids_after_text
from .answers import Answers, Row
from .conversation import ChatRequest, NamedTool, Tool
from .jobs import Job
from .log import Account
from .protocol import FIELDS
from .refusal import Refusal, refused
from .replies import Reply
from .rows import (
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
from .tools import Call, Layout

MOST_ALTERNATIVES = 20  # of each token, in OpenAI's interface
MOST_TOOLS = 1 << 18  # characters of tools: a template may indent them
USUAL = 1024  # tokens of an answer unless a request says how many


async def chat(service: Service, request: ChatRequest, account: Account) -> ChatReply:
    """The answers to a conversation, which are being written.

    Raises:
        Refusal: the request cannot be answered, or not now.
    """
    _check(service, request)
    settings = request.settings()
    prepare = partial(_jobs, service, request, settings)
    slow = request.forced is not None or any(name in settings for name in CONSTRAINTS)
    slow = slow or service.checkpoint.sees_images
    answers = await ask(service, request, account, prepare, slow)
    return ChatReply(service, request, answers)


def _check(service: Service, request: ChatRequest) -> None:
    """Refuse what contradicts itself, is too much, or needs what the model lacks.

    Raises:
        Refusal: it does, or is.
    """
    service.check_model(request.model, request.mode)
    if not service.checkpoint.tokenizer.chat_template:
        raise Refusal(
            400, "the model has no chat template, so it takes no messages; send the text to "
            "/v1/completions, or serve a model that was made for chats", "messages",
            "no_chat_template",
        )  # fmt: skip
    check_count(service, request, 1)
    for name in ("max_tokens", "max_completion_tokens"):
        check_tokens(service, getattr(request, name), name)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise Refusal(400, "max_tokens is set beside max_completion_tokens; leave it out",
                      "max_tokens")  # fmt: skip
    check_alternatives(request.alternatives, MOST_ALTERNATIVES, "top_logprobs")
    if request.top_logprobs and not request.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs; set it to true", "top_logprobs")
    check_length(service, (text for m in request.messages for text in m.texts()), "messages")
    _check_images(service, request)
    _check_tools(service, request)


def _check_images(service: Service, request: ChatRequest) -> None:
    count, most = request.images, service.limits.images
    if count and not service.checkpoint.sees_images:
        raise Refusal(400, "messages has an image, but this model reads text alone; leave it out",
                      "messages", "no_images")  # fmt: skip
    if count > most:
        told = f"messages has {count} images, of which a request may have {most}"
        raise Refusal(400, f"{told}; send fewer", "messages")


def _check_tools(service: Service, request: ChatRequest) -> None:
    choice = request.tool_choice
    if request.forced == []:
        named = choice.function.name[:80] if isinstance(choice, NamedTool) else choice
        raise Refusal(400, f"tool_choice is {named!r}, but tools has no such function",
                      "tool_choice")  # fmt: skip
    if not request.offered:
        return
    size = len(json.dumps([tool.rendered() for tool in request.offered]))
    if size > MOST_TOOLS:
        told = f"tools has {size:,} characters, of which a request may have {MOST_TOOLS:,}"
        raise Refusal(400, f"{told}; describe fewer functions", "tools")
    if service.layout is None:
        raise Refusal(
            400, "the model's chat template does not render tools, or not in a layout that can be "
            "read; describe the functions in a system message, and use response_format", "tools",
        )  # fmt: skip
    for name in ("response_format", "regex", "choice", "grammar"):
        value = getattr(request, name)
        if value is not None and getattr(value, "type", None) != "text":
            told = f"{name} cannot be combined with tools"
            raise Refusal(400, f"{told}; set tool_choice to none, or leave it out", name)


def _names(request: ChatRequest) -> Names:
    own = {**FIELDS, "json_schema": "response_format"}
    if request.max_completion_tokens is not None:
        own["max_new_tokens"] = "max_completion_tokens"
    if request.forced is not None:
        own |= {"json_schema": "tools", "regex": "tools"}
    return Names("messages", lambda option: own.get(option, option))


def _jobs(service: Service, request: ChatRequest, settings: dict[str, Any]) -> list[Job]:
    checkpoint, names = service.checkpoint, _names(request)
    layout = service.layout
    as_text = layout is not None and layout.as_text
    messages = [message.rendered(as_text) for message in request.messages]
    tools = [tool.rendered() for tool in request.offered] or None
    album, tokenizer = service.album(), checkpoint.tokenizer
    try:
        messages = with_keys(messages, album, checkpoint.path)
        with service.encoding if album is None else service.seeing:
            if album is not None:
                tokenizer = service.processor.tokenizer
            ids = encode_messages(tokenizer, checkpoint.read_as, messages, tools, album)
            if request.forced is not None and layout is not None and layout.opening()[0]:
                ids = [*ids, *ids_after_text(tokenizer, layout.opening()[0])]
        if request.forced is not None and layout is not None:
            settings = {**settings, "regex": _pattern(request.forced, layout)}
    except Ar2DiffError as error:
        raise refused(error, names.field_of, names.prompt) from None
    config = checkpoint.model.generation_config
    free = checkpoint.read_as.attention != "full" and config.max_new_tokens is None
    tokens = request.max_completion_tokens or request.max_tokens
    return jobs_of(
        service,
        request,
        [Prompt(ids, album=album)],
        settings,
        tokens,
        USUAL if free else None,
        names,
    )


def _pattern(tools: list[Tool], layout: Layout) -> str:
    return layout.pattern([tool.rendered()["function"] for tool in tools])


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    kind, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    request: ChatRequest

    def __init__(self, service: Service, request: ChatRequest, answers: Answers):
        super().__init__(service, request, answers)
        self.layout = service.layout if request.offered else None
        self.writing = [_Calling(self.layout, request) for _ in answers.rows]

    def choice(self, row: Row) -> dict[str, Any]:
        """See `Reply`."""
        content, calls = self._read(row)
        message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        return {
            "index": row.index, "message": message, "logprobs": self._logprobs(row),
            "finish_reason": self.finish_reason(row),
        }  # fmt: skip

    def opening(self, row: Row) -> list[dict[str, Any]]:
        """See `Reply`."""
        return [{**self.empty(row), "delta": {"role": "assistant", "content": ""}}]

    def parts(self, row: Row, text: str) -> list[dict[str, Any]]:
        """See `Reply`."""
        deltas = self.writing[row.index].deltas(row.text.shown, row.reason is not None)
        logprobs = self._logprobs(row)
        if not deltas and logprobs and logprobs["content"]:
            deltas = [{}]
        found = [{**self.empty(row), "delta": delta} for delta in deltas]
        if found:
            found[0]["logprobs"] = logprobs
        return found

    def empty(self, row: Row) -> dict[str, Any]:
        """See `Reply`."""
        return {"index": row.index, "delta": {}, "logprobs": None, "finish_reason": None}

    def finish_reason(self, row: Row) -> str:
        """See `Reply`."""
        return "tool_calls" if self._read(row)[1] else row.finish_reason

    def _read(self, row: Row) -> tuple[str | None, list[Call]]:
        return self.writing[row.index].read(row.text.shown)

    def _logprobs(self, row: Row) -> dict[str, Any] | None:
        """Of the tokens that were shown since the last call."""
        if not self.request.logprobs:
            return None
        found = []
        for token in row.fresh():
            likeliest = token.likeliest[: self.request.alternatives]
            top = [_told(name, value) for name, value in likeliest]
            found.append({**_told(token.name, token.logprob), "top_logprobs": top})
        return {"content": found, "refusal": None}


def _told(name: str, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": logprob, "bytes": [*name.encode()]}


class _Calling:
    """An answer that may call functions, as it comes in."""

    def __init__(self, layout: Layout | None, request: ChatRequest):
        self.layout, self.forced = layout, request.forced is not None
        self.names = [tool.function.name for tool in request.forced or request.offered]
        self.most = 1 if self.forced or request.parallel_tool_calls is False else None
        self.sent = 0  # characters of the content, or of a forced call's arguments
        self.name: str | None = None  # of the forced call that is being written

    def read(self, text: str) -> tuple[str | None, list[Call]]:
        """Content and calls of a whole answer."""
        if self.layout is None:
            return text, []
        before = self.layout.shown() if self.forced else ""
        content, calls = self.layout.calls(before + text, self.names)
        if not calls:
            return text, []
        return content or None, calls[: self.most]

    def deltas(self, text: str, over: bool) -> list[dict[str, Any]]:
        """What is new in an answer."""
        if self.layout is None:
            return self._content(text)
        if self.forced:
            return self._arguments(self.layout, text, over)
        if not over:
            return self._content(text[: self.layout.begins(text)])
        content, calls = self.read(text)
        found = self._content(content or "")
        if calls:
            found.append({"tool_calls": [call.as_json(n) for n, call in enumerate(calls)]})
        return found

    def _content(self, text: str) -> list[dict[str, Any]]:
        new, self.sent = text[self.sent :], max(self.sent, len(text))
        return [{"content": new}] if new else []

    def _arguments(self, layout: Layout, text: str, over: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        start = layout.opening()[1]
        if self.name is None:
            self.name = next(
                (n for n in self.names if text.startswith(start + n + layout.middle)), None
            )
            if self.name is None:
                return []
            found.append({"tool_calls": [Call(self.name, "").as_json(0)]})
        whole = over and bool(self.read(text)[1])
        arguments = text[len(start + self.name + layout.middle) :]
        if whole or not over:
            arguments = arguments[: max(0, len(arguments) - len(layout.closing()))]
        new, self.sent = arguments[self.sent :], max(self.sent, len(arguments))
        if new:
            found.append({"tool_calls": [{"index": 0, "function": {"arguments": new}}]})
        return found
