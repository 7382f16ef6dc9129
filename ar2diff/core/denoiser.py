"""Mode `diffusion`: read the blocks, choose tokens, decide some, move on.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .canvas import Canvas, Finished
from .decoder import Decoder
from .forward import rope_switches, without_gradients
from .head import UNKNOWN, head_of
from .options import Options
from .readers import BlockReader, FullReader
from .samplers import Chooser, Context, commits, left_to_right, likeliest, quota_of, top
from .spec import Spec
from .switching import SwitchingReader
from .transfer import download, upload


class Denoiser(Decoder):
    """Decodes the blocks of rows.

    Args:
        canvas: changed in place, until rows join or leave.
        finished: additional reasons to stop a row.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        canvas: Canvas,
        options: Options,
        chooser: Chooser,
        finished: Finished | None,
    ):
        self.canvas, self.options, self.chooser, self.finished = canvas, options, chooser, finished
        self.without_gradients = without_gradients(model, options.compile)
        self.head = head_of(model, spec)
        total = canvas.ids.shape[1]
        self.size = min(options.block_length or total, total)
        self.rows = torch.arange(len(canvas.ids))
        self.guided = 1 + (options.cfg_scale > 0)  # a second copy of each row without its prompt
        cache = options.cache_implementation
        self.reader = self._reader_for(model, spec, cache)
        self.checker = self._reader_for(model, spec, "none") if options.check_cache else None
        self.fixed_shape = cache == "static"
        # An approximate cache serves all steps of a block and is filled for all rows at once.
        self.together = cache in ("prefix", "dual")
        canvas.advance(self.rows, self.size)
        self.row, self.position = self._window()
        self.began = torch.zeros_like(canvas.prompt)  # forwards before the block
        self.masked = self._masked()  # [R, W] bool, what its forwards read
        self.to_decide = self.masked.sum(1)  # tokens that the block had to decide

    def _reader_for(
        self, model: Any, spec: Spec, cache: str
    ) -> BlockReader | FullReader | SwitchingReader:
        canvas, full = self.canvas, spec.attention == "full"
        length = canvas.length.repeat(self.guided)
        # A row may leap over blocks that are given, beside a far longer row.
        columns = canvas.ids.shape[1] + canvas.leap(self.size)

        def make(rows: Tensor) -> BlockReader | FullReader:
            if full:
                return FullReader(model, spec, length[rows], self.size, cache)
            return BlockReader(
                model, spec, len(rows), columns, self.size, cache, self.options.compile
            )

        if switches := rope_switches(model.config):
            return SwitchingReader(make, switches, self.size, length if full else None)
        return make(torch.arange(len(length)))

    def close(self) -> None:
        """See `Decoder`."""
        self.reader = self.checker = None

    @torch.no_grad()
    def step(self) -> None:
        """Forward all rows once, and decide tokens."""
        canvas, masked, count = self.canvas, self.masked, self.canvas.unfinished
        with self.without_gradients():
            logits = self._read(masked)
        canvas.forwards[self.rows] += masked.any(1)
        masked = masked ^ self._decide(logits, masked)
        if self.options.remask or canvas.unfinished < count or not masked.any(1).all():
            masked = self._next(masked)
        self.masked = masked

    @property
    def joins(self) -> bool:
        """Whether rows can join: all are read by one reader, whose cache is exact and grows."""
        kinds = BlockReader, FullReader
        alone = self.together or self.fixed_shape or self.guided > 1 or self.checker is not None
        return isinstance(self.reader, kinds) and not alone

    @property
    def resumes(self) -> bool:
        """Whether a row can begin with a context that was read before: its keys depend on the
        context alone."""
        return self.joins and isinstance(self.reader, BlockReader) and bool(self.reader.cache)

    def resume(self, contexts: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        """Begin with keys and values, by layer, of the first tokens of each row: of none, or of
        some before its block, but not of all; and of none in not every row."""
        self.reader.cache.fill(contexts)

    def context(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of what has been read of a row for good, by layer; none of a row that is
        not read any more."""
        rows = self.rows.tolist()
        return self.reader.cache.context(rows.index(row)) if row in rows else []

    def join(self, other: Denoiser) -> None:
        """Take the rows of another decoder with the same options behind one's own; both have made
        a forward."""
        first = self._extend(other)
        self.reader.join(other.reader)
        self.size = max(self.size, other.size)
        self.rows = torch.cat([self.rows, other.rows + first])
        self.began = torch.cat([self.began, other.began])
        self.to_decide = torch.cat([self.to_decide, other.to_decide])
        self.row, self.position = self._window()
        self.masked = self._masked()

    def select(self, rows: Sequence[int]) -> None:
        """Continue with some of the canvas's rows, which are not finished."""
        kept = torch.isin(self.rows, torch.tensor(rows)).nonzero()[:, 0]
        self._keep(kept)
        self._reduce(rows, self.size)
        self.began, self.to_decide = self.began[rows], self.to_decide[rows]
        self.rows = torch.arange(len(rows))
        self.row, self.position = self._window()
        self.masked = self._masked()

    def _window(self) -> tuple[Tensor, Tensor]:
        """[R, W] the row (of the canvas) and the position of each token of the blocks."""
        position = self.canvas.start[self.rows, None] + torch.arange(self.size)
        return self.rows[:, None].expand_as(position), position

    def _masked(self) -> Tensor:
        """[R, W] undecided tokens of the blocks of unfinished rows."""
        canvas = self.canvas
        inside = (self.position < canvas.length[self.rows, None]) & ~canvas.done[self.rows, None]
        position = self.position.clamp(max=canvas.ids.shape[1] - 1)
        return inside & (canvas.ids[self.row, position] == canvas.mask_token_id)

    def _read(self, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, with guidance if the options ask for it."""
        canvas, ids = self.canvas, self.canvas.ids[self.rows]
        start = canvas.start[self.rows]
        if self.guided == 2:
            prompt = canvas.given[self.rows] & (torch.arange(ids.shape[1]) > 0)
            ids = torch.cat([ids, ids.masked_fill(prompt, canvas.mask_token_id)])
            start, masked = start.repeat(2), masked.repeat(2, 1)
        logits = self.reader.read(ids, start, masked)
        if self.checker is not None:
            exact = self.checker.read(ids, start, masked)
            error = (logits - exact).abs().max() / exact.abs().max()
            same = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
            canvas.drift.append(tuple(map(float, download(error, same))))
        if self.guided == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (1 + self.options.cfg_scale) * (conditional - unconditional)

    def _decide(self, logits: Tensor, masked: Tensor) -> Tensor:
        """Choose tokens, and write those that are sure enough. Returns which ones, [R, W] bool."""
        canvas, options, rows = self.canvas, self.options, self.rows
        row, position = self.row[masked], self.position[masked]
        given = {}  # what the device has to know of the canvas
        if self.head is not None:
            given["before"] = self._before(row, position)
        if self.chooser.readers:
            given["ids"], given["position"] = canvas.ids[row], position
        drawn = None if options.greedy else self.chooser.uniform(row)
        if drawn is not None and canvas.constraint is None:  # which draws on the host
            given["u"] = drawn
        if given:
            given = dict(zip(given, upload(logits.device, *given.values()), strict=True))
        u = given.get("u", drawn)
        context = Context(given["ids"], given["position"]) if self.chooser.readers else None
        no_end = position < canvas.end_from[row] if canvas.held else None
        plain = logits = self.chooser.possible(logits, no_end, canvas.end_ids)
        if self.head is not None:
            logits = logits + self.head(given["before"]).to(logits)
        if canvas.constraint is not None:
            choice, given_fit = canvas.constraint.choose(
                self.chooser, self.row, self.position, masked, logits, context, u
            )
        else:
            choice = given_fit = self.chooser.pick(logits, u, context)
            if self.head is None:
                choice = given_fit = choice.on_host()
        quota = None
        if options.steps_per_block is not None:
            left = masked.sum(1)
            taken = canvas.forwards[rows] - self.began[rows] - 1
            quota = quota_of(self.to_decide[rows], options.steps_per_block, taken, left)
        commit = commits(options, given_fit, masked, quota, self.chooser, rows)
        if self.head is not None and canvas.constraint is None:  # else tokens are those of a path
            choice, commit = left_to_right(
                self.head, self.chooser, logits, u, context, choice, masked, commit
            )
            tokens, logprob, commit = download(choice.tokens, choice.logprob, commit)
            choice = replace(choice, tokens=tokens, logprob=logprob)
        now = commit[masked]
        canvas.write(
            row[now], position[now], choice.tokens[now], choice.logprob[now], self.finished
        )
        if canvas.alternatives:
            self._note(plain, row, position, now)
        return commit

    def _note(self, logits: Tensor, row: Tensor, position: Tensor, now: Tensor) -> None:
        """Note the likeliest tokens at the positions decided now, after what was decided there.

        Args:
            logits: [N, V] without a head's bias. now: [N] bool.
        """
        row, position = row[now], position[now]
        (at,) = upload(logits.device, now.nonzero()[:, 0])
        logits = logits[at]
        if self.head is not None:
            (before,) = upload(logits.device, self._before(row, position))
            logits = logits + self.head(before).to(logits)
        self.canvas.note(row, position, download(*likeliest(logits, self.canvas.alternatives)))

    def _before(self, row: Tensor, position: Tensor) -> Tensor:
        """[N] the tokens to the left of positions, `UNKNOWN` where undecided."""
        before = self.canvas.ids[row, position - 1]
        return before.masked_fill(before == self.canvas.mask_token_id, UNKNOWN)

    def _next(self, masked: Tensor) -> Tensor:
        """Which tokens to decide next, [R, W] bool: a row whose block is decided moves to another
        block, and finished rows are dropped once they are half of the batch."""
        canvas, options = self.canvas, self.options
        left = ~canvas.done[self.rows]
        masked = masked & left[:, None]
        ready = left & ~masked.any(1)
        if options.remask:
            masked = masked | self._give_back(left & ~ready)
        if self.together and masked.any():
            ready = torch.zeros_like(ready)
        if ready.any():
            rows = self.rows[ready]
            canvas.advance(rows, self.size)
            self.row, self.position = self._window()
            self.began[rows] = canvas.forwards[rows]
            masked[ready] = self._masked()[ready]
            self.to_decide[rows] = masked[ready].sum(1)
        count, keep = len(left), left.nonzero()[:, 0]
        if not self.fixed_shape and 0 < 2 * len(keep) <= count:
            self._keep(keep)
            masked = masked[keep]
        return masked

    def _keep(self, lines: Tensor) -> None:
        """Read some of the rows from now on."""
        count = len(self.rows)
        if len(lines) == count:
            return
        readers = (self.reader, self.checker) if self.checker else (self.reader,)
        for reader in readers:
            reader.select(torch.cat([lines + i * count for i in range(self.guided)]))
        self.rows = self.rows[lines]
        self.row, self.position = self._window()

    def _give_back(self, open_: Tensor) -> Tensor:
        """Mask a share of the block's decided tokens again, the least sure ones, at every step but
        the last (ReMDM, Wang et al. 2025, confidence-based).

        Args:
            open_: [R] bool, rows whose block has more tokens to decide.

        Returns:
            [R, W] bool, which tokens.
        """
        canvas, rows = self.canvas, self.rows
        at = (self.row, self.position.clamp(max=canvas.ids.shape[1] - 1))
        decided = (canvas.ids[at] != canvas.mask_token_id) & ~canvas.given[at]
        decided &= self.position < canvas.length[rows, None]
        taken = canvas.forwards[rows] - self.began[rows]
        decided &= (open_ & (taken < self.options.steps_per_block))[:, None]
        back = top(-canvas.logprob[at], decided, (self.options.remask * decided.sum(1)).long())
        canvas.erase(self.row[back], self.position[back])
        return back
