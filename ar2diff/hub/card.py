"""The model card: what a published model is, how to run it, what happens without its code, how fast
it decodes, how it was made, and its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..checkpoint.custom_generate import FOLDER, REQUIREMENTS, custom_generate, digest
from ..checkpoint.files import EXAMPLE
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, option, shortened
from ..core.options import RULE, STEPS
from ..core.spec import Spec
from ..evaluation.check import elsewhere_of
from ..generation.chat import Chat
from ..generation.events import Answer, Problem
from ..generation.tokens import closing_tokens
from ..reports.figures import Report
from ..reports.serving import serve_command
from ..reports.summary import markdown, renamed
from .example import Example
from .origin import Origin

TEMPLATE = Path(__file__).with_name("card.jinja")
DRAFT_TEMPLATE = Path(__file__).with_name("draft_card.jinja")
TOKENS = 32  # maximum length of a sample: the model may be large and on a CPU
GREEDY = {"max_new_tokens": TOKENS, "temperature": 0}
REACH = {  # what `images` in the spec means
    "causal": "the tokens of an image read each other from left to right, as a text's do",
    "image": "the tokens of an image read each other in both directions",
    "prefix": "the whole prompt, images and text, is read in both directions",
}
DRAFT_LENGTH = 7  # at most; the default depends on the machine


@dataclass(frozen=True)
class Sample:
    """A model's greedy answer to a prompt.

    Attributes:
        settings: sampler settings, in addition to the folder's own.
        text: the answer. tokens: its length. forwards: how many forward passes it took.
    """

    settings: dict[str, Any]
    text: str
    tokens: int
    forwards: int


def shown_settings(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The settings that a card shows. The first write what the folder writes without any, with a
    fixed number of drafts."""
    spec, longest = checkpoint.read_as, (checkpoint.read_as.block_length or 1) - 1
    if checkpoint.draft is not None:
        return [{"draft_length": longest}, {"mode": "ar"}]
    lossless = {"mode": "speculative", "draft_length": min(DRAFT_LENGTH, longest)}
    fast: dict[str, Any] = {"threshold": 0.7}
    if spec.noise.free:
        fast = {"steps_per_block": max(1, (spec.block_length or STEPS) // 4)}
    if not spec.lossless or not longest:
        return [{}, fast]
    if getattr(checkpoint.model.generation_config, "mode", None) == "speculative":
        return [lossless, {"mode": "diffusion"}, fast]
    return [{}, fast, lossless]


def fitting_settings(checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], list[str]]:
    """Those of `shown_settings` that do not conflict with the folder's own, and why others do.

    Raises:
        Ar2DiffError: the first do.
    """
    fitting: list[dict[str, Any]] = []
    refused: list[str] = []
    for settings in shown_settings(checkpoint):
        try:
            Chat(checkpoint, settings | _greedy(checkpoint))
        except Ar2DiffError as error:
            if not fitting or checkpoint.draft is not None:
                raise
            refused.append(f"`{_label(settings)}` is not shown: {error.what}")
        else:
            fitting.append(settings)
    return fitting, refused


def _greedy(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of all samples: a noise may be drawn at temperature 0 too."""
    return GREEDY | ({"seed": 0} if checkpoint.read_as.noise.random else {})


def measure_all(
    checkpoint: Checkpoint, prompts: Sequence[str]
) -> tuple[dict[str, list[Sample]], list[str]]:
    """What `measure` finds for each of several prompts that nobody chose, and why some of them are
    left out."""
    answers, refused = {}, []
    for prompt in prompts:
        try:
            answers[prompt] = measure(checkpoint, prompt)
        except Ar2DiffError as error:
            refused.append(error.what)
    return answers, refused


def measure(
    checkpoint: Checkpoint, prompt: str, every: bool = True, image: Any = None
) -> list[Sample]:
    """Answers to one prompt, with each of the settings that a card shows.

    Args:
        prompt: a user message if there is a chat template, else the beginning of a text.
        every: False uses only the first settings.
        image: a picture before the prompt, for a vision-language model.

    Raises:
        Ar2DiffError: the prompt is empty or too long.
    """
    samples: list[Sample] = []
    for settings in fitting_settings(checkpoint)[0][: None if every else 1]:
        chat = Chat(checkpoint, settings | _greedy(checkpoint))
        chat.attached = () if image is None else (image,)
        for event in chat.events(prompt):
            if isinstance(event, Problem):
                raise Ar2DiffError(
                    f"{option('prompt')} {shortened(prompt)}: {event.what}",
                    f"give another {option('prompt')}",
                )
            if isinstance(event, Answer):
                found = event.result
                samples.append(Sample(settings, found.text, found.new_tokens, found.forwards))
    if not samples:
        raise Ar2DiffError(f"{option('prompt')} is empty", f"give another {option('prompt')}")
    return samples


def make_card(
    name: str,
    checkpoint: Checkpoint,
    record: dict[str, Any],
    origin: Origin,
    answers: dict[str, list[Sample]],
    held_out: bool,
    report: Report | None = None,
    example: Example | None = None,
) -> str:
    """The card as Markdown with front matter.

    Args:
        name: name of the repository.
        record: the record as published, without paths on this machine.
        answers: {prompt: result of `measure`}. held_out: whether the prompts are the beginnings of
            texts that the run held out.
        report: what was measured of the model.
        example: the picture that a vision-language model was asked about.
    """
    if checkpoint.draft is not None:
        return _make_draft_card(name, checkpoint, record, origin, answers, held_out, report)
    spec, model = checkpoint.spec, checkpoint.model
    adapter = checkpoint.base is not None
    model_type = model.config.model_type
    tags = ["ar2diff", "diffusion-lm", *([] if adapter else [FOLDER])]
    sees = checkpoint.sees_images
    whole = "masked-diffusion" if spec.noise.starts_masked else f"{spec.noise.kind}-diffusion"
    tags += [whole if spec.attention == "full" else "block-diffusion", model_type]
    relation = "adapter" if adapter else "finetune"
    data = ModelCardData(
        base_model=origin.name,
        base_model_relation=relation if origin.name else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_task_of(checkpoint),
        tags=tags + (["lora"] if adapter else []),
        **origin.licence,
    )
    run = run_of(record)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        title=name.split("/")[-1],
        adapter=adapter,
        architecture=_class_name(model),
        **_shown(checkpoint, answers, held_out),
        report=_measured(report, name, origin),
        serve=serve_command(report, name),
        templated=bool(checkpoint.tokenizer.chat_template),
        requirement=REQUIREMENTS.strip(),
        tokens=TOKENS,
        own_rule=_own_rule(model.generation_config, spec),
        own_mode=getattr(model.generation_config, "mode", None),
        spec=spec,
        parameters=_parameters(spec),
        mask_token=checkpoint.tokenizer.mask_token,
        origin=origin,
        base_name=origin.name or record.get("base_model") or "unknown",
        elsewhere=elsewhere_of(checkpoint),
        masked_lm=checkpoint.is_masked_lm,
        sees=sees,
        reach=REACH.get(spec.images or ""),
        file=EXAMPLE,
        example=example,
        closing=closing_tokens(checkpoint.tokenizer),
        code_sha256=digest(custom_generate()),
        run=run,
        changed=yaml.safe_dump(changes(run.get("recipe") or {}), sort_keys=False).strip(),
        record=record,
        learned=bool(run.get("steps")),
        base_differs=_differences(spec, checkpoint) if adapter else [],
    )
    return str(card)


def _make_draft_card(
    name: str,
    checkpoint: Checkpoint,
    record: dict[str, Any],
    origin: Origin,
    answers: dict[str, list[Sample]],
    held_out: bool,
    report: Report | None,
) -> str:
    """The card of a draft adapter; arguments as for `make_card`."""
    model = checkpoint.model
    data = ModelCardData(
        base_model=origin.name,
        base_model_relation="adapter",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ar2diff", "draft-adapter", "speculative-decoding", FOLDER, model.config.model_type],
        **origin.licence,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(DRAFT_TEMPLATE),
        name=name,
        title=name.split("/")[-1],
        **_shown(checkpoint, answers, held_out),
        report=_measured(report, name, origin),
        serve=serve_command(report, name),
        templated=bool(checkpoint.tokenizer.chat_template),
        requirement=REQUIREMENTS.strip(),
        tokens=TOKENS,
        spec=checkpoint.draft.spec,
        parameters=sum(p.numel() for p in checkpoint.draft.parameters()),
        origin=origin,
        code_sha256=digest(custom_generate()),
        run=record,
        changed=yaml.safe_dump(changes(record.get("recipe") or {}), sort_keys=False).strip(),
        record=record,
    )
    return str(card)


def _shown(
    checkpoint: Checkpoint, answers: dict[str, list[Sample]], held_out: bool
) -> dict[str, Any]:
    """What both templates show of the answers: each prompt with its first answer, and for each of
    the settings the tokens and forwards of all answers."""
    settings, refused = fitting_settings(checkpoint)
    rows = []
    for number, chosen in enumerate(settings):
        found = [samples[number] for samples in answers.values()]
        tokens, forwards = sum(s.tokens for s in found), sum(s.forwards for s in found)
        rate = tokens / max(forwards, 1)
        rows.append({"label": _label(chosen), "tokens": tokens, "forwards": forwards, "rate": rate})
    quoted = {json.dumps(prompt, ensure_ascii=False): s[0].text for prompt, s in answers.items()}
    return {
        "prompt": next(iter(quoted)),
        "answers": quoted,
        "held_out": held_out,
        "rows": rows,
        "refused": refused,
    }


def _measured(report: Report | None, name: str, origin: Origin) -> dict[str, Any] | None:
    """What a card shows of a report, under the names that others know."""
    if report is None:
        return None
    return markdown(renamed(report, name.split("/")[-1], origin.name))


def run_of(record: dict[str, Any]) -> dict[str, Any]:
    """The record of the run that trained a model, which a merged one keeps within its own."""
    return record if "recipe" in record else record.get("run") or {}


def changes(recipe: dict[str, Any]) -> dict[str, Any]:
    """The values in a recorded recipe that differ from the defaults, by section."""
    defaults = Recipe().model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, values in recipe.items():
        known = defaults.get(name)
        if isinstance(values, dict) and isinstance(known, dict):
            values = {key: value for key, value in values.items() if value != known.get(key)}
            if values:
                found[name] = values
        elif values != known:
            found[name] = values
    return found


def _label(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def _own_rule(generation: Any, spec: Spec) -> str:
    """The settings of the folder that determine which tokens a forward pass decides; of a noise in
    the free form its steps, whether set or not."""
    own = {name: getattr(generation, name, None) for name in RULE}
    own = {name: value for name, value in own.items() if value is not None}
    if spec.noise.free:
        own = {"steps_per_block": own.get("steps_per_block", spec.block_length or STEPS)}
    return f"`{_label(own)}`"


def _parameters(spec: Spec) -> str:
    """The parameters of the noise."""
    values = spec.noise.to_dict()
    return _label({name: v for name, v in values.items() if name not in ("kind", "form", "sha256")})


def _task_of(checkpoint: Checkpoint) -> str:
    """What the Hub calls what a model is for."""
    if checkpoint.sees_images:
        return "image-text-to-text"
    return "fill-mask" if checkpoint.is_masked_lm else "text-generation"


def _class_name(model: Any) -> str:
    return (model.config.architectures or [type(model).__name__])[0]


def _differences(spec: Spec, checkpoint: Checkpoint) -> list[str]:
    """What an adapter changed in the spec of its base, which only ar2diff reads."""
    base = checkpoint.base.spec.to_dict()
    return [f"{key} {base[key]} -> {value}" for key, value in spec.to_dict().items()
            if base[key] != value]  # fmt: skip
