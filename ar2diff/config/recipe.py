"""Recipes: strict YAML, checked before anything heavy is imported.

A recipe is the whole of a run but the model and its data. `key=value` on the command line overrides
one field by its dotted name; an unknown key names its section and the nearest spelling.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.errors import Ar2DiffError, first_line
from .rl import Rl


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Convert(_Section):
    """What the converted model is. Becomes the `diffusion` block of config.json."""

    attention: Literal["causal_context", "block_causal", "full"] = "causal_context"
    block_length: int | None = Field(8, gt=0, description="null for full")
    prediction: Literal["same", "shift"] = "shift"
    local_window: Literal["kept", "dropped"] | None = Field(
        None, description="the base's window; null: kept where rows are longer than it"
    )
    mask_token: str | None = Field(None, description="null: chosen; or a special token's text")
    reconvert: bool = Field(
        False, description="give a converted model another attention or prediction"
    )

    @model_validator(mode="after")
    def _full_has_no_blocks(self) -> Convert:
        if (self.attention == "full") != (self.block_length is None):
            raise ValueError("block_length is null for attention full, and a number otherwise")
        return self


class Anneal(_Section):
    """How attention gets from causal to its goal."""

    kind: Literal["none", "reveal", "grow", "wsd"] = "none"
    steps: int = Field(0, ge=0, description="optimiser steps until the goal is reached")
    lengths: tuple[int, ...] = Field(
        (), description="block lengths before the goal's, for as long each; wsd: longer ones too"
    )

    @model_validator(mode="after")
    def _needs_steps(self) -> Anneal:
        if (self.kind == "none") != (self.steps == 0):
            raise ValueError("steps is 0 for kind none, and at least 1 otherwise")
        by_length = self.kind in ("grow", "wsd")
        if by_length != bool(self.lengths) or any(n < 1 for n in self.lengths):
            raise ValueError("lengths of at least 1 belong to kinds grow and wsd, which need them")
        return self


class Noise(_Section):
    """The forward process."""

    time: Literal["block", "document", "sequence"] = Field(
        "block", description="which tokens share a time (full: document or sequence)"
    )
    complementary: bool = Field(False, description="a second view of each row: the other tokens")


class Objective(_Section):
    """The loss: weight(t) * cross-entropy of masked tokens / divisor + ar_weight * AR loss."""

    kind: Literal["diffusion", "ar"] = Field(
        "diffusion", description="sft: ar tunes an unconverted model, the control"
    )
    weight: Literal["uniform", "1/t", "cart"] = "uniform"
    cart_p: float = Field(0.3, gt=0, lt=1, description="cart: decay of the geometric weight")
    normaliser: Literal["tokens", "masked", "sequence"] = "tokens"
    ar_weight: float = Field(0.3, ge=0, description="AR co-loss on the clean half")


class Source(_Section):
    """One data source: a file, or a Hub data set."""

    path: str
    weight: float | None = Field(None, gt=0, description="share of documents; null: its size")
    name: str | None = Field(None, description="Hub: configuration")
    split: str = Field("train", description="Hub: split")


class Columns(_Section):
    """sft: where a row holds what: a column's name, or a text with columns in {braces}."""

    prompt: str | None = Field(
        None, description="sft: a column, or a text with {columns}; null: prompt"
    )
    completion: str | None = Field(None, description="likewise")
    messages: str | None = Field(None, description="sft: a column; null: messages")


class Data(_Section):
    """What is trained on."""

    sources: tuple[Source, ...] = ()
    text_field: str = "text"
    columns: Columns = Columns()
    max_length: int = Field(512, gt=1, description="tokens of a row")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split", description="longer documents; sft: longer rows, never split"
    )
    cut_share: float = Field(
        0.0, ge=0, lt=1, description="adapt, full: this share of rows' parts has a random length"
    )
    packing: bool = Field(True, description="several documents in a row, isolated")
    streaming: bool = Field(False, description="read Hub data sets as they come")
    assistant_only: bool = Field(True, description="sft: learn what the assistant says alone")
    chat_template: str | None = Field(
        None, description="sft, rl: one of ours by name, or a .jinja file; null: the tokenizer's"
    )

    @model_validator(mode="before")
    @classmethod
    def _paths_may_be_bare(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("sources"), (list, tuple)):
            rows = [{"path": s} if isinstance(s, str) else s for s in value["sources"]]
            value = {**value, "sources": rows}
        return value


class LrScale(_Section):
    """Factors on the learning rate by kind of parameter; norms and biases keep 1."""

    attention: float = Field(1.0, ge=0)
    mlp: float = Field(1.0, ge=0)
    embeddings: float = Field(1.0, ge=0)


