"""What the estimators of rl are worth: bias, standard deviation and passes on a trained model.

    python benchmarks/estimators.py runs/demo [--prompts 12] [--tokens 16] [--seeds 24]

Completions that the model writes to questions of the embedded corpus (temperature 1, threshold
0.9), scored in nats a completion. The truth is the log-probability that a random order writes it,
a token a step: the mean over all orders, exact by recursion over all subsets of a block. Bias:
mean over seeds and completions less the truth. Std: over seeds, root mean square over
completions; times the root of the passes it says what an equal number of passes is worth.
new - old: std of the difference between the model and one whose weights have moved by 1%, with
the same noise for both (as rl has it), and with noise of each one's own.
"""

from __future__ import annotations

import argparse
import math
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.rl import Rl
from ar2diff.core.readers import BlockReader, FullReader
from ar2diff.demo import corpus
from ar2diff.training.estimators import score, views
from ar2diff.training.rollouts import Rollout, sample

WAYS = [
    {"estimator": "one_step"},
    {"estimator": "coupled"},
    {"estimator": "elbo"},
    {"estimator": "elbo", "samples": 2},
    {"estimator": "elbo", "samples": 4},
    {"estimator": "spg"},
    {"estimator": "spg", "samples": 2},
    {"estimator": "trajectory"},
    {"estimator": "trajectory", "segments": 2},
    {"estimator": "ar"},
]
BATCH = 24


def subsets(block: list[int]) -> list[list[int]]:
    """All subsets; that of number n has the members of n's bits."""
    return [[i for bit, i in enumerate(block) if n >> bit & 1] for n in range(2 ** len(block))]


def truth(checkpoint: Checkpoint, rollout: Rollout) -> tuple[float, float]:
    """(log of the mean probability, mean log-probability) over all orders."""
    size = checkpoint.spec.block_length or len(rollout.ids)
    end, exact, bound = rollout.prompt + rollout.answer, 0.0, 0.0
    for start in range(rollout.prompt // size * size, end, size):
        block = list(range(max(start, rollout.prompt), min(start + size, end)))
        logp = subset_logps(checkpoint, rollout, start, size, block)
        whole, mean = [0.0], [0.0]
        for n in range(1, 2 ** len(block)):
            bits = [bit for bit in range(len(block)) if n >> bit & 1]
            each = torch.tensor([logp[n][bit] + whole[n & ~(1 << bit)] for bit in bits]).double()
            whole.append(float(each.logsumexp(0)) - math.log(len(bits)))
            mean.append(sum(logp[n][bit] + mean[n & ~(1 << bit)] for bit in bits) / len(bits))
        exact, bound = exact + whole[-1], bound + mean[-1]
    return exact, bound


@torch.no_grad()
def subset_logps(
    checkpoint: Checkpoint, rollout: Rollout, start: int, size: int, block: list[int]
) -> list[dict[int, float]]:
    """For each subset that is masked, {bit: log-probability of its token}: a decoder's canvas."""
    model, spec, hidden = checkpoint.model, checkpoint.spec, subsets(block)[1:]
    ids = rollout.ids[: start + size].repeat(len(hidden), 1)
    ids[:, rollout.prompt + rollout.answer :] = spec.mask_token_id
    masked = torch.zeros(len(hidden), size, dtype=torch.bool)
    for row, positions in enumerate(hidden):
        ids[row, positions] = spec.mask_token_id
        masked[row, [i - start for i in positions]] = True
    first = torch.full((len(hidden),), start)
    if spec.attention == "full":
        reader = FullReader(model, spec, torch.full_like(first, ids.shape[1]), size, "none")
    else:
        reader = BlockReader(model, spec, len(hidden), ids.shape[1], size, size, "none")
    logits = reader.read(ids, first, masked)
    logp = logits.masked_fill(checkpoint.suppressed, -math.inf).log_softmax(-1)
    row, place = masked.nonzero(as_tuple=True)
    values = logp.gather(1, rollout.ids[start + place][:, None])[:, 0].tolist()
    found: list[dict[int, float]] = [{} for _ in range(len(hidden) + 1)]
    for line, i, value in zip(row.tolist(), (start + place).tolist(), values, strict=True):
        found[line + 1][block.index(i)] = value
    return found


@torch.no_grad()
def estimates(checkpoint: Checkpoint, rollouts: list[Rollout], rl: Rl, seeds: int) -> Tensor:
    """[R, seeds]"""
    suppressed, values = checkpoint.suppressed, []
    drawn = [replace(r, seed=seed) for r in rollouts for seed in range(seeds)]
    for first in range(0, len(drawn), BATCH):
        part = drawn[first : first + BATCH]
        scores = score(checkpoint.model, part, rl, checkpoint.spec, suppressed)
        good = torch.zeros(len(part), dtype=torch.bool) if rl.estimator == "spg" else None
        values.append(scores.per_token(good).sum(1).double())
    return torch.cat(values).view(len(rollouts), seeds)


def moved(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with weights that have moved by 1%."""
    model, draw = deepcopy(checkpoint.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 0.01 * torch.randn(parameter.shape, generator=draw)
    return replace(checkpoint, model=model)


def spread(values: Tensor) -> float:
    return values.var(1).mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16, help="at most 10 with attention full")
    parser.add_argument("--seeds", type=int, default=24)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.model)
    checkpoint.model.eval()
    spec = checkpoint.spec
    examples = corpus.corpus(args.prompts, 2, (1, 2), "valid")
    prompts = [checkpoint.tokenizer(corpus.prompt(e)).input_ids for e in examples]
    settings = {"temperature": 1.0, "threshold": 0.9, "max_new_tokens": args.tokens}
    rollouts = sample(checkpoint, prompts, range(len(prompts)), settings, BATCH)
    exact, bound = torch.tensor([truth(checkpoint, r) for r in rollouts]).double().T
    tokens = sum(r.answer for r in rollouts) / len(rollouts)
    print(
        f"{len(rollouts)} completions of {tokens:.1f} tokens in {spec.attention} attention: "
        f"log p {exact.mean():.3f} (std over completions {exact.std():.3f}), "
        f"bound {bound.mean():.3f}; {args.seeds} seeds\n"
    )
    other = moved(checkpoint)
    print(
        "| estimator | passes | mean | bias | std | std x root of passes | new - old | own noise |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        rl = Rl(**way)
        if rl.estimator == "ar" and not spec.ar_mode:
            continue
        passes = sum(len(views(r, rl, spec)[0]) for r in rollouts) / len(rollouts)
        old, new = (estimates(c, rollouts, rl, args.seeds) for c in (checkpoint, other))
        name = ", ".join([way["estimator"], *(f"{k} {v}" for k, v in way.items() if k in
                                              ("samples", "segments"))])  # fmt: skip
        bias = (old.mean(1) - exact).mean()
        print(
            f"| {name} | {passes:.2g} | {old.mean():.3f} | {bias:+.3f} | {spread(old):.3f} "
            f"| {spread(old) * math.sqrt(passes):.3f} | {spread(new - old):.3f} "
            f"| {spread(new - old.roll(1, 1)):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
