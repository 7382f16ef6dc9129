"""What a model really does with the attention masks of a spec, found by perturbing tokens in a few
tiny forwards.

The name of its class decides nothing: a model is convertible if every mode of its spec is exact.

Exact up to rounding, and how much that is depends on the dtype, the device and the kernels that a
shape gets. So each check measures it first, in readings that must be equal whatever the model does
with masks: it reads the same tokens as the AR model that it was, in the two shapes of the check. (A
masked language model was none: it reads them alone and in a batch.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .attention import Slots, allowed_edges, dense_mask, lay_out, layer_windows, model_mask
from .cache import ContextCache
from .errors import first_line
from .forward import positions_of, quiet_routers
from .images import image_token_of
from .masked_lm import is_masked_lm
from .spec import Spec

BLOCK = 4  # the mechanism does not depend on the length; short rows keep the probe cheap
LENGTH = 10  # two blocks and a ragged tail
# How far a layer reads, or how many tokens, in the names of transformers' configs.
REACH = ("sliding_window", "local_attention")  # of a window, which a conversion may drop
WINDOWS = (*REACH, "attention_chunk_size", "index_topk", "keep_window_size")
WINDOW = 3  # shorter than either of two packed documents
TOLERANCE = 1e-4  # relative to the largest logit; a wrong mask is off by whole logits
ROUNDED = (torch.bfloat16, torch.float16)
ROUNDING = 8  # epsilons by which the same sums may differ between two shapes (measured: 1.5)
MARGIN = 4  # how often the rounding that was measured a check may meet
MOST_ROUNDING = 0.3  # of the largest logit; what is off by more is wrong, whatever was measured


@torch.no_grad()
def probe(model: Any, spec: Spec) -> list[str]:
    """Reasons why the model does not do what the spec says, as sentences without a full stop; empty
    if every mode is exact.

    Args:
        model: in eval mode, of any floating-point dtype.
    """
    block = None if spec.attention == "full" else min(BLOCK, spec.block_length)
    try:
        with short_windows(model, spec.local_window):
            prober = _Prober(model, spec, block)
            return [
                *prober.dependencies(),
                *(prober.mask_free() if spec.attention == "full" else prober.blocks()),
                *(prober.cache() if spec.attention != "full" else []),
                *(prober.ar_mode() if spec.ar_mode and spec.attention == "causal_context" else []),
                *prober.packing(),
            ]
    except Exception as error:  # any class: other people's forwards fail in many ways
        reason = f"its forward does not accept the spec's attention masks ({first_line(error)})"
    try:
        _run_as_stock(model)
    except Exception as error:
        return [f"its forward pass fails even without the masks of the spec ({first_line(error)})"]
    return [reason]


def _run_as_stock(model: Any) -> None:
    """One forward as before any conversion."""
    _stock_logits(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))


def _stock_logits(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    """Logits [B, S, V] as before any conversion: causal, with a stock mask."""
    seen = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    known = {}
    if cache is not None:
        place = torch.arange(seen - ids.shape[1], seen, device=ids.device)
        known = {"past_key_values": cache, "position_ids": place.expand_as(ids)}
    return stock_forward(
        model, input_ids=ids, attention_mask=ids.new_ones(len(ids), seen),
        use_cache=cache is not None, **known, **as_text(model, ids),
    )  # fmt: skip


def stock_forward(model: Any, **inputs: Any) -> Tensor:
    """Logits of a forward as before any conversion."""
    config = model.config.get_text_config()
    is_causal = vars(config).pop("is_causal", None)
    try:
        return model(**inputs, **quiet_routers(model)).logits
    finally:
        if is_causal is not None:
            config.is_causal = is_causal


def as_text(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What tells a vision-language model that reads some tokens in both directions that these ids
    are not such. Their types are 0, but where a prompt of type 0 is read so (PaliGemma), 1."""
    spec = vars(model.config).get("diffusion") or {}
    if image_token_of(model.config) is None or spec.get("images") in (None, "causal"):
        return {}
    return {"token_type_ids": torch.full_like(ids, int(spec["images"] == "prefix"))}


@contextmanager
def short_windows(model: Any, local_window: str | None) -> Iterator[None]:
    """Shorten the sliding windows while the probe runs, since it would not notice a window that is
    longer than its rows. A dropped window stays as it is: as long as the context."""
    names = WINDOWS[len(REACH) :] if local_window == "dropped" else WINDOWS
    config = model.config.get_text_config()
    found = [
        (holder, name, size)
        for holder in (config, *model.modules())  # some modules keep what they read from the config
        for name in names
        if type(size := vars(holder).get(name)) is int
    ]
    for holder, name, size in found:
        setattr(holder, name, min(size, WINDOW))
    try:
        yield
    finally:
        for holder, name, size in found:
            setattr(holder, name, size)


