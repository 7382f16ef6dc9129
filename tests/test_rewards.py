"""Rewards: what each of ours gives, finding others, and the guard around all of them."""

from __future__ import annotations

import asyncio
import functools
import gc
import gzip
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ar2diff.config.rl import Reward
from ar2diff.core.errors import Ar2DiffError
from ar2diff.demo import corpus
from ar2diff.rewards.builtin import GRADERS, countdown, demo, exact, length, sudoku, words
from ar2diff.rewards.loading import make_rewards
from ar2diff.rewards.workers import Worker, confine

HUGE = 100_000  # characters of a completion that has to be judged quickly


def reward_of(name, *others, time_limit=60.0, **args):
    """The function of a reward, beside others that are not returned."""
    entry = Reward(name=name, args=args, time_limit=time_limit)
    return make_rewards([entry, *(Reward(name=other) for other in others)])[0]


def judged(name, completion, args=None, **row):
    """What one of ours gives for one completion."""
    columns = {column: [value] for column, value in row.items()}
    return reward_of(name, **(args or {}))(prompts=["?"], completions=[completion], **columns)[0]


def fails(call, *parts):
    """The call must raise the error that has all the parts; its text."""
    with pytest.raises(Ar2DiffError) as error:
        call()
    said = f"{error.value.what}\n{error.value.fix}"
    assert said.count("\n") == 1
    for part in parts:
        assert part in said, said
    return said


@functools.cache
def _rows(path):
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


@pytest.fixture(scope="session")
def rows(shared_data):
    """Factory: the rows of a file of real data."""
    return lambda name: _rows(shared_data(f"{name}.jsonl.gz"))


# exact


@pytest.mark.parametrize(
    ("extract", "completion", "answer", "value"),
    [
        ("whole", " 954\n", "954", 1),
        ("whole", "954", 954, 1),
        ("whole", "954.", "954", 0),
        ("whole", "it is 954", "954", 0),
        ("whole", "", "954", 0),
        ("whole", "18", "2 * 9 = 18\n#### 18", 1),
        ("first_line", "\n 2,9,6 \n7", "2,9,6", 1),
        ("first_line", "7\n2,9,6", "2,9,6", 0),
        ("last_line", "7\n 2,9,6 \n\n", "2,9,6", 1),
        ("last_line", "2,9,6\n7", "2,9,6", 0),
        ("last_line", "", "2,9,6", 0),
        ("last_number", "so 9 * 2 = $18.", "#### 18", 1),
        ("last_number", "18.0", "18", 1),
        ("last_number", "1,000", "1000", 1),
        ("last_number", "1000", "#### 1,000", 1),
        ("last_number", "1,234,567.50", "1234567.5", 1),
        ("last_number", "18 eggs", "18", 1),
        ("last_number", "18kg", "18", 1),
        ("last_number", "18 or 19", "18", 0),
        ("last_number", "**18**", "18", 1),
        ("last_number", "no number", "0", 0),
        ("last_number", "", "0", 0),
        ("last_number", "8 - 34 = -26", "-26", 1),
        ("last_number", "8 − 34 = −26", "-26", 1),  # U+2212
        ("last_number", "-$26", "-26", 1),
        ("last_number", r"\$26", "26", 1),
        ("last_number", "26", "-26", 0),
        ("last_number", "pages 10-26", "26", 1),  # no sign but a range
        ("last_number", "pages 10-26", "-26", 0),
        ("last_number", "1_000", "1000", 0),
        ("last_number", "1_000", "0", 0),  # nor is its end a number
        ("last_number", "x2", "2", 0),
        ("last_number", "1e5", "1", 0),
        ("last_number", "18.05e3", "18", 0),
        ("last_number", "1.2.3", "3", 0),
        ("last_number", "3/4", "0.75", 1),
        ("last_number", "3/4", "4", 0),
        ("last_number", "3/0", "3", 0),
        ("last_number", ".5", "1/2", 1),
        ("last_number", "1,2,3", "3", 1),
        ("last_number", "9" * 5000, "9", 0),
        ("last_number", "٣", "3", 0),  # a digit to Python, but not to the column's author
        ("boxed", r"so \boxed{18}", "18", 1),
        ("boxed", r"\boxed{1} no, \boxed{18}.", "18", 1),
        ("boxed", r"\boxed{18} no, \boxed{1}.", "18", 0),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
        ("boxed", r"\boxed{\frac{1}{2}}", r"thus \boxed{ \frac{1}{2} }", 1),
        ("boxed", r"\boxed{1,000}", "1000.0", 1),
        ("boxed", r"\boxed{$18}", "18", 1),
        ("boxed", r"\boxed{x = 18}", "18", 0),
        ("boxed", "18", "18", 0),
        ("boxed", r"\boxed{18", "18", 0),
    ],
)
def test_exact(extract, completion, answer, value):
    assert judged("exact", completion, {"extract": extract}, answer=answer) == value


