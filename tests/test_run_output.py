"""What the training verbs print, and what their runs leave in `log`."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings

import pytest

from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.sources import Documents
from ar2diff.reports.svg import LIGHT
from ar2diff.training.adapt import AdaptTrainer, adapt
from ar2diff.training.closing import closing
from ar2diff.training.findings import findings, reached
from ar2diff.training.history import find_runs
from ar2diff.training.journal import Journal, read_metrics
from ar2diff.training.plots import draw, pictures_in
from ar2diff.training.screen import Screen
from ar2diff.training.wording import amount, fitted_line

TEXTS = [{"text": f"the cat number {n} sat on the mat and saw {n} dogs"} for n in range(48)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": str(n)},
        ]
    }
    for n in range(12)
]
SMALL = ["train.per_device_train_batch_size=4", "data.max_length=32", "train.logging_steps=2"]
VERBS = {  # rows, settings, what the line of a step shows
    "adapt": (TEXTS, ["eval.rows=2", "eval.length=16"], r"loss [\d.]+  accuracy [\d.]+%  AR loss"),
    "draft": (
        TEXTS, ["draft.rank=2", "draft.head_rank=2", "draft.block_length=4", "eval.steps=0"],
        r"loss [\d.]+  accepted [\d.]+%  [\d.]+ tokens/forward",
    ),
    "sft": (CHATS, ["data.chat_template=plain"], r"loss [\d.]+  accuracy [\d.]+%  AR loss"),
    "rl": (
        [{"prompt": f"say {n}", "answer": str(n)} for n in range(8)],
        ["rl.rewards=[{name: exact}]", "rl.num_generations=4", "rl.max_completion_length=8"],
        r"reward [\d.]+  stopped \d+%  (KL|entropy) [\d.]+",
    ),
}  # fmt: skip


@pytest.fixture
def recipe(write_jsonl):
    """Factory: a recipe of a run of a few small steps on `TEXTS`, with settings."""

    def make(*settings):
        data = write_jsonl("texts.jsonl", TEXTS)
        return load_recipe(None, [*SMALL, f"data.sources=[{data}]", "train.max_steps=4", *settings])

    return make


# On the screen


@pytest.mark.usefixtures("estimates")
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_piped_run_prints(run_both, tiny_checkpoint, converted, write_jsonl, tmp_path, verb):
    rows, settings, figures = VERBS[verb]
    model = converted if verb in ("sft", "rl") else tiny_checkpoint
    data, out = write_jsonl("rows.jsonl", rows), tmp_path / "out"
    code, said, err = run_both(
        verb, model, "--data", data, "--output-dir", out, "--max-steps", 4, *SMALL, *settings
    )
    assert code == 0, err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said + err)
    opening, steps = err.split("step ", 1)[0].splitlines(), re.findall(r"step \d.*", err)
    assert re.match(rf"{verb}: .*llama.*, [\d.]+k parameters|{verb}: .*model", opening[0])
    assert "  budget  4 steps of 4" in err and f"  output  {out}" in opening
    (memory,) = (line for line in opening if line.startswith("  memory"))
    assert re.search(r"about \d\.\d+ GB of [\d.]+ GB", memory)
    assert all(len(line) <= 80 for line in steps)
    assert re.search(rf"step 4/4: {figures}", err)
    assert f"{verb}: " in said.splitlines()[0] and "tokens in 4 steps" in said
    assert len(said.splitlines()) < 16 and "ar2diff " in said.split("next:\n")[1]
    assert (out / "log" / "command.txt").read_text().startswith(f"ar2diff {verb} ")
    assert load_recipe(str(out / "log" / "recipe.yaml")).train.max_steps == 4


def test_on_a_terminal_lines_stand_above_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    screen = Screen()
    with screen.bar("adapt", 10):
        screen.step(3, "5 min left  1,234 tokens/s")
        screen.say("step 3/10: loss [1]")
        screen._bar.refresh()
    shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"adapt ━+.* 3/10 5 min left  1,234 tokens/s", shown)
    assert "step 3/10: loss [1]\n" in shown
    before = terminal.getvalue()
    with Screen(speaks=False).bar("adapt", 10):
        Screen(speaks=False).say("no")
    assert terminal.getvalue() == before


@pytest.mark.parametrize(
    "count, said",
    [(0, "0"), (9999, "9,999"), (16_400, "16.4k"), (1_638_400, "1.64M"), (7.6e9, "7.6B")],
)
def test_amounts(count, said):
    assert amount(count) == said


def test_a_line_loses_the_parts_that_do_not_fit():
    assert fitted_line(["a" * 40, "b" * 38, "c"]) == "a" * 40 + "  " + "b" * 38


# Before and after


def test_rows_are_held_out_unasked_where_the_run_would_read_them_last(
    tiny_checkpoint, recipe, tmp_path
):
    settings = ["eval.rows=2", "eval.length=16", "eval.samples=1"]
    watched = adapt(str(tiny_checkpoint), recipe(*settings), tmp_path / "a")
    alone = adapt(str(tiny_checkpoint), recipe(*settings, "eval.steps=0"), tmp_path / "b")
    assert (watched.eval_rows, alone.eval_rows, watched.data["held_out"]) == (2, 0, 2)
    assert [row["step"] for row in read_metrics(tmp_path / "a") if "eval_bound" in row] == [0, 4]
    assert watched.before["eval_ar_nll"] != watched.after["eval_ar_nll"]
    assert watched.after["eval_bound"] == watched.eval["bound"]["nats_per_token"]
    one, other = (tmp_path / run / "model.safetensors" for run in "ab")
    assert one.read_bytes() == other.read_bytes()  # it does not come as far as these rows


def test_no_rows_are_held_out_of_little_data(tiny_checkpoint, recipe, tmp_path):
    for few in (["eval.rows=3"], ["eval.rows=2", "eval.length=64"]):  # 48 texts, all shorter
        plan = adapt(
            str(tiny_checkpoint), recipe(*few, "data.max_length=64"), tmp_path / "o", dry_run=True
        )
        assert plan.eval_rows == 0, few


def test_the_last_documents_are_those_that_an_epoch_ends_with(write_jsonl):
    documents = Documents(recipe_sources(write_jsonl), "text", 3)
    epoch = [text for _, (text, _) in zip(range(48), documents, strict=False)]
    assert documents.last(5) == epoch[-5:] and sorted(documents.known()) == sorted(epoch)


def recipe_sources(write_jsonl):
    data = write_jsonl("texts.jsonl", TEXTS)
    return load_recipe(None, [f"data.sources=[{data}]"]).data.sources


def test_the_base_is_measured_where_the_conversion_gives_up_its_ar_mode(
    tiny_checkpoint, recipe, tmp_path
):
    settings = ["eval.rows=2", "eval.length=16", "train.max_steps=1"]
    full = ["convert.attention=full", "convert.block_length=null", "noise.time=sequence",
            "objective.ar_weight=0"]  # fmt: skip
    kept = adapt(str(tiny_checkpoint), recipe(*settings), tmp_path / "a").before
    given_up = adapt(str(tiny_checkpoint), recipe(*settings, *full), tmp_path / "b").before
    assert given_up["base_ar_nll"] == pytest.approx(kept["eval_ar_nll"], rel=1e-5)


def test_what_was_reached_is_the_mean_of_the_first_and_last_logs_without_an_evaluation():
    rows = [{"step": n, "seconds": 0, "reward": float(n)} for n in range(1, 21)]
    assert reached(rows, ["reward", "kl"]) == ({"reward": 1.5}, {"reward": 19.5})


def test_the_end_of_a_run_in_words():
    result = {
        "output_dir": "runs/my model", "base_model": "m", "verb": "adapt", "diffusion": {},
        "tokens": 1_638_400, "steps": 1600, "seconds": 185.0, "peak_memory": 640_000_000,
        "before": {"eval_bound": 7.1, "base_ar_nll": 1.13}, "after": {"eval_bound": 2.4224},
        "warnings": ["a. b"],
    }  # fmt: skip
    assert closing(result, ["loss.svg", "bound.svg"]) == [
        "adapt: 1.64M tokens in 1,600 steps, 3 min, 0.64 GB of memory at the peak",
        "  bound    7.100 -> 2.422 nats per token of held-out text",
        "  base     1.130 AR NLL of the model before conversion",
        "warning: a. b",
        "  output   runs/my model",
        "  log      runs/my model/log (metrics.jsonl, loss.svg, bound.svg)",
        "next:",
        "  ar2diff generate 'runs/my model' --prompt 'Once upon a time'",
        "  ar2diff eval 'runs/my model' --data FILE",
        "  ar2diff sft 'runs/my model' --data FILE",
    ]
    assert "no plots; pip install 'ar2diff[plot]' draws them" in "".join(closing(result))
    assert closing(result | {"tokens": None})[0] == "converted m without training"


# What a person should act on


def reward_rows(rewards=(0.5,) * 4, stops=(1.0,) * 4, alike=(0.0,) * 4):
    return [
        {"step": n, "seconds": 0, "loss": 0.1, "reward": r, "reward_std": 0.0, "stop_rate": s,
         "frac_reward_zero_std": a}
        for n, (r, s, a) in enumerate(zip(rewards, stops, alike, strict=True), 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows, found",
    [
        (reward_rows(), set()),
        (reward_rows(rewards=[0.0] * 4, alike=[1.0] * 4), {"no reward"}),
        (reward_rows(alike=[0.2, 1.0, 0.9, 0.9]), {"alike"}),
        (reward_rows(stops=[0.8, 0.7, 0.5, 0.3]), {"stops less"}),
        (reward_rows(stops=[0.0] * 4), {"never stops"}),
        (reward_rows(rewards=[0.0] * 4)[:2], set()),  # too early to tell
    ],
    ids=["good", "no reward", "alike", "stops less", "never stops", "early"],
)
def test_what_rl_warns_of_while_it_runs(rows, found):
    assert findings("rl", rows, settled=False).keys() == found


def test_what_a_run_warns_of_at_its_end():
    def at(step, **logs):
        return {"step": step, "seconds": 0, **logs}

    def found(verb, *rows, **facts):
        return findings(verb, rows, settled=True, **facts).keys()

    start = at(0, eval_bound=5.0, eval_ar_nll=1.0)
    assert found("adapt", start, at(9, eval_bound=2.0, eval_ar_nll=1.02)) == set()
    assert found("adapt", start, at(9, eval_bound=5.0, eval_ar_nll=1.02)) == {"bound"}
    assert found("adapt", start, at(9, eval_bound=2.0, eval_ar_nll=1.2)) == {"ar"}
    assert found("adapt", at(3, loss=None), at(4, loss=1.0)) == {"nan"}
    assert found("draft", at(9, eval_tokens_per_forward=1.1)) == {"slow"}
    answers = {"rows_over_max_length": 5, "turns": 30, "ended": 29}
    data = {"answers": answers, "conversations": 20, "max_length": 64}
    assert found("sft", at(9, loss=1.0), **data) == {"cut", "unended"}
    assert found("sft", at(9, loss=1.0), **data | {"conversations": 51}) == {"unended"}


# The log of a run


def test_a_run_that_was_killed_is_listed_and_goes_on_with_its_metrics(
    run_both, tiny_checkpoint, recipe, tmp_path, monkeypatch
):
    settings = ["train.save_steps=2", "train.logging_steps=1", "eval.rows=2", "eval.length=16"]
    runs, step = tmp_path / "runs", AdaptTrainer.training_step
    whole, out = runs / "whole", runs / "deep" / "killed"
    adapt(str(tiny_checkpoint), recipe(*settings), whole)

    def killed_in_step_4(self, *args, **kwargs):
        if self.state.global_step == 3:
            assert [run.state for run in find_runs(out)] == ["running"]
            raise InterruptedError
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(AdaptTrainer, "training_step", killed_in_step_4)
        adapt(str(tiny_checkpoint), recipe(*settings), out)
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2, 3]
    with (out / "log" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert len(read_metrics(out)) == 4

    (runs / "other").mkdir()
    code, said, _ = run_both("runs", runs)
    head, killed, done = said.splitlines()
    assert code == 0 and head.split() == ["run", "verb", "steps", "time", "reached"]
    assert re.search(r"deep/killed +adapt +3/4 unfinished +\d+ s +bound \d", killed)
    assert re.search(r"whole +adapt +4 +\d+ s +bound [\d.]+, AR NLL [\d.]+", done)
    (one, _) = json.loads(run_both("runs", runs, "--json")[1])["runs"]
    assert (one["state"], one["step"]) == ("unfinished", 3) and one["before"]["eval_bound"] > 0

    adapt(str(tiny_checkpoint), recipe(*settings), out, resume=True)
    changing = ("seconds", "tokens_per_second")
    kept = [
        [{name: value for name, value in row.items() if name not in changing} for row in rows]
        for rows in map(read_metrics, (whole, out))
    ]
    assert kept[0] == kept[1]
    seconds = [row["seconds"] for row in read_metrics(out)]
    assert seconds == sorted(seconds)


def test_a_log_goes_with_its_run_and_files_of_others_stay(tiny_checkpoint, recipe, tmp_path):
    out = tmp_path / "out"
    adapt(str(tiny_checkpoint), recipe(), out)
    (out / "log" / "notes.txt").write_text("mine")
    adapt(str(tiny_checkpoint), recipe("train.max_steps=0"), out, overwrite=True)
    assert [file.name for file in (out / "log").iterdir()] == ["notes.txt"]


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_log(
    tiny_checkpoint, recipe, tmp_path, monkeypatch
):
    def fails(*_):
        raise Ar2DiffError("it failed", "try again")

    monkeypatch.setattr(AdaptTrainer, "training_step", fails)
    with pytest.raises(Ar2DiffError):
        adapt(str(tiny_checkpoint), recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metrics_are_json_even_where_a_number_is_none(tmp_path):
    journal = Journal(tmp_path)
    journal.write(1, {"loss": float("nan"), "text": "é"})
    (line,) = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=None)["loss"] is None and "NaN" not in line


# What libraries say


def test_libraries_are_quiet_unless_they_are_asked_for(
    run_both, tiny_checkpoint, write_jsonl, tmp_path, monkeypatch
):
    data, step = write_jsonl("texts.jsonl", TEXTS), AdaptTrainer.training_step

    def talks(self, *args, **kwargs):
        warnings.warn_explicit("an old name", FutureWarning, "torch/utils.py", 1, "torch.utils")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", talks)
    for number, asked in enumerate(([], ["-v"])):
        line = ["adapt", tiny_checkpoint, "--data", data, "--output-dir", tmp_path / str(number)]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            monkeypatch.setattr(
                "warnings.showwarning", lambda m, *_: print(f"said: {m}", file=sys.stderr)
            )
            code, _, err = run_both(*line, "--max-steps", 1, *SMALL, "eval.steps=0", *asked)
        assert code == 0 and ("an old name" in err) == bool(asked), err


# Pictures, and the list of runs


ROWS = [
    {"step": 0, "seconds": 0, "eval_bound": 5.0, "eval_ar_nll": 1.1},
    *({"step": n, "seconds": n, "loss": 5 / n, "ar_loss": None} for n in range(1, 5)),
    {"step": 4, "seconds": 4, "eval_bound": 2.5, "eval_ar_nll": 1.2},
]


def test_the_same_metrics_give_the_same_picture(pictures, tmp_path):
    for folder in ("a", "b"):
        drawn = draw({"run": ROWS}, tmp_path / folder)
        assert [file.name for file in drawn] == ["loss.svg", "bound.svg"]
    names = ("loss.svg", "loss-dark.svg", "bound.svg", "bound-dark.svg")
    texts = {name: (tmp_path / "a" / name).read_text() for name in names}
    assert all((tmp_path / "b" / name).read_text() == text for name, text in texts.items())
    assert len({*texts.values()}) == 4
    for name, text in texts.items():
        assert ("#0d1117" in text) == ("dark" in name) and "#1f77b4" not in text
    (both,) = draw({"a": ROWS, "b": ROWS[1:]}, tmp_path / "c", "loss")
    assert both.read_text() != texts["loss.svg"] and LIGHT.colors[1] in both.read_text()


def test_a_run_draws_what_it_logged(pictures, tiny_checkpoint, recipe, tmp_path):
    import matplotlib

    matplotlib.rcParams["lines.linestyle"] = "--"  # one of the user's own settings
    adapt(str(tiny_checkpoint), recipe("eval.rows=2", "eval.length=16"), tmp_path / "out")
    log = tmp_path / "out" / "log"
    assert {file.name for file in log.glob("*.svg")} == {
        "loss.svg", "loss-dark.svg", "bound.svg", "bound-dark.svg",
    }  # fmt: skip
    assert pictures_in(tmp_path / "out") == ["loss.svg", "bound.svg"]
    assert "stroke-dasharray" not in (log / "loss.svg").read_text()
    matplotlib.rcdefaults()


def test_a_picture_that_fails_costs_no_model(
    tiny_checkpoint, recipe, tmp_path, monkeypatch, capsys
):
    def fails(_folder):
        raise OSError("no fonts")

    monkeypatch.setattr("ar2diff.training.run.draw_log", fails)
    adapt(str(tiny_checkpoint), recipe(), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "note: no plots were drawn: no fonts" in capsys.readouterr().err


def test_plots_without_matplotlib_name_the_extra(run_both, tmp_path):
    Journal(tmp_path).write(1, {"loss": 1.0})
    code, said, err = run_both("plot", tmp_path)
    assert (code, said) == (2, "")
    assert err == (
        "error: matplotlib, which draws the plots, is not installed\n"
        "  fix: run pip install 'ar2diff[plot]'\n"
    )
    code, _, err = run_both("plot", tmp_path / "nowhere")
    assert code == 2 and "has no log/metrics.jsonl" in err


def test_a_folder_without_runs(run_both, tmp_path):
    assert run_both("runs", tmp_path) == (0, f"there are no runs in {tmp_path}\n", "")
    code, _, err = run_both("runs", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in err and len(err.splitlines()) == 2


def test_a_tracker_gets_all_that_is_logged(tiny_checkpoint, recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    settings = ["train.report_to=tensorboard", "eval.rows=2", "eval.length=16"]
    adapt(str(tiny_checkpoint), recipe(*settings), out)
    events = EventAccumulator(str(out / "log" / "tensorboard")).Reload()
    for tag, name in (("train/loss", "loss"), ("eval/bound", "eval_bound")):
        logged = [(row["step"], row[name]) for row in read_metrics(out) if name in row]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(value)) for step, value in logged
        ]
    assert not [name for name in os.environ if name == "TENSORBOARD_LOGGING_DIR"]
    adapt(str(tiny_checkpoint), recipe("train.max_steps=0"), out, overwrite=True)
    assert not (out / "log").exists()
