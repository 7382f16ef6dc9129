"""Where a model comes from, as seen from other machines: the base that others can find, its
licence, and the record of the run without paths on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi, ModelCard

from ..checkpoint.files import (
    ADAPTER_CONFIG,
    DRAFT_CONFIG,
    RUN_FILE,
    is_adapter,
    is_draft,
    read_json,
)
from ..core.errors import Ar2DiffError, option
from .client import NotAsked, asking, reason

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")  # keys in the front matter of a card
HERE = re.compile(r"[/~]|\.\.?/|[A-Za-z]:[\\/]|\\\\")  # how obvious paths begin
FILES = (
    "base_model",
    "adapter",
    "path",
    "prompts",
    "data",
)  # keys whose value is a file or a name on the Hub


@dataclass(frozen=True)
class Origin:
    """The nearest model upstream that others can find.

    Attributes:
        name: Hub id; None if nothing upstream is published.
        commit: its commit, if known.
        licence: its `license`, with `license_name` and `license_link` if present.
        unknown: why the licence is not known.
    """

    name: str | None
    commit: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)
    unknown: str = ""


def origin_of(folder: Path, base: str | None = None, lenient: bool = False) -> Origin:
    """Follow the records from base to base until one is on the Hub.

    Args:
        folder: a converted model, an adapter or a draft adapter.
        base: the Hub id under which its base was published.
        lenient: do without the Hub if it cannot be asked about the base of an adapter.

    Raises:
        Ar2DiffError: the base of an adapter is a folder on this machine, or is not on the Hub.
    """
    if is_adapter(folder):
        config = read_json(folder / ADAPTER_CONFIG, "")
        reference = str(config.get("base_model_name_or_path") or "")
        if base is None and Path(reference).is_dir():
            raise Ar2DiffError(
                f"the base of adapter {folder} is a folder on this machine, {reference}",
                f"run 'ar2diff push {reference} REPO', then push again with "
                f"{option('base', 'REPO')}",
            )
        named = (base, None) if base else (reference, config.get("revision"))
        return _asked(*named, lenient)
    if is_draft(folder):
        config = read_json(folder / DRAFT_CONFIG, "")
        reference = str(config.get("base") or "")
        if base is None and (Path(reference).is_dir() or (folder / reference).is_dir()):
            raise Ar2DiffError(
                f"the base of draft adapter {folder} is a folder on this machine, {reference}",
                f"publish it, with 'hf upload' or 'ar2diff push', then push again with "
                f"{option('base', 'REPO')}",
            )
        named = (base, None) if base else (reference, config.get("revision"))
        return _asked(*named, lenient)
    if base is not None:
        return _published(base, None)
    record = read_json(folder / RUN_FILE, "give a folder that ar2diff wrote")
    return origin_of_base(str(record.get("base_model") or ""), record.get("base_commit", ""))


def origin_of_base(reference: str, commit: str | None = "") -> Origin:
    """Follow a base to the nearest model on the Hub, which may be itself.

    Args:
        reference: folder or Hub id.
        commit: as recorded: None if the base was a folder, empty if the record does not say.
    """
    licence: dict[str, Any] = {}
    seen: set[str] = set()
    while True:
        folder = Path(reference).expanduser()
        if commit or not (commit is None or folder.is_dir() or HERE.match(reference)):
            name, _, revision = reference.partition("@")
            found = _published(name, commit or revision or None)
            break
        licence = licence or _front_matter(folder / CARD)
        record = read_json(folder / RUN_FILE, "") if (folder / RUN_FILE).is_file() else {}
        seen.add(reference)
        if record.get("base_model", reference) in seen:
            found = Origin(None, unknown=f"the card in folder {reference} does not say")
            break
        reference, commit = str(record["base_model"]), record.get("base_commit", "")
    return Origin(found.name, found.commit, licence or found.licence, found.unknown)


def without_paths(record: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """A record as published: files and folders without their paths, the base by its Hub id, and no
    texts that a run held out, of which the card alone shows some."""
    clean = _clean(record)
    for run in (clean, clean.get("run")):
        if isinstance(run, dict):
            run.pop("prompts", None)
    if origin.name is not None:
        clean |= {"base_model": origin.name, "base_commit": origin.commit}
    return clean


def _clean(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _clean(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return PurePath(value).name if HERE.match(value) or _is_file(value, key) else value


def _is_file(value: str, key: str) -> bool:
    """Whether a value names a file on this machine rather than something on the Hub."""
    from ..data.sources import SUFFIXES, find_file

    try:
        if key not in FILES:
            return "/" in value and Path(value.partition(":")[0]).exists()  # may be file:function
        return value.endswith(SUFFIXES) or Path(value).exists() or find_file(value) is not None
    except OSError:  # too long to be a path
        return False
    except Ar2DiffError:
        return True


def _asked(name: str, commit: str | None, lenient: bool) -> Origin:
    """A base that must be on the Hub."""
    try:
        with asking(name):
            info = HfApi().model_info(name, revision=commit)
    except NotAsked as error:
        if not lenient:
            raise
        return Origin(name, commit, unknown=error.what)
    return _origin(name, info.sha, info)


def _published(name: str, commit: str | None) -> Origin:
    try:
        info = HfApi().model_info(name, revision=commit)
    except Exception as error:  # no repository or no connection: the user may give a licence
        return Origin(
            name, commit, unknown=f"{name} could not be looked up on the Hub: {reason(error)}"
        )
    return _origin(name, commit, info)


def _origin(name: str, commit: str | None, info: Any) -> Origin:
    licence = _licence(info.card_data.to_dict() if info.card_data else {})
    return Origin(name, commit, licence, f"the card of {name} does not say")


def _front_matter(file: Path) -> dict[str, Any]:
    try:
        return _licence(ModelCard.load(file).data.to_dict()) if file.is_file() else {}
    except (ValueError, OSError):  # not YAML, or not YAML that a card can have
        return {}


def _licence(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in LICENCE if values.get(name)}
