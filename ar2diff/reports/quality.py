"""Quality: likelihood of held-out text, right answers at every setting, and free text.

Everything is measured on the same texts and questions for all subjects, so that differences to the
base are those of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import log
from typing import Any

import torch

from ..diffusion.likelihood import ar_nll, bound, scored
from .estimates import mean, ratio, ratio_difference, share, share_difference
from .figures import AR, BASELINE, TOKEN_BY_TOKEN, Difference, Text
from .journal import Part, Row
from .seen import WRONG, answers_scored, seen_figures
from .session import Found, Session, apart, cells_of
from .subjects import Held
from .writing import Way, batches

QUESTION = "quality"
SCORED = 128  # tokens of a text that are scored
BATCH = 16  # answers that are written together
SHOWN = 3  # prompts whose answers are shown side by side


def parts(session: Session) -> list[Part]:
    """What is measured: the likelihood of each subject, its answers at each setting, and its texts
    at each temperature."""
    sizes, found = session.sizes, []
    for held in session.subjects.values():
        cost = sizes.texts * (sizes.draws if held.denoises else 1)
        score = partial(answers_scored if session.sees else _likelihood, session, held)
        found.append(Part(QUESTION, f"likelihood, {held.key}", cost, score))
    tokens = sizes.questions * sizes.answer / BATCH**0.5
    for way in session.ways():
        if session.material.questions and not _single(way):
            run = partial(_answers, session, way)
            found.append(Part(QUESTION, f"questions, {way.name}", tokens, run))
    tokens = sizes.texts * sizes.answer / BATCH**0.7
    drawn = {way.name for way in (*session.main_ways(), *session.ways(TOKEN_BY_TOKEN))}
    for way in session.ways() if session.base else ():
        if _single(way):
            continue
        for temperature in (0.0, *(sizes.temperatures if way.name in drawn else ())):
            run = partial(_texts, session, way, temperature)
            name = f"texts at temperature {temperature}, {way.name}"
            found.append(Part(QUESTION, name, tokens, run))
    return found


def _single(way: Way) -> bool:
    """Whether a way writes what another one does, and one prompt at a time."""
    return way.stock and way.setting != BASELINE


# Likelihood


def _likelihood(session: Session, held: Held) -> list[Row]:
    """Nats of each text in every mode that the subject has."""
    checkpoint = held.checkpoint
    spec, model = checkpoint.spec, checkpoint.model
    suppressed = checkpoint.suppressed
    rows = [ids[:SCORED] for ids in session.encode(session.material.texts[: session.sizes.texts])]
    tokens = [int(scored(row, suppressed).sum()) for row in rows]
    sizes = [len(session.decode(row[1:]).encode()) for row in rows]
    found: list[Row] = [
        {"subject": held.key, "text": n, "score_tokens": count, "bytes": size}
        for n, (count, size) in enumerate(zip(tokens, sizes, strict=True))
    ]
    if held.has_ar_mode:
        window = spec.local_window if spec else "kept"
        nats = ar_nll(model, rows, suppressed, window).nats.tolist()
        found = [row | {"ar_nats": value} for row, value in zip(found, nats, strict=True)]
    if held.denoises:
        made = bound(model, spec, rows, suppressed, session.sizes.draws, session.seed)
        found = [
            row | {"bound_nats": value, "draw_variance": spread}
            for row, value, spread in zip(
                found, made.nats.tolist(), made.variance.tolist(), strict=True
            )
        ]
    return found


def _likelihood_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    mine: dict[str, list[Row]] = {}
    for row in rows:
        if "score_tokens" in row:
            mine.setdefault(row["subject"], []).append(row)
    base = mine.get("base")
    for subject, scores in mine.items():
        for kind, metric, bits in (
            ("ar_nats", "ar_nll", "bits_per_byte"),
            ("bound_nats", "bound", "bound_bits_per_byte"),
        ):
            if kind not in scores[0]:
                continue
            evidence: dict[str, Any] = {"estimator": "exact", "texts": len(scores)}
            if kind == "bound_nats":
                spread = sum(row["draw_variance"] for row in scores) ** 0.5
                evidence |= {
                    "estimator": "bound", "draws": session.sizes.draws, "seed": session.seed,
                    "error_of_draws": spread / sum(row["score_tokens"] for row in scores),
                }  # fmt: skip
            for name, size, unit in ((metric, "score_tokens", 1.0), (bits, "bytes", log(2))):
                nats, wholes = [row[kind] for row in scores], [row[size] * unit for row in scores]
                difference = None
                if base is not None and subject != "base":
                    theirs = [row["ar_nats"] for row in base]
                    difference = apart(
                        "base", None, ratio_difference((nats, wholes), (theirs, wholes))
                    )
                found.add(
                    QUESTION, name, subject, ratio(nats, wholes), difference=difference,
                    evidence=evidence,
                )  # fmt: skip


# Questions


def _answers(session: Session, way: Way) -> list[Row]:
    """Answers to all questions, and whether they are right."""
    questions = session.material.questions[: session.sizes.questions]
    rows: list[Row] = []
    prompts = session.asked(questions)
    for group in batches(prompts, BATCH):
        written = way.write(group, session.clock, max_new_tokens=session.sizes.answer)
        for answer, forwards in zip(written.answers, written.row_forwards, strict=True):
            text = session.decode(answer)
            number = len(rows)
            rows.append(
                {
                    "subject": way.held.key, "setting": way.setting, "asked": number,
                    "right": questions[number].score(text), "text": text,
                    "forwards": 0, "steps": 0, "tokens": len(answer), "row_forwards": forwards,
                }
            )  # fmt: skip
        rows[-1] |= {"forwards": written.forwards, "steps": written.longest}  # of the batch
    return rows


def _question_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    asked = cells_of(rows, "asked")
    right = {key: [row["right"] for row in answers] for key, answers in asked.items()}
    graded = not session.sees or any(map(any, right.values()))
    if not graded and right:
        session.miss(QUESTION, "exact match", WRONG)
    base = ("base", BASELINE)
    for way in session.ways():
        key = (way.held.key, way.setting)
        if key not in asked:
            continue
        evidence = way.evidence(asked[key], max_new_tokens=session.sizes.answer)
        difference = None
        if base in right and key != base:
            difference = apart(*base, share_difference(right[key], right[base]))
        add = partial(found.add, QUESTION, setting=way.setting, evidence=evidence)
        if graded:
            add("exact_match", way.held.key, share(right[key]), difference=difference)
        own = asked.get((way.held.key, AR))
        if own is not None and way.setting != AR:
            same = [a["text"] == b["text"] for a, b in zip(asked[key], own, strict=True)]
            add("same_as_ar", way.held.key, share(same))
        for row in asked[key][: 0 if session.sees else SHOWN]:
            prompt = session.material.questions[row["asked"]].prompt
            found.texts.append(_text(prompt, row))


def _text(prompt: str, row: Row) -> Text:
    return Text(
        question=QUESTION, prompt=prompt, subject=row["subject"], setting=row["setting"],
        text=row["text"],
    )  # fmt: skip


# Free text


def _texts(session: Session, way: Way, temperature: float) -> list[Row]:
    """Continuations of texts, and what the base says of them."""
    prompts, rows = session.opened(session.sizes.texts), []
    sampling = sampled(way, temperature)
    torch.manual_seed(session.seed)  # which transformers draws by
    for group in batches(prompts, BATCH):
        written = way.write(group, session.clock, max_new_tokens=session.sizes.answer, **sampling)
        nats = continued_nats(session.base, group, written.answers)
        for answer, value in zip(written.answers, nats, strict=True):
            rows.append(
                {
                    "subject": way.held.key, "setting": way.setting, "temperature": temperature,
                    "start": len(rows), "nats": value, "text": session.decode(answer),
                    **shape_of(answer), "forwards": 0, "steps": 0, "tokens": len(answer),
                }
            )  # fmt: skip
        rows[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return rows


def sampled(way: Way, temperature: float) -> dict[str, Any]:
    """Arguments that sample at a temperature, and do nothing else to the distribution (the default
    of transformers is to keep 50 tokens); none at 0."""
    if not temperature:
        return {}
    more = {} if way.stock else {"seed": 0}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, **more}


def continued_nats(
    base: Held, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """-log p of each answer after its prompt, under the base."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    return read_by_base(base, whole, list(map(len, prompts))).tolist()


