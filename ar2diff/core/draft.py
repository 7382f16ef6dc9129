"""A draft adapter: a frozen model's own layers, taught to guess several of its next tokens at once.

In speculation, masks follow the newest tokens, and the model reads them through a small branch
beside some of its linear layers (LoRA). The branch sees *noisy* slots only: for clean ones it is
skipped, not added as zeros, and no clean slot reads a noisy one. So the model's own logits are the
same bits with the adapter and without it, and a token that they verify is the model's own (I-DLM's
gated LoRA, 2604.11035). The guesses are drawn from left to right, each with a bias by its head.

A folder of a draft adapter holds `draft.json` and `draft.safetensors`, and no adapter_config.json:
peft knows no gate and would apply the branch everywhere.
This file is copied into converted folders: it imports torch, safetensors, transformers and its
neighbours alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from .errors import Ar2DiffError, first_line, shortened
from .head import DraftHead
from .noises import Mask
from .spec import CAUSAL, Spec, format_of

CONFIG, WEIGHTS = "draft.json", "draft.safetensors"
FORMAT = 1
SCALE = 2.0  # of the branch while it is trained, as alpha = 2 r; folded into the weights on disk
AGAIN = "download the draft adapter again, or train it again with 'ar2diff draft'"


@dataclass(frozen=True)
class DraftSpec:
    """What `draft.json` says of an adapter; every key is required.

    Attributes:
        format: version of the file; a reader refuses a higher one.
        base: folder or Hub id of the model that it drafts for. revision: the commit of a Hub id.
        weights_sha256: fingerprint of the base's weights. An adapter still works on others; its
            drafts are accepted less often.
        vocabulary: rows of the base's embeddings; the mask is the id after the last.
        hidden_size: width of an embedding.
        block_length: masks that follow a candidate, as trained.
        targets: names of the linear layers with a branch. rank: of the branch.
        head_rank: rank of the head; 0: none.
    """

    format: int
    base: str
    revision: str | None
    weights_sha256: str
    vocabulary: int
    hidden_size: int
    block_length: int
    targets: tuple[str, ...]
    rank: int
    head_rank: int

    @classmethod
    def from_dict(cls, values: Any) -> DraftSpec:
        """Read a parsed `draft.json`.

        Raises:
            Ar2DiffError: a higher format, a key that is unknown or missing, or a bad value. The
                message names the key; the caller names the file.
        """
        if not isinstance(values, Mapping):
            raise Ar2DiffError("it is not a JSON object", AGAIN)
        version = values.get("format")
        if type(version) is int and version > FORMAT:
            raise Ar2DiffError(
                f"format is {shortened(version)}; this version of ar2diff reads format {FORMAT}",
                "upgrade ar2diff to the version that wrote it",
            )
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise Ar2DiffError(f"it has an unknown key, {shortened(key)}", AGAIN)
        for name in names:
            if name not in values:
                raise Ar2DiffError(f"{name} is missing", AGAIN)
        kinds: dict[str, Callable[[Any], bool]] = {
            "base": lambda v: isinstance(v, str) and v != "",
            "revision": lambda v: v is None or isinstance(v, str),
            "weights_sha256": lambda v: isinstance(v, str),
            "targets": lambda v: (
                isinstance(v, list)
                and all(isinstance(name, str) for name in v)
                and len(set(v)) == len(v) > 0
            ),
            "head_rank": lambda v: type(v) is int and v >= 0,
        }
        for name in names:
            fits = kinds.get(name, lambda v: type(v) is int and v >= 1)
            if not fits(values[name]):
                raise Ar2DiffError(f"{name} is {shortened(values[name])}", AGAIN)
        if values["block_length"] < 2:
            raise Ar2DiffError("block_length is 1, which leaves nothing to draft", AGAIN)
        return cls(**{**values, "targets": tuple(values["targets"])})

    def to_dict(self) -> dict[str, Any]:
        """The content of `draft.json`."""
        return {**asdict(self), "targets": list(self.targets)}

    def spec_for(self, base: Spec | None) -> Spec:
        """How the model is read with this adapter: its AR mode, and blocks of the adapter's own
        masks that start at any position, whatever the noise of the base.

        Args:
            base: the spec in the model's config, if it is a converted one.
        """
        base = base or CAUSAL
        return replace(
            base,
            format=format_of(Mask(), base.head, base.images),
            noise=Mask(),
            mask_token_id=self.vocabulary,
            block_length=self.block_length,
            prediction="shift",
        )


class Draft(torch.nn.Module):
    """The weights of a draft adapter. It does not hold the model that it drafts for.

    Args:
        spec: sizes of everything.
        shapes: (outputs, inputs) of each layer of `spec.targets`.
        generator: of the initial weights, with which the adapter changes nothing yet; None leaves
            them at zero, to be loaded.

    Attributes:
        row: [H] the embedding of a mask.
        down, up: [rank, inputs] and [outputs, rank] of each target.
        head: what the guesses know of each other, or None.
        scale: factor on the branch.
    """

    def __init__(
        self,
        spec: DraftSpec,
        shapes: list[tuple[int, int]],
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.spec, self.scale = spec, 1.0 if generator is None else SCALE
        self._found: tuple[Any, list[Any]] | None = None
        self.row = torch.nn.Parameter(torch.zeros(spec.hidden_size))
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for outputs, inputs in shapes:
            down = torch.zeros(spec.rank, inputs)
            if generator is not None:
                down.normal_(std=inputs**-0.5, generator=generator)
            self.down.append(torch.nn.Parameter(down))
            self.up.append(torch.nn.Parameter(torch.zeros(outputs, spec.rank)))
        rank = spec.head_rank
        sizes = (spec.vocabulary, rank, spec.hidden_size)
        self.head = DraftHead(*sizes, generator) if rank else None

    @property
    def mask_token_id(self) -> int:
        """The id that stands for a mask: one that no embedding has."""
        return self.spec.vocabulary

    def spec_for(self, base: Spec | None) -> Spec:
        """See `DraftSpec.spec_for`."""
        return self.spec.spec_for(base)

    @contextmanager
    def applied(self, model: Any, noisy: slice) -> Iterator[None]:
        """In the model's forwards by this thread, until the end of the `with`, the branch acts on
        the slots `noisy`, and the mask's id has an embedding.

        Args:
            model: the causal LM, not wrapped.
            noisy: slots of each row, which every target sees as [B, S, inputs].
        """
        own, put = get_ident(), []

        def patch(layer: Any, forward: Callable[[Tensor], Tensor]) -> None:
            held = vars(layer)  # torch's own setter takes longer, and so do hooks
            put.append((held, held.get("forward")))
            held["forward"] = forward

        for layer, down, up in zip(self._layers(model), self.down, self.up, strict=True):
            patch(layer, _branched(layer.forward, down, up, self.scale, noisy, own))
        table = model.get_input_embeddings()
        patch(table, _embedded(table.forward, self.row, self.mask_token_id, own))
        try:
            yield
        finally:
            for held, before in put:
                if before is None:
                    held.pop("forward", None)
                else:
                    held["forward"] = before

    def _layers(self, model: Any) -> list[Any]:
        """The layers of a model that have a branch, looked up once."""
        if self._found is None or self._found[0]() is not model:
            layers = [model.get_submodule(name) for name in self.spec.targets]
            self._found = ref(model), layers
        return self._found[1]

    def named(self) -> dict[str, torch.nn.Parameter]:
        """The weights by their names in `draft.safetensors`."""
        held = {"row": self.row}
        for name, down, up in zip(self.spec.targets, self.down, self.up, strict=True):
            held |= {f"{name}.down": down, f"{name}.up": up}
        if self.head is not None:
            held |= {f"head.{name}": tensor for name, tensor in self.head.named_parameters()}
        return held

    def tensors(self) -> dict[str, Tensor]:
        """The content of `draft.safetensors`."""
        scales = {f"{name}.up": self.scale for name in self.spec.targets}
        return {
            name: (tensor.detach() * scales.get(name, 1.0)).cpu().contiguous()
            for name, tensor in self.named().items()
        }

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Take the weights of a `draft.safetensors`, as they are.

        Raises:
            Ar2DiffError: names or shapes are not those of the spec.
        """
        own = self.named()
        for name in sorted(own.keys() ^ held.keys()):
            problem = "is missing" if name in own else "is not in its spec"
            raise Ar2DiffError(f"tensor {shortened(name)} {problem}", AGAIN)
        for name, tensor in own.items():
            if held[name].shape != tensor.shape or not held[name].is_floating_point():
                raise Ar2DiffError(f"tensor {name} does not have the shape in its spec", AGAIN)
        self.scale = 1.0
        for module in self.modules():  # in place of parameters without storage
            for name, tensor in module.named_parameters(recurse=False):
                found = next(key for key, parameter in own.items() if parameter is tensor)
                setattr(module, name, torch.nn.Parameter(held[found]))


