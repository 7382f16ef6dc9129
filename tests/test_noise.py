"""The forward process: how many tokens are masked, which, and what the draw depends on."""

from collections import Counter
from itertools import combinations, product

import pytest
import torch
from conftest import MASK, MASKS

from ar2diff.core.attention import PADDING
from ar2diff.core.seeds import content_key, keyed_generator
from ar2diff.data.documents import Collator, DocumentPart, document_parts
from ar2diff.diffusion.corruption import (
    Law,
    block_times,
    draw_times,
    given_spans,
    importance,
    open_slots,
    replaced,
)
from ar2diff.diffusion.objective import time_weights

EOS = 2
CASES = [
    ("causal_context", {}),
    ("block_causal", {}),
    ("block_causal", {"time": "document"}),
    ("block_causal", {"time": "sequence"}),
    ("full", {}),
    ("full", {"time": "sequence"}),
]


def piece(length=30, seed=0, epoch=0, real=None):
    ids = torch.randint(3, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return DocumentPart(ids, real or length, 0, epoch, content_key(ids))


def single_block(length):
    return torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.long)


# What is given


def test_spans_are_given_in_turns_and_begin_anywhere():
    """Against all numbers of spans and all boundaries, each as likely; the first token is none."""
    room, most, draws = 4, 3, 6000
    law = Counter()
    for spans in range(1, most + 1):
        cuts = [*combinations(range(1, room), spans - 1)]
        for cut, flipped in product(cuts, (0, 1)):
            number = [sum(c <= i for c in cut) + flipped for i in range(room)]
            given = tuple(bool(n % 2) and spans > 1 for n in number)
            law[(False, *given)] += 1 / most / len(cuts) / 2
    generator, found, dropped = torch.Generator().manual_seed(0), Counter(), 0
    for _ in range(draws):
        given, drops = given_spans(room + 1, most, 0.3, generator)
        found[tuple(given.tolist())] += 1
        dropped += drops
    assert {*found} == {*law} and sum(law.values()) == pytest.approx(1)
    for given, p in law.items():
        assert abs(found[given] - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5
    assert abs(dropped - 0.3 * draws) < 5 * (0.21 * draws) ** 0.5
    for count in (1, 2, 3):  # with hardly any room
        for _ in range(20):
            given, _ = given_spans(count, 9, 0.0, generator)
            assert not given[0] and int(given.sum()) <= max(0, count - 2)


@pytest.mark.parametrize("kind", ["mask", "embedding"])
@pytest.mark.parametrize("attention", ["causal_context", "full"])
def test_given_spans_are_shown_and_not_scored_or_show_masks(make_recipe, attention, kind):
    recipe = make_recipe(attention, noise={"kind": kind, "spans": 3, "dropped": 0.4})
    noise = recipe.noise.process.on(MASK, torch.arange(64) == MASK)
    collator, seen = Collator(recipe, noise), Counter()
    pieces = [piece(16, seed) for seed in range(40)]
    batch = collator([(n, [part]) for n, part in enumerate(pieces)])
    for row, part in enumerate(pieces):
        x0, xt, scored = (batch[name][row] for name in ("x0", "xt", "scored"))
        given = collator._given(part)[0]
        assert not scored[0] and xt[0] == x0[0] and not (scored & given).any()
        assert scored[1:].any() and (xt[scored] < 0).all() == (kind == "embedding")
        masked = xt[given] == MASK
        assert masked.all() or torch.equal(xt[given], x0[given])
        shown = "none" if not len(masked) else "masks" if masked.all() else "tokens"
        seen[shown] += 1
        alone = collator([(7, [piece(5), part])])  # beside another text, in another row
        for name in ("xt", "scored", "t"):
            assert torch.equal(alone[name][0, 5:], batch[name][row])
        if kind == "embedding":  # all others are open
            assert torch.equal(scored, ~given & (torch.arange(16) > 0))
    assert min(seen["none"], seen["masks"], seen["tokens"]) > 4
    assert seen["tokens"] > seen["masks"]


# How many


def test_exactly_k_tokens_are_masked_for_any_time():
    maskable, block = single_block(7)
    generator = torch.Generator().manual_seed(0)
    for k in range(1, 8):
        for t in ((k - 1 + 0.01) / 7, (k - 0.5) / 7, (k - 0.01) / 7):
            masked, time = open_slots(maskable, block, torch.tensor([t]), generator)
            assert masked.sum() == k
            assert torch.allclose(time.double(), torch.tensor(k / 7, dtype=torch.double))


def test_k_is_uniform_on_1_to_n():
    maskable, block = single_block(7)
    generator = torch.Generator().manual_seed(0)
    times = (torch.arange(700) + 0.5) / 700  # uniform times, enumerated
    counts = Counter(int(open_slots(maskable, block, t[None], generator)[0].sum()) for t in times)
    assert counts == dict.fromkeys(range(1, 8), 100)


def test_k_of_a_complementary_view_is_uniform_on_0_to_n():
    maskable, block = single_block(7)
    generator = torch.Generator().manual_seed(0)
    times = (torch.arange(800) + 0.5) / 800
    counts = Counter(
        int(open_slots(maskable, block, t[None], generator, True)[0].sum()) for t in times
    )
    assert counts == dict.fromkeys(range(8), 100)


@pytest.mark.parametrize("t", [0.0, 1e-9, 1.0])
def test_a_time_at_the_edge_masks_one_token_or_all(t):
    maskable, block = single_block(5)
    masked, time = open_slots(maskable, block, torch.tensor([t]), torch.Generator().manual_seed(0))
    assert masked.sum() == (5 if t == 1 else 1)
    assert time[0] == masked.double().mean()


def test_every_subset_of_k_tokens_is_as_likely():
    maskable, block = single_block(5)
    draws = 6000
    for k in (1, 2, 4):
        counts = Counter()
        for seed in range(draws):
            masked, _ = open_slots(
                maskable, block, torch.tensor([(k - 0.5) / 5]), keyed_generator(seed)
            )
            counts[tuple(masked.nonzero()[:, 0].tolist())] += 1
        subsets = list(combinations(range(5), k))
        assert set(counts) == set(subsets)
        p = 1 / len(subsets)
        deviation = (draws * p * (1 - p)) ** 0.5
        assert max(abs(counts[s] - draws * p) for s in subsets) < 4 * deviation


def test_every_block_has_a_mask():
    block = torch.arange(26) // 4  # seven blocks, the last one ragged
    maskable = torch.arange(26) > 0
    for seed in range(300):
        times = block_times(7, "block", seed, 0, 1, 1)
        masked, _ = open_slots(maskable, block, times, keyed_generator(seed))
        assert masked.view(-1)[:4].any()
        assert all(masked[block == b].any() for b in range(7))


def test_each_block_has_its_own_k_and_t():
    block, maskable = torch.arange(12) // 4, torch.arange(12) > 0
    times = torch.tensor([0.1, 0.6, 1.0])
    masked, t = open_slots(maskable, block, times, torch.Generator().manual_seed(0))
    assert masked.view(3, 4).sum(1).tolist() == [1, 3, 4]
    assert torch.allclose(t.view(3, 4).double()[:, 1], torch.tensor([1 / 3, 3 / 4, 1.0]).double())


def test_what_is_not_maskable_is_never_masked():
    block = torch.arange(12) // 4
    maskable = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]).bool()
    for seed in range(100):
        times = torch.rand(3, generator=keyed_generator(seed, 1))
        for complementary in (False, True):
            masked, _ = open_slots(maskable, block, times, keyed_generator(seed), complementary)
            assert not (masked & ~maskable).any()
    masked, t = open_slots(maskable, block, torch.ones(3), keyed_generator(0))
    assert torch.equal(masked, maskable)
    assert t.isfinite().all()  # a block with nothing to mask has no division by zero


