"""Pictures of handwritten digits with questions and exact answers, for tuning and for evaluation.

python -m ar2diff.demo.vision.scenes scenes.jsonl --count 4000

A picture has 4 x 4 cells of 8 x 8 pixels. A cell is empty or shows one digit, and it is named as in
a spreadsheet: `a1` is at the top left, `d1` at the top right, `a4` at the bottom left. What is
held out is handwriting: no digit of a held-out picture occurs in any picture of the split `train`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .digits import CELL, SPLITS, sheet

SIDE = 4  # cells of a picture's side
PLACES = [f"{column}{row}" for row in range(1, SIDE + 1) for column in "abcd"]  # as one reads
QUESTIONS = {
    "count": "How many digits are there?",
    "which": "Which digit is at {place}?",
    "sum": "What is the sum of the digits?",
    "caption": "Describe the picture.",
    "json": "Read the digits as JSON.",
    "grid": "Read the picture row by row.",
}
KINDS = tuple(QUESTIONS)
DIGITS = (2, 4)  # fewest and most digits of a picture that the embedded model was trained for


@dataclass(frozen=True)
class Scene:
    """Which digit of the sheet stands in which cell; a cell is a number from 0 to 15."""

    drawn: dict[int, int]

    @property
    def digits(self) -> dict[str, int]:
        """The value at each place that is not empty, in reading order."""
        return {PLACES[cell]: int(sheet()[1][i]) for cell, i in sorted(self.drawn.items())}

    def pixels(self) -> np.ndarray:
        """Brightness (32, 32), uint8."""
        pixels = np.zeros((SIDE, CELL, SIDE, CELL), np.uint8)
        for cell, i in self.drawn.items():
            pixels[cell // SIDE, :, cell % SIDE] = sheet()[0][i]
        return pixels.reshape(SIDE * CELL, SIDE * CELL)

    def image(self) -> Any:
        """The picture as a Pillow image of 32 x 32 pixels."""
        from PIL import Image

        return Image.fromarray(self.pixels()).convert("RGB")


def draw(rng: random.Random, split: str, digits: tuple[int, int] = DIGITS) -> Scene:
    """A random picture with a number of digits in a range, both ends included."""
    number = rng.randint(*digits)
    cells = rng.sample(range(len(PLACES)), number)
    return Scene({cell: rng.choice(SPLITS[split]) for cell in cells})


def ask(rng: random.Random, kind: str, scene: Scene) -> tuple[str, str]:
    """A question of a kind about a picture, and its answer."""
    digits = scene.digits
    place = rng.choice(list(digits))
    if rng.random() < 0.25:
        place = rng.choice([p for p in PLACES if p not in digits])
    return QUESTIONS[kind].format(place=place), answer(kind, digits, place)


def answer(kind: str, digits: dict[str, int], place: str) -> str:
    """The exact answer; `place` is what `which` asks for."""
    values = [str(value) for value in digits.values()]
    if kind == "count":
        return str(len(values))
    if kind == "which":
        return str(digits.get(place, "none"))
    if kind == "sum":
        return f"{' + '.join(values)} = {sum(digits.values())}"
    if kind == "caption":
        found = (f"{'an' if value == 8 else 'a'} {value} at {p}" for p, value in digits.items())
        return f"The picture shows {listed(list(found))}."
    if kind == "json":
        return json.dumps(digits)
    cells = [str(digits.get(p, "-")) for p in PLACES]
    return "\n".join(" ".join(cells[i : i + SIDE]) for i in range(0, len(cells), SIDE))


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def scenes(
    count: int,
    seed: int,
    split: str = "train",
    kinds: Sequence[str] = KINDS,
    digits: tuple[int, int] = DIGITS,
    turns: int = 1,
) -> Iterator[dict]:
    """Rows of `messages` whose first question holds the picture as a Pillow image, of `kinds`, the
    kind of each question, and of `digits`, the value at each place that is not empty.

    Args:
        turns: questions asked about one picture.
    """
    rng = random.Random(f"{split} {seed}")
    for _ in range(count):
        scene = draw(rng, split, digits)
        asked = [rng.choice(kinds) for _ in range(turns)]
        messages = conversation([ask(rng, kind, scene) for kind in asked], scene.image())
        yield {"messages": messages, "kinds": asked, "digits": scene.digits}


def right_answer(row: dict) -> str:
    """The answer to the first question of a row."""
    return row["messages"][1]["content"][0]["text"]


def conversation(turns: Sequence[tuple[str, str]], image: Any) -> list[dict]:
    """Messages with typed parts; the image is in front of the first question."""
    messages = []
    for question, reply in turns:
        for role, text in (("user", question), ("assistant", reply)):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return messages


def write_scenes(file: Path, *wanted: Any) -> None:
    """Write `scenes(*wanted)` to a file, and the pictures into a folder beside it: the parts of
    type image name them as `path`, relative to the file's folder."""
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as rows:
        for i, row in enumerate(scenes(*wanted)):
            part = row["messages"][0]["content"][0]
            path = folder / f"{i:05}.png"
            part.pop("image").save(path)
            part["path"] = f"{folder.name}/{path.name}"
            rows.write(f"{json.dumps(row)}\n")


def main() -> None:
    """Write a file and its pictures."""
    parser = argparse.ArgumentParser(description="Pictures of digits with questions and answers.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--split", default="train", choices=list(SPLITS))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument(
        "--digits", type=int, nargs=2, default=DIGITS, metavar=("FROM", "TO"),
        help="range of the number of digits in a picture",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=1, help="questions about one picture")
    args = parser.parse_args()
    write_scenes(
        args.file, args.count, args.seed, args.split, args.kinds, tuple(args.digits), args.turns
    )


if __name__ == "__main__":
    main()
