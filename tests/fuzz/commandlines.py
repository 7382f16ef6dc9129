"""What is done to a recipe and to the words of a command line."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hostile
import yaml
from hostile import mutate_bytes, shown

if TYPE_CHECKING:
    from cases import Case

PEFT = {"method": "lora", "r": 2, "alpha": 4, "targets": "all-linear"}
LARGE = (
    "max_steps",
    "samples",
    "num_generations",
    "max_new_tokens",
    "max_completion_length",
    "batch",
)
HEAVY = ("--launch", "--num-processes", "train.compile")  # many processes, or a compiler


YAML = [
    "2020-13-45", "2020-01-02", "2020-01-02 03:04:05", "12:34:56", "~", "yes", "0o17", "1_000",
    ".nan", "-.inf", "9" * 5000, "[" * 3000, "[" * 900 + "]" * 900, "{a: " * 900, "'x", "&a [*a]",
    "*nobody", "!!python/object/apply:os.system ['touch pwned']", "!!binary xx", "!!set {a, b}",
    "!evil x", "? {a: 1}", "[1, 2]", "{a: 1}", "[[]]", "''", "|\n  x", "\u2028", "1e400", "-1",
    "0", "1.5", "x", "null", "[null]", "{1: 2}", "{null: 1}", "{[1]: 2}", "'" + "x" * 5000 + "'",
    "[d1]", "!!float x", "!!int ''", "=", "<<", "{<<: x}", "'../../secret/diary.txt'", "'%s'",
    "0x" + "f" * 5000, "!!timestamp x", "'\\ud800'",
]  # fmt: skip
BOMB = "".join(
    [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12)]
)
SETTINGS = [
    "description", "convert", "convert.attention", "convert.block_length", "convert.prediction",
    "convert.local_window", "convert.mask_token", "convert.reconvert", "anneal", "anneal.kind",
    "anneal.steps", "anneal.lengths", "noise", "noise.time", "noise.complementary", "objective",
    "objective.kind", "objective.weight", "objective.cart_p", "objective.normaliser",
    "objective.ar_weight", "data", "data.sources", "data.text_field", "data.columns",
    "data.columns.prompt", "data.max_length", "data.overlong", "data.cut_share", "data.packing",
    "data.streaming", "data.assistant_only", "data.chat_template", "train", "train.max_steps",
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.optimizer",
    "train.learning_rate", "train.lr_scale", "train.lr_scale.mlp", "train.schedule",
    "train.warmup_steps", "train.decay_steps", "train.weight_decay", "train.adam_beta2",
    "train.max_grad_norm", "train.gradient_checkpointing", "train.precision",
    "train.attn_implementation", "train.seed", "train.logging_steps", "train.save_steps",
    "train.save_total_limit", "train.report_to", "eval", "eval.data", "eval.rows", "eval.length",
    "eval.samples", "eval.steps", "eval.panel_steps", "peft", "peft.method", "peft.r",
    "peft.alpha", "peft.targets", "quantization", "quantization.bits", "quantization.kind", "rl",
    "rl.rewards", "rl.preset", "rl.sampler", "rl.estimator", "rl.samples", "rl.num_generations",
    "rl.beta", "rl.max_completion_length", "rl.level", "rl.loss_type", "rl.epsilon",
    "rl.scale_rewards", "rl.rollout_batch_size", "rl.show_steps", "modle", "train.", ".", "", "=",
    "train.x.y.z", "x" * 3000,
]  # fmt: skip


def flow(item: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(item, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def write_recipe(work: Path, tree: dict[str, Any]) -> Path:
    """A recipe's file."""
    (work / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return work / "recipe.yaml"


def recipe_file(case: Case, draw: random.Random, file: Path) -> str:
    """A recipe with a value that its key does not take, or that is no recipe."""
    if not file.is_file() or file.is_symlink():
        return ""
    data = file.read_bytes()
    kind = draw.choice(["value"] * 8 + ["bytes", "bytes", "bomb", "all", "odd"])
    if kind == "bytes":
        data, note = mutate_bytes(draw, data)
    elif kind == "bomb":
        data, note = data + BOMB.encode(), kind
    elif kind == "all":
        text = draw.choice(YAML)
        data, note = text.encode(), f"all {shown(text)}"
    elif kind == "odd":
        file.unlink()
        note = draw.choice(["folder", "gone"])
        if note == "folder":
            file.mkdir()
        return f"recipe.yaml {note}"
    else:
        key, text = draw.choice(SETTINGS), draw.choice(YAML)
        note = f"{shown(key)}: {shown(text)}"
        case.patient |= key.rpartition(".")[2] in LARGE
        with contextlib.suppress(
            yaml.YAMLError, UnicodeError, AttributeError, TypeError, ValueError, RecursionError
        ):
            tree = yaml.safe_load(data)
            section, _, name = key.partition(".")
            if name and isinstance(tree.get(section), dict):
                tree[section][name] = "@@"
            elif name:
                tree[section] = {name: "@@"}
            else:
                tree[section] = "@@"
            whole = yaml.safe_dump(tree, default_flow_style=None).replace("'@@'", text)
            file.write_bytes(whole.encode("utf-8", "surrogatepass"))
            return f"recipe.yaml {note}"
        return ""
    file.write_bytes(data)
    return f"recipe.yaml {note}"


def override(case: Case, draw: random.Random, _: None) -> str:
    """A setting in the command line."""
    if case.verb == "config" and "schema" in case.words:
        return ""
    key, text = draw.choice(SETTINGS), draw.choice([*YAML, *hostile.TEXTS])
    case.patient |= key.rpartition(".")[2] in LARGE
    case.words.append(f"{key}={text}".replace("\x00", "").replace("\ud800", "\udcff"))
    return shown(case.words[-1])


def arguments(case: Case, draw: random.Random, _: None) -> str:
    """A word changed, added, doubled or taken away, as a shell would hand it over."""
    words, kind = (
        case.words,
        draw.choice(["change"] * 4 + ["option"] * 4 + ["drop", "twice", "add", "key"]),
    )
    place = draw.randrange(1, len(words)) if len(words) > 1 else 0
    if words[place] == "--output-dir" or words[place - 1] == "--output-dir" or not place:
        return ""
    old = words[place]
    if case.verb == "push" and "--dry-run" in words[place : place + 1]:
        return ""  # what is published would stay, for the cases after this one
    numbers = [
        "-1",
        "0",
        "1e308",
        "nan",
        "inf",
        "-inf",
        "9" * 5000,
        str(10**18),
        "1.5",
        "٣",
        "0x10",
        "1_0",
    ]
    texts = [
        "", " ", "\udcff\udcfe", "a\udcff", "x" * 5000, "-", "--", "---", "/", ".", "..",
        "/dev/null", "/proc/self/mem", "~", "$(touch pwned)", "nobody/nothing",
        "nobody/nothing@main", "a/b/c/d", "@", "@@x", "file:///etc/passwd",
        "https://example.com/x", "a\nb", "model/config.json", "rows.jsonl", "🦙", "{mask:0}",
        "{mask:-1}", "{mask:99999999999}", "{mask:" + "9" * 5000 + "}", "{mask:x}", "\\", "*",
        "CON", "model/../model", "./model/", "model@x", "\udced\udca0\udc80", "%n%s",
        "{{ 7 * 7 }}", "\u202e", "[", "{",
    ]  # fmt: skip
    new = draw.choice(numbers if old.lstrip("-").isdigit() or draw.random() < 0.2 else texts)
    match kind:
        case "change":
            if old.startswith("--"):
                return ""
            words[place] = new
        case "option":
            found = [option for option in options(case.verb, words) if option[0] not in HEAVY]
            if not found:
                return ""
            name, takes = draw.choice(found)
            words += [name, new] if takes else [name]
            case.patient |= any(part.replace("_", "-") in name for part in LARGE)
            note = f"added {name} {shown(new) if takes else ''}"
            return note
        case "drop":
            words.pop(place)
        case "twice":
            words.insert(place, old)
        case "add":
            words.append(new)
        case "key":
            words[place] = old + new
    case.patient |= new.isdigit() and words[place - 1].strip("-").replace("-", "_") in LARGE
    return f"{kind} {shown(old)} {shown(new) if kind in ('change', 'add', 'key') else ''}".strip()


SAID = [
    b"\xff\xfe\n", b"\x00\n", b"/nothing x\n", b"x" * 3000 + b"\n", b"<|mask|></s>\n",
    b"\xed\xa0\x80\n", b"/set steps=x\n", b"/mode ar\n", b"/undo\n", b"/quit\n",
    b"/temperature x\n", b"/system \xff\n", b"{mask:99999999999}\n", b"/\n", b"//\n", b"/save /\n",
    b"/threshold " + b"9" * 5000 + b"\n", b"\x1b[2J\n", b"/set\n", b"/seed -1\n", b"/steps 0\n",
    b"/max_new_tokens -1\n", b"/block-length 0\n", b"\r\n", b"{mask:3}\n",
]  # fmt: skip


def said(case: Case, draw: random.Random, _: None) -> str:
    """A line of a chat that nobody would type."""
    line = draw.choice(SAID)
    case.stdin += line + b"y\n"
    return ascii(line[:40])


def options(verb: str, words: list[str]) -> list[tuple[str, bool]]:
    """The options of a verb, as the command line has them, and whether each takes a value."""
    import typer
    from ar2diff.cli.main import app

    command = typer.main.get_command(app).commands[verb]
    if hasattr(command, "commands"):
        command = command.commands.get(words[1])
    parameters = command.params if command else []
    safe = ("--output-dir", "--overwrite", "--push-to-hub", "--output")  # those are the case's own
    return [
        (p.opts[0], not p.is_flag)
        for p in parameters
        if p.param_type_name == "option" and p.opts[0] not in safe
    ]
