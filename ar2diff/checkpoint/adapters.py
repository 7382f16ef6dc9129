"""Adapters: LoRA and DoRA on a converted model, with the embedding of the mask token trained too,
and the folders that hold them.

An adapter changes a *converted* model. Its folder names that base and holds `diffusion.json`: what
a logit of the adapted model means, and how the base is recognized.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..config.recipe import Peft
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..core.spec import Spec
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSION,
    adapter_spec,
    find_checkpoint,
    is_adapter,
    is_draft,
    read_json,
    read_spec,
)
from .layers import named_layers
from .model import Checkpoint, load_model, load_tokenizer, write_spec
from .output import Output, write_json
from .stored import file_tensors, fingerprint

# Keys of the spec that training may change; `format` follows from others.
MAY_DIFFER = ("format", "block_length", "ar_mode", "max_length")
RETRAIN = "train the adapter again"


@dataclass(frozen=True)
class Base:
    """The converted model under an adapter.

    Attributes:
        reference: an absolute folder, or a Hub id. revision: the commit of the Hub id, or None.
        spec: the `diffusion` block of its config.
        mask_row: the result of `mask_row_of`. weights: the result of `stored.fingerprint`.
    """

    reference: str
    revision: str | None
    spec: Spec
    mask_row: str
    weights: str

    def known(self) -> dict[str, Any]:
        """How `diffusion.json` describes the base."""
        return {
            "diffusion": self.spec.to_dict(),
            "mask_row_sha256": self.mask_row,
            "weights_sha256": self.weights,
        }


def add_adapter(checkpoint: Checkpoint, recipe: Any) -> None:
    """Wrap the model of a loaded, converted checkpoint as the recipe's `peft` section says. From
    then on only the adapter's parameters get gradients. Without such a section nothing changes.

    Raises:
        Ar2DiffError: the model on disk is not converted; the recipe asks for a change that an
            adapter cannot make; a target matches no layer, or the output embeddings.
    """
    wanted: Peft | None = recipe.peft
    if wanted is None:
        return
    spec = read_spec(checkpoint.path)
    check_base(checkpoint.path, spec)
    if name := _changed(spec, checkpoint.spec):
        before, after = spec.to_dict()[name], checkpoint.spec.to_dict()[name]
        if name == "noise":
            known, wished = spec.noise, checkpoint.spec.noise
            steps = "at least one step" if wished.fits else option("max_steps", 0)
            raise Ar2DiffError(
                f"an adapter cannot change the noise of its base from {known} to {wished}",
                f"convert the base with this {option('noise.kind')} and {steps} first, or remove "
                "the peft section from the recipe",
            )
        raise Ar2DiffError(
            f"an adapter cannot change {name} from {before} to {after}",
            f"set {option(f'convert.{name}', before)}, or remove the peft section from the recipe",
        )
    model = checkpoint.model
    targets = named_layers(model, wanted.targets, "peft.targets")
    config = LoraConfig(
        r=wanted.r,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        use_dora=wanted.method == "dora",
        target_modules=targets,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        task_type="CAUSAL_LM",
    )
    if wanted.mask_row:
        config.trainable_token_indices = {_embeddings_name(model): [spec.mask_token_id]}
    row = mask_row_of(model, spec.mask_token_id)
    weights = fingerprint(checkpoint.path) if row else ""
    base = Base(*name_of(checkpoint.path), spec, row, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        _wrap(checkpoint, config, base)


def check_base(path: Path, spec: Spec | None) -> None:
    """Refuse a model that cannot be the base of an adapter. Cheap: call it before loading a model.

    Args:
        path: folder of the model. spec: the result of `read_spec`.

    Raises:
        Ar2DiffError: the model is an adapter itself, is not converted, or has a diffusion head.
    """
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is itself an adapter",
            f"run 'ar2diff merge {path} DIR', then train on DIR",
        )
    if spec is None:
        raise Ar2DiffError(
            f"model {path} is not converted: an adapter needs a diffusion model as its base",
            f"run 'ar2diff adapt {path} --max-steps 0 --output-dir DIR', then train on DIR",
        )
    if spec.head is not None:
        raise Ar2DiffError(
            f"model {path} has a diffusion head, which adapters do not train",
            f"use a model that was converted without {option('convert.head_rank')}",
        )


def load_adapter(
    path: Path,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    base: str | None = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load the base that an adapter folder names, check that it is the model that the adapter was
    trained on, and put the adapter on it.

    Args:
        attn_implementation, device, quantization: as for `load_model`.
        base: folder or Hub id to use instead of the one that the adapter names.

    Raises:
        Ar2DiffError: the base is missing, is not converted, or is not the one that the adapter was
            trained on; the adapter is damaged.
    """
    spec, known, config = adapter_spec(path), _read_base(path), _read_config(path)
    file_tensors(path / ADAPTER_WEIGHTS)
    folder = _find_base(path, base or _reference(config))
    found = read_spec(folder)
    fix = "set base_model_name_or_path in its adapter_config.json to the model it was trained on"
    if is_adapter(folder) or is_draft(folder) or found is None:
        raise Ar2DiffError(f"adapter {path}: its base {folder} is not a converted model", fix)
    for name, value in found.to_dict().items():
        trained_on = known["diffusion"].get(name)
        if value != trained_on:
            raise Ar2DiffError(
                f"adapter {path} was trained on a base with {name} {shortened(trained_on)}, but "
                f"its base {folder} has {value}",
                fix,
            )
    if name := _changed(found, spec):
        raise Ar2DiffError(
            f"adapter {path}: {name} is {getattr(spec, name)} in its {DIFFUSION}, but "
            f"{getattr(found, name)} in its base, and no adapter can change that",
            f"download the adapter again, or {RETRAIN}",
        )
    other = Ar2DiffError(
        f"adapter {path}: the weights of its base {folder} are not the ones it was trained on", fix
    )
    weights = fingerprint(folder)
    if weights != known.get("weights_sha256"):
        raise other
    checkpoint = load_model(folder, attn_implementation, device, quantization, dtype)
    mask_row = mask_row_of(checkpoint.model, found.mask_token_id)
    if mask_row != known.get("mask_row_sha256"):
        raise other
    _wrap(checkpoint, config, Base(*name_of(folder), found, mask_row, weights))
    _load_weights(checkpoint.model, path)
    checkpoint.path, checkpoint.processor_path = path, folder
    if (path / "tokenizer_config.json").is_file():  # training may have given it a chat template
        checkpoint.tokenizer = load_tokenizer(path)
    write_spec(checkpoint, replace(spec, noise=checkpoint.spec.noise))
    checkpoint.model.eval()
    return checkpoint


