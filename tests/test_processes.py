"""Runs in several processes: that DDP and ZeRO really cut what they say and train as one process
does, and what a kill, a SIGTERM and an error do. What is refused before: `test_launch.py`."""

from __future__ import annotations

import functools
import importlib
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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from kills import killed_at_step
from safetensors.torch import load_file

from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.core.errors import Ar2DiffError
from ar2diff.distributed.builds import check_locks
from ar2diff.distributed.sharding import deepspeed_config
from ar2diff.training.adapt import adapt

HERE = Path(__file__).resolve().parent
STEPS, ROWS = 10, 8  # rows of an optimizer step, over all processes
RECIPE = [
    "train.precision=fp32",
    "convert.block_length=4",
    "data.max_length=32",
    f"train.max_steps={STEPS}",
    "train.learning_rate=0.003",
    "train.logging_steps=1",
    "train.save_steps=2",
]
LORA = ["peft.r=4", "convert.block_length=8", "train.learning_rate=0.02"]
QLORA = [*LORA, "quantization.kind=nf4"]
RL = [
    "rl.num_generations=4",
    "rl.max_completion_length=8",
    "rl.sampler={temperature: 2.0}",  # the tiny model would say one thing again and again
    "rl.estimator=coupled",
    "train.max_steps=3",
    "train.learning_rate=0.001",
]
ACROSS = [  # groups lie on all processes
    "rl.num_generations=8",
    "rl.num_iterations=2",
    "rl.beta=0.1",
    "train.optimizer=sgd",
    "train.learning_rate=0.01",
]
LONG_RL = [  # five and ten updates end amid the four updates of a generation
    *RL,
    "rl.num_iterations=2",
    "rl.steps_per_generation=2",
    "rl.beta=0.1",
    "train.max_steps=14",
    "train.save_steps=5",
]
DRAFT = [
    "draft.block_length=4",
    "draft.rank=4",
    "draft.head_rank=4",
    "eval.steps=0",
    "train.warmup_steps=0",
]
KINDS = {  # the verb, and its recipe besides RECIPE; all but AR start from a converted model
    "adapt": ("adapt", []),
    "adapt lora": ("adapt", LORA),
    "sft": ("sft", []),
    "sft lora": ("sft", LORA),
    "adapt qlora": ("adapt", QLORA),
    "sft qlora": ("sft", QLORA),
    "rl": ("rl", [*RL, "rl.beta=0.1"]),
    "rl lora": ("rl", [*LORA, *RL, *ACROSS]),
    "rl long": ("rl", LONG_RL),
    "rl qlora": ("rl", [*QLORA, *RL]),
    "draft": ("draft", DRAFT),
}
AR = ("adapt", "draft")  # kinds that begin with an AR model
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = "the cat sat on a mat and saw one big red dog run to his old house".split()


@pytest.fixture(scope="session")
def data_for(tmp_path_factory):
    """Texts for `adapt`, prompts with completions for `sft`."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = {
        "adapt": [{"text": words(3, 18)} for _ in range(120)],
        "sft": [{"prompt": words(2, 5), "completion": f" {words(1, 4)}"} for _ in range(120)],
        "rl": [{"prompt": words(1, 5)} for _ in range(20)],
    }
    rows["draft"] = rows["adapt"]
    files = {verb: folder / f"{verb}.jsonl" for verb in rows}
    for verb, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[verb]))
    return files


def no_deepspeed() -> str:
    """Why ZeRO cannot run here: DeepSpeed is missing, or what it compiles with."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed: pip install 'ar2diff[dev]'"
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    missing = [tool for tool in ("ninja", "g++") if shutil.which(tool, path=path) is None]
    return f"{missing[0]} is not on PATH, and DeepSpeed compiles with it" if missing else ""


