"""The model `ar2diff` of lm-evaluation-harness, on tasks that are shipped here."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ar2diff import evaluate
from ar2diff.core.errors import Ar2DiffError
from ar2diff.diffusion.estimate import total_of
from ar2diff.evaluation.documents import TASKS
from ar2diff.evaluation.harness import Harness
from ar2diff.evaluation.task_results import difference, run_tasks, shipped_tasks

DEMO = ROOT / "ar2diff" / "demo"
OFFLINE = ("demo_choices", "demo_stories", "demo_questions")  # one of each kind of request
TEXTS = ["One day Mia was at the beach.", "A soft wind blew.", "The sun was warm. Ben sang a song."]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The embedded model, converted without training."""
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    folder = tmp_path_factory.mktemp("demo") / "model"
    adapt(str(DEMO / "model"), load_recipe("demo", ["train.max_steps=0"]), folder)
    return folder


@pytest.fixture(scope="module")
def answers():
    """Factory: what a model of the harness answers to the requests of tasks, by task, with the
    arguments of each request."""

    def ask(model, *tasks, limit=4):
        loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load([*tasks])
        found = run_harness(model, loaded, limit=limit, bootstrap_iters=0)["samples"]
        return {
            task: [
                (request, answer[0])
                for sample in found[task]
                for request, answer in zip(sample["arguments"], sample["resps"], strict=True)
            ]
            for task in tasks
        }

    return ask


def requests_of(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def score_of(answer):
    """Nats of an answer, and whether it is greedy; a whole text has no such mark."""
    return answer if isinstance(answer, tuple) else (answer, None)


# As the harness's own model


@pytest.mark.parametrize("kind", ["embedded", "random"])
def test_ar_mode_answers_as_the_harness_own_model_does_on_the_base(
    kind, answers, demo, tiny_checkpoint, converted
):
    base, ours = (DEMO / "model", demo) if kind == "embedded" else (tiny_checkpoint, converted)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    theirs = answers(HFLM(model, tokenizer=tokenizer, batch_size=3), *OFFLINE)
    found = answers(Harness(str(ours), mode="ar", batch_size=3), *OFFLINE)
    for task in OFFLINE:
        assert len(found[task]) == len(theirs[task]) > 0
        for (asked, answer), (same, wanted) in zip(found[task], theirs[task], strict=True):
            assert asked == same
            if task == "demo_questions":
                assert answer == wanted
                continue
            tokens = len(tokenizer(asked[-1], add_special_tokens=False)["input_ids"])
            (nats, greedy), (want, is_greedy) = score_of(answer), score_of(wanted)
            assert nats == pytest.approx(want, rel=0, abs=1e-6 * tokens)
            assert greedy == is_greedy


def test_a_row_longer_than_the_context_keeps_its_end(converted, tiny_checkpoint):
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = HFLM(base, tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint), max_length=20)
    ours = Harness(str(converted), mode="ar", max_length=20)
    for text in (TEXTS[2], TEXTS[2][:21]):  # 36 and 21 bytes: several windows, and just two
        wanted = theirs.loglikelihood_rolling(requests_of((text,)))[0]
        assert ours.loglikelihood_rolling(requests_of((text,)))[0] == pytest.approx(
            wanted, abs=4e-5
        )
    pair = (TEXTS[2], " He slept.")
    (wanted, _), (found, _) = (m.loglikelihood(requests_of(pair))[0] for m in (theirs, ours))
    assert found == pytest.approx(wanted, abs=1e-5)


# Bounds


def test_the_bound_is_that_of_eval(converted):
    texts = [text[:15] for text in TEXTS]
    model = Harness(str(converted), mode="diffusion", samples=4, seed=3, batch_size=2)
    found = model.loglikelihood(requests_of(*[("", text) for text in texts]))
    wanted = evaluate(str(converted), texts, length=16, samples=4, seed=3)
    estimates = [model.bounds["", text] for text in texts]
    assert not any(greedy for _, greedy in found)
    nats = -sum(nats for nats, _ in found) / wanted.tokens
    assert nats == pytest.approx(wanted.bound.nats_per_token, rel=1e-6)
    assert total_of(estimates).error == pytest.approx(wanted.bound.standard_error, rel=1e-6)
    assert abs(nats - wanted.ar_nll.nats_per_token) > 0.01


