"""The command line: help, JSON, dry runs, and what it does not import."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ar2diff.cli import main as main_module
from ar2diff.cli.main import main
from ar2diff.cli.output import report
from ar2diff.cli.recipes import aligned

from ar2diff.config.recipe import Recipe, field_names, load_recipe, parse_recipe, recipe_names
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.results import write_results

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("adapt", "sft", "rl", "draft")
VERBS = (
    ["adapt"],
    ["sft"],
    ["rl"],
    ["draft"],
    ["generate"],
    ["chat"],
    ["eval"],
    ["check"],
    ["merge"],
    ["push"],
    ["card"],
    ["import"],
    ["export"],
    ["doctor"],
    ["memory"],
    ["recipes", "ls"],
    ["recipes", "show"],
    ["recipes", "cp"],
    ["config", "schema"],
    ["config", "show"],
    ["config", "validate"],
)


@pytest.fixture
def run(run_both):
    """Run the command line in this process: exit code and stdout."""
    return lambda *arguments: run_both(*arguments)[:2]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_shows_an_example_of_its_own(run, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "300")  # where nothing is wrapped
    code, out = run(*verb, "--help")
    assert code == 0
    assert re.search(rf"^ Example: ar2diff {' '.join(verb)}( |$)", out, re.MULTILINE)
    others = {"adapt", "sft", "rl", "draft"} - {*verb}
    assert verb[0] not in TRAINING or not others & {*re.findall(r"\b[a-z]+\b(?! adapter)", out)}


def test_the_list_of_commands_is_in_groups_and_wrapped_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out = run("--help")
    assert code == 0
    assert "error, and the negative log-likelihood of the AR mode." in out
    groups = re.findall(r"─ ([A-Z][\w ]+?) ─", out)
    assert groups == ["Options", main_module.TRAIN, main_module.GENERATE, main_module.MOVE,
                      main_module.PREPARE]  # fmt: skip


@pytest.mark.parametrize("arguments", [["config", "schema"], ["doctor"]], ids=" ".join)
def test_values_are_shown_as_a_recipe_writes_them(run, arguments):
    code, out = run(*arguments)
    assert code == 0
    assert re.findall(r"\bNone\b|\bTrue\b|\bFalse\b|\(\)", out) == []


def test_a_report_shows_no_python_values(capsys):
    sources = [{"path": "a.jsonl", "weight": None, "split": "train"}]
    report({"sources": sources, "columns": {"prompt": None}, "packing": True}, as_json=False)
    assert capsys.readouterr().out == "sources:\n  path: a.jsonl, split: train\npacking: true\n"


def test_recipes_are_listed_in_columns(run):
    _, out = run("recipes", "ls")
    heads, *lines = out.splitlines()
    assert heads.split() == ["recipe", "verb", "model", "hardware", "measured", "description"]
    assert [line.split()[0] for line in lines] == recipe_names()
    described = {line[heads.index("description") :] for line in lines}
    assert described == {load_recipe(name).description for name in recipe_names()}
    _, out = run("recipes", "ls", "--run")
    measured = [line for line in lines if line[heads.index("measured") :].startswith("yes")]
    assert [line.split()[0] for line in out.splitlines()[1:]] == [m.split()[0] for m in measured]
    assert 5 < len(measured) < len(lines)


def test_a_list_of_recipes_fits_the_terminal():
    rows = [("a", "yes", "says what it is for at some length"), ("name", "no", "short")]
    assert aligned(rows, None) == ["a     yes  says what it is for at some length",
                                   "name  no   short"]  # fmt: skip
    assert aligned(rows, 40) == ["a     yes  says what it is for at some …", "name  no   short"]
    assert aligned(rows, 20) == ["a     yes", "name  no   short"]


def test_config_show_resolves_a_recipe_and_config_validate_checks_it(run):
    _, out = run("config", "show", "demo", "train.seed=3")
    assert parse_recipe(yaml.safe_load(out), "shown") == load_recipe("demo", ["train.seed=3"])
    assert run("config", "validate", "demo", "train.seed=3") == (0, "demo: valid\n")
    assert run("config", "validate", "demo", "train.seed=x")[0] == 2


@pytest.mark.parametrize("flag", ["-c", "--config", "--recipe"])
def test_a_recipe_is_given_with_any_of_three_flags(run_both, flag):
    _, _, said = run_both("sft", "m", flag, "no-such", "--data", "a")
    assert "there is no recipe 'no-such'" in said


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("ar2diff dra", ["draft"]),
        ("ar2diff adapt m --overw", ["--overwrite"]),
        ("ar2diff sft m --recipe stories-", ["stories-chat"]),
        ("ar2diff adapt m train.learn", ["train.learning_rate="]),
    ],
)
def test_the_shell_completes_verbs_options_recipes_and_keys(run, monkeypatch, typed, completed):
    monkeypatch.setenv("_AR2DIFF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert run()[1].split() == completed


def test_a_wrong_choice_is_told_without_the_words_of_a_library(run_both):
    code, _, said = run_both("generate", "x", "--prompt", "a", "--mode", "sideways")
    assert code == 2
    assert "Value error" not in said and "'sideways' is not one of" in said


@pytest.mark.parametrize(
    "arguments",
    (
        ["--help"],
        ["adapt", "--help"],
        ["recipes", "ls"],
        ["adapt", "x", "train.learning_rat=1"],
        ["chat", "--help"],
        ["generate", "x"],
        ["generate", "x", "--prefix", "a", "--length", "0"],
        ["generate", "x", "--prompt", "a {mask:0} b"],
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


RESULT = ["prompt", "text", "token_ids", "new_tokens", "forwards", "tokens_per_forward", "seconds"]


@pytest.mark.parametrize("name", ("prompts.txt", "prompts.jsonl", "prompts.jsonl.gz"))
def test_generate_goes_over_a_file_of_prompts(run, converted, tmp_path, name):
    prompts = ["the dog barked at the moon", "the cat", "a longer text about the dog"]
    text = "".join(
        f"{json.dumps({'prompt': p}) if 'jsonl' in name else p}\n\n" for p in prompts
    ).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    arguments = ("--prompts-file", tmp_path / name, "--max-new-tokens", 4, "--batch-size", 2)
    arguments += ("--mode", "diffusion")
    _, out = run("generate", converted, *arguments, "--json")
    results = json.loads(out)["results"]
    assert [result["prompt"] for result in results] == prompts
    code, out = run("generate", converted, *arguments, "--output", tmp_path / "out.jsonl")
    assert (code, out) == (0, "")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(result) for result in written] == [RESULT] * 3
    for one, other in zip(results, written, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert not list(tmp_path.glob("*.partial"))


def test_output_is_replaced_with_overwrite_alone(run, converted, tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    arguments = ("--prompt", "the cat", "--max-new-tokens", 4, "--output", tmp_path / "out.jsonl")
    assert run("generate", converted, *arguments)[0] == 2
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert run("generate", converted, *arguments, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "the cat"


def test_output_that_cannot_be_written_leaves_the_old_one(run, converted, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out.jsonl").write_text("old")
    monkeypatch.setattr("ar2diff.generation.results.os.fsync", full)
    arguments = ("--prompt", "the cat", "--max-new-tokens", 4, "--output", tmp_path / "out.jsonl")
    assert run("generate", converted, *arguments, "--overwrite")[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_stops_the_next(run_both, converted, tmp_path):
    """Killed at 20 moments of writing its file, each in a fork of this process."""
    (tmp_path / "in.txt").write_text("the cat\nthe dog\na longer prompt\n")
    out = tmp_path / "out.jsonl"
    command = ("generate", converted, "--prompts-file", tmp_path / "in.txt",
               "--max-new-tokens", 2, "--output", out)  # fmt: skip

    def killed(moment: int) -> int:
        """Run in a fork that kills itself at an event of the writing; returns how many events there
        were if it did not get that far."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            events, writing = 0, False

            def count(frame, event, _argument):
                nonlocal events, writing
                own = frame.f_code is write_results.__code__
                writing = writing or (own and event == "call")
                events += writing
                if events == moment and writing:
                    os.kill(os.getpid(), signal.SIGKILL)
                writing = writing and not (own and event == "return")

            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv = ["ar2diff", *map(str, command)]
            sys.setprofile(count)
            try:
                main()
            finally:
                os.write(write, str(events).encode())
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            return int(pipe.read() or -1)

    def texts() -> list[str]:
        return [json.loads(line)["text"] for line in out.read_text().splitlines()]

    total = killed(0)
    complete, states = texts(), set()
    assert len(complete) == 3
    for moment in [1, total, *random.Random(0).sample(range(2, total), 18)]:
        out.unlink(missing_ok=True)
        assert killed(moment) == -1
        states.add((out.exists(), out.with_name("out.jsonl.partial").exists()))
        code, _, err = run_both(*command)
        assert code == 0 or (code == 2 and "already exists" in err)
        assert texts() == complete
        assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]
    assert states == {(False, False), (False, True), (True, False)}


