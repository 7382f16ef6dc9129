"""What a checkpoint is, whether it does what it says, and where it would silently decode as AR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.custom_generate import FOLDER, CustomGenerate, read_custom_generate
from ..checkpoint.files import find_checkpoint
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..core.probe import probe

TRUSTED = "transformers >= 5.2 with trust_remote_code=True"
TRUSTING = "denoises, ar2diff need not be installed: generate(), pipelines, serve, lm-eval's tasks"
CODELESS = f"does not denoise: the folder has no {FOLDER}"
ELSEWHERE = {
    "causal_context": {
        "transformers without trust_remote_code, vLLM, SGLang, llama.cpp": (
            "decode left to right: correct text, but not the diffusion mode"
        ),
        "transformers serve --continuous-batching": "decodes left to right, trusted or not",
        "lm-eval --model hf": "scores of choices and perplexities are those of the AR mode",
    },
    "other": {
        "transformers without trust_remote_code": (
            "decodes left to right with two-way attention: wrong text"
        ),
        "transformers serve --continuous-batching": "the same, trusted or not: wrong text",
        "transformers < 5.2, vLLM, SGLang, llama.cpp": (
            "ignore is_causal and run it as the AR model that it no longer is: wrong text"
        ),
        "lm-eval --model hf": (
            "scores of choices and perplexities see the answer: invalid; use 'ar2diff eval'"
        ),
    },
}


def inspect(reference: str) -> dict[str, Any]:
    """Examine a checkpoint.

    Returns:
        spec (None: unconverted), findings [{what, ok}], custom_generate {state, sha256},
        elsewhere {place: what happens there}, ok.

    Raises:
        Ar2DiffError: it does not load at all, or its spec is not one we honour.
    """
    path = find_checkpoint(reference, code=True)
    checkpoint = load_checkpoint(str(path), device="auto")
    spec, model, tokenizer = checkpoint.spec, checkpoint.model, checkpoint.tokenizer
    if spec is None:
        return {
            "model": reference,
            "spec": None,
            "findings": [],
            "custom_generate": None,
            "ok": True,
            "elsewhere": {"everywhere": "decodes left to right; 'ar2diff adapt' converts it"},
        }
    problems = probe(model, spec)
    causal = getattr(model.config, "is_causal", None)
    generation = model.generation_config
    code = read_custom_generate(_home(checkpoint))
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = None if spec.attention == "causal_context" else False
    flag = "absent" if wanted is None else "false"
    checks = [
        (f"the probe agrees with the spec{': ' + problems[0] if problems else ''}", not problems),
        (f"mask token {spec.mask_token_id} is in range ({rows} rows)", spec.mask_token_id < rows),
        (
            f"the tokenizer's mask token is {spec.mask_token_id} ({tokenizer.mask_token})",
            tokenizer.mask_token_id == spec.mask_token_id,
        ),
        (
            "generation_config suppresses the mask token",
            spec.mask_token_id in (generation.suppress_tokens or []),
        ),
        ("generation_config sets no max_new_tokens", generation.max_new_tokens is None),
        (
            f"config.is_causal is {flag}, as {spec.attention} needs",
            causal is wanted,
        ),
        (
            "the pad token is no end token",
            tokenizer.pad_token_id not in checkpoint.end_ids,
        ),
        (_said(code), code.state == "ok"),
    ]
    if checkpoint.base is not None:  # it would not have loaded otherwise
        name = checkpoint.base.reference
        checks.append((f"the base {name} has the spec and the mask row it was trained on", True))
    return {
        "model": reference,
        "spec": spec.to_dict(),
        "findings": [{"what": what, "ok": ok} for what, ok in checks],
        "custom_generate": vars(code),
        "elsewhere": {TRUSTED: TRUSTING if code.sha256 else CODELESS}
        | ELSEWHERE.get(spec.attention, ELSEWHERE["other"]),
        "ok": all(ok for _, ok in checks),
    }


def _home(checkpoint: Checkpoint) -> Path:
    """The folder with the decoding code: an adapter's is its base's."""
    base = checkpoint.base
    if base is None:
        return checkpoint.path
    revision = f"@{base.revision}" if base.revision else ""
    return find_checkpoint(base.reference + revision, code=True)


def _said(code: CustomGenerate) -> str:
    if code.state == "missing":
        return f"{FOLDER} is missing: nothing denoises it where ar2diff is not installed"
    if code.state == "differs":
        return f"{FOLDER} differs from this version's, read it before you trust it: {code.sha256}"
    return f"{FOLDER} is this version's, byte for byte (sha256 {code.sha256})"
