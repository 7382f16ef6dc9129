"""The shapes that rows of conversations have, and the one form that each becomes:

    messages: [{role, content}]             OpenAI; also as JSON text; content may be parts
    conversations: [{from, value}]          ShareGPT
    instruction, input, output              Alpaca; `input` may be empty or missing
    prompt, completion                      texts, or messages
    text                                    in the column data.text_field

Images stand in messages, prompts and texts as `parts` says. A message with `weight: 0` or
`train: false` is read, but not learned.
"""

from __future__ import annotations

from typing import Any

from ..core.errors import Ar2DiffError, option, shortened
from .columns import likely_columns
from .parts import COLUMNS, content_of, images_of, with_images
from .rows import FIX, kind_of, parse_value
from .sources import columns_of

SPEAKERS = {  # in ShareGPT and similar data
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
OF_A_CHAT = ("tools", "chat_template_kwargs")  # columns beside the messages
ALPACA = ("instruction", "input", "output")


def conversation_of(row: dict[str, Any], where: str, text_field: str) -> dict[str, Any]:
    """The row as `messages` (with `tools` and `chat_template_kwargs`, if it has them), as `prompt`
    and `completion` that are texts, or as a text under `text_field`; with its images as of
    `with_images`.

    Args:
        where: what an error calls the row.

    Raises:
        Ar2DiffError: naming the column that cannot be read, and the settings that would read it.
    """
    return with_images(_conversation(row, where, text_field), images_of(row), where)


def _conversation(row: dict[str, Any], where: str, text_field: str) -> dict[str, Any]:
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _chat(messages_of(row[name], f"{where}: {name}"), row, where)
    if "prompt" in row and "completion" in row:
        return _pair(row, where)
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return _chat(_alpaca(row, where), row, where)
    text = row.get(text_field)
    if isinstance(text, str) and text:
        return {text_field: text}
    likely = likely_columns(row)
    texts = [name for name, value in row.items() if isinstance(value, str) and value]
    if not likely and texts:
        likely = option("data.text_field", texts[0])
    raise Ar2DiffError(
        f"{where} has neither messages, nor prompt and completion, nor {text_field!r} "
        f"(it has {columns_of(row)})",
        f"say which columns to read: {likely}"
        if likely
        else "set data.columns; see 'ar2diff config schema data'",
    )


def columns_of_shape(row: dict[str, Any], text_field: str) -> set[str]:
    """The columns that `conversation_of` reads of a row, and those of images."""
    return {*_columns(row, text_field), *COLUMNS}


def _columns(row: dict[str, Any], text_field: str) -> set[str]:
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return {name, "system" if name == "conversations" else name, *OF_A_CHAT}
    if "prompt" in row and "completion" in row:
        texts = isinstance(row["prompt"], str) and isinstance(row["completion"], str)
        return {"prompt", "completion", *(() if texts else OF_A_CHAT)}
    if "instruction" in row and "output" in row:
        return {*ALPACA, "system", *OF_A_CHAT}
    return {text_field}


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from any of the ways to write them; `weight` is 0 on
    those that are not to be learned, and absent from all others.

    Args:
        where: what an error calls the row and the column.

    Raises:
        Ar2DiffError: naming the message that cannot be read.
    """
    if isinstance(value, str):
        value = _of_json(value, where)
    if not isinstance(value, list) or not value:
        raise Ar2DiffError(f"{where} has no messages", FIX)
    return [_message(message, f"{where}[{n}]") for n, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Ar2DiffError(f"{where} is {kind_of(message)}, but must be a message", FIX)
    message = dict(message)
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        message["role"] = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        message["content"] = message.pop("value", None)
        if message["role"] is None:
            raise Ar2DiffError(
                f"{where}.from: the role {shortened(speaker)} is unknown",
                f"use one of {', '.join(SPEAKERS)}",
            )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise Ar2DiffError(f"{where}: the message has no role", FIX)
    calls = message.get("tool_calls")
    if isinstance(content, list):
        content = content_of(content, where)
    if not isinstance(content, (str, list)) and not (content is None and calls):
        raise Ar2DiffError(
            f"{where}: the content is {kind_of(content)}, but must be text",
            'correct or remove the row; an empty answer is ""',
        )
    message["content"] = content
    if calls:
        message["tool_calls"] = _calls(calls, where)
    learned = _learned(message, where)
    message.pop("train", None)
    message.pop("weight", None)
    return message if learned else {**message, "weight": 0}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls, whose arguments templates want as an object, not as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Ar2DiffError(f"{where}.tool_calls is not a list of objects", FIX)
    read = []
    for n, call in enumerate(calls):
        inner = call.get("function")
        if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
            text = inner["arguments"].strip() or "{}"  # some APIs write no arguments as no text
            given = _of_json(text, f"{where}.tool_calls[{n}].function.arguments")
            call = {**call, "function": {**inner, "arguments": given}}
        read.append(call)
    return read


def _learned(message: dict[str, Any], where: str) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1) or train not in (None, False, True):
        name, value = ("weight", weight) if weight not in (None, 0, 1) else ("train", train)
        raise Ar2DiffError(
            f"{where}.{name} is {shortened(value)}, but a message can only be learned or not",
            "set weight to 0 or 1, or train to true or false",
        )
    return weight != 0 and train is not False


def _chat(messages: list[dict[str, Any]], row: dict[str, Any], where: str) -> dict[str, Any]:
    """Messages with the columns that belong to them."""
    if all(message["role"] != "assistant" for message in messages):
        raise Ar2DiffError(f"{where}: there is no message from the assistant", FIX)
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        if row.get("messages") is None:  # there they are complete
            messages = [{"role": "system", "content": system}, *messages]
    found: dict[str, Any] = {"messages": messages}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(name)
        if isinstance(value, str):
            value = _of_json(value, f"{where}: {name}") if value.strip() else None
        if value is None or value in ([], {}):
            continue
        if not isinstance(value, kind):
            raise Ar2DiffError(
                f"{where}: {name} is {kind_of(value)}, but must be {kind_of(kind())}", FIX
            )
        found[name] = value
    if not all(isinstance(tool, dict) for tool in found.get("tools", ())):
        raise Ar2DiffError(f"{where}: tools contains something other than objects", FIX)
    return found


def _pair(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Prompt and completion: texts as they are, messages as a chat whose prompt is not learned."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _side(prompt, "user", f"{where}: prompt")
        after = _side(completion, "assistant", f"{where}: completion")
        return _chat([*({**m, "weight": 0} for m in before), *after], row, where)
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            number = isinstance(row[name], (int, float)) and not isinstance(row[name], bool)
            raise Ar2DiffError(
                f"{where}: {name} is {kind_of(row[name])}, but must be text",
                f"set {option(f'data.columns.{name}', '{' + name + '}')} to turn numbers into text"
                if number
                else 'correct or remove the row; an empty answer is ""',
            )
    if not prompt and not completion:
        raise Ar2DiffError(f"{where}: prompt and completion are empty", "remove the row")
    return {"prompt": prompt, "completion": completion}


def _side(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    return messages_of(
        [{"role": role, "content": value}] if isinstance(value, str) else value, where
    )


def _alpaca(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """An instruction, with its input below it, and the answer."""
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise Ar2DiffError(f"{where}: input is {kind_of(given)}, but must be text", FIX)
    asked = "\n\n".join(text for text in (row["instruction"], given) if text)
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": row["output"]},
    ]


def _of_json(text: str, where: str) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        raise Ar2DiffError(f"{where} is a text that is not JSON: {error}", FIX) from None