@pytest.fixture(scope="session")
def deepspeed():
    """Skips where ZeRO cannot run."""
    if reason := no_deepspeed():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def deepspeed_built(deepspeed):
    """DeepSpeed's communication for CPUs, compiled once, in a minute; used by launch files."""
    check_locks()
    code = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as B; B().load()"
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    env = {**ENV, "PATH": path, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


def settings_of(kind: str, folder: Path, processes: int) -> list[str]:
    """The recipe of a kind of run. `folder`: where rewards write down what they judge."""
    verb, settings = KINDS[kind]
    judge = f"rl.rewards=[{{name: '{HERE / 'graded.py'}:graded', args: {{folder: '{folder}'}}}}]"
    batch = f"train.per_device_train_batch_size={ROWS // processes}"
    base = [field for field in RECIPE if verb != "draft" or not field.startswith("convert.")]
    return [*base, *settings, batch, *([judge] if verb == "rl" else [])]


def steps_of(kind: str) -> int:
    return load_recipe(None, [*RECIPE, *KINDS[kind][1]]).train.max_steps


@pytest.fixture(scope="session")
def base_of(tiny_checkpoint, convert_tiny, convert_wide):
    """Factory: what a kind of run begins with."""

    def find(kind: str) -> Path:
        if kind in AR:
            return tiny_checkpoint
        return (convert_wide if kind.endswith("qlora") else convert_tiny)("convert.block_length=4")

    return find


@pytest.fixture(scope="session")
def arguments_of(base_of, data_for):
    """Factory: the command line of a kind of run, in a number of processes."""

    def arguments(kind: str, output_dir: Path, processes: int, *more: str) -> list[str]:
        verb, _ = KINDS[kind]
        named = [str(base_of(kind)), "--data", str(data_for[verb]), "--output-dir", str(output_dir)]
        return [verb, *named, *settings_of(kind, output_dir.parent, processes), *more]

    return arguments


def launched(folder: Path, *arguments: str) -> list[str]:
    """A command whose processes leave notes in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [sys.executable, str(HERE / "launched.py"), str(folder), *arguments]


def notes_in(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*"))]


def logs_of(folder: Path) -> list[dict]:
    """The logs of each step of a run, as its last checkpoint has them."""
    states = sorted(folder.glob("checkpoints/*/trainer_state.json"), key=os.path.getmtime)
    return [row for row in json.loads(states[-1].read_text())["log_history"] if "loss" in row]


@pytest.fixture(scope="session")
def train_here(base_of, data_for):
    """Factory: train_here("sft", folder, resume=False) trains in this process."""

    def train(kind: str, folder: Path, *settings: str, resume: bool = False) -> None:
        verb, _ = KINDS[kind]
        named = "draft" if verb == "draft" else None  # its recipe without another
        recipe = load_recipe(named, [*settings_of(kind, folder.parent, 1), *settings])
        recipe = with_values(recipe, data={"sources": [str(data_for[verb])]})
        run = getattr(importlib.import_module(f"ar2diff.training.{verb}"), verb)
        run(str(base_of(kind)), recipe, folder, resume=resume)

    return train


@pytest.fixture(scope="session")
def train_alone(train_here, tmp_path_factory):
    """Factory: train_alone("sft") is (folder, losses) of a run in this process. Made once."""

    @functools.cache
    def train(kind: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp("alone") / "out"
        train_here(kind, folder)
        return folder, [row["loss"] for row in logs_of(folder)]

    return train


# What every test run trains in the same two processes, one after another: a launch takes as long as
# ten of these runs. `TestKilledInTwo` launches ZeRO itself.
TOGETHER = [("ddp", "sft"), ("ddp", "rl lora")]
if importlib.util.find_spec("bitsandbytes"):
    TOGETHER.append(("ddp", "adapt qlora"))
if not no_deepspeed():
    TOGETHER += [("zero1", "adapt"), ("zero2", "sft"), ("zero2", "rl")]
    TOGETHER += [("zero3", "adapt"), ("zero3", "sft lora"), ("zero3", "rl")]


@pytest.fixture(scope="session")
def train_in_two(request, arguments_of, tmp_path_factory):
    """Factory: train_in_two("zero2", "sft") is (folder, notes of each process) of a run in two
    processes. Made once."""

    @functools.cache
    def launch(runs: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], Path]:
        folders = {run: tmp_path_factory.mktemp(run[0]) for run in runs}
        (home, strategy, first), *others = [
            (str(folder), strategy, [*arguments_of(kind, folder / "out", 2), "--json"])
            for (strategy, kind), folder in folders.items()
        ]
        command = launched(Path(home), *first, "--launch", strategy, "--num-processes", "2")
        if others:
            Path(home, "others.json").write_text(json.dumps(others))
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert [r["steps"] for r in results] == [steps_of(kind) for _, kind in runs]  # and no more
        return folders

    def train(strategy: str, kind: str) -> tuple[Path, list[dict]]:
        if strategy.startswith("zero"):
            request.getfixturevalue("deepspeed")
        run = (strategy, kind)
        folder = launch(tuple(TOGETHER) if run in TOGETHER else (run,))[run]
        return folder / "out", notes_in(folder)

    return train


def weights_of(folder: Path) -> Path:
    (file,) = (f for f in folder.glob("*.safetensors") if not f.name.startswith("rollouts"))
    return file


def apart(a: Path, b: Path) -> float:
    """Largest difference of two folders' weights, in parts of the tensor's largest."""
    one, other = load_file(weights_of(a)), load_file(weights_of(b))
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
# Each strategy once with every test run, two with each verb: what depends on the strategy (how
# weights are cut, gathered, saved) is the same code for both verbs, what depends on the verb (which
# rows a process gets, divisors) for all strategies. ZeRO-3 with sft is below, under LoRA. The other
# four combinations are slow tests.
OFTEN = {("ddp", "sft"), ("zero1", "adapt"), ("zero2", "sft"), ("zero3", "adapt")}


@pytest.mark.parametrize(
    "strategy,kind",
    [
        pytest.param(strategy, kind, marks=() if (strategy, kind) in OFTEN else pytest.mark.slow)
        for strategy in HELD
        for kind in ("adapt", "sft")
    ],
)
def test_two_processes_cut_what_they_say_and_train_as_one(
    train_in_two, train_alone, strategy, kind
):
    folder, notes = train_in_two(strategy, kind)
    alone, losses = train_alone(kind)
    assert len(notes) == 2
    for note in notes:
        assert note["processes"] == 2
        zero = strategy.startswith("zero")
        assert note["engine"] == ("DeepSpeedEngine" if zero else "DistributedDataParallel")
        held = [note[name] for name in ("parameters", "gradients", "masters", "moments")]
        assert held == [part * PARAMETERS for part in HELD[strategy]]
        assert note["whole"] == (NORMS if strategy == "zero3" else PARAMETERS)
        assert note["fused"]  # all logits are never made
        assert len(note["losses"]) == STEPS
        assert note["losses"] == pytest.approx(losses, rel=1e-4)
    assert apart(folder, alone) < 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((alone / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_shards_of_fsdp2_train_and_are_saved_as_the_whole_model(
    tiny_model, tiny_tokenizer, tmp_path, tied
):
    shape = {"vocab_size": len(tiny_tokenizer), "pad_token_id": None}
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=tied, **shape)
    model.save_pretrained(tmp_path / "ar")
    tiny_tokenizer.save_pretrained(tmp_path / "ar")
    settings = ["train.max_steps=0", "convert.block_length=4", "data.max_length=32"]
    adapt(str(tmp_path / "ar"), load_recipe(None, settings), tmp_path / "converted")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [HERE / "sharded.py", tmp_path / "converted", tmp_path / "out"]
    subprocess.run([*command, *arguments], check=True, env=ENV, capture_output=True, text=True)
    note = json.loads((tmp_path / "out" / "note.json").read_text())
    assert note["plain"] and note["losses"][0] == pytest.approx(note["losses"][1], rel=1e-5)
    assert note["apart"] < 1e-4
    assert note["gathered"] == ["lm_head.weight"]  # tied or not: under both of its names
    saved, base = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "converted")
    )
    assert saved.keys() == base.keys() and ("lm_head.weight" in saved) is not tied
    assert all(torch.equal(saved[name], base[name]) for name in base)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_lora_trains_on_zero3_as_in_one_process(train_in_two, train_alone):
    folder, notes = train_in_two("zero3", "sft lora")
    alone, losses = train_alone("sft lora")
    record = json.loads((alone / "ar2diff.json").read_text())
    assert [note["processes"] for note in notes] == [2, 2]
    for note in notes:
        assert note["losses"] == pytest.approx(losses, rel=1e-4)
        trained = record["trainable_parameters"]
        assert note["moments"] == pytest.approx(trained, rel=0.01)  # half of two each, padded
        assert note["parameters"] < 0.55 * record["parameters"]
    assert losses[-1] < losses[0]
    assert apart(folder, alone) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_draft_adapter_trains_in_two_processes_as_in_one(train_in_two, train_alone, strategy):
    folder, notes = train_in_two(strategy, "draft")
    alone, losses = train_alone("draft")
    for note in notes:
        assert note["processes"] == 2
        assert note["losses"] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    assert apart(folder, alone) < 1e-4


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_qlora_trains_in_two_processes_as_in_one(train_in_two, train_alone):
    folder, notes = train_in_two("ddp", "adapt qlora")
    alone, losses = train_alone("adapt qlora")
    record = json.loads((alone / "ar2diff.json").read_text())
    for note in notes:
        assert note["processes"] == 2
        assert note["parameters"] < 0.8 * record["parameters"]  # two weights a byte
        assert note["moments"] == 2 * record["trainable_parameters"]
        assert note["losses"] == pytest.approx(losses, rel=1e-4)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert apart(folder, alone) < 1e-3


def judged_in(folder: Path) -> list[tuple[list, list]]:
    """(completions, rewards) of each generation, ranks in their order."""
    ranks = [path.read_text().splitlines() for path in sorted(folder.glob("judged-*"))]
    each = [[json.loads(line) for line in lines] for lines in zip(*ranks, strict=True)]
    return [tuple([row for part in parts for row in part[n]] for n in (0, 1)) for parts in each]


REWARDED = ("reward", "reward_std", "kl", "stop_rate", "tokens_per_forward", "estimator_spread",
            "entropy", "completions/mean_length", "grad_norm")  # fmt: skip


@pytest.mark.parametrize("strategy, kind", [("ddp", "rl lora"), ("zero2", "rl"), ("zero3", "rl")])
def test_rl_in_two_processes_writes_judges_and_learns_as_in_one(
    train_in_two, train_alone, strategy, kind
):
    """A row's noise is that of its place in the global batch; what is logged is of all of it."""
    folder, notes = train_in_two(strategy, kind)
    alone, _ = train_alone(kind)
    judged, wanted = judged_in(folder.parent), judged_in(alone.parent)
    assert len(judged) == len(wanted) == (2 if kind == "rl lora" else 3)
    assert len({tuple(ids) for ids, _ in [*zip(*wanted[0], strict=True)]}) > 4
    assert judged == wanted
    for got, want in zip(logs_of(folder), logs_of(alone), strict=True):
        for name in {*REWARDED} & want.keys():
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
    assert "kl" in want
    for note in notes:
        zero = strategy.startswith("zero")
        assert note["engine"] == ("DeepSpeedEngine" if zero else "DistributedDataParallel")
        held = [note[name] for name in ("parameters", "gradients", "masters", "moments")]
        if kind == "rl":  # an adapter's numbers are padded
            assert held == [part * PARAMETERS for part in HELD[strategy]]
            assert note["whole"] == (NORMS if strategy == "zero3" else PARAMETERS)
    assert apart(folder, alone) < 1e-4


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("kind", ["sft qlora", "rl qlora"])
def test_adapters_of_quantised_models_stay_in_float32(train_alone, kind):
    """trl rounds them to bfloat16; the base below them does not move."""
    folder, losses = train_alone(kind)
    weights = load_file(weights_of(folder))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in weights.values())
    assert all(0 < tensor.abs().max() for name, tensor in weights.items() if "lora_B" in name)
    assert len(losses) == steps_of(kind)


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


