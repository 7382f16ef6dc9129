"""Converted checkpoints in the layouts that engines read: the same weights, another config.

`sdar` is what SGLang (python/sglang/srt/models/sdar.py, sdar_moe.py, dllm/config.py) and LMDeploy
(lmdeploy/pytorch/configurations/sdar.py) run: Qwen3's tensor names, `rope_theta` at the top of the
config, the mask token at the id that both have in their code. `ar` is a plain causal model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.files import (
    RUN_FILE,
    WEIGHTS,
    find_checkpoint,
    is_adapter,
    read_config,
    read_json,
    read_spec,
    stored_dtypes,
    weight_files,
)
from ..checkpoint.model import load_tokenizer
from ..checkpoint.output import check_disk, check_output, clear_output, staged, write_json
from ..core.errors import Ar2DiffError
from ..core.spec import Spec

TARGETS = ("sdar", "ar")
SDAR_MASK = 151669  # in the engines' code: no option of theirs changes it
SDAR_BLOCK = 4  # SGLang's default
ROPE = ("rope_theta", "partial_rotary_factor")  # once at the top of a config


@dataclass(frozen=True)
class Layout:
    """What the engines call a stock layout."""

    architecture: str
    model_type: str
    config_class: str


SDAR = {
    "qwen3": Layout("SDARForCausalLM", "sdar", "SDARConfig"),
    "qwen3_moe": Layout("SDARMoeForCausalLM", "sdar_moe", "SDARMoeConfig"),
}
# The engines ask transformers for the config of a model_type that it does not know.
CONFIG_CODE = '''"""The config of an SDAR checkpoint, for engines: every value is in config.json."""

from transformers import PretrainedConfig


class {config_class}(PretrainedConfig):
    """Holds config.json's values as they stand there."""

    model_type = "{model_type}"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, **kwargs):
        super().__init__(**kwargs)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
