"""ar2diff converts autoregressive (AR) language models into diffusion language models, and
fine-tunes them.

    import ar2diff

    ar2diff.adapt("Qwen/Qwen3-0.6B", "qwen3-0.6b", "runs/qwen", data="stories.jsonl")
    model = ar2diff.load("runs/qwen")
    print(model.generate("The sea", max_new_tokens=64).text)

Training, with the same names as the commands:
    adapt               converts a checkpoint and trains it until it denoises
    sft                 tunes a converted model on conversations
    rl                  tunes a converted model by rewards
    draft               trains a draft adapter, with which a frozen model writes the same text in
                        fewer forwards

Using a model:
    load                loads a folder or Hub id as a `DiffusionModel`, which generates, streams,
                        fills gaps, chats and evaluates
    evaluate            likelihood on held-out text: the diffusion bound and the AR mode's NLL
    check               what a checkpoint is, and whether it does what its config says
    report              speed, quality, length and control beside the base, as a page
    compare             several reports as one page
    serve               answers clients of OpenAI's interface, and shows a page

Moving models:
    merge               merges an adapter into its base
    import_checkpoint   imports a diffusion checkpoint of another family
    export              writes a converted model in a layout that engines read
    push                publishes a model or an adapter on the Hugging Face Hub

Classes:
    AdaptTrainer, DiffusionSFTTrainer, DiffusionGRPOTrainer     for your own training loops
    Spec                what a logit of a converted model means: `diffusion` of its config.json
    Ar2DiffError        every error that a user can fix, with `what`, `fix` and `option`
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name is defined. They are imported when they are first asked for: torch and
# transformers take seconds, and `ar2diff --help` must not.
_HOMES = {
    "adapt": "training.adapt",
    "sft": "training.sft",
    "rl": "training.rl",
    "draft": "training.draft",
    "load": "api.model",
    "DiffusionModel": "api.model",
    "evaluate": "evaluation.evaluate",
    "check": "evaluation.check",
    "report": "reports.run",
    "compare": "reports.compare",
    "serve": "serving.server",
    "merge": "checkpoint.merge",
    "import_checkpoint": "conversion.imports",
    "export": "conversion.exports",
    "push": "hub.push",
    "AdaptTrainer": "training.adapt",
    "DiffusionSFTTrainer": "training.sft",
    "DiffusionGRPOTrainer": "training.grpo",
    "Spec": "core.spec",
    "Ar2DiffError": "core.errors",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
