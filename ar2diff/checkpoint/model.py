"""A checkpoint in memory: model, tokenizer and spec, loaded from a folder after every check."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.attention import layer_windows
from ..core.errors import Ar2DiffError, first_line
from ..core.forward import context_length
from ..core.options import RULE, THRESHOLD
from ..core.spec import CAUSAL, Spec
from ..diffusion.objective import suppressed_ids
from .files import read_config, read_spec, stored_dtypes


@dataclass
class Checkpoint:
    """A loaded checkpoint: model (float32 unless asked), tokenizer, spec (None: still an AR model).

    `stored` maps a tensor's name to the dtype in which the files hold it; `base` is the converted
    model under an adapter (`adapters.Base`), None where there is none; `notes` are what its user
    should know of the conversion.
    """

    path: Path
    model: Any
    tokenizer: Any
    spec: Spec | None
    stored: dict[str, str]
    commit: str | None = None
    base: Any = None
    notes: list[str] = field(default_factory=list)
    _token_ids: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a text; training ends documents with the first."""
        for holder in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            if ids is not None and ids != []:
                return ids if isinstance(ids, list) else [ids]
        return []

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the tokenizer has a token for; a vocabulary may have holes."""
        if len(self._token_ids) != len(self.tokenizer):
            self._token_ids = frozenset(self.tokenizer.get_vocab().values())
        return self._token_ids

    @property
    def suppressed(self) -> Tensor:
        """[V] bool: ids that the model can never mean."""
        mask_token_id = self.spec.mask_token_id if self.spec else None
        rows = self.model.config.get_text_config().vocab_size  # weights may be cut to shards
        return suppressed_ids(mask_token_id, self.token_ids, rows)

    @property
    def spec_or_causal(self) -> Spec:
        """The spec; of an unconverted model that of its AR mode, where no token is a mask."""
        return self.spec or causal_spec(self.model)


def load_model(
    path: Path,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
) -> Checkpoint:
    """Load the whole model in a folder, in float32 (float64 if stored so), after every check that
    costs nothing.

    Args:
        attn_implementation: `auto` is sdpa, or eager where the class lacks it.
        device: None leaves the model on the CPU; `auto` puts it on the accelerator if there is one.
        quantization: a recipe's section: linear layers in 4 bits, all else as it is stored.

    Raises:
        Ar2DiffError: it is not a decoder, its weights are incomplete, its tokenizer does not match,
            or its spec is not one we honour.
    """
    config = read_config(path)
    spec = read_spec(path)
    _refuse_non_decoder(path, config)
    stored = stored_dtypes(path)

    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    dtype = torch.float64 if "F64" in stored.values() else torch.float32
    quantized: dict[str, Any] = {}
    if quantization is not None:
        quantized["quantization_config"] = _bits_and_bytes(quantization)
        dtype = "auto"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
        )
    except Exception as error:  # from a config of the wrong type to a class without sdpa
        raise Ar2DiffError(
            f"model {path}: does not load ({first_line(error)})",
            "check that config.json and the weights belong together",
        ) from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        names = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
        raise Ar2DiffError(
            f"model {path}: the weights lack {names[0]} and {len(names) - 1} more tensors",
            "check that config.json and the weights belong together",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    # Vocabularies are padded to a round number of rows, not by a tenth of their size.
    if len(tokenizer) > rows or rows - len(tokenizer) > max(1024, rows // 10):
        raise Ar2DiffError(
            f"model {path}: the tokenizer has {len(tokenizer)} tokens, the weights {rows} rows",
            "use the tokenizer that the model was trained with",
        )
    if spec is not None and spec.mask_token_id >= rows:
        raise Ar2DiffError(
            f"model {path}: mask_token_id {spec.mask_token_id} is out of range, {rows} rows",
            "convert the base model again",
        )
    if device == "auto" and quantization is None:  # which puts it there by itself
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    commit = path.name if path.parent.name == "snapshots" else None
    return Checkpoint(path, model.eval(), tokenizer, spec, stored, commit)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        Ar2DiffError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise Ar2DiffError(
            f"model {path}: its tokenizer does not load ({first_line(error)})",
            "put the tokenizer's files beside the weights",
        ) from error


def _bits_and_bytes(quantization: Any) -> Any:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise Ar2DiffError(
            "quantization needs bitsandbytes, which is not installed",
            "pip install 'ar2diff[qlora]', or set quantization=null",
        )
    dtype = quantization.compute_dtype
    if dtype == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if gpu else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )


def _refuse_non_decoder(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures") or []
    decoders = {
        name
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([entry] if isinstance(entry, str) else entry)
    }
    if config.get("is_encoder_decoder") or not any(n in decoders for n in names):
        raise Ar2DiffError(
            f"model {path}: {', '.join(names) or 'it'} is not a decoder-only causal LM",
            "bring it in with 'ar2diff import', if it is a diffusion model of another family"
            if "auto_map" in config
            else "give an autoregressive checkpoint (LLaMA, Qwen, Mistral, GPT-2 ...)",
        )


def count_parameters(model: Any) -> tuple[int, int]:
    """Parameters that train, and all of a model's; of quantised weights, what they stand for."""
    if hasattr(model, "get_nb_trainable_parameters"):  # an adapter of peft's
        return model.get_nb_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a parameter is written: the base's; for a new one, the most common."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    common = max(set(checkpoint.stored.values()), key=list(checkpoint.stored.values()).count)
    return dtypes.get(checkpoint.stored.get(name, common), torch.float32)


def write_spec(checkpoint: Checkpoint, spec: Spec) -> None:
    """Put the spec into the model's config, and what depends on it into the generation config."""
    config, generation = checkpoint.model.config, checkpoint.model.generation_config
    config.diffusion = spec.to_dict()
    config.mask_token_id = spec.mask_token_id
    if spec.attention == "causal_context":
        config.__dict__.pop("is_causal", None)  # plain engines run the AR model that it still is
    else:
        config.is_causal = False
    # A file marked as made from a model's config loses its sampler settings when it is read.
    generation._from_model_config = None
    ends = checkpoint.end_ids
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    rows = config.get_text_config().vocab_size  # weights may be cut to shards
    suppressed = {*(generation.suppress_tokens or ())}  # the base's own, or of a conversion before
    if checkpoint.spec is not None:  # since when a row may have become an end token
        suppressed -= {*ends}
    unused = {*range(rows)} - checkpoint.token_ids  # of a padded vocabulary, or of one with holes
    generation.suppress_tokens = sorted({*suppressed, *unused, spec.mask_token_id})
    if not any(getattr(generation, name, None) is not None for name in RULE):
        generation.threshold = THRESHOLD
    generation.pad_token_id = checkpoint.tokenizer.pad_token_id
    generation.max_new_tokens = None
    checkpoint.spec = spec


def causal_spec(model: Any) -> Spec:
    """What an unconverted model is: its AR mode alone, and a mask id that no token has."""
    config = model.config.get_text_config()
    return replace(
        CAUSAL,
        mask_token_id=model.get_input_embeddings().weight.shape[0],
        local_window="kept" if any(layer_windows(config, "kept").values()) else None,
        max_length=context_length(model.config) or 0,
    )
