"""Rebuilds the embedded demo checkpoint: ``python -m ar2diff.demo.build``; with ``--draft``, the
draft adapter beside it.

Generates the corpus, trains a tokenizer and a small LLaMA from scratch on one CPU core, measures
both on held-out stories and saves everything that ``AutoModelForCausalLM`` and ``AutoTokenizer``
need.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from . import corpus

MODEL_DIR = Path(__file__).parent / "model"
DRAFT_DIR = Path(__file__).parent / "draft"
DRAFT_STORIES, DRAFT_LEVELS = 8_000, (0, 1, 1, 2, 2, 3, 4)
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2 as in LLaMA; there is no pad and no mask token
BOS, EOS = 1, 2
VOCAB_SIZE = 896
CONTEXT = 256  # tokens; the longest documents have about 170
BATCH_TOKENS = 2048
LEARNING_RATE = 3e-3


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE whose words carry their leading space and whose digits stand alone."""
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]|\n| ?[^\sA-Za-z0-9]+|\s"), "isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL) - 256, show_progress=False)
    )
    # The trainer knows no byte fallback: the special and the byte tokens go before what it learnt.
    learnt = json.loads(learner.to_str())["model"]
    pieces = (
        SPECIAL
        + [f"<0x{byte:02X}>" for byte in range(256)]
        + sorted(learnt["vocab"], key=learnt["vocab"].get)
    )
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = split
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def new_model(vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=None,
            initializer_range=0.05,
        )
    )


def encode(tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict]) -> list[list[int]]:
    """Token ids of whole documents, ``<s> text </s>``, cut at the context length."""
    rows = tokenizer([corpus.text(e) for e in examples])["input_ids"]
    return [([*row, EOS])[:CONTEXT] for row in rows]


def batches(rows: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of about ``BATCH_TOKENS`` tokens, as (inputs, labels), both (batch, length).

    Rows of like length go together. Padding on the right needs no attention mask in a causal
    model; its labels are -100.
    """
    rows, start = sorted(rows, key=len), 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * len(rows[stop]) <= BATCH_TOKENS:
            stop += 1
        length = len(rows[stop - 1])
        inputs = torch.tensor([r + [EOS] * (length - len(r)) for r in rows[start:stop]])
        ends = torch.tensor([len(r) for r in rows[start:stop]])
        yield inputs, inputs.masked_fill(torch.arange(length) >= ends[:, None], -100)
        start = stop


def training_batches(
    tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh training documents; none is seen twice but by chance."""
    generator = torch.Generator().manual_seed(seed)
    for part in range(seed * 100_000, (seed + 1) * 100_000):
        found = list(batches(encode(tokenizer, corpus.corpus(2048, part, corpus.PRETRAIN_LEVELS))))
        for i in torch.randperm(len(found), generator=generator).tolist():
            yield found[i]


def warm_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then half a cosine."""
    warmup = min(100, steps // 10 + 1)
    return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def name_tokenizer_class(folder: Path) -> None:
    """Give a saved tokenizer the class name that transformers 4 and 5 both know; 5 writes one of
    its own."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int
) -> int:
    """AdamW with a short warm-up and a cosine decay; returns the number of tokens seen."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.1), dict(params=kept, weight_decay=0.0)],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    tokens, began = 0, time.time()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    model.train()
    for step, (inputs, labels) in zip(
        range(1, steps + 1), training_batches(tokenizer, seed), strict=False
    ):
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int((labels != -100).sum())
        if step % 50 == 0 or step == steps:
            print(
                f"step {step} loss {loss.item():.3f} tokens {tokens} "
                f"seconds {time.time() - began:.0f}",
                flush=True,
            )
        if step % 1000 == 0:
            probe = ", ".join(
                f"{accuracy(model, tokenizer, level, n=40):.2f}" for level in (1, 2, 3, 4)
            )
            print(
                f"held-out nll {held_out_nll(model, tokenizer, n=100):.4f}, "
                f"accuracy by level {probe}",
                flush=True,
            )
            model.train()
    return tokens


@torch.no_grad()
def held_out_nll(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, n: int = 500, seed: int = 0
) -> float:
    """Mean negative log-likelihood in nats per token over ``n`` validation documents."""
    model.eval()
    total, count = 0.0, 0
    rows = encode(tokenizer, corpus.corpus(n, seed, corpus.PRETRAIN_LEVELS, split="valid"))
    for inputs, labels in batches(rows):
        targets = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=inputs, labels=labels).loss.item() * targets
        count += targets
    return total / count


@torch.no_grad()
def complete(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **settings
) -> list[str]:
    """Completions of the prompts, greedy unless ``settings`` for ``generate`` say otherwise."""
    model.eval()
    # Prompts of equal length share a batch: with no pad token there is no left padding.
    groups, completions = defaultdict(list), [""] * len(prompts)
    for i, ids in enumerate(tokenizer(prompts)["input_ids"]):
        groups[len(ids)].append((i, ids))
    for length, group in groups.items():
        inputs = torch.tensor([ids for _, ids in group])
        output = model.generate(
            inputs,
            **{
                "attention_mask": torch.ones_like(inputs),
                "do_sample": False,
                "max_new_tokens": 60,
                "pad_token_id": EOS,
                **settings,
            },
        )
        decoded = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for (i, _), completion in zip(group, decoded, strict=False):
            completions[i] = completion
    return completions


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    level: int,
    n: int = 200,
    seed: int = 0,
) -> float:
    """Share of held-out questions of a level that greedy decoding answers with the right number."""
    examples = list(corpus.corpus(n, seed, (level,), split="valid"))
    completions = complete(model, tokenizer, [corpus.prompt(e) for e in examples])
    return sum(map(corpus.score, examples, completions)) / n


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# ar2diff demo checkpoint

A small autoregressive LLaMA ({parameters:,} parameters, float32) that writes short children's
stories and answers counting questions about them with a worked sum. It is what ar2diff converts
when no checkpoint is named, in its tests and in its examples; it is no use for anything else.

## How it was made

    python -m ar2diff.demo.build --steps {steps} --seed {seed}

trained it from scratch on {tokens:,} tokens of documents generated by `ar2diff/demo/corpus.py`
({minutes:.0f} minutes on one CPU core). No other text and no other model's weights or output went
into it. The tokenizer is a byte-fallback BPE of {vocab} pieces: `<s>` (id 1) starts a document,
`</s>` (id 2) ends it, digits stand alone, and there is no pad and no mask token.

## Measured on held-out documents

| measure | value |
|---|---|
| negative log-likelihood, nats per token (500 documents) | {nll:.4f} |
{rows}

Accuracy is the share of 200 questions per level whose last "The answer is N." is right under
greedy decoding. Held-out stories come from the generator too, and never occur in training.

## Licence

Apache-2.0, weights and tokenizer alike; see the LICENSE file of ar2diff.
"""


