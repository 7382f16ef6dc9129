"""Gaps: the middle of a held-out text is left out. The diffusion mode fills it; the base writes on
from the left, once greedily, once by ranking several drawn middles by how likely they make what
follows. What is given must be kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch

from ..diffusion.likelihood import ar_nll, scored
from .estimates import ratio, ratio_difference, share, share_difference
from .figures import BASELINE, RANKED
from .journal import Row
from .length import long_rows, stretch_bound
from .quality import continued_nats
from .session import Found, Session, apart, cells_of
from .subjects import STOCK_ARGUMENTS, USUAL, Held
from .writing import Way, Written, batches

QUESTION = "control"
LEFT, GAP, RIGHT = 32, 6, 10  # tokens before, in and after a gap
CANDIDATES = 8  # middles among which the base chooses
BATCH = 16


def ranked(base: Held) -> Way:
    """The base, drawing several middles for each gap."""
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    drawn["num_return_sequences"] = CANDIDATES
    return Way(base, RANKED, STOCK_ARGUMENTS | drawn)


def fillers(session: Session) -> list[Way]:
    """Ways that fill gaps or, in the base, stand in for it."""
    ways = [way for way in session.ways(USUAL, BASELINE) if way.held.key != "control"]
    ways = [way for way in ways if way.held.fills or not way.held.denoises]
    return ways if session.base is None else [*ways, ranked(session.base)]


def _rows(session: Session) -> list[list[int]]:
    """Texts with a gap from `LEFT` to `LEFT + GAP`."""
    length = LEFT + GAP + RIGHT
    rows = long_rows(session, length, session.sizes.infills)
    if len(rows) < 2:
        raise ValueError(f"fewer than 2 texts have {length} tokens")
    return rows


def gaps_of(session: Session, way: Way) -> list[Row]:
    """The middles that a way writes, and what the base says of them and of what follows."""
    torch.manual_seed(session.seed)
    found: list[Row] = []
    for group in batches(_rows(session), BATCH):
        written, middles, kept = _filled(session, way, group)
        left = [row[:LEFT] for row in group]
        new = [[*middle, *row[LEFT + GAP :]] for middle, row in zip(middles, group, strict=True)]
        nats = [0.0] * len(group)
        if session.base is not None:
            nats = continued_nats(session.base, left, new)
        for row, middle, value, keeps in zip(group, middles, nats, kept, strict=True):
            found.append(
                {
                    "subject": way.held.key, "setting": way.setting, "gap": len(found),
                    "exact": middle == row[LEFT : LEFT + GAP], "text": session.decode(middle),
                    "nats": value, "kept": keeps, "tokens": GAP + RIGHT, "forwards": 0, "steps": 0,
                }
            )  # fmt: skip
        found[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return found


def _filled(
    session: Session, way: Way, group: Sequence[list[int]]
) -> tuple[Written, list[list[int]], list[int]]:
    """The middles, and how many of the tokens after the gap are kept. A way that cannot fill gaps
    writes on, and keeps those that it would have written itself."""
    if way.held.denoises:
        mask = way.held.checkpoint.spec.mask_token_id
        asked = [[*row[:LEFT], *[mask] * GAP, *row[LEFT + GAP :]] for row in group]
        written = fill(session, way, asked)
        kept = [
            sum(a == b for a, b in zip(new[LEFT + GAP :], row[LEFT + GAP :], strict=True))
            for new, row in zip(written.prompts, group, strict=True)
        ]
        return written, [new[LEFT : LEFT + GAP] for new in written.prompts], kept
    left = [row[:LEFT] for row in group]
    if way.setting == RANKED:
        written = way.write(left, session.clock, max_new_tokens=GAP, min_new_tokens=GAP)
        return written, _best(session.base, group, written.answers), [RIGHT] * len(group)
    new = GAP + RIGHT
    written = way.write(left, session.clock, max_new_tokens=new, min_new_tokens=new)
    kept = [
        sum(a == b for a, b in zip(answer[GAP:], row[LEFT + GAP :], strict=True))
        for answer, row in zip(written.answers, group, strict=True)
    ]
    return written, [answer[:GAP] for answer in written.answers], kept


def fill(session: Session, way: Way, prompts: Sequence[list[int]]) -> Written:
    """Prompts with their gaps filled, without the warning that a block model does not read all that
    follows a gap: the report says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens after the gap")
        return way.write(prompts, session.clock, max_new_tokens=0)