def test_exact_wants_a_number_in_the_column():
    fails(
        lambda: judged("exact", "3", {"extract": "last_number"}, answer="three"),
        "exact", "no number", "'three'", "row 0",
    )  # fmt: skip


def test_exact_on_real_rows(rows):
    for row in rows("rl-arithmetic/test") + rows("rl-digits/test"):
        assert exact(row["answer"], row["answer"]) == 1
        assert exact(row["answer"] + "1", row["answer"]) == 0
    for row in rows("rl-arithmetic/test"):
        assert exact(f"{row['prompt']} {row['answer']}.", row["answer"], extract="last_number") == 1
    for row in rows("gsm8k/test"):
        assert exact(row["answer"], row["answer"], extract="last_number") == 1
        end = row["answer"].split("#### ")[1]
        assert exact(f"The answer is ${end}.", row["answer"], extract="last_number") == 1
        assert exact(rf"Thus \boxed{{{end}}}.", row["answer"], extract="boxed") == 1
        assert exact(f"It is {end}1", row["answer"], extract="last_number") == 0


# json


@pytest.mark.parametrize("completion, value", [
    ('{"digit": 3, "colour": "red"}', 1), ('Here: {"colour": "red",\n "digit": 3.0}.', 1),
    ('{"digit": 3}', 0.5), ('{"digit": 3, "colour": "blue"}', 0.5), ('{"digit": true}', 0),
    ('{"digit": 3, "colour": "red", "size": 1, "place": 2}', 0.5), ("3, red", 0), ("}{", 0),
    ('{"digit": 3, "colour": "red"', 0), ("[1]", 0), ('{"digit": NaN}', 0), ("{" * 9999 + "}", 0),
])  # fmt: skip
def test_json_is_the_share_of_entries_that_are_right(completion, value):
    assert judged("json", completion, answer={"digit": 3, "colour": "red"}) == value
    assert judged("json", completion, answer='{"digit": 3, "colour": "red"}') == value


def test_json_compares_what_is_nested_and_wants_an_object():
    assert judged("json", '{"a": [1, {"b": 2}]}', answer={"a": [1, {"b": 2}]}) == 1
    assert judged("json", '{"a": [1, {"b": true}]}', answer={"a": [1, {"b": 1}]}) == 0
    for answer in ("3", {}, None):
        with pytest.raises(Ar2DiffError, match="column answer is no JSON object with entries"):
            judged("json", "{}", answer=answer)


# countdown


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("3 * 8 + 0 * 5", 0.0),  # a number of its own
        ("(8 - 5) * 8", 0.0),  # one twice, one not at all
        ("3 * (8 - 5)", 0.1),
        ("5 * 3 + 8", 0.1),
        ("8 * (5 - 3) + 0", 0.0),
        ("8 * (5 - 3)", 1.0),
        ("8*(5-3) = 16", 1.0),
        ("8 * (5 - 3).", 1.0),
        ("8 × (5 − 3)", 1.0),
        ("(5 - 3) ÷ 8", 0.1),
        ("<answer>8 * (5 - 3)</answer>", 1.0),
        ("<answer>1</answer> no <answer> 8 * (5 - 3) </answer> yes", 1.0),
        ("<answer>8 * (5 - 3)</answer> no <answer>1</answer>", 0.0),
        ("8 * (5 - 3) no\n<answer>5 - 3 + 8", 0.1),
        ("5 - 3 = 2\n2 * 8 = 16\n8 * (5 - 3) = 16\n", 1.0),
        ("8 * (5 - 3) = 16\n16", 0.0),  # only the last line counts
        ("The answer is 8 * (5 - 3)", 0.0),
        ("16", 0.0),  # the target is no answer
        ("16 = 16", 0.0),
        ("16 = 8 * (5 - 3)", 0.0),
        ("5 - 3", 0.0),  # 8 is not used
        ("-(3 - 5) * 8", 1.0),
        ("8 / (5 - 5) + 3", 0.0),
        ("5 ** 3 ** 8", 0.0),
        ("8 // 5 * 3", 0.0),
        ("8 % 5 % 3", 0.0),
        ("8 * (5 - 3) # 1", 0.0),
        ("8 * (5 - 3), 16", 0.0),
        ("8(5 - 3)", 0.0),
        ("8 5 3", 0.0),
        ("835", 0.0),
        ("8_ * (5 - 3)", 0.0),
        ("8.0 * (5 - 3)", 0.0),
        ("0x8 * (5 - 3)", 0.0),
        ("08 * (5 - 3)", 0.0),
        ("８ * (5 - 3)", 0.0),
        ("__import__('os').getpid()", 0.0),
        ("(" * 300 + "8" + ")" * 300, 0.0),
        ("-" * 450 + "8*(5-3)", 1.0),
        ("-" * 1500 + "8*(5-3)", 0.0),  # too deep to be worked out
        ("", 0.0),
        ("=", 0.0),
    ],
)
def test_countdown(completion, value):
    assert judged("countdown", completion, numbers=[3, 5, 8], target=16) == value


