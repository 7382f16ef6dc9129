"""What the package computes, to the bit: losses, likelihoods and tokens of fixed seeds.

    make golden                                        # writes runs/golden.json
    python benchmarks/golden.py before.json            # at one commit
    python benchmarks/golden.py after.json             # at another
    python benchmarks/golden.py --compare before.json after.json

A change that moves code and is not meant to change a number leaves the file as it is, byte for
byte. The numbers hold for one machine and one set of versions: floats depend on both, so compare
two commits on the same machine, not a machine with a committed file.

Everything goes through the command line, in this process, so the script does not depend on where
the package keeps its modules; `read` alone knows the names of what the command line writes. All
text is generated here. Recipes of adapt and sft run on stories260K-hf where AR2DIFF_DATA has it,
those named demo on the embedded model, and those of rl on what that was adapted to. Methods and
schedules are kept, sizes and numbers of steps are cut. An item that fails has its error as its
result, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from ar2diff.cli.main import main as command_line

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = next(ROOT.glob("ar2diff/**/model/config.json")).parent
STORIES = Path(os.environ.get("AR2DIFF_DATA", "")) / "stories260K-hf"

STEPS = 20
WINDOWS, PROMPTS = 16, 50
NEW_TOKENS = 12  # one block of the demo recipe, and half of another
LOGGED = (
    "loss", "grad_norm", "ar_loss", "masked_accuracy", "reward", "kl", "eval_bound", "eval_ar_nll",
)  # fmt: skip

SFT = (
    "demo-easy", "demo-sft", "fast-dllm-v2", "gsm8k-lora", "gsm8k-qlora", "llada-sft",
    "llama3.2-1b-zero2", "qwen2.5-7b-zero3", "stories-chat", "tiny-a2d",
)  # fmt: skip
LEFT_OUT = {
    "gsm8k-qlora": "run without its quantization: four bits are not float32",
    "gsm8k-rl-zero2, llama3.1-8b-zero3, llama3.2-1b-zero2, qwen2.5-7b-zero3": (
        "run in one process: ZeRO needs a launch of several"
    ),
}
# Methods of rl that no recipe names, in recipe arithmetic; and the attention of the model.
RL_METHODS = {
    "d1": ("full", ["rl.preset=d1"]),
    "coupled": ("causal_context", ["rl.preset=coupled"]),
    "spg": ("causal_context", ["rl.preset=spg"]),
    "ar": ("causal_context", ["rl.estimator=ar"]),
}

ATTENTIONS = {
    "causal_context": [],
    "block_causal": ["convert.attention=block_causal", "objective.ar_weight=0"],
    "full": [
        "convert.attention=full", "convert.block_length=null", "noise.time=sequence",
        "objective.ar_weight=0",
    ],
}  # fmt: skip
PACED = "--mode=speculative"
PER_BLOCK = "--steps-per-block"  # which was --steps up to commit 3553796
SAMPLINGS = {"greedy": ["--seed=7"], "sampled": ["--temperature=0.8", "--seed=7"]}
DECODINGS = {  # of mode diffusion
    "threshold 0.9": ["--threshold=0.9"],
    "threshold 0.5": ["--threshold=0.5"],
    "steps": [f"{PER_BLOCK}=4"],
    "steps, order margin": [f"{PER_BLOCK}=4", "--order=margin"],
    "steps, order entropy": [f"{PER_BLOCK}=4", "--order=entropy"],
    "steps, order random": [f"{PER_BLOCK}=4", "--order=random"],
    "steps, remask": [f"{PER_BLOCK}=6", "--remask=0.25"],
    "entropy bound": ["--entropy-bound=0.5"],
    "cfg": ["--cfg-scale=1"],
    "blocks of 4": ["--block-length=4"],
    "penalty": ["--mode=diffusion", "--repetition-penalty=1.3"],
    "filters": ["--mode=diffusion", "--top-k=20", "--top-p=0.9", "--min-p=0.02"],
    "stop": ["--mode=diffusion", "--stop=."],
}
LEFT_TO_RIGHT = {
    "ar": ["--mode=ar"],
    "ar, static cache": ["--mode=ar", "--cache=static"],
    "speculative": [PACED],
    "speculative, drafts of 2": [PACED, "--draft-length=2"],
    "speculative, static cache": [PACED, "--cache=static"],
}
BLOCK_CACHES = {
    "static cache": ["--mode=diffusion", "--cache=static"],
    "no cache": ["--mode=diffusion", "--cache=none"],
    "static cache, steps": ["--cache=static", f"{PER_BLOCK}=4"],
}
FULL_CACHES = {
    "prefix cache": ["--cache=prefix", "--block-length=8"],
    "dual cache": ["--cache=dual", "--block-length=8"],
}
CACHES = {"causal_context": BLOCK_CACHES, "block_causal": BLOCK_CACHES, "full": FULL_CACHES}
INFILLS = {
    "threshold 0.9": ["--threshold=0.9"],
    "steps": [f"{PER_BLOCK}=4"],
    "entropy bound": ["--entropy-bound=0.5"],
}

REWARD = '''"""A reward that differs among completions of any model."""


def variety(completions, **columns):
    return [len(set(str(text))) / 10 for text in completions]
'''


class Failed(Exception):
    """A command did not exit with 0; says what it wrote, without paths and figures of time."""


def command(*arguments: object) -> str:
    """Run the command line here and return its stdout."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    argv = ["ar2diff", *map(str, arguments)]
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.object(sys, "argv", argv), streams[0], streams[1]:
        try:
            command_line()
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, int) and code >= 128:  # interrupted or terminated: so is this script
        raise SystemExit(code)
    if code:
        lines = err.getvalue().strip().splitlines()
        # What and how to mend it; above them, of a bug, the exception.
        raise Failed(f"exit code {code}\n" + "\n".join(lines[-3 if code == 1 else -2 :]))
    return out.getvalue()


