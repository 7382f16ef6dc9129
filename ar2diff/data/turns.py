"""The data of `sft`: tokenized conversations -> turns to learn -> packed rows -> noised batches.

A turn is a run of supervised tokens: a completion, or one message of the assistant. Its canvas in
training is the canvas of decoding: the prompt is clean, prompt tokens that share a block with the
turn are clean in the noisy copy, and a turn that ends is filled up to the grid with its end token.
With blocks, each turn has noisy copies of its own blocks, given the clean turns before it:

    clean   [ user 1 | turn 1 | user 2 | turn 2 ]
    noisy   [ ..r 1 | turn 1 | EOS fill ]   [ ..r 2 | turn 2 | EOS fill ]

With `full` attention each turn is a row of its own, which ends with that turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..config.recipe import Recipe
from ..core.attention import PADDING, reading_slot
from ..core.head import UNKNOWN
from ..core.images import codes_of
from ..core.noise import Noise
from ..core.seeds import content_key, keyed_generator
from ..core.sight import until_of, wide
from ..diffusion.corruption import block_times, corrupt, holds, importance
from ..diffusion.objective import coefficients, joint_divisors, time_weights
from ..diffusion.task import previous_ids
from .album import Album
from .documents import drawn_before, guess_draws, law_of, pack, weighs_law
from .places import chosen_places, distilled_tokens, shown_at

IGNORED = -100  # the label of a token that is not supervised, as in transformers


@dataclass(frozen=True)
class Turn:
    """Supervised tokens of a conversation.

    Attributes:
        start, end: positions of the first token, and after the last token.
        stop: position after the last of the canvas, which includes the fill.
        ended: whether the last token is an end token.
    """

    start: int
    end: int
    stop: int
    ended: bool


@dataclass(frozen=True)
class ConversationPart:
    """A conversation as it is placed in a row: token ids, the turns in them, and the number of the
    pass over the data."""

    ids: list[int]
    turns: tuple[Turn, ...]
    epoch: int


@dataclass(frozen=True)
class Answers:
    """Statistics of the supervised turns.

    Attributes:
        turns: number of turns.
        ended: number of turns with an end token.
        lengths: tokens of each turn, including the end token.
        cut: number of conversations longer than `max_length`, which were cut or left out.
        torn: number of those that were left out because a cut would lose an image.
        barren: number of conversations from which nothing is learned.
    """

    turns: int
    ended: int
    lengths: tuple[int, ...]
    cut: int
    torn: int
    barren: int


def runs_of(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of supervised tokens; position 0 is never supervised."""
    start = None
    for place, label in enumerate([*labels, IGNORED]):
        wanted = label != IGNORED and 0 < place < len(labels)
        if wanted and start is None:
            start = place
        elif not wanted and start is not None:
            yield start, place
            start = None


def without_separators(
    ids: Sequence[int],
    labels: Sequence[int],
    ends: frozenset[int],
    blank: Callable[[int], bool],
) -> list[int]:
    """The labels without the blank tokens that some templates, like Qwen's and Gemma's, mark after
    an end token: generation stops at the end token."""
    labels = list(labels)
    for start, end in runs_of(labels):
        last = end - 1
        while last > start and blank(ids[last]):
            last -= 1
        if ids[last] in ends:
            labels[last + 1 : end] = [IGNORED] * (end - 1 - last)
    return labels


