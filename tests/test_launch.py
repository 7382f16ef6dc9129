"""What is refused before any process is started, and how the processes would be started. Runs in
several processes: `test_processes.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main

from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.distributed.builds import STALE, check_locks
from ar2diff.distributed.launch import Launch, make_launch, strategy_of
from ar2diff.distributed.sharding import deepspeed_config

STEPS, PARAMETERS = 10, 35232  # of the tiny checkpoint with its mask row


def data_file(folder: Path, rows: int = 60) -> Path:
    file = folder / "stories.jsonl"
    file.write_text('{"text": "the cat sat on a mat"}\n' * rows)
    return file


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    return data_file(tmp_path_factory.mktemp("launch"))


def arguments_of(model: Path, data: Path, output_dir: Path, *more: str) -> list[str]:
    settings = ["data.max_length=32", f"train.max_steps={STEPS}"]
    settings += ["convert.block_length=4", "train.per_device_train_batch_size=4"]
    named = [str(model), "--data", str(data), "--output-dir", str(output_dir)]
    return ["adapt", *named, *settings, *more]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, tiny_checkpoint, stories):
    """Run `adapt` with launch options: it must exit with 2, print two lines and start nothing."""

    def never(*args):
        raise AssertionError("a process was started")

    def run(*arguments: object, data: Path = stories) -> str:
        monkeypatch.setattr(Launch, "_start", never)
        line = arguments_of(tiny_checkpoint, data, tmp_path / "out", *map(str, arguments))
        monkeypatch.setattr("sys.argv", ["ar2diff", *line])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        assert re.fullmatch(r"error: .+\n  fix: .+\n", captured.err), captured.err
        assert not (tmp_path / "out").exists()
        return captured.err

    return run


def test_unknown_strategy(refused):
    assert "did you mean zero3?" in refused("--launch", "zero4")


@pytest.mark.parametrize("name", ["no.yaml", "no.json"])
def test_launch_file_that_does_not_exist(refused, tmp_path, name):
    assert f"{name} does not exist" in refused("--launch", tmp_path / name)


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("a.json", "{", "a.json is not a DeepSpeed config"),
        ("a.json", "{}", "it has no 'zero_optimization'"),
        ("a.json", '{"zero_optimization": {"stage": 7}}', "stage is 7"),
        ("a.yaml", "a: [", "a.yaml is not an accelerate config"),
        ("a.yaml", "num_processes: 2", "it has no 'distributed_type'"),
        ("a.yaml", "{distributed_type: MULTI_CPU, num_processes: 2}", "a single process"),
        ("a.yaml", "{distributed_type: MULTI_GPU, num_processes: 2, use_cpu: true}", "a single"),
    ],
)
def test_launch_file_that_would_not_do_it(refused, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    assert says in refused("--launch", tmp_path / name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_fsdp2_on_cpus_would_be_plain_ddp(refused, tmp_path):
    assert "plain DDP instead" in refused("--launch", "fsdp2", "--num-processes", 2)
    (tmp_path / "a.yaml").write_text("{distributed_type: FSDP, num_processes: 2}")
    assert "plain DDP instead" in refused("--launch", tmp_path / "a.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("tool", ["ninja", "g++"])
def test_zero_without_its_compiler(refused, monkeypatch, tool):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == tool else name)
    said = refused("--launch", "zero2", "--num-processes", 2)
    assert f"on CPUs needs {tool} to compile" in said


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Of a build that nobody makes any more."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir()
    file.touch()
    os.utime(file, (0, time.time() - STALE - 1))
    return file


@pytest.mark.parametrize("default", [False, True])
def test_the_lock_of_a_killed_build(refused, monkeypatch, lock, default):
    if default:  # where torch builds if it is not told where
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        build_root = lambda: str(lock.parents[1])  # noqa: E731
        monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", build_root)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name, path: name)
    said = refused("--launch", "zero2", "--num-processes", 2)
    assert f"{lock} was left behind by a DeepSpeed build that was killed" in said
    assert "fix: remove it with: rm" in said
    assert lock.exists()


def test_a_lock_that_a_build_holds_is_none_of_our_business(lock):
    with lock.open():
        check_locks()
    with pytest.raises(Ar2DiffError, match="was killed"):
        check_locks()


def test_a_young_lock_may_be_another_nodes_and_is_waited_for(lock, monkeypatch, capsys):
    lock.touch()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            lock.unlink()

    monkeypatch.setattr("time.sleep", sleep)
    check_locks()
    assert len(waited) == 3
    assert capsys.readouterr().err.count("waiting up to 300 s") == 1


def test_locks_of_other_extensions_do_not_matter(lock):
    lock.rename(lock.parent.parent / "lock")
    check_locks()


def test_zero_without_deepspeed(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused("--launch", "zero2", "--num-processes", 2)
    assert "deepspeed, which is not installed\n  fix: pip install 'ar2diff[deepspeed]'" in said


def test_more_processes_than_rows(refused, tmp_path):
    data = data_file(tmp_path, rows=3)
    said = refused("--launch", "ddp", "--num-processes", 4, data=data)
    assert "4 processes, but the data has only 3 rows" in said


def test_processes_and_flags_without_a_launch(refused):
    assert "--num-processes needs --launch" in refused("--num-processes", 2)
    assert "-- --nnodes 2 needs --launch" in refused("--", "--nnodes", 2)


def test_number_of_processes(refused):
    assert "is less than 1" in refused("--launch", "ddp", "--num-processes", 0)
    if not torch.cuda.is_available():
        assert "needs a number of processes" in refused("--launch", "ddp")


def test_a_recipe_error_starts_nothing(refused):
    assert "is not a key" in refused("train.nonsense=1", "--launch", "ddp", "--num-processes", 2)


def test_a_flag_that_the_launcher_does_not_know(monkeypatch, capsys, stories, tiny_checkpoint):
    line = arguments_of(tiny_checkpoint, stories, Path("/nowhere/out"), "--launch", "ddp")
    monkeypatch.setattr("sys.argv", ["ar2diff", *line, "--num-processes", "2", "--", "--nonsense"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert (
        "does not accept the flags after --: unrecognized arguments: --nonsense"
        in capsys.readouterr().err
    )


def test_dry_run_shows_what_would_be_started(
    monkeypatch, capsys, stories, tiny_checkpoint, tmp_path
):
    line = arguments_of(tiny_checkpoint, stories, tmp_path / "out")
    options = ["--launch=ddp", "--num-processes", "2", "--dry-run", "--json", "--", "--nnodes", "1"]
    monkeypatch.setattr("sys.argv", ["ar2diff", *line, *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    plan = json.loads(capsys.readouterr().out)
    launcher = "-m torch.distributed.run --nproc-per-node=2 --nnodes 1 -m ar2diff.cli adapt"
    assert launcher in plan["launch"]
    assert plan["launch"].startswith("AR2DIFF_LAUNCH=ddp ")
    assert plan["launch"].endswith(" --json")
    assert plan["rows_per_step"] == 8
    assert plan["memory"]["weights"] == plan["memory"]["buckets"] == 4 * PARAMETERS
    assert plan["recipe"]["train"]["max_steps"] == STEPS
    assert not (tmp_path / "out").exists()


def test_accelerate_file_names_the_launcher(tmp_path):
    (tmp_path / "a.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 3}")
    launch = make_launch(str(tmp_path / "a.yaml"), None if not torch.cuda.is_available() else 1)
    assert launch.command(["adapt"])[2] == "accelerate.commands.launch"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_transformers_fills_in_what_is_auto(stage, tmp_path):
    pytest.importorskip("deepspeed")
    config = deepspeed_config(stage)
    assert config["zero_optimization"]["stage"] == stage
    whole = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
    assert whole is (True if stage == 3 else None)


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def planned_commands() -> list[list[str]]:
    command = [BENCHMARKS / "multi_gpu.sh", "--dry-run", "MODEL", "DATA", "OUT"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_the_multi_gpu_benchmark_prints_each_command():
    commands = planned_commands()
    launches: dict[str, list[str]] = {}
    for words in commands:
        assert words[0] == "ar2diff"
        if "--launch" in words:
            quantized = "qlora " if "quantization.kind=nf4" in words else ""
            assert ("OUT/converted" == words[2]) == bool(quantized)
            strategy = quantized + Path(words[words.index("--launch") + 1]).name
            launches.setdefault(strategy, []).append(words[words.index("--num-processes") + 1])
    wanted = ["ddp", "zero1", "zero2", "zero3", "fsdp2", "qlora ddp", "qlora zero2"]
    wanted += ["zero2-offload.json", "zero3-offload.json"]
    assert launches == {strategy: ["1", "2", "4", "8"] for strategy in wanted}
    assert [words[1] for words in commands].count("memory") == 4
    assert commands[0][-3:-1] == ["--output-dir", "OUT/converted"]
    script = BENCHMARKS / "multi_gpu.sh"
    assert "Not run" in script.read_text()
    assert subprocess.run([script], capture_output=True).returncode == 2


def test_the_settings_of_the_multi_gpu_benchmark_are_sound():
    for words in planned_commands():
        overrides = [word for word in words if "=" in word]
        recipe = load_recipe(words[words.index("--recipe") + 1], overrides)
        if "--launch" in words:
            count = int(words[words.index("--num-processes") + 1])
            assert recipe.train.gradient_accumulation_steps * count == 16


@pytest.mark.parametrize("stage", [2, 3])
def test_the_benchmarks_offloading_is_ours_otherwise(stage):
    kind, config = strategy_of(str(BENCHMARKS / "deepspeed" / f"zero{stage}-offload.json"))
    assert kind == f"zero{stage}"
    zero = config["zero_optimization"]
    offloaded = [name for name in list(zero) if name.startswith("offload_") and zero.pop(name)]
    assert offloaded == ["offload_optimizer", "offload_param"][: stage - 1]
    assert config == deepspeed_config(stage)


@pytest.mark.parametrize(
    "arguments,code", [(["--version"], 0), (["recipes", "show", "nowhere"], 2)]
)
def test_a_launched_process_leaves_without_taking_python_apart(arguments, code):
    """Its exit handlers run and its exit code stands, but nothing is torn down: threads of gloo's
    that are still at work would abort it."""
    script = f"""
import atexit, sys
from ar2diff.cli import main as cli
class Torn:
    def __del__(self, write=sys.stderr.write):
        write("torn down")
def library(app=cli.app, **options):
    atexit.register(sys.stderr.write, "handled ")
    return app(**options)
torn, cli.app, sys.argv = Torn(), library, ["ar2diff", *{arguments}]
cli.main()
"""

    def run(**told: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)

    launched, alone = run(RANK="1"), run()
    assert (launched.returncode, alone.returncode) == (code, code)
    assert alone.stderr.endswith("handled torn down")
    assert launched.stderr.endswith("handled ")
    assert launched.stdout == alone.stdout
