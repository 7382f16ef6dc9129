"""An untrained draft adapter beside a frozen model, and the module that trains it."""

from __future__ import annotations

import torch

from ..checkpoint.draft import base_of
from ..checkpoint.layers import draft_layers
from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.draft import FORMAT, DraftSpec, new_draft
from ..diffusion.cross_entropy import has_plain_head
from ..diffusion.drafting import Drafting


def add_draft(checkpoint: Checkpoint, recipe: Recipe, known: bool = True) -> None:
    """Freeze the model, and put an untrained draft adapter beside it.

    Args:
        known: False leaves its base unnamed, for a model whose weights need not be there.
    """
    wanted, model = recipe.draft, checkpoint.model.eval().requires_grad_(False)
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    reference, revision, weights = base_of(checkpoint.path) if known else ("", None, "")
    spec = DraftSpec(
        format=FORMAT,
        base=reference,
        revision=revision,
        weights_sha256=weights,
        vocabulary=vocabulary,
        hidden_size=hidden,
        block_length=wanted.block_length,
        targets=tuple(draft_layers(model, wanted.targets, "draft.targets")),
        rank=wanted.rank,
        head_rank=wanted.head_rank,
    )
    generator = torch.Generator().manual_seed(recipe.train.seed) if known else None
    checkpoint.draft = new_draft(model, spec, generator)


def drafting_for(checkpoint: Checkpoint, recipe: Recipe, plain: bool | None = None) -> Drafting:
    """The module that a run trains.

    Args:
        plain: whether the output head is one linear layer; None finds out.
    """
    if plain is None:
        plain = has_plain_head(checkpoint.model)
    return Drafting(
        checkpoint.model,
        checkpoint.draft,
        checkpoint.read_as,
        checkpoint.suppressed,
        recipe.draft.loss,
        recipe.draft.decay == "dpace",
        plain,
    )
