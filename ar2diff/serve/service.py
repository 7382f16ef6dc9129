"""What every request needs: the model and its engine, limits, and threads that prepare rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError
from ..core.generate import room_of
from ..core.options import CONSTRAINTS, MODES
from ..generation.complete import settings_of
from .engine import Engine
from .limits import Limits
from .refusal import busy

Found = TypeVar("Found")


class Lane:
    """Threads that do what takes too long for the loop, and a queue of limited length."""

    def __init__(self, name: str, threads: int, most: int):
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.most, self.count = most, 0

    async def run(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """Call a function.

        Raises:
            Refusal: too many calls wait.
        """
        if self.count >= self.most:
            raise busy()
        self.count += 1
        future = self.pool.submit(function, *arguments)
        future.add_done_callback(partial(self._done, asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _done(self, loop: asyncio.AbstractEventLoop, _: Any) -> None:
        try:
            loop.call_soon_threadsafe(self._count_down)
        except RuntimeError:  # the loop is closed
            pass

    def _count_down(self) -> None:
        self.count -= 1


@dataclass
class Service:
    """A model that is served.

    Attributes:
        name: under which clients know it.
        encoding: held while the tokenizer encodes, which is not thread-safe.
        plain, constrained: prepare rows; an automaton may take a minute.
    """

    checkpoint: Checkpoint
    engine: Engine
    name: str
    limits: Limits
    encoding: Any = field(default_factory=Lock)
    plain: Lane = field(default_factory=lambda: Lane("rows", 1, 256))
    constrained: Lane = field(default_factory=lambda: Lane("constraints", 2, 32))

    def lane(self, settings: dict[str, Any]) -> Lane:
        """Where rows with some settings are prepared."""
        return self.constrained if any(name in settings for name in CONSTRAINTS) else self.plain

    def described(self) -> dict[str, Any]:
        """What a client should know of the model."""
        checkpoint, spec = self.checkpoint, self.checkpoint.read_as
        default = settings_of(checkpoint, self.base())[1]
        tokenizer = checkpoint.tokenizer
        return {
            "attention": spec.attention,
            "prediction": spec.prediction,
            "block_length": spec.block_length,
            "modes": self.modes(),
            "default_mode": default.mode,
            "chat": bool(tokenizer.chat_template),
            "tools": False,
            "constraints": True,
            "context": room_of(checkpoint.model, spec, default),
            "max_tokens": self.limits.tokens,
        }

    def base(self) -> dict[str, Any]:
        """Settings that every call needs: an unconverted model has its AR mode alone."""
        converted = self.checkpoint.spec is not None or self.checkpoint.draft is not None
        return {} if converted else {"mode": "ar"}

    def modes(self) -> list[str]:
        """Modes that the model has."""
        found = []
        for mode in MODES:
            try:
                settings_of(self.checkpoint, {"mode": mode})
            except Ar2DiffError:
                continue
            found.append(mode)
        return found
