"""The data of `adapt`: documents -> parts on the grid -> packed rows -> noised batches.

The rows are one endless stream that depends only on sources, tokenizer and recipe, and the noise of
a part depends only on seed, epoch and its ids. Batch size, number of ranks, gradient accumulation
and resuming therefore change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..config.recipe import Recipe
from ..config.sections import Edits
from ..core.attention import PADDING, reading_slot, reveal_edges
from ..core.errors import Ar2DiffError, option
from ..core.noise import Noise
from ..core.seeds import content_key, keyed_generator
from ..diffusion.corruption import (
    Law,
    block_times,
    corrupt,
    given_spans,
    holds,
    importance,
    replaced,
)
from ..diffusion.objective import cart_weights, coefficients, joint_divisors, time_weights
from .places import chosen_places, distilled_tokens, shown_at
from .sources import Document, Documents

DRAWN = 0.5  # share of tokens that a diffusion head corrects although the one before is masked
OPEN_ROWS = 16  # rows that a part may still be packed into


@dataclass(frozen=True)
class DocumentPart:
    """A document, or a part of one, as it is placed in a row.

    Attributes:
        ids: token ids, filled up to the grid with EOS.
        real: number of ids that belong to the document, including its end token.
        run: length of the run of EOS at the end, including the fill; 0 if the document was cut.
        epoch: number of the pass over its source.
        document: content key of the whole document.
    """

    ids: list[int]
    real: int
    run: int
    epoch: int
    document: int


def document_parts(
    ids: Sequence[int], epoch: int, eos: int, recipe: Recipe, seed: int
) -> Iterator[DocumentPart]:
    """Cut a document into parts that fit a row, and fill its end so that no length is visible.

    The last block is filled up to the grid with EOS that is masked and supervised, because a
    decoder's canvas extends to the end of the block. With `full` attention the canvas has a random
    length of up to `max_length`. A part starts with the last token of the previous part: position 0
    is never scored, so every token of the document except its first is scored exactly once.
    """
    data, grid = recipe.data, recipe.convert.block_length
    document = content_key(ids)
    if data.overlong == "drop" and len(ids) > data.max_length:
        return
    for start in range(0, len(ids) - 1, data.max_length - 1):
        part = list(ids[start : start + data.max_length])
        real, last = len(part), start + data.max_length >= len(ids)
        if last:
            if grid is not None:
                tail = -real % grid
            else:
                room = data.max_length - real
                tail = int(
                    torch.randint(room + 1, (), generator=keyed_generator(seed, epoch, document))
                )
            part += [eos] * tail
        run = len(part) - real + 1 if last else 0
        if data.cut_share:
            generator = keyed_generator(seed, epoch, document, start)
            if torch.rand((), generator=generator) < data.cut_share:
                real = min(real, int(torch.randint(2, len(part) + 1, (), generator=generator)))
                part, run = part[:real], 0
        yield DocumentPart(part, real, run, epoch, document)
        if data.overlong == "truncate":
            return


class PackedDocuments(IterableDataset):
    """Endless packed rows; an item is (ordinal, parts with a total of at most `max_length` tokens).

    Args:
        documents: the mixed sources.
        tokenizer: adds its own BOS; the EOS is added here.
        eos: id that ends a document.
        skip: content keys of documents that are held out.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        eos: int,
        recipe: Recipe,
        skip: frozenset[int] = frozenset(),
    ):
        self.documents, self.tokenizer, self.eos = documents, tokenizer, eos
        self.recipe, self.skip = recipe, skip

    def __iter__(self) -> Iterator[tuple[int, list[DocumentPart]]]:
        data = self.recipe.data
        return enumerate(pack(self._parts(), data.max_length, data.packing))

    def _parts(self) -> Iterator[DocumentPart]:
        barren = 0
        for text, epoch in self.documents:
            ids = tokenize(self.tokenizer, text, self.eos)
            found = False
            if content_key(ids) not in self.skip:
                for part in document_parts(
                    ids, epoch, self.eos, self.recipe, self.recipe.train.seed
                ):
                    found = True
                    yield part
            barren = 0 if found else barren + 1
            if barren > max(1000, 2 * self.documents.size):
                raise Ar2DiffError(
                    f"the data has no usable row: each of the last {barren:,} rows has fewer "
                    "than 2 tokens, or is held out for evaluation",
                    f"check the data and {option('text_field')}, or lower {option('eval.rows')}",
                )


