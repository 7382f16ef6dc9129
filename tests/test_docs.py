"""The README and the documentation: what they link to, name and tell people to type exists."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import typer
from ar2diff.cli.main import app

import ar2diff
from ar2diff.config.recipe import Recipe, field_names, load_recipe, recipe_names
from ar2diff.core import noises
from ar2diff.generation.chat import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDES = ROOT / "docs" / "guides"
PAGES = [README, ROOT / "benchmarks" / "README.md"]
PAGES += sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "messages.md")
FOLDERS = ("benchmarks", "docs", "recipes", "tests", "ar2diff", "cli", "results")
OTHERS = {"--nnodes", "--node-rank", "--master-addr", "--rdzv-id", "--rdzv-backend"}  # torchrun's
OTHERS |= {"--rdzv-endpoint", "--no-deps", "--directory", "--continuous-batching"}
OTHERS |= {"--model", "--dllm-algorithm-config"}  # of lm-eval, and of SGLang

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def script(name: str) -> ModuleType:
    """A file of docs/site as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs/site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of the blocks of code in a page, fenced or indented."""
    for language, code in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S):
        yield language, code
    for code in re.findall(r"(?:^    \S[^\n]*\n)+", without_fences(text), re.M):
        yield "", code


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Code within the sentences and tables of a page."""
    return re.findall(r"`([^`\n]+)`", without_fences(text))


def typed(text: str) -> Iterator[list[str]]:
    """The words of every `ar2diff` command line in the blocks of code."""
    for language, code in blocks(text):
        if language not in ("", "console"):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            for part in re.split(r" \| |&&", line):
                words = shlex.split(part.removeprefix("$").strip(), comments=True) or [""]
                while re.match(r"\w+=", words[0]) and len(words) > 1:  # of the environment
                    words = words[1:]
                if words[0] == "ar2diff":
                    yield words[1:]


@functools.cache
def command_line() -> typer.core.TyperGroup:
    return typer.main.get_command(app)


@functools.cache
def known_options() -> set[str]:
    """All flags of the command line and of the benchmarks."""
    scripts = "".join(map(read, ROOT.glob("benchmarks/*.py")))
    shell = read(ROOT / "benchmarks" / "multi_gpu.sh")
    own = re.findall(r"\"(--[\w-]+)\"", scripts) + re.findall(r"--[\w-]+", shell)
    return options_of(command_line()) | OTHERS | set(own)


