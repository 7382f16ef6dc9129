"""Rewards that ship with ar2diff: pure functions that each score one completion.

A grader's first parameter is the text of the completion; the parameters after it are columns of the
data, and keyword-only ones are the reward's `args` in the recipe, validated by their annotations. A
column that holds no readable answer raises a ValueError, since every completion would silently be
wrong. A grader that can run forever on some texts is listed in `loading.UNBOUNDED`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, Literal

from pydantic import PositiveInt

from ..config.safe_json import parse_json
from .code import code

# 18  1,000  18.0  .5  -3  $18  -$18; but not parts of 1_000, x2, 1e5, 3.14.15, or the -5 in 10-5
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?![\d_]|\.\d|[eE][+-]?\d)"
NUMBER = re.compile(
    rf"((?<![\w)])-\\?\$?)?(?<![\w.])({_UNSIGNED})(?:/({_UNSIGNED}))?", flags=re.ASCII
)
LONGEST_NUMBER = 40  # characters; Python refuses to parse 5,000 digits
LONGEST_SUM = 500  # characters in an answer to countdown, which has few numbers
SYMBOLS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/"})
OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

Extract = Literal["whole", "first_line", "last_line", "last_number", "boxed"]


def exact(completion: str, answer: Any, *, extract: Extract = "whole") -> float:
    """1 if the answer in the completion equals the column `answer`, else 0.

    If the `answer` contains `####`, as in gsm8k, only what follows it counts. With `last_number`
    and `boxed`, numbers are compared by value: 1,000 equals 1000, and $18.0 equals 18.

    Args:
        extract: which part of the completion is the answer: `whole`, `first_line`, `last_line`
            (without surrounding white space), `last_number`, or `boxed` (the last LaTeX
            `\\boxed{}`).
    """
    wanted = str(answer).rpartition("####")[2]
    if extract == "last_number":
        number = _last_number(wanted)
        if number is None:
            raise ValueError(f"column answer has no number: {wanted.strip()[:60]!r}")
        return float(_last_number(completion) == number)
    if extract == "boxed":
        found, wanted = _boxed(completion), _boxed(wanted) or wanted
        return float(found is not None and _same(found, wanted))
    lines = [completion] if extract == "whole" else completion.strip().splitlines() or [""]
    return float(lines[-1 if extract == "last_line" else 0].strip() == wanted.strip())


def json(completion: str, answer: Any) -> float:
    """The share of the entries of the column `answer`, a JSON object or its text, that the
    completion has too.

    The completion's object is what stands between its first `{` and its last `}`. An entry that
    only it has counts as one that is wrong.
    """
    wanted = _object_of(answer) if isinstance(answer, str) else answer
    if not isinstance(wanted, dict) or not wanted:
        raise ValueError(f"column answer is no JSON object with entries: {str(answer)[:60]!r}")
    found = _object_of(completion)
    right = sum(_equal(found[name], wanted[name]) for name in wanted.keys() & found.keys())
    return right / len(wanted.keys() | found.keys())


def countdown(completion: str, numbers: Any, target: Any) -> float:
    """1 for an expression that uses each number in the column `numbers` once and evaluates to the
    column `target`, 0.1 if it evaluates to another value, else 0.

    The answer is the last line, up to an equals sign, of what follows the last `<answer>`, or else
    of the whole completion. It may use + - * / and brackets. A division by zero counts as another
    value.
    """
    node = _arithmetic(_last_line(_answered(completion)).partition("=")[0])
    if node is None or Counter(_leaves(node)) != Counter(_integers(numbers)):
        return 0.0
    try:
        return 1.0 if _value(node) == Fraction(str(target)) else 0.1
    except ZeroDivisionError:
        return 0.1


def sudoku(completion: str, puzzle: Any, solution: Any) -> float:
    """The share of the empty cells (0 . _) in the column `puzzle` that agree with the column
    `solution`.

    Both columns hold digits in a row, in lines, or in lists. The answer is looked for in what
    follows the last `<answer>`, or else in the whole completion. It is the last run of exactly as
    many digits as the puzzle has cells, with only white space and | , + - [ ] between them; if
    there is none, it is the last run, cut to that size.
    """
    given, right = _cells(puzzle), _cells(solution)
    empty = [i for i, cell in enumerate(given) if cell == "0"]
    if len(given) != len(right) or not empty:
        raise ValueError(
            f"column puzzle has {len(given)} cells ({len(empty)} of them empty), but column "
            f"solution has {len(right)}"
        )
    found = _grid(_answered(completion), len(right)).ljust(len(right), "0")
    return sum(found[i] == right[i] for i in empty) / len(empty)


def regex(completion: str, *, pattern: re.Pattern[str]) -> float:
    """1 if the whole completion, without surrounding white space, matches `pattern`, else 0."""
    return float(pattern.fullmatch(completion.strip()) is not None)


def words(completion: str, words: Any) -> float:
    """The share of the words in the column `words` that the completion contains as whole words, in
    any case.

    The column holds a list, or a text like `pond, thirsty and drank`.
    """
    listed = re.split(r",|;|\n|\band\b|&", words) if isinstance(words, str) else words
    wanted = {word.strip().casefold() for word in listed} - {""}
    if not wanted:
        raise ValueError("column words has no words")
    text = completion.casefold()
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in wanted]
    return sum(map(bool, found)) / len(wanted)


def length(completion: str, completion_ids: list[int], *, target: PositiveInt) -> float:
    """1 if the completion has `target` tokens, falling to 0 for no tokens and for twice as many.

    The end token counts.
    """
    return max(0.0, 1 - abs(len(completion_ids) - target) / target)


def demo(completion: str, answer: Any) -> float:
    """1 if the last `The answer is N.` in the completion matches the column `answer`, else 0.

    This is how the built-in corpus of counting questions is scored.
    """
    found = re.findall(r"The answer is ([0-9]+)\.", completion)
    # compared as text: Python refuses to parse 5,000 digits
    return float(bool(found) and found[-1].lstrip("0") == str(answer).strip().lstrip("0"))


def math(completion: str, answer: Any) -> float:
    """1 if math-verify finds the answer in the completion equal to the column `answer`, else 0.

    The column holds LaTeX or plain text. A comparison that times out scores 0.
    """
    import math_verify  # optional dependency

    return float(_verified(math_verify, completion, answer))


GRADERS: dict[str, Callable[..., float]] = {
    grade.__name__: grade
    for grade in (exact, json, countdown, sudoku, regex, words, length, demo, math, code)
}


def _object_of(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty if there is none."""
    try:
        value = parse_json(text[text.find("{") : text.rfind("}") + 1], constants=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; True is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _last_number(text: str) -> Fraction | None:
    """The last number in a text, or None."""
    found = NUMBER.findall(text.replace("−", "-"))
    if not found:
        return None
    sign, above, below = found[-1]
    if max(len(above), len(below)) > LONGEST_NUMBER:
        return None
    above, below = (Fraction(part.replace(",", "") or 1) for part in (above, below))
    return None if not below else (-above if sign else above) / below


def _same(found: str, wanted: str) -> bool:
    """Whether two texts are equal up to white space, or are equal numbers."""
    found, wanted = ("".join(text.split()) for text in (found, wanted))
    numbers = [
        _last_number(text) if NUMBER.fullmatch(text.replace("$", "").replace("−", "-")) else None
        for text in (found, wanted)
    ]
    return found == wanted or (numbers[0] is not None and numbers[0] == numbers[1])


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}, with braces matched, or None."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[:i]
    return None


