"""`import ar2diff`: what it offers, what importing it costs, and that the commands call it."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ar2diff

ROOT = Path(__file__).resolve().parents[1]
# verb -> the public function that it calls
VERBS = {
    "adapt": "adapt", "sft": "sft", "rl": "rl", "draft": "draft",
    "generate": "load", "chat": "load",
    "eval": "evaluate", "check": "check", "merge": "merge", "push": "push", "export": "export",
    "import": "import_checkpoint", "report": "report", "compare": "compare",
    "serve": "serve",
}  # fmt: skip
TRAINING = ("adapt", "sft", "rl", "draft")
# They print; there is nothing to call in Python.
LOCAL = {"card", "recipes", "config", "doctor", "memory", "runs", "plot"}


def test_dir_is_all_and_every_name_is_there():
    assert dir(ar2diff) == ar2diff.__all__
    for name in ar2diff.__all__:
        value = getattr(ar2diff, name)
        assert not inspect.ismodule(value), name
        assert name.startswith("__") or (value.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ar2diff.nothing


def test_no_submodule_bears_the_name_of_a_public_function():
    modules = {module.name for module in pkgutil.iter_modules(ar2diff.__path__)} | {
        "cli",
        "recipes",
    }
    assert not modules & set(ar2diff.__all__)


def test_the_docstring_names_each_public_function_in_a_line():
    lines = ar2diff.__doc__.splitlines()
    assert len(lines) <= 40
    for name in set(ar2diff.__all__) - {"__version__"}:
        assert any(name in line for line in lines), name


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, ar2diff; ar2diff.Ar2DiffError, ar2diff.Spec, dir(ar2diff);"
        "assert not {'torch', 'transformers', 'pydantic', 'typer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def commands() -> dict[str, Path]:
    """Every command -> the file that defines it; groups of commands have none."""
    from ar2diff.cli.main import app

    return {
        command.name: Path(sys.modules[command.callback.__module__].__file__)
        for command in app.registered_commands
    }


def imported_from(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every name that a file of the command line imports from ar2diff."""
    return {
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 2
        for alias in node.names
    }


def test_every_command_has_its_public_function():
    assert set(commands()) | {"recipes", "config"} == set(VERBS) | LOCAL
    assert set(VERBS.values()) <= set(ar2diff.__all__)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in TRAINING])
def test_a_command_calls_its_public_function(verb):
    assert ("", VERBS[verb]) in imported_from(commands()[verb])


@pytest.mark.parametrize("verb", TRAINING)
def test_a_training_command_calls_its_public_function(verb, monkeypatch, capsys):
    """They share a file, so it is the call that is watched."""
    calls = []

    def stand_in(*args, **options):
        calls.append(args)
        raise ar2diff.Ar2DiffError("called", "nothing to fix")

    monkeypatch.setattr(ar2diff, verb, stand_in)
    monkeypatch.setattr(sys, "argv", ["ar2diff", verb, "model", "--data", "rows.jsonl"])
    from ar2diff.cli.main import main

    with pytest.raises(SystemExit):
        main()
    assert calls and calls[0][0] == "model"


def test_no_command_imports_a_public_function_from_where_it_is_defined():
    homes = {(home, name) for name, home in ar2diff._HOMES.items() if name in VERBS.values()}
    for file in (ROOT / "cli").glob("*.py"):
        assert not imported_from(file) & homes, file.name


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """All cells of docs/demo.ipynb in their order, with a shorter training."""
    cells = json.loads((ROOT / "docs" / "demo.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
        if "parameters" in cell["metadata"].get("tags", ()):
            scope |= {"STEPS": 4, "STORIES": 64}
    assert scope["filled"].text.endswith(" with Ben.")
    assert "tokens per forward" in capsys.readouterr().out
