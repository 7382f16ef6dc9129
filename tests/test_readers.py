"""Logits while decoding, against raw forwards under masks written here and against training's."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from conftest import CLASSES, MASK, WINDOW, build_model, tiny_spec
from test_likelihood import BLOCK, BLOCKWISE, EXACT, PREDICTIONS, close, own_mask, raw_logits

from ar2diff.core.attention import PADDING, lay_out, model_mask, reading_slot
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.forward import logits_at
from ar2diff.core.options import resolve
from ar2diff.core.readers import BlockReader, FullReader

LENGTHS = (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 1)
mask_of = cache(own_mask)


def window_of(kind):
    return WINDOW if kind == "mistral_window" else None


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(3, MASK, (length,), generator=generator).tolist()


@pytest.fixture
def readings(monkeypatch):
    """All reads from now on: (ids [R, T], start [R], masked [R, W], logits [N, V]) each."""
    seen = []
    for reader in (BlockReader, FullReader):

        def read(self, ids, start, masked, original=reader.read):
            logits = original(self, ids, start, masked)
            seen.append((ids.clone(), start.clone(), masked.clone(), logits.clone()))
            return logits

        monkeypatch.setattr(reader, "read", read)
    return seen


def decode(model, spec, prompts, *, new=2 * BLOCK + 1, **settings):
    options = resolve(spec, {"steps_per_block": 2, **settings})
    canvas = Canvas.of_prompts(
        prompts,
        MASK,
        max_new_tokens=new,
        grid=1 if spec.attention == "full" else options.block_length,
    )
    for _ in denoise(model, spec, canvas, options):
        pass
    assert not (canvas.ids[:, : int(canvas.total.min())] == MASK).any()
    return canvas


def own_logits(model, ids, start, masked, spec, window, size, grid=None):
    """Logits of a row's masked tokens: of one forward of [clean context | noisy block]; `grid` is
    the block length of the context, if several blocks are read together."""
    full = spec.attention == "full"
    end = len(ids) if full else start + size
    mask = mask_of(end, 0 if full else start, spec.attention, grid or size, window)
    wanted = start + masked.nonzero()[:, 0] - int(spec.prediction == "shift")
    return raw_logits(model, ids[None, :end], mask)[0, wanted]


def assert_exact(
    model, spec, reading, window=None, size=BLOCK, lengths=None, exact=EXACT, grid=None
):
    """Each row of a reading against its own forward; how many it has compared."""
    ids, start, masked, logits = reading
    parts = logits.split(masked.sum(1).tolist())
    for row, part in enumerate(parts):
        if len(part):
            own = ids[row, : lengths[int(ids[row, 0])]] if lengths else ids[row]
            args = (own, int(start[row]), masked[row], spec, window, size, grid)
            torch.testing.assert_close(part, own_logits(model, *args), **exact)
    return len(logits)


# Blocks: exact at every step


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", ["dynamic", "static"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
@pytest.mark.parametrize("kind", CLASSES)
def test_cached_logits_are_those_of_a_forward_of_context_and_block(
    readings, kind, attention, prediction, cached, implementation
):
    model, spec = build_model(kind, implementation), tiny_spec(attention, BLOCK, prediction)
    prompts = [prompt_of(length) for length in LENGTHS]
    decode(model, spec, prompts, cache_implementation=cached)
    compared = sum(
        assert_exact(model, spec, reading, window_of(kind), exact=close(implementation))
        for reading in readings
    )
    assert compared > len(prompts) * 2 * BLOCK


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_logits_are_exact_in_float32(readings, attention, prediction, cached):
    model = build_model("llama", dtype=torch.float32)
    spec = tiny_spec(attention, BLOCK, prediction)
    decode(model, spec, [prompt_of(n) for n in LENGTHS], cache_implementation=cached)
    for reading in readings:
        assert_exact(model, spec, reading, exact={"rtol": 0, "atol": 1e-5})


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_logits_are_exact_where_earlier_blocks_are_read_anew(
    readings, attention, prediction, cached
):
    """Two blocks of 4 are read together, from the middle of a trained block of 8, too."""
    model, spec = build_model("llama"), tiny_spec(attention, 8, prediction)
    edits = {"edit_threshold": 0.0, "edit_blocks": 1, "corrector_steps": 1, "block_length": 4}
    prompts = [prompt_of(length) for length in (2, 9, 5)]
    canvas = decode(model, spec, prompts, new=13, cache_implementation=cached, **edits)
    starts, again = set(), 0
    for reading in readings:
        ids, start, wanted, _ = reading
        assert_exact(model, spec, reading, size=8, grid=4)
        starts |= {*start.tolist()}
        at = start[:, None] + torch.arange(4)
        again += int((wanted[:, :4] & (ids.gather(1, at) != MASK)).sum())
    assert starts >= {0, 4, 8, 12} and again and canvas.edits.sum() > 0


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_logits_are_exact_in_shorter_blocks_and_rows_of_unlike_speed(
    readings, attention, prediction, cached
):
    model, spec = build_model("llama"), tiny_spec(attention, 8, prediction)
    prompts = [prompt_of(length) for length in (2, 9, 3, 6)]
    settings = {
        "block_length": 3,
        "steps_per_block": None,
        "threshold": 0.3,
        "temperature": 1.0,
        "seed": 1,
    }
    decode(model, spec, prompts, cache_implementation=cached, **settings)
    assert len({tuple(start.diff().tolist()) for _, start, _, _ in readings}) > 1
    for reading in readings:
        assert_exact(model, spec, reading, size=3)


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", BLOCKWISE)
def test_logits_are_exact_behind_gaps(readings, attention, prediction, cached):
    """A row leaps from a gap over blocks of given tokens, beside rows that are far ahead of it."""
    model, spec = build_model("llama"), tiny_spec(attention, BLOCK, prediction)
    leaping = prompt_of(20)
    leaping[2] = leaping[18] = MASK
    adjacent = prompt_of(12)
    adjacent[7] = adjacent[8] = MASK
    decode(model, spec, [leaping, adjacent, prompt_of(19)], new=5, cache_implementation=cached)
    assert readings[0][1].tolist() == [0, 4, 16]
    for reading in readings:
        assert_exact(model, spec, reading)


# Full: `none` is exact; `prefix` and `dual` are where a block begins


def full_decode(kind, prediction, cached, **changes):
    model, spec = build_model(kind, **changes), tiny_spec("full", None, prediction)
    prompts = [prompt_of(length) for length in (3, 7, 5)]
    decode(model, spec, prompts, cache_implementation=cached, block_length=BLOCK)
    return model, spec, {prompt[0]: len(prompt) + 2 * BLOCK + 1 for prompt in prompts}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_full_logits_without_a_cache_are_the_plain_forwards(readings, kind, prediction):
    model, spec, lengths = full_decode(kind, prediction, "none")
    for reading in readings:
        assert_exact(model, spec, reading, window_of(kind), lengths=lengths)


def refreshes(readings):
    starts = [None] + [start.tolist() for _, start, _, _ in readings]
    return [one != two for one, two in pairwise(starts)]


@pytest.mark.parametrize("cached", ["prefix", "dual"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_cached_full_logits_are_exact_at_each_refresh_and_not_in_between(
    readings, kind, prediction, cached
):
    model, spec, lengths = full_decode(kind, prediction, cached)
    fresh = refreshes(readings)
    assert fresh.count(True) >= 3 and fresh.count(False) >= 3
    for reading, is_fresh in zip(readings, fresh, strict=True):
        args = (model, spec, reading, window_of(kind), BLOCK, lengths)
        if is_fresh:
            assert_exact(*args)
        else:
            with pytest.raises(AssertionError, match="not close"):
                assert_exact(*args)


@pytest.mark.parametrize("cached", ["prefix", "dual"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral_window"])
def test_cached_full_logits_of_one_layer_are_exact_at_every_step(
    readings, kind, prediction, cached
):
    """Its keys do not depend on other tokens, so nothing in a cache is ever stale."""
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    model, spec, lengths = full_decode(kind, prediction, cached, **{name: 1})
    assert not all(refreshes(readings))
    for reading in readings:
        assert_exact(model, spec, reading, window_of(kind), lengths=lengths)


# The two halves of the project: what training does with a state, and what decoding does


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("attention", [*BLOCKWISE, "full"])
@pytest.mark.parametrize("kind", CLASSES)
def test_decoding_logits_are_the_training_logits_of_the_same_state(kind, attention, prediction):
    model, spec = build_model(kind), tiny_spec(attention, BLOCK, prediction)
    lengths, total = [3 * BLOCK, 2 * BLOCK, BLOCK], 3 * BLOCK
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(3, MASK, (3, total), generator=generator)
    masked = torch.rand(3, total, generator=generator) < 0.6
    masked[:, 0], masked[:, BLOCK] = False, True
    pos = torch.arange(total).expand_as(x0)
    real = pos < torch.tensor(lengths)[:, None]
    masked &= real
    xt = torch.where(masked, MASK, x0)

    # as in training: all blocks of all rows in one forward
    ids, slots = lay_out(xt, x0, torch.where(real, 0, PADDING), pos, attention)
    row = torch.arange(3)[:, None] * ids.shape[1]
    index = row + reading_slot(pos, attention, spec.block_length, prediction)
    with torch.no_grad():
        trained = logits_at(
            model,
            index[masked],
            input_ids=ids,
            attention_mask=model_mask(model, slots, attention, spec.block_length, None),
            position_ids=slots.pos,
        )
    want = torch.zeros(3, total, 64, dtype=torch.float64)
    want[masked] = trained

    # as in decoding: block after block, what comes behind is still masked
    if attention == "full":
        reader = FullReader(model, spec, torch.tensor(lengths), total, "none")
        with torch.no_grad():
            got = reader.read(xt, torch.zeros(3, dtype=torch.long), masked)
        torch.testing.assert_close(got, trained, **EXACT)
        return
    reader, start = BlockReader(model, spec, 3, 0, BLOCK, BLOCK, "dynamic"), torch.zeros(3).long()
    for block in range(3):
        for line, length in enumerate(lengths):
            start[line] = min(block, length // BLOCK - 1) * BLOCK
        behind = pos >= start[:, None]
        state = torch.where(behind, torch.where(pos < start[:, None] + BLOCK, xt, MASK), x0)
        here = start[:, None] + torch.arange(BLOCK)
        wanted = masked.gather(1, here)
        with torch.no_grad():
            got = reader.read(state, start, wanted)
        expected = want.gather(1, here[:, :, None].expand(-1, -1, 64))[wanted]
        torch.testing.assert_close(got, expected, **EXACT)