# Times


def test_times_are_stratified_over_the_blocks_of_a_document():
    for seed in range(50):
        times = block_times(16, "block", seed, 0, 5, 5)
        assert (times * 16).long().sort().values.tolist() == list(range(16))


def test_the_stratum_of_a_block_is_not_always_the_same():
    first = {int(block_times(8, "block", seed, 0, 5, 5)[0] * 8) for seed in range(200)}
    assert first == set(range(8))


def test_the_draws_of_a_likelihood_are_stratified_within_each_block():
    times = draw_times(8, 5, keyed_generator(0))
    assert times.shape == (8, 5)
    for column in times.T:
        assert (column * 8).long().sort().values.tolist() == list(range(8))
    assert len({tuple((column * 8).long().tolist()) for column in times.T}) > 1


def gaps(times):
    """Lengths between neighbouring times on the circle, in parts of the mean."""
    x = torch.tensor(times, dtype=torch.double).sort().values
    return torch.diff(torch.cat([x, x[:1] + 1])) * len(times)


@pytest.mark.parametrize("time", ["sequence", "document"])
@pytest.mark.parametrize("key", [1, 2, 3])
def test_times_of_a_document_are_low_discrepancy_over_the_epochs(time, key):
    for epochs in (2, 5, 13, 50):
        times = [float(block_times(3, time, 0, epoch, key, key)[0]) for epoch in range(epochs)]
        assert gaps(times).max() < 2  # 50 independent ones: 4.5 on average


