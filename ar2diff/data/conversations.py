"""Conversations of files, and the chat template that makes text of them, which must tell what the
assistant says and where it ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError
from .columns import arranged
from .sources import find_file, read_lines

FORMATS = ("messages", "prompt and completion", "text")
TEMPLATES = Path(__file__).parent / "templates"
FIX = "set data.chat_template to one that does, or data.assistant_only=false"
# What two templates must write alike to be taken for one: roles, order, spaces, nothing said.
PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": " b \n"}),
    (
        {"role": "system", "content": "s "},
        {"role": "user", "content": "\na b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "e"},
    ),
    ({"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}),
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": ["b"]}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
TOOL_PROBE: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": '{"z": 3}'},
    {"role": "assistant", "content": "b"},
)


def read_conversations(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of all sources: `messages`, or `prompt` and `completion`, or a text; all of one format.

    Raises:
        Ar2DiffError: naming the file and the row that is not.
    """
    rows = [_conversation(row, where, recipe) for where, row in read_rows(recipe)]
    kinds = {tuple(sorted(row)) for row in rows}
    if len({kind[0] for kind in kinds}) > 1:
        raise Ar2DiffError("the rows are of several formats", f"one of {', '.join(FORMATS)} alone")
    return rows


def read_rows(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """(what an error calls it, row) of all sources, columns where the recipe says they are.

    Raises:
        Ar2DiffError: naming the file and the row that cannot be read.
    """
    if not recipe.data.sources:
        raise Ar2DiffError("no data is named", "give --data, or data.sources in the recipe")
    rows: list[tuple[str, dict[str, Any]]] = []
    for source in recipe.data.sources:
        path = find_file(source.path)
        if path is None:
            raise Ar2DiffError(
                f"data {source.path}: no such file", "sft and rl read local jsonl files"
            )
        for number, line in enumerate(read_lines(path, f"data {path}"), 1):
            where = f"data {path}: row {number}"
            if line.strip():
                rows.append((where, arranged(_parsed(line, where), recipe.data.columns, where)))
    if not rows:
        raise Ar2DiffError("the data is empty", "give a file with rows")
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Ar2DiffError(f"{where} is not JSON ({error.msg})", "mend or remove it") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Ar2DiffError(f"{where} is not valid Unicode", "mend or remove it") from None
    return row if isinstance(row, dict) else {}


def _conversation(row: dict[str, Any], where: str, recipe: Recipe) -> dict[str, Any]:
    if "messages" in row:
        messages = row["messages"]
        said = [
            isinstance(m, dict) and isinstance(m.get("role"), str) and (
                isinstance(m.get("content"), str) or m.get("tool_calls")
            )
            for m in (messages if isinstance(messages, list) else [])
        ]  # fmt: skip
        if not said or not all(said):
            raise Ar2DiffError(
                f"{where}: a message without role or content",
                'mend or remove the row; an answer of nothing is ""',
            )
        if all(message["role"] != "assistant" for message in messages):
            raise Ar2DiffError(f"{where}: the assistant says nothing", "mend or remove the row")
        return {k: row[k] for k in ("messages", "tools") if row.get(k) is not None}
    if "prompt" in row and "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str):
                raise Ar2DiffError(
                    f"{where}: {name} is {_kind(row[name])}, wanted text",
                    'mend or remove the row; an answer of nothing is ""',
                )
        if not row["prompt"] and not row["completion"]:
            raise Ar2DiffError(f"{where}: prompt and completion are empty", "remove the row")
        return {"prompt": row["prompt"], "completion": row["completion"]}
    field = recipe.data.text_field
    if isinstance(row.get(field), str) and row[field]:
        return {field: row[field]}
    raise Ar2DiffError(
        f"{where} has neither messages nor prompt and completion nor {field!r} "
        f"(it has {', '.join(row) or 'nothing'})",
        "see data.columns in 'ar2diff config schema data'",
    )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def uses_tools(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation has tools, calls of them or their results."""
    return any(
        row.get("tools")
        or any(m.get("tool_calls") or m.get("role") == "tool" for m in row.get("messages", ()))
        for row in rows
    )


def asked_otherwise(tokenizer: Any, rows: Sequence[dict[str, Any]], most: int = 64) -> int:
    """Of how many of the first rows the last answer is taught behind other tokens than those that
    ask for it in a chat: a tokenizer may join what ends the prompt to what begins the answer."""
    found = 0
    for row in rows[:most]:
        messages, tools = row["messages"], row.get("tools")
        if messages[-1]["role"] != "assistant":
            continue
        asked, whole = (
            tokenizer.apply_chat_template(
                part, tools=tools, add_generation_prompt=part is not messages, return_dict=True
            )["input_ids"]
            for part in (messages[:-1], messages)
        )
        found += whole[: len(asked)] != asked
    return found


def chat_template(tokenizer: Any, recipe: Recipe, tools: bool = False) -> str:
    """The template to render conversations with: the recipe's, else the tokenizer's; where that
    does not mark what the assistant says, one that writes the same and does: trl's, or ours.

    Args:
        tools: there are some in the conversations.

    Raises:
        Ar2DiffError: there is none, or it cannot tell what the assistant says or where it ends.
    """
    from trl.chat_template_utils import has_generation_markers

    template = _named(recipe.data.chat_template) or tokenizer.chat_template
    if isinstance(template, dict):  # of several it is the one that chats
        template = template.get("default")
    if not template:
        raise Ar2DiffError(
            "the tokenizer has no chat template", "set data.chat_template, for example to plain"
        )
    if not recipe.data.assistant_only:
        return template
    if not has_generation_markers(template):
        template = _marked(tokenizer, template, tools)
    if turn_end(tokenizer, template) is None:
        raise Ar2DiffError(
            "the chat template ends no answer with an end token that the tokenizer has: "
            "nothing would teach the model to stop",
            "set data.chat_template to one that does, for example plain",
        )
    return template


def turn_end(tokenizer: Any, template: str) -> int | None:
    """The special token that a template writes behind what the assistant says."""
    said = "what is said"
    written = rendered(tokenizer, template, [{"role": "user", "content": "a"}, _said(said)])
    if written is None or said not in written:
        return None
    behind = tokenizer(written.rpartition(said)[2], add_special_tokens=False).input_ids
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((n for n in behind if n in special or n in tokenizer.all_special_ids), None)


def rendered(
    tokenizer: Any,
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> str | None:
    """What a template writes; None where it refuses."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools, chat_template=template, tokenize=False, **options
        )
    except Exception:  # a template raises what it likes
        return None


def _said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _named(name: str | None) -> str | None:
    if name is None:
        return None
    path = Path(name) if name.endswith((".jinja", ".j2")) else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise Ar2DiffError(
            f"data.chat_template {name}: no such template", f"{shipped}, or a .jinja file"
        )
    return path.read_text(encoding="utf-8")


def _marked(tokenizer: Any, template: str, tools: bool) -> str:
    """A template with generation markers that writes what `template` does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        known = get_training_chat_template(tokenizer)
        if known is not None and has_generation_markers(known):
            return known
    except ValueError:
        pass
    finally:
        tokenizer.chat_template = before
    for path in sorted(TEMPLATES.glob("*.jinja")):
        ours = path.read_text(encoding="utf-8")
        if _same(tokenizer, template, ours, tools):
            return ours
    raise Ar2DiffError(
        "the chat template does not mark what the assistant says ({% generation %})", FIX
    )


def _same(tokenizer: Any, one: str, other: str, tools: bool) -> bool:
    """Whether two templates write the same; what both refuse says nothing."""
    cases = [(probe, None) for probe in PROBES]
    if tools:
        cases += [(TOOL_PROBE, None), (TOOL_PROBE, [TOOL])]
    written = [
        [
            rendered(tokenizer, template, *case, add_generation_prompt=prompt)
            for case in cases
            for prompt in (False, True)
        ]
        for template in (one, other)
    ]
    return written[0] == written[1] and any(text is not None for text in written[0])
