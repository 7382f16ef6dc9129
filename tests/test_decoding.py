"""Decoding of text: gaps, length search, batches, stop strings, what streams and what is drawn."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.canvas import Canvas
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.complete import (
    begin,
    complete,
    complete_all,
    infill,
    settings_of,
)
from ar2diff.generation.prompts import request_of, split_gaps
from ar2diff.generation.results import Completion, summary, unread_note
from ar2diff.generation.tokens import (
    decode,
    draw_tokens,
    encode,
    prompt_ids,
    text_after,
    with_gaps_filled,
)
from ar2diff.generation.writing import stream

TEXT = "the cat"


@pytest.fixture(scope="module")
def checkpoint(converted):
    return load_checkpoint(str(converted))


@pytest.fixture(scope="module")
def full(convert_tiny):
    return load_checkpoint(str(convert_tiny("convert.attention=full")))


def without_time(result):
    return replace(result, seconds=0)


def test_gaps_of_a_prompt():
    assert split_gaps("a {mask:3} b{mask:12}") == ["a ", 3, " b", 12, ""]
    assert split_gaps("{mask:1}") == ["", 1, ""]
    assert split_gaps("{musk:3} {mask") == ["{musk:3} {mask"]


@pytest.mark.parametrize(
    "gap", ("{mask}", "{mask:}", "{mask:0}", "{mask:-1}", "{mask:x}", "{mask:99999999999}")
)
def test_gap_of_no_tokens(gap):
    with pytest.raises(Ar2DiffError, match="does not say how many tokens"):
        split_gaps(f"the {gap} cat")


def test_a_suffix_that_begins_with_a_word_is_set_apart():
    for suffix, text in (("who", " who"), (" who", " who"), (".", "."), ("日", "日"), (None, "")):
        assert request_of(None, None, "a", suffix, ["2"]).infill == ("a", text, (2,))


def test_gaps_are_filled_and_the_rest_stays(checkpoint):
    result = complete(checkpoint, "the{mask:3} sat on{mask:2}mat")
    assert result.text == f"the{result.filled[0]} sat on{result.filled[1]}mat"
    assert result.new_tokens == 5
    assert result.token_ids == []
    assert 1 <= result.forwards <= 5
    assert result.tokens_per_forward == 5 / result.forwards


def test_a_prompt_with_gaps_is_gone_on_from_where_asked_for(checkpoint):
    result = complete(checkpoint, "the{mask:3} sat", max_new_tokens=4)
    assert len(result.token_ids) == 4
    assert result.new_tokens == 7


def test_a_prompt_may_begin_with_a_gap(checkpoint):
    assert complete(checkpoint, "{mask:2} sat").text.endswith(" sat")


def test_modes_that_go_left_to_right_fill_no_gap(checkpoint):
    with pytest.raises(Ar2DiffError, match="cannot fill gaps"):
        complete(checkpoint, "the{mask:2} sat", mode="ar")


@pytest.mark.parametrize("batch_size", (1, 2, 8))
def test_results_of_a_batch_are_those_of_each_alone(checkpoint, batch_size):
    prompts = ["the dog barked at", "a", "the{mask:3} sat", "the cat", "{mask:2} on the mat and"]
    settings = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3, "mode": "diffusion"}
    results = dict(complete_all(checkpoint, prompts, batch_size=batch_size, **settings))
    assert sorted(results) == [0, 1, 2, 3, 4]
    for number, prompt in enumerate(prompts):
        alone = complete(checkpoint, prompt, **settings)
        assert without_time(results[number]) == without_time(alone)


def test_no_prompt_is_decoded_before_all_are_checked(checkpoint):
    with pytest.raises(Ar2DiffError, match="prompt 2: the prompt has 601 tokens"):
        next(complete_all(checkpoint, [TEXT, "a" * 600]))


def test_length_search_takes_the_highest_mean_log_probability(checkpoint):
    lengths = [1, 4, 2, 7]
    result = infill(checkpoint, "the cat", " on the mat", lengths)
    means = {}
    for length in lengths:  # each alone, its log-probabilities from the canvas
        spec, options = settings_of(checkpoint, {"max_new_tokens": 0}, gaps=True)
        row = encode(checkpoint.tokenizer, spec, ["the cat", length, " on the mat"])
        canvas, states = begin(checkpoint, spec, options, [row])
        assert list(states)
        means[length] = canvas.logprob[0][~canvas.given[0]][:length].mean().item()
    best = max(means, key=means.get)
    assert len(set(means.values())) == 4
    assert result.length == best
    assert [c.length for c in result.candidates] == sorted(means, key=lambda n: -means[n])
    for candidate in result.candidates:
        assert candidate.mean_logprob == pytest.approx(means[candidate.length], abs=1e-5)
    assert result.text == "the cat" + result.candidates[0].text + " on the mat"
    assert result.new_tokens == best


def test_braces_in_the_texts_around_a_gap_are_text(checkpoint):
    assert infill(checkpoint, "{mask:2}", "{mask}", [1]).text.startswith("{mask:2}")


@pytest.mark.parametrize("mode", ("diffusion", "ar", "speculative"))
def test_stop_string_ends_the_answer_behind_it(checkpoint, mode):
    settings = {"max_new_tokens": 40, "mode": mode}
    whole = complete(checkpoint, TEXT, **settings).text
    letters = [c for c in whole[5:] if c.isascii()]
    assert letters
    stop = letters[0]
    prompts = ["a longer prompt", TEXT]
    results = dict(complete_all(checkpoint, prompts, stop_strings=[stop], **settings))
    assert results[1].text == whole[: whole.index(stop) + 1]
    assert results[1].new_tokens < 40
    other = complete(checkpoint, prompts[0], **settings).text
    assert results[0].text == (other.partition(stop)[0] + stop if stop in other else other)


def test_generation_config_holds_unless_an_argument_is_nearer(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint.model.generation_config, "max_new_tokens", 3)
    assert complete(checkpoint, TEXT).new_tokens == 3
    assert complete(checkpoint, TEXT, max_new_tokens=5).new_tokens == 5
    assert complete(checkpoint, "the{mask:2} cat").new_tokens == 2


def test_suffix_in_later_blocks_is_counted_and_said(checkpoint, full):
    # With the BOS: the gap is at 4 and 5, in the first block of 8; "at" of the suffix is there too.
    result = complete(checkpoint, "the{mask:2}at on the mat")
    assert result.suffix_tokens == 13
    assert result.unread_tokens == 11
    assert unread_note(checkpoint.spec, [result]) == (
        "11 of the 13 suffix tokens lie in later blocks than the gap, which causal_context "
        "attention does not read"
    )
    plain = complete(checkpoint, "the", max_new_tokens=2)
    assert unread_note(checkpoint.spec, [result, plain]).endswith("(in 1 of 2 prompts)")
    assert unread_note(checkpoint.spec, [plain]) is None
    assert unread_note(full.spec, [complete(full, "the{mask:2}at on the mat")]) is None


@pytest.mark.parametrize(
    "settings",
    (
        {"mode": "diffusion"},
        {"mode": "speculative", "draft_length": 3},
        {"steps_per_block": 4, "remask": 0.5},
        {"mode": "diffusion", "temperature": 1.0, "seed": 1},
        {"mode": "diffusion", "stop_strings": ["a"]},
    ),
    ids=str,
)
def test_what_streams_is_what_completes(checkpoint, settings):
    parts = list(stream(checkpoint, TEXT, max_new_tokens=40, **settings))
    result = complete(checkpoint, TEXT, max_new_tokens=40, **settings)
    assert "".join(text for text, _ in parts) == TEXT + result.text
    assert [last is None for _, last in parts] == [True] * (len(parts) - 1) + [False]
    assert without_time(parts[-1][1]) == without_time(result)
    assert sum(bool(text) for text, _ in parts) > 2


def test_gaps_stream_too(checkpoint):
    parts = list(stream(checkpoint, "the{mask:3} sat{mask:2}mat"))
    result = parts[-1][1]
    assert "".join(text for text, _ in parts) == result.text
    assert result.new_tokens == 5
    for start, filling in zip(result.filled_at, result.filled, strict=True):
        assert result.text[start : start + len(filling)] == filling


def test_tokens_are_drawn_as_text(tiny_tokenizer):
    ids = tiny_tokenizer(" é b", add_special_tokens=False).input_ids
    mask = len(tiny_tokenizer)
    assert draw_tokens(tiny_tokenizer, ids, mask) == [" ", "", "é", " ", "b"]
    half = [mask, *ids[:2], mask, ids[3], mask]
    assert draw_tokens(tiny_tokenizer, half, mask) == ["·", " ", "", "·", " ", "·"]
    for text in ("naïve 日本 🙂", "\n\ttwo  spaces"):
        ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(draw_tokens(tiny_tokenizer, ids, mask)) == text


@pytest.fixture(scope="module")
def spaced(checkpoint):
    """The checkpoint with a tokenizer that puts a space in front of a text, as LLaMA's does."""
    from dataclasses import replace

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "\n", *"▁abcdefghijklmnopqrstuvwxyz"]
    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[], unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    return replace(checkpoint, tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw))


