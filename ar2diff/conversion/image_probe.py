"""What a vision-language model really does with an image, found in a few tiny forwards: how far the
base reads in both directions, and whether the masks, positions and caches of a spec are exact with
an image in the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.attention import Slots, lay_out, model_mask
from ..core.cache import ContextCache
from ..core.errors import first_line
from ..core.forward import output_at
from ..core.images import Images, image_token_of, seeing
from ..core.probe import BLOCK, apart, short_windows, stock_forward, tolerance
from ..core.sight import given_images, numbered_prompts, until_of
from ..core.spec import REACHES, Spec

TAIL = 2 * BLOCK + 1  # tokens behind the image that the checks read


class _ImageProber:
    """Reads one row with an image in several ways.

    Args:
        inputs: what the model's processor makes of a text with an image, of one row.
    """

    def __init__(self, model: Any, spec: Spec, inputs: dict[str, Tensor]):
        self.model, self.spec, self.inputs = model, spec, dict(inputs)
        ids = self.inputs.pop("input_ids").cpu()
        self.inputs.pop("attention_mask", None)
        known = {name: self.inputs.get(name) for name in self.inputs}
        pixels, self.places = given_images(model, ids, torch.ones_like(ids).bool(), known)
        (row,), self.images = numbered_prompts(ids.tolist(), image_token_of(model.config), pixels)
        self.ids, self.seen = ids.to(model.device), torch.tensor([row])
        self.pos = torch.arange(len(row))[None]
        self.block = min(BLOCK, spec.block_length or BLOCK)

    def stock(self) -> Tensor:
        """Logits [1, L, V] of the base, with all that its processor gave."""
        on = {
            name: x.to(self.model.device, self.model.dtype if x.is_floating_point() else x.dtype)
            for name, x in self.inputs.items()
        }
        return stock_forward(self.model, input_ids=self.ids, use_cache=False, **on)

    def clean(self, reach: str) -> Tensor:
        """Logits [1, L, V] of the clean copy alone, with our mask."""
        until = until_of(self.seen[0], reach)[None]
        slots = Slots(0 * self.pos, self.pos, self.pos < 0, until=until)
        return self.read(self.seen, slots, "causal_context")

    def read(
        self, ids: Tensor, slots: Slots, attention: str | None = None, cache: Any = None,
        queries: range | None = None, images: Images | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of all slots, or of the slots `queries` after those in a cache."""
        device = self.model.device
        slots = Slots(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(slots).values()))
        mask = model_mask(
            self.model, slots, attention or self.spec.attention, self.block,
            self.spec.local_window, queries=queries,
        )  # fmt: skip
        read = slice(None) if queries is None else slice(queries.start, queries.stop)
        ids, pos = ids[:, read].to(device), slots.pos[:, read]
        places = None if self.places is None else self.places[0][None]
        with seeing(images or self.images, places):
            return output_at(
                self.model, torch.arange(ids.numel(), device=device), cache=cache,
                input_ids=ids, attention_mask=mask, position_ids=pos,
            ).logits  # fmt: skip


@torch.no_grad()
def reach_of(model: Any, spec: Spec, inputs: dict[str, Tensor]) -> tuple[str, float]:
    """Which of `REACHES` reads a text with an image as the base does, and how far the two are
    apart, relative to the largest logit.

    Args:
        spec: of the AR model. inputs: as of `_ImageProber`.
    """
    prober = _ImageProber(model, spec, inputs)
    stock = prober.stock()
    return min(
        ((reach, apart(prober.clean(reach), stock)) for reach in REACHES if reach),
        key=lambda found: found[1],
    )


