"""The layout: a file imports from its own folder and from folders to its left, no other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "core", "diffusion", "config", "distributed", "data", "demo", "checkpoint", "rewards",
    "conversion", "generation", "evaluation", "reports", "training", "hub", "api", "serving", "cli",
)  # fmt: skip
FLAT = {"__init__.py", "__main__.py", "doctor.py", "lm_eval.py"}  # what lies beside the folders
SOURCES = [*(ROOT / "ar2diff").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]


def folder_of(module: str) -> str | None:
    """`data` of `ar2diff.data.turns`; None of what is not in a folder of ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ar2diff" and parts[1:2] and parts[1] in ORDER else None


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "ar2diff" else ("ar2diff", *parts))


def imported(file: Path) -> set[str]:
    """Modules that a file imports anywhere, in functions too."""
    found: set[str] = set()
    package = module_of(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from ..core import spec` names a module, `from .spec import Spec` does not
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {module}
    return found


MODULES = {module_of(file).removesuffix(".__init__") for file in SOURCES}


def test_every_module_lies_in_the_folder_of_its_noun():
    flat = {file.name for file in (ROOT / "ar2diff").glob("*.py")}
    assert flat == FLAT
    assert {p.parent.name for p in (ROOT / "ar2diff").glob("*/__init__.py")} == set(ORDER) - {"cli"}


def test_imports_go_one_way():
    against = []
    for file in SOURCES:
        if file.name == "__main__.py":  # an entry point starts what lies to its right
            continue
        here = folder_of(module_of(file))
        for module in imported(file):
            there = folder_of(module)
            if here and there and ORDER.index(there) > ORDER.index(here):
                against.append(f"{module_of(file)} imports {module}")
    assert not against, f"{'; '.join(sorted(against))}: the order is {' < '.join(ORDER)}"


def test_no_modules_import_each_other_in_a_circle():
    edges = {module_of(f): imported(f) & MODULES for f in SOURCES if f.name != "__init__.py"}
    left = dict(edges)
    while free := [m for m, uses in left.items() if not (uses - {m}) & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle within {sorted(left)}"


def test_core_imports_nothing_that_does_not_travel_with_a_checkpoint():
    allowed = {"torch", "transformers", "numpy", "safetensors", *sys.stdlib_module_names}
    for file in (ROOT / "ar2diff" / "core").glob("*.py"):
        for module in imported(file):
            assert folder_of(module) == "core" or module.split(".")[0] in allowed, (file, module)
