"""Speculation is lossless: the AR mode's text in float64, and its distribution, by enumeration."""

import math
from collections import Counter
from copy import deepcopy
from functools import cache
from itertools import permutations, product

import pytest
import torch
from conftest import CLASSES, MASK, WINDOW, build_model, tiny_spec
from test_likelihood import EXACT, PREDICTIONS, own_mask, raw_logits

from ar2diff.core import group, speculation
from ar2diff.core.candidates import CandidateReader
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.options import resolve
from ar2diff.core.tree import Tree

PROMPTS = [[1, 17, 42, 5, 9, 60, 33], [1, 8], [1, 33, 21, 4], [1, 50, 50, 50, 50]]
mask_of = cache(own_mask)


def run(model, prompts, new, spec=None, **kwargs):
    spec = spec or tiny_spec()
    options = resolve(spec, {"mode": "speculative", "max_new_tokens": new, **kwargs})
    canvas = Canvas.of_prompts(
        prompts, spec.mask_token_id, max_new_tokens=new, end_ids=options.eos_token_id
    )
    for _ in denoise(model, spec, canvas, options):
        pass
    return canvas


def answers(canvas):
    return [canvas.new_ids(row) for row in range(len(canvas.ids))]


def ar_greedy(model, prompt, new, ends=(), mask_id=MASK):
    """One plain forward a token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and not (len(ids) > len(prompt) and ids[-1] in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[mask_id] = -math.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


# Greedy


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", CLASSES)
def test_greedy_speculation_is_greedy_ar_decoding(kind, drafts, cached):
    model, ends = build_model(kind), [7, 12, 25]
    kwargs = {"draft_length": drafts, "cache_implementation": cached, "eos_token_id": ends}
    canvas = run(model, PROMPTS, 12, **kwargs)
    assert answers(canvas) == [ar_greedy(model, prompt, 12, ends) for prompt in PROMPTS]


@pytest.mark.parametrize("caches", permutations(["dynamic", "static", "none"]))
def test_a_call_leaves_nothing_behind_for_one_with_another_cache(caches):
    model = deepcopy(build_model("mistral"))  # layouts of single rows are kept with their model
    for mode, cached in product(["ar", "speculative"], caches):
        kwargs = {"draft_length": 2} if mode == "speculative" else {}
        canvas = run(model, PROMPTS[:1], 9, mode=mode, cache_implementation=cached, **kwargs)
        assert answers(canvas) == [ar_greedy(model, PROMPTS[0], 9)]


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_every_forward_of_a_bfloat16_model_reads_logits_in_float32(mode, monkeypatch):
    model, seen = deepcopy(build_model("llama")).bfloat16(), []
    read = CandidateReader.read

    def noting(self, *args):
        found = read(self, *args)
        seen.append(found[0].dtype)
        return found

    monkeypatch.setattr(CandidateReader, "read", noting)
    run(model, PROMPTS[:1], 9, mode=mode)
    assert len(seen) > 1 and {*seen} == {torch.float32}


@pytest.mark.parametrize("mode", ["ar", "speculative"])
@pytest.mark.parametrize("kind", CLASSES)
def test_greedy_decoding_is_that_of_transformers(kind, mode):
    model = build_model(kind)
    free = ar_greedy(model, PROMPTS[0], 15)
    canvas = run(model, PROMPTS, 15, mode=mode, eos_token_id=[free[6]])
    for prompt, got in zip(PROMPTS, answers(canvas), strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            suppress_tokens=[MASK],
            max_new_tokens=15,
            eos_token_id=free[6],
            pad_token_id=0,
        )
        assert got == want[0, len(prompt) :].tolist()
    assert len(answers(canvas)[0]) <= 7


def test_greedy_decoding_with_a_penalty_and_a_bias_is_that_of_transformers():
    model = build_model("llama")
    kwargs = {"repetition_penalty": 1.9, "sequence_bias": [[[17], 1.5], [[9], -3.0]]}
    canvas = run(model, PROMPTS, 15, draft_length=2, eos_token_id=[2], **kwargs)
    for prompt, got in zip(PROMPTS, answers(canvas), strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            suppress_tokens=[MASK],
            max_new_tokens=15,
            pad_token_id=0,
            **kwargs,
        )
        assert got == want[0, len(prompt) :].tolist()


@pytest.fixture
def drafted(monkeypatch):
    """Factory: drafts from now on are the given rows' own continuation, wrong where
    `wrong(position)`; a random model would hardly ever be right."""

    def plant(rows, wrong):
        def draft(group, ends, found, after):
            group.trees = [Tree() for _ in group.rows]
            for tree, row, front in zip(group.trees, group.rows, group.front, strict=True):
                for depth in range(1, group.drafts + 1):
                    place = front + depth - 1
                    word = rows[row][place] if place < len(rows[row]) else 3
                    word = (word + 1) % MASK if wrong(place) else word
                    tree.add(word, depth - 2, depth, 1.0)
            group.pace.plan(group.trees, group.drafts)

        monkeypatch.setattr(group.Group, "_draft", draft)

    return plant


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("every", [2, 3, 5, 100])
@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_drafts_are_accepted_up_to_the_first_wrong_one(drafted, kind, every, cached):
    model, new = build_model(kind), 13
    want = [ar_greedy(model, prompt, new) for prompt in PROMPTS]
    drafted(
        [prompt + answer for prompt, answer in zip(PROMPTS, want, strict=True)],
        lambda place: place % every == 0,
    )
    canvas = run(model, PROMPTS, new, draft_length=3, cache_implementation=cached)
    assert answers(canvas) == want
    for prompt, forwards in zip(PROMPTS, canvas.forwards.tolist(), strict=True):
        front, count = len(prompt) + 1, 1  # the first forward has no drafts yet
        while front < len(prompt) + new:
            wrong = [place for place in range(front, front + 3) if place % every == 0]
            front, count = (wrong[0] if wrong else front + 3) + 1, count + 1
        assert forwards == count


@pytest.mark.parametrize("cached", ["dynamic", "static"])
def test_an_end_token_among_accepted_drafts_ends_the_row_there(drafted, cached):
    model = build_model("llama")
    free = [ar_greedy(model, prompt, 14) for prompt in PROMPTS]
    ends = [free[0][4], free[2][9]]
    drafted([p + a for p, a in zip(PROMPTS, free, strict=True)], lambda place: False)
    canvas = run(model, PROMPTS, 14, eos_token_id=ends, draft_length=3, cache_implementation=cached)
    assert answers(canvas) == [ar_greedy(model, prompt, 14, ends) for prompt in PROMPTS]
    assert len(set(map(len, answers(canvas)))) > 1


# What is read: AR logits behind each draft, and a noisy block behind each candidate


def one_forward(model, known, masks, window):
    """Logits of [known words, causal | a block of masks]."""
    mask = mask_of(len(known) + masks, len(known), "causal_context", 4, window)
    return raw_logits(model, torch.tensor([[*known, *[MASK] * masks]]), mask)[0]


@pytest.mark.parametrize(
    ("nodes", "kind", "cached"),
    [
        *((None, *case) for case in product(CLASSES, ["dynamic", "static", "none"])),
        *((5, kind, "dynamic") for kind in CLASSES),
        (5, "llama", "static"),
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_candidate_is_read_as_if_it_stood_alone(monkeypatch, kind, prediction, cached, nodes):
    model, spec = build_model(kind), tiny_spec(prediction=prediction)
    window, back = WINDOW if kind == "mistral_window" else None, int(prediction == "shift")
    original, compared = CandidateReader.read, Counter()

    def read(self, canvas_ids, rows, fronts, newest, trees, drafts):
        target, ahead, hidden = original(self, canvas_ids, rows, fronts, newest, trees, drafts)
        ids, masks = canvas_ids[torch.tensor(rows)], drafts + 1 - back
        for line, (front, tree) in enumerate(zip(fronts, trees, strict=True)):
            (row,) = [n for n, p in enumerate(PROMPTS) if ids[line, : len(p)].tolist() == p]
            if front >= len(PROMPTS[row]) + 9:  # finished
                continue
            words = ids[line, :front].tolist()
            if nodes is None and len(tree):  # were drafted with the newest word still masked
                own = one_forward(model, words[:-1], masks, window)
                assert tree.tokens == own[front - back :, :MASK].argmax(-1)[:drafts].tolist()
            for block, node in enumerate(tree.blocks):
                path = [*words, *(tree.tokens[n] for n in tree.path(node))]
                own = one_forward(model, path, masks, window)
                torch.testing.assert_close(target[line, node + 1], own[len(path) - 1], **EXACT)
                own = own[len(path) + 1 - back :][:drafts]
                torch.testing.assert_close(ahead[line, block], own, **EXACT)
                compared[row] += 1
                compared["branches"] += not tree.is_chain
        return target, ahead, hidden

    monkeypatch.setattr(CandidateReader, "read", read)
    asked = {"draft_length": 2 + back} | ({"draft_nodes": nodes} if nodes else {})
    run(model, PROMPTS, 9, spec, **asked, cache_implementation=cached)
    assert min(compared[row] for row in range(len(PROMPTS))) > 9
    assert (compared["branches"] > 0) == (nodes is not None)


# With temperature: in distribution, on three words


def three_words():
    return build_model("llama", vocab_size=4, initializer_range=0.25)


def probabilities(logits, words=(), temperature=1.0, repetition_penalty=1.0, top_k=3):
    logits = logits[:3].clone()
    for word in set(words):
        factor = repetition_penalty
        logits[word] = logits[word] / factor if logits[word] > 0 else logits[word] * factor
    logits = logits / temperature
    logits[logits < logits.sort().values[-top_k]] = -math.inf
    return logits.softmax(-1).tolist()


def ar(ids, **warp):
    """What the AR mode gives the next word."""
    with torch.no_grad():
        logits = three_words()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return probabilities(logits, ids, **warp)


def continued(words, prompt, length, **warp):
    """{words: probability} of all that the AR mode makes of a beginning."""
    if len(words) >= length:
        return {words[:length]: 1.0}
    result = Counter()
    for word, p in enumerate(ar([*prompt, *words], **warp)):
        for more, rest in continued((*words, word), prompt, length, **warp).items():
            result[more] += p * rest
    return result


WARPS = [{}, {"temperature": 0.6}, {"top_k": 2}, {"repetition_penalty": 1.6, "temperature": 1.5}]
CANDIDATES = [{"draft_length": 1}, {"draft_length": 3}, {"draft_length": 3, "draft_nodes": 7}]


@pytest.mark.parametrize("warp", WARPS, ids=lambda warp: "+".join(warp) or "plain")
@pytest.mark.parametrize("candidates", CANDIDATES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampled_words_are_those_of_ar_sampling_with_the_same_seed(prediction, candidates, warp):
    model, spec = build_model("llama", initializer_range=0.25), tiny_spec(prediction=prediction)
    kwargs = {"temperature": 1.0, "seed": 5, "eos_token_id": [7]} | warp
    want = answers(run(model, PROMPTS, 14, spec, mode="ar", **kwargs))
    canvas = run(model, PROMPTS, 14, spec, **kwargs, **candidates)
    assert answers(canvas) == want
    alone = [answers(run(model, [p], 14, spec, **kwargs, **candidates))[0] for p in PROMPTS]
    assert alone == want
    other = answers(run(model, PROMPTS, 14, spec, mode="ar", **kwargs | {"seed": 6}))
    assert other != want


def chi_square(counts, want):
    total = sum(counts.values())
    assert all(words in want for words in counts)
    return sum((counts[w] - total * p) ** 2 / (total * p) for w, p in want.items())


@pytest.mark.parametrize("candidates", [{}, *CANDIDATES], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_random_words_are_those_of_ar_sampling(candidates, prediction):
    spec = tiny_spec(prediction=prediction, mask_token_id=3)
    kwargs = {"temperature": 1.0, "seed": 0} | (candidates or {"mode": "ar"})
    canvas = run(three_words(), [[1]] * 1500, 4, spec, **kwargs)
    counts = Counter(map(tuple, answers(canvas)))
    assert chi_square(counts, continued((), [1], 4)) < 135  # 80 df, p = 1e-4
    if candidates:
        assert len(set(canvas.forwards.tolist())) > 1


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_the_logprob_of_a_word_is_the_ar_modes(mode):
    prompt, kwargs = [1, 17, 42], {"temperature": 0.5, "top_k": 9, "seed": 1}
    canvas = run(build_model("llama"), [prompt], 9, mode=mode, **kwargs)
    ids = canvas.ids[:, : int(canvas.end)]
    with torch.no_grad():
        logits = build_model("llama")(input_ids=ids, use_cache=False).logits[0, :, :MASK]
    logp = logits.log_softmax(-1)[range(2, 11), ids[0, 3:]]
    torch.testing.assert_close(canvas.logprob[0, 3:12], logp.float())


# Choices that the host reads one forward late


@pytest.mark.parametrize("cached", ["dynamic", "static"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_text_whose_tokens_are_read_late_is_the_same(kind, temperature, cached, monkeypatch):
    model = build_model(kind)
    kwargs = {"mode": "ar", "cache_implementation": cached, "temperature": temperature, "seed": 3}
    free = answers(run(model, PROMPTS, 12, **kwargs))
    kwargs |= {"min_new_tokens": 2, "eos_token_id": [free[0][3], free[1][6]]}
    at_once = run(model, PROMPTS, 12, **kwargs)
    monkeypatch.setattr(speculation, "WAITING", ())
    late = run(model, PROMPTS, 12, **kwargs)
    assert answers(late) == answers(at_once)
    assert len({*map(len, answers(late))}) > 1  # rows end at different forwards
    assert torch.equal(late.forwards, at_once.forwards)
    assert torch.equal(late.step, at_once.step)
    torch.testing.assert_close(late.logprob, at_once.logprob)


def test_a_forward_is_launched_before_the_tokens_of_the_last_one_are_read(monkeypatch):
    events = []
    read, write = CandidateReader.read, Canvas.write
    monkeypatch.setattr(speculation, "WAITING", ())
    monkeypatch.setattr(
        CandidateReader, "read", lambda *args: (events.append("launch"), read(*args))[1]
    )
    monkeypatch.setattr(Canvas, "write", lambda *args: (events.append("write"), write(*args))[1])
    run(build_model("llama"), PROMPTS[:2], 4, mode="ar")
    assert events == ["launch", *["launch", "write"] * 3, "write"]
