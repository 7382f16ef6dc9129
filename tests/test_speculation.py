"""Speculation is lossless: greedy token for token, and in distribution, by enumeration."""

import math
from collections import Counter
from functools import cache
from itertools import product

import pytest
import torch
from conftest import CLASSES, MASK, WINDOW, build_model, tiny_spec
from test_likelihood import EXACT, PREDICTIONS, own_mask, raw_logits

from ar2diff.core import speculation
from ar2diff.core.candidates import CandidateReader
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.options import resolve
from ar2diff.core.samplers import Chooser

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
        def draft(canvas, state, chooser, logits, drafts):
            state.drafts = torch.zeros(len(state.rows), drafts, dtype=torch.long)
            for line, row in enumerate(state.rows.tolist()):
                for i in range(drafts):
                    place = int(state.front[line]) + i
                    word = rows[row][place] if place < len(rows[row]) else 3
                    state.drafts[line, i] = (word + 1) % MASK if wrong(place) else word

        monkeypatch.setattr(speculation, "_draft", draft)

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
    canvas = run(model, PROMPTS, new, cache_implementation=cached)
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
    canvas = run(model, PROMPTS, 14, eos_token_id=ends, cache_implementation=cached)
    assert answers(canvas) == [ar_greedy(model, prompt, 14, ends) for prompt in PROMPTS]
    assert len(set(map(len, answers(canvas)))) > 1


# What is read: AR logits behind each draft, and a noisy block behind each candidate


def one_forward(model, known, masks, window):
    """Logits of [known words, causal | a block of masks]."""
    mask = mask_of(len(known) + masks, len(known), "causal_context", 4, window)
    return raw_logits(model, torch.tensor([[*known, *[MASK] * masks]]), mask)[0]


@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_each_candidate_is_read_as_if_it_stood_alone(monkeypatch, kind, prediction, cached):
    model, spec = build_model(kind), tiny_spec(prediction=prediction)
    window, back = WINDOW if kind == "mistral_window" else None, int(prediction == "shift")
    original, compared = CandidateReader.read, Counter()

    def read(self, ids, fronts, drafted):
        target, ahead = original(self, ids, fronts, drafted)
        drafts = self.drafts
        for line, front in enumerate(fronts.tolist()):
            more = drafted[line].tolist()
            (row,) = [n for n, p in enumerate(PROMPTS) if ids[line, : len(p)].tolist() == p]
            if front >= len(PROMPTS[row]) + 9:  # finished
                continue
            words = [*ids[line, :front].tolist(), *more]
            if more:  # were drafted with the newest word still masked
                own = one_forward(model, words[: front - 1], drafts + 1, window)
                assert more == own[front - back :, :MASK].argmax(-1)[:drafts].tolist()
            for j in range(len(more) + 1):
                own = one_forward(model, words[: front + j], drafts + 1, window)
                torch.testing.assert_close(target[line, j], own[front + j - 1], **EXACT)
                own = own[front + j + 1 - back :][:drafts]
                torch.testing.assert_close(ahead[line, j], own, **EXACT)
                compared[row] += 1
        return target, ahead

    monkeypatch.setattr(CandidateReader, "read", read)
    run(model, PROMPTS, 9, spec, draft_length=2 + back, cache_implementation=cached)
    assert min(compared[row] for row in range(len(PROMPTS))) > 9


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


def drafting(prompt, count, prediction, repetition_penalty=1.0, **warp):
    """What drafts behind the word after a prompt are drawn from."""
    n, back = len(prompt), int(prediction == "shift")
    mask = own_mask(n + count + 1, n, "causal_context", 4)
    logits = raw_logits(three_words(), torch.tensor([[*prompt, *[3] * (count + 1)]]), mask)[0]
    return [probabilities(logits[n + 1 + i - back], **warp) for i in range(count)]


def continued(words, prompt, length, **warp):
    """{words: probability} of all that the AR mode makes of a beginning."""
    if len(words) >= length:
        return {words[:length]: 1.0}
    result = Counter()
    for word, p in enumerate(ar([*prompt, *words], **warp)):
        for more, rest in continued((*words, word), prompt, length, **warp).items():
            result[more] += p * rest
    return result


def cells(weights):
    """(word, a number that draws it, its probability)."""
    ends = [sum(weights[: word + 1]) for word in range(3)]
    for word, weight in enumerate(weights):
        if weight > 0:
            yield word, (ends[word] - weight / 2) / ends[-1], weight / ends[-1]


