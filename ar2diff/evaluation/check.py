"""What a checkpoint is, whether it does what its config says, and where it would silently decode as
an AR model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.custom_generate import FOLDER, CustomGenerate, read_custom_generate
from ..checkpoint.files import find_checkpoint
from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..core.attention import lay_out, model_mask
from ..core.draft import DraftSpec
from ..core.forward import quiet_routers
from ..core.probe import probe
from ..core.spec import Spec

TRUSTED = "transformers >= 5.2 with trust_remote_code=True"
TRUSTING = (
    "denoises without ar2diff installed: generate(), pipelines, serve, generation tasks in lm-eval"
)
CODELESS = f"does not denoise, because the folder has no {FOLDER}"
ELSEWHERE = {
    "causal_context": {
        "transformers without trust_remote_code, vLLM, SGLang, llama.cpp": (
            "decode left to right: the text is correct, but the diffusion mode is not used"
        ),
        "transformers serve --continuous-batching": (
            "decodes left to right, with or without trust_remote_code"
        ),
        "lm-eval --model hf": "perplexities and multiple-choice scores are those of the AR mode",
    },
    "other": {
        "transformers without trust_remote_code": (
            "decodes left to right with bidirectional attention: the text is wrong"
        ),
        "transformers serve --continuous-batching": (
            "decodes the same way, with or without trust_remote_code: the text is wrong"
        ),
        "transformers < 5.2, vLLM, SGLang, llama.cpp": (
            "ignore is_causal and decode left to right, as an AR model: the text is wrong"
        ),
        "lm-eval --model hf": (
            "perplexities and multiple-choice scores are invalid, because the model sees the "
            "answer; use 'ar2diff eval' instead"
        ),
    },
}
BESIDE = {
    "transformers, with the base and trust_remote_code=True": (
        "writes the base's text in fewer forwards: "
        "base.generate(ids, custom_generate=FOLDER, draft=FOLDER, trust_remote_code=True)"
    ),
    "peft, AutoModelForCausalLM, vLLM, SGLang, llama.cpp": "do not read the folder",
}


@dataclass(frozen=True)
class Finding:
    """A checked statement, and whether it holds."""

    what: str
    ok: bool


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        model: folder or Hub id.
        spec: the diffusion spec; None for an unconverted model. That of a draft adapter is its
            base's.
        custom_generate: the state of the decoding code in the folder; None for an unconverted
            model.
        elsewhere: {program: what happens when it runs the model}.
        ok: whether every finding holds.
        draft: what `draft.json` says of a draft adapter; None for anything else.
    """

    model: str
    spec: Spec | None
    findings: tuple[Finding, ...]
    custom_generate: CustomGenerate | None
    elsewhere: dict[str, str]
    ok: bool
    draft: DraftSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def check(model: str | Path) -> Check:
    """Examine a checkpoint.

    Args:
        model: folder or Hub id.

    Raises:
        Ar2DiffError: the checkpoint does not load, or its spec cannot be honoured.
    """
    path = find_checkpoint(str(model), code=True)
    checkpoint = load_checkpoint(str(path), device="auto")
    spec = checkpoint.spec
    if checkpoint.draft is not None:
        return _check_draft(str(model), path, checkpoint)
    if spec is None:
        where = {"everywhere": "decodes left to right; 'ar2diff adapt' converts it"}
        return Check(str(model), None, (), None, where, True)
    code = read_custom_generate(_home(checkpoint))
    findings = (*_findings(checkpoint, spec), _code_finding(code))
    return Check(
        model=str(model),
        spec=spec,
        findings=findings,
        custom_generate=code,
        elsewhere={TRUSTED: TRUSTING if code.sha256 else CODELESS}
        | ELSEWHERE.get(spec.attention, ELSEWHERE["other"]),
        ok=all(finding.ok for finding in findings),
    )


