"""What a finished run has reached, in a few lines. Imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.output import LOG
from ..reports.svg import INSTALL
from .wording import amount, duration, gigabytes

FIGURES = {  # what was reached: its name, and how a value is shown
    "eval_bound": ("bound", "{:.3f}", "nats per token of held-out text"),
    "eval_ar_nll": ("AR NLL", "{:.3f}", "nats per token of held-out text"),
    "eval_tokens_per_forward": ("drafts", "{:.2f}", "tokens per forward on held-out text"),
    "eval_right_1": ("", "{:.1%}", "of the first drafts right"),
    "loss": ("loss", "{:.3f}", ""),
    "masked_accuracy": ("accuracy", "{:.1%}", "on masked tokens"),
    "ar_loss": ("AR loss", "{:.3f}", ""),
    "accepted_1": ("accepted", "{:.1%}", "of the first drafts"),
    "reward": ("reward", "{:.3f}", "on average"),
    "stop_rate": ("stopped", "{:.0%}", "of the completions end by themselves"),
    "kl": ("KL", "{:.4f}", "from the initial model"),
}
NEXT = {  # commands that are worth typing after a verb
    "adapt": (
        "generate {} --prompt 'Once upon a time'",
        "eval {} --data FILE",
        "sft {} --data FILE",
    ),
    "draft": ("generate {} --prompt 'Once upon a time'", "eval {} --data FILE"),
    "sft": ("chat {}", "eval {} --data FILE", "push {} NAME/REPOSITORY"),
    "rl": ("chat {}", "push {} NAME/REPOSITORY"),
}
SEEING = {"adapt": ("chat {}", "eval {} --answers FILE", "sft {} --data FILE")}  # of images


def closing(result: Mapping[str, Any], pictures: Sequence[str] | None = None) -> list[str]:
    """The lines that describe a finished run, by the fields of its `RunResult`.

    Args:
        pictures: names of what was drawn; None: matplotlib is not installed.
    """
    folder = result["output_dir"]
    if result["tokens"] is None:
        lines = [f"converted {result['base_model']} without training"]
    else:
        lines = [_spent(result)]
        lines += figures(result["before"] or {}, result["after"] or {})
        lines += [f"warning: {text}" for text in result["warnings"]]
    lines.append(f"  output   {folder}")
    if result["tokens"] is not None:
        drawn = f"no plots; {INSTALL} draws them" if pictures is None else ", ".join(pictures)
        lines.append(f"  log      {folder}/{LOG} (metrics.jsonl{', ' if drawn else ''}{drawn})")
    known = NEXT | SEEING if "images" in (result["diffusion"] or ()) else NEXT
    commands = known.get(result["verb"] or "", ())
    if result["diffusion"] is None and result["verb"] != "draft":
        commands = ("eval {} --data FILE",)  # an AR model, for which our decoding is not meant
    place = shlex.quote(folder)
    return [
        *lines,
        *(["next:"] if commands else []),
        *(f"  ar2diff {c.format(place)}" for c in commands),
    ]


def in_brief(after: Mapping[str, float]) -> str:
    """The most important figures that were reached, in a few words."""
    known = [(*FIGURES[name][:2], value) for name, value in after.items() if name in FIGURES]
    return ", ".join(f"{label} {form.format(value)}" for label, form, value in known if label)


def figures(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A line for each figure that was reached, with what it was before."""
    lines = []
    for name, (label, form, unit) in FIGURES.items():
        if name not in after:
            continue
        start = f"{form.format(before[name])} -> " if name in before else ""
        lines.append(f"  {label:9}{start}{form.format(after[name])} {unit}".rstrip())
    if "base_ar_nll" in before:
        lines.append(
            f"  {'base':9}{before['base_ar_nll']:.3f} AR NLL of the model before conversion"
        )
    return lines


def _spent(result: Mapping[str, Any]) -> str:
    said = (
        f"{result['verb'] or 'run'}: {amount(result['tokens'])} tokens in {result['steps']:,} steps"
    )
    if result["seconds"] is not None:
        said += f", {duration(result['seconds'])}"
    if result["peak_memory"] is not None:
        said += f", {gigabytes(result['peak_memory'])} of memory at the peak"
    return said
