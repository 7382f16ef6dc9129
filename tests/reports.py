"""Reports that nobody measured: a realistic one, and random ones. Used by the tests, and

    python tests/reports.py DIR

writes the realistic one into a folder."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from ar2diff.reports.figures import (
    BASELINE,
    EXACT,
    LOOKUP,
    METRICS,
    OWN,
    STOCK,
    TOKEN_BY_TOKEN,
    Difference,
    Figure,
    Missing,
    Order,
    Report,
    Subject,
    Text,
    write_report,
)

MODEL, BASE, CONTROL = "runs/stories3m", "stories3M-hf", "runs/stories3m-ar"
SETTINGS: dict[str, dict[str, Any]] = {
    BASELINE: {"do_sample": False, "use_cache": True},
    LOOKUP: {"do_sample": False, "use_cache": True, "prompt_lookup_num_tokens": 10},
    "ar": {"mode": "ar", "temperature": 0},
    "lossless": {"mode": "speculative", "temperature": 0},
    "lossless chain": {"mode": "speculative", "draft_length": 7, "temperature": 0},
    "lossless tree": {"mode": "speculative", "draft_nodes": 24, "temperature": 0},
    "diffusion 0.95": {"mode": "diffusion", "threshold": 0.95, "temperature": 0},
    "diffusion 0.9": {"mode": "diffusion", "threshold": 0.9, "temperature": 0},
    "diffusion 0.7": {"mode": "diffusion", "threshold": 0.7, "temperature": 0},
    TOKEN_BY_TOKEN: {"mode": "diffusion", "threshold": 1.0, "temperature": 0},
    "ranked ar": {"mode": "ar", "temperature": 1, "num_return_sequences": 8},
}
HELD: dict[Any, dict[str, Any]] = {
    "regex": {"regex": "[a-z]+"}, "JSON schema": {"json_schema": {"type": "integer"}},
}  # fmt: skip
WORDS = "Once upon a time there was a little dog named Max . He liked to run in the park".split()


def plain(text: str) -> str:
    """A text with ordinary spaces where a line must not be broken."""
    return text.replace("\u00a0", " ")


def figure(
    question: str,
    metric: str,
    value: float,
    error: float | None,
    subject: str = "model",
    setting: str | None = None,
    n: int = 5,
    difference: Difference | None = None,
    **at: float | str,
) -> Figure:
    """A figure with the unit and the evidence that it needs."""
    unit, better = METRICS[question].get(metric, ("%", "high"))
    evidence: dict[str, Any] = {}
    if "bound" in metric:
        evidence["estimator"] = "bound"
    elif metric in EXACT:
        evidence["estimator"] = "exact"
    if setting is not None:
        stock = setting in (BASELINE, LOOKUP)
        evidence |= {
            "callable": STOCK if stock else OWN, "arguments": SETTINGS[setting] | at,
            "dtype": "float32", "threads": 2, "forwards": 320, "tokens": 320, "steps": 320,
        }  # fmt: skip
        evidence["arguments"] |= HELD.get(at.get("constraint"), {})
    return Figure(
        question=question, metric=metric, unit=unit, subject=subject, setting=setting, at=at,
        value=value, error=error, n=n, difference=difference, better=better, evidence=evidence,
    )  # fmt: skip


def apart(value: float, error: float, setting: str | None = BASELINE, **more: Any) -> Difference:
    return Difference(to="base", setting=setting, value=value, error=error, **more)


def report(figures: list[Figure], **more: Any) -> Report:
    subjects = {
        "model": Subject(name=MODEL, kind="conversion", parameters=3_000_000, block_length=8,
                         trained_length=256, context=512),
        "base": Subject(name=BASE, kind="ar", parameters=3_000_000, context=512),
    }  # fmt: skip
    return Report(**{
        "title": MODEL, "quick": False, "subjects": subjects, "figures": figures,
        "settings": SETTINGS,
    } | more)  # fmt: skip


def realistic() -> Report:
    """What a report of a small conversion might look like."""
    subjects = report([]).subjects | {
        "control": Subject(name=CONTROL, kind="ar", parameters=3_000_000, context=512)
    }
    figures = [*_speed(), *_quality(), *_length(), *_control()]
    prompt = "Once upon a time, there was a little girl named Lily. One day she found"
    texts = [
        ("base", BASELINE, "a shiny key in the garden. She ran to show it to her mom."),
        ("model", "lossless chain", "a shiny key in the garden. She ran to show it to her mom."),
        ("model", "diffusion 0.9", "a shiny key under the tree. She ran to show her mom."),
        ("model", "diffusion 0.7", "a shiny shiny key. She ran ran to the <b>tree</b> and Tom."),
    ]
    orders = [
        Order(
            prompt="Once upon a time", tokens=[f" {word}" for word in WORDS[4:]],
            forward=[1, 1, 2, 1, 3, 2, 4, 4, 5, 5, 4, 6, 7, 6, 6],
            confidence=[0.99, 0.97, 0.91, 0.95, 0.9, 0.93, 0.97, 0.92, 0.98, 0.9, 0.91, 0.99, 0.94,
                        0.9, 0.96],
        )
    ]  # fmt: skip
    protocol = {
        "command": f"ar2diff report {MODEL} --base {BASE} --control {CONTROL} --data stories.jsonl",
        "when": "2026-11-26T20:15:00", "seconds": 1260.0, "seed": 0, "threads": 2,
        "dtype": "float32", "data": "stories.jsonl, 64 texts held out from training",
        "hardware": {"processor": "x86-64", "cores": 2, "gpu": None, "system": "Linux"},
        "versions": {"ar2diff": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "callable": {s: STOCK if s in (BASELINE, LOOKUP) else OWN for s in SETTINGS},
    }  # fmt: skip
    return report(
        figures, subjects=subjects, orders=orders, protocol=protocol,
        texts=[Text(question="quality", prompt=prompt, subject=s, setting=k, text=t)
               for s, k, t in texts],
        missing=[Missing(question="speed", what="batch 32 and 64", why="no GPU on this machine"),
                 Missing(question="control", what="gaps held to a JSON schema",
                         why="a constraint needs jsonschema, which is not installed")],
    )  # fmt: skip


def _speed() -> list[Figure]:
    rates = {  # tokens/s at batch 1, 4, 8, 16
        ("base", BASELINE): (421, 1390, 2410, 3620), ("base", LOOKUP): (505,),
        ("control", BASELINE): (419, 1394, 2405, 3611),
        ("model", "ar"): (402, 1330, 2300, 3480),
        ("model", "lossless chain"): (812, 1910, 2380, 2710),
        ("model", "lossless tree"): (874, 1640, 1810, 1900),
        ("model", "diffusion 0.95"): (760, 1720, 2240, 2650),
        ("model", "diffusion 0.9"): (930, 2050, 2570, 2940),
        ("model", "diffusion 0.7"): (1410, 3010, 3600, 4020),
        ("model", TOKEN_BY_TOKEN): (330, 1080, 1790, 2400),
    }  # fmt: skip
    forward = {"ar": 1, "lossless chain": 2.9, "lossless tree": 3.4, "diffusion 0.95": 2.2,
               "diffusion 0.9": 2.7, "diffusion 0.7": 4.1, TOKEN_BY_TOKEN: 0.96}  # fmt: skip
    found = []
    for (who, setting), values in rates.items():
        for batch, value, plain in zip(
            (1, 4, 8, 16), values, rates["base", BASELINE], strict=False
        ):
            ratio, error = value / plain, 0.012 * value
            against = apart(ratio, 0.018 * ratio, ratio=True) if who != "base" else None
            found.append(figure("speed", "tokens_per_second", value, error, who, setting,
                                difference=against, batch=batch))  # fmt: skip
            each = forward.get(setting, 1.4 if setting == LOOKUP else 1.0)
            rows = {"tokens_per_forward": each, "p_cache": min(1, each / 8 + 0.1),
                    "seconds_to_first_text": 0.002 * each * batch**0.5,
                    "peak_bytes": 31e6 + batch * 1.3e6}  # fmt: skip
            if batch == 1:
                rows |= {"seconds_per_token_p50": 1 / value, "seconds_per_token_p95": 1.6 / value}
            for metric, amount in rows.items():
                error = None if metric == "peak_bytes" else 0.01 * amount
                found.append(figure("speed", metric, amount, error, who, setting, batch=batch))
    for slot in range(1, 8):
        for setting, first in (("lossless chain", 82), ("lossless tree", 89)):
            share = first * 0.86 ** (slot - 1)
            found += [figure("speed", "acceptance", share, 1.1 + 0.2 * slot, "model", setting,
                             n=640, batch=batch, slot=slot) for batch in (1, 8)]  # fmt: skip
    return found


def _quality() -> list[Figure]:
    found = [
        figure("quality", "ar_nll", 1.462, 0.021, "base", n=64),
        figure("quality", "ar_nll", 1.447, 0.021, "control", n=64,
               difference=apart(-0.015, 0.004, None)),
        figure("quality", "ar_nll", 1.471, 0.021, n=64, difference=apart(0.009, 0.003, None)),
        figure("quality", "bound", 1.874, 0.026, n=64),
        figure("quality", "bits_per_byte", 0.604, 0.009, "base", n=64),
        figure("quality", "bits_per_byte", 0.608, 0.009, n=64),
        figure("quality", "bound_bits_per_byte", 0.774, 0.011, n=64),
    ]  # fmt: skip
    scores = {
        ("base", BASELINE): (41.2, 63.5), ("control", BASELINE): (42.0, 64.0),
        ("model", "ar"): (41.0, 63.0), ("model", "lossless chain"): (41.0, 63.0),
        ("model", "diffusion 0.95"): (40.4, 62.5), ("model", "diffusion 0.9"): (39.8, 62.0),
        ("model", "diffusion 0.7"): (34.1, 55.5), ("model", TOKEN_BY_TOKEN): (41.4, 62.8),
    }  # fmt: skip
    for (who, setting), values in scores.items():
        for metric, value, plain in zip(
            ("exact_match", "task:stories_cloze"), values, scores["base", BASELINE], strict=True
        ):
            against = apart(value - plain, 0.9) if who != "base" else None
            found.append(figure("quality", metric, value, 2.2, who, setting, 500, against))
    for who, setting, gain in (
        ("base", BASELINE, 0), ("model", "ar", 0.02), ("model", "diffusion 0.9", 0.12),
    ):  # fmt: skip
        for heat in (0.4, 0.6, 0.8, 1.0):
            rows = {
                "base_nll": 0.7 + heat**2 + gain, "entropy": 3.9 + 0.8 * heat - 0.3 * gain,
                "distinct_2": 62 + 20 * heat, "repeated_4grams": 9 - 6 * heat + 10 * gain,
            }  # fmt: skip
            for metric, value in rows.items():
                found.append(figure("quality", metric, value, 0.02 * value, who, setting, 64,
                                    temperature=heat))  # fmt: skip
    return found


def _length() -> list[Figure]:
    found = []
    for prompt in (32, 128):
        for answer in (32, 128, 256):
            size, plain = prompt + answer, 0.0023 + 1e-6 * (prompt + answer)
            for who, setting, gain in (
                ("base", BASELINE, 1),
                ("model", "ar", 0.96),
                ("model", "lossless chain", 1.95 - 0.0027 * size),
            ):
                value = plain / gain
                against = apart(1 / gain, 0.02, ratio=True) if who == "model" else None
                at = {"prompt": prompt, "answer": answer}
                found += [
                    figure("length", "seconds_per_token", value, 0.01 * value, who, setting,
                           difference=against, **at),
                    figure("length", "peak_bytes", 31e6 + 9e3 * size, None, who, setting, **at),
                    figure("length", "stopped", max(0, 96 - answer / 4), 4, who, setting, **at),
                ]  # fmt: skip
    for position in (32, 64, 128, 192, 256, 320, 384, 448):
        past, gain = max(0, position - 256) / 192, 0.05 * position**0.3
        for who, metric, value in (
            ("base", "ar_nll", 1.7 - gain),
            ("model", "bound", 2.1 - gain + 0.6 * past),
            ("model", "ar_nll", 1.71 - gain + 0.1 * past),
        ):
            found.append(figure("length", metric, value, 0.03, who, n=64, position=position))
    return found


def _control() -> list[Figure]:
    found = []
    for who, setting, right, forwards in (
        ("model", "diffusion 0.9", 38.0, 1.6), ("base", "ar", 31.0, 2.4),
        ("base", "ranked ar", 37.0, 3.4), ("control", "ar", 33.0, 2.4),
    ):  # fmt: skip
        rows = {"matches": (100.0, 0.7), "exact_match": (right, 2.4), "base_nll": (2.1, 0.05),
                "forwards": (forwards, 0.1), "seconds": (0.004 * forwards, 0.0002)}  # fmt: skip
        found += [
            figure("control", f"constrained_{name}", *row, who, setting, 200, constraint="regex")
            for name, row in rows.items()
        ]
    return [
        *found,
        figure("control", "infill_exact_match", 41.5, 2.1, "model", "diffusion 0.9", 400,
               apart(12.3, 1.9)),
        figure("control", "infill_exact_match", 11.2, 1.4, "base", BASELINE, 400),
        figure("control", "infill_exact_match", 29.2, 2.0, "base", "ar", 400),
        figure("control", "infill_bound", 1.52, 0.05, n=400),
        figure("control", "infill_ar_nll", 2.31, 0.06, "base", n=400),
        figure("control", "forced_kept", 100.0, 0.0, "model", "diffusion 0.9", 400),
        figure("control", "revision_exact_match", 72.0, 2.2, "model", "diffusion 0.9", 400),
        figure("control", "revision_forwards", 3.1, 0.1, "model", "diffusion 0.9", 400),
    ]  # fmt: skip


def random_report(seed: int, settings: int = 1) -> Report:
    """Figures of any size, of so many settings of the model and one of the base, for each
    question."""
    draw, names = random.Random(seed), ("ar", "diffusion 0.9", "diffusion 0.7")[:settings]
    found: list[Figure] = []

    def both(question: str, metric: str, low: float, high: float, spread: float, **at: float):
        for who, setting in (*(("model", name) for name in names), ("base", BASELINE)):
            value = draw.uniform(low, high)
            found.append(figure(question, metric, value, spread * value, who, setting, **at))

    for batch in (1, 4, 8, 16):
        both("speed", "tokens_per_second", 300, 1200, draw.choice((0.01, 0.1)), batch=batch)
    both("quality", "exact_match", 20, 60, draw.choice((0.01, 0.1, 0.4)))
    for prompt, answer in ((32, 32), (32, 128), (128, 32), (128, 256)):
        both("length", "seconds_per_token", 1e-3, 4e-3, draw.choice((0.01, 0.1)),
             prompt=prompt, answer=answer)  # fmt: skip
    both("control", "infill_exact_match", 5, 60, draw.choice((0.01, 0.1, 0.4)))
    if draw.random() < 0.5:
        found = [_paired(f, found) for f in found]
    return report(found)


def _paired(one: Figure, figures: list[Figure]) -> Figure:
    """The model's figure with its recorded difference from the base's."""
    if one.subject != "model":
        return one
    keys = ("question", "metric", "at")
    other = next(f for f in figures if f.subject == "base"
                 and all(getattr(f, k) == getattr(one, k) for k in keys))  # fmt: skip
    ratio = one.question in ("speed", "length")
    value = one.value / other.value if ratio else one.value - other.value
    error = 0.02 * value if ratio else 0.5 * (one.error + other.error)
    return one.model_copy(update={"difference": apart(value, error, ratio=ratio)})


def swapped(given: Report) -> Report:
    """The same figures with model and base in each other's places."""
    turn = {"model": "base", "base": "model"}
    figures = []
    for one in given.figures:
        difference = one.difference and one.difference.model_copy(
            update={"to": turn[one.difference.to]}
        )
        figures.append(
            one.model_copy(update={"subject": turn[one.subject], "difference": difference})
        )
    return given.model_copy(update={"figures": figures})


def widened(given: Report, by: float) -> Report:
    """The same values with errors so many times as large."""
    figures = []
    for one in given.figures:
        difference = one.difference and one.difference.model_copy(
            update={"error": one.difference.error * by}
        )
        figures.append(
            one.model_copy(update={"error": one.error and one.error * by, "difference": difference})
        )
    return given.model_copy(update={"figures": figures})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(write_report(realistic(), folder))