def verdicts(p, q, drafts):
    """(numbers that decide on each draft, what the word behind them is drawn from, probability)."""
    if not drafts:
        yield [], p[0], 1.0
        return
    ratio = min(1.0, p[0][drafts[0]] / q[0][drafts[0]])
    for numbers, last, weight in verdicts(p[1:], q[1:], drafts[1:]) if ratio > 0 else ():
        yield [ratio / 2, *numbers], last, weight * ratio
    if ratio < 1:
        residual = [max(0.0, a - b) for a, b in zip(p[0], q[0], strict=True)]
        yield [(1 + ratio) / 2] + [0.5] * (len(drafts) - 1), residual, 1 - ratio


def all_draws(prompt, count, prediction, **warp):
    """A number from the middle of each cell of draws between which the definition of speculative
    sampling (Leviathan et al. 2023, algorithm 1) tells no difference, and the cell's size."""
    q = drafting(prompt, count, prediction, **warp)
    for first, u, weight in cells(ar(prompt, **warp)):
        for chosen in product(*(list(cells(line)) for line in q)):
            drafts = [word for word, _, _ in chosen]
            p = [ar([*prompt, first, *drafts[:i]], **warp) for i in range(count + 1)]
            size = weight * math.prod(share for _, _, share in chosen)
            for numbers, last, share in verdicts(p, q, drafts):
                for _, final, part in cells(last):
                    script = [u, *(number for _, number, _ in chosen), *numbers, final]
                    yield script, size * share * part


@pytest.fixture
def scripted(monkeypatch):
    """Factory: row r's draws are `scripts[r]` from now on."""

    def plant(scripts):
        left = [iter(script) for script in scripts]

        def uniform(self, row):
            return torch.tensor([next(left[r], 0.5) for r in row.tolist()], dtype=torch.float64)

        monkeypatch.setattr(Chooser, "uniform", uniform)

    return plant


WARPS = [{}, {"temperature": 0.6}, {"top_k": 2}, {"repetition_penalty": 1.6, "temperature": 1.5}]


@pytest.mark.parametrize("warp", WARPS, ids=lambda warp: "+".join(warp) or "plain")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("prompt", [[1], [0, 2, 1]], ids=str)
def test_words_are_those_of_ar_sampling_over_all_draws(scripted, prompt, drafts, prediction, warp):
    scripts, sizes = zip(*all_draws(prompt, drafts, prediction, **warp), strict=True)
    assert sum(sizes) == pytest.approx(1)
    scripted(scripts)
    spec, length = tiny_spec(prediction=prediction, mask_token_id=3), drafts + 2
    options = resolve(
        spec, {"mode": "speculative", "draft_length": drafts, "temperature": 1.0} | warp
    )
    canvas = Canvas.of_prompts([prompt] * len(scripts), 3, max_new_tokens=length + 2)
    states = denoise(three_words(), spec, canvas, options)
    next(states), next(states)  # a word and its drafts; what is accepted of them, and a word
    got = Counter()
    for row, size in enumerate(sizes):
        for words, p in continued(tuple(canvas.new_ids(row)), prompt, length, **warp).items():
            got[words] += size * p
    want = continued((), prompt, length, **warp)
    for words in product(range(3), repeat=length):
        assert got[words] == pytest.approx(want.get(words, 0.0), abs=1e-9)
    emitted = Counter(len(canvas.new_ids(row)) for row in range(len(scripts)))
    assert len(emitted) == drafts + 1  # from no draft accepted to all of them


def chi_square(counts, want):
    total = sum(counts.values())
    assert all(words in want for words in counts)
    return sum((counts[w] - total * p) ** 2 / (total * p) for w, p in want.items())


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_random_words_are_those_of_ar_sampling(drafts, prediction):
    spec, mode = tiny_spec(prediction=prediction, mask_token_id=3), {"draft_length": drafts}
    kwargs = {"temperature": 1.0, "seed": 0} | (mode if drafts else {"mode": "ar"})
    canvas = run(three_words(), [[1]] * 1500, 4, spec, **kwargs)
    counts = Counter(map(tuple, answers(canvas)))
    assert chi_square(counts, continued((), [1], 4)) < 135  # 80 df, p = 1e-4
    if drafts:
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
