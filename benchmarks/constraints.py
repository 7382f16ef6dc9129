"""What a constraint costs: CPU time of a forward beside one without it, and of making automata; and
whether answers that have its form anyway stay as good.

python benchmarks/constraints.py forwards stories3M-hf   (a folder, converted without training)
python benchmarks/constraints.py automata                (synthetic byte-level vocabularies)
python benchmarks/constraints.py answers runs/demo       (the folder that `make demo` converts)

One thread. The vocabularies of `automata` hold all bytes, the commonest words of TinyStories with
and without the space before them, what JSON is written with, and random pairs of those; they
are no real tokenizer's. `AR2DIFF_DATA` names the folder with `tinystories`.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

import ar2diff
from ar2diff.core import index
from ar2diff.core.automaton import Automaton
from ar2diff.core.canvas import Canvas
from ar2diff.core.constraint import Constraint
from ar2diff.core.options import Options
from ar2diff.core.pattern import pattern_of
from ar2diff.core.samplers import Chooser
from ar2diff.demo.corpus import corpus, prompt, score

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object", "properties": {"name": TEXT, "age": WHOLE, "ok": {"type": "boolean"}},
        "required": ["name", "age", "ok"],
    },
    "lengths": {
        "type": "object",
        "properties": {
            "code": {**TEXT, "minLength": 3, "maxLength": 10}, "note": {**TEXT, "maxLength": 64},
        },
        "required": ["code", "note"],
    },
    "optional": {"type": "object", "properties": {letter: TEXT for letter in "abcdef"}},
    "array": {
        "type": "array", "minItems": 1, "maxItems": 5,
        "items": {
            "type": "object", "properties": {"id": WHOLE, "price": {"type": "number"}},
            "required": ["id", "price"],
        },
    },
    "tool call": {
        "type": "object", "required": ["name", "arguments"],
        "properties": {
            "name": {"enum": ["get_weather", "search", "send_mail"]},
            "arguments": {
                "type": "object", "properties": {"q": TEXT, "n": WHOLE}, "required": ["q"],
            },
        },
    },
    "recursive": {
        "$defs": {
            "n": {
                "type": "object", "required": ["v"],
                "properties": {
                    "v": WHOLE, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}},
                },
            }
        },
        "$ref": "#/$defs/n",
    },
}  # fmt: skip
CASES = {
    **{name: {"json_schema": schema} for name, schema in SCHEMAS.items()},
    "regex": {"regex": r"( [A-Za-z][a-z]{0,9}[,.]?){1,40}"},
    "choice": {"choice": [" yes", " no", " I do not know"]},
}


def forwards(folder: str, runs: int) -> None:
    """Milliseconds of a forward with each constraint, beside those without one."""
    import ar2diff
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    root = Path(os.environ.get("AR2DIFF_DATA", "../shared/data"))
    with tempfile.TemporaryDirectory() as target:
        recipe = load_recipe("stories260k", ["train.max_steps=0"])
        adapt(str(root / folder), recipe, Path(target) / "model")
        model = ar2diff.load(Path(target) / "model", dtype="float32")
        print("| mode | constraint | states, classes, edges | ms a forward | times without |")
        print("|---|---|---|---|---|")
        for mode in ("diffusion", "ar"):
            for name, constraint in CASES.items():
                _row(model, mode, name, constraint, runs)


def _row(model: Any, mode: str, name: str, constraint: dict[str, Any], runs: int) -> None:
    prompt = "Once upon a time, there was a little girl named"
    settings = {"mode": mode, "max_new_tokens": 48, "temperature": 1.0}
    each: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(runs + 1):
        for held in (False, True):  # in turn, so that both have the machine alike
            own = constraint if held else {}
            start = time.process_time()
            result = model.generate(prompt, seed=seed, **settings, **own)
            if seed:  # the first makes the automaton
                each[held].append((time.process_time() - start) / result.forwards)
    (automaton,) = (
        a for k, a in index.FOUND[model.tokenizer].items() if _pattern(constraint) in k[0]
    )
    free, held = (1e3 * statistics.median(each[kind]) for kind in (False, True))
    size = f"{automaton.states}, {automaton.classes}, {len(automaton.label)}"
    print(f"| {mode} | {name} | {size} | {held:.2f} | {held / free:.2f} |", flush=True)


def _pattern(constraint: dict[str, Any]) -> str:
    given = dict(constraint)
    if "json_schema" in given:
        given["json_schema"] = json.dumps(given["json_schema"])
    return pattern_of(Options(**given))


def answers(folder: str, count: int = 200) -> None:
    """Right answers of the demo model to held-out questions, in mode diffusion, with and without
    the form that they have."""
    form = r"( [0-9]+ [+-] [0-9]+ = [0-9]+\.)+ The answer is [0-9]+\."
    model, rows = ar2diff.load(folder), [*corpus(count, 7, (1, 2), "valid")]
    print("| a forward decides | constraint | right | tokens a forward | match |")
    print("|---|---|---|---|---|")
    for rule in ({"threshold": 0.9}, {"threshold": 0.7}, {"steps_per_block": 4}):
        for held in ({}, {"regex": form}):
            results = model.generate(
                [*map(prompt, rows)], batch_size=32, mode="diffusion", max_new_tokens=48,
                **rule, **held,
            )  # fmt: skip
            right = statistics.mean(score(e, r.text) for e, r in zip(rows, results, strict=True))
            error = (right * (1 - right) / count) ** 0.5
            speed = sum(r.new_tokens for r in results) / sum(r.forwards for r in results)
            fits = sum(re.fullmatch(form, r.text) is not None for r in results) / count
            (name, value), kind = *rule.items(), "regex" if held else "none"
            print(
                f"| `{name}={value}` | {kind} | {100 * right:.1f} ± {100 * error:.1f} % | "
                f"{speed:.2f} | {100 * fits:.1f} % |",
                flush=True,
            )


def automata() -> None:
    """Seconds and memory of making each automaton, its size, and milliseconds of a block of 32."""
    print(
        "| tokens | constraint | s in all | MB at most | states | edges | classes | their edges ",
        end="",
    )
    print("| ms for 32 positions, without |\n|---|---|---|---|---|---|---|---|---|")
    for size in (32_000, 152_000):
        tokens = _vocabulary(size)
        for name, constraint in CASES.items():
            read, write = os.pipe()
            child = os.fork()  # so that each has a peak of its own
            if not child:
                _automaton(tokens, size, _pattern(constraint), write)
                os._exit(0)
            os.close(write)
            os.waitpid(child, 0)
            seconds, most, *counts, held, free = json.loads(os.read(read, 1 << 16))
            os.close(read)
            print(f"| {size:,} | {name} | {seconds:.2f} | {most:.0f} | ", end="")
            print(" | ".join(f"{value:,}" for value in counts), end="")
            print(f" | {held:.1f}, {free:.1f} |", flush=True)


def _automaton(tokens: dict[bytes, list[int]], size: int, pattern: str, write: int) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the memory until now
    before, start = _megabytes("VmRSS"), time.process_time()
    begin, final, edges = index._answer(pattern, tokens, size + 1)
    automaton = Automaton.of_edges(edges, [begin], final, size + 1, end_ids=[size])
    seconds, most = time.process_time() - start, _megabytes("VmHWM") - before
    canvas = Canvas.of_prompts([[0]], size + 1, max_new_tokens=64, end_ids=[size])
    constraint, chooser = Constraint(automaton, canvas), Chooser(Options(), torch.tensor([]), [])
    logits = 4 * torch.randn(32, size + 1)
    position, masked = torch.arange(1, 33)[None], torch.ones(1, 32, dtype=torch.bool)
    row, counts = torch.zeros_like(position), (automaton.states, len(edges[0]))
    counts += automaton.classes, len(automaton.label)
    held = _ms(lambda: constraint.choose(chooser, row, position, masked, logits, None, None))
    free = _ms(lambda: chooser.pick(logits, None))
    os.write(write, json.dumps([seconds, most, *counts, held, free]).encode())


def _megabytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _ms(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def _vocabulary(size: int) -> dict[bytes, list[int]]:
    """A byte-level vocabulary: {bytes: [id]}."""
    root = Path(os.environ.get("AR2DIFF_DATA", "../shared/data")) / "tinystories"
    file = sorted(root.glob("*train*.jsonl*"))[0]
    words: collections.Counter[str] = collections.Counter()
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as lines:
        for line, _ in zip(lines, range(20_000), strict=False):
            words.update(line.split())
    found = [bytes([byte]) for byte in range(256)]
    found += [
        text.encode() for text in ('":', '",', '{"', '"}', "},", '": "', '", "', "],", ": ", ", ")
    ]
    for word, _ in words.most_common(10_000):
        found += [word.encode(), b" " + word.encode()]
    found, known = [*dict.fromkeys(found)], {*found}
    short, draw = [text for text in found if len(text) <= 8], random.Random(0)
    while len(found) < size:
        text = draw.choice(short) + draw.choice(short)
        if text not in known:
            known.add(text)
            found.append(text)
    return {text: [number] for number, text in enumerate(found[:size])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("forwards", "automata", "answers"))
    parser.add_argument("model", nargs="?", default="stories3M-hf")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    if given.what == "automata":
        automata()
    else:
        forwards(given.model, given.runs) if given.what == "forwards" else answers(given.model)


if __name__ == "__main__":
    main()