def test_generate_prints_text_and_figures_apart(run_both, converted):
    arguments = ("generate", converted, "--prompt", "the cat", "--max-new-tokens", 9)
    code, out, err = run_both(*arguments)
    assert code == 0
    assert out.startswith("the cat")
    figures = r"\[9 tokens, \d+ forwards, [\d.]+ tokens per forward, \d+ tokens/s, [\d.]+ s\]\n"
    assert re.fullmatch(figures, err)
    assert run_both(*arguments, "--stream")[:2] == (0, out)


def test_generate_fills_a_gap_of_the_likeliest_length(run_both, converted):
    gap = ("--prefix", "the cat", "--suffix", " on the mat", "--length", "2,4", "--length", 3)
    _, out, err = run_both("generate", converted, *gap, "--json")
    result = json.loads(out)
    assert sorted(c["length"] for c in result["candidates"]) == [2, 3, 4]
    assert result["text"].startswith("the cat")
    assert result["text"].endswith(" on the mat")
    assert "of the 11 suffix tokens lie in later blocks than the gap, which causal_context" in err
    assert run_both("generate", converted, *gap)[1] == result["text"] + "\n"


def test_the_default_mode_of_a_folder_is_known_before_it_is_loaded(
    run_both, converted, convert_tiny
):
    ask = ("--prompt", "the cat", "--max-new-tokens", 4, "--draft-length", 2)
    assert run_both("generate", converted, *ask)[0] == 0
    code, _, said = run_both("generate", convert_tiny("convert.attention=block_causal"), *ask)
    assert code == 2 and "--draft-length only works with --mode speculative" in said


