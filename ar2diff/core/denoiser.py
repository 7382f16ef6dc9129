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
from .forward import rope_switches, showing, without_gradients
from .guidance import Guidance, Texts
from .head import UNKNOWN, head_of
from .options import Options
from .readers import BlockReader, FullReader
from .samplers import (
    Choice,
    Chooser,
    Context,
    commits,
    left_to_right,
    likeliest,
    quota_of,
    spread,
    surer,
    top,
)
from .sight import looking
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
        self.model, self.without_gradients = model, without_gradients(model, options.compile)
        self.head = head_of(model, spec)
        total = canvas.ids.shape[1]
        self.size = min(options.block_length or total, total)
        self.before = self.size * options.edit_blocks  # tokens before the block that are read anew
        self.rows = torch.arange(len(canvas.ids))
        self.noise = spec.noise
        if self.noise.visible:
            suppressed = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
            suppressed[chooser.suppressed.cpu()] = True
            self.noise = self.noise.on(spec.mask_token_id, suppressed)
            if canvas.shown is None:
                canvas.shown = self.noise.blank(canvas.ids)
        self.guidance = None
        if options.classifier is not None:
            self.guidance = Guidance(options.classifier, options.fluency, options.classifier_steps)
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
        self.corrected = torch.zeros_like(canvas.prompt)  # forwards since it was decided
        self.edited = torch.zeros(len(self.rows), dtype=torch.bool)  # rows, at the last forward
        self.masked = self._masked()  # [R, W] bool, what its forwards read
        self.to_decide = self.masked.sum(1)  # tokens that the block had to decide
        self._begin(self.masked)

    def _reader_for(
        self, model: Any, spec: Spec, cache: str
    ) -> BlockReader | FullReader | SwitchingReader:
        canvas, full = self.canvas, spec.attention == "full"
        length = canvas.length.repeat(self.guided)
        # A row may leap over blocks that are given, beside a far longer row.
        columns = canvas.ids.shape[1] + canvas.leap(self.size) + self.before
        reach = self.size + self.before

        def make(rows: Tensor) -> BlockReader | FullReader:
            if full:
                return FullReader(model, spec, length[rows], self.size, cache)
            return BlockReader(
                model, spec, len(rows), columns, reach, self.size, cache, self.options.compile,
                None if canvas.sight is None else canvas.sight.reach(rows % len(canvas.ids)),
            )  # fmt: skip

        if switches := rope_switches(model.config):
            return SwitchingReader(make, switches, reach, length if full else None)
        return make(torch.arange(len(length)))

    def close(self) -> None:
        """See `Decoder`."""
        self.model = self.reader = self.checker = None

    @torch.no_grad()
    def step(self) -> None:
        """Forward all rows once, and decide tokens."""
        canvas, masked, count = self.canvas, self.masked, self.canvas.unfinished
        revised = self._revisable() if self.options.edit_threshold is not None else None
        wanted = masked if revised is None else masked | revised
        with self.without_gradients():
            logits = self._read(wanted)
        canvas.forwards[self.rows] += wanted.any(1)
        if revised is not None:
            logits = self._edit(logits, wanted, revised)
        if len(logits):
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
        self.corrected = torch.cat([self.corrected, other.corrected])
        self.to_decide = torch.cat([self.to_decide, other.to_decide])
        self.row, self.position = self._window()
        self.masked = self._masked()

    def select(self, rows: Sequence[int]) -> None:
        """Continue with some of the canvas's rows, which are not finished."""
        kept = torch.isin(self.rows, torch.tensor(rows)).nonzero()[:, 0]
        self._keep(kept)
        self._reduce(rows, self.size)
        self.began, self.to_decide = self.began[rows], self.to_decide[rows]
        self.corrected = self.corrected[rows]
        self.rows = torch.arange(len(rows))
        self.row, self.position = self._window()
        self.masked = self._masked()

    def _window(self) -> tuple[Tensor, Tensor]:
        """[R, W] the row (of the canvas) and the position of each token of the blocks, and of those
        before them that may be edited."""
        position = self._first()[:, None] + torch.arange(self.before + self.size)
        return self.rows[:, None].expand_as(position), position

    def _first(self) -> Tensor:
        """[R] the first position that is read as noise, of each row."""
        return (self.canvas.start[self.rows] - self.before).clamp(min=0)

    def _masked(self) -> Tensor:
        """[R, W] undecided tokens of the blocks of unfinished rows."""
        canvas = self.canvas
        end = torch.minimum(canvas.length, canvas.start + self.size)[self.rows, None]
        inside = (self.position < end) & ~canvas.done[self.rows, None]
        position = self.position.clamp(max=canvas.ids.shape[1] - 1)
        return inside & (canvas.ids[self.row, position] == canvas.mask_token_id)

    def _read(self, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, with guidance if the options ask for it."""
        canvas, ids = self.canvas, self.canvas.read[self.rows]
        start = self._first()
        if self.before:  # at a row's beginning, the slots read end behind its first block
            ids = torch.nn.functional.pad(ids, (0, self.before), value=canvas.mask_token_id)
        if self.guided == 2:
            prompt = canvas.given[self.rows] & (torch.arange(canvas.ids.shape[1]) > 0)
            prompt = torch.nn.functional.pad(prompt, (0, self.before))
            null = ids.masked_fill(prompt, canvas.mask_token_id)
            ids = torch.cat([ids, torch.where(null < 0, null - canvas.ids.numel(), null)])
            start, masked = start.repeat(2), masked.repeat(2, 1)
        rows = self.rows.repeat(self.guided)
        with showing(self.model, self._vectors()), looking(canvas.sight, rows):
            logits = self.reader.read(ids, start, masked)
            if self.checker is not None:
                exact = self.checker.read(ids, start, masked)
        if self.checker is not None:
            error = (logits - exact).abs().max() / exact.abs().max()
            same = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
            canvas.drift.append(tuple(map(float, download(error, same))))
        if self.guided == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (1 + self.options.cfg_scale) * (conditional - unconditional)

    def _vectors(self) -> Tensor | None:
        """[R * T, H] the embeddings of what open slots show, and, with guidance, again of what they
        show in the copies without a prompt, which know no guesses either (SED, Strudel et al.
        2022); None where they show ids."""
        if not self.noise.vectors:
            return None
        shown = self.canvas.shown.flatten(0, 1)
        if self.guided > 1:
            none = torch.zeros(len(shown), dtype=torch.long)
            shown = torch.cat([shown, self.noise.with_guesses(shown, none, none > 0)])
        like = self.model.get_input_embeddings().weight
        return upload(like.device, self.noise.embedded(shown).to(like.dtype))[0]

    def _decide(self, logits: Tensor, masked: Tensor) -> Tensor:
        """Choose tokens, and write those that are sure enough. Returns which ones, [R, W] bool."""
        canvas, options = self.canvas, self.options
        row, position = self.row[masked], self.position[masked]
        given = {}  # what the device has to know of the canvas
        if self.head is not None:
            given["before"] = self._before(row, position)
        if self.chooser.readers:
            given["ids"], given["position"] = canvas.ids[row], position
        evidence = None
        if self.noise.visible:
            shown, (t, s) = canvas.shown[row, position], self._times(row)
            evidence = self.noise.added(shown, t)
        if evidence is not None:
            given["shown"], given["evidence"] = evidence.tensors
        drawn = None if options.greedy else self.chooser.uniform(row)
        if drawn is not None and canvas.constraint is None:  # which draws on the host
            given["u"] = drawn
        if given:
            given = dict(zip(given, upload(logits.device, *given.values()), strict=True))
        u = given.get("u", drawn)
        context = Context(given["ids"], given["position"]) if self.chooser.readers else None
        no_end = position < canvas.end_from[row] if canvas.held else None
        logits = others = self.chooser.possible(logits, no_end, canvas.end_ids)
        if evidence is not None:
            evidence = evidence.on(given["shown"], given["evidence"])
            logits = evidence.add_(logits.clone())
        plain = logits
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
        commit = self._commits(given_fit, masked)
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
        if self.noise.visible:
            u = self.chooser.uniform(row) if self.noise.random else t
            after = self.noise.step(shown, choice.tokens, t, s, u)
            if self.guidance is not None:
                after = self._guide(others, shown, t, s, after, row, position)
            canvas.shown[row, position] = after
        return commit

    def _guide(
        self, logits: Tensor, x: Tensor, t: Tensor, s: Tensor, after: Tensor, row: Tensor,
        position: Tensor,
    ) -> Tensor:  # fmt: skip
        """What slots show at times s [N], moved by the classifier where they stay open; arguments
        as of `Guidance.moved`."""
        left = (s > 0).nonzero()[:, 0]
        if not len(left):
            return after
        texts = Texts.of(self.canvas, row[left], position[left], logits)
        (at,) = upload(logits.device, left)
        own = (y[left] for y in (x, t, s, after))
        return after.index_copy(0, left, self.guidance.moved(self.noise, logits[at], *own, texts))

    def _commits(self, choice: Choice, masked: Tensor) -> Tensor:
        """The positions to decide now, [R, W] bool: those that the options choose, or, in a noise
        of which nobody knows the right tokens, all of them at a block's last step."""
        canvas, rows, steps = self.canvas, self.rows, self.options.steps_per_block
        taken = canvas.forwards[rows] - self.began[rows] - 1
        if self.noise.free:
            return masked & (taken + 1 >= steps)[:, None]
        quota = None
        if steps is not None:
            quota = quota_of(self.to_decide[rows], steps, taken, masked.sum(1))
        return commits(self.options, choice, masked, quota, self.chooser, rows)

    def _times(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """[N] double, the times of the state that was read in rows of the canvas and of the next
        one: a free noise takes equal steps from 1 to 0."""
        if not self.noise.free:
            return torch.ones(len(row), dtype=torch.double), torch.ones(len(row))
        taken = (self.canvas.forwards - self.began)[row].double() - 1
        steps = self.options.steps_per_block
        return 1 - taken / steps, (1 - (taken + 1) / steps).clamp(min=0)

    def _begin(self, masked: Tensor) -> None:
        """Show the prior in the open slots [R, W] of blocks that begin."""
        if self.noise.visible and masked.any():
            row, position = self.row[masked], self.position[masked]
            u = self.chooser.uniform(row) if self.noise.random else row.double()
            self.canvas.shown[row, position] = self.noise.state(self.noise.prior(u))

    def _revisable(self) -> Tensor:
        """[R, W] tokens that unfinished rows decided, and may replace or mask again."""
        canvas = self.canvas
        inside = (self.position < canvas.length[self.rows, None]) & ~canvas.done[self.rows, None]
        at = self.row, self.position.clamp(max=canvas.ids.shape[1] - 1)
        return inside & ~canvas.open[at] & ~canvas.given[at]

    def _edit(self, logits: Tensor, wanted: Tensor, revised: Tensor) -> Tensor:
        """Replace decided tokens of which another is surer than the threshold (LLaDA 2.1), and
        return the logits [N, V] of the masked ones.

        Args:
            logits: of the `wanted` [R, W]; of those, the `revised` are decided.
        """
        canvas, threshold = self.canvas, self.options.edit_threshold
        decided = revised[wanted]
        row, position = self.row[revised], self.position[revised]
        here, rest = upload(logits.device, decided.nonzero()[:, 0], (~decided).nonzero()[:, 0])
        self.edited = torch.zeros(len(self.rows), dtype=torch.bool)
        if len(row):
            no_end = position < canvas.end_from[row] if canvas.held else None
            own = plain = self.chooser.possible(logits[here], no_end, canvas.end_ids)
            if self.head is not None:
                (before,) = upload(own.device, self._before(row, position))
                own = own + self.head(before).to(own)
            context = None
            if self.chooser.readers:  # which read a position that is chosen as undecided
                ids = canvas.ids[row].scatter(1, position[:, None], canvas.mask_token_id)
                context = Context(ids, position)
            choice = self.chooser.pick(own, None, context).on_host()
            now = choice.tokens != canvas.ids[row, position]
            now &= surer(choice.logprob, threshold)
            self.edited = spread(now, revised).any(1)
            found = choice.tokens[now], choice.logprob[now]
            canvas.edit(row[now], position[now], *found, self.finished)
            if canvas.alternatives:
                self._note(plain, row, position, now)
        return logits[rest]

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
        if options.corrector_steps:
            ready &= ~self._corrects(ready)
        if ready.any():
            rows = self.rows[ready]
            canvas.advance(rows, self.size)
            self.row, self.position = self._window()
            self.began[rows] = canvas.forwards[rows]
            masked[ready] = self._masked()[ready]
            self.to_decide[rows] = masked[ready].sum(1)
            self._begin(masked & ready[:, None])
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

    def _corrects(self, ready: Tensor) -> Tensor:
        """[R] bool, which of the rows whose block is decided have it read again: up to
        `corrector_steps` times, as long as that replaces tokens."""
        done = self.corrected[self.rows]
        again = ready & (done < self.options.corrector_steps) & ((done == 0) | self.edited)
        self.corrected[self.rows] = torch.where(again, done + 1, 0 * done)
        return again

    def _give_back(self, open_: Tensor) -> Tensor:
        """Mask a share of the block's decided tokens again, the least sure ones, at every step but
        the last (ReMDM, Wang et al. 2025, confidence-based).

        Args:
            open_: [R] bool, rows whose block has more tokens to decide.

        Returns:
            [R, W] bool, which tokens.
        """
        canvas, rows, decided = self.canvas, self.rows, self._revisable()
        at = (self.row, self.position.clamp(max=canvas.ids.shape[1] - 1))
        taken = canvas.forwards[rows] - self.began[rows]
        decided &= (open_ & (taken < self.options.steps_per_block))[:, None]
        back = top(-canvas.logprob[at], decided, (self.options.remask * decided.sum(1)).long())
        canvas.erase(self.row[back], self.position[back])
        return back