def _branched(
    forward: Callable[[Tensor], Tensor],
    down: Tensor,
    up: Tensor,
    scale: float,
    noisy: slice,
    own: int,
) -> Callable[[Tensor], Tensor]:
    """A layer's forward that adds the branch at the noisy slots, and touches no other."""

    def branched(x: Tensor) -> Tensor:
        output = forward(x)
        if _elsewhere(own):
            return output
        a, b = down.to(x.dtype), up.to(x.dtype)
        if len(x) == 1:  # the layer made its output for this forward alone
            output[0, noisy].addmm_(linear(x[0, noisy], a), b.T, alpha=scale)
        else:
            output[:, noisy].add_(linear(linear(x[:, noisy], a), b), alpha=scale)
        return output

    return branched


def _embedded(
    forward: Callable[[Tensor], Tensor], row: Tensor, mask_token_id: int, own: int
) -> Callable[[Tensor], Tensor]:
    """The embeddings' forward that knows the mask's id, which the table lacks."""

    def embedded(ids: Tensor) -> Tensor:
        if _elsewhere(own):
            return forward(ids)
        masked = ids == mask_token_id
        output = forward(ids.masked_fill(masked, 0))
        return torch.where(masked[..., None], row.to(output.dtype), output)

    return embedded


def _elsewhere(own: int) -> bool:
    """Whether the forward is that of another thread; those that are compiled never are."""
    return not torch.compiler.is_compiling() and get_ident() != own


