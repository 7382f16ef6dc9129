"""Tiny random models of the decoder classes of transformers, and the table of what each can be.

    python tests/architectures.py     # prints the table of docs/support.md
    python tests/architectures.py masked    # that of the classes for masked language modelling

What a class can be is found out by the probe. Nothing here steers the conversion: a class that is
not in `SHAPES` is converted or refused just the same.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ar2diff.checkpoint.kinds import generative_class, outline_of
from ar2diff.core.attention import layer_windows
from ar2diff.core.masked_lm import is_masked_lm
from ar2diff.core.probe import probe
from ar2diff.core.spec import ATTENTIONS, Spec

ROWS = 259  # of the vocabulary
WINDOW = 6
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"  # around it in docs/support.md

# Sizes by the names that configs give them; a config takes those that it knows.
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), ROWS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "mlp_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "dff"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # a wrong mask moves whole logits
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "head_dim", "query_pre_attn_scalar", "laurel_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "altup_num_inputs"), 2),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "hidden_size_per_layer_input"), 8),
    "num_key_value_heads": 2,
    "n_inner": None,
    "rotary_dim": 4,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LATENT = {"head_dim": None, "qk_head_dim": None, "num_key_value_heads": 4}  # MLA: its own sizes
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
DEEP = {"initializer_range": 0.1}  # whose many passes make much of rounding
PADDED = {"vocab_size": 264}  # its tokenizer class adds a token of its own
ROUTED = {"output_router_logits": True}  # asks for the loss of its routers
# What a class needs besides, by model type: those that every run of the tests converts and trains,
# those that `make slow` does, and those that cannot be converted.
NAMED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": ROUTED,
    "ministral": MIXED,
    "qwen2": PADDED,
    "qwen3": {},
    "qwen3_moe": ROUTED,
    "gemma": {},
    "gemma2": {},
    "gemma3_text": MIXED,
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "glm4": {},
    "cohere2": MIXED,
    "starcoder2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "deepseek_v3": LATENT,
    "gpt_oss": ROUTED,
}
MORE: dict[str, dict[str, Any]] = {
    "afmoe": MIXED, "apertus": {}, "arcee": {}, "aria_text": {}, "axk1": LATENT, "axk2": LATENT,
    "beam": {}, "biogpt": {}, "bitnet": {}, "codegen": {}, "cohere": {}, "cohere2_moe": MIXED,
    "ctrl": {}, "cwm": {}, "deepseek_v2": LATENT, "deepseek_v32": LATENT, "diffllama": {},
    "dots1": {}, "ernie4_5": {}, "ernie4_5_moe": {}, "exaone4": MIXED, "exaone_moe": MIXED,
    "falcon": {}, "flex_olmo": {}, "flint": {},
    "gemma3n_text": MIXED | {"num_kv_shared_layers": 0},
    "gemma4_text": MIXED | {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "glm": {}, "glm4_moe": {},
    "glm4_moe_lite": LATENT, "gpt_bigcode": {}, "gpt_neox_japanese": {}, "gptj": {}, "granite": {},
    "granite_swa": {}, "granitemoe": {}, "granitemoe_swa": {}, "granitemoeshared": {}, "helium": {},
    "hrm_text": DEEP, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {}, "hy_v3": {}, "hyperclovax": {},
    "jais2": {}, "jetmoe": {}, "kolibri1": MIXED, "laguna": MIXED, "llama4_text": {},
    "mellum": MIXED, "mimo_v2_flash": {}, "minicpm3": LATENT, "minimax_m2": {}, "ministral3": {},
    "modernbert-decoder": {"pad_token_id": 0, "local_attention": 2 * WINDOW}, "nanochat": {},
    "nemotron": {}, "olmo3": MIXED, "olmoe": {}, "persimmon": {}, "phimoe": {}, "qwen2_moe": PADDED,
    "seed_oss": {}, "solar_open": {}, "stablelm": {}, "vaultgemma": {}, "xglm": {}, "youtu": LATENT,
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "bamba": {}, "bloom": {}, "doge": {},
    "falcon_h1": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {}, "jamba": {}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {}, "minimax": {},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "mpt": {}, "nemotron_h": {}, "olmo_hybrid": {}, "openai-gpt": {},
    "qwen3_5_text": {}, "qwen3_next": {}, "recurrent_gemma": {}, "rwkv": {},
}  # fmt: skip
SHAPES = NAMED | MORE | REFUSED
MOST = 20_000_000  # parameters of a tiny masked language model
# Sizes that the configs of masked language models give besides.
MASKED: dict[str, Any] = {
    **dict.fromkeys(("embedding_size", "dim"), 32),
    **dict.fromkeys(("true_hidden_size", "intra_bottleneck_size"), 32),
    **dict.fromkeys(("hidden_dim", "inner_dim"), 64),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0),
    **{"num_hidden_groups": 1, "local_attention": 2 * WINDOW, "attention_window": 4},
    **{"pad_token_id": 1, "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 2},
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """The config of a tiny model of a type."""
    cls = CONFIG_MAPPING[kind]
    known, own = cls(), SHAPES[kind] | changes
    values = {name: value for name, value in TINY.items() if name in vars(known)} | own
    values = {k: v for k, v in values.items() if v is not None or k not in LATENT}  # theirs
    return cls(**values)


def tiny_model(kind: str, attn_implementation: str | None = None, **changes: Any) -> Any:
    """A random model of a type in float32, in eval mode; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            tiny_config(kind, **changes),
            attn_implementation=attn_implementation,
            dtype=torch.float32,
        )
    return model.eval()