def test_countdown_counts_exactly_and_reads_columns_of_text():
    assert countdown("1 / 3 * 9", [1, 3, 9], 3) == 1  # 3.0000000000000004 is not meant
    assert countdown("9 / 3 / 2", [9, 3, 2], 1.5) == 1
    assert countdown("4 + 4 * 2", [4, 4, 2], "12") == 1
    assert countdown("4 * 2", [4, 4, 2], 8) == 0
    assert countdown("1 / (2 - 2)", [1, 2, 2], 1) == 0.1
    assert countdown("8 * (5 - 3)", "3,5,8", "16") == 1
    assert countdown("1_000 + 1", [1000, 1], 1001) == 0
    assert countdown("1000 + 1", [1000, 1], 1001) == 1


def test_countdown_is_quick_on_much_text():
    began = time.process_time()
    for text in ("(", "1+", "<answer>", "<answer", "9", "-", "1\n", " ", "*"):
        assert countdown(text * (HUGE // len(text)), [1, 2], 3) == 0
    assert time.process_time() - began < 2


def test_countdown_on_real_rows(rows):
    for row in rows("rl-countdown/cd3_test") + rows("rl-countdown/cd4_test"):
        numbers, target, solution = row["numbers"], row["target"], row["solution"]
        assert countdown(solution, numbers, target) == 1
        assert countdown(f"<answer>{solution} = {target}</answer>", numbers, target) == 1
        assert countdown(solution, numbers, target + 1) == 0.1
        assert countdown(solution, [*numbers, 1], target) == 0
        assert countdown(str(target), numbers, target) == 0
    for row in rows("rl-countdown/d1_cd3_test"):
        assert countdown(" + ".join(map(str, row["numbers"])), **row) in (0.1, 1)


# sudoku


PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"  # 8 empty cells


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (SOLUTION, 8),
        ("3142\n2431\n4213\n1324", 8),
        ("3 1 | 4 2\n2 4 | 3 1\n----+----\n4 2 | 1 3\n1 3 | 2 4", 8),
        ("[[3, 1, 4, 2], [2, 4, 3, 1], [4, 2, 1, 3], [1, 3, 2, 4]]", 8),
        (f"First 1234. <answer>\n{SOLUTION}\n</answer> 99", 8),
        (f"It is {SOLUTION}. Is it? I found 8 cells.", 8),
        (f"{PUZZLE} becomes {SOLUTION}", 8),
        (f"{SOLUTION} becomes {PUZZLE}", 0),
        (PUZZLE, 0),
        ("3142243142131325", 7),
        ("314224314213", 6),  # cut short
        (SOLUTION + "1", 8),
        ("1" + SOLUTION, 0),  # moved by one
        ("1" * 16, 2),
        ("", 0),
        ("1234" * (HUGE // 4), 3),
        ("٣" * 16, 0),
    ],
)
def test_sudoku(completion, right):
    assert judged("sudoku", completion, puzzle=PUZZLE, solution=SOLUTION) == right / 8


def test_sudoku_reads_grids_of_other_shapes():
    lists = [[int(cell) for cell in PUZZLE[i : i + 4]] for i in range(0, 16, 4)]
    assert sudoku(SOLUTION, lists, SOLUTION) == 1
    assert sudoku(SOLUTION, PUZZLE.replace("0", "."), SOLUTION) == 1
    assert sudoku(SOLUTION, "31_2\n2___\n_21_\n_32_", SOLUTION) == 1
    call = functools.partial(judged, "sudoku", SOLUTION, solution=SOLUTION)
    fails(lambda: call(puzzle=SOLUTION), "sudoku", "(0 of them empty)", "row 0")
    fails(lambda: call(puzzle=PUZZLE[1:]), "sudoku", "15 cells")


def test_sudoku_on_real_rows(rows):
    for row in rows("rl-sudoku4/test") + rows("rl-sudoku4/d1_test"):
        puzzle, solution = row["puzzle"], row["solution"]
        assert sudoku(f"<answer>{solution}</answer>", puzzle, solution) == 1
        assert sudoku(puzzle, puzzle, solution) == 0
        first = puzzle.index("0")
        almost = f"{solution[:first]}9{solution[first + 1 :]}"
        assert sudoku(almost, puzzle, solution) == pytest.approx(1 - 1 / row["holes"])


# regex, words, length, demo, math


@pytest.mark.parametrize(
    ("pattern", "completion", "value"),
    [
        (r"\d+", " 12\n", 1),
        (r"\d+", "12 a", 0),
        (r"\d+", "", 0),
        (r"a|b", "ab", 0),
        (r"(?s)<think>.*</think>.*", "<think>a\nb</think> c", 1),
        (r"<think>.*</think>.*", "<think>a\nb</think> c", 0),
    ],
)
def test_regex(pattern, completion, value):
    assert judged("regex", completion, {"pattern": pattern}) == value


def test_a_completion_that_backtracks_is_worth_0_and_the_others_what_they_are(capfd):
    """C code looks for no signal: only the end of its process ends it."""
    reward = reward_of("regex", pattern="(a+)+b", time_limit=0.3)
    call = {"prompts": list("pqrs"), "completions": ["ab", "a" * 60, "aab", "b"]}
    assert reward(**call) == [1, 0, 1, 0]
    assert reward(**call) == [1, 0, 1, 0]
    said = capfd.readouterr().err
    assert said.count("reward regex took longer than 0.3 seconds and was stopped") == 1


def test_a_confined_reward_writes_no_file_and_takes_no_memory_without_end(tmp_path):
    def tries(completion):
        if completion == "write":
            (tmp_path / "file").write_text("a")
        return len(bytearray(1 << 34))

    worker = Worker(lambda completion: tries(completion), confine)
    assert worker.call(20, {"completion": "write"}).kind == "OSError"
    assert worker.call(20, {"completion": "take"}).kind == "MemoryError"
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").read_text()


@pytest.mark.parametrize(
    ("wanted", "completion", "value"),
    [
        (["cat", "dog"], "A cat and a dog.", 1),
        (["cat", "dog"], "A CAT, no more", 0.5),
        (["cat", "dog"], "categories of dogma and a hotdog", 0),
        (["cat"], "a cat_flap, cat2", 0),
        (["cat"], "(cat)", 1),
        (["cat", "Cat"], "cat", 1),
        (["straße"], "STRASSE", 1),
        (["ice cream"], "ice cream", 1),
        (["c++"], "c++ code", 1),
        (["a.c"], "abc", 0),
        ("pond, thirsty and drank", "pond drank", 2 / 3),
        ("sand", "sand", 1),  # there is no and in sand
        ("pond", "", 0),
    ],
)
def test_words(wanted, completion, value):
    assert judged("words", completion, words=wanted) == value


def test_words_on_real_rows(rows):
    for row in rows("rl-story-words/test"):
        assert words(row["reference"], row["words"]) == 1
        assert words(row["reference"].upper(), ", ".join(row["words"])) == 1
        assert words("".join(row["words"]) + "x", row["words"]) == 0
    fails(lambda: judged("words", "a", words=[]), "words", "no words", "row 0")


def test_length_falls_to_both_sides():
    values = [length("", list(range(n)), target=4) for n in (0, 1, 3, 4, 5, 6, 8, 9, 1000)]
    assert values == [0, 0.25, 0.75, 1, 0.75, 0.5, 0, 0, 0]
    assert judged("length", "text", {"target": 2}, completion_ids=[5, 2]) == 1


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (" 2 + 3 = 5. The answer is 5.", 1),
        ("The answer is 5. The answer is 6.", 0),
        ("The answer is 6. The answer is 5.", 1),
        ("The answer is 5", 0),
        ("The answer is 15.", 0),
        ("5", 0),
        (f"The answer is {'5' * 5000}.", 0),
    ],
)
def test_demo(completion, value):
    assert judged("demo", completion, answer="5") == value


