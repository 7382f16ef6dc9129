"""Diffusion models that others publish with code of their own, and the stock classes that hold the
same weights: what `ar2diff import` knows about them, from their published configs and tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import Ar2DiffError, shortened

QKV = "[qkv]"  # in a tensor name: it holds the rows of query, key and value, in that order
# Some configs mention windows, but none of the original masks has one.
WINDOWLESS = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family become those of a stock class.

    Attributes:
        name: the usual name of the family.
        architectures: values of `architectures[0]` in its config.json.
        stock: model_type of the stock class.
        attention, block_length, prediction: of the spec. A block length in the config wins.
        blocks: whether it is also trained on blocks of other lengths, which not all configs say.
        mask_token_id: used if neither the config nor the tokenizer names one.
        max_length: longest row trained on, if that is not the context in the config.
        keys: {name in the stock config: name in theirs}, where the two differ.
        values: what the stock config holds, whatever theirs says.
        needs: {key of theirs: values with which the stock class computes the same}; a missing key
            passes.
        weights: (pattern, replacement) of tensor names; the first one that matches is used.
        tokenizer: stock class for a tokenizer that comes with code and without tokenizer.json.
    """

    name: str
    architectures: tuple[str, ...]
    stock: str
    attention: str
    prediction: str
    block_length: int | None = None
    blocks: bool = False
    mask_token_id: int | None = None
    max_length: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    weights: tuple[tuple[str, str], ...] = ()
    tokenizer: str | None = None

    def rename(self, name: str) -> str:
        """The stock class's name for one of their tensors."""
        for pattern, replacement in self.weights:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name

    def check(self, config: Mapping[str, Any], path: Any) -> None:
        """Refuse a config that asks for something that the stock class does not compute.

        Raises:
            Ar2DiffError: a value is not among `needs`.
        """
        for key, allowed in self.needs.items():
            if key in config and config[key] not in allowed:
                raise Ar2DiffError(
                    f"model {path}: {key} is {shortened(config[key])} in its config.json, which "
                    f"the stock {self.stock} class does not support",
                    f"only {self.name} checkpoints with {key} "
                    f"{' or '.join(repr(value) for value in allowed)} can be imported",
                )


_BLOCK = r"model\.transformer\.blocks\.(\d+)\."
_LLADA = Family(
    name="LLaDA",
    architectures=("LLaDAModelLM",),
    stock="llama",
    attention="full",
    prediction="same",
    mask_token_id=126336,
    keys={
        "vocab_size": "embedding_size",
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
    },
    needs={
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "activation_type": ("silu",),
        "rope": (True,),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "multi_query_attention": (False, None),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "block_group_size": (1,),
    },
    weights=(
        (r"^model\.transformer\.wte\.", "model.embed_tokens."),
        (r"^model\.transformer\.ln_f\.", "model.norm."),
        (r"^model\.transformer\.ff_out\.", "lm_head."),
        (rf"^{_BLOCK}attn_norm\.", r"model.layers.\1.input_layernorm."),
        (rf"^{_BLOCK}ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (rf"^{_BLOCK}([qkv]_proj)\.", r"model.layers.\1.self_attn.\2."),
        (rf"^{_BLOCK}attn_out\.", r"model.layers.\1.self_attn.o_proj."),
        (rf"^{_BLOCK}ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
        (rf"^{_BLOCK}up_proj\.", r"model.layers.\1.mlp.up_proj."),
        (rf"^{_BLOCK}ff_out\.", r"model.layers.\1.mlp.down_proj."),
    ),
)
_LLADA_MOE = Family(
    name="LLaDA-MoE",
    architectures=("LLaDAMoEModelLM",),
    stock="qwen3_moe",
    attention="full",
    prediction="same",
    mask_token_id=156895,
    keys={
        "moe_intermediate_size": "expert_intermediate_size",
        "intermediate_size": "dense_intermediate_size",
    },
    values={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    needs={
        "qk_layernorm": (True,),
        "clip_qkv": (None,),
        "moe_router_enable_expert_bias": (False, None),
        "shared_expert_intermediate_size": (None,),
        "partial_rotary_factor": (1, None),
    },
)
_LLADA2 = Family(
    name="LLaDA 2",
    architectures=("LLaDA2MoeModelLM",),
    stock="glm4_moe",
    attention="block_causal",
    block_length=32,
    prediction="same",
    mask_token_id=156895,
    keys={
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "attention_bias": "use_qkv_bias",
    },
    values={"use_qk_norm": True, "norm_topk_prob": True, "num_nextn_predict_layers": 0},
    needs={
        "use_qk_norm": (True, None),
        "use_bias": (False, None),
        "score_function": ("sigmoid", None),
        "norm_topk_prob": (True, None),
        "norm_head": (False, None),
    },
    weights=(
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.query_key_value\.", f".self_attn.{QKV}_proj."),
        (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    ),
)
_DREAM = Family(
    name="Dream",
    architectures=("DreamModel",),
    stock="qwen2",
    attention="full",
    prediction="shift",
    mask_token_id=151666,
    max_length=2048,  # its config gives the context of the AR base
    values=WINDOWLESS,
    needs={"use_mrope": (False, None)},
    tokenizer="Qwen2Tokenizer",
)
_SDAR = Family(
    name="SDAR",
    architectures=("SDARForCausalLM",),
    stock="qwen3",
    attention="block_causal",
    block_length=4,
    blocks=True,
    prediction="same",
    mask_token_id=151669,
    values=WINDOWLESS,
    tokenizer="Qwen2Tokenizer",
)
_SDAR_MOE = replace(_SDAR, architectures=("SDARMoeForCausalLM",), stock="qwen3_moe")


def _a2d(architecture: str, stock: str) -> Family:
    """dLLM trains the same classes on whole rows (MDLM) and on blocks (BD3LM), and no config says
    which: whole rows, unless the user names a block length."""
    return Family(
        name="dLLM A2D",
        architectures=(architecture,),
        stock=stock,
        attention="full",
        blocks=True,
        prediction="same",
        values=WINDOWLESS,
    )


FAMILIES = (
    _DREAM,
    _LLADA,
    _LLADA_MOE,
    _LLADA2,
    _SDAR,
    _SDAR_MOE,
    _a2d("A2DLlamaLMHeadModel", "llama"),
    _a2d("A2DQwen2LMHeadModel", "qwen2"),
    _a2d("A2DQwen3LMHeadModel", "qwen3"),
)


def family_of(config: Mapping[str, Any], path: Any) -> Family:
    """The family to which a foreign config.json belongs.

    Raises:
        Ar2DiffError: it belongs to none, or asks for something that the stock class does not
            compute.
    """
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    for family in FAMILIES:
        if names and names[0] in family.architectures:
            family.check(config, path)
            return family
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    if "diffusion" in config:
        raise Ar2DiffError(
            f"model {path} is already a converted model",
            f"use it as it is; to inspect it, run 'ar2diff check {path}'",
        )
    if "auto_map" not in config:
        raise Ar2DiffError(
            f"model {path}: {', '.join(names) or 'its class'} is not one of the diffusion models "
            f"that can be imported ({known})",
            f"if it is an autoregressive model, run 'ar2diff adapt {path}' instead",
        )
    raise Ar2DiffError(
        f"model {path}: {', '.join(names) or 'its class'} needs code of its own, and no stock "
        "class is known that computes the same",
        f"choose a model of one of these families: {known}",
    )
