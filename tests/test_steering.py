"""Biases of tokens, guides, and parts of a text that are written anew."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ar2diff
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.tree import Tree
from ar2diff.generation.prompts import split_gaps
from ar2diff.generation.steering import steered
from ar2diff.generation.tokens import encode, opened

MODES = ("ar", "speculative", "diffusion")
WORD = 40  # a token of the small model


@pytest.fixture(scope="module")
def model(converted):
    return ar2diff.load(converted)


def write(model, mode, **settings):
    return model.generate("ab", mode=mode, max_new_tokens=12, **settings).token_ids


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_and_a_guide_that_adds_the_same_write_the_same(model, mode):
    def guide(logprob, ids, position):
        added = torch.zeros_like(logprob)
        added[:, WORD] = 5.0
        return added

    text = model.tokenizer.decode([WORD])
    plain = write(model, mode)
    biased = write(model, mode, logit_bias={WORD: 5.0})
    assert biased != plain and biased.count(WORD) > plain.count(WORD)
    assert write(model, mode, guide=guide) == biased
    assert write(model, mode, sequence_bias={(WORD,): 5.0}) == biased
    assert write(model, mode, logit_bias={text: 5.0, "41": 0}) == biased


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_guide_sees_what_stands_before_a_token_in_every_mode(model, settings):
    """It forbids the token two places before: a wrong place or token would change the text."""

    def guide(logprob, ids, position):
        lines = torch.arange(len(ids))
        assert (ids[lines, position] == model.spec.mask_token_id).all()
        added = torch.zeros_like(logprob)
        added[lines, ids[lines, position - 2]] = -torch.inf
        return added

    texts = {mode: write(model, mode, guide=guide, **settings) for mode in MODES}
    assert texts["ar"] == texts["speculative"]
    assert settings or texts["ar"] != write(model, "ar")
    prompt = model.tokenizer("ab").input_ids
    for mode in ("ar", "speculative"):
        before = [*prompt, *texts[mode]][len(prompt) - 2 :]
        assert all(a != b for a, b in zip(texts[mode], before, strict=False))


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_a_guide_is_not_asked_about_rows_that_are_over(model, mode):
    """Nothing stands in their contexts, and their positions may lie beyond them."""

    def guide(logprob, ids, position):
        lines = torch.arange(len(ids))
        assert (ids[lines, position - 1] != model.spec.mask_token_id).all()
        return torch.zeros_like(logprob)

    prompts = ["ab", "abcd ab ab", "b", "c"]
    settings = {"mode": mode, "max_new_tokens": 12, "cache_implementation": "static"}
    settings |= {"draft_length": 3} if mode == "speculative" else {}
    settings |= {"choice": ["b", "cdefgh", "d", "efgh"], "temperature": 100.0, "seed": 1}
    alone = model.generate(prompts, **settings)
    assert len({result.text for result in alone}) > 1
    guided = model.generate(prompts, guide=guide, **settings)
    assert [result.text for result in guided] == [result.text for result in alone]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_guide_that_allows_one_text_is_asked_for_no_other(model, settings, monkeypatch):
    """Behind a candidate off that text, and behind its end, it leaves no token."""
    only = [40, 41, 42, 43, 40, 41, 44, 45, 46, 40]
    start = len(model.tokenizer("ab").input_ids)

    def guide(logprob, ids, position):
        added = torch.full_like(logprob, -torch.inf)
        for line, (row, place) in enumerate(zip(ids.tolist(), position.tolist(), strict=True)):
            if row[start:place] == only[: place - start] and place - start < len(only):
                added[line, only[place - start]] = 0.0
        return added

    own = {"max_new_tokens": len(only), "guide": guide, "mode": "speculative"}
    for size in (1, 3, 7):
        text = model.generate("ab", draft_length=size, **own, **settings)
        assert text.token_ids == only

    def draft(group, ends, found, after):
        group.trees = [Tree() for _ in group.rows]
        for tree, front in zip(group.trees, group.front, strict=True):
            for depth, token in enumerate([*only, 40, 40][front - start :][:3], 1):
                tree.add(token, depth - 2, depth, 1.0)
        group.pace.plan(group.trees, group.drafts)

    monkeypatch.setattr("ar2diff.core.group.Group._draft", draft)
    result = model.generate("ab", draft_length=3, **own, **settings)
    assert result.token_ids == only and result.forwards < len(only)
    with pytest.raises(Ar2DiffError, match="leave no token"):
        model.generate("ab", draft_length=3, **own | {"max_new_tokens": 11}, **settings)


def test_a_guide_by_name_steers_the_command_line(converted, run_both, tmp_path, model):
    file = tmp_path / "mine.py"
    file.write_text(
        "def only(logprob, ids, position):\n"
        f"    return logprob.new_full(logprob.shape, float('-inf')).index_fill(1, "
        f"logprob.new_tensor([{WORD}]).long(), 0.0)\n"
        "def wrong(logprob, ids, position):\n    return logprob[:1, :3]\n"
        "def fails(logprob, ids, position):\n    return logprob + ids.no\n"
        "def none(logprob, ids, position):\n    return logprob * 0 - float('inf')\n"
        "value = 3\n"
    )
    call = ["generate", converted, "--prompt", "ab", "--max-new-tokens", 3, "--json", "--guide"]
    code, out, _ = run_both(*call, f"{file}:only")
    assert code == 0 and json.loads(out)["token_ids"] == [WORD] * 3
    for name, says in {
        "wrong": "returned a tensor [1, 3]",
        "fails": "failed: ",
        "none": "leave no token",
        "value": "is not a function",
        "lost": "has no 'lost'",
    }.items():
        code, _, err = run_both(*call, f"{file}:{name}")
        assert code == 2 and says in err and "fix: " in err


BAD = {
    "is not a token and its bias": ["--logit-bias", "ab"],
    "is 2 tokens": ["--logit-bias", "ab=2"],
    "out of range": ["--logit-bias", "90000=2"],
    "names no function": ["--guide", "mine.py"],
    "does not occur in": ["--revise", "z"],
    "occurs 2 times in": ["--revise", "b"],
}


@pytest.mark.parametrize("says", BAD)
def test_what_cannot_be_done_is_refused(says, converted, run_both):
    code, _, err = run_both("generate", converted, "--prompt", "ab b", *BAD[says])
    assert code == 2 and says in err and "fix: " in err


def test_a_part_of_a_text_becomes_a_gap_of_as_many_tokens(model):
    text, spec = "ab cd ab ef", model.spec
    whole = encode(model.tokenizer, spec, [text])
    for parts in (["cd"], ["ab ef", "cd"], ["cd ", "ab e"], [" cd"], ["d a"]):
        ids = encode(model.tokenizer, spec, split_gaps(opened(model.tokenizer, text, parts)))
        assert len(ids) == len(whole)
        left = [token for token in ids if token != spec.mask_token_id]
        assert 0 < len(left) < len(whole)
    assert opened(model.tokenizer, text, ["cd ", "ab e"]).count("{mask") == 1
    result = model.revise(text, "cd")
    assert result.text.startswith("ab ") and result.text.endswith(" ab ef")


@pytest.fixture(scope="module")
def sentences():
    """A tokenizer that puts a space before a text, as SentencePiece does."""
    words = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5, "\n": 6, "▁ab": 7}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    raw = Tokenizer(models.BPE(vocab=words, merges=merges, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def test_a_part_at_the_beginning_has_the_space_that_a_tokenizer_puts_there(sentences):
    assert opened(sentences, "ab b", ["ab"]) == "{mask:1} b"
    assert opened(sentences, "ab b a", ["ab b"]) == "{mask:2} a"


def test_a_token_of_a_bias_is_named_as_it_stands_in_a_text(sentences):
    biases = steered({"logit_bias": {" a": 1.0, "a": 2.0}}, sentences)["sequence_bias"]
    assert biases == {(4,): 1.0, (2,): 2.0}


def test_a_part_is_written_anew_from_the_command_line(converted, run_both):
    call = ["generate", converted, "--prompt", "ab 1 ab", "--revise", "1", "--json"]
    code, out, _ = run_both(*call, "--regex", "[2-9]")
    assert code == 0 and json.loads(out)["matches"]
    code, _, err = run_both(*call[:2], "--revise", "1")
    assert code == 2 and "only works together with --prompt" in err
