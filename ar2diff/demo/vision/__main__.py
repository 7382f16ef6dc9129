"""`python -m ar2diff.demo.vision`: a vision-language model, converted in minutes.

Adapts the shipped Llava, which answers about pictures of handwritten digits. Then prints the share
of answers that are right to the letter and the tokens per forward, by kind of question and way of
decoding, and some held-out pictures with a question and what each way says.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ...cli.main import boundary
from ...cli.output import quiet
from ..__main__ import say

PICTURES, TURNS, SEED = 4000, 3, 5
JUDGED, SHOWN = 50, 3
SHADES = " .:-=+*#%@"


def main(output_dir: Path, name: str = "demo-vision", pictures: int = PICTURES) -> None:
    """Run the demo with a recipe and a number of pictures; writes the model to `output_dir`."""
    quiet()
    from ...checkpoint.io import load_checkpoint
    from ...config.recipe import load_recipe
    from ...training.adapt import adapt
    from . import scenes
    from .build import MODEL_DIR
    from .judge import judge, ways_of

    start = time.monotonic()
    data = output_dir.with_name(f"{output_dir.name}-data") / "scenes.jsonl"
    scenes.write_scenes(data, pictures, SEED, "train", scenes.KINDS, scenes.DIGITS, TURNS)
    say(f"adapting {MODEL_DIR.parent.name}/{MODEL_DIR.name}, {pictures:,} pictures")
    recipe = load_recipe(name)
    adapt(str(MODEL_DIR), recipe, output_dir, data=str(data), overwrite=output_dir.exists())
    trained = time.monotonic() - start
    checkpoint = load_checkpoint(str(output_dir))
    print(f"{JUDGED} held-out pictures for each kind of question, answers right to the letter:")
    _, texts = judge(checkpoint, JUDGED, ways=ways_of(checkpoint))
    for place in range(SHOWN):  # another picture for each of the last kinds
        number = len(scenes.KINDS) - SHOWN + place
        *_, row = scenes.scenes(place + 1, 1, "held_out", [scenes.KINDS[number]])
        show(row, {way: said[number * JUDGED + place] for way, said in texts.items()})
    print(f"""
{trained:.0f} s until trained, {time.monotonic() - start:.0f} s in all
The converted model is in {output_dir}:
  ar2diff chat {output_dir}
and there, with a question after it: /image {data.with_suffix("")}/00000.png""")


def show(row: dict[str, Any], said: dict[str, str]) -> None:
    """A picture in characters, its question, and what each way says."""
    picture, question = row["messages"][0]["content"]
    pixels = picture["image"].convert("L")
    print(f"\n  +{'-' * pixels.width}+")
    for y in range(0, pixels.height, 2):  # characters are twice as high as wide
        line = (pixels.getpixel((x, y)) for x in range(pixels.width))
        print(f"  |{''.join(SHADES[value * len(SHADES) // 256] for value in line)}|")
    print(f"  +{'-' * pixels.width}+")
    print(f"  {question['text']}")
    for way in ("AR", "lossless", "threshold 0.9"):
        first, *rest = said[way].split("\n")
        print(f"    {way:14} {first}")
        for line in rest:
            print(" " * 19 + line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ar2diff.demo.vision", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo-vision"))
    parser.add_argument("--recipe", default="demo-vision")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    arguments = parser.parse_args()
    with boundary():
        main(arguments.output_dir, arguments.recipe, arguments.pictures)