def test_demo_is_the_score_of_the_corpus():
    rng = random.Random(1)
    for level in (1, 2, 3, 4) * 25:
        example = corpus.example(level, rng)
        right = example["answer_work"]
        assert demo(right, example["answer"]) == corpus.score(example, right) == 1
        for number in range(corpus.MAX_NUMBER + 1):
            text = f"The answer is {number}."
            assert demo(text, example["answer"]) == corpus.score(example, text)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify: an extra")
@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"Thus $\frac{2}{4}$.", r"\frac{1}{2}", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{2}", r"\frac{1}{2}", 0),
        (r"\boxed{1}", r"\frac{1}{2}", 0),
        ("The answer is 18.", "9 * 2 = 18\n#### 18", 1),
        ("no idea", "18", 0),
        (r"$x^2+2x+1$", r"$(x+1)^2$", 1),
    ],
)
def test_math(completion, answer, value):
    assert judged("math", completion, answer=answer) == value


def test_math_is_an_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(lambda: reward_of("math"), "math-verify", "pip install 'ar2diff[math]'")


def test_math_that_takes_for_ever_is_wrong_and_the_others_are_judged(monkeypatch):
    from ar2diff.rewards import builtin

    def verified(library, completion, answer):
        return time.sleep(60) if completion == "slow" else completion == answer

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "math_verify", types.ModuleType("math_verify"))
    monkeypatch.setattr(builtin, "_verified", verified)
    reward = reward_of("math", time_limit=0.3)
    call = {"prompts": ["p"] * 3, "completions": ["1", "slow", "1"], "answer": ["1"] * 3}
    assert reward(**call) == [1, 0, 1]


