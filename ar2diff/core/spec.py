"""The contract: what a logit of a converted checkpoint means. Written in `config.json`, read here.

This file is copied into converted folders, so it imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT = 1
ATTENTIONS = ("causal_context", "block_causal", "full")
PREDICTIONS = ("same", "shift")
NOISES = ("mask",)
LOCAL_WINDOWS = (None, "kept", "dropped")


class SpecError(ValueError):
    """A `diffusion` block that this version cannot honour. Carries `what` and `fix`."""

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what} ({fix})")
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Spec:
    """The `diffusion` block of `config.json`; every key is required.

    Attributes:
        format: layout version; a reader refuses a higher one.
        noise: forward process; `mask` is absorbing.
        mask_token_id: id of the absorbing state.
        attention: `causal_context`, `block_causal` or `full`.
        block_length: tokens denoised together; `None` for `full`.
        prediction: token i is read at i (`same`) or i - 1 (`shift`).
        ar_mode: the same weights are still a trained left-to-right model.
        local_window: what became of the base's sliding window.
        max_length: the longest row trained on, in tokens.
    """

    format: int
    noise: str
    mask_token_id: int
    attention: str
    block_length: int | None
    prediction: str
    ar_mode: bool
    local_window: str | None
    max_length: int

    def __post_init__(self) -> None:
        if type(self.format) is int and self.format > FORMAT:
            raise SpecError(
                f"config.json: diffusion.format is {self.format!r}, this version reads {FORMAT}",
                "upgrade ar2diff to the version that wrote the checkpoint",
            )
        for name, allowed in (
            ("noise", NOISES),
            ("attention", ATTENTIONS),
            ("prediction", PREDICTIONS),
            ("local_window", LOCAL_WINDOWS),
        ):
            if getattr(self, name) not in allowed:
                raise _bad(name, getattr(self, name), f"one of {', '.join(map(str, allowed))}")
        if type(self.ar_mode) is not bool:
            raise _bad("ar_mode", self.ar_mode, "true or false")
        for name in ("format", "mask_token_id", "max_length"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise _bad(name, getattr(self, name), "a whole number")
        if self.attention == "full":
            if self.block_length is not None:
                raise _bad("block_length", self.block_length, "null where attention is full")
        elif type(self.block_length) is not int or self.block_length < 1:
            raise _bad("block_length", self.block_length, "a whole number of at least 1")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec | None:
        """Read the block out of a parsed `config.json`; `None` where there is none.

        Raises:
            SpecError: an unknown key or value, a missing key, a higher format, or a
                `mask_token_id` beside the block that differs from the one inside.
        """
        block = config.get("diffusion")
        if block is None:
            return None
        if not isinstance(block, Mapping):
            raise SpecError("config.json: diffusion is not a mapping", "convert the base again")
        names = [field.name for field in fields(cls)]
        version = block.get("format", 0)
        if type(version) is int and version > FORMAT:  # before its keys, which we cannot know
            cls(**{name: block.get(name) for name in names})
        for key in block:
            if key not in names:
                raise SpecError(
                    f"config.json: diffusion.{key}: unknown key", "upgrade ar2diff, or remove it"
                )
        for name in names:
            if name not in block:
                raise SpecError(
                    f"config.json: diffusion.{name} is missing", "convert the base model again"
                )
        spec = cls(**block)
        if config.get("mask_token_id") != spec.mask_token_id:
            raise SpecError(
                f"config.json: mask_token_id is {config.get('mask_token_id')!r} but "
                f"diffusion.mask_token_id is {spec.mask_token_id}",
                "make the two equal; the tokenizer's mask token tells which is right",
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands in `config.json`."""
        return asdict(self)


def _bad(name: str, value: Any, wanted: str) -> SpecError:
    return SpecError(
        f"config.json: diffusion.{name} is {value!r}, wanted {wanted}",
        "upgrade ar2diff, or convert the base model again",
    )


# What an unconverted model is: its AR mode alone, and no token is a mask.
CAUSAL = Spec(
    format=FORMAT,
    noise="mask",
    mask_token_id=0,
    attention="causal_context",
    block_length=1,
    prediction="shift",
    ar_mode=True,
    local_window=None,
    max_length=0,
)
