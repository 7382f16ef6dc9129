"""The chat template that turns messages into text: which one a run uses, whether it marks what the
assistant says, and where an answer ends."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, first_line, nearest, option
from .template_trial import check_cost

TEMPLATES = Path(__file__).parent / "templates"
FIX = (
    f"set {option('data.chat_template')} to one that does, "
    f"or {option('data.assistant_only', 'false')}"
)
OWN = f"correct the template, or set {option('data.chat_template', 'plain')}"
# Two templates that render all of these alike are taken to be the same: roles, order, white space,
# empty messages.
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
IMAGE_PROBE: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "b"},
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


def chat_template(tokenizer: Any, recipe: Recipe, tools: bool = False, images: bool = False) -> str:
    """The template to render conversations with: the recipe's if it names one, else the
    tokenizer's. If that does not mark what the assistant says, it is replaced by one that renders
    the same text and does: trl's, or one that ships with ar2diff.

    Args:
        tools, images: whether the conversations have tools, or images.

    Raises:
        Ar2DiffError: there is no template, or it cannot be rendered, or it does not tell what the
            assistant says or where that ends.
    """
    from trl.chat_template_utils import has_generation_markers

    template = _named(recipe.data.chat_template) or tokenizer.chat_template
    if isinstance(template, dict):  # the one for chats, of several
        template = template.get("default")
    if not template:
        raise Ar2DiffError(
            "the tokenizer has no chat template",
            f"choose one, for example {option('data.chat_template', 'plain')}",
        )
    name = template_name(recipe)
    if recipe.data.chat_template is not None:  # the tokenizer's own was tried when it was loaded
        check_cost(template, tokenizer.special_tokens_map)
    _check_syntax(tokenizer, template, name)
    if not recipe.data.assistant_only:
        return template
    if not has_generation_markers(template):
        template = _marked(tokenizer, template, tools, images, name)
    if turn_end(tokenizer, template) is None:
        raise _endless(tokenizer, template, name)
    return template


def template_name(recipe: Recipe) -> str:
    """How an error refers to the template of a run."""
    given = recipe.data.chat_template
    return "the chat template of the tokenizer" if given is None else f"the chat template {given}"


@functools.lru_cache(maxsize=64)
def _takes_text(template: str) -> bool:
    """Whether a template writes messages whose content is a text; some only know lists of parts."""
    probe, values = "ar2diffprobe", dict.fromkeys(("bos_token", "eos_token", "pad_token"), "")
    chat = [{"role": role, "content": probe} for role in ("user", "assistant")]
    try:
        return _compile_jinja_template(template).render(messages=chat, **values).count(probe) == 2
    except Exception:  # a template raises what it likes
        return True


def in_form(template: str | None, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose texts are lists of one part, for a template that takes nothing else."""
    if not isinstance(template, str) or _takes_text(template):
        return list(messages)
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]


def turn_end(tokenizer: Any, template: str) -> int | None:
    """The special token that a template writes after what the assistant says; None if there is
    none."""
    said = "what is said"
    written = rendered(tokenizer, template, [{"role": "user", "content": "a"}, _said(said)])
    if written is None or said not in written:
        return None
    after = tokenizer(written.rpartition(said)[2], add_special_tokens=False).input_ids
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((n for n in after if n in special or n in tokenizer.all_special_ids), None)


