"""Several processes: what is refused before they start; that DDP and ZeRO really cut what they say
and train as one process does; kills, SIGTERM, and errors that are said once."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main
from safetensors.torch import load_file

from ar2diff.launch import Launch, make_launch
from ar2diff.training.sharding import deepspeed_config

HERE = Path(__file__).resolve().parent
STEPS = 10
RECIPE = [
    "convert.block_length=4",
    "data.max_length=32",
    f"train.max_steps={STEPS}",
    "train.learning_rate=0.003",
    "train.logging_steps=1",
    "train.save_steps=2",
]
LORA = ["peft.r=4", "convert.block_length=8", "train.learning_rate=0.02"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def data_file(folder: Path, rows: int = 120) -> Path:
    words = "the cat sat on a mat and saw one big red dog run to his old house".split()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 18))) for _ in range(rows)]
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    return data_file(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="session")
def deepspeed_built():
    """DeepSpeed's communication for CPUs, compiled once; skips where that cannot be done."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'ar2diff[dev]'")
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    for tool in ("ninja", "g++"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not on PATH, and DeepSpeed compiles with it")
    code = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as B; B().load()"
    env = {**ENV, "PATH": path, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


def arguments_of(model: Path, data: Path, output_dir: Path, batch: int, *more: str) -> list[str]:
    batch_size = f"train.per_device_train_batch_size={batch}"
    named = [str(model), "--data", str(data), "--output-dir", str(output_dir)]
    return ["adapt", *named, *RECIPE, batch_size, *more]


def launched(folder: Path, *arguments: str) -> list[str]:
    """A command whose processes leave notes in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [sys.executable, str(HERE / "launched.py"), str(folder), *arguments]


@pytest.fixture(scope="session")
def train_in_two(request, tiny_checkpoint, convert_tiny, stories, tmp_path_factory):
    """Factory: train_in_two("zero2") is (folder, notes of each process) of a run in two processes;
    "one" of a run in one. Made once."""

    @functools.cache
    def train(strategy: str, adapted: bool = False) -> tuple[Path, list[dict]]:
        if strategy.startswith("zero"):
            request.getfixturevalue("deepspeed_built")
        folder = tmp_path_factory.mktemp(strategy)
        model = convert_tiny() if adapted else tiny_checkpoint
        more, batch = (LORA if adapted else []), 8 if strategy == "one" else 4
        launch = ["ddp", "1"] if strategy == "one" else [strategy, "2"]
        arguments = arguments_of(model, stories, folder / "out", batch, *more)
        command = launched(
            folder, *arguments, "--launch", launch[0], "--num-processes", launch[1], "--json"
        )
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == STEPS  # nothing else is on stdout
        return folder / "out", [json.loads(p.read_text()) for p in sorted(folder.glob("rank-*"))]

    return train


def apart(a: Path, b: Path, name: str = "model.safetensors") -> float:
    """Largest difference of two folders' weights, in parts of the tensor's largest."""
    one, other = load_file(a / name), load_file(b / name)
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).abs().max() / one[n].abs().max()).item() for n in one)


PARAMETERS = 35232  # of the tiny checkpoint with its mask row
NORMS = 5 * 32  # so few elements that ZeRO-3 keeps them whole beside the shards
HELD = {  # by a process, of PARAMETERS: weights, gradients, masters, moments
    "ddp": (1, 1, 0, 2),
    "zero1": (1, 1 / 2, 1 / 2, 1),
    "zero2": (1, 1 / 2, 1 / 2, 1),
    "zero3": (1 / 2, 1 / 2, 1 / 2, 1),
}


@pytest.mark.parametrize("strategy", HELD)
def test_two_processes_cut_what_they_say_and_train_as_one(train_in_two, strategy):
    folder, notes = train_in_two(strategy)
    alone, (one,) = train_in_two("one")
    assert len(notes) == 2
    for note in notes:
        assert note["processes"] == 2
        zero = strategy.startswith("zero")
        assert note["engine"] == ("DeepSpeedEngine" if zero else "DistributedDataParallel")
        held = [note[name] for name in ("parameters", "gradients", "masters", "moments")]
        assert held == [part * PARAMETERS for part in HELD[strategy]]
        assert note["whole"] == (NORMS if strategy == "zero3" else PARAMETERS)
        assert len(note["losses"]) == STEPS
        assert note["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert apart(folder, alone) < 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((alone / "config.json").read_text())


def test_lora_trains_on_zero3_as_in_one_process(train_in_two):
    folder, notes = train_in_two("zero3", adapted=True)
    alone, (one,) = train_in_two("one", adapted=True)
    assert [note["processes"] for note in notes] == [2, 2]
    for note in notes:
        assert note["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert note["moments"] == pytest.approx(one["moments"] / 2, rel=0.01)  # with padding
        assert note["parameters"] < 0.55 * one["parameters"]
    assert note["losses"][-1] < note["losses"][0]
    assert apart(folder, alone, "adapter_model.safetensors") < 1e-3


def processes_under(pid: int) -> list[int]:
    """The processes that a launcher started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def await_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stderr:
        if (said := re.match(r"step (\d+)/", line)) and int(said[1]) >= step:
            return
    raise AssertionError("the run ended before it was to be killed")


def started(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENV, text=True, start_new_session=True, **pipes)


def gone(pids: list[int]) -> None:
    """Wait until processes are no more; they are no children of ours."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        pass


def kill_and_resume(command: list[str], run: Path, whole: Path, seed: int) -> None:
    """SIGKILL the launcher or one of its two processes after a random step; a resumed run ends with
    the bits of one that was left alone."""
    rng = random.Random(seed)
    step, victim = rng.randint(1, STEPS - 1), rng.choice(["the launcher", "process 0", "process 1"])
    print(f"kill seed {seed}: SIGKILL to {victim} after step {step}")
    process = started(command)
    await_step(process, step)
    children = processes_under(process.pid)
    assert len(children) == 2
    pids = {"the launcher": process.pid, "process 0": children[0], "process 1": children[1]}
    os.kill(pids[victim], signal.SIGKILL)
    said = process.communicate()[1]
    gone(children)
    if victim == "the launcher":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 2
        assert re.search(r"^error: process \d was killed \(SIGKILL\)\n  fix: .*\n\Z", said, re.M)
    for saved in (run / "checkpoints").glob("checkpoint-*"):
        assert load_file(saved / "model.safetensors")
        assert (saved / "trainer_state.json").is_file()
    subprocess.run([*command, "--resume"], check=True, env=ENV, capture_output=True)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
class TestKilled:
    def command(self, strategy, model, data, folder):
        arguments = arguments_of(model, data, folder / "out", 4)
        return launched(folder, *arguments, "--launch", strategy, "--num-processes", "2")

    def test_a_killed_run_resumes_to_the_same_bits(
        self, train_in_two, tiny_checkpoint, stories, tmp_path
    ):
        whole, _ = train_in_two("zero2")
        command = self.command("zero2", tiny_checkpoint, stories, tmp_path)
        kill_and_resume(command, tmp_path / "out", whole, seed=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
    def test_twenty_kills_resume_to_the_same_bits(
        self, train_in_two, tiny_checkpoint, stories, tmp_path, strategy, seed
    ):
        whole, _ = train_in_two(strategy)
        command = self.command(strategy, tiny_checkpoint, stories, tmp_path)
        kill_and_resume(command, tmp_path / "out", whole, seed=seed)

    def test_sigterm_saves_and_exits(self, tiny_checkpoint, stories, tmp_path):
        command = self.command("ddp", tiny_checkpoint, stories, tmp_path)
        process = started([*command, "train.max_steps=2000", "train.save_steps=2000"])
        await_step(process, 3)
        process.terminate()
        said = process.communicate()[1]
        assert process.returncode == 128 + signal.SIGTERM
        stopped = re.findall(r"^stopped by SIGTERM after step (\d+), which is saved", said, re.M)
        assert len(stopped) == 1
        assert "Traceback" not in said
        saved = tmp_path / "out" / "checkpoints" / f"checkpoint-{stopped[0]}"
        assert load_file(saved / "model.safetensors")
        assert not (tmp_path / "out" / "config.json").exists()


def test_sigterm_saves_and_exits_in_one_process(tiny_checkpoint, stories, tmp_path, monkeypatch):
    from ar2diff.config import load_recipe, with_values
    from ar2diff.training.adapt import adapt
    from ar2diff.training.trainer import AdaptTrainer

    recipe = load_recipe(None, [*RECIPE, "train.save_steps=100"])
    recipe = with_values(recipe, data={"sources": [str(stories)]})
    adapt(str(tiny_checkpoint), recipe, tmp_path / "whole")
    step = AdaptTrainer.training_step

    def terminated_in_step_3(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", terminated_in_step_3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == before
    assert [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == ["checkpoint-3"]
    monkeypatch.undo()
    adapt(str(tiny_checkpoint), recipe, tmp_path / "stopped", resume=True)
    assert apart(tmp_path / "whole", tmp_path / "stopped") == 0


def test_an_error_of_two_processes_is_said_once(tiny_checkpoint, stories, tmp_path):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:9000])
    arguments = arguments_of(model, stories, tmp_path / "out", 4)
    command = launched(tmp_path, *arguments, "--launch", "ddp", "--num-processes", "2")
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* is cut short or damaged\n  fix: .*\n", done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_resume_with_another_sharding_is_refused(train_in_two, tiny_checkpoint, stories, tmp_path):
    from ar2diff.config import load_recipe, with_values
    from ar2diff.errors import Ar2DiffError
    from ar2diff.training.adapt import adapt

    folder, _ = train_in_two("zero2")
    batch = "train.per_device_train_batch_size=4"
    recipe = load_recipe(None, [*RECIPE, batch, "train.gradient_accumulation_steps=2"])
    recipe = with_values(recipe, data={"sources": [str(stories)]})
    shutil.copytree(folder, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "ar2diff.json").read_text())
    record["recipe"] = recipe.model_dump(mode="json")
    (tmp_path / "out" / "ar2diff.json").write_text(json.dumps(record))
    with pytest.raises(Ar2DiffError, match="another sharding: zero2 x 2, now None"):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "out", resume=True)


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, tiny_checkpoint, stories):
    """Run `adapt` with launch options: it must exit with 2, print two lines and start nothing."""

    def never(*args):
        raise AssertionError("a process was started")

    def run(*arguments: object, data: Path = stories) -> str:
        monkeypatch.setattr(Launch, "_start", never)
        line = arguments_of(tiny_checkpoint, data, tmp_path / "out", 4, *map(str, arguments))
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
    assert f"{name}: no such file" in refused("--launch", tmp_path / name)


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("a.json", "{", "no DeepSpeed config"),
        ("a.json", "{}", "no 'zero_optimization'"),
        ("a.json", '{"zero_optimization": {"stage": 7}}', "stage is 7"),
        ("a.yaml", "a: [", "no accelerate config"),
        ("a.yaml", "num_processes: 2", "no 'distributed_type'"),
        ("a.yaml", "{distributed_type: MULTI_CPU, num_processes: 2}", "as one process"),
        ("a.yaml", "{distributed_type: MULTI_GPU, num_processes: 2, use_cpu: true}", "as one"),
    ],
)
def test_launch_file_that_would_not_do_it(refused, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    assert says in refused("--launch", tmp_path / name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_fsdp2_on_cpus_would_be_plain_ddp(refused, tmp_path):
    assert "plain DDP in its name" in refused("--launch", "fsdp2", "--num-processes", 2)
    (tmp_path / "a.yaml").write_text("{distributed_type: FSDP, num_processes: 2}")
    assert "plain DDP in its name" in refused("--launch", tmp_path / "a.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("tool", ["ninja", "g++"])
def test_zero_without_its_compiler(refused, monkeypatch, tool):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == tool else name)
    said = refused("--launch", "zero2", "--num-processes", 2)
    assert f"DeepSpeed compiles for CPUs, and {tool} is not on PATH" in said


def test_zero_without_deepspeed(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused("--launch", "zero2", "--num-processes", 2)
    assert "deepspeed is not installed\n  fix: pip install 'ar2diff[deepspeed]'" in said


def test_more_processes_than_rows(refused, tmp_path):
    data = data_file(tmp_path, rows=3)
    said = refused("--launch", "ddp", "--num-processes", 4, data=data)
    assert "4 processes, and the data has 3 rows" in said


def test_processes_and_flags_without_a_launch(refused):
    assert "--num-processes goes with --launch" in refused("--num-processes", 2)
    assert "-- --nnodes 2 goes with --launch" in refused("--", "--nnodes", 2)


def test_number_of_processes(refused):
    assert "at least one" in refused("--launch", "ddp", "--num-processes", 0)
    if not torch.cuda.is_available():
        assert "how many processes?" in refused("--launch", "ddp")


def test_a_recipe_error_starts_nothing(refused):
    assert "unknown key" in refused("train.nonsense=1", "--launch", "ddp", "--num-processes", 2)


def test_a_flag_that_the_launcher_does_not_know(monkeypatch, capsys, stories, tiny_checkpoint):
    line = arguments_of(tiny_checkpoint, stories, Path("/nowhere/out"), 4, "--launch", "ddp")
    monkeypatch.setattr("sys.argv", ["ar2diff", *line, "--num-processes", "2", "--", "--nonsense"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "flags of the launcher: unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_dry_run_shows_what_would_be_started(
    monkeypatch, capsys, stories, tiny_checkpoint, tmp_path
):
    line = arguments_of(tiny_checkpoint, stories, tmp_path / "out", 4)
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_on_loopback_train_as_two_processes(
    train_in_two, tiny_checkpoint, stories, tmp_path
):
    whole, _ = train_in_two("zero2")
    arguments = arguments_of(tiny_checkpoint, stories, tmp_path / "out", 4)
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    options = ["--launch", "zero2", "--num-processes", "1", "--", *flags]
    nodes = [started(launched(tmp_path / "notes", *arguments, *options)) for _ in range(2)]
    said = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    notes = [json.loads(p.read_text()) for p in sorted((tmp_path / "notes").glob("rank-*"))]
    assert [note["processes"] for note in notes] == [2, 2]
    assert {note["moments"] for note in notes} == {PARAMETERS}
    assert apart(tmp_path / "out", whole) == 0


@pytest.mark.slow
def test_an_accelerate_file_runs_its_processes(train_in_two, tiny_checkpoint, stories, tmp_path):
    (tmp_path / "a.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 2}")
    arguments = arguments_of(tiny_checkpoint, stories, tmp_path / "out", 4)
    command = launched(tmp_path, *arguments, "--launch", str(tmp_path / "a.yaml"))
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    notes = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("rank-*"))]
    assert [note["processes"] for note in notes] == [2, 2]
    assert apart(tmp_path / "out", train_in_two("ddp")[0]) == 0


@pytest.mark.slow
def test_a_deepspeed_file_offloads(train_in_two, tiny_checkpoint, stories, tmp_path):
    config = deepspeed_config(2)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "ds.json").write_text(json.dumps(config))
    arguments = arguments_of(tiny_checkpoint, stories, tmp_path / "out", 4)
    options = ["--launch", str(tmp_path / "ds.json"), "--num-processes", "2"]
    subprocess.run(
        launched(tmp_path, *arguments, *options), check=True, env=ENV, capture_output=True
    )
    assert apart(tmp_path / "out", train_in_two("one")[0]) < 1e-4
