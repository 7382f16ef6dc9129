"""Decoding on a pretended accelerator: the CPU's tokens, no mixing of devices, and the host waits
at most once a forward.

`fakedev` raises on operations that mix devices, as CUDA does, and counts what makes the host wait.
It cannot see pinned memory, streams, nor the numerics of a GPU's kernels, nor the back ends of
attention that exist on CUDA alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakedev import build

HERE = Path(__file__).parent
SIX = [
    "ar", "speculative compiled", "draft adapter", "threshold", "block_causal compiled", "full",
]  # fmt: skip


def run(*arguments):
    """The lines of JSON that a module of `fakedev` prints, in a process of its own."""
    if why := build.missing():
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def judge(found):
    for line in found:
        assert line.get("error") is None, line
        assert line["same"], line
        assert line["waits"] <= line["forwards"], line
        assert line["uploads"] <= 10 * line["forwards"], line  # mostly 2 to 5; 9 with a head


def test_some_settings_write_the_cpus_tokens_and_wait_once_a_forward():
    joining = ["joining ar sampled", "joining trees", "joining steps"]
    noises = [f"noise {name}" for name in ("embedding", "nearest", "edited", "guided")]
    found = run("fakedev.decoding", *SIX, *joining, *noises)
    assert len(found) == len(SIX) + len(joining) + len(noises)
    judge(found)


@pytest.mark.slow
def test_every_setting_writes_the_cpus_tokens_and_waits_once_a_forward():
    found = run("fakedev.decoding")
    assert len(found) >= 25
    judge(found)


@pytest.mark.slow
def test_every_verb_does_on_a_device_what_it_does_on_a_cpu(tiny_checkpoint, tmp_path):
    found = run("fakedev.verbs", tiny_checkpoint, tmp_path / "work")
    verbs = {line["name"]: line for line in found}
    assert list(verbs) == ["adapt", "sft", "rl", "draft", "eval", "generate"]
    assert all(line["difference"] < 1e-4 for line in found), found
    assert all(line["operations"] > 100 for line in found), found
    assert all(verbs[name]["moved"] > 1e-4 for name in ("adapt", "sft", "rl")), found
