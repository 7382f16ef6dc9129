"""Tiny random checkpoints in the layouts that other diffusion families publish, and what their own
code computes of them.

The originals are not installed. Each forward here is written anew in plain torch from the family's
published description; it shares nothing with ar2diff or transformers.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu

EOS, MASK, TOKENS, ROWS = 2, 260, 262, 272  # ids 259 ... 261 are special tokens behind the bytes
SPECIAL = ("<|reserved_token_0|>", "<|mdm_mask|>", "<|extra|>")
HIDDEN, INNER, LAYERS, HEADS, KEYS, CONTEXT = 32, 48, 2, 4, 2, 128
CODE = "raise SystemExit('code of the repository ran')\n"


@dataclass(frozen=True)
class Foreign:
    """A family: its config.json, its tensors, and `forward(weights, ids, allowed)`."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    forward: Any

    def weights(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (1.0 if "norm" in name or "ln_f" in name else 0.0)
            + 0.3 * torch.randn(*shape, generator=generator)
            for name, shape in self.shapes.items()
        }

    def logits(self, weights, ids, allowed):
        """Raw logits [L, V] of ids [L]; `allowed` [L, L] bool."""
        return self.forward({name: w.float() for name, w in weights.items()}, ids, allowed)


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, theta, width):
    """Rotary embedding of the first `width` numbers of each head, in halves. x: [H, L, D]."""
    position = torch.arange(x.shape[1]).float()[:, None]
    angle = position / theta ** (torch.arange(0, width, 2).float() / width)
    a, b = x[..., : width // 2], x[..., width // 2 : width]
    turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat([*turned, x[..., width:]], -1)


def attend(q, k, v, allowed, theta, width):
    """Grouped heads. q: [L, H, D]; k, v: [L, G, D]; result [L, H * D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k = turn(q, theta, width), turn(k, theta, width)
    share = len(q) // len(k)
    rows = []
    for head in range(len(q)):
        score = q[head] @ k[head // share].T / q.shape[-1] ** 0.5
        rows.append(score.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[head // share])
    return torch.cat(rows, -1)


def heads(x, count):
    return x.view(len(x), count, -1)


def gated(x, w, prefix):
    gate = silu(linear(x, w[f"{prefix}.gate_proj.weight"]))
    return linear(gate * linear(x, w[f"{prefix}.up_proj.weight"]), w[f"{prefix}.down_proj.weight"])


# Qwen's layout: Dream (biases on q, k, v), SDAR and A2D (norms on the heads of q and k)


def qwen(config, head, bias, norms, tied, experts=0):
    rows = config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (rows, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, HIDDEN)
    inner = experts and INNER // 2
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        for name, count in (("q", HEADS), ("k", KEYS), ("v", KEYS)):
            shapes[f"{p}.self_attn.{name}_proj.weight"] = (count * head, HIDDEN)
            if bias:
                shapes[f"{p}.self_attn.{name}_proj.bias"] = (count * head,)
        shapes[f"{p}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * head)
        if norms:
            shapes |= {f"{p}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes[f"{p}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{p}.post_attention_layernorm.weight"] = (HIDDEN,)
        if experts:
            shapes[f"{p}.mlp.gate.weight"] = (experts, HIDDEN)
        for e in [f".experts.{e}" for e in range(experts)] or [""]:
            shapes |= mlp_shapes(f"{p}.mlp{e}", inner or INNER)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def forward(w, ids, allowed):
        x = w["model.embed_tokens.weight"][ids]
        for i in range(LAYERS):
            p = f"model.layers.{i}"
            n = rms(x, w[f"{p}.input_layernorm.weight"], eps)
            q, k, v = (
                heads(
                    linear(
                        n,
                        w[f"{p}.self_attn.{name}_proj.weight"],
                        w.get(f"{p}.self_attn.{name}_proj.bias"),
                    ),
                    count,
                )
                for name, count in (("q", HEADS), ("k", KEYS), ("v", KEYS))
            )
            if norms:
                q = rms(q, w[f"{p}.self_attn.q_norm.weight"], eps)
                k = rms(k, w[f"{p}.self_attn.k_norm.weight"], eps)
            x = x + linear(attend(q, k, v, allowed, theta, head), w[f"{p}.self_attn.o_proj.weight"])
            n = rms(x, w[f"{p}.post_attention_layernorm.weight"], eps)
            if experts:
                chance = linear(n, w[f"{p}.mlp.gate.weight"]).softmax(-1)
                x = x + routed(n, w, f"{p}.mlp.experts", chance, chance, config)
            else:
                x = x + gated(n, w, f"{p}.mlp")
        x = rms(x, w["model.norm.weight"], eps)
        return linear(x, w["model.embed_tokens.weight" if tied else "lm_head.weight"])

    return Foreign(config, shapes, forward)


def mlp_shapes(prefix, inner):
    return {
        f"{prefix}.gate_proj.weight": (inner, HIDDEN),
        f"{prefix}.up_proj.weight": (inner, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, inner),
    }


def routed(x, w, prefix, ranked, weight, config):
    """Each token through its best experts by `ranked`, weighted by `weight` [L, E]."""
    rows = []
    for token, order, scores in zip(x, ranked, weight, strict=True):
        best = order.topk(config["num_experts_per_tok"]).indices.tolist()
        total = scores[best].sum() if config.get("norm_topk_prob") else 1.0
        scale = config.get("routed_scaling_factor", 1.0) / total
        rows.append(sum(scale * scores[e] * gated(token[None], w, f"{prefix}.{e}") for e in best))
    return torch.cat(rows)


QWEN = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-3,  # unlike any default
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "use_sliding_window": True,  # their masks leave windows out
    "sliding_window": 3,
    "max_window_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
}


def dream():
    config = QWEN | {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "mask_token_id": MASK,
    }
    return qwen(config, HIDDEN // HEADS, bias=True, norms=False, tied=False)


def sdar(**more):
    config = QWEN | {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "head_dim": 16,  # more than hidden / heads
        "attention_bias": False,
        "mask_token_id": MASK,
        **more,
    }
    return qwen(config, 16, bias=False, norms=True, tied=False)


def sdar_moe(**more):
    config = sdar().config | {
        "architectures": ["SDARMoeForCausalLM"],
        "model_type": "sdar_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER // 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **more,
    }
    return qwen(config, 16, bias=False, norms=True, tied=False, experts=4)


def a2d(kind="qwen3"):
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    tied, head = kind != "llama", 16 if kind == "qwen3" else HIDDEN // HEADS
    config = QWEN | {
        "architectures": [f"A2D{name}LMHeadModel"],
        "model_type": f"a2d-{kind}",
        "tie_word_embeddings": tied,
        "head_dim": head,
    }
    return qwen(config, head, bias=kind == "qwen2", norms=kind == "qwen3", tied=tied)


def llada_moe():
    config = QWEN | {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "auto_map": {"AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"},
        "qk_layernorm": True,
        "clip_qkv": None,
        "attention_bias": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": INNER // 2,
        "dense_intermediate_size": INNER,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [1] * LAYERS,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "partial_rotary_factor": 1,
        "mask_token_id": MASK,
    }
    del config["intermediate_size"], config["use_sliding_window"]
    return qwen(config, HIDDEN // HEADS, bias=False, norms=True, tied=False, experts=4)


# LLaDA: OLMo's layout, the block of its `llama` kind


def llada(tied=False):
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": HIDDEN,
        "embedding_dropout": 0.0,
        "embedding_size": ROWS,
        "eos_token_id": EOS,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK,
        "max_sequence_length": CONTEXT,
        "mlp_hidden_size": INNER,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": KEYS,
        "n_layers": LAYERS,
        "pad_token_id": EOS,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-3,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 1000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": TOKENS,
        "weight_tying": tied,
    }
    top, head = "model.transformer", HIDDEN // HEADS
    shapes = {f"{top}.wte.weight": (ROWS, HIDDEN), f"{top}.ln_f.weight": (HIDDEN,)}
    if not tied:
        shapes[f"{top}.ff_out.weight"] = (ROWS, HIDDEN)
    for i in range(LAYERS):
        p = f"{top}.blocks.{i}"
        shapes |= {
            f"{p}.attn_norm.weight": (HIDDEN,),
            f"{p}.ff_norm.weight": (HIDDEN,),
            f"{p}.q_proj.weight": (HIDDEN, HIDDEN),
            f"{p}.k_proj.weight": (KEYS * head, HIDDEN),
            f"{p}.v_proj.weight": (KEYS * head, HIDDEN),
            f"{p}.attn_out.weight": (HIDDEN, HIDDEN),
            f"{p}.ff_proj.weight": (INNER, HIDDEN),
            f"{p}.up_proj.weight": (INNER, HIDDEN),
            f"{p}.ff_out.weight": (HIDDEN, INNER),
        }

    def forward(w, ids, allowed):
        x = w[f"{top}.wte.weight"][ids]
        for i in range(LAYERS):
            block = {n.removeprefix(f"{top}.blocks.{i}."): t for n, t in w.items()}
            n = rms(x, block["attn_norm.weight"], 1e-3)
            q = heads(linear(n, block["q_proj.weight"]), HEADS)
            k, v = (heads(linear(n, block[f"{name}_proj.weight"]), KEYS) for name in "kv")
            x = x + linear(attend(q, k, v, allowed, 1000.0, head), block["attn_out.weight"])
            n = rms(x, block["ff_norm.weight"], 1e-3)
            inner = silu(linear(n, block["ff_proj.weight"])) * linear(n, block["up_proj.weight"])
            x = x + linear(inner, block["ff_out.weight"])
        x = rms(x, w[f"{top}.ln_f.weight"], 1e-3)
        return linear(x, w[f"{top}.{'wte' if tied else 'ff_out'}.weight"])

    return Foreign(config, shapes, forward)


# LLaDA 2: Ling's layout; a dense layer, then one of experts in groups beside a shared one


def llada2():
    config = QWEN | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
        "head_dim": 16,
        "partial_rotary_factor": 0.25,  # the stock default is 0.5
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "moe_intermediate_size": INNER // 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "mask_token_id": MASK,
    }
    del config["use_sliding_window"], config["sliding_window"]
    shapes = {
        "model.word_embeddings.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (ROWS, HIDDEN),
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        shapes |= {
            f"{p}.input_layernorm.weight": (HIDDEN,),
            f"{p}.post_attention_layernorm.weight": (HIDDEN,),
            f"{p}.attention.query_key_value.weight": ((HEADS + 2 * KEYS) * 16, HIDDEN),
            f"{p}.attention.query_layernorm.weight": (16,),
            f"{p}.attention.key_layernorm.weight": (16,),
            f"{p}.attention.dense.weight": (HIDDEN, HEADS * 16),
        }
    shapes |= mlp_shapes("model.layers.0.mlp", INNER)
    shapes["model.layers.1.mlp.gate.weight"] = (8, HIDDEN)
    shapes["model.layers.1.mlp.gate.expert_bias"] = (8,)
    for name in ("shared_experts", *(f"experts.{e}" for e in range(8))):
        shapes |= mlp_shapes(f"model.layers.1.mlp.{name}", INNER // 2)

    def forward(w, ids, allowed):
        x = w["model.word_embeddings.weight"][ids]
        for i in range(LAYERS):
            p = f"model.layers.{i}"
            n = rms(x, w[f"{p}.input_layernorm.weight"], 1e-3)
            fused = heads(linear(n, w[f"{p}.attention.query_key_value.weight"]), HEADS + 2 * KEYS)
            q, k, v = fused.split([HEADS, KEYS, KEYS], 1)
            q = rms(q, w[f"{p}.attention.query_layernorm.weight"], 1e-3)
            k = rms(k, w[f"{p}.attention.key_layernorm.weight"], 1e-3)
            seen = attend(q, k, v, allowed, 1000.0, 4)
            x = x + linear(seen, w[f"{p}.attention.dense.weight"])
            n = rms(x, w[f"{p}.post_attention_layernorm.weight"], 1e-3)
            if i == 0:
                x = x + gated(n, w, f"{p}.mlp")
                continue
            score = linear(n, w[f"{p}.mlp.gate.weight"]).sigmoid()
            ranked = score + w[f"{p}.mlp.gate.expert_bias"]
            of_group = ranked.view(-1, 4, 2).topk(2, -1).values.sum(-1)  # their two best each
            chosen = torch.zeros_like(of_group).scatter_(1, of_group.topk(2).indices, 1).bool()
            ranked = ranked.masked_fill(~chosen.repeat_interleave(2, 1), -torch.inf)
            x = x + routed(n, w, f"{p}.mlp.experts", ranked, score, config)
            x = x + gated(n, w, f"{p}.mlp.shared_experts")
        return linear(rms(x, w["model.norm.weight"], 1e-3), w["lm_head.weight"])

    return Foreign(config, shapes, forward)


FAMILIES = {
    "dream": (dream, "full", None, "shift"),
    "llada": (llada, "full", None, "same"),
    "llada_tied": (lambda: llada(tied=True), "full", None, "same"),
    "llada_moe": (llada_moe, "full", None, "same"),
    "llada2": (llada2, "block_causal", 32, "same"),
    "sdar": (sdar, "block_causal", 4, "same"),
    "sdar_moe": (sdar_moe, "block_causal", 4, "same"),
    "a2d_llama": (lambda: a2d("llama"), "full", None, "same"),
    "a2d_qwen2": (lambda: a2d("qwen2"), "full", None, "same"),
    "a2d_qwen3": (a2d, "full", None, "same"),
}  # checkpoint, and what its spec has to say: attention, block_length, prediction


def allowed_of(length, attention, block_length):
    """[L, L] bool: who may read whom, in one forward of clean and masked tokens."""
    if attention == "full":
        return torch.ones(length, length, dtype=torch.bool)
    block = torch.arange(length) // block_length
    return block[None, :] <= block[:, None]


def save(foreign, folder, tokenizer, weights=None, shards=1, named=True):
    """Write the checkpoint as it would be downloaded, code that must not run included.

    Args:
        named: where config.json says no mask token, the tokenizer does.
    """
    folder.mkdir(parents=True)
    weights = foreign.weights() if weights is None else weights
    names = sorted(weights)
    parts = [names[start::shards] for start in range(shards)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files if shards > 1 else ["model.safetensors"], parts, strict=True):
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder)
    if named and "mask_token_id" not in foreign.config:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["mask_token"] = SPECIAL[MASK - 259]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(foreign.config))
    for reference in foreign.config.get("auto_map", {}).values():
        (folder / f"{reference.split('.')[0]}.py").write_text(CODE)
    return folder


def fill(foreign, weights, prompt, new, attention, block_length, prediction):
    """The family's own greedy decoding, one token a forward: the surest masked token of the block,
    or of the row. `shift` reads token i at i - 1, as Dream does by shifting the logits."""
    ids = torch.tensor([*prompt, *[MASK] * new])
    size = block_length or len(ids)
    for end in range(size, len(ids) + size, size):
        row = ids[: min(end, len(ids))]  # a view
        while (row == MASK).any():
            allowed = allowed_of(len(row), attention, block_length)
            logits = foreign.logits(weights, row, allowed)
            if prediction == "shift":
                logits = torch.cat([logits[:1], logits[:-1]])
            logits[:, MASK] = -torch.inf
            chance = logits.softmax(-1).max(-1)
            place = chance.values.masked_fill(row != MASK, -1).argmax()
            row[place] = chance.indices[place]
    return ids.tolist()
