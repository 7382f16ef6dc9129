"""The decoding loop: `denoise` decides all tokens of a canvas and yields its state as it goes.

Everything that decodes uses it: the command line, chat, rollouts, the code in a converted folder.
A state is the canvas after a forward, so that a screen can draw each one.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from .canvas import Canvas, Finished
from .compiled import check_compiles
from .draft import Draft
from .errors import Ar2DiffError, option
from .forward import rope_switches, without_gradients
from .guide import guided
from .head import UNKNOWN, head_of
from .options import Options
from .pace import Pace
from .readers import BlockReader, FullReader
from .samplers import Chooser, Context, commits, left_to_right, quota_of, top
from .seeds import keyed_generator
from .spec import Spec
from .speculation import Speculation, measured_pace
from .switching import SwitchingReader
from .transfer import download, upload

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
    draft: Draft | None = None,
) -> Iterator[Canvas]:
    """Decide all tokens of a canvas, yielding it after every forward.

    Args:
        model: in eval mode.
        canvas: from `canvas_of`; changed in place.
        options: from `resolve`.
        processors: additional processors of transformers that look at each position alone.
        finished: additional reasons to stop a row, from `finished_of`.
        draft: the draft adapter, if the model has one; `spec` is then that of `spec_for`.

    Raises:
        Ar2DiffError: the options leave no token to write, or name one that the model lacks; the
            diffusion head that the spec names is not there.
    """
    rows = model.config.get_text_config().vocab_size
    impossible = {i for i in (spec.mask_token_id, *options.suppress_tokens) if 0 <= i < rows}
    if len(impossible | (canvas.ends if canvas.held else set())) >= rows:
        raise Ar2DiffError(
            f"{option('suppress_tokens')} and {option('eos_token_id')} together leave no token "
            "that could be written",
            f"remove tokens from {option('suppress_tokens')}",
        )
    if any(token >= rows for (token,) in options.sequence_bias or ()):
        raise Ar2DiffError(
            f"{option('sequence_bias')} or {option('logit_bias')} names a token id that is out of "
            f"range for the model, which has {rows} tokens",
            "use ids of its tokenizer",
        )
    if options.compile:
        check_compiles(model)
    suppressed = torch.tensor(sorted(impossible), dtype=torch.long)
    readers = _readers(options)
    chooser = Chooser(
        options,
        *upload(model.device, suppressed),
        _generators(canvas, options),
        [*_warpers(options, readers, model.device), *processors],
        readers,
    )
    if options.mode != "diffusion":
        yield from Speculation(
            model, spec, canvas, chooser, _pace(model, spec, canvas, chooser, draft),
            draft=draft, cache=options.cache_implementation, finished=finished,
        ).run()  # fmt: skip
        return
    yield from _Denoiser(model, spec, canvas, options, chooser, finished).run()


def _pace(model: Any, spec: Spec, canvas: Canvas, chooser: Chooser, draft: Draft | None) -> Pace:
    """How many tokens the options ask to draft; if they do not say, as many as pay."""
    options = chooser.options
    if options.mode == "ar" or spec.block_length == 1:
        return Pace(0)
    if options.draft_length is None and options.draft_nodes is None:
        return measured_pace(model, spec, canvas, chooser.suppressed, draft)
    return Pace(options.draft_length or spec.block_length - 1, options.draft_nodes)


class _Denoiser:
    """The loop of mode `diffusion`: read the blocks, choose tokens, decide some, move on."""

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
        self.to_decide = self._masked().sum(1)  # tokens that the block had to decide

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

    def run(self) -> Iterator[Canvas]:
        canvas = self.canvas
        masked = self._masked()
        while count := canvas.unfinished:
            with self.without_gradients():
                logits = self._read(masked)
            canvas.forwards[self.rows] += masked.any(1)
            masked = masked ^ self._decide(logits, masked)
            if self.options.remask or canvas.unfinished < count or not masked.any(1).all():
                masked = self._next(masked)
            yield canvas

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
        logits = self.chooser.possible(logits, no_end, canvas.end_ids)
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
        return commit

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
            rows = torch.cat([keep + i * count for i in range(self.guided)])
            for reader in (self.reader, self.checker) if self.checker else (self.reader,):
                reader.select(rows)
            self.rows, masked = self.rows[keep], masked[keep]
            self.row, self.position = self._window()
        return masked

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


def _generators(canvas: Canvas, options: Options) -> list[torch.Generator]:
    """One for each row, keyed by the seed, the prompt, and the number of earlier rows with the same
    prompt: a row's draws do not depend on its batch, and equal prompts get different ones."""
    rows = len(canvas.ids)
    if options.greedy and options.order != "random":
        return []
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # torch.manual_seed governs it
    if isinstance(seed, tuple):
        if len(seed) != rows:
            raise Ar2DiffError(
                f"{option('seed')} is a list of {len(seed)}, but there are {rows} rows",
                "use one seed, or a list with one for each row",
            )
        return [keyed_generator(s) for s in seed]
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for row in range(rows):
        prompt = tuple(canvas.ids[row, : int(canvas.prompt[row])].tolist())
        generators.append(keyed_generator(seed, seen[prompt], *prompt))
        seen[prompt] += 1
    return generators


def _warpers(options: Options, readers: Sequence[Any], device: Any) -> list[Any]:
    """The processors that the options ask for, in the order of transformers; a guide follows the
    penalty."""
    warpers: list[Any] = []
    if options.sequence_bias:
        warpers.append(logits_process.SequenceBiasLogitsProcessor(options.sequence_bias))
    warpers += readers
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


def _readers(options: Options) -> list[Callable[[Context, Tensor], Tensor]]:
    """Those of the processors that look at what stands around a position."""
    readers: list[Callable[[Context, Tensor], Tensor]] = []
    if options.repetition_penalty != 1:
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
        readers.append(lambda context, scores: penalty(context.ids, scores))
    if options.guide is not None:
        readers.append(partial(guided, options.guide))
    return readers
