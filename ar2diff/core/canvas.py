"""The rows that are being written: what is given, what is decided, where each answer ends.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .sight import Sight, joined

STRIDE = 16  # tokens that are read at a time
Finished = Callable[[int, Tensor], bool]  # (row, its ids up to a new token): stop here?


@dataclass
class Canvas:
    """A batch of rows on the CPU, each from its own position 0; the state that a screen can draw.

    Attributes:
        ids: [R, T]; undecided tokens hold the mask id, whatever the model is shown there.
        mask_token_id: the mask id, which no decided token has.
        given: [R, T] bool, tokens of the prompt, including fixed tokens between masks.
        prompt: [R] length of the prompt, including its masks.
        total: [R] the last possible end of the answer.
        length: [R] end of the canvas: `total`, rounded up to whole blocks.
        end_from: [R] first position at which an end token may be written.
        end_ids: ids that end an answer.
        start: [R] first position of the block that is being denoised.
        end: [R] end of a finished answer; -1 as long as it is not finished.
        step: [R, T] number of the row's forward that decided a token; 0 for given ones.
        logprob: [R, T] log-probability of the token in that forward, in the model's own
            distribution.
        forwards: [R] forwards that a row took part in.
        front: for each row, the number of tokens up to `total` that are decided without a gap.
        over: for each row, whether its answer is finished.
        refused: for each row, the tokens that its last forward drafted and the AR mode refused, for
            a screen.
        likeliest: for each row, by position, the likeliest tokens and their log-probabilities in
            the forward that decided it, in the model's own distribution.
        unfinished: number of rows without a finished answer.
        drift: with `check_cache`, for each step the largest error of a cached logit, relative to
            the largest logit, and the share of positions with the same likeliest token.
        constraint: a `Constraint` on this canvas, which the text has to match; None: anything goes.
        alternatives: how many tokens `likeliest` notes.
        shown: [R, T] the ids that the model reads, where a noise shows others than the mask in open
            slots; None: `ids`.
        edits: [R] decided tokens that were replaced.
        sight: what the prompts' images are; None: there are none.
    """

    ids: Tensor
    mask_token_id: int
    given: Tensor
    prompt: Tensor
    total: Tensor
    length: Tensor
    end_from: Tensor
    end_ids: Tensor
    start: Tensor
    end: Tensor
    step: Tensor
    logprob: Tensor
    forwards: Tensor
    front: list[int]
    over: list[bool]
    refused: list[list[int]]
    likeliest: list[dict[int, list[tuple[int, float]]]]
    unfinished: int
    drift: list[tuple[float, float]] = field(default_factory=list)
    constraint: Any = field(default=None, repr=False)
    alternatives: int = 0
    shown: Tensor | None = None
    edits: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sight: Sight | None = field(default=None, repr=False)

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        mask_token_id: int,
        *,
        max_new_tokens: int,
        grid: int = 1,
        end_ids: Sequence[int] = (),
        min_new_tokens: int = 0,
    ) -> Canvas:
        """Rows that continue prompts, or fill the masks in them.

        Args:
            prompts: token ids, at least one each; the first is not a mask.
            max_new_tokens: tokens after the prompt.
            grid: block length; the canvas is rounded up to whole blocks.
            end_ids: an answer is finished at the first of them before which all is decided.
        """
        for prompt in prompts:
            if not len(prompt) or prompt[0] == mask_token_id:
                raise ValueError("a row starts with a token: position 0 is never predicted")
        prompt = torch.tensor([len(ids) for ids in prompts])
        total = prompt + max_new_tokens
        filled = -(-total // grid) * grid
        ids = torch.full((len(prompts), int(filled.max())), mask_token_id)
        for row, values in enumerate(prompts):
            ids[row, : len(values)] = torch.as_tensor(values)
        given = ids != mask_token_id
        canvas = cls(
            ids=ids,
            mask_token_id=mask_token_id,
            given=given,
            prompt=prompt,
            total=total,
            # The rest of an answer's last block is decided with it, so that the answer does not
            # depend on where it is cut; a prompt whose gaps are filled has no answer.
            length=filled if max_new_tokens else total,
            end_from=prompt + min_new_tokens,  # a gap in the prompt is filled, not ended in
            end_ids=torch.tensor(list(end_ids), dtype=torch.long),
            start=torch.zeros_like(prompt),
            end=torch.full_like(prompt, -1),
            step=torch.zeros_like(ids),
            logprob=torch.zeros(ids.shape),
            forwards=torch.zeros_like(prompt),
            front=[0] * len(prompts),
            over=[False] * len(prompts),
            refused=[[] for _ in prompts],
            likeliest=[{} for _ in prompts],
            unfinished=len(prompts),
            edits=torch.zeros_like(prompt),
        )
        for row in range(len(prompts)):
            canvas._settle(row, None)
        return canvas

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(self.end_ids.tolist())

    @cached_property
    def held(self) -> bool:
        """Whether some positions to be written may not hold an end token."""
        early = torch.arange(self.ids.shape[1]) < self.end_from[:, None]
        return bool((early & ~self.given).any())

    @cached_property
    def last(self) -> list[int]:
        """`total` as integers."""
        return self.total.tolist()

    @cached_property
    def first(self) -> list[int]:
        """`end_from` as integers."""
        return self.end_from.tolist()

    @property
    def open(self) -> Tensor:
        """[R, T] bool, which tokens are undecided."""
        return self.ids == self.mask_token_id

    @property
    def read(self) -> Tensor:
        """[R, T] the ids that the model reads: decided tokens, the features of images, and what the
        noise shows in open slots; where that is vectors, their numbers in the flattened `shown`, as
        -1, -2, ..."""
        if self.sight is not None:
            ids = self.ids if self.shown is None else torch.where(self.open, self.shown, self.ids)
            return self.sight.put(ids)
        if self.shown is None:
            return self.ids
        shown = self.shown
        if shown.dim() == 3:
            shown = -1 - torch.arange(self.ids.numel()).view_as(self.ids)
        return torch.where(self.open, shown, self.ids)

    @property
    def done(self) -> Tensor:
        """[R] bool, which rows have a finished answer."""
        return self.end >= 0

    def new_ids(self, row: int) -> list[int]:
        """The answer in a row, including its end token; if unfinished, what has been decided."""
        end = int(self.end[row])
        return self.ids[row, int(self.prompt[row]) : end if end >= 0 else self.front[row]].tolist()

    def certain(self, row: int, revised: int | None) -> int:
        """How many tokens of a row are decided for good, without a gap.

        Args:
            revised: how many tokens before its block may still be masked again or replaced, beside
                those of the block (`Options.revised`); None: no token may.
        """
        if revised is None or self.end[row] >= 0:
            return self.front[row]
        return min(self.front[row], max(0, int(self.start[row]) - revised))

    def unread(self, size: int) -> Tensor:
        """[R] given tokens after a row's last gap that lie in later blocks, which a model with
        block attention does not read when it fills the gap."""
        place = torch.arange(self.ids.shape[1])
        gap = ~self.given & (place < self.prompt[:, None])
        last = torch.where(gap, place, -1).amax(1)
        later = self.given & (place // size > last[:, None] // size) & (last >= 0)[:, None]
        return later.sum(1)

    def leap(self, size: int) -> int:
        """The most tokens from a block with a mask in it to its row's next one."""
        masked = self.open
        masked &= torch.arange(self.ids.shape[1]) < self.length[:, None]
        starts = [row.nonzero()[:, 0] // size * size for row in masked]
        return max([size, *(int(s.diff().max()) for s in starts if len(s) > 1)])

    def advance(self, rows: Tensor, size: int) -> None:
        """Move `start` of rows on the grid to the first block with a mask in it.

        Args:
            rows: [K] int, which rows.
            size: block length.
        """
        masked = self.open[rows]
        masked &= torch.arange(self.ids.shape[1]) < self.length[rows, None]
        first = masked.int().argmax(1) // size * size
        self.start[rows] = torch.where(masked.any(1), first, self.start[rows])

    def write(
        self,
        rows: Tensor,
        positions: Tensor,
        tokens: Tensor,
        logprob: Tensor,
        finished: Finished | None = None,
    ) -> None:
        """Decide tokens, and find the answers that they finish.

        Args:
            rows, positions, tokens, logprob: [N].
            finished: more reasons to stop, asked for each new token once all before it are decided.
        """
        at = rows.numpy(), positions.numpy()
        self.ids.numpy()[at] = tokens.numpy()
        self.logprob.numpy()[at] = logprob.to(self.logprob.dtype).numpy()
        self.step.numpy()[at] = self.forwards.numpy()[at[0]]
        for row in set(rows.tolist()):
            self._settle(row, finished)

    def note(self, rows: Tensor, positions: Tensor, likeliest: Sequence[Tensor]) -> None:
        """Note the likeliest tokens in the places of decided ones.

        Args:
            rows, positions: [N]. likeliest: [N, A] ids, and their log-probabilities.
        """
        ids, logprobs = (x.tolist() for x in likeliest)
        for row, position, *pair in zip(
            rows.tolist(), positions.tolist(), ids, logprobs, strict=True
        ):
            self.likeliest[row][position] = [*zip(*pair, strict=True)]

    def count(self, rows: list[int]) -> None:
        """Count a forward for each of some rows."""
        if len(rows) == len(self.over):
            self.forwards += 1
        else:
            self.forwards[torch.tensor(rows, dtype=torch.long)] += 1

    def close(self, row: int) -> None:
        """Finish a row where it is, whatever stands there."""
        if not self.over[row]:
            self.end[row], self.over[row] = self.front[row], True
            self.unfinished -= 1

    def joined(self, other: Canvas) -> Canvas:
        """The rows of both, those of the other last, with what their texts have to match."""
        width = max(self.ids.shape[1], other.ids.shape[1])

        def cat(first: Any, second: Any, name: str) -> Any:
            if isinstance(first, list):
                return first + second
            if first is None:
                return None
            if first.dim() == 1:
                return torch.cat([first, second])
            fill = self.mask_token_id if name in ("ids", "shown") else 0
            return torch.cat(
                [
                    torch.nn.functional.pad(
                        x, (*[0] * 2 * (x.dim() - 2), 0, width - x.shape[1]), value=fill
                    )
                    for x in (first, second)
                ]
            )

        rows = {
            name: cat(getattr(self, name), getattr(other, name), name) for name in self._by_row()
        }
        both = Canvas(
            sight=joined(self.sight, len(self.over), other.sight, len(other.over)),
            mask_token_id=self.mask_token_id,
            end_ids=self.end_ids,
            unfinished=self.unfinished + other.unfinished,
            drift=[*self.drift, *other.drift],
            alternatives=max(self.alternatives, other.alternatives),
            **rows,
        )
        if self.constraint is not None:
            both.constraint = self.constraint.joined(other.constraint, both)
        return both

    def selected(self, rows: Sequence[int], grid: int = 1) -> Canvas:
        """Some of the rows, in this order, with what their texts have to match.

        Args:
            grid: block length; whole blocks are kept, also of rows that end within one.
        """
        at = torch.tensor(rows, dtype=torch.long)
        width = -(-int(self.length[at].max()) // grid) * grid

        def pick(values: Any) -> Any:
            if isinstance(values, list):
                return [values[row] for row in rows]
            if values is None:
                return None
            return values[at] if values.dim() == 1 else values[at, :width]

        picked = {name: pick(getattr(self, name)) for name in self._by_row()}
        some = Canvas(
            sight=None if self.sight is None else self.sight.selected(at),
            mask_token_id=self.mask_token_id,
            end_ids=self.end_ids,
            unfinished=picked["over"].count(False),
            drift=self.drift,
            alternatives=self.alternatives,
            **picked,
        )
        if self.constraint is not None:
            some.constraint = self.constraint.selected(rows, some)
        return some

    @staticmethod
    def _by_row() -> list[str]:
        """The attributes that hold something for each row."""
        shared = {"mask_token_id", "end_ids", "unfinished", "drift", "constraint", "alternatives"}
        return [f.name for f in fields(Canvas) if f.name not in shared | {"sight"}]

    def edit(
        self,
        rows: Tensor,
        positions: Tensor,
        tokens: Tensor,
        logprob: Tensor,
        finished: Finished | None = None,
    ) -> None:
        """Replace decided tokens; arguments as of `write`."""
        self.erase(rows, positions)
        self.edits.index_add_(0, rows, torch.ones_like(rows))
        self.write(rows, positions, tokens, logprob, finished)

    def erase(self, rows: Tensor, positions: Tensor) -> None:
        """Mask decided tokens again."""
        self.ids[rows, positions] = self.mask_token_id
        self.step[rows, positions] = 0
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            self.front[row] = min(self.front[row], position)

    def _settle(self, row: int, finished: Finished | None) -> None:
        """Move a row's front; the row is finished at the first end token that it passes, or where
        `finished` says so, or at `total`. The front of a finished row stays where it ends."""
        if self.over[row]:
            return
        front, total, first = self.front[row], self.last[row], self.first[row]
        over = False
        for token in self._known(row, front, total):
            if over:
                break
            front += 1
            over = front > first and (
                token in self.ends or bool(finished and finished(row, self.ids[row, :front]))
            )
        self.front[row] = front
        if over or front == total:
            self.end[row], self.over[row] = front, True
            self.unfinished -= 1

    def _known(self, row: int, start: int, stop: int) -> Iterator[int]:
        """The tokens of a row from a position on, up to the first that is undecided. They are read
        a few at a time, since most of a long answer is usually still undecided."""
        held = self.ids.numpy()[row]  # slices of a tensor take longer
        for first in range(start, stop, STRIDE):
            for token in held[first : min(first + STRIDE, stop)].tolist():
                if token == self.mask_token_id:
                    return
                yield token
