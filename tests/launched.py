"""The command line, whose processes write down what each of them holds: for `test_processes.py`.

    python tests/launched.py FOLDER adapt ... --launch zero2 --num-processes 2

Where FOLDER holds `others.json`, [[folder, strategy, arguments], ...], the same processes run these
commands after the first, each in a fork of what has imported everything, as if they were launched
with that strategy.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ar2diff.cli.main import main
from ar2diff.cli.output import quiet

from ar2diff.distributed.launch import Launch
from ar2diff.distributed.ranks import CHOSEN, chosen, is_launched, is_main


def numel(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def watch(folder: Path) -> None:
    """Have the trainer write `rank-N.json`: losses, and numbers of elements held at the end."""
    import torch
    from transformers import TrainerCallback

    from ar2diff.training.base import Running

    class Notes(TrainerCallback):
        def __init__(self, trainer: Any):
            self.trainer, self.gradients = trainer, 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            engine = self.trainer.deepspeed
            optimizer = self.trainer.optimizer if engine is None else engine.optimizer
            step = optimizer.step

            def noted(*args: Any, **kwargs: Any) -> Any:
                self.gradients = held_gradients(self.trainer.model, optimizer)
                return step(*args, **kwargs)

            optimizer.step = noted

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            trainer, parameters = self.trainer, list(self.trainer.model.parameters())
            optimizer = trainer.optimizer
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            state = [x for held in optimizer.state.values() for x in held.values()]
            notes = {
                "engine": type(trainer.model_wrapped).__name__,
                "processes": torch.distributed.get_world_size(),
                "optimizer": type(optimizer).__name__,
                "fused": getattr(trainer, "_fused", None),
                "offloads": bool(trainer.deepspeed and trainer.deepspeed.zero_cpu_offload()),
                "parameters": numel(getattr(p, "ds_tensor", p) for p in parameters),
                "whole": numel(p for p in parameters),
                "moments": numel(x for x in state if torch.is_tensor(x) and x.ndim),
                "masters": masters(trainer.deepspeed.optimizer) if trainer.deepspeed else 0,
                "gradients": self.gradients,
                "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            }
            (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(notes))

    train = Running.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Notes(self))
        return train(self, *args, **kwargs)

    Running.train = noted


def held_gradients(model: Any, optimizer: Any) -> int:
    """Elements of the gradients that wait for the optimizer's step: the model's, or where ZeRO
    keeps its part of them."""
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    parts = getattr(optimizer, "averaged_gradients", {}) if flat is None else {}
    kept = [x for part in parts.values() for x in (part or ())]
    return numel([*(p.grad for p in model.parameters()), *kept, flat])


def masters(optimizer: Any) -> int:
    """Elements of the float32 copies that ZeRO steps on; the model's own weights without it."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return numel(getattr(optimizer, name))
    return 0


def through_gloo() -> None:
    """Have DeepSpeed communicate through gloo, as it does where it has nothing of its own: what it
    has for CPUs takes a minute to compile."""
    with redirect_stdout(sys.stderr):  # it says which machine it found
        importlib.import_module("deepspeed.comm.torch")
    # `deepspeed.comm.torch` names torch itself, which `deepspeed.comm` imports after that module.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def agreed_port(folder: Path) -> int:
    """A port that is free now, which the first process tells the others."""
    told = folder / "port"
    if is_main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            told.with_suffix(".new").write_text(str(listener.getsockname()[1]))
        told.with_suffix(".new").rename(told)
    while not told.exists():
        time.sleep(0.001)
    return int(told.read_text())


def hurry() -> None:
    """Draw no pictures and do not say how much memory the run will need: both take longer than what
    is tested."""
    from ar2diff.training import plots, run

    plots.can_draw = lambda: False
    run.needed_memory = lambda path, recipe: None


def run_each(folder: Path, others: list[tuple[str, str, list[str]]]) -> None:
    """Run this process's command and the others, until one fails. The others hurry."""
    if any(strategy.startswith("zero") for _, strategy, _ in others):
        through_gloo()
    for verb in {arguments[0] for arguments in (sys.argv[1:], *(other[2] for other in others))}:
        importlib.import_module(f"ar2diff.training.{verb}")
    gc.collect()
    gc.freeze()  # every run would go through all that was imported
    for number, (place, strategy, arguments) in enumerate(
        [(str(folder), chosen(), sys.argv[1:]), *others]
    ):
        if not (child := os.fork()):
            if number:  # the launcher's own store knows the first command alone
                os.environ |= {
                    CHOSEN: strategy,
                    "MASTER_PORT": str(agreed_port(Path(place))),
                    "TORCHELASTIC_USE_AGENT_STORE": "False",
                }
                hurry()
            sys.argv[1:] = arguments
            watch(Path(place))
            main()
            return
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(code)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    others = folder / "others.json"
    if is_launched():
        quiet()  # as every verb does, before libraries are imported
        if others.exists():
            run_each(folder, json.loads(others.read_text()))
            sys.exit()
        if chosen().startswith("zero"):  # not with a launch file
            through_gloo()
        hurry()
        watch(folder)
    else:
        command = Launch.command

        def here(self: Launch, arguments: list[str]) -> list[str]:
            whole = command(self, arguments)
            at = len(whole) - len(arguments) - 2
            return [*whole[:at], __file__, str(folder), *arguments]

        Launch.command = here
    main()
