"""`ar2diff report`: figures that would mislead are refused, and a stopped report goes on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from math import sqrt

import pytest
from reports import realistic

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core import speculation
from ar2diff.core.errors import Ar2DiffError
from ar2diff.demo import corpus
from ar2diff.generation.complete import settings_of
from ar2diff.reports import quality, speed, subjects, tasks
from ar2diff.reports.control import edit
from ar2diff.reports.estimates import ratio, ratio_difference, share, share_difference
from ar2diff.reports.figures import (
    BASELINE,
    OWN,
    QUESTIONS,
    STOCK,
    TOKEN_BY_TOKEN,
    Difference,
    Figure,
    Report,
    Subject,
    lies,
    read_report,
    write_report,
)
from ar2diff.reports.run import Asked, make_report
from ar2diff.reports.session import Sizes
from ar2diff.reports.writing import Way

TINY = Sizes(
    batches=(1, 2), timed=2, repeats=2, answer=6, questions=8, texts=8, draws=2,
    temperatures=(1.0,), prompts=(8,), answers=(4,), length_repeats=2, long_rows=8, infills=8,
    edits=2,
)  # fmt: skip
STOCK_RULES = {"do_sample": False, "use_cache": True}
OWN_RULES = {"mode": "diffusion", "threshold": 0.9}


def evidence(arguments, callable_, forwards):
    return {
        "callable": callable_, "arguments": arguments, "dtype": "float32", "threads": 1,
        "forwards": forwards, "tokens": 10, "steps": 10,
    }  # fmt: skip


def honest():
    """A report of two figures of speed and one of quality."""
    at = {"batch": 1}
    base = Figure(
        question="speed", metric="tokens_per_second", unit="tokens/s", subject="base",
        setting=BASELINE, at=at, value=100.0, error=1.0, n=5, better="high",
        evidence=evidence(STOCK_RULES, STOCK, 10),
    )  # fmt: skip
    twice = Difference(to="base", setting=BASELINE, value=2.0, error=0.1, ratio=True)
    own = evidence(OWN_RULES, OWN, 4)
    ours = base.model_copy(
        update={
            "subject": "model", "setting": "diffusion 0.9", "value": 200.0, "evidence": own,
            "difference": twice,
        }
    )  # fmt: skip
    right = ours.model_copy(
        update={
            "question": "quality", "metric": "exact_match", "unit": "%", "at": {}, "value": 50.0,
            "difference": None,
        }
    )  # fmt: skip
    return Report(
        title="m", quick=True,
        subjects={
            "model": Subject(name="m", kind="conversion", parameters=9),
            "base": Subject(name="b", kind="ar", parameters=9),
        },
        figures=[base, ours, right],
        settings={BASELINE: STOCK_RULES, "diffusion 0.9": OWN_RULES},
    )  # fmt: skip


def with_evidence(**changes):
    return lambda figure: {"evidence": figure.evidence | changes}


LIES = {
    "no standard error": (2, lambda figure: {"error": None}),
    "the baseline does not use its cache": (
        0, with_evidence(arguments={"do_sample": False, "use_cache": False}),
    ),
    "was measured with ours": (0, with_evidence(callable="ours")),
    "took 20 forwards for 10": (0, with_evidence(forwards=20)),
    "the baseline drafts": (
        0, with_evidence(arguments=STOCK_RULES | {"prompt_lookup_num_tokens": 10}),
    ),
    "threshold is 0.99, but 0.9": (2, with_evidence(arguments=OWN_RULES | {"threshold": 0.99})),
    "the number type is not": (2, with_evidence(dtype="bfloat16")),
    "lacks forwards": (
        1, lambda figure: {
            "evidence": {k: v for k, v in figure.evidence.items() if k != "forwards"}
        },
    ),
    "not with transformers": (
        1, lambda figure: {
            "difference": figure.difference.model_copy(update={"setting": "diffusion 0.9"})
        },
    ),
    "a bound must be called one": (
        2, lambda figure: {
            "metric": "ar_nll", "unit": "nats/token", "better": "low", "setting": None,
            "evidence": {"estimator": "bound"},
        },
    ),
    "what it was held to is not what it says": (2, lambda figure: {"at": {"constraint": "regex"}}),
    "does not say that it is exact": (
        2, lambda figure: {
            "metric": "ar_nll", "unit": "nats/token", "better": "low", "setting": None,
            "evidence": {},
        },
    ),
}  # fmt: skip


def test_an_honest_report_is_read_as_it_was_written(tmp_path):
    write_report(honest(), tmp_path)
    assert read_report(tmp_path) == honest()


@pytest.mark.parametrize("told", LIES)
def test_a_lie_is_neither_written_nor_read(tmp_path, told):
    place, change = LIES[told]
    report = honest()
    figures = list(report.figures)
    figures[place] = figures[place].model_copy(update=change(figures[place]))
    lying = report.model_copy(update={"figures": figures})
    assert any(told in lie for lie in lies(lying))
    with pytest.raises(Ar2DiffError):
        write_report(lying, tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "report.json").write_text(json.dumps(lying.model_dump(mode="json")))
    with pytest.raises(Ar2DiffError):
        read_report(tmp_path)


def test_token_by_token_decides_no_more_than_one_token_in_a_forward():
    given = realistic()
    assert not list(lies(given))
    (slow,) = given.of("speed", "tokens_per_forward", setting=TOKEN_BY_TOKEN, batch=1)
    faster = [f.model_copy(update={"value": 1.2}) if f is slow else f for f in given.figures]
    (told,) = lies(given.model_copy(update={"figures": faster}))
    assert "more than one token is decided in a forward" in told


def test_all_that_is_compared_under_a_constraint_is_held_to_the_same_one():
    given = realistic()
    (ours,) = given.of("control", "constrained_exact_match", subject="model")

    def told(**changes):
        arguments = {**ours.evidence["arguments"], **changes}
        lying = ours.model_copy(update={"evidence": ours.evidence | {"arguments": arguments}})
        figures = [lying if figure is ours else figure for figure in given.figures]
        return [
            lie.partition(": ")[2] for lie in lies(given.model_copy(update={"figures": figures}))
        ]

    assert not told()
    assert "held to another constraint" in " ".join(told(regex="[a-z]*"))
    assert "held to another constraint" in " ".join(told(json_schema={"type": "integer"}))


def test_errors_are_those_of_shares_quotients_and_pairs():
    assert share([True] * 8 + [False] * 8).error == pytest.approx(100 * sqrt(0.25 / 15))
    assert share([True] * 20).error > 0  # all right on a few questions is not certain
    assert share_difference([True] * 20, [True] * 20).error == pytest.approx(100 / 22)
    assert ratio([2.0, 4.0, 6.0], [1, 2, 3]).error == pytest.approx(0)
    # the mean of equal wholes
    assert ratio([1.0, 3.0], [1, 1]).error == pytest.approx(1.0)
    ours, theirs = ([2.0, 4.0, 7.0], [1, 2, 3]), ([1.0, 2.0, 4.0], [1, 2, 3])
    found = ratio_difference(ours, theirs)
    assert found.value == pytest.approx(13 / 6 - 7 / 6)
    apart = [a - b for a, b in zip(ours[0], theirs[0], strict=True)]
    assert found.error == pytest.approx(ratio(apart, [1, 2, 3]).error)


def test_drafts_that_the_end_of_a_text_hides_do_not_count():
    # forwards of 1, 3, 1 and 2 tokens: of the last, only its first draft is known to be right
    row = {"decided_at": [[1, 2, 2, 2, 3, 4, 4]]}
    first, second = speed._acceptance([row, row], 2)
    assert (first.value, second.value) == (pytest.approx(200 / 3), pytest.approx(50))


def test_an_edited_story_has_the_answer_of_its_new_numbers():
    for example in corpus.corpus(40, 2, (1, 2), "valid"):
        found = edit(corpus.prompt(example), example["answer_work"])
        if found is not None:
            story, answer = found
            right = int(example["answer"]) + 1
            assert corpus.score(example | {"answer": right}, answer)
            assert story != corpus.prompt(example)


@pytest.fixture
def asked(converted, tiny_checkpoint, write_jsonl, monkeypatch):
    """A report on a tiny model, which nobody has trained, on texts of which it knows nothing."""
    monkeypatch.setattr(speculation, "ENOUGH", 0)  # seconds for which forwards are timed
    words = "one two three four five six seven eight nine ten red blue green".split()
    texts = [" ".join([*words[n:], *words[:n], "x" * n]) for n in range(8)]
    data = write_jsonl("held.jsonl", [{"text": text} for text in texts])
    return Asked(str(converted), str(tiny_checkpoint), data=str(data))


def measure(asked, folder, **more):
    ticks = itertools.count()
    return make_report(asked, folder, sizes=TINY, clock=lambda: float(next(ticks)), **more)[1]


def stopping(after):
    """Steps that are interrupted after a number of parts."""

    def steps(parts):
        for number, part in enumerate(parts):
            if number == after:
                raise KeyboardInterrupt
            yield part

    return steps


def test_a_stopped_report_goes_on_and_is_the_same(asked, tmp_path):
    whole = measure(asked, tmp_path / "whole")
    assert {figure.question for figure in whole.figures} == set(QUESTIONS)
    assert {m.what for m in whole.missing} == {"exact match", "revision after an edit"}
    assert whole.orders and whole.texts
    assert whole.settings[TOKEN_BY_TOKEN]["threshold"] == 1.0  # which no probability exceeds
    for size in TINY.batches:
        (slow,) = whole.of("speed", "tokens_per_forward", setting=TOKEN_BY_TOKEN, batch=size)
        assert 0.3 < slow.value <= 1 and slow.evidence["tokens"] <= size * slow.evidence["forwards"]
    assert whole.of("quality", "base_nll", setting=TOKEN_BY_TOKEN, temperature=0.0)
    base = whole.of("speed", "tokens_per_second", subject="base", setting=BASELINE, batch=1)[0]
    assert base.evidence["forwards"] == base.evidence["steps"] == base.evidence["tokens"]
    parts = []
    with pytest.raises(KeyboardInterrupt):
        measure(asked, tmp_path / "cut", steps=stopping(9))
    file = tmp_path / "cut" / "rows" / "quality.jsonl"
    file.write_text(file.read_text()[:-20])  # as if killed while the ninth part was written
    found = measure(asked, tmp_path / "cut", steps=lambda left: parts.extend(left) or left)
    every = measure(asked, tmp_path / "whole", steps=lambda left: left and pytest.fail("again"))
    assert len(parts) == _count(tmp_path / "whole") - 8
    same = [metric for metric in ("ar_nll", "bound", "base_nll", "infill_exact_match")]
    for metric in same:
        ours, theirs = (
            [(f.subject, f.setting, f.value, f.error) for f in r.figures if f.metric == metric]
            for r in (found, every)
        )
        assert sorted(ours, key=str) == sorted(theirs, key=str)


def _count(folder):
    lines = [line for file in (folder / "rows").glob("*.jsonl") for line in file.open()]
    return len({(json.loads(line)["part"]) for line in lines})


def test_a_baseline_without_its_cache_makes_no_report(asked, tmp_path, monkeypatch):
    slow = subjects.STOCK_ARGUMENTS | {"use_cache": False}
    monkeypatch.setattr(subjects, "STOCK_ARGUMENTS", slow)
    with pytest.raises(Ar2DiffError, match="the baseline does not use its cache"):
        measure(replace(asked, only=("speed",)), tmp_path / "report", steps=lambda all: all[:2])
    assert not (tmp_path / "report" / "report.json").exists()


def test_what_fails_costs_its_own_figures_alone(asked, tmp_path, monkeypatch):
    write = Way.write

    def broken(way, *args, **more):
        if way.setting == "diffusion 0.7":
            raise RuntimeError("out of paper")
        return write(way, *args, **more)

    def lost(*_):
        raise RuntimeError("no scale")

    monkeypatch.setattr(Way, "write", broken)
    monkeypatch.setattr(quality, "_likelihood", lost)

    def sums(session, way, name):
        if way.setting == "ar" and way.held.key == "model":
            lost()
        about = {"subject": way.held.key, "setting": way.setting, "task": name, "bound": False}
        about |= {"metric": "exact_match", "filter": "none", "better": "high"}
        spent = {"forwards": 9, "tokens": 0, "steps": 0}
        right = (1.0, 1.0, 0.0, way.held.key == "base")
        return [{**about, **spent, "document": n, "value": v} for n, v in enumerate(right)]

    monkeypatch.setattr(speed, "_memory", lost)
    monkeypatch.setattr(tasks, "check", lambda names: None)
    monkeypatch.setattr(tasks, "measured", sums)
    both = replace(asked, only=("speed", "quality"), tasks=("sums",))
    found = measure(both, tmp_path / "report")
    why = {(miss.question, miss.why) for miss in found.missing}
    assert ("speed", "out of paper") in why and ("quality", "no scale") in why
    assert not found.of("speed", "tokens_per_second", setting="diffusion 0.7")
    assert found.of("speed", "tokens_per_second", setting="diffusion 0.9")
    assert not found.of("quality", "bound") and found.of("quality", "base_nll")
    (lost_task,) = [miss for miss in found.missing if "sums" in miss.what]
    assert lost_task.what == "task sums, model, ar"
    (task,) = found.of("quality", "task:sums exact_match", setting="lossless")
    assert (task.value, task.n, task.difference.value) == (50.0, 4, -25.0)
    assert task.error == pytest.approx(100 * sqrt(0.25 / 3))
    monkeypatch.undo()  # a part that failed as a whole is tried again
    assert measure(replace(asked, only=("quality",)), tmp_path / "report").of("quality", "bound")


def test_requests_that_cannot_be_met_are_refused_in_two_lines(
    asked, converted, tiny_checkpoint, convert_tiny, run_both, tmp_path, write_jsonl
):
    out, model, base = tmp_path / "report", asked.model, asked.base
    demo = str(corpus.__file__).replace("corpus.py", "model")
    few = write_jsonl("few.jsonl", [{"text": "one two three"}])
    data = ("--data", asked.data)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, told in (
        ((base,), "is not converted"),
        ((model, "--base", demo, *data), "has another tokenizer"),
        ((model, "--base", model, *data), "must be an autoregressive one"),
        ((model, "--base", base), "there is no held-out text"),
        ((model, "--base", base, "--data", few), "a report needs at least 8"),
        ((model, *data, "--only", "sped"), "did you mean speed"),
        ((model, *data, "--tasks", "no_such_task"), "--tasks"),
        ((model, *data, "--output-dir", tmp_path / "full"), "holds no report"),
    ):
        code, said, told_too = run_both("report", "--output-dir", out, *arguments)
        assert (code, said) == (2, ""), (arguments, told_too)
        lines = told_too.strip().splitlines()
        assert len(lines) == 2 and lines[0].startswith("error: ") and told in told_too, told_too
    assert not out.exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "noise,settings,fills",
    [
        (["uniform", "free"], ["ar", *(f"diffusion in {n} steps" for n in (8, 4, 2))], False),
        (["uniform", "tracked"], ["ar", "diffusion 0.98", "diffusion 0.9"], False),
        (["mask_uniform", "free"], ["ar", "lossless", "lossless chain"], True),
    ],
)
def test_a_subject_is_measured_in_what_its_noise_can_do(convert_tiny, noise, settings, fills):
    folder = convert_tiny(f"noise.kind={noise[0]}", f"noise.form={noise[1]}")
    held = subjects.Held("model", "model", load_checkpoint(str(folder)), 259)
    assert [*held.settings()][: len(settings)] == settings
    assert held.fills is fills and held.usual in held.settings()
    for arguments in held.settings().values():
        settings_of(held.checkpoint, dict(arguments))
