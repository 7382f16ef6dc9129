"""What tuning on answers gives, beside the AR base tuned alike (`objective.kind: ar`: the same
rows, order, tokens, schedule and learning rate).

    python benchmarks/sft.py answers runs/demo                                  # demo-sft
    python benchmarks/sft.py words runs/stories3m --base path/to/stories3M-hf   # stories-chat

`answers`: the embedded default, converted by `make demo`; counting questions of levels 1 and 2.
Judged on held-out questions (their stories are in no training file), greedy: the share of exact
answers, the share that stop by themselves, tokens per forward (commits counted), at several
settings.

`words`: a converted stories3M and the files tinystories-chat/train and /valid of `AR2DIFF_DATA`.
Judged on the rows of kind `words` of the valid file, some samples of each, with a limit of tokens:
the share of the requested words that the story has (whole word, any case), the share that stop by
themselves, distinct-2 (different bigrams of words over all bigrams: mean over the stories, and of
all stories together). Standard errors are over prompts.

Models are kept in --work and used again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.config.sections import Source
from ar2diff.data.sources import read_source
from ar2diff.demo.__main__ import MODEL
from ar2diff.demo.answers import answers
from ar2diff.demo.corpus import corpus, prompt, score
from ar2diff.generation.complete import begin, settings_of
from ar2diff.generation.tokens import text_after
from ar2diff.training.sft import sft

RESULTS = Path(__file__).parent / "results"
LEVELS = (1, 2)
TRAINING_ROWS = 4000
# Rules of decoding, from careful to quick.
SETTINGS: dict[str, dict[str, Any]] = {
    "one token a step": {"steps_per_block": "block"},
    "threshold 0.98": {"threshold": 0.98},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.5": {"threshold": 0.5},
    "4 steps a block": {"steps_per_block": 4},
    "2 steps a block": {"steps_per_block": 2},
}
Row = dict[str, Any]
Judge = Callable[[list[list[str]], list[list[bool]]], Row]


def tuned(kind: str, model: str, recipe: str, data: str, work: Path, given: Sequence[str]) -> Path:
    """The folder of a tuned model; made if it is not there."""
    folder = work / f"{recipe}-{kind}"
    if not (folder / "config.json").exists():
        fields = [f"data.sources=[{data}]", f"objective.kind={kind}", *given]
        sft(model, load_recipe(recipe, fields), folder, resume=folder.exists())
    return folder


def decoded(
    checkpoint: Checkpoint, prompts: list[list[int]], samples: int, size: int, **settings: Any
) -> Row:
    """Texts and whether each stopped, `samples` of each prompt, with what they cost."""
    if settings.get("steps_per_block") == "block":
        settings["steps_per_block"] = checkpoint.spec.block_length
    spec, options = settings_of(checkpoint, settings)
    texts: list[list[str]] = [[] for _ in prompts]
    stopped: list[list[bool]] = [[] for _ in prompts]
    tokens = forwards = 0
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    start = time.monotonic()
    for first in range(0, len(order), max(1, size // samples)):
        numbers = order[first : first + max(1, size // samples)]
        rows = [prompts[n] for n in numbers for _ in range(samples)]
        canvas, states = begin(checkpoint, spec, options, rows)
        for _ in states:
            pass
        for place, number in enumerate(itertools.chain(*([n] * samples for n in numbers))):
            new = canvas.new_ids(place)
            texts[number].append(text_after(checkpoint.tokenizer, prompts[number], new))
            stopped[number].append(bool(new) and new[-1] in checkpoint.end_ids)
            tokens, forwards = tokens + len(new), forwards + int(canvas.forwards[place])
    seconds = time.monotonic() - start
    return {
        "texts": texts,
        "stopped": stopped,
        "tokens": tokens,
        "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def judge_answers(examples: list[Any]) -> Judge:
    def judge(texts: list[list[str]], _: list[list[bool]]) -> Row:
        right = [score(e, t) for e, (t,) in zip(examples, texts, strict=True)]
        share, error = mean_and_error(right)
        return {"exact": share, "exact_error": error}

    return judge


def words_of(request: str) -> list[str]:
    """The words that a request names: "... with the words a, b and c."."""
    return re.split(r", | and ", re.search(r"with the words (.*)\.$", request)[1])


def has_word(text: str, word: str) -> bool:
    """Whether a text has a whole word, in any case."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def distinct_2(texts: Sequence[str]) -> float:
    """Different bigrams of words over all."""
    pairs = [p for text in texts for p in itertools.pairwise(re.findall(r"\w+", text.lower()))]
    return len(set(pairs)) / max(1, len(pairs))


def judge_words(wanted: list[list[str]]) -> Judge:
    def judge(texts: list[list[str]], _: list[list[bool]]) -> Row:
        shares = [
            statistics.fmean(has_word(t, w) for t in stories for w in words)
            for words, stories in zip(wanted, texts, strict=True)
        ]
        share, error = mean_and_error(shares)
        stories = list(itertools.chain(*texts))
        return {
            "words": share,
            "words_error": error,
            "distinct_2": statistics.fmean(distinct_2([story]) for story in stories),
            "distinct_2_of_all": distinct_2(stories),
        }

    return judge


