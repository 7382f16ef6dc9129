"""The texts of a report: those that the run which made the model kept out of its training."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import pytest

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import Recipe
from ar2diff.conversion.convert import end_token
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.seeds import content_key
from ar2diff.data.documents import tokenize
from ar2diff.reports.material import EMBEDDED, material_for
from ar2diff.training.adapt import ADAPT

ROWS = 8
WORDS = "one two three four five six seven eight nine ten red blue".split()
TEXTS = [" ".join([*WORDS[n % 12 :], *WORDS[: n % 12], "number", str(n)]) for n in range(170)]
SMALL = (f"eval.rows={ROWS}", "data.max_length=64", "eval.length=32", "train.schedule=constant")


@pytest.fixture
def data(write_jsonl):
    return write_jsonl("stories.jsonl", [{"text": text} for text in TEXTS])


def run(tiny_checkpoint, data, folder, *overrides, verb=ar2diff.adapt):
    verb(tiny_checkpoint, None, folder, data=data, max_steps=1, overrides=[*SMALL, *overrides])
    return folder, load_checkpoint(str(folder))


@pytest.mark.parametrize("asked", [(), ("eval.steps=1",)])
def test_a_report_reads_exactly_what_training_does_not(tiny_checkpoint, data, tmp_path, asked):
    folder, checkpoint = run(tiny_checkpoint, data, tmp_path / "run", *asked)
    found = material_for(folder, checkpoint, None, "text", 100)
    assert found.data == f"{ROWS} documents of {data} that the run held out from its training"
    record = json.loads((folder / "ar2diff.json").read_text())
    plan = ADAPT.prepare(tiny_checkpoint, Recipe.model_validate(record["recipe"]))
    trained = {p.document for _, row in islice(plan.rows, 3 * len(TEXTS)) for p in row}
    eos = end_token(checkpoint)
    unseen = [
        t for t in TEXTS if content_key(tokenize(checkpoint.tokenizer, t, eos)) not in trained
    ]
    assert len(unseen) == ROWS and sorted(found.texts) == sorted(unseen)
    assert "eval.rows=100" in found.lack(100) and not found.lack(ROWS)
    other = material_for(folder, checkpoint, str(data), "text", 100)  # a file that is named is read
    assert other.data == str(data) and other.texts == TEXTS[:100] and not other.lack(200)
    assert other.digest != found.digest


def test_a_model_that_may_have_been_trained_on_the_texts_is_known(tiny_checkpoint, data, tmp_path):
    folder, checkpoint = run(tiny_checkpoint, data, tmp_path / "run")
    found = material_for(folder, checkpoint, None, "text", 100)
    assert found.unknown_to(folder, checkpoint)
    assert found.unknown_to(*run(tiny_checkpoint, data, tmp_path / "control", "objective.kind=ar"))
    other, loaded = run(tiny_checkpoint, data, tmp_path / "other", "train.seed=1")
    assert not found.unknown_to(other, loaded)
    assert not found.unknown_to(tiny_checkpoint, load_checkpoint(str(tiny_checkpoint)))
    named = material_for(folder, checkpoint, str(data), "text", 100)
    assert named.unknown_to(other, loaded)  # as far as anybody can know


def test_conversations_that_were_held_out_are_read_as_the_template_writes_them(
    tiny_checkpoint, write_jsonl, tmp_path
):
    rows = [{"prompt": f"{text} ?", "completion": " yes it is"} for text in TEXTS]
    data = write_jsonl("talks.jsonl", rows)
    start, _ = run(tiny_checkpoint, write_jsonl("t.jsonl", [{"text": t} for t in TEXTS]),
                   tmp_path / "start")  # fmt: skip
    folder, checkpoint = run(start, data, tmp_path / "run", "data.max_length=96", verb=ar2diff.sft)
    found = material_for(folder, checkpoint, None, "text", 100)
    assert found.data == f"{ROWS} conversations of {data} that the run held out from its training"
    assert len(found.texts) == ROWS
    assert {text.partition(" ?")[0] for text in found.texts} < set(TEXTS)


def test_texts_that_cannot_be_told_from_training_data_are_not_read(tiny_checkpoint, data, tmp_path):
    folder, checkpoint = run(tiny_checkpoint, data, tmp_path / "run")

    def refused(told):
        with pytest.raises(Ar2DiffError, match=told) as error:
            material_for(folder, checkpoint, None, "text", 100)
        assert "there is no held-out text" in error.value.what and "data" in error.value.fix

    whole = data.read_text()
    data.write_text(whole + whole)
    refused("have changed")
    data.unlink()
    refused("does not exist")
    data.write_text(whole)
    file, record = folder / "ar2diff.json", json.loads((folder / "ar2diff.json").read_text())
    for change, told in (
        ({"data": record["data"] | {"held_out": 0}}, "held out no data"),
        ({"recipe": record["recipe"] | {"later": 1}}, "another version"),
        (
            {"recipe": record["recipe"] | {"data": record["recipe"]["data"] | {"sources": []}}},
            "wrote",
        ),
    ):
        file.write_text(json.dumps(record | change))
        refused(told)
    file.unlink()
    refused("no record")


def test_a_model_that_knows_the_embedded_stories_is_asked_their_questions(data, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    checkpoint = load_checkpoint(str(folder))
    plain = material_for(folder, checkpoint, None, "text", 8)
    assert plain.data == "the embedded stories and questions"
    recipe = Recipe().model_dump(mode="json")
    recipe["eval"] |= {"data": str(data)}
    (folder / "ar2diff.json").write_text(json.dumps({"verb": "adapt", "recipe": recipe}))
    own = material_for(folder, checkpoint, None, "text", 8)
    assert own.texts == TEXTS[:8]
    assert own.data == f"{data}, on which the run evaluated the model, and the embedded questions"
    assert [q.prompt for q in own.questions] == [q.prompt for q in plain.questions]
