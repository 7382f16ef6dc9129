"""Running a command in several processes: DDP, DeepSpeed ZeRO-1, 2 or 3, FSDP2, or a launch file.

With `--launch`, a command starts itself again, once for each process, under torch's elastic
launcher (or under `accelerate launch`, if given an accelerate config). The processes learn their
roles from the environment. An error is reported once, whichever process hits it, and the exit code
is that of the failing process.

On several nodes, run the same command on each, with the launcher's own flags after `--` and an
output folder that all of them see:

    ar2diff adapt MODEL --recipe R --output-dir /shared/run --launch zero2 --num-processes 8 \\
        -- --nnodes 2 --rdzv-id run --rdzv-backend c10d --rdzv-endpoint first-node:29500
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..core.errors import Ar2DiffError, first_line, nearest, option, shortened
from .builds import check_locks
from .ranks import CHOSEN, STOPPED, search_path

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds before processes that still save are killed


@dataclass(frozen=True)
class Launch:
    """How a command will run.

    Attributes:
        strategy: one of `STRATEGIES`, or `accelerate` if an accelerate config decides.
        processes: how many to start on this node.
        file: absolute path of a DeepSpeed .json or accelerate .yaml; None for our own settings.
        flags: extra arguments for the launcher.
    """

    strategy: str
    processes: int
    file: str | None = None
    flags: tuple[str, ...] = ()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that starts the processes.

        Args:
            arguments: those of ar2diff, beginning with the command, without the launch options.
        """
        python = [sys.executable, "-m"]
        if self.strategy == "accelerate":
            launcher = ["accelerate.commands.launch", "--config_file", str(self.file)]
            launcher += ["--num_processes", str(self.processes)]
        else:
            launcher = ["torch.distributed.run", f"--nproc-per-node={self.processes}"]
        return [*python, *launcher, *self.flags, "-m", "ar2diff.cli", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that tell the processes how they were launched."""
        return {CHOSEN: self.file or self.strategy}

    def run(self, arguments: Sequence[str]) -> NoReturn:
        """Start the processes, wait for them, and exit with the code of the first one that failed.

        Raises:
            Ar2DiffError: a mistake that one of the processes reported.
        """
        os.environ.update(self.environment)
        os.environ.setdefault(SHUTDOWN, "600")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.processes)))
        # The launcher's own reports are silenced: `_fail` reports what went wrong.
        os.environ.setdefault("TORCHELASTIC_LOG_LEVEL", "CRITICAL")
        import logging

        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError

        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        try:
            self._start(self.command(arguments)[3:])
        except ChildFailedError as error:
            _fail(list(error.failures.items()))
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except RendezvousError as error:
            raise Ar2DiffError(
                f"the nodes cannot find each other: {first_line(error)}",
                "check the rendezvous flags after --, and that the first node can be reached",
            ) from None
        sys.exit(0)

    def _start(self, command: list[str]) -> None:
        if self.strategy == "accelerate":
            from accelerate.commands.launch import launch_command, launch_command_parser

            launch_command(_parsed(launch_command_parser().parse_args, command))
        else:
            from torch.distributed import run

            run.run(_parsed(run.parse_args, command))


def make_launch(
    chosen: str | None, processes: int | None, flags: Sequence[str] = ()
) -> Launch | None:
    """The launch that a command line asks for; None to run in this process alone.

    Raises:
        Ar2DiffError: an unknown strategy, a missing file, or something that this machine lacks.
    """
    if chosen is None:
        if processes is None and not flags:
            return None
        what = option("num_processes") if processes is not None else f"-- {' '.join(flags)}"
        raise Ar2DiffError(
            f"{what} needs {option('launch')}", f"add {option('launch', STRATEGIES[0])}"
        )
    if processes is not None and processes < 1:
        raise Ar2DiffError(
            f"{option('num_processes', processes)} is less than 1", "set it to 1 or more"
        )
    file, strategy, known = None, chosen, None
    if chosen not in STRATEGIES:
        strategy, file, known = _read_file(chosen)
    _check_machine(strategy)
    processes = processes or known or _accelerators()
    accelerators = _accelerators()
    if processes is None:
        raise Ar2DiffError(
            f"{option('launch', chosen)} needs a number of processes, because this machine has "
            "no GPUs",
            f"set {option('num_processes')}, for example {option('num_processes', 2)}",
        )
    if accelerators is not None and processes > accelerators:
        raise Ar2DiffError(
            f"{option('num_processes', processes)} is more than the number of GPUs on this "
            f"machine, {accelerators}",
            f"set it to {accelerators} or less",
        )
    return Launch(strategy, processes, file, tuple(flags))


def strategy_of(path: str) -> tuple[str, dict[str, Any]]:
    """The strategy that a DeepSpeed .json asks for, and the content of the file.

    Raises:
        Ar2DiffError: the file is not a DeepSpeed config.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = tree["zero_optimization"]["stage"]
        if stage not in (1, 2, 3):
            raise ValueError(f"zero_optimization.stage is {shortened(stage)}, not 1, 2 or 3")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise Ar2DiffError(
            f"launch file {path} is not a DeepSpeed config: {said}",
            "correct it as described at https://www.deepspeed.ai/docs/config-json",
        ) from None
    return f"zero{stage}", tree


def _read_file(path: str) -> tuple[str, str, int | None]:
    """The strategy, absolute path and number of processes (None if not given) of a launch file."""
    file = Path(path).expanduser()
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise Ar2DiffError(
            f"{option('launch')} {shortened(path)} is unknown{nearest(path, STRATEGIES)}",
            f"use one of {', '.join(STRATEGIES)}, or an accelerate .yaml or DeepSpeed .json file",
        )
    if not file.is_file():
        raise Ar2DiffError(
            f"launch file {path} does not exist",
            "check the path, or create a file with 'accelerate config --config_file launch.yaml'",
        )
    if file.suffix == ".json":
        return strategy_of(str(file))[0], str(file.resolve()), None
    return "accelerate", str(file.resolve()), _read_accelerate(file)


def _read_accelerate(file: Path) -> int:
    """The number of processes in an accelerate config, which must really start several."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind, processes = tree["distributed_type"], int(tree["num_processes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise Ar2DiffError(
            f"launch file {file} is not an accelerate config: {said}",
            "create one with 'accelerate config --config_file launch.yaml'",
        ) from None
    if kind in ("NO", "MULTI_CPU") or (tree.get("use_cpu") and processes > 1):
        if kind != "NO" or processes > 1:
            raise Ar2DiffError(
                f"launch file {file}: with distributed_type {shortened(kind)}, accelerate runs "
                "a single process",
                f"use {option('launch', 'ddp')}, or set distributed_type to MULTI_GPU, which "
                "also works on CPUs",
            )
    if kind == "FSDP":
        _check_machine("fsdp2")
    if kind == "DEEPSPEED":
        _check_machine("zero")
    return processes


def _check_machine(strategy: str) -> None:
    """Refuse a strategy that this machine cannot run, before anything is started."""
    gpu = _accelerators() is not None
    if strategy == "fsdp2" and not gpu:
        raise Ar2DiffError(
            f"{option('launch', 'fsdp2')} needs GPUs: on CPUs accelerate runs plain DDP instead",
            f"use {option('launch', 'zero3')}, which shards on CPUs too",
        )
    if not strategy.startswith("zero"):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise Ar2DiffError(
            f"{option('launch', strategy)} needs deepspeed, which is not installed",
            "pip install 'ar2diff[deepspeed]'",
        )
    missing = [tool for tool in ("ninja", "g++") if shutil.which(tool, path=search_path()) is None]
    if missing and not gpu:  # on CPUs DeepSpeed compiles its communication
        raise Ar2DiffError(
            f"{option('launch', strategy)} on CPUs needs {missing[0]} to compile DeepSpeed's "
            "communication, and it is not on PATH",
            "pip install ninja" if missing[0] == "ninja" else "install g++",
        )
    check_locks()


def _accelerators() -> int | None:
    """The number of GPUs, or None if there are none."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parsed(parse: Any, command: list[str]) -> Any:
    said = StringIO()
    try:
        with redirect_stderr(said):
            return parse(command)
    except SystemExit:
        line = (said.getvalue().strip().splitlines() or ["not understood"])[-1]
        raise Ar2DiffError(
            "the launcher does not accept the flags after --: "
            f"{line.partition('error: ')[2] or line}",
            "see 'torchrun --help' or 'accelerate launch --help'",
        ) from None


def _fail(failures: list[tuple[int, Any]]) -> NoReturn:
    """Pass on the error of the first process to fail; when one is killed, the others die with
    it."""
    killed = [f for f in failures if f[1].exitcode < 0 and f[1].exitcode != -signal.SIGTERM]
    said = [f for f in failures if f[1].exitcode > 0]
    if killed:
        rank, failure = killed[0]
        raise Ar2DiffError(
            f"process {rank} was killed ({failure.signal_name()})",
            "if it ran out of memory, see 'ar2diff memory'; continue with "
            f"{option('resume', True)}",
        )
    first = min(said or failures, key=lambda f: (f[1].timestamp, -f[1].exitcode))[1]
    if first.error_file_data.get("what"):
        raise Ar2DiffError(first.error_file_data["what"], first.error_file_data["fix"])
    if first.exitcode not in (STOPPED, 130) and first.error_file_data.get("message") != "<NONE>":
        print(first.message, file=sys.stderr)
    sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)


@contextmanager
def planned_world(launch: Launch | None) -> Iterator[None]:
    """For a dry run: make this process look like one of those that would run."""
    before = os.environ.get("WORLD_SIZE")
    if launch is not None:
        os.environ["WORLD_SIZE"] = str(launch.processes)
    try:
        yield
    finally:
        if launch is not None:
            os.environ.pop("WORLD_SIZE")
            if before is not None:
                os.environ["WORLD_SIZE"] = before
