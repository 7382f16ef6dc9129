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
from ..checkpoint.output import record_of
from ..conversion.images import image_problems, reach_in
from ..core.attention import lay_out, model_mask
from ..core.draft import DraftSpec
from ..core.errors import Ar2DiffError
from ..core.forward import quiet_routers
from ..core.noises import Mask
from ..core.options import RULE, SAFE_THRESHOLD, THRESHOLD
from ..core.probe import probe
from ..core.spec import Spec
from .lossless import golden_run

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
LOSSLESS = {
    "mode speculative": (
        "in float32, the text is that of the AR mode up to near-ties: where it differs, the two "
        "likeliest tokens are less than 0.001 apart in float64; in bfloat16 there are more such "
        "places, and the two tokens are less than 0.5 apart"
    ),
}
MASKED_LM = {
    "transformers, with AutoModelForMaskedLM and trust_remote_code=True": (
        "denoises without ar2diff installed: GenerationMixin.load_custom_generate(None, FOLDER, "
        "trust_remote_code=True)(model=model, input_ids=ids)"
    ),
    "transformers, with AutoModelForMaskedLM or a fill-mask pipeline": (
        "predicts the masks of a text in one forward, as its base does"
    ),
    "transformers, with AutoModelForCausalLM": (
        "does not load most such classes; for some it does (BERT, RoBERTa), and without "
        "trust_remote_code decodes left to right with bidirectional attention: the text is wrong"
    ),
    "vLLM, SGLang, llama.cpp, transformers serve, lm-eval --model hf": "do not denoise",
}
READ = {
    "causal": "read from left to right, as text",
    "image": "each is read in both directions",
    "prefix": "they are read with the whole prompt, in both directions",
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
class DefaultMode:
    """How a folder decodes by default.

    Attributes:
        mode: `speculative`, `diffusion` or `ar`. why: the reason, in a clause.
    """

    mode: str
    why: str


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
        default: the mode in which it decodes by default; None for an unconverted model.
        masked_lm: whether the class of the model is one for masked language modelling.
    """

    model: str
    spec: Spec | None
    findings: tuple[Finding, ...]
    custom_generate: CustomGenerate | None
    elsewhere: dict[str, str]
    ok: bool
    draft: DraftSpec | None = None
    default: DefaultMode | None = None
    masked_lm: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def check(model: str | Path, dtype: str = "auto") -> Check:
    """Examine a checkpoint.

    Args:
        model: folder or Hub id.
        dtype: number type to compute in, as for `load`.

    Raises:
        Ar2DiffError: the checkpoint does not load, or its spec cannot be honoured.
    """
    path = find_checkpoint(str(model), code=True)
    checkpoint = load_checkpoint(str(path), device="auto", dtype=dtype)
    spec = checkpoint.spec
    if checkpoint.draft is not None:
        return _check_draft(str(model), path, checkpoint)
    if spec is None:
        way = "predicts single masks" if checkpoint.is_masked_lm else "decodes left to right"
        where = {"everywhere": f"{way}; 'ar2diff adapt' converts it"}
        seen = tuple(_seen(checkpoint))
        return Check(
            str(model), None, seen, None, where, all(finding.ok for finding in seen),
            masked_lm=checkpoint.is_masked_lm,
        )  # fmt: skip
    code, masked = read_custom_generate(_home(checkpoint)), checkpoint.is_masked_lm
    findings = (
        *_findings(checkpoint, spec),
        *_seen(checkpoint),
        *_lossless(checkpoint, path),
        _code_finding(code),
    )
    return Check(
        model=str(model),
        spec=spec,
        findings=findings,
        custom_generate=code,
        elsewhere=({} if masked else {TRUSTED: TRUSTING if code.sha256 else CODELESS})
        | elsewhere_of(checkpoint)
        | (LOSSLESS if spec.lossless else {}),
        ok=all(finding.ok for finding in findings),
        default=_default_mode(checkpoint, path),
        masked_lm=masked,
    )


def elsewhere_of(checkpoint: Checkpoint) -> dict[str, str]:
    """{program: what happens when it runs a converted model}."""
    if checkpoint.is_masked_lm:
        return MASKED_LM
    return ELSEWHERE.get(checkpoint.spec.attention, ELSEWHERE["other"])


def _check_draft(model: str, path: Path, checkpoint: Checkpoint) -> Check:
    """What there is to say of a draft adapter on its base."""
    draft, code = checkpoint.draft.spec, read_custom_generate(path)
    clean, noisy = _moved(checkpoint)
    findings = (
        Finding(f"the base {draft.base} has the weights that it was trained for", True),
        Finding("the base's own logits are the same bits with the adapter and without it", clean),
        Finding("the adapter changes the logits of drafts", noisy),
        *_lossless(checkpoint, path),
        _code_finding(code),
    )
    return Check(
        model=model,
        spec=checkpoint.spec,
        findings=findings,
        custom_generate=code,
        elsewhere=BESIDE | LOSSLESS,
        ok=all(finding.ok for finding in findings),
        draft=draft,
        default=_default_mode(checkpoint, path),
    )


def _seen(checkpoint: Checkpoint) -> list[Finding]:
    """What there is to say of the images that a model sees."""
    if not checkpoint.sees_images:
        return []
    missing = _no_processor(checkpoint)
    if missing is not None:
        return [Finding(f"it sees images, but {missing.what}; {missing.fix}", False)]
    spec, problems = checkpoint.spec, []
    try:
        reach = spec.images if spec is not None else reach_in(checkpoint)
    except Ar2DiffError as error:
        return [Finding(f"it sees images, but {error.what}", False)]
    if spec is not None:
        problems = image_problems(checkpoint, spec)
    name = type(checkpoint.processor).__name__
    told = f", but {problems[0]}" if problems else ""
    what = f"it sees images ({reach}: {READ[reach]}), prepared by {name}{told}"
    return [Finding(what, not problems)]


def _no_processor(checkpoint: Checkpoint) -> Ar2DiffError | None:
    """Why the processor of a vision-language model cannot be loaded; None if it can."""
    try:
        checkpoint.processor  # noqa: B018
    except Ar2DiffError as error:
        return error
    return None


def _lossless(checkpoint: Checkpoint, path: Path) -> list[Finding]:
    """What a golden run of the lossless mode found, if there is such a mode."""
    if checkpoint.draft is None and not checkpoint.spec.lossless:
        return []
    if checkpoint.sees_images and _no_processor(checkpoint) is not None:
        return []  # which is told
    found = golden_run(checkpoint, str(path))
    if found is None:
        return [Finding("the lossless mode was not tried, because the model is too large", True)]
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    return [Finding(f"the lossless mode in {dtype}: {found}", found.ok)]


def _default_mode(checkpoint: Checkpoint, path: Path) -> DefaultMode:
    """In which mode a folder decodes if nothing is asked for, and why."""
    generation, spec = checkpoint.model.generation_config, checkpoint.spec
    if checkpoint.draft is not None:
        return DefaultMode("speculative", "the drafts of the adapter are verified by its base")
    mode = getattr(generation, "mode", None) or "diffusion"
    if spec.lossless:
        if mode == "speculative":
            return DefaultMode(mode, "it has an AR mode, whose text is kept")
        return DefaultMode(mode, "generation_config.json says so, although it has an AR mode")
    if spec.noise.free:
        why = "its noise, in the free form, decides a whole block at the last of its steps"
        return DefaultMode(mode, f"{_drafts_no(spec)}; {why}")
    rule = {name: getattr(generation, name, None) for name in RULE}
    rule = {name: value for name, value in rule.items() if value is not None}
    shown = ", ".join(f"{name}={value}" for name, value in rule.items())
    ours = rule in ({"threshold": THRESHOLD}, {"threshold": SAFE_THRESHOLD})
    reason = f"because {_measured(path)}" if ours else "as generation_config.json says"
    return DefaultMode(mode, f"{_drafts_no(spec)}; {shown}, {reason}")


def _drafts_no(spec: Spec) -> str:
    """Why a model has no lossless mode."""
    if spec.writes_ar:
        return (
            f"it drafts nothing for its AR mode, because its noise, {spec.noise.kind}, has no masks"
        )
    return "it has no AR mode"


def _measured(path: Path) -> str:
    """What the record of a folder says of its text at the default threshold."""
    try:
        record = record_of(path)
        text = (record if "recipe" in record else record["run"])["text"]
        if "not_measured" in text:
            return f"its text was not compared with its base's ({text['not_measured']})"
        return (
            f"its text at threshold {text['threshold']} is "
            f"{'as good as' if text['good'] else 'worse than'} its base's (NLL under the base "
            f"{text['nll']:.3f} and {text['base_nll']:.3f}, difference {text['difference']:.3f} "
            f"± {text['standard_error']:.3f} on {text['rows']} continuations)"
        )
    except (TypeError, KeyError, ValueError):  # no record, or one that somebody edited
        return "its text was not compared with its base's"


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
        *([] if spec.noise == Mask() else [Finding(f"its noise: {spec.noise.described}", True)]),
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
