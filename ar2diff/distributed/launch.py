"""One verb in several processes: DDP, DeepSpeed ZeRO-1, 2, 3, FSDP2, or a launch file.

A verb that was given `--launch` starts itself again, once a process, under torch's elastic launcher
(an accelerate config: under `accelerate launch`); what the processes are to do reaches them in the
environment. A mistake is said once, whichever process makes it, and the exit code comes through.

Several nodes: the same command on each, with the launcher's own flags behind `--`, and a folder for
the output that all of them see:

    ar2diff adapt MODEL --recipe R --output-dir /shared/run --launch zero2 --num-processes 8 \\
        -- --nnodes 2 --rdzv-id run --rdzv-backend c10d --rdzv-endpoint first-node:29500
"""

from __future__ import annotations

import difflib
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

from ..core.errors import Ar2DiffError, first_line
from .builds import check_locks
from .ranks import CHOSEN, STOPPED, search_path

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds until the launcher kills what saves


@dataclass(frozen=True)
class Launch:
    """How a verb is to run.

    Attributes:
        strategy: one of `STRATEGIES`, or `accelerate` where a config of it decides.
        processes: on this node.
        file: a DeepSpeed json or an accelerate yaml, absolute; None: our own settings.
        flags: passed to the launcher.
    """

    strategy: str
    processes: int
    file: str | None = None
    flags: tuple[str, ...] = ()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What is run, as a shell would have it.

        Args:
            arguments: of ar2diff, the verb first, without the launch's own.
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
        """What the processes are told."""
        return {CHOSEN: self.file or self.strategy}

    def run(self, arguments: Sequence[str]) -> NoReturn:
        """Start the processes, wait for them, and exit as the first that failed did.

        Raises:
            Ar2DiffError: what a process found to be the user's to mend.
        """
        os.environ.update(self.environment)
        os.environ.setdefault(SHUTDOWN, "600")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.processes)))
        # The launcher's own reports go nowhere: what went wrong is said by `_fail`.
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
                f"the launcher's processes do not find each other ({first_line(error)})",
                "check the flags of the rendezvous, and that the first node is reachable",
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
    """Check what the command line asks for; None: this process is all.

    Raises:
        Ar2DiffError: an unknown strategy, a file that is not there, what this machine lacks.
    """
    if chosen is None:
        if processes is None and not flags:
            return None
        what = "--num-processes" if processes is not None else f"-- {' '.join(flags)}"
        raise Ar2DiffError(f"{what} goes with --launch", f"add --launch {STRATEGIES[0]}")
    if processes is not None and processes < 1:
        raise Ar2DiffError(f"--num-processes {processes}: at least one", "give 1 or more")
    file, strategy, known = None, chosen, None
    if chosen not in STRATEGIES:
        strategy, file, known = _read_file(chosen)
    _check_machine(strategy)
    processes = processes or known or _accelerators()
    accelerators = _accelerators()
    if processes is None:
        raise Ar2DiffError(f"--launch {chosen}: how many processes?", "give --num-processes")
    if accelerators is not None and processes > accelerators:
        raise Ar2DiffError(
            f"--num-processes {processes}: this machine has {accelerators} GPUs",
            f"give at most {accelerators}",
        )
    return Launch(strategy, processes, file, tuple(flags))