# Ours, as trl calls them


def test_columns_go_by_row_and_messages_are_read():
    reward = reward_of("exact")
    turns = [{"role": "assistant", "content": "7"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "8"}]}]
    tools = [*turns, {"role": "tool", "content": "x"}]
    values = reward(
        prompts=[[{"role": "user", "content": "?"}]] * 4,
        completions=[turns, parts, tools, turns],
        answer=["7", "8", "7", "8"],
        completion_ids=[[1]] * 4,
        trainer_state=None,
        log_extra=None,
        log_metric=None,
    )
    assert values == [1, 1, 1, 0]


def test_names_are_unique_and_graders_documented():
    entries = [Reward(name="regex", args={"pattern": p}) for p in "abc"]
    made = make_rewards([*entries, Reward(name="exact"), Reward(name="demo")])
    assert [reward.__name__ for reward in made] == ["regex", "regex_2", "regex_3", "exact", "demo"]
    assert [reward(prompts=[""], completions=["b"]) for reward in made[:3]] == [[0], [1], [0]]
    for name, grade in GRADERS.items():
        assert grade.__doc__ and name == grade.__name__


@pytest.mark.parametrize(
    ("name", "args", "parts"),
    [
        (
            "exact",
            {"extrakt": "whole"},
            ["exact has no argument 'extrakt'", "did you mean extract?"],
        ),
        ("exact", {"extract": "wholly"}, ["args.extract", "'whole'"]),
        ("demo", {"x": 1}, ["demo has no argument 'x'", "none"]),
        ("regex", {}, ["args.pattern", "required"]),
        ("regex", {"pattern": "("}, ["args.pattern", "regular expression"]),
        ("length", {"target": 0}, ["args.target", "greater than 0"]),
    ],
)
def test_arguments_of_ours_are_checked_at_load(name, args, parts):
    fails(lambda: reward_of(name, **args), *parts)


def test_ours_name_the_row_and_the_column():
    reward = reward_of("countdown")
    call = functools.partial(reward, prompts=["p", "q" * 99], completions=["1", "2"])
    fails(
        lambda: call(numbers=[[1], [2]], answer=["", ""]),
        "countdown reads column 'target'", "it has numbers, answer",
    )  # fmt: skip
    said = fails(lambda: call(numbers=[[1], []], target=[1, 2]), "countdown", "row 1", "no numbers")
    assert "q" * 59 + "…" in said and "q" * 60 not in said


# Finding


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Factory: write_module("name", code) writes name.py into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, code):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        return path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


OWN = """
import functools
def ones(prompts, completions, scale=1, **columns):
    "Ones."
    return [scale] * len(prompts)
async def later(completions, **columns):
    return [len(text) for text in completions]
class Judge:
    def __call__(self, completions, **columns):
        return [2] * len(completions)
    async def wait(self, completions, **columns):
        return [3] * len(completions)
class Later:
    async def __call__(self, completions, **columns):
        return [4] * len(completions)
judge = Judge()
later_object = Later()
part = functools.partial(ones, scale=5)
any = lambda completions, **columns: [6] * len(completions)
number = 3
def bare(prompts, completions): return [0] * len(prompts)
"""


