"""Publishing: a folder that ar2diff wrote becomes a repository of the Hub in one commit, comes down
again, and is compared with what went up. What is wrong is found before torch is imported."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.files import ADAPTER_CONFIG, RUN_FILE, is_adapter, read_json, read_spec
from ..checkpoint.output import LAST, OURS
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError
from .client import Target, download, find_target, matching, upload
from .origin import CARD, Origin, origin_of, origin_of_base, without_paths

PROMPT = "Once upon a time"
PUBLISHED = [pattern for pattern in OURS if pattern not in ("checkpoints", "*.partial")]
MODELS = ["config.json", ADAPTER_CONFIG, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    base: str | None = None,
    license: str | None = None,
    prompt: str | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Publish a folder, download it to a fresh one, and compare the two.

    Args:
        folder: of a converted model or an adapter, as a run of ours left it.
        name: of the repository; without an owner, the token's.
        private: make it private; one that is public is refused.
        base: Hub id under which the base was published, where the record has a folder.
        license: an identifier of the Hub's list; None: the base's.
        prompt: of the card's example, and of the generation that is compared; None: a story's.
        dry_run: check all, and change nothing anywhere.
        tell: called with a line on what is being done.

    Returns:
        repository, files {path: bytes}, removed, card; and, of a real push, url, commit, changed,
        difference (of logits, relative), tokens of the generation.

    Raises:
        Ar2DiffError: something the user can mend. Until the upload nothing was changed.
    """
    folder, prompt = Path(folder), PROMPT if prompt is None else prompt
    record = check_folder(folder)
    target = find_target(name, private)
    origin = known_origin(folder, base, license)
    # With --base it has another name than an earlier push may have given it.
    known = None if base else origin.name or record.get("base_model")
    check_same(target, record | {"base_model": known}, is_adapter(folder))
    from ..checkpoint.compare import fixed_logits
    from .card import measure
    from .verify import check_published_base, load_local, verify

    tell("measuring")
    checkpoint = load_local(folder, origin)
    samples, logits = measure(checkpoint, prompt), fixed_logits(checkpoint)
    files = files_of(folder, target.name, checkpoint, record, origin, prompt, samples)
    result = {
        "repository": target.name,
        "files": {path: _size(content) for path, content in files.items()},
        "removed": [p for p in matching(target.files, PUBLISHED) if p not in files],
        "card": _text(files[CARD]),
    }
    if dry_run:
        return result
    if checkpoint.base is not None:
        check_published_base(folder, origin, logits)
    del checkpoint
    tell(f"uploading {len(files)} files, {sum(result['files'].values()) / 1e6:,.1f} MB")
    commit = upload(target, files, result["removed"], f"{folder.resolve().name}, by ar2diff")
    tell("downloading it again")
    difference = verify(target.name, commit, logits, samples[0], prompt)
    return result | {
        "url": target.url,
        "commit": commit,
        "changed": commit != target.head,
        "difference": difference,
        "tokens": samples[0].tokens,
    }


def preview(
    folder: str | Path,
    *,
    base: str | None = None,
    license: str | None = None,
    prompt: str | None = None,
) -> str:
    """The card that `push` would publish; the repository's name is left open.

    Raises:
        Ar2DiffError: as `push`, without a Hub.
    """
    folder, prompt = Path(folder), PROMPT if prompt is None else prompt
    record, origin = check_folder(folder), known_origin(folder, base, license)
    from .card import measure
    from .verify import load_local

    checkpoint = load_local(folder, origin)
    name = f"USER/{folder.resolve().name}"
    return _text(
        files_of(folder, name, checkpoint, record, origin, prompt, measure(checkpoint, prompt))[
            CARD
        ]
    )


