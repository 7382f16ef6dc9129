"""Whether self-correction pays: models trained with masks, and with their own guesses in open slots
(`noise.kind: self`), decoded with and without edits; quality against tokens per forward.

    python benchmarks/self_correction.py --model demo --seeds 0 1 2
    AR2DIFF_DATA=path/to/data python benchmarks/self_correction.py --model stories3m
    python benchmarks/self_correction.py --table
    python benchmarks/self_correction.py --reports FOLDER ...

demo: the embedded model, adapted by recipes/demo.yaml on the demo's 6,000 stories; judged by the
share of right answers to counting questions. stories3m: stories3M, adapted for 500 steps (0.8M
tokens) of recipes/stories3m.yaml; judged by the base's NLL, in nats per token, of the 64 tokens
with which it continues the first 32 of a story, with the entropy of tokens within a text beside it.

Greedy, mode diffusion. Every forward counts, those of corrector steps too. Each threshold is
decoded without edits, and with the way of editing (`edit_threshold`, `corrector_steps`) that does
best on questions or stories which do not judge it. An edit is a decided token that was replaced.
Results are appended to benchmarks/results/self_correction.jsonl.

--reports takes reports of the models trained with `self`, against those trained with masks,

    ar2diff report demo-self-0 --base ar2diff/demo/model --against demo-mask-0 \\
      --only quality --quick

and adds what they measured to benchmarks/results/self_correction_reports.jsonl. A report edits with
one way (`EDITS` in ar2diff/reports/subjects.py) that was chosen on no question of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.data.sources import read_texts
from ar2diff.demo import __main__ as demo
from ar2diff.demo.corpus import corpus, prompt, score, write_stories
from ar2diff.diffusion.likelihood import ar_nll
from ar2diff.evaluation.score import windows
from ar2diff.generation.complete import begin, settings_of
from ar2diff.generation.tokens import prompt_ids
from ar2diff.reports.quality import shape_of

DATA = Path(os.environ.get("AR2DIFF_DATA", ""))
RESULTS = Path(__file__).parent / "results" / "self_correction.jsonl"
NOISES = {"mask": [], "self": ["noise.kind=self"]}
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.97)
EDITS: list[dict[str, Any]] = [
    {},
    *({"edit_threshold": edit, "corrector_steps": steps}
      for edit, steps in product((0.5, 0.8), (0, 1))),
]  # fmt: skip
CHOSEN_ON, JUDGED_ON = 200, 400  # questions; stories: a quarter
BATCH = 50


def trained(model: str, noise: str, seed: int, runs: Path) -> Path:
    """The folder of a model, trained if it is not there."""
    from ar2diff.training.adapt import adapt

    folder = runs / f"{model}-{noise}-{seed}"
    if (folder / "config.json").exists():
        return folder
    settings = [f"train.seed={seed}", *NOISES[noise]]
    if model == "demo":
        data = runs / "stories.jsonl"
        write_stories(data, demo.TRAIN_STORIES)
        base, settings = str(demo.MODEL), [f"data.sources=[{data}]", *settings]
    else:
        base = str(DATA / "stories3M-hf")
        settings += ["data.sources=[tinystories/train, stories3M-samples]", "train.max_steps=500"]
    adapt(base, load_recipe(model, [*settings, "eval.steps=0", "eval.panel_steps=0"]), folder,
          resume=folder.exists())  # fmt: skip
    return folder


def written(checkpoint: Any, prompts: list[list[int]], new: int, settings: dict) -> dict:
    """Answers to prompts, the forwards they took, and the tokens that were replaced."""
    answers, forwards, edits = [], 0, 0
    spec, options = settings_of(
        checkpoint, {"mode": "diffusion", "max_new_tokens": new, **settings}
    )
    for first in range(0, len(prompts), BATCH):
        canvas, states = begin(checkpoint, spec, options, prompts[first : first + BATCH])
        for _ in states:
            pass
        answers += [canvas.new_ids(row) for row in range(len(canvas.ids))]
        forwards += int(canvas.forwards.sum())
        edits += int(canvas.edits.sum())
    return {"answers": answers, "forwards": forwards, "edits": edits}


class Questions:
    """The demo's questions: quality is the share of right answers."""

    better = max

    def __init__(self, checkpoint: Any):
        self.checkpoint = checkpoint
        found = list(corpus(CHOSEN_ON + JUDGED_ON, 7, (1, 2), "valid"))
        self.examples = found
        self.prompts = [prompt_ids(checkpoint.tokenizer, prompt(e)) for e in found]

    def quality(self, part: slice, settings: dict) -> tuple[dict, list[float]]:
        made = written(self.checkpoint, self.prompts[part], 48, settings)
        decode = self.checkpoint.tokenizer.decode
        texts = [decode(ids, skip_special_tokens=True) for ids in made["answers"]]
        values = [score(e, t) for e, t in zip(self.examples[part], texts, strict=True)]
        return made | {"texts": texts}, values

    @property
    def parts(self) -> tuple[slice, slice]:
        return slice(CHOSEN_ON), slice(CHOSEN_ON, None)