def conversation_parts(
    ids: Sequence[int], labels: Sequence[int], epoch: int, ends: frozenset[int], recipe: Recipe
) -> list[ConversationPart]:
    """The parts that a conversation contributes to rows: itself, or with `full` attention one part
    per turn.

    A turn whose end was cut off is not filled and does not teach to stop; with blocks, its last,
    incomplete block is left out. A conversation of which a cut would lose an image, or a part of
    one, is left out.
    """
    size, grid = recipe.data.max_length, recipe.convert.block_length
    if len(ids) > size and (recipe.data.overlong == "drop" or loses_image(ids, size)):
        return []
    ids, labels = list(ids[:size]), labels[:size]
    turns = []
    for start, end in runs_of(labels):
        ended = ids[end - 1] in ends
        if grid is not None:
            stop = -(-end // grid) * grid if ended else end // grid * grid
            if stop > start:
                turns.append(Turn(start, min(end, stop), stop, ended))
            continue
        room = size - end if ended else 0
        generator = keyed_generator(recipe.train.seed, epoch, content_key(ids[:end]))
        tail = int(torch.randint(room + 1, (), generator=generator))
        turns.append(Turn(start, end, end + tail, ended))
    if grid is not None:
        return [ConversationPart(ids, tuple(turns), epoch)] if turns else []
    return [
        ConversationPart(
            [*ids[: turn.end], *[ids[turn.end - 1]] * (turn.stop - turn.end)], (turn,), epoch
        )
        for turn in turns
    ]


def loses_image(ids: Sequence[int], size: int) -> bool:
    """Whether the ids after the first `size` have codes of images."""
    return min(ids[size:], default=0) < 0


class PackedConversations(IterableDataset):
    """Endless packed rows of tokenized conversations; an item is (ordinal, its parts). They depend
    only on rows and recipe, whatever the batch size, the ranks and the resumed runs.

    Args:
        rows: each with `input_ids` and `labels`.
        ends: ids that end a turn.
        blank: tells of an id whether it is only white space, which separates turns.
        held_out: numbers of rows that are kept out of training.
    """

    def __init__(
        self,
        rows: Any,
        ends: Iterable[int],
        recipe: Recipe,
        blank: Callable[[int], bool] = lambda _: False,
        held_out: frozenset[int] = frozenset(),
    ):
        self.rows, self.ends, self.recipe = rows, frozenset(ends), recipe
        self.blank, self.held_out = blank, held_out

    def __iter__(self) -> Iterator[tuple[int, list[ConversationPart]]]:
        data = self.recipe.data
        return enumerate(pack(self._parts(), data.max_length, data.packing))

    def _parts(self) -> Iterator[ConversationPart]:
        epoch = 0
        while True:
            for number in self._order(epoch):
                if number not in self.held_out:
                    yield from self.parts(number, epoch)
            epoch += 1

    def _order(self, epoch: int) -> list[int]:
        """The numbers of the rows as an epoch reads them."""
        generator = keyed_generator(self.recipe.train.seed, epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def last(self, count: int) -> list[int]:
        """The rows to hold out: those that teach something and that the first epoch reads last, so
        that a shorter run trains on the same rows as without them."""
        found = (n for n in reversed(self._order(0)) if self.parts(n, 0))
        return list(islice(found, count))

    def parts(self, number: int, epoch: int) -> list[ConversationPart]:
        """What one conversation contributes to the rows of an epoch."""
        return conversation_parts(*self._supervised(number), epoch, self.ends, self.recipe)

    def _supervised(self, number: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation."""
        row = self.rows[number]
        ids = row["input_ids"]
        return ids, without_separators(ids, row["labels"], self.ends, self.blank)

    def answers(self) -> Answers:
        """Statistics of one pass over the training data."""
        lengths, ended, cut, torn, barren = [], 0, 0, 0, 0
        size = self.recipe.data.max_length
        for number in range(len(self.rows)):
            if number in self.held_out:
                continue
            ids, labels = self._supervised(number)
            cut += len(ids) > size
            torn += len(ids) > size and loses_image(ids, size)
            barren += not conversation_parts(ids, labels, 0, self.ends, self.recipe)
            for start, end in runs_of(labels):
                lengths.append(end - start)
                ended += ids[end - 1] in self.ends
        return Answers(len(lengths), ended, tuple(lengths), cut, torn, barren)

    def example(self) -> tuple[list[int], list[bool]] | None:
        """Ids of the first conversation with supervised tokens, cut to `max_length`, and which of
        them are supervised; None if there is no such conversation."""
        for number in range(len(self.rows)):
            ids, labels = self._supervised(number)
            parts = conversation_parts(ids, labels, 0, self.ends, self.recipe)
            if parts:
                ids = list(ids[: self.recipe.data.max_length])
                learned = [False] * len(ids)
                for turn in (turn for part in parts for turn in part.turns):
                    learned[turn.start : turn.end] = [True] * (turn.end - turn.start)
                return ids, learned
        return None


@dataclass(frozen=True)
class TurnCollator:
    """Turns rows into a noised batch of slots. The noise is drawn here, on the CPU, so that the
    loss's divisor is known before the first micro-step.

    Attributes:
        noise: over the model's vocabulary.
        album: the images of the rows; None for a model of text.
        reach: the `images` of the spec.
        ghost: the key of an image that a batch without one gets, in slots of padding, so that every
            batch trains the same parameters, by 0; None: none.
    """

    recipe: Recipe
    noise: Noise
    album: Album | None = None
    reach: str | None = None
    ghost: int | None = None

    def __call__(
        self, numbered: Sequence[tuple[int, Sequence[ConversationPart]]]
    ) -> dict[str, Tensor]:
        """[B, S] tensors: input_ids, doc, pos, noisy, start, block (`Slots`), target, scored, reads
        (slot at which a scored token is predicted), before (slot of the clean copy of the token
        before it; -1 in the fill, which the AR mode never writes), coef, t, eos, ar, with a
        diffusion head also previous (the token before each one, as `previous_ids` has it), with
        guesses of the model also guess (their draws, as `Noise.guesses_for` has them); scalars:
        divisor, ar_divisor, tokens; those of `chosen_places`; and, with images, those of
        `_sighted`, of `_seen`."""
        views = 2 if self.recipe.noise.complementary else 1
        rows = [self._row(parts, view) for view in range(views) for _, parts in numbered]
        ghost = self._needed(rows)
        size = max(len(row["pos"]) for row in rows) + len(ghost)
        fill = {"doc": PADDING, "seq": PADDING, "before": -1, "previous": UNKNOWN}
        batch = {
            name: torch.stack([_padded(row[name], size, fill.get(name, 0)) for row in rows])
            for name in rows[0]
        }
        if self.album is not None:
            batch["input_ids"][0, size - len(ghost) :] = torch.tensor(ghost, dtype=torch.long)
            batch |= self._sighted(batch["input_ids"])
        scored, objective = batch["scored"], self.recipe.objective
        coef, divisor = coefficients(
            scored,
            batch.pop("weight"),
            batch.pop("seq"),
            time_weights(batch["t"], objective.weight) * batch.pop("ratio"),
            objective.normaliser,
        )
        divisor, ar_divisor = joint_divisors(objective.normaliser, divisor, batch["ar"].sum())
        distilled = None
        if objective.distil is not None:
            visible = batch["noisy"] & ~scored & (batch["doc"] != PADDING)
            distilled = distilled_tokens(
                objective.distil, scored, batch["before"] >= 0, visible,
                batch["block"] + 1,  # clean slots have -1
                batch["reads"] == batch["before"],
            )  # fmt: skip
        return {
            **batch,
            "coef": coef.to(torch.get_default_dtype()),
            "divisor": divisor,
            "ar_divisor": ar_divisor,
            "tokens": ((batch["doc"] != PADDING) & ~batch["noisy"]).sum()
            if self.recipe.convert.block_length
            else (batch["doc"] != PADDING).sum(),
            **chosen_places(scored, batch["ar"], distilled),
            **shown_at(self.noise, batch["input_ids"], scored),
        }

    def _sighted(self, ids: Tensor) -> dict[str, Any]:
        """The input_ids [B, S] with the numbers of features in place of codes, and `images`, what
        they are the features of; nothing if there are none."""
        images = self.album.images_in(ids)
        return {} if images is None else {"images": images, "input_ids": images.numbered(ids)}

    def _needed(self, rows: Sequence[dict[str, Tensor]]) -> list[int]:
        """The codes of an image that no row of the batch needs, but every batch must have."""
        if self.ghost is None or any((row["input_ids"] < 0).any() for row in rows):
            return []
        return codes_of(self.ghost, self.album.header(self.ghost).size)

    def _row(self, parts: Sequence[ConversationPart], view: int) -> dict[str, Tensor]:
        """Slots of a row: the noisy copies of all turns, then the clean copies."""
        convert = self.recipe.convert
        grid = convert.block_length
        copies: list[dict[str, Tensor]] = []
        base = 0  # slots so far
        control = self.recipe.objective.kind == "ar"
        denoised = [() if control else part.turns for part in parts]
        # Slot of the part's clean copy.
        clean = sum(turn.stop - self._first(turn) for turns in denoised for turn in turns)
        blocks = 0
        for doc, (part, turns) in enumerate(zip(parts, denoised, strict=True)):
            for turn in turns:
                copy = self._noisy(part, turn, view)
                count = len(copy["pos"])
                copy["doc"] = torch.full((count,), doc)
                copy["seq"] = torch.full((count,), len(copies))
                own = base + torch.arange(count)
                copy["reads"] = reading_slot(
                    copy["pos"],
                    convert.attention,
                    grid,
                    convert.prediction,
                    own,
                    clean + copy["pos"],
                )
                before = clean + copy["pos"] - 1
                copy["before"] = torch.where(copy["pos"] < turn.end, before, -1)
                copy["block"] = copy["start"] // (grid or count) + blocks
                blocks = int(copy["block"].max()) + 1
                copies.append(copy)
                base += count
            clean += len(part.ids) if grid else 0
        for doc, part in enumerate(parts) if grid else ():
            copies.append(self._clean(part, doc))
        return {name: torch.cat([copy[name] for copy in copies]) for name in copies[0]}

    def _first(self, turn: Turn) -> int:
        """First position of a turn's noisy copy: the start of its first block, or of the row."""
        grid = self.recipe.convert.block_length
        return turn.start // grid * grid if grid else 0

    def _noisy(self, part: ConversationPart, turn: Turn, view: int) -> dict[str, Tensor]:
        first, grid = self._first(turn), self.recipe.convert.block_length
        pos = torch.arange(first, turn.stop)
        fill = turn.stop - turn.end
        ids = [*part.ids[first : turn.end], *[part.ids[turn.end - 1]] * fill]
        codes = torch.tensor(ids)
        target = self._words(codes)
        maskable = (pos >= turn.start) & holds(self.noise, target)
        eos = (pos >= turn.end - 1) & turn.ended
        # A run of end tokens counts as one.
        weight = maskable.float() / torch.where(eos, fill + 1.0, 1.0)
        xt, scored, t = self._noised(part, turn, target, maskable, pos, view)
        ratio = torch.ones_like(t)
        if weighs_law(self.recipe):
            block = (pos - first) // (grid or len(pos))
            both = self.recipe.noise.complementary
            ratio = importance(maskable, block, t, law_of(self.recipe), both)
        found = {
            "target": target, "pos": pos, "noisy": torch.ones_like(maskable),
            "input_ids": torch.where(codes < 0, codes, xt), "scored": scored,
            "t": t, "ratio": ratio, "weight": weight, "eos": eos,
            "ar": torch.zeros_like(maskable),
            "start": pos // grid * grid if grid else torch.zeros_like(pos),
            **self._seen(part, pos, False),
        }  # fmt: skip
        if self.recipe.convert.head_rank is not None:
            found["previous"] = self._previous(part, turn, target, scored)
        if self.noise.guesses:
            key = content_key(part.ids[: turn.end])
            seed = self.recipe.train.seed
            found["guess"] = guess_draws(self.noise, seed, part.epoch, key, len(pos))
        return found

    def _previous(
        self, part: ConversationPart, turn: Turn, target: Tensor, masked: Tensor
    ) -> Tensor:
        """[n] the token before each one of a turn's noisy copy, for the diffusion head."""
        first, key = self._first(turn), content_key(part.ids[: turn.end])
        drawn = drawn_before(self.recipe.train.seed, part.epoch, key, len(target))
        # The copy begins with a block, whose first token follows a clean one.
        x0 = torch.cat([torch.tensor([part.ids[first - 1] if first else 0]), target])
        seen = torch.zeros(1, dtype=torch.bool)
        found = previous_ids(
            x0[None],
            torch.cat([seen, masked])[None],
            torch.arange(first - 1, first + len(target))[None],
            self.recipe.convert.block_length,
            torch.cat([seen, drawn])[None],
        )
        return found[0, 1:]

    def _noised(
        self,
        part: ConversationPart,
        turn: Turn,
        x0: Tensor,
        maskable: Tensor,
        pos: Tensor,
        view: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[n] xt, scored and t of a view: a function of (seed, epoch, ids up to the turn's end)."""
        noise, seed = self.recipe.noise, self.recipe.train.seed
        key = content_key(part.ids[: turn.end])
        size = self.recipe.convert.block_length or len(pos)
        block = (pos - pos[0]) // size
        times = block_times(int(block[-1]) + 1, noise.time, seed, part.epoch, key, key)
        times = law_of(self.recipe).times(times)
        generator = keyed_generator(seed, part.epoch, key)
        both = noise.complementary
        views = corrupt(self.noise, x0, maskable, block, times, generator, both)
        return tuple(found[view] for found in views)

    def _clean(self, part: ConversationPart, doc: int) -> dict[str, Tensor]:
        """The clean copy, whose supervised tokens have an AR loss."""
        ids, pos = torch.tensor(part.ids), torch.arange(len(part.ids))
        words = self._words(ids)
        none = torch.zeros(len(ids), dtype=torch.bool)
        ar = none.clone()
        for turn in part.turns:
            ar[turn.start : turn.end] = True
        zeros = torch.zeros(len(ids))
        guess = {"guess": zeros.double() - 1} if self.noise.guesses else {}
        return {
            "target": words, "input_ids": ids, "pos": pos, "noisy": none, "scored": none,
            "t": zeros.double(), "ratio": zeros.double(), "before": torch.full_like(pos, -1),
            "weight": zeros, "eos": none, "ar": ar & (ids != self.noise.mask),
            "start": pos // self.recipe.convert.block_length * self.recipe.convert.block_length,
            "doc": torch.full_like(pos, doc), "seq": torch.full_like(pos, PADDING),
            "reads": torch.zeros_like(pos), "block": torch.full_like(pos, -1),
            "previous": torch.full_like(pos, UNKNOWN), **guess, **self._seen(part, pos, True),
        }  # fmt: skip

    def _words(self, ids: Tensor) -> Tensor:
        """The ids with placeholders in place of codes."""
        return ids if self.album is None else ids.masked_fill(ids < 0, self.album.token)

    def _seen(self, part: ConversationPart, pos: Tensor, clean: bool) -> dict[str, Tensor]:
        """For the slots [n] of a copy of a conversation: `places` [n, 3], the model's positions, if
        these are not logical ones; and `until` [n], the last position that each clean slot reads,
        if that is not its own."""
        if self.album is None:
            return {}
        ids, found = torch.tensor(part.ids), {}
        if self.album.moves:
            found["places"] = wide(self.album.places(ids), int(pos[-1]) + 1, 0)[pos]
        if self.reach in ("image", "prefix") and self.recipe.convert.block_length:
            found["until"] = pos
            if clean:
                found["until"] = until_of(ids, self.reach, part.turns[0].start)
        return found


def _padded(values: Tensor, size: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((size - len(values), *values.shape[1:]), fill)])