def strategy_of(path: str) -> tuple[str, dict[str, Any]]:
    """The strategy that a DeepSpeed json names, and what it says.

    Raises:
        Ar2DiffError: it is not one.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = tree["zero_optimization"]["stage"]
        if stage not in (1, 2, 3):
            raise ValueError(f"zero_optimization.stage is {stage!r}, wanted 1, 2 or 3")
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise Ar2DiffError(
            f"launch file {path}: no DeepSpeed config ({said})", "see deepspeed.ai's config-json"
        ) from None
    return f"zero{stage}", tree


def _read_file(path: str) -> tuple[str, str, int | None]:
    """Strategy, absolute path, processes (None: it does not say) of a launch file."""
    file = Path(path).expanduser()
    if file.suffix not in (".json", ".yaml", ".yml"):
        near = difflib.get_close_matches(path, STRATEGIES, 1)
        raise Ar2DiffError(
            f"--launch {path!r} is unknown{f'; did you mean {near[0]}?' if near else ''}",
            f"one of {', '.join(STRATEGIES)}, an accelerate .yaml or a DeepSpeed .json",
        )
    if not file.is_file():
        raise Ar2DiffError(
            f"launch file {path}: no such file",
            "make one with 'accelerate config', or write a DeepSpeed json",
        )
    if file.suffix == ".json":
        return strategy_of(str(file))[0], str(file.resolve()), None
    return "accelerate", str(file.resolve()), _read_accelerate(file)


def _read_accelerate(file: Path) -> int:
    """Processes of an accelerate config, which must be one that really starts them."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind, processes = tree["distributed_type"], int(tree["num_processes"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise Ar2DiffError(
            f"launch file {file}: no accelerate config ({said})",
            "make one with 'accelerate config'",
        ) from None
    if kind in ("NO", "MULTI_CPU") or (tree.get("use_cpu") and processes > 1):
        if kind != "NO" or processes > 1:
            raise Ar2DiffError(
                f"launch file {file}: accelerate runs distributed_type {kind} as one process",
                "use --launch ddp, or distributed_type MULTI_GPU, which runs on CPUs too",
            )
    if kind == "FSDP":
        _check_machine("fsdp2")
    if kind == "DEEPSPEED":
        _check_machine("zero")
    return processes


def _check_machine(strategy: str) -> None:
    """Refuse what this machine cannot do before anything is started."""
    gpu = _accelerators() is not None
    if strategy == "fsdp2" and not gpu:
        raise Ar2DiffError(
            "--launch fsdp2 needs GPUs: on CPUs accelerate runs plain DDP in its name",
            "use --launch zero3, which shards on CPUs too",
        )
    if not strategy.startswith("zero"):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise Ar2DiffError(
            f"--launch {strategy}: deepspeed is not installed", "pip install 'ar2diff[deepspeed]'"
        )
    missing = [tool for tool in ("ninja", "g++") if shutil.which(tool, path=search_path()) is None]
    if missing and not gpu:  # on CPUs DeepSpeed compiles its communication
        raise Ar2DiffError(
            f"--launch {strategy}: DeepSpeed compiles for CPUs, and {missing[0]} is not on PATH",
            "install it (pip install ninja)" if missing[0] == "ninja" else "install g++",
        )
    check_locks()


def _accelerators() -> int | None:
    """How many GPUs there are; None where there is none."""
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
            f"flags of the launcher: {line.partition('error: ')[2] or line}",
            "see 'torchrun --help' or 'accelerate launch --help'",
        ) from None


def _fail(failures: list[tuple[int, Any]]) -> NoReturn:
    """Say what the first process to fail said; a killed one takes the others with it."""
    killed = [f for f in failures if f[1].exitcode < 0 and f[1].exitcode != -signal.SIGTERM]
    said = [f for f in failures if f[1].exitcode > 0]
    if killed:
        rank, failure = killed[0]
        raise Ar2DiffError(
            f"process {rank} was killed ({failure.signal_name()})",
            "if memory ran out ask 'ar2diff memory'; then go on with --resume",
        )
    first = min(said or failures, key=lambda f: (f[1].timestamp, -f[1].exitcode))[1]
    if first.error_file_data.get("what"):
        raise Ar2DiffError(first.error_file_data["what"], first.error_file_data["fix"])
    if first.exitcode not in (STOPPED, 130) and first.error_file_data.get("message") != "<NONE>":
        print(first.message, file=sys.stderr)
    sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)


@contextmanager
def planned_world(launch: Launch | None) -> Iterator[None]:
    """For a dry run: as if the processes were running."""
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
