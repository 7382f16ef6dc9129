"""What requests may hold: OpenAI's fields, those of its clients that mean nothing here, and ours.
Whatever else a request holds is refused by name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..core.errors import nearest
from ..core.values import LARGE
from .refusal import Refusal

MOST_STOPS, LONGEST_STOP = 16, 128  # texts, and characters of one
MOST = 2**31 - 1
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Texts = Annotated[list[str], Field(fail_fast=True)]

# Fields of OpenAI's interface that are not honoured: the values at which they ask for nothing, and
# what to do instead of others.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), "use repetition_penalty"),
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "service_tier": (("auto", "default"), "leave it out"),
    "modalities": ((["text"],), "leave it out"),
    "audio": ((), "leave it out"),
    "prediction": ((), "leave it out"),
    "web_search_options": ((), "leave it out"),
    "reasoning_effort": (("none",), "leave it out"),
    "verbosity": (("medium",), "leave it out"),
    "functions": ((), "use tools"),
    "function_call": ((), "use tool_choice"),
}
# Fields of requests, by the option of `generate` that they set, where the names differ.
FIELDS = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop",
    "sequence_bias": "logit_bias",
}  # fmt: skip
SETTINGS = (
    "mode", "threshold", "steps_per_block", "entropy_bound", "block_length", "draft_length",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "seed", "regex",
    "choice", "grammar",
)  # fmt: skip
OFF = {"top_p": 1, "top_k": 0, "min_p": 0}  # a filter that lets everything pass asks for nothing


class Strict(BaseModel):
    """A part of a request: no other fields, and no conversions between types. Checks end at the
    first fault, since a hostile body may have millions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                raise PydanticCustomError("unknown", "unknown", {"name": name})
        return value


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(Strict):
    """What both kinds of requests have in common."""

    model: str | None = None
    max_tokens: Natural | None = None
    min_tokens: Natural | None = None
    n: Positive | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    drafts: bool | None = None
    # sampling
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Any = None
    # decoding
    mode: str | None = None
    threshold: Number | None = None
    steps_per_block: Positive | None = None
    entropy_bound: Number | None = None
    block_length: Positive | None = None
    draft_length: Positive | None = None
    # constraints
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    # of each kind of request, in its own form
    logprobs: Any = None
    # what means nothing here
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    service_tier: Any = None

    @field_validator(*NEUTRAL, check_fields=False)
    @classmethod
    def _is_neutral(cls, value: Any, info: Any) -> None:
        allowed, advice = NEUTRAL[info.field_name]
        if value is not None and (isinstance(value, bool) or value not in allowed):
            raise ValueError(f"is not supported; {advice}")

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: Any) -> dict[str, float] | None:
        biases = value.values() if isinstance(value, dict) else [] if value is None else [None]
        if not all(type(bias) in (int, float) and abs(bias) <= LARGE for bias in biases):
            raise ValueError(f"is not an object of numbers, from {-LARGE:g} to {LARGE:g}, by token")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("is not a text or a list of texts")
        if not all(texts):
            raise ValueError("holds an empty text; leave it out")
        if len(texts) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in texts):
            raise ValueError(
                f"holds more than {MOST_STOPS} texts, or one of more than {LONGEST_STOP} characters"
            )
        return texts

    def settings(self) -> dict[str, Any]:
        """The options of `generate` that the request sets, but for the number of tokens."""
        found = {name: getattr(self, name) for name in SETTINGS}
        found |= {"stop_strings": self.stop or None, "min_new_tokens": self.min_tokens}
        return {
            name: value
            for name, value in found.items()
            if value is not None and not (name in OFF and value == OFF[name])
        }

    @property
    def usage(self) -> bool:
        """Whether the stream is to end with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """A request to /v1/completions."""

    prompt: Any
    suffix: str | None = None
    revise: Annotated[list[Annotated[list[Natural], Field(min_length=2, max_length=2)]],
                      Field(fail_fast=True)] | None = None  # fmt: skip
    echo: bool | None = None
    logprobs: Natural | None = None
    best_of: Positive | None = None
    json_schema: dict[str, Any] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        given = value if isinstance(value, list) else [value]
        if _is_ids(value):
            given = [value]
        if not given or not all(isinstance(part, str) or _is_ids(part) for part in given):
            raise ValueError(
                "is not a text, a list of texts, a list of token ids, or a list of such lists"
            )
        return given

    @property
    def rows(self) -> int:
        """How many answers are asked for."""
        return len(self.prompt) * (self.n or 1)

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens are told with each."""
        return self.logprobs or 0

    def settings(self) -> dict[str, Any]:
        """See `Request`."""
        schema = {} if self.json_schema is None else {"json_schema": self.json_schema}
        return {**super().settings(), **schema}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


Kind = TypeVar("Kind", bound=Request)


def read_request(kind: type[Kind], value: Any) -> Kind:
    """A request, from what its JSON holds.

    Raises:
        Refusal: a field has the wrong type or value, or is not known.
    """
    if not isinstance(value, dict):
        raise Refusal(400, "the body is not a JSON object; send one with the fields of a request")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[Request], error: ValidationError) -> Refusal:
    found = error.errors(include_url=False, include_input=False)
    first = max(found, key=lambda one: len(one["loc"]))  # of alternatives, the one that was meant
    where = [part for part in first["loc"] if not _names_type(part)]
    where += [first["ctx"]["name"]] if first["type"] == "unknown" else []
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    name = name.removeprefix(".")[:200]
    if first["type"] == "unknown":
        near = nearest(name, kind.model_fields) if len(where) == 1 else ""
        told = f"{name!r} is not a field that this server knows{near}"
    elif first["type"] == "value_error":
        told = f"{name} {first['ctx']['error']}"
    elif first["type"] == "missing":
        told = f"{name} is missing"
    else:
        what = re.sub(r" or instance of \w+", "", first["msg"])
        told = f"{name}: {what[:1].lower()}{what[1:]}"
    return Refusal(400, told, name)


def _names_type(part: str | int) -> bool:
    """Whether a part of a place is the name of an alternative, as pydantic gives it."""
    return isinstance(part, str) and (part in ("str", "NamedTool") or "[" in part)


def field_of(option: str) -> str:
    """The field that sets an option of `generate`."""
    return FIELDS.get(option, option)
