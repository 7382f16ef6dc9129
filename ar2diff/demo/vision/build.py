"""Rebuilds the embedded vision checkpoint: ``python -m ar2diff.demo.vision.build``.

Trains a vision tower to read one digit a patch, then a projector and a small LLaMA from scratch on
conversations about generated pictures, on one CPU core; measures them on held-out handwriting and
saves everything that ``AutoModelForImageTextToText`` and ``AutoProcessor`` need.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from ..build import name_tokenizer_class, warm_cosine
from . import scenes
from .architecture import BOS, EOS, IMAGE, PAD, PATCHES, new_model, new_processor
from .digits import SOURCE, SPLITS, sheet

MODEL_DIR = Path(__file__).parent / "model"
CHECK = 1000
TOWER_STEPS, STEPS = 2000, 3000
ROWS, TURNS = 16, 3  # conversations of a batch, questions of a conversation


def varied(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (N, 8, 8) from 0 to 1, each turned, scaled, sheared and moved by about a pixel, drawn
    thicker or thinner, some with noise: other hands write the held-out digits."""
    n = len(tiles)

    def within(reach: float) -> torch.Tensor:
        return (torch.rand(n) * 2 - 1) * reach

    turn, shear, x, y = within(math.pi / 12), within(0.15), within(0.3), within(0.3)
    scale = 1 + within(0.15)
    rows = [scale * turn.cos(), shear - turn.sin(), x, turn.sin(), scale * turn.cos(), y]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), (n, 1, 8, 8), align_corners=False)
    moved = F.grid_sample(tiles[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)
    moved = moved ** within(0.4).exp()[:, None, None] * (1 + 0.2 * torch.randn(n, 1, 1))
    noise = 0.1 * torch.randn_like(moved) * (torch.rand(n, 1, 1) < 0.5)
    return (moved + noise).clamp(0, 1)


def cells(drawn: np.ndarray, vary: bool) -> torch.Tensor:
    """Pixel values (N, 3, 32, 32), from -1 to 1, of pictures given as digits of the sheet
    (N, 16), with -1 for an empty cell."""
    drawn = torch.as_tensor(drawn)
    tiles = torch.from_numpy(sheet()[0])[drawn.clamp(min=0)].float() / 255
    if vary:
        tiles = varied(tiles.view(-1, 8, 8)).view(tiles.shape)
    tiles = tiles * (drawn >= 0)[..., None, None]
    pixels = tiles.view(-1, scenes.SIDE, scenes.SIDE, 8, 8).transpose(2, 3).reshape(-1, 1, 32, 32)
    return pixels.expand(-1, 3, -1, -1) * 2 - 1


def optimize(
    parameters: list[torch.nn.Parameter], losses: Iterator[torch.Tensor], steps: int, rate: float
) -> None:
    """AdamW over `steps` of the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    change = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    began = time.process_time()
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        change.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            used = time.process_time() - began
            print(f"step {step} loss {loss.item():.4f} CPU seconds {used:.0f}", flush=True)


def tower_losses(
    tower: torch.nn.Module, head: torch.nn.Module, seed: int
) -> Iterator[torch.Tensor]:
    """Cross entropy of which digit, or none, each patch of 64 random pictures shows."""
    rng, labels = np.random.default_rng(seed), sheet()[1]
    while True:
        drawn = rng.choice(SPLITS["train"], (64, PATCHES))
        drawn[rng.random(drawn.shape) < rng.uniform(0.1, 0.95, (64, 1))] = -1
        target = torch.as_tensor(np.where(drawn >= 0, labels[drawn], 10))
        logits = head(tower(cells(drawn, vary=True)).last_hidden_state)
        yield F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def tower_accuracy(tower: torch.nn.Module, head: torch.nn.Module, count: int = 4000) -> float:
    """Share of the digits in held-out pictures that the tower reads right."""
    rng, drawn = random.Random(0), np.full((count, PATCHES), -1)
    for row in drawn:
        place(row, scenes.draw(rng, "held_out"))
    read = head(tower(cells(drawn, vary=False)).last_hidden_state).argmax(-1).numpy()
    return (read == sheet()[1][drawn])[drawn >= 0].mean().item()


def place(row: np.ndarray, scene: scenes.Scene) -> None:
    """Write the digits of a scene into a row (16,) of what `cells` takes."""
    row[list(scene.drawn)] = list(scene.drawn.values())


def draw_conversation(rng: random.Random) -> tuple[scenes.Scene, list[dict]]:
    """A training picture and questions about it."""
    scene = scenes.draw(rng, "train", (1, 6) if rng.random() < 0.2 else scenes.DIGITS)
    turns = [scenes.ask(rng, kind, scene) for kind in rng.sample(scenes.KINDS, TURNS)]
    return scene, scenes.conversation(turns, None)


def batch(processor: LlavaProcessor, rng: random.Random) -> dict[str, torch.Tensor]:
    """Conversations as what the model takes: ids and labels (ROWS, length), padded on the right,
    and pixel values."""
    rows, drawn = [], np.full((ROWS, PATCHES), -1)
    for row in drawn:
        scene, messages = draw_conversation(rng)
        place(row, scene)
        rows.append(messages)
    found = processor.tokenizer.apply_chat_template(
        rows, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = [], []
    for row, mask in zip(found["input_ids"], found["assistant_masks"], strict=True):
        row, mask = np.array(row), np.array(mask)
        times = np.where(row == IMAGE, PATCHES, 1)  # as the processor writes a picture
        ids.append(torch.as_tensor(row.repeat(times)))
        labels.append(torch.as_tensor(np.where(mask, row, -100).repeat(times)))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=PAD),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "pixel_values": cells(drawn, vary=True),
    }


def losses(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int
) -> Iterator[torch.Tensor]:
    """Cross entropy of the answers of fresh conversations."""
    rng = random.Random(seed)
    for step in itertools.count(1):
        yield model(**batch(processor, rng)).loss
        if step % CHECK == 0:
            print(step, exact_match(model, processor, 40), flush=True)
            model.train()


@torch.no_grad()
def replies(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: list[dict], **settings
) -> list[str]:
    """What the model answers to the first question of each row, greedily unless ``settings`` for
    ``generate`` say otherwise."""
    model.eval()
    prompts = [row["messages"][:1] for row in rows]
    inputs = processor.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 60, **settings})
    return processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def exact_match(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    count: int,
    digits: tuple[int, int] = scenes.DIGITS,
    seed: int = 0,
) -> dict[str, float]:
    """Share of `count` held-out questions of each kind whose greedy answer is right to the
    letter."""
    found = {}
    for kind in scenes.KINDS:
        rows = list(scenes.scenes(count, seed, "held_out", [kind], digits))
        pairs = zip(replies(model, processor, rows), map(scenes.right_answer, rows), strict=True)
        found[kind] = sum(said == right for said, right in pairs) / count
    return found


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# ar2diff demo checkpoint for pictures

A small autoregressive Llava ({parameters:,} parameters, float16: a SigLIP tower, a projector and a
LLaMA) that answers questions about pictures of 32 x 32 pixels with up to four handwritten digits.
It is what ar2diff converts into a diffusion model when a vision-language checkpoint is needed in
its tests and examples; it is no use for anything else. `AutoProcessor` needs Pillow, not
torchvision.

## How it was made

    python -m ar2diff.demo.vision.build --tower-steps {tower_steps} --steps {steps} --seed {seed}

trained it from scratch in {seconds:,.0f} CPU seconds on one core: the tower to read one digit in
each of its 16 patches, then, with the tower fixed, projector and language model on {answers:,}
answers about {pictures:,} pictures that `ar2diff/demo/vision/scenes.py` generates. No other model's
weights or output went into it. Another processor rounds otherwise and so gives other weights. The
tokenizer knows the {vocab} words of the questions and answers and four reserved
tokens. One placeholder `<image>` becomes 16 tokens.

## Measured on held-out handwriting

The share of greedy answers that are right to the letter, of {count} questions of each kind. The
digits in these pictures are the last 300 of the data set; training saw the first 1,497 alone. The
tower by itself reads {read:.1%} of the held-out digits, and an answer that names three needs all
three. A fifth of the training pictures had one to six digits, none had more: the harder columns
are there for reinforcement learning.

| question | {levels} |
|---|{rule}
{rows}

## Licence

Apache-2.0, weights and tokenizer alike; see the LICENSE file of ar2diff. The handwritten digits are
of another source, under CC BY 4.0: {source}.
"""
LEVELS = {"2 to 4 digits": (2, 4), "5 or 6 digits": (5, 6), "7 to 9 digits": (7, 9)}


def card_rows(found: dict[str, dict[str, float]]) -> str:
    """A line of the card's table for each kind of question; `found` is by level, then by kind."""
    return "\n".join(
        f"| {scenes.QUESTIONS[kind].format(place='c2')} | "
        + " | ".join(f"{by_kind[kind]:.3f}" for by_kind in found.values())
        + " |"
        for kind in scenes.KINDS
    )


def build(output_dir: Path, tower_steps: int, steps: int, seed: int, count: int = 400) -> None:
    """Trains, saves and measures; ``output_dir`` then holds a complete checkpoint."""
    torch.set_num_threads(1)  # the figures in the model card are for one core
    torch.manual_seed(seed)
    began = time.process_time()
    processor = new_processor()
    model = new_model(len(processor.tokenizer))
    tower = model.model.vision_tower
    head = torch.nn.Linear(model.config.vision_config.hidden_size, 11)
    both = [*tower.parameters(), *head.parameters()]
    optimize(both, tower_losses(tower, head, seed), tower_steps, 1.5e-3)
    read = tower_accuracy(tower, head)
    print(f"held-out digits read by the tower {read:.4f}", flush=True)
    tower.requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    optimize(rest, losses(model, processor, seed), steps, 3e-3)
    seconds = time.process_time() - began
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.requires_grad_(True).to(torch.float16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    name_tokenizer_class(output_dir)
    found = {name: exact_match(model, processor, count, span) for name, span in LEVELS.items()}
    card = CARD.format(
        parameters=model.num_parameters(), tower_steps=tower_steps, steps=steps, seed=seed,
        seconds=seconds, answers=steps * ROWS * TURNS, pictures=steps * ROWS,
        vocab=len(processor.tokenizer), count=count, read=read, levels=" | ".join(LEVELS),
        rule="---|" * len(LEVELS), rows=card_rows(found), source=SOURCE,
    )  # fmt: skip
    print(card)
    (output_dir / "README.md").write_text(card)


def main() -> None:
    """Build the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.output_dir, args.tower_steps, args.steps, args.seed)


if __name__ == "__main__":
    main()