def test_documents_start_their_times_anywhere():
    starts = [float(block_times(1, "document", 0, 0, key, key)[0]) for key in range(400)]
    counts = Counter(int(t * 4) for t in starts)
    assert all(abs(counts[quarter] - 100) < 4 * 75**0.5 for quarter in range(4))


def test_time_sequence_and_document_are_shared_by_all_blocks():
    for time in ("sequence", "document"):
        assert block_times(6, time, 0, 3, 1, 2).unique().numel() == 1


def test_pieces_of_a_document_share_their_time_and_their_own_sequences_do_not():
    def times(time):
        return {float(block_times(1, time, 0, 0, key, 7)[0]) for key in range(5)}

    assert len(times("document")) == 1 and len(times("sequence")) == 5


# Laws of the time other than the uniform one

LAWS = [Law("bell"), Law("all", 0.0), Law("all", 0.3), Law("all", 1.0)]
FINE = (torch.arange(6000) + 0.5) / 6000  # uniform times, enumerated


def test_a_bell_is_beta_2_2_and_a_share_of_all_is_masked_whole():
    density = 6 * FINE.double() * (1 - FINE.double())
    for power in (1, 2, 3):
        want = (density * FINE.double() ** power).mean()
        found = (Law("bell").times(FINE) ** power).mean()
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    times = Law("all", 0.3).times(FINE)
    assert (times == 1).double().mean() == pytest.approx(0.3, abs=1e-3)
    rest = times[times < 1]
    torch.testing.assert_close(rest, (torch.arange(len(rest)).double() + 0.5) / len(rest))
    assert Law().times(FINE) is FINE


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_distribution_function_of_a_law_and_its_mean_are_those_of_its_times(law):
    times = law.times(FINE)
    for t in (0.1, 0.37, 0.5, 0.9, 1.0):
        found = law.below(torch.tensor(t, dtype=torch.double))
        assert float(found) == pytest.approx(float((times <= t).double().mean()), abs=1e-3)
    assert law.mean == pytest.approx(float(times.mean()), abs=1e-3)


def all_masks(n):
    return [s for k in range(1, n + 1) for s in combinations(range(n), k)]