@torch.no_grad()
def probe_images(model: Any, spec: Spec, inputs: dict[str, Tensor]) -> list[str]:
    """Reasons why the model does not do with images what the spec says, as `probe` gives them.

    Args:
        inputs: as of `_ImageProber`.
    """
    try:
        with short_windows(model, spec.local_window):
            prober, bound = _ImageProber(model, spec, inputs), tolerance(model)
            return _full(prober) if spec.attention == "full" else _blocks(prober, bound)
    except Exception as error:  # any class: other people's forwards fail in many ways
        return [f"its forward does not accept an image with the spec's masks ({first_line(error)})"]


def _full(prober: _ImageProber) -> list[str]:
    """Every slot reads the image, and the image every slot."""
    slots = Slots(0 * prober.pos, prober.pos, prober.pos >= 0)
    before = prober.read(prober.seen, slots)
    if (_moved(before, prober.read(prober.seen, slots, images=_other(prober))) == 0).any():
        return ["a slot does not read the image"]
    return []


def _blocks(prober: _ImageProber, bound: float) -> list[str]:
    """[noisy | clean] with an image: the clean half is the base, each block is the block alone and
    the block after a cache, and pixels move what is behind them."""
    spec, model, size = prober.spec, prober.model, prober.seen.shape[1]
    seen, pos, block = prober.seen, prober.pos, prober.block
    until = until_of(seen[0], spec.images)[None]
    xt = seen.clone()
    xt[:, -TAIL::2] = spec.mask_token_id
    doc = torch.zeros_like(pos)
    ids, slots = lay_out(xt, seen, doc, pos, spec.attention)
    slots = Slots(**vars(slots) | {"until": torch.cat([pos, until], 1)})
    both = prober.read(ids, slots)
    if spec.ar_mode and spec.attention == "causal_context":
        if apart(both[:, size:], prober.stock()) > bound:
            return ["with an image, the clean half differs from the base's own forward"]
    start = (size - block - 1) // block * block
    end = start + block
    row = torch.cat([seen[:, :start], xt[:, start:end]], 1)
    noisy = (torch.arange(end) >= start)[None]
    ahead = until[:, :end].clamp(max=start - 1)
    alone = Slots(doc[:, :end], pos[:, :end], noisy, until=torch.where(noisy, pos[:, :end], ahead))
    if spec.images == "causal" or int(until[0, :start].max()) < start:
        together = both[:, start:end]
        if apart(together, prober.read(row, alone)[:, start:]) > bound:
            return ["with an image, a block in [noisy | clean] differs from the block alone"]
        cache = ContextCache(model, 1).stock
        first = Slots(doc[:, :start], pos[:, :start], noisy[:, :start], until=ahead[:, :start])
        prober.read(row, first, cache=cache, queries=range(start))
        cached = prober.read(row, alone, cache=cache, queries=range(start, end))
        if apart(together, cached) > bound:
            return ["with an image, a block after a cached context differs from one forward"]
    moved = _moved(both, prober.read(ids, slots, images=_other(prober)))
    behind = int((seen[0] < 0).nonzero()[-1]) + 1
    reads = torch.cat([pos[0] // block * block >= behind, pos[0] >= behind])
    if (moved[reads] == 0).any():
        return ["a token behind an image does not read it"]
    first = int((seen[0] < 0).nonzero()[0])
    last = (pos // block * block + block - 1) if spec.attention == "block_causal" else until
    blind = torch.cat([pos[0] < 0, last[0] < first])
    if (moved[blind] > 0).any():
        return ["a token reads an image that comes after it"]
    return []


def _other(prober: _ImageProber) -> Images:
    """The same row with another image."""
    (picture,) = prober.images.pictures
    inputs = {
        name: x * 0.5 + 0.1 if x.is_floating_point() else x for name, x in picture.inputs.items()
    }
    return Images([type(picture)(picture.key, picture.size, inputs)])


def _moved(one: Tensor, other: Tensor) -> Tensor:
    """[S] how far each slot's logits moved, relative to the largest; 0 below rounding."""
    moved = ((one - other).abs().amax(-1) / one.abs().max())[0]
    return torch.where(moved > 1e-6, moved, 0).cpu()
