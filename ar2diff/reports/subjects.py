"""Who is measured: the model, its base, a tuned control and others, all with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import find_checkpoint, is_draft, read_spec, weight_files
from ..checkpoint.model import Checkpoint, load_tokenizer
from ..checkpoint.output import record_of
from ..conversion.images import reach_in
from ..core.errors import Ar2DiffError, option
from ..core.forward import context_length
from ..core.options import STEPS, THRESHOLD
from ..generation.complete import load
from .figures import AR, BASELINE, LOOKUP, TOKEN_BY_TOKEN, Subject

THRESHOLDS = (0.98, THRESHOLD, 0.7)  # of the diffusion mode: careful, usual, fast
CHAIN, NODES = 7, 15  # drafts in a chain, and candidates of a tree, at most
LOSSLESS, LOSSLESS_CHAIN, LOSSLESS_TREE = "lossless", "lossless chain", "lossless tree"
USUAL = f"diffusion {THRESHOLD}"
EDITS = {"edit_threshold": 0.5, "corrector_steps": 1}  # of the diffusion mode
Settings = dict[str, dict[str, Any]]
# One token a forward, with the cache, whatever the generation config says.
STOCK_ARGUMENTS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
LOOKUP_TOKENS = 10  # that the cheap rival copies from the prompt


@dataclass(frozen=True)
class Held:
    """A subject that is loaded.

    Attributes:
        key: `model`, `base`, `control`, `against 1`, ...
        name: as the user gave it.
        known: ids below it are tokens of all subjects; others are not written, because the base
            could not judge them.
    """

    key: str
    name: str
    checkpoint: Checkpoint
    known: int

    @property
    def kind(self) -> str:
        """`draft`, `conversion` or `ar`."""
        if self.checkpoint.draft is not None:
            return "draft"
        return "ar" if self.checkpoint.spec is None else "conversion"

    @property
    def denoises(self) -> bool:
        """Whether it has a diffusion mode."""
        return self.kind == "conversion"

    @property
    def free(self) -> bool:
        """Whether its noise is in the free form: fixed steps, and no threshold."""
        return self.denoises and self.checkpoint.spec.noise.free

    @property
    def fills(self) -> bool:
        """Whether its diffusion mode fills gaps."""
        spec = self.checkpoint.spec
        return self.denoises and spec.noise.fills and spec.images != "prefix"

    @cached_property
    def reach(self) -> str:
        """How far it reads images: as of `until_of`."""
        spec = self.checkpoint.spec
        return (reach_in(self.checkpoint) if spec is None else spec.images) or "causal"

    def seen_in(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The arguments of `ar_nll` by which it sees the images whose codes are in rows."""
        codes = torch.tensor([token for row in rows for token in row if token < 0])
        if not len(codes):
            return {}
        return {"images": self.checkpoint.album.images_in(codes), "reach": self.reach}

    @property
    def usual(self) -> str:
        """The name of the setting of the diffusion mode that users would choose."""
        return _in_steps(self.checkpoint.spec.block_length or STEPS) if self.free else USUAL

    @property
    def has_ar_mode(self) -> bool:
        """Whether it writes from left to right."""
        return self.kind != "conversion" or self.checkpoint.spec.writes_ar

    @property
    def context(self) -> int | None:
        """Tokens that a row may have."""
        return context_length(self.checkpoint.model)

    def described(self) -> Subject:
        """What the report says of it."""
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        draft = None if checkpoint.draft is None else checkpoint.draft.spec
        return Subject(
            name=self.name,
            kind=self.kind,
            parameters=sum(p.numel() for p in checkpoint.model.parameters()),
            block_length=draft.block_length if draft else spec and spec.block_length,
            trained_length=(spec and spec.max_length) or None,
            context=self.context,
        )

    def settings(self) -> Settings:
        """The settings in which it is measured, by name."""
        if self.kind == "ar":
            lookup = {**STOCK_ARGUMENTS, "prompt_lookup_num_tokens": LOOKUP_TOKENS}
            return {BASELINE: STOCK_ARGUMENTS} | ({LOOKUP: lookup} if self.key == "base" else {})
        found: Settings = {}
        block = self.checkpoint.read_as.block_length
        if self.has_ar_mode:
            found[AR] = {"mode": "ar"}
        if self.checkpoint.read_as.lossless:
            found[LOSSLESS] = {"mode": "speculative"}
            if block is not None and block > 1:
                chain = min(CHAIN, block - 1)
                found[LOSSLESS_CHAIN] = {"mode": "speculative", "draft_length": chain}
        if self.kind == "draft":
            found[LOSSLESS_TREE] = {"mode": "speculative", "draft_nodes": NODES}
        if self.free:
            most = self.checkpoint.spec.block_length or STEPS
            for steps in sorted({most, -(-most // 2), -(-most // 4)}, reverse=True):
                found[_in_steps(steps)] = {"mode": "diffusion", "steps_per_block": steps}
        elif self.denoises:
            for threshold in THRESHOLDS:
                found[f"diffusion {threshold}"] = {"mode": "diffusion", "threshold": threshold}
            found[TOKEN_BY_TOKEN] = {"mode": "diffusion", "threshold": 1.0}
            if self.checkpoint.spec.noise.guesses:  # it was trained to correct what it decided
                for threshold in THRESHOLDS:
                    usual = found[f"diffusion {threshold}"]
                    found[f"diffusion {threshold}, edited"] = usual | EDITS
        return {name: {"do_sample": False, **arguments} for name, arguments in found.items()}


def _in_steps(steps: int) -> str:
    """The name of a setting of a noise in the free form."""
    return f"diffusion in {steps} steps"


def load_subjects(
    model: str, base: str | None, control: str | None, against: Sequence[str], dtype: str = "auto"
) -> dict[str, Held]:
    """Load all subjects, the model first.

    Raises:
        Ar2DiffError: one does not load; the model is not converted, or its base or control is; or
            they have different tokens.
    """
    named = {"base": base, "control": control}
    named |= {f"against {n}": name for n, name in enumerate(against, 1)}
    named = {key: name for key, name in named.items() if name is not None}
    places = {key: find_checkpoint(name) for key, name in named.items()}
    _check_model(model)
    for key in ("base", "control"):
        if key in named:
            _check_ar(key, named[key], places[key])
    for key, name in named.items():
        if key.startswith("against"):
            _check_model(name)
    found = {"model": load(model, dtype)}
    vocabulary = found["model"].tokenizer.get_vocab()
    for key, place in places.items():
        if not is_draft(place):
            _check_tokens(key, named[key], vocabulary, load_tokenizer(place).get_vocab())
    for key, name in named.items():
        found[key] = load(name, dtype)
        _check_tokens(key, name, vocabulary, found[key].tokenizer.get_vocab())
    known = min(c.model.config.get_text_config().vocab_size for c in found.values())
    named = {"model": model, **named}
    return {key: Held(key, named[key], checkpoint, known) for key, checkpoint in found.items()}


def base_of(model: str) -> str | None:
    """The base that a model's record or draft adapter names, if that is a folder here."""
    from ..checkpoint.files import DRAFT_CONFIG, read_json

    path = find_checkpoint(model)
    if is_draft(path):
        named = str(read_json(path / DRAFT_CONFIG, "").get("base"))
    else:
        named = str((record_of(path) or {}).get("base_model"))
    for folder in (Path(named), path / named):
        if folder.is_dir():
            return str(folder)
    return None


def identity_of(reference: str) -> list[Any]:
    """What tells a model from another one of the same name, without reading its weights."""
    path = find_checkpoint(reference)
    stats = (
        [(file.name, file.stat()) for file in weight_files(path)]
        if not is_draft(path)
        else [(file.name, file.stat()) for file in sorted(path.glob("*.safetensors"))]
    )
    return [reference, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _check_model(name: str) -> None:
    path = find_checkpoint(name)
    if not is_draft(path) and read_spec(path) is None:
        raise Ar2DiffError(
            f"model {name} is not converted, so there is no mode to report on",
            f"convert it with 'ar2diff adapt {name} --output-dir DIR', or pass it as "
            f"{option('base', name)} of a converted model",
        )


def _check_ar(key: str, name: str, path: Path) -> None:
    if is_draft(path) or read_spec(path) is not None:
        what = "a draft adapter" if is_draft(path) else "a converted model"
        raise Ar2DiffError(
            f"{option(key)} {name} is {what}, but must be an autoregressive one",
            f"pass it as {option('against', name)}",
        )


def _check_tokens(key: str, name: str, ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Refuse a subject whose tokens are not the model's; a conversion may add a few."""
    few, many = sorted((ours, theirs), key=len)
    differ = sum(many.get(token) != place for token, place in few.items())
    if differ:
        flag = key.partition(" ")[0]
        raise Ar2DiffError(
            f"{option(flag)} {name} has another tokenizer than the model: {differ} of its tokens "
            "differ",
            f"choose as {option(flag)} a model with the same tokens",
        )
