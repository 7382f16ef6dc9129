"""The tests that a CPU, its cores, the locale or the time zone could turn, under each of them.

    python tests/cpus.py [FILE ...]    # `make cpus`

Each setting occurs beside several others, and no run repeats all of another's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILES = (
    "adapters",
    "custom_generate",
    "decoding",
    "denoise",
    "requests",
    "samplers",
    "speculation",
)
# A kernel set of torch's and of oneDNN's, what bitsandbytes takes the CPU for, cores, locale, zone.
SETTINGS = (
    ("default", "AVX2", "yes", 1, "C", "Asia/Kathmandu"),
    ("avx2", "", "no", 1, "tr_TR.UTF-8", "America/St_Johns"),
    ("", "AVX2", "no", 2, "C", "Pacific/Kiritimati"),
    ("", "", "yes", 2, "tr_TR.UTF-8", "UTC"),
    ("default", "", "no", 2, "C.UTF-8", ""),
    ("avx2", "AVX2", "yes", 1, "", "Asia/Kathmandu"),
)
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "AR2DIFF_TEST_BF16", "", "LC_ALL", "TZ")


def run(setting: tuple[str | int, ...], files: list[str]) -> bool:
    """Whether the files pass under a setting; an empty one is left unset."""
    chosen = {name: str(value) for name, value in zip(NAMES, setting, strict=True) if name}
    env = {name: value for name, value in os.environ.items() if name not in chosen}
    env |= {name: value for name, value in chosen.items() if value}
    cores = sorted(os.sched_getaffinity(0))[: setting[3]]
    print("==", *(f"{n}={v}" for n, v in chosen.items() if v), f"cores={len(cores)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-n", str(len(cores)), "--dist", "loadfile", *files]
    done = subprocess.run(
        command,
        env={**env, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    )
    return done.returncode == 0


if __name__ == "__main__":
    here = Path(__file__).parent
    chosen = sys.argv[1:] or [str(here / f"test_{name}.py") for name in FILES]
    red = [setting for setting in SETTINGS if not run(setting, chosen)]
    sys.exit(f"red under {red}" if red else 0)
