"""A tiny Llava with its processor in a folder, pictures, and conversations about them; and albums
for the classes whose processors need more packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from vision_classes import IMAGE, VisionClass

from ar2diff.data.album import Album

WORDS = (
    "<unk> <s> </s> <pad> <image> <|reserved_0|> <|reserved_1|> <|user|> <|assistant|> how many "
    "what is in the picture ? a b c d e f one two three four five and ."
).split()
SPECIAL = [word for word in WORDS if word.startswith("<")]
SIZE = 16  # pixels of a side, as the tower sees them; 16 placeholders
TYPED = (  # a template that takes lists of parts alone, as many do
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|> "
    "{% generation %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endgeneration %} "
    "{% else %}<|user|> {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def llava_tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip
    made.chat_template = TYPED
    return made


def llava_folder(folder: Path, layers: int = 2, **text: Any) -> Path:
    """A checkpoint of a Llava with random weights, and its processor."""
    tower = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        image_size=SIZE, patch_size=4, vision_use_head=False,
    )  # fmt: skip
    shape = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=tower, text_config=hf.LlamaConfig(**shape | text), image_token_id=4,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    tokenizer = llava_tokenizer()
    hf.LlavaProcessor(
        image_processor=hf.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="full",
        image_token="<image>", chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(number: int) -> Image.Image:
    """A picture that no other number has."""
    pixels = torch.rand(20, 24 + number, 3, generator=torch.Generator().manual_seed(number))
    return Image.fromarray((255 * pixels).byte().numpy())


def picture_rows(folder: Path, count: int) -> Path:
    """A file of conversations about pictures beside it, each of two turns."""
    rows = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        asked = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "what is ?"}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": f"a {WORDS[18 + number % 5]}"},
                    {"role": "user", "content": "how many ?"},
                    {"role": "assistant", "content": "one and two"},
                ]
            }
        )
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


class ClassAlbum(Album):
    """An album whose picture n is the image n of a class of `vision_classes`."""

    def __init__(self, seen: VisionClass):
        super().__init__(None, seen.model)
        self.seen = seen
        self.shots.sizes = {n: (n, n) for n in range(8)}

    def _prepared(self, key: int) -> tuple[dict[str, Tensor], int]:
        inputs = {k: x for k, x in self.seen.pixels([key]).items() if k in self._names}
        return inputs, self.seen.size(key)


assert IMAGE  # of the classes; that of the Llava here is 4
