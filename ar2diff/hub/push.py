"""Publishing: a folder that ar2diff wrote becomes a repository on the Hub in one commit, and is
then downloaded and compared with what was uploaded. Whatever can be checked without torch is
checked before torch is imported."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSION,
    DRAFT_CONFIG,
    DRAFT_WEIGHTS,
    EXAMPLE,
    PROCESSOR,
    PROCESSOR_TEMPLATE,
    RUN_FILE,
    check_path,
    inside,
    is_adapter,
    is_draft,
    read_json,
    read_spec,
    weight_files,
)
from ..checkpoint.output import check_not_locked, holds_model, run_record
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, option
from ..core.fitted import NOISE_FILE
from ..core.spec import HEAD_FILE
from ..reports.summary import find_report
from .client import NotAsked, Target, download, find_target, matching, upload
from .origin import CARD, Origin, origin_of, origin_of_base, without_paths

PROMPT = "Once upon a time"
# The files of a model besides its weights, which are published and replaced in the repository.
PUBLISHED = [
    RUN_FILE, "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates", "custom_generate", ADAPTER_CONFIG, DIFFUSION, DRAFT_CONFIG,
    "configuration_*.py", "*.safetensors.index.json", HEAD_FILE, NOISE_FILE, *PROCESSOR,
    PROCESSOR_TEMPLATE,
]  # fmt: skip
REPLACED = [*PUBLISHED, "*.safetensors", EXAMPLE]
MODELS = [
    "config.json", ADAPTER_CONFIG, DRAFT_CONFIG, "*.safetensors", "*.bin", "*.pt", "*.pth",
    "*.gguf",
]  # fmt: skip


@dataclass(frozen=True)
class Pushed:
    """What a push published, or would publish.

    Attributes:
        repository: name on the Hub.
        files: {path: bytes}. removed: paths in the repository that are no longer part of the model.
        card: the model card.
        url, commit: those of the repository; None in a dry run, like all attributes below.
        changed: whether the push changed the repository.
        difference: difference of the logits before and after, relative to the largest logit.
        tokens: length of the generations that were compared.
        notes: what a dry run could not check, and what the card does not show.
    """

    repository: str
    files: dict[str, int]
    removed: list[str]
    card: str
    notes: list[str]
    url: str | None = None
    commit: str | None = None
    changed: bool | None = None
    difference: float | None = None
    tokens: int | None = None


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    base: str | None = None,
    license: str | None = None,
    prompt: str | None = None,
    image: str | Path | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Publish a folder, download it to a fresh folder, and compare the two.

    Args:
        folder: a converted model, an adapter or a draft adapter that ar2diff wrote.
        name: name of the repository; if it has no owner, the user of the token is the owner.
        private: make the repository private; an existing public one is refused.
        base: Hub id under which the base was published, if the record names a folder.
        license: identifier from the Hub's list; None means that of the base.
        prompt: prompt for the example on the card and for the generation that is compared; None
            means beginnings of texts that the run held out, or that of a story if there are none;
            of a vision-language model a question about a picture.
        image: file of that picture, of which a small copy is published; None: one that is drawn. No
            picture of the data is published.
        dry_run: check everything, but change nothing anywhere. Without a token or a connection,
            what the Hub knows is left unchecked, and `notes` says so.
        tell: called with a line that says what is being done.

    Raises:
        Ar2DiffError: for anything the user can fix. Nothing is changed before the upload.
    """
    folder = Path(folder)
    record, notes = check_folder(folder), []
    try:
        target = find_target(name, private)
    except NotAsked as error:
        if not dry_run:
            raise
        target = Target(name if "/" in name else f"USER/{name}", private)
        notes.append(
            f"the Hub was not asked whether {target.name} exists and what it holds: {error.what}"
        )
    origin = known_origin(folder, base, license, lenient=dry_run)
    if not origin.licence:
        notes.append(_without_license(folder, origin))
    # The caller may name a base differently than an earlier push did.
    known = None if base else origin.name or record.get("base_model")
    check_same(target, record | {"base_model": known}, kind_of(folder))
    from ..checkpoint.compare import fixed_logits
    from .verify import check_published_base, load_local, seen_logits, verify

    tell("measuring")
    checkpoint = load_local(folder, origin)
    shown = shown_answers(checkpoint, record, prompt, image)
    notes += shown.refused
    logits, seen = fixed_logits(checkpoint), seen_logits(checkpoint)
    files = files_of(folder, target.name, checkpoint, record, origin, shown)
    result = Pushed(
        repository=target.name,
        files={path: _size(content) for path, content in files.items()},
        removed=[path for path in matching(target.files, REPLACED) if path not in files],
        card=_text(files[CARD]),
        notes=notes,
    )
    if dry_run:
        return result
    if checkpoint.base is not None or checkpoint.draft is not None:
        check_published_base(folder, origin, logits)
    del checkpoint
    tell(f"uploading {len(files)} files, {sum(result.files.values()) / 1e6:,.1f} MB")
    commit = upload(target, files, result.removed, f"{folder.resolve().name}, by ar2diff")
    tell("downloading and comparing")
    golden = {prompt: samples[0] for prompt, samples in shown.answers.items()}
    difference = verify(target.name, commit, logits, golden, seen)
    return replace(
        result,
        url=target.url,
        commit=commit,
        changed=commit != target.head,
        difference=difference,
        tokens=sum(sample.tokens for sample in golden.values()),
    )