def started(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENV, text=True, start_new_session=True, **pipes)


def await_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stderr:
        if (said := re.match(r"step (\d+)/", line)) and int(said[1]) >= step:
            return
    raise AssertionError("the run ended before it was to be killed")


def await_saving(process: subprocess.Popen, run_dir: Path) -> None:
    """Until a checkpoint is being written."""
    while process.poll() is None and not (run_dir / ".partial").exists():
        time.sleep(0.001)


def await_end(pids: Sequence[int]) -> None:
    """Until processes are no more; they are no children of ours."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def check_checkpoints(run_dir: Path) -> None:
    """Whatever is called a checkpoint is whole."""
    for saved in run_dir.glob("checkpoint-*"):
        assert load_file(weights_of(saved))
        json.loads((saved / "trainer_state.json").read_text())
        states = [*saved.rglob("*optim*.pt")]  # ZeRO: one of each process
        assert states
        for state in states:
            torch.load(state, weights_only=False, map_location="cpu")


def kill(process: subprocess.Popen, victim: str) -> None:
    """SIGKILL a launcher or one of its two processes; all of them end, and the reason is said."""
    children = processes_under(process.pid)
    assert len(children) == 2
    pids = {"the launcher": process.pid, "process 0": children[0], "process 1": children[1]}
    os.kill(pids[victim], signal.SIGKILL)
    said = process.communicate()[1]
    await_end(children)
    if victim == "the launcher":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 2
        assert re.search(r"^error: process \d was killed \(SIGKILL\)\n  fix: .*\n\Z", said, re.M)


def kill_and_resume(
    command: list[str], run: Path, whole: Path, seed: int, steps: int = STEPS
) -> None:
    """SIGKILL the launcher or one of its two processes after a random step, with an odd seed while
    a checkpoint is written; a resumed run ends with the bits of one that was left alone."""
    rng = random.Random(seed)
    step, victim = rng.randint(1, steps - 3), rng.choice(["the launcher", "process 0", "process 1"])
    odd = " and at the next save" if seed % 2 else ""
    print(f"kill seed {seed}: SIGKILL to {victim} after step {step}{odd}")
    process = started(command)
    await_step(process, step)
    if seed % 2:
        await_saving(process, run / "checkpoints")
    kill(process, victim)
    check_checkpoints(run / "checkpoints")
    done = subprocess.run([*command, "--resume"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights_of(run).read_bytes() == weights_of(whole).read_bytes()


# Seeds of kills after the first save, which is amid the updates of a generation.
RL_KILLED = [("ddp", 0), ("ddp", 7), ("zero2", 6), ("zero2", 9), ("zero3", 12), ("zero3", 11)]
KILLED = {"ddp": "sft", "zero1": "adapt", "zero2": "sft", "zero3": "sft lora"}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
class TestKilledInTwo:
    @pytest.fixture
    def kill_one(self, train_in_two, arguments_of, tmp_path) -> Callable[[str, int], None]:
        def run(strategy: str, seed: int, kind: str | None = None) -> None:
            kind = kind or KILLED[strategy]
            whole, _ = train_in_two(strategy, kind)
            arguments = arguments_of(kind, tmp_path / "out", 2, "--launch", strategy)
            command = launched(tmp_path, *arguments, "--num-processes", "2")
            kill_and_resume(command, tmp_path / "out", whole, seed, steps_of(kind))

        return run

    def test_a_killed_run_resumes_to_the_same_bits(self, kill_one):
        kill_one("zero2", seed=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(20))
    def test_twenty_kills_resume_to_the_same_bits(self, kill_one, seed):
        kill_one(list(KILLED)[seed // 5], seed)

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy, seed", RL_KILLED)
    def test_kills_of_rl_resume_to_the_same_bits(self, kill_one, strategy, seed):
        kill_one(strategy, seed, "rl long")

    @pytest.mark.parametrize("kind", ["adapt", pytest.param("rl long", marks=pytest.mark.slow)])
    def test_sigterm_saves_and_exits(self, arguments_of, tmp_path, kind):
        arguments = arguments_of(kind, tmp_path / "out", 2, "--launch", "ddp")
        command = launched(tmp_path, *arguments, "--num-processes", "2")
        process = started([*command, "train.max_steps=2000", "train.save_steps=2000"])
        await_step(process, 3)
        process.terminate()
        said = process.communicate()[1]
        assert process.returncode == 128 + signal.SIGTERM
        stopped = re.findall(r"^stopped by SIGTERM after step (\d+), which was saved", said, re.M)
        assert len(stopped) == 1
        assert "Traceback" not in said
        saved = tmp_path / "out" / "checkpoints" / f"checkpoint-{stopped[0]}"
        assert load_file(saved / "model.safetensors")
        assert not (tmp_path / "out" / "config.json").exists()


# `test_training.py` kills `adapt` in one process.
ALONE = [sys.executable, "-m", "ar2diff.cli"]
LONGER = ["train.max_steps=120", "train.save_steps=3", "--resume"]


@pytest.fixture(scope="session")
def uninterrupted(arguments_of, tmp_path_factory):
    """Factory: folder of a LONGER run in one process. Made once."""

    @functools.cache
    def run(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "out"
        command = [*ALONE, *arguments_of(kind, folder, 1, *LONGER)]
        subprocess.run(command, check=True, env=ENV, capture_output=True)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["sft", "sft lora", "adapt lora"])
def test_two_kills_in_one_process_resume_to_the_same_bits(
    uninterrupted, arguments_of, tmp_path, kind, seed
):
    run, whole = tmp_path / "out", uninterrupted(kind)
    command = [*ALONE, *arguments_of(kind, run, 1, *LONGER)]
    moments = sorted(random.Random(seed).sample(range(2, 110), 2))
    print(f"kill seed {seed}: SIGKILL to {kind} after steps {moments}, the second at a save")
    for number, step in enumerate(moments):
        process = started(command)
        await_step(process, step)
        if number:
            await_saving(process, run / "checkpoints")
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        check_checkpoints(run / "checkpoints")
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    assert weights_of(run).read_bytes() == weights_of(whole).read_bytes()


def test_a_kill_amid_the_updates_of_a_generation_resumes_to_the_same_bits(
    train_here, train_alone, tmp_path
):
    run, (whole, _) = tmp_path / "out", train_alone("rl long")
    killed_at_step(lambda: train_here("rl long", run), 7)
    check_checkpoints(run / "checkpoints")
    saved = json.loads((run / "checkpoints/checkpoint-5/rollouts-0.json").read_text())
    assert saved == {"step": 5, "batches": 2}
    train_here("rl long", run, resume=True)
    assert weights_of(run).read_bytes() == weights_of(whole).read_bytes()


@pytest.mark.parametrize("kind", ["adapt", "sft lora", "rl long"])
def test_sigterm_saves_and_exits_in_one_process(
    train_here, train_alone, tmp_path, monkeypatch, kind
):
    from ar2diff.training.grpo import DiffusionGRPOTrainer
    from ar2diff.training.loss import Denoising

    trainer, name = Denoising, "losses"
    if kind.startswith("rl"):
        trainer, name = DiffusionGRPOTrainer, "_compute_loss"
    loss = getattr(trainer, name)

    def terminated_in_step_3(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer, name, terminated_in_step_3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train_here(kind, tmp_path / "out", "train.save_steps=100")
    assert signal.getsignal(signal.SIGTERM) == before
    assert [p.name for p in (tmp_path / "out/checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    train_here(kind, tmp_path / "out", "train.save_steps=100", resume=True)
    assert apart(train_alone(kind)[0], tmp_path / "out") == 0


def test_an_error_of_two_processes_is_said_once(arguments_of, tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:9000])
    verb, _, *rest = arguments_of("adapt", tmp_path / "out", 2)
    options = ["--launch", "ddp", "--num-processes", "2"]
    command = launched(tmp_path, verb, str(model), *rest, *options)
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* is incomplete or damaged .*\n  fix: .*\n", done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_resume_with_another_sharding_is_refused(train_in_two, tiny_checkpoint, data_for, tmp_path):
    folder, _ = train_in_two("zero1", "adapt")
    batch = f"train.per_device_train_batch_size={ROWS // 2}"
    recipe = load_recipe(None, [*RECIPE, batch, "train.gradient_accumulation_steps=2"])
    recipe = with_values(recipe, data={"sources": [str(data_for["adapt"])]})
    shutil.copytree(folder, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "ar2diff.json").read_text())
    record["recipe"] = recipe.model_dump(mode="json")
    (tmp_path / "out" / "ar2diff.json").write_text(json.dumps(record))
    with pytest.raises(Ar2DiffError, match="its sharding was 'zero1 x 2', but is now None"):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "out", resume=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two_nodes(arguments_of, folder: Path, strategy: str, kind: str, flags: list[str]) -> None:
    """Two commands on loopback, a process each; `{rank}` in a flag is the node's number."""
    nodes = []
    for rank in range(2):
        told = [flag.format(rank=rank) for flag in flags]
        options = ["--launch", strategy, "--num-processes", "1", "--", "--nnodes", "2", *told]
        arguments = arguments_of(kind, folder / "out", 2, *options)
        nodes.append(started(launched(folder / "notes", *arguments)))
    said = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    notes = notes_in(folder / "notes")
    assert [note["processes"] for note in notes] == [2, 2]
    assert notes[0]["losses"] == notes[1]["losses"]


