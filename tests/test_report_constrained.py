"""Gaps of a report that have to match: what is left out, who fills it from what, and what a machine
without the library says."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_report import TINY, asked, measure  # noqa: F401  (a fixture)

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.pattern import validates
from ar2diff.generation.tokens import prompt_ids
from ar2diff.reports.constrained_gaps import BEFORE, Form, cases_of
from ar2diff.reports.sentences import claims

pytest.importorskip("outlines_core")
STORIES = [
    f"One day in the warm and sunny month of May old Tom had {n} red apples. He ate {n % 7} of "
    f"them, and then the other {n - n % 7} apples were left for all of us."
    for n in range(10, 30)
]


def only_control(asked, folder):  # noqa: F811
    found = measure(replace(asked, only=("control",)), folder)
    lines = (folder / "rows" / "control.jsonl").read_text().splitlines()
    return found, [row for row in map(json.loads, lines) if "constraint" in row]


@pytest.fixture(scope="module")
def session(converted):
    """What cases need of a session of a report on stories."""
    checkpoint = load_checkpoint(str(converted))
    model = SimpleNamespace(checkpoint=checkpoint, context=None)
    return SimpleNamespace(
        model=model, subjects={"model": model}, seed=0, sizes=TINY,
        material=SimpleNamespace(texts=STORIES),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["regex", "JSON schema"])
def test_what_is_left_out_is_a_number_of_the_text_in_its_own_tokens(session, name):
    form, cases = cases_of(session, name)
    tokenizer = session.model.checkpoint.tokenizer
    assert form.kind == "number" and len(cases) == TINY.infills
    for case, story in zip(cases, STORIES, strict=False):
        left, size, right = case.segments
        value = form.read(case.true) if name == "regex" else form.read(case.true)["number"]
        assert story.startswith(f"{left}{value}{right}") and left.endswith(" ")
        assert len(left.split()) >= BEFORE and size == len(case.gap)
        whole = prompt_ids(tokenizer, f"{left}{case.true}{right}")
        assert [*case.left, *case.gap, *case.right] == whole
    places = {len(case.segments[0].split()) for case in cases}
    assert len(places) > 1  # not always the same of the three numbers


def test_words_are_left_out_of_texts_without_numbers(session):
    session = SimpleNamespace(**vars(session))
    session.material = SimpleNamespace(texts=[re.sub("[0-9]+", "many", text) for text in STORIES])
    form, cases = cases_of(session, "JSON schema")
    assert form.kind == "word" and re.fullmatch(r'\{"word": "[a-z]+"\}', cases[0].true)
    session.material = SimpleNamespace(texts=["ONE TWO " * 20] * 8)
    with pytest.raises(ValueError, match="fewer than 2 texts"):
        cases_of(session, "regex")


def test_everybody_is_held_to_the_same_form_and_room(asked, tmp_path):  # noqa: F811
    found, rows = only_control(asked, tmp_path / "report")
    for name in ("regex", "JSON schema"):
        settings = {("model", "diffusion 0.9"), ("base", "ar"), ("base", "ranked ar")}
        mine = [row for row in rows if row["constraint"] == name]
        assert {(row["subject"], row["setting"]) for row in mine} == settings
        form = Form.named(name, "word")
        options = SimpleNamespace(json_schema=json.dumps(form.arguments.get("json_schema")))
        for row in mine:
            fits = re.fullmatch("[a-z]+", row["text"]) if name == "regex" else validates(
                options, row["text"]
            )  # fmt: skip
            assert fits and row["matches"], row
            true = next(r["true"] for r in mine if r["case"] == row["case"])
            assert row["right"] == (form.read(row["text"]) == form.read(true))
            if row["subject"] == "base":  # one token a forward, and one forward that ranks
                assert row["forwards"] == row["tokens"] + (row["setting"] == "ranked ar")
        assert found.of("control", "constrained_matches", constraint=form.label)
        for figure in found.of("control", "constrained_matches", constraint=form.label):
            assert (figure.value, figure.n) == (100.0, len(mine) / 3) and figure.error > 0
    (told, *_) = [
        text for text in claims(found)["control"].more if "Held to a regex for a word" in text
    ]
    assert "with ar (" in told and "with ranked ar (" in told
    assert {text.setting for text in found.texts} == {"diffusion 0.9", "ar", "ranked ar"}
    assert found.protocol["constraint"]["regex for a word"] == '{"regex": "[a-z]+"}'


def test_without_the_library_the_rest_is_measured(asked, tmp_path, monkeypatch):  # noqa: F811
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "outlines_core" else there(name)
    )
    found, rows = only_control(asked, tmp_path / "report")
    missing = {miss.what: miss.why for miss in found.missing if miss.question == "control"}
    for name in ("regex", "JSON schema"):
        assert "pip install 'ar2diff[constraints]'" in missing[f"gaps held to a {name}"]
    assert not rows and found.of("control", "infill_exact_match")
    monkeypatch.undo()  # a part that failed is tried again
    assert only_control(asked, tmp_path / "report")[1]
