"""`import ar2diff`: what it offers, what that costs, and that the command line calls nothing else."""

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
    "adapt": "adapt", "sft": "sft", "rl": "rl", "generate": "load", "chat": "load",
    "eval": "evaluate", "check": "check", "merge": "merge", "push": "push", "export": "export",
    "import": "import_checkpoint",
}  # fmt: skip
LOCAL = {"card", "recipes", "config", "doctor", "memory"}  # they print; nothing to call in Python


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


def verbs_of_the_command_line() -> dict[str, ast.Module]:
    """Every verb -> the tree of the file of its command."""
    import typer
    from ar2diff.cli.main import app

    commands = typer.main.get_command(app).commands
    return {
        name: ast.parse(Path(inspect.getsourcefile(command.callback)).read_text())
        for name, command in commands.items()
        if command.callback is not None
    }


def test_every_verb_has_a_public_function():
    import typer
    from ar2diff.cli.main import app

    assert set(typer.main.get_command(app).commands) == set(VERBS) | LOCAL
    assert set(VERBS.values()) <= set(ar2diff.__all__)


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