def test_two_nodes_with_ranks_train_as_two_processes(train_in_two, arguments_of, tmp_path):
    flags = ["--node-rank", "{rank}", "--master-addr", "127.0.0.1"]
    flags += ["--master-port", str(free_port())]
    run_two_nodes(arguments_of, tmp_path, "ddp", "sft", flags)
    assert apart(tmp_path / "out", train_in_two("ddp", "sft")[0]) == 0


@pytest.mark.slow
def test_two_nodes_at_a_rendezvous_train_as_two_processes(train_in_two, arguments_of, tmp_path):
    flags = ["--rdzv-backend", "c10d", "--rdzv-id", "two"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    run_two_nodes(arguments_of, tmp_path, "zero2", "adapt", flags)
    assert {note["moments"] for note in notes_in(tmp_path / "notes")} == {PARAMETERS}
    assert apart(tmp_path / "out", train_in_two("zero2", "adapt")[0]) == 0


@pytest.mark.slow
def test_an_accelerate_file_runs_its_processes(train_in_two, arguments_of, tmp_path):
    (tmp_path / "a.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 2}")
    arguments = arguments_of("adapt", tmp_path / "out", 2, "--launch", str(tmp_path / "a.yaml"))
    command = launched(tmp_path, *arguments)
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    assert [note["processes"] for note in notes_in(tmp_path)] == [2, 2]
    assert apart(tmp_path / "out", train_in_two("ddp", "adapt")[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("steps_with", ["AdamW", "DeepSpeedCPUAdam"])
def test_a_deepspeed_file_offloads(
    train_alone, arguments_of, deepspeed_built, tmp_path, stage, steps_with
):
    config = deepspeed_config(stage)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if steps_with == "AdamW":  # else accelerate puts DeepSpeed's own in its place, and compiles it
        config["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "ds.json").write_text(json.dumps(config))
    options = ["--launch", str(tmp_path / "ds.json"), "--num-processes", "2"]
    arguments = arguments_of("adapt", tmp_path / "out", 2, *options)
    subprocess.run(launched(tmp_path, *arguments), check=True, env=ENV, capture_output=True)
    for note in notes_in(tmp_path):
        assert (note["processes"], note["offloads"], note["optimizer"]) == (2, True, steps_with)
    assert apart(tmp_path / "out", train_alone("adapt")[0]) < 1e-4