class _Prober:
    def __init__(self, model: Any, spec: Spec, block: int | None):
        self.model, self.spec, self.block = model, spec, block
        generator = torch.Generator().manual_seed(0)
        self.two_way = is_masked_lm(model.config.architectures)
        rows = torch.arange(model.get_input_embeddings().weight.shape[0])
        words = rows != spec.mask_token_id
        words &= rows != (-1 if (token := image_token_of(model.config)) is None else token)
        if self.two_way:  # some of these classes give a token of padding no position of its own
            words &= rows != (model.config.get_text_config().pad_token_id or 0)
        self.words = rows[words].to(model.device)
        drawn = torch.randint(len(self.words), (1, LENGTH), generator=generator)
        self.x0 = self.words[drawn.to(model.device)]
        self.xt = self.x0.clone()
        self.xt[0, torch.arange(1, LENGTH, 2)] = spec.mask_token_id
        self.pos = torch.arange(LENGTH, device=model.device)[None]
        self.doc = torch.zeros_like(self.pos)

    def run(
        self, input_ids: Tensor, slots: Slots, cache: Any = None, queries: range | None = None
    ) -> Tensor:
        """Logits of all slots, or of the slots `queries` after those in a cache."""
        mask = model_mask(
            self.model, slots, self.spec.attention, self.block, self.spec.local_window,
            queries=queries,
        )  # fmt: skip
        read = slice(None) if queries is None else slice(queries.start, queries.stop)
        return self.plain(
            input_ids=input_ids[:, read],
            attention_mask=mask,
            position_ids=positions_of(self.model, slots.pos[:, read]),
            use_cache=cache is not None,
            **({} if cache is None else {"past_key_values": cache}),
        )

    def plain(self, **inputs: Any) -> Tensor:
        return self.model(**{"use_cache": False} | inputs, **quiet_routers(self.model)).logits

    def differ(self, a: Tensor, b: Tensor, rounding: float) -> bool:
        """Whether two tensors differ by more than rounding, relative to the largest logit.

        Args:
            rounding: what was measured for the two shapes.
        """
        least = tolerance(self.model, b.dtype)  # under autocast only the logits have it
        return apart(a, b) > max(least, min(MARGIN * rounding, MOST_ROUNDING))

    def rounding(self, ids: Tensor, length: int) -> float:
        """How far the AR model's readings of a row [1, S] and of its first `length` tokens are
        apart, relative to the largest logit: no token reads those after it."""
        if self.two_way:
            alone, both = (_stock_logits(self.model, x) for x in (ids, ids.repeat(2, 1)))
            return apart(alone, both[:1])
        long, short = (_stock_logits(self.model, x) for x in (ids, ids[:, :length]))
        return apart(long[:, :length], short)

    def dependencies(self) -> list[str]:
        """Perturb each slot: the logits that change must be those that the mask connects to it
        through the layers."""
        input_ids, slots = lay_out(self.xt, self.x0, self.doc, self.pos, self.spec.attention)
        size = input_ids.shape[1]
        batch = input_ids.repeat(size + 1, 1)
        for slot in range(size):
            others = self.words[self.words != batch[slot, slot]]
            batch[slot, slot] = others[slot % len(others)]
        wide = Slots(*(x.repeat(size + 1, 1) for x in (slots.doc, slots.pos, slots.noisy)))
        logits = self.run(batch, wide)
        moved = _moved(logits)
        # The AR model reads no later token, but in a mixture of experts each token shares its
        # products with all others that go to the same expert.
        stock = _moved(_stock_logits(self.model, batch))
        noise = stock.triu(1).max().clamp(max=MOST_ROUNDING / MARGIN)
        if self.two_way:
            noise = torch.zeros_like(noise)  # all rows have one shape, and no experts
        windows = layer_windows(self.model.config.get_text_config(), self.spec.local_window)
        edges = torch.zeros(size, size, dtype=torch.bool, device=input_ids.device)
        for window in windows.values():
            allowed = allowed_edges(slots, self.spec.attention, self.block, None, window)
            edges |= dense_mask(allowed, slots)[0, 0]
        reach = edges.double()
        for _ in range(self.model.config.get_text_config().num_hidden_layers - 1):
            reach = (reach @ edges.double()).clamp(max=1)
        if (moved[reach == 0] > (MARGIN * noise).clamp(min=1e-6)).any():
            return ["a token is read where the mask forbids it"]
        ahead = edges & (slots.pos[0][None, :] > slots.pos[0][:, None])
        if ahead.any() and (moved[ahead] > noise).double().mean() < 0.9:
            return ["attention stays causal: later tokens are not read"]
        return []

    def mask_free(self) -> list[str]:
        """`full`: a forward without a mask must be bidirectional, as config.is_causal says."""
        input_ids, slots = lay_out(self.xt, self.x0, self.doc, self.pos, "full")
        if self.two_way:
            if self.differ(_stock_logits(self.model, input_ids), self.run(input_ids, slots), 0):
                return ["with masks and positions of our own it reads otherwise than without"]
            return []
        plain = self.plain(input_ids=input_ids, is_causal=False)
        rounding = self.rounding(input_ids, LENGTH - 1)
        if self.differ(plain, self.run(input_ids, slots), rounding):
            return ["is_causal=false is ignored: a forward without a mask stays causal"]
        return []

    def blocks(self) -> list[str]:
        """[noisy | clean] must equal separate forwards of [clean context | noisy block]."""
        input_ids, slots = lay_out(self.xt, self.x0, self.doc, self.pos, self.spec.attention)
        together = self.run(input_ids, slots)
        for start in range(0, LENGTH, self.block):
            end = min(start + self.block, LENGTH)
            row = torch.cat([self.x0[:, :start], self.xt[:, start:end]], 1)
            noisy = (torch.arange(end, device=row.device) >= start)[None]
            alone = self.run(row, Slots(self.doc[:, :end], self.pos[:, :end], noisy))
            rounding = self.rounding(input_ids, end)
            if self.differ(together[:, start:end], alone[:, start:end], rounding):
                return ["a block in [noisy | clean] differs from the block alone"]
        return []

    def cache(self) -> list[str]:
        """A block after a cached context must equal the block in one forward."""
        start, end = self.block, min(2 * self.block, LENGTH)
        row = torch.cat([self.x0[:, :start], self.xt[:, start:end]], 1)
        noisy = (torch.arange(end, device=row.device) >= start)[None]
        slots = Slots(self.doc[:, :end], self.pos[:, :end], noisy)
        context = Slots(self.doc[:, :start], self.pos[:, :start], noisy[:, :start])
        cache = ContextCache(self.model, 1).stock
        try:
            self.run(row, context, cache, range(start))
            cached = self.run(row, slots, cache, range(start, end))
        except Exception as error:  # it has another kind of cache, or none
            return [f"it does not decode from a cache of keys and values ({first_line(error)})"]
        stock, known = _stock_logits(self.model, row), ContextCache(self.model, 1).stock
        parts = [_stock_logits(self.model, ids, known) for ids in row.tensor_split([start], 1)]
        rounding = apart(torch.cat(parts, 1), stock)
        if self.differ(cached, self.run(row, slots)[:, start:], rounding):
            return ["a block after a cached context differs from the block in one forward"]
        return []

    def ar_mode(self) -> list[str]:
        """The clean half must equal a stock forward without a mask."""
        input_ids, slots = lay_out(self.xt, self.x0, self.doc, self.pos, self.spec.attention)
        clean = self.run(input_ids, slots)[:, LENGTH:]
        plain = self.plain(input_ids=self.x0, **as_text(self.model, self.x0))
        if self.differ(clean, plain, self.rounding(input_ids, LENGTH)):
            return ["the clean half differs from the model's own left-to-right forward"]
        return []

    def packing(self) -> list[str]:
        """Two documents packed in one row must equal each of them alone."""
        cut = self.block or LENGTH // 2
        doc = (self.pos >= cut).long()
        pos = torch.where(doc == 0, self.pos, self.pos - cut)
        row, slots = lay_out(self.xt, self.x0, doc, pos, self.spec.attention)
        packed = self.run(row, slots)[:, cut:LENGTH]
        part = [x[:, cut:] for x in (self.xt, self.x0)]
        input_ids, slots = lay_out(*part, self.doc[:, cut:], pos[:, cut:], self.spec.attention)
        alone = self.run(input_ids, slots)[:, : LENGTH - cut]
        if self.differ(packed, alone, self.rounding(row, input_ids.shape[1])):
            return ["documents packed in one row see each other"]
        return []


def tolerance(model: Any, *more: torch.dtype) -> float:
    """By how much two readings of the same tokens may be apart, by the dtypes they compute in."""
    dtypes = {p.dtype for p in model.parameters()} | {*more}
    # Layers in 4 bits compute in another dtype than that of the parameters beside them.
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    return max([TOLERANCE, *(ROUNDING * torch.finfo(d).eps for d in dtypes & {*ROUNDED})])


def apart(a: Tensor, b: Tensor) -> float:
    """How far two tensors are apart, relative to the largest number of the second."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


def _moved(logits: Tensor) -> Tensor:
    """[query, perturbed key] how far each perturbed row of logits [S + 1, S, V] is from the last
    one, relative to the largest logit."""
    return ((logits[:-1] - logits[-1]).abs().amax(-1) / logits.abs().max()).T
