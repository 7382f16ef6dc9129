"""Converted checkpoints in the formats that other engines read: the same weights, another config.

`sdar` is what SGLang (python/sglang/srt/models/sdar.py, sdar_moe.py, dllm/config.py) and LMDeploy
(lmdeploy/pytorch/configurations/sdar.py) run: Qwen3's tensor names, `rope_theta` at the top level
of the config, and the mask token at the id that both engines have in their code. `ar` is a plain
causal model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.files import (
    WEIGHTS,
    check_ids,
    find_checkpoint,
    is_adapter,
    read_config,
    read_json,
    read_spec,
    refuse_draft,
    weight_files,
)
from ..checkpoint.kinds import outline_of
from ..checkpoint.model import load_config, load_tokenizer
from ..checkpoint.output import check_disk, check_output, claimed, record_of, write_json
from ..checkpoint.processor import copy_processor
from ..checkpoint.stored import stored_tensors
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..core.noises import Mask
from ..core.spec import Spec
from .tensors import BELONG, check_tensors

TARGETS = ("sdar", "ar")
SDAR_MASK = 151669  # fixed in the engines' code; none of their options changes it
SDAR_BLOCK = 4  # SGLang's default
ROPE = ("rope_theta", "partial_rotary_factor")  # formerly at the top level of a config


@dataclass(frozen=True)
class EngineNames:
    """The engines' names for a stock class."""

    architecture: str
    model_type: str
    config_class: str


