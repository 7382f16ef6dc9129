"""The decoding loop: `denoise` decides all tokens of a canvas, an iterator of states.

Everything that decodes goes through it: the command line, chat, evaluation, rollouts, a converted
folder. A state is the canvas after a forward, so that a screen can draw each one.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from .canvas import Canvas, Finished
from .errors import Ar2DiffError
from .forward import context_length
from .options import Options
from .readers import BlockReader, FullReader
from .samplers import Choice, Chooser, commits, quota_of, spread, top
from .seeds import keyed_generator
from .spec import Spec
from .speculation import speculate

FILTERS = {
    "top_h": logits_process.TopHLogitsWarper, "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper, "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
}  # fmt: skip


@torch.no_grad()
def denoise(
    model: Any,
    spec: Spec,
    canvas: Canvas,
    options: Options,
    *,
    processors: Sequence[Any] = (),
    finished: Finished | None = None,
) -> Iterator[Canvas]:
    """Decide all tokens of a canvas, yielding it after every forward.

    Args:
        model: in eval mode.
        canvas: of `canvas_of`; changed in place.
        options: of `resolve`.
        processors: more row-wise processors of transformers.
        finished: more reasons to stop a row.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    suppressed = torch.zeros(rows, dtype=torch.bool)
    impossible = {spec.mask_token_id, *options.suppress_tokens}
    suppressed[[i for i in impossible if i < rows]] = True
    chooser = Chooser(
        options,
        suppressed.to(model.device),
        _generators(canvas, options),
        [*_warpers(options, model.device), *processors],
        _penalty(options),
    )
    if options.mode != "diffusion":
        drafts = 0 if options.mode == "ar" else options.draft_length or spec.block_length - 1
        yield from speculate(
            model, spec, canvas, chooser, drafts=drafts, cache=options.cache_implementation,
            context=context_length(model.config), finished=finished,
        )  # fmt: skip
        return
    yield from _Denoiser(model, spec, canvas, options, chooser, finished).run()


