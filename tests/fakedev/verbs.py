"""Every verb on the pretended accelerator and on the CPU, in small: for test_fakedev.py.

    python -m fakedev.verbs BASE WORK    # in tests/; BASE is an AR checkpoint, WORK a new folder

One line of JSON for each verb: the largest difference between what the two devices wrote, and for
those that train a whole model, how far that is from where it started; and how many operations the
device ran.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.state
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from ar2diff.checkpoint import adapters, draft, io, model
from ar2diff.evaluation.evaluate import evaluate
from ar2diff.generation.complete import complete, load
from ar2diff.training.adapt import adapt
from ar2diff.training.draft import draft as train_draft
from ar2diff.training.rl import rl
from ar2diff.training.sft import sft

from .device import install

TEXTS = [{"text": f"the cat sat on mat {n} and {n} and {n}"} for n in range(8)]
CHATS = [{"prompt": f"what is {n}?", "completion": f" it is {n}."} for n in range(8)]
ASKED = [{"prompt": f"say {n}", "answer": str(n)} for n in range(8)]
SMALL = {
    "data.max_length": 32, "train.per_device_train_batch_size": 4, "train.logging_steps": 1,
    "train.precision": "fp32", "train.learning_rate": 1e-3,
}  # fmt: skip
RL = {
    "rl.rewards": [{"name": "regex", "args": {"pattern": "[a-z]"}}],
    "rl.num_generations": 4,
    "rl.max_completion_length": 8,
}


@contextmanager
def accelerated(device: torch.device) -> Iterator[None]:
    """What takes an accelerator if there is one takes `device`."""
    started, load_model = accelerate.state.PartialState.__init__, model.load_model

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        started(self, *args, **kwargs)
        self.device = device

    def loaded(path: Any, kind: str = "auto", asked: str | None = None, *args: Any, **kwargs: Any):
        found = load_model(path, kind, None, *args, **kwargs)
        if asked == "auto":
            found.model.to(device)
        return found

    place = property(lambda self: (self._setup_devices, device)[1])
    with (
        mock.patch.object(accelerate.state.PartialState, "__init__", start),
        mock.patch.object(TrainingArguments, "device", place),
        mock.patch.object(TrainingArguments, "n_gpu", 1),
        mock.patch.object(Trainer, "_save_optimizer_and_scheduler", lambda *_: None),
        mock.patch.object(model, "load_model", loaded),
        mock.patch.object(io, "load_model", loaded),
        mock.patch.object(adapters, "load_model", loaded),
        mock.patch.object(draft, "load_model", loaded),
    ):
        accelerate.state.AcceleratorState._reset_state(True)
        yield
    accelerate.state.AcceleratorState._reset_state(True)


def verbs(base: Path, converted: Path, work: Path) -> dict[str, Callable[[Path], Any]]:
    """Of each verb, what it does with a new folder: it writes weights there, or returns numbers
    or a text."""
    files = {}
    for name, rows in {"texts": TEXTS, "chats": CHATS, "asked": ASKED}.items():
        files[name] = work / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(verb: Any, model: Path, data: str, **more: Any) -> Callable[[Path], None]:
        return lambda out: verb(
            model, None, out, data=files[data], max_steps=2, overrides=SMALL | more
        )

    def said(_: Path) -> list[int]:
        return complete(load(str(converted)), "the cat", max_new_tokens=24).token_ids

    def scored(_: Path) -> list[float]:
        found = evaluate(converted, files["texts"], length=16, samples=2).to_dict()
        return numbers(found)

    return {
        "adapt": train(adapt, base, "texts"),
        "sft": train(sft, converted, "chats"),
        "rl": train(rl, converted, "asked", **RL),
        "draft": train(train_draft, converted, "texts", **{"eval.length": 16, "eval.rows": 2}),
        "eval": scored,
        "generate": said,
    }


def numbers(found: Any) -> list[float]:
    """All numbers in JSON values with fractions."""
    if isinstance(found, dict):
        return [x for value in found.values() for x in numbers(value)]
    return [found] if isinstance(found, float) else []


def weights(folder: Path) -> torch.Tensor:
    """All weights of a folder, one after the other."""
    files = sorted(folder.glob("*.safetensors"))
    return torch.cat([x.flatten() for file in files for x in load_file(file).values()])


def difference(
    verb: Callable[[Path], Any], work: Path, device: torch.device, start: torch.Tensor
) -> dict[str, float]:
    """The largest one between what a verb makes on the CPU and on the device, and between that and
    the weights at the start."""
    made = []
    for place in (torch.device("cpu"), device):
        out = work / place.type
        with accelerated(place):
            result = verb(out)
        result = result if isinstance(result, list) else weights(out)
        made.append(torch.as_tensor(result, dtype=torch.double))
    found = {"difference": float((made[0] - made[1]).abs().max())}
    if made[0].shape == start.shape:
        found["moved"] = float((made[0] - start).abs().max())
    return found


def main() -> None:
    base, work = map(Path, sys.argv[1:3])
    work.mkdir(parents=True, exist_ok=True)
    device, module = install()
    converted = work / "converted"
    adapt(base, None, converted, max_steps=0, overrides={"convert.block_length": 4})
    for name, verb in verbs(base, converted, work).items():
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        module.reset()
        found = difference(verb, work / name, device, weights(converted))
        found["operations"] = sum(module.counts().values())
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()
