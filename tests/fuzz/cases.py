"""A case: a sound command line over sound files, and then one to three things wrong with it."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import commandlines
import datafiles
import mutations
from sandbox import SECONDS
from stock import ADAPT, LORA, clear, rows

CONVERTED = ("causal", "causal", "full", "block")
FOREIGN = ("dream", "llada", "sdar", "a2d_llama")
ASKING = b"y\n" * 200  # whoever asks is answered yes
SAYINGS = [
    b"Tom had\n", b"y\n", b"/help\n", b"/reset\n", b"{mask:2}\n", b"/system be kind\n", b"   \n",
]  # fmt: skip


@dataclass
class Case:
    """A command line and its files.

    Attributes:
        files: what can be mutated, by its role: model, base, adapter, rows, recipe.
        output: the folder or file that it was told to write; None: it writes nothing.
        old: whether `output` holds the model of an earlier run and a file of the user's.
        patient: it may take as long as it likes, for its user asked for much work.
        refusal: why it must not succeed, if so.
        refused: whether it is refused even where nothing is wrong.
    """

    verb: str
    work: Path
    words: list[str]
    stdin: bytes = ASKING
    files: dict[str, Path] = field(default_factory=dict)
    output: Path | None = None
    old: bool = False
    patient: bool = False
    refusal: str = ""
    refused: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until it is killed."""
        return SECONDS / 4 if self.patient else SECONDS


def make(root: Path, seed: int, number: int, sound: bool = False) -> Case:
    """Case `number` of a seed: its folder is written, its command line is not run.

    Args:
        sound: leave it as it is before anything is wrong.
    """
    draw = random.Random(f"{seed}:{number}")
    work = clear(root)
    secret = root / "case" / "secret"
    secret.mkdir()
    (secret / "diary.txt").write_text(checkpoints.CANARY)
    verb, start = draw.choice(SCENARIOS)
    case = Case(verb, work, [verb])
    start(case, root / "stock", draw)
    if sound:
        return case
    wanted, done = draw.choice((1, 1, 1, 2, 2, 3)), 0
    for _ in range(50):
        note = mutations.mutate(case, draw)
        done += bool(note)
        case.notes += [note] if note else []
        if done == wanted:
            break
    case.patient |= _trains_on(case)
    return case


def _trains_on(case: Case) -> bool:
    """Whether nothing says any more after how many steps a training ends: by default it is long."""
    recipe = case.files.get("recipe")
    told = recipe.read_bytes() if recipe and recipe.is_file() else b""
    return case.verb in ("adapt", "sft", "rl") and b"max_steps" not in told + repr(
        case.words
    ).replace("-", "_").encode("utf-8", "replace")


def _bring(case: Case, stock: Path, role: str, name: str) -> str:
    """Copy a folder of the stock; its name in the command line."""
    case.files[role] = case.work / role
    shutil.copytree(stock / name, case.work / role)
    return role


def _rows(case: Case, draw: random.Random, *kinds: str) -> str:
    kind = draw.choice(kinds)
    case.files["rows"] = datafiles.write_rows(case.work, rows()[kind], draw, flat=kind == "texts")
    return case.files["rows"].name


def _outputs(case: Case, stock: Path, draw: random.Random) -> list[str]:
    """Options of verbs that write a folder."""
    case.output = case.work / "out"
    words = ["--dry-run"] if draw.random() < 0.15 else []
    if draw.random() < 0.1:
        shutil.copytree(stock / "causal", case.output)
        (case.output / "diary.txt").write_text("mine")
        (case.output / "my.safetensors").write_text("mine")
        case.old = True
        words.append("--overwrite")
    return words


def _model(case: Case, stock: Path, draw: random.Random) -> str:
    """A converted model, or an adapter of one."""
    if draw.random() < 0.25:
        return _bring(case, stock, "adapter", "adapter")
    return _bring(case, stock, "model", draw.choice(CONVERTED))


