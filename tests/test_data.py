"""Documents to noised batches: the canvas, the EOS run, cuts, packing, mixtures, broken sources."""

from collections import Counter
from itertools import accumulate, islice

import pytest
import torch
from conftest import MASK, MASKS
from hypothesis import given, settings
from hypothesis import strategies as st

from ar2diff.config.recipe import Recipe
from ar2diff.config.sections import Source
from ar2diff.core.attention import (
    PADDING,
    allowed_edges,
    dense_mask,
    lay_out,
    model_mask,
    reading_slot,
)
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.noises import Mask
from ar2diff.core.seeds import content_key
from ar2diff.data.documents import (
    OPEN_ROWS,
    Collator,
    DocumentPart,
    PackedDocuments,
    block_length_at,
    document_parts,
    tokenize,
)
from ar2diff.data.sources import Documents, find_file, read_texts
from ar2diff.training.adapt import read_rows

EOS = 2
BLOCKWISE = ("causal_context", "block_causal")
ATTENTIONS = (*BLOCKWISE, "full")
PREFIX = [1, 11, 12, 13, 14, 15, 16, 17]  # two blocks of four


def words(length, seed=0):
    return torch.randint(3, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cut(ids, recipe, epoch=0, seed=0):
    return list(document_parts(ids, epoch, EOS, recipe, seed))


def collate(recipe, *rows):
    return Collator(recipe, MASKS)(list(enumerate(rows)))


# The canvas: nothing visible tells where the answer ends


ENDINGS = ([EOS], [21, EOS], [21, 22, EOS], [21, 22, 23, EOS])  # all in the third block


@pytest.fixture
def all_masked(monkeypatch):
    """Every maskable token is masked."""
    monkeypatch.setattr("ar2diff.data.documents.block_times", lambda blocks, *_: torch.ones(blocks))


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_documents_that_end_anywhere_in_a_block_are_the_same_canvas(
    make_recipe, all_masked, attention
):
    recipe = make_recipe(attention)
    seen = []
    for ending in ENDINGS:
        batch = collate(recipe, cut(PREFIX + ending, recipe))
        # the last block is masked; what stands before it is read clean
        ids, slots = lay_out(batch["xt"], batch["x0"], batch["doc"], batch["pos"], attention)
        mask = dense_mask(allowed_edges(slots, attention, 4), slots)
        queries = mask[:, :, 8:12]  # of the last block
        seen.append(
            (
                batch["xt"],
                batch["doc"],
                batch["pos"],
                batch["scored"],
                mask,
                ids * queries.any(2)[:, 0],
            )
        )
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_documents_that_end_anywhere_in_a_full_canvas_are_the_same_canvas(make_recipe, all_masked):
    recipe, seen = make_recipe("full"), {}
    for ending in ENDINGS:
        for epoch in range(40):  # tails have random lengths: take those that fill 12 slots
            batch = collate(recipe, cut(PREFIX + ending, recipe, epoch))
            if batch["xt"].shape[1] == 12:
                seen[len(ending)] = [batch[name] for name in ("xt", "doc", "pos", "scored")]
    assert len(seen) == 4
    for other in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(seen[1], other, strict=True))


@pytest.mark.parametrize("prediction", ["same", "shift"])
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_no_logit_of_a_masked_last_block_tells_where_it_ends(
    tiny_model, make_recipe, attention, prediction
):
    model, recipe, seen = tiny_model("llama"), make_recipe(attention), []
    for ending in ENDINGS:
        batch = collate(recipe, cut(PREFIX + ending, recipe))
        xt = torch.where(batch["pos"] >= 8, MASK, batch["x0"])
        ids, slots = lay_out(xt, batch["x0"], batch["doc"], batch["pos"], attention)
        mask = model_mask(model, slots, attention, 4, None)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=slots.pos, use_cache=False
            ).logits[0]
        seen.append(logits[reading_slot(batch["pos"], attention, 4, prediction)[0, 8:]])
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_the_noise_of_a_last_block_does_not_tell_where_it_ends(make_recipe, attention):
    recipe, epochs = make_recipe(attention), 1000
    for ending in ENDINGS:
        collator, ks, places = Collator(recipe, MASKS), Counter(), torch.zeros(4)
        for epoch in range(epochs):
            (piece,) = cut(PREFIX + ending, recipe, epoch)
            masked = collator.noised(piece, 4)[1][0, 8:]
            ks[int(masked.sum())] += 1
            places += masked
        assert all(abs(ks[k] / epochs - 0.25) < 4 * (0.1875 / epochs) ** 0.5 for k in range(1, 5))
        # the mean of k/4 is 0.625 at every place, before the end and behind it
        assert (places / epochs - 0.625).abs().max() < 4 * (0.235 / epochs) ** 0.5