@pytest.mark.parametrize(
    ("law", "complementary"), [*((law, False) for law in LAWS[:3]), (LAWS[0], True)], ids=str
)
def test_with_weight_1_over_t_the_loss_is_the_bound_under_any_law(law, complementary):
    """The expectation over all masks of a block, each with its own made-up losses."""
    n, uniform = 4, (torch.arange(1000) + 0.5) / 1000
    maskable, block = single_block(n)
    of_mask = {s: 0.1 * number + len(s) ** 2 for number, s in enumerate(all_masks(n))}
    of_size = {k: sum(v for s, v in of_mask.items() if len(s) == k) for k in range(n + 1)}
    mean = {k: of_size[k] / len(list(combinations(range(n), k))) for k in range(n + 1)}
    bound = sum(mean[k] * n / k for k in range(1, n + 1)) / n
    total = 0.0
    for t in law.times(uniform):
        masked, time = open_slots(
            maskable, block, t[None], torch.Generator().manual_seed(0), complementary
        )
        ratio = importance(maskable, block, time, law, complementary)
        weight = time_weights(time, "1/t") * ratio
        total += float(weight[0]) * mean[int(masked.sum())]
    assert total / len(uniform) == pytest.approx(bound, rel=5e-3)


def test_a_block_with_nothing_to_mask_has_no_importance():
    block = torch.arange(8) // 4
    maskable = torch.arange(8) > 3
    _, t = open_slots(maskable, block, torch.full((2,), 0.5), torch.Generator().manual_seed(0))
    found = importance(maskable, block, t, Law("bell"))
    assert not found[:4].any() and (found[4:] > 0).all()


@pytest.mark.parametrize("weight", ["uniform", "1/t"])
def test_the_collator_draws_by_the_law_and_weighs_by_it(make_recipe, weight):
    sections = {"objective": {"weight": weight}, "data": {"max_length": 64}}
    share = {"law": "all", "all_share": 0.5}
    recipe = make_recipe(noise=share, block_length=8, **sections)
    plain = make_recipe(block_length=8, **sections)
    whole = 0
    for epoch in range(20):
        parts = [piece(64, epoch=epoch)]
        batch, uniform = (collate(r, [parts]) for r in (recipe, plain))
        ks = batch["scored"].view(8, 8).sum(1)[1:]
        whole += int((ks == 8).sum())
        if weight == "uniform":
            assert torch.equal(batch["coef"].unique(), torch.tensor([0.0, 1.0]))
        else:
            coef = batch["coef"].view(8, 8)[1:]
            assert torch.allclose(coef[ks == 8].unique(), torch.tensor(1 / (8 * (0.5 / 8 + 0.5))))
            assert torch.allclose(
                coef[ks < 8].amax(1), 2 * 8 / ks[ks < 8].float()
            )  # half as likely as under the uniform law
        assert not torch.equal(batch["scored"], uniform["scored"])
    assert 0.5 <= whole / 140 < 0.7  # half of them, and one in eight of the others


# What a draw depends on


@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_noise_is_a_function_of_seed_epoch_and_ids_alone(make_recipe, attention, noise):
    def drawn(seed=0, **changes):
        recipe = make_recipe(attention, noise=noise, train={"seed": seed}, data={"max_length": 64})
        return Collator(recipe, MASKS).noised(piece(**changes), recipe.convert.block_length)

    xt, masked, t = drawn()
    before = torch.get_rng_state()
    torch.manual_seed(5)
    for again, same in zip(drawn(), (xt, masked, t), strict=True):
        assert torch.equal(again, same)
    torch.set_rng_state(before)
    for changes in ({"epoch": 1}, {"seed": 1}):
        assert not torch.equal(drawn(**changes)[1], masked)
    recipe = make_recipe(attention, noise=noise, train={"seed": 1}, data={"max_length": 64})
    assert not torch.equal(
        Collator(recipe, MASKS).noised(piece(), recipe.convert.block_length)[1], masked
    )


@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_which_tokens_are_masked_changes_with_epoch_seed_and_ids(make_recipe, attention, noise):
    """Not only how many: two tokens and k = 1, drawn anew each time."""

    def first_alone(seed, epoch, other):
        recipe = make_recipe(attention, noise=noise, train={"seed": seed})
        ids = [1, 9, other]
        _, masked, _ = Collator(recipe, MASKS).noised(
            DocumentPart(ids, 3, 0, epoch, content_key(ids)), recipe.convert.block_length
        )
        return bool(masked[0, 1]) if masked.sum() == 1 else None

    assert {first_alone(0, epoch, 9) for epoch in range(40)} == {True, False, None}
    assert {first_alone(seed, 0, 9) for seed in range(40)} == {True, False, None}
    assert {first_alone(0, 0, other) for other in range(40)} == {True, False, None}


