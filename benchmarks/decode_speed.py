"""Speed of decoding, and the quality beside it: the converted model against its AR base.

    python benchmarks/decode_speed.py runs/demo-long                      # the embedded default
    python benchmarks/decode_speed.py runs/stories3m --base path/to/stories3M-hf \\
        --data tinystories/valid --max-new-tokens 128

One process. Every repeat runs every way once over the same prompts, one after the other
(interleaved); figures are medians over the repeats. Ways: `hf dynamic` and `hf static` are
transformers' `generate` on the base; `ar` is ours, one token a forward, on the converted model's AR
mode; `lossless` is self-speculation; the rest is the diffusion mode: `one` decides one token a
forward, `safe`, `balanced` and `fast` are thresholds. With --compile, some of them are timed
compiled too. A forward is any call of the model, prefill and commits included. `sampler` is the
time to choose, decide and write tokens, `outside the model` all that is not the model's, in parts
of the model's time. Greedy throughout. Quality is of all prompts: share of right answers (embedded
default), nats per token under the AR base, distinct-2 (share of different bigrams over all answers)
and the share of 4-grams that repeat in an answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.core.denoise import _Denoiser, denoise
from ar2diff.core.generate import canvas_of
from ar2diff.core.speculation import _Group
from ar2diff.data.sources import find_file, read_texts
from ar2diff.demo import corpus
from ar2diff.diffusion.likelihood import ar_nll
from ar2diff.generation.complete import settings_of

DEMO = Path(__file__).parents[1] / "ar2diff" / "demo" / "model"
SETTINGS = {"safe": 0.98, "balanced": 0.9, "fast": 0.7}
CURVE = (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
Way = Callable[[list[list[int]]], list[list[int]]]  # prompts of one batch -> answers


class Clock:
    """Counts the calls of a function and the seconds in them."""

    def __init__(self, owner: Any, name: str):
        self.calls, self.seconds = 0, 0.0
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        setattr(owner, name, timed)


SAMPLERS = [  # choose, decide, write
    Clock(_Denoiser, "_decide"),
    *(Clock(_Group, part) for part in ("_tokens", "_found", "_write", "_draft")),
]


def ours(checkpoint: Checkpoint, limit: int, **settings: Any) -> Way:
    spec, options = settings_of(checkpoint, {"temperature": 0, "max_new_tokens": limit, **settings})

    def run(prompts: list[list[int]]) -> list[list[int]]:
        canvas = canvas_of(checkpoint.model, spec, prompts, options)
        for _ in denoise(checkpoint.model, spec, canvas, options):
            pass
        run.forwards += int(canvas.forwards.sum())  # of each row, which are those it has alone
        return [canvas.new_ids(row) for row in range(len(prompts))]

    run.forwards = 0

    return run


def stock(checkpoint: Checkpoint, limit: int, cache: str) -> Way:
    """transformers' own generate, left-padded."""
    pad, ends = checkpoint.tokenizer.pad_token_id or 0, checkpoint.end_ids

    def run(prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = checkpoint.model.generate(
            ids, attention_mask=real, max_new_tokens=limit, do_sample=False, pad_token_id=pad,
            eos_token_id=ends, cache_implementation=cache,
        )  # fmt: skip
        return [cut(row, ends) for row in output[:, width:].tolist()]

    return run


def cut(ids: list[int], ends: list[int]) -> list[int]:
    """An answer up to its first end token."""
    stops = [place for place, token in enumerate(ids) if token in ends]
    return ids[: stops[0] + 1] if stops else ids


def timed(ways: dict[str, tuple[Way, Clock]], batches: list[list[list[int]]], repeats: int) -> Any:
    """{way: {tokens, seconds, ...}}: medians over interleaved repeats."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first warms up
        for name, (way, clock) in ways.items():
            for each in (clock, *SAMPLERS):
                each.calls, each.seconds = 0, 0.0
            start = time.perf_counter()
            tokens = sum(len(new) for batch in batches for new in way(batch))
            seconds = time.perf_counter() - start
            if repeat:
                runs[name].append(
                    {
                        "tokens_per_second": tokens / seconds,
                        "ms_per_forward": 1e3 * seconds / clock.calls,
                        "ms_model": 1e3 * clock.seconds / clock.calls,
                        "sampler": sum(s.seconds for s in SAMPLERS) / clock.seconds,
                        "outside": (seconds - clock.seconds) / clock.seconds,
                        "forwards": clock.calls,
                        "tokens": tokens,
                    }
                )
    return {
        name: {key: statistics.median(run[key] for run in rows) for key in rows[0]}
        for name, rows in runs.items()
    }


class Judge:
    """Quality of answers to prompts, under the AR base."""

    def __init__(self, base: Checkpoint, prompts: list[list[int]], examples: list[Any]):
        self.base, self.prompts, self.examples = base, prompts, examples
        self.suppressed = base.suppressed
        self.given = ar_nll(base.model, prompts, self.suppressed).nats

    def __call__(self, answers: list[list[int]]) -> dict[str, float]:
        rows = [p + a for p, a in zip(self.prompts, answers, strict=True)]
        nats = ar_nll(self.base.model, rows, self.suppressed).nats - self.given
        grams = [pair for a in answers for pair in itertools.pairwise(a)]
        fours = [list(zip(a, a[1:], a[2:], a[3:], strict=False)) for a in answers]
        count = sum(map(len, fours))
        result = {
            "base_nll": nats.sum().item() / max(1, sum(map(len, answers))),
            "distinct_2": len(set(grams)) / max(1, len(grams)),
            "repeated_4": sum(len(f) - len(set(f)) for f in fours) / max(1, count),
            "length": sum(map(len, answers)) / len(answers),
        }
        if self.examples:
            texts = self.base.tokenizer.batch_decode(answers, skip_special_tokens=True)
            right = [corpus.score(e, t) for e, t in zip(self.examples, texts, strict=True)]
            mean = sum(right) / len(right)
            result["right"] = mean
            result["right_error"] = (mean * (1 - mean) / len(right)) ** 0.5
        return result


def prompts_of(base: Checkpoint, args: argparse.Namespace) -> tuple[list[list[int]], list[Any]]:
    """Held-out prompts: questions of the embedded corpus, or starts of stories."""
    encode = base.tokenizer
    if args.data is None:
        examples = list(corpus.corpus(args.prompts, 2, (1, 2), "valid"))
        return [encode(corpus.prompt(e)).input_ids for e in examples], examples
    texts = read_texts(find_file(args.data), "text")[: args.prompts]
    return [encode(" ".join(t.split()[:12])).input_ids for t in texts], []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--base", default=str(DEMO))
    parser.add_argument("--data", help="stories whose starts are the prompts; none: questions")
    parser.add_argument("--prompts", type=int, default=400, help="that quality is judged on")
    parser.add_argument("--timed", type=int, default=16, help="of them, that are timed")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draft-length", type=int)
    parser.add_argument("--compile", action="store_true", help="time compiled forwards too")
    parser.add_argument("--output", type=Path, help="jsonl to add the figures to")
    args = parser.parse_args()
    base, model = load_checkpoint(args.base), load_checkpoint(args.model)
    base_clock, clock = Clock(base.model, "forward"), Clock(model.model, "forward")
    prompts, examples = prompts_of(base, args)
    limit, size = args.max_new_tokens, model.spec.block_length
    ways: dict[str, tuple[Way, Clock]] = {
        "hf dynamic": (stock(base, limit, "dynamic"), base_clock),
        "hf static": (stock(base, limit, "static"), base_clock),
        "ar": (ours(model, limit, mode="ar"), clock),
        "lossless": (ours(model, limit, mode="speculative", draft_length=args.draft_length), clock),
        "one": (ours(model, limit, steps_per_block=size), clock),
        **{n: (ours(model, limit, threshold=t), clock) for n, t in SETTINGS.items()},
    }
    fixed: dict[str, dict[str, Any]] = {
        "ar": {"mode": "ar"}, "one": {"steps_per_block": size}, "balanced": {"threshold": 0.9},
    }  # fmt: skip
    for name, settings in fixed.items() if args.compile else ():
        ways[f"{name}, compiled"] = ours(model, limit, **settings, compile=True), clock
    judge = Judge(base, prompts, examples)
    record = json.loads((Path(args.model) / "ar2diff.json").read_text())
    about = {
        "model": Path(args.model).name, "trained_tokens": record.get("tokens", 0),
        "prompts": len(prompts), "timed": args.timed, "max_new_tokens": limit,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(about))
    rows = []
    quality = {}
    for name, (way, _) in ways.items():
        quality[name] = judged(way, judge, prompts)
    for batch_size in args.batch_sizes:
        chosen = prompts[: args.timed]
        batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        result = timed(ways, batches, args.repeats)
        reference = result["hf dynamic"]["tokens_per_second"]
        for name, figures in result.items():
            figures["speedup"] = figures["tokens_per_second"] / reference
            rows.append({**about, "batch": batch_size, "way": name, **figures, **quality[name]})
    show(rows)
    for threshold in CURVE:
        way = ours(model, limit, threshold=threshold)
        figures = judged(way, judge, prompts)
        figures["tokens_per_forward"] = figures["length"] * len(prompts) / way.forwards
        rows.append({**about, "batch": 1, "way": f"threshold {threshold}", **figures})
    show_curve(rows)
    if args.output:
        with args.output.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


def judged(way: Way, judge: Judge, prompts: list[list[int]], size: int = 16) -> dict[str, float]:
    answers = [new for i in range(0, len(prompts), size) for new in way(prompts[i : i + size])]
    return judge(answers)


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| batch | way | tokens/forward | tokens/s | vs hf dynamic | ms/forward | sampler "
          "| outside the model | right | base NLL | distinct-2 | repeated-4 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        right = f"{r['right']:.3f} ± {r['right_error']:.3f}" if "right" in r else "-"
        per_row = r["tokens"] / r["forwards"] / r["batch"]
        print(
            f"| {r['batch']} | {r['way']} | {per_row:.2f} | {r['tokens_per_second']:.0f} "
            f"| {r['speedup']:.2f}x | {r['ms_per_forward']:.2f} "
            f"| {100 * r['sampler']:.0f} % | {100 * r['outside']:.0f} % "
            f"| {right} | {r['base_nll']:.3f} | {r['distinct_2']:.3f} | {r['repeated_4']:.3f} |"
        )


def show_curve(rows: list[dict[str, Any]]) -> None:
    print("\n| threshold | tokens/forward | right | base NLL | distinct-2 | repeated-4 |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        if r["way"].startswith("threshold"):
            right = f"{r['right']:.3f} ± {r['right_error']:.3f}" if "right" in r else "-"
            print(
                f"| {r['way'].split()[1]} | {r['tokens_per_forward']:.2f} | {right} "
                f"| {r['base_nll']:.3f} | {r['distinct_2']:.3f} | {r['repeated_4']:.3f} |"
            )


if __name__ == "__main__":
    main()
