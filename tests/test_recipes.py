"""Every recipe on disk: two steps of it through the command line, sizes alone changed; and what its
header says: a command that the command line takes, hardware, memory."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ar2diff.cli.main import app, main
from vision import llava_folder, picture_rows

from ar2diff.checkpoint.files import ADAPTER_CONFIG, is_adapter, read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.catalogue import catalogue, commands, header
from ar2diff.config.recipe import Recipe, load_recipe
from ar2diff.config.schema import describe_fields
from ar2diff.core.errors import Ar2DiffError
from ar2diff.distributed.launch import STRATEGIES
from ar2diff.training.base import Running

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = catalogue()
EVERY_RECIPE = pytest.mark.parametrize("name", CATALOGUE)
WORDS = "the cat sat on a mat"


def adapt_rows(recipe) -> list[dict]:
    return [{recipe.data.text_field: f"{n} {WORDS}"} for n in range(24)]


def sft_rows(recipe) -> list[dict]:
    """Conversations in the form that the recipe reads."""
    columns = recipe.data.columns
    if columns.prompt and columns.completion:
        names = re.findall(r"\{(\w+)\}", columns.prompt + columns.completion)
        return [{column: f"{column[0]}{n}" for column in names} for n in range(24)]
    if recipe.data.chat_template or columns.messages:
        turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": WORDS}]
        return [{columns.messages or "messages": turns}] * 24
    return [{"prompt": f"say {n}:", "completion": f" {WORDS}"} for n in range(24)]


def rl_rows(recipe) -> list[dict]:
    """Tasks with the columns of every reward."""
    row = {
        "answer": "3", "question": "1 + 2?", "numbers": [1, 2, 3], "target": 6, "words": ["cat"],
        "puzzle": "1034", "solution": "1234", "test": "assert f() == 3", "entry_point": "f",
    }  # fmt: skip
    return [{"prompt": f"say {n}:", **row} for n in range(24)]


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """A vision-language model, and a file of conversations about pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    return llava_folder(folder / "model"), picture_rows(folder, 24)


def sees(name: str) -> bool:
    return "vision-language" in CATALOGUE[name].description


@pytest.fixture
def base_of(tiny_checkpoint, convert_tiny, convert_wide):
    """Factory: what a recipe begins with: the AR model, or that converted as the recipe wants it,
    in a shape for 4-bit layers where the recipe has them."""

    def find(name: str, recipe) -> Path:
        if CATALOGUE[name].verb in ("adapt", "draft"):
            return tiny_checkpoint
        chosen = recipe.convert.model_dump(include=recipe.convert.model_fields_set)
        convert = convert_tiny if recipe.quantization is None else convert_wide
        return convert(*(f"convert.{key}={json.dumps(value)}" for key, value in chosen.items()))

    return find


# What a verb's recipes read.
ROWS = {"adapt": adapt_rows, "draft": adapt_rows, "sft": sft_rows, "rl": rl_rows}


def sizes(recipe) -> list[str]:
    """A run of two steps that does all that the recipe's does."""
    train, watch = recipe.train, recipe.eval
    values = {
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": min(2, train.gradient_accumulation_steps),
        "train.warmup_steps": min(1, train.warmup_steps),
        "train.decay_steps": min(1, train.decay_steps),
        "train.logging_steps": 1,
        "data.max_length": 64,
        "eval.steps": min(1, watch.steps or 0),
        "eval.panel_steps": min(2, watch.panel_steps),
        "eval.rows": 2,
        "eval.length": 16,
    }
    if recipe.draft is None:
        values["anneal.steps"] = min(2, recipe.anneal.steps)
    if recipe.rl is not None:
        values |= {
            "rl.num_generations": 2,
            "rl.max_completion_length": 8,
            "rl.num_iterations": min(2, recipe.rl.num_iterations),
            "rl.show_steps": min(2, recipe.rl.show_steps),
        }
    return [f"{key}={value}" for key, value in values.items()]


