"""What every request needs: the model and its engine, limits, and threads that prepare rows."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Lock
from typing import Any, TypeVar

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError
from ..core.forward import context_length
from ..core.generate import room_of
from ..core.options import FILTERS, MODES
from ..data.album import Album
from ..generation.complete import settings_of
from ..generation.steering import steered
from .engine import Engine
from .events import Post
from .limits import Limits
from .metrics import Metrics
from .refusal import Refusal, busy
from .tools import Layout, layout_of

SLACK = 4  # times that a tokenizer may shorten a text before it cuts it into tokens
Found = TypeVar("Found")


class Lane:
    """Threads for what takes too long for the loop, and a queue of limited length."""

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
        seeing: held while the processor of a vision-language model does, with a tokenizer of its
            own: texts do not wait for images.
        plain, slow: prepare rows; an automaton may take a minute, and images some seconds.
    """

    checkpoint: Checkpoint
    engine: Engine
    name: str
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    encoding: Any = field(default_factory=Lock)
    seeing: Any = field(default_factory=Lock)
    plain: Lane = field(default_factory=lambda: Lane("rows", 1, 256))
    slow: Lane = field(default_factory=lambda: Lane("slow", 2, 32))

    def check_model(self, name: str | None, mode: str | None = None) -> None:
        """Refuse a request for another model, or for a mode that the model lacks.

        Raises:
            Refusal: it is for one.
        """
        if name is not None and name != self.name:
            told = f"the model {name[:100]!r} is not here; this server has {self.name!r}"
            raise Refusal(404, told, "model", "model_not_found")
        if mode is not None and mode not in self.described["modes"]:
            modes = ", ".join(self.described["modes"])
            raise Refusal(400, f"mode is {mode[:40]!r}; this model has {modes}", "mode")

    @cached_property
    def post(self) -> Post:
        """The way of events from the engine to the loop that runs now."""
        return Post(asyncio.get_running_loop().call_soon_threadsafe)

    @cached_property
    def base(self) -> dict[str, Any]:
        """Settings that every call needs: an unconverted model has its AR mode alone."""
        converted = self.checkpoint.spec is not None or self.checkpoint.draft is not None
        return {} if converted else {"mode": "ar"}

    @cached_property
    def longest(self) -> int | None:
        """Characters that no text has which fits into the context; None if there is no limit."""
        context = context_length(self.checkpoint.model)
        if context is None:
            return None
        token = max(map(len, self.checkpoint.tokenizer.get_vocab()))
        return SLACK * context * token

    @cached_property
    def layout(self) -> Layout | None:
        """How the chat template writes a call of a tool; None if it does not, or cannot be told."""
        with self.encoding:
            return layout_of(self.checkpoint.tokenizer)

    @cached_property
    def processor(self) -> Any:
        """That of a vision-language model, with a tokenizer of its own."""
        found = copy(self.checkpoint.processor)
        found.tokenizer = deepcopy(found.tokenizer)
        return found

    def album(self) -> Album | None:
        """A new album for the images of a request; None if the model reads text alone."""
        if not self.checkpoint.sees_images:
            return None
        found = Album(self.processor, self.checkpoint.model)
        found.shots.most, found.shots.room = self.limits.pixels, self.limits.all_pixels
        return found

    @cached_property
    def lossless(self) -> bool:
        """Whether the model has an AR mode."""
        return "ar" in self.described["modes"]

    @cached_property
    def described(self) -> dict[str, Any]:
        """What a client should know of the model."""
        checkpoint, spec = self.checkpoint, self.checkpoint.read_as
        default = settings_of(checkpoint, self.base)[1]
        return {
            "attention": spec.attention,
            "prediction": spec.prediction,
            "block_length": spec.block_length,
            "modes": [mode for mode in MODES if self._has(mode)],
            "default_mode": default.mode,
            "chat": bool(checkpoint.tokenizer.chat_template),
            "tools": self.layout is not None,
            "images": self.checkpoint.sees_images,
            "constraints": importlib.util.find_spec("outlines_core") is not None,
            "context": room_of(checkpoint.model, spec, default),
            "max_tokens": self.limits.tokens,
        }

    def _has(self, mode: str) -> bool:
        try:
            settings_of(self.checkpoint, {"mode": mode})
        except Ar2DiffError:
            return False
        return True


def set_defaults(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Have options of `generate` hold for every call that does not set them: they go into the
    model's generation config, which a call's own options come before.

    Raises:
        Ar2DiffError: an option is wrong.
    """
    found = steered(settings, checkpoint.tokenizer)
    found["mode"] = settings_of(checkpoint, settings)[1].mode  # some options ask for one
    if any(name in found for name in ("temperature", *FILTERS)):
        found["do_sample"] = True
    for name, value in found.items():
        setattr(checkpoint.model.generation_config, name, value)