def test_text_behind_a_gap_gets_no_space_of_its_own(spaced):
    tokenizer, mask = spaced.tokenizer, spaced.spec.mask_token_id
    ids = encode(spaced.tokenizer, spaced.spec, ["the", 2, " sat"])
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == list("▁the")
    assert ids[4:6] == [mask, mask]
    assert tokenizer.convert_ids_to_tokens(ids[6:]) == list("▁sat")
    assert encode(spaced.tokenizer, spaced.spec, ["the", 1, "sat"])[5:] == ids[7:]


@pytest.fixture(scope="module")
def joined(spaced):
    """The same, with tokens that hold a space and the letter after it."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(spaced.tokenizer.backend_tokenizer.to_str())
    size = len(raw["model"]["vocab"])
    raw["model"]["vocab"] |= {"▁a": size, "▁c": size + 1}
    raw["model"]["merges"] = [["▁", "a"], ["▁", "c"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))
    return replace(spaced, tokenizer=tokenizer)


def test_the_space_before_a_gap_is_left_to_a_token_that_can_hold_it(spaced, joined):
    def tokens(checkpoint, *segments):
        tokenizer, mask = checkpoint.tokenizer, checkpoint.spec.mask_token_id
        ids = encode(tokenizer, checkpoint.spec, segments)
        return ["_" if i == mask else tokenizer.convert_ids_to_tokens(i) for i in ids]

    assert tokens(joined, "the ", 2, " cat") == [*"▁the", "_", "_", "▁c", *"at"]
    assert tokens(joined, "the  ", 1, "") == [*"▁the▁", "_"]
    assert tokens(joined, "a", 1, " ", 1, "") == ["▁a", "_", "▁", "_"]  # else the gaps would meet
    assert tokens(spaced, "the ", 1, " cat") == [*"▁the▁", "_", *"▁cat"]
    assert tokens(joined, "the ") == [*"▁the▁"]  # no gap


@pytest.mark.parametrize(
    ("before", "filling", "after", "text"),
    (
        ("the ", " cat", " sat", "the [cat] sat"),
        ("the ", "cat", " sat", "the [cat] sat"),
        ("the ", "cat ", " sat", "the [cat] sat"),
        ("the", " cat", " sat", "the[ cat] sat"),
        ("the ", "cat ", "sat", "the [cat ]sat"),
        ("un", "do", "ing", "un[do]ing"),
    ),
)
def test_a_filling_is_spaced_once(spaced, before, filling, after, text):
    ids = [
        spaced.tokenizer.convert_tokens_to_ids("▁" if letter == " " else letter)
        for letter in f" {before}{filling}{after}"
    ]
    start = 1 + len(before)
    gap = list(range(start, start + len(filling)))
    segments = [before, len(gap), after]
    first, found, last = with_gaps_filled(spaced.tokenizer, segments, ids, gap)
    assert f"{first}[{found}]{last}" == text
    part = with_gaps_filled(spaced.tokenizer, segments, ids[: gap[-1]], gap)
    assert text.replace("[", "").startswith("".join(part))
    assert len(part) == 2  # what follows the gap is not shown before it is filled


def test_first_token_keeps_its_space_where_it_is_drawn(spaced):
    ids = spaced.tokenizer("the cat", add_special_tokens=False).input_ids
    assert "".join(draw_tokens(spaced.tokenizer, ids, -1)) == " the cat"


def test_summary_is_over_all_results():
    def completion(new_tokens, forwards, seconds):
        return Completion(
            text="", token_ids=[], new_tokens=new_tokens, forwards=forwards,
            tokens_per_forward=0.0, seconds=seconds,
        )  # fmt: skip

    result = completion(6, 2, 0.5)
    assert summary([result]) == "6 tokens, 2 forwards, 3.00 tokens per forward, 12 tokens/s, 0.50 s"
    assert summary([result] * 2).startswith("2 prompts, 12 tokens, 4 forwards, 3.00 tokens")
    assert summary([completion(0, 0, 0.0)]).startswith("0 tokens")


def test_what_a_cache_costs_is_said(checkpoint, full):
    exact = complete(checkpoint, TEXT, max_new_tokens=12, check_cache=True).drift
    assert exact.largest < 1e-5 and exact.same_token == 1
    result = complete(
        full, TEXT, max_new_tokens=12, block_length=4, cache_implementation="dual", check_cache=True
    )
    assert 1e-4 < result.drift.mean <= result.drift.largest
    assert "the likeliest token stays the same" in summary([result])
    assert "cache" not in summary([complete(full, TEXT, max_new_tokens=4)])


DENOISING = [
    {"threshold": 0.9}, {"steps_per_block": 2}, {"entropy_bound": 0.5}, {"block_length": 8},
    {"steps_per_block": 2, "order": "margin"}, {"steps_per_block": 2, "remask": 0.5},
    {"cfg_scale": 1.0}, {"check_cache": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", DENOISING, ids=str)
def test_an_option_of_mode_diffusion_asks_for_it(checkpoint, settings):
    assert settings_of(checkpoint, settings)[1].mode == "diffusion"


def test_the_default_mode_is_lossless_where_there_is_an_ar_mode(checkpoint, full):
    def mode(checkpoint, gaps=False, **settings):
        return settings_of(checkpoint, settings, gaps)[1].mode

    assert mode(checkpoint) == mode(checkpoint, temperature=1.0, draft_length=2) == "speculative"
    assert mode(checkpoint, cfg_scale=0, remask=0, order="prob", check_cache=False) == "speculative"
    assert mode(checkpoint, gaps=True) == mode(full) == "diffusion"
    assert mode(checkpoint, gaps=True, threshold=0.5, mode="ar") == "ar"  # refused by its prompt
    with pytest.raises(Ar2DiffError, match="cfg_scale only works with mode=diffusion"):
        mode(checkpoint, mode="speculative", cfg_scale=1.0)
    with pytest.raises(Ar2DiffError, match="draft_length only works with mode=speculative"):
        mode(checkpoint, draft_length=2, threshold=0.5)


def test_settings_of_a_generation_config_for_other_modes_are_left_alone(checkpoint, monkeypatch):
    for name, value in (("threshold", None), ("steps_per_block", 4), ("draft_length", 2)):
        monkeypatch.setattr(checkpoint.model.generation_config, name, value, raising=False)
    assert settings_of(checkpoint, {})[1].draft_length == 2
    assert settings_of(checkpoint, {"mode": "diffusion"})[1].steps_per_block == 4


@pytest.fixture(scope="module")
def closing(checkpoint):
    """The checkpoint with a tokenizer that appends an EOS to every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(checkpoint.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return replace(checkpoint, tokenizer=tokenizer)


@pytest.mark.parametrize("prompt", (TEXT, "", "the cat</s>", "the{mask:2} cat", "{mask:2}"))
def test_a_prompt_does_not_end_where_a_tokenizer_ends_texts(checkpoint, closing, prompt):
    assert closing.tokenizer(TEXT).input_ids[-1] == 2
    segments = split_gaps(prompt)
    ids = encode(checkpoint.tokenizer, checkpoint.spec, segments)
    assert encode(closing.tokenizer, closing.spec, segments) == ids
    if len(segments) == 1:
        assert prompt_ids(closing.tokenizer, prompt) == ids


@pytest.fixture(scope="module")
def bytewise(checkpoint):
    """The checkpoint with a tokenizer that spells what it has no token for in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "<mask>",
        *"▁abcdefghij",
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return replace(
        checkpoint,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ),
    )


def ids_of_bytes(text):
    return [byte + 3 for byte in text.encode()]


def test_half_a_character_takes_no_whole_one_with_it(bytewise):
    tokenizer, day = bytewise.tokenizer, ids_of_bytes("日")
    whole = tokenizer("ab\n日", add_special_tokens=False).input_ids
    for half in (day[:1], day[:2], [day[1]]):
        assert decode(tokenizer, [*whole, *half]) == "ab\n日\ufffd"
        assert text_after(tokenizer, whole, [*half, *ids_of_bytes("\né")]) == "\ufffd\né"
        assert decode(tokenizer, [*half, *whole, *half, 2, *half]) == "\ufffdab\n日\ufffd"
    assert decode(tokenizer, [*whole, *day[:2], 2, day[2]]) == "ab\n日日"  # the EOS is skipped


@pytest.mark.parametrize("new", range(1, 8))
def test_a_stream_that_ends_in_half_a_character_repeats_nothing(bytewise, monkeypatch, new):
    written = ids_of_bytes("\n日c日")
    row = [*bytewise.tokenizer("ab", add_special_tokens=False).input_ids, *written[:new]]

    def begin(checkpoint, spec, options, rows, texts=None, album=None):
        canvas = Canvas.of_prompts(rows, spec.mask_token_id, max_new_tokens=new)

        def states():
            for place in range(len(rows[0]), len(row)):
                at = torch.tensor([place])
                canvas.write(torch.tensor([0]), at, torch.tensor([row[place]]), torch.zeros(1))
                yield canvas

        return canvas, states()

    monkeypatch.setattr("ar2diff.generation.writing.begin", begin)
    parts = list(stream(bytewise, "ab", mode="ar", max_new_tokens=new))
    text = "ab" + "\n日c日".encode()[:new].decode(errors="replace")
    assert "".join(piece for piece, _ in parts) == text
    assert parts[-1][1].text == text[2:]
    assert all("\ufffd" not in piece for piece, _ in parts[:-2])