def run(monkeypatch, capsys, *arguments: object) -> dict:
    monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, arguments), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return json.loads(captured.out)


@EVERY_RECIPE
def test_two_steps_of_a_recipe(name, monkeypatch, capsys, base_of, write_jsonl, tmp_path, request):
    recipe = load_recipe(name)
    if recipe.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'ar2diff[dev]'")
    if recipe.rl is not None and any(reward.name == "code" for reward in recipe.rl.rewards):
        request.getfixturevalue("sandboxed")
    seen, train = [], Running.train
    monkeypatch.setattr(Running, "train", lambda self, **k: seen.append(self) or train(self, **k))
    what, out = CATALOGUE[name].verb, tmp_path / "out"
    if sees(name):
        model, data = request.getfixturevalue("seeing")
    else:
        model, data = base_of(name, recipe), write_jsonl("rows.jsonl", ROWS[what](recipe))
    record = run(
        monkeypatch, capsys, what, model, "--recipe", name, "--data", data, "--output-dir", out,
        *sizes(recipe),
    )  # fmt: skip
    (trainer,) = seen
    assert trainer.state.global_step == 2 and record["tokens"] > 0
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all("loss" in row and (what == "rl" or row["loss"] > 0) for row in rows)
    assert ("reward" in rows[0]) == (what == "rl")
    assert (record["eval"] is not None) == bool(recipe.eval.steps)
    check_features(trainer, recipe)
    assert is_adapter(out) == (recipe.peft is not None)
    tuned = load_checkpoint(str(out))
    assert (tuned.draft is not None) == (what == "draft")
    if what != "draft":
        assert tuned.spec.attention == recipe.convert.attention
        assert tuned.spec.ar_mode == (recipe.objective.ar_weight > 0 or what == "rl")
    if recipe.peft is not None:
        trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and not any("base_layer" in n for n in trained)
        assert json.loads((out / ADAPTER_CONFIG).read_text())["r"] == recipe.peft.r
    else:
        assert read_spec(out) == tuned.spec


def check_features(trainer, recipe) -> None:
    """What costs or saves memory is really on, on a CPU too."""
    args, model = trainer.args, trainer.model
    assert args.bf16 == (recipe.train.precision == "bf16")
    assert (trainer.accelerator.mixed_precision == "bf16") == args.bf16
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert bool(checkpointed) == recipe.train.gradient_checkpointing
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds) == (recipe.quantization is not None)
    assert hasattr(model, "peft_config") == (recipe.peft is not None)


@EVERY_RECIPE
def test_a_header_says_command_hardware_and_memory(name):
    text, entry = header(name), CATALOGUE[name]
    assert commands(name), "no command"
    assert entry.model and len(entry.model) <= 24, "no model, or no short name of one"
    assert re.fullmatch(r"\d CPU cores|\w+ \d\d GB GPUs?", entry.hardware), "no hardware"
    assert entry.measured == ("not run" not in entry.description), "run or not?"
    assert re.search(r"\d GB of memory|Memory: (\d+ GB|not measured)", text), "no memory"


@EVERY_RECIPE
def test_what_is_published_of_a_cpu_was_computed_in_float32(name):
    if re.search(r"\d CPU cores", header(name)) and "any model" not in header(name):
        assert load_recipe(name).train.precision == "fp32"


@EVERY_RECIPE
def test_the_commands_of_a_header_exist(name):
    for command in commands(name):
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif command[0] == "python":
            check_module(command[1:])
        else:
            check_command(command[1:])
    if not any(command[0] == "make" for command in commands(name)):
        assert any(name in command for command in commands(name)), "no command has this recipe"


