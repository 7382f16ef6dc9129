"""What a noise was fitted to when a model was converted: tables of its tokens, and its schedule.

They lie beside the weights in a file of their own, which the spec names by its SHA-256, and do not
follow the model when that is trained: what the noise is must not change under it.

This file is copied into converted folders: it imports the standard library and its neighbours
alone, and torch and safetensors within functions.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Ar2DiffError, first_line

if TYPE_CHECKING:
    from torch import Tensor

NOISE_FILE = "noise.safetensors"
ATTRIBUTE = "fitted_noise"  # of the model
SHA256 = re.compile(r"[0-9a-f]{64}")
ROUNDING = 1e-9  # of a share of entropy
HARDLY = 1e-3  # of the entropy of a token: as little as the ends of a schedule's table lose or keep
FIX = f"download the checkpoint again, or copy the {NOISE_FILE} that belongs to its config.json"


class Fitted:
    """Named tensors, which are read when they are needed.

    Args:
        sha256: of the file that holds them; None: that of `tensors`.
        tensors: None: not read yet.
    """

    def __init__(self, sha256: str | None = None, tensors: Mapping[str, Tensor] | None = None):
        self.tensors = None if tensors is None else dict(tensors)
        self.sha256 = sha256 or hashlib.sha256(self.to_bytes()).hexdigest()
        self._made: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}

    def __getitem__(self, name: str) -> Tensor:
        if self.tensors is None:
            raise RuntimeError(f"{NOISE_FILE} was not read")
        return self.tensors[name]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def at(self, name: str, like: Tensor) -> Tensor:
        """A tensor on the device of another one."""
        return self.once((name, like.device), lambda: self[name].to(like.device))

    def to_bytes(self) -> bytes:
        """The content of the file."""
        import safetensors.torch

        return safetensors.torch.save({n: x.contiguous().cpu() for n, x in self.tensors.items()})

    def read(self, file: Path, most: int, check: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Read the tensors.

        Args:
            most: bytes that they may have.
            check: raises any error where they cannot be those of the noise.

        Raises:
            Ar2DiffError: the file is missing, or not the one that the spec names, or `check` fails.
        """
        import safetensors.torch

        if not file.is_file():
            raise Ar2DiffError(f"{file}, to which the noise was fitted, is missing", FIX)
        content = file.read_bytes() if file.stat().st_size <= most else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise Ar2DiffError(f"{file} is not the file that config.json names", FIX)
        try:
            tensors = safetensors.torch.load(content)
            check(tensors)
        except Exception as error:  # from a damaged header to a table of another size
            raise Ar2DiffError(f"{file} is damaged ({first_line(error)})", FIX) from None
        self.tensors = tensors


class Schedule:
    """A quantity y that grows from -inf at t = 0 to inf at t = 1: linear in log(t / (1 - t))
    between knots, and beyond them as at the ends.

    Args:
        knots: [2, n] values of log(t / (1 - t)) and of y, both increasing; double.
    """

    def __init__(self, knots: Tensor):
        if (
            knots.dim() != 2
            or knots.shape[0] != 2
            or knots.shape[1] < 2
            or not (knots.diff(dim=1) > 0).all()
        ):
            raise ValueError("the schedule is not monotone")
        self.x, self.y = knots
        self._there = {knots.device: (self.x, self.y)}

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """y and its derivative in t, for t [N] in [0, 1]."""
        import torch

        if t.device not in self._there:
            self._there[t.device] = self.x.to(t.device), self.y.to(t.device)
        x_of, y_of = self._there[t.device]
        x = (t / (1 - t)).log()
        left = (torch.searchsorted(x_of, x.detach()) - 1).clamp(0, len(x_of) - 2)
        slope = (y_of[left + 1] - y_of[left]) / (x_of[left + 1] - x_of[left])
        return y_of[left] + slope * (x - x_of[left]), slope / (t * (1 - t))


def knots_of(y: Tensor, lost: Tensor) -> Tensor:
    """The knots [2, n] of a schedule in which a share t of what is known of a token is lost at time
    t (the mutual-information schedule of D3PM, Austin et al. 2021, appendix B).

    Args:
        y: [m] increasing. lost: [m] double, estimates of H(x0 | xt) / H(x0) at each of them; those
            that do not exceed all before them are left out.

    Raises:
        ValueError: the share does not grow with y.
    """
    import torch

    before = torch.cat([lost.new_zeros(1), lost.cummax(0).values[:-1]])
    kept = (lost > HARDLY) & (lost < 1 - HARDLY) & (lost > before + ROUNDING)
    knots = torch.stack([lost.logit(), y])[:, kept]
    Schedule(knots)
    return knots


def entropy_of(counts: Tensor) -> tuple[Tensor, float]:
    """Probabilities of tokens that were counted [K], and their entropy in nats. Each token is
    counted once more, so that none of them is impossible."""
    p = (counts.double() + 1) / (counts.double() + 1).sum()
    return p, float(-(p * p.log()).sum())


def fitted_of(value: Any) -> Fitted:
    """What a spec names by its SHA-256.

    Raises:
        ValueError: it is no SHA-256.
    """
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise ValueError("64 hexadecimal digits")
    return Fitted(value)


def read_beside(model: Any, noise: Any) -> None:
    """Read what a noise was fitted to from the folder or the Hub repository that a stock class was
    loaded from, unless it has been read.

    Raises:
        Ar2DiffError: it is not there, or is not what the spec names.
    """
    if noise.fitted is None or noise.fitted.tensors is not None:
        return
    held = getattr(model, ATTRIBUTE, None)
    if held is not None and held.sha256 == noise.fitted.sha256:
        noise.fitted.tensors, noise.fitted._made = held.tensors, held._made
        return
    from transformers.utils import cached_file

    config = model.config
    try:
        commit = getattr(config, "_commit_hash", None)
        found = cached_file(config._name_or_path, NOISE_FILE, revision=commit)
    except OSError as error:
        raise Ar2DiffError(
            f"model {config._name_or_path}: {NOISE_FILE}, to which its noise was fitted, was not "
            f"found ({first_line(error)})",
            "load the model from the folder or repository that holds the file",
        ) from None
    read_fitted(model, noise, Path(found))


def read_fitted(model: Any, noise: Any, file: Path) -> None:
    """Read what the noise of a model was fitted to from its file; errors as of `Fitted.read`."""
    size = rows_of(model)
    most = BYTES * size[0] * max(MOST_LINKS, size[1]) + MOST_HEADER
    noise.fitted.read(file, most, lambda tensors: noise.check(tensors, size))
    carry(model, noise)


def carry(model: Any, noise: Any) -> None:
    """Have a model carry what its noise was fitted to, if it was."""
    if noise.fitted is not None:
        model.__dict__[ATTRIBUTE] = noise.fitted


def rows_of(model: Any) -> tuple[int, int]:
    """The numbers of a model's tokens and of the numbers in an embedding."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)


BYTES, MOST_LINKS, MOST_HEADER = 8, 4096, 1 << 16  # of a number, of a token, and of the file
GEOMETRIC = math.log(1e-4), math.log(1e5)  # between which schedules are tabulated
