"""`rl` from the command line: what it refuses, what rewards that fail leave behind, a dry run,
quantised bases."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main
from conftest import besides_progress
from safetensors.torch import load_file

import ar2diff
from ar2diff.checkpoint.adapters import add_adapter
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.training.journal import read_metrics
from ar2diff.training.plan import Plan
from ar2diff.training.rl import make_trainer

ROWS = [{"prompt": f"say {n}", "answer": str(n)} for n in range(8)]
SETTINGS = [
    "rl.rewards=[{name: exact}]",
    "rl.num_generations=4",
    "rl.max_completion_length=8",
    "train.per_device_train_batch_size=8",
    "train.logging_steps=1",
    "train.max_steps=1",
]
BLOCKS = "convert.block_length=4"


@pytest.fixture
def rl(monkeypatch, capsys, tmp_path, write_jsonl):
    """Run `ar2diff rl` into `out`: (exit code, stdout, lines of stderr besides its progress)."""

    def run(model: object, *arguments: object, rows: object = ROWS, settings=SETTINGS):
        data = write_jsonl("rows.jsonl", rows)
        line = ["rl", model, "--data", data, "--output-dir", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, [*line, *settings, *arguments])])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return stop.value.code, said.out, besides_progress(said.err)

    return run


@pytest.fixture
def refused(rl):
    """Run `ar2diff rl`; it must exit with 2 and print two lines, which are returned."""

    def run(*arguments: object, **more: object) -> str:
        code, out, lines = rl(*arguments, **more)
        assert (code, out, len(lines)) == (2, "", 2), lines
        assert lines[0].startswith("error: ") and lines[1].startswith("  fix: ")
        return "\n".join(lines)

    return run


# Refused before the model is loaded


MESSAGES = [{"role": "user", "content": "say 1"}]
NEAR = "there is no reward 'exakt'\n  fix: did you mean exact?"
MISTAKES = [  # overrides, rows, part of what is said
    (["rl.rewards=[]"], ROWS, "rl.rewards is empty"),
    (["rl.rewards=[{name: exakt}]"], ROWS, NEAR),
    (["rl.rewards=[{name: './nowhere.py:f'}]"], ROWS, "there is no file ./nowhere.py"),
    (["rl.rewards=[{name: exact, args: {extrac: boxed}}]"], ROWS, "did you mean"),
    ([], [{"question": "a"}], "row 1 has no prompt that is text or messages (it has question)"),
    ([], [*ROWS, {"prompt": ""}], "row 9 has no prompt"),
    ([], [{"prompt": [{"role": "user"}]}], "row 1 has no prompt"),
    ([], [{"prompt": ["a"]}], "row 1 has no prompt"),
    (["data.columns.prompt=task"], ROWS, "has no column 'task' (it has prompt, answer)"),
    ([], [*ROWS, {"prompt": MESSAGES}], "some prompts are texts and some are lists of messages"),
    ([], [{"prompt": "a", "prompts": "b"}], "the column name 'prompts' is reserved by trl"),
    ([], [], "is empty"),
    (["train.per_device_train_batch_size=6"], ROWS, "a generation step produces 6 completions"),
    (["rl.sampler.temperature=0"], ROWS, "sampler.temperature must be above 0"),
    (["rl.sampler.nonsense=1"], ROWS, "nonsense"),
    (["train.compile=true"], ROWS, "train.compile cannot be used with rl"),
    (["rl.sampler.max_new_tokens=4"], ROWS, "sampler.max_new_tokens cannot be set for rollouts"),
    (["rl.sampler.mode=ar"], ROWS, "rl.sampler.mode 'ar' cannot be scored"),
    (["peft.r=4", "peft.dropout=0.1"], ROWS, "peft.dropout makes two scores under the same "
    "policy differ"),
    (["rl.draft=x"], ROWS, "draft can only be set with estimator ar"),
    (["rl.estimator=ar", "rl.draft=./nowhere"], ROWS, "./nowhere does not exist"),
    (["rl.estimator=ar", "rl.draft=."], ROWS, "rl.draft . is not a draft adapter"),
    (["rl.num_generation=4"], ROWS, "did you mean rl.num_generations?"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, rows, message", MISTAKES)
def test_mistakes_are_said_before_the_model_is_loaded(
    refused, convert_tiny, tmp_path, monkeypatch, overrides, rows, message
):
    model = convert_tiny(BLOCKS)
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    assert message in refused(model, *overrides, rows=rows)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_rl_and_a_model_that_is_not_converted(
    refused, convert_tiny, tiny_checkpoint, tmp_path, monkeypatch
):
    model = convert_tiny(BLOCKS)
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    assert "the recipe has no rl section" in refused(model, settings=[])
    said = refused(tiny_checkpoint)
    assert "is not converted" in said and f"run 'ar2diff adapt {tiny_checkpoint}" in said
    assert not (tmp_path / "out").exists()


TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users alone') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


def test_prompts_that_do_not_fit_the_model(refused, convert_tiny, tmp_path):
    model = convert_tiny(BLOCKS)
    long = [*ROWS, {"prompt": "x" * 600}]
    said = refused(model, rows=long)
    assert "prompt 9 has 601 tokens" in said and "exceeds the model's context of 512" in said
    assert "the tokenizer has no chat template" in refused(model, "rl.chat=true")
    (tmp_path / "a.jinja").write_text(TEMPLATE)
    said = refused(
        model, f"data.chat_template={tmp_path / 'a.jinja'}",
        rows=[{"prompt": MESSAGES}, {"prompt": [{"role": "system", "content": "a"}]}],
    )  # fmt: skip
    assert "cannot render prompt 2: users alone" in said
    assert not (tmp_path / "out").exists()


def test_a_column_that_a_reward_reads_and_the_data_has_not(refused, convert_tiny, tmp_path):
    said = refused(convert_tiny(BLOCKS), rows=[{"prompt": "a", "solution": 1}] * 8)
    assert "reward exact reads column 'answer', which the data does not have (it has" in said
    assert not (tmp_path / "out").exists()


# Rewards that fail


JUDGE = """
from pathlib import Path