@pytest.mark.parametrize("source", ["own_rewards", "own_rewards.py", "./own_rewards.py"])
def test_functions_of_modules_and_files(write_module, source):
    write_module("own_rewards", OWN)
    call = {"prompts": ["p"], "completions": ["abc"], "completion_ids": [[1]], "answer": ["x"]}
    for name, value in {"ones": 1, "judge": 2, "part": 5, "any": 6}.items():
        reward = reward_of(f"{source}:{name}")
        assert (reward.__name__, reward(**call)) == (name, [value])
    assert reward_of(f"{source}:ones", scale=7)(**call) == [7]
    assert reward_of(f"{source}:ones").__doc__ == "Ones."
    for name, value in {"later": 3, "judge.wait": 3, "later_object": 4}.items():
        reward = reward_of(f"{source}:{name}")
        assert asyncio.iscoroutinefunction(reward) and reward.__name__ == name.split(".")[-1]
        assert asyncio.run(reward(**call)) == [value]
        assert asyncio.run(reward(**call)) == [value]  # by another loop of the caller's


def test_files_in_folders_import_their_neighbours_once(write_module):
    write_module("deep/helper_of_rewards", "VALUE = 4")
    write_module(
        "deep/random", "from helper_of_rewards import VALUE\nfrom dataclasses import dataclass\n"
        "count = []\n@dataclass\nclass Row:\n    a: 'int'\n"
        "def f(completions, **columns):\n    count.append(1)\n    return [len(count)]\n",
    )  # fmt: skip
    call = {"prompts": [""], "completions": [""]}
    one, other = reward_of("deep/random.py:f"), reward_of("./deep/random.py:f")
    assert one.__globals__ is other.__globals__  # of one module
    assert [one(**call), one(**call), other(**call)] == [[1], [2], [1]]  # each in its own process
    assert sys.modules["random"] is random  # a file hides no module


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("countdwn", ["there is no reward 'countdwn'", "did you mean countdown?"]),
        ("zzz", ["there is no reward 'zzz'", "exact, json, countdown", "module:function"]),
        ("", ["there is no reward ''"]),
        (":f", ["there is no reward"]),
        ("own_rewards.py", ["names no function", "write own_rewards.py:FUNCTION"]),
        ("own_rewards:", ["names no function", "write own_rewards:FUNCTION"]),
        ("absent:f", ["no module 'absent'"]),
        ("own_rewards.absent:f", ["no module 'own_rewards.absent'"]),
        ("absent.py:f", ["no file absent.py"]),
        ("own_rewards:onces", ["has no 'onces'", "did you mean ones?"]),
        ("own_rewards.py:judge.zzz", ["has no 'judge.zzz'", "it has wait"]),
        ("own_rewards:number", ["is not a function but of type int"]),
        ("own_rewards:bare", ["does not take **columns"]),
        ("breaks:f", ["cannot be imported: ZeroDivisionError"]),
        ("breaks.py:f", ["cannot be imported: ZeroDivisionError"]),
        ("wants:f", ["cannot be imported", "missing_library"]),
        ("typo.py:f", ["cannot be imported: SyntaxError"]),
        ("model:", ["no model at ''"]),
        ("model:./absent", ["no model at './absent'"]),
        ("model:a/b/c", ["no model at 'a/b/c'"]),
        ("model:empty", ["no model at 'empty'"]),
    ],
)
def test_rewards_that_are_not_there(write_module, tmp_path, name, parts):
    write_module("own_rewards", OWN)
    write_module("breaks", "1 / 0")
    write_module("wants", "import missing_library")
    write_module("typo", "def f(:")
    (tmp_path / "empty").mkdir()
    fails(lambda: reward_of(name), *parts)
    assert not any("breaks" in module or "typo" in module for module in sys.modules)


def test_exits_at_import_are_exits(write_module):
    write_module("leaves", "raise SystemExit(3)")
    for name in ("leaves:f", "leaves.py:f"):
        with pytest.raises(SystemExit):
            reward_of(name)


def test_args_do_not_hide_what_trl_passes(write_module):
    write_module("own_rewards", OWN)
    fails(lambda: reward_of("own_rewards:ones", completions=1), "trl passes completions itself")


def test_reward_models_are_paths(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    entries = [
        Reward(name=f"model:{tmp_path}"),
        Reward(name="model:org/judge"),
        Reward(name="demo"),
    ]
    made = make_rewards(entries)
    assert made[:2] == [str(tmp_path), "org/judge"] and callable(made[2])
    fails(lambda: reward_of("model:org/judge", x=1), "takes no arguments")


# Guarding


@pytest.fixture
def own(write_module):
    """Factory: the reward of a function, through a module that holds it."""

    def make(function, *others, **settings):
        module = types.ModuleType("held_rewards")
        module.f = function
        sys.modules["held_rewards"] = module
        return reward_of("held_rewards:f", *others, **settings)

    return make


def returning(value):
    return lambda **columns: value


BATCH = {"prompts": ["first prompt", "second"], "completions": ["a", "b"]}
NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [[1, 0.5], (1, 0.5), [True, 0.5], np.array([1, 0.5]), torch.tensor([1, 0.5]),
     [np.float32(1), np.float64(0.5)], [torch.tensor(1), torch.tensor(0.5)], [np.bool_(1), 0.5]],
)  # fmt: skip
def test_lists_of_numbers_go_through_as_floats(own, value):
    values = own(returning(value))(**BATCH)
    assert values == [1.0, 0.5] and all(type(value) is float for value in values)