class Train(_Section):
    """Optimisation. Names are those of transformers.TrainingArguments where it has one."""

    max_steps: int = Field(1000, ge=0, description="0 converts without training")
    per_device_train_batch_size: int = Field(8, gt=0, description="rows")
    gradient_accumulation_steps: int = Field(1, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    lr_scale: LrScale = LrScale()
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0, description="wsd: steps of the final decay")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="master weights: fp32")
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = Field(
        "auto", description="auto: sdpa, or eager where the class lacks it"
    )
    compile: bool = Field(False, description="torch.compile of the layers: slow first steps")
    seed: int = Field(0, ge=0)
    logging_steps: int = Field(25, gt=0)
    save_steps: int = Field(500, gt=0)
    save_total_limit: int = Field(2, gt=0)
    report_to: str = Field("none", description="wandb, tensorboard, trackio, none ...")


class Eval(_Section):
    """The bound on a fixed set with fixed noise, while training."""

    data: str | None = Field(None, description="null: rows held out of the training data")
    rows: int = Field(16, gt=0)
    length: int = Field(128, gt=1)
    samples: int = Field(4, gt=0, description="noise draws a row")
    steps: int = Field(0, ge=0, description="every so many steps; 0: never")
    panel_steps: int = Field(0, ge=0, description="show a sample being denoised; 0: never")


class Peft(_Section):
    """Adapters instead of full tuning: a converted model stays as it is, small matrices train."""

    method: Literal["lora", "dora"] = "lora"
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32.0, gt=0, description="the update counts alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="or names of linear layers: [q_proj, v_proj]"
    )
    mask_row: bool = Field(True, description="the mask token's embedding trains too")

    @model_validator(mode="after")
    def _names_are_a_list(self) -> Peft:
        if self.targets == () or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ValueError("targets is all-linear, or a list of names")
        return self


class Quantization(_Section):
    """How the frozen weights under an adapter are held (QLoRA)."""

    bits: Literal[4] = 4
    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = Field(True, description="quantise the scales too")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU that has it, else float32"
    )