def check_command(arguments: list[str]) -> None:
    """Parsed by the command line itself, which knows verbs and options; recipe, overrides and
    launch by what the verb does with them."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    given = command.make_context(arguments[0], arguments[1:]).params
    if "recipe" in given:
        load_recipe(given["recipe"], given["overrides"] or [])
    assert given.get("launch") in (None, *STRATEGIES)
    assert (given.get("launch") is None) == (given.get("num_processes") is None)


def check_module(arguments: list[str]) -> None:
    """A module that runs, and has the options."""
    assert arguments[0] == "-m"
    command = [sys.executable, "-m", arguments[1], "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = [word for word in arguments[2:] if word.startswith("--")]
    assert all(option in said.split() for option in options), options
    for option, value in itertools.pairwise(arguments):
        if option == "--recipe":
            load_recipe(value)


# Recipes that are wrong or hostile

BOMB = "a: &a [1, 1, 1, 1]\nb: &b [*a, *a, *a, *a]\n"
HOSTILE = [  # an override, or a file; what is said of it
    ("rl.preset=[d1]", "rl.preset: Input should be"),
    ("rl.preset={a: 1}", "rl.preset: Input should be"),
    ("train.seed=2020-13-45", "train.seed: Input should be a valid integer"),
    ("train.seed=2020-12-25", "(got '2020-12-25')"),
    ("train.seed=" + "9" * 5000, "Exceeds the limit (4300 digits)"),
    ("train.seed=" + "x" * 5000, "train.seed: Input should be a valid integer"),
    ("data.sources=" + "[" * 3000, "nested"),
    ("data.sources=" + "[" * 60 + "]" * 60, "nested more than 50 levels deep"),
    ("rl.rewards=[&a [1], *a]", "aliases (*a) are not supported"),
    ("train={1: 2}", "train.1: Keys should be strings"),
    ("convert=3", "convert: Input should be a valid dictionary"),
    ("train.seed.x=3", "train.seed: Input should be a valid integer"),
    ("a" * 5000 + "=3", "is not a key of the top level"),
    ("a." * 5000 + "b=3", "is not a recipe key"),
    ("train.save_steps=" + "9" * 23, "train.save_steps: must lie between"),
    ("rl.epsilon=1e308", "rl.epsilon: must lie between"),
    ("train.per_device_train_batch_size=1000000000", "less than or equal to 65536"),
    ("modle=x", "modle is not a key of the top level of a recipe |"),
    ("train.lr=3", "; did you mean train.learning_rate? |"),
    ("train.learning_rat=3", "; did you mean train.learning_rate? |"),
    ("max_steps=3", "; did you mean train.max_steps? |"),
    ("data.sources=[{pth: a}]", "; did you mean data.sources.0.path? |"),
    (BOMB.encode(), "aliases (*a) are not supported"),
    (b"train: {seed: " + b"[" * 3000, "nested"),
    (b"[1, 2]", "is not a mapping of sections"),
    (b"\xff\xfe", "cannot be read: "),
    (b"a: " + b"x" * 1_000_001, "it is larger than 1,000,000 bytes"),
    (b"a: [", "is not valid YAML"),
    *((b"description: " + value, "(!!)") for value in (b"!!int ''", b"!!bool x", b"!!float ''")),
    (b"description: !!timestamp x", "timestamp"),
]


@pytest.mark.parametrize("given, said", HOSTILE, ids=lambda value: str(value)[:24])
def test_a_wrong_recipe_is_two_short_lines(tmp_path, given, said):
    name, overrides = "demo", [given]
    if isinstance(given, bytes):
        (tmp_path / "a.yaml").write_bytes(given)
        name, overrides = str(tmp_path / "a.yaml"), []
    with pytest.raises(Ar2DiffError) as error:
        load_recipe(name, overrides)
    assert said in f"{error.value.what} |"
    assert len(error.value.what) <= 400 and "\n" not in error.value.what


@pytest.mark.parametrize("later", ["convert=x", "convert=[1]", "convert={}", "convert=null"])
def test_an_override_may_replace_the_section_of_one_before(later):
    try:
        load_recipe("demo", ["convert.attention=full", later])
    except Ar2DiffError as error:
        assert error.what.startswith("demo: convert: ")


def test_every_field_of_a_recipe_is_described():
    assert [name for name, _, _, text in describe_fields(Recipe) if not text] == []
