"""What requests may hold: OpenAI's fields, those of its clients that mean nothing here, and ours.
Whatever else a request holds is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core.errors import nearest
from .refusal import Refusal

MOST_CHOICES = 128  # answers to a prompt
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]

# Fields of OpenAI's interface that are not honoured, and the values at which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "modalities": (["text"],),
    "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",), "functions": (), "function_call": (), "service_tier": (
    "auto", "default"),
}  # fmt: skip
ADVICE = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "functions": "use tools",
    "function_call": "use tool_choice",
}
# Fields of requests, by the option of `generate` that they set.
FIELDS = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop",
    "sequence_bias": "logit_bias",
}  # fmt: skip
SETTINGS = (
    "mode", "threshold", "steps_per_block", "entropy_bound", "block_length", "draft_length",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "seed", "regex",
    "choice", "grammar",
)  # fmt: skip
OFF = {"top_p": 1, "top_k": 0, "min_p": 0}  # a filter that lets everything pass is no sampling


class Strict(BaseModel):
    """A part of a request: no other fields, and no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(Strict):
    """What both kinds of requests have in common."""

    model: str | None = None
    max_tokens: Natural | None = None
    min_tokens: Natural | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    drafts: bool | None = None
    # sampling
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    # decoding
    mode: str | None = None
    threshold: Number | None = None
    steps_per_block: Positive | None = None
    entropy_bound: Number | None = None
    block_length: Positive | None = None
    draft_length: Positive | None = None
    # constraints
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
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
    def _is_neutral(cls, value: Any, info: Any) -> Any:
        allowed = NEUTRAL[info.field_name]
        if value is None or (not isinstance(value, bool) and value in allowed):
            return None
        advice = ADVICE.get(info.field_name, "leave it out")
        raise ValueError(f"is not supported; {advice}")

    @field_validator("stop")
    @classmethod
    def _texts(cls, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("is not a text or a list of texts")
        if not all(texts):
            raise ValueError("has an empty text")
        if len(texts) > 16 or any(len(text) > 64 for text in texts):
            raise ValueError("has more than 16 texts, or one of more than 64 characters")
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
    revise: list[list[Natural]] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Positive | None = None
    json_schema: dict[str, Any] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        given = value if isinstance(value, list) else [value]
        if given and all(type(part) is int for part in given):
            given = [given]
        for part in given:
            whole = isinstance(part, list) and all(type(token) is int for token in part)
            if not isinstance(part, str) and not (whole and part):
                break
        else:
            if given:
                return given
        raise ValueError("is not a text, a list of texts, a list of ids, or a list of such lists")

    def settings(self) -> dict[str, Any]:
        """See `Request`."""
        schema = {} if self.json_schema is None else {"json_schema": self.json_schema}
        return {**super().settings(), **schema}


Kind = TypeVar("Kind", bound=Request)


def read_request(kind: type[Kind], value: Any) -> Kind:
    """A request from what its JSON holds.

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
    first = error.errors(include_url=False, include_input=False)[0]
    where = first["loc"]
    name = str(where[0]) if where else ""
    for part in where[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    name = name[:200]
    if first["type"] == "extra_forbidden":
        near = nearest(name, kind.model_fields) if len(where) == 1 else ""
        told = f"{name!r} is not a field that this server knows{near}"
    elif first["type"] == "value_error":
        told = f"{name} {first['ctx']['error']}"
    elif first["type"] == "missing":
        told = f"{name} is missing"
    else:
        told = f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return Refusal(400, told, name)


def field_of(option: str) -> str:
    """The field that sets an option of `generate`."""
    return FIELDS.get(option, option)
