"""Writing text as users do, by the public interfaces, and what it took.

A base writes with `generate` of transformers, everything else with ours. Both get left-padded
prompts and tell a streamer when text arrives; the forwards are counted outside of both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.generate import generate
from ..core.images import placed
from .figures import OWN, STOCK, STOCK_SETTINGS
from .subjects import Held

Clock = Callable[[], float]  # seconds


@dataclass
class Counter:
    """Forwards of a model, and the token rows that they read."""

    forwards: int = 0
    rows: int = 0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Count what happens meanwhile."""

        def count(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            ids = given["input_ids"] if "input_ids" in given else args[0]
            self.forwards += 1
            self.rows += ids.numel()

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@dataclass
class Listener:
    """A streamer that notes when text arrives. Both `generate`s put the prompt first."""

    clock: Clock
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens
    _prompt: bool = True

    def put(self, value: Tensor) -> None:
        """Take some tokens."""
        if not self._prompt and value.numel():
            self.arrivals.append((self.clock(), value.numel()))
        self._prompt = False

    def end(self) -> None:
        """Take the end of the text."""


@dataclass(frozen=True)
class Written:
    """Answers to a batch of prompts.

    Attributes:
        answers: token ids, the end token included.
        seconds: of the call. first: seconds until the first text came; None for a batch.
        forwards: calls of the model. row_forwards: those that each row took part in.
        rows: token rows that the model read, without those of the prompts.
        prompts: with their gaps filled; none of transformers.
        order: for each answer, the forward at which each of its tokens was decided, and its
            log-probability; none of transformers.
    """

    answers: list[list[int]]
    seconds: float
    first: float | None
    forwards: int
    row_forwards: list[int]
    rows: int
    prompts: list[list[int]] = field(default_factory=list)
    order: list[tuple[list[int], list[float]]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))


@dataclass(frozen=True)
class Way:
    """A subject at a setting.

    Attributes:
        arguments: of its `generate`.
    """

    held: Held
    setting: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Unique within a report."""
        return f"{self.held.key}, {self.setting}"

    @property
    def stock(self) -> bool:
        """Whether it writes with `generate` of transformers."""
        return self.setting in STOCK_SETTINGS

    def write(
        self, prompts: Sequence[Sequence[int]], clock: Clock = time.perf_counter, **more: Any
    ) -> Written:
        """Answer a batch of prompts; that of a single prompt is listened to.

        Args:
            prompts: token ids, masks and codes of images included. Images are prepared before the
                clock starts, and the tower that looks at them is in the call.
            more: further arguments, such as `max_new_tokens`.
        """
        checkpoint = self.held.checkpoint
        model, ends = checkpoint.model, checkpoint.end_ids
        pad = next((t for t in (checkpoint.tokenizer.pad_token_id, *ends) if t is not None), 0)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        seen: dict[str, Tensor] = {}
        if (ids < 0).any():
            ids, seen = checkpoint.album.given(ids)
            seen = placed(seen, model)
        ids, real = ids.to(model.device), real.to(model.device)
        listener = Listener(clock) if len(prompts) == 1 else None
        call = self._stock if self.stock else self._own
        arguments = {"eos_token_id": ends, **self.arguments, **more, **seen}
        counter = Counter()
        with counter.watching(model):
            wait(model.device)
            start = clock()
            made = call(ids, attention_mask=real, streamer=listener, pad_token_id=pad, **arguments)
            wait(model.device)
            seconds = clock() - start
        first = listener.arrivals[0][0] - start if listener and listener.arrivals else None
        rows = counter.rows - ids.numel()
        if isinstance(made, Tensor):
            answers = [_cut(row, ends) for row in made[:, width:].tolist()]
            each = [counter.forwards] if len(prompts) == 1 else list(map(len, answers))
            return Written(answers, seconds, first, counter.forwards, each, rows)
        answers, order = [], []
        for row, steps, sure in zip(made.sequences, made.steps, made.logprobs, strict=True):
            size = int((steps > 0).sum())
            answers.append(row[width : width + size].tolist())
            order.append((steps[:size].tolist(), sure[:size].tolist()))
        given = []
        for row, prompt in zip(made.sequences[:, :width].tolist(), prompts, strict=True):
            own = zip(row[width - len(prompt) :], prompt, strict=True)
            given.append([code if code < 0 else token for token, code in own])
        each = made.forwards.tolist()
        return Written(answers, seconds, first, counter.forwards, each, rows, given, order)

    def _stock(self, ids: Tensor, **arguments: Any) -> Tensor:
        return self.held.checkpoint.model.generate(ids, **arguments)

    def _own(self, ids: Tensor, **arguments: Any) -> Any:
        checkpoint = self.held.checkpoint
        suppressed = checkpoint.suppressed.clone()
        suppressed[self.held.known :] = True
        suppressed = suppressed.nonzero()[:, 0].tolist()
        return generate(
            ids, model=checkpoint.model, draft=checkpoint.draft, tokenizer=checkpoint.tokenizer,
            return_dict_in_generate=True, suppress_tokens=suppressed, **arguments,
        )  # fmt: skip

    def evidence(self, written: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What a reader needs to repeat it.

        Args:
            written: rows with `forwards`, `tokens` and `steps`. more: further arguments.
        """
        model = self.held.checkpoint.model
        return {
            "callable": STOCK if self.stock else OWN,
            "arguments": {**self.arguments, **more},
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{name: sum(row[name] for row in written) for name in ("forwards", "tokens", "steps")},
        }


def _cut(ids: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its first end token."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items in batches of a size, the last of which may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]
