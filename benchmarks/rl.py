"""What rewards teach: curves of `ar2diff rl`, and each against the same time spent otherwise.

    python benchmarks/rl.py runs/demo                    # every arm below, three seeds
    python benchmarks/rl.py runs/demo --arms trajectory ar --seeds 0

The embedded default, adapted (`make demo`), is tuned by recipe demo-easy on questions of one step
whose numbers are at most 10. It is then judged on questions of two steps whose largest number is 11
to 20 (held-out stories), and trained on others of the kind, of which it is told the answer alone:

* `one_step`, `coupled`, `elbo`, `spg`, `trajectory`: recipe demo-rl with that estimator;
* `ar`: the control. The AR base, tuned on the same easy questions at half the learning rate, which
  leaves it about as good (at the whole it answers 2 %, and rewards have nothing to begin with),
  then GRPO of it;
* `sft`: as before RL, for as long: the easy questions, at the learning rate of RL.

Each gets the same seconds of one core (time of the process, one thread; loading is not counted),
judged greedily and as it samples. distinct-2: different bigrams of words over all, of all answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sft import decoded, distinct_2, mean_and_error
from transformers import TrainerCallback

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import Recipe, load_recipe
from ar2diff.demo.__main__ import MODEL
from ar2diff.demo.answers import answers, examples
from ar2diff.demo.corpus import prompt, score
from ar2diff.training.rl import RL
from ar2diff.training.sft import SFT, sft

RESULTS = Path(__file__).parent / "results"
EASY = {"levels": (1,), "largest": (0, 10)}
HARD = {"levels": (2,), "largest": (11, 20)}
ESTIMATORS = ("one_step", "coupled", "elbo", "spg", "trajectory")
Row = dict[str, Any]


class Budget(TrainerCallback):
    """Ends a run when the process has worked for so many seconds; notes the curve by them."""

    def __init__(self, seconds: float):
        self.seconds, self.curve = seconds, []
        self.start = self.spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.spent = time.process_time() - self.start
        control.should_training_stop |= self.spent >= self.seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Row, **_: Any) -> None:
        if "reward" in logs:
            self.curve.append([state.global_step, round(self.spent, 1), round(logs["reward"], 4)])


def write_rows(path: Path, rows: Any) -> Path:
    """A JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def beginnings(model: str, work: Path) -> dict[str, str]:
    """Both models where RL begins, made if they are not there."""
    easy = write_rows(work / "easy.jsonl", answers(4000, 5, **EASY))
    write_rows(work / "hard.jsonl", answers(4000, 7, **HARD))
    folders = {}
    for kind, source in (("diffusion", model), ("ar", str(MODEL))):
        folder = work / f"demo-easy-{kind}"
        if not (folder / "config.json").exists():
            fields = [f"data.sources=[{easy}]", f"objective.kind={kind}"]
            fields += ["train.learning_rate=2.0e-4"] if kind == "ar" else []
            sft(source, load_recipe("demo-easy", fields), folder)
        folders[kind] = str(folder)
    return folders


def recipe_of(arm: str, seed: int, work: Path, given: Sequence[str]) -> Recipe:
    """What an arm trains by."""
    hard, rate = work / "hard.jsonl", load_recipe("demo-rl").train.learning_rate
    fields = [f"train.seed={seed}", "train.max_steps=100000", "train.schedule=constant"]
    if arm == "sft":
        easy = [f"data.sources=[{work / 'easy.jsonl'}]", f"train.learning_rate={rate}"]
        return load_recipe("demo-easy", [*fields, *easy, "train.warmup_steps=0"])
    fields += [f"data.sources=[{hard}]", f"rl.estimator={arm}", "rl.show_steps=0"]
    if arm == "ar":
        fields += ["objective.kind=ar", "rl.sampler={}"]
    return load_recipe("demo-rl", [*fields, *given])


