"""What a run shows while it trains, on stderr: a progress bar where that is a terminal, and lines
of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REFRESH = 0.1  # seconds between two drawings of the bar


class Screen:
    """The stderr of the process that speaks for a run; the others have a silent one.

    Args:
        speaks: whether this process is the one that speaks.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self._bar: Any = None
        self._drawn = 0.0

    def say(self, *lines: str) -> None:
        """Print lines, above the bar if there is one."""
        for line in lines if self.speaks else ():
            if self._bar is None:
                print(line, file=sys.stderr, flush=True)
            else:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, drawn: Any) -> None:
        """Print something that rich draws, above the bar if there is one."""
        if self.speaks:
            from rich.console import Console

            console = Console(file=sys.stderr) if self._bar is None else self._bar.console
            console.print(drawn)

    @contextmanager
    def bar(self, verb: str, steps: int) -> Iterator[None]:
        """A context in which `step` moves a bar, on a terminal.

        Args:
            verb: what stands before the bar. steps: the number of steps of the whole run.
        """
        if not (self.speaks and sys.stderr.isatty()):
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[rate]}"),
        )
        # Drawn at steps, not by a thread: workers that are forked meanwhile would inherit its lock.
        console = Console(file=sys.stderr)
        with Progress(
            *columns, console=console, auto_refresh=False, transient=True, expand=True
        ) as bar:
            bar.add_task(verb, total=steps, rate="")
            bar.refresh()
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def step(self, done: int, rate: str) -> None:
        """Move the bar to a step, with the speed and the time left beside it."""
        if self._bar is None:
            return
        self._bar.update(self._bar.task_ids[0], completed=done, rate=rate)
        if time.monotonic() - self._drawn >= REFRESH:
            self._bar.refresh()
            self._drawn = time.monotonic()