SDAR = {
    "qwen3": EngineNames("SDARForCausalLM", "sdar", "SDARConfig"),
    "qwen3_moe": EngineNames("SDARMoeForCausalLM", "sdar_moe", "SDARMoeConfig"),
}
# The engines ask transformers for the config of a model_type that it does not know: with this code.
CONFIG_CODE = '''"""The config of an SDAR checkpoint, for engines: every value is in config.json."""

from transformers import PretrainedConfig


class {config_class}(PretrainedConfig):
    """Holds the values of config.json unchanged."""

    model_type = "{model_type}"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, **kwargs):
        super().__init__(**kwargs)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
'''


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        model: the model as it was given. to: the target format.
        loads_as: the class that its config names.
        notes: what the user should know.
    """

    model: str
    to: str
    loads_as: str
    notes: list[str]


def export(
    reference: str,
    output_dir: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Exported:
    """Write a converted checkpoint in the format of other engines. The weights are copied as they
    are.

    Args:
        reference: folder or Hub id.
        output_dir: a new or empty folder.
        to: one of `TARGETS`.
        overwrite: replace the model that ar2diff wrote to `output_dir`.
        dry_run: check everything, but write nothing.

    Raises:
        Ar2DiffError: the target format cannot express the model; its weights are damaged or are not
            those of its config; as `claimed`.
    """
    if to not in TARGETS:
        raise Ar2DiffError(
            f"{option('to')} is {shortened(to)}, which is not a format",
            f"choose one of {', '.join(TARGETS)}",
        )
    path, output_dir = find_checkpoint(reference, weights=False), Path(output_dir)
    spec, config = _read(path)
    check_output(output_dir, [path], overwrite=overwrite)
    if to == "sdar":
        _check_sdar(path, spec, config)
    else:
        _check_ar(path, spec)
    path = find_checkpoint(reference)
    architecture = _check_weights(path)
    if to == "sdar":
        exported, notes = _sdar_config(spec, config), _sdar_notes(spec, output_dir)
    else:
        exported, notes = _ar_config(config, architecture), _ar_notes(spec)
    tokenizer, generation = load_tokenizer(path), _generation(path)
    result = Exported(reference, to, exported["architectures"][0], notes)
    weights = [*weight_files(path), *path.glob(f"{WEIGHTS}.index.json")]
    needed = sum(file.stat().st_size for file in weights)
    check_disk(output_dir, needed)
    if dry_run:
        return result
    record = {
        "ar2diff": __version__,
        "exported": asdict(result),
        "diffusion": spec.to_dict(),
        "run": record_of(path),
    }
    with (
        claimed(output_dir, [path], overwrite=overwrite, needed=needed) as output,
        output.staged(record) as folder,
    ):
        for file in weights:
            shutil.copyfile(file, folder / file.name)
        if to == "sdar":
            names = SDAR[config["model_type"]]
            code = CONFIG_CODE.format(**vars(names))
            (folder / f"configuration_{names.model_type}.py").write_text(code)
        tokenizer.save_pretrained(folder)
        copy_processor(path, folder)
        write_json(folder / "generation_config.json", generation)
        write_json(folder / "config.json", exported)
    return result


def _read(path: Path) -> tuple[Spec, dict[str, Any]]:
    """Spec and config of a converted model, which must not be an adapter."""
    refuse_draft(path, "which no other engine reads")
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter", f"run 'ar2diff merge {path} DIR', then export DIR"
        )
    spec = read_spec(path)
    if spec is None:
        raise Ar2DiffError(
            f"model {path} is not converted",
            f"run 'ar2diff adapt {path} --output-dir DIR', then export DIR",
        )
    return spec, read_config(path)


def _check_weights(path: Path) -> str:
    """Refuse weights that are damaged, or are not those that the config asks for: a copy of them
    would load nowhere.

    Returns:
        The name of the class that holds them.
    """
    check_ids(path)
    tensors = stored_tensors(path)
    config = load_config(path, len(tensors))
    try:
        model = outline_of(config)
    except Exception as error:  # a value of the wrong type, a class without sdpa
        raise Ar2DiffError(
            f"model {path}: its config.json does not describe a model ({first_line(error)})", BELONG
        ) from error
    check_tensors(tensors, model, path, others=True)
    return type(model).__name__


def _check_sdar(path: Path, spec: Spec, config: Mapping[str, Any]) -> None:
    """Refuse a model that the engines would run as a different one."""
    kind = config.get("model_type")
    moe = "num_experts_per_tok" in config
    rope = config.get("rope_parameters")
    partial = rope.get("partial_rotary_factor", 1) if isinstance(rope, dict) else 1
    again = "convert the base again with {}".format
    for wrong, what, fix in (
        (
            spec.head is not None,
            "it has a diffusion head, which the engines do not know",
            "convert the base again without convert.head_rank",
        ),
        (
            spec.noise != Mask(),
            f"its noise is {spec.noise.kind}, but the engines decode masks alone",
            again("noise.kind=mask"),
        ),
        (
            spec.attention != "block_causal",
            f"its attention is {spec.attention}, but the engines run block_causal",
            again("convert.attention=block_causal"),
        ),
        (
            spec.prediction != "same",
            f"its prediction is {spec.prediction}, but the engines read a token at its own "
            "position (same)",
            again("convert.prediction=same"),
        ),
        (
            kind not in [*SDAR],
            f"its model_type is {shortened(kind)}, but the engines only run {' and '.join(SDAR)}",
            "convert a Qwen3 model",
        ),
        (
            spec.mask_token_id != SDAR_MASK,
            f"its mask token is {spec.mask_token_id}, but the engines always use {SDAR_MASK}",
            f"convert a Qwen3 model with its own tokenizer, whose next free id is {SDAR_MASK}",
        ),
        (
            bool(config.get("use_sliding_window")) and spec.local_window != "dropped",
            "it has a sliding window, which the engines ignore",
            again("convert.local_window=dropped"),
        ),
        (
            config.get("hidden_act", "silu") != "silu",
            f"its activation is {shortened(config.get('hidden_act'))}, not silu",
            "convert a Qwen3 model",
        ),
        (
            partial != 1,
            "its rotary embedding is partial, but the engines rotate whole heads",
            "convert a Qwen3 model",
        ),
        (
            moe
            and bool(config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1),
            "some of its layers have no experts, but the engines expect them in all layers",
            "convert a Qwen3-MoE model",
        ),
    ):
        if wrong:
            raise Ar2DiffError(f"model {path} cannot be exported to sdar: {what}", fix)


def _sdar_config(spec: Spec, config: Mapping[str, Any]) -> dict[str, Any]:
    names = SDAR[config["model_type"]]
    kept = _without(config, "diffusion", "is_causal", "layer_types", "max_window_layers")
    if "num_local_experts" in kept:  # the engines know its older name
        kept["num_experts"] = kept["num_local_experts"]
    return {
        **_with_old_names(kept),
        "architectures": [names.architecture],
        "model_type": names.model_type,
        "auto_map": {"AutoConfig": f"configuration_{names.model_type}.{names.config_class}"},
        "block_size": spec.block_length,
    }


def _sdar_notes(spec: Spec, output_dir: Path) -> list[str]:
    block = spec.block_length
    sglang = f"sglang.launch_server --model-path {output_dir} --trust-remote-code"
    notes = [f"SGLang: python -m {sglang} --dllm-algorithm LowConfidence"]
    if block != SDAR_BLOCK:
        notes[0] += f" --dllm-algorithm-config FILE, where FILE is YAML with block_size: {block}"
    return [
        *notes,
        f"LMDeploy: lmdeploy serve api_server {output_dir} --dllm-block-length {block}",
        "transformers has no such class; 'ar2diff import' turns it back into a converted model",
    ]


def _check_ar(path: Path, spec: Spec) -> None:
    if spec.attention != "causal_context":
        raise Ar2DiffError(
            f"model {path} has no AR mode: its attention is {spec.attention}",
            "only causal_context models can be exported to ar",
        )
    if not spec.ar_mode:
        raise Ar2DiffError(
            f"model {path} has no AR mode: the AR loss was not trained",
            f"train it with {option('objective.ar_weight')} above 0",
        )


def _ar_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    kept = _with_old_names(_without(config, "diffusion", "mask_token_id"))
    return kept | {"architectures": [architecture]}


def _ar_notes(spec: Spec) -> list[str]:
    return [
        f"the mask token {spec.mask_token_id} keeps its row; generation_config.json suppresses it"
    ]


def _generation(path: Path) -> dict[str, Any]:
    """The generation config without the settings that only our sampler knows.

    Raises:
        Ar2DiffError: nothing could load it.
    """
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    values = read_json(file, "") if file.is_file() else {}
    known = GenerationConfig().to_dict().keys()
    values = {name: value for name, value in values.items() if name in known}
    try:
        GenerationConfig(**values).validate()
    except Exception as error:  # of any class: nothing checks the types before
        raise Ar2DiffError(
            f"{file}: it is not a generation config ({first_line(error)})",
            "correct it, or remove it",
        ) from error
    return values


def _with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add rotary settings and dtype under their old names. transformers 5 writes the new names
    alone, and a reader of the old ones would silently take its defaults."""
    named = {"torch_dtype": config.get("dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        named |= {name: rope.pop(name) for name in ROPE if name in rope}
        named["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return {**config, **named}


def _without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}
