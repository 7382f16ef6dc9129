"""The images of the completions at hand. Where training leaves their features as they are, these
are computed once, for the rollouts, for all scores and for all updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..checkpoint.model import Checkpoint
from ..checkpoint.towers import trains_images
from ..core.images import Images, keys_in
from .modules import unwrapped


class Pictures:
    """Images by the codes in ids.

    Args:
        checkpoint: of which model; one of text has no images.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.album, self.model = checkpoint.album, unwrapped(checkpoint.model)
        self.trained = trains_images(self.model)
        self._held = Images(())

    def hold(self, rows: Sequence[Tensor]) -> None:
        """The images of all completions of a step, whose features are computed now if no gradient
        changes them. The order of the rows makes no difference.

        Args:
            rows: of ids, with codes.
        """
        if self.album is None:
            return
        self._held = self._found(keys_of(rows))
        if not self.trained:
            self._held.compute(self.model)

    def images_in(self, ids: Tensor) -> Images | None:
        """As of `Album.images_in`."""
        return self.of([ids])

    def of(self, rows: Sequence[Tensor], batches: Sequence[dict[str, Any]] = ()) -> Images | None:
        """The images of rows of ids in one forward: those that are held, or, where gradients reach
        what makes their features, new ones.

        Args:
            batches: all completions of the step, if they are not held: after an evaluation, or in a
                run that is resumed.
        """
        if self.album is None:
            return None
        keys = keys_of(rows)
        if self.trained:
            return self._found(keys)
        if not keys <= self._held.first.keys():
            self.hold([*rows, *(batch["canvas"][:, 0].cpu() for batch in batches)])
        return self._held

    def _found(self, keys: Iterable[int]) -> Images:
        return Images([self.album.picture(key) for key in sorted(keys)])


def keys_of(rows: Sequence[Tensor]) -> set[int]:
    """The keys of the images in rows of ids."""
    return {key for ids in rows for key in keys_in(ids)}
