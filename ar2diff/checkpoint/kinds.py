"""Which stock class of transformers loads a folder: of causal LMs, of masked LMs, or of
vision-language models. Its config tells; no other kind is loaded."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..core.errors import Ar2DiffError, shortened
from ..core.images import image_token_of
from ..core.masked_lm import is_masked_lm, names_of
from .files import CONFIG, is_adapter, is_draft, read_config


def sees_images(config: Any) -> bool:
    """Whether a config is that of a vision-language model."""
    return image_token_of(config) is not None and type(config) in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )


def holds_vision_language(path: Path) -> bool:
    """Whether a folder holds a vision-language model, by its config, which is not checked."""
    if is_adapter(path) or is_draft(path):
        return False
    config = read_config(path)
    names = config.get("architectures")
    return isinstance(names, list) and _is_vision_language(config.get("model_type"), names, config)


def loader_of(config: Any) -> type:
    """What loads the weights of a config, with `from_pretrained`: its class, or transformers' own
    choice of one for causal LMs; errors as of `class_of`."""
    other = is_masked_lm(config.architectures) or sees_images(config)
    return class_of(config) if other else AutoModelForCausalLM


def class_of(config: Any) -> type:
    """The class of a config.

    Raises:
        Ar2DiffError: this transformers runs the tower of such a class in every forward.
    """
    if is_masked_lm(config.architectures):
        return generative_class(config)
    if not sees_images(config):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    known = inspect.signature(found.forward).parameters
    if "mm_encoder_outputs" not in known or not hasattr(found, "get_image_features"):
        raise Ar2DiffError(
            f"{found.__name__} of transformers {transformers.__version__} does not take the "
            "features of images, only the images themselves",
            "upgrade transformers, or use a checkpoint of another class",
        )
    return found


def refuse_other_kinds(path: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that holds no decoder, masked language model or vision-language model.

    Raises:
        Ar2DiffError: it does, or its `architectures` and `model_type` contradict each other.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise Ar2DiffError(
            f"{path / CONFIG}: architectures is {shortened(names)}, but must be a list of names",
            "correct or remove the key",
        )
    if not names:  # the type tells as much, but for models that are encoders or decoders
        names = []
        if isinstance(kind, str) and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            names = names_of(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ()))
    if is_masked_lm(names) and not config.get("is_encoder_decoder"):
        if names[0] in names_of(MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind, ())):
            return
    if _is_vision_language(kind, names, config):
        return
    decoders = {
        name for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names_of(entry)
    }
    if names and isinstance(kind, str) and kind in CONFIG_MAPPING:
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and any(n in decoders for n in names):
            raise Ar2DiffError(
                f"{path / CONFIG}: model_type {shortened(kind)} and architectures "
                f"{shortened(names)} do not belong together",
                "correct it, or download the checkpoint again",
            )
    if config.get("is_encoder_decoder") or not any(n in decoders for n in names):
        what = shortened(", ".join(names))[1:-1] or f"a model of type {shortened(kind)}"
        raise Ar2DiffError(
            f"model {path}: {what} is neither a decoder-only causal LM, nor a masked LM, nor a "
            "vision-language model",
            "if it is a diffusion model of another family, run 'ar2diff import' on it first"
            if "auto_map" in config
            else "use an autoregressive checkpoint (LLaMA, Qwen, Mistral, GPT-2 ...), or a "
            "...ForMaskedLM (BERT, RoBERTa, ModernBERT ...)",
        )


def _is_vision_language(kind: Any, names: list[str], config: dict[str, Any]) -> bool:
    if not isinstance(kind, str):
        return False
    own = names_of(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, ()))
    return bool(names) and names[0] in own and not config.get("is_encoder_decoder")


@cache
def _with_generate(stock: type) -> type:
    values = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock, GenerationMixin), values)


def generative_class(config: Any) -> type:
    """The class of a masked language model, with `generate` and a generation config, which those
    of transformers lack. Its name and its weights are those of the stock class."""
    return _with_generate(MODEL_FOR_MASKED_LM_MAPPING[type(config)])


def model_from(config: Any, **kwargs: Any) -> Any:
    """A model of a config with random weights; keyword arguments as of transformers'
    `from_config`."""
    found = loader_of(config)
    if found is AutoModelForCausalLM:
        return found.from_config(config, trust_remote_code=False, **kwargs)
    return found._from_config(config, **kwargs)


def outline_of(config: Any) -> Any:
    """The model of a config without storage, which costs no memory whatever its size."""
    with torch.device("meta"):
        return class_of(config)(config)
