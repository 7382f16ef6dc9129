"""The forward of speculation: logits after each candidate, and drafts of what may follow.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .attention import layer_windows, model_mask, with_context
from .cache import ContextCache
from .compiled import compiled, rounded
from .draft import Draft
from .forward import logits_at, quiet_routers, rounds
from .readers import ALL, slots_of, until_at, until_joined
from .spec import Spec
from .transfer import upload
from .tree import Tree, shapes

# Layouts of a single row recur from call to call, and small ones are kept with their model.
LAYOUTS: WeakKeyDictionary[Any, dict[Any, tuple[_CandidateSlots, Any]]] = WeakKeyDictionary()
MOST_KEPT, MOST_SLOTS = 1024, 64
MOST_LAYOUTS = 64  # of any size that are remembered during a call


@dataclass(frozen=True)
class _CandidateSlots:
    """Where the slots of a forward stand: [clean | a noisy block behind some candidates].

    The clean slots of a row end with its newest token, at position front - 1, and its candidates.
    The block behind a candidate starts at the position after it.

    Attributes:
        pos, start: [R, S] positions less the row's front. noisy: [S] bool.
        branch: [R, S] `enter`, `leave` and `block` of `Slots`; None if no row branches.
        clean: number of clean slots; real: [R, S] bool, slots that hold something.
        index: [R * K] slots, counted over the rows, whose logits are read: after the newest token
            and each candidate, then the drafts of each block.
    """

    pos: Tensor
    start: Tensor
    noisy: Tensor
    branch: tuple[Tensor, Tensor, Tensor] | None
    clean: int
    real: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, trees: list[Tree], certain: int, width: int, drafts: int, ahead: int
    ) -> _CandidateSlots:
        """With `certain` tokens before the candidates, and blocks of `width` masks of which
        `drafts` are read, the first of them `ahead` of its block's start."""
        nodes = max(map(len, trees))
        blocks = max(len(tree.blocks) for tree in trees) if width else 0
        clean = certain + nodes
        rows = [_row_of(tree, certain, nodes, blocks, width) for tree in trees]
        pos, start, enter, leave, block, real = torch.tensor(rows).unbind(1)
        drafted = clean + torch.arange(blocks)[:, None] * width + ahead + torch.arange(drafts)
        wanted = torch.cat([certain - 1 + torch.arange(nodes + 1), drafted.flatten()])
        index = torch.arange(len(trees))[:, None] * pos.shape[1] + wanted
        return cls(
            pos,
            start,
            torch.arange(pos.shape[1]) >= clean,
            None if all(tree.is_chain for tree in trees) else (enter, leave, block),
            clean,
            real.bool(),
            index.flatten(),
        )


def _row_of(tree: Tree, certain: int, nodes: int, blocks: int, width: int) -> list[list[int]]:
    """Position, start of the block, enter, leave, block and whether it is real, of each slot of a
    row."""
    spare = nodes - len(tree)
    enter, leave = tree.branches()
    pos = [*range(-certain, 0), *(depth - 1 for depth in tree.depths), *[0] * spare]
    real = [1] * (certain + len(tree)) + [0] * spare
    enter = [0] * certain + enter + [0] * spare
    leave = [ALL] * certain + leave + [ALL] * spare
    start, block = pos[:], [-1] * len(pos)
    for number in range(blocks):
        there = number < len(tree.blocks)
        node = tree.blocks[number] if there else -1
        begin = tree.depths[node] if node >= 0 else 0
        pos += range(begin, begin + width)
        start += [begin] * width
        enter += [enter[certain + node] if node >= 0 else 0] * width
        leave += [ALL] * width
        block += [number] * width
        real += [int(there)] * width
    return [pos, start, enter, leave, block, real]


