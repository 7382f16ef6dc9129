"""What the cases start from: tiny bases, what ar2diff makes of them, and sound rows."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import sandbox

LLAMA = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1,
    "max_position_embeddings": 128, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "Tom Lily had 3 apples and gave 2 to the cat. Then they sat on a mat, 007 true null.".split()
)
ADAPT = ["data.max_length=32", "train.per_device_train_batch_size=2", "train.logging_steps=1"]
LORA = ["peft={method: lora, r: 2, alpha: 4, targets: all-linear}"]
# A name: how it is made; @ marks what lies in the stock.
MADE: dict[str, tuple[str, ...]] = {
    "causal": ("adapt", "@base", "--max-steps", "0", *ADAPT),
    "full": (
        "adapt", "@base", "--max-steps", "0", *ADAPT, "convert.attention=full",
        "convert.block_length=null", "objective.ar_weight=0", "noise.time=document",
    ),
    "block": (
        "adapt", "@qwen", "--max-steps", "0", *ADAPT, "convert.attention=block_causal",
        "convert.block_length=4", "convert.prediction=same", "objective.ar_weight=0",
    ),
    "adapter": (
        "adapt", "@causal", "--max-steps", "1", "--data", "@texts.jsonl", *ADAPT, *LORA,
    ),
}  # fmt: skip
# Command lines after which the parent imports what their children had to.
WARMING = [
    ("check", "@adapter"), ("generate", "@causal", "--prompt", "Tom", "--max-new-tokens", "2"),
    ("eval", "@causal", "--data", "@texts.jsonl", "--length", "8", "--limit", "1"),
    ("sft", "@causal", "--data", "@chats.jsonl", "--max-steps", "1", "--output-dir", "o1", *ADAPT),
    ("rl", "@causal", "--data", "@asked.jsonl", "--max-steps", "1", "--output-dir", "o2", *ADAPT,
     "rl.rewards=[{name: exact}]", "rl.num_generations=2", "rl.max_completion_length=4"),
    ("merge", "@adapter", "o3"), ("export", "@causal", "--to", "ar", "--output-dir", "o4"),
    ("import", "@sdar", "--output-dir", "o5"), ("memory", "@causal"), ("recipes", "ls"),
    ("push", "@causal", "a/b", "--dry-run", "--license", "mit"), ("doctor",),
]  # fmt: skip


def rows() -> dict[str, list[Any]]:
    """Sound rows by kind."""
    draw = random.Random(0)

    def say(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    return {
        "texts": [{"text": say(12)} for _ in range(8)],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": say(4)},
                    {"role": "assistant", "content": say(4)},
                ]
            }
            for _ in range(8)
        ],
        "asked": [{"prompt": say(3), "completion": say(3), "answer": "3"} for _ in range(8)],
        "prompts": [{"prompt": say(3)} for _ in range(3)],
    }


def build(root: Path) -> None:
    """Write `root/stock`; import on the way what the verbs import."""
    import torch
    import transformers

    stock = root / "stock"
    stock.mkdir()
    tokenizer = _tokenizer()
    for name, kind in (("base", "Llama"), ("qwen", "Qwen3")):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**LLAMA)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        model.save_pretrained(stock / name)
        tokenizer.save_pretrained(stock / name)
    for name, lines in rows().items():
        (stock / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    _others(stock, tokenizer)
    for name, line in MADE.items():
        _run(root, line, [stock / name, "--output-dir"])
    for line in WARMING:
        _run(root, line, [])


def _run(root: Path, line: tuple[str, ...], output: list[Any]) -> None:
    """Run a line that has to end well, and import here what it imported."""
    stock = root / "stock"
    clear(root)
    words = [str(stock / w[1:]) if w.startswith("@") else w for w in line]
    if output:
        words += ["--output-dir", "made"]
    outcome = sandbox.run(root, words, b"")
    if outcome.code != 0:
        sys.exit(f"the stock cannot be built: ar2diff {' '.join(line)}\n{outcome.err[-4000:]}")
    if output:
        shutil.move(root / "case" / "work" / "made", output[0])
    for name in outcome.modules:
        try:
            __import__(name)
        except Exception:  # a module that only another one imports
            continue


def _others(stock: Path, tokenizer: Any) -> None:
    """Checkpoints of other families, as the tests make them."""
    import copy

    import foreign

    theirs = copy.deepcopy(tokenizer)
    theirs.add_special_tokens({"extra_special_tokens": list(foreign.SPECIAL)})
    theirs.pad_token = "</s>"
    for name in ("dream", "llada", "sdar", "a2d_llama"):
        foreign.save(foreign.FAMILIES[name][0](), stock / name, theirs)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def clear(root: Path) -> Path:
    """An empty folder of a case, with a home and a place to work in; where it works."""
    for name in ("case", "tmp"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("case/home", "case/work", "tmp"):
        (root / name).mkdir(parents=True)
    return root / "case" / "work"
