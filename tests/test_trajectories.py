"""States of the sampler's own trajectories as training noise."""

from collections import Counter

import pytest
import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import parse_recipe
from ar2diff.core.attention import PADDING
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.seeds import content_key
from ar2diff.data.documents import document_parts, tokenize
from ar2diff.diffusion.likelihood import bound
from ar2diff.generation.complete import begin, settings_of
from ar2diff.training.adapt import make_collator
from ar2diff.training.sft import SFT
from ar2diff.training.trajectories import DRAWS, _continued, drawn_state, is_on_policy, own_states

TEXTS = ["the cat sat on the mat", "a dog ran to the old house by the sea", "one red mat", "so it"]
SIZE, EOS = 4, 2


@pytest.fixture(scope="module")
def checkpoint(convert_tiny):
    return load_checkpoint(str(convert_tiny("convert.block_length=4")))


def recipe_of(**sections):
    tree = {"convert": {"block_length": SIZE}, "data": {"max_length": 64}, **sections}
    return parse_recipe(tree, "test")


def batch_of(checkpoint, recipe, texts, step=3):
    """The collator and its batch of rows, of which each holds some texts."""
    collate, rows = make_collator(recipe, checkpoint.noise), []
    for row in texts:
        parts = [
            next(document_parts(tokenize(checkpoint.tokenizer, t, EOS), 0, EOS, recipe, 0))
            for t in row
        ]
        rows.append((step * collate.rows_per_step, parts))
    return collate, collate(rows)


def states_of(checkpoint, recipe, texts, **more):
    collate, batch = batch_of(checkpoint, recipe, texts, **more)
    return batch, own_states(checkpoint, collate, batch, EOS)


def test_of_several_texts_the_likeliest_is_learned(checkpoint):
    """Among texts of the same documents, those of one, two and four tries: the bound only falls."""
    nats = []
    for tries in (1, 2, 4):
        recipe = recipe_of(noise={"on_policy": 1.0, "best_of": tries})
        collate, batch = batch_of(checkpoint, recipe, [[text] for text in TEXTS])
        found = _continued(checkpoint, batch, SIZE, (0, 3), tries)
        rows = [(r.ids[: r.prompt + r.answer].tolist(), r.prompt) for _, r in found]
        made = bound(
            checkpoint.model, checkpoint.spec, [row for row, _ in rows], checkpoint.suppressed,
            DRAWS, starts=[start for _, start in rows],
        )  # fmt: skip
        nats.append(made.nats / torch.tensor([r.answer for _, r in found]))
        states = own_states(checkpoint, collate, batch, EOS)
        for place, text in found:
            written = text.ids[place.prompt : place.prompt + text.answer]
            assert torch.equal(states["x0"][place.row, place.prompt :][: text.answer], written)
    assert (nats[1] <= nats[0]).all() and (nats[2] <= nats[1]).all() and (nats[2] < nats[0]).any()


def test_a_view_with_replaced_tokens_is_not_continued_twice(checkpoint):
    plain, edited = (
        recipe_of(noise={"on_policy": 1.0} | more, train={"max_steps": 4})
        for more in ({}, {"edits": {"after": 0.5}})
    )
    (before, made), (doubled, same) = (states_of(checkpoint, r, [TEXTS]) for r in (plain, edited))
    assert len(doubled["x0"]) == 2 * len(before["x0"])
    assert torch.equal(made["x0"], same["x0"]) and torch.equal(made["xt"], same["xt"])


def documents(batch):
    """(row, columns) of each document."""
    for row, doc in enumerate(batch["doc"]):
        for number in doc[doc != PADDING].unique():
            yield row, (doc == number).nonzero()[:, 0]


