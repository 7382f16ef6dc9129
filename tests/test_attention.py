"""Masks against an oracle written from the rules, models under those masks against themselves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, MASK, WINDOW
from hypothesis import given, settings
from hypothesis import strategies as st

from ar2diff.core.attention import (
    CLEAN,
    PADDING,
    Slots,
    allowed_edges,
    dense_mask,
    lay_out,
    layer_windows,
    model_mask,
    reading_slot,
    reveal_edges,
)

BLOCK = 4
ATTENTIONS = ("causal_context", "block_causal", "full")
IMPLEMENTATIONS = ("sdpa", "eager")


# A row is a list of (document or None, logical position, "noisy" or "clean"): the rules in words.


def may_read(query, key, attention, block, window=None, revealed=None):
    """May this slot read that one? `revealed(p, q)`: has the anneal opened the edge p -> q."""
    document, p, copy = query
    other, q, other_copy = key
    if document is None or document != other:
        return False
    if attention == "full":
        goal, reach = True, window
    else:
        reach = None if window is None else window - 1
        if copy == "noisy":
            # The block being denoised sees itself whole, and the finished blocks behind it.
            goal = q // block == p // block if other_copy == "noisy" else q // block < p // block
        elif other_copy == "noisy":
            goal = False
        elif attention == "causal_context":
            goal = q <= p
        else:
            goal = q // block <= p // block
    if reach is not None and abs(p - q) > reach:
        goal = False
    of_an_ar_model = q <= p and (window is None or p - q < window)
    return goal and (of_an_ar_model or revealed is None or revealed(p, q))


def oracle(row, attention, block, window=None, revealed=None):
    return [
        [
            q == k or may_read(row[q], row[k], attention, block, window, revealed)
            for k in range(len(row))
        ]
        for q in range(len(row))
    ]


def document(name, length):
    return [(name, position) for position in range(length)]


PAD = (None, 0)
ROWS = {
    "one document, ragged tail": document("a", 11),
    "packed": document("a", 6) + document("b", 5),
    "packed on the grid": document("a", 4) + document("b", 7),
    "left padding": [PAD] * 3 + document("a", 8),
    "right padding": document("a", 7) + [PAD] * 4,
    "packed and padded": [PAD] + document("a", 5) + document("b", 3) + [PAD] * 2,
}


def copies(row, form):
    """The slots of a row in the layout of training, decoding or the AR mode."""
    if form == "train":
        return [(*slot, "noisy") for slot in row] + [(*slot, "clean") for slot in row]
    if form == "decode":  # the last block that each document has begun is being denoised
        ends = {}
        for name, position in row:
            ends[name] = max(position, ends.get(name, 0))
        return [
            (name, p, "noisy" if p // BLOCK == ends[name] // BLOCK else "clean") for name, p in row
        ]
    return [(*slot, "noisy" if form == "full" else "clean") for slot in row]


def slots_of(rows):
    names = {None: PADDING, "a": 0, "b": 1, "c": 2}
    return Slots(
        torch.tensor([[names[name] for name, _, _ in row] for row in rows]),
        torch.tensor([[position for _, position, _ in row] for row in rows]),
        torch.tensor([[copy == "noisy" for _, _, copy in row] for row in rows]),
    )


def expected(rows, *rules):
    return torch.tensor([oracle(row, *rules) for row in rows])[:, None]


FORMS = [(a, f) for a in ("causal_context", "block_causal") for f in ("train", "decode", "ar")]
FORMS += [("full", "full")]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("attention", "form"), FORMS)
def test_every_element_of_the_mask_is_what_the_rules_say(attention, form, window, ratio):
    rows = [copies(row, form) for row in ROWS.values()]
    slots = slots_of(rows)
    for block in (1, 2, BLOCK, 16) if attention != "full" else (None,):
        width = block or 11
        reveal = reveal_edges(ratio, 11, width, seed=0, step=7)
        table = None if reveal is None else lambda p, q, t=reveal, w=width: bool(t[p, q % w])
        mask = dense_mask(allowed_edges(slots, attention, block, reveal, window), slots)
        right = expected(rows, attention, block, window, table)
        for name, got, want in zip(ROWS, mask, right, strict=True):
            assert torch.equal(got, want), (name, block)


@st.composite
def random_rows(draw):
    row = [PAD] * draw(st.integers(0, 3))
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        row += document(name, draw(st.integers(1, 6)))
    return row + [PAD] * draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=random_rows(),
    block=st.integers(1, 7),
    window=st.none() | st.integers(1, 6),
    attention=st.sampled_from(ATTENTIONS),
)
def test_the_mask_of_any_layout_is_what_the_rules_say(row, block, window, attention):
    row = copies(row, "full" if attention == "full" else "train")
    slots = slots_of([row])
    mask = dense_mask(allowed_edges(slots, attention, block, None, window), slots)
    assert mask[0, 0].tolist() == oracle(row, attention, block, window)


def test_the_training_layout_is_the_noisy_copy_then_the_clean_one_with_the_same_positions():
    x0, xt = torch.tensor([[5, 6, 7]]), torch.tensor([[5, MASK, 7]])
    doc, pos = torch.zeros_like(x0), torch.arange(3)[None]
    ids, slots = lay_out(xt, x0, doc, pos, "causal_context")
    assert ids.tolist() == [[5, MASK, 7, 5, 6, 7]]
    assert slots.pos.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert slots.noisy.tolist() == [[True] * 3 + [False] * 3]
    assert lay_out(xt, x0, doc, pos, "full")[0] is xt


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("attention", ["causal_context", "block_causal"])
def test_a_mask_tells_where_the_clean_copy_begins_and_nothing_from_there_reads_before(
    tiny_model, attention, ratio
):
    plain = slots_of([copies(row, "full") for row in ROWS.values()])
    _, slots = lay_out(plain.pos, plain.pos, plain.doc, plain.pos, attention)
    for block in (1, BLOCK, 16):
        rule = (attention, block, "kept", reveal_edges(ratio, 11, block, 0, 0))
        masks = model_mask(tiny_model("qwen3_mixed"), slots, *rule)
        for mask in masks.values():
            assert getattr(mask, CLEAN) == 11
            assert not mask[..., 11:, :11].any()
    model, rule = tiny_model("llama"), (attention, BLOCK, None)
    assert not hasattr(model_mask(model, slots, *rule, queries=range(11, 22)), CLEAN)
    assert not hasattr(model_mask(model, replace(slots, clean=None), *rule), CLEAN)
    assert not hasattr(model_mask(model, plain, "full", None, None), CLEAN)


def test_training_and_decoding_read_the_same_tokens():
    pos, doc = torch.arange(11)[None], torch.zeros(1, 11, dtype=torch.long)
    _, train = lay_out(pos, pos, doc, pos, "causal_context")
    for attention in ("causal_context", "block_causal"):
        mask = dense_mask(allowed_edges(train, attention, BLOCK), train)[0, 0]
        for start in (0, 4, 8):
            end = min(start + BLOCK, 11)
            alone = Slots(doc[:, :end], pos[:, :end], pos[:, :end] >= start)
            own = dense_mask(allowed_edges(alone, attention, BLOCK), alone)[0, 0]
            slots = [*range(11, 11 + start), *range(start, end)]  # clean context, noisy block
            assert torch.equal(mask[slots][:, slots], own)
            elsewhere = [s for s in range(22) if s not in slots]
            assert not mask[slots][:, elsewhere].any()


def test_every_slot_sees_itself_even_in_padding():
    slots = slots_of([copies(row, "train") for row in ROWS.values()])
    for attention in ATTENTIONS:
        mask = dense_mask(allowed_edges(slots, attention, BLOCK, None, 1), slots)
        assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_where_a_token_is_read():
    pos = torch.tensor([[0, 1, 2, 3, 4, 5]])
    for attention in ATTENTIONS:
        same = reading_slot(pos, attention, 2, "same")
        assert same.tolist() == [[0, 1, 2, 3, 4, 5]]
    # shift: one to the left; across a block boundary in the clean copy, which starts at slot 6
    assert reading_slot(pos, "causal_context", 2, "shift")[0, 1:].tolist() == [0, 7, 2, 9, 4]
    assert reading_slot(pos, "causal_context", 1, "shift")[0, 1:].tolist() == [6, 7, 8, 9, 10]
    assert reading_slot(pos, "full", None, "shift")[0, 1:].tolist() == [0, 1, 2, 3, 4]


def test_where_a_token_of_a_packed_document_is_read():
    pos = torch.tensor([[0, 1, 2, 0, 1, 2]])
    slots = reading_slot(pos, "block_causal", 2, "shift")[0]
    assert slots[[1, 2, 4, 5]].tolist() == [0, 7, 3, 10]


def test_where_a_token_is_read_in_another_layout():
    pos, own = torch.tensor([2, 3, 4, 5]), torch.tensor([6, 7, 8, 9])
    given = {"own": own, "clean": 20 + pos}
    assert reading_slot(pos, "block_causal", 2, "same", **given).tolist() == [6, 7, 8, 9]
    assert reading_slot(pos, "block_causal", 2, "shift", **given).tolist() == [21, 6, 23, 8]
    assert reading_slot(pos, "full", None, "shift", **given).tolist() == [5, 6, 7, 8]
    # in decoding the context ends where the block begins
    assert reading_slot(pos, "block_causal", 2, "shift", own, own).tolist() == [5, 6, 7, 8]


# Back ends


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_eager_gets_a_float_mask_that_says_what_the_bool_one_says(tiny_model, attention, dtype):
    slots = slots_of([copies(row, "train") for row in ROWS.values()])
    mask = model_mask(tiny_model("llama", "eager", dtype), slots, attention, BLOCK, None)
    right = model_mask(tiny_model("llama", "sdpa", dtype), slots, attention, BLOCK, None)
    assert right.dtype == torch.bool and right.shape == (len(ROWS), 1, 22, 22)
    assert mask.dtype == dtype and mask.shape == right.shape
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    assert torch.equal(mask == 0, right)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_flex_block_mask_is_the_dense_mask(tiny_model, attention):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    slots = slots_of([copies(row, "train") for row in ROWS.values()])
    reveal = reveal_edges(0.5, 11, BLOCK if attention != "full" else 11, seed=0, step=0)
    try:
        model = tiny_model("llama", "flex_attention")
        mask = model_mask(model, slots, attention, BLOCK, None, reveal)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"flex_attention does not build a BlockMask here: {error}")
    right = model_mask(tiny_model("llama"), slots, attention, BLOCK, None, reveal)
    assert isinstance(mask, flex.BlockMask)
    dense = flex.create_mask(mask.mask_mod, len(ROWS), None, 22, 22, device="cpu")
    assert torch.equal(dense, right)
    # and its own table of blocks leaves none of them out
    fine = flex.create_block_mask(mask.mask_mod, len(ROWS), None, 22, 22, "cpu", BLOCK_SIZE=1)
    assert torch.equal(fine.to_dense().bool(), right)


def test_layers_that_differ_in_their_window_get_a_mask_each(tiny_model):
    rows = [copies(row, "train") for row in ROWS.values()]
    masks = model_mask(tiny_model("qwen3_mixed"), slots_of(rows), "causal_context", BLOCK, "kept")
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["full_attention"], expected(rows, "causal_context", BLOCK))
    assert torch.equal(masks["sliding_attention"], expected(rows, "causal_context", BLOCK, WINDOW))


def test_a_dropped_window_is_dropped_in_every_layer(tiny_model):
    rows = [copies(row, "train") for row in ROWS.values()]
    for kind in ("mistral_window", "qwen3_mixed"):
        masks = model_mask(tiny_model(kind), slots_of(rows), "block_causal", BLOCK, "dropped")
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert torch.equal(mask, expected(rows, "block_causal", BLOCK))


def test_the_window_of_each_kind_of_layer(tiny_model):
    def windows(kind, local_window="kept"):
        return layer_windows(tiny_model(kind).config, local_window)

    assert windows("llama") == windows("mistral") == windows("gpt2") == {None: None}
    assert windows("mistral_window") == {None: WINDOW}
    assert windows("qwen3_mixed") == {"full_attention": None, "sliding_attention": WINDOW}
    assert windows("mistral_window", "dropped") == {None: None}


def test_an_implementation_that_takes_no_mask_is_refused():
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    config.get_text_config = lambda: config
    slots = slots_of([copies(ROWS["packed"], "train")])
    with pytest.raises(ValueError, match="flash_attention_2"):
        model_mask(SimpleNamespace(config=config), slots, "full", None, None)


# The anneal


def test_the_revealed_edges_are_a_function_of_seed_and_step():
    before = torch.get_rng_state()
    first = reveal_edges(0.5, 64, 64, seed=1, step=10)
    assert torch.equal(before, torch.get_rng_state())  # ranks need not agree on the global one
    torch.manual_seed(99)
    assert torch.equal(first, reveal_edges(0.5, 64, 64, seed=1, step=10))
    assert not torch.equal(first, reveal_edges(0.5, 64, 64, seed=1, step=11))
    assert not torch.equal(first, reveal_edges(0.5, 64, 64, seed=2, step=10))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_share_of_open_edges_ahead_is_the_ratio(ratio):
    length, steps = 64, 20
    pos = torch.arange(length)[None]
    slots = Slots(torch.zeros_like(pos), pos, torch.ones_like(pos, dtype=torch.bool))
    ahead = torch.ones(length, length).triu(1).bool()
    opened = 0
    for step in range(steps):
        reveal = reveal_edges(ratio, length, length, seed=0, step=step)
        opened += dense_mask(allowed_edges(slots, "full", None, reveal), slots)[0, 0][ahead].sum()
    edges = steps * int(ahead.sum())
    deviation = (ratio * (1 - ratio) / edges) ** 0.5
    assert abs(opened / edges - ratio) < 4 * deviation


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_anneal_never_closes_an_edge_that_a_causal_model_has(attention):
    row = copies(ROWS["one document, ragged tail"], "full" if attention == "full" else "train")
    slots = slots_of([row])
    goal = dense_mask(allowed_edges(slots, attention, BLOCK), slots)[0, 0]
    behind = slots.pos[0][None, :] <= slots.pos[0][:, None]
    width = 11 if attention == "full" else BLOCK
    for ratio in (0.0, 0.3):
        reveal = reveal_edges(ratio, 11, width, seed=3, step=5)
        mask = dense_mask(allowed_edges(slots, attention, BLOCK, reveal), slots)[0, 0]
        assert torch.equal(mask & behind, goal & behind)
        assert not (mask & ~goal).any()
    assert not (
        dense_mask(allowed_edges(slots, attention, BLOCK, reveal_edges(0, 11, width, 0, 0)), slots)[
            0, 0
        ]
        & ~behind
    ).any()


def test_no_ratio_reopens_padding_or_another_document():
    rows = [copies(ROWS["packed and padded"], "full")]
    slots, everything = slots_of(rows), torch.ones(11, 11, dtype=torch.bool)
    mask = dense_mask(allowed_edges(slots, "full", None, everything), slots)
    assert torch.equal(mask, expected(rows, "full", None))
    apart = slots.doc[0][:, None] != slots.doc[0][None, :]
    assert not mask[0, 0][apart].any()


# Models


def forward(model, ids, slots, attention, reveal=None, block=BLOCK, local_window="kept"):
    mask = model_mask(model, slots, attention, block, local_window, reveal)
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, position_ids=slots.pos, use_cache=False
        ).logits


def one_document(ids):
    pos = torch.arange(ids.shape[1]).expand_as(ids)
    return Slots(torch.zeros_like(pos), pos, torch.ones_like(pos, dtype=torch.bool))


def words(*size, seed=0):
    return torch.randint(3, MASK, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_anneal_0_is_the_built_in_causal_model_bit_for_bit(tiny_model, kind, implementation, dtype):
    model = tiny_model(kind, implementation, dtype)
    for length in (9, 130):
        ids = words(2, length)
        with torch.no_grad():
            causal = model(input_ids=ids, use_cache=False).logits
        reveal = reveal_edges(0.0, length, length, seed=0, step=0)
        assert torch.equal(forward(model, ids, one_document(ids), "full", reveal), causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_anneal_1_is_the_built_in_full_model_bit_for_bit(tiny_model, kind, implementation, dtype):
    model = tiny_model(kind, implementation, dtype)
    for length in (9, 130):
        ids = words(2, length)
        with torch.no_grad():
            full = model(input_ids=ids, use_cache=False, is_causal=False).logits
            causal = model(input_ids=ids, use_cache=False).logits
        assert not torch.allclose(full, causal, atol=0.1)
        reveal = reveal_edges(1.0, length, length, seed=0, step=0)
        assert torch.equal(forward(model, ids, one_document(ids), "full", reveal), full)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_padded_row_is_the_built_in_model_with_a_2d_mask(tiny_model, kind, ratio):
    model, ids = tiny_model(kind), words(1, 11)
    for left, right in ((3, 0), (0, 4)):
        real = torch.ones(1, 11, dtype=torch.long)
        real[0, :left], real[0, 11 - right :] = 0, 0
        pos = (real.cumsum(1) - 1).clamp(min=0)
        slots = Slots(real - 1, pos, real.bool())
        got = forward(model, ids, slots, "full", reveal_edges(ratio, 11, 11, 0, 0))
        with torch.no_grad():
            want = model(
                input_ids=ids,
                attention_mask=real,
                position_ids=pos,
                use_cache=False,
                is_causal=ratio == 0,
            ).logits
        torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=0, atol=1e-10)


def close(implementation):
    """Stock eager attention takes its softmax in float32 whatever it is given."""
    return {"rtol": 0, "atol": 1e-10 if implementation == "sdpa" else 1e-4}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", [*CLASSES, "qwen3_mixed"])
def test_packed_documents_are_what_each_is_alone(tiny_model, kind, attention, implementation):
    model = tiny_model(kind, implementation)
    x0, masked = words(1, 16), torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [1, 3, 5, 8, 9, 12, 13]] = True
    xt = torch.where(masked, MASK, x0)
    # 6 tokens, 7 tokens, padding; reveal half the edges: they belong to positions, not to slots
    doc = torch.tensor([[0] * 6 + [1] * 7 + [PADDING] * 3])
    pos = torch.tensor([[*range(6), *range(7), 0, 0, 0]])
    reveal = reveal_edges(0.5, 16, 16 if attention == "full" else BLOCK, seed=0, step=1)
    ids, slots = lay_out(xt, x0, doc, pos, attention)
    packed = forward(model, ids, slots, attention, reveal)
    for start, end in ((0, 6), (6, 13)):
        part = slice(start, end)
        ids, slots = lay_out(
            xt[:, part], x0[:, part], torch.zeros_like(doc[:, part]), pos[:, part], attention
        )
        alone = forward(model, ids, slots, attention, reveal)
        noisy = packed[:, part]
        clean = packed[:, 16 + start : 16 + end]
        got = noisy if attention == "full" else torch.cat([noisy, clean], 1)
        torch.testing.assert_close(got, alone, **close(implementation))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_stands_in_padding_is_invisible(tiny_model, attention):
    model, x0 = tiny_model("llama"), words(1, 10)
    doc = torch.tensor([[0] * 7 + [PADDING] * 3])
    pos = torch.arange(10)[None] * (doc != PADDING)
    other = torch.where(doc == PADDING, words(1, 10, seed=1), x0)
    logits = [
        forward(model, *lay_out(ids, ids, doc, pos, attention), attention)[:, :7]
        for ids in (x0, other)
    ]
    assert torch.equal(*logits)
