"""Exports: what an engine reads of the folder is the model that it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.conversion.exports import export
from ar2diff.conversion.imports import import_checkpoint
from ar2diff.generation.complete import complete

QWEN_TOKENS, QWEN_ROWS, SDAR_MASK = 151669, 151936, 151669
IDS = torch.tensor([1, 17, SDAR_MASK, 5, 99, SDAR_MASK, SDAR_MASK, 42, 8, SDAR_MASK, 7])


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """As long as Qwen3's: the next free id is the one that engines take for the mask."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, QWEN_TOKENS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def sdar(qwen_tokenizer, tmp_path_factory):
    """Factory: (foreign checkpoint, its weights, the folder of ours that it was imported to)."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sdar")
            build = {"dense": foreign.sdar, "moe": foreign.sdar_moe}[kind]
            theirs = build(vocab_size=QWEN_ROWS, mask_token_id=SDAR_MASK, block_size=8)
            weights = theirs.weights()
            foreign.save(theirs, folder / "theirs", qwen_tokenizer, weights, shards=2)
            import_checkpoint(str(folder / "theirs"), folder / "ours")
            made[kind] = theirs, weights, folder / "ours"
        return made[kind]

    return make


@pytest.fixture
def fails(run_both, tmp_path):
    """The export must exit with 2, say two lines, and write nothing."""

    def call(folder, to):
        arguments = ("--to", to, "--output-dir", tmp_path / "out")
        code, out, err = run_both("export", folder, *arguments)
        lines = err.strip().splitlines()
        assert (code, out, len(lines)) == (2, "", 2), err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("  fix: ")
        assert not (tmp_path / "out").exists()
        return err

    return call


def logits_of(folder, ids=IDS):
    checkpoint = load_checkpoint(str(folder))
    with torch.no_grad():
        return checkpoint, checkpoint.model(ids[None], use_cache=False).logits[0]


def edited(folder, target, **values):
    """The folder with other values in its config.json, and in its diffusion block."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] |= {k: v for k, v in values.items() if k in config["diffusion"]}
    config |= {k: v for k, v in values.items() if k not in config["diffusion"]}
    config["mask_token_id"] = config["diffusion"]["mask_token_id"]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_export_to_sdar_and_import_give_the_same_model(sdar, tmp_path, kind):
    _, weights, ours = sdar(kind)
    export(str(ours), tmp_path / "sdar", "sdar")
    stored = {}
    for file in (tmp_path / "sdar").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)
    import_checkpoint(str(tmp_path / "sdar"), tmp_path / "again")
    one, before = logits_of(ours)
    other, after = logits_of(tmp_path / "again")
    assert torch.equal(before, after)
    assert one.spec == other.spec
    assert one.end_ids == other.end_ids
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_engine_finds_in_the_sdar_config_what_it_reads(sdar, tmp_path, kind):
    """The names that SGLang and LMDeploy read, by `getattr` with their defaults."""
    theirs, _, ours = sdar(kind)
    export(str(ours), tmp_path / "sdar", "sdar")
    config = AutoConfig.from_pretrained(tmp_path / "sdar", trust_remote_code=True)
    moe = "Moe" if kind == "moe" else ""
    assert config.architectures == [f"SDAR{moe}ForCausalLM"]
    assert config.model_type == f"sdar{moe and '_moe'}"
    read = {
        "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 32768,
        "head_dim": None, "attention_bias": False, "num_attention_heads": None,
        "num_key_value_heads": None, "hidden_size": None, "rms_norm_eps": None,
        "vocab_size": None, "num_hidden_layers": None, "tie_word_embeddings": None,
    }  # fmt: skip
    if moe:
        read |= dict.fromkeys(
            ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        )
    for name, default in read.items():
        assert getattr(config, name, default) == theirs.config[name], name
    plain = json.loads((tmp_path / "sdar" / "config.json").read_text())
    assert plain["rope_theta"] == 1000.0
    assert plain["torch_dtype"] == "float32"
    assert not {"diffusion", "is_causal"} & set(plain)
    assert not (tmp_path / "sdar" / "custom_generate").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sdar", trust_remote_code=True)
    assert tokenizer.mask_token_id == SDAR_MASK


