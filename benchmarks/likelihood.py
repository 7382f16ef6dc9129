"""How many forwards a likelihood takes: the estimator of the bound against the one with iid times.

    python benchmarks/likelihood.py MODEL [MODEL ...] [--rows 16] [--seeds 24] [--samples 3 8]

The first stories of tinystories/valid with >= 128 tokens, BOS + 127. For every estimator, the
standard deviation over the seeds of the mean over the rows, in nats per token (from that of each
row: rows are independent), and from it the forwards that it takes for the same standard error as
`1/t, iid`, as a share of that one's:

* `1/t, iid`: t ~ U(0.001, 1), each token masked with probability t, weight 1/t (MDLM, LLaDA).
* `k, iid`: exactly k of the n tokens of a block, k ~ U{1..n}, weight n/k.
* `k, stratified`: the draws of a block are stratified in k.
* `bound`: what `ar2diff eval` does: also, the context is read once for all draws, and what it
  predicts is a control variate. That forward is counted as a whole one.

`difference`: of the bounds of the right and a wrong ending of tinystories-cloze given the story, if
both have the same draws (`shared`) or each its own. Coverage: how often the truth lies within 1.96
reported standard errors, over seeds and groups of four rows. The truth is exact for blocks
(all 255 masks), and the mean over all seeds for `full`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.core.seeds import keyed_generator
from ar2diff.data.sources import read_texts
from ar2diff.diffusion.corruption import draw_times, open_slots
from ar2diff.diffusion.estimate import Estimate, total_of
from ar2diff.diffusion.likelihood import bound, masked_nll
from ar2diff.evaluation.documents import documents
from ar2diff.evaluation.score import windows
from ar2diff.generation.tokens import prompt_ids

RESULTS = Path(__file__).parent / "results" / "likelihood.jsonl"
LEAST = 1e-3  # the smallest t, as in LLaDA
GROUP = 4  # rows whose error is judged together
Masks = Callable[[Tensor, Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


def of_times(
    maskable: Tensor, block: Tensor, samples: int, generator: Any
) -> tuple[Tensor, Tensor]:
    """[samples, L] masks, and the weight of each masked token."""
    shape = (samples, int(block.max()) + 1)
    t = (LEAST + (1 - LEAST) * torch.rand(shape, generator=generator).double())[:, block]
    return maskable & (torch.rand(t.shape, generator=generator) < t), 1 / t


def of_counts(
    maskable: Tensor, block: Tensor, samples: int, generator: Any, stratified: bool = False
) -> tuple[Tensor, Tensor]:
    blocks = int(block.max()) + 1
    times = torch.rand(samples, blocks, generator=generator)
    if stratified:
        times = draw_times(samples, blocks, generator)
    masks, shares = zip(
        *[open_slots(maskable, block, row, generator) for row in times], strict=True
    )
    return torch.stack(masks), 1 / torch.stack(shares)


def stratified(*arguments: Any) -> tuple[Tensor, Tensor]:
    return of_counts(*arguments, stratified=True)


BASELINES: dict[str, Masks] = {
    "1/t, iid": of_times, "k, iid": of_counts, "k, stratified": stratified,
}  # fmt: skip


@torch.no_grad()
def estimate(
    checkpoint: Checkpoint, rows: list[list[int]], masks: Masks, samples: int, seed: int
) -> Tensor:
    """[R] nats of rows of one length, by an estimator that reads each masked copy on its own."""
    x0 = torch.tensor(rows).repeat_interleave(samples, 0)
    pos = torch.arange(x0.shape[1]).expand_as(x0)
    block = pos[0] // (checkpoint.spec.block_length or x0.shape[1])
    drawn = [masks(pos[0] > 0, block, samples, keyed_generator(seed, *row)) for row in rows]
    masked, weight = (torch.cat(part) for part in zip(*drawn, strict=True))
    values = torch.zeros(x0.shape, dtype=torch.double)
    for part in torch.arange(len(x0)).split(32):
        nll = masked_nll(
            checkpoint.model, checkpoint.spec, x0[part], masked[part], 0 * x0[part], pos[part],
            checkpoint.suppressed,
        )  # fmt: skip
        values[part] = values[part].masked_scatter(masked[part], nll.double())
    return (values * weight).sum(1).view(len(rows), samples).mean(1)


def bounds(checkpoint: Checkpoint, rows: list[list[int]], samples: int, seed: int, **given: Any):
    spec, suppressed = checkpoint.spec, checkpoint.suppressed
    return bound(checkpoint.model, spec, rows, suppressed, samples, seed, 4 * samples, **given)


def measure(checkpoint: Checkpoint, rows: list[list[int]], samples: int, seeds: int) -> list[dict]:
    """A row of the table for each estimator."""
    tokens = sum(len(row) - 1 for row in rows)
    found: dict[str, list[Tensor]] = {}
    for name, masks in BASELINES.items():
        found[name] = [estimate(checkpoint, rows, masks, samples, seed) for seed in range(seeds)]
    own = [bounds(checkpoint, rows, samples, seed) for seed in range(seeds)]
    found["bound"] = [each.nats for each in own]
    if checkpoint.spec.attention == "full":
        truth = torch.stack(found["bound"]).mean(0)
    else:
        truth = bounds(checkpoint, rows, 2**checkpoint.spec.block_length, 0).nats
    table = []
    for name, values in found.items():
        means = torch.stack(values).sum(1) / tokens
        cost = samples + (name == "bound" and checkpoint.spec.attention != "full")
        table.append({
            "attention": checkpoint.spec.attention, "samples": samples, "estimator": name,
            "rows": len(rows), "seeds": seeds, "mean": round(means.mean().item(), 4),
            "truth": round(truth.sum().item() / tokens, 4),
            "sd": round(torch.stack(values).var(0).sum().sqrt().item() / tokens, 5),
            "forwards": cost,
        })  # fmt: skip
        ratio = table[-1]["sd"] / table[0]["sd"]
        table[-1]["sd_ratio"] = round(ratio, 3)  # at as many draws
        table[-1]["forwards_at_equal_error"] = round(ratio**2 * cost / samples, 4)
    table[-1]["coverage"] = coverage(own, truth)
    return table


def coverage(own: list[Estimate], truth: Tensor) -> float:
    hits = []
    for each in own:
        for first in range(0, len(truth), GROUP):
            group = range(first, min(first + GROUP, len(truth)))
            part = total_of([each.row(number) for number in group])
            wanted = sum(truth[number].item() for number in group)
            error = part.error * part.tokens.item()
            hits.append(abs(part.nats.item() - wanted) <= 1.96 * error)
    return round(sum(hits) / len(hits), 3)


def differences(checkpoint: Checkpoint, count: int, samples: int, seeds: int) -> dict:
    """Endings of a story: how much sharing draws narrows the difference of two bounds."""
    spreads: dict[str, list[float]] = {"shared": [], "own": []}
    for doc in list(documents("tinystories-cloze/test.jsonl.gz")["test"])[:count]:
        context = prompt_ids(checkpoint.tokenizer, doc["context"])
        whole = [prompt_ids(checkpoint.tokenizer, f"{doc['context']} {o}") for o in doc["options"]]
        right = whole[doc["answer"]]
        wrong = next(row for row in whole if row != right)
        starts = [len(context)] * 2
        each = [
            bounds(checkpoint, [right, wrong], samples, seed, starts=starts).nats
            for seed in range(seeds)
        ]
        one, other = torch.stack(each).T
        spreads["shared"].append((one - other).var().item())
        spreads["own"].append((one - other.roll(1)).var().item())
    shared, own = (sum(values) / len(values) for values in spreads.values())
    return {
        "attention": checkpoint.spec.attention, "samples": samples, "estimator": "difference",
        "rows": count, "seeds": seeds, "sd": round(shared**0.5, 4),
        "sd_own_draws": round(own**0.5, 4), "variance_ratio": round(shared / own, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="converted folders")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--samples", type=int, nargs="+", default=[3, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["AR2DIFF_DATA"]) / "tinystories" / "valid.jsonl.gz"
    for folder in args.models:
        checkpoint = load_checkpoint(folder)
        rows = windows(read_texts(str(data), "text"), checkpoint.tokenizer, 128, args.rows)
        for samples in args.samples:
            found = measure(checkpoint, rows, samples, args.seeds)
            found.append(differences(checkpoint, args.rows, samples, args.seeds))
            with RESULTS.open("a") as file:
                for row in found:
                    line = json.dumps({"model": Path(folder).name, **row})
                    print(line, flush=True)
                    file.write(f"{line}\n")


if __name__ == "__main__":
    main()
