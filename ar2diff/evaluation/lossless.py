"""A golden run: whether the lossless mode of a folder writes the text of its AR mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..conversion.images import sample_image
from ..core.attention import Slots, model_mask
from ..core.forward import context_length
from ..core.gumbel import GumbelNoise
from ..core.seeds import keyed_generator
from ..core.sight import Sight, looking, wide
from ..data.album import Album
from ..generation.complete import decode_rows, settings_of
from ..generation.images import album_of, encode_prompt
from ..generation.tokens import prompt_ids

SHOWN = "{image} The picture shows"  # the prompt beside them for a model that sees images
PROMPTS = ("Once upon a time", "The answer is", "def main():", "1, 2, 3,")
LENGTH = 16  # most tokens of a prompt
TEMPERATURES = (0.0, 0.8)
DRAFT_LENGTH = 3  # at most
# Gap in float64 below which two tokens are equally likely to a model of some dtype.
NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
MOST_TOKENS = ((100_000_000, 16), (2_000_000_000, 8))  # of a text, for models of so many parameters


@dataclass(frozen=True)
class Golden:
    """How many texts of the lossless mode are those of the AR mode.

    Attributes:
        texts: number of texts, half of them greedy, half at temperature 0.8 under the same seeds.
        tokens: length of each.
        identical: how many are the same.
        gaps: of the others, float64 gap between the two likeliest tokens at the first difference.
        near_tie: gap below which two tokens are equally likely to the model.
        seen: how many of the texts follow an image.
    """

    texts: int
    tokens: int
    identical: int
    gaps: tuple[float, ...]
    near_tie: float
    seen: int = 0

    @property
    def ok(self) -> bool:
        """Whether texts differ at near-ties alone."""
        return all(gap < self.near_tie for gap in self.gaps)

    def __str__(self) -> str:
        seen = f"; {self.seen} of them follow an image" if self.seen else ""
        said = (
            f"{self.identical} of {self.texts} texts of {self.tokens} tokens (greedy, and at "
            f"temperature {TEMPERATURES[1]} with a seed{seen}) are those of the AR mode"
        )
        if self.gaps:
            said += f"; at the first difference the likeliest tokens are {max(self.gaps):.0e} apart"
        return said


def golden_run(checkpoint: Checkpoint, folder: str) -> Golden | None:
    """Decode a few prompts in both modes.

    Args:
        checkpoint: with an AR mode or a draft adapter.
        folder: from where it is loaded again, to be read in float64, if a text differs.

    Returns:
        What was found; None if the model is too large to try, or its context too short.
    """
    size = sum(p.numel() for p in checkpoint.model.parameters())
    new = next((tokens for most, tokens in MOST_TOKENS if size <= most), 0)
    prompts = [prompt_ids(checkpoint.tokenizer, text)[:LENGTH] for text in PROMPTS]
    prompts = [prompt for prompt in prompts if prompt]
    context, block = context_length(checkpoint.model), checkpoint.read_as.block_length
    if context is not None:
        new = min(new, context - LENGTH - block)
    if new < 1 or not prompts:
        return None
    album = None
    if checkpoint.sees_images:
        album = album_of(checkpoint)
        shown = encode_prompt(checkpoint, checkpoint.read_as, [SHOWN], [sample_image()], album)
        if context is None or len(shown) + new + block <= context:
            prompts.append(shown)
    identical, gaps, dtype = 0, [], checkpoint.model.dtype
    for temperature in TEMPERATURES:
        settings = {
            "max_new_tokens": new, "temperature": temperature, "eos_token_id": [-1],
            "seed": tuple(range(len(prompts))),
        }  # fmt: skip
        theirs = _texts(checkpoint, prompts, album, mode="ar", **settings)
        if block > 1:
            settings["draft_length"] = min(DRAFT_LENGTH, block - 1)
        ours = _texts(checkpoint, prompts, album, mode="speculative", **settings)
        for row, (own, wanted) in enumerate(zip(ours, theirs, strict=True)):
            if own == wanted:
                identical += 1
            else:
                gap = _gap(folder, dtype, prompts[row], own, wanted, temperature, row, album)
                gaps.append(gap)
    texts, near_tie = len(TEMPERATURES) * len(prompts), NEAR_TIE.get(dtype, NEAR_TIE[torch.float32])
    seen = len(TEMPERATURES) * sum(min(prompt) < 0 for prompt in prompts)
    return Golden(texts, new, identical, tuple(gaps), near_tie, seen)


def _texts(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], album: Album | None, **settings: Any
) -> list[list[int]]:
    spec, options = settings_of(checkpoint, settings)
    results = decode_rows(checkpoint, spec, options, prompts, album=album)
    return [result.token_ids for result in results]


@torch.no_grad()
def _gap(
    folder: str,
    dtype: torch.dtype,
    prompt: list[int],
    own: list[int],
    wanted: list[int],
    temperature: float,
    seed: int,
    album: Album | None,
) -> float:
    """Gap in float64 between the two highest scores where two texts first differ: logits or, above
    temperature 0, what a token is drawn by."""
    same = next(n for n, (a, b) in enumerate(zip_longest(own, wanted)) if a != b)
    double = load_checkpoint(folder, dtype=str(dtype).removeprefix("torch."))
    double.model.double()
    scores = _scores(double, prompt, wanted[:same], album)
    scores = scores.masked_fill(double.suppressed, float("-inf"))
    if temperature:
        noise = GumbelNoise([keyed_generator(seed)], len(scores))
        scores = scores / temperature + noise.at([0], [len(prompt) + same])[0]
    top = scores.topk(2).values
    return (top[0] - top[1]).item()


def _scores(
    checkpoint: Checkpoint, prompt: list[int], new: list[int], album: Album | None
) -> Tensor:
    """[V] logits of the token behind a text, as the AR mode reads it."""
    model, spec = checkpoint.model, checkpoint.read_as
    ids, inputs, sight = torch.tensor([prompt + new]), {}, None
    images = album.images_in(ids) if album is not None else None
    if images is not None:
        numbered = images.numbered(torch.tensor(prompt))
        sight = Sight.of_rows(model, images, [numbered], spec.images or "causal")
        ids[:, : len(prompt)] = numbered
        pos = torch.arange(ids.shape[1])[None]
        inputs["position_ids"] = pos
        if sight.until is not None:
            slots = Slots(0 * pos, pos, pos < 0, until=wide(sight.until, ids.shape[1]))
            inputs["attention_mask"] = model_mask(
                model, slots, "causal_context", spec.block_length, spec.local_window
            )
    with looking(sight, [0]):
        return model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
