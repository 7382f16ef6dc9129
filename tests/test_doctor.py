"""What `doctor` knows of the libraries: which versions work, which were tested."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from ar2diff import doctor
from ar2diff.doctor import NEWEST, Package, find_packages

ROOT = Path(__file__).resolve().parents[1]


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {name.lower(): version for name, version in pinned.items()}
    assert {name: pinned[name.lower()] for name in NEWEST} == NEWEST


def test_every_dependency_is_known_with_the_range_that_the_project_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [re.match(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"]]
    found = find_packages()
    assert {n: {*r.split(",")} for n, r in required} == {
        name: {*p.requires.split(",")} for name, p in found.items() if p.extra is None
    }
    assert found["bitsandbytes"].extra and found["transformers"].requires.startswith(">=")


@pytest.mark.parametrize(
    "version, state",
    [
        ("2.9", "tested"),
        ("2.13.0+cpu", "tested"),
        ("2.13.1", "newer"),
        ("2.14.0.dev20261101+cu130", "newer"),
        ("2.8.1", "unsupported"),
        (None, "not installed"),
    ],
)
def test_a_version_is_tested_newer_or_unsupported(version, state):
    assert Package(version, ">=2.9", "2.13.0", None).state == state


def test_doctor_says_which_versions_lie_outside_of_the_tested_range(run_both, monkeypatch):
    installed = {"torch": "2.99", "transformers": "6.0", "trl": None}

    def version(name: str) -> str:
        if (found := installed.get(name, NEWEST[name])) is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(doctor, "version", version)
    code, out, _ = run_both("doctor")
    assert code == 0
    assert "torch: 2.99, newer than tested (>=2.9, tested up to 2.13.0)\n" in out
    assert "transformers: 6.0, NOT SUPPORTED (>=5.20,<6, tested up to 5.23.0)\n" in out
    assert "peft: 0.21.2, ok (>=0.20, tested up to 0.21.2)\n" in out
    assert "transformers is 6.0, but ar2diff needs >=5.20,<6" in out
    assert "trl is not installed, but ar2diff needs ==1.16.*" in out
    assert "newer than any version that was tested: torch 2.99" in out


def test_doctor_says_that_an_updated_clone_has_to_be_installed_again(run_both, monkeypatch):
    before = [line for line in requires("ar2diff") if not line.startswith("llguidance")]
    monkeypatch.setattr(doctor, "requires", lambda name: before)
    code, out, _ = run_both("doctor")
    assert code == 0
    assert "llguidance:" not in out and "outlines-core: " in out
    assert "uses llguidance since then; install it again" in out