def test_the_last_block_is_filled_to_the_grid_with_eos_and_no_further(make_recipe):
    recipe = make_recipe("block_causal")
    for length in range(2, 17):
        (piece,) = cut([*words(length - 1), EOS], recipe)
        assert len(piece.ids) == -(-length // 4) * 4
        assert piece.ids[length - 1 :] == [EOS] * piece.run and piece.real == length


def test_the_fill_is_masked_and_supervised(make_recipe, all_masked):
    recipe = make_recipe("causal_context")
    batch = collate(recipe, cut([*PREFIX, EOS], recipe))
    assert batch["scored"][0, 8:].all() and (batch["coef"][0, 8:] > 0).all()
    assert (batch["x0"][0, 8:] == EOS).all()
    assert batch["eos"][0].tolist() == [False] * 8 + [True] * 4


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_eos_run_weighs_as_one_token_in_divisor_and_coef(make_recipe, all_masked, attention):
    recipe = make_recipe(attention)
    for epoch in range(8):
        for ending in ENDINGS:
            batch = collate(recipe, cut(PREFIX + ending, recipe, epoch))
            assert float(batch["divisor"]) == pytest.approx(7 + len(ending))  # all but position 0
            run = batch["eos"]
            assert float(batch["coef"][run].sum()) == pytest.approx(1)
            assert float(batch["coef"].sum()) == pytest.approx(7 + len(ending))


@pytest.mark.parametrize("normaliser", ["masked", "sequence"])
def test_an_eos_run_weighs_as_one_token_under_every_normaliser(make_recipe, all_masked, normaliser):
    recipe = make_recipe("block_causal", objective={"normaliser": normaliser})
    batch = collate(recipe, cut([1, 9, 8, 7, EOS], recipe))  # 3 words and a run of 4
    total = 4 if normaliser == "masked" else 1
    assert float(batch["divisor"]) == pytest.approx(total)
    assert float(batch["coef"].sum()) == pytest.approx(total)


def test_the_tail_of_a_full_canvas_has_a_random_length(make_recipe):
    recipe, ids = make_recipe("full", data={"max_length": 64}), [*words(9), EOS]
    lengths = [len(cut(ids, recipe, epoch)[0].ids) for epoch in range(300)]
    assert min(lengths) < 15 and max(lengths) > 59  # whatever room the row has
    assert set(len(cut(ids * 6, recipe, epoch)[0].ids) for epoch in range(60)) == set(range(60, 65))


def test_the_tail_of_a_full_canvas_is_reproducible(make_recipe):
    recipe, ids = make_recipe("full", data={"max_length": 64}), [*words(9), EOS]

    def tails(**changes):
        return [len(cut(ids, recipe, epoch, **changes)[0].ids) for epoch in range(20)]

    first = tails()
    torch.manual_seed(7)
    assert tails() == first != tails(seed=1)
    others = [len(cut([*words(9, seed=s), EOS], recipe)[0].ids) for s in range(20)]
    assert len(set(others)) > 3  # each document its own


def test_the_ar_loss_goes_up_to_the_first_eos_only(make_recipe):
    recipe = make_recipe("causal_context")
    for ending in ENDINGS:
        batch = collate(recipe, cut(PREFIX + ending, recipe))
        end = 8 + len(ending)
        assert batch["ar"][0].nonzero()[:, 0].tolist() == list(range(1, end))
        assert batch["x0"][0, end - 1] == EOS
        assert int(batch["ar_divisor"]) == end - 1


def test_padding_beyond_is_hidden_and_unsupervised(make_recipe):
    recipe = make_recipe("causal_context")
    long, short = cut([*words(14), EOS], recipe), cut([*words(5), EOS], recipe)
    batch = collate(recipe, long, short)
    pad = torch.arange(16) >= 8
    assert (batch["doc"][1, pad] == PADDING).all()
    for name in ("scored", "coef", "ar", "eos"):
        assert not batch[name][1, pad].any(), name
    _, slots = lay_out(batch["xt"], batch["x0"], batch["doc"], batch["pos"], "causal_context")
    mask = dense_mask(allowed_edges(slots, "causal_context", 4), slots)[1, 0]
    hidden = slots.doc[1] == PADDING
    assert hidden.sum() == 16 and not mask[~hidden][:, hidden].any()
    assert int(batch["tokens"]) == 24


def test_a_mask_token_in_the_text_is_never_a_target(make_recipe):
    recipe = make_recipe("block_causal")
    ids = [1, 9, MASK, 8, 7, 6, 5, EOS]
    for epoch in range(20):
        batch = collate(recipe, cut(ids, recipe, epoch))
        assert not batch["coef"][batch["x0"] == MASK].any()
        assert float(batch["divisor"]) == 6  # and is no scored token


def test_a_mask_token_in_the_text_is_no_target_of_the_ar_loss(make_recipe):
    recipe = make_recipe("causal_context")
    batch = collate(recipe, cut([1, 9, MASK, 8, 7, 6, 5, EOS], recipe))
    assert not batch["ar"][batch["x0"] == MASK].any()


# Cuts


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    length=st.integers(2, 60),
    max_length=st.sampled_from([4, 8, 16]),
    attention=st.sampled_from(ATTENTIONS),
)
def test_split_loses_no_token_and_no_piece_is_too_long(make_recipe, length, max_length, attention):
    recipe = make_recipe(attention, data={"max_length": max_length})
    ids = [*words(length - 1), EOS]
    parts = cut(ids, recipe)
    # a piece starts with the token before it: position 0 is never scored, every other token once
    assert [t for part in parts for t in part.ids[1 : part.real]] == ids[1:]
    starts = [0, *accumulate(part.real - 1 for part in parts)]
    assert [part.ids[0] for part in parts] == [ids[start] for start in starts[:-1]]
    assert all(2 <= len(part.ids) <= max_length for part in parts)
    assert {part.document for part in parts} == {content_key(ids)}
    if attention != "full":
        assert all(len(part.ids) % 4 == 0 for part in parts)


