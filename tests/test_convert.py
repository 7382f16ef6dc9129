"""Conversion: the mask's row, the pad, what stays byte-identical, what loads without ar2diff."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.stored import stored_dtypes
from ar2diff.config.recipe import Convert, load_recipe
from ar2diff.conversion.convert import convert, end_token
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.probe import probe
from ar2diff.core.spec import Spec
from ar2diff.generation.complete import complete
from ar2diff.training import plan as plan_module
from ar2diff.training.adapt import AdaptTrainer, adapt

SPEC = {
    "format": 1,
    "noise": "mask",
    "mask_token_id": 63,
    "attention": "causal_context",
    "block_length": 4,
    "prediction": "shift",
    "ar_mode": True,
    "local_window": None,
    "max_length": 64,
}
ATTENTIONS = [("causal_context", 8), ("block_causal", 8), ("full", None)]


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refuse(*args: object, **kwargs: object) -> None:
    raise ValueError("refused:\n of no use")


def only_convert(*overrides: str) -> object:
    return load_recipe(None, ["train.max_steps=0", "data.max_length=64", *overrides])


@pytest.fixture
def save_tiny(tiny_model, tiny_tokenizer, tmp_path):
    """Factory: a checkpoint folder of a kind, with some reserved tokens or unused rows."""

    def save(
        kind: str, rows: int | None = None, reserved: int = 0, dtype=torch.float32, **shape
    ) -> Path:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [f"<|reserved_special_token_{i}|>" for i in range(reserved)]}
        )
        model = tiny_model(
            kind, dtype=torch.float32, vocab_size=rows or len(tokenizer), pad_token_id=None, **shape
        )
        model = copy.deepcopy(model).to(dtype)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_steps_leave_every_tensor_byte_identical_but_the_mask_row(
    save_tiny, tmp_path, kind, dtype
):
    base = save_tiny(kind, dtype=dtype)
    adapt(str(base), only_convert(), tmp_path / "out")
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name][: len(tensor)], tensor), name
    grown = [name for name in before if after[name].shape != before[name].shape]
    # 259 tokens, then one row for the mask; the pad is <unk>
    assert grown
    assert {tuple(after[name].shape) for name in grown} <= {(260, 32), (260,)}


def test_new_mask_row_is_near_the_mean_and_is_no_other_row(save_tiny):
    checkpoint = load_checkpoint(str(save_tiny("llama")))
    spec = convert(checkpoint, Convert(), 64, True, 0)
    weight = checkpoint.model.get_input_embeddings().weight
    mean = weight[:259].mean(0)
    assert (weight[spec.mask_token_id] - mean).norm() < 0.2 * weight[:259].std() * 32**0.5
    assert not torch.equal(weight[spec.mask_token_id], mean)


def test_tied_embeddings_stay_tied(save_tiny, tmp_path):
    base = save_tiny("llama", tie_word_embeddings=True)
    adapt(str(base), only_convert(), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "lm_head.weight" not in stored_dtypes(tmp_path / "out")


def test_head_bias_is_kept(tiny_tokenizer, tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
    )
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "phi")
    tiny_tokenizer.save_pretrained(tmp_path / "phi")
    adapt(str(tmp_path / "phi"), only_convert(), tmp_path / "out")
    bias = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.bias
    assert torch.equal(bias[:259], model.lm_head.bias)
    assert bias[259].item() == pytest.approx(model.lm_head.bias.mean().item(), abs=1e-6)


def test_reserved_special_token_is_the_mask_and_the_next_one_the_pad(save_tiny):
    checkpoint = load_checkpoint(str(save_tiny("llama", reserved=3)))
    spec = convert(checkpoint, Convert(), 64, True, 0)
    assert spec.mask_token_id == 259
    assert checkpoint.tokenizer.mask_token == "<|reserved_special_token_0|>"
    assert checkpoint.tokenizer.pad_token == "<|reserved_special_token_1|>"
    assert checkpoint.model.get_input_embeddings().weight.shape[0] == 262


def test_unused_row_of_a_padded_vocabulary_is_the_mask(save_tiny):
    checkpoint = load_checkpoint(str(save_tiny("qwen3", rows=320)))
    spec = convert(checkpoint, Convert(), 64, True, 0)
    assert spec.mask_token_id == 259  # the first row that no token has, as 151669 is Qwen3's
    assert checkpoint.model.get_input_embeddings().weight.shape[0] == 320


def test_a_word_is_never_the_mask(save_tiny):
    checkpoint = load_checkpoint(str(save_tiny("llama")))
    with pytest.raises(Ar2DiffError, match="is an ordinary token of the vocabulary"):
        convert(checkpoint, Convert(mask_token="a"), 64, True, 0)


@pytest.mark.parametrize("attention,block_length", ATTENTIONS)
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "mistral", "mistral_window", "qwen3_mixed"]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_probe_accepts_every_class_and_attention(
    tiny_model, kind, implementation, attention, block_length
):
    model = tiny_model(kind, implementation)
    window = "kept" if "window" in kind or "mixed" in kind else None
    spec = Spec(
        **{
            **SPEC,
            "attention": attention,
            "block_length": block_length,
            "ar_mode": attention == "causal_context",
            "local_window": window,
        }
    )
    assert probe(model, spec) == []


@pytest.mark.parametrize("attention,block_length", ATTENTIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral_window"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_takes_no_rounding_for_a_wrong_mask(
    tiny_model, kind, implementation, dtype, attention, block_length
):
    window = "kept" if "window" in kind else None
    spec = {**SPEC, "attention": attention, "block_length": block_length, "local_window": window}
    model = tiny_model(kind, implementation, dtype)
    assert probe(model, Spec(**{**spec, "ar_mode": attention == "causal_context"})) == []


def test_the_probe_sees_under_autocast(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        assert probe(tiny_model("llama", dtype=torch.float32), Spec(**SPEC)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_probe_sees_a_class_that_stays_causal(monkeypatch, tiny_model, dtype):
    model = tiny_model("llama", dtype=dtype)
    plain = type(model).forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    assert probe(model, Spec(**SPEC))


def test_a_run_probes_on_the_accelerator_and_in_the_main_process_alone(monkeypatch, tiny_model):
    model, places, moves = tiny_model("llama"), [], []
    monkeypatch.setattr(plan_module, "probe", lambda *_: places.append(moves[-1:]) or ["wrong"])
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)) or model)
    assert plan_module.probed(model, Spec(**SPEC)) == ["wrong"] and places == [[]]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for free, place in ((1 << 40, ["cuda"]), (1, ["cpu"])):  # it does not fit, and stays
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: (free, 1 << 40))
        assert plan_module.probed(model, Spec(**SPEC)) == ["wrong"]
        assert places[-1] == place and moves == ["cuda", "cpu"]
    monkeypatch.setenv("RANK", "1")
    assert plan_module.probed(model, Spec(**SPEC)) == [] and len(places) == 3


def rough(monkeypatch, model, noise, obeys=True):
    """Add to the logits what other kernels for another shape, or other tokens in the batch, might:
    noise [B, S, V] that depends on the ids, given as `noise(input_ids)`."""
    plain = type(model).forward

    def forward(self, *args, input_ids=None, attention_mask=None, **kwargs):
        mask = attention_mask if obeys else None
        output = plain(self, *args, input_ids=input_ids, attention_mask=mask, **kwargs)
        output.logits = output.logits * (1 + noise(input_ids))
        return output

    monkeypatch.setattr(type(model), "forward", forward)


def of_shape(ids):  # what a kernel for another length rounds otherwise
    return 0.03 * (ids.shape[1] % 5 - 2)


def of_tokens(ids):  # what shares a product with other tokens of its row, as experts do
    return 1e-4 * (ids.sum(1) % 5)[:, None, None]


@pytest.mark.parametrize("noise", [of_shape, of_tokens])
@pytest.mark.parametrize("attention,block_length", ATTENTIONS)
def test_the_probe_measures_how_far_two_readings_of_the_same_tokens_are_apart(
    monkeypatch, tiny_model, attention, block_length, noise
):
    spec = Spec(**{**SPEC, "attention": attention, "block_length": block_length, "ar_mode": False})
    with monkeypatch.context() as patch:
        model = tiny_model("llama")
        rough(patch, model, noise)
        assert probe(model, spec) == []
    rough(monkeypatch, model, noise, obeys=False)
    assert probe(model, spec)  # and no rounding hides a mask that is not obeyed


def test_the_probe_sees_a_mask_that_eager_would_add_instead_of_obey(monkeypatch, tiny_model):
    import ar2diff.core.probe as module
    from ar2diff.core.attention import allowed_edges, dense_mask

    def as_bool(model, slots, attention, block_length, local_window, queries=None):
        return dense_mask(allowed_edges(slots, attention, block_length), slots, queries)

    monkeypatch.setattr(module, "model_mask", as_bool)
    problems = probe(tiny_model("llama", "eager"), Spec(**SPEC))
    assert problems[0] == "a token is read where the mask forbids it"


@pytest.mark.parametrize(
    "change,said",
    [
        ({"format": 5}, "format is 5"),
        ({"noise": "uniform"}, "noise"),
        ({"attention": "causal"}, "attention"),
        ({"block_length": None}, "block_length"),
        ({"colour": 1}, "unknown key, 'colour'"),
    ],
)
def test_a_reader_refuses_what_it_does_not_know(change, said):
    config = {"mask_token_id": 63, "diffusion": {**SPEC, **change}}
    with pytest.raises(Ar2DiffError, match=said):
        Spec.from_config(config)


def test_every_key_of_the_spec_is_required():
    for key in SPEC:
        with pytest.raises(Ar2DiffError):
            Spec.from_config(
                {"mask_token_id": 63, "diffusion": {k: v for k, v in SPEC.items() if k != key}}
            )


def test_what_a_converted_folder_says(save_tiny, tmp_path):
    for attention, block_length in ATTENTIONS:
        folder = tmp_path / attention
        adapt(
            str(save_tiny("llama")),
            only_convert(
                f"convert.attention={attention}", f"convert.block_length={block_length or 'null'}"
            ),
            folder,
        )
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["diffusion"] == read_spec(folder).to_dict()
        assert config.get("is_causal") is (None if attention == "causal_context" else False)
        assert generation["suppress_tokens"] == [config["mask_token_id"]]
        assert "max_new_tokens" not in generation
        assert AutoTokenizer.from_pretrained(folder).mask_token_id == config["mask_token_id"]
        assert (folder / "ar2diff.json").is_file()
        assert not list(folder.rglob("*.partial"))


def test_a_converted_model_is_continued_from_its_spec_and_its_block_may_grow(save_tiny, tmp_path):
    adapt(str(save_tiny("llama")), only_convert("convert.block_length=4"), tmp_path / "four")
    adapt(str(tmp_path / "four"), only_convert("convert.block_length=8"), tmp_path / "eight")
    assert read_spec(tmp_path / "eight").block_length == 8
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("four", "eight"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(Ar2DiffError, match="trained with blocks of 8"):
        adapt(str(tmp_path / "eight"), only_convert("convert.block_length=4"), tmp_path / "back")


def test_a_converted_model_keeps_what_the_recipe_leaves_open(save_tiny, tmp_path):
    adapt(
        str(save_tiny("llama")),
        only_convert("convert.attention=block_causal", "convert.prediction=same"),
        tmp_path / "a",
    )
    adapt(str(tmp_path / "a"), only_convert(), tmp_path / "b")
    assert read_spec(tmp_path / "a") == read_spec(tmp_path / "b")
    with pytest.raises(Ar2DiffError, match="asks for full"):
        adapt(str(tmp_path / "b"), only_convert("convert.attention=full"), tmp_path / "c")
    asked = only_convert(
        "convert.attention=full", "convert.reconvert=true", "convert.prediction=same"
    )
    adapt(str(tmp_path / "b"), asked, tmp_path / "c")
    assert read_spec(tmp_path / "c").attention == "full"


def test_a_dropped_window_is_gone_for_a_stock_forward_too(save_tiny, tmp_path):
    base = save_tiny("mistral_window")
    adapt(str(base), only_convert("convert.local_window=dropped"), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.sliding_window is None
    assert read_spec(tmp_path / "a").local_window == "dropped"
    ids = torch.arange(3, 43)[None]
    moved = ids.clone()
    moved[0, 0] = 50
    assert (model(ids).logits - model(moved).logits)[0, -1].abs().max() > 0
    adapt(str(tmp_path / "a"), only_convert(), tmp_path / "b")
    assert read_spec(tmp_path / "b").local_window == "dropped"


def test_doubles_stay_doubles(save_tiny, tmp_path):
    base = save_tiny("llama", dtype=torch.float64)
    weights = load_file(base / "model.safetensors")
    weights = {n: w + 1e-12 * torch.randn_like(w) for n, w in weights.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapt(str(base), only_convert(), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[n][: len(w)], w) for n, w in weights.items())


def test_several_chat_templates_come_along(save_tiny, tmp_path):
    base = save_tiny("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
    tokenizer.save_pretrained(base)
    adapt(str(base), only_convert(), tmp_path / "out")
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {
        "default",
        "tool_use",
    }


def test_training_leaves_use_cache_as_it_was(save_tiny, tmp_path, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 8)
    recipe = load_recipe(
        None, ["train.max_steps=1", "data.max_length=32", f"data.sources=[{data}]"]
    )
    adapt(str(save_tiny("llama")), recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


def test_a_document_ends_with_the_first_end_token(shared_data):
    checkpoint = load_checkpoint(str(shared_data("stories260K-hf")))
    assert end_token(checkpoint) == 1


def test_result_loads_and_writes_stories_where_ar2diff_is_not_installed(shared_data, tmp_path):
    adapt(str(shared_data("stories260K-hf")), only_convert(), tmp_path / "model")
    code = """
