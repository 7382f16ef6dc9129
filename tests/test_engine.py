"""The engine: rows come and go between forwards, and each writes what it writes alone."""

import ctypes
import gc
import math
import threading
import weakref

import pytest
import torch

import ar2diff
from ar2diff.core.candidates import CandidateReader
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.complete import decode_rows, settings_of
from ar2diff.generation.prompts import split_gaps
from ar2diff.generation.tokens import encode
from ar2diff.serving.engine import Engine, EngineBusy, EngineGone
from ar2diff.serving.events import Committed, Done, Draft, Failed, Mailbox, Post
from ar2diff.serving.jobs import job_of
from ar2diff.serving.prefix import PrefixCache

AR, LOSSLESS = {"mode": "ar"}, {"mode": "speculative", "draft_length": 3}
DIFFUSION = {"mode": "diffusion", "threshold": 0.1}
DRAWN = {"temperature": 1.0, "seed": 7}
ASKED = [
    ("ab", {**AR, "max_new_tokens": 30}),
    ("Once upon a time", {**LOSSLESS, "max_new_tokens": 25}),
    ("Once upon a time", {**DIFFUSION, "max_new_tokens": 20}),
    ("x{mask:5}y{mask:9}z", {**DIFFUSION, "max_new_tokens": 0}),
    ("ab", {**LOSSLESS, "max_new_tokens": 9}),
    ("Once upon", {**AR, **DRAWN, "max_new_tokens": 17}),
    ("b", {**LOSSLESS, **DRAWN, "max_new_tokens": 12}),
    ("hello", {**DIFFUSION, **DRAWN, "max_new_tokens": 33}),
    ("hello hello", {**DIFFUSION, **DRAWN, "max_new_tokens": 5}),
    ("abc", {**AR, "max_new_tokens": 11, "min_new_tokens": 6}),
    ("stop here", {**AR, "max_new_tokens": 40, "stop_strings": ["e", "a", "t", "i"]}),
    ("", {**LOSSLESS, "max_new_tokens": 14}),
]
CONSTRAINED = [
    ("ab" * number, {**mode, "max_new_tokens": 9 + 6 * number, **constraint})
    for constraint in ({"regex": "[0-9]{2,90}(!|\\?)"}, {"choice": ["(yes)", "no", "perhaps not"]})
    for mode in (AR, LOSSLESS, DIFFUSION)
    for number in (1, 2, 3)
]


@pytest.fixture(scope="module")
def checkpoint(converted):
    return ar2diff.load(converted).checkpoint