def test_only_the_end_of_a_document_is_filled(make_recipe):
    recipe = make_recipe("block_causal", data={"max_length": 8})
    parts = cut([*words(14), 9, EOS], recipe)
    assert [(p.real, p.run, len(p.ids)) for p in parts] == [(8, 0, 8), (8, 0, 8), (2, 3, 4)]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_truncate_keeps_the_first_row_and_gives_it_no_end(make_recipe, attention):
    recipe = make_recipe(attention, data={"max_length": 8, "overlong": "truncate"})
    ids = [*words(20), EOS]
    assert cut(ids, recipe) == [DocumentPart(ids[:8], 8, 0, 0, content_key(ids))]
    assert cut([*ids[:5], EOS], recipe)[0].run >= 1  # a document that fits keeps its end


def test_a_document_of_one_token_gives_nothing(make_recipe):
    assert cut([EOS], make_recipe("full")) == []


# Packing


class Texts:
    """Documents without a file: a list of texts, over and over."""

    def __init__(self, texts):
        self.texts, self.size = texts, len(texts)

    def __iter__(self):
        epoch = 0
        while True:
            yield from ((text, epoch) for text in self.texts)
            epoch += 1


TEXTS = [f"{i:02d} " + "a story " * (i % 7) for i in range(25)]


def packed(recipe, tokenizer, count, skip=frozenset()):
    rows = PackedDocuments(Texts(TEXTS), tokenizer, EOS, recipe, skip)
    return [row for _, row in islice(rows, count)]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_row_never_exceeds_max_length(make_recipe, tiny_tokenizer, attention):
    recipe = make_recipe(attention, data={"max_length": 32})
    rows = packed(recipe, tiny_tokenizer, 100)
    used = [sum(len(piece.ids) for piece in row) for row in rows]
    assert max(used) <= 32 and max(map(len, rows)) > 1
    assert sum(used) / len(used) > 0.9 * 32