def save_adapter(
    checkpoint: Checkpoint,
    output: Output,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the adapter of a checkpoint.

    Args:
        record: content of `ar2diff.json`.
        weights: {parameter name: tensor} for the trained parameters, if the model itself does not
            hold them whole.

    Raises:
        Ar2DiffError: as for `Output.staged`.
    """
    state = get_peft_model_state_dict(
        checkpoint.model, state_dict=weights, save_embedding_layers=False
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with output.staged(record) as folder:
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        save_adapter_config(checkpoint, folder)


def save_adapter_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files of an adapter except the weights and the record."""
    base, config = checkpoint.base, checkpoint.model.peft_config["default"]
    named = replace(
        config,
        base_model_name_or_path=base.reference,
        revision=base.revision,
        inference_mode=True,
        target_modules=sorted(config.target_modules),
    )
    named.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    spec = checkpoint.spec.to_dict()
    write_json(folder / DIFFUSION, {"diffusion": spec, "base": base.known()})


@torch.no_grad()
def mask_row_of(model: Any, mask_token_id: int) -> str:
    """SHA-256 of the mask token's embedding in float32, whatever its stored dtype. Empty for a
    model without storage, whose memory is being estimated."""
    row = model.get_input_embeddings().weight[mask_token_id]
    if row.is_meta:
        return ""
    return hashlib.sha256(row.float().cpu().numpy().astype("<f4").tobytes()).hexdigest()


class AddToColumn(torch.autograd.Function):
    """logits[..., token] += column, in place: autograd's own operation would copy the logits and
    their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, token: int) -> Tensor:
        """The logits, changed in place."""
        ctx.mark_dirty(logits)
        ctx.token = token
        logits.select(-1, token).add_(column)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of the logits and of the column."""
        return grad, grad.select(-1, ctx.token), None


class MaskRow(TrainableTokensLayer):
    """peft's layer for trainable tokens, but it replaces rows only where they are used. peft's own
    layer copies the whole table in each forward pass and computes a gradient for all of it."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of ids or, for a head tied to them, the logits of hidden states."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in active_adapters:
            rows, before = self.trainable_tokens_delta[name], self.trainable_tokens_original[name]
            for token, row, old in zip(self.token_indices[name], rows, before, strict=True):
                if isinstance(self.base_layer, torch.nn.Embedding):
                    scale = self._get_embed_scale()
                    new = row.to(result) if scale is None else row.to(result) * scale.to(result)
                    result = torch.where((x == token)[..., None], new, result)
                else:
                    column = (x @ (row - old).to(x.dtype)).to(result.dtype)
                    result = AddToColumn.apply(result, column, token)
        return result


def _wrap(checkpoint: Checkpoint, config: LoraConfig, base: Base) -> None:
    model = checkpoint.model
    model.requires_grad_(False)
    try:
        wrapped = PeftModelForCausalLM(model, config)
    except Exception as error:  # peft asserts, indexes and divides on the way
        raise Ar2DiffError(
            f"model {checkpoint.path}: peft cannot put an adapter on it ({first_line(error)})",
            f"name other layers in {option('peft.targets')}, or set it to all-linear",
        ) from error
    for module in wrapped.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = MaskRow
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    checkpoint.model, checkpoint.base = wrapped, base


def _changed(base: Spec, spec: Spec) -> str | None:
    """The first key in which an adapter's spec must not differ from that of its base, but does."""
    names = (field.name for field in fields(Spec) if field.name not in MAY_DIFFER)
    before, after = base.to_dict(), spec.to_dict()
    return next((name for name in names if before.get(name) != after.get(name)), None)


def _embeddings_name(model: Any) -> str:
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def name_of(folder: Path) -> tuple[str, str | None]:
    """How the config of an adapter names a base: an absolute folder, or a Hub id and its commit."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder.resolve()), None


def _reference(config: LoraConfig) -> str:
    name = str(config.base_model_name_or_path or "")
    return f"{name}@{config.revision}" if config.revision else name


def _find_base(path: Path, reference: str) -> Path:
    try:
        return find_checkpoint(reference)
    except Ar2DiffError as error:
        raise Ar2DiffError(
            f"adapter {path}: its base was not found: {error.what}",
            f"correct base_model_name_or_path in {path / ADAPTER_CONFIG}",
        ) from error


def _read_config(path: Path) -> LoraConfig:
    """The adapter's config, if ar2diff can read it. It must not name code to import."""
    values = read_json(path / ADAPTER_CONFIG, RETRAIN)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    fix = "merge it into its base with peft's merge_and_unload first"
    if kind != "LORA":
        raise Ar2DiffError(
            f"adapter {path} is of type {shortened(kind)}, but ar2diff only reads LoRA and DoRA",
            fix,
        )
    if values.get("megatron_config") or values.get("modules_to_save"):
        raise Ar2DiffError(
            f"adapter {path} contains modules other than LoRA layers, which ar2diff cannot read",
            fix,
        )
    try:
        return LoraConfig.from_pretrained(str(path))
    except (TypeError, ValueError) as error:
        raise Ar2DiffError(f"{path / ADAPTER_CONFIG}: {first_line(error)}", RETRAIN) from error


def _read_base(path: Path) -> dict[str, Any]:
    base = read_json(path / DIFFUSION, "").get("base")
    if not isinstance(base, dict) or not isinstance(base.get("diffusion"), dict):
        raise Ar2DiffError(
            f"{path / DIFFUSION} does not say what base the adapter was trained on",
            RETRAIN,
        )
    return base


def _load_weights(model: Any, path: Path) -> None:
    damaged = Ar2DiffError(
        f"adapter {path}: {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} do not belong together",
        f"download the adapter again, or {RETRAIN}",
    )
    state = load_file(path / ADAPTER_WEIGHTS)
    try:
        result = set_peft_model_state_dict(model, state)
    except (RuntimeError, KeyError) as error:
        raise damaged from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if result.unexpected_keys or wanted - set(state):
        raise damaged
