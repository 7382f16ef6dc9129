"""Which options of `generate` cannot be combined, with each other or with a model.

This file is copied into converted folders: it imports its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import Ar2DiffError, option
from .spec import Spec

CONSTRAINTS = ("regex", "json_schema", "choice", "grammar")
# Options that only mode diffusion uses, with the values at which they ask for nothing.
DENOISING: dict[str, Any] = {
    "threshold": None, "steps_per_block": None, "entropy_bound": None, "block_length": None,
    "order": "prob", "remask": 0, "edit_threshold": None, "corrector_steps": 0, "edit_blocks": 0,
    "cfg_scale": 0, "check_cache": False, "classifier": None,
}  # fmt: skip
# Those that a call in another mode must not set.
DIFFUSION_ALONE = (
    "steps_per_block", "entropy_bound", "edit_threshold", "corrector_steps", "edit_blocks",
    "cfg_scale", "check_cache", "classifier",
)  # fmt: skip
# Those that tell decided tokens from others, which a noise in the free form cannot.
DECIDING = (
    "threshold", "entropy_bound", "remask", "edit_threshold", "corrector_steps", "edit_blocks",
    "order",
)  # fmt: skip


def check(options: Any, spec: Spec, called: Mapping[str, Any]) -> None:
    """Refuse what a model cannot do, before anything is computed.

    Args:
        options: an `Options`.
        called: the options that the call names, beside those of generation configs.
    """
    _check_constraints(options)
    _check_noise(options, spec, called)
    _check_rule(options)
    _check_edits(options, spec)
    _check_mode(options, spec, called)


def _check_constraints(options: Any) -> None:
    """Refuse more than one constraint."""
    given = [name for name in CONSTRAINTS if getattr(options, name) not in (None, ())]
    if len(given) > 1:
        first, second = map(option, given[:2])
        raise Ar2DiffError(f"{first} cannot be combined with {second}", "use only one of them")
    if "" in options.choice:
        raise Ar2DiffError(f"one text of {option('choice')} is empty", "leave it out")
    if options.grammar is not None and options.min_new_tokens:
        raise Ar2DiffError(
            f"{option('grammar')} cannot be combined with {option('min_new_tokens')}: a text ends "
            "where the grammar has nothing more",
            f"leave out {option('min_new_tokens')}",
        )


def _check_rule(options: Any) -> None:
    """Refuse options that belong to a rule that is not used."""
    steps = option("steps_per_block")
    if options.entropy_bound is not None and (
        options.steps_per_block or options.threshold is not None
    ):
        raise Ar2DiffError(
            f"{option('entropy_bound')} cannot be combined with {option('threshold')} or {steps}",
            "use only one of the three",
        )
    if options.remask and not options.steps_per_block:
        raise Ar2DiffError(f"{option('remask')} needs a fixed number of steps", f"set {steps} too")
    if options.order != "prob" and not options.steps_per_block:
        raise Ar2DiffError(
            f"{option('order', options.order)} needs a fixed number of steps",
            f"set {steps} too",
        )


def _check_edits(options: Any, spec: Spec) -> None:
    """Refuse edits together with what relies on decided tokens."""
    edits = option("edit_threshold")
    for name in ("corrector_steps", "edit_blocks"):
        if getattr(options, name) and options.edit_threshold is None:
            raise Ar2DiffError(
                f"{option(name)} needs to know which tokens to replace", f"set {edits} too"
            )
    most = (spec.block_length or 0) // (options.block_length or 1) - 1
    if options.edit_blocks > max(0, most):
        raise Ar2DiffError(
            f"{option('edit_blocks', options.edit_blocks)} and the block being denoised would be "
            f"read together, which is more than this model was trained to read "
            f"({spec.block_length or 'no blocks'})",
            f"lower {option('block_length')}: {option('edit_blocks')} 1 takes half of the trained "
            "length"
            if spec.block_length
            else f"leave it out: with full attention, use {option('corrector_steps')}",
        )
    if options.edit_threshold is None:
        return
    given = [name for name in CONSTRAINTS if getattr(options, name) not in (None, ())]
    for name in (*given, *(["remask"] if options.remask else [])):
        raise Ar2DiffError(
            f"{edits} cannot be combined with {option(name)}", "use only one of them"
        )


def _check_noise(options: Any, spec: Spec, called: Mapping[str, Any]) -> None:
    """Refuse what the noise of the model cannot do."""
    noise = spec.noise
    kind = f"this model's noise, {noise.kind} in the {noise.form} form,"
    if options.mode == "speculative" and not noise.starts_masked:
        raise Ar2DiffError(
            f"{option('mode', 'speculative')} drafts in masks, which {kind} does not have",
            f"use {option('mode', 'diffusion')} or {option('mode', 'ar')}",
        )
    if options.classifier is None:
        for name in ("fluency", "classifier_steps"):
            if called.get(name) is not None:
                raise Ar2DiffError(
                    f"{option(name)} is of the guidance by a classifier, and there is none",
                    f"set {option('classifier')} too",
                )
    if options.mode != "diffusion":
        return
    if options.classifier is not None and not noise.vectors:
        raise Ar2DiffError(
            f"{option('classifier')} moves the vectors that open slots show, but {kind} shows "
            "tokens",
            f"use {option('guide')}, or convert the base with {option('noise.kind', 'embedding')}",
        )
    if options.cache_implementation in ("prefix", "dual") and noise.visible:
        raise Ar2DiffError(
            f"{option('cache_implementation', options.cache_implementation)} keeps what open slots "
            f"showed, but {kind} changes it at every step",
            f"use {option('cache_implementation', 'none')}",
        )
    static = options.compile or options.cache_implementation == "static"
    if static and noise.vectors:
        name = "compile" if options.compile else "cache_implementation"
        raise Ar2DiffError(
            f"{option(name, getattr(options, name))} replays one forward of token ids, but {kind} "
            "shows vectors in place of embeddings",
            f"leave out {option(name)}",
        )
    if options.cfg_scale and not noise.fills:
        raise Ar2DiffError(
            f"{option('cfg_scale')} masks the prompt, but {kind} has no mask",
            f"leave out {option('cfg_scale')}",
        )
    if not noise.free:
        return
    for name in DECIDING:
        if called.get(name) not in (None, DENOISING[name]):
            raise Ar2DiffError(
                f"{option(name)} needs to know which tokens are decided, but {kind} decides a "
                "block at its last step",
                f"leave it out, and set {option('steps_per_block')}",
            )


def _check_mode(options: Any, spec: Spec, called: Mapping[str, Any]) -> None:
    """Refuse a mode that the model lacks, and options of another mode in a call. (A generation
    config may hold settings for several modes.)"""
    mode = option("mode", options.mode)
    if options.mode == "diffusion" and options.grammar is not None:
        raise Ar2DiffError(
            f"{option('grammar')} does not work with {mode}: whether undecided positions can still "
            "be filled in the room that is left is not known token by token",
            f"use {option('regex')} or {option('json_schema')}; or, without gaps, "
            f"{option('mode', 'speculative')}",
        )
    if options.mode != "diffusion":
        if not spec.writes_ar:
            raise Ar2DiffError(
                f"{mode} needs an AR mode, which this model ({spec.attention} attention) does not "
                "have",
                f"use {option('mode', 'diffusion')}, or convert the base with causal_context "
                f"attention and {option('objective.ar_weight')} above 0",
            )
        for name in DIFFUSION_ALONE:
            if called.get(name):
                raise Ar2DiffError(
                    f"{option(name)} only works with {option('mode', 'diffusion')}, not with "
                    f"{mode}",
                    f"leave out {option(name)}",
                )
    if options.compile and _measures(options):
        raise Ar2DiffError(
            f"{option('compile')} needs forwards of one shape, but {mode} varies the number of "
            "drafts",
            f"set {option('draft_length')}, or use {option('mode', 'ar')}",
        )
    for name in ("draft_length", "draft_nodes"):
        if called.get(name) is not None and options.mode != "speculative":
            raise Ar2DiffError(
                f"{option(name)} only works with {option('mode', 'speculative')}",
                f"leave out {option(name)}",
            )
    if options.draft_length is None or options.mode != "speculative":
        return
    if options.draft_length >= spec.block_length:
        raise Ar2DiffError(
            f"{option('draft_length', options.draft_length)} is not below the model's block length "
            f"of {spec.block_length}",
            f"set it to {spec.block_length - 1} or less",
        )


def _measures(options: Any) -> bool:
    """Whether the number of drafts is chosen while decoding."""
    fixed = options.draft_length is not None or options.draft_nodes is not None
    return options.mode == "speculative" and not fixed