def windowed(model: Any) -> bool:
    """Whether some layer has a sliding window."""
    return any(layer_windows(model.config.get_text_config(), "kept").values())


def problems(model: Any, attention: str, prediction: str = "shift") -> list[str]:
    """Why a model cannot have an attention."""
    full = attention == "full"
    model.config.__dict__.pop("is_causal", None)
    if attention != "causal_context":
        model.config.is_causal = False  # as the conversion does
    spec = Spec(
        format=1,
        noise="mask",
        mask_token_id=ROWS - 1,
        attention=attention,
        block_length=None if full else 8,
        prediction=prediction,
        ar_mode=attention == "causal_context",
        local_window="kept" if windowed(model) else None,
        max_length=32,
    )
    return probe(model, spec)


def findings(kinds: Iterable[str]) -> dict[str, dict[str, str]]:
    """What each type can be: `as`: in words; `window`: whether layers of it have one."""
    found = {}
    for kind in kinds:
        model = tiny_model(kind)
        reasons = {attention: problems(model, attention) for attention in ATTENTIONS}
        able = [attention for attention in ATTENTIONS if not reasons[attention]]
        said = ", ".join(able) or f"none: {_plain(reasons['causal_context'][0])}"
        if able and reasons["full"] and model.config._attn_implementation == "sdpa":
            eager = tiny_model(kind, "eager")
            said += "; full with eager" if not problems(eager, "full") else ""
        found[kind] = {"as": said, "window": windowed(model)}
    return found


def masked_findings(kinds: Iterable[str]) -> dict[str, list[str]]:
    """{what the probe says: types} of classes that are for masked language modelling alone, with
    sdpa, or with eager attention where a class has no other."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        name = MODEL_FOR_MASKED_LM_MAPPING_NAMES[kind]
        if not is_masked_lm([name]) or CONFIG_MAPPING[kind]().is_encoder_decoder:
            continue
        said = "not tried"
        for kernel in ("sdpa", "eager"):
            try:
                model = _tiny_masked(kind, name, kernel)
                reasons = problems(model, "full", "same")
            except Exception:  # of any class: no such kernel, or sizes that do not fit
                continue
            said = f"none: {_plain(reasons[0])}" if reasons else "full"
            said += " with eager" if kernel == "eager" and not reasons else ""
            break
        found.setdefault(said, []).append(kind)
    return found


def _tiny_masked(kind: str, name: str, kernel: str) -> Any:
    """A random masked language model; `ValueError` if its sizes cannot be given."""
    known = vars(CONFIG_MAPPING[kind]())
    sizes = {key: value for key, value in (TINY | MASKED).items() if key != "head_dim"}
    config = CONFIG_MAPPING[kind](**{k: v for k, v in sizes.items() if k in known})
    config.architectures = [name]
    if sum(parameter.numel() for parameter in outline_of(config).parameters()) > MOST:
        raise ValueError(f"{kind} is not tiny")
    torch.manual_seed(0)
    return generative_class(config)._from_config(config, attn_implementation=kernel).eval()


def _plain(reason: str) -> str:
    """A reason without the error of the class that it may end in, for a cell."""
    return reason.partition(" (")[0].replace("|", "\\|")


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table of docs/support.md."""
    lines = ["| attention | classes |", "|---|---|"]
    for said in sorted({f["as"] for f in found.values()}, key=lambda s: (s.startswith("none"), s)):
        kinds = [
            kind + ("*" if f["window"] and not said.startswith("none") else "")
            for kind, f in sorted(found.items())
            if f["as"] == said
        ]
        lines.append(f"| {said} | {', '.join(kinds)} |")
    version = ".".join(transformers.__version__.split(".")[:2])
    note = f"transformers {version}, tiny random models; \\* sliding windows, by layer"
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["masked"]:
        kinds = sys.argv[2:] or MODEL_FOR_MASKED_LM_MAPPING_NAMES
        for said, named in sorted(masked_findings(kinds).items()):
            print(f"| {said} | {', '.join(sorted(named))} |")
    else:
        print(table(findings(sys.argv[1:] or SHAPES)))
