"""Supervised turns: what is masked, what it reads, and that it is what decoding will see."""

from __future__ import annotations

import pytest
import torch
from conftest import MASK, MASKS, build_model, tiny_spec

from ar2diff.core.attention import PADDING, Slots, model_mask
from ar2diff.core.forward import logits_at
from ar2diff.core.head import UNKNOWN
from ar2diff.core.readers import BlockReader, FullReader
from ar2diff.data.turns import (
    IGNORED,
    ConversationPart,
    PackedConversations,
    Turn,
    TurnCollator,
    conversation_parts,
    runs_of,
)
from ar2diff.diffusion.cross_entropy import cross_entropy

END = 2
ENDS = frozenset([END])
BLOCKWISE = ("causal_context", "block_causal")
PREDICTIONS = ("same", "shift")
# Two turns: user 10 11 12, assistant 20 21 END, user 13 14, assistant 22 23 24 END
IDS = [1, 10, 11, 12, 20, 21, END, 13, 14, 22, 23, 24, END]
LABELS = [IGNORED] * 4 + [20, 21, END] + [IGNORED] * 2 + [22, 23, 24, END]


def turns_of(ids, labels, recipe, epoch=0):
    return [
        turn for part in conversation_parts(ids, labels, epoch, ENDS, recipe) for turn in part.turns
    ]


def test_runs_are_the_supervised_tokens_without_position_0():
    assert list(runs_of(LABELS)) == [(4, 7), (9, 13)]
    assert list(runs_of([5, 6, IGNORED, 7])) == [(1, 2), (3, 4)]
    assert list(runs_of([IGNORED] * 3)) == []


TABLE = [  # ids, labels, the turns in blocks of 4 as (start, end, stop, ended)
    (IDS, LABELS, [(4, 7, 8, True), (9, 13, 16, True)]),
    # the end token at the end of a block: no fill
    ([1, 10, 20, END], [IGNORED] * 2 + [20, END], [(2, 4, 4, True)]),
    # an empty answer: its end token alone
    ([1, 10, 11, END], [IGNORED] * 3 + [END], [(3, 4, 4, True)]),
    # no end token: the unfinished block is left out, nothing is filled
    ([1, 10, 20, 21, 22, 23], [IGNORED] * 2 + [20, 21, 22, 23], [(2, 4, 4, False)]),
    ([1, 10, 11, 12, 20, 21], [IGNORED] * 4 + [20, 21], []),
    # a whole text: all but its first token
    ([1, 20, 21, END], [1, 20, 21, END], [(1, 4, 4, True)]),
]


@pytest.mark.parametrize("ids, labels, turns", TABLE)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_turns_end_filled_to_the_grid_where_they_end(sft_recipe, attention, ids, labels, turns):
    assert turns_of(ids, labels, sft_recipe(attention)) == [Turn(*turn) for turn in turns]


def test_full_attention_gives_each_turn_its_own_row_without_later_turns(sft_recipe):
    first, second = conversation_parts(IDS, LABELS, 0, ENDS, sft_recipe("full"))
    assert first.ids[:7] == IDS[:7] and set(first.ids[7:]) <= {END}
    assert second.ids[:13] == IDS and set(second.ids[13:]) <= {END}
    assert [(t.start, t.end) for p in (first, second) for t in p.turns] == [(4, 7), (9, 13)]
    tails = {
        len(conversation_parts(IDS[:7], LABELS[:7], epoch, ENDS, sft_recipe("full"))[0].ids)
        for epoch in range(40)
    }
    assert min(tails) == 7 and len(tails) > 10  # the tail's length is random


