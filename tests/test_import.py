"""Checkpoints of other families: the logits of their own code, as the stock class has them.

What their own code computes is written anew in `foreign.py`, from its published description.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import foreign
import pytest
import torch
from foreign import EOS, FAMILIES, MASK, ROWS, TOKENS
from safetensors.torch import load_file, save_file
from test_likelihood import raw_logits
from transformers import Qwen2Tokenizer

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.stored import stored_dtypes
from ar2diff.conversion.families import FAMILIES as TABLE
from ar2diff.conversion.imports import import_checkpoint
from ar2diff.conversion.tensors import renamed_tensors, write_shards
from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.options import resolve

IDS = torch.tensor([1, 17, MASK, 5, 99, MASK, MASK, 42, 8, MASK, 7])


@pytest.fixture(scope="session")
def their_tokenizer(tiny_tokenizer):
    """Special tokens behind the words, the mask among them but not named as such; the pad is the
    end token, as in LLaDA and Dream."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(foreign.SPECIAL)})
    tokenizer.pad_token = "</s>"
    return tokenizer


@pytest.fixture
def make(their_tokenizer, tmp_path):
    """Factory: the folder of a foreign checkpoint."""

    def save(checkpoint, **kwargs):
        return foreign.save(checkpoint, tmp_path / "theirs", their_tokenizer, **kwargs)

    return save


@pytest.fixture
def fails(run_both, tmp_path):
    """The import must exit with 2, say two lines, and write nothing."""

    def call(folder, *arguments):
        code, out, err = run_both("import", folder, "--output-dir", tmp_path / "out", *arguments)
        lines = err.strip().splitlines()
        assert (code, out, len(lines)) == (2, "", 2), err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("  fix: ")
        assert not (tmp_path / "out").exists()
        return err

    return call


