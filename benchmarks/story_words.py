"""Stories with requested words, by rewards: recipe story-words on a stories3M that chats.

    python benchmarks/story_words.py runs/stories-chat     # of recipe stories-chat; AR2DIFF_DATA

Trains for a while on the requests of rl-story-words/train, told only how many of the words
stand in each story. Before and after, on requests of rl-story-words/test, sampled as the rollouts:
the share of requested words, distinct-2 (of a story, and of all), stops, length; and the bound on
64 stories of tinystories/valid, which says what is lost besides. One seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rl import Budget
from sft import decoded, distinct_2, judge_words

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.evaluation.evaluate import evaluate
from ar2diff.generation.tokens import prompt_ids
from ar2diff.training.rl import RL, read_prompts

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def judged(checkpoint: Checkpoint, recipe: Any, count: int, show: int) -> Row:
    """Of requests that were not trained on."""
    test = with_values(recipe, data={"sources": [{"path": "rl-story-words/test"}]})
    asked = read_prompts(test)[:count]
    ids = [prompt_ids(checkpoint.tokenizer, row["prompt"]) for row in asked]
    result = decoded(
        checkpoint, ids, 1, 50, max_new_tokens=recipe.rl.max_completion_length, seed=0,
        **{"temperature": 1.0, **recipe.rl.sampler},
    )  # fmt: skip
    for row, (text,) in list(zip(asked, result["texts"], strict=True))[:show]:
        print(f"   {', '.join(row['words'])} | {' '.join(text.split())}", flush=True)
    texts = [text for (text,) in result["texts"]]
    found = judge_words([row["words"] for row in asked])(result["texts"], result["stopped"])
    data = evaluate(checkpoint, "tinystories/valid", limit=64, samples=4)
    return {
        **found, "distinct_2_of_all": distinct_2(texts),
        "stop": statistics.fmean(s[0] for s in result["stopped"]),
        "length": result["tokens"] / count, "tokens_per_forward": result["tokens_per_forward"],
        "bound": data.bound.nats_per_token, "bound_error": data.bound.standard_error,
    }  # fmt: skip


def main() -> None:
    """Judge, train, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a stories3M that chats")
    parser.add_argument("overrides", nargs="*", help="recipe fields")
    parser.add_argument("--seconds", type=float, default=240.0, help="of one core")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("runs/story-words"))
    parser.add_argument("--output", type=Path, default=RESULTS / "story_words.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fields = ["data.sources=[rl-story-words/train]", "train.max_steps=100000"]
    recipe = load_recipe("story-words", [*fields, *args.overrides])
    plan = RL.prepare(Path(args.model), recipe)
    result: Row = {"before": judged(plan.checkpoint, recipe, args.requests, args.show)}
    print(json.dumps(result), flush=True)
    budget = Budget(args.seconds)
    trainer = plan.make_trainer(plan, args.work, [budget])
    trainer.train()
    plan.checkpoint.model.eval()
    result |= {"seconds": round(budget.spent), "steps": trainer.state.global_step}
    result["after"] = judged(plan.checkpoint, recipe, args.requests, args.show)
    result["curve"] = budget.curve
    print(json.dumps(result), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