@pytest.mark.parametrize("attention", BLOCKWISE)
def test_blocks_of_packed_documents_stand_on_the_grid_of_the_row(
    make_recipe, tiny_tokenizer, attention
):
    recipe = make_recipe(attention, data={"max_length": 32})
    batch = collate(recipe, *packed(recipe, tiny_tokenizer, 20))
    real = batch["doc"] != PADDING
    slot = torch.arange(batch["pos"].shape[1]).expand_as(real)
    assert torch.equal(batch["pos"][real] % 4, slot[real] % 4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_positions_restart_with_every_document(make_recipe, tiny_tokenizer, attention):
    recipe = make_recipe(attention, data={"max_length": 32})
    rows = packed(recipe, tiny_tokenizer, 20)
    batch = collate(recipe, *rows)
    for r, row in enumerate(rows):
        lengths = [len(piece.ids) for piece in row]
        end = sum(lengths)
        assert batch["pos"][r, :end].tolist() == [p for n in lengths for p in range(n)]
        documents = [number for number, n in enumerate(lengths) for _ in range(n)]
        assert batch["doc"][r, :end].tolist() == documents
        assert batch["x0"][r, :end].tolist() == [token for piece in row for token in piece.ids]


@pytest.mark.parametrize("packing", [True, False])
def test_every_piece_of_an_epoch_is_trained_on_exactly_once(make_recipe, tiny_tokenizer, packing):
    recipe = make_recipe("block_causal", data={"max_length": 32, "packing": packing})
    rows = packed(recipe, tiny_tokenizer, 60 + 3 * OPEN_ROWS)
    got = Counter(tuple(p.ids) for row in rows for p in row if p.epoch == 0)
    want = Counter(
        tuple(p.ids) for text in TEXTS for p in cut(tokenize(tiny_tokenizer, text, EOS), recipe)
    )
    assert got == want
    if not packing:
        assert all(len(row) == 1 for row in rows)


def test_rows_are_numbered_and_the_same_each_time(make_recipe, tiny_tokenizer):
    recipe = make_recipe("full", data={"max_length": 32})
    rows = PackedDocuments(Texts(TEXTS), tiny_tokenizer, EOS, recipe)
    first = list(islice(rows, 30))
    assert [number for number, _ in first] == list(range(30))
    assert list(islice(rows, 30)) == first


def test_documents_held_out_are_never_trained_on(make_recipe, tiny_tokenizer):
    recipe = make_recipe("full", data={"max_length": 32})
    held_out = frozenset(content_key(tokenize(tiny_tokenizer, t, EOS)) for t in TEXTS[:3])
    rows = packed(recipe, tiny_tokenizer, 120, skip=held_out)
    seen = {piece.document for row in rows for piece in row}
    assert len(seen) == len(TEXTS) - 3 and not seen & held_out


def test_a_document_is_its_bos_its_text_and_one_eos(tiny_tokenizer):
    ids = tokenize(tiny_tokenizer, "ab", EOS)
    assert ids[0] == tiny_tokenizer.bos_token_id and ids[-1] == EOS and len(ids) == 4
    assert tokenize(tiny_tokenizer, "ab</s>", EOS) == ids
    assert tokenize(tiny_tokenizer, "", EOS) == []


def test_data_without_a_usable_row_is_an_error(make_recipe, tiny_tokenizer):
    rows = PackedDocuments(Texts([""] * 5), tiny_tokenizer, EOS, make_recipe("full"))
    with pytest.raises(Ar2DiffError, match="no usable row"):
        next(iter(rows))


def test_rows_of_real_stories_keep_every_token(shared_data, make_recipe):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data("stories260K-hf"))
    texts = read_texts(shared_data("tinystories/valid.jsonl.gz"), "text")[:40]
    recipe = make_recipe("causal_context", block_length=8, data={"max_length": 128})
    noise = Mask(mask=len(tokenizer), ids=torch.arange(len(tokenizer)))
    for text in texts:
        ids = tokenize(tokenizer, text, tokenizer.bos_token_id)  # stories end with <s>
        parts = cut(ids, recipe)
        assert [t for p in parts for t in p.ids[1 : p.real]] == ids[1:]
        batch = Collator(recipe, noise)([(n, [p]) for n, p in enumerate(parts)])
        assert float(batch["divisor"]) == pytest.approx(sum(p.real - 1 for p in parts))
        assert int(batch["ar_divisor"]) == sum(p.real - 1 for p in parts)