# Texts in which tokens are replaced


def test_up_to_a_share_of_the_tokens_is_replaced_and_all_are_scored():
    x0, maskable = torch.arange(40), torch.arange(40) > 7
    counts, seen = Counter(), set()
    for seed in range(400):
        xt, scored, t = replaced(MASKS, x0, maskable, 0.25, keyed_generator(seed))
        changed = xt != x0
        assert not (changed & ~maskable).any() and (xt != MASK).all()
        assert torch.equal(scored, maskable) and (t == 1).all()
        counts[int(changed.sum())] += 1
        seen |= {*xt[changed].tolist()}
    assert max(counts) <= 8 and set(counts) >= {*range(8)}  # floor(a n), a uniform in [0, 1/4]
    assert seen == {*range(MASK)}  # any token


def test_edits_begin_after_their_share_of_the_steps_and_leave_the_masks_as_they_were(make_recipe):
    train, edits = {"max_steps": 10}, {"after": 0.8, "most": 0.5}
    recipe = make_recipe(noise={"edits": edits}, train=train)
    plain = make_recipe(train=train)
    rows = [[piece(16)], [piece(16, seed=1)]]
    for step, copies in ((7, 1), (8, 2), (9, 2)):
        batch, without = collate(recipe, rows, step), collate(plain, rows, step)
        assert len(batch["xt"]) == 2 * copies
        for name in ("xt", "scored", "coef"):
            assert torch.equal(batch[name][:2], without[name]), name
        if copies == 2:  # all tokens but the first are scored, with the weight of a masked token
            assert torch.equal(batch["x0"][2:], batch["x0"][:2])
            assert batch["scored"][2:, 1:].all() and not batch["scored"][2:, 0].any()
            assert (batch["coef"][2:, 1:] == 1).all() and (batch["xt"][2:] != MASK).all()


def test_weights_of_the_bound_are_those_of_the_masks_alone_with_edits(make_recipe):
    changes = {"objective": {"weight": "1/t"}, "train": {"max_steps": 1}}
    noise = {"law": "bell", "edits": {"after": 0}}
    batch = collate(make_recipe(noise=noise, **changes), [[piece(16)]])
    without = collate(make_recipe(noise={"law": "bell"}, **changes), [[piece(16)]])
    assert torch.equal(batch["coef"][:1], without["coef"])
    assert (batch["coef"][1, 1:] == 1).all()


def collate(recipe, rows, start=0):
    return Collator(recipe, MASKS)([(start + i, row) for i, row in enumerate(rows)])


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_noise_does_not_depend_on_batch_split(make_recipe, attention, noise, complementary):
    recipe = make_recipe(
        attention, noise=noise | {"complementary": complementary}, data={"max_length": 40}
    )
    rows = [[piece(4 * (3 + i % 4), seed=i)] for i in range(6)]
    views = 1 + complementary
    together = collate(recipe, rows)
    for size in (1, 2, 3):
        for start in range(0, 6, size):
            part = collate(recipe, rows[start : start + size], start)
            for name in ("x0", "xt", "scored", "t", "coef"):
                whole = together[name].unflatten(0, (views, 6))[:, start : start + size]
                got = part[name].unflatten(0, (views, size))
                length = got.shape[-1]
                assert torch.equal(whole[..., :length], got), name
                assert not whole[..., length:].any(), name  # nothing beyond the longest row


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_noise_does_not_depend_on_packing(make_recipe, attention, noise, complementary):
    recipe = make_recipe(
        attention, noise=noise | {"complementary": complementary}, data={"max_length": 40}
    )
    parts = [piece(12, seed=1), piece(8, seed=2), piece(20, seed=3)]
    packed, alone = collate(recipe, [parts]), [collate(recipe, [[p]]) for p in parts]
    for name in ("x0", "xt", "scored", "t", "coef", "pos"):
        assert torch.equal(packed[name], torch.cat([a[name] for a in alone], 1)), name
    assert packed["divisor"] == sum(a["divisor"] for a in alone)