@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
def test_a_cut_answer_teaches_no_stopping(sft_recipe, attention):
    recipe = sft_recipe(attention, data={"max_length": 8, "overlong": "truncate"})
    ids = [1, 10, *range(20, 40), END]
    (part,) = conversation_parts(ids, [IGNORED] * 2 + ids[2:], 0, ENDS, recipe)
    assert part.ids == ids[:8] and END not in part.ids
    assert part.turns == (Turn(2, 8, 8, False),)
    dropped = sft_recipe(attention, data={"max_length": 8, "overlong": "drop"})
    assert conversation_parts(ids, [IGNORED] * 2 + ids[2:], 0, ENDS, dropped) == []


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
def test_the_prompt_is_never_corrupted(sft_recipe, attention, complementary):
    """10,000 draws, in six cases."""
    recipe = sft_recipe(attention, noise={"complementary": complementary})
    collator, seen = TurnCollator(recipe, MASKS), torch.zeros(64)
    views = 2 if complementary else 1
    for epoch in range(1_700 // 50 // views):
        rows = [
            (n, conversation_parts(IDS, LABELS, 50 * epoch + n, ENDS, recipe)) for n in range(50)
        ]
        batch = collator(rows)
        masked = batch["scored"]
        assert len(masked) == 50 * views
        assert (batch["input_ids"][masked] == MASK).all()
        assert torch.equal(batch["input_ids"][~masked], batch["target"][~masked])
        user = torch.isin(batch["target"], torch.tensor([1, 10, 11, 12, 13, 14]))
        assert not (masked & user).any()
        seen += torch.bincount(batch["target"][masked], minlength=64)
    assert set(seen.nonzero()[:, 0].tolist()) == {END, 20, 21, 22, 23, 24}


def test_a_run_of_end_tokens_weighs_as_one(sft_recipe):
    recipe = sft_recipe(objective={"ar_weight": 0.3})
    batch = TurnCollator(recipe, MASKS)([(0, conversation_parts(IDS, LABELS, 0, ENDS, recipe))])
    assert float(batch["divisor"]) == pytest.approx(7.0)  # 20 21 END, 22 23 24 END
    assert int(batch["ar_divisor"]) == 7
    filled = batch["eos"].sum()
    assert int(filled) == 2 + 4  # 7..8 of the first turn's canvas, 12..16 of the second's


@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
def test_a_diffusion_head_knows_the_token_before_where_the_sampler_does(sft_recipe, attention):
    """It is visible, ends a block before, or counts as drawn just before in half of the cases."""
    recipe = sft_recipe(attention, convert={"head_rank": 4})
    grid, collator, shares = recipe.convert.block_length, TurnCollator(recipe, MASKS), []
    for epoch in range(40):
        batch = collator([(0, conversation_parts(IDS, LABELS, epoch, ENDS, recipe))])
        names = ("scored", "pos", "target", "previous")
        masked, pos, target, previous = (batch[name][0] for name in names)
        again = collator([(0, conversation_parts(IDS, LABELS, epoch, ENDS, recipe))])
        assert torch.equal(again["previous"], batch["previous"])
        for slot in masked.nonzero()[:, 0].tolist():
            place, found = int(pos[slot]), int(previous[slot])
            hidden = bool(masked[slot - 1]) and not (grid and place % grid == 0)
            if hidden:
                shares.append(found != UNKNOWN)
            begins = slot == 0 or int(pos[slot - 1]) != place - 1  # the copy of a turn
            token = IDS[place - 1] if begins else int(target[slot - 1])
            assert found == token or (hidden and found == UNKNOWN)
    assert 0.35 < sum(shares) / len(shares) < 0.65


@pytest.mark.parametrize("complementary", [False, True])
def test_complementary_views_mask_every_supervised_token_once(sft_recipe, complementary):
    recipe = sft_recipe(noise={"complementary": True})
    batch = TurnCollator(recipe, MASKS)([(0, conversation_parts(IDS, LABELS, 3, ENDS, recipe))])
    one, two = batch["scored"]
    assert not (one & two).any()
    assert int((one | two).sum()) == 4 + 7  # positions 4..7, and 9..15


def logits_of(model, spec, batch):
    """Logits of the masked tokens, as the trainer computes them."""
    slots = Slots(*(batch[name] for name in ("doc", "pos", "noisy", "start", "block")))
    mask = model_mask(model, slots, spec.attention, spec.block_length, spec.local_window)
    row = torch.arange(len(slots.doc))[:, None] * slots.doc.shape[1]
    with torch.no_grad():
        return logits_at(
            model,
            (row + batch["reads"])[batch["scored"]],
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=slots.pos,
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_turn_reads_in_training_is_what_decoding_reads(
    sft_recipe, kind, attention, prediction
):
    """The contract: each block of each turn, against a decoder's canvas in the same state."""
    model, spec = build_model(kind), tiny_spec(attention, 4, prediction)
    recipe = sft_recipe(attention, prediction)
    for epoch in range(3):
        parts = conversation_parts(IDS, LABELS, epoch, ENDS, recipe)
        batch = TurnCollator(recipe, MASKS)([(n, [part]) for n, part in enumerate(parts)])
        got = iter(logits_of(model, spec, batch))
        compared = 0
        for row in range(len(parts)):
            masked = batch["scored"][row].nonzero()[:, 0].tolist()
            for block in dict.fromkeys(batch["block"][row, masked].tolist()):
                own = batch["noisy"][row] & (batch["block"][row] == block)
                pos, ids = batch["pos"][row, own], batch["input_ids"][row, own]
                canvas = torch.zeros(1, int(pos[-1]) + 1, dtype=torch.long)
                canvas[0, : len(IDS)] = torch.tensor(IDS)[: canvas.shape[1]]
                canvas[0, pos] = ids
                start = pos[:1]
                if attention == "full":
                    reader = FullReader(model, spec, torch.tensor([len(pos)]), len(pos), "none")
                else:
                    reader = BlockReader(model, spec, 1, canvas.shape[1], 4, 4, "dynamic")
                want = reader.read(canvas, start, (ids == MASK)[None])
                for logits in want:
                    torch.testing.assert_close(next(got), logits, rtol=0, atol=1e-9)
                    compared += 1
        assert compared == int(batch["scored"].sum()) > 2


@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
def test_no_answer_leaks_into_its_own_prediction(sft_recipe, attention):
    """Change what is hidden behind the masks, and what comes later: no logit moves."""
    model, spec, recipe = build_model("llama"), tiny_spec(attention, 4), sft_recipe(attention)
    other = [*IDS[:9], 30, 31, 32, END]
    labels = [*LABELS[:9], 30, 31, 32, END]
    collator = TurnCollator(recipe, MASKS)
    batch = collator([(0, [conversation_parts(IDS, LABELS, 0, ENDS, recipe)[0]])])
    changed = collator([(0, [conversation_parts(other, labels, 0, ENDS, recipe)[0]])])
    first = batch["scored"] & (batch["pos"] < 8)  # of the first turn
    assert torch.equal(first, changed["scored"] & (changed["pos"] < 8))
    wanted = first[batch["scored"]]
    one = logits_of(model, spec, batch)[wanted]
    two = logits_of(model, spec, changed)[
        (changed["scored"] & (changed["pos"] < 8))[changed["scored"]]
    ]
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    hidden = dict(batch, target=torch.where(batch["scored"], 40, batch["target"]))
    torch.testing.assert_close(logits_of(model, spec, hidden)[wanted], one, rtol=0, atol=0)


@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
def test_packed_conversations_have_the_loss_of_each_alone(sft_recipe, attention):
    model, spec, recipe = build_model("llama"), tiny_spec(attention, 4), sft_recipe(attention)
    conversations = [
        (IDS, LABELS),
        ([1, 10, 20, END], [IGNORED] * 2 + [20, END]),
        ([1, 14, 13, 12, 11, 25, 26, END], [IGNORED] * 5 + [25, 26, END]),
    ]
    parts = [
        p for ids, labels in conversations for p in conversation_parts(ids, labels, 1, ENDS, recipe)
    ]
    collator = TurnCollator(recipe, MASKS)

    def loss(batch):
        masked = batch["scored"]
        ce = cross_entropy(logits_of(model, spec, batch), batch["target"][masked])
        return float((batch["coef"][masked] * ce).sum()), float(batch["divisor"])

    packed, alone = loss(collator([(0, parts)])), [loss(collator([(0, [p])])) for p in parts]
    assert packed[0] == pytest.approx(sum(value for value, _ in alone), abs=1e-6)
    assert packed[1] == pytest.approx(sum(divisor for _, divisor in alone))


def test_padding_is_read_by_nobody(sft_recipe):
    recipe = sft_recipe()
    long, short = (
        conversation_parts(IDS, LABELS, 0, ENDS, recipe),
        [ConversationPart([1, 10, 20, END], (Turn(2, 4, 4, True),), 0)],
    )
    batch = TurnCollator(recipe, MASKS)([(0, long), (1, short)])
    padding = batch["doc"] == PADDING
    assert padding.any() and not batch["scored"][padding].any() and not batch["ar"][padding].any()


def test_the_stream_of_rows_is_a_function_of_the_data_alone(sft_recipe):
    rows = [
        {"input_ids": [1, n, 20, END], "labels": [IGNORED, IGNORED, 20, END]} for n in range(4, 30)
    ]
    recipe = sft_recipe()
    one, two = (iter(PackedConversations(rows, ENDS, recipe)) for _ in range(2))
    first = [next(one) for _ in range(12)]
    assert first == [next(two) for _ in range(12)]
    seen = [part.ids[1] for _, row in first for part in row]
    assert len(set(seen[:26])) == 26  # every row once before any comes again
    answers = PackedConversations(rows, ENDS, recipe).answers()
    assert (answers.turns, answers.ended, answers.cut) == (26, 26, 0)
