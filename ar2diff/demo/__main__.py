"""`python -m ar2diff.demo`: a whole conversion of the embedded checkpoint, in a few minutes.

Adapts the shipped AR checkpoint to diffusion on generated stories, then prints how its likelihood
has changed and what both modes write for the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..cli.main import boundary
from ..cli.output import quiet
from .corpus import PRETRAIN_LEVELS, corpus, prompt, score, text

MODEL = Path(__file__).parent / "model"
TRAIN_STORIES = 6000
JUDGED_STORIES = 64
QUESTIONS = 20
SHOWN = 3


def main(output_dir: Path, name: str = "demo", stories: int = TRAIN_STORIES) -> None:
    """Run the demo with a recipe and a number of stories; writes the model to `output_dir`."""
    quiet()
    from ..checkpoint.io import load_checkpoint
    from ..config.recipe import load_recipe, with_values
    from ..evaluation.score import score as likelihood
    from ..evaluation.score import windows
    from ..training.adapt import adapt

    start = time.monotonic()
    base = load_checkpoint(str(MODEL))
    held_out = [text(e) for e in corpus(JUDGED_STORIES * 4, 0, PRETRAIN_LEVELS, "valid")]
    rows = windows(held_out, base.tokenizer, 64, JUDGED_STORIES)
    before = likelihood(base, rows, samples=8)

    data = output_dir.with_name(f"{output_dir.name}-data") / "stories.jsonl"
    write_stories(data, stories)
    recipe = with_values(load_recipe(name), data={"sources": [{"path": str(data)}]})
    say(f"adapting {MODEL.name} ({sum(p.numel() for p in base.model.parameters()):,} parameters)")
    record = adapt(str(MODEL), recipe, output_dir, overwrite=output_dir.exists())
    trained = time.monotonic() - start
    converted = load_checkpoint(str(output_dir))
    after = likelihood(converted, rows, samples=8)
    plain = adapt_without_training(base, recipe)
    untrained = likelihood(plain, rows, samples=8)

    print_generations(load_checkpoint(str(MODEL)), converted)
    bound, in_all = after.bound, time.monotonic() - start
    print(f"""
Likelihood on {len(rows)} held-out stories, nats per token
  AR model before                  {before.ar_nll.nats_per_token:.3f}
  AR mode after                    {after.ar_nll.nats_per_token:.3f}
  diffusion bound, not trained     {untrained.bound.nats_per_token:.3f}
  diffusion bound after            {bound.nats_per_token:.3f} +- {bound.standard_error:.3f}
{record.tokens:,} training tokens; {trained:.0f} s until trained, {in_all:.0f} s in all
The converted model is in {output_dir}:
  ar2diff generate {output_dir} --prompt "One day Mia was in the garden."
Next, see what rewards can teach it in three minutes:
  make demo-rl      (without make: the commands that 'ar2diff recipes show demo-rl' begins with)
""")


def write_stories(path: Path, count: int = TRAIN_STORIES) -> None:
    """Write the training data of the demo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stories = (json.dumps({"text": text(e)}) for e in corpus(count, 1, PRETRAIN_LEVELS))
    path.write_text("".join(f"{line}\n" for line in stories))


def adapt_without_training(base: Any, recipe: Any) -> Any:
    """The base, converted in memory only, to show what training adds."""
    from ..conversion.convert import convert

    convert(base, recipe.convert, recipe.data.max_length, True, recipe.train.seed)
    return base


def print_generations(base: Any, converted: Any) -> None:
    """Ask both modes the same questions, and print how many each answers correctly."""
    from ..generation.complete import complete

    totals = {name: [0.0, 0, 0] for name in ("AR", "diffusion")}
    for number, example in enumerate(corpus(QUESTIONS, 2, (1, 2), "valid")):
        if number < SHOWN:
            print(f"\n{prompt(example)}")
        for name, model, mode in (("AR", base, "ar"), ("diffusion", converted, "diffusion")):
            result = complete(model, prompt(example), max_new_tokens=48, mode=mode)
            right = score(example, result.text)
            totals[name][0] += right
            totals[name][1] += result.new_tokens
            totals[name][2] += result.forwards
            if number < SHOWN:
                rate = f"{result.new_tokens} tokens in {result.forwards} forwards"
                print(f"  {name:9} |{result.text}   [{rate}, {'right' if right else 'wrong'}]")
    for name, (right, tokens, forwards) in totals.items():
        print(
            f"{name:9} {right:.0f} of {QUESTIONS} right, {tokens / forwards:.2f} tokens per forward"
        )


def say(line: str) -> None:
    """Print a line about progress on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ar2diff.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--stories", type=int, default=TRAIN_STORIES)
    arguments = parser.parse_args()
    with boundary():
        main(arguments.output_dir, arguments.recipe, arguments.stories)
