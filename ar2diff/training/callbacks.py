"""What is watched during training: the bound on fixed rows with fixed noise, a sample, the logs."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpoint.model import Checkpoint
from ..distributed.sharding import holds_shards
from ..generation.complete import begin, settings_of
from ..generation.tokens import draw_tokens
from .findings import findings
from .journal import Journal
from .plan import Plan
from .screen import Screen
from .wording import amount, duration, fitted_line, gigabytes

TIMED = 2  # steps that must be timed before the rest of a run is estimated
SOON = 60.0  # seconds until the end of a run that are not worth telling
FIGURES = 3  # that the line of a step shows
JUDGED = {  # how the line of an evaluation shows what is logged of it
    "eval_bound": "bound {:.3f}", "eval_ar_nll": "AR NLL {:.3f}",
    "base_ar_nll": "AR NLL of the base {:.3f}",
    "eval_tokens_per_forward": "{:.2f} tokens/forward", "eval_right_1": "first draft right {:.1%}",
}  # fmt: skip


class Watch(TrainerCallback):
    """Evaluates the model on the plan's fixed rows before the first step, every `eval.steps` steps
    and after the last, and shows one row being denoised every `eval.panel_steps` steps. Tells what
    is logged: a line on the screen, all of it in the journal. Results of an evaluation go through
    `trainer.log`, so trackers see them.

    Args:
        journal: None in a process that does not write.

    Attributes:
        judged: (step, result) of the last evaluation; None before it.
    """

    def __init__(self, verb: str, plan: Plan, screen: Screen, journal: Journal | None):
        self.verb, self.plan, self.screen, self.journal = verb, plan, screen, journal
        self.checkpoint, self.recipe = plan.checkpoint, plan.recipe
        self.trainer: Any = None  # set once the trainer exists
        self.judged: tuple[int, Any] | None = None
        self._began: tuple[int, float, int] | None = None  # step, its end and the tokens until it
        self._now = 0.0  # the end of the last step
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model that the run starts from."""
        if self.plan.eval_rows and state.global_step == 0:
            self._judge(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, and draw a panel, when they are due at this step. Once some steps have been
        timed, say how long the run will take, and how much memory it needs."""
        self._now = time.monotonic()
        if self._began is None:
            self._began = state.global_step, self._now, state.num_input_tokens_seen
        elif state.global_step == self._began[0] + TIMED:
            if (left := self._left(state)) is not None:
                peak = f"{gigabytes(peak_memory())} of memory at the peak"
                self.screen.say(f"step {state.global_step}/{state.max_steps}: about {left}, {peak}")
        self.screen.step(state.global_step, fitted_line(self._pace(state)))
        steps, panel_steps = self.recipe.eval.steps, self.recipe.eval.panel_steps
        last = state.global_step == state.max_steps
        if self.plan.eval_rows and (last or (steps and state.global_step % steps == 0)):
            self._judge(state, control)
        denoises = self.checkpoint.spec is not None  # a control does not
        if denoises and panel_steps and state.global_step % panel_steps == 0:
            # If weights are sharded, every process takes part in every forward.
            if state.is_world_process_zero or holds_shards(self.trainer):
                quietly(self.checkpoint.model, self._panel)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write all logs to the journal, and the most important ones to the screen."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if self.journal is not None:
            self.journal.write(state.global_step, logs)
        place = f"step {state.global_step}/{state.max_steps}:"
        trains = "loss" in logs
        forms = self.trainer.figures if trains else JUDGED
        known = [name for name in forms if logs.get(name) is not None][:FIGURES]
        first, *more = [forms[name].format(logs[name]) for name in known] or [""]
        kind = "" if trains else "held-out "
        pace = self._pace(state) if trains else []
        self.screen.say(fitted_line([f"{place} {kind}{first}", *more, *pace]))
        if not trains:
            return
        if (sample := self.trainer.sample()) is not None:
            self.screen.say(sample)
        if self.journal is not None:
            self._warn(findings(self.verb, self.journal.rows, False))

    def _warn(self, found: dict[str, str]) -> None:
        for name, text in found.items():
            if name not in self._warned:
                self.screen.say(f"warning: {text}")
        self._warned |= found.keys()

    def _judge(self, state: Any, control: Any) -> None:
        def judge() -> tuple[Any, dict[str, float]]:
            base = self.plan.base_logs(self.plan) if state.global_step == 0 else {}
            return self.plan.judge(self.plan), base

        found, base = quietly(self.checkpoint.model, judge)
        self.judged = state.global_step, found
        due = control.should_log
        self.trainer.log({**found.logs(), **base})
        control.should_log = due  # `log` resets it, but the loss of the step is due too

    def _pace(self, state: Any) -> list[str]:
        """The time that is left, and tokens per second, as far as they are known."""
        if self._began is None or state.global_step == self._began[0]:
            return []
        _, start, before = self._began
        tokens = (state.num_input_tokens_seen - before) / max(self._now - start, 1e-9)
        left = self._left(state)
        return [*([left] if left else []), *([f"{amount(tokens)} tokens/s"] if tokens else [])]

    def _left(self, state: Any) -> str | None:
        """The time that is left, by the steps of this process but the first, which may compile;
        None if too few were timed, or it is not worth telling."""
        if self._began is None or state.global_step < self._began[0] + TIMED:
            return None
        done = state.global_step - self._began[0]
        rest = state.max_steps - state.global_step
        seconds = (self._now - self._began[1]) / done * rest
        return f"{duration(seconds)} left" if seconds >= SOON else None

    def _panel(self) -> None:
        rows = self.plan.eval_rows
        prompt = [token for token in (rows[0] if rows else ()) if token >= 0][:8]  # without images
        prompt = prompt or [self.checkpoint.tokenizer.bos_token_id or 0]
        self.screen.show(denoised(self.checkpoint, prompt, self.recipe.eval.length // 4))


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


def quietly(model: Any, function: Any) -> Any:
    """Call a function with the model in eval mode, then restore its mode and the random state."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return function()
    finally:
        model.train(training)


def denoised(checkpoint: Checkpoint, prompt: list[int], max_new_tokens: int) -> Any:
    """A panel that shows an answer being denoised, with undecided tokens as dots."""
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
    return Panel(text, title=f"{max_new_tokens} tokens in {len(states)} forwards")