def judge(completions, trainer_state, switch, **columns):
    rewards = [float(len(c) % 5) for c in completions]
    how = Path(switch).read_text() if Path(switch).exists() else ""
    if trainer_state.global_step < 2 or not how:
        return rewards
    if how == "hang":
        while True:
            pass
    return {"raise": lambda: 1 / 0, "none": lambda: [None] * 8, "short": lambda: rewards[1:],
            "nan": lambda: [*rewards[:3], float("nan"), *rewards[4:]]}[how]()
"""
FAILING = {
    "raise": "reward judge raised ZeroDivisionError: division by zero in a batch whose first",
    "none": "reward judge returned None for all rows in a batch whose first prompt is 'say ",
    "nan": "reward judge returned nan at row 3 of a batch, prompt 'say ",
    "short": "reward judge returned 7 values for 8 completions",
}


@pytest.mark.parametrize("how", FAILING)
def test_a_reward_that_fails_leaves_the_last_checkpoint_to_go_on_from(
    rl, refused, convert_tiny, tmp_path, how
):
    (tmp_path / "judge.py").write_text(JUDGE)
    switch, out = tmp_path / "switch", tmp_path / "out"
    switch.write_text(how)
    reward = f"{{name: '{tmp_path / 'judge.py'}:judge', args: {{switch: '{switch}'}}}}"
    run = [convert_tiny(BLOCKS), f"rl.rewards=[{reward}]", "--max-steps", 4, "train.save_steps=2"]
    assert FAILING[how] in refused(*run)
    assert [p.name for p in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "config.json").exists()
    if how != "raise":
        return
    switch.unlink()
    assert rl(*run, "--resume")[0] == 0
    resumed = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / "before")
    assert rl(*run)[0] == 0
    assert (out / "model.safetensors").read_bytes() == resumed


def test_a_reward_that_hangs_does_not_end_the_run(rl, convert_tiny, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "switch").write_text("hang")
    judge, switch = tmp_path / "judge.py", tmp_path / "switch"
    reward = f"{{name: '{judge}:judge', time_limit: 0.5, args: {{switch: '{switch}'}}}}"
    run = [convert_tiny(BLOCKS), f"rl.rewards=[{reward}]", "--max-steps", 4]
    code, _, lines = rl(*run)
    assert code == 0 and (tmp_path / "out" / "config.json").exists()
    assert [line for line in lines if "judge" in line] == [
        "warning: reward judge took longer than 0.5 seconds and was stopped; its values "
        "for this batch are left out. This warning is shown once."
    ]


def test_a_row_that_a_reward_of_ours_cannot_judge_is_named(refused, convert_tiny, tmp_path):
    rows = [{"prompt": f"p{n}", "puzzle": "10", "solution": "12"} for n in range(2)]
    rows[1]["solution"] = "123"
    said = refused(convert_tiny(BLOCKS), "rl.rewards=[{name: sudoku}]", rows=rows)
    assert "reward sudoku raised ValueError: column puzzle has 2 cells" in said
    assert re.search("at row [04] of a batch, prompt 'p1'", said)
    assert not (tmp_path / "out").exists()


def test_without_a_sandbox_code_is_not_run(refused, convert_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(convert_tiny(BLOCKS), "rl.rewards=[{name: code}]")
    assert "needs bubblewrap, which is not installed" in said and "apt-get" in said


def test_real_tests_that_no_completion_passes(rl, convert_tiny, shared_data, sandboxed):
    path = shared_data("humaneval/HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    rows = [row for row in rows if len(row["prompt"].encode()) < 300]  # tokens of the tiny model
    sizes = [*SETTINGS[2:], "train.max_steps=2", "train.gradient_accumulation_steps=1"]
    sizes += ["rl.num_generations=2", "train.per_device_train_batch_size=4"]
    recipe = ["--recipe", "humaneval-rl", "rl.num_iterations=1"]
    code, said, _ = rl(convert_tiny(BLOCKS), *recipe, rows=rows, settings=sizes)
    assert code == 0 and len(rows) > 10
    assert "warning: no completion has earned a reward in 2 steps" in said


# A dry run


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("launch", [[], ["--launch", "ddp", "--num-processes", "2"]])
def test_a_dry_run_shows_the_first_prompt_and_writes_nothing(
    rl, convert_tiny, tmp_path, monkeypatch, launch, chat
):
    monkeypatch.chdir(tmp_path)
    settings = [*SETTINGS, "rl.rewards=[{name: exact}, {name: length, args: {target: 3}}]"]
    settings += ["rl.chat=true", "data.chat_template=plain"] if chat else []
    code, out, lines = rl(convert_tiny(BLOCKS), "--dry-run", "--json", *launch, settings=settings)
    assert (code, lines) == (0, [])
    plan = json.loads(out)
    text = "<s>User: say 0\nAssistant:" if chat else "<s>say 0"
    assert plan["first_prompt"]["text"].strip() == text
    assert plan["first_prompt"]["tokens"] == len(plan["first_prompt"]["text"]) - 2  # <s> is one
    assert plan["prompts"] == 8 and plan["rewards"] == ["exact", "length"]
    assert plan["recipe"]["rl"]["num_generations"] == 4
    assert set(plan["memory"]) and ("launch" in plan) == bool(launch)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    if not (launch or chat):
        shown = rl(convert_tiny(BLOCKS), "--dry-run", settings=settings)[1]
        assert "first prompt:\n  text: <s>say 0\n  tokens: 6\n" in shown


# A quantised base


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_qlora_trains_the_adapter_in_float32_and_the_base_not_at_all(convert_wide, tmp_path):
    more = ["peft.r=4", "quantization.kind=nf4", "train.max_steps=3", "train.learning_rate=0.01"]
    recipe = load_recipe(None, [*SETTINGS, *more])
    checkpoint = load_checkpoint(str(convert_wide(BLOCKS)), quantization=recipe.quantization)
    add_adapter(checkpoint, recipe)
    parameters = dict(checkpoint.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = make_trainer(
        Plan(checkpoint, recipe, ROWS, make_trainer), [reward], tmp_path / "run", []
    )
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert all("reward" in log for log in trainer.state.log_history[:3])
    for name, parameter in parameters.items():
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    kept = load_file(Path(saved) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.parametrize("more", [["objective.kind=ar"], ["peft.r=2"]])
def test_a_draft_adapter_writes_the_same_completions(
    tiny_checkpoint, convert_tiny, write_jsonl, tmp_path, more
):
    """The run learns from the same texts, though the model moves away from the adapter."""
    model = convert_tiny(BLOCKS) if "peft.r=2" in more else tiny_checkpoint
    tiny = ["draft.block_length=4", "draft.rank=2", "draft.head_rank=2", "data.max_length=16"]
    ar2diff.draft(
        model, None, tmp_path / "draft", max_steps=1,
        data=write_jsonl("texts.jsonl", [{"text": "say abcdefgh"}]),
        overrides=[*tiny, "train.warmup_steps=0", "eval.steps=0"],
    )  # fmt: skip
    settings = [*SETTINGS, "rl.estimator=ar", "train.learning_rate=1e-2", "train.max_steps=2",
                "rl.rewards=[{name: regex, args: {pattern: '(?s).*[A-M].*'}}]", *more]  # fmt: skip
    data, runs = write_jsonl("rows.jsonl", ROWS), []
    for draft in ([], [f"rl.draft={tmp_path / 'draft'}", "rl.sampler.draft_length=3"]):
        out = tmp_path / f"out{len(runs)}"
        ar2diff.rl(model, None, out, data=data, overrides=[*settings, *draft])
        steps = read_metrics(out)
        rates = [step["tokens_per_forward"] for step in steps]
        assert any(0 < step["reward"] < 1 for step in steps)
        (file,) = out.glob("*model.safetensors")
        runs.append((load_file(file), rates))
    (one, slow), (two, fast) = runs
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert slow == [1, 1] and all(rate > 1 for rate in fast)
