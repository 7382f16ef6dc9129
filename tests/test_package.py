"""The package: wheel, sdist and editable installs hold every module, and nothing else on top."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TYPES = ".py .yaml .safetensors .typed .json .jsonl .jinja .html .svg .css .js .png".split()
TOP = ("ar2diff", "cli", "recipes")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Names in the wheel and in the sdist, built from what git tracks, and the wheel's size."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    file = next(folder.glob("*.whl"))
    wheel = zipfile.ZipFile(file).namelist()
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        sdist = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    return wheel, sdist, file.stat().st_size


def test_wheel_is_small(built):
    assert built[2] <= 10_000_000  # with the embedded model and its draft adapter


def test_wheel_holds_every_module_and_data_file(built):
    wheel, *_ = built
    wanted = [
        p.relative_to(ROOT) for top in TOP for p in (ROOT / top).rglob("*") if p.suffix in TYPES
    ]
    names = [str(p) if p.parts[0] == "ar2diff" else f"ar2diff/{p}" for p in wanted]
    assert not set(names) - set(wheel)
    assert "ar2diff/py.typed" in wheel


def test_wheel_has_one_top_level_package(built):
    wheel, *_ = built
    assert {n.split("/")[0] for n in wheel if ".dist-info" not in n} == {"ar2diff"}


def test_sdist_holds_what_it_takes_to_test(built):
    _, sdist, _ = built
    assert {"pyproject.toml", "cli/main.py", "recipes/demo.yaml", "tests/test_package.py"} <= set(
        sdist
    )


def test_cli_is_no_package_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import ar2diff.cli, ar2diff.recipes; import cli"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "No module named 'cli'" in done.stderr


def test_version_is_said_once():
    import tomllib

    import ar2diff

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ar2diff.__version__
