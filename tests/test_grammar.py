"""Grammars against enumeration: the tokens that may come next, and what the AR mode draws."""

from __future__ import annotations

import json
import re

import pytest
from conftest import tiny_spec
from test_constraint import (
    BB,
    EOS,
    MASK,
    VOCABULARY,
    A,
    B,
    C,
    X,
    check_distribution,
    next_logits,
    small_model,
    torch_like,
    written,
)

import ar2diff
from ar2diff.core.automaton import DEAD
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.grammar import Grammar
from ar2diff.core.options import resolve
from ar2diff.core.tree import Tree

pytest.importorskip("llguidance")
NESTED = 'start: "a" start "c" | /b+/'  # no automaton counts how often c has to come
LETTERS = {A: b"a", B: b"b", C: b"c", BB: b"bb", X: b"x"}


class Letters:
    """A tokenizer whose tokens are those of LETTERS."""


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(
        "ar2diff.core.grammar.token_bytes",
        lambda tokenizer, known=ar2diff.core.grammar.token_bytes: (
            LETTERS if isinstance(tokenizer, Letters) else known(tokenizer)
        ),
    )


def text_of(tokens) -> str:
    return "".join(LETTERS[token].decode() for token in tokens)


def matches(text: str) -> bool:
    found = re.fullmatch("(a*)b+(c*)", text)
    return bool(found) and len(found[1]) == len(found[2])


def begins(text: str) -> bool:
    """Whether a text that matches begins so."""
    found = re.fullmatch("(a*)(b*)(c*)", text)
    return bool(found) and (not found[3] or (bool(found[2]) and len(found[1]) >= len(found[3])))


def allowed(tokens: tuple) -> set[int]:
    text = text_of(tokens)
    after = {token for token, letters in LETTERS.items() if begins(text + letters.decode())}
    return after | ({EOS} if matches(text) else set())


def grammar_of(canvas: Canvas, text: str = NESTED) -> Grammar:
    return Grammar(text, canvas, Letters(), VOCABULARY, {MASK})


def canvas_of(prompts, room: int) -> Canvas:
    return Canvas.of_prompts(prompts, MASK, max_new_tokens=room, end_ids=[EOS])


def test_the_tokens_that_may_come_next_are_those_with_which_a_text_can_be_completed():
    grammar = grammar_of(canvas_of([[X]], 8))
    seen, left = 0, [((), grammar.state(0, 1))]
    while left:
        tokens, state = left.pop()
        assert {*grammar.allowed([0], [0], [state])[0].nonzero()[:, 0].tolist()} == allowed(tokens)
        assert state.is_accepting() == matches(text_of(tokens))
        for token in range(VOCABULARY):
            after = grammar.step(state, token)
            assert (after != DEAD) == (token in allowed(tokens))
            if after != DEAD and token != EOS and len(tokens) < 5:
                left.append(((*tokens, token), after))
        seen += 1
    assert seen > 50


def write(prompts, room: int, **settings) -> Canvas:
    spec = tiny_spec(mask_token_id=MASK)
    options = resolve(spec, {"eos_token_id": [EOS], "max_new_tokens": room, **settings})
    canvas = canvas_of(prompts, room)
    canvas.constraint = grammar_of(canvas)
    for _ in denoise(small_model(), spec, canvas, options):
        pass
    return canvas


def masked_ar(prompt, room: int, temperature: float, before=()) -> dict[tuple, float]:
    """Answers whose every token is drawn from the allowed ones, by enumeration."""
    if len(before) == room or (before and before[-1] == EOS):
        return {before: 1.0}
    p = (next_logits((*prompt, *before)) / temperature).softmax(-1)
    after, found = sorted(allowed(before)), {}
    for token in after:
        share = float(p[token] / p[after].sum())
        for answer, mass in masked_ar(prompt, room, temperature, (*before, token)).items():
            found[answer] = share * mass
    return found


def test_ar_mode_draws_each_token_from_those_that_the_grammar_allows():
    canvas = write([[X, A]] * 600, 4, mode="ar", temperature=0.8, seed=1)
    check_distribution(torch_like(written(canvas)), masked_ar((X, A), 4, 0.8))
    for row, tokens in enumerate(written(canvas)):
        whole = matches(text_of(token for token in tokens if token != EOS))
        assert canvas.constraint.whole(row, canvas.front[row]) == whole


