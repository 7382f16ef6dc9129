"""The embedded vision model before training: its tokens, its processor and its random weights."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from . import scenes

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>"] + [
    f"<|reserved_{i}|>" for i in range(4)
]
BOS, EOS, PAD, IMAGE = 1, 2, 3, 4  # positions in SPECIAL
PATCHES = scenes.SIDE**2  # one cell a patch
CONTEXT = 512
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ("user", "assistant") %}
{{- raise_exception("this model knows the roles user and assistant") }}
{%- endif %}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content %}
{{- "<|" + message.role + "|>" }}
{%- if message.role == "assistant" %}
{%- generation %}
{%- for part in parts %}{{- part.text }}{%- endfor %}{{- eos_token }}
{%- endgeneration %}
{%- else %}
{%- for part in parts %}{{- "<image>" if part.type == "image" else part.text }}{%- endfor %}{{- eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- endif %}
"""  # noqa: E501


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word that occurs in questions and answers; a word carries its leading
    space, so decoded text is exact."""
    split = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z]+[0-9]?| ?[0-9]|\n| ?[^\sA-Za-z0-9]|\s"), "isolated"
    )
    rows = scenes.scenes(5000, 0, turns=3, digits=(1, 9))
    texts = [
        p["text"] for row in rows for m in row["messages"] for p in m["content"] if "text" in p
    ]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + words)}, "<unk>"))
    backend.pre_tokenizer, backend.decoder = split, decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_processor() -> LlavaProcessor:
    """The tokenizer with an image processor that keeps the pixels as they are, from -1 to 1."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = scenes.SIDE * scenes.CELL
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}),
        new_tokenizer(),
        patch_size=scenes.CELL,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def new_model(vocab_size: int) -> LlavaForConditionalGeneration:
    """A Llava with random weights, in float32."""
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=512,
        num_hidden_layers=1,  # a patch shows a digit by itself
        num_attention_heads=4,
        image_size=scenes.SIDE * scenes.CELL,
        patch_size=scenes.CELL,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.05,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=PATCHES,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