class CandidateReader:
    """Logits of the AR mode after each candidate, and of the drafts that may follow.

    Args:
        rows: how many rows; columns: tokens of the canvas.
        cache: `dynamic`, `static`, or `none`: the context is read again at each forward.
        context: positions that the model has; drafts beyond it are not read.
        most: the most candidates and masks of a forward, for a static cache.
        draft: the draft adapter, if the model has one.
        fast: whether the forwards after the prompt's are compiled; the cache is static then.
        until: [R, P] the last position that each token of the prompts reads; None: its own.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        rows: int,
        columns: int,
        cache: str,
        context: int | None,
        most: int,
        draft: Draft | None = None,
        fast: bool = False,
        until: Tensor | None = None,
    ):
        self.model, self.spec, self.draft, self.fast = model, spec, draft, fast
        self.until = until
        # The last accepted drafts may lie beyond the end of the canvas.
        columns += spec.block_length + most
        static = (rounded(columns) if fast else columns) if cache == "static" else None
        self.cache = None if cache == "none" else ContextCache(model, rows, static, lent=fast)
        self.last = (context or 1 << 60) - 1
        windows = layer_windows(model.config.get_text_config(), spec.local_window)
        self.vocabulary = model.config.get_text_config().vocab_size
        self.uniform = not any(windows.values())  # all slots read the whole context
        self.length = [0] * rows  # tokens of each row in the cache
        self.certain: list[int] = []  # tokens known that are not
        self.layout: _CandidateSlots | None = None
        self._before: list[int] = []  # `length` at the last forward
        self._steady: dict[Any, tuple[_CandidateSlots, Any]] = {}
        self._kept = LAYOUTS.setdefault(model, {}) if rows == 1 else {}
        # What a layout and its mask depend on, besides the trees.
        self._kind = spec, model.config._attn_implementation, model.dtype, model.device

    def read(
        self,
        ids: Tensor,
        rows: list[int],
        front: list[int],
        newest: list[int] | Tensor,
        trees: list[Tree],
        drafts: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits [R, N + 1, V] after the newest token and each of N candidates; logits
        [R, M, drafts, V] of what may follow the token after each of the M candidates of `blocks`;
        and their hidden states [R, M, drafts, H] if a head reads them.

        Args:
            ids: [., T] canvas. rows: which of its rows are read.
            front: tokens known of each. newest: the last of them; [R] on the device if nothing
                follows it, after the first forward. trees: its candidates.
            drafts: tokens drafted behind each of the trees' `blocks`.
        """
        length = self._before = self.length if self.cache else [0] * len(front)
        self.certain = [known - cached for known, cached in zip(front, length, strict=True)]
        if not drafts and self._plain(front, trees):
            return self._read_newest(newest, front[0] - 1)
        device, first = self.model.device, max(self.certain)
        self.layout, mask = self._lay_out(front, length, trees, drafts)
        layout, nodes = self.layout, max(map(len, trees))
        pos = layout.pos + _column(front)
        if isinstance(newest, Tensor):
            tokens = newest[:, None]
        else:
            tokens = ids.new_full(pos.shape, self.spec.mask_token_id)
            tokens[:, max(first - 1, 0) : layout.clean] = torch.tensor(
                [
                    [*([known] if first else []), *tree.tokens, *[0] * (nodes - len(tree))]
                    for known, tree in zip(newest, trees, strict=True)
                ]
            )
        if first > 1:
            at = pos[:, :first].clamp(0, ids.shape[1] - 1)
            tokens[:, :first] = ids[torch.tensor(rows)].gather(1, at)
        drafting = self.draft is not None and pos.shape[1] > layout.clean
        noisy = slice(layout.clean, None)
        states: list[Tensor] = []
        index, tokens, pos = upload(device, layout.index, tokens, pos.clamp(0, self.last))
        steady = self.fast and self.cache.width and first == 1
        with (
            self.draft.applied(self.model, noisy) if drafting else nullcontext(),
            compiled(self.model) if steady else nullcontext(),
        ):
            logits = logits_at(
                self.model,
                index,
                cache=self.cache.stock if self.cache else None,
                read=states,
                input_ids=tokens,
                attention_mask=mask,
                position_ids=pos,
            ).view(len(rows), -1, self.vocabulary)
        headed = drafting and self.draft.head is not None
        ahead, hidden = (
            found.view(len(rows), -1, found.shape[-1])[:, nodes + 1 :].unflatten(1, (-1, drafts))
            if drafts and found is not None
            else None
            for found in (logits, states[0] if headed else None)
        )
        return logits[:, : nodes + 1], ahead, hidden

    @property
    def slots(self) -> int:
        """Of each row in the last forward."""
        return 1 if self.layout is None else self.layout.pos.shape[1]

    def keep(self, paths: list[list[int]], alive: list[bool]) -> None:
        """The tokens that were certain and the accepted candidates, by row, become context. A row
        that is over goes on to have one certain token, like the others."""
        if not self.cache:
            return
        counts = [
            known + len(path) if live else known - 1
            for known, path, live in zip(self.certain, paths, alive, strict=True)
        ]
        self.length = [cached + more for cached, more in zip(self.length, counts, strict=True)]
        slots, certain = self.slots, max(self.certain)
        if counts == [counts[0]] * len(counts) and all(
            path == list(range(len(path))) for path in paths
        ):  # each row keeps its first slots, as the cache has them
            if self.certain == [certain] * len(counts) and self._even():
                self.cache.extend(slots, counts[0])
                return
        first, size = [certain - known for known in self.certain], max(counts)
        chosen = [
            ([*range(begin, certain), *(certain + node for node in path)] + [slots - 1] * size)[
                :size
            ]
            for begin, path in zip(first, paths, strict=True)
        ]
        chosen = torch.tensor(chosen).view(len(paths), size)
        self.cache.keep(slots, torch.tensor(first), torch.tensor(counts), chosen)

    def select(self, rows: list[int]) -> None:
        """Continue with some of the rows."""
        self.length = [self.length[row] for row in rows]
        if self.until is not None:
            self.until = self.until[torch.tensor(rows)]
        if self.cache:
            self.cache.select(torch.tensor(rows))

    def resume(self, contexts: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        """Begin with keys and values that were read before, of each row."""
        self.cache.fill(contexts)
        self.length = self.cache.length.tolist()

    def join(self, other: CandidateReader) -> None:
        """Take the rows of another reader behind one's own; both have read before, and neither has
        a static cache."""
        self.length = self.length + other.length
        self.until = until_joined(self.until, other.until)
        if self.cache:
            self.cache.join(other.cache)

    def _plain(self, front: list[int], trees: list[Tree]) -> bool:
        """Whether a forward only reads the newest token of each row, after a context that fills
        the cache: then it needs no mask."""
        return (
            self.cache is not None
            and self.cache.static is None
            and self.uniform
            and self.cache.width > 0
            and self._full()
            and self.certain == [1] * len(front)
            and not any(map(len, trees))
        )

    def _even(self) -> bool:
        """Whether the context of all rows ends with the last column of the cache."""
        return bool((self.cache.begin + self.cache.length == self.cache.width).all())

    def _full(self) -> bool:
        """Whether it fills all columns."""
        return min(self._before) == self.cache.width

    def _read_newest(self, newest: list[int] | Tensor, position: int) -> tuple[Tensor, None, None]:
        """`read` without candidates and drafts."""
        self.layout = None
        newest = newest if isinstance(newest, Tensor) else torch.tensor(newest)
        (tokens,) = upload(self.model.device, newest[:, None])
        place = torch.full_like(tokens, position)
        if rounds(self.model):
            index = torch.arange(len(newest), device=tokens.device)
            logits = logits_at(
                self.model, index, cache=self.cache.stock, input_ids=tokens, position_ids=place
            )
            return logits[:, None], None, None
        logits = self.model(
            input_ids=tokens,
            position_ids=place,
            past_key_values=self.cache.stock,
            use_cache=True,
            **quiet_routers(self.model),
        ).logits
        return logits, None, None

    def _lay_out(
        self, front: list[int], length: list[int], trees: list[Tree], drafts: int
    ) -> tuple[_CandidateSlots, Any]:
        """The slots, and the mask over the context and them. As long as each row has one certain
        token and trees of the same shape, only the context grows, and the slots after it are laid
        out once."""
        certain = max(self.certain)
        ahead = 1 if self.spec.prediction == "same" else 0  # the first of a block is the AR's
        width = drafts + ahead if drafts else 0  # whole blocks draft no better, and cost more
        deepest = max((max(tree.depths) for tree in trees if len(tree)), default=0)
        beyond = max(front) + deepest + width > self.last
        steady = self.uniform and not beyond and min(self.certain) == certain
        steady &= self.until is None or certain == 1
        key = (*self._kind, certain, drafts, *shapes(trees))
        columns = self.cache.width if self.cache else 0
        found = self._steady.get(key) or self._kept.get(key) if steady else None
        if found is None:
            layout = _CandidateSlots.of(trees, certain, width, drafts, ahead)
            if not steady:
                seen = self._seen(len(front))
                width = self.cache.columns(layout.pos.shape[1]) if self.cache else None
                return layout, self._mask(layout, front, length, seen, width)
            none = torch.zeros(len(front), 0, dtype=torch.bool)
            found = layout, self._mask(layout, front, length, none)
            small = len(front) == 1 and layout.pos.shape[1] <= MOST_SLOTS
            store, most = (self._kept, MOST_KEPT) if small else (self._steady, MOST_LAYOUTS)
            if len(store) >= most:
                store.clear()
            store[key] = found
        layout, mask = found
        if self.cache and self.cache.static is not None:
            return layout, self.cache.mask(mask, self._seen(len(front)), recurs=certain == 1)
        if columns and self._full():
            seen = 0.0 if mask.is_floating_point() else True
            return layout, torch.nn.functional.pad(mask, (columns, 0), value=seen)
        return layout, with_context(mask, *upload(mask.device, self._seen(len(front))))

    def _seen(self, rows: int) -> Tensor:
        """[R, columns] which columns of the cache hold a token of their row."""
        return self.cache.seen if self.cache else torch.zeros(rows, 0, dtype=torch.bool)

    def _mask(
        self,
        layout: _CandidateSlots,
        front: list[int],
        length: list[int],
        seen: Tensor,
        width: int | None = None,
    ) -> Any:
        """The mask of the slots, which follow the columns `seen` [R, C] of the context; of `width`
        columns, if some are empty."""
        start = torch.tensor(front)[:, None]
        pos, columns = layout.pos + start, seen.shape[1]
        slots, cached = pos.shape[1], torch.tensor(length)[:, None]
        built = slots_of(
            width or columns + slots,
            seen,
            self.cache.position if columns else pos[:, :0],
            (pos >= cached) & (pos <= self.last) & layout.real,
            pos,
            layout.noisy.expand(len(pos), -1),
            self.model.device,
            layout.start + start,
            layout.branch,
            None if self.until is None else until_at(self.until, pos),
        )
        return model_mask(
            self.model, built, "causal_context", self.spec.block_length, self.spec.local_window,
            queries=range(columns, columns + slots),
        )  # fmt: skip


def _column(values: list[int]) -> Any:
    """[R, 1] or, if all rows have the same, one number."""
    same = min(values) == max(values)
    return values[0] if same else torch.tensor(values)[:, None]