@pytest.mark.parametrize("drafted", ["by the model", "by a fool"])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_speculation_writes_the_text_of_the_ar_mode(temperature, drafted, monkeypatch):
    prompts, settings = [[X, A], [X, B, C], [X]], {"temperature": temperature, "seed": 3}
    alone = written(write(prompts, 11, mode="ar", **settings))
    if drafted == "by a fool":

        def draft(group, ends, found, after):
            group.trees = [Tree() for _ in group.rows]
            for tree in group.trees:
                for depth, token in enumerate((B, C, A)):
                    tree.add(token, depth - 1, depth + 1, 1.0)
            group.cut()
            group.pace.plan(group.trees, group.drafts)

        monkeypatch.setattr("ar2diff.core.group.Group._draft", draft)
    assert written(write(prompts, 11, mode="speculative", draft_length=3, **settings)) == alone
    assert all(begins(text_of(t for t in line if t != EOS)) for line in alone)


def test_what_no_token_spells_ends_a_text_that_does_not_match():
    canvas = canvas_of([[X]], 8)
    grammar = grammar_of(canvas, 'start: "a" "z" | "b"')
    after = grammar.step(grammar.state(0, 1), A)
    assert grammar.allowed([0], [0], [after])[0].nonzero()[:, 0].tolist() == [EOS]
    assert grammar.step(after, EOS) == DEAD


def test_an_end_token_that_is_suppressed_ends_no_text():
    canvas = Canvas.of_prompts([[X]], MASK, max_new_tokens=8, end_ids=[EOS, C])
    grammar = Grammar('start: "a"', canvas, Letters(), VOCABULARY, {MASK, EOS})
    after = grammar.step(grammar.state(0, 1), A)
    assert grammar.allowed([0], [0], [after])[0].nonzero()[:, 0].tolist() == [C]
    with pytest.raises(Ar2DiffError, match="none that can be written"):
        Grammar('start: "a"', canvas, Letters(), VOCABULARY, {MASK, EOS, C})


# The command line and Python

SUM = 'start: sum "."\nsum: term (" + " term)*\nterm: /[0-9]/ | "(" sum ")"\n'
BAD = {
    'at 1(8): unknown name: "word"': {"grammar": "start: word"},
    "cannot be used (": {"grammar": "start: <|nothing|>"},
    "is 3": {"grammar": 3},
    "does not work with mode=diffusion": {"grammar": SUM, "mode": "diffusion"},
    "regex cannot be combined with grammar": {"grammar": SUM, "regex": "a"},
    "cannot be combined with min_new_tokens": {"grammar": SUM, "min_new_tokens": 3},
}


@pytest.mark.parametrize("says", BAD)
def test_a_grammar_that_cannot_be_held_to_is_refused_before_a_forward(says, converted, monkeypatch):
    monkeypatch.setattr("ar2diff.generation.complete.denoise", None)
    model, settings = ar2diff.load(converted), {"mode": "ar", **BAD[says]}
    with pytest.raises(Ar2DiffError) as error:
        model.generate("ab", **settings)
    assert says in error.value.what


def test_the_command_line_writes_what_a_grammar_derives(converted, run_both, tmp_path):
    file = tmp_path / "sum.lark"
    file.write_text(SUM)
    call = ["generate", converted, "--prompt", "ab", "--grammar", file, "--json", "--seed", 1]
    found = set()
    for mode in ("ar", "speculative"):
        code, out, _ = run_both(*call, "--mode", mode, "--max-new-tokens", 60, "--temperature", 1)
        assert code == 0
        result = json.loads(out)
        assert result["matches"] and re.fullmatch(r"[0-9+ ()]+\.", result["text"])
        found.add(result["text"])
    assert len(found) == 1
    code, out, _ = run_both(*call, "--mode", "ar", "--max-new-tokens", 1)
    assert code == 0 and json.loads(out)["matches"] is False
    file.unlink()
    code, _, err = run_both(*call)
    assert code == 2 and "cannot be read" in err
