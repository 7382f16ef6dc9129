"""Kills of verbs that write a folder: the same command again succeeds, or says that it is done."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import foreign
import pytest
from kills import in_a_child, moments

from ar2diff.checkpoint.merge import merge
from ar2diff.config.recipe import load_recipe
from ar2diff.conversion.exports import export
from ar2diff.conversion.imports import import_checkpoint
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training.adapt import adapt


@pytest.fixture
def verbs(converted, tiny_tokenizer, tmp_path):
    """{verb: what it does with an output folder}."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    settings = ["train.max_steps=1", "data.max_length=16", f"data.sources=[{rows}]", "peft.r=2"]
    adapt(str(converted), load_recipe(None, settings), tmp_path / "adapter")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(foreign.SPECIAL)})
    theirs = foreign.save(foreign.llada(), tmp_path / "theirs", tokenizer, shards=2)
    return {
        "merge": lambda out: merge(str(tmp_path / "adapter"), out),
        "export": lambda out: export(str(converted), out, "ar"),
        "import": lambda out: import_checkpoint(str(theirs), out),
    }


def held(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".ar2diff.lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["merge", "export", "import"])
def test_the_same_command_succeeds_after_each_of_twenty_kills(verbs, tmp_path, verb):
    work = verbs[verb]
    work(tmp_path / "whole")
    whole = held(tmp_path / "whole")
    counts = in_a_child(lambda: work(tmp_path / "counted"), mark="claimed")
    for number, moment in enumerate(moments(*counts)):
        out = tmp_path / str(number)
        in_a_child(lambda out=out: work(out), kill=moment)
        try:
            work(out)
        except Ar2DiffError as error:
            assert "already holds a complete model" in error.what
        assert held(out) == whole, f"{verb} was killed at call {moment}"
