"""Bad input: two lines, exit 2, nothing written. Each test is one mistake and what it says."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main
from safetensors.torch import load_file, save_file


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
        lines = captured.err.strip().splitlines()
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
    assert "train.learning_rat: unknown key in section 'train'" in said
    assert "Did you mean train.learning_rate?" in said


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
    assert "is not key=value" in adapts_not(tiny_checkpoint, "fast")


def test_missing_data_file(adapts_not, tiny_checkpoint):
    assert "no such file" in adapts_not(tiny_checkpoint, data="./nowhere.jsonl")


def test_empty_data_file(adapts_not, tiny_checkpoint, write_jsonl):
    assert "is empty" in adapts_not(tiny_checkpoint, data=write_jsonl("empty.jsonl", []))


def test_no_data_named(fails, tmp_path, tiny_checkpoint):
    assert "no data is named" in fails("adapt", tiny_checkpoint, "--output-dir", tmp_path / "out")


def test_row_without_the_field_is_named_by_number(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "one"}, {"story": "two"}])
    assert "row 2 has no field 'text' (it has story)" in adapts_not(tiny_checkpoint, data=data)


def test_broken_json_line_is_named_by_number(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "one"}, {"text": "two"}, '{"text": "thr'])
    assert "row 3 is not JSON" in adapts_not(tiny_checkpoint, data=data)


def test_rows_all_shorter_than_two_tokens(adapts_not, tiny_checkpoint, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": ""}] * 4)
    assert "has 2 tokens" in adapts_not(tiny_checkpoint, data=data)


def test_truncated_weights(adapts_not, broken):
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut short" in adapts_not(broken)


def test_pickled_weights_are_not_opened(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    assert "pickled" in adapts_not(broken)


def test_config_without_weights(adapts_not, broken):
    (broken / "model.safetensors").unlink()
    assert "model.safetensors is not" in adapts_not(broken)


def test_folder_without_config(adapts_not, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "config.json: no such file" in adapts_not(tmp_path / "nothing")


def test_weights_that_lack_a_tensor(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "up_proj" in adapts_not(broken)


def test_encoder_only_architecture(adapts_not, broken):
    change_json(broken / "config.json", architectures=["BertForMaskedLM"], model_type="bert")
    assert "BertForMaskedLM is not a decoder-only causal LM" in adapts_not(broken)


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
    assert "convert.block_length 1024 is over the model's context of 512" in said


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
    assert "holds the input" in said
    assert (broken / "model.safetensors").is_file()


def test_disk_too_full_to_start(adapts_not, tiny_checkpoint, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("ar2diff.checkpoint.shutil.disk_usage", lambda path: usage)
    assert "the disk is full" in adapts_not(tiny_checkpoint)


def test_disk_full_while_writing_leaves_nothing(fails, tmp_path, tiny_checkpoint, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    said = fails("adapt", tiny_checkpoint, "--max-steps", 0, "--output-dir", tmp_path / "out")
    assert "the disk is full" in said


def test_hub_id_while_offline(adapts_not, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not to be had from the Hub" in adapts_not("someone/some-model")


def converted(tiny_checkpoint: Path, folder: Path) -> Path:
    from ar2diff.config import load_recipe
    from ar2diff.training.adapt import adapt

    adapt(str(tiny_checkpoint), load_recipe(None, ["train.max_steps=0"]), folder)
    return folder


def test_mask_id_out_of_range(fails, tmp_path, tiny_checkpoint):
    folder = converted(tiny_checkpoint, tmp_path / "converted")
    block = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(
        folder / "config.json", mask_token_id=9999, diffusion={**block, "mask_token_id": 9999}
    )
    assert "mask_token_id 9999 is out of range" in fails("generate", folder, "--prompt", "the cat")


def test_mask_id_that_differs_from_its_copy(fails, tmp_path, tiny_checkpoint):
    folder = converted(tiny_checkpoint, tmp_path / "converted")
    change_json(folder / "config.json", mask_token_id=5)
    assert "mask_token_id is 5 but diffusion.mask_token_id is 259" in fails("check", folder)


def test_spec_of_a_higher_format(fails, tmp_path, tiny_checkpoint):
    folder = converted(tiny_checkpoint, tmp_path / "converted")
    block = json.loads((folder / "config.json").read_text())["diffusion"]
    change_json(folder / "config.json", diffusion={**block, "format": 2, "horizon": 3})
    assert "diffusion.format is 2, this version reads 1" in fails(
        "generate", folder, "--prompt", "a"
    )


def test_tokenizer_that_does_not_match_the_weights(adapts_not, broken):
    weights = load_file(broken / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:100].clone()
    weights["lm_head.weight"] = weights["lm_head.weight"][:100].clone()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    change_json(broken / "config.json", vocab_size=100)
    assert "the tokenizer has 259 tokens, the weights 100 rows" in adapts_not(broken)


def test_generate_with_a_model_that_is_not_converted(fails, tiny_checkpoint):
    assert "is not converted" in fails("generate", tiny_checkpoint, "--prompt", "the cat")


def test_converted_model_refuses_another_attention(fails, tmp_path, tiny_checkpoint, write_jsonl):
    folder = converted(tiny_checkpoint, tmp_path / "converted")
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
    assert "converted already, with attention causal_context" in said
