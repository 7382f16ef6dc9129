"""What is watched during training: the bound on fixed rows with fixed noise, and a sample."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..distributed.sharding import holds_shards
from ..generation.complete import begin, settings_of
from ..generation.tokens import draw_tokens

TIMED = 2  # steps that must be timed before the rest of a run is estimated
SOON = 60.0  # seconds until the end of a run that are not worth telling


class Watch(TrainerCallback):
    """Evaluates the model on fixed rows every `eval.steps` steps, and shows one row being denoised
    every `eval.panel_steps` steps. Results go through `trainer.log`, so trackers see them.

    Args:
        rows: the evaluation rows.
        judge: evaluates the model on them; returns an object with `logs`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        rows: list[list[int]],
        judge: Callable[[], Any],
    ):
        self.checkpoint, self.recipe, self.rows, self.judge = checkpoint, recipe, rows, judge
        self.trainer: Any = None  # set once the trainer exists
        self._began: tuple[int, float] | None = None  # the first step of this process, its end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, and draw a panel, when they are due at this step. Once some steps have been
        timed, say how long the run will take, and how much memory it needs."""
        if self._began is None:
            self._began = state.global_step, time.monotonic()
        elif state.global_step == self._began[0] + TIMED and state.is_world_process_zero:
            if (left := self._left(state)) is not None:
                peak = f"{peak_memory() / 1e9:.1f} GB of memory at the peak"
                print(
                    f"step {state.global_step}/{state.max_steps}: {left}, {peak}", file=sys.stderr
                )
        steps, panel_steps = self.recipe.eval.steps, self.recipe.eval.panel_steps
        last = state.global_step == state.max_steps
        if self.rows and steps and (state.global_step % steps == 0 or last):
            logs = quietly(self.checkpoint.model, self.judge).logs()
            due = control.should_log
            self.trainer.log(logs)
            control.should_log = due  # `log` resets it, but the loss of the step is due too
        if panel_steps and state.global_step % panel_steps == 0:
            # If weights are sharded, every process takes part in every forward.
            if state.is_world_process_zero or holds_shards(self.trainer):
                quietly(self.checkpoint.model, self._panel)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print one line on stderr; stdout is for results."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            shown = " ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in self.trainer.shown(logs).items()
                if name not in ("epoch", "total_flos")
            )
            left = self._left(state)
            shown += f" ({left})" if left is not None else ""
            print(
                f"step {state.global_step}/{state.max_steps}: {shown}", file=sys.stderr, flush=True
            )

    def _left(self, state: Any) -> str | None:
        """The time that is left, by the steps of this process but the first, which may compile;
        None if too few were timed, or it is not worth telling."""
        if self._began is None or state.global_step < self._began[0] + TIMED:
            return None
        done = state.global_step - self._began[0]
        rest = state.max_steps - state.global_step
        seconds = (time.monotonic() - self._began[1]) / done * rest
        return f"about {duration(seconds)} left" if seconds >= SOON else None

    def _panel(self) -> None:
        prompt = self.rows[0][:8] if self.rows else [self.checkpoint.tokenizer.bos_token_id or 0]
        silent = not self.trainer.is_world_process_zero()
        draw_panel(self.checkpoint, prompt, self.recipe.eval.length // 4, silent)


class Stopping(TrainerCallback):
    """Saves and stops after the step during which any process received SIGTERM."""

    def __init__(self, accelerator: Any):
        self.accelerator, self.asked, self.agreed = accelerator, False, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the signal is noted. (Python allows this only in the main thread.)"""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make all processes stop after the same step; otherwise they would wait for each other."""
        self.agreed = self.asked
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(int(self.asked), device=self.accelerator.device)
            self.agreed = bool(self.accelerator.reduce(asked, "sum"))
        if self.agreed:
            control.should_save = control.should_training_stop = True


def peak_memory() -> int:
    """The most bytes that this process has held so far: on the GPU if it uses one, else in main
    memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quietly(model: Any, function: Any) -> Any:
    """Call a function with the model in eval mode, then restore its mode and the random state."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return function()
    finally:
        model.train(training)


def draw_panel(
    checkpoint: Checkpoint, prompt: list[int], max_new_tokens: int, silent: bool = False
) -> None:
    """Print a panel on stderr that shows an answer being denoised, with undecided tokens as
    dots."""
    from rich.console import Console
    from rich.panel import Panel

    settings = {
        "mode": "diffusion", "max_new_tokens": max_new_tokens, "temperature": 0,
        "eos_token_id": [-1],
    }  # fmt: skip
    spec, options = settings_of(checkpoint, settings)
    canvas, steps = begin(checkpoint, spec, options, [prompt])
    total = int(canvas.total[0])
    states = [state.ids[0, :total].tolist() for state in steps]
    lines = []
    for number in sorted({0, len(states) // 3, 2 * len(states) // 3, len(states) - 1}):
        drawn = "".join(draw_tokens(checkpoint.tokenizer, states[number], spec.mask_token_id))
        lines.append(f"{number + 1:3d}  {drawn}")
    text = "\n".join(lines).replace("[", "\\[")
    Console(file=sys.stderr, quiet=silent).print(
        Panel(text, title=f"{max_new_tokens} tokens in {len(states)} forwards")
    )
