"""Prints every message and help text of ar2diff, so that they can be read in one go.

    python tests/messages.py > docs/messages.md

Messages are read from the source: the two lines of each error, warnings, what is written on the
screen. `{...}` stands for what is filled in. Help texts are those of the command line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import typer
from ar2diff.cli.main import app

from ar2diff.config.recipe import Recipe
from ar2diff.config.schema import describe_fields

ROOT = Path(__file__).resolve().parents[1]
SPOKEN = {"warn", "echo", "secho", "print", "Note", "Problem", "tell"}  # calls that speak to a user
SPEC_ERRORS = {"Ar2DiffError", "SpecError"}


def text_of(node: ast.expr) -> str | None:
    """The text of a string expression, with `{name}` where something is filled in, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_part(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [text_of(node.left), text_of(node.right)]
        return "".join(part or "{...}" for part in parts) if any(parts) else None
    if isinstance(node, ast.IfExp):
        parts = [text_of(node.body), text_of(node.orelse)]
        return " | ".join(part or "{...}" for part in parts) if any(parts) else None
    return None


def _part(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    inner = value.value if isinstance(value, ast.FormattedValue) else value
    if isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "option":
        arguments = [text_of(argument) or ast.unparse(argument) for argument in inner.args]
        return f"<{'='.join(arguments)}>"
    return f"{{{text_of(inner) or ast.unparse(inner)}}}"


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def messages(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, texts) of every message in a file."""
    told: list[tuple[int, str]] = []  # beginnings of messages that have a line of their own
    for node in sorted(
        ast.walk(ast.parse(file.read_text())), key=lambda n: getattr(n, "lineno", 0)
    ):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "told":
            told.append((node.lineno, text_of(node.value) or "{...}"))
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node)
        raised = name == "ValueError" and "config" in file.parts  # pydantic makes errors of them
        if name == "Refusal" and len(node.args) > 1:  # a status, a message, a field
            text = text_of(node.args[1]) or f"{{{ast.unparse(node.args[1])}}}"
            yield node.lineno, [text.replace("{told}", told[-1][1]) if told else text]
        elif name in SPEC_ERRORS or name in SPOKEN or raised:
            texts = [text for argument in node.args if (text := text_of(argument))]
            if texts:
                yield node.lineno, texts


def help_of(command: object, path: str) -> Iterator[str]:
    """Help of a command and of all below it."""
    yield f"\n### `{path}`\n\n{(getattr(command, 'help', '') or '').strip()}\n"
    for parameter in command.params:
        names = ", ".join(f"`{name}`" for name in parameter.opts)
        yield f"* {names}: {getattr(parameter, 'help', '') or ''}"
    for name, below in getattr(command, "commands", {}).items():
        yield from help_of(below, f"{path} {name}")


def main() -> None:
    """Print all."""
    print("# Every message and help text\n\nMade by `make messages`.\n\n## Messages")
    sources = sorted([*(ROOT / "ar2diff").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
    for file in sources:
        found = sorted(messages(file))
        if found:
            print(f"\n### {file.relative_to(ROOT)}\n")
        for _, texts in found:
            print("* " + "\n  fix: ".join(" ".join(text.split()) for text in texts))
    print("\n## Keys of a recipe\n")
    for field in describe_fields(Recipe):
        print(f"* `{field[0]}`: {field[-1]}")
    print("\n## Help", *help_of(typer.main.get_command(app), "ar2diff"), sep="\n")


if __name__ == "__main__":
    main()