class Stories:
    """Continuations of stories: quality is the base's NLL per token."""

    better = min

    def __init__(self, checkpoint: Any):
        self.checkpoint, self.base = checkpoint, load_checkpoint(str(DATA / "stories3M-hf"))
        texts = read_texts("tinystories/valid", "text")
        count = (CHOSEN_ON + JUDGED_ON) // 4
        self.prompts = [row[:32] for row in windows(texts, checkpoint.tokenizer, 96, count)]

    def quality(self, part: slice, settings: dict) -> tuple[dict, list[float]]:
        barred = [*self.checkpoint.end_ids, self.checkpoint.spec.mask_token_id]
        prompts = self.prompts[part]
        made = written(self.checkpoint, prompts, 64, {"suppress_tokens": barred, **settings})
        whole = [p + a for p, a in zip(prompts, made["answers"], strict=True)]
        nats = ar_nll(self.base.model, whole, self.base.suppressed, starts=[32] * len(whole)).nats
        made["entropy"] = statistics.mean(shape_of(a)["entropy"] for a in made["answers"])
        made["texts"] = [self.checkpoint.tokenizer.decode(row) for row in whole]
        return made, (nats / 64).tolist()

    @property
    def parts(self) -> tuple[slice, slice]:
        return slice(CHOSEN_ON // 4), slice(CHOSEN_ON // 4, None)


def run(model: str, noise: str, seed: int, runs: Path) -> list[dict[str, Any]]:
    checkpoint = load_checkpoint(str(trained(model, noise, seed, runs)))
    task = Questions(checkpoint) if model == "demo" else Stories(checkpoint)
    choosing, judging = task.parts
    rows = []
    for threshold in THRESHOLDS:
        tried = {}
        for number, edit in enumerate(EDITS):
            _, values = task.quality(choosing, {"threshold": threshold, **edit})
            tried[number] = statistics.mean(values)
        best = task.better(list(tried)[1:], key=lambda number: tried[number])
        for edit in (EDITS[0], EDITS[best]):
            made, values = task.quality(judging, {"threshold": threshold, **edit})
            tokens = sum(map(len, made["answers"]))
            rows.append(
                {
                    "model": model, "noise": noise, "seed": seed, "threshold": threshold, **edit,
                    "quality": statistics.mean(values),
                    "se": statistics.stdev(values) / len(values) ** 0.5,
                    "tokens_per_forward": tokens / made["forwards"], "edits": made["edits"],
                    "tokens": tokens, "entropy": made.get("entropy"), "texts": made["texts"][:5],
                }
            )  # fmt: skip
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "texts"}), flush=True)
    return rows


def table() -> str:
    lines = [
        "| model | noise | threshold | edits | quality | tokens per forward | tokens replaced |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple, list[dict]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        way = "none" if "edit_threshold" not in row else "chosen"
        cells.setdefault((row["model"], row["noise"], row["threshold"], way), []).append(row)
    for (model, noise, threshold, way), rows in sorted(cells.items()):
        qualities = [row["quality"] for row in rows]
        spread = f" ± {statistics.stdev(qualities):.3f}" if len(rows) > 1 else ""
        rate = statistics.mean(row["tokens_per_forward"] for row in rows)
        edits = sum(row["edits"] for row in rows) / sum(row["tokens"] for row in rows)
        lines.append(
            f"| {model} ({len(rows)} seeds) | {noise} | {threshold} | {way} | "
            f"{statistics.mean(qualities):.3f}{spread} | {rate:.2f} | {edits:.1%} |"
        )
    return "\n".join(lines)


def of_report(folder: Path) -> Iterator[dict[str, Any]]:
    """Each setting of the diffusion mode in a report: exact match, tokens per forward, NLL."""
    report = json.loads((folder / "report.json").read_text())
    lines = (folder / "rows/quality.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "diffusion" in row.get("setting", "")]
    of = {(row["subject"], row["setting"]): [] for row in rows}
    for row in rows:
        of[row["subject"], row["setting"]] += [row] * ("right" in row)
    for (subject, setting), answers in of.items():
        nll = [
            (figure["value"], figure["error"]) for figure in report["figures"]
            if (figure["subject"], figure["setting"]) == (subject, setting)
            and figure["metric"] == "base_nll" and figure["at"]["temperature"] == 0
        ]  # fmt: skip
        found = {"report": report["title"].split("/")[-1], "subject": subject, "setting": setting}
        if answers:
            forwards = sum(row["row_forwards"] for row in answers)
            found["exact_match"] = statistics.mean(row["right"] for row in answers)
            found["questions"] = len(answers)
            found["tokens_per_forward"] = sum(row["tokens"] for row in answers) / forwards
        yield found | ({"base_nll": nll[0][0], "error": nll[0][1]} if nll else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "stories3m"), default="demo")
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/self_correction"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--reports", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    for folder in args.reports:
        with RESULTS.with_name("self_correction_reports.jsonl").open("a") as file:
            for row in of_report(folder):
                print(row)
                file.write(json.dumps(row) + "\n")
    if args.reports:
        return
    for seed, noise in [] if args.table else product(args.seeds, args.noises):
        for row in run(args.model, noise, seed, args.runs):
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table())


if __name__ == "__main__":
    main()