def test_scaled_rotary_embeddings_stay_scaled(sdar, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_parameters": yarn | {"rope_theta": 1000.0}}
    folder = edited(sdar("dense")[2], tmp_path / "yarn", **rope)
    export(str(folder), tmp_path / "sdar", "sdar")
    plain = json.loads((tmp_path / "sdar" / "config.json").read_text())
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1000.0, yarn)
    import_checkpoint(str(tmp_path / "sdar"), tmp_path / "again")
    again = load_checkpoint(str(tmp_path / "again")).model.config
    assert again.rope_parameters == rope["rope_parameters"]


def test_the_notes_say_how_to_serve_it(sdar, run_both, tmp_path):
    code, out, _ = run_both(
        "export", sdar("dense")[2], "--to", "sdar", "--output-dir", tmp_path / "out"
    )
    assert code == 0
    assert "loads as: SDARForCausalLM" in out
    assert "block_size: 8" in out
    assert "--dllm-block-length 8" in out


# To AR


def test_export_to_ar_is_the_models_ar_mode(converted, tiny_checkpoint, tmp_path):
    export(str(converted), tmp_path / "ar", "ar")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ar").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    checkpoint, before = logits_of(converted, ids[0])
    with torch.no_grad():
        after = plain(ids).logits[0]
        assert torch.equal(after, before)
        assert torch.equal(after[:, :259], base(ids).logits[0])  # not trained: the base's own
    config = json.loads((tmp_path / "ar" / "config.json").read_text())
    assert not {"diffusion", "mask_token_id", "is_causal"} & set(config)
    assert not (tmp_path / "ar" / "custom_generate").exists()
    text = complete(checkpoint, "the cat", mode="ar", max_new_tokens=12).token_ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ar")
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    said = plain.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert said.tolist() == text


def test_older_readers_find_the_rotary_settings_too(converted, tmp_path):
    """Under the names of transformers 4: what is left when those of 5 are taken away."""
    scaled = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5000.0,
    }  # fmt: skip
    folder = edited(converted, tmp_path / "scaled", rope_parameters=scaled)
    export(str(folder), tmp_path / "ar", "ar")
    ids = torch.arange(3, 53)
    before = logits_of(folder, ids)[1]
    file = tmp_path / "ar" / "config.json"
    config = json.loads(file.read_text())
    for shown in (config, {k: v for k, v in config.items() if k != "rope_parameters"}):
        file.write_text(json.dumps(shown))
        with torch.no_grad():
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ar").eval()
            assert torch.equal(plain(ids[None]).logits[0], before)
    assert (before - logits_of(converted, ids)[1]).abs().max() > 0.01
    assert config["torch_dtype"] == "float32"


def test_an_exported_ar_model_can_be_converted_again(converted, tmp_path, run_both, write_jsonl):
    export(str(converted), tmp_path / "ar", "ar")
    arguments = ("--max-steps", 0, "--output-dir", tmp_path / "again", "--json")
    code, out, err = run_both("adapt", tmp_path / "ar", *arguments)
    assert code == 0, err
    assert json.loads(out)["diffusion"]["mask_token_id"] == 259


# What cannot be


