"""Whether a run reads conversations where documents are usual."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.kinds import holds_vision_language
from ..config.recipe import Recipe
from ..data.columns import arranged
from ..data.shapes import conversation_of
from ..data.sources import read_source


def are_conversations(path: Path, recipe: Recipe) -> bool:
    """Whether the model in a folder sees images and the rows of a run are conversations, by the
    first of them.

    Raises:
        Ar2DiffError: the first row cannot be read.
    """
    if not recipe.data.sources or not holds_vision_language(path):
        return False
    where, row = next(iter(read_source(recipe.data.sources[0])))
    row = arranged(row, recipe.data.columns, where)
    return not conversation_of(row, where, recipe.data.text_field).keys() <= {
        recipe.data.text_field
    }
