"""`adapt`, `sft` and `rl` as Python functions: what they accept and refuse alike."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training.adapt import adapt
from ar2diff.training.request import requested
from ar2diff.training.results import RlPlan, RunPlan, RunResult, SftPlan
from ar2diff.training.rl import rl
from ar2diff.training.sft import sft

VERBS = {"adapt": adapt, "sft": sft, "rl": rl}
ROWS = {
    "adapt": [{"text": f"the cat sat on mat {n}"} for n in range(8)],
    "sft": [{"prompt": f"what is {n}?", "completion": f" it is {n}."} for n in range(8)],
    "rl": [{"prompt": f"say {n}", "answer": str(n)} for n in range(8)],
}
SMALL = {"data.max_length": 32, "train.per_device_train_batch_size": 4, "train.logging_steps": 1}
OF_RL = {
    "rl.rewards": [{"name": "exact"}], "rl.num_generations": 4, "rl.max_completion_length": 8,
}  # fmt: skip


@pytest.fixture
def call(convert_tiny, tiny_checkpoint, write_jsonl, tmp_path):
    """Factory: call("sft", max_steps=1) into `out`, in small."""

    def make(verb: str, rows: object = None, **arguments: object):
        model = tiny_checkpoint if verb == "adapt" else convert_tiny("convert.block_length=4")
        data = write_jsonl("rows.jsonl", ROWS[verb] if rows is None else rows)
        overrides = SMALL | (OF_RL if verb == "rl" else {}) | arguments.pop("overrides", {})
        settings = {"output_dir": tmp_path / "out", "max_steps": 1, **arguments}
        return VERBS[verb](model, data=data, overrides=overrides, **settings)

    return make


@pytest.mark.parametrize("verb", VERBS)
def test_a_result_is_what_the_folder_records(call, tmp_path, verb):
    result = call(verb)
    assert isinstance(result, RunResult) and result.steps == 1 and not result.dry_run
    record = json.loads((tmp_path / "out" / "ar2diff.json").read_text())
    known = asdict(result)
    assert known["recipe"]["data"]["max_length"] == 32
    shared = known.keys() & record.keys()
    assert {name: json.loads(json.dumps(known[name])) for name in shared} == {
        name: record[name] for name in shared
    }
    assert record.keys() - known.keys() == {"inputs", "precision", "prompts", "files"}
    assert call(verb, resume=True) == result  # it had finished


@pytest.mark.parametrize(("verb", "kind"), [("adapt", RunPlan), ("sft", SftPlan), ("rl", RlPlan)])
def test_a_dry_run_is_a_plan_and_writes_nothing(call, tmp_path, verb, kind):
    plan = call(verb, dry_run=True)
    assert type(plan) is kind and plan.dry_run and plan.rows_per_step == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("tracker", ["no_such_tracker", "wandb"])
def test_a_tracker_that_does_not_start_is_refused_before_the_model_is_loaded(
    call, convert_tiny, tmp_path, monkeypatch, verb, tracker
):
    convert_tiny("convert.block_length=4")
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    if tracker == "wandb":
        monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", bool)
    with pytest.raises(Ar2DiffError, match=f"train.report_to '{tracker}' cannot be started"):
        call(verb, overrides={"train.report_to": tracker})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["sft", "rl"])
def test_a_run_without_steps_is_for_adapt_alone(call, tmp_path, verb):
    with pytest.raises(Ar2DiffError, match=r"train.max_steps=0 trains nothing"):
        call(verb, max_steps=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_a_library_is_not_put_down_to_the_rows(call, monkeypatch, verb):
    def breaks(*_: object, **__: object) -> None:
        raise ValueError("a bug of the library")

    monkeypatch.setattr("transformers.Trainer.add_callback", breaks)
    with pytest.raises(ValueError, match="a bug of the library"):
        call(verb)


def test_resume_and_overwrite_contradict_each_other(call):
    with pytest.raises(Ar2DiffError, match="resume=True and overwrite=True cannot be combined"):
        call("adapt", resume=True, overwrite=True)


# What is asked for


def test_a_recipe_is_a_name_a_file_or_an_object_with_overrides_of_two_kinds(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"train": {"learning_rate": 0.5}, "noise": {"time": "block"}}))
    for recipe in (str(file), file, load_recipe(str(file))):
        for overrides in (
            {"train.max_steps": 7, "rl.rewards": [{"name": "exact"}], "eval.data": None},
            ["train.max_steps=7", "rl.rewards=[{name: exact}]", "eval.data=null"],
        ):
            found = requested("adapt", "m", recipe, overrides=overrides).recipe
            assert (found.train.learning_rate, found.train.max_steps) == (0.5, 7)
            assert found.rl.rewards[0].name == "exact" and found.eval.data is None
            assert "batch_size" not in found.train.model_fields_set
    assert requested("adapt", "m").recipe == load_recipe(None)
    assert requested("adapt", "m", "demo").recipe == load_recipe("demo")


def test_data_is_a_path_or_several_and_keeps_what_the_recipe_knows_of_them():
    recipe = load_recipe(None, ["data.sources=[{path: a.jsonl, weight: 2}, {path: b, weight: 1}]"])
    for data, paths in (("a.jsonl", ["a.jsonl"]), ([Path("a.jsonl"), "c"], ["a.jsonl", "c"])):
        if len(paths) == 2:  # every source has a weight, or none
            recipe = load_recipe(None, ["data.sources=[{path: a.jsonl}, {path: b}]"])
        sources = requested("adapt", "m", recipe, data=data).recipe.data.sources
        assert [source.path for source in sources] == paths
    sources = requested("adapt", "m", recipe, data=[]).recipe.data.sources
    assert [source.path for source in sources] == ["a.jsonl", "b"]


@pytest.mark.parametrize(
    ("verb", "model", "folder"),
    [("adapt", "Qwen/Qwen3-0.6B@main", "Qwen3-0.6B-causal_context"), ("sft", "runs/a/", "a-sft")],
)
def test_a_run_has_a_folder_of_its_own_in_runs(verb, model, folder):
    assert requested(verb, model).output_dir == Path("runs") / folder
