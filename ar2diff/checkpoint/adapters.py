"""Adapters: LoRA and DoRA on a converted model, the mask token's row trained beside them, folders
of them, and the merge into a whole model.

An adapter says what a *converted* model becomes. Its folder names that base and carries
`diffusion.json`: what a logit of the adapted model means, and by what the base is known.
"""

from __future__ import annotations

import difflib
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
from ..core.errors import Ar2DiffError, first_line
from ..core.spec import Spec
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSION,
    RUN_FILE,
    adapter_spec,
    find_checkpoint,
    is_adapter,
    read_json,
    read_spec,
    tensor_dtypes,
)
from .model import Checkpoint, load_model, load_tokenizer, write_spec
from .output import staged, write_json

MAY_DIFFER = ("block_length", "ar_mode", "max_length")  # what training may change of a spec


@dataclass(frozen=True)
class Base:
    """The converted model under an adapter.

    Attributes:
        reference: absolute folder, or Hub id. revision: of the Hub id, or None.
        spec: the `diffusion` block of its config. mask_row: sha256 of its mask token's embedding.
    """

    reference: str
    revision: str | None
    spec: Spec
    mask_row: str


def add_adapter(checkpoint: Checkpoint, recipe: Any) -> None:
    """Wrap the model of a loaded, converted checkpoint as the recipe's `peft` section says; without
    one, leave it as it is. From then on the adapter's parameters alone get gradients.

    Raises:
        Ar2DiffError: the model on disk is not converted, or the run would make another model of it
            than an adapter can; targets that match nothing, or the output embeddings.
    """
    wanted: Peft | None = recipe.peft
    if wanted is None:
        return
    spec = read_spec(checkpoint.path)
    check_base(checkpoint.path, spec)
    _check_change(spec, checkpoint.spec)
    model = checkpoint.model
    targets = _targets(model, wanted.targets)
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
    base = Base(*_name_of(checkpoint.path), spec, mask_row_of(model, spec.mask_token_id))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        _wrap(checkpoint, config, base)


def check_base(path: Path, spec: Spec | None) -> None:
    """Refuse what no adapter can stand on. Costs nothing: call it before a model is loaded.

    Args:
        path: folder of the model. spec: of `read_spec`.
    """
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter itself", f"run 'ar2diff merge {path} DIR' first"
        )
    if spec is None:
        raise Ar2DiffError(
            f"model {path} is not converted: an adapter needs a diffusion model as its base",
            f"run 'ar2diff adapt {path} --max-steps 0 --output-dir DIR', and train on DIR",
        )


