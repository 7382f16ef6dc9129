"""The mode in which a folder decodes by default: what is measured for it, and what `check` says."""

from __future__ import annotations

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.gumbel import GumbelNoise
from ar2diff.demo.__main__ import DRAFT
from ar2diff.evaluation import lossless
from ar2diff.evaluation.check import check
from ar2diff.evaluation.quality import ROWS, TextQuality, choose_threshold, text_quality
from ar2diff.generation.complete import decode_rows, settings_of
from ar2diff.training.adapt import adapt

MEASURED = TextQuality(ROWS, 6, 2.0, 1.0, 1.0, 0.4)


@pytest.fixture
def blocks(convert_tiny):
    """A model without an AR mode, to change."""
    return load_checkpoint(str(convert_tiny("convert.attention=block_causal")))


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    return [tiny_tokenizer(f"{n:02d} cats").input_ids for n in range(ROWS)]


def test_text_is_compared_by_its_likelihood_under_the_base(blocks, tiny_checkpoint, rows):
    base = load_checkpoint(str(tiny_checkpoint))
    found = text_quality(blocks, base, rows)
    assert (found.rows, found.tokens) == (ROWS, 6)
    means = []
    for model, mode in ((blocks, {"mode": "diffusion", "threshold": 0.9}), (base, {"mode": "ar"})):
        asked = {**mode, "max_new_tokens": 6}
        nll = []
        for row in rows:
            (text,) = decode_rows(model, *settings_of(model, asked), [row[:2]])
            ids = torch.tensor([row[:2] + text.token_ids])
            logp = base.model(ids).logits[0].log_softmax(-1)
            new = range(2, ids.shape[1])
            nll.append(-sum(logp[i - 1, ids[0, i]].item() for i in new) / len(new))
        means.append(torch.tensor(nll))
    assert found.nll == pytest.approx(means[0].mean().item(), abs=1e-3)
    assert found.base_nll == pytest.approx(means[1].mean().item(), abs=1e-3)
    apart = means[0] - means[1]
    assert found.difference == pytest.approx(apart.mean().item(), abs=1e-3)
    assert found.standard_error == pytest.approx(apart.std().item() / ROWS**0.5, abs=1e-3)


@pytest.mark.parametrize("error,threshold", [(0.4, 0.99), (0.5, 0.9)])
def test_text_within_two_standard_errors_gets_the_usual_threshold(
    blocks, tiny_checkpoint, rows, monkeypatch, error, threshold
):
    quality = TextQuality(ROWS, 6, 2.0, 1.0, 1.0, error)
    monkeypatch.setattr("ar2diff.evaluation.quality.text_quality", lambda *_: quality)
    record = choose_threshold(blocks, tiny_checkpoint, rows)
    assert blocks.model.generation_config.threshold == threshold
    assert record["good"] == (threshold == 0.9) and record["standard_error"] == error


def test_what_cannot_be_measured_gets_the_safe_threshold(
    blocks, tiny_checkpoint, convert_tiny, rows, monkeypatch
):
    other = convert_tiny("convert.attention=full")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    for base, given, said in (
        (tiny_checkpoint, rows[:-1], "32 evaluation rows"),
        (other, rows, "no AR mode"),
        (tiny_checkpoint, rows, "no room"),
    ):
        monkeypatch.setattr("ar2diff.evaluation.quality.text_quality", out_of_memory)
        blocks.model.generation_config.threshold = 0.9
        assert said in choose_threshold(blocks, base, given)["not_measured"]
        assert blocks.model.generation_config.threshold == 0.99


def test_a_threshold_of_the_users_own_stays(blocks, tiny_checkpoint, rows):
    blocks.model.generation_config.threshold = 0.5
    choose_threshold(blocks, tiny_checkpoint, rows[:1])
    assert blocks.model.generation_config.threshold == 0.5