def test_the_fill_of_the_last_block_does_not_change_the_noise_before_it(make_recipe):
    recipe = make_recipe("block_causal", data={"max_length": 40})
    ids = piece(9).ids
    (filled,) = document_parts(ids, 0, EOS, recipe, 0)
    assert len(filled.ids) == 12 and filled.real == 9
    _, masked, _ = Collator(recipe, MASKS).noised(filled, 4)
    other = DocumentPart(filled.ids[:9] + [7] * 3, 9, 0, 0, filled.document)
    assert torch.equal(Collator(recipe, MASKS).noised(other, 4)[1], masked)


# At the collator


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_position_0_and_padding_are_never_masked(make_recipe, attention, noise, complementary):
    recipe = make_recipe(
        attention, noise=noise | {"complementary": complementary}, data={"max_length": 40}
    )
    for epoch in range(40):
        rows = [
            [piece(8, seed=1, epoch=epoch), piece(12, seed=2, epoch=epoch)],
            [piece(32, seed=3, epoch=epoch)],
        ]
        batch = collate(recipe, rows)
        never = (batch["pos"] == 0) | (batch["doc"] == PADDING)
        assert never.any() and not (batch["scored"] & never).any()
        assert not batch["coef"][never].any()


def test_masked_tokens_become_the_mask_and_the_others_stay(make_recipe):
    batch = collate(make_recipe("block_causal"), [[piece(16)], [piece(8, seed=1)]])
    assert (batch["xt"][batch["scored"]] == MASK).all()
    assert torch.equal(batch["xt"][~batch["scored"]], batch["x0"][~batch["scored"]])


@pytest.mark.parametrize(("attention", "noise"), CASES)
def test_complementary_views_mask_every_token_exactly_once(make_recipe, attention, noise):
    recipe = make_recipe(attention, noise=noise | {"complementary": True}, data={"max_length": 40})
    for epoch in range(20):
        batch = collate(
            recipe,
            [
                [piece(8, epoch=epoch), piece(12, seed=2, epoch=epoch)],
                [piece(24, seed=3, epoch=epoch)],
            ],
        )
        first, second = batch["scored"].chunk(2)
        maskable = (batch["pos"] > 0) & (batch["doc"] != PADDING)
        assert torch.equal(first.int() + second.int(), maskable[:2].int())
        assert torch.equal(*batch["x0"].chunk(2))


def test_the_weights_of_complementary_views_are_unbiased(make_recipe):
    """Over all k, sum of weight(k) * P(k) of a view is the exact-k bound's 1/k."""
    recipe = make_recipe("full", noise={"complementary": True}, data={"max_length": 40})
    n, weights = 5, [Counter(), Counter()]
    for epoch in range(6000):
        _, masked, t = Collator(recipe, MASKS).noised(piece(n + 1, epoch=epoch), None)
        for view in (0, 1):
            k = int(masked[view].sum())
            weights[view][k] += 1
            if k:
                assert float(t[view, 1]) == pytest.approx(k / (n + 1))
    for counts in weights:  # uniform on 0..n, so that 1/t = (n + 1)/k weighs each k by 1/k
        assert all(abs(counts[k] / 6000 - 1 / (n + 1)) < 0.01 for k in range(n + 1))


@pytest.mark.parametrize("attention", ["causal_context", "block_causal"])
def test_blocks_of_a_document_have_different_k(make_recipe, attention):
    """Seven full blocks of eight tokens and stratified times: k goes over 1..8 without repeats."""
    recipe = make_recipe(attention, block_length=8, data={"max_length": 64})
    for epoch in range(20):
        _, masked, _ = Collator(recipe, MASKS).noised(piece(64, epoch=epoch), 8)
        ks = masked.view(8, 8).sum(1)[1:].tolist()
        assert len(set(ks)) == 7