def _recipe(case: Case, draw: random.Random, tree: dict[str, Any]) -> list[str]:
    """Its settings as a file, or as overrides."""
    if draw.random() < 0.5:
        case.files["recipe"] = commandlines.write_recipe(case.work, tree)
        return ["--recipe", "recipe.yaml"]
    return [f"{s}.{k}={commandlines.flow(v)}" for s, part in tree.items() for k, v in part.items()]


def _settings(draw: random.Random, least: int = 1, **more: Any) -> dict[str, Any]:
    """Sections of a recipe; only adapt has a use for no steps, where `least` is 0."""
    steps = max(draw.choice((0, 1, 1)), least)
    train = {"max_steps": steps, "per_device_train_batch_size": 2, "logging_steps": 1}
    return {"data": {"max_length": 32}, "train": train, **more}


def check(case: Case, stock: Path, draw: random.Random) -> None:
    if draw.random() < 0.3:
        case.words.append(_bring(case, stock, "model", draw.choice(("base", "qwen"))))
    else:
        case.words.append(_model(case, stock, draw))
    case.words += draw.choice(([], ["--json"]))


def generate(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_model(case, stock, draw), "--max-new-tokens", "4"]
    case.words += draw.choice(
        (
            ["--prompt", "Tom had"],
            ["--prompt", "Tom had", "--stream"],
            ["--prompt", "Tom{mask:3} had", "--json"],
            ["--prefix", "Tom", "--suffix", "cat", "--length", "2,3"],
            ["--prompts-file", "", "--batch-size", "2"],
        )
    )
    if "--prompts-file" in case.words:
        place = case.words.index("--prompts-file") + 1
        case.words[place] = _rows(case, draw, "prompts", "asked")
    filling = "--prefix" in case.words or "Tom{mask:3} had" in case.words
    ar = [["--mode", "speculative"], ["--mode", "ar", "--stop", "cat"]]
    case.words += draw.choice(
        (
            [],
            *([] if filling or not _reads_ar(case) else ar),
            ["--steps-per-block", "2", "--order", "entropy"],
            ["--temperature", "0.7", "--top-k", "5", "--seed", "1"],
            ["--cache", "prefix" if _is_full(case) else "dynamic"],
        )
    )
    if draw.random() < 0.3 and "--stream" not in case.words:
        case.output = case.work / "out.jsonl"
        case.words += ["--output", "out.jsonl"]


def _reads_ar(case: Case) -> bool:
    """Whether its model has kept the AR mode."""
    return (
        "adapter" in case.files
        or '"causal_context"' in (case.files["model"] / "config.json").read_text()
    )


def _is_full(case: Case) -> bool:
    """Whether its model sees both sides of every token."""
    return "model" in case.files and '"full"' in (case.files["model"] / "config.json").read_text()


def chat(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_model(case, stock, draw), "--max-new-tokens", "4"]
    case.words += draw.choice(([], [], ["--system", "Be kind."]))
    case.stdin = b"y\n" + b"".join(draw.choice(SAYINGS) for _ in range(4)) + b"y\n"


def evaluate(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_model(case, stock, draw), "--data", _rows(case, draw, "texts")]
    case.words += ["--length", "8", "--limit", "2", "--samples", "1"]


def adapt(case: Case, stock: Path, draw: random.Random) -> None:
    more = {"convert": {"attention": draw.choice(("causal_context", "block_causal"))}}
    if draw.random() < 0.2:
        base, more = _bring(case, stock, "model", "causal"), {"peft": commandlines.PEFT}
    else:
        base = _bring(case, stock, "base", draw.choice(("base", "qwen")))
        if more["convert"]["attention"] == "block_causal":
            more["objective"] = {"ar_weight": 0.0}
    case.words += [base, *_outputs(case, stock, draw)]
    case.words += ["--data", _rows(case, draw, "texts"), "--output-dir", "out"]
    case.words += _recipe(case, draw, _settings(draw, 0, **more))


