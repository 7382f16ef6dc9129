"""The processor of a vision-language checkpoint: its chat template with images, and what it makes
of their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from ..core.errors import Ar2DiffError, first_line


def load_processor(path: Path, tokenizer: Any) -> Any:
    """The processor of a folder, as a stock class of transformers, around a tokenizer.

    Raises:
        Ar2DiffError: it needs a package that is not installed, or does not load.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise Ar2DiffError(
            f"model {path}: its processor cannot be loaded ({first_line(error)})",
            "add the files of its processor to the folder, or download them again",
        ) from error
    processor.tokenizer = tokenizer
    return processor