import sys
sys.modules["ar2diff"] = None  # any import of it fails
try:
    import ar2diff
except ImportError:
    pass
else:
    raise SystemExit("ar2diff is importable")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"], check=True, capture_output=True, text=True
    )
    assert "there was a little girl named Lily" in done.stdout


# Bases with something odd


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(save_tiny, tmp_path):
    base = save_tiny("llama", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"] + 0.5
    save_file(weights | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    adapt(str(base), only_convert(), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"][:259], head)
    assert not torch.equal(after["lm_head.weight"][259], after["model.embed_tokens.weight"][259])


def test_tokens_that_the_base_suppresses_stay_suppressed(save_tiny, tmp_path):
    base = save_tiny("llama", rows=264)
    change(base / "generation_config.json", suppress_tokens=[20, 21])
    for source, out in ((base, "once"), (tmp_path / "once", "twice")):
        adapt(str(source), only_convert(), tmp_path / out)
        said = json.loads((tmp_path / out / "generation_config.json").read_text())
        assert said["suppress_tokens"] == [20, 21, 259, 260, 261, 262, 263]


def test_a_vocabulary_with_holes(save_tiny, tmp_path):
    """The end token is beyond the others, so a new token is not the last one."""
    base = save_tiny("llama", rows=272)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<|end|>"] = 268
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({**end, "id": 268, "content": "<|end|>", "special": True})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    change(base / "tokenizer_config.json", eos_token="<|end|>")
    change(base / "generation_config.json", eos_token_id=268)
    change(base / "config.json", eos_token_id=268)
    adapt(str(base), only_convert(), tmp_path / "out")
    checkpoint = load_checkpoint(str(tmp_path / "out"))
    mask = checkpoint.spec.mask_token_id
    assert mask == checkpoint.tokenizer.mask_token_id == checkpoint.model.config.mask_token_id
    suppressed = sorted({*range(259, 272)} - {268})
    assert mask in suppressed
    assert checkpoint.suppressed.nonzero()[:, 0].tolist() == suppressed
    assert checkpoint.model.generation_config.suppress_tokens == suppressed


def test_settings_that_a_denoiser_cannot_honour_are_left_out_and_noted(save_tiny, tmp_path):
    base = save_tiny("llama")
    odd = {
        "temperature": 0.6, "top_p": 0.9, "num_beams": 4, "length_penalty": 0.5, "min_length": 5,
        "no_repeat_ngram_size": 3, "bad_words_ids": [[20], [21, 22]], "begin_suppress_tokens": [20],
        "forced_eos_token_id": 2, "guidance_scale": 1.5, "output_scores": True,
    }  # fmt: skip
    kept = {"repetition_penalty": 1.3, "num_return_sequences": 1}
    change(base / "generation_config.json", **odd, **kept)
    notes = adapt(str(base), only_convert(), tmp_path / "out").notes
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not odd.keys() & said.keys() and said["repetition_penalty"] == 1.3
    assert {note.split("=")[0] for note in notes} == {*odd}
    assert notes == json.loads((tmp_path / "out" / "ar2diff.json").read_text())["notes"]
    complete(load_checkpoint(str(tmp_path / "out")), "the cat", max_new_tokens=2)


def test_sampling_that_a_base_asks_for_is_kept(save_tiny, tmp_path):
    base = save_tiny("llama")
    change(base / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    assert adapt(str(base), only_convert(), tmp_path / "out").notes == []
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (said["temperature"], said["top_p"]) == (0.6, 0.9)


def test_what_cannot_be_written_at_the_end_is_found_before_the_first_step(
    save_tiny, tmp_path, write_jsonl, monkeypatch
):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 8)
    settings = ["train.max_steps=1", "data.max_length=32", f"data.sources=[{data}]"]
    recipe = load_recipe(None, settings)
    steps, base = [], save_tiny("llama")
    monkeypatch.setattr(AdaptTrainer, "training_step", lambda *args: steps.append(args))
    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", refuse)
    with pytest.raises(Ar2DiffError, match=r"could not be written .refused: of no use"):
        adapt(str(base), recipe, tmp_path / "out")
    assert not steps and not (tmp_path / "out").exists()
