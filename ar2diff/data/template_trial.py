"""Trying a chat template before it is used, in a child process with limits.

A template that comes with a checkpoint is an untrusted program. Its sandbox keeps it from files and
from Python's internals, but not from running forever or writing gigabytes.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..core.errors import Ar2DiffError

SECONDS = 2  # of CPU time for all trials of a template; usual ones need a few milliseconds
PATIENCE = 60  # seconds after which an idle child is given up
MOST_TEXT = 1 << 20  # characters that a template may write about one of the trial conversations
MOST_MEMORY = 1 << 28  # bytes that the trials may take
MOST_TEMPLATE = 1 << 20  # characters of a template
OTHER = "use another template, or remove it from the folder"

_USER, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
# Conversations of all kinds, so that every branch of a usual template runs: (messages, tools).
TRIALS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    ([_USER], None),
    ([_USER, _ANSWER], None),
    ([{"role": "system", "content": "s"}, _USER, _ANSWER, _USER], None),
    ([_USER, _ANSWER] * 50, None),
    (
        [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "f", "content": "1"},
            _ANSWER,
        ],
        [_TOOL],
    ),
)


def templates_of(tokenizer: Any) -> list[str]:
    """The chat templates of a tokenizer, which may have none, one, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    found = list(template.values()) if isinstance(template, dict) else [template]
    return [text for text in found if isinstance(text, str)]


def check_cost(template: str, values: dict[str, Any]) -> None:
    """Refuse a template that runs forever or writes far too much: it is compiled, and renders the
    trial conversations, in a child process, which is limited in time and memory. What the template
    raises there does not matter, since few templates take conversations of every kind.

    The trial cannot tell what a template does with other conversations.

    Args:
        values: what the tokenizer gives its template besides the messages (`bos_token`).

    Raises:
        Ar2DiffError: it exceeds a limit.
    """
    reason = _cost(template, tuple(sorted((k, str(v)) for k, v in values.items())))
    if reason is not None:
        raise Ar2DiffError(f"the chat template {reason}", OTHER)


@functools.lru_cache(maxsize=256)
def _cost(template: str, values: tuple[tuple[str, str], ...]) -> str | None:
    if len(template) > MOST_TEMPLATE:
        return f"has {len(template)} characters, more than {MOST_TEMPLATE}"
    return _limited(lambda: _trial(template, dict(values)))


def _trial(template: str, values: dict[str, Any]) -> None:
    """Compile the template, and render every trial conversation. For a child process only.

    Raises:
        MemoryError: a text is too long.
    """
    from jinja2 import nodes

    # jinja computes constants when it compiles, and takes every failure for "not constant".
    nodes.Impossible.__init__ = _not_constant
    compiled = _compiled(template)
    for messages, tools in TRIALS:
        for prompt in (False, True):
            try:
                parts = compiled.generate(
                    messages=messages, tools=tools, add_generation_prompt=prompt, **values
                )
                _drain(parts)
            except MemoryError:
                raise
            except Exception:  # a template raises whatever it likes
                continue


def _not_constant(self: Exception, *args: object) -> None:
    if isinstance(sys.exc_info()[1], MemoryError):
        os._exit(LARGE)


def _drain(parts: Iterator[str]) -> None:
    written = 0
    for part in parts:
        written += len(part)
        if written > MOST_TEXT:
            raise MemoryError


def _compiled(template: str) -> Any:
    # The environment that transformers renders templates in, so that the trial is of the same
    # program: its sandbox, filters and extensions.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _limited(work: Callable[[], None]) -> str | None:
    """What went wrong with work that is done in a child process; None if nothing did, whatever it
    raised but a MemoryError. Where processes cannot be forked, nothing is done."""
    if not hasattr(os, "fork"):
        return None
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _run_limited(work)
    os.close(sender)  # the child's is the only one left: the pipe ends when the child does
    try:
        ended, _, _ = select.select([receiver], [], [], PATIENCE)
        if not ended:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(receiver)
        status = _wait(child)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return f"runs for more than {SECONDS} seconds on a short conversation"
        return "makes Python crash"
    if os.WEXITSTATUS(status) == LARGE:
        return f"writes more than {MOST_TEXT} characters for a short conversation"
    return None


LARGE = 3  # exit status of a child that hit the limit of text or memory


def _run_limited(work: Callable[[], None]) -> None:
    """In the child: it ends here, and runs none of its parent's cleanup."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        _limit_memory(resource)
        work()
    except MemoryError:
        os._exit(LARGE)
    except BaseException:
        os._exit(1)
    finally:
        os._exit(0)


def _limit_memory(resource: Any) -> None:
    try:
        with open("/proc/self/statm") as stream:
            taken = int(stream.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = taken + MOST_MEMORY
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except OSError:  # a system without /proc; the limit of time holds there too
        pass


def _wait(child: int) -> int:
    while True:
        try:
            return os.waitpid(child, 0)[1]
        except InterruptedError:
            time.sleep(0)
