"""The pages of the site that are made from something else: the README, the command line, the schema
of a recipe, the shipped recipes and the public names. mkdocs calls `on_files`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
import yaml
from ar2diff.cli.main import app
from typer.cli import get_docs_for_click

import ar2diff
from ar2diff.config.recipe import Recipe, recipe_names
from ar2diff.config.schema import describe_fields

ROOT = Path(__file__).resolve().parents[2]
# Where the links of the README and of the two other pages from outside docs/ lead on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}


def pages() -> dict[str, str]:
    """{path under docs/: Markdown} of every page that no file there holds."""
    return {
        **{page: _moved(source) for source, page in ELSEWHERE.items()},
        "reference/cli.md": commands(),
        "reference/recipe.md": recipe_keys(),
        "reference/recipes.md": shipped_recipes(),
        "reference/api.md": public_names(),
        "terminal.md": recordings(),
    }


def _moved(source: str) -> str:
    """A page from outside docs/, with its links as the site has them."""
    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    return re.sub(r"\]\(([\w/]+\.md)\)", lambda m: f"]({ELSEWHERE.get(m[1], m[1])})", text)


def commands() -> str:
    """Every command with its arguments and options, as typer documents them."""
    command = typer.main.get_command(app)
    for below in command.commands.values():  # else the list shortens it to 45 characters
        below.short_help = below.short_help or below.help
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="ar2diff", title="Commands"
    )
    return re.sub(r"^Example: (.*)$", r"```console\n$ \1\n```", text, flags=re.M)


def recipe_keys() -> str:
    """Every key of a recipe, a table for each section."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a YAML file; [the guide](../guides/recipes.md) explains how to write one. "
        "`ar2diff config schema` prints these keys in a terminal, and as a JSON schema with "
        "`--json`. An unknown key is an error, and the nearest known one is named.",
    ]
    section = None
    for name, kind, default, meaning in describe_fields(Recipe):
        above = name.rpartition(".")[0].split(".")[0] or "description"
        if above != section:
            section = above
            lines += [
                "",
                f"## {section}",
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
        shown = (
            json.dumps(default) if default is None or isinstance(default, bool) else str(default)
        )
        if isinstance(default, tuple):
            shown = str(list(default))
        cells = [f"`{name}`", _cell(kind), f"`{shown}`" if shown else "", _cell(meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def shipped_recipes() -> str:
    """Every shipped recipe whole, with the command and the hardware that it begins with."""
    lines = [
        "# Shipped recipes",
        "",
        "`ar2diff recipes ls` lists them, and `ar2diff recipes cp NAME my.yaml` copies one to "
        "edit. [The guide](../guides/recipes.md) sorts them by purpose.",
    ]
    for name in recipe_names():
        text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        said = yaml.safe_load(text)["description"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{said[0].upper()}{said[1:]}.",
            "",
            "```yaml",
            text.rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def public_names() -> str:
    """What `import ar2diff` offers, in the order and with the headings of its docstring."""
    parts = re.split(r"^(\S[^\n:]*):\n(?=    \w)", ar2diff.__doc__ or "", flags=re.M)
    lines = ["# Python", "", parts[0].split("\n\n")[0].replace("\n", " "), ""]
    left = dict(ar2diff._HOMES)
    for heading, below in zip(parts[1::2], parts[2::2], strict=True):
        lines += [f"## {heading.partition(',')[0]}", ""]
        for name in (word for word in re.findall(r"\w+", below) if word in left):
            lines += [f"::: ar2diff.{left.pop(name)}.{name}"]
            options = f"heading: ar2diff.{name}, toc_label: {name}"
            if name.endswith("Trainer"):  # their methods are what transformers and trl call
                options += ", members: false"
            lines += [f"    options: {{{options}}}", ""]
    return "\n".join(lines)


def recordings() -> str:
    """What commands show in a terminal: docs/recordings/VERB[-OPTION]-COLUMNS.svg."""
    lines = ["# In the terminal", "", "Recorded with `python benchmarks/recordings.py`.", ""]
    verbs = list(typer.main.get_command(app).commands)
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted((ROOT / "docs" / "recordings").glob("*-*.svg"), key=lambda f: f.stem):
        name, _, columns = file.stem.rpartition("-")
        found.setdefault(name, []).append((columns, file.name))
    for name in sorted(found, key=lambda name: verbs.index(name.partition("-")[0])):
        command = f"ar2diff {name.replace('-', ' --', 1)}"
        lines += [f"## {command.removeprefix('ar2diff ')}", ""]
        for columns, file in found[name]:
            said = f"What {command} shows in a terminal of {columns} columns"
            lines += [f"![{said}](recordings/{file})", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that mkdocs found."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **rest: Any) -> str:
    """Show a pipe in the code of a cell as one: in Markdown it has a backslash before it."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html)
