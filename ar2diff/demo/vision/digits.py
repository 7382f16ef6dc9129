"""Handwritten digits: the 1,797 that scikit-learn ships, in their order, in one picture.

python -m ar2diff.demo.vision.digits

packs the picture `digits.png` again, which needs scikit-learn; its use needs Pillow alone. The last
300 are held out. They are harder than 300 drawn by chance would be: the nearest of the other digits
is wrong about them several times as often, as if other hands had written them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

SHEET = Path(__file__).parent / "digits.png"
CELL = 8  # pixels of a digit's side
ROWS, COLUMNS = 30, 60  # digits of the sheet, with room for three more
SPLITS = {"train": range(1497), "held_out": range(1497, 1797)}
SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine "
    "Learning Repository, https://archive.ics.uci.edu/dataset/80, CC BY 4.0; the part that "
    "scikit-learn ships as load_digits"
)


@functools.cache
def sheet() -> tuple[np.ndarray, np.ndarray]:
    """Brightness (1797, 8, 8), uint8, and value (1797,) of the digits."""
    from PIL import Image

    with Image.open(SHEET) as image:
        labels = np.array([int(label) for label in image.text["labels"]])
        tiles = np.asarray(image).reshape(ROWS, CELL, COLUMNS, CELL).swapaxes(1, 2)
    return tiles.reshape(-1, CELL, CELL)[: len(labels)], labels


def pack() -> None:
    """Write the picture; its text `labels` says what the digits are."""
    from PIL import Image, PngImagePlugin
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    tiles = np.zeros((ROWS * COLUMNS, CELL, CELL), np.uint8)
    tiles[: len(labels)] = np.minimum(images.reshape(-1, CELL, CELL) * 16, 255)  # from 0 to 16
    pixels = tiles.reshape(ROWS, COLUMNS, CELL, CELL).swapaxes(1, 2)
    text = PngImagePlugin.PngInfo()
    text.add_text("labels", "".join(map(str, labels)))
    text.add_text("Source", SOURCE)
    picture = Image.fromarray(pixels.reshape(ROWS * CELL, COLUMNS * CELL))
    picture.save(SHEET, optimize=True, pnginfo=text)


if __name__ == "__main__":
    pack()