def preview(
    folder: str | Path,
    *,
    base: str | None = None,
    license: str | None = None,
    prompt: str | None = None,
    image: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """The card that `push` would publish, with `USER` as the owner of the repository.

    Args:
        folder, base, license, prompt, image: as for `push`.
        tell: called with what is not known, and with what the card does not show.

    Raises:
        Ar2DiffError: as for a dry run of `push`.
    """
    folder = Path(folder)
    record, origin = check_folder(folder), known_origin(folder, base, license, lenient=True)
    if not origin.licence:
        tell(_without_license(folder, origin))
    from .verify import load_local

    checkpoint = load_local(folder, origin)
    name = f"USER/{folder.resolve().name}"
    shown = shown_answers(checkpoint, record, prompt, image)
    for note in shown.refused:
        tell(note)
    return _text(files_of(folder, name, checkpoint, record, origin, shown)[CARD])


@dataclass(frozen=True)
class Shown:
    """What a card shows of a model's answers.

    Attributes:
        answers: {prompt: its answers with each of the settings}.
        held_out: whether the prompts are the beginnings of texts that the run held out.
        refused: why prompts are not shown.
        example: the picture that a vision-language model was asked about.
    """

    answers: dict[str, list[Any]]
    held_out: bool
    refused: list[str]
    example: Any = None


def shown_answers(
    checkpoint: Any, record: dict[str, Any], prompt: str | None, image: str | Path | None = None
) -> Shown:
    """The answers to a prompt; None: to those that the run held out, else to the beginning of a
    story. Of a vision-language model, the answer to a question about a picture.

    Raises:
        Ar2DiffError: the prompt that was given is empty or too long, or there is no such picture.
    """
    from .card import measure, measure_all, run_of
    from .example import PROMPT as QUESTION
    from .example import example_of

    example = example_of(checkpoint, image)
    if example is not None:
        asked = QUESTION if prompt is None else prompt
        found = {asked: measure(checkpoint, asked, image=example.picture)}
        return Shown(found, False, [], example)
    if prompt is not None:
        return Shown({prompt: measure(checkpoint, prompt)}, False, [])
    kept = [text for text in run_of(record).get("prompts") or [] if isinstance(text, str)]
    answers, refused = measure_all(checkpoint, kept)
    if answers:
        return Shown(answers, True, refused)
    return Shown({PROMPT: measure(checkpoint, PROMPT)}, False, refused)


def check_before(name: str, model: str, recipe: Recipe) -> None:
    """Refuse, before a run trains, what could not be published after it.

    Args:
        name: name of the repository. model: folder or Hub id of the model to train.

    Raises:
        Ar2DiffError: as for `push`.
    """
    hub = option("push_to_hub")
    if recipe.objective.kind == "ar":
        raise Ar2DiffError(
            f"{hub} cannot be used here: an AR control run does not make a diffusion model",
            f"leave out {hub} or {option('objective.kind')}",
        )
    target, here = find_target(name), Path(model).is_dir()
    kind = "a draft adapter" if recipe.draft else "an adapter" if recipe.peft else "a whole model"
    if kind != "a whole model" and here:
        raise Ar2DiffError(
            f"{hub} cannot be used here: the adapter's base {model} is a folder on this machine",
            f"leave out {hub}; later publish the base, and then the adapter with {option('base')}",
        )
    origin = origin_of_base(model.rstrip("/"), None if here else "")
    check_same(target, {"base_model": origin.name or model}, kind)
    if not origin.licence:
        raise Ar2DiffError(
            f"{hub} cannot be used here: the license of {model} is unknown ({origin.unknown})",
            f"leave out {hub}, and push with {option('license')} when the run has finished",
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Check that a folder can be published, and return its record.

    Raises:
        Ar2DiffError: the folder is missing, holds no converted model, or is being written; its card
            is not text.
    """
    check_path(folder)
    fix = "give a folder that ar2diff wrote"
    if not folder.is_dir():
        raise Ar2DiffError(f"{folder} does not exist", fix)
    check_not_locked(folder)
    if not holds_model(folder):
        if run_record(folder) is None:
            raise Ar2DiffError(f"{folder} holds no model", fix)
        raise Ar2DiffError(
            f"the run in {folder} has not finished", f"continue it with {option('resume', True)}"
        )
    if not is_draft(folder) and read_spec(folder) is None:
        raise Ar2DiffError(
            f"the model in {folder} is not converted: its config.json has no diffusion block",
            f"run 'ar2diff adapt {folder} --output-dir DIR', then push DIR",
        )
    _check_card(folder)
    find_report(folder)  # one that is damaged is refused before anything is measured
    return read_json(folder / RUN_FILE, fix)


def kind_of(folder: Path) -> str:
    """What a folder holds, in words."""
    if is_draft(folder):
        return "a draft adapter"
    return "an adapter" if is_adapter(folder) else "a whole model"


def check_same(target: Target, record: dict[str, Any], kind: str) -> None:
    """Refuse a repository that holds another model, or one that ar2diff did not write.

    Args:
        record: record of the model to be published. kind: of `kind_of`.

    Raises:
        Ar2DiffError: it does.
    """
    held = matching(target.files, MODELS)
    if not held:
        return
    fix = "choose another name, or delete that repository first"
    if RUN_FILE not in target.files:
        raise Ar2DiffError(
            f"repository {target.name} holds a model that ar2diff did not write ({held[0]})", fix
        )
    with tempfile.TemporaryDirectory() as place:
        found = download(target.name, target.head, Path(place), [RUN_FILE])
        old = read_json(found / RUN_FILE, fix)
    held_kind = "an adapter" if ADAPTER_CONFIG in target.files else "a whole model"
    held_kind = "a draft adapter" if DRAFT_CONFIG in target.files else held_kind
    mine, theirs = _identity(record, kind), _identity(old, held_kind)
    for part, value in mine.items():
        if value is not None and value != theirs[part]:
            raise Ar2DiffError(
                f"repository {target.name} holds another model: its {part} is {theirs[part]}, not "
                f"{value}",
                fix,
            )


def known_origin(
    folder: Path, base: str | None, license: str | None, lenient: bool = False
) -> Origin:
    """Where the model in a folder comes from, with its licence.

    Args:
        lenient: do without a licence that is not known, and without the Hub if it cannot be asked.

    Raises:
        Ar2DiffError: the licence is not known, or an adapter's base is not on the Hub.
    """
    origin = origin_of(folder, base, lenient)
    if license is not None:
        return Origin(origin.name, origin.commit, {"license": license})
    if not origin.licence and not lenient:
        raise Ar2DiffError(
            f"the license of {folder}'s base is unknown ({origin.unknown})",
            f"add {option('license', 'apache-2.0')} (or mit, llama3.2, other ...)",
        )
    return origin


def _without_license(folder: Path, origin: Origin) -> str:
    return (
        f"the license of {folder}'s base is unknown ({origin.unknown}): a push will need "
        "--license ID"
    )


def files_of(
    folder: Path,
    name: str,
    checkpoint: Any,
    record: dict[str, Any],
    origin: Origin,
    shown: Shown,
) -> dict[str, Path | bytes]:
    """Everything that is published, by path in the repository: the model files in the folder, the
    decoding code of this version, the record and an adapter's config with names that others can
    resolve, and the card.

    Raises:
        Ar2DiffError: a file is a link that points outside the folder.
    """
    from ..checkpoint.custom_generate import FOLDER, custom_generate
    from .card import make_card
    from .example import coded

    files: dict[str, Path | bytes] = {}
    weights = [folder / (DRAFT_WEIGHTS if checkpoint.draft else ADAPTER_WEIGHTS)]
    if checkpoint.base is None and checkpoint.draft is None:
        weights = weight_files(folder)
    found = [*weights, *(entry for pattern in PUBLISHED for entry in sorted(folder.glob(pattern)))]
    for entry in (entry for entry in found if entry.name != FOLDER):
        for file in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if not file.resolve().is_relative_to(folder.resolve()):
                raise Ar2DiffError(
                    f"{file} is a link to a file outside the folder",
                    "replace it with a copy of that file",
                )
            if file.is_file():
                files[file.relative_to(folder).as_posix()] = file
    if checkpoint.base is None:
        files |= {f"{FOLDER}/{path}": code for path, code in custom_generate().items()}
    else:
        config = read_json(folder / ADAPTER_CONFIG, "")
        config |= {"base_model_name_or_path": origin.name, "revision": origin.commit}
        files[ADAPTER_CONFIG] = _json(config)
    if checkpoint.draft is not None:
        config = read_json(folder / DRAFT_CONFIG, "")
        files[DRAFT_CONFIG] = _json(config | {"base": origin.name, "revision": origin.commit})
    if shown.example is not None:
        files[EXAMPLE] = coded(shown.example.picture)
    published = without_paths(record, origin)
    golden = [
        {"prompt": prompt, "samples": [asdict(sample) for sample in samples]}
        for prompt, samples in shown.answers.items()
    ]
    files[RUN_FILE] = _json(published | {"golden": golden, "files": sorted(files)})
    own = folder / CARD
    report = find_report(folder)
    card = make_card(
        name, checkpoint, published, origin, shown.answers, shown.held_out, report, shown.example
    )
    files[CARD] = own if own.is_file() else card.encode()
    return files


def _check_card(folder: Path) -> None:
    """Refuse a card of the user's own that is not text, or lies outside of the folder."""
    file = inside(folder, CARD)
    try:
        if file.is_file():
            file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Ar2DiffError(
            f"{file}: it is not UTF-8 (byte {error.start})", "save it as UTF-8, or remove it"
        ) from None


def _identity(record: dict[str, Any], kind: str) -> dict[str, Any]:
    base = record.get("base_model")
    return {
        "kind": kind,
        "base": Path(base).name if base else None,
        "number of parameters": record.get("parameters"),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()
