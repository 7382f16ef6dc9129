"""Recipes: strict YAML, validated before anything heavy is imported.

A recipe is everything about a run except its model and its output folder. `key=value` on the
command line overrides one field by its dotted name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from ..core.errors import Ar2DiffError, first_line, nearest, option, shortened
from ..core.noise import Noise as Process
from ..core.noises import Mask
from ..core.spec import sees_itself
from .draft import Draft
from .rl import Rl
from .schema import field_names, keys_of
from .section import Section
from .sections import (
    Anneal,
    Convert,
    Data,
    Eval,
    Noise,
    Objective,
    Peft,
    Quantization,
    Train,
)
from .strict_yaml import parse_yaml
from .synonyms import key_meant, key_named

FREE_ESTIMATORS = ("one_step", "elbo", "ar")  # of rl, in the free form of a noise
LARGEST = 1_000_000  # bytes of a recipe file; those that ship have two thousand


class Recipe(Section):
    """A whole run."""

    description: str = Field("", description="one line for 'ar2diff recipes ls'")
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
    draft: Draft | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_attention(cls, tree: Any) -> Any:
        """Fields that make sense for one attention only get fitting defaults for the others."""
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
            raise ValueError(
                "quantization needs a peft section, because quantized weights cannot be trained"
            )
        if self.convert.head_rank is not None and (self.peft is not None or self.rl is not None):
            raise ValueError(
                "convert.head_rank cannot be combined with peft or rl: only adapt trains the "
                "diffusion head, along with all weights"
            )
        if full and self.noise.time == "block":
            raise ValueError("noise.time must be document or sequence with attention full")
        if self.objective.ar_weight > 0 and self.convert.attention != "causal_context":
            raise ValueError("objective.ar_weight must be 0 unless the attention is causal_context")
        for problem in _contradictions(self.objective, self.noise, self.convert, self.rl):
            raise ValueError(problem)
        if (process := self.noise.process) is not None:
            for problem in contradictions_of(process, self):
                raise ValueError(problem)
        shared = [*self.data.sources, *([self.data.self] if self.data.self else [])]
        weighted = [source.weight is not None for source in shared]
        if any(weighted) and not all(weighted):
            raise ValueError(
                "data.sources: either all sources (and data.self) or no source must have a weight"
            )
        if self.train.compile and self.rl is not None:
            raise ValueError(
                "train.compile cannot be used with rl, because rollouts would recompile the model"
            )
        if self.train.decay_steps and self.train.schedule != "warmup_stable_decay":
            raise ValueError(
                "train.decay_steps can only be set with train.schedule warmup_stable_decay"
            )
        if self.train.schedule == "warmup_stable_decay" and self.train.max_steps:
            if not 0 < self.train.decay_steps <= self.train.max_steps - self.train.warmup_steps:
                raise ValueError(
                    "train.schedule warmup_stable_decay needs decay_steps from 1 to "
                    "max_steps - warmup_steps"
                )
        if not full and not self.draft and self.data.max_length % self.convert.block_length:
            raise ValueError("data.max_length must be a multiple of convert.block_length")
        if self.train.max_steps and self.anneal.steps > self.train.max_steps:
            raise ValueError("anneal.steps must not exceed train.max_steps")
        if self.anneal.kind == "grow" and not full:
            if max(self.anneal.lengths) > self.convert.block_length:
                raise ValueError(
                    "anneal.lengths must not exceed convert.block_length unless anneal.kind is wsd"
                )
        if self.data.cut_share and not full:
            raise ValueError(
                "data.cut_share can only be set with attention full; otherwise documents are "
                "cut between blocks"
            )
        return self


def contradictions_of(process: Process, recipe: Recipe) -> Iterator[str]:
    """What a recipe asks for that a noise cannot do."""
    convert, objective, noise, rl = recipe.convert, recipe.objective, recipe.noise, recipe.rl
    named = f"noise.kind {process.kind}"
    if convert.head_rank is not None and process != Mask():
        yield f"convert.head_rank cannot be combined with {named}: the head reads masks"
    if noise.edits is not None and (process.free or process.guesses):
        yield f"noise.edits cannot be used with {named}, which corrects tokens anyway"
    if noise.on_policy and process.random:
        yield f"noise.on_policy cannot be used with {named}, whose states it does not keep"
    if noise.spans > 1 and not process.certain:
        yield f"noise.spans cannot be used with {named}, which can look like the tokens given"
    if noise.complementary and process.guesses:
        yield f"noise.complementary cannot be used with {named}, which changes visible tokens too"
    if not process.free:
        if objective.weight == "bound":
            yield f"objective.weight bound needs a noise in the free form; 1/t is that of {named}"
        return
    free = f"{named} in the free form"
    if process.logits == "posterior" and not sees_itself(convert.attention, convert.prediction):
        yield (
            "noise.parameters.logits posterior cannot be combined with convert.prediction shift in "
            "blocks: the first token of a block is read at a slot that does not see it"
        )
    if noise.complementary:
        yield f"noise.complementary cannot be used with {free}, where all tokens are scored"
    if objective.weight not in ("uniform", "bound"):
        yield (
            f"objective.weight must be uniform or bound with {free}, where no slot is known to be "
            "open"
        )
    if objective.distil is not None:
        yield f"objective.distil cannot be used with {free}, where no slot is known to be open"
    if rl is not None and rl.estimator not in FREE_ESTIMATORS:
        yield (
            f"rl.estimator {rl.estimator} cannot be used with {free}; "
            f"{', '.join(FREE_ESTIMATORS)} can"
        )


def _contradictions(
    objective: Objective, noise: Noise, convert: Convert, rl: Rl | None
) -> Iterator[str]:
    """What is wrong with the objective and the noise, given the rest."""
    distil = objective.distil
    if noise.on_policy and rl is not None:
        yield "noise.on_policy cannot be used with rl, which trains on its own texts anyway"
    if noise.dropped:
        head = convert.head_rank is not None and "convert.head_rank"
        cart = objective.weight == "cart" and "objective.weight cart"
        for other in (distil is not None and "objective.distil", head, cart):
            if other:
                yield f"noise.dropped cannot be used with {other}: what it masks is not shown"
    if noise.spans > 1 and rl is not None:
        yield "noise.spans cannot be used with rl, whose estimators draw their own noise"
    if noise.edits is not None and rl is not None:
        yield "noise.edits cannot be used with rl, whose estimators draw their own noise"
    if noise.edits is not None and (distil is not None or objective.weight == "cart"):
        yield "noise.edits cannot be used with objective.distil or objective.weight cart"
    if noise.edits is not None and convert.head_rank is not None:
        yield "noise.edits cannot be combined with convert.head_rank: the head reads masks"
    if noise.on_policy and convert.attention == "full":
        yield "noise.on_policy needs an attention with blocks, not full"
    if noise.on_policy and objective.weight == "cart":
        yield "noise.on_policy cannot be used with objective.weight cart"
    if objective.normaliser == "masked+ar" and objective.ar_weight == 0:
        yield "objective.normaliser masked+ar needs objective.ar_weight above 0"
    if noise.law != "uniform" and rl is not None:
        yield "noise.law must be uniform with rl, whose estimators draw their own noise levels"
    if distil is None:
        return
    if convert.head_rank is not None:
        yield "objective.distil cannot be combined with convert.head_rank"
    if rl is not None:
        yield "objective.distil cannot be used with rl, which learns from rewards"
    if objective.kind == "ar":
        yield "objective.distil cannot be used with objective.kind ar, which masks no tokens"
    if distil.target == "clean" and convert.attention != "causal_context":
        yield "objective.distil.target clean needs attention causal_context, which keeps an AR mode"
    if distil.target == "clean" and objective.ar_weight == 0:
        yield (
            "objective.distil.target clean needs objective.ar_weight above 0, because otherwise "
            "nothing keeps the AR mode from drifting"
        )


def _implied(attention: Any) -> list[tuple[str, str, Any]]:
    """(section, key, value) that go with an attention other than the default."""
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
    """The YAML of a recipe, given by its name or as a .yaml file.

    Raises:
        Ar2DiffError: there is no such recipe, or the file cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _file_text(path)
    if name not in recipe_names():
        raise Ar2DiffError(
            f"there is no recipe {shortened(name)}{nearest(name, recipe_names())}",
            "list the recipes with 'ar2diff recipes ls', or give the path of a .yaml file",
        )
    return resources.files("ar2diff.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _file_text(path: Path) -> str:
    reason = "it is not a regular file"
    try:
        if path.is_file() or not path.exists():
            if path.stat().st_size <= LARGEST:
                return path.read_text(encoding="utf-8-sig")
            reason = f"it is larger than {LARGEST:,} bytes"
    except (OSError, ValueError) as error:  # it is not there; or it is not UTF-8
        reason = first_line(error)
    raise Ar2DiffError(
        f"recipe {path} cannot be read: {reason}",
        "check the file; 'ar2diff recipes ls' lists the recipes that ship with ar2diff",
    )


def load_recipe(name: str | Recipe | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Args:
        name: a recipe's name, or a .yaml file; a `Recipe` is taken as it is; None starts from the
            defaults.

    Raises:
        Ar2DiffError: unknown recipe or key, a value of the wrong type, or fields that contradict
            each other.
    """
    label = "given" if isinstance(name, Recipe) else name or ""
    try:
        if isinstance(name, Recipe):
            tree = name.model_dump(mode="json", exclude_unset=True)
        else:
            tree = (parse_yaml(recipe_text(name)) if name else None) or {}
    except ValueError as error:
        raise Ar2DiffError(
            f"recipe {label} is not valid YAML: {error}", "correct the file"
        ) from None
    if not isinstance(tree, dict):
        raise Ar2DiffError(
            f"recipe {label} is not a mapping of sections",
            "write it like those that 'ar2diff recipes show demo' prints",
        )
    chosen = {override.partition("=")[0] for override in overrides}
    for number, override in enumerate(overrides):
        if "=" not in override[1:]:
            raise _no_override(overrides, number)
        _apply(tree, override)
    convert = tree.get("convert")  # which a later override may have replaced by anything
    if "convert.attention" in chosen and isinstance(convert, dict) and "attention" in convert:
        # Another attention than the recipe's, and what goes with it.
        for section, key, value in _implied(convert["attention"]):
            if f"{section}.{key}" not in chosen and isinstance(tree.get(section, {}), dict):
                tree.setdefault(section, {})[key] = value
    return parse_recipe(tree, label)


def parse_recipe(tree: dict[str, Any], label: str) -> Recipe:
    """Validate a parsed recipe.

    Args:
        label: what an error calls the recipe; empty for none.

    Raises:
        Ar2DiffError: naming the key, and the nearest existing key if it is unknown.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # An unknown key first: a missing one is often the same mistake.
        errors = sorted(
            error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden"
        )
        raise _explain(errors[0], label) from None


def with_values(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """A copy with some fields of some sections replaced, validated again."""
    tree = recipe.model_dump(exclude_unset=True)
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_recipe(tree, "arguments")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    *sections, last = key.split(".")
    if len(sections) > 5:
        raise Ar2DiffError(
            f"{key[:80]} is not a recipe key", "run 'ar2diff config schema' to see all keys"
        )
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise Ar2DiffError(
                f"{key[:80]}: {section} is a value, not a section",
                "run 'ar2diff config schema' to see all keys",
            )
    try:
        tree[last] = parse_yaml(text)
    except ValueError as error:
        raise Ar2DiffError(
            f"{key[:80]}: {shortened(text)} is not valid YAML: {error}",
            "correct the value, or put it in quotes",
        ) from None


def _no_override(words: Sequence[str], number: int) -> Ar2DiffError:
    """The error for a word, of all that were given, that is not `key=value`."""
    word, (before, after) = words[number], (words[:number], words[number + 1 :])
    key = key_meant(word.rstrip(":"), field_names(Recipe))
    value = next((later.lstrip("=") for later in after if later != "="), "VALUE")
    if before and before[-1].endswith("="):
        key, value = before[-1].rstrip("="), word
    if word.endswith((".yaml", ".yml")):
        fix = f"give a recipe as {option('recipe', word)}"
    elif key is not None:
        fix = f"write {key if '=' in key else f'{key}={value}'}, without spaces"
    elif Path(word[:200]).exists():
        fix = f"give data as {option('data', word)}"
    else:
        fix = "write it like train.learning_rate=1e-3"
    return Ar2DiffError(f"argument {shortened(word)} is not of the form key=value", fix)


def _explain(error: Any, label: str) -> Ar2DiffError:
    """Our error for one of pydantic's validation errors."""
    names = [str(part)[:80] for part in error["loc"]]
    where = ".".join(names)
    if error["type"] == "extra_forbidden":
        return _unknown_key(names, f"{label}: " if label else "")
    got = error["input"]
    shown = "" if isinstance(got, dict) and got else f" (got {shortened(got)})"
    message = error["msg"].removeprefix("Value error, ")
    schema = ["ar2diff config schema", *(n for n in names[:1] if n in Recipe.model_fields)]
    return Ar2DiffError(
        f"{': '.join(part for part in (label, where, message) if part)}{shown}",
        f"run '{' '.join(schema)}' to see what is allowed",
    )


def _unknown_key(names: list[str], prefix: str) -> Ar2DiffError:
    """An unknown key, with the key that was probably meant: a similar one of the same section, or
    one of the same name in another section."""
    *parents, last = names
    section = ".".join(parents)
    right = key_named(last, field_names(Recipe), section)
    if right is None and (near := nearest(last, keys_of(Recipe, parents))):
        right = ".".join([*parents, near.removeprefix("; did you mean ").rstrip("?")])
    place = f"section {section}" if section else "the top level of a recipe"
    return Ar2DiffError(
        f"{prefix}{'.'.join(names)} is not a key of {place}"
        + (f"; did you mean {right}?" if right else ""),
        (f"write {right} instead, or remove it" if right else "rename or remove it")
        + "; 'ar2diff config schema' lists all keys",
    )
