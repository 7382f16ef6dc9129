"""Speed: every way of writing on the same prompts, one after the other, repeat by repeat.

Each repeat runs all ways once, in an order that rotates, so that whatever else the machine does
meets all of them. Figures are medians over the repeats, compared with the base repeat by repeat.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from .estimates import Value, middle, percentile, ratio, share
from .figures import BASELINE
from .journal import Part, Row
from .session import Found, Session, apart, only_alone, taken
from .subjects import LOSSLESS_CHAIN
from .writing import Way, Written, batches

QUESTION = "speed"
PROFILED = 24  # tokens of an answer whose memory is measured


def parts(session: Session) -> list[Part]:
    """What is measured: a repeat at a batch size is a part, and so is the memory."""
    sizes, warm = session.sizes, set()
    tokens = sizes.timed * sizes.answer * len(session.ways())
    found = [
        Part(
            QUESTION, f"batch {size}, repeat {repeat}", tokens / size**0.7,
            partial(_repeat, session, size, repeat, warm),
        )
        for size in sizes.batches
        for repeat in range(sizes.repeats)
    ]  # fmt: skip
    memory = Part(QUESTION, "memory", tokens / 10, partial(_memory, session))
    return [*found, memory]


def _repeat(session: Session, size: int, repeat: int, warm: set[tuple[str, int]]) -> list[Row]:
    ways = [way for way in session.ways() if not only_alone(way.setting, size)]
    prompts = session.prompts(session.sizes.timed)
    groups = batches(prompts, size)
    rows: list[Row] = []
    for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
        call = partial(_write_all, session, way, groups, (way.name, size) not in warm)
        written = session.attempt(QUESTION, f"batch {size} of {way.name}", call)
        warm.add((way.name, size))
        for number, each in enumerate(written or ()):
            observed = way.setting == LOSSLESS_CHAIN and size == 1 and repeat == 0
            rows.append(
                {
                    "subject": way.held.key, "setting": way.setting, "batch": size,
                    "repeat": repeat, "group": number, "seconds": each.seconds,
                    "first": each.first, **taken(each),
                    "row_tokens": list(map(len, each.answers)), "row_forwards": each.row_forwards,
                    "decided_at": [order[0] for order in each.order] if observed else [],
                }
            )  # fmt: skip
    return rows


def _write_all(
    session: Session, way: Way, groups: Sequence[Sequence[list[int]]], cold: bool
) -> list[Written]:
    """Answers to all groups; a cold way warms up before, and times the forwards it goes by."""
    limit = session.sizes.answer
    if cold:
        way.write(groups[0], session.clock, max_new_tokens=limit)
    return [way.write(group, session.clock, max_new_tokens=limit) for group in groups]


def _memory(session: Session) -> list[Row]:
    """Bytes of the weights and of what is allocated at most while a batch is written."""
    rows = []
    for size in session.sizes.batches:
        group = session.prompts(size)
        for way in session.ways():
            if only_alone(way.setting, size) or len(group) < size:
                continue
            what = f"memory at batch {size} of {way.name}"
            found = session.attempt(QUESTION, what, partial(peak_of, way, group, PROFILED))
            if found is not None:
                row = {"subject": way.held.key, "setting": way.setting, "batch": size}
                rows.append(row | found)
    return rows


def peak_of(way: Way, group: Sequence[list[int]], tokens: int) -> Row:
    """`peak`, the bytes of the weights and of everything that torch holds beside them at most,
    while answers of some tokens are written; and what that took."""
    model = way.held.checkpoint.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        written = way.write(group, max_new_tokens=tokens)
        more = torch.cuda.max_memory_allocated(model.device) - before
    else:
        cpu = torch.profiler.ProfilerActivity.CPU
        profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
        with _without_stderr():
            profile.start()
        written = way.write(group, max_new_tokens=tokens)
        with _without_stderr():
            profile.stop()
        held = more = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                more = max(more, held)
    return {"peak": weights + more, "limit": tokens, **taken(written)}


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep off the screen what the profiler says when it starts and stops, which it writes past
    Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def figures(session: Session, rows: Sequence[Row]) -> Found:
    """The figures that the rows give."""
    found = Found()
    timed = [row for row in rows if "repeat" in row]
    cells: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in timed:
        cells[row["subject"], row["setting"], row["batch"]].append(row)
    for (subject, setting, size), cell in cells.items():
        way = next((w for w in session.ways(setting) if w.held.key == subject), None)
        if way is not None and len(_repeats(cell)) > 1:
            base = cells.get(("base", BASELINE, size), [])
            _figures_of(found, way, size, cell, base, session.sizes.answer)
    for row in rows:
        if "peak" in row:
            way = next(w for w in session.ways(row["setting"]) if w.held.key == row["subject"])
            found.add(
                QUESTION, "peak_bytes", row["subject"], Value(row["peak"], None, 1),
                setting=row["setting"], at={"batch": row["batch"]},
                evidence=way.evidence([row], max_new_tokens=row["limit"]),
            )  # fmt: skip
    return found


def _figures_of(
    found: Found, way: Way, size: int, cell: list[Row], base: list[Row], answer: int
) -> None:
    """The figures of a way at a batch size."""
    evidence = way.evidence(cell, max_new_tokens=answer)

    def add(metric: str, value: Value, **more: Any) -> None:
        at = {"batch": size} | more.pop("at", {})
        found.add(
            QUESTION, metric, way.held.key, value, setting=way.setting, at=at,
            evidence=evidence, **more,
        )  # fmt: skip

    speeds, theirs = _repeats(cell), _repeats(base)
    both = sorted(speeds.keys() & theirs.keys())
    faster = None
    if len(both) > 1 and way.name != f"base, {BASELINE}":
        quotient = middle([speeds[repeat] / theirs[repeat] for repeat in both])
        faster = apart("base", BASELINE, quotient, ratio=True)
    add("tokens_per_second", middle(list(speeds.values())), difference=faster)
    per_row = [
        (tokens, forwards)
        for row in cell
        if row["repeat"] == cell[0]["repeat"]
        for tokens, forwards in zip(row["row_tokens"], row["row_forwards"], strict=True)
    ]
    if len(per_row) > 1:
        add("tokens_per_forward", ratio(*zip(*per_row, strict=True)))
    once = [row for row in cell if row["repeat"] == cell[0]["repeat"]]
    if len(once) > 1:
        read = [max(1, row["rows"]) for row in once]
        add("p_cache", ratio([row["tokens"] for row in once], read))
    if size == 1 and len(once) > 1:
        _latency(add, cell)
    if any(row["decided_at"] for row in once):
        drafts = way.arguments["draft_length"]
        for slot, value in enumerate(_acceptance(once, drafts), 1):
            add("acceptance", value, at={"slot": slot})


def _repeats(cell: Sequence[Row]) -> dict[int, float]:
    """{repeat: tokens per second}."""
    found = {}
    ordered = sorted(cell, key=lambda row: row["repeat"])
    for repeat, group in groupby(ordered, key=lambda row: row["repeat"]):
        rows = list(group)
        found[repeat] = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    return found


def _latency(add: Any, cell: Sequence[Row]) -> None:
    """Seconds that a reader waits for the first text and, over the whole answer, for a token."""
    first, token = defaultdict(list), defaultdict(list)
    for row in cell:
        if row["first"] is not None:
            first[row["group"]].append(row["first"])
            token[row["group"]].append(row["seconds"] / row["tokens"])
    if len(first) < 2:
        return
    add("seconds_to_first_text", percentile(list(first.values()), 0.5))
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        add(f"seconds_per_token_{name}", percentile(list(token.values()), q))


def _acceptance(rows: Sequence[Row], drafts: int) -> list[Value]:
    """For each slot, the share of forwards whose drafts up to it were all right. The first forward
    of an answer has no drafts; its last one shows only those before the end."""
    texts = [steps for row in rows for steps in row["decided_at"] if steps]
    values = []
    for slot in range(1, drafts + 1):
        hits, tries = [], []
        for steps in texts:
            sizes = [len(list(group)) for _, group in groupby(steps)][1:]
            known = [size > slot for size in sizes[:-1]]
            known += [True] if sizes and sizes[-1] > slot else []
            hits.append(sum(known))
            tries.append(len(known))
        if sum(map(bool, tries)) > 1:
            value = ratio(hits, tries, scale=100.0)
            if not value.error:  # all right, or all wrong
                known = [n < sum(hits) for n in range(sum(tries))]
                value = replace(value, error=share(known).error)
            values.append(value)
    return values