class Reader:
    """What an engine tells of a row."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.over.set()

    @property
    def ids(self):
        return [token for e in self.events if isinstance(e, Committed) for token in e.ids]

    @property
    def result(self):
        (end,) = [event for event in self.events if isinstance(event, Done | Failed)]
        assert isinstance(end, Done), end.error
        return end.result


def asked(checkpoint, prompt, settings, **more):
    segments = split_gaps(prompt)
    ids = encode(checkpoint.tokenizer, checkpoint.read_as, segments)
    return job_of(checkpoint, ids, settings, segments=segments, **more)


def alone(checkpoint, prompt, settings):
    segments = split_gaps(prompt)
    gaps = len(segments) > 1
    spec, options = settings_of(checkpoint, settings, gaps)
    ids = encode(checkpoint.tokenizer, spec, segments)
    return decode_rows(checkpoint, spec, options, [ids], [segments] if gaps else None)[0]


def cache_of(decoder):
    reader = decoder.reader if hasattr(decoder, "reader") else decoder.groups[0].reader
    return reader.cache


def finish(engine):
    while engine.batches or engine.stats.waiting:
        engine.turn()


def same(result, lone):
    assert (result.text, result.token_ids, result.matches, result.filled) == (
        lone.text, lone.token_ids, lone.matches, lone.filled,
    )  # fmt: skip


@pytest.mark.parametrize("most", [3, 32])
def test_rows_write_what_they_write_alone_whatever_their_company(checkpoint, most):
    pytest.importorskip("outlines_core")
    engine = Engine(checkpoint, max_batch=most)
    every = [*ASKED, *CONSTRAINED]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(most)).tolist()
    readers = {}
    for number in order:
        readers[number] = Reader()
        engine.submit([asked(checkpoint, *every[number])], [readers[number]])
        engine.turn()
    finish(engine)
    assert engine.stats.rows == len(every) and engine.stats.running == 0
    for number, reader in readers.items():
        lone = alone(checkpoint, *every[number])
        same(reader.result, lone)
        if lone.filled is None:
            assert reader.ids == lone.token_ids
        if every[number][1]["mode"] == "diffusion":
            assert reader.result.forwards == lone.forwards


@pytest.mark.parametrize("mode", [AR, LOSSLESS, DIFFUSION])
def test_constrained_rows_come_and_go(checkpoint, mode):
    pytest.importorskip("outlines_core")
    every = [
        (
            "ab" * size,
            {**mode, "max_new_tokens": new, "min_new_tokens": new - 2, "regex": "([0-9][a-z])+"},
        )
        for size, new in ((1, 6), (6, 30), (3, 9), (1, 25), (8, 7), (2, 20))
    ]
    engine, readers = Engine(checkpoint), [Reader() for _ in every]
    for row, reader in zip(every, readers, strict=True):
        engine.submit([asked(checkpoint, *row)], [reader])
        for _ in range(7):
            engine.turn() if engine.batches or engine.stats.waiting else None
    finish(engine)
    for row, reader in zip(every, readers, strict=True):
        same(reader.result, alone(checkpoint, *row))
        assert reader.result.matches


def test_the_choices_of_a_request_are_the_rows_that_generate_writes(checkpoint):
    settings = {**AR, **DRAWN, "max_new_tokens": 12}
    engine, readers = Engine(checkpoint), [Reader() for _ in range(4)]
    jobs = [asked(checkpoint, "ab", settings, number=number) for number in range(4)]
    engine.submit(jobs, readers)
    finish(engine)
    spec, options = settings_of(checkpoint, settings)
    ids = encode(checkpoint.tokenizer, spec, ["ab"])
    texts = [result.text for result in decode_rows(checkpoint, spec, options, [ids] * 4)]
    assert [reader.result.text for reader in readers] == texts and len(set(texts)) == 4


def test_a_newcomer_has_its_first_text_within_three_forwards_of_a_long_answer(checkpoint):
    for settings in (AR, LOSSLESS, {**DIFFUSION, "threshold": 0.0}):
        engine, long, short = Engine(checkpoint), Reader(), Reader()
        engine.submit([asked(checkpoint, "ab", {**settings, "max_new_tokens": 500})], [long])
        for _ in range(5):
            engine.turn()
        before = engine.stats.forwards
        engine.submit([asked(checkpoint, "Once", {**settings, "max_new_tokens": 8})], [short])
        while not short.ids:
            engine.turn()
        assert engine.stats.forwards - before <= 3
        assert not long.over.is_set()


def test_rows_with_equal_options_share_their_forwards(checkpoint):
    engine = Engine(checkpoint)
    for prompt in ("ab", "c", "hello", "what", "d", "e", "f", "g"):
        engine.submit([asked(checkpoint, prompt, {**AR, "max_new_tokens": 40})], [Reader()])
    finish(engine)
    assert engine.stats.forwards == 40 and engine.stats.tokens == 320


def test_newcomers_do_not_join_rows_that_ended_in_their_first_forward(checkpoint):
    engine, readers = Engine(checkpoint), [Reader(), Reader()]
    rows = [("ab", {**AR, "max_new_tokens": 1}), ("a longer one " * 9, {**AR, "max_new_tokens": 4})]
    engine.submit([asked(checkpoint, *row) for row in rows], readers)
    finish(engine)
    for row, reader in zip(rows, readers, strict=True):
        same(reader.result, alone(checkpoint, *row))


def test_a_gap_in_a_block_that_is_not_whole_outlives_its_company(checkpoint):
    slow = {"mode": "diffusion", "threshold": 1.0, "block_length": 4, "max_new_tokens": 2}
    rows = [("a", slow), ("ab{mask:3}cd{mask:2}", {**slow, "max_new_tokens": 0}), ("b", slow)]
    engine, readers = Engine(checkpoint), [Reader() for _ in rows]
    for row, reader in zip(rows, readers, strict=True):
        engine.submit([asked(checkpoint, *row)], [reader])
        engine.turn()
    assert readers[0].over.is_set() and not readers[1].over.is_set()
    finish(engine)
    for row, reader in zip(rows, readers, strict=True):
        same(reader.result, alone(checkpoint, *row))


def test_a_prompt_that_is_asked_for_several_times_is_read_once(checkpoint):
    engine, readers = Engine(checkpoint), [Reader() for _ in range(5)]
    prompt = "A prompt of several blocks, which is read before all of its answers."
    jobs = [asked(checkpoint, prompt, {**AR, **DRAWN, "max_new_tokens": 9}) for _ in readers]
    engine.submit(jobs, readers)
    finish(engine)
    assert engine.stats.forwards <= 10
    assert engine.stats.prompts - engine.stats.reused < len(prompt) + 5 * 16


def test_a_cancelled_row_is_written_no_further_and_the_others_are(checkpoint):
    engine, readers = Engine(checkpoint), [Reader() for _ in range(3)]
    prompts = ["ab", "Once", "hello"]
    tickets = [
        engine.submit([asked(checkpoint, p, {**LOSSLESS, "max_new_tokens": 40})], [r])[0]
        for p, r in zip(prompts, readers, strict=True)
    ]
    engine.turn()
    engine.turn()
    engine.cancel(tickets[1])
    told = len(readers[1].events)
    finish(engine)
    assert len(readers[1].events) == told and not readers[1].over.is_set()
    for place in (0, 2):
        lone = alone(checkpoint, prompts[place], {**LOSSLESS, "max_new_tokens": 40})
        same(readers[place].result, lone)


def test_a_row_that_is_cut_ends_with_what_it_has(checkpoint):
    for settings in (AR, LOSSLESS, DIFFUSION):
        engine, reader, late = Engine(checkpoint, max_batch=1), Reader(), Reader()
        jobs = [
            asked(checkpoint, "ab", {**settings, "max_new_tokens": 40}, streams=False)
            for _ in range(2)
        ]
        tickets = engine.submit(jobs, [reader, late])
        for _ in range(4):
            engine.turn()
        for ticket in tickets:
            engine.cut(ticket)
        finish(engine)
        lone = alone(checkpoint, "ab", {**settings, "max_new_tokens": 40})
        (end,) = reader.events
        assert end.reason == "time" and 0 < len(end.result.token_ids) < 40
        assert lone.token_ids[: len(end.result.token_ids)] == end.result.token_ids
        (end,) = late.events  # it was still waiting
        assert isinstance(end.error, TimeoutError) and not engine.stats.waiting


def test_newcomers_draft_nothing_while_the_rows_that_take_them_rest(checkpoint, monkeypatch):
    engine, drafted = Engine(checkpoint), []
    read = CandidateReader.read

    def noting(reader, ids, rows, front, newest, trees, drafts):
        drafted.append(drafts)
        return read(reader, ids, rows, front, newest, trees, drafts)

    monkeypatch.setattr(CandidateReader, "read", noting)
    settings = {"mode": "speculative", "max_new_tokens": 60}
    engine.warm({})
    engine.submit([asked(checkpoint, p, settings) for p in ("ab", "c", "de")], [Reader()] * 3)
    engine.turn()
    assert drafted[-1] > 0  # behind the first prompts
    decoder = engine.batches[0].decoder
    decoder.pace.resting, decoder.groups[0].drafts = 1000, 0
    decoder.paced = lambda _: decoder.pace
    drafted.clear()
    engine.submit([asked(checkpoint, "Once", settings)], [Reader()])
    engine.turn()
    engine.turn()
    assert drafted == [0, 0, 0]


def test_a_batch_that_is_over_lets_go_of_its_keys_and_values(checkpoint):
    gc.collect()
    gc.disable()
    try:
        for settings in (AR, LOSSLESS, DIFFUSION):
            engine = Engine(checkpoint, prefix_bytes=0)
            for _ in range(2):
                job = asked(checkpoint, "ab", {**settings, "max_new_tokens": 6})
                engine.submit([job], [Reader()])
                engine.turn()
            (batch,) = engine.batches
            cache = weakref.ref(cache_of(batch.decoder))
            del batch
            finish(engine)
            assert cache() is None
    finally:
        gc.enable()


def test_a_batch_that_fails_takes_its_own_rows_with_it(checkpoint):
    engine, one, other = Engine(checkpoint), Reader(), Reader()
    engine.submit([asked(checkpoint, "ab", {**AR, "max_new_tokens": 20})], [one])
    engine.submit([asked(checkpoint, "ab", {**DIFFUSION, "max_new_tokens": 20})], [other])
    engine.turn()
    (batch,) = [batch for batch in engine.batches if batch.options.mode == "ar"]

    def broken():
        raise RuntimeError("out of memory")

    batch.decoder.step = broken
    finish(engine)
    assert isinstance(one.events[-1], Failed)
    same(other.result, alone(checkpoint, "ab", {**DIFFUSION, "max_new_tokens": 20}))


def test_more_than_may_wait_are_turned_away_whole(checkpoint):
    engine = Engine(checkpoint, max_batch=1, max_waiting=3)
    job = asked(checkpoint, "ab", {**AR, "max_new_tokens": 2})
    engine.submit([job], [Reader()])
    with pytest.raises(EngineBusy):
        engine.submit([job] * 3, [Reader()] * 3)
    assert engine.stats.waiting == 1


def test_a_closed_engine_finishes_what_it_has_and_takes_no_more(checkpoint):
    engine, reader = Engine(checkpoint), Reader()
    engine.start()
    engine.submit([asked(checkpoint, "ab", {**AR, "max_new_tokens": 60})], [reader])
    engine.call(lambda: 8).cancel()
    assert engine.call(lambda: 7).result(60) == 7
    engine.close()
    same(reader.result, alone(checkpoint, "ab", {**AR, "max_new_tokens": 60}))
    assert not engine.alive
    with pytest.raises(EngineGone):
        engine.submit([], [])


def test_when_the_thread_dies_every_row_is_told(checkpoint):
    engine, reader = Engine(checkpoint), Reader()
    engine.start()
    engine.submit([asked(checkpoint, "ab", {**AR, "max_new_tokens": 500})], [reader])
    thread = ctypes.c_ulong(engine._thread.ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SystemExit))
    assert reader.over.wait(60)
    assert isinstance(reader.events[-1].error, EngineGone)
    engine._thread.join(60)
    assert not engine.alive
    with pytest.raises(EngineGone):
        engine.call(lambda: 7)


@pytest.mark.parametrize("place", ["batch.Batch.__init__", "engine.Engine._keep", "engine._answer"])
def test_nobody_is_forgotten_wherever_it_dies(checkpoint, monkeypatch, place):
    engine, readers = Engine(checkpoint), [Reader() for _ in range(3)]

    def dies(*_):
        raise SystemExit

    monkeypatch.setattr(f"ar2diff.serving.{place}", dies)
    jobs = [asked(checkpoint, "a" * n, {**AR, "max_new_tokens": 400}) for n in (1, 2, 99)]
    engine.submit(jobs, readers)
    future = engine.call(lambda: 7)
    engine.start()
    assert all(reader.over.wait(60) for reader in readers)
    assert all(isinstance(reader.events[-1].error, EngineGone) for reader in readers)
    if place == "engine._answer":  # the call dies with it
        return
    assert future.result(60) == 7


def test_what_is_wrong_with_a_request_is_found_before_the_engine_sees_it(checkpoint):
    for settings in ({"mode": "ar", "threshold": -1}, {"max_new_tokens": 10**6}, {"modes": "ar"}):
        with pytest.raises(Ar2DiffError):
            asked(checkpoint, "ab", settings)


# What a reader sees


@pytest.mark.parametrize("settings", [AR, LOSSLESS, DIFFUSION, {**DIFFUSION, "threshold": 0.9}])
@pytest.mark.parametrize("every", [1, 5])
def test_drafts_make_up_the_answer_for_slow_readers_too(checkpoint, settings, every):
    engine, tokens, number = Engine(checkpoint), [], 0
    box = Mailbox(lambda: None)
    job = asked(checkpoint, "Once", {**settings, "max_new_tokens": 30}, drafts=True)
    engine.submit([job], [box.put])
    committed, end = [], None
    while end is None:
        for _ in range(every):
            engine.turn() if engine.batches or engine.stats.waiting else None
        for event in box.take():
            if isinstance(event, Committed):
                committed += event.ids
            elif isinstance(event, Draft):
                assert event.start <= len(tokens) and event.forwards >= number
                number = event.forwards
                columns = event.ids, event.logprobs, event.steps
                tokens[event.start :] = zip(*columns, strict=True)
            else:
                end = event
    lone = alone(checkpoint, "Once", {**settings, "max_new_tokens": 30})
    assert committed == lone.token_ids
    assert [token for token, *_ in tokens] == lone.token_ids
    assert all(step and logprob <= 0 for _, logprob, step in tokens)


@pytest.mark.parametrize("settings", [AR, LOSSLESS, DIFFUSION, {**DIFFUSION, **DRAWN}])
def test_the_likeliest_tokens_are_those_of_the_forward_that_decided(checkpoint, settings):
    vocabulary, engine, readers = 259, Engine(checkpoint), [Reader() for _ in range(3)]
    settings = {**settings, "max_new_tokens": 9}
    for count, reader in zip((0, vocabulary, 4), readers, strict=True):
        job = asked(checkpoint, "ab" * (1 + count % 5), settings, alternatives=count)
        engine.submit([job], [reader])
        engine.turn()
    finish(engine)
    told = [[x for e in r.events if isinstance(e, Committed) for x in e.likeliest] for r in readers]
    assert not any(told[0]) and [len(told[1]), len(told[2])] == [9, 9]
    logprobs = [v for e in readers[1].events if isinstance(e, Committed) for v in e.logprobs]
    for token, value, every in zip(readers[1].ids, logprobs, told[1], strict=True):
        assert sum(math.exp(v) for _, v in every) == pytest.approx(1, abs=1e-4)
        assert dict(every)[token] == pytest.approx(value, abs=1e-4)
        assert [v for _, v in every] == sorted((v for _, v in every), reverse=True)
    assert readers[2].ids == alone(checkpoint, "ab" * 5, settings).token_ids


def test_events_cross_to_a_loop_in_one_call_and_in_their_order():
    calls, box = [], Mailbox(lambda: None)
    post = Post(calls.append)
    sent = [Committed([n], [0.0], [1], n) for n in range(3)]
    for event in sent:
        post.put(box, event)
    assert len(calls) == 1 and not box.events
    calls.pop()()
    assert box.take() == sent
    post.put(box, sent[0])
    assert len(calls) == 1


# Beginnings


def kept(*counts):
    """Keys and values of two layers, whose first feature counts the tokens."""
    return [
        (torch.arange(n, dtype=torch.float32).view(1, 1, n, 1) + layer,) * 2
        for layer, n in enumerate(counts)
    ]


def test_a_beginning_is_found_by_any_text_that_shares_it():
    cache = PrefixCache(1 << 20)
    text = list(range(100, 150))
    cache.put(text, kept(50, 50))  # three whole blocks of 16
    assert cache.get(text, 50)[0][0].flatten().tolist() == list(range(48))
    assert cache.get([*text[:20], 1, 2, 3], 23)[1][1].flatten().tolist() == list(range(1, 21))
    assert cache.get(text, 7)[0][0].shape[2] == 7
    assert cache.get([5, *text], 50) == []
    assert cache.hits == 48 + 20 + 7


def test_whole_blocks_alone_are_reused_where_tokens_read_their_block():
    cache = PrefixCache(1 << 20, grain=12)
    assert cache.size == 24
    cache.put(list(range(50)), kept(50))
    assert cache.get(list(range(50)), 47)[0][0].shape[2] == 36


def test_what_was_used_last_is_kept_within_the_budget():
    block = 2 * 16 * 4  # bytes of keys and values of a block
    cache = PrefixCache(3 * block)
    first, second = list(range(32)), list(range(500, 532))
    cache.put(first, kept(32))
    cache.put(second, kept(32))
    assert cache.used <= cache.budget
    assert len(cache.get(second, 32)[0][0].flatten()) == 32
    assert len(cache.get(first, 32)[0][0].flatten()) == 16  # its end was dropped, not its beginning
    cache.put(list(range(900, 1000)), kept(100))
    assert cache.used <= cache.budget


def test_shared_beginnings_are_read_once_and_change_no_text(checkpoint):
    system = "A long beginning that all of these prompts share, word for word. "
    for settings in (AR, LOSSLESS, DIFFUSION):
        settings = {**settings, "max_new_tokens": 12}
        texts, reused = [], []
        for budget in (0, 1 << 24):
            engine, readers = Engine(checkpoint, prefix_bytes=budget), []
            for prompts in (["one"], ["two"], ["one", "three", "five", "four"]):
                new = [Reader() for _ in prompts]
                jobs = [asked(checkpoint, system + prompt, settings) for prompt in prompts]
                engine.submit([*jobs, asked(checkpoint, "x", settings)], [*new, Reader()])
                finish(engine)
                readers += new
            texts.append([reader.result.text for reader in readers])
            reused.append(engine.stats.reused)
        assert texts[0] == texts[1]
        assert reused[0] == 0 and reused[1] >= 5 * (len(system) - 4)
