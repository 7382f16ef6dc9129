"""The contract of a converted checkpoint: what one of its logits means. It is written into
`config.json` and read from there.

This file is copied into converted folders. It imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import Ar2DiffError, shortened
from .fitted import NOISE_FILE
from .noise import Noise
from .noises import Mask, noise_of

# Masks; with a diffusion head; another noise; a vision-language model.
FORMAT, HEAD_FORMAT, NOISE_FORMAT, IMAGE_FORMAT = 1, 2, 3, 4
HEAD_FILE = "diffusion_head.safetensors"
ATTENTIONS = ("causal_context", "block_causal", "full")
PREDICTIONS = ("same", "shift")
REACHES = (None, "causal", "image", "prefix")
OWN = {HEAD_FORMAT: "head", IMAGE_FORMAT: "images"}  # the key that a format alone has
LOCAL_WINDOWS = (None, "kept", "dropped")
AGAIN = "upgrade ar2diff, or convert the base model again"


@dataclass(frozen=True)
class Head:
    """`diffusion.head`: a bigram head that corrects the logits of a token by the one before it.

    Attributes:
        rank: of the bias.
        sha256: of the file that holds it.
    """

    rank: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise _bad("head.rank", self.rank, "an integer of at least 1")
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise _bad("head.sha256", self.sha256, "64 hexadecimal digits")

    @classmethod
    def of(cls, value: Any) -> Head:
        """Read the value of the key; errors as of `Spec.from_config`."""
        if not isinstance(value, Mapping) or value.keys() != {"rank", "sha256"}:
            raise _bad("head", value, "an object with the keys rank and sha256")
        return cls(**value)


@dataclass(frozen=True)
class Spec:
    """The `diffusion` block of `config.json`; every key is required, but `head` belongs to format 2
    alone, and `images` to format 4.

    Attributes:
        format: version of the block: 1; 2 with a head; 3 with another noise than the mask; 4 of a
            vision-language model. A reader refuses a higher one.
        noise: forward process: `mask`, or, in formats 3 and 4, an object with a kind and its
            parameters.
        mask_token_id: id of the absorbing state; of noises without one, a token that nothing shows.
        attention: `causal_context`, `block_causal` or `full`.
        block_length: number of tokens denoised together; `None` for `full`.
        prediction: whether the logits of token i are read at slot i (`same`) or i - 1 (`shift`).
        ar_mode: whether the same weights are still a trained left-to-right model.
        local_window: whether the base's sliding window was `kept` or `dropped`; `None` if it had
            none.
        max_length: length in tokens of the longest row trained on.
        head: the diffusion head; `None` if there is none.
        images: what the base's clean text reads beside what stands before it: `causal`, nothing;
            `image`, an image all of itself; `prefix`, the prompt all of itself. `None` for models
            of text.

    Raises:
        Ar2DiffError: a value that this version cannot honour; it names the key, not the file.
    """

    format: int
    noise: Noise
    mask_token_id: int
    attention: str
    block_length: int | None
    prediction: str
    ar_mode: bool
    local_window: str | None
    max_length: int
    head: Head | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        if type(self.format) is int and self.format > IMAGE_FORMAT:
            raise Ar2DiffError(
                f"diffusion.format is {shortened(self.format)}; this version of ar2diff reads "
                f"formats up to {IMAGE_FORMAT}",
                "upgrade ar2diff to the version that wrote the checkpoint",
            )
        object.__setattr__(self, "noise", noise_of(self.noise))
        for name, allowed in (
            ("attention", ATTENTIONS),
            ("prediction", PREDICTIONS),
            ("local_window", LOCAL_WINDOWS),
            ("images", REACHES),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join("null" if value is None else value for value in allowed)
                raise _bad(name, getattr(self, name), f"one of {known}")
        if type(self.ar_mode) is not bool:
            raise _bad("ar_mode", self.ar_mode, "true or false")
        for name in ("format", "mask_token_id", "max_length"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise _bad(name, getattr(self, name), "an integer of at least 0")
        if self.format != format_of(self.noise, self.head, self.images):
            raise ValueError(
                f"format {self.format} with {self.noise}, head {self.head}, images {self.images}"
            )
        if self.noise.fits and self.noise.fitted is None:
            raise _bad("noise.sha256", None, f"the SHA-256 of {NOISE_FILE}")
        check_reads(self.noise, self.attention, self.prediction)
        if self.attention == "full":
            if self.block_length is not None:
                raise _bad("block_length", self.block_length, "null, because attention is full")
        elif type(self.block_length) is not int or self.block_length < 1:
            raise _bad("block_length", self.block_length, "an integer of at least 1")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec | None:
        """Read the block from a parsed `config.json`; `None` if there is no block.

        Raises:
            Ar2DiffError: an unknown key or value, a missing key, a higher format, or a
                `mask_token_id` beside the block that differs from the one inside. The message
                names the key; the caller names the file, with `Ar2DiffError.about`.
        """
        block = config.get("diffusion")
        if block is None:
            return None
        if not isinstance(block, Mapping):
            raise Ar2DiffError(
                f"diffusion is {shortened(block)}, but must be a JSON object",
                "convert the base model again",
            )
        version = block.get("format", 0)
        with_head = version == HEAD_FORMAT
        absent = {"head", "images"} - {OWN.get(version)}
        names = [f.name for f in fields(cls) if f.name not in absent]
        if type(version) is int and version > IMAGE_FORMAT:  # its keys may be unknown here
            cls(**{name: block.get(name) for name in names})
        for key in block:
            if key not in names:
                raise Ar2DiffError(
                    f"diffusion has an unknown key, {shortened(key)}",
                    "upgrade ar2diff, or remove the key",
                )
        for name in names:
            if name not in block:
                raise Ar2DiffError(f"diffusion.{name} is missing", "convert the base model again")
        named = block["noise"]
        if version != IMAGE_FORMAT and not (
            isinstance(named, Mapping) if version == NOISE_FORMAT else named == Mask.kind
        ):
            wanted = "an object with a kind" if version == NOISE_FORMAT else Mask.kind
            raise _bad("noise", named, f"{wanted} in format {shortened(version)}")
        if isinstance(named, Mapping) and noise_of(named) == Mask():
            raise _bad("noise.kind", Mask.kind, f"another one: masks are noise {Mask.kind}")
        head = {"head": Head.of(block["head"])} if with_head else {}
        spec = cls(**{**block, **head})
        beside = config.get("mask_token_id")
        if type(beside) is not int or beside != spec.mask_token_id:
            raise Ar2DiffError(
                f"mask_token_id is {shortened(beside)}, but diffusion.mask_token_id is "
                f"{shortened(spec.mask_token_id)}",
                "set both to the id of the tokenizer's mask token",
            )
        return spec

    @property
    def writes_ar(self) -> bool:
        """Whether there is an AR mode that reads text as its base does."""
        return self.ar_mode and self.attention == "causal_context"

    @property
    def lossless(self) -> bool:
        """Whether the AR mode can verify drafts: tokens that the model reads in masks."""
        return self.writes_ar and self.noise.starts_masked

    def to_dict(self) -> dict[str, Any]:
        """The block as it is written in `config.json`."""
        noise = self.noise.kind if self.noise == Mask() else self.noise.to_dict()
        block = {f.name: getattr(self, f.name) for f in fields(self)} | {"noise": noise}
        block["head"] = None if self.head is None else asdict(self.head)
        return {
            name: value
            for name, value in block.items()
            if name not in OWN.values() or name == OWN.get(self.format)
        }


def format_of(noise: Noise, head: Head | None, images: str | None = None) -> int:
    """The version of a block with this noise, head and reach of images.

    Raises:
        Ar2DiffError: no version has a head and another noise than the mask, or images.
    """
    if images is not None:
        if head is not None:
            raise _bad("head", "an object", "left out for a vision-language model")
        return IMAGE_FORMAT
    if noise == Mask():
        return FORMAT if head is None else HEAD_FORMAT
    if head is not None:
        raise _bad("noise", noise.kind, "mask where there is a diffusion head")
    return NOISE_FORMAT


def sees_itself(attention: str, prediction: str) -> bool:
    """Whether each token is predicted at a slot that sees what the token's own slot shows: the
    first one of a block does not, where it is read at the slot before."""
    return prediction == "same" or attention == "full"


def check_reads(noise: Noise, attention: str, prediction: str) -> None:
    """Refuse logits that cannot mean what the noise says they mean."""
    if noise.logits == "posterior" and not sees_itself(attention, prediction):
        raise _bad(
            "noise.logits", "posterior",
            "others with prediction shift in blocks: the first token of a block is read at a slot "
            "that does not see it",
        )  # fmt: skip


def _bad(name: str, value: Any, wanted: str) -> Ar2DiffError:
    return Ar2DiffError(f"diffusion.{name} is {shortened(value)}, but must be {wanted}", AGAIN)


# An unconverted model as a spec: its AR mode alone, with no token as the mask.
CAUSAL = Spec(
    format=FORMAT,
    noise=Mask(),
    mask_token_id=0,
    attention="causal_context",
    block_length=1,
    prediction="shift",
    ar_mode=True,
    local_window=None,
    max_length=0,
)
