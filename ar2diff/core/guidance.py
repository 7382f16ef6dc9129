"""Control by a user's classifier, whose gradient moves the vectors that open slots show
(Diffusion-LM, Li et al. 2022, section 4).

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError, first_line, option
from .noise import Noise
from .transfer import upload

RATE = 0.1  # of Adagrad, as in Diffusion-LM
WANTED = "log p(c | x) [R], by operations of torch on the probabilities that have gradients"


@dataclass(frozen=True)
class Guidance:
    """Gradient steps on what open slots show next.

    At each step of the sampler but the last, a few steps of Adagrad raise

        log p(c | softmax(logits + evidence(z))) - fluency * |z - z(s)|^2 / (2 spread^2)

    from the drawn z(s) on, where `spread` is the standard deviation with which it was drawn. The
    logits of the network are held fixed: the gradient flows through the evidence alone, which is
    known in closed form, so that a step costs no other forward. Diffusion-LM differs in both: its
    classifier was trained on noisy vectors and is differentiated itself, and its second term is
    centred at the mean of z(s).

    Attributes:
        classifier, fluency, steps: as `classifier`, `fluency` and `classifier_steps` of `Options`.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    fluency: float
    steps: int

    def moved(
        self, noise: Noise, logits: Tensor, x: Tensor, t: Tensor, s: Tensor, after: Tensor,
        texts: Texts,
    ) -> Tensor:  # fmt: skip
        """What slots show at time s, of the type of `after`.

        Args:
            logits: [N, V] of the network, without evidence.
            x, t: [N, ...] what they showed, and when. s, after: the same of what was drawn.

        Raises:
            Ar2DiffError: the classifier fails, or returns anything else.
        """
        size = noise.fitted["rows"].shape[1]
        x, t, s, drawn = upload(logits.device, x, t, s, after)
        _, spread = noise.between_steps(x[:, :size], x[:, :size], t, s)
        beside, total = drawn[:, size:], torch.zeros_like(drawn[:, :size])
        z = drawn[:, :size]
        logits = logits.clone()  # which may come from inference mode
        with torch.enable_grad():
            for _ in range(self.steps):
                z = z.detach().requires_grad_()
                likely = noise.log_likely(torch.cat([z, beside], 1), s)
                p = texts.with_open((logits + likely.to(logits)).softmax(-1))
                held = ((z - drawn[:, :size]) ** 2).sum(1) / (2 * spread[:, 0] ** 2)
                value = self._classified(p, texts.prompt).sum() - self.fluency * held.sum()
                (slope,) = torch.autograd.grad(value, z)
                total = total + slope**2
                z = z + RATE * slope / (total.sqrt() + 1e-10)
        return torch.cat([z.detach(), beside], 1).to(after)

    def _classified(self, p: Tensor, prompt: Tensor) -> Tensor:
        named = option("classifier")
        try:
            found = self.classifier(p, prompt)
        except Exception as error:
            raise Ar2DiffError(
                f"{named} failed: {type(error).__name__}: {first_line(error)}",
                "correct the function; it is called with probabilities [R, L, V] and the lengths "
                "of prompts [R]",
            ) from error
        if not isinstance(found, Tensor) or found.shape != prompt.shape:
            got = (
                f"a tensor {[*found.shape]}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise Ar2DiffError(f"{named} returned {got}", f"return {WANTED}")
        if not found.requires_grad:
            raise Ar2DiffError(f"{named} returned what has no gradient", f"return {WANTED}")
        if not bool(found.isfinite().all()):
            raise Ar2DiffError(
                f"{named} returned values that are no numbers or infinite",
                "return finite values, for instance of clamped probabilities",
            )
        return found


@dataclass(frozen=True)
class Texts:
    """Rows of a canvas as a classifier reads them.

    Attributes:
        decided: [R, L, V] one-hot where a token is decided, else 0, up to the last open slot.
        row, position: [N] of the open slots. prompt: [R] lengths.
    """

    decided: Tensor
    row: Tensor
    position: Tensor
    prompt: Tensor

    @classmethod
    def of(cls, canvas: Any, row: Tensor, position: Tensor, like: Tensor) -> Texts:
        """The rows [N] of a canvas whose `position` [N] are open, beside logits [N, V]."""
        rows, number = row.unique(return_inverse=True)
        length = int(position.max()) + 1
        ids, *there = upload(
            like.device, canvas.ids[rows, :length], number, position, canvas.prompt[rows]
        )
        known = (ids != canvas.mask_token_id)[..., None]
        decided = torch.nn.functional.one_hot(ids, like.shape[1]).to(like.dtype) * known
        return cls(decided, *there)

    def with_open(self, p: Tensor) -> Tensor:
        """[R, L, V] with the probabilities p [N, V] of the open slots."""
        return self.decided.index_put((self.row, self.position), p)