def _read_after(held: Held) -> int:
    """How many of the tokens after a gap the model reads when it fills it."""
    block = held.checkpoint.spec.block_length or LEFT + GAP + RIGHT
    return min(RIGHT, -(LEFT + GAP) % block)


def _best(
    base: Held, group: Sequence[list[int]], candidates: Sequence[list[int]]
) -> list[list[int]]:
    """Of each row's candidates the one with which the whole text is likeliest."""
    rows = [row for row in group for _ in range(CANDIDATES)]
    left = [row[:LEFT] for row in rows]
    whole = [[*c, *row[LEFT + GAP :]] for c, row in zip(candidates, rows, strict=True)]
    nats = continued_nats(base, left, whole)
    best = []
    for start in range(0, len(rows), CANDIDATES):
        chosen = min(range(start, start + CANDIDATES), key=nats.__getitem__)
        best.append(candidates[chosen])
    return best


def true_middles(session: Session, held: Held) -> list[Row]:
    """Nats of the true middles, given both sides or what precedes them."""
    rows, checkpoint = _rows(session), held.checkpoint
    suppressed = checkpoint.suppressed
    tokens = [int(scored(row, suppressed)[LEFT : LEFT + GAP].sum()) for row in rows]
    found: list[Row] = [
        {"subject": held.key, "middle": n, "scored": t} for n, t in enumerate(tokens)
    ]
    if held.has_ar_mode:
        window = checkpoint.spec_or_causal.local_window
        ends = [
            ar_nll(checkpoint.model, [row[:end] for row in rows], suppressed, window).nats
            for end in (LEFT, LEFT + GAP)
        ]
        found = [
            r | {"ar_nats": v} for r, v in zip(found, (ends[1] - ends[0]).tolist(), strict=True)
        ]
    if held.denoises and not held.free:
        nats = stretch_bound(held, rows, LEFT, LEFT + GAP, session.sizes.draws, session.seed)
        found = [r | {"bound_nats": v} for r, v in zip(found, nats, strict=True)]
    return found


def gap_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    """Add what the filled gaps say."""
    cells = cells_of(rows, "gap")
    base = cells.get(("base", BASELINE))
    for way in fillers(session):
        cell = cells.get((way.held.key, way.setting))
        if cell is None:
            continue
        apart_ = base is not None and way.name != f"base, {BASELINE}"
        limits = {} if way.held.denoises else {"min_new_tokens": GAP}
        evidence = way.evidence(cell, max_new_tokens=0 if way.held.denoises else GAP, **limits)
        if way.held.denoises:
            evidence |= {"given_after": RIGHT, "read_after": _read_after(way.held)}
        add = partial(
            found.add, QUESTION, subject=way.held.key, setting=way.setting, evidence=evidence
        )
        exact = [row["exact"] for row in cell]
        difference = None
        if apart_:
            theirs = [row["exact"] for row in base]
            difference = apart("base", BASELINE, share_difference(exact, theirs))
        add("infill_exact_match", value=share(exact), difference=difference)
        if session.base is not None:
            ours, theirs = (
                ([row["nats"] for row in c], [row["tokens"] for row in c])
                for c in (cell, base or cell)
            )
            difference = apart("base", BASELINE, ratio_difference(ours, theirs)) if apart_ else None
            found.add(
                QUESTION, "infill_base_nll", way.held.key, ratio(*ours), setting=way.setting,
                difference=difference, evidence=evidence | {"estimator": "exact"},
            )  # fmt: skip
        if way.setting != RANKED:
            kept = [n < row["kept"] for row in cell for n in range(RIGHT)]
            value = share(kept)
            if 0 < value.value < 100:  # tokens of a text are not independent
                value = ratio([row["kept"] for row in cell], [RIGHT] * len(cell), scale=100.0)
            add("forced_kept", value=value)


def middle_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    """Add how likely the true middles are."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        if "middle" in row:
            cells.setdefault(row["subject"], []).append(row)
    base = cells.get("base")
    for subject, cell in cells.items():
        wholes = [row["scored"] for row in cell]
        for kind, metric, estimator in (
            ("ar_nats", "infill_ar_nll", "exact"),
            ("bound_nats", "infill_bound", "bound"),
        ):
            if kind not in cell[0]:
                continue
            nats, difference = [row[kind] for row in cell], None
            if base is not None and subject != "base":
                theirs = [row["ar_nats"] for row in base], wholes
                difference = apart("base", None, ratio_difference((nats, wholes), theirs))
            found.add(
                QUESTION, metric, subject, ratio(nats, wholes), difference=difference,
                evidence={"estimator": estimator, "draws": session.sizes.draws},
            )  # fmt: skip
