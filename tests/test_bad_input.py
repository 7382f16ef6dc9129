"""Bad input: two lines, exit 2, nothing written. Each test is one mistake and what it says."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main
from conftest import besides_progress
from safetensors.torch import load, load_file, save_file

from ar2diff.checkpoint.output import check_output
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.spec import Spec


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run the command line; it must exit with 2, print two lines, and leave `out` unwritten."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        lines = besides_progress(captured.err)
        assert len(lines) == 2, captured.err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("  fix: ")
        assert not (tmp_path / "out").exists()
        return captured.err

    return run


@pytest.fixture
def broken(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


@pytest.fixture
def adapts_not(fails, tmp_path, write_jsonl):
    """`adapt MODEL ...` with sound data unless other data is named, and `out` as its folder."""

    def run(model: object, *arguments: object, data: object = None) -> str:
        data = data or write_jsonl("good.jsonl", [{"text": "the cat sat on the mat"}] * 8)
        return fails(
            "adapt",
            model,
            "--data",
            data,
            "--max-steps",
            1,
            "--output-dir",
            tmp_path / "out",
            *arguments,
        )

    return run


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_unknown_recipe_key_names_its_section_and_the_nearest_key(adapts_not, tiny_checkpoint):
    said = adapts_not(tiny_checkpoint, "train.learning_rat=1e-3")
    assert "train.learning_rat is not a key of section train" in said
    assert "did you mean train.learning_rate?" in said


def test_unknown_top_level_key_names_the_section_it_belongs_to(adapts_not, tiny_checkpoint):
    said = adapts_not(tiny_checkpoint, "learning_rate=1e-3")
    assert "top level" in said
    assert "train.learning_rate" in said


def test_wrong_type(adapts_not, tiny_checkpoint):
    assert "train.max_grad_norm" in adapts_not(tiny_checkpoint, "train.max_grad_norm=much")


def test_unknown_recipe(fails, tmp_path, tiny_checkpoint):
    said = fails(
        "adapt", tiny_checkpoint, "--recipe", "stories3n", "--output-dir", tmp_path / "out"
    )
    assert "did you mean stories3m?" in said


def test_argument_that_is_no_key_value(adapts_not, tiny_checkpoint):
    assert "is not of the form key=value" in adapts_not(tiny_checkpoint, "fast")


def test_missing_data_file(adapts_not, tiny_checkpoint):
    assert "does not exist" in adapts_not(tiny_checkpoint, data="./nowhere.jsonl")


def test_empty_data_file(adapts_not, tiny_checkpoint, write_jsonl):
    assert "is empty" in adapts_not(tiny_checkpoint, data=write_jsonl("empty.jsonl", []))


def test_no_data_named(fails, tmp_path, tiny_checkpoint):
    assert "there is no data" in fails("adapt", tiny_checkpoint, "--output-dir", tmp_path / "out")


def test_row_without_the_field_is_named_by_number(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "one"}, {"story": "two"}])
    assert "row 2 has no column 'text' (it has story)" in adapts_not(tiny_checkpoint, data=data)


def test_broken_json_line_is_named_by_number(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "one"}, {"text": "two"}, '{"text": "thr'])
    assert "row 3 is not JSON" in adapts_not(tiny_checkpoint, data=data)


def test_rows_all_shorter_than_two_tokens(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": ""}] * 4)
    assert "the data has no usable row" in adapts_not(tiny_checkpoint, data=data)


def test_truncated_weights(adapts_not, broken):
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "incomplete or damaged" in adapts_not(broken)


def test_pickled_weights_are_not_opened(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    assert "pickled" in adapts_not(broken)


def test_config_without_weights(adapts_not, broken):
    (broken / "model.safetensors").unlink()
    assert "no model.safetensors" in adapts_not(broken)


def test_folder_without_config(adapts_not, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "config.json does not exist" in adapts_not(tmp_path / "nothing")


def test_weights_that_lack_a_tensor(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "up_proj" in adapts_not(broken)


def test_encoder_only_architecture(adapts_not, broken):
    name = "BertForQuestionAnswering"
    change_json(broken / "config.json", architectures=[name], model_type="bert")
    said = f"{name} is neither a decoder-only causal LM, nor a masked LM, nor a"
    assert said in adapts_not(broken)


def test_unconvertible_architecture(adapts_not, tmp_path, tiny_tokenizer):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tiny_tokenizer.save_pretrained(tmp_path / "neo")
    said = adapts_not(tmp_path / "neo")
    assert "gpt_neo cannot be converted to causal_context attention" in said


def test_block_length_over_the_context(adapts_not, tiny_checkpoint):
    said = adapts_not(tiny_checkpoint, "convert.block_length=1024", "data.max_length=1024")
    assert "convert.block_length is 1024, more than the model's context of 512" in said


def test_non_empty_output_folder(fails, tmp_path, tiny_checkpoint):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    said = fails("adapt", tiny_checkpoint, "--max-steps", 0, "--output-dir", tmp_path / "full")
    assert "is not empty" in said
    said = fails(
        "adapt", tiny_checkpoint, "--max-steps", 0, "--output-dir", tmp_path / "full", "--overwrite"
    )
    assert "did not write" in said
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_output_folder_that_holds_the_model(fails, broken):
    said = fails("adapt", broken, "--max-steps", 0, "--output-dir", broken, "--overwrite")
    assert "contains the input" in said
    assert (broken / "model.safetensors").is_file()


def test_compile_without_a_compiler(adapts_not, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = adapts_not(tiny_checkpoint, "train.compile=true")
    assert "train.compile on a CPU needs no-such-compiler" in said


def test_output_folder_whose_name_is_too_long(tmp_path):
    with pytest.raises(Ar2DiffError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))


def test_disk_too_full_to_start(adapts_not, tiny_checkpoint, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("ar2diff.checkpoint.output.shutil.disk_usage", lambda path: usage)
    assert "the disk is full" in adapts_not(tiny_checkpoint)


def test_disk_full_while_writing_leaves_nothing(fails, tmp_path, tiny_checkpoint, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    said = fails("adapt", tiny_checkpoint, "--max-steps", 0, "--output-dir", tmp_path / "out")
    assert "the disk is full" in said


def test_hub_id_while_offline(adapts_not, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be downloaded from the Hub" in adapts_not("someone/some-model")


def convert_to(tiny_checkpoint: Path, folder: Path) -> Path:
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    adapt(str(tiny_checkpoint), load_recipe(None, ["train.max_steps=0"]), folder)
    return folder


def test_mask_id_out_of_range(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    block = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(
        folder / "config.json", mask_token_id=9999, diffusion={**block, "mask_token_id": 9999}
    )
    assert "mask_token_id 9999 is out of range" in fails("generate", folder, "--prompt", "the cat")


def test_mask_id_that_differs_from_its_copy(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    change_json(folder / "config.json", mask_token_id=5)
    assert "mask_token_id is 5, but diffusion.mask_token_id is 259" in fails("check", folder)


def test_spec_of_a_higher_format(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    block = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(folder / "config.json", diffusion={**block, "format": 5, "horizon": 3})
    assert "diffusion.format is 5; this version of ar2diff reads formats up to 4" in fails(
        "generate", folder, "--prompt", "a"
    )


UNIFORM = {"kind": "uniform"}
ODD_NOISES = [  # what is changed in a block of format 3, and what is said of it
    ({"noise": "mask"}, "diffusion.noise is 'mask', but must be an object with a kind"),
    ({"noise": {"kind": "mask"}}, "diffusion.noise.kind is 'mask', but must be another one"),
    ({"noise": None}, "diffusion.noise is None"),
    ({"noise": {}}, "diffusion.noise.kind is None, but must be one of mask, uniform"),
    ({"noise": {"kind": ["uniform"]}}, "diffusion.noise.kind is ['uniform']"),
    ({"noise": UNIFORM | {"schedul": "linear"}}, "lacks, 'schedul'; did you mean schedule?"),
    ({"noise": UNIFORM | {"ids": [1]}}, "has a key that kind uniform lacks, 'ids'"),
    ({"noise": UNIFORM | {"form": {"a": 1}}}, "diffusion.noise.form is {'a': 1}"),
    ({"noise": UNIFORM | {"logits": "posterior"}}, "must be others in the tracked form"),
    (
        {"noise": UNIFORM | {"form": "free", "logits": "posterior"}},
        "must be others with prediction shift in blocks",
    ),
    ({"noise": {"kind": "mask_uniform", "p_u": True}}, "diffusion.noise.p_u is True"),
    ({"noise": {"kind": "mask_uniform", "p_u": float("nan")}}, "diffusion.noise.p_u is nan"),
    ({"noise": {"kind": "mask_uniform", "p_u": 10**400}}, "p_u is an integer of 1329 bits"),
    ({"noise": {"kind": "mask_uniform", "gamma": 3}}, "diffusion.noise.gamma is 3"),
    ({"noise": {"kind": "spindle"}}, "diffusion.noise.sha256 is None, but must be the SHA-256 of"),
    ({"noise": {"kind": "nearest", "sha256": "ab"}}, "sha256 is 'ab', but must be 64 hexadecimal"),
    ({"noise": UNIFORM | {"sha256": "a" * 64}}, "has a key that kind uniform lacks, 'sha256'"),
    ({"format": 1}, "diffusion.noise is {'kind': 'uniform'}, but must be mask in format 1"),
    ({"format": 1, "noise": "uniform"}, "diffusion.noise is 'uniform', but must be mask"),
    ({"head": {}}, "diffusion has an unknown key, 'head'"),
]


@pytest.mark.parametrize("changes,said", ODD_NOISES, ids=lambda value: str(value)[:60])
def test_noises_that_a_spec_cannot_have(changes, said):
    block = {
        "format": 3, "noise": UNIFORM, "mask_token_id": 9, "attention": "causal_context",
        "block_length": 8, "prediction": "shift", "ar_mode": True, "local_window": None,
        "max_length": 64,
    }  # fmt: skip
    assert Spec.from_config({"mask_token_id": 9, "diffusion": block}).noise.kind == "uniform"
    with pytest.raises(Ar2DiffError) as refused:
        Spec.from_config({"mask_token_id": 9, "diffusion": block | changes})
    assert said in refused.value.what


def test_odd_noise_in_a_folder_names_the_file(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    block = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(folder / "config.json", diffusion={**block, "format": 3, "noise": {"kind": "x"}})
    said = fails("generate", folder, "--prompt", "a")
    assert "config.json" in said and "diffusion.noise.kind is 'x'" in said


FREE = ["noise.kind=uniform", "noise.form=free"]
GIDD = "noise.kind=mask_uniform"
BAD_NOISES = [
    (["noise.kind=maks"], "noise: kind is 'maks', but must be one of mask, uniform"),
    (["noise.form=free"], "form and parameters belong to a kind"),
    (["noise.kind=mask", "noise.form=free"], "form is 'free', but must be tracked"),
    ([GIDD, "noise.form=tracked"], "form is 'tracked', but must be free"),
    ([GIDD, "noise.parameters={pu: 0.1}"], "lacks, 'pu'; did you mean p_u?"),
    ([GIDD, "noise.parameters={mask: 3}"], "its keys are kind, form, logits, p_u, gamma"),
    ([GIDD, "noise.parameters={p_u: 1}"], "p_u is 1.0, but must be a number above 0"),
    ([GIDD, "noise.parameters={p_u: .nan}"], "p_u is nan"),
    ([GIDD, "noise.parameters={p_u: .inf}"], "p_u is inf"),
    ([GIDD, "noise.parameters={p_u: true}"], "'p_u' is True, but must be a number or a word"),
    ([GIDD, "noise.parameters={p_u: [1]}"], "'p_u' is [1], but must be a number or a word"),
    ([GIDD, "noise.parameters={p_u: much}"], "p_u is 'much', but must be a number"),
    ([GIDD, "noise.parameters={gamma: 3}"], "gamma is 3.0"),
    (["noise.kind=uniform", "noise.parameters={kind: mask}"], "kind is not a parameter"),
    (["noise.kind=uniform", "noise.parameters={schedule: cos}"], "schedule is 'cos'"),
    (["noise.kind=self", "noise.parameters={guessed: true}"], "'guessed' is True"),
    (["noise.kind=self", "noise.complementary=true"], "which changes visible tokens too"),
    ([*FREE, "noise.parameters={logits: posterior}"], "cannot be combined with convert.prediction"),
    ([*FREE, "noise.complementary=true"], "where all tokens are scored"),
    ([*FREE, "objective.weight=1/t"], "objective.weight must be uniform"),
    ([*FREE, "objective.weight=cart"], "objective.weight must be uniform"),
    ([*FREE, "objective.distil.target=clean"], "objective.distil cannot be used"),
    ([*FREE, "noise.on_policy=true"], "whose states it does not keep"),
    ([*FREE, "rl.estimator=trajectory"], "one_step, elbo, ar can"),
    (["noise.kind=uniform", "convert.head_rank=4"], "the head reads masks"),
    (["noise.spans=3", "noise.kind=mask_uniform"], "which can look like the tokens given"),
    (["noise.spans=3", "noise.kind=self"], "noise.spans cannot be used with noise.kind self"),
    (["noise.dropped=0.1"], "dropped needs spans above 1"),
    (["noise.spans=2", "rl.estimator=elbo"], "noise.spans cannot be used with rl"),
    (
        ["noise.spans=2", "noise.dropped=0.1", "objective.distil.target=clean"],
        "noise.dropped cannot be used with objective.distil",
    ),
    (["noise.kind=spindle", "noise.parameters={strength: 0.32}"], "a number from 0 to 0.318"),
    (["noise.kind=spindle", "noise.parameters={logits: posterior}"], "where tokens are certain"),
    (["noise.kind=gaussian", "noise.parameters={order: size}"], "must be component or ids"),
    (["noise.kind=gaussian", "noise.parameters={width: 0}"], "width is 0.0"),
    (["noise.kind=nearest", "noise.parameters={neighbours: 2.5}"], "must be a whole number"),
    (["noise.kind=nearest", "noise.parameters={sha256: ab}"], "sha256 is not a parameter"),
    (["noise.kind=embedding", "noise.parameters={guessed: 2}"], "must be a number from 0 to 1"),
]


@pytest.mark.parametrize("overrides,said", BAD_NOISES, ids=lambda value: str(value)[:70])
def test_noises_that_a_recipe_cannot_have(overrides, said):
    with pytest.raises(Ar2DiffError) as refused:
        load_recipe(None, overrides)
    assert said in refused.value.what


def test_numbers_of_a_noise_in_any_notation():
    recipe = load_recipe(None, [GIDD, "noise.parameters={p_u: 2e-1, gamma: 1}"])
    assert recipe.noise.process.p_u == 0.2


def test_what_a_free_noise_cannot_train_is_refused_for_a_converted_model_too(
    adapts_not, convert_tiny
):
    folder = convert_tiny(*FREE)
    for override in ("objective.weight=1/t", "noise.complementary=true", "convert.head_rank=4"):
        assert override.split("=")[0] in adapts_not(folder, override)
    said = adapts_not(folder, "noise.kind=mask", "peft.r=2")
    assert "an adapter cannot change the noise of its base" in said


DECIDES = "needs to know which tokens are decided, but this model's noise, uniform in the free form"
MISTAKES_OF_NOISES = [
    ("uniform", "free", ["--threshold", 0.5], DECIDES),
    ("uniform", "free", ["--entropy-bound", 0.5], DECIDES),
    ("uniform", "free", ["--order", "margin"], DECIDES),
    ("uniform", "free", ["--remask", 0.2], DECIDES),
    ("uniform", "free", ["--edit-threshold", 0.5], DECIDES),
    ("uniform", "free", ["--corrector-steps", 2], DECIDES),
    ("uniform", "free", ["--cfg-scale", 1], "--cfg-scale masks the prompt"),
    ("uniform", "free", ["--classifier", "math:sqrt"], "--classifier moves the vectors"),
    ("uniform", "free", ["--fluency", 1], "set --classifier too"),
    ("uniform", "tracked", ["--mode", "speculative"], "drafts in masks, which this model's noise"),
    ("uniform", "tracked", ["--prompt", "a {mask:3} b"], "this model cannot fill gaps"),
    ("uniform", "tracked", ["--corrector-steps", 2], "set --edit-threshold too"),
    ("uniform", "tracked", ["--edit-threshold", -1], "--edit-threshold is -1.0"),
    ("uniform", "tracked", ["--edit-threshold", "nan"], "--edit-threshold is nan"),
    (
        "self", "tracked", ["--edit-threshold", 0.5, "--choice", "a"],
        "--edit-threshold cannot be combined with --choice",
    ),
    (
        "self", "tracked", ["--edit-threshold", 0.5, "--remask", 0.2, "--steps-per-block", 4],
        "--edit-threshold cannot be combined with --remask",
    ),
    (
        "self", "tracked", ["--mode", "ar", "--edit-threshold", 0.5],
        "--edit-threshold only works with --mode diffusion, not with --mode ar",
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind,form,arguments,said", MISTAKES_OF_NOISES)
def test_mistakes_of_generate_with_another_noise(fails, convert_tiny, kind, form, arguments, said):
    folder = convert_tiny(f"noise.kind={kind}", f"noise.form={form}")
    if "--prompt" not in arguments:
        arguments = ["--prompt", "a", *arguments]
    assert said in fails("generate", folder, *arguments)


def test_noises_that_cannot_be_fitted_to_a_model(adapts_not, tiny_checkpoint, monkeypatch):
    few = adapts_not(tiny_checkpoint, "noise.kind=nearest", "noise.parameters={neighbours: 1}")
    assert "groups between which there are no jumps" in few
    assert "noise.parameters.neighbours=1" in few and "set more neighbours" in few
    told = adapts_not(tiny_checkpoint, "noise.kind=spindle", "--max-steps", 0)
    assert "is fitted to the texts that adapt trains on, and here are none" in told
    monkeypatch.setattr("ar2diff.core.walks.MOST", 100)
    many = adapts_not(tiny_checkpoint, "noise.kind=gaussian")
    assert "the model has 259 tokens, more than 100" in many
    assert "use noise.kind uniform or mask_uniform" in many and "noise.kind=gaussian" in many


def test_what_a_noise_was_fitted_to_is_missing_or_another_or_damaged(
    fails, convert_tiny, converted, write_jsonl, tmp_path
):
    data = write_jsonl("text.jsonl", [{"text": "the cat sat on the mat"}] * 8)
    own = ["noise.kind=spindle", f"data.sources=[{data}]", "train.max_steps=1"]
    folder = Path(shutil.copytree(convert_tiny(*own), tmp_path / "fitted"))
    config = json.loads((folder / "config.json").read_text())
    file = folder / "noise.safetensors"
    tensors = load(file.read_bytes())
    generate = "generate", folder, "--prompt", "a"
    file.write_bytes(b"nothing")
    assert "noise.safetensors is not the file that config.json names" in fails(*generate)
    damaged = {"ids": tensors["ids"], "information": tensors["information"] + 1}
    for content, said in ((b"nothing", "is damaged"), (damaged, "not that of any texts")):
        if content is damaged:
            save_file(content, file)
        config["diffusion"]["noise"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))
        assert said in fails(*generate)
    file.unlink()
    assert "to which the noise was fitted, is missing" in fails("check", folder)
    line = "--data", data, "--max-steps", 1, "--output-dir", tmp_path / "out"
    assert "noise.spans only works with adapt" in fails("sft", converted, *line, "noise.spans=2")
    said = fails("sft", converted, *line, "noise.kind=spindle")
    assert "is fitted to the texts that adapt trains on" in said and "run 'ar2diff adapt'" in said


def test_caches_that_keep_what_open_slots_showed(fails, convert_tiny):
    folder = convert_tiny("noise.kind=mask_uniform", "convert.attention=full")
    said = fails("generate", folder, "--prompt", "a", "--cache", "dual")
    assert "keeps what open slots showed" in said and "use --cache none" in said


def test_export_of_a_noise_that_engines_cannot_decode(fails, convert_tiny, tmp_path):
    folder = convert_tiny("noise.kind=mask_uniform", "convert.attention=block_causal")
    said = fails("export", folder, "--to", "sdar", "--output-dir", tmp_path / "out")
    assert "its noise is mask_uniform, but the engines decode masks alone" in said


def test_tokenizer_that_does_not_match_the_weights(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:100].clone()
    weights["lm_head.weight"] = weights["lm_head.weight"][:100].clone()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    change_json(broken / "config.json", vocab_size=100)
    assert "the tokenizer has 259 tokens, but the weights have 100 rows" in adapts_not(broken)


def test_generate_with_a_model_that_is_not_converted(fails, tiny_checkpoint):
    assert "is not converted" in fails("generate", tiny_checkpoint, "--prompt", "the cat")


def test_converted_model_refuses_another_attention(fails, tmp_path, tiny_checkpoint, write_jsonl):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    data = write_jsonl("good.jsonl", [{"text": "the cat sat"}] * 4)
    said = fails(
        "adapt",
        folder,
        "--data",
        data,
        "--output-dir",
        tmp_path / "out",
        "convert.attention=block_causal",
    )
    assert "converted with attention causal_context" in said


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["adapt"], "adapt needs MODEL"),
        (["adapt", "x", "--max-steps", "many"], "--max-steps"),
        (["generate", "x", "--prompt", "a", "--mode", "sideways"], "--mode"),
        (["translate"], "ar2diff has no verb"),
        (["recipes", "cp", "demo", "x" * 300], "cannot be written: File name too long"),
        (["generate", "x", "--prompts-file", "x" * 300], "File name too long"),
        (["eval", "x", "--data", "y", "--samples", "9" * 18], "--samples is 999999999999999999"),
        (["card", "x" * 300], "File name too long"),
    ],
)
def test_wrong_usage_is_two_lines_too(fails, arguments, said):
    assert said in fails(*arguments)


GENERATE_MISTAKES = [
    (["--prompt", "a" * 600], "the prompt has 601 tokens, which leaves no room"),
    (["--block-length", 64], "--block-length 64 is above the model's block length of 8"),
    (["--prompt", "a {mask:0} b"], "'{mask:0}' does not say how many"),
    (["--prompt", "a {mask:x} b"], "'{mask:x}' does not say how many"),
    (["--prompt", "a {mask} b"], "'{mask}' does not say how many"),
    (["--prompt", "a{mask:2}b", "--mode", "ar"], "--mode ar cannot fill gaps"),
    (["--cache", "prefix"], "--cache 'prefix' does not work with causal_context attention"),
    (
        ["--steps-per-block", 4, "--entropy-bound", 0.5],
        "--entropy-bound cannot be combined with --threshold or --steps-per-block",
    ),
    (["--temperature", -1], "--temperature is -1.0"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--top-p", 1.5], "--top-p is 1.5"),
    (["--top-k", 0, "--min-p", -1], "--min-p is -1.0"),
    (["--steps-per-block", 0], "--steps-per-block is 0"),
    (["--remask", 0.5], "--remask needs a fixed number of steps"),
    (["--order", "margin"], "--order margin needs a fixed number of steps"),
    (["--repetition-penalty", 0], "--repetition-penalty is 0.0"),
    (["--max-new-tokens", -1], "--max-new-tokens is -1"),
    (
        ["--mode", "diffusion", "--draft-length", 3],
        "--draft-length only works with --mode speculative",
    ),
    (
        ["--steps-per-block", 3, "--mode", "ar"],
        "--steps-per-block only works with --mode diffusion, not with --mode ar",
    ),
    (["--treshold", 3], "--threshold 3"),
    (["--stream", "--json"], "--stream prints text"),
    (["--length", 0, "--prefix", "a"], "--length '0' is not a number of tokens"),
    (["--length", "4,x", "--prefix", "a"], "--length 'x' is not a number of tokens"),
    (["--suffix", "b"], "--suffix only works together with --prefix"),
    (["--length", "3"], "--length only works together with --prefix"),
    (["--prefix", "a"], "--prefix only works together with --length"),
    (
        ["--prefix", "a", "--prompt", "b", "--length", 2],
        "more than one of --prompt, --prompts-file and --prefix is given",
    ),
    (["--output", "/nowhere/out.jsonl"], "the folder /nowhere does not exist"),
    (["--output", "/"], "is a folder"),
]


@pytest.mark.parametrize("arguments,said", GENERATE_MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_of_generate(fails, converted, monkeypatch, arguments, said):
    if "601 tokens" not in said:  # for that one the tokenizer must be there

        def load(*args: object, **kwargs: object) -> None:
            raise AssertionError("the model was loaded before its options were checked")

        monkeypatch.setattr("ar2diff.generation.complete.load_checkpoint", load)
    if not {"--prompt", "--prefix", "--suffix", "--length"} & set(arguments):
        arguments = ["--prompt", "a", *arguments]
    assert said in fails("generate", converted, *arguments)


def test_modes_that_a_model_does_not_have(fails, convert_tiny, tiny_checkpoint):
    folder = convert_tiny("convert.attention=block_causal")
    for verb in (["generate", folder, "--prompt", "a"], ["chat", folder]):
        for mode in ("ar", "speculative"):
            said = fails(*verb, "--mode", mode)
            assert f"--mode {mode} needs an AR mode, which this model" in said
    said = fails("chat", tiny_checkpoint, "--mode", "speculative")
    assert f"convert it with 'ar2diff adapt {tiny_checkpoint} --output-dir DIR'" in said


def test_model_whose_attention_is_not_what_its_spec_says(fails, converted, monkeypatch):
    monkeypatch.setattr(
        "ar2diff.core.generate.probe", lambda model, spec: ["a token reads the next"]
    )
    for verb in (["generate", converted, "--prompt", "a"], ["chat", converted]):
        said = fails(*verb)
        assert "the model does not do what its spec says: a token reads the next" in said


def test_output_that_exists(fails, converted, tmp_path):
    (tmp_path / "a.jsonl").write_text("old")
    said = fails("generate", converted, "--prompt", "a", "--output", tmp_path / "a.jsonl")
    assert "a.jsonl already exists" in said
    assert "--overwrite" in said


def test_gap_and_length_over_the_context(fails, converted):
    said = fails("generate", converted, "--prompt", "a{mask:99999}")
    assert "the model's context of 512" in said
    said = fails("generate", converted, "--prefix", "a", "--length", "2,600")
    assert "the prompt has 602 tokens" in said


def test_cache_of_block_attention_for_full_attention(fails, convert_tiny):
    folder = convert_tiny("convert.attention=full")
    said = fails("generate", folder, "--prompt", "a", "--cache", "static")
    assert "--cache 'static' does not work with full attention" in said
    assert "one of none, prefix, dual" in said


@pytest.mark.parametrize(
    "name,text,said",
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"', "row 3 is not JSON"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"text": "b"}',
            "row 2 has no text in column 'prompt'",
        ),
        ("a.jsonl", '{"prompt": 3}', "row 1 has no text in column 'prompt'"),
        ("a.jsonl", '{"prompt": ""}', "row 1 has no text in column 'prompt'"),
        ("a.jsonl", "[1]", "row 1 is a list, but must be an object"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "half a surrogate pair is not valid Unicode"),
        ("a.txt", "one\ntwo {mask:0}\n", "row 2: the gap '{mask:0}' does not say how many"),
        ("a.txt", "\n \n", "a.txt is empty"),
        ("a.txt.gz", "no gzip", "a.txt.gz cannot be read: Not a gzipped file"),
        ("a.txt", "one\n" + "a" * 600, "prompt 2: the prompt has 601 tokens"),
    ],
)
def test_broken_file_of_prompts(fails, converted, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    assert said in fails("generate", converted, "--prompts-file", tmp_path / name)


def test_file_of_prompts_that_is_not_there(fails, converted, tmp_path):
    said = fails("generate", converted, "--prompts-file", tmp_path / "none.txt")
    assert "does not exist" in said


def test_system_message_without_a_chat_template(fails, converted):
    assert "needs a chat template" in fails("chat", converted, "--system", "be brief")


@pytest.mark.parametrize(
    "setting,said",
    [
        ("train.report_to=wandbb", "train.report_to 'wandbb'"),
        ("convert.mask_token='</s>'", "has another use"),
        (
            "data.sources=[{path: a, weight: 1}, {path: b}]",
            "either all sources (and data.self) or no source must have a weight",
        ),
        ("train.decay_steps=5", "with train.schedule warmup_stable_decay"),
        ("train.schedule=warmup_stable_decay", "needs decay_steps"),
        ("eval.steps=1", "no text has 128 tokens"),
        ("objective.wieght=1/t", "did you mean objective.weight?"),
    ],
)
def test_settings_that_contradict_the_run(adapts_not, tiny_checkpoint, setting, said, request):
    if setting.startswith("data.sources"):
        assert said in request.getfixturevalue("fails")("adapt", tiny_checkpoint, setting)
    else:
        assert said in adapts_not(tiny_checkpoint, setting)


def test_rows_of_evaluation_over_the_context(fails, adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat"}])
    assert "context of 512" in fails("eval", tiny_checkpoint, "--data", data, "--length", 1024)
    assert "context of 512" in adapts_not(tiny_checkpoint, "eval.steps=1", "eval.length=1024")


def test_damaged_bytes_in_a_gz(adapts_not, tiny_checkpoint, tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "the cat sat on the mat"}\n' * 50, mtime=0))
    packed[20:30] = b"\xff" * 10
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert "a.jsonl.gz" in adapts_not(tiny_checkpoint, data=tmp_path / "a.jsonl.gz")


def test_text_that_is_no_unicode(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "one"}, '{"text": "\\ud800"}'])
    assert "row 2 is not JSON: half a surrogate pair is not valid Unicode" in adapts_not(
        tiny_checkpoint, data=data
    )


def test_binary_file_as_recipe_or_prompts(fails, tmp_path, tiny_checkpoint):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "recipe" in fails("adapt", tiny_checkpoint, "--recipe", tmp_path / "a.yaml")
    assert "a.yaml" in fails("generate", tiny_checkpoint, "--prompts-file", tmp_path / "a.yaml")


def test_index_without_its_map(adapts_not, broken):
    (broken / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in adapts_not(broken)


def test_config_of_the_wrong_type(adapts_not, broken):
    change_json(broken / "config.json", hidden_size="wide")
    assert "does not describe a llama model" in adapts_not(broken)


@pytest.mark.parametrize("block", [{"format": "2"}, {"format": None}, [1]])
def test_spec_of_a_wrong_type(fails, tmp_path, tiny_checkpoint, block):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    old = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(
        folder / "config.json", diffusion={**old, **block} if isinstance(block, dict) else block
    )
    assert "diffusion" in fails("check", folder)


def test_prompt_that_spells_the_mask_token(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    assert "contains the mask token" in fails("generate", folder, "--prompt", "a <|mask|> b")


def test_answer_over_the_context_names_what_fits(fails, tmp_path, tiny_checkpoint):
    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    said = fails("generate", folder, "--prompt", "the cat", "--max-new-tokens", 600)
    assert "--max-new-tokens to 504" in said


def test_overwrite_takes_away_what_is_ours_and_leaves_the_rest(tmp_path, tiny_checkpoint):
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    folder = convert_to(tiny_checkpoint, tmp_path / "converted")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints").mkdir()
    adapt(str(tiny_checkpoint), load_recipe(None, ["train.max_steps=0"]), folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos 64 vs 0"),
    ],
    ids=str,
)
def test_disk_full_at_a_checkpoint_leaves_nothing_to_mistake(
    adapts_not, tiny_checkpoint, monkeypatch, error
):
    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    monkeypatch.setattr("ar2diff.checkpoint.output.FULL", 1 << 62)  # as if no byte were free
    assert "the disk is full" in adapts_not(tiny_checkpoint, "train.logging_steps=1000")


# sft

PAIRS = [{"prompt": f"what is {n}?", "completion": f" it is {n}."} for n in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
] * 4


@pytest.fixture
def tunes_not(fails, tmp_path, write_jsonl):
    """`sft MODEL ...` on rows, sound ones unless others are named, and `out` as its folder."""

    def run(model: object, *arguments: object, rows: object = PAIRS) -> str:
        data = write_jsonl("rows.jsonl", rows)
        options = ["--data", data, "--max-steps", 1, "--output-dir", tmp_path / "out"]
        return fails("sft", model, *options, *arguments)

    return run


BAD_ROWS = [
    ({"story": "a"}, "has neither messages, nor prompt and completion, nor 'text' (it has story)"),
    (
        {"prompt": "a"},
        "nor prompt and completion, nor 'text' (it has prompt)",
    ),
    ({"prompt": "a", "completion": None}, "completion is null, but must be text"),
    ({"messages": [{"role": "assistant"}]}, "messages[0]: the content is null"),
    ({"messages": [{"role": "user", "content": "a"}]}, "there is no message from the assistant"),
    ({"prompt": "", "completion": ""}, "prompt and completion are empty"),
]


@pytest.mark.parametrize("row, said", BAD_ROWS)
def test_row_that_sft_cannot_learn_from(tunes_not, converted, monkeypatch, row, said):
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)  # it is said before
    told = tunes_not(converted, rows=[row])
    assert all(part in told for part in ("rows.jsonl: row 1", said))


def test_sft_of_a_model_that_is_not_converted(tunes_not, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    said = tunes_not(tiny_checkpoint)
    assert "is not converted" in said and f"run 'ar2diff adapt {tiny_checkpoint}" in said


def test_assistant_alone_without_a_template_that_marks_it(tunes_not, converted, tmp_path):
    assert "the tokenizer has no chat template" in tunes_not(converted, rows=CHATS)
    (tmp_path / "a.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    template = f"data.chat_template={tmp_path / 'a.jinja'}"
    said = tunes_not(converted, template, rows=CHATS)
    assert "does not mark what the assistant says" in said and "data.assistant_only=false" in said
    assert "no such template" in tunes_not(converted, "data.chat_template=plane", rows=CHATS)


def test_end_token_outside_of_what_the_template_marks(tunes_not, converted, tmp_path):
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    said = tunes_not(converted, f"data.chat_template={tmp_path / 'a.jinja'}", rows=CHATS)
    assert "nothing would teach the model to stop" in said


def test_tools_in_a_template_without_them(tunes_not, converted):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    said = tunes_not(converted, "data.chat_template=plain", rows=[row])
    assert "row 1: the chat template plain cannot render it" in said
    assert "plain does not support tools" in said


@pytest.mark.parametrize(
    "policy, rows, said",
    [
        ("drop", PAIRS, "4 of 4 rows are longer than data.max_length 8 and are dropped"),
        ("truncate", PAIRS, "4 of 4 rows are longer than data.max_length 8 and are cut"),
    ],
)
def test_rows_of_which_nothing_fits(tunes_not, converted, policy, rows, said):
    said_of = tunes_not(converted, "data.max_length=8", f"data.overlong={policy}", rows=rows)
    assert f"nothing to learn: {said}" in said_of
    assert "raise data.max_length" in said_of


def test_rows_longer_than_the_models_context(tunes_not, converted, tiny_checkpoint):
    wanted = "data.max_length is 1024, more than the model's context of 512"
    assert wanted in tunes_not(converted, "data.max_length=1024")
    control = ["data.max_length=1024", "objective.kind=ar"]
    assert "context of 512" in tunes_not(tiny_checkpoint, *control)


@pytest.mark.parametrize(
    "targets, said",
    [("[q_porj]", "did you mean q_proj?"), ("[lm_head]", "lm_head is the output head")],
)
def test_adapter_targets_that_sft_cannot_train(tunes_not, converted, targets, said):
    assert said in tunes_not(converted, "peft.r=2", f"peft.targets={targets}")


def test_launch_of_sft_that_cannot_start(tunes_not, converted, tmp_path):
    missing = tmp_path / "none.yaml"
    assert f"launch file {missing} does not exist" in tunes_not(converted, "--launch", missing)
    said = tunes_not(converted, "--launch", "ddp", "--num-processes", 5)
    assert "5 processes, but the data has only 4 rows" in said and "--num-processes 4" in said