def _answered(text: str) -> str:
    """What follows the last <answer>, up to </answer>; the whole text if there is no <answer>."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _arithmetic(text: str) -> ast.expr | None:
    """The syntax tree of an expression of integers with + - * /, or None for anything else."""
    text = text.strip().translate(SYMBOLS).rstrip(". ")
    # Rejects underscores, letters and points: Python would accept 1_000, 0x10, 1e9 and 1.0.
    if len(text) > LONGEST_SUM or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        return None
    known = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.UAdd, ast.USub)
    for node in ast.walk(body):
        if not isinstance(node, known) or (
            isinstance(node, ast.operator)
            and (
                type(node) not in OPERATIONS  # ** might never finish, and // is not allowed
            )
        ):
            return None
    return body


def _leaves(node: ast.expr) -> Iterable[int]:
    return (leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    return Fraction(node.value)


def _integers(numbers: Any) -> list[int]:
    """The integers in a list, or in a text like `3, 4, 5`."""
    found = re.findall(r"[0-9]+", numbers) if isinstance(numbers, str) else numbers
    if not found:
        raise ValueError("column numbers has no numbers")
    return [int(number) for number in found]


def _cells(grid: Any) -> str:
    """The digits in a text or in nested lists, with 0 for an empty cell."""
    if isinstance(grid, (list, tuple)):
        return "".join(map(_cells, grid))
    return re.sub("[^0-9]", "", re.sub("[._]", "0", str(grid)))


def _grid(text: str, size: int) -> str:
    runs = re.findall(r"[0-9](?:[0-9\s|,+\-\[\]]*[0-9])?", text)
    runs = [re.sub("[^0-9]", "", run) for run in runs] or [""]
    whole = [run for run in runs if len(run) == size]
    return (whole or runs)[-1][:size]


def _verified(math_verify: Any, completion: str, answer: Any) -> bool:
    answer = str(answer).rpartition("####")[2].strip()
    if "\\boxed" not in answer and "$" not in answer:
        answer = f"\\boxed{{{answer}}}"  # math-verify finds LaTeX only inside a delimiter
    # The worker is killed if this takes too long; math-verify's own time limits need signals.
    wanted = math_verify.parse(answer, parsing_timeout=None)
    if not wanted:
        raise ValueError(f"math-verify finds no answer in column answer: {answer[:60]!r}")
    found = math_verify.parse(completion, parsing_timeout=None)
    return math_verify.verify(wanted, found, timeout_seconds=None)
