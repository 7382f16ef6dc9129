"""`python -m ar2diff.demo`: a lossless accelerator and a whole conversion, in a few minutes.

Adapts the shipped AR checkpoint to diffusion on generated stories. Then prints what the AR model
writes, the same text in fewer forwards with the shipped draft adapter, what the converted model
writes without loss and in its diffusion mode, a gap that it fills, and how the likelihood changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.main import boundary
from ..cli.output import quiet
from .corpus import PRETRAIN_LEVELS, corpus, prompt, score, text, write_stories

MODEL = Path(__file__).parent / "model"
DRAFT = Path(__file__).parent / "draft"  # a draft adapter for it
# A fixed number of drafts; without it, as many are drafted as pay off on the machine.
LOSSLESS = {"mode": "speculative", "draft_length": 7}
GAP = ("Jack had 2 stickers. He picked up 4 more", ". Jack was glad.")
GAP_LENGTHS = (1, 2, 3)  # in tokens; the likeliest text is chosen
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

    drafting = load_checkpoint(str(DRAFT))
    print_generations(load_checkpoint(str(MODEL)), drafting, converted)
    print_infill(converted)
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


def adapt_without_training(base: Any, recipe: Any) -> Any:
    """The base, converted in memory only, to show what training adds."""
    from ..conversion.convert import convert

    convert(base, recipe.convert, recipe.data.max_length, True, recipe.train.seed)
    return base


def print_generations(base: Any, drafting: Any, converted: Any) -> None:
    """Ask every way of decoding the same questions, and print how many it answers correctly, how
    many forwards that takes, and whether its text is that of the AR mode that it must keep."""
    from ..generation.complete import complete

    ways = [
        Way("AR model", base, {"mode": "ar"}),
        Way("with the draft adapter", drafting, LOSSLESS, "AR model"),
        Way("converted, AR mode", converted, {"mode": "ar"}),
        Way("converted, lossless", converted, LOSSLESS, "converted, AR mode"),
        Way("converted, diffusion", converted, {"mode": "diffusion"}),
    ]
    for number, example in enumerate(corpus(QUESTIONS, 2, (1, 2), "valid")):
        texts: dict[str, str] = {}
        if number < SHOWN:
            print(f"\n{prompt(example)}")
        for way in ways:
            result = complete(way.model, prompt(example), max_new_tokens=48, **way.settings)
            texts[way.name] = result.text
            same = way.kept is None or result.text == texts[way.kept]
            right = score(example, result.text)
            way.add(right, result.new_tokens, result.forwards, same)
            if number < SHOWN:
                rate = f"{result.new_tokens} tokens in {result.forwards} forwards"
                print(f"  {way.name:22} |{result.text}   [{rate}, {'right' if right else 'wrong'}]")
    heads = "right  tokens  forwards  tokens per forward  the same text"
    print(f"\n{f'{QUESTIONS} questions':23} {heads}")
    for way in ways:
        print(way.line())


def print_infill(converted: Any) -> None:
    """Fill a gap in a story; only a model that denoises reads what stands behind it."""
    from ..generation.complete import infill

    result = infill(converted, *GAP, lengths=GAP_LENGTHS)
    print(f"\nA gap in a story, filled: {GAP[0]}[{result.filled[0]}]{GAP[1]}")


@dataclass
class Way:
    """A way of decoding, and what it has done so far.

    Attributes:
        kept: the way whose text it must keep; None if it may write another.
    """

    name: str
    model: Any
    settings: dict[str, Any]
    kept: str | None = None
    right: float = 0.0
    tokens: int = 0
    forwards: int = 0
    same: bool = True

    def add(self, right: float, tokens: int, forwards: int, same: bool) -> None:
        """Count an answer."""
        self.right, self.same = self.right + right, self.same and same
        self.tokens, self.forwards = self.tokens + tokens, self.forwards + forwards

    def line(self) -> str:
        """A line of the table."""
        line = (
            f"{self.name:22} {self.right:6.0f} {self.tokens:7} {self.forwards:9} "
            f"{self.tokens / self.forwards:19.2f}"
        )
        return line if self.kept is None else f"{line}  {'yes' if self.same else 'no'}"


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
