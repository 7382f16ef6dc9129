"""The command line: help, JSON, dry runs, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main

from ar2diff.config import Recipe, field_names, load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    ["adapt"],
    ["generate"],
    ["eval"],
    ["check"],
    ["doctor"],
    ["recipes", "ls"],
    ["recipes", "show"],
    ["recipes", "cp"],
    ["recipes", "validate"],
    ["config", "schema"],
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit code and stdout."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def converted(tiny_checkpoint, tmp_path_factory):
    from ar2diff.training.adapt import adapt

    folder = tmp_path_factory.mktemp("converted") / "model"
    adapt(str(tiny_checkpoint), load_recipe(None, ["train.max_steps=0"]), folder)
    return folder


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_shows_an_example(run, verb):
    code, out = run(*verb, "--help")
    assert code == 0
    assert "Example: ar2diff" in out


@pytest.mark.parametrize(
    "arguments",
    (
        ["--help"],
        ["adapt", "--help"],
        ["recipes", "ls"],
        ["adapt", "x", "train.learning_rat=1"],
    ),
    ids=" ".join,
)
def test_help_and_recipe_errors_import_no_torch(arguments):
    code = (
        "import sys; sys.argv = ['ar2diff', *sys.argv[1:]]\n"
        "from ar2diff.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_dry_run_says_the_plan_and_writes_nothing(run, tiny_checkpoint, write_jsonl, tmp_path):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 8)
    code, out = run(
        "adapt",
        tiny_checkpoint,
        "--data",
        data,
        "--output-dir",
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--max-steps",
        5,
    )
    plan = json.loads(out)
    assert code == 0
    assert plan["steps"] == 5
    assert plan["diffusion"]["mask_token_id"] == 259
    assert not (tmp_path / "out").exists()


def test_generate_json_has_what_it_promises(run, converted):
    code, out = run("generate", converted, "--prompt", "the cat", "--max-new-tokens", 9, "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {
        "text",
        "token_ids",
        "new_tokens",
        "forwards",
        "tokens_per_forward",
        "seconds",
    }
    assert result["new_tokens"] == len(result["token_ids"]) <= 9
    assert 259 not in result["token_ids"]


def test_generate_goes_over_a_file_of_prompts(run, converted, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    _, out = run(
        "generate",
        converted,
        "--prompts-file",
        tmp_path / "prompts.txt",
        "--json",
        "--max-new-tokens",
        4,
    )
    assert len(json.loads(out)["results"]) == 2


def test_eval_json_has_bound_and_ar_nll(run, converted, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    _, out = run("eval", converted, "--data", data, "--length", 16, "--samples", 4, "--json")
    result = json.loads(out)
    assert result["rows"] == 3
    assert result["bound"]["standard_error"] > 0
    assert result["ar_nll"]["bits_per_byte"] > 0


def test_eval_of_an_unconverted_model_has_the_ar_nll_alone(run, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}])
    _, out = run("eval", tiny_checkpoint, "--data", data, "--length", 16, "--json")
    assert "ar_nll" in json.loads(out)
    assert "bound" not in json.loads(out)


def test_check_finds_a_sound_conversion_sound(run, converted):
    code, out = run("check", converted, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True


def test_check_finds_a_causal_flag_that_a_block_model_lacks(run, tiny_checkpoint, tmp_path):
    from ar2diff.training.adapt import adapt

    recipe = load_recipe(None, ["train.max_steps=0", "convert.attention=block_causal"])
    adapt(str(tiny_checkpoint), recipe, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.pop("is_causal") is False
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    code, out = run("check", tmp_path / "model", "--json")
    assert code == 2
    assert [f["what"] for f in json.loads(out)["findings"] if not f["ok"]] == [
        "config.is_causal is false, as block_causal needs"
    ]


def test_doctor_reports_json_and_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out = run("doctor", "--json")
    assert code == 0
    assert json.loads(out)["hub_token"] == "set"
    assert "hf_secret" not in out


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is(name):
    assert load_recipe(name).description


def test_recipes_cp_does_not_overwrite(run, tmp_path):
    assert run("recipes", "cp", "demo", tmp_path / "my.yaml")[0] == 0
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe("demo")
    assert run("recipes", "cp", "demo", tmp_path / "my.yaml")[0] == 2


def test_every_recipe_field_is_read_somewhere():
    sources = (
        "\n".join(p.read_text() for p in (ROOT / "ar2diff").rglob("*.py") if p.name != "config.py")
        + (ROOT / "cli" / "recipes.py").read_text()
    )
    unread = [
        n
        for n in field_names(Recipe)
        if f".{n.split('.')[-1]}" not in sources and n.split(".")[1:2] != ["lr_scale"]
    ]
    assert not unread


def test_number_written_as_1e_3_is_a_number():
    assert load_recipe(None, ["train.learning_rate=1e-3"]).train.learning_rate == pytest.approx(
        1e-3
    )


def test_version(run):
    assert run("--version") == (0, "0.1.0\n")


def test_no_model_is_asked_for_more_than_float32(converted):
    from ar2diff.checkpoint import load_checkpoint

    assert load_checkpoint(str(converted)).model.dtype == torch.float32