def sft(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_bring(case, stock, "model", draw.choice(CONVERTED))]
    case.words += _outputs(case, stock, draw)
    case.words += ["--data", _rows(case, draw, "chats", "chats", "asked"), "--output-dir", "out"]
    more = {"data": {"max_length": 64, "overlong": "truncate"}}
    more |= {"peft": commandlines.PEFT} if draw.random() < 0.2 else {}
    case.words += _recipe(case, draw, _settings(draw) | more)


def rl(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_bring(case, stock, "model", "causal"), *_outputs(case, stock, draw)]
    case.words += ["--data", _rows(case, draw, "asked"), "--output-dir", "out"]
    reward = draw.choice(({"name": "exact"}, {"name": "regex", "args": {"pattern": "a+"}}))
    section = {"rewards": [reward], "num_generations": 2, "max_completion_length": 4}
    case.words += _recipe(case, draw, _settings(draw, rl=section))


def merge(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_bring(case, stock, "adapter", "adapter"), *_outputs(case, stock, draw), "out"]
    if draw.random() < 0.5:
        case.words += ["--base", _bring(case, stock, "model", "causal")]


def export(case: Case, stock: Path, draw: random.Random) -> None:
    name, to = draw.choice((*[("causal", "ar")] * 8, ("block", "sdar")))
    case.refused = to == "sdar"  # the engines' mask token has an id above this vocabulary
    case.words += [_bring(case, stock, "model", name), "--to", to]
    case.words += [*_outputs(case, stock, draw), "--output-dir", "out"]


def bring_in(case: Case, stock: Path, draw: random.Random) -> None:
    name = draw.choice(FOREIGN)
    case.words += [_bring(case, stock, "model", name), *_outputs(case, stock, draw)]
    case.words += ["--output-dir", "out", *(["--block-length", "4"] if name == "sdar" else [])]


def push(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [
        _bring(case, stock, "model", draw.choice(CONVERTED)),
        "a/b",
        "--dry-run",
        "--license",
        "mit",
    ]


def card(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_bring(case, stock, "model", draw.choice(CONVERTED)), "--license", "mit"]


def memory(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += [_bring(case, stock, "model", draw.choice(("causal", "base")))]
    case.words += _recipe(case, draw, _settings(draw))


def recipes(case: Case, stock: Path, draw: random.Random) -> None:
    case.words += draw.choice(
        (["ls"], ["ls", "--run"], ["show", "demo"], ["cp", "demo", "out.yaml"])
    )
    case.output = case.work / "out.yaml" if "cp" in case.words else None


def config(case: Case, stock: Path, draw: random.Random) -> None:
    tree = _settings(draw, rl={"rewards": [{"name": "exact"}], "preset": "d1"})
    tree |= draw.choice(({}, {"peft": commandlines.PEFT}))
    case.files["recipe"] = commandlines.write_recipe(case.work, tree)
    overrides = [] if draw.random() < 0.5 else list(ADAPT + LORA)
    case.words += draw.choice(
        (
            ["validate", "recipe.yaml", *overrides],
            ["validate", "recipe.yaml", *overrides],
            ["show", "recipe.yaml", *overrides],
            ["schema"],
        )
    )


# As often as there is something to break.
SCENARIOS = [
    *[("check", check)] * 4, *[("generate", generate)] * 5, *[("chat", chat)] * 2,
    *[("eval", evaluate)] * 4, *[("adapt", adapt)] * 5, *[("sft", sft)] * 5, *[("rl", rl)] * 4,
    *[("merge", merge)] * 2, *[("export", export)] * 3, *[("import", bring_in)] * 3,
    *[("push", push)] * 2, *[("card", card)] * 2, *[("memory", memory)] * 2,
    ("recipes", recipes), *[("config", config)] * 4,
]  # fmt: skip