class Recipe(_Section):
    """A whole run."""

    description: str = ""
    convert: Convert = Convert()
    anneal: Anneal = Anneal()
    noise: Noise = Noise()
    objective: Objective = Objective()
    data: Data = Data()
    train: Train = Train()
    eval: Eval = Eval()
    peft: Peft | None = None
    quantization: Quantization | None = None
    rl: Rl | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_attention(cls, tree: Any) -> Any:
        """What only one attention knows is left out for the others, unless it is asked for."""
        if not isinstance(tree, dict) or not isinstance(tree.get("convert", {}), dict):
            return tree
        attention = tree.get("convert", {}).get("attention", "causal_context")
        for section, key, value in _implied(attention):
            if isinstance(tree.get(section, {}), dict):
                tree = {**tree, section: {key: value, **tree.get(section, {})}}
        return tree

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        full = self.convert.attention == "full"
        if self.quantization is not None and self.peft is None:
            raise ValueError("quantization needs a peft section: quantised weights do not train")
        if full and self.noise.time == "block":
            raise ValueError("noise.time is document or sequence for attention full")
        if self.objective.ar_weight > 0 and self.convert.attention != "causal_context":
            raise ValueError("objective.ar_weight needs attention causal_context; set it to 0")
        weighted = [source.weight is not None for source in self.data.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("data.sources: give every source a weight, or none")
        if self.train.compile and self.rl is not None:
            raise ValueError("train.compile is not for rl, whose rollouts would be compiled anew")
        if self.train.decay_steps and self.train.schedule != "wsd":
            raise ValueError("train.decay_steps belongs to train.schedule wsd")
        if self.train.schedule == "wsd" and self.train.max_steps:
            if not 0 < self.train.decay_steps <= self.train.max_steps - self.train.warmup_steps:
                raise ValueError(
                    "train.schedule wsd needs decay_steps of 1 up to max_steps - warmup_steps"
                )
        if not full and self.data.max_length % self.convert.block_length:
            raise ValueError("data.max_length must be a multiple of convert.block_length")
        if self.train.max_steps and self.anneal.steps > self.train.max_steps:
            raise ValueError("anneal.steps must not exceed train.max_steps")
        if self.anneal.kind == "grow" and not full:
            if max(self.anneal.lengths) > self.convert.block_length:
                raise ValueError("anneal.lengths must not exceed convert.block_length, but for wsd")
        if self.data.cut_share and not full:
            raise ValueError("data.cut_share needs attention full: blocks are cut at the grid")
        return self


def _implied(attention: Any) -> list[tuple[str, str, Any]]:
    """(section, key, value) that an attention other than the default goes with."""
    implied: list[tuple[str, str, Any]] = []
    if attention == "full":
        implied = [("convert", "block_length", None), ("noise", "time", "sequence")]
    if attention != "causal_context":
        implied.append(("objective", "ar_weight", 0.0))
    return implied


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("ar2diff.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe by name or by file.

    Raises:
        Ar2DiffError: there is no such recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Ar2DiffError(
                f"recipe {name}: {first_line(error)}", "see 'ar2diff recipes ls'"
            ) from None
    if name not in recipe_names():
        raise Ar2DiffError(
            f"recipe {name!r} is unknown{_nearest(name, recipe_names())}",
            "see 'ar2diff recipes ls', or give a .yaml file",
        )
    return resources.files("ar2diff.recipes").joinpath(f"{name}.yaml").read_text()


def load_recipe(name: str | Recipe | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, by name or file, and apply `section.key=value` overrides; None is the
    defaults, and a `Recipe` is taken as it is.

    Raises:
        Ar2DiffError: unknown recipe or key, wrong type, or parts that contradict each other.
    """
    label = "the recipe" if isinstance(name, Recipe) else name or "defaults"
    try:
        if isinstance(name, Recipe):
            tree = name.model_dump(mode="json", exclude_unset=True)
        else:
            tree = (yaml.safe_load(recipe_text(name)) if name else None) or {}
    except yaml.YAMLError as error:
        raise Ar2DiffError(f"{label}: {' '.join(str(error).split())}", "mend the YAML") from None
    if not isinstance(tree, dict):
        raise Ar2DiffError(f"{label}: a recipe is a mapping", "see 'ar2diff config schema'")
    chosen = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        _apply(tree, override)
    if "convert.attention" in chosen:  # another attention than the recipe's, and what goes with it
        for section, key, value in _implied(tree["convert"]["attention"]):
            if f"{section}.{key}" not in chosen:
                tree.setdefault(section, {})[key] = value
    return parse_recipe(tree, label)


def parse_recipe(tree: dict[str, Any], label: str) -> Recipe:
    """Validate a parsed recipe.

    Raises:
        Ar2DiffError: naming section and key, and the nearest key where one is unknown.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error.errors()[0], label) from None


def with_values(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """A copy with some fields of some sections replaced, validated again."""
    tree = recipe.model_dump(exclude_unset=True)
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_recipe(tree, "arguments")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def field_names(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of every field."""
    for name, field in model.model_fields.items():
        kind = section_of(field.annotation)
        if kind is not None:
            yield from field_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, which may be null; None for a plain value."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not type(None)]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel):
        return kinds[0]
    return None


def describe_fields() -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, description) of every field."""
    for name in field_names():
        model: Any = Recipe
        *sections, last = name.split(".")
        for section in sections:
            model = section_of(model.model_fields[section].annotation)
        field = model.model_fields[last]
        kind = (
            field.annotation.__name__
            if isinstance(field.annotation, type)
            else str(field.annotation)
        )
        kind = kind.replace("typing.Literal", "").replace("ar2diff.config.recipe.", "").strip("[]")
        yield name, kind, field.default, field.description or ""


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise Ar2DiffError(
            f"argument {override!r} is not key=value", "write for example train.learning_rate=1e-3"
        )
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise Ar2DiffError(f"{key}: {section} has no keys", "see 'ar2diff config schema'")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise Ar2DiffError(f"{key}: {text!r} is not YAML", "quote it") from None


def _explain(error: Any, label: str) -> Ar2DiffError:
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
        message = error["msg"].removeprefix("Value error, ")
        return Ar2DiffError(
            f"{label}: {where + ': ' if where else ''}{message}{got}",
            f"see '{' '.join(['ar2diff config schema', *map(str, error['loc'][:1])])}'",
        )
    section = ".".join(map(str, error["loc"][:-1]))
    names = list(field_names())
    inside = [n for n in names if n.startswith(f"{section}.")] if section else []
    if "sources" in error["loc"]:
        inside = [f"{section}.{name}" for name in Source.model_fields]
    near = difflib.get_close_matches(where, inside or names, 1, 0.5)
    near = near or [n for n in names if n.endswith(f".{error['loc'][-1]}")]
    near = near or difflib.get_close_matches(str(error["loc"][-1]), names, 1, 0.3)
    place = f"section {section!r}" if section else "the top level"
    hint = f" Did you mean {near[0]}?" if near else ""
    return Ar2DiffError(
        f"{label}: {where}: unknown key in {place}.{hint}",
        "rename or remove it; 'ar2diff config schema' lists the keys",
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""
