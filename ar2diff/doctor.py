"""The machine: what is installed, what it can do, and settings that surprise."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "deepspeed",
    "bitsandbytes",
    "lm-eval",
)


def examine() -> dict[str, Any]:
    """Facts about this machine, and `warnings`: what is likely to go wrong. Names no secret."""
    import torch

    from . import __version__

    cuda = torch.cuda.is_available()
    free = shutil.disk_usage(Path()).free
    facts: dict[str, Any] = {
        "ar2diff": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "accelerator": torch.cuda.get_device_name(0) if cuda else "none (CPU)",
        "accelerators": torch.cuda.device_count(),
        "precision": "bf16, fp32 master" if cuda and torch.cuda.is_bf16_supported() else "fp32",
        "cpu_threads": torch.get_num_threads(),
        "disk_free_gb": round(free / 1e9, 1),
        "hub_token": "set" if _has_token() else "not set",
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }
    warnings = []
    stray = Path("~/.cache/huggingface/accelerate/default_config.yaml").expanduser()
    if stray.is_file():
        warnings.append(f"{stray} changes how runs are launched; remove it if that is not meant")
    if importlib.util.find_spec("ar2diff").origin is None:
        warnings.append(
            "a stale folder in site-packages hides ar2diff; uninstall and install again"
        )
    if free < 5e9:
        warnings.append("less than 5 GB of disk are free")
    return {**facts, "warnings": warnings or "none"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
