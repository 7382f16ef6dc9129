"""Tiny random models of every stock vision-language class that is supported, and what a processor
would make of texts with images for them: tensors alone, as some processors need more packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from ar2diff.core.images import prepare

ROWS, IMAGE, VIDEO, BEGIN, END, MASK = 64, 60, 59, 58, 57, 61
TEXT = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = TEXT | {"head_dim": 8}
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
SIGLIP = TOWER | {"vision_use_head": False, "model_type": "siglip_vision_model"}
WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
QWEN = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
GRIDS = ((4, 8), (4, 4), (8, 4))  # patches of the images that Qwen's classes get


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.LlamaConfig(**HEADS),
        image_token_id=IMAGE, **WHOLE,
    )  # fmt: skip


def _llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.LlamaConfig(**HEADS),
        image_token_id=IMAGE, image_grid_pinpoints=[[16, 16], [32, 32]], **WHOLE,
    )  # fmt: skip


def _llava_onevision() -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=[[16, 16], [32, 32]],
        **WHOLE,
    )  # fmt: skip


def _qwen2_vl() -> Any:
    tower = PATCHES | {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = HEADS | {"rope_parameters": MROPE}
    return hf.Qwen2VLConfig(vision_config=tower, text_config=text, **QWEN)


def _qwen2_5_vl() -> Any:
    tower = PATCHES | {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = HEADS | {"rope_parameters": MROPE}
    return hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **QWEN)


def _qwen3_vl() -> Any:
    tower = PATCHES | {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = HEADS | {"rope_parameters": MROPE}
    return hf.Qwen3VLConfig(vision_config=tower, text_config=text, **QWEN)


def _idefics3() -> Any:
    return hf.Idefics3Config(
        vision_config=TOWER, text_config=hf.LlamaConfig(**HEADS), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip


def _smolvlm() -> Any:
    return hf.SmolVLMConfig(
        vision_config=TOWER, text_config=hf.LlamaConfig(**HEADS), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip


def _paligemma() -> Any:
    return hf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=hf.GemmaConfig(**HEADS), image_token_id=IMAGE,
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip


def _paligemma2() -> Any:
    text = hf.Gemma2Config(**HEADS, sliding_window=256)
    return hf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip


def _gemma3() -> Any:
    text = hf.Gemma3TextConfig(
        **HEADS, sliding_window=256, layer_types=["sliding_attention", "full_attention"]
    )
    return hf.Gemma3Config(
        vision_config=SIGLIP, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE,
        boi_token_index=BEGIN, eoi_token_index=END, mm_tokens_per_image=4,
    )  # fmt: skip


def _internvl() -> Any:
    tower = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    return hf.InternVLConfig(
        vision_config=tower, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE,
        image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip


CONFIGS = {
    "llava": _llava, "llava_next": _llava_next, "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics3, "smolvlm": _smolvlm, "paligemma": _paligemma,
    "paligemma2": _paligemma2, "gemma3": _gemma3, "internvl": _internvl,
}  # fmt: skip
REACH = {"paligemma": "prefix", "paligemma2": "prefix", "gemma3": "image"}  # the others: causal
SIZES = {  # placeholders of an image; of Qwen's classes those of its grid
    "llava": 16, "llava_next": 36, "llava_onevision": 36, "idefics3": 4, "smolvlm": 4,
    "paligemma": 16, "paligemma2": 16, "gemma3": 4, "internvl": 4,
}  # fmt: skip


@dataclass
class VisionClass:
    """A model of a class, in eval mode and with attention of our own choice."""

    name: str
    model: Any

    @property
    def is_qwen(self) -> bool:
        return self.name.startswith("qwen")

    @property
    def reach(self) -> str:
        return REACH.get(self.name, "causal")

    def size(self, number: int) -> int:
        """Placeholders of an image."""
        if not self.is_qwen:
            return SIZES[self.name]
        height, width = GRIDS[number % len(GRIDS)]
        return height * width // 4

    def inputs(self, rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """What a processor makes of rows of word ids and `Picture` numbers `("image", n)`, padded
        on the left."""
        texts, numbers = [], []
        for row in rows:
            ids = []
            for part in row:
                if isinstance(part, tuple):
                    ids += [IMAGE] * self.size(part[1])
                    numbers.append(part[1])
                else:
                    ids.append(part)
            texts.append(ids)
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        real = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        found = {"input_ids": ids, "attention_mask": real, **self.pixels(numbers)}
        if self.is_qwen:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
        if self.reach == "image":
            found["token_type_ids"] = (ids == IMAGE).long()
        if self.reach == "prefix":
            found["token_type_ids"] = 0 * ids
        return found

    def pixels(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What a processor makes of images."""
        if not numbers:
            return {}
        drawn = [torch.Generator().manual_seed(number) for number in numbers]
        if self.is_qwen:
            grids = [GRIDS[number % len(GRIDS)] for number in numbers]
            patches = [
                torch.randn(h * w, 3 * 2 * 16, generator=g)
                for (h, w), g in zip(grids, drawn, strict=True)
            ]
            grid = torch.tensor([[1, h, w] for h, w in grids])
            return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}
        shape = (3, 16, 16)
        if self.name in ("llava_next", "llava_onevision"):
            shape = (2, *shape)
        if self.name in ("idefics3", "smolvlm"):
            shape = (1, *shape)
        found = {"pixel_values": torch.stack([torch.randn(shape, generator=g) for g in drawn])}
        if len(shape) == 4 and shape[0] == 2:
            found["image_sizes"] = torch.tensor([[16, 16]] * len(numbers))
        return found


def vision_class(name: str, attention: str = "sdpa") -> VisionClass:
    """A tiny model of a class, whose weights are random but far from linear."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for part in (config, config.get_text_config()):  # a tied head repeats the last word forever
        part.tie_word_embeddings = False
    kind = "eager" if name == "paligemma2" else attention  # its text model has no sdpa
    model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation=kind).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    prepare(model)
    return VisionClass(name, model)