'''


def export_checkpoint(
    reference: str,
    output_dir: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write a converted checkpoint in another layout. Weights are copied as they are.

    Args:
        reference: folder or Hub id. to: one of `TARGETS`.

    Returns:
        model, to, loads_as (what the config calls the class), notes (a list).

    Raises:
        Ar2DiffError: the target cannot carry what the model is.
    """
    if to not in TARGETS:
        raise Ar2DiffError(f"--to {to} is no layout", f"give one of {', '.join(TARGETS)}")
    path, output_dir = find_checkpoint(reference, weights=False), Path(output_dir)
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter", f"run 'ar2diff merge {path} DIR', and export DIR"
        )
    spec, config = read_spec(path), read_config(path)
    if spec is None:
        raise Ar2DiffError(
            f"model {path} is not converted",
            f"run 'ar2diff adapt {path}' first, or use it as it is",
        )
    check_output(output_dir, [path], False, overwrite)
    if to == "sdar":
        _check_sdar(path, spec, config)
        exported, notes = _sdar_config(spec, config), _sdar_notes(spec, output_dir)
    else:
        _check_ar(path, spec)
        exported, notes = _ar_config(config), _ar_notes(spec)
    path = find_checkpoint(reference)
    stored_dtypes(path)
    tokenizer, generation = load_tokenizer(path), _generation(path)
    loads_as = exported["architectures"][0]
    result = {"model": reference, "to": to, "loads_as": loads_as, "notes": notes}
    if dry_run:
        return result
    weights = [*weight_files(path), *path.glob(f"{WEIGHTS}.index.json")]
    check_disk(output_dir, sum(file.stat().st_size for file in weights))
    if overwrite and output_dir.is_dir():
        clear_output(output_dir)
    with staged(output_dir) as folder:
        for file in weights:
            shutil.copyfile(file, folder / file.name)
        if to == "sdar":
            layout = SDAR[config["model_type"]]
            code = CONFIG_CODE.format(**vars(layout))
            (folder / f"configuration_{layout.model_type}.py").write_text(code)
        tokenizer.save_pretrained(folder)
        write_json(folder / "generation_config.json", generation)
        write_json(folder / "config.json", exported)
        run = path / RUN_FILE
        record = {"ar2diff": __version__, "exported": result, "diffusion": spec.to_dict()}
        made = read_json(run, "") if run.is_file() else None
        write_json(folder / RUN_FILE, record | {"run": made})
    return result


def _check_sdar(path: Path, spec: Spec, config: Mapping[str, Any]) -> None:
    """Refuse what the engines would run as another model than it is."""
    kind = config.get("model_type")
    moe = "num_experts_per_tok" in config
    rope = config.get("rope_parameters") or {}
    again = "convert the base again with {}".format
    for wrong, what, fix in (
        (
            spec.attention != "block_causal",
            f"its attention is {spec.attention}, the engines run block_causal",
            again("convert.attention=block_causal"),
        ),
        (
            spec.prediction != "same",
            f"its prediction is {spec.prediction}, the engines read a token where it stands (same)",
            again("convert.prediction=same"),
        ),
        (
            kind not in SDAR,
            f"its class is {config['architectures'][0]}, the engines run the layouts of "
            f"{' and '.join(SDAR)}",
            "convert a Qwen3 model",
        ),
        (
            spec.mask_token_id != SDAR_MASK,
            f"its mask token is {spec.mask_token_id}, the engines have {SDAR_MASK} in their code",
            "convert a Qwen3 model with its own tokenizer, whose next free id that is",
        ),
        (
            bool(config.get("use_sliding_window")) and spec.local_window != "dropped",
            "it has a sliding window, which the engines leave out",
            again("convert.local_window=dropped"),
        ),
        (
            config.get("hidden_act", "silu") != "silu",
            f"its activation is {config.get('hidden_act')}, the engines compute silu",
            "convert a Qwen3 model",
        ),
        (
            rope.get("partial_rotary_factor", 1) != 1,
            "its rotary embedding is partial, the engines turn all of a head",
            "convert a Qwen3 model",
        ),
        (
            moe and bool(config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) > 1),
            "some of its layers have no experts, the engines give them to all",
            "convert a Qwen3-MoE model",
        ),
    ):
        if wrong:
            raise Ar2DiffError(f"model {path} is no SDAR model: {what}", fix)


def _sdar_config(spec: Spec, config: Mapping[str, Any]) -> dict[str, Any]:
    layout = SDAR[config["model_type"]]
    kept = _without(config, "diffusion", "is_causal", "layer_types", "max_window_layers")
    if "num_local_experts" in kept:  # the engines know the older name
        kept["num_experts"] = kept["num_local_experts"]
    return {
        **_with_old_names(kept),
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "auto_map": {"AutoConfig": f"configuration_{layout.model_type}.{layout.config_class}"},
        "block_size": spec.block_length,
    }


def _sdar_notes(spec: Spec, output_dir: Path) -> list[str]:
    block = spec.block_length
    sglang = f"sglang.launch_server --model-path {output_dir} --trust-remote-code"
    notes = [f"SGLang: python -m {sglang} --dllm-algorithm LowConfidence"]
    if block != SDAR_BLOCK:
        notes[0] += f" --dllm-algorithm-config FILE, a YAML file that says block_size: {block}"
    return [
        *notes,
        f"LMDeploy: lmdeploy serve api_server {output_dir} --dllm-block-length {block}",
        "transformers has no such class: 'ar2diff import' makes it one of ours again",
    ]


def _check_ar(path: Path, spec: Spec) -> None:
    if spec.attention != "causal_context":
        raise Ar2DiffError(
            f"model {path} has no AR mode: its attention is {spec.attention}",
            "only causal_context models can be exported to ar",
        )
    if not spec.ar_mode:
        raise Ar2DiffError(
            f"model {path} has no AR mode: it was not trained along",
            "train with objective.ar_weight above 0",
        )


def _ar_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return _with_old_names(_without(config, "diffusion", "mask_token_id"))


def _ar_notes(spec: Spec) -> list[str]:
    return [
        f"the mask token {spec.mask_token_id} keeps its row; generation_config.json suppresses it"
    ]


def _generation(path: Path) -> dict[str, Any]:
    """What transformers knows of a generation config: the settings of our sampler stay behind."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    values = read_json(file, "") if file.is_file() else {}
    known = GenerationConfig().to_dict().keys()
    return {name: value for name, value in values.items() if name in known}


def _with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rotary settings and the dtype under new names alone; a reader of the
    old ones would take its defaults, silently. So both stand there."""
    named = {"torch_dtype": config.get("dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        named |= {name: rope.pop(name) for name in ROPE if name in rope}
        named["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return {**config, **named}


def _without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}
