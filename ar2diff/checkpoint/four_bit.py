"""4-bit linear layers for QLoRA: the settings of bitsandbytes, and its limits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ..core.errors import Ar2DiffError
from ..distributed.precision import gpu_has_bf16

FOUR_BIT_BLOCK = 64  # weights that share a scale; the only size that recipes can ask for


def bits_and_bytes(quantization: Any) -> BitsAndBytesConfig:
    """The `quantization` section of a recipe, as transformers takes it.

    Raises:
        Ar2DiffError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Ar2DiffError(
            "quantization needs bitsandbytes, which is not installed",
            "pip install 'ar2diff[qlora]', or set quantization=null",
        )
    dtype = quantization.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu_has_bf16() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )


def check_four_bit_shapes(path: Path, outline: Any) -> None:
    """Refuse a model whose layers a CPU cannot hold in 4 bits, before its weights are read.

    bitsandbytes quantizes blocks of 64 weights. Its CPU kernels assume that each row of a layer
    consists of whole blocks; for other rows they fail or silently apply wrong scales, depending on
    the CPU.

    Args:
        outline: the model without storage.
    """
    if torch.cuda.is_available():
        return
    head = outline.get_output_embeddings()  # it is never quantized
    for name, module in outline.named_modules():
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        inputs = module.nx if isinstance(module, Conv1D) else module.in_features
        if inputs % FOUR_BIT_BLOCK:
            raise Ar2DiffError(
                f"model {path}: layer {name} has {inputs} inputs; on a CPU, 4-bit layers need a "
                f"multiple of {FOUR_BIT_BLOCK}",
                "set quantization=null, or train on a GPU",
            )


def keep_unpacked(model: Any) -> None:
    """Keep 4-bit layers in the form that trains, on every CPU.

    On a CPU with avx512_bf16, the first forward in eval mode would repack a layer for inference.
    That rounds its scales to bfloat16 and blocks gradients, so that the training that follows would
    silently go wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