def test_a_continuation_of_one_token_is_exact_in_mode_diffusion(demo):
    few, many = (Harness(str(demo), mode="diffusion", samples=n) for n in (1, 16))
    pair = requests_of(("How many apples does Mia have? She has", " 3"))
    assert few.loglikelihood(pair)[0] == pytest.approx(many.loglikelihood(pair)[0], abs=1e-5)
    assert many.bounds["How many apples does Mia have? She has", " 3"].variance.item() == 0


def test_a_smaller_block_length_is_scored_as_well(converted):
    def nats(**settings):
        model = Harness(str(converted), mode="diffusion", samples=16, **settings)
        return model.loglikelihood(requests_of(("", TEXTS[0])))[0][0]

    with pytest.warns(UserWarning, match="never seen blocks"):
        ones = nats(block_length=1)
    ar = Harness(str(converted), mode="ar").loglikelihood(requests_of(("", TEXTS[0])))[0][0]
    assert ones == pytest.approx(ar, abs=1e-3)
    assert abs(nats() - ar) > 0.1


# What must change nothing


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_batches_limits_and_the_order_of_requests_change_nothing(mode, answers, demo):
    one, three = (Harness(str(demo), mode=mode, batch_size=size) for size in (1, 3))
    found, wanted = answers(three, *OFFLINE), answers(one, *OFFLINE, limit=2)
    for task in OFFLINE:
        for (asked, answer), (same, alone) in zip(found[task], wanted[task], strict=False):
            assert asked == same
            if task == "demo_questions":
                assert answer == alone
            else:
                assert score_of(answer)[0] == pytest.approx(score_of(alone)[0], abs=1e-3)
    pairs = [(text, " The end.") for text in TEXTS]
    forth = three.loglikelihood(requests_of(*pairs))
    back = three.loglikelihood(requests_of(*pairs[::-1]))
    assert [nats for nats, _ in back[::-1]] == pytest.approx([nats for nats, _ in forth], abs=1e-3)


