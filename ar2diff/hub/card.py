"""The model card: what a published model is, how to run it, what happens without its code, how fast
it decodes, how it was made, and its limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..checkpoint.custom_generate import FOLDER, REQUIREMENTS, custom_generate, digest
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, option, shortened
from ..core.options import RULE
from ..core.spec import Spec
from ..evaluation.check import ELSEWHERE
from ..generation.chat import Chat
from ..generation.events import Answer, Problem
from .origin import Origin

TEMPLATE = Path(__file__).with_name("card.jinja")
DRAFT_TEMPLATE = Path(__file__).with_name("draft_card.jinja")
TOKENS = 32  # maximum length of a sample: the model may be large and on a CPU
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

    @property
    def rate(self) -> float:
        """Tokens per forward."""
        return self.tokens / max(self.forwards, 1)


def shown_settings(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The settings that a card shows. The first write what the folder writes without any, with a
    fixed number of drafts."""
    spec, longest = checkpoint.read_as, (checkpoint.read_as.block_length or 1) - 1
    if checkpoint.draft is not None:
        return [{"draft_length": longest}, {"mode": "ar"}]
    lossless = {"mode": "speculative", "draft_length": min(DRAFT_LENGTH, longest)}
    if not spec.lossless or not longest:
        return [{}, {"threshold": 0.7}]
    if getattr(checkpoint.model.generation_config, "mode", None) == "speculative":
        return [lossless, {"mode": "diffusion"}, {"threshold": 0.7}]
    return [{}, {"threshold": 0.7}, lossless]


def measure(checkpoint: Checkpoint, prompt: str, every: bool = True) -> list[Sample]:
    """Answers to one prompt, with each of the settings that a card shows.

    Args:
        prompt: a user message if there is a chat template, else the beginning of a text.
        every: False uses only the first settings.

    Raises:
        Ar2DiffError: the prompt is empty or too long.
    """
    samples: list[Sample] = []
    for settings in shown_settings(checkpoint)[: None if every else 1]:
        try:
            chat = Chat(checkpoint, settings | {"max_new_tokens": TOKENS, "temperature": 0})
        except Ar2DiffError:
            if samples and checkpoint.draft is None:  # the folder's own would conflict with them
                continue
            raise
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
    prompt: str,
    samples: list[Sample],
) -> str:
    """The card as Markdown with front matter.

    Args:
        name: name of the repository.
        record: the record as published, without paths on this machine.
        prompt, samples: argument and result of `measure`.
    """
    if checkpoint.draft is not None:
        return _make_draft_card(name, checkpoint, record, origin, prompt, samples)
    spec, model = checkpoint.spec, checkpoint.model
    adapter = checkpoint.base is not None
    model_type = model.config.model_type
    tags = ["ar2diff", "diffusion-lm", *([] if adapter else [FOLDER])]
    tags += ["masked-diffusion" if spec.attention == "full" else "block-diffusion", model_type]
    relation = "adapter" if adapter else "finetune"
    data = ModelCardData(
        base_model=origin.name,
        base_model_relation=relation if origin.name else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + (["lora"] if adapter else []),
        **origin.licence,
    )
    run = record if "recipe" in record else record.get("run") or {}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        title=name.split("/")[-1],
        adapter=adapter,
        architecture=_class_name(model),
        prompt=json.dumps(prompt, ensure_ascii=False),
        templated=bool(checkpoint.tokenizer.chat_template),
        requirement=REQUIREMENTS.strip(),
        tokens=TOKENS,
        samples=[{"label": _label(s.settings), "sample": s} for s in samples],
        own_rule=_own_rule(model.generation_config),
        own_mode=getattr(model.generation_config, "mode", None),
        spec=spec,
        mask_token=checkpoint.tokenizer.mask_token,
        origin=origin,
        base_name=origin.name or record.get("base_model") or "unknown",
        elsewhere=ELSEWHERE.get(spec.attention, ELSEWHERE["other"]),
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
    prompt: str,
    samples: list[Sample],
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
        prompt=json.dumps(prompt, ensure_ascii=False),
        templated=bool(checkpoint.tokenizer.chat_template),
        requirement=REQUIREMENTS.strip(),
        tokens=TOKENS,
        samples=[{"label": _label(s.settings), "sample": s} for s in samples],
        spec=checkpoint.draft.spec,
        parameters=sum(p.numel() for p in checkpoint.draft.parameters()),
        origin=origin,
        code_sha256=digest(custom_generate()),
        run=record,
        changed=yaml.safe_dump(changes(record.get("recipe") or {}), sort_keys=False).strip(),
        record=record,
    )
    return str(card)


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


def _own_rule(generation: Any) -> str:
    """The settings in `generation_config.json` that determine which tokens a forward pass
    decides."""
    own = {name: getattr(generation, name, None) for name in RULE}
    return f"`{_label({name: value for name, value in own.items() if value is not None})}`"


def _class_name(model: Any) -> str:
    return (model.config.architectures or [type(model).__name__])[0]


def _differences(spec: Spec, checkpoint: Checkpoint) -> list[str]:
    """What an adapter changed in the spec of its base, which only ar2diff reads."""
    base = checkpoint.base.spec.to_dict()
    return [f"{key} {base[key]} -> {value}" for key, value in spec.to_dict().items()
            if base[key] != value]  # fmt: skip