def _check_draft(model: str, path: Path, checkpoint: Checkpoint) -> Check:
    """What there is to say of a draft adapter on its base."""
    draft, code = checkpoint.draft.spec, read_custom_generate(path)
    clean, noisy = _moved(checkpoint)
    findings = (
        Finding(f"the base {draft.base} has the weights that it was trained for", True),
        Finding("the base's own logits are the same bits with the adapter and without it", clean),
        Finding("the adapter changes the logits of drafts", noisy),
        _code_finding(code),
    )
    return Check(
        model=model,
        spec=checkpoint.spec,
        findings=findings,
        custom_generate=code,
        elsewhere=BESIDE,
        ok=all(finding.ok for finding in findings),
        draft=draft,
    )


@torch.no_grad()
def _moved(checkpoint: Checkpoint) -> tuple[bool, bool]:
    """Whether, in a forward of a short [noisy | clean] row, the adapter leaves every clean logit as
    it is, and changes the noisy ones."""
    model, draft = checkpoint.model, checkpoint.draft
    spec, length = checkpoint.read_as, 2 * draft.spec.block_length
    pos = torch.arange(length, device=model.device)[None]
    x0 = pos % draft.spec.vocabulary
    ids, slots = lay_out(
        torch.full_like(x0, draft.mask_token_id), x0, torch.zeros_like(pos), pos, spec.attention
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": model_mask(
            model, slots, spec.attention, spec.block_length, spec.local_window
        ),
        "position_ids": slots.pos,
    }
    found = []
    for branch in (slice(0, length), slice(0, 0)):
        with draft.applied(model, branch):
            found.append(model(**inputs, use_cache=False, **quiet_routers(model)).logits)
    one, other = found
    same = torch.equal(one[:, length:], other[:, length:])
    return same, not torch.equal(one[:, :length], other[:, :length])


def _findings(checkpoint: Checkpoint, spec: Spec) -> list[Finding]:
    model, tokenizer, mask = checkpoint.model, checkpoint.tokenizer, spec.mask_token_id
    generation = model.generation_config
    problems = probe(model, spec)
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = None if spec.attention == "causal_context" else False
    flag = "absent" if wanted is None else "false"
    findings = [
        Finding(
            f"the probe agrees with the spec{': ' + problems[0] if problems else ''}", not problems
        ),
        Finding(f"the mask token {mask} is in range ({rows} rows)", mask < rows),
        Finding(
            f"the tokenizer's mask token is {mask} ({tokenizer.mask_token})",
            tokenizer.mask_token_id == mask,
        ),
        Finding(
            "generation_config suppresses the mask token",
            mask in (generation.suppress_tokens or []),
        ),
        Finding("generation_config sets no max_new_tokens", generation.max_new_tokens is None),
        Finding(
            f"config.is_causal is {flag}, as {spec.attention} attention needs",
            getattr(model.config, "is_causal", None) is wanted,
        ),
        Finding(
            "the pad token is not an end token", tokenizer.pad_token_id not in checkpoint.end_ids
        ),
    ]
    if checkpoint.base is not None:  # otherwise it would not have loaded
        name = checkpoint.base.reference
        findings.append(
            Finding(
                f"the base {name} has the spec and mask row that the adapter was trained with", True
            )
        )
    return findings


def _home(checkpoint: Checkpoint) -> Path:
    """The folder with the decoding code, which for an adapter is that of its base."""
    base = checkpoint.base
    if base is None:
        return checkpoint.path
    revision = f"@{base.revision}" if base.revision else ""
    return find_checkpoint(base.reference + revision, code=True)


def _code_finding(code: CustomGenerate) -> Finding:
    what = {
        "missing": f"{FOLDER} is missing: the model does not denoise without ar2diff",
        "differs": f"{FOLDER} differs from that of this version; read it before you trust it "
        f"(sha256 {code.sha256})",
        "ok": f"{FOLDER} is identical to that of this version (sha256 {code.sha256})",
    }
    return Finding(what[code.state], code.state == "ok")