def judged(checkpoint: Checkpoint, count: int, sampler: Row, show: int = 0) -> Row:
    """The share of right answers to held-out questions, greedily and as in the rollouts."""
    asked = list(examples(count, 2, split="valid", **HARD))
    ids = [checkpoint.tokenizer(prompt(e)).input_ids for e in asked]
    mode = "diffusion" if checkpoint.spec else "ar"
    found: Row = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        result = decoded(
            checkpoint, ids, 1, 50, max_new_tokens=40, temperature=temperature, seed=0,
            **{"mode": mode, **sampler},
        )  # fmt: skip
        texts = [text for (text,) in result["texts"]]
        right, error = mean_and_error([score(e, t) for e, t in zip(asked, texts, strict=True)])
        found[name] = {
            "exact": right, "error": error, "length": result["tokens"] / count,
            "stop": statistics.fmean(s[0] for s in result["stopped"]),
            "distinct_2": distinct_2(texts), "tokens_per_forward": result["tokens_per_forward"],
        }  # fmt: skip
        for e, text in list(zip(asked, texts, strict=True))[:show]:
            mark = "right" if score(e, text) else "wrong"
            print(f"   {name}, {mark}: {text.strip()!r} (as taught: {e['answer_work']!r})")
    return found


def run(arm: str, seed: int, folder: str, args: Any) -> Row:
    """Train an arm for its time, and judge it before and after."""
    recipe = recipe_of(arm, seed, args.work, args.overrides)
    plan = (SFT.prepare if arm == "sft" else RL.prepare)(Path(folder), recipe)
    sampler = {} if arm == "ar" else dict(load_recipe("demo-rl").rl.sampler)
    before = judged(plan.checkpoint, args.questions, sampler)
    budget = Budget(args.seconds)
    trainer = plan.make_trainer(plan, args.work / f"{arm}-{seed}", [budget])
    trainer.train()
    plan.checkpoint.model.eval()
    after = judged(plan.checkpoint, args.questions, sampler, args.show)
    logs = [log for log in trainer.state.log_history if "generation_share" in log]
    return {
        "arm": arm, "seed": seed, "seconds": round(budget.spent, 1),
        "steps": trainer.state.global_step, "before": before, "after": after,
        "generation_share": statistics.fmean(x["generation_share"] for x in logs) if logs else None,
        "learning_rate": recipe.train.learning_rate, "curve": budget.curve,
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown: an arm a line, means over seeds, the least and the most in brackets."""
    lines = [
        "| arm | seeds | steps | greedy before | greedy after | sampled before | sampled after | "
        "length | stops | distinct-2 | tokens/forward |",
        "|---" * 11 + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]

        def both(key: str, place: str = "greedy", digits: int = 3, own: Any = own) -> str:
            ends = (statistics.fmean(r[t][place][key] for r in own) for t in ("before", "after"))
            return " → ".join(f"{value:.{digits}f}" for value in ends)

        cells = [arm, str(len(own)), f"{statistics.fmean(r['steps'] for r in own):.0f}"]
        for place in ("greedy", "sampled"):
            for moment in ("before", "after"):
                values = [100 * row[moment][place]["exact"] for row in own]
                span = f" ({min(values):.1f}–{max(values):.1f})" if moment == "after" else ""
                cells.append(f"{statistics.fmean(values):.1f} %{span}")
        cells += [both("length", digits=1), both("stop"), both("distinct_2"),
                  both("tokens_per_forward", digits=2)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Every arm and seed that the output file does not hold yet; then the table of all it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the embedded default, converted")
    parser.add_argument("overrides", nargs="*", help="recipe fields, of RL")
    parser.add_argument("--arms", nargs="+", default=[*ESTIMATORS, "ar", "sft"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--show", type=int, default=0, help="print so many answers after")
    parser.add_argument("--work", type=Path, default=Path("runs/rl"))
    parser.add_argument("--output", type=Path, default=RESULTS / "rl.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = beginnings(args.model, args.work)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    rows = [json.loads(line) for line in lines]
    for seed in args.seeds:
        for arm in args.arms:
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            row = run(arm, seed, folders["ar" if arm == "ar" else "diffusion"], args)
            print(json.dumps(row), flush=True)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