def measure(
    folders: dict[str, Path], ways: list[tuple[str, str, Row]], make: Callable, args: Any
) -> list[Row]:
    """A row for each way: (which model, its name, settings)."""
    rows = []
    loaded = {name: load_checkpoint(str(folder)) for name, folder in folders.items()}
    prompts, judge, samples = make(loaded["control"].tokenizer)
    for model, name, settings in ways:
        result = decoded(
            loaded[model], prompts, samples, args.batch_size,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
            **settings,
        )  # fmt: skip
        record = json.loads((folders[model] / "ar2diff.json").read_text())
        texts, stopped = result.pop("texts"), result.pop("stopped")
        rates = [statistics.fmean(s) for s in stopped]
        stops, error = mean_and_error(rates)
        rows.append({
            "model": model, "way": name, **settings, "prompts": len(prompts), "samples": samples,
            "temperature": args.temperature, "max_new_tokens": args.max_new_tokens,
            "trained_tokens": record["tokens"], "trained_steps": record["steps"],
            "stop": stops, "stop_error": error, **judge(texts, stopped), **result,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        for text in [t for each in texts[: args.show] for t in each[:1]]:
            print("   |", text.replace("\n", " / "), flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """A markdown table."""
    scores = ("exact",) if "exact" in rows[0] else ("words",)
    plain = [k for k in ("distinct_2", "distinct_2_of_all") if k in rows[0]]
    head = ["model", "decoding", *scores, "stops", *plain, "tokens/forward", "tokens/s", "length"]
    lines = ["| " + " | ".join(h.replace("_", " ") for h in head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        cells = [r["model"], r["way"]]
        cells += [f"{100 * r[s]:.1f} ± {100 * r[f'{s}_error']:.1f} %" for s in scores]
        cells += [f"{100 * r['stop']:.1f} ± {100 * r['stop_error']:.1f} %"]
        cells += [f"{r[k]:.3f}" for k in plain]
        cells += [f"{r['tokens_per_forward']:.2f}", f"{r['tokens_per_second']:.0f}"]
        cells += [f"{r['tokens'] / r['prompts'] / r['samples']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answers_setup(args: Any) -> tuple[str, Callable]:
    """The training file, and (prompts, judge, samples) of a tokenizer."""
    data = args.work / "answers.jsonl"
    rows = answers(TRAINING_ROWS, 5, LEVELS)
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    examples = list(corpus(args.prompts or 400, 2, LEVELS, "valid"))

    def make(tokenizer: Any) -> tuple[list[list[int]], Judge, int]:
        return [tokenizer(prompt(e)).input_ids for e in examples], judge_answers(examples), 1

    return str(data), make


def words_setup(args: Any) -> tuple[str, Callable]:
    """The same, of tinystories-chat."""
    rows = [row for _, row in read_source(Source(path="tinystories-chat/valid"))]
    asked = [r["messages"][0] for r in rows if r["kind"] == "words"][: args.prompts]

    def make(tokenizer: Any) -> tuple[list[list[int]], Judge, int]:
        prompts = [
            tokenizer.apply_chat_template([a], add_generation_prompt=True, return_dict=True)
            for a in asked
        ]
        judge = judge_words([words_of(a["content"]) for a in asked])
        return [list(p["input_ids"]) for p in prompts], judge, args.samples

    return "tinystories-chat/train", make


def main() -> None:
    """Tune both, decode, judge, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["answers", "words"])
    parser.add_argument("model", help="a converted folder")
    parser.add_argument("overrides", nargs="*", help="recipe fields, for both models")
    parser.add_argument("--base", default=str(MODEL), help="what the model was converted from")
    parser.add_argument("--work", type=Path, default=Path("runs/sft"))
    parser.add_argument("--prompts", type=int, help="at most so many")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print a text of so many prompts")
    parser.add_argument("--ways", nargs="+", help="names of decoding settings; none: all")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    counting = args.task == "answers"
    args.max_new_tokens = args.max_new_tokens or (48 if counting else 384)
    args.temperature = (
        args.temperature if args.temperature is not None else 0.0 if counting else 0.8
    )
    recipe = "demo-sft" if counting else "stories-chat"
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data, make = (answers_setup if counting else words_setup)(args)
    folders = {
        "control": tuned("ar", args.base, recipe, data, args.work, args.overrides),
        "diffusion": tuned("diffusion", args.model, recipe, data, args.work, args.overrides),
    }
    ways = [("control", "AR", {"mode": "ar"}), ("diffusion", "AR mode", {"mode": "ar"})]
    ways += [("diffusion", "lossless speculation", {"mode": "speculative"})]
    ways += [("diffusion", name, settings) for name, settings in SETTINGS.items()]
    rows = measure(folders, [w for w in ways if not args.ways or w[1] in args.ways], make, args)
    print(f"\n{table(rows)}\n\n{time.monotonic() - start:.0f} s; threads {torch.get_num_threads()}")
    if args.output:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
