"""The likelihood of answers that a run holds out, and which conversations these are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, islice
from math import comb

import numpy as np
import pytest
import torch
from conftest import MASK, MASKS, build_model, tiny_spec

from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.noise import Noise
from ar2diff.core.noises import MaskUniform, Uniform
from ar2diff.core.spec import format_of
from ar2diff.data.conversations import Conversations, TokenRows
from ar2diff.data.turns import IGNORED, PackedConversations
from ar2diff.diffusion.likelihood import ar_nll, bound, masked_nll
from ar2diff.evaluation.answers import AnswerJudge
from ar2diff.evaluation.held_out import judged_answers

END, ENDS = 2, frozenset([2])
PROMPT, ANSWER = [1, 10, 11, 12, 13, 14], [20, 21, END]  # in blocks of 4: [13 14 20 21][END END ..]
IDS, LABELS = [*PROMPT, *ANSWER], [IGNORED] * 6 + ANSWER


class Stub:
    """What a judge asks of a checkpoint."""

    def __init__(self, attention: str, spec: bool = True, noise: Noise = MASKS):
        self.model, self.tokenizer = build_model("llama").eval(), self
        self.spec_or_causal = replace(
            tiny_spec(attention), noise=noise, format=format_of(noise, None)
        )
        self.spec = self.spec_or_causal if spec else None
        self.suppressed = torch.arange(self.model.config.vocab_size) == MASK
        self.noise = noise.on(MASK, self.suppressed)

    noise, end_ids, sees_images = MASKS, ENDS, False

    def decode(self, ids):
        return "x"

    def batch_decode(self, rows, skip_special_tokens):
        return ["x" * sum(token not in ENDS for token in row) for row in rows]


def judge(checkpoint, recipe, samples):
    rows = [{"input_ids": IDS, "labels": LABELS}]
    return AnswerJudge(checkpoint, PackedConversations(rows, ENDS, recipe), [0], samples)()


@torch.no_grad()
def exact_bound(checkpoint, ids, open_):
    """The mean over k and over all sets of k of the open positions of a block."""
    total = 0.0
    for k in range(1, len(open_) + 1):
        for chosen in combinations(open_, k):
            x0, masked = torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.bool)
            masked[0, list(chosen)] = True
            pos = torch.arange(len(ids))[None]
            nll = masked_nll(
                checkpoint.model, checkpoint.spec, x0, masked, torch.zeros_like(pos), pos,
                checkpoint.suppressed,
            )  # fmt: skip
            total += float(nll.sum()) / k / comb(len(open_), k)
    return total


def test_the_bound_is_the_mean_over_all_masks_of_the_filled_answer(sft_recipe):
    checkpoint = Stub("causal_context")
    filled = [*PROMPT, *ANSWER, *[END] * 3]  # as decoding has it
    exact = exact_bound(checkpoint, filled, [6, 7]) + exact_bound(
        checkpoint, filled, [8, 9, 10, 11]
    )
    found = judge(checkpoint, sft_recipe(), 400)
    assert found.tokens == len(ANSWER) and found.bytes == 2
    assert abs(found.bound.nats_per_token - exact / 3) < 3 * found.bound.standard_error
    assert found.bound.standard_error < 0.05 * exact / 3


@pytest.mark.parametrize("noise", [Uniform("free"), MaskUniform()])
@pytest.mark.parametrize("attention", ["causal_context", "full"])
def test_a_free_noise_has_the_bound_of_its_own(sft_recipe, attention, noise):
    checkpoint = Stub(attention, noise=noise)
    filled = [*PROMPT, *ANSWER, *[END] * (3 if attention != "full" else 0)]
    exact = bound(
        checkpoint.model, checkpoint.spec, [filled], checkpoint.suppressed, 600, 9, starts=[6]
    )
    found = judge(checkpoint, sft_recipe(attention), 600)
    error = 3 * (found.bound.standard_error + float(exact.variance.sqrt()) / 3)
    assert abs(found.bound.nats_per_token - float(exact.nats) / 3) < error
    assert error < 0.5 * found.bound.nats_per_token


def test_full_attention_scores_the_answer_without_the_end_tokens_that_training_appends(sft_recipe):
    checkpoint = Stub("full")
    exact = exact_bound(checkpoint, IDS, [6, 7, 8])
    found = judge(checkpoint, sft_recipe("full"), 400)
    assert abs(found.bound.nats_per_token - exact / 3) < 3 * found.bound.standard_error
    assert found.ar_nll is None


@pytest.mark.parametrize("kind", ["denoising", "ar"])
def test_the_ar_nll_is_that_of_the_answer_given_the_prompt(sft_recipe, kind):
    checkpoint = Stub("causal_context", spec=kind != "ar")
    whole, prompt = (
        ar_nll(checkpoint.model, [row], checkpoint.suppressed).nats.item() for row in (IDS, PROMPT)
    )
    recipe = sft_recipe(objective={"kind": "ar"} if kind == "ar" else {})
    found = judge(checkpoint, recipe, 1)
    assert found.ar_nll.nats_per_token == pytest.approx((whole - prompt) / 3, abs=1e-5)
    assert (found.bound is None) == (kind == "ar")


def tokenized(count):
    ids = [np.array([1, 10, n, 20, END]) for n in range(30, 30 + count)]
    return TokenRows(ids, [np.array([IGNORED] * 3 + [20, END])] * count, ())


def plan(recipe, rows):
    asked = [{"messages": [{"role": "user", "content": f"ask {row[2]}"}]} for row in rows.ids]
    return judged_answers(
        Stub("causal_context"), recipe, Conversations(asked, [""] * len(asked), ()), rows
    )


def test_what_the_first_epoch_reads_last_is_held_out_and_never_trained_on(sft_recipe):
    recipe, rows = sft_recipe(eval={"rows": 2, "steps": 5}), tokenized(12)
    rows.ids[3] = rows.ids[7]  # whichever of the two is held out, so is the other
    order = [
        part.ids[2]
        for _, row in islice(PackedConversations(rows.dataset(), ENDS, recipe), 12)
        for part in row
    ]
    found = plan(recipe, rows)
    held = [int(rows.ids[n][2]) for n in found.held_out]
    assert (
        set(held) == {row[2] for row in found.rows} == {int(q.split()[1]) for q in found.questions}
    )
    trained = PackedConversations(rows.dataset(), ENDS, recipe, held_out=found.held_out)
    seen = [part.ids[2] for _, row in islice(trained, 40) for part in row]
    assert not set(seen) & set(held)
    assert (
        seen[: 12 - len(held)]
        == [n for n in order[:12] if n not in held]
        == order[: 12 - len(held)]
    )


def test_nothing_is_held_out_unasked_of_few_conversations(sft_recipe):
    assert plan(sft_recipe(eval={"rows": 2}), tokenized(39)).judge is None
    assert len(plan(sft_recipe(eval={"rows": 2}), tokenized(40)).held_out) == 2
    with pytest.raises(Ar2DiffError, match="no conversation is left to train on"):
        plan(sft_recipe(eval={"rows": 4, "steps": 5}), tokenized(4))