def check_before(name: str, model: str, recipe: Recipe) -> None:
    """Refuse, before a run trains, what could not be published when it has ended.

    Args:
        name: of the repository. model: that is trained on.
    """
    if recipe.objective.kind == "ar":
        raise Ar2DiffError(
            "--push-to-hub: an AR control is no diffusion model", "leave it out, or objective.kind"
        )
    target, here, adapter = find_target(name), Path(model).is_dir(), recipe.peft is not None
    if adapter and here:
        raise Ar2DiffError(
            f"--push-to-hub: the adapter's base {model} is a folder of this machine",
            "leave it out, then push the base and, with --base, the adapter ('ar2diff push')",
        )
    origin = origin_of_base(model.rstrip("/"), None if here else "")
    check_same(target, {"base_model": origin.name or model}, adapter)
    if not origin.licence:
        raise Ar2DiffError(
            f"--push-to-hub: the licence of {model} is not known ({origin.unknown})",
            "leave it out, and push with --license when the run has ended",
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """The record of a folder that can be published.

    Raises:
        Ar2DiffError: it is not there, is not converted, or no run of ours has ended in it.
    """
    if not folder.is_dir():
        raise Ar2DiffError(f"{folder}: no such folder", "give a folder that ar2diff wrote")
    if not any((folder / name).is_file() for name in LAST):
        ours = (folder / RUN_FILE).is_file()
        raise Ar2DiffError(
            f"{folder}: {'its run has not ended' if ours else 'it holds no model'}",
            "go on with --resume" if ours else "give a folder that ar2diff wrote",
        )
    if read_spec(folder) is None:
        raise Ar2DiffError(
            f"{folder}: it is not converted, config.json has no diffusion block",
            f"run 'ar2diff adapt {folder} --output-dir DIR', and push DIR",
        )
    return read_json(folder / RUN_FILE, "give a folder that ar2diff wrote")


def check_same(target: Target, record: dict[str, Any], adapter: bool) -> None:
    """Refuse a repository that holds another model, or one that ar2diff did not write.

    Args:
        record: of what is to go there. adapter: whether it is one.
    """
    held = matching(target.files, MODELS)
    if not held:
        return
    fix = "give another name, or delete that repository first"
    if RUN_FILE not in target.files:
        raise Ar2DiffError(
            f"repository {target.name} holds a model that ar2diff did not write ({held[0]})", fix
        )
    with tempfile.TemporaryDirectory() as place:
        found = download(target.name, target.head, Path(place), [RUN_FILE])
        old = read_json(found / RUN_FILE, fix)
    mine, theirs = _identity(record, adapter), _identity(old, ADAPTER_CONFIG in target.files)
    for part, value in mine.items():
        if value is not None and value != theirs[part]:
            raise Ar2DiffError(
                f"repository {target.name} holds another model: its {part} is {theirs[part]}, "
                f"this one's {value}",
                fix,
            )


def known_origin(folder: Path, base: str | None, license: str | None) -> Origin:
    """Where a folder's model comes from, with a licence.

    Raises:
        Ar2DiffError: the licence is not known, or an adapter's base is not on the Hub.
    """
    origin = origin_of(folder, base)
    if license is not None:
        return Origin(origin.name, origin.commit, {"license": license})
    if not origin.licence:
        raise Ar2DiffError(
            f"{folder}: the licence of its base is not known ({origin.unknown})",
            "name it: --license apache-2.0 (or mit, llama3.2, other ...)",
        )
    return origin


def files_of(
    folder: Path,
    name: str,
    checkpoint: Any,
    record: dict[str, Any],
    origin: Origin,
    prompt: str,
    samples: list[Any],
) -> dict[str, Path | bytes]:
    """What is published, by its path there: the folder's own files as they are, this version's
    decoding code, the record and an adapter's base by names that others can follow, the card."""
    from ..checkpoint.custom_generate import FOLDER, custom_generate
    from .card import make_card

    files: dict[str, Path | bytes] = {}
    for pattern in PUBLISHED:
        for entry in sorted(folder.glob(pattern)):
            inside = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
            files |= {f.relative_to(folder).as_posix(): f for f in inside if f.is_file()}
    files = {path: file for path, file in files.items() if path.split("/")[0] != FOLDER}
    if checkpoint.base is None:
        files |= {f"{FOLDER}/{path}": code for path, code in custom_generate().items()}
    else:
        config = read_json(folder / ADAPTER_CONFIG, "")
        config |= {"base_model_name_or_path": origin.name, "revision": origin.commit}
        files[ADAPTER_CONFIG] = _json(config)
    published = without_paths(record, origin)
    golden = {"prompt": prompt, "samples": [asdict(sample) for sample in samples]}
    files[RUN_FILE] = _json(published | {"golden": golden})
    own = folder / CARD
    card = make_card(name, checkpoint, published, origin, prompt, samples)
    files[CARD] = own if own.is_file() else card.encode()
    return files


def _identity(record: dict[str, Any], adapter: bool) -> dict[str, Any]:
    base = record.get("base_model")
    return {
        "kind": "an adapter" if adapter else "a whole model",
        "base": Path(base).name if base else None,
        "number of parameters": record.get("parameters"),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()
