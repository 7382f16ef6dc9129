"""The picture on the card of a vision-language model.

Pictures that a run has seen are never published: they may be of people, or belong to somebody. By
default the picture is drawn here, or of the embedded digits; the user may name another. What is
published is a small copy of its pixels, which is also what the model is asked about.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, option
from ..data.images import Shot, check_pillow
from ..demo.vision.digits import SOURCE
from ..demo.vision.scenes import scenes
from ..reports.material import EYES, knows

PROMPT = "Describe the picture."
SIDE = 512  # pixels of the longer side, at most
SHAPES = ((250, 250, 250), (200, 60, 60), (60, 80, 200))  # colours: paper, circle, square


@dataclass(frozen=True)
class Example:
    """A picture to show.

    Attributes:
        alt: what it shows. origin: a clause that says where it is from; empty for the user's own.
    """

    picture: Any
    alt: str = "The picture of the example"
    origin: str = ""


def example_of(checkpoint: Checkpoint, image: str | Path | None) -> Example | None:
    """The picture to show; None for a model of text.

    Args:
        image: a file; None: a scene with digits for models made from the embedded one, else a
            picture that is drawn here.

    Raises:
        Ar2DiffError: the file is no image, or the model reads text alone.
    """
    if not checkpoint.sees_images:
        if image is not None:
            raise Ar2DiffError(
                f"{option('image')} {image} cannot be shown: the model reads text alone",
                f"leave out {option('image')}",
            )
        return None
    check_pillow()
    if image is not None:
        return Example(_copied(Shot(Path(image)).pixels(option("image"))))
    if knows(checkpoint.tokenizer, EYES):
        (scene,) = scenes(1, 0, "held_out", ["caption"])
        picture = scene["messages"][0]["content"][0]["image"]
        return Example(picture, "Handwritten digits", f", of digits from {SOURCE}")
    drawn = ", which was drawn for this card"
    return Example(_drawn(), "A red circle beside a blue square", drawn)


def coded(picture: Any) -> bytes:
    """A picture as PNG: its pixels and nothing else."""
    out = io.BytesIO()
    _copied(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


def _copied(picture: Any) -> Any:
    """A copy of the pixels, without what else is known of them, made small."""
    from PIL import Image

    found = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
    found.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return found


def _drawn() -> Any:
    """A circle beside a square."""
    from PIL import Image, ImageDraw

    paper, circle, square = SHAPES
    picture = Image.new("RGB", (224, 224), paper)
    pen = ImageDraw.Draw(picture)
    pen.ellipse((28, 72, 108, 152), fill=circle)
    pen.rectangle((124, 72, 204, 152), fill=square)
    return picture