def test_only_options_that_are_given_become_settings(run, converted, monkeypatch):
    seen = []

    def complete_all(checkpoint, prompts, batch_size, images, **settings):
        seen.append(settings)
        return iter(())

    monkeypatch.setattr("ar2diff.api.model.complete_all", complete_all)
    run("generate", converted, "--prompt", "a")
    run(
        "generate", converted, "--prompt", "a", "--cache", "none", "--stop", ".", "--stop", "!",
        "--top-k", 5, "--temperature", 0,
    )  # fmt: skip
    assert seen == [
        {},
        {
            "cache_implementation": "none",
            "stop_strings": [".", "!"],
            "top_k": 5,
            "temperature": 0.0,
        },
    ]


def test_chat_answers_lines_of_stdin(run_both, converted, monkeypatch):
    lines = "the cat\n/set thresold=1\n/mode ar\nthe dog\n/nonsense\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, out, err = run_both("chat", converted, "--max-new-tokens", 6)
    assert code == 0
    assert out.count("\n") >= 2
    assert err.count("tokens per forward") == 2
    assert err.count("no chat template") == 1
    assert "error: there is no option 'thresold'; did you mean threshold?\n" in err
    assert "error: there is no command /nonsense" in err


def test_eval_json_has_bound_and_ar_nll(run, converted, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    _, out = run("eval", converted, "--data", data, "--length", 16, "--samples", 4, "--json")
    result = json.loads(out)
    assert result["rows"] == 3
    assert result["bound"]["standard_error"] > 0
    assert result["ar_nll"]["bits_per_byte"] > 0


def test_eval_of_text_without_a_token_to_score(run_both, converted, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "<|mask|>" * 20}] * 2)
    code, out, err = run_both("eval", converted, "--data", data, "--length", 8)
    assert (code, out) == (2, "")
    assert re.fullmatch("error: --data .*: no token can be scored.*\n  fix: .*\n", err)


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
        "config.is_causal is false, as block_causal attention needs"
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
        if f".{n.split('.')[-1]}" not in sources
        and n.split(".")[1:2] != ["lr_scale"]
        and n != "rl.preset"  # which fills in the others
    ]
    assert not unread


def test_number_written_as_1e_3_is_a_number():
    assert load_recipe(None, ["train.learning_rate=1e-3"]).train.learning_rate == pytest.approx(
        1e-3
    )


def test_version(run):
    assert run("--version") == (0, "0.1.0\n")


def test_auto_is_the_stored_dtype_on_a_gpu_and_float32_on_a_cpu():
    from ar2diff.checkpoint.model import _dtype

    stored = {"a": "BF16", "b": "BF16", "c": "F32"}
    assert _dtype("auto", stored, True) == torch.bfloat16
    assert _dtype("auto", stored, False) == torch.float32
    assert _dtype("stored", stored, False) == torch.bfloat16


@pytest.mark.parametrize("verb", ["generate", "chat", "eval", "check"])
def test_every_verb_that_decodes_takes_a_dtype(run_both, converted, monkeypatch, write_jsonl, verb):
    from ar2diff.checkpoint import io as loading

    asked = []

    def load(path, attention, device, quantization, dtype):
        asked.append((device, dtype))
        raise Ar2DiffError("loaded", "no more is wanted")

    monkeypatch.setattr(loading, "load_model", load)
    more = {"generate": ["--prompt", "a"], "eval": ["--data", str(write_jsonl("a.jsonl", []))]}
    for chosen in ([], ["--dtype", "bfloat16"]):
        assert "loaded" in run_both(verb, converted, *more.get(verb, []), *chosen)[2]
    assert asked == [("auto", "auto"), ("auto", "bfloat16")]


def test_no_model_is_asked_for_more_than_float32(converted):
    from ar2diff.checkpoint.io import load_checkpoint

    assert load_checkpoint(str(converted)).model.dtype == torch.float32
