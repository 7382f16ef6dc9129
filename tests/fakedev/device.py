"""The device `fakedev`, and how often the host waits for it."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import traceback
import types
from pathlib import Path
from typing import Any

import torch

from .build import NAME, extension

PACKAGE = str(Path(__file__).parents[2] / "ar2diff")


def install() -> tuple[torch.device, Any]:
    """Register the device in this process. Returns it, and the extension."""
    spec = importlib.util.spec_from_file_location(NAME, extension())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.utils.rename_privateuse1_backend("fakedev")
    torch._register_device_module("fakedev", _functions())
    torch.utils.generate_methods_for_privateuse1_backend()
    # As on CUDA, a module that moves keeps its parameters, so that tied ones stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    return torch.device("fakedev:0"), module


def _functions() -> types.ModuleType:
    """What libraries look for in `torch.cuda`, under the device's own name."""
    module = types.ModuleType("torch.fakedev")
    constants = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "_is_in_bad_fork": False, "is_bf16_supported": True, "max_memory_allocated": 0,
        "memory_allocated": 0, "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip
    for name, value in constants.items():
        setattr(module, name, lambda *_, value=value: value)
    for name in (
        "set_device", "synchronize", "_lazy_init", "manual_seed", "manual_seed_all",
        "set_rng_state", "set_rng_state_all", "empty_cache", "reset_peak_memory_stats",
    ):  # fmt: skip
        setattr(module, name, lambda *_: None)
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.get_rng_state_all = lambda: [torch.get_rng_state()]
    module.device = lambda *_: contextlib.nullcontext()
    return module


class Waits:
    """Counts, within a `with`, how often the host waits for the device and what it uploads.

    Attributes:
        waits, uploads: their numbers.
        sites: how many of each, by (kind, operation, innermost file and line of ar2diff, its text).
    """

    def __init__(self, module: Any):
        self.module, self.sites = module, collections.Counter()

    def __enter__(self) -> Waits:
        self.module.set_tracer(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self.module.set_tracer(None)

    @property
    def waits(self) -> int:
        return sum(n for site, n in self.sites.items() if site[0] == "sync")

    @property
    def uploads(self) -> int:
        return sum(n for site, n in self.sites.items() if site[0] == "h2d-async")

    def _note(self, kind: str, what: str) -> None:
        frame = next(
            f for f in reversed(traceback.extract_stack()[:-1])
            if f.filename.startswith(PACKAGE) or __package__ in f.filename
        )  # fmt: skip
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        self.sites[kind, what, place, frame.line] += 1