def load_adapter(
    path: Path,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    base: str | None = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load the base that an adapter folder names, check that it is that one, and put the adapter
    on it.

    Args:
        base: folder or Hub id to take instead of the one that the adapter names.

    Raises:
        Ar2DiffError: the base is not there, is not converted, or is another than the adapter was
            trained on; the adapter is damaged.
    """
    spec, known, config = adapter_spec(path), _read_base(path), _read_config(path)
    tensor_dtypes(path / ADAPTER_WEIGHTS)
    folder = _find_base(path, base or _reference(config))
    found = read_spec(folder)
    if is_adapter(folder) or found is None:
        raise Ar2DiffError(
            f"adapter {path}: its base {folder} is not a converted model",
            "give the converted checkpoint that it was trained on",
        )
    for name in (field.name for field in fields(Spec)):
        if getattr(found, name) != known["diffusion"].get(name):
            raise Ar2DiffError(
                f"adapter {path}: it was trained on {name} {known['diffusion'].get(name)}, its "
                f"base {folder} has {getattr(found, name)}",
                "give the converted checkpoint that it was trained on",
            )
    checkpoint = load_model(folder, attn_implementation, device, quantization, dtype)
    mask_row = mask_row_of(checkpoint.model, found.mask_token_id)
    if mask_row != known.get("mask_row_sha256"):
        raise Ar2DiffError(
            f"adapter {path}: the mask token of its base {folder} has another embedding than the "
            "one it was trained on",
            "give the converted checkpoint that it was trained on",
        )
    _wrap(checkpoint, config, Base(*_name_of(folder), found, mask_row))
    _load_weights(checkpoint.model, path)
    checkpoint.path = path
    if (path / "tokenizer_config.json").is_file():  # it may have got a chat template
        checkpoint.tokenizer = load_tokenizer(path)
    write_spec(checkpoint, spec)
    checkpoint.model.eval()
    return checkpoint


def save_adapter(
    checkpoint: Checkpoint,
    output_dir: Path,
    record: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the adapter of a wrapped checkpoint, its adapter_config.json last.

    Args:
        record: for `ar2diff.json`.
        weights: the trained ones by name, where the model does not hold them whole.
    """
    model, base = checkpoint.model, checkpoint.base
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = replace(
        model.peft_config["default"],
        base_model_name_or_path=base.reference,
        revision=base.revision,
        inference_mode=True,
        target_modules=sorted(model.peft_config["default"].target_modules),
    )
    with staged(output_dir) as folder:
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        known = {"diffusion": base.spec.to_dict(), "mask_row_sha256": base.mask_row}
        write_json(folder / DIFFUSION, {"diffusion": checkpoint.spec.to_dict(), "base": known})
        write_json(folder / RUN_FILE, record)


@torch.no_grad()
def mask_row_of(model: Any, mask_token_id: int) -> str:
    """sha256 of the embedding of a model's mask token, in float32, whatever it is stored in."""
    row = model.get_input_embeddings().weight[mask_token_id]
    if row.is_meta:
        return ""  # of a model without storage, whose memory is estimated
    return hashlib.sha256(row.float().cpu().numpy().astype("<f4").tobytes()).hexdigest()


class AddToColumn(torch.autograd.Function):
    """logits[..., token] += column, in place: autograd's own would copy logits and gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, token: int) -> Tensor:
        """The logits, changed."""
        ctx.mark_dirty(logits)
        ctx.token = token
        logits.select(-1, token).add_(column)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of logits and column."""
        return grad, grad.select(-1, ctx.token), None


class MaskRow(TrainableTokensLayer):
    """peft's layer of trainable tokens, that replaces their rows where they are used: peft's own
    copies the whole table for each forward, and takes the gradient of all of it."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        """Embeddings of ids, or (a head tied to them) logits of states."""
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
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise Ar2DiffError(
            f"model {checkpoint.path}: no adapter fits it ({first_line(error)})",
            "name other layers with peft.targets",
        ) from error
    for module in wrapped.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = MaskRow
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    checkpoint.model, checkpoint.base = wrapped, base


def _targets(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that `peft.targets` means."""
    head = model.get_output_embeddings()
    linear = {
        name: module is head
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    layers = [name for name, is_head in linear.items() if not is_head]
    if wanted == "all-linear":
        return layers
    found: set[str] = set()
    for target in wanted:
        matched = [name for name in linear if f".{name}".endswith(f".{target}")]
        if any(linear[name] for name in matched):
            raise Ar2DiffError(
                f"peft.targets: {target} is the output embeddings, which adapters leave alone",
                "leave it out; peft.mask_row trains the mask token's row",
            )
        if not matched:
            names = sorted({name.rpartition(".")[2] for name in layers})
            near = difflib.get_close_matches(target, names, 1, 0.5)
            raise Ar2DiffError(
                f"peft.targets: {target} matches no linear layer of the model"
                f"{f'; did you mean {near[0]}?' if near else ''}",
                f"it has {', '.join(names)}; or all-linear",
            )
        found.update(matched)
    return [name for name in layers if name in found]


def _check_change(base: Spec, spec: Spec) -> None:
    for name in (field.name for field in fields(Spec)):
        if name not in MAY_DIFFER and getattr(base, name) != getattr(spec, name):
            raise Ar2DiffError(
                f"an adapter cannot turn {name} {getattr(base, name)} into {getattr(spec, name)}",
                f"set convert.{name}={getattr(base, name)}, or leave peft out",
            )


def _embeddings_name(model: Any) -> str:
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def _name_of(folder: Path) -> tuple[str, str | None]:
    """What a base is called in adapter_config.json: an absolute folder, or a Hub id and commit."""
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
            f"adapter {path}: its base is not there: {error.what}",
            f"put it there, or name its place in {path / ADAPTER_CONFIG}",
        ) from error


def _read_config(path: Path) -> LoraConfig:
    """The adapter's config, if it is one of ours to read: it may name no code to import."""
    values = read_json(path / ADAPTER_CONFIG, "train the adapter again")
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA" or values.get("megatron_config") or values.get("modules_to_save"):
        raise Ar2DiffError(
            f"adapter {path}: ar2diff reads LoRA and DoRA without further modules, this is {kind}",
            "merge it with peft first",
        )
    try:
        return LoraConfig.from_pretrained(str(path))
    except (TypeError, ValueError) as error:
        raise Ar2DiffError(
            f"{path / ADAPTER_CONFIG}: {first_line(error)}", "train the adapter again"
        ) from error


def _read_base(path: Path) -> dict[str, Any]:
    base = read_json(path / DIFFUSION, "").get("base")
    if not isinstance(base, dict) or not isinstance(base.get("diffusion"), dict):
        raise Ar2DiffError(
            f"{path / DIFFUSION}: it does not say what base the adapter has",
            "train the adapter again",
        )
    return base


def _load_weights(model: Any, path: Path) -> None:
    damaged = Ar2DiffError(
        f"adapter {path}: {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} do not belong together",
        "download the adapter again, or train it again",
    )
    state = load_file(path / ADAPTER_WEIGHTS)
    try:
        result = set_peft_model_state_dict(model, state)
    except (RuntimeError, KeyError) as error:
        raise damaged from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if result.unexpected_keys or wanted - set(state):
        raise damaged
