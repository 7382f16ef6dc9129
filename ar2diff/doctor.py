"""What this machine has installed, what it can compute with, and settings with surprising
effects."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    "matplotlib",
    "tensorboard",
    "wandb",
    "trackio",
)
LITTLE = 5e9  # bytes of free disk space below which there is a warning


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; none of them is a secret.

    Attributes:
        ar2diff, python: their versions.
        packages: version of each library that ar2diff uses, or `not installed`.
        accelerator: name of the first accelerator; `accelerators`: how many there are.
        precision: what training computes in when `train.precision` is `auto`.
        cpu_threads: threads that torch uses.
        disk_free_gb: free space on the disk of the working folder, in 10^9 bytes.
        hub_token: `set` or `not set`. hub_offline: whether downloads are switched off.
        warnings: what is likely to go wrong.
    """

    ar2diff: str
    python: str
    packages: dict[str, str]
    accelerator: str
    accelerators: int
    precision: str
    cpu_threads: int
    disk_free_gb: float
    hub_token: str
    hub_offline: bool
    warnings: tuple[str, ...]


def examine() -> Machine:
    """Examine this machine."""
    import torch

    from . import __version__
    from .distributed.precision import computes_in_bf16

    free = shutil.disk_usage(Path()).free
    return Machine(
        ar2diff=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        accelerator=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (CPU)",
        accelerators=torch.cuda.device_count(),
        precision="bf16, fp32 master" if computes_in_bf16() else "fp32",
        cpu_threads=torch.get_num_threads(),
        disk_free_gb=round(free / 1e9, 1),
        hub_token="set" if _has_token() else "not set",
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        warnings=tuple(_warnings(free)),
    )


def _warnings(free: int) -> list[str]:
    found = []
    settings = Path("~/.cache/huggingface/accelerate/default_config.yaml").expanduser()
    if settings.is_file():
        found.append(f"{settings} changes how runs are launched; remove it if you do not want that")
    if importlib.util.find_spec("ar2diff").origin is None:
        found.append("a leftover folder in site-packages hides ar2diff; uninstall and reinstall it")
    if free < LITTLE:
        found.append(f"less than {LITTLE / 1e9:.0f} GB of disk space is free")
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