def read(verb: str, printed: str, folder: Path | None = None) -> Any:
    """The numbers of a run, from the JSON that a verb printed or the state that it left.

    The only place that knows the names of both.
    """
    if verb == "train":
        states = [json.loads(file.read_text()) for file in folder.rglob("trainer_state.json")]
        state = max(states, key=lambda state: state["global_step"])
        kept = [{k: row[k] for k in LOGGED if k in row} for row in state["log_history"]]
        return [row for row in kept if row]
    result = json.loads(printed)
    if verb == "eval":
        return {
            "tokens": result["tokens"],
            "bound": result.get("bound", {}).get("nats_per_token"),
            "standard_error": result.get("bound", {}).get("standard_error"),
            "ar_nll": result.get("ar_nll", {}).get("nats_per_token"),
        }
    rows = result.get("results", [result])
    return {
        "token_ids": [row["token_ids"] for row in rows],
        "forwards": [row["forwards"] for row in rows],
    }


def story(number: int) -> tuple[str, str]:
    """A question and its answer; no two of the first hundreds are alike."""
    names, friends = ("Tom", "Mia", "Ben", "Lucy", "Sam"), ("Dad", "Anna", "Max")
    things, places = ("apples", "sticks", "blocks", "shells"), ("park", "garden", "house", "wood")
    name, friend = names[number % 5], friends[number % 3]
    thing, place = things[number % 4], places[number // 2 % 4]
    had, more = 1 + number % 9, 1 + number % 7
    question = f"One day {name} was in the {place}. {name} had {had} {thing}. "
    if number % 2:
        question += "It was a warm day and all the birds sang. "
    question += f"{friend} gave {name} {more} more {thing}."
    return question, f" Now {name} has {had + more} {thing}. They went home and were happy."


def prompts() -> list[str]:
    """Prompts of 1 to 50 words."""
    words = " ".join("".join(story(number)) for number in range(PROMPTS)).split()
    return [" ".join(words[3 * n : 4 * n + 1]) for n in range(PROMPTS)]


def gaps() -> list[str]:
    """Stories with one gap of 1 to 5 tokens, or two; in the middle or at an end."""
    made = []
    for n in range(PROMPTS):
        words = "".join(story(n)).split()[: 10 + n % 20]
        words.insert(n % len(words), f"{{mask:{1 + n % 5}}}")
        if n % 3 == 0:
            words.append(f"{{mask:{2 + n % 4}}}.")
        made.append(" ".join(words))
    return made


def write_data(folder: Path) -> None:
    """Every file that a command reads."""
    stories = [story(number) for number in range(240)]
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a.strip()}]
        for q, a in stories
    ]
    three = ["".join(stories[n] + stories[n + 1] + stories[n + 2]) for n in range(120)]
    files = {
        "texts": [{"text": q + a} for q, a in stories],
        "valid": [{"text": text} for text in three[::2]],
        "pairs": [{"prompt": q, "completion": a, "question": q, "answer": a} for q, a in stories],
        "chats": [{"messages": turns} for turns in chats],
        "tasks": [
            {
                "prompt": q, "question": q, "answer": str(n), "numbers": [1, 2, n], "target": n + 3,
                "words": ["happy", "day"], "puzzle": "1034", "solution": "1234",
            }
            for n, (q, _) in enumerate(stories)
        ],
        "prompts": [{"prompt": text} for text in prompts()],
        "gaps": [{"prompt": text} for text in gaps()],
    }  # fmt: skip
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")


