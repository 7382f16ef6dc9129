"""The reward for programs: the forms of tests that it reads, and what programs earn."""

from __future__ import annotations

import gzip
import json

import pytest

from ar2diff.config.rl import Reward
from ar2diff.core.errors import Ar2DiffError
from ar2diff.rewards.loading import make_rewards

pytestmark = pytest.mark.usefixtures("sandboxed")
SIGNATURE = 'import math\n\n\ndef half(n):\n    """Half of n."""\n'
CHECK = "def check(candidate):\n    assert candidate(8) == 4\n    assert candidate(3) == 1.5\n"


@pytest.fixture(scope="module", autouse=True)
def checked():
    """The check of the sandbox costs a second each time, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ar2diff.rewards.loading.check_sandbox", lambda: None)
        yield


@pytest.fixture(scope="module")
def reward(sandboxed):
    """Function: what the reward gives completions, all with the same columns."""
    judge = make_rewards([Reward(name="code", args={"seconds": 20})])[0]

    def given(*completions, prompt="Write a function.", **columns):
        count = len(completions)
        columns = {name: [value] * count for name, value in columns.items()}
        return judge(prompts=[prompt] * count, completions=list(completions), **columns)

    return given


def test_functions_as_in_humaneval(reward):
    values = reward(
        "    return n / 2\n",
        "    return n // 2\n",
        "    return math.fsum([n / 2])\n\nprint(half(2))\nthis is no code\n",  # cut at `print`
        "    return (\n        n / 2\n)\n",
        "Half of it:\n```python\ndef half(n):\n    return math.fsum([n]) / 2\n```\nDone.",
        "```\ndef half(n):\n    return n\n```",
        "import math\n\ndef half(n):\n    return math.fsum([n / 2])\n",
        "return n / 2",
        "",
        prompt=SIGNATURE,
        test=CHECK,
        entry_point="half",
    )
    assert values == [1, 0, 1, 1, 1, 0, 1, 0, 0]


def test_functions_in_answers_of_a_conversation(reward):
    answer = [{"role": "assistant", "content": "```python\ndef half(n): return n / 2\n```"}]
    asked = [{"role": "user", "content": "Halve a number."}]
    assert reward(answer, prompt=asked, test=CHECK, entry_point="half") == [1]


def test_helpers_of_a_prompt_are_those_of_the_data(reward):
    prompt = "def double(n):\n    return 2 * n\n\ndef half(n):\n    'Half.'\n"
    test = "def check(candidate):\n    assert double(candidate(3)) == 3\n"
    cheat = "```\ndef half(n): return 0\ndef double(n): return 3\n```"
    values = reward("    return n / 2\n", cheat, prompt=prompt, test=test, entry_point="half")
    assert values == [1, 0]


PROGRAM = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def swapped(pair): return Pair(pair.b, pair.a)
def sides(pair): return {'a': (pair.a,), 'b': {pair.b}}
def count(n): yield from range(n)
def adder(n): return lambda m: n + m
def fail(): raise ValueError('no')
def same(x): return x
"""
TESTS = [
    "assert swapped(Pair(1, 2)).a == 2",
    "assert sides(pair) == {'a': (3,), 'b': {4}} and sides(pair) != {'a': [3], 'b': {4}}",
    "assert list(count(3)) == [0, 1, 2]",
    "assert adder(2)(3) == 5",
    "try:\n    fail()\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'",
    "for x in (None, True, 10**5000, 1.5, '\\ud800', b'a', 1j, frozenset({(1, 'a')}), math.inf):\n"
    "    assert same(x) == x and type(same(x)) is type(x)",
]


def test_statements_as_in_mbpp(reward):
    setup = "pair = Pair(0, 4)\npair.a = 3"
    assert reward(PROGRAM, "", test_list=TESTS, test_setup_code=setup) == [1, 0]
    assert reward(PROGRAM, test_list=["assert swapped(Pair(1, 2)) == Pair(2, 1)"]) == [0]
    loud = ["import sys; print('a' * 99999); print('a' * 99999, file=sys.stderr)"]
    assert reward(PROGRAM, test_list=[*loud, "assert same(1) == 1"]) == [1]


def test_output_is_compared_line_by_line(reward):
    echo = "import sys\nfor line in sys.stdin:\n    print(int(line) * 2, end=' \\n')"
    values = reward(
        echo,
        f"```python\n{echo}\n```",
        echo.replace("* 2", "* 3"),
        echo + "\n1 / 0",
        echo + "\nraise SystemExit(0)",
        echo + "\nif __name__ != '__main__': 1 / 0",
        "print('2\\n4')",  # right for the first input alone
        "print(6)",
        stdin=["1\n2\n", "3"],
        expected=["2\n4\n\n", "6"],
    )
    assert values == [1, 1, 0, 0, 1, 1, 0, 0]
    assert reward("print(input())", stdin="a", expected="a") == [1]


def test_a_program_without_end_earns_nothing_and_the_others_what_they_earn(capfd):
    judge = make_rewards([Reward(name="code", time_limit=1)])[0]
    tests = [["assert f() == 1"]] * 3
    programs = ["def f(): return 1", "while True: pass", "def f(): return 1"]
    assert judge(prompts=[""] * 3, completions=programs, test_list=tests) == [1, 0, 1]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"test_list": ["assert f( =="]}, ["not valid Python", "at row 0"]),
        ({"test_list": []}, ["there are no tests"]),
        ({"test_list": ["f(lambda: 1)"]}, ["hand the program a value of type function"]),
        (
            {"prompt": "import absent\ndef f():\n    'a'\n", "test": "f()", "entry_point": "f"},
            ["cannot be set up", "absent"],
        ),
        ({"stdin": ["a"], "expected": []}, ["has 1 texts and expected 0"]),
        ({"stdin": "a"}, ["reads the columns test and entry_point (HumanEval), test_list (MBPP)"]),
    ],
)
def test_tests_that_are_at_fault_are_named(reward, columns, parts):
    with pytest.raises(Ar2DiffError) as error:
        reward("def f(x=1): return 1", **columns)
    for part in parts:
        assert part in error.value.what, error.value.what


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_real_tests_pass_the_given_solutions_and_nothing_else(shared_data, every):
    path = shared_data("humaneval/HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")][::every]
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point")}
    columns["prompts"] = [row["prompt"] for row in rows]
    judge = make_rewards([Reward(name="code")])[0]
    right = [row["canonical_solution"] for row in rows]
    assert judge(completions=right, **columns) == [1] * len(rows)
    assert judge(completions=["    return None\n"] * len(rows), **columns) == [0] * len(rows)
