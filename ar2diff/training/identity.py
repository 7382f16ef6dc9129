"""How a resumed run recognizes its inputs: by the content of the model and the data, since a path
says nothing about what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..checkpoint.files import PROCESSOR, PROCESSOR_TEMPLATE
from ..checkpoint.stored import fingerprint
from ..config.recipe import Recipe
from ..data.sources import identity as data_identity

BESIDE_WEIGHTS = (  # other files in a checkpoint folder that a run depends on
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.jinja",
    *PROCESSOR, PROCESSOR_TEMPLATE,
)  # fmt: skip


def identity(model: Path, recipe: Recipe) -> dict[str, Any]:
    """Digests of the inputs that determine a run, besides its settings.

    Args:
        model: folder of the model to train.

    Returns:
        `model`: a digest of the folder's weights, configs and tokenizer. `data`: digests of each
        source and of the other files that the recipe names, but not their names, since the record
        is published.
    """
    return {"model": model_digest(model), "data": list(data_identity(recipe).values())}


def model_digest(folder: Path) -> str:
    """SHA-256 over the fingerprint of the weights in a checkpoint folder and the content of its
    configs and tokenizer."""
    hashed = hashlib.sha256(fingerprint(folder).encode())
    files = {file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        hashed.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return hashed.hexdigest()