class Golden:
    """Items by name, as they are computed; `folder` is for data and models."""

    def __init__(self, folder: Path):
        self.folder, self.items = folder, dict[str, Any]()
        write_data(folder)

    def item(self, name: str, compute: Callable[[], Any]) -> None:
        """Compute an item. What fails is a result, too."""
        start = time.monotonic()
        try:
            self.items[name] = compute()
        except Failed as error:
            said = str(error).replace(str(self.folder), "FOLDER").replace(str(ROOT), "ROOT")
            self.items[name] = {"error": said}
            print(f"{name}: {said}", file=sys.stderr, flush=True)
        print(f"{time.monotonic() - start:6.1f} s  {name}", file=sys.stderr, flush=True)

    def data(self, name: str) -> Path:
        """One of the files of `write_data`."""
        return self.folder / f"{name}.jsonl"

    def train(self, verb: str, model: Path, data: str, out: Path, *arguments: object) -> Any:
        """Run a verb that trains, and return what was logged at each step."""
        files = ["--data", self.data(data), "--output-dir", out, "--json"]
        command(verb, model, *files, *arguments, "train.logging_steps=1", "train.precision=fp32")
        return read("train", "", out)

    def convert(self, base: Path, recipe: dict[str, Any]) -> Path:
        """The base converted as a recipe asks for, without training; made once."""
        chosen = [f"convert.{k}={json.dumps(v)}" for k, v in recipe.get("convert", {}).items()]
        if recipe.get("convert", {}).get("attention") == "full":
            chosen.append("data.cut_share=0")
        out = self.folder / "-".join(["converted", base.name, *chosen]).replace('"', "")
        if not out.exists():
            command("adapt", base, "--max-steps", 0, "--output-dir", out, "--json", *chosen)
        return out

    def recipes(self) -> None:
        """Twenty steps of each recipe."""
        names = json.loads(command("recipes", "ls", "--json"))
        for name in names:
            self.item(f"train: {name}", lambda n=name: self.recipe(n))
        for name, (attention, chosen) in RL_METHODS.items():
            self.item(
                f"train: rl by {name}",
                lambda a=attention, c=chosen: self.recipe("arithmetic", a, *c),
            )

    def recipe(self, name: str, attention: str = "causal_context", *chosen: str) -> Any:
        """Twenty steps of one recipe; of rl, on the model with an attention."""
        recipe = yaml.safe_load(command("recipes", "show", name))
        own = next((verb for verb in ("rl", "draft") if verb in recipe), "adapt")
        verb = "sft" if name in SFT else own
        model = EMBEDDED if name.startswith("demo") or not STORIES.is_dir() else STORIES
        if verb == "rl":
            model = self.folder / attention  # one that writes words, or no reward differs
        elif verb == "sft":
            model = self.convert(model, recipe)
        chats = "chat_template" in recipe.get("data", {})
        data = {"sft": "chats" if chats else "pairs", "rl": "tasks"}.get(verb, "texts")
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["--recipe", name, *self.sizes(recipe), *chosen]
        return self.train(verb, model, data, out, *arguments)

    def sizes(self, recipe: dict[str, Any]) -> list[str]:
        """Overrides that make a recipe small and leave its method as it is."""
        train, watch = recipe["train"], recipe.get("eval", {})
        values: dict[str, Any] = {
            "train.max_steps": STEPS,
            "train.per_device_train_batch_size": 4,
            "train.gradient_accumulation_steps": min(
                2, train.get("gradient_accumulation_steps", 1)
            ),
            "train.warmup_steps": min(4, train.get("warmup_steps", 0)),
            "train.decay_steps": min(8, train.get("decay_steps", 0)),
            "data.max_length": 128 if "columns" in recipe.get("data", {}) else 64,
            "anneal.steps": min(12, recipe.get("anneal", {}).get("steps", 0)),
            "eval.steps": min(10, watch.get("steps", 0)),
            "eval.panel_steps": min(10, watch.get("panel_steps", 0)),
            "eval.rows": 2,
            "eval.length": 32,
        }
        if "rl" in recipe:
            own = {"name": f"{self.folder / 'rewards.py'}:variety"}
            values |= {
                "rl.rewards": json.dumps([*recipe["rl"]["rewards"], own]),
                "rl.num_generations": 4,
                "rl.max_completion_length": 8,
                "rl.show_steps": 0,
            }
        if "quantization" in recipe:
            values["quantization"] = "null"
        if "draft" in recipe:  # which refuses a section that it does not use
            del values["anneal.steps"]
        return [f"{key}={value}" for key, value in values.items()]

    def attentions(self) -> None:
        """A model for each attention, its likelihood and what it writes in every way."""
        self.evaluate("the embedded model", EMBEDDED)
        self.decode("the embedded model", EMBEDDED, {"ar": ["--mode=ar"]})
        for name, chosen in ATTENTIONS.items():
            model = self.folder / name
            arguments = ["--recipe", "demo", *chosen, "train.max_steps=60", "data.max_length=64"]
            arguments += ["eval.steps=0", "eval.panel_steps=0"]
            self.item(
                f"train: {name}",
                lambda m=model, a=arguments: self.train("adapt", EMBEDDED, "texts", m, *a),
            )
            self.evaluate(name, model)
            own = LEFT_TO_RIGHT if name == "causal_context" else {}
            self.decode(name, model, {**DECODINGS, **CACHES[name], **own})
            self.infill(name, model)

    def evaluate(self, name: str, model: Path) -> None:
        """Bound and AR NLL of 16 windows."""
        arguments = ["--limit", WINDOWS, "--length", 48, "--samples", 4, "--json"]
        self.item(
            f"eval: {name}",
            lambda: read("eval", command("eval", model, "--data", self.data("valid"), *arguments)),
        )

    def generate(self, model: Path, *arguments: object) -> Any:
        numbers = read("generate", command("generate", model, *arguments, "--json"))
        if PACED in arguments and not any("--draft-length" in str(word) for word in arguments):
            del numbers["forwards"]  # as many tokens are drafted as pay on the machine just then
        return numbers

    def decode(self, name: str, model: Path, decodings: dict[str, list[str]]) -> None:
        """What 50 prompts are answered, in batches and one by one."""
        length = f"--max-new-tokens={NEW_TOKENS}"
        self.each(f"generate: {name}", model, "prompts", decodings, length)

    def infill(self, name: str, model: Path) -> None:
        """What 50 texts with gaps are filled with; and one gap of several lengths."""
        self.each(f"infill: {name}", model, "gaps", INFILLS)
        before, behind = story(3)
        gap = ["--prefix", before, "--suffix", behind[14:], "--length", "2,4,6"]
        self.item(f"infill: {name}: of several lengths", lambda: self.generate(model, *gap))

    def each(
        self, title: str, model: Path, data: str, decodings: dict[str, list[str]], *more: object
    ) -> None:
        """An item for each decoding, sampling and size of a batch."""
        for decoding, given in decodings.items():
            for sampling, drawn in SAMPLINGS.items():
                for size in (8, 1):
                    file = ["--prompts-file", self.data(data), "--batch-size", size]
                    self.item(
                        f"{title}: {decoding}: {sampling}: batch {size}",
                        lambda a=(*file, *more, *given, *drawn): self.generate(model, *a),
                    )