def parsed(words: list[str]) -> dict[str, object]:
    """The values of a command line as its verb would get them; nothing is run."""
    if "--" in words:  # what follows is the launcher's
        words = words[: words.index("--")]
    command = command_line()
    context = command.make_context("ar2diff", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context.params


def options_of(command: object) -> set[str]:
    """All flags of a command and of those below it."""
    found = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    return found.union(*(options_of(c) for c in getattr(command, "commands", {}).values()))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_readme_is_a_front_page():
    assert len(read(README).splitlines()) <= 150


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    """The pages that are made when the site is built, by the path they would have."""
    return {ROOT / "docs" / path: text for path, text in script("hooks").pages().items()}


@every_page
def test_links_lead_to_files_and_headings(page, made):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", read(page)):
        path, _, anchor = "".join(target).partition("#")
        assert not path.startswith("http"), "no page depends on another site"
        where = (page.parent / path).resolve() if path else page
        known = page != README and where in made  # the README is read without the site, too
        assert known or where.is_file(), target
        if anchor:
            assert anchor in anchors(made[where] if known else read(where)), target


@every_page
def test_command_lines_are_understood(page):
    for words in typed(read(page)):
        values = parsed(words)
        name = values.get("recipe")
        shipped = name if name in recipe_names() else None
        assert shipped == name or name.endswith(".yaml"), words
        if words[0] not in ("memory", "recipes"):
            load_recipe(shipped, values.get("overrides") or [])


@every_page
def test_commands_within_sentences_exist(page):
    commands = command_line().commands
    for words in (span.split() for span in spans(read(page)) if span.startswith("ar2diff ")):
        command = command_line() if words[1].startswith("--") else commands.get(words[1])
        assert command is not None, words
        given = {word for word in words if word.startswith("--")}
        assert given <= options_of(command) | {"--help"}, words


@every_page
def test_options_exist(page):
    named = {flag for span in spans(read(page)) for flag in re.findall(r"(?<!\S)--\w[\w-]*", span)}
    assert named <= known_options()


@every_page
def test_benchmarks_take_the_options_that_are_given(page):
    text = read(page)
    for code in [*spans(text), *(code.replace("\\\n", " ") for _, code in blocks(text))]:
        for file, rest in re.findall(r"python (benchmarks/\w+\.py)([^\n#|]*)", code):
            source = read(ROOT / file)
            assert all(f'"{flag}"' in source for flag in re.findall(r"--[\w-]+", rest)), code


@every_page
def test_files_and_make_targets_exist(page):
    text, makefile = read(page), read(ROOT / "Makefile")
    codes = [*spans(text), *(code for _, code in blocks(text))]
    for code in codes:
        for path in re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*-]*)", code):
            assert any([*ROOT.glob(path), *ROOT.glob(f"benchmarks/{path}")]), path
        for target in re.findall(r"(?:^|\$ )make ([a-z][\w-]*)", code, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target
        for module in re.findall(r"python -m (ar2diff[\w.]*)", code):
            assert importlib.util.find_spec(module), module


@every_page
def test_recipe_keys_exist(page):
    names = set(field_names(Recipe))
    names |= {name.rsplit(".", n)[0] for name in names for n in (1, 2)}
    for span in spans(read(page)):
        key = re.match(r"([a-z_]+)\.[a-z_.]*[a-z]", span)
        file = re.search(r"\.(json|yaml|safetensors)$", span)
        if key and key[1] in Recipe.model_fields and not file:
            assert key[0] in names, span


@every_page
def test_python_examples_use_public_names(page):
    text = read(page)
    python = [code for language, code in blocks(text) if language == "python"]
    for code in python:
        ast.parse(code)
    for code in [*python, *(span for span in spans(text) if "(" in span)]:
        assert set(re.findall(r"\bar2diff\.(\w+)\(", code)) <= set(ar2diff.__all__)


def test_every_noise_and_its_parameters_are_in_the_guide():
    named = set(spans(read(GUIDES / "noises.md")))
    for kind in noises.KINDS:
        assert {kind.kind, *kind().to_dict()} - {"kind", "form", "logits"} <= named


def test_every_recipe_is_in_the_guide():
    named = set(spans(read(ROOT / "docs/guides/recipes.md")))
    assert set(recipe_names()) <= named


def test_every_command_is_in_the_readme():
    assert set(command_line().commands) <= set(re.findall(r"[\w-]+", read(README)))


def test_every_command_of_a_chat_is_in_its_guide():
    named = re.findall(r"[` ]/(\w+)", read(ROOT / "docs/guides/chat.md"))
    assert set(named) == set(COMMANDS)


def test_every_public_name_is_in_the_reference(made):
    page = made[ROOT / "docs/reference/api.md"]
    shown = set(re.findall(r"heading: ar2diff\.(\w+)", page))
    assert shown == set(ar2diff._HOMES)


def test_every_recipe_key_and_command_is_in_the_references(made):
    keys, commands = (made[ROOT / "docs/reference" / f] for f in ("recipe.md", "cli.md"))
    assert set(field_names(Recipe)) <= set(spans(keys))
    assert {f"ar2diff {name}" for name in command_line().commands} <= set(
        re.findall(r"^## `(.*)`$", commands, re.M)
    )


def test_the_pictures_are_drawn_from_the_masks_of_today():
    pictures = script("pictures")
    drawn = {f"{name}.svg": pictures.svg(picture) for name, picture in pictures.pictures().items()}
    assert {file.name: read(file) for file in pictures.IMAGES.glob("*.svg")} == drawn


class Loaded(HTMLParser):
    """Collects what a browser loads for a page, beside the page itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag != "a":
            self.found += [values[n] for n in ("src", "href", "srcset", "data") if values.get(n)]
        self.found += ["https://mermaid"] if "mermaid" in (values.get("class") or "") else []


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's banner
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(read(page))
        assert not [f for f in loaded.found if re.match(r"(https?:)?//", f)], page
    for file in [*tmp_path.rglob("*.css"), *tmp_path.rglob("*.svg")]:
        assert not re.search(r"(@import|url\(|href=)\s*[\"']?(https?:)?//", read(file)), file