@pytest.mark.parametrize(
    ("values", "said"),
    (
        ({"attention": "full", "block_length": None}, "its attention is full"),
        ({"prediction": "shift"}, "its prediction is shift"),
        ({"mask_token_id": 7}, "its mask token is 7, but the engines always use 151669"),
        ({"use_sliding_window": True, "sliding_window": 4}, "it has a sliding window"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu', not silu"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "its model_type is 'llama', but the engines only run qwen3 and qwen3_moe",
        ),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_sdar_engines_would_get_wrong_is_refused(sdar, fails, tmp_path, values, said):
    assert said in fails(edited(sdar("dense")[2], tmp_path / "ours", **values), "sdar")


def test_experts_in_some_layers_alone_are_refused(sdar, fails, tmp_path):
    folder = edited(sdar("moe")[2], tmp_path / "ours", mlp_only_layers=[0])
    assert "some of its layers have no experts" in fails(folder, "sdar")


def test_models_without_an_ar_mode_are_refused(sdar, fails, converted, tmp_path):
    assert "its attention is block_causal" in fails(sdar("dense")[2], "ar")
    dead = edited(converted, tmp_path / "dead", ar_mode=False)
    assert "the AR loss was not trained" in fails(dead, "ar")


def test_unconverted_models_and_adapters_are_refused(fails, tiny_checkpoint, tmp_path):
    assert "is not converted" in fails(tiny_checkpoint, "ar")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    said = fails(tmp_path / "lora", "ar")
    assert "is an adapter" in said
    assert "ar2diff merge" in said


def test_an_unknown_format_is_refused_and_the_known_ones_are_named(fails, converted):
    said = fails(converted, "gguf")
    assert "--to is 'gguf'" in said
    assert "choose one of sdar, ar" in said


def test_a_folder_in_use_is_refused_and_ours_is_replaced_on_demand(run_both, converted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    arguments = ("export", converted, "--to", "ar", "--output-dir", out)
    code, _, err = run_both(*arguments, "--overwrite")
    assert code == 2
    assert "did not write" in err
    (out / "mine.txt").unlink()
    assert run_both(*arguments)[0] == 0
    assert run_both(*arguments)[0] == 2
    assert run_both(*arguments, "--overwrite")[0] == 0


def test_a_dry_run_says_all_and_writes_nothing(run_both, converted, tmp_path):
    arguments = ("--to", "ar", "--output-dir", tmp_path / "out", "--dry-run", "--json")
    code, out, _ = run_both("export", converted, *arguments)
    assert code == 0
    assert json.loads(out)["loads_as"] == "LlamaForCausalLM"
    assert not (tmp_path / "out").exists()


# Weights that nothing could load


def with_header(folder, change):
    """Change the header of a folder's weights; the bytes stay."""
    file = folder / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    change(header)
    text, rest = json.dumps(header).encode(), file.read_bytes()[8 + length :]
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    return folder


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (lambda header: header[NORM].update(dtype="Z9"), "incomplete or damaged"),
        (lambda header: header[NORM].update(shape=[2**40, 2**40]), "incomplete or damaged"),
        (lambda header: header[NORM].update(shape=[31]), "incomplete or damaged"),
        (lambda header: header[NORM].update(data_offsets=[0, 128]), "incomplete or damaged"),
        (lambda header: header.update({NORM: [1]}), "incomplete or damaged"),
        (lambda header: header.pop(HEAD), "incomplete or damaged"),  # leaves a gap
        (lambda header: header[NORM].update(shape=[1, 32]), "norm.weight has shape [1, 32]"),
        (
            lambda header: header.update({"x": header.pop(HEAD)}),
            "lm_head.weight is missing from its weights",
        ),
    ),
    ids=["dtype", "huge", "size", "overlap", "type", "gap", "shape", "name"],
)
def test_damaged_weights_are_not_copied(fails, converted, tmp_path, change, said):
    folder = with_header(shutil.copytree(converted, tmp_path / "ours"), change)
    assert said in fails(folder, "ar")


@pytest.mark.parametrize(
    "values, said",
    [
        ({"suppress_tokens": [{"a": 2}]}, "suppress_tokens is {'a': 2}, which is not a token id"),
        ({"early_stopping": 5}, "it is not a generation config"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_generation_config_that_cannot_be_loaded_is_not_copied(
    fails, converted, tmp_path, values, said
):
    folder = Path(shutil.copytree(converted, tmp_path / "ours"))
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert said in fails(folder, "ar")