def pack(parts: Iterable[Any], room: int, packing: bool) -> Iterator[list[Any]]:
    """Pack parts (objects with `ids`) into rows of at most `room` tokens. Each part goes into the
    fullest open row that has room for it. Without packing, each part is a row."""
    rows: list[list[Any]] = []
    for part in parts:
        if not packing:
            yield [part]
            continue
        free = [room - sum(len(p.ids) for p in row) - len(part.ids) for row in rows]
        fits = [i for i, left in enumerate(free) if left >= 0]
        row = rows[min(fits, key=free.__getitem__)] if fits else []
        if not fits:
            rows.append(row)
        row.append(part)
        used = sum(len(p.ids) for p in row)
        if used == room:
            rows.remove(row)
            yield row
        elif len(rows) > OPEN_ROWS:
            fullest = max(rows, key=lambda r: sum(len(p.ids) for p in r))
            rows.remove(fullest)
            yield fullest


def tokenize(tokenizer: Any, text: Document, eos: int) -> list[int]:
    """Ids of a document: the tokenizer's own BOS if it adds one, the text, one EOS. A text that has
    no tokens of its own gives none. Token ids are taken as they are."""
    if not isinstance(text, str):
        return text
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) <= len(tokenizer("").input_ids):
        return []
    return ids if ids[-1] == eos and len(ids) > 1 else [*ids, eos]