@pytest.mark.parametrize("end", [True, False])
def test_each_block_is_as_the_sampler_met_it(checkpoint, end):
    """Each document again, alone: every block must be one of those that the sampler read."""
    recipe, known = recipe_of(), checkpoint.model.generation_config.eos_token_id
    if end:  # ids that end a text early
        checkpoint.model.generation_config.eos_token_id = list(range(3, 120))
    try:
        batch, made = states_of(checkpoint, recipe, [TEXTS[:2], TEXTS[2:]])
        ended = 0
        for row, columns in documents(batch):
            prompt = max(1, (int(batch["ar"][row, columns].sum()) + 1) // 2 // SIZE * SIZE)
            given = batch["x0"][row, columns[:prompt]].tolist()
            seed = content_key([content_key([0, 3, *given]) % 2**62, 1]) % 2**62
            spec, options = settings_of(
                checkpoint,
                {"mode": "diffusion", "temperature": 1.0, "seed": (seed,),
                 "max_new_tokens": len(columns) - prompt},
            )  # fmt: skip
            canvas, states = begin(checkpoint, spec, options, [given])
            before, read = canvas.ids[0].clone(), []
            for state in states:
                read.append(before)
                before = state.ids[0].clone()
            end_of = int(canvas.end[0])
            ended += end_of < len(columns)
            kept = columns[: -(-end_of // SIZE) * SIZE]
            assert (made["doc"][row, columns[len(kept) :]] == PADDING).all()
            xt, x0 = made["xt"][row, kept], made["x0"][row, kept]
            assert torch.equal(x0[:end_of], canvas.ids[0, :end_of])
            assert torch.equal(xt[:prompt], torch.tensor(given))
            for first in range(prompt // SIZE * SIZE, len(kept), SIZE):
                block = slice(first, first + SIZE)
                met = [s for s in read if (s[:first] != spec.mask_token_id).all()]
                assert any(torch.equal(xt[block], s[block]) for s in met)
                assert made["scored"][row, kept[block]].any()
            scored = torch.arange(len(kept))
            scored = (scored >= prompt) & (scored < end_of)
            assert torch.equal(made["written"][row, kept], scored)
            coef, masked = made["coef"][row, kept], made["scored"][row, kept]
            assert torch.equal(coef > 0, masked & scored)
            assert torch.equal(masked, xt == spec.mask_token_id)
            ar = made["ar"][row, kept]
            assert ar[1:prompt].all() and not ar[prompt:].any() and not ar[0]
        assert (ended > 0) == end
    finally:
        checkpoint.model.generation_config.eos_token_id = known


def test_every_state_of_a_block_is_as_likely():
    """Two blocks after a prompt of two tokens: the first is decided in forwards 1 and 3, the second
    in 4, 6 and 7, of which the last decides a token behind the end."""
    step = torch.tensor([0, 0, 3, 1, 4, 6, 6, 7])
    decided, written = torch.ones(8).bool(), torch.arange(8) >= 2
    written[7] = False
    counts: Counter[str] = Counter()
    for seed in range(900):
        masked, t = drawn_state(step, decided, written, SIZE, seed)
        counts["".join("x" if m else "." for m in masked)] += 1
        first, second = masked[2:4].double().mean(), masked[4:7].double().mean()
        assert torch.equal(t, torch.cat([first.expand(4), second.expand(4)]))
    assert counts.keys() == {a + b for a in ("..xx", "..x.") for b in ("xxxx", ".xxx")}
    assert all(abs(n - 225) < 4 * (900 * 0.25 * 0.75) ** 0.5 for n in counts.values())


def test_a_documents_text_and_noise_do_not_depend_on_the_batch(checkpoint):
    recipe = recipe_of()
    together = states_of(checkpoint, recipe, [TEXTS[:2], TEXTS[2:]])[1]
    for row, texts in enumerate((TEXTS[:2], TEXTS[2:])):
        alone = states_of(checkpoint, recipe, [texts])[1]
        length = alone["x0"].shape[1]
        for name in ("x0", "xt", "scored", "coef", "doc", "pos", "ar", "written"):
            assert torch.equal(together[name][row, :length], alone[name][0]), name
        assert (together["doc"][row, length:] == PADDING).all()
    again = states_of(checkpoint, recipe, [TEXTS[:2], TEXTS[2:]])[1]
    steps = together.pop("step"), again.pop("step")
    assert steps == (3, 3)
    assert all(torch.equal(together[name], again[name]) for name in together)
    other = states_of(checkpoint, recipe, [TEXTS[:2], TEXTS[2:]], step=4)[1]
    assert not torch.equal(other["x0"], together["x0"])


def test_the_model_writes_as_many_steps_as_asked_for_after_the_anneal():
    recipe = recipe_of(noise={"on_policy": 0.3})
    assert sum(is_on_policy(recipe, step) for step in range(100)) == 30
    assert not any(is_on_policy(recipe_of(), step) for step in range(100))
    anneal = {"kind": "grow", "steps": 50, "lengths": [2]}
    late = recipe_of(noise={"on_policy": 1.0}, anneal=anneal)
    assert [is_on_policy(late, step) for step in (0, 49, 50, 99)] == [False, False, True, True]


def test_the_model_is_in_training_mode_again(checkpoint):
    checkpoint.model.train()
    try:
        states_of(checkpoint, recipe_of(), [TEXTS[:1]])
        assert checkpoint.model.training
    finally:
        checkpoint.model.eval()


def test_sft_refuses_it(convert_tiny):
    with pytest.raises(Ar2DiffError, match=r"noise\.on_policy only works with adapt"):
        SFT.prepare(convert_tiny(), recipe_of(noise={"on_policy": 0.5}))
