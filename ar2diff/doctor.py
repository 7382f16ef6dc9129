"""What this machine has installed, what it can compute with, and settings with surprising
effects."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from .core.errors import first_line

# What ar2diff computes and reads files with, each with the newest version that was tested, which is
# that of constraints.txt. The oldest one is what the package itself requires.
NEWEST = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "pydantic": "2.14.3",
    "PyYAML": "6.0.3",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "jinja2": "3.1.6",
    "deepspeed": "0.19.8",
    "bitsandbytes": "0.50.2",
    "lm-eval": "0.4.13",
    "math-verify": "0.9.0",
    "outlines-core": "0.2.14",
    "jsonschema": "4.26.0",
    "llguidance": "1.9.1",
    "fastapi": "0.165.0",
    "uvicorn": "0.54.0",
    "prometheus-client": "0.26.0",
    "pillow": "12.3.0",
    "matplotlib": "3.11.2",
    "tensorboard": "2.21.0",
    "wandb": "0.31.0",
    "trackio": "0.43.0",
}
LITTLE = 5e9  # bytes of free disk space below which there is a warning


@dataclass(frozen=True)
class Package:
    """A library that ar2diff uses.

    Attributes:
        version: the installed one; None if there is none.
        requires: the versions that ar2diff works with, as pip writes them (`>=2.9`).
        newest: the newest version that was tested.
        extra: the extra of ar2diff that installs it; None if ar2diff needs it.
    """

    version: str | None
    requires: str
    newest: str
    extra: str | None

    @property
    def state(self) -> str:
        """`tested`, `newer` than any tested version, `unsupported`, or `not installed`."""
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        if self.version is None:
            return "not installed"
        version = Version(Version(self.version).public)  # without +cpu
        if not SpecifierSet(self.requires).contains(version, prereleases=True):
            return "unsupported"
        return "newer" if version > Version(self.newest) else "tested"


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; none of them is a secret.

    Attributes:
        ar2diff, python: their versions.
        packages: each library that ar2diff uses, by its name.
        accelerator: name of the first accelerator; `accelerators`: how many there are.
        precision: what training computes in when `train.precision` is `auto`.
        cpu_threads: threads that torch uses.
        disk_free_gb: free space on the disk of the working folder, in 10^9 bytes.
        hub_token: `set` or `not set`. hub_offline: whether downloads are switched off.
        sandbox: the version of bubblewrap if programs can be run safely for code rewards, or why
            they cannot.
        warnings: what is likely to go wrong.
    """

    ar2diff: str
    python: str
    packages: dict[str, Package]
    accelerator: str
    accelerators: int
    precision: str
    cpu_threads: int
    disk_free_gb: float
    hub_token: str
    hub_offline: bool
    sandbox: str
    warnings: tuple[str, ...]


def examine() -> Machine:
    """Examine this machine."""
    import torch

    from . import __version__
    from .distributed.precision import computes_in_bf16

    free, packages = shutil.disk_usage(Path()).free, find_packages()
    return Machine(
        ar2diff=__version__,
        python=platform.python_version(),
        packages=packages,
        accelerator=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (CPU)",
        accelerators=torch.cuda.device_count(),
        precision="bf16, fp32 master" if computes_in_bf16() else "fp32",
        cpu_threads=torch.get_num_threads(),
        disk_free_gb=round(free / 1e9, 1),
        hub_token="set" if _has_token() else "not set",
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        sandbox=_sandbox(),
        warnings=tuple([*_mismatches(packages), *_warnings(free)]),
    )


def find_packages() -> dict[str, Package]:
    """The libraries that ar2diff uses, as its installation requires them and as they are installed.

    A clone that was updated after it was installed may use more than its installation knows of.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {}
    for line in reversed(requires("ar2diff") or []):  # so that what is needed anyway stays
        wanted = Requirement(line)
        extra = re.search(r"extra == ['\"]([^'\"]+)", line)
        found[canonicalize_name(wanted.name)] = (
            ",".join(sorted(map(str, wanted.specifier), reverse=True)),  # the lower bound first
            extra and extra[1],
        )
    return {
        name: Package(_version(name), specifier, newest, extra)
        for name, newest in NEWEST.items()
        if (known := found.get(canonicalize_name(name)))
        for specifier, extra in [known]
    }


def _mismatches(packages: dict[str, Package]) -> list[str]:
    found = []
    if unknown := [name for name in NEWEST if name not in packages]:
        found.append(
            f"the clone was updated after it was installed, and uses {', '.join(unknown)} since "
            "then; install it again"
        )
    for name, package in packages.items():
        if package.state == "unsupported" or (package.version is None and not package.extra):
            found.append(
                f"{name} is {package.version or 'not installed'}, but ar2diff needs "
                f"{package.requires}"
            )
    newer = [
        f"{name} {package.version}" for name, package in packages.items()
        if package.state == "newer"
    ]  # fmt: skip
    if newer:
        found.append(
            f"newer than any version that was tested: {', '.join(newer)}; if something fails, "
            "install ar2diff with its constraints.txt"
        )
    return found


def _warnings(free: int) -> list[str]:
    found = []
    settings = Path("~/.cache/huggingface/accelerate/default_config.yaml").expanduser()
    if settings.is_file():
        found.append(f"{settings} changes how runs are launched; remove it if you do not want that")
    if importlib.util.find_spec("ar2diff").origin is None:
        found.append("a leftover folder in site-packages hides ar2diff; uninstall and reinstall it")
    if importlib.util.find_spec("torchvision") is not None:  # without it some models cannot see
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # its operators are registered when it is imported
            found.append(
                f"torchvision does not match torch ({first_line(error)}), and no vision-language "
                "model loads; install the one that belongs to it, from the same index"
            )
    if free < LITTLE:
        found.append(f"less than {LITTLE / 1e9:.0f} GB of disk space is free")
    return found


def _sandbox() -> str:
    from .core.errors import Ar2DiffError
    from .rewards.sandbox import check_sandbox, version

    try:
        check_sandbox()
    except Ar2DiffError as error:
        return f"not available: {error.what}; {error.fix}"
    return f"ok (bubblewrap {version()})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