def close(ours, theirs):
    return (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def decode(checkpoint, prompt, new):
    """Our sampler, greedy, one token a forward."""
    spec = checkpoint.spec
    grid = spec.block_length or 1
    canvas = Canvas.of_prompts([prompt], MASK, max_new_tokens=new, grid=grid)
    options = resolve(spec, {"threshold": 1.0, "max_new_tokens": new, "eos_token_id": None})
    for _ in denoise(checkpoint.model, spec, canvas, options):
        pass
    return canvas.ids[0, : len(prompt) + new].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_class_computes_what_their_code_does(make, tmp_path, name):
    build, attention, block_length, prediction = FAMILIES[name]
    theirs = build()
    weights = theirs.weights()
    import_checkpoint(str(make(theirs)), tmp_path / "ours")
    ours = load_checkpoint(str(tmp_path / "ours"))
    spec = ours.spec
    assert (spec.attention, spec.block_length, spec.prediction, spec.mask_token_id) == (
        attention, block_length, prediction, MASK,
    )  # fmt: skip
    assert type(ours.model).__module__.startswith("transformers.models.")
    allowed = foreign.allowed_of(len(IDS), attention, 4)
    logits = theirs.logits(weights, IDS, allowed)
    assert close(raw_logits(ours.model, IDS[None], allowed)[0], logits)
    prompt = IDS[:2].tolist()
    new = max(block_length or 8, 12) - len(prompt)  # the blocks are whole
    said = foreign.fill(theirs, weights, prompt, new, attention, block_length, prediction)
    assert MASK not in said
    assert decode(ours, prompt, new) == said


@pytest.mark.parametrize("name", ["dream", "llada", "llada2", "sdar", "a2d_qwen3"])
def test_check_generate_and_eval_run_on_it(run_both, make, tmp_path, write_jsonl, name):
    folder, out = make(FAMILIES[name][0]()), tmp_path / "ours"
    code, said, _ = run_both("import", folder, "--output-dir", out)
    assert code == 0
    assert f"next: ar2diff check {out}" in said
    code, said, err = run_both("check", out)
    assert code == 0, said + err
    assert "FAIL" not in said
    arguments = ("--prompt", "the cat", "--max-new-tokens", 6, "--json")
    assert json.loads(run_both("generate", out, *arguments)[1])["new_tokens"] <= 6
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat and slept"}] * 2)
    code, said, _ = run_both("eval", out, "--data", data, "--length", 24, "--json")
    assert code == 0
    assert json.loads(said)["bound"]["nats_per_token"] > 0


@pytest.mark.slow
def test_the_folder_denoises_without_us(make, tmp_path):
    """In a process that cannot import ar2diff: stock class, custom_generate, logits of a mask-less
    forward."""
    theirs = foreign.llada()
    import_checkpoint(str(make(theirs)), tmp_path / "ours")
    code = (
        "import sys, torch\n"
        "sys.modules['ar2diff'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor([[1, 17, 42]])\n"
        "new = model.generate(ids, max_new_tokens=8, threshold=1.0, eos_token_id=None)\n"
        "print(new.tolist()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "ours"], capture_output=True, text=True, check=True
    )
    said = foreign.fill(theirs, theirs.weights(), [1, 17, 42], 8, "full", None, "same")
    assert json.loads(done.stdout) == said


def test_blocks_that_no_config_tells_are_the_users_to_name(make, run_both, tmp_path):
    """dLLM's BD3LM has the classes of its MDLM."""
    theirs = foreign.a2d()
    code, out, _ = run_both(
        "import", make(theirs), "--output-dir", tmp_path / "ours", "--block-length", 4, "--json"
    )
    assert code == 0
    assert json.loads(out)["diffusion"]["attention"] == "block_causal"
    ours = load_checkpoint(str(tmp_path / "ours"))
    weights = theirs.weights()
    said = foreign.fill(theirs, weights, [1, 17], 10, "block_causal", 4, "same")
    assert decode(ours, [1, 17], 10) == said
    assert said != foreign.fill(theirs, weights, [1, 17], 10, "full", None, "same")


def test_a_config_that_names_its_block_is_believed(make, tmp_path):
    import_checkpoint(str(make(foreign.sdar(block_size=8))), tmp_path / "ours")
    assert load_checkpoint(str(tmp_path / "ours")).spec.block_length == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_theirs(make, tmp_path, dtype):
    theirs = foreign.llada2()
    weights = {name: w.to(dtype) for name, w in theirs.weights().items()}
    bias = "model.layers.1.mlp.gate.expert_bias"
    weights[bias] = weights[bias].float()  # as published, beside bfloat16
    import_checkpoint(str(make(theirs, weights=weights, shards=3)), tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    ours = {}
    for file in (tmp_path / "ours").glob("*.safetensors"):
        ours |= load_file(file)
    assert set(ours) == set(index["weight_map"])
    fused = "model.layers.1.attention.query_key_value.weight"
    parts = [ours[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), weights[fused])
    assert torch.equal(ours["model.layers.1.mlp.gate.e_score_correction_bias"], weights[bias])
    assert sum(w.numel() for w in ours.values()) == sum(w.numel() for w in weights.values())
    assert {str(dtype)} == {
        f"torch.{json.loads((tmp_path / 'ours/config.json').read_text())['dtype']}"
    }
    assert set(stored_dtypes(tmp_path / "ours").values()) == (
        {"F32"} if dtype == torch.float32 else {"BF16", "F32"}
    )
    load_checkpoint(str(tmp_path / "ours"))


def test_numbers_of_any_width_stand_where_they_can_be_read(tmp_path):
    """An odd number of bfloat16 before a float32 would set it off its bounds."""
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(2.0)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    model = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=False))
    pieces = [*renamed_tensors(tmp_path / "theirs.safetensors", TABLE[0], model)]
    write_shards(tmp_path, [sorted(pieces, key=lambda piece: piece.name)])
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + length])
    assert (8 + length + header["b"]["data_offsets"][0]) % 4 == 0


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_the_weights(make, tmp_path):
    """Tensors of 64 MB go through in a process that grows by far less."""
    rows = 1 << 19
    theirs = foreign.dream()
    theirs.config["vocab_size"] = rows
    weights = theirs.weights()
    weights["model.embed_tokens.weight"] = torch.zeros(rows, foreign.HIDDEN)
    weights["lm_head.weight"] = torch.zeros(rows, foreign.HIDDEN)
    folder = make(theirs, weights=weights)
    code = (
        "import resource, sys\n"
        "from ar2diff.conversion.imports import import_checkpoint\n"
        "import_checkpoint(sys.argv[1], sys.argv[2], dry_run=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import_checkpoint(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "ours"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(done.stdout.split()[-1]) * (1024 if sys.platform != "darwin" else 1)
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size > 1.2e8
    assert grown < 5e7


@pytest.mark.parametrize("moved", [0.0, 0.5], ids=["the same", "another"])
def test_a_stored_head_is_kept_where_it_is_not_the_embeddings(make, tmp_path, moved):
    theirs = foreign.a2d()
    theirs.config["tie_word_embeddings"] = True
    weights = theirs.weights()
    head = weights["model.embed_tokens.weight"] + moved
    import_checkpoint(str(make(theirs, weights=weights | {"lm_head.weight": head})), tmp_path / "o")
    ours = load_checkpoint(str(tmp_path / "o")).model
    assert ours.config.tie_word_embeddings == (not moved)
    assert torch.equal(ours.get_output_embeddings().weight, head)


def test_the_folder_says_where_it_comes_from_and_carries_no_code_of_theirs(make, tmp_path):
    folder = make(foreign.dream())
    import_checkpoint(str(folder), tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "ar2diff.json").read_text())
    assert (record["base_model"], record["family"]) == (str(folder), "Dream")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["model_type"], config["is_causal"]) == ("qwen2", False)
    assert "auto_map" not in config
    assert not list((tmp_path / "ours").glob("*.py"))
    assert (tmp_path / "ours" / "custom_generate" / "generate.py").is_file()


