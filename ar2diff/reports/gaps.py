"""Gaps: the middle of a held-out text is left out. The diffusion mode fills it; the base writes on
from the left, once greedily, once by ranking several drawn middles by how likely they make what
follows. What is given must be kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from ..diffusion.likelihood import ar_nll, scored
from .estimates import mean, ratio, ratio_difference, share, share_difference
from .figures import BASELINE, RANKED
from .journal import Row
from .length import long_rows, stretch_bound
from .quality import continued_nats
from .questions import Question
from .session import Found, Session, apart, cells_of
from .subjects import STOCK_ARGUMENTS, USUAL, Held
from .writing import Way, Written, batches

QUESTION = "control"
LEFT, GAP, RIGHT = 32, 6, 10  # tokens before, in and after a gap
SHORTEST = 3  # tokens of an answer that gets a gap
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


@dataclass(frozen=True)
class Hole:
    """A text, `row`, with a gap from its token `start` to `end`."""

    row: list[int]
    start: int
    end: int

    @property
    def left(self) -> list[int]:
        """What precedes the gap."""
        return self.row[: self.start]

    @property
    def true(self) -> list[int]:
        """What was there."""
        return self.row[self.start : self.end]

    @property
    def right(self) -> list[int]:
        """What follows."""
        return self.row[self.end :]

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens in the gap and behind it."""
        return self.end - self.start, len(self.row) - self.end


def _holes(session: Session) -> list[Hole]:
    """Texts with gaps in their middle; or right answers about images, those together whose gaps are
    alike."""
    if session.sees:
        found = [hole for q in session.material.questions if (hole := _in_answer(q))]
        found = sorted(found[: session.sizes.infills], key=lambda hole: hole.shape)
        if len(found) < 2:
            raise ValueError(f"fewer than 2 answers have {SHORTEST} tokens")
        return found
    length = LEFT + GAP + RIGHT
    rows = long_rows(session, length, session.sizes.infills)
    if len(rows) < 2:
        raise ValueError(f"fewer than 2 texts have {length} tokens")
    return [Hole(row, LEFT, LEFT + GAP) for row in rows]


def _in_answer(question: Question) -> Hole | None:
    """A right answer without a third of its tokens, at most `GAP`, from its middle, and without its
    end, which an answer that goes on would not have; None if it is too short."""
    reply = question.reply[:-1]
    size = min(GAP, len(reply) // 3)
    start = len(question.ids) + (len(reply) - size) // 2
    if len(reply) < SHORTEST:
        return None
    return Hole([*question.ids, *reply], start, start + size)


def _groups(holes: Sequence[Hole]) -> list[Sequence[Hole]]:
    """Neighbours of one shape, which are filled together."""
    alike = (list(group) for _, group in groupby(holes, key=lambda hole: hole.shape))
    return [some for group in alike for some in batches(group, BATCH)]


def gaps_of(session: Session, way: Way) -> list[Row]:
    """The middles that a way writes, and what the base says of them and of what follows."""
    torch.manual_seed(session.seed)
    found: list[Row] = []
    for group in _groups(_holes(session)):
        written, middles, kept = _filled(session, way, group)
        left = [hole.left for hole in group]
        new = [[*middle, *hole.right] for middle, hole in zip(middles, group, strict=True)]
        nats = [0.0] * len(group)
        if session.base is not None:
            nats = continued_nats(session.base, left, new)
        for hole, middle, value, keeps in zip(group, middles, nats, kept, strict=True):
            found.append(
                {
                    "subject": way.held.key, "setting": way.setting, "gap": len(found),
                    "exact": middle == hole.true, "text": session.decode(middle),
                    "nats": value, "kept": keeps, "tokens": sum(hole.shape), "forwards": 0,
                    "steps": 0, "after": hole.shape[1], "read_after": _read_after(way.held, hole),
                }
            )  # fmt: skip
        found[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return found


def _filled(
    session: Session, way: Way, group: Sequence[Hole]
) -> tuple[Written, list[list[int]], list[int]]:
    """The middles of holes of one shape, and how many of the tokens after the gap are kept. A way
    that cannot fill gaps writes on, and keeps those that it would have written itself."""
    gap, right = group[0].shape
    if way.held.denoises:
        mask = way.held.checkpoint.spec.mask_token_id
        asked = [[*hole.left, *[mask] * gap, *hole.right] for hole in group]
        written = fill(session, way, asked)
        pairs = list(zip(written.prompts, group, strict=True))
        kept = [_same(new[hole.end :], hole.right) for new, hole in pairs]
        return written, [new[hole.start : hole.end] for new, hole in pairs], kept
    left = [hole.left for hole in group]
    if way.setting == RANKED:
        written = way.write(left, session.clock, max_new_tokens=gap, min_new_tokens=gap)
        return written, _best(session.base, group, written.answers), [right] * len(group)
    new = gap + right
    written = way.write(left, session.clock, max_new_tokens=new, min_new_tokens=new)
    pairs = list(zip(written.answers, group, strict=True))
    kept = [_same(answer[gap:], hole.right) for answer, hole in pairs]
    return written, [answer[:gap] for answer in written.answers], kept


def _same(new: Sequence[int], old: Sequence[int]) -> int:
    """How many tokens are the same."""
    return sum(a == b for a, b in zip(new, old, strict=True))


def fill(session: Session, way: Way, prompts: Sequence[list[int]]) -> Written:
    """Prompts with their gaps filled, without the warning that a block model does not read all that
    follows a gap: the report says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens after the gap")
        return way.write(prompts, session.clock, max_new_tokens=0)


def _read_after(held: Held, hole: Hole) -> int:
    """How many of the tokens after a gap the model reads when it fills it."""
    if not held.denoises:
        return 0
    block = held.checkpoint.spec.block_length or len(hole.row)
    return min(hole.shape[1], -hole.end % block)


def _best(base: Held, group: Sequence[Hole], candidates: Sequence[list[int]]) -> list[list[int]]:
    """Of each row's candidates the one with which the whole text is likeliest."""
    holes = [hole for hole in group for _ in range(CANDIDATES)]
    left = [hole.left for hole in holes]
    whole = [[*c, *hole.right] for c, hole in zip(candidates, holes, strict=True)]
    nats = continued_nats(base, left, whole)
    best = []
    for start in range(0, len(holes), CANDIDATES):
        chosen = min(range(start, start + CANDIDATES), key=nats.__getitem__)
        best.append(candidates[chosen])
    return best


def true_middles(session: Session, held: Held) -> list[Row]:
    """Nats of the true middles, given both sides or what precedes them."""
    rows, checkpoint = [hole.row for hole in _holes(session)], held.checkpoint
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
            for name, field in (("given_after", "after"), ("read_after", "read_after")):
                evidence[name] = mean([row[field] for row in cell]).value
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
            after = [row["after"] for row in cell]
            value = share([n < row["kept"] for row in cell for n in range(row["after"])])
            if 0 < value.value < 100:  # tokens of a text are not independent
                value = ratio([row["kept"] for row in cell], after, scale=100.0)
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