def write(path: Path, items: dict[str, Any]) -> None:
    """JSON with an item a line, in the order of their names."""
    lines = [f"{json.dumps(name)}: {json.dumps(items[name], sort_keys=True)}" for name in items]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n", encoding="utf-8")


def compare(before: Path, after: Path) -> list[str]:
    """The items that differ, or that one of the files lacks, each with which of these it is."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    found = []
    for name in sorted(one.keys() | other.keys()):
        if name not in other:
            found.append(f"only in {before}: {name}")
        elif name not in one:
            found.append(f"only in {after}: {name}")
        elif json.dumps(one[name], sort_keys=True) != json.dumps(other[name], sort_keys=True):
            found.append(f"differs: {name}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path("runs") / "golden.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args()
    if args.compare:
        found = compare(*args.compare)
        print("\n".join(found) or "no difference")
        return int(bool(found))
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        golden = Golden(Path(folder))
        golden.attentions()
        golden.recipes()
    base = STORIES.name if STORIES.is_dir() else "the embedded model"
    about = {"left out": LEFT_OUT, "recipes other than demo on": base}
    write(args.file, {**about, **golden.items})
    failed = [n for n, result in golden.items.items() if "error" in result]
    print(
        f"{args.file}: {len(golden.items)} items, {len(failed)} failed, "
        f"{time.monotonic() - start:.0f} s ({time.process_time():.0f} s of CPU)",
        file=sys.stderr,
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
