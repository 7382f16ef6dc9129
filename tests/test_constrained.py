"""Constraints from the command line and Python on a small model, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import pytest
from drawn_schemas import generated

import ar2diff
from ar2diff.core import index
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import canvas_of
from ar2diff.core.pattern import constraint_of
from ar2diff.generation.complete import settings_of

pytest.importorskip("outlines_core")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yz"]}, "n": {"type": "integer"}},
    "required": ["a"],
}
DIGITS = "[0-9]{2,4}(!|\\?)"


@pytest.fixture(scope="module")
def model(converted):
    return ar2diff.load(converted)


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_every_mode_writes_what_matches(model, mode, temperature):
    settings = {"mode": mode, "max_new_tokens": 24, "temperature": temperature, "seed": 2}
    results = model.generate(["ab", "abcd"], regex=DIGITS, **settings)
    assert all(re.fullmatch(DIGITS, result.text) and result.matches for result in results)
    result = model.generate("ab", json_schema=SCHEMA, **settings)
    assert json.loads(result.text)["a"] in ("x", "yz") and result.matches
    result = model.generate("ab", choice=["(yes)", "no"], **settings)
    assert result.text in ("(yes)", "no") and result.matches


def test_lossless_text_is_that_of_ar_mode(model):
    for settings in ({}, {"temperature": 1.3, "seed": 5}):
        texts = [
            model.generate("ab", regex="([a-z]{2,4} )+", max_new_tokens=20, mode=mode, **settings)
            for mode in ("ar", "speculative")
        ]
        assert texts[0].token_ids == texts[1].token_ids


def test_gaps_match_with_the_space_before_them_and_no_other(model):
    result = model.generate("a {mask:3} b{mask:2}", regex="[0-9]+")
    assert re.fullmatch("[0-9]{3} b[0-9]{2}", result.text.removeprefix("a "))
    assert result.matches and [*map(len, result.filled)] == [3, 2]
    result = model.infill("x", "y", length=[2, 3], regex="[ab]+")
    assert {len(candidate.text) for candidate in result.candidates} == {2, 3}


def test_a_space_that_the_prompt_leaves_to_its_gap_is_the_gaps_first():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from ar2diff.generation.tokens import spaced_gaps

    words = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}
    raw = Tokenizer(models.BPE(vocab=words, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert spaced_gaps(tokenizer, ["a ", 2, " b", 1, ""]) == [True, False]
    own = index.automaton_of(["a+", " (?:a+)"], tokenizer, 6, (), ())
    plain, spaced = own.starts
    assert own.accepting[own.walk([2, 2], plain)] and own.walk([4], plain) == -1
    assert own.accepting[own.walk([4, 2], spaced)] and own.walk([2], spaced) == -1


def test_stop_strings_end_a_text_only_where_it_matches(model):
    settings = {"max_new_tokens": 16, "stop_strings": ["7"]}
    for mode in ("diffusion", "ar"):
        result = model.generate("ab", regex="7[0-9]{3}7[0-9]*", mode=mode, **settings)
        assert re.fullmatch("7[0-9]{3}7", result.text) and result.matches


def test_a_text_that_is_stopped_is_not_presented_as_finished(model, converted, run_both):
    result = model.generate("ab", regex="x{20}", max_new_tokens=30, mode="ar", max_time=0)
    assert result.matches is False and len(result.text) < 20


BAD = {
    "the regular expression '('": {"regex": "("},
    "the regular expression 'a)|(b'": {"regex": "a)|(b"},
    "more than 10 states": {"regex": "[ab]{20}", "states": 10},
    "more than 0 seconds": {"regex": "(ab|c)*", "seconds": 0},
    "more than 200 MB of memory": {"regex": "(a|b)*a(a|b){30}", "memory": 200 << 20},
    "more than 50,000 states": {"regex": "(a|b)*a(a|b){15}"},
    "the shortest text that matches has 9 tokens": {"regex": "x{9}", "max_new_tokens": 8},
    "no text that matches has from 5 to 8": {
        "regex": "x",
        "min_new_tokens": 5,
        "max_new_tokens": 8,
    },
    "cannot be combined": {"regex": "x", "choice": ["y"]},
    "regex is 3": {"regex": 3},
    "is empty": {"choice": [""]},
    "'minimum'": {"json_schema": {"type": "integer", "minimum": 2}},
    "json_schema is '{'": {"json_schema": "{"},
}


@pytest.mark.parametrize("says", BAD)
def test_a_constraint_that_cannot_be_held_to_is_refused_before_a_forward(model, says, monkeypatch):
    settings = dict(BAD[says])
    monkeypatch.setattr(index, "SECONDS", settings.pop("seconds", index.SECONDS))
    monkeypatch.setattr(index, "MEMORY", settings.pop("memory", index.MEMORY))
    if "states" in settings:
        monkeypatch.setattr(index, "MOST_STATES", settings.pop("states"))
    monkeypatch.setattr("ar2diff.generation.complete.denoise", None)
    with pytest.raises(Ar2DiffError) as error:
        model.generate("ab", **settings)
    assert says in error.value.what


def test_an_automaton_that_cannot_be_made_says_why(model, monkeypatch):
    monkeypatch.setattr(index, "MOST_STATES", None)  # a fault in the other process
    with pytest.raises(Ar2DiffError, match=r"cannot be made .*TypeError"):
        model.generate("ab", regex="w{3}")


def test_only_the_last_automata_are_kept(model, monkeypatch):
    monkeypatch.setattr(index, "KEPT", 2)
    for letter in "cde":
        assert model.generate("ab", choice=[letter]).text == letter
    assert [*(key[0] for key in index.FOUND[model.tokenizer])] == [("d",), ("e",)]


def test_a_missing_library_is_named_with_its_extra(model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "outlines_core" else found(name)
    )
    with pytest.raises(Ar2DiffError) as error:
        model.generate("ab", choice=["zz"])
    assert "outlines-core" in error.value.what and "ar2diff[constraints]" in error.value.fix


def test_the_command_line_has_them_all(converted, run_both, tmp_path):
    file = tmp_path / "schema.json"
    call = ["generate", converted, "--prompt", "ab", "--max-new-tokens", 24]
    file.write_text(json.dumps(SCHEMA))
    code, out, _ = run_both(*call, "--json-schema", file, "--json")
    assert code == 0 and json.loads(json.loads(out)["text"])["a"] and json.loads(out)["matches"]
    code, out, _ = run_both(*call, "--choice", "yes", "--choice", "no", "--mode", "ar")
    assert code == 0 and out.strip() in ("abyes", "abno")
    code, out, _ = run_both(*call, "--regex", "[0-9]{3}", "--mode", "diffusion")
    assert code == 0 and re.fullmatch("ab[0-9]{3}", out.strip())
    for text, says in (("{", "is not JSON"), (None, "cannot be read"), ("3", "is 3")):
        file.write_text(text) if text else file.unlink()
        code, _, err = run_both(*call, "--json-schema", file)
        assert code == 2 and says in err and "--json-schema" in err
        file.touch()


@pytest.mark.slow
def test_generated_schemas_are_finished_by_a_random_model_wherever_they_fit(model):
    draw = random.Random(3)
    for number in range(100):
        schema = generated(draw, 2)
        options = settings_of(model.checkpoint, {"json_schema": schema})[1]
        canvas = canvas_of(model.model, model.spec, [[1, 20]], options)
        automaton = constraint_of(model.model, model.tokenizer, options, canvas).automaton
        room = automaton.shortest(automaton.starts[0]) + number % 5
        settings = {"max_new_tokens": room, "mode": "diffusion", "json_schema": schema}
        result = model.generate("ab", temperature=1.0, seed=number, **settings)
        assert result.matches, f"{result.text} is not an instance of {schema}"
        with pytest.raises(Ar2DiffError, match="the shortest text that matches"):
            model.generate("ab", **settings | {"max_new_tokens": room - number % 5 - 1})
