"""What a request to /v1/chat/completions may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..config.safe_json import parse_json
from .protocol import Natural, Request, Strict

NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class ImageUrl(Strict):
    """The image of a part, as a data URI: nothing is fetched, and no file is read."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _holds_it(cls, value: str) -> str:
        head, _, data = value.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64") and data):
            where = "on the web" if value[:8].startswith(("http://", "https://")) else "elsewhere"
            raise ValueError(
                f"names an image {where}, but this server fetches none and reads no files; send "
                "the image itself, as data:image/png;base64,..."
            )
        return value


class Part(Strict):
    """A part of a message's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None

    @model_validator(mode="after")
    def _is_whole(self) -> Part:
        if self.type not in ("text", "image_url"):
            raise ValueError(
                f"of type {self.type[:40]!r} is not supported: models read text, and some images"
            )
        if self.type == "text" and self.text is None:
            raise ValueError("has no text")
        if self.type == "image_url" and self.image_url is None:
            raise ValueError("has no image_url")
        return self

    def rendered(self) -> dict[str, str]:
        """The part as `content_of` reads it."""
        if self.image_url is not None and self.type == "image_url":
            return {"type": "image", "image": self.image_url.url}
        return {"type": "text", "text": self.text or ""}


class CalledFunction(Strict):
    """The function of a call in an earlier answer."""

    name: Annotated[str, Field(pattern=NAME)]
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, value: str) -> str:
        try:
            found = parse_json(value or "{}", constants=False)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError("is not the text of a JSON object")
        return value or "{}"


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Natural | None = None


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    # What answers have that clients send back.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("has tool_calls, which belong to the role assistant")
        if self.content is None and not self.tool_calls:
            raise ValueError("has no content")
        return self

    def texts(self) -> Iterator[str]:
        """All texts of the message."""
        content = self.content or ""
        yield from (
            [content] if isinstance(content, str) else (part.text or "" for part in content)
        )
        yield from (call.function.arguments for call in self.tool_calls or ())

    @property
    def images(self) -> int:
        """How many images the message has."""
        parts = [] if isinstance(self.content, str) else self.content or []
        return sum(part.type == "image_url" for part in parts)

    def rendered(self, as_text: bool) -> dict[str, Any]:
        """The message as chat templates read it.

        Args:
            as_text: they want the arguments of calls as a text.
        """
        role = "system" if self.role == "developer" else self.role
        content: Any = self.content or ""
        if self.images:
            content = [part.rendered() for part in self.content or () if isinstance(part, Part)]
        elif not isinstance(content, str):
            content = "\n".join(part.text or "" for part in content)
        found: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            found["name"] = self.name
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            found["tool_calls"] = [_rendered(call, as_text) for call in self.tool_calls]
        return found


def _rendered(call: ToolCall, as_text: bool) -> dict[str, Any]:
    function = call.function
    arguments = function.arguments if as_text else json.loads(function.arguments)
    return {
        "id": call.id or "", "type": "function",
        "function": {"name": function.name, "arguments": arguments},
    }  # fmt: skip


class Function(Strict):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function

    def rendered(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }


class NamedFunction(Strict):
    """The function that has to be called."""

    name: str


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Schema(Strict):
    """`response_format.json_schema`."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class Format(Strict):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Format:
        if self.type == "json_object":
            raise ValueError(
                "of type json_object is not supported, because it does not say which object; use "
                "json_schema"
            )
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema_ is None
        ):
            raise ValueError("has no json_schema.schema")
        return self


class ChatRequest(Request):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Natural | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Natural | None = None
    # what means nothing here, or is refused
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    functions: Any = None
    function_call: Any = None

    @field_validator("tools")
    @classmethod
    def _are_different(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(set(names)) < len(names):
            raise ValueError("has two functions of the same name")
        return value or None

    @property
    def images(self) -> int:
        """How many images the conversation has."""
        return sum(message.images for message in self.messages)

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model hears of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> list[Tool] | None:
        """Those of which one has to be called; None: none has to be."""
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.offered if tool.function.name == wanted]
        return self.offered if self.tool_choice == "required" else None

    @property
    def rows(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens are told with each."""
        return self.top_logprobs or 0

    def settings(self) -> dict[str, Any]:
        """See `Request`."""
        found, format_ = super().settings(), self.response_format
        if format_ is not None and format_.json_schema is not None:
            found["json_schema"] = format_.json_schema.schema_
        return found