def test_pad_is_no_end_token_and_the_mask_is_named(make, tmp_path):
    import_checkpoint(str(make(foreign.llada())), tmp_path / "ours")
    ours = load_checkpoint(str(tmp_path / "ours"))
    assert ours.tokenizer.mask_token == "<|mdm_mask|>"
    assert ours.tokenizer.pad_token == "<|reserved_token_0|>"
    assert ours.end_ids == [EOS]
    suppressed = ours.model.generation_config.suppress_tokens
    assert suppressed == [MASK, *range(TOKENS, ROWS)]


def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer(make, tmp_path):
    folder = make(foreign.sdar())
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6], "temperature": 0.2, "alg": "origin", "steps": 512})
    )
    import_checkpoint(str(folder), tmp_path / "ours")
    ours = load_checkpoint(str(tmp_path / "ours"))
    assert ours.end_ids == [5, 6, EOS]
    said = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert not {"alg", "steps"} & set(said)


def test_a_mask_token_that_the_tokenizer_lacks_is_added_where_the_weights_have_it(make, tmp_path):
    """dLLM adds it at each load: it is not in the tokenizer's files."""
    import_checkpoint(str(make(foreign.a2d(), named=False)), tmp_path / "ours")
    ours = load_checkpoint(str(tmp_path / "ours"))
    assert (ours.tokenizer.mask_token, ours.spec.mask_token_id) == ("<|mask|>", TOKENS)


def test_a_tokenizer_with_code_of_its_own_is_read_as_the_stock_one(tmp_path, their_tokenizer):
    """Dream's: Qwen2's files, a class of its own, no tokenizer.json."""
    folder = foreign.save(foreign.dream(), tmp_path / "theirs", their_tokenizer)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    words = [c for c in their_tokenizer.get_vocab() if len(c) == 1] + ["he", "Ġt"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ t\n")
    added = {"258": "<|endoftext|>", "259": "<|beginoftext|>", "260": "<|mask|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": {
                    i: {"content": token, "special": True, "normalized": False, "lstrip": False,
                        "rstrip": False, "single_word": False}
                    for i, token in added.items()
                },
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "bos_token": "<|beginoftext|>",
                "mask_token": "<|mask|>",
            }
        )
    )  # fmt: skip
    (folder / "tokenization_dream.py").write_text(foreign.CODE)
    import_checkpoint(str(folder), tmp_path / "ours")
    tokenizer = load_checkpoint(str(tmp_path / "ours")).tokenizer
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (260, 258)
    assert tokenizer.pad_token == "<|pad|>"
    stock = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = "the cat's 12 hats,\n  he said"
    assert tokenizer(text).input_ids == stock(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    saved = "".join(file.read_text() for file in (tmp_path / "ours").glob("*.json"))
    assert "tokenization_dream" not in saved
    assert "/tmp" not in saved.replace(str(tmp_path), "")


# What cannot be


def test_a_config_that_no_stock_class_computes_is_refused_with_its_key(make, fails):
    theirs = foreign.llada()
    theirs.config["scale_logits"] = True
    said = fails(make(theirs))
    assert (
        "scale_logits is True in its config.json, which the stock llama class does not support"
        in said
    )


@pytest.mark.parametrize("missing", ["rms_norm_eps", "rope_theta", "n_heads"])
def test_what_no_tensor_tells_must_be_in_the_config(make, fails, missing):
    theirs = foreign.llada()
    del theirs.config[missing]
    assert f"{missing} is missing from its config.json" in fails(make(theirs))


def test_tensors_of_another_layout_are_refused_by_name(make, fails, tmp_path):
    theirs = foreign.dream()
    weights = theirs.weights()
    weights.pop("model.layers.0.self_attn.k_proj.bias")
    said = fails(make(theirs, weights=weights))
    assert "k_proj.bias is missing from its weights, but Qwen2ForCausalLM needs it" in said


def test_tensors_without_a_place_are_refused_by_name(make, fails):
    theirs = foreign.sdar()
    more = theirs.weights() | {"model.layers.0.self_attn.sink": torch.zeros(4)}
    said = fails(make(theirs, weights=more))
    assert "contain model.layers.0.self_attn.sink, which is not part of Qwen3ForCausalLM" in said


def test_shapes_that_the_config_does_not_mean_are_refused(make, fails):
    theirs = foreign.llada()
    theirs.config["n_kv_heads"] = foreign.HEADS
    assert "k_proj.weight has shape [16, 32], but LlamaForCausalLM needs [32, 32]" in fails(
        make(theirs)
    )


def test_fused_rows_that_the_config_does_not_mean_are_refused(make, fails):
    theirs = foreign.llada2()
    theirs.config["num_key_value_heads"] = foreign.HEADS
    said = fails(make(theirs))
    assert "query_key_value.weight has shape [128, 32], but its config.json implies 192" in said


@pytest.mark.parametrize(
    ("config", "said"),
    (
        ({"architectures": ["DreamForCausalLM"]}, "DreamForCausalLM needs code of its own, and no"),
        ({"architectures": ["LlamaForCausalLM"], "auto_map": None}, "ar2diff adapt"),
        ({"mask_token_id": 64}, "is an ordinary token of the vocabulary"),
        ({"mask_token_id": 271}, "mask_token_id 271 is out of range: the tokenizer has 262 tokens"),
        (
            {"mask_token_id": "260"},
            "mask_token_id is '260' in its config.json, but must be an integer",
        ),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"hidden_size": "wide"}, "its config.json does not describe a qwen2 model"),
    ),
    ids=["unknown", "AR", "word", "no-token", "text", "config", "type"],
)
def test_refusals_say_why(make, fails, config, said):
    theirs = foreign.dream()
    theirs.config.update(config)
    if config.get("auto_map", 1) is None:
        del theirs.config["auto_map"]
    assert said in fails(make(theirs))