def test_none_leaves_a_row_out(own):
    assert own(returning([None, 1]))(**BATCH) == [None, 1]
    assert own(returning([None, None]), "demo")(**BATCH) == [None, None]  # others judge these
    fails(lambda: own(returning([None, None]))(**BATCH), "f returned None for all rows")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (None, ["a NoneType"]),
        (1.0, ["a float"]),
        ("11", ["a str"]),
        ({"a": 1, "b": 2}, ["a dict"]),
        ((x for x in (1, 2)), ["a generator"]),
        (torch.tensor(1.0), ["a float"]),
        ([1], ["1 values for 2 completions"]),
        ([1, 2, 3], ["3 values for 2"]),
        ([1, "2"], ["'2'", "row 1", "'second'"]),
        ([[1], [2]], ["[1]", "row 0", "'first prompt'"]),
        (torch.ones(2, 1), ["[1.0]", "row 0"]),
        ([1, NAN], ["nan", "row 1"]),
        ([float("inf"), 1], ["inf", "row 0"]),
        ([1, -float("inf")], ["-inf", "row 1"]),
        ([1, np.float32(NAN)], ["nan", "row 1"]),
        ([1, torch.tensor(NAN)], ["nan", "row 1"]),
        ([1, 1e39], ["1e+39", "row 1"]),  # infinite in float32
        ([1, 10**5000], ["an integer of 16610 bits", "row 1"]),
        ([1, 1j], ["1j", "row 1"]),
    ],
)
def test_what_is_no_list_of_finite_numbers(own, value, parts):
    fails(lambda: own(returning(value))(**BATCH), "reward f returned", "finite number", *parts)


def test_exceptions_name_the_reward_and_its_line(own):
    def f(completions, missing, **columns):
        return []

    fails(lambda: own(f)(**BATCH), "reward f raised TypeError", "'missing'", "'first prompt'")

    def g(**columns):
        raise KeyError("some\nlines")

    said = fails(lambda: own(g)(**BATCH), "f raised KeyError", "test_rewards.py, line")
    assert "row" not in said  # which one is not known


def test_an_exit_of_a_reward_is_its_failure(own):
    def f(**columns):
        raise SystemExit(3)

    fails(lambda: own(f)(**BATCH), "reward f raised SystemExit: 3")


def test_a_reward_that_ends_its_process_leaves_the_batch_out(own, capfd):
    def f(completions, **columns):
        if completions[0] == "end":
            os._exit(7)
        return [1, 2]

    reward = own(f)
    ends = {**BATCH, "completions": ["end", "b"]}
    assert [reward(**ends), reward(**BATCH), reward(**ends)] == [[None] * 2, [1, 2], [None] * 2]
    said = capfd.readouterr().err
    assert said.count("warning: reward f exited and was stopped") == 1


def test_an_interrupt_ends_a_call_and_its_process(own):
    reward = own(sleeps)
    # A shell starts background jobs with interrupts ignored, which Python leaves so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reward(**BATCH)
    finally:
        signal.signal(signal.SIGINT, before)


LONG = 30  # seconds that a machine may take; what hangs takes far more


def run(call, in_main):
    if in_main:
        return call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(LONG)
    assert not thread.is_alive()


def sleeps(**columns):
    time.sleep(2 * LONG)


def spins(**columns):
    while True:
        pass


def eats(**columns):
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


def eats_all(**columns):
    try:
        time.sleep(60)
    except:  # noqa: E722
        return [0, 0]


def eats_one(**columns):
    eats_all()
    time.sleep(60)


def backtracks(**columns):
    return [re.fullmatch("(a+)+b", "a" * 60)]


def spawns(folder, **columns):
    process = subprocess.Popen(["sleep", "60"])
    Path(folder, "pid").write_text(str(process.pid))
    process.wait()