def read_by_base(base: Held, rows: Sequence[list[int]], starts: Sequence[int]) -> torch.Tensor:
    """[R] -log p of each row from its start on, under the base, which sees the same images."""
    model, suppressed = base.checkpoint.model, base.checkpoint.suppressed
    seen = base.seen_in(rows)
    return ar_nll(model, rows, suppressed, "kept", starts=starts, **seen).nats


def shape_of(answer: Sequence[int]) -> Row:
    """How varied a text is: the entropy of its tokens in nats, its different pairs of tokens, and
    its 4-grams that occurred before."""
    counts = Counter(answer).values()
    entropy = -sum(c / len(answer) * log(c / len(answer)) for c in counts)
    pairs, fours = (list(zip(*(answer[k:] for k in range(n)), strict=False)) for n in (2, 4))
    return {
        "entropy": entropy, "pairs": len(pairs), "different": len(set(pairs)),
        "fours": len(fours), "repeated": len(fours) - len(set(fours)),
    }  # fmt: skip


def _text_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        if "temperature" in row:
            key = row["subject"], row["setting"], row["temperature"]
            cells.setdefault(key, []).append(row)
    for (subject, setting, temperature), cell in cells.items():
        way = next(w for w in session.ways(setting) if w.held.key == subject)
        evidence = way.evidence(
            cell, max_new_tokens=session.sizes.answer, **sampled(way, temperature)
        )
        base = None if subject == "base" else cells.get(("base", BASELINE, temperature))
        add = partial(
            found.add, QUESTION, subject=subject, setting=setting,
            at={"temperature": temperature},
        )  # fmt: skip
        value = ratio([row["nats"] for row in cell], [row["tokens"] for row in cell])
        exact = evidence | {"estimator": "exact"}
        add("base_nll", value=value, difference=worse_text(cell, base), evidence=exact)
        add("entropy", value=mean([row["entropy"] for row in cell]), evidence=evidence)
        for metric, part, whole in (
            ("distinct_2", "different", "pairs"),
            ("repeated_4grams", "repeated", "fours"),
        ):
            parts_, wholes = [row[part] for row in cell], [row[whole] for row in cell]
            if sum(wholes):
                add(metric, value=ratio(parts_, wholes, scale=100.0), evidence=evidence)
        if temperature == 0 and not session.sees:
            starts = session.openings(SHOWN)
            found.texts += [_text(starts[row["start"]], row) for row in cell[:SHOWN]]


def worse_text(cell: Sequence[Row], base: Sequence[Row] | None) -> Difference | None:
    """How many nats a token costs more under the base than in the base's texts after the same
    starts."""
    if base is None:
        return None
    ours, theirs = (
        ([row["nats"] for row in rows], [row["tokens"] for row in rows]) for rows in (cell, base)
    )
    return apart("base", BASELINE, ratio_difference(ours, theirs))


def figures(session: Session, rows: Sequence[Row]) -> Found:
    """The figures that the rows give."""
    found = Found()
    _likelihood_figures(session, found, rows)
    _question_figures(session, found, rows)
    _text_figures(session, found, rows)
    if session.sees:
        seen_figures(session, found, rows)
    if not session.material.questions:
        session.miss(QUESTION, "exact match", "the data has no questions with a right answer")
    if session.base is None:
        session.miss(QUESTION, "free text", "it is judged by the base, and there is none")
    return found