def test_two_mask_tokens_are_refused(make, fails):
    theirs = foreign.dream()
    folder = make(theirs)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["mask_token"] = "<|extra|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    said = fails(folder)
    assert (
        "mask_token_id is 260 in its config.json, but the tokenizer's mask token <|extra|> is 261"
        in said
    )


def test_a_block_length_is_refused_where_the_family_has_one_or_none(make, fails, tmp_path):
    said = fails(make(foreign.dream()), "--block-length", 8)
    assert "Dream models are always trained on whole rows" in said


def test_a_converted_model_is_refused(make, fails, tmp_path):
    import_checkpoint(str(make(foreign.llada())), tmp_path / "ours")
    assert "is already a converted model" in fails(tmp_path / "ours")


@pytest.mark.parametrize("verb", [("check",), ("adapt", "--max-steps", 0)], ids=["check", "adapt"])
def test_other_verbs_point_to_the_import(make, run_both, tmp_path, verb):
    more = ("--output-dir", tmp_path / "out") if verb[0] == "adapt" else ()
    code, _, err = run_both(*verb, make(foreign.dream()), *more)
    assert code == 2
    assert "bring it in with 'ar2diff import'" in err


def test_pickled_weights_are_refused(make, fails):
    folder = make(foreign.llada())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled" in fails(folder)


def test_layers_without_weights_are_refused_before_they_are_built(make, fails):
    folder = make(foreign.dream())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    assert "'num_hidden_layers' is 1000000" in fails(folder)


def test_a_folder_in_use_is_refused_and_left_alone(make, run_both, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, err = run_both("import", make(foreign.llada()), "--output-dir", tmp_path / "out")
    assert code == 2
    assert "is not empty" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_dry_run_says_all_and_writes_nothing(make, run_both, tmp_path):
    folder = make(foreign.llada())
    code, out, _ = run_both(
        "import", folder, "--output-dir", tmp_path / "out", "--dry-run", "--json"
    )
    assert code == 0
    assert json.loads(out)["loads_as"] == "LlamaForCausalLM"
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_leaves_nothing(make, run_both, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ar2diff.checkpoint.output.os.fsync", full)
    code, _, err = run_both("import", make(foreign.llada()), "--output-dir", tmp_path / "out")
    assert code == 2
    assert "the disk is full" in err
    assert not (tmp_path / "out").exists()
