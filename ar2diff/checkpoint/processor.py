"""The processor of a vision-language checkpoint: its chat template with images, and what it makes
of their pixels."""

from __future__ import annotations

import copy
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from ..core.errors import Ar2DiffError, first_line
from .files import PROCESSOR, PROCESSOR_TEMPLATE, inside

NEEDED = re.compile(r"(\w+) library|No module named '(\w+)'|(num2words|torchvision)", re.IGNORECASE)
COPIED = "_ar2diff_tokenizer"  # attribute of a processor: of which tokenizer its own is a copy
PILLOW = "pip install 'ar2diff[vision]'"
MISMATCH = "torchvision::nms"  # in the error of a torchvision that was built for another torch
SAME_BUILD = "install the torchvision that belongs to the installed torch, from the same index"


def load_processor(path: Path) -> Any:
    """The processor of a folder, as a stock class of transformers. No code in the folder is run.

    Raises:
        Ar2DiffError: it needs a package that is not installed or does not fit, or does not load.
    """
    for name in (*PROCESSOR, PROCESSOR_TEMPLATE):
        inside(path, name)
    try:
        found = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each class raises what it likes
        raise _no_processor(path, error) from error
    if not hasattr(found, "image_processor"):  # a tokenizer, where the class is not known
        raise _no_processor(path, ValueError(f"it is a {type(found).__name__}"))
    return found


def take_tokenizer(processor: Any, tokenizer: Any) -> None:
    """Put the tokenizer of a checkpoint into its processor. A processor that writes the first token
    of a text itself (PaliGemma, behind the images) gets a copy that does not write it again."""
    own = processor.tokenizer
    if own("").input_ids == tokenizer("").input_ids or not hasattr(own, "backend_tokenizer"):
        processor.tokenizer = tokenizer
        return
    source = id(tokenizer), len(tokenizer)
    if getattr(processor, COPIED, None) != source:
        processor.tokenizer = copy.deepcopy(tokenizer)
        processor.tokenizer.backend_tokenizer.post_processor = own.backend_tokenizer.post_processor
        setattr(processor, COPIED, source)


def _no_processor(path: Path, error: Exception) -> Ar2DiffError:
    what = f"model {path}: its processor"
    if MISMATCH in str(error):
        return Ar2DiffError(
            f"{what} cannot be loaded: torchvision does not match torch", SAME_BUILD
        )
    named = NEEDED.search(str(error))
    package = next((name.lower() for name in named.groups() if name), "") if named else ""
    package = {"pil": "pillow"}.get(package, package)
    module = {"pillow": "PIL"}.get(package, package)
    if isinstance(error, ImportError) and package and importlib.util.find_spec(module) is None:
        return Ar2DiffError(
            f"{what} needs the package {package}, which is not installed",
            PILLOW if package == "pillow" else f"pip install {package}",
        )
    if importlib.util.find_spec("PIL") is None:
        return Ar2DiffError(f"{what} needs the package pillow, which is not installed", PILLOW)
    return Ar2DiffError(
        f"{what} cannot be loaded ({first_line(error)})",
        "add the files of its processor to the folder, or download them again",
    )


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the files of a processor as they are; its chat template only where the tokenizer wrote
    none."""
    own = (folder / "chat_template.jinja").is_file()
    for name in (*PROCESSOR, *([] if own else [PROCESSOR_TEMPLATE])):
        file = inside(source, name)
        if file.is_file():
            shutil.copyfile(file, folder / name)
