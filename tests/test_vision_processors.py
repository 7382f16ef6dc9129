"""Classes whose processors need Pillow alone, from a folder with pixels to answers: the processor's
own ids, a conversion, a step of training, and what is decoded, against the stock class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from vision import TYPED, picture
from vision_classes import CONFIGS, REACH

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.core.generate import generate
from ar2diff.data.album import Album
from ar2diff.data.conversations import read_conversations, tokenize_conversations

MARKS = {"gemma3": {"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "<eoi>"}}
KINDS = ("llava", "llava_next", "idefics3", "paligemma", "paligemma2", "gemma3")
WORDS = "how many what is in the picture ? a b c d e f one two three four five and .".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|mask_me|>", "<|user|>", "<|assistant|>"]
PLAIN = {"height": 16, "width": 16}
NEW = 8


def tokenizer_of(name: str) -> Any:
    marks = MARKS.get(name, {"image_token": "<image>"})
    words = [*SPECIAL, *WORDS]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=SPECIAL[4:], extra_special_tokens=marks,
    )  # fmt: skip


def processor_of(name: str, tokenizer: Any) -> Any:
    if name in ("llava", "llava_next"):
        kind = hf.LlavaProcessor if name == "llava" else hf.LlavaNextProcessor
        seen: Any = hf.SiglipImageProcessorPil(size=PLAIN)
        if name == "llava_next":
            seen = hf.LlavaNextImageProcessorPil(
                size={"shortest_edge": 16}, crop_size=PLAIN, image_grid_pinpoints=[[16, 32]]
            )
        return kind(
            seen, tokenizer, patch_size=4, vision_feature_select_strategy="full",
            image_token="<image>", chat_template=TYPED,
        )  # fmt: skip
    if name == "idefics3":
        seen = hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16},
            do_image_splitting=False,
        )  # fmt: skip
        return hf.Idefics3Processor(seen, tokenizer, image_seq_len=4, chat_template=TYPED)
    seen = hf.SiglipImageProcessorPil(size=PLAIN)
    if name == "gemma3":
        return hf.Gemma3Processor(
            hf.Gemma3ImageProcessorPil(size=PLAIN), tokenizer, image_seq_length=4,
            chat_template=TYPED,
        )  # fmt: skip
    seen.image_seq_length = 16
    return hf.PaliGemmaProcessor(seen, tokenizer, chat_template=TYPED)


def folder_of(name: str, folder: Path) -> Path:
    """A checkpoint of a class with random weights, and its processor."""
    tokenizer = tokenizer_of(name)
    processor = processor_of(name, tokenizer)
    config = CONFIGS[name]()
    token = tokenizer.convert_tokens_to_ids("<soft>" if name == "gemma3" else "<image>")
    config.image_token_id = token
    if name == "gemma3":
        config.boi_token_index, config.eoi_token_index = (
            tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<eoi>")
        )
    if name == "llava_next":
        config.image_grid_pinpoints = [[16, 32]]
    text = config.get_text_config()
    text.vocab_size, text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        len(tokenizer), 1, 2, 3,
    )  # fmt: skip
    for part in (config, text):
        part.tie_word_embeddings = False
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """Conversations about one and about two pictures of several sizes."""
    rows = []
    for number in range(4):
        parts: list[dict[str, Any]] = [{"type": "text", "text": "how many ?"}]
        for own in range(number % 2 + 1):
            name = f"{2 * number + own}.png"
            picture(2 * number + own).save(folder / name)
            parts.insert(own, {"type": "image", "path": name})
        answer = [{"type": "text", "text": "one two three four five and a b c d"}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def as_stock(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row's messages with pictures in place of their paths."""
    from PIL import Image

    return [
        {
            **message,
            "content": [
                {"type": "image", "image": Image.open(folder / part["path"])}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in row["messages"]
    ]


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_with_pictures_goes_through_every_step(name, tmp_path):
    base, rows = folder_of(name, tmp_path / "base"), rows_in(tmp_path)
    stock = hf.AutoProcessor.from_pretrained(base)
    given = load_checkpoint(str(base))
    data = with_values(load_recipe(None), data={"sources": [str(tmp_path / "rows.jsonl")]})
    album = Album(given.processor, given.model)
    found = tokenize_conversations(read_conversations(data), given.tokenizer, data, album)
    token = given.model.config.image_token_id
    for row, ids in zip(rows, found.ids, strict=True):
        wanted = stock.apply_chat_template(
            as_stock(row, tmp_path), tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0]
        assert [token if one < 0 else one for one in ids.tolist()] == wanted.tolist()

    small = ["convert.block_length=4", "data.max_length=128"]
    settings = [*small, "train.per_device_train_batch_size=2", "eval.steps=0"]
    ar2diff.adapt(base, None, tmp_path / "whole", max_steps=0, overrides=small)
    ar2diff.sft(
        tmp_path / "whole", None, tmp_path / "tuned", data=tmp_path / "rows.jsonl", max_steps=1,
        overrides=settings,
    )  # fmt: skip
    for folder in ("whole", "tuned"):
        made = load_checkpoint(str(tmp_path / folder))
        assert made.spec.images == REACH.get(name, "causal")
    whole = load_checkpoint(str(tmp_path / "whole")).model
    for key, tensor in given.model.state_dict().items():
        assert torch.equal(whole.state_dict()[key][: len(tensor)], tensor), key

    asked = [as_stock(row, tmp_path)[:1] for row in rows[: 1 if name[:4] == "pali" else 4]]
    inputs = stock.apply_chat_template(
        asked, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip
    inputs.pop("labels", None)
    width = inputs["input_ids"].shape[1]
    whole.generation_config.eos_token_id = None
    never = whole.generation_config.suppress_tokens
    plain = whole.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=never
    )[:, width:]  # fmt: skip

    def ours(**options: Any) -> Any:
        return generate(model=whole, **inputs, max_new_tokens=NEW, **options)[:, width:]

    assert torch.equal(ours(mode="ar"), plain) and torch.equal(ours(mode="speculative"), plain)
    denoised = ours(mode="diffusion", threshold=0.2)
    assert torch.equal(ours(mode="diffusion", threshold=0.2, use_cache=False), denoised)