def ended(process):
    """Whether a process is no more, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def gone(process):
    """Whether a process has ended; waits a while."""
    until = time.monotonic() + LONG
    while not ended(process) and time.monotonic() < until:
        pass
    return ended(process)


@pytest.mark.parametrize("in_main", [True, False])
@pytest.mark.parametrize("function", [sleeps, spins, eats, eats_all, eats_one, backtracks])
def test_a_call_that_hangs_is_cut_whatever_it_does(own, function, in_main):
    began = time.monotonic()
    reward, out = own(function, time_limit=0.2), []
    run(lambda: out.append(reward(**BATCH)), in_main)
    assert out == [[None, None]] and time.monotonic() - began < LONG


def test_what_a_call_has_started_ends_with_it(own, tmp_path):
    reward = own(spawns, time_limit=1)
    assert reward(**BATCH, folder=str(tmp_path)) == [None, None]
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_reward_that_is_always_stopped_ends_the_run(own):
    reward = own(sleeps, time_limit=0.1)
    assert [reward(**BATCH) for _ in range(2)] == [[None, None]] * 2
    fails(
        lambda: reward(**BATCH), "f took longer than 0.1 seconds and was stopped 3 times in a row",
        "'first prompt'", "time_limit",
    )  # fmt: skip


def test_a_function_keeps_what_it_knows_between_calls(own):
    seen = []

    def f(completions, **columns):
        seen.append(1)
        return [len(seen)] * len(completions)

    reward = own(f)
    assert [reward(**BATCH)[0] for _ in range(100)] == list(range(1, 101)) and not seen


def test_what_a_function_notes_for_the_log_arrives(own):
    def f(completions, log_extra, log_metric, trainer_state, **columns):
        log_extra("length", [len(c) for c in completions])
        log_metric("step", trainer_state.global_step)
        return [0, 1]

    noted = []
    own(f)(
        **BATCH, trainer_state=types.SimpleNamespace(global_step=3),
        log_extra=lambda *args: noted.append(args), log_metric=lambda *args: noted.append(args),
    )  # fmt: skip
    assert noted == [("length", [1, 1]), ("step", 3)]


def test_the_processes_of_a_reward_end_with_it(own):
    reward = own(lambda **columns: [os.getpid(), os.getppid()])
    processes = [int(n) for n in reward(**BATCH)]
    assert all(Path(f"/proc/{n}").exists() for n in processes)
    del reward
    gc.collect()
    assert all(map(gone, processes))


# Async


def called_as_trl_does(reward):
    """In an event loop of another thread, waited for here."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return asyncio.run_coroutine_threadsafe(reward(**BATCH), loop).result(LONG)


def test_async_functions_are_guarded(own):
    async def waits(**columns):
        await asyncio.sleep(60)

    async def blocks(**columns):
        time.sleep(60)

    for function in (waits, blocks):
        assert called_as_trl_does(own(function, time_limit=0.2)) == [None, None]

    async def nan(**columns):
        return [1, NAN]

    fails(lambda: called_as_trl_does(own(nan)), "f returned nan", "row 1")

    async def times_out(**columns):
        raise TimeoutError("the judge is slow")

    fails(lambda: called_as_trl_does(own(times_out)), "f raised TimeoutError: the judge is slow")


def test_async_exits_end_the_run_and_no_loop(own):
    async def leaves(**columns):
        raise SystemExit(3)

    fails(lambda: called_as_trl_does(own(leaves)), "f raised SystemExit: 3")


def test_calls_share_a_loop(own):
    loops = []

    async def f(**columns):
        loops.append(asyncio.get_running_loop())
        return [float(loops[0] is loops[-1]), len(loops)]

    reward = own(f)
    assert [called_as_trl_does(reward) for _ in range(2)] == [[1, 1], [1, 2]]


def test_async_functions_run_side_by_side(own, tmp_path):
    """Each waits for all the others to have begun."""

    async def f(name, **columns):
        (tmp_path / name).touch()
        while len(list(tmp_path.iterdir())) < 3:
            await asyncio.sleep(0.01)
        return [1, 2]

    async def all_of_them():
        return await asyncio.gather(*(r(**BATCH, name=str(n)) for n, r in enumerate(rewards)))

    rewards = [own(f, time_limit=20) for _ in range(3)]
    assert asyncio.run(all_of_them()) == [[1, 2]] * 3


def test_trl_takes_them(own):
    """As `_calculate_rewards` of trl uses them: their names, and which are async."""
    from trl.trainer.utils import get_callable_name, is_async_callable

    async def f(**columns):
        return [1, 2]

    for function, is_async in ((f, True), (returning([1, 2]), False)):
        reward = own(function)
        assert get_callable_name(reward) == "f" and is_async_callable(reward) is is_async