class _Denoiser:
    """The loop of mode `diffusion`: read the blocks, choose, decide, move on."""

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
        total = canvas.ids.shape[1]
        self.size = options.block_length or total
        self.rows = torch.arange(len(canvas.ids))
        self.guided = 1 + (options.cfg_scale > 0)  # a second copy of each row without its prompt
        count, cache = self.guided * len(self.rows), options.cache_implementation
        self.reader: BlockReader | FullReader
        if spec.attention == "full":
            length = canvas.length.repeat(self.guided)
            self.reader = FullReader(model, spec, length, self.size, cache)
        else:
            self.reader = BlockReader(model, spec, count, total, self.size, cache)
        self.fixed_shape = cache == "static"
        # A cached context that is shared by a block's steps must be filled for all rows at once.
        self.together = cache in ("prefix", "dual")
        canvas.advance(self.rows, self.size)
        self.taken = torch.zeros_like(canvas.prompt)  # steps taken in the block
        self.to_decide = self._masked(self.rows).sum(1)  # tokens that the block had to decide

    def run(self) -> Iterator[Canvas]:
        canvas = self.canvas
        while not canvas.done.all():
            masked = self._masked(self.rows) & ~canvas.done[self.rows, None]
            logits = self._read(masked)
            active = masked.any(1)
            canvas.forwards[self.rows[active]] += 1
            self._decide(logits, masked)
            self.taken[self.rows[active]] += 1
            self._advance()
            yield canvas
            self._shrink()

    def _masked(self, rows: Tensor) -> Tensor:
        """[R, W] undecided tokens of each row's block."""
        window = self._window(rows)
        inside = window < self.canvas.length[rows, None]
        window = window.clamp(max=self.canvas.ids.shape[1] - 1)
        return inside & (self.canvas.ids[rows[:, None], window] == self.canvas.mask_token_id)

    def _window(self, rows: Tensor) -> Tensor:
        return self.canvas.start[rows, None] + torch.arange(self.size)

    def _read(self, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, guided where asked for."""
        canvas, ids = self.canvas, self.canvas.ids[self.rows]
        start = canvas.start[self.rows]
        if self.guided == 1:
            return self.reader.read(ids, start, masked)
        prompt = canvas.given[self.rows] & (torch.arange(ids.shape[1]) > 0)
        blank = ids.masked_fill(prompt, canvas.mask_token_id)
        both = self.reader.read(torch.cat([ids, blank]), start.repeat(2), masked.repeat(2, 1))
        conditional, unconditional = both.chunk(2)
        return unconditional + (1 + self.options.cfg_scale) * (conditional - unconditional)

    def _decide(self, logits: Tensor, masked: Tensor) -> None:
        canvas, options, rows = self.canvas, self.options, self.rows
        row, place = masked.nonzero(as_tuple=True)
        position = canvas.start[rows[row]] + place
        no_end = position < canvas.end_from[rows[row]]
        logits = self.chooser.possible(logits, no_end, canvas.end_ids)
        context = canvas.ids[rows[row]] if self.chooser.penalty is not None else None
        choice = self.chooser.choose(logits, rows[row], context)
        quota = None
        if options.steps is not None:
            left = masked.sum(1)
            quota = quota_of(self.to_decide[rows], options.steps, self.taken[rows], left)
        commit = commits(options, choice, masked, quota, self.chooser, rows)
        self._write(commit, choice, masked)
        if options.remask:
            self._give_back()

    def _write(self, commit: Tensor, choice: Choice, masked: Tensor) -> None:
        row, place = commit.nonzero(as_tuple=True)
        rows = self.rows[row]
        self.canvas.write(
            rows,
            self.canvas.start[rows] + place,
            spread(choice.tokens, masked)[commit],
            spread(choice.logprob, masked)[commit],
            self.finished,
        )

    def _give_back(self) -> None:
        """Mask a share of the block's decided tokens again, the least sure ones (ReMDM, Wang et al.
        2025, confidence-based), but in the last step and in finished rows."""
        canvas, rows = self.canvas, self.rows
        window = self._window(rows).clamp(max=canvas.ids.shape[1] - 1)
        at = (rows[:, None], window)
        decided = (canvas.ids[at] != canvas.mask_token_id) & ~canvas.given[at]
        decided &= self._window(rows) < canvas.length[rows, None]
        open_ = (self.taken[rows] + 1 < self.options.steps) & ~canvas.done[rows]
        open_ &= self._masked(rows).any(1)
        decided &= open_[:, None]
        count = (self.options.remask * decided.sum(1)).long()
        back = top(-canvas.logprob[at], decided, count)
        row, _ = back.nonzero(as_tuple=True)
        canvas.erase(rows[row], window[back])

    def _advance(self) -> None:
        """Rows whose block is decided go to the next one."""
        ready = ~self._masked(self.rows).any(1) & ~self.canvas.done[self.rows]
        if self.together and not bool((ready | self.canvas.done[self.rows]).all()):
            return
        rows = self.rows[ready]
        if len(rows):
            self.canvas.advance(rows, self.size)
            self.taken[rows] = 0
            self.to_decide[rows] = self._masked(rows).sum(1)

    def _shrink(self) -> None:
        """Leave finished rows out once they are half of the batch."""
        left = (~self.canvas.done[self.rows]).nonzero()[:, 0]
        if self.fixed_shape or not len(left) or 2 * len(left) > len(self.rows):
            return
        count = len(self.rows)
        self.reader.select(torch.cat([left + i * count for i in range(self.guided)]))
        self.rows = self.rows[left]


def _generators(canvas: Canvas, options: Options) -> list[torch.Generator]:
    """One for each row: a function of the seed, the prompt, and how many rows before have the same
    prompt; so a row's draws do not depend on its batch, and equal prompts get different ones."""
    rows = len(canvas.ids)
    if options.greedy and options.order != "random":
        return []
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # torch.manual_seed governs it
    if isinstance(seed, tuple):
        if len(seed) != rows:
            raise Ar2DiffError(
                f"generate: {len(seed)} seeds for {rows} rows", "give one seed, or one for each row"
            )
        return [keyed_generator(s) for s in seed]
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for row in range(rows):
        prompt = tuple(canvas.ids[row, : int(canvas.prompt[row])].tolist())
        generators.append(keyed_generator(seed, seen[prompt], *prompt))
        seen[prompt] += 1
    return generators


def _warpers(options: Options, device: Any) -> list[Any]:
    warpers: list[Any] = []
    if options.sequence_bias:
        warpers.append(logits_process.SequenceBiasLogitsProcessor(options.sequence_bias))
    if options.greedy:
        return warpers
    if options.temperature != 1:
        warpers.append(logits_process.TemperatureLogitsWarper(options.temperature))
    for name, value in options.filters:
        if name == "eta_cutoff":
            warpers.append(logits_process.EtaLogitsWarper(value, device=str(device)))
        else:
            warpers.append(FILTERS[name](value))
    return warpers


def _penalty(options: Options) -> Any:
    if options.repetition_penalty == 1:
        return None
    return logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
