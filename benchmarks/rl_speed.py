"""Seconds of a step of RL, and of the same step done as d1 does it (diffu-GRPO, Zhao et al. 2025).

    python benchmarks/rl.py runs/demo --arms trajectory --seeds 0 --seconds 1   # makes runs/rl
    python benchmarks/rl_speed.py runs/rl/demo-easy-diffusion --data runs/rl/hard.jsonl

Both train the same model on the same prompts by recipe demo-rl, from the same weights, a step of
the one after a step of the other in one process. d1's way here:

* rollouts: the whole canvas, prompt and all masks, goes through the model at every step, with the
  logits of all its positions; two tokens a step by confidence until the canvas is full, whatever
  has ended (its length 256 in 128 steps, blocks of 32, is here the recipe's length in blocks of the
  model's own);
* scores: one step (`one_step`), of all completions on the whole canvas.

Ours is the recipe as it stands. Both are without a reference model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.attention import PADDING, Slots, model_mask
from ar2diff.core.seeds import keyed_generator
from ar2diff.training import grpo
from ar2diff.training.rl import RL
from ar2diff.training.rollouts import Rollout

RESULTS = Path(__file__).parent / "results"
TOKENS_A_STEP = 2


@torch.no_grad()
def d1_sample(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: dict[str, Any],
    batch_size: int,
) -> list[Rollout]:
    """Completions d1's way; arguments as of `ar2diff.rollouts.sample`."""
    found: list[Rollout] = []
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        found += _canvases(checkpoint, prompts[rows], seeds[rows], settings)
    return found


def _canvases(
    checkpoint: Checkpoint, prompts: Any, seeds: Any, settings: dict[str, Any]
) -> list[Rollout]:
    spec, grid = checkpoint.spec, checkpoint.spec.block_length
    suppressed = [spec.mask_token_id, *settings.get("suppress_tokens", ())]
    asked = torch.tensor([len(prompt) for prompt in prompts])
    length = -(-(asked + settings["max_new_tokens"]) // grid) * grid
    pos = torch.arange(int(length.max())).expand(len(prompts), -1)
    ids = torch.full(pos.shape, spec.mask_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    step = torch.zeros_like(ids)
    generators = [keyed_generator(seed) for seed in seeds]
    forwards = 0
    for block in range(int((length // grid - asked // grid).max())):
        start = (asked // grid + block) * grid
        inside = (pos >= start[:, None]) & (pos < start[:, None] + grid) & (pos < length[:, None])
        while (masked := inside & (ids == spec.mask_token_id)).any():
            forwards += 1
            logits = _whole_canvas(checkpoint, ids, pos, start, length)
            logits[..., suppressed] = float("-inf")
            noise = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators])
            tokens = (logits - (-noise.log()).log()).argmax(-1)
            sure = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            best = sure.masked_fill(~masked, -1).topk(TOKENS_A_STEP, -1).indices
            now = torch.zeros_like(masked).scatter(1, best, True) & masked
            ids, step = torch.where(now, tokens, ids), step.masked_fill(now, forwards)
    found = []
    for row, (begin, end) in enumerate(zip(asked.tolist(), length.tolist(), strict=True)):
        new = ids[row, begin : begin + settings["max_new_tokens"]].tolist()
        stops = [n for n, token in enumerate(new, 1) if token in checkpoint.end_ids]
        answer = stops[0] if stops else len(new)
        found.append(Rollout(ids[row, :end], begin, answer, step[row, :end], seeds[row], forwards))
    return found


def _whole_canvas(
    checkpoint: Checkpoint, ids: Tensor, pos: Tensor, start: Tensor, length: Tensor
) -> Tensor:
    """Logits [B, T, V] of each position's own token."""
    spec, model = checkpoint.spec, checkpoint.model
    doc = torch.where(pos < length[:, None], 0, PADDING)
    slots = Slots(doc, pos, pos >= start[:, None])
    mask = model_mask(model, slots, spec.attention, spec.block_length, spec.local_window)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits
    return logits.roll(1, 1) if spec.prediction == "shift" else logits


def trainer_of(model: str, data: Path, run_dir: Path, fields: Sequence[str], d1: bool) -> Any:
    """A trainer that was not started."""
    given = [f"data.sources=[{data}]", "train.schedule=constant", "rl.show_steps=0", *fields]
    given += ["rl.estimator=one_step"] if d1 else []
    plan = RL.prepare(Path(model), load_recipe("demo-rl", given))
    trainer = plan.make_trainer(plan, run_dir, [])
    if d1:  # completions are scored whether something can be learned from them or not
        trainer._loss_of_live_rows = partial(GRPOTrainer._compute_loss, trainer)
    return trainer


def steps(trainer: Any, sample: Any) -> Iterator[tuple[float, float, float]]:
    """Train; seconds, seconds of rollouts and reward of each step."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    for batch in trainer.get_train_dataloader():
        grpo.sample, start = sample, time.perf_counter()
        trainer.training_step(model, batch, None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        share = trainer._metrics["train"]["generation_share"][-1]
        seconds = time.perf_counter() - start
        yield seconds, share * seconds, trainer._metrics["train"]["reward"][-1]


def main() -> None:
    """Interleave, write the steps, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="runs/rl/demo-easy-diffusion")
    parser.add_argument("overrides", nargs="*", help="recipe fields, of both")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("runs/rl-speed"))
    parser.add_argument("--output", type=Path, default=RESULTS / "rl_speed.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = grpo.sample
    ways = {
        name: steps(trainer_of(args.model, args.data, args.work / name, args.overrides, d1), sample)
        for name, d1, sample in (("ours", False, own), ("d1", True, d1_sample))
    }
    rows = []
    for number in range(1, args.steps + 1):
        for name, way in ways.items():
            seconds, rollouts, reward = next(way)
            rows.append({"step": number, "way": name, "seconds": round(seconds, 3),
                         "rollouts": round(rollouts, 3), "reward": round(reward, 4)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n| way | s a step (median) | of it rollouts | reward, first / last five steps |")
    print("|---|---|---|---|")
    for name in ways:
        mine = [row for row in rows if row["way"] == name]
        both = [statistics.median(row[k] for row in mine) for k in ("seconds", "rollouts")]
        ends = [statistics.fmean(r["reward"] for r in part) for part in (mine[:5], mine[-5:])]
        print(f"| {name} | {both[0]:.2f} | {both[1]:.2f} | {ends[0]:.3f} / {ends[1]:.3f} |")
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    print(f"\nd1 / ours, median of {len(pairs)} pairs: {statistics.median(pairs):.2f}")


if __name__ == "__main__":
    main()
