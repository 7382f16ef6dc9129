"""How a resumed run recognises its inputs: by digests of the content of the model and of the data,
since a path says nothing of what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..data import sources

WHOLE = 1 << 26  # bytes of a file that are all read; of a larger one `SAMPLES` parts are
SAMPLES, SAMPLE = 1024, 1 << 14
MODEL_FILES = (  # of a checkpoint folder, what a run depends on
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "*.jinja",
)  # fmt: skip


def identity(model: Path, recipe: Recipe) -> dict[str, Any]:
    """Digests of what decides a run besides its settings.

    Args:
        model: folder of the model that is trained.

    Returns:
        `model`: of the folder's weights, configs and tokenizer. `data`: of each source, and of the
        other files that the recipe names; without their names, since a record is published.
    """
    return {"model": model_digest(model), "data": list(sources.identity(recipe).values())}


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of a checkpoint folder's weights, configs and
    tokenizer."""
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(f"{file.name}\0{_digest(file)}\n".encode())
    return hashed.hexdigest()


def _digest(file: Path) -> str:
    """SHA-256 of a file's size and content; of a large file's evenly spread parts."""
    size = file.stat().st_size
    hashed = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            while part := stream.read(1 << 20):
                hashed.update(part)
        else:
            for n in range(SAMPLES):
                stream.seek(n * (size - SAMPLE) // (SAMPLES - 1))
                hashed.update(stream.read(SAMPLE))
    return hashed.hexdigest()