def new_draft(model: Any, spec: DraftSpec, generator: torch.Generator) -> Draft:
    """An untrained draft adapter for a model, which changes nothing yet.

    Raises:
        Ar2DiffError: as `shapes_of`.
    """
    draft = Draft(spec, shapes_of(model, spec), generator)
    with torch.no_grad():
        draft.row.copy_(model.get_input_embeddings().weight.detach().float().mean(0))
    return draft


def shapes_of(model: Any, spec: DraftSpec) -> list[tuple[int, int]]:
    """(outputs, inputs) of each target of a spec in a model.

    Raises:
        Ar2DiffError: the model lacks one of the layers, or has other sizes.
    """
    table = model.get_input_embeddings().weight
    if table.shape != (spec.vocabulary, spec.hidden_size):
        raise Ar2DiffError(
            f"it was trained for a model with embeddings of {spec.vocabulary} x "
            f"{spec.hidden_size}, but those of this one are {table.shape[0]} x {table.shape[1]}",
            "use it with the model that its draft.json names",
        )
    layers = dict(model.named_modules())
    shapes = []
    for name in spec.targets:
        layer = layers.get(name)
        names = ("nf", "nx") if isinstance(layer, Conv1D) else ("out_features", "in_features")
        sizes = tuple(getattr(layer, size, None) for size in names)
        if None in sizes:
            raise Ar2DiffError(
                f"it adds to the linear layer {shortened(name)}, which this model does not have",
                "use it with the model that its draft.json names",
            )
        shapes.append(sizes)
    return shapes


def read_draft_spec(file: Path) -> DraftSpec:
    """The spec in a `draft.json`.

    Raises:
        Ar2DiffError: it cannot be read, or is not one that this version honours.
    """
    try:
        return DraftSpec.from_dict(json.loads(file.read_text()))
    except Ar2DiffError as error:
        raise error.about(f"draft adapter {file.parent}: {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Ar2DiffError(f"{file} cannot be read ({first_line(error)})", AGAIN) from error


def load_draft(folder: Path, model: Any) -> Draft:
    """The draft adapter in a folder, for a loaded model, on its device.

    Raises:
        Ar2DiffError: it is damaged, or does not fit the model.
    """
    spec = read_draft_spec(folder / CONFIG)
    try:
        shapes = shapes_of(model, spec)
        with torch.device("meta"):  # sizes are compared before any memory is taken
            draft = Draft(spec, shapes)
        draft.load(load_file(folder / WEIGHTS))
    except Ar2DiffError as error:
        raise error.about(f"draft adapter {folder}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        what = f"{folder / WEIGHTS} cannot be read ({first_line(error)})"
        raise Ar2DiffError(what, AGAIN) from error
    return draft.to(device=model.device, dtype=table_dtype(model)).eval().requires_grad_(False)


def table_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's embeddings."""
    return model.get_input_embeddings().weight.dtype