def test_a_run_measures_what_it_wrote_and_check_says_so(
    tiny_checkpoint, tmp_path, write_jsonl, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "ar2diff.evaluation.quality.text_quality", lambda *given: asked.append(given) or MEASURED
    )
    data = write_jsonl("a.jsonl", [{"text": f"the cat number {n} sat"} for n in range(80)])
    settings = [
        f"data.sources=[{data}]", "train.max_steps=1", "data.max_length=32", "eval.steps=9",
        f"eval.rows={ROWS}", "eval.length=8", "objective.ar_weight=0",
    ]  # fmt: skip
    adapt(str(tiny_checkpoint), None, tmp_path / "out", overrides=settings)
    ((_, base, rows),) = asked
    assert (base.path, len(rows)) == (tiny_checkpoint, ROWS)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["mode"], written["threshold"]) == ("diffusion", 0.99)
    assert json.loads((tmp_path / "out" / "ar2diff.json").read_text())["text"]["good"] is False
    said = check(tmp_path / "out").default
    assert said.mode == "diffusion"
    assert "threshold=0.99, because its text at threshold 0.9 is worse than its base's" in said.why
    assert "NLL under the base 2.000 and 1.000, difference 1.000 ± 0.400 on 32" in said.why


def test_check_says_why_a_folder_decodes_as_it_does(convert_tiny, converted, run_both):
    assert check(converted).default.mode == "speculative"
    assert (
        "mode            speculative by default: it has an AR mode"
        in run_both("check", converted)[1]
    )
    said = check(convert_tiny("convert.attention=full")).default
    assert (said.mode, "threshold=0.99, because its text was not compared" in said.why) == (
        "diffusion", True,
    )  # fmt: skip


def test_check_tries_whether_speculation_is_lossless(converted, monkeypatch):
    found = check(converted)
    assert found.ok and "near-ties" in found.elsewhere["mode speculative"]
    assert any("8 of 8 texts of 16 tokens" in finding.what for finding in found.findings)
    plain = lossless._texts

    def wrong(checkpoint, prompts, album, mode, **settings):
        texts = plain(checkpoint, prompts, album, mode=mode, **settings)
        if mode == "speculative":
            texts[1][5] += 1
        return texts

    monkeypatch.setattr(lossless, "_texts", wrong)
    monkeypatch.setattr(lossless, "MOST_TOKENS", ((10**9, 8),))
    monkeypatch.setattr(lossless, "_gap", lambda *_: 0.5)
    found = check(converted)
    assert not found.ok
    assert any("6 of 8 texts" in f.what and not f.ok for f in found.findings)
    monkeypatch.setattr(lossless, "_gap", lambda *_: 1e-4)
    assert check(converted).ok


@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_the_gap_at_a_difference_is_that_of_the_two_likeliest_tokens(converted, temperature):
    checkpoint = load_checkpoint(str(converted), dtype="float64")
    prompt, text = [1, 40, 41], [50, 51, 52, 53]
    found = lossless._gap(
        str(converted), torch.float64, prompt, [50, 51, 60], text, temperature, 7, None
    )
    scores = checkpoint.model(torch.tensor([[*prompt, 50, 51]])).logits[0, -1]
    scores[checkpoint.suppressed] = float("-inf")
    if temperature:
        noise = GumbelNoise([lossless.keyed_generator(7)], len(scores)).at([0], [5])[0]
        scores = scores / temperature + noise
    best, second = scores.topk(2).values.tolist()
    assert found == pytest.approx(best - second)


def test_in_bfloat16_texts_of_both_modes_differ_at_near_ties_alone(monkeypatch):
    """The demo model and its draft adapter; the gap is that of the rounded weights in float64."""
    starts = ("Once upon a time", "One day, a", "Lily was", "A big dog", "She said", "Ben and")
    monkeypatch.setattr(lossless, "PROMPTS", starts)
    monkeypatch.setattr(lossless, "MOST_TOKENS", ((10**9, 48),))
    found = lossless.golden_run(load_checkpoint(str(DRAFT), dtype="bfloat16"), str(DRAFT))
    assert 0 < found.identical < found.texts  # some do differ
    assert found.near_tie == 0.5 and found.ok


def test_a_large_model_is_not_tried(converted, monkeypatch):
    checkpoint = deepcopy(load_checkpoint(str(converted)))
    huge = SimpleNamespace(numel=lambda: 3_000_000_000)
    monkeypatch.setattr(checkpoint.model, "parameters", lambda: [huge])
    assert lossless.golden_run(checkpoint, str(converted)) is None
