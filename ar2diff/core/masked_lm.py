"""Masked language models as bases (BERT, RoBERTa, ModernBERT ...): what tells them from AR models,
and at which number their positions begin.

This file is copied into converted folders: it imports torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

_FIRST: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def names_of(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    """The class names of an entry in one of transformers' mappings."""
    return (entry,) if isinstance(entry, str) else tuple(entry)


def is_masked_lm(architectures: Sequence[str] | None) -> bool:
    """Whether a config's `architectures` name a class that transformers lists for masked language
    modelling, and not for causal language modelling. Such a class reads in both directions, has no
    AR mode, and keeps no keys and values.

    Models that are converted keep the name of their class, so the answer holds for them too.
    """
    masked, causal = (
        {name for entry in mapping.values() for name in names_of(entry)}
        for mapping in (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    names = architectures if isinstance(architectures, list) else ()
    return any(isinstance(name, str) and name in masked - causal for name in names)


def first_position(model: Any) -> int:
    """The number of a text's first position, in `position_ids`: 0, but for classes whose table of
    positions has a row for padding, the number after that one (RoBERTa, from fairseq). The probe
    compares it with a forward in which the class numbers the positions itself."""
    if model not in _FIRST:
        rows = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        words = {*model.get_input_embeddings().modules()}  # of which adapters make several
        tables = [
            module.padding_idx
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding) and module not in words
            if module.num_embeddings == rows and module.padding_idx is not None
        ]
        _FIRST[model] = tables[0] + 1 if tables else 0
    return _FIRST[model]