def build(output_dir: Path, steps: int, seed: int) -> None:
    """Trains, measures and saves; ``output_dir`` then holds a complete checkpoint."""
    torch.set_num_threads(1)  # the figures in the model card are for one core
    torch.manual_seed(seed)
    began = time.time()
    tokenizer = train_tokenizer(
        corpus.text(e) for e in corpus.corpus(20_000, seed, corpus.PRETRAIN_LEVELS)
    )
    model = new_model(len(tokenizer))
    tokens = train(model, tokenizer, steps, seed)
    figures = dict(
        steps=steps,
        seed=seed,
        tokens=tokens,
        vocab=len(tokenizer),
        parameters=model.num_parameters(),
        minutes=(time.time() - began) / 60,
        nll=held_out_nll(model, tokenizer),
    )
    rows = []
    for level in (1, 2, 3, 4):
        rows.append(f"| greedy accuracy, level {level} | {accuracy(model, tokenizer, level):.3f} |")
    print(figures, *rows, sep="\n")
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    name_tokenizer_class(output_dir)
    (output_dir / "README.md").write_text(CARD.format(**figures, rows="\n".join(rows)))


def build_draft(output_dir: Path) -> None:
    """Trains a draft adapter for the checkpoint; ``output_dir`` then holds its two files."""
    from .. import draft

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data, begun, made = (Path(scratch) / name for name in ("a.jsonl", "b.jsonl", "draft"))
        corpus.write_stories(data, DRAFT_STORIES, DRAFT_LEVELS)
        corpus.write_stories(begun, DRAFT_STORIES, DRAFT_LEVELS, seed=2)
        own = {"data.self.prompts": str(begun)}
        print(draft(MODEL_DIR, "draft-demo", made, data=data, overrides=own))
        spec = json.loads((made / "draft.json").read_text()) | {"base": "../model"}
        output_dir.mkdir(exist_ok=True)
        (output_dir / "draft.json").write_text(json.dumps(spec, indent=2) + "\n")
        shutil.copy(made / "draft.safetensors", output_dir)


def main() -> None:
    """Build the checkpoint, or the draft adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", action="store_true")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.draft:
        build_draft(args.output_dir or DRAFT_DIR)
    else:
        build(args.output_dir or MODEL_DIR, args.steps, args.seed)


if __name__ == "__main__":
    main()
