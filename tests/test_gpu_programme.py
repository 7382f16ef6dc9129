"""The programme of `make gpu`: what is written when, and what is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakedev import build

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_noises

MACHINE = gpu.Machine("cpu", small=True, peak=0.0)


class Clock:
    """A clock that only parts move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(clock):
    def run(limit=540.0, **parts):
        written = []
        whole = gpu.programme(parts, MACHINE, written.append, clock, limit)
        return whole, written

    return run


def part_of(clock, *seconds):
    """A part that takes so many seconds for each of its rows."""

    def part(_machine):
        for number, taken in enumerate(seconds):
            clock.now += taken
            yield {"row": number}

    return part


def test_every_row_is_written_with_the_time_at_which_it_was_known(run, clock):
    whole, written = run(first=part_of(clock, 2, 3), second=part_of(clock, 4))
    assert whole
    assert written == [
        {"part": "first", "row": 0, "at_seconds": 2.0},
        {"part": "first", "row": 1, "at_seconds": 5.0},
        {"part": "first", "seconds": 5.0},
        {"part": "second", "row": 0, "at_seconds": 9.0},
        {"part": "second", "seconds": 4.0},
    ]


def test_what_does_not_fit_into_nine_minutes_is_left_out_by_name(run, clock):
    whole, written = run(
        first=part_of(clock, 300, 250, 100), second=part_of(clock, 1), third=part_of(clock, 1)
    )
    assert whole and clock.now == 550  # the row at 650 was not begun
    left = {row["part"]: row["left_out"] for row in written if "left_out" in row}
    assert left == {
        "first": "its rest: 540 seconds are spent",
        "second": "540 seconds are spent",
        "third": "540 seconds are spent",
    }


def test_a_part_that_fails_is_a_row_and_the_others_go_on(run, clock):
    def broken(_machine):
        yield {"row": 0}
        raise RuntimeError("no kernel")

    whole, written = run(broken=broken, after=part_of(clock, 1))
    assert not whole
    assert [row["part"] for row in written] == ["broken", "broken", "after", "after"]
    assert written[1]["error"] == "RuntimeError: no kernel"


@pytest.mark.slow
def test_the_whole_programme_runs_in_small_on_a_pretended_gpu(tmp_path):
    if why := build.missing():
        pytest.skip(why)
    script, rows = Path(gpu.__file__), tmp_path / "gpu.jsonl"
    command = [sys.executable, script, "--device", "fakedev", "--small", "--output", rows]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert done.returncode == 0, [row for row in found if "error" in row]
    texts = [row for row in found if row["part"] == "tokens" and "different" in row]
    assert len(texts) == 14 and all(row["different"] == 0 for row in texts)
    assert {row["verb"] for row in found if "verb" in row} == {"adapt", "sft", "rl", "generate"}
    noises = [row for row in found if "noise" in row]
    assert {row["noise"] for row in noises} == {*gpu_noises.TRIED}
    assert all(row.get("different", 0) == 0 for row in noises)
    trained = [row for row in noises if row.get("verb") in ("adapt", "sft")]
    assert all(row["difference"] < 1e-2 and row.get("same_fit", True) for row in trained)