def block_length_at(recipe: Recipe, step: int) -> int | None:
    """Block length at an optimizer step, which may be annealed; None if a row is one block."""
    anneal = recipe.anneal
    if not anneal.lengths or step >= anneal.steps:
        return recipe.convert.block_length
    return anneal.lengths[step * len(anneal.lengths) // anneal.steps]


def attention_of(recipe: Recipe, block_length: int | None) -> str:
    """The attention at a block length, which may be annealed."""
    attention = recipe.convert.attention
    if attention == "full" and block_length is not None:
        attention = "block_causal"  # growing: blocks until the goal
    if attention == "block_causal" and block_length >= recipe.data.max_length:
        attention = "full"  # one block: nothing reads the clean copy
    return attention


def edits_at(recipe: Recipe, step: int) -> Edits | None:
    """How tokens are replaced at an optimizer step; None: not at all."""
    edits = recipe.noise.edits
    return None if edits is None or step < edits.after * recipe.train.max_steps else edits


def law_of(recipe: Recipe) -> Law:
    """The distribution of the noise level that a recipe asks for."""
    return Law(recipe.noise.law, recipe.noise.all_share)


def weighs_law(recipe: Recipe) -> bool:
    """Whether the weights of masked tokens depend on the law of the noise level."""
    return recipe.objective.weight == "1/t" and recipe.noise.law != "uniform"


def blank_batch(size: tuple[int, ...]) -> dict[str, Tensor]:
    """A batch [B, L] without a token, for `Collator.finish` once it is filled."""
    return {
        "x0": torch.zeros(size, dtype=torch.long),
        "doc": torch.full(size, PADDING),
        "pos": torch.zeros(size, dtype=torch.long),
        "weight": torch.zeros(size),
        "real": torch.zeros(size, dtype=torch.bool),
        "eos": torch.zeros(size, dtype=torch.bool),
        "drawn": torch.zeros(size, dtype=torch.bool),
        "guess": torch.full(size, -1.0, dtype=torch.double),
    }


def drawn_before(seed: int, epoch: int, key: int, count: int) -> Tensor:
    """[count] bool, the tokens that are predicted with the diffusion head's bias although the token
    before them is masked, as if that had been drawn just before: the head learns what a step of the
    sampler needs of it, and the model what it predicts without. A function of (seed, epoch, the
    key of the text), like the noise."""
    return torch.rand(count, generator=keyed_generator(seed, epoch, key, 2)) < DRAWN


def guess_draws(noise: Noise, seed: int, epoch: int, key: int, count: int) -> Tensor:
    """[count] the draws of the model's guesses for a text, as `Noise.guesses_for` has them: a
    function of (seed, epoch, the key of the text), like the noise."""
    return noise.guesses_for(count, keyed_generator(seed, epoch, key, 4))


@dataclass(frozen=True)
class Collator:
    """Turns rows into a noised batch. The noise is drawn here, on the CPU, so that the divisor of
    the loss is known before the first micro-step. A complementary view doubles the batch."""

    recipe: Recipe
    noise: Noise  # over the model's vocabulary
    rows_per_step: int = 1  # over all ranks and gradient accumulation steps

    def __call__(self, numbered: Sequence[tuple[int, Sequence[DocumentPart]]]) -> dict[str, Tensor]:
        """[B, L] tensors: x0, xt, scored, t, coef, doc, pos, ar, written (see `finish`), eos, drawn
        (tokens that a diffusion head corrects although the one before is masked); those of
        `chosen_places`; guess, the draws of the model's guesses, as `Noise.guesses_for` has them,
        if the noise has any; reveal, as `reveal_edges` has it, while an anneal reveals; scalars:
        divisor, ar_divisor, tokens; and an int: step (the optimizer step that these rows belong to,
        on whichever rank)."""
        step = numbered[0][0] // self.rows_per_step
        size_of_block = block_length_at(self.recipe, step)
        rows = [parts for _, parts in numbered]
        length = max(sum(len(p.ids) for p in row) for row in rows)
        edits = edits_at(self.recipe, step)
        views = 2 if self.recipe.noise.complementary or edits else 1
        size = (len(rows), length)
        batch = blank_batch(size)
        scored = torch.zeros(views, *size, dtype=torch.bool)
        xt = torch.zeros(views, *size, dtype=torch.long)
        t, ratio = torch.zeros(2, views, *size, dtype=torch.double)
        for r, row in enumerate(rows):
            start = 0
            for number, part in enumerate(row):
                end = start + len(part.ids)
                place = (r, slice(start, end))
                self._place(batch, place, number, part)
                here = (slice(None), r, slice(start, end))
                xt[here], scored[here], t[here] = self.noised(part, size_of_block, edits)
                ratio[:, r, start:end] = self._ratio(part, size_of_block, t[:, r, start:end])
                start = end
        batch["ratio"] = ratio.flatten(0, 1)
        made = self.finish(batch, xt, scored, t, size_of_block) | {"step": step}
        if (reveal := self._reveal(step, size_of_block)) is not None:
            made["reveal"] = reveal
        return made

    def _reveal(self, step: int, block_length: int | None) -> Tensor | None:
        anneal, length = self.recipe.anneal, self.recipe.data.max_length
        if anneal.kind != "reveal":
            return None
        seed = self.recipe.train.seed
        return reveal_edges(step / anneal.steps, length, block_length or length, seed, step)

    def _place(self, batch: dict[str, Tensor], place: Any, number: int, part: DocumentPart) -> None:
        n = len(part.ids)
        weight = torch.ones(n)
        if part.run:
            weight[-part.run :] = 1 / part.run
            batch["eos"][place[0], place[1].stop - part.run : place[1].stop] = True
        ids = torch.tensor(part.ids)
        weight[~self._maskable(ids)] = 0
        batch["x0"][place] = ids
        batch["doc"][place] = number
        batch["pos"][place] = torch.arange(n)
        batch["weight"][place] = weight
        batch["real"][place] = torch.arange(n) < part.real
        if self.recipe.convert.head_rank is not None:
            key = content_key(part.ids[: part.real])
            seed = self.recipe.train.seed
            batch["drawn"][place] = drawn_before(seed, part.epoch, key, n)
        if self.noise.guesses:
            key = content_key(part.ids[: part.real])
            seed = self.recipe.train.seed
            batch["guess"][place] = guess_draws(self.noise, seed, part.epoch, key, n)

    def noised(
        self, part: DocumentPart, block_length: int | None, edits: Edits | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[views, n] xt, scored and t of a part: a function of (seed, epoch, the part's ids).

        Args:
            edits: adds a view in which some tokens are replaced; None: none.
        """
        noise, seed = self.recipe.noise, self.recipe.train.seed
        key = content_key(part.ids[: part.real])
        maskable, block = self._blocks(part, block_length)
        times = block_times(int(block[-1]) + 1, noise.time, seed, part.epoch, key, part.document)
        times = law_of(self.recipe).times(times)
        generator = keyed_generator(seed, part.epoch, key)
        ids = torch.tensor(part.ids)
        views = corrupt(self.noise, ids, maskable, block, times, generator, noise.complementary)
        given, drops = self._given(part)
        if drops:
            views = (views[0].masked_fill(given, self.noise.mask), *views[1:])
        if edits is None:
            return views
        edited = replaced(self.noise, ids, maskable, edits.most, generator)
        return tuple(torch.cat([x, y[None]]) for x, y in zip(views, edited, strict=True))

    def _ratio(self, part: DocumentPart, block_length: int | None, t: Tensor) -> Tensor:
        """[views, n] factors that keep the weight 1/t that of the bound under any law."""
        if not weighs_law(self.recipe):
            return torch.ones_like(t)
        maskable, block = self._blocks(part, block_length)
        law, both = law_of(self.recipe), self.recipe.noise.complementary
        noised = t if both else t[:1]  # not a view with tokens replaced
        own = [importance(maskable, block, view, law, both) for view in noised]
        return torch.cat([torch.stack(own), torch.ones_like(t[len(noised) :])])

    def _blocks(self, part: DocumentPart, block_length: int | None) -> tuple[Tensor, Tensor]:
        """[n] which tokens of a part may be masked, and the block of each."""
        n, maskable = len(part.ids), self._maskable(torch.tensor(part.ids))
        return maskable & ~self._given(part)[0], torch.arange(n) // (block_length or n)

    def _given(self, part: DocumentPart) -> tuple[Tensor, bool]:
        """[n] bool, the given spans of a part, and whether they show masks: a function of (seed,
        epoch, the part's ids)."""
        noise, key = self.recipe.noise, content_key(part.ids[: part.real])
        generator = keyed_generator(self.recipe.train.seed, part.epoch, key, 5)
        return given_spans(len(part.ids), noise.spans, noise.dropped, generator)

    def _maskable(self, ids: Tensor) -> Tensor:
        """Position 0 is never masked nor scored, and neither is a token within the text that no
        position can hold, like the mask; an AR control masks nothing."""
        if self.recipe.objective.kind == "ar":
            return torch.zeros(len(ids), dtype=torch.bool)
        return (torch.arange(len(ids)) > 0) & holds(self.noise, ids)

    def finish(
        self,
        batch: dict[str, Tensor],
        xt: Tensor,
        scored: Tensor,
        t: Tensor,
        block_length: int | None,
    ) -> dict[str, Tensor]:
        """The batch with its noise, weights and divisors; see `__call__`.

        Args:
            batch: [B, L] x0, doc, pos, weight (how much a token counts), real (tokens in the AR
                loss), eos, drawn, guess; ratio [views * B, L], factors on the weights; and written,
                the tokens that an AR model writes, none beyond the end of a text, where they are
                not those in the AR loss.
            xt, scored, t: [views, B, L].
        """
        views, objective = len(scored), self.recipe.objective
        ratio = batch.pop("ratio")
        batch = {name: x.repeat(views, 1) for name, x in batch.items()}
        xt, scored, t = (x.flatten(0, 1) for x in (xt, scored, t))
        if objective.weight == "cart":
            block = batch["pos"] // (block_length or batch["pos"].shape[1])
            times = cart_weights(scored, batch["real"], batch["doc"], block, objective.cart_p)
        else:
            times = time_weights(t, objective.weight) * ratio
        coef, divisor = coefficients(
            scored, batch["weight"], batch["doc"], times, objective.normaliser
        )
        # The AR mode stops at the first EOS.
        ar = batch["real"] & (batch["pos"] > 0) & (batch["x0"] != self.noise.mask)
        divisor, ar_divisor = joint_divisors(objective.normaliser, divisor, ar.sum())
        distilled, written = None, batch.get("written", ar)
        if objective.distil is not None:
            distilled = self._distilled(batch, scored, written, block_length)
        return {
            "x0": batch["x0"],
            "xt": xt,
            "scored": scored,
            "t": t,
            "coef": coef.to(torch.get_default_dtype()),
            "doc": batch["doc"],
            "pos": batch["pos"],
            "ar": ar,
            "written": written,
            "eos": batch["eos"],
            "drawn": batch["drawn"],
            "divisor": divisor,
            "ar_divisor": ar_divisor,
            "tokens": (batch["doc"] != PADDING).sum(),
            **chosen_places(scored, ar, distilled),
            **shown_at(self.noise, xt, scored),
            **({"guess": batch["guess"]} if self.noise.guesses else {}),
        }

    def _distilled(
        self, batch: dict[str, Tensor], masked: Tensor, written: Tensor, block_length: int | None
    ) -> Tensor:
        """[B, L] bool, the masked tokens that are distilled."""
        pos, length, recipe = batch["pos"], batch["pos"].shape[1], self.recipe
        attention = attention_of(recipe, block_length)
        first = pos % block_length == 0 if block_length else pos == 0
        reads = reading_slot(pos, attention, block_length, recipe.convert.prediction)
        visible = ~masked & (batch["doc"] != PADDING)
        return distilled_tokens(
            recipe.objective.distil, masked, written, visible, first.cumsum(1), reads >= length
        )