def rendered(
    tokenizer: Any,
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> str | None:
    """The text that a template writes; None if it raises an error."""
    try:
        return tokenizer.apply_chat_template(
            in_form(template, messages), tools, chat_template=template, tokenize=False, **options
        )
    except Exception:  # a template raises what it likes
        return None


def check_options(tokenizer: Any, options: dict[str, Any], where: str) -> None:
    """Refuse template variables that would be settings of `apply_chat_template` itself.

    Args:
        where: what an error calls the row.
    """
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents"}
    for name in options:
        if name in taken or name in ("messages", "raise_exception"):
            raise Ar2DiffError(
                f"{where}: chat_template_kwargs must not set {name!r}",
                "remove it from chat_template_kwargs in the row",
            )


def asked_otherwise(tokenizer: Any, rows: Sequence[dict[str, Any]], most: int = 64) -> int:
    """How many of the first rows teach their last answer after different tokens than a chat would
    end its prompt with: a tokenizer may merge the end of the prompt with the start of the
    answer."""
    found = 0
    for row in rows[:most]:
        messages, tools = in_form(tokenizer.chat_template, row["messages"]), row.get("tools")
        if messages[-1]["role"] != "assistant":
            continue
        try:
            asked, whole = (
                tokenizer.apply_chat_template(
                    part,
                    tools=tools,
                    add_generation_prompt=part is not messages,
                    return_dict=True,
                    **row.get("chat_template_kwargs", {}),
                )["input_ids"]
                for part in (messages[:-1], messages)
            )
        except Exception:  # a template that refuses half a conversation
            continue
        found += whole[: len(asked)] != asked
    return found


def dropped_by(tokenizer: Any, template: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which parts of the conversations a template drops: messages of a role, tools, tool calls."""
    probe, dropped = "ar2diffprobe", []
    for role in sorted({m["role"] for row in rows for m in row["messages"]}):
        row, place = _first_of(rows, lambda m, role=role: m["role"] == role and m["content"])
        if row is not None:
            messages = list(row["messages"])
            messages[place] = {**messages[place], "content": probe}
            if probe not in (_written_of(tokenizer, template, row, messages) or probe):
                dropped.append(f"messages of role {role}")
    row, place = _first_of(rows, lambda m: m.get("tool_calls"))
    if row is not None:
        messages = list(row["messages"])
        call = {"type": "function", "function": {"name": probe, "arguments": {}}}
        messages[place] = {**messages[place], "tool_calls": [call]}
        if probe not in (_written_of(tokenizer, template, row, messages) or probe):
            dropped.append("tool calls")
    row = next((row for row in rows if row.get("tools")), None)
    if row is not None:
        without = {name: value for name, value in row.items() if name != "tools"}
        one, other = (_written_of(tokenizer, template, r, r["messages"]) for r in (row, without))
        if one is not None and one == other:
            dropped.append("the column tools")
    return dropped


def _first_of(rows: Sequence[dict[str, Any]], wanted: Any) -> tuple[dict[str, Any] | None, int]:
    for row in rows:
        for place, message in enumerate(row["messages"]):
            if wanted(message):
                return row, place
    return None, 0


def _written_of(
    tokenizer: Any, template: str, row: dict[str, Any], messages: list[dict[str, Any]]
) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            in_form(template, messages),
            row.get("tools"),
            chat_template=template,
            tokenize=False,
            **row.get("chat_template_kwargs", {}),
        )
    except Exception:  # a template raises what it likes
        return None


def _said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _check_syntax(tokenizer: Any, template: str, name: str) -> None:
    try:
        tokenizer.apply_chat_template([_said("a")], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:  # of a filter that does not exist, too
        raise Ar2DiffError(
            f"{name} is not valid: {first_line(error)} (line {error.lineno})", OWN
        ) from None
    except Exception:  # it may well refuse an answer to nothing
        return


def _endless(tokenizer: Any, template: str, name: str) -> Ar2DiffError:
    """The error for a template that does not end an answer, or does not render one at all."""
    chat = [{"role": "user", "content": "a"}, _said("what is said")]
    try:
        tokenizer.apply_chat_template(
            in_form(template, chat), chat_template=template, tokenize=False
        )
    except Exception as error:  # a template raises what it likes
        return Ar2DiffError(
            f"{name} cannot render a question and its answer: {first_line(error)}", OWN
        )
    return Ar2DiffError(
        f"{name} does not end answers with an end token of the tokenizer, so nothing would teach "
        "the model to stop",
        f"use one that does, for example {option('data.chat_template', 'plain')}",
    )


def _named(name: str | None) -> str | None:
    if name is None:
        return None
    path = Path(name) if name.endswith((".jinja", ".j2")) else TEMPLATES / f"{name}.jinja"
    shipped = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        reason = "there is no such template" + nearest(name, shipped)
    except (OSError, ValueError) as error:  # it may not be read, or is not UTF-8
        reason = first_line(error)
    raise Ar2DiffError(
        f"data.chat_template {name}: {reason}", f"use one of {', '.join(shipped)}, or a .jinja file"
    )


def _marked(tokenizer: Any, template: str, tools: bool, images: bool, name: str) -> str:
    """A template with generation markers that renders the same text as `template`."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        known = get_training_chat_template(tokenizer)
        if known is not None and has_generation_markers(known):
            return known
    except Exception:  # trl renders it, and a template raises what it likes
        pass
    finally:
        tokenizer.chat_template = before
    for path in sorted(TEMPLATES.glob("*.jinja")):
        ours = path.read_text(encoding="utf-8")
        if _same(tokenizer, template, ours, tools, images):
            return ours
    raise Ar2DiffError(f"{name} does not mark what the assistant says with {{% generation %}}", FIX)


def _same(tokenizer: Any, one: str, other: str, tools: bool, images: bool) -> bool:
    """Whether two templates render the same text. Conversations that both refuse do not count."""
    cases = [(probe, None) for probe in PROBES]
    if tools:
        cases += [(TOOL_PROBE, None), (TOOL_PROBE, [TOOL])]
    if images:
        cases.append((IMAGE_PROBE, None))
    written = [
        [
            rendered(tokenizer, template, *case, add_generation_prompt=prompt)
            for case in cases
            for prompt in (False, True)
        ]
        for template in (one, other)
    ]
    return written[0] == written[1] and any(text is not None for text in written[0])
