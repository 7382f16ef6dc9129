"""The reward for programs: 1 if the program that a model wrote passes its tests, in a sandbox."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Any

from pydantic import PositiveFloat

from ..core.errors import Ar2DiffError
from .sandbox import Job, judge

FORMS = "test and entry_point (HumanEval), test_list (MBPP), or stdin and expected"
CASES = 200  # inputs of a program
INPUT = 8 << 20  # bytes of all inputs of a program
FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
SECONDS = 10.0  # that a program and its tests may take


def code(
    completion: str,
    prompt: str,
    test: str | None = None,
    entry_point: str | None = None,
    test_list: Sequence[str] | None = None,
    test_setup_code: str | None = None,
    stdin: str | Sequence[str] | None = None,
    expected: str | Sequence[str] | None = None,
    *,
    seconds: PositiveFloat = SECONDS,
) -> float:
    """1 if the Python program in the completion passes its tests, else 0.

    It runs in a sandbox, which needs bubblewrap (Linux only). The last fenced block of the
    completion is the program, or else all of it. The columns say how it is tested:

    * `test` and `entry_point`, as in HumanEval: a completion that begins with indentation continues
      the prompt, up to the next line that is not indented; any other, and a fenced block, stands
      for itself. `test` may define `check(candidate)`.
    * `test_list`, as in MBPP: statements that call the functions of the program, after those in
      `test_setup_code` if there is that column.
    * `stdin` and `expected`: one text each, or a list of as many; what the program prints for each
      input has to be what is expected, up to white space at the end of lines.

    Args:
        seconds: how long a program and its tests may take; `time_limit` if that is less.
    """
    if test is not None and entry_point is not None:
        program = _continued(prompt, completion)
        return _passed(Job(program, test, _code(prompt), entry_point), seconds)
    program = _fenced(completion) or completion
    if test_list is not None:
        tests = [test_list] if isinstance(test_list, str) else test_list
        return _passed(Job([program], "\n".join(tests), test_setup_code or ""), seconds)
    if stdin is not None and expected is not None:
        inputs, outputs = _texts(stdin), _texts(expected)
        if len(inputs) != len(outputs) or not 0 < len(inputs) <= CASES:
            raise ValueError(
                f"column stdin has {len(inputs)} texts and expected {len(outputs)}; there must be "
                f"as many, from 1 to {CASES}"
            )
        if sum(map(len, inputs)) > INPUT:
            raise ValueError(f"column stdin has more than {INPUT:,} characters")
        return _passed(Job([program], inputs=inputs, expected=outputs), seconds)
    raise Ar2DiffError(
        f"reward code reads the columns {FORMS}, which the data does not have or leaves empty",
        "rename the columns of the data, remove the row, or choose another reward",
    )


def _passed(job: Job, seconds: float) -> float:
    if not (job.tests.strip() or job.inputs):
        raise ValueError("there are no tests")
    return float(judge(job, seconds).passed)


def _continued(prompt: str, completion: str) -> list[str]:
    """The sources of a program that begins with the prompt, unless the prompt is no code."""
    fenced, given = _fenced(completion), _code(prompt)
    indented = completion.lstrip("\r\n")[:1] in (" ", "\t")
    if fenced is not None or not (given and indented):
        return [given, fenced or completion]
    first, *rest = completion.splitlines(keepends=True) or [""]
    body = [first]
    for line in rest:
        if line.strip() and line[0] not in " \t)]}":
            break
        body.append(line)
    return [prompt + "".join(body)]


def _fenced(completion: str) -> str | None:
    found = FENCE.findall(completion)
    return found[-1] if found else None


def _code(prompt: str) -> str:
    """The prompt if it is Python by itself, as a signature with a docstring is; else nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(prompt)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    return prompt


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(text) for text in value]
