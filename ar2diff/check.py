"""What a checkpoint is, whether it does what it says, and where it would silently decode as AR."""

from __future__ import annotations

from typing import Any

from .checkpoint import load_checkpoint
from .probe import probe

ELSEWHERE = {
    "causal_context": {
        "transformers' own generate(), vLLM, SGLang, llama.cpp": (
            "decode left to right: correct text, but not the diffusion mode"
        ),
    },
    "other": {
        "transformers' own generate()": "decodes left to right with two-way attention: wrong text",
        "transformers < 5.2, vLLM, SGLang, llama.cpp": (
            "ignore is_causal and run it as the AR model that it no longer is: wrong text"
        ),
        "lm-eval --model hf": "scores see the answer: invalid figures; use 'ar2diff eval'",
    },
}


def inspect(reference: str) -> dict[str, Any]:
    """Examine a checkpoint.

    Returns:
        spec (None: unconverted), findings [{what, ok}], elsewhere {place: what happens there}, ok.

    Raises:
        Ar2DiffError: it does not load at all, or its spec is not one we honour.
    """
    checkpoint = load_checkpoint(reference, device="auto")
    spec, model, tokenizer = checkpoint.spec, checkpoint.model, checkpoint.tokenizer
    if spec is None:
        return {
            "model": reference,
            "spec": None,
            "findings": [],
            "ok": True,
            "elsewhere": {"everywhere": "decodes left to right; 'ar2diff adapt' converts it"},
        }
    problems = probe(model, spec)
    causal = getattr(model.config, "is_causal", None)
    generation = model.generation_config
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
    ]
    return {
        "model": reference,
        "spec": spec.to_dict(),
        "findings": [{"what": what, "ok": ok} for what, ok in checks],
        "elsewhere": ELSEWHERE.get(spec.attention, ELSEWHERE["other"]),
        "ok": all(ok for _, ok in checks),
    }