def test_an_adapter_answers_as_it_does_when_it_is_merged(converted, tmp_path, answers, write_jsonl):
    from ar2diff.checkpoint.merge import merge
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.sft import sft

    rows = write_jsonl("rows.jsonl", [{"prompt": "Mia", "completion": " smiled."}] * 8)
    recipe = load_recipe(None, [
        f"data.sources=[{rows}]", "train.max_steps=2", "train.learning_rate=1e-1", "peft.r=2",
        "data.max_length=32",
    ])  # fmt: skip
    sft(str(converted), recipe, tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    pair = requests_of((TEXTS[0], TEXTS[1]))
    for mode in ("ar", "diffusion"):
        adapter, merged, base = (
            Harness(str(folder), mode=mode).loglikelihood(pair)[0][0]
            for folder in (tmp_path / "adapter", tmp_path / "merged", converted)
        )
        assert adapter == pytest.approx(merged, abs=1e-3)
        assert abs(adapter - base) > 0.1


def test_a_draft_adapter_writes_and_scores_what_its_base_does(answers):
    base = answers(Harness(str(DEMO / "model")), "demo_questions", "demo_choices", limit=2)
    draft = Harness(str(DEMO / "draft"))
    found = answers(draft, "demo_questions", "demo_choices", limit=2)
    assert draft.exact and draft.options.mode == "speculative"
    assert found["demo_questions"] == base["demo_questions"]
    for (_, answer), (_, wanted) in zip(found["demo_choices"], base["demo_choices"], strict=True):
        assert answer == pytest.approx(wanted, abs=1e-5)


def test_a_cache_answers_in_place_of_the_model(converted, tmp_path, monkeypatch):
    model = Harness(str(converted), mode="ar")
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    asked = requests_of((TEXTS[0], TEXTS[1]))
    written = requests_of((TEXTS[0], {"until": ["."], "max_gen_toks": 4}))
    first = cached.loglikelihood(asked), cached.generate_until(written)
    monkeypatch.setattr(model, "estimate", None)
    monkeypatch.setattr(model, "_write", None)
    assert (cached.loglikelihood(asked), cached.generate_until(written)) == first


# Writing


def test_a_gap_is_filled_in_mode_diffusion_and_otherwise_its_left_side_continued(demo):
    context = "Mia had 2 shells.{mask:4,6} It was a lovely day."
    asked = requests_of((context, {"until": [], "max_gen_toks": 6}))
    left = requests_of(("Mia had 2 shells.", {"until": [], "max_gen_toks": 6}))
    ar = Harness(str(demo), mode="ar")
    assert ar.generate_until(asked) == ar.generate_until(left)
    model = Harness(str(demo), mode="diffusion")
    (filled,) = model.generate_until(asked)
    short, long = (
        model.generate_until(requests_of((context.replace("4,6", n), {})))[0] for n in "46"
    )
    assert filled in (short, long) and short != long


def test_stop_strings_lengths_and_sampling_are_the_tasks_unless_the_settings_say(converted):
    model = Harness(str(converted), mode="ar")

    def write(other=model, **asked):
        return other.generate_until(requests_of((TEXTS[0], asked)))[0]

    text = write(max_gen_toks=12)
    assert text.startswith(write(max_gen_toks=4)) and write(max_gen_toks=4) != text
    stop = text[3:5]
    assert write(max_gen_toks=12, until=[stop]) == text.split(stop)[0]
    warm = write(max_gen_toks=12, do_sample=True, temperature=5.0)
    assert warm != text
    cold = Harness(str(converted), mode="ar", temperature=0, max_new_tokens=4)
    assert write(cold, max_gen_toks=12, do_sample=True, temperature=5.0) == write(max_gen_toks=4)


def test_conversations_are_rendered_by_the_chat_template(converted):
    model = Harness(str(converted), mode="ar")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    user = {"role": "user", "content": "hi"}
    assert model.apply_chat_template([user]) == "<hi>A:"
    system = {"role": "system", "content": "be kind"}
    assert model.apply_chat_template([system, user]) == "<hi>A:"
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert str(converted).replace("/", "__") == model.tokenizer_name


# Results


def test_results_have_errors_and_rows_and_can_be_compared(demo):
    settings = {"mode": "diffusion"}
    (ours,) = run_tasks(demo, ["demo_choices"], settings, limit=8, samples=2)
    (theirs,) = run_tasks(demo, ["demo_choices"], {"mode": "ar"}, limit=8)
    assert (ours.bound, theirs.bound) == (True, False)
    (metric,), (exact,) = ours.metrics, theirs.metrics
    right = [row["acc"] for row in ours.rows]
    assert metric.value == sum(right) / 8 and metric.documents == 8
    spread = math.sqrt(metric.value * (1 - metric.value) / 7)
    assert metric.standard_error == pytest.approx(spread)
    assert metric.bound_error > 0 and exact.bound_error is None
    assert all(len(row["bound_errors"]) == 4 for row in ours.rows)
    assert ours.setting == {"mode": "diffusion", "seed": 0}
    apart = difference(ours, theirs, "acc", "none")
    assert apart.value == metric.value - exact.value and apart.documents == 8
    assert difference(ours, ours, "acc", "none").standard_error == 0
    (fewer,) = run_tasks(demo, ["demo_choices"], {"mode": "ar"}, limit=7)
    with pytest.raises(Ar2DiffError, match="not about the same documents"):
        difference(ours, fewer, "acc", "none")


def test_bits_per_byte_have_the_error_of_a_ratio_and_that_of_their_draws(demo):
    (result,) = run_tasks(demo, ["demo_stories"], {"mode": "diffusion"}, limit=5, samples=2)
    (metric,) = result.metrics
    nats, sizes = zip(*[row["bits_per_byte"] for row in result.rows], strict=True)
    assert metric.value == pytest.approx(-sum(nats) / sum(sizes) / math.log(2))
    without = [  # the jackknife, by leaving each text out
        -(sum(nats) - nats[n]) / (sum(sizes) - sizes[n]) / math.log(2) for n in range(5)
    ]
    middle = sum(without) / 5
    jackknife = math.sqrt(4 / 5 * sum((value - middle) ** 2 for value in without))
    assert metric.standard_error == pytest.approx(jackknife, rel=0.1)
    errors = [row["bound_errors"][0] for row in result.rows]
    drawn = math.sqrt(sum(error**2 for error in errors)) / sum(sizes) / math.log(2)
    assert metric.bound_error == pytest.approx(drawn)


def test_what_a_results_file_says_of_the_model(demo):
    info = Harness(str(demo), mode="diffusion", samples=4, threshold=0.8).get_model_info()
    assert (info["bound"], info["samples"], info["block_length"]) == (True, 4, 8)
    assert info["settings"] == {"seed": 0, "mode": "diffusion", "threshold": 0.8}
    assert Harness(str(DEMO / "model")).get_model_info()["bound"] is False


@pytest.mark.parametrize("task", shipped_tasks())
def test_every_shipped_task_runs(task, demo, shared_data, monkeypatch):
    if not task.startswith("demo"):
        monkeypatch.setenv("AR2DIFF_DATA", str(shared_data()))
    settings = {"mode": "diffusion", "max_new_tokens": 8}
    (result,) = run_tasks(demo, [task], settings, limit=2, samples=1)
    assert {row["id"] for row in result.rows} == {0, 1}
    assert all(math.isfinite(metric.value) for metric in result.metrics)


# The command lines


def test_eval_prints_a_table_of_tasks(run_both, demo, tmp_path):
    rows = tmp_path / "rows.jsonl"
    line = ["eval", demo, "--tasks", "demo_choices,demo_questions", "--limit", 2, "--output", rows]
    code, out, _ = run_both(*line, "--mode", "diffusion", "--max-new-tokens", 8)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "decoded with: seed 0, mode diffusion, max_new_tokens 8"
    assert lines[1].split("  ")[0] == "task" and "due to draws" in lines[1]
    assert [line.split()[0] for line in lines[2:4]] == ["demo_choices", "demo_questions"]
    assert "upper bounds on -log p, from 8 noise draws each, not likelihoods" in lines[4]
    assert len(rows.read_text().splitlines()) == 4
    code, out, _ = run_both(*line[:6], "--mode", "ar", "--max-new-tokens", 8)
    assert code == 0 and "draws" not in out


def test_the_harness_command_line_knows_the_model_and_the_tasks(monkeypatch):
    from lm_eval.api.registry import get_model

    from ar2diff.lm_eval import main

    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for words in (
        ["--tasks", "demo_choices"],
        ["run", "--model=hf", "--include_path", "x"],
        ["ls"],
    ):
        monkeypatch.setattr("sys.argv", ["lm_eval", *words])
        main()
    assert get_model("ar2diff") is Harness
    assert seen[0] == [
        "--tasks",
        "demo_choices",
        "--model",
        "ar2diff",
        "--include_path",
        str(TASKS),
    ]
    assert seen[1:] == [["run", "--model=hf", "--include_path", "x"], ["ls"]]


def test_mistakes_are_told_before_the_model_is_loaded(monkeypatch, tmp_path, run_both):
    monkeypatch.delenv("AR2DIFF_DATA", raising=False)

    def only_here(include_path, include_defaults=False):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", only_here)  # the index of all takes seconds

    def told(*words):
        code, out, said = run_both("eval", "no/model", *words)
        assert (code, out) == (2, "")
        return said

    assert "'demo_choice' is not a task; did you mean demo_choices?" in told(
        "--tasks", "demo_choice"
    )
    assert "AR2DIFF_DATA is not set" in told("--tasks", "stories_cloze")
    assert "is not a folder" in told("--tasks", "x", "--include-path", tmp_path / "none")
    assert "--fewshot only works with --tasks" in told("--data", "x", "--fewshot", 2)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "fix: pip install 'ar2diff[eval]'" in told("--tasks", "demo_choices")


def test_what_a_model_cannot_do_is_refused(converted, convert_tiny):
    with pytest.raises(Ar2DiffError, match="needs an AR mode"):
        Harness(str(convert_tiny("convert.attention=full", "convert.block_length=null")), mode="ar")
    with pytest.raises(Ar2DiffError, match="did you mean threshold"):
        Harness(str(converted), thresold=0.9)
    with pytest.raises(Ar2DiffError, match="never runs code"):
        Harness(str(converted), trust_remote_code=True)
    with pytest.raises(Ar2DiffError, match="samples is 0"):
        Harness(str(converted), samples=0)
    with pytest.raises(Ar2DiffError, match="is not a number of rows"):
        Harness(str(converted), batch_size="many")
    model = Harness(str(converted), mode="ar", max_length=20)
    with pytest.raises(Ar2DiffError, match="leave no room for a prompt"):
        model.generate_until(requests_of(("a", {"max_gen_toks": 20})))
    with pytest.raises(Ar2DiffError, match="cannot be scored"):
        model.loglikelihood(requests_of(("a", "b" * 30)))