# Steps


def test_the_block_grows_with_the_step_and_the_step_is_that_of_the_row(make_recipe):
    recipe = make_recipe("block_causal", anneal={"kind": "grow", "steps": 6, "lengths": (1, 2)})
    assert [block_length_at(recipe, s) for s in range(8)] == [1, 1, 1, 2, 2, 2, 4, 4]
    (piece,) = cut([*words(15), EOS], recipe)
    for ordinal, step in ((0, 0), (11, 2), (12, 3), (23, 5), (24, 6)):
        batch = Collator(recipe, MASKS, rows_per_step=4)([(ordinal, [piece])])
        assert int(batch["step"]) == step
        size = block_length_at(recipe, step)
        assert batch["scored"].view(-1, size)[1:].any(1).all()  # a mask in every block of that size


# Mixtures and epochs


@pytest.mark.parametrize("weights", [(3, 1), (0.5, 0.3, 0.2), (0.9, *[0.02] * 5), (1, 1, 1)])
def test_the_weights_of_a_mixture_hold_at_any_time(write_jsonl, weights):
    sources = [
        Source(path=str(write_jsonl(f"{i}.jsonl", [{"text": f"{i}"}] * 3)), weight=weight)
        for i, weight in enumerate(weights)
    ]
    taken = Counter()
    for n, (text, _) in enumerate(islice(Documents(sources, "text", 0), 400), 1):
        taken[int(text)] += 1
        for i, weight in enumerate(weights):
            share = n * weight / sum(weights)
            assert share - 1 < taken[i] < share + max(1, len(weights) - 1)


def test_sources_without_weights_weigh_their_size(write_jsonl):
    sources = [
        Source(path=str(write_jsonl(name, [{"text": name}] * rows)))
        for name, rows in (("a.jsonl", 30), ("b.jsonl", 10))
    ]
    taken = Counter(text for text, _ in islice(Documents(sources, "text", 0), 40))
    assert taken == {"a.jsonl": 30, "b.jsonl": 10}


def epochs_of(path, seed=0, count=3, rows=12):
    stream = islice(Documents([Source(path=str(path))], "text", seed), count * rows)
    pairs = list(stream)
    return [pairs[i : i + rows] for i in range(0, len(pairs), rows)]


def test_every_epoch_is_a_permutation_of_the_rows(write_jsonl):
    path = write_jsonl("a.jsonl", [{"text": str(i)} for i in range(12)])
    epochs = epochs_of(path)
    for number, pairs in enumerate(epochs):
        assert sorted(int(text) for text, _ in pairs) == list(range(12))
        assert {epoch for _, epoch in pairs} == {number}
    orders = [tuple(text for text, _ in pairs) for pairs in epochs]
    assert len(set(orders)) == 3


def test_the_order_is_a_function_of_the_seed(write_jsonl):
    path = write_jsonl("a.jsonl", [{"text": str(i)} for i in range(12)])
    assert epochs_of(path) == epochs_of(path) != epochs_of(path, seed=1)


# Sources


def test_a_missing_source_and_an_ambiguous_folder_are_errors(tmp_path, write_jsonl):
    with pytest.raises(Ar2DiffError, match="does not exist"):
        find_file(str(tmp_path / "nothing.jsonl"))
    write_jsonl("two/a.jsonl", [])
    assert find_file(str(tmp_path / "two")) == tmp_path / "two" / "a.jsonl"
    write_jsonl("two/b.jsonl", [])
    with pytest.raises(Ar2DiffError, match="2 data files"):
        find_file(str(tmp_path / "two"))


def test_no_source_is_an_error():
    with pytest.raises(Ar2DiffError, match="there is no data"):
        read_rows(Recipe())
