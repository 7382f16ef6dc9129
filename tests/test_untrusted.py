"""A downloaded folder is untrusted: no code of it runs, nothing outside of it is read, and what it
says costs neither hours nor memory. Each mistake is told in the words that fit it."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ar2diff.cli.main import main
from conftest import tiny_spec
from safetensors.torch import load_file, save_file

from ar2diff.checkpoint.files import (
    check_counts,
    find_checkpoint,
    inside,
    read_json,
    read_spec,
    weight_files,
)
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import load_config, load_tokenizer
from ar2diff.config.recipe import load_recipe
from ar2diff.config.safe_json import parse_json
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.probe import probe
from ar2diff.data import template_trial
from ar2diff.data.template_trial import check_cost
from ar2diff.distributed import precision as precision_module
from ar2diff.distributed.precision import computes_in_bf16
from ar2diff.training.memory import estimate

ROOT = Path(__file__).resolve().parents[1]
DEEP = "[" * 5000
LOADERS = {"from_pretrained", "from_config", "load_dataset"}


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "folder"))


def change(file: Path, **values: object) -> None:
    old = json.loads(file.read_text()) if file.is_file() else {}
    new = {name: value for name, value in (old | values).items() if value is not ...}
    file.write_text(json.dumps(new))


def refused(call, *arguments: object, **options: object) -> str:
    with pytest.raises(Ar2DiffError) as caught:
        call(*arguments, **options)
    return f"{caught.value.what}\n{caught.value.fix}"


# Code


@pytest.fixture
def evil(folder, tmp_path, monkeypatch):
    """The folder with a module that would leave a file, and a user who says yes to everything."""
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as EvilConfig\n"
        "from transformers import PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    yield folder
    assert not ran.exists()


def test_a_config_that_needs_code_is_refused_and_none_runs(evil):
    change(evil / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    assert "never runs the code in the folder" in refused(load_checkpoint, str(evil))
    assert "model_type is 'evil'" in refused(load_config, evil)


def test_a_tokenizer_that_needs_code_is_refused_and_none_runs(evil):
    names = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    change(evil / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=names)
    assert "ar2diff never runs" in refused(load_tokenizer, evil)


def test_code_beside_a_stock_model_is_left_alone(evil):
    change(evil / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    assert type(load_checkpoint(str(evil)).model).__name__ == "LlamaForCausalLM"


def test_every_loader_of_transformers_is_told_to_run_no_code():
    places = []
    for file in (*(ROOT / "ar2diff").rglob("*.py"), *(ROOT / "cli").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(call, ast.Attribute) and call.attr in LOADERS):
                continue
            owner = ast.unparse(call.value)
            if owner in (
                "datasets",
                "GenerationConfig",
                "LoraConfig",
                "Spec",
                "cls",
            ):  # these can run none
                continue
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            places.append((file.name, f"{owner}.{call.attr}", told.get("trust_remote_code")))
    assert {told for _, _, told in places} == {"False"}, places
    loads = {(file, call) for file, call, _ in places if call.endswith("from_pretrained")}
    assert {file for file, _ in loads} == {"model.py", "processor.py", "base.py"}
    assert len(loads) == 5


@pytest.mark.parametrize("value", [{"a": None}, "4", True, 0])
def test_a_window_that_is_no_number_of_tokens_is_refused(folder, value):
    change(folder / "config.json", sliding_window=value)
    assert "sliding_window is" in refused(load_config, folder)


@pytest.mark.parametrize("value", [-1, 1.5, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(folder, value):
    change(folder / "config.json", attention_dropout=value)
    assert "'attention_dropout' is" in refused(load_config, folder)


@pytest.mark.parametrize("value", [True, {"model_type": "evil"}])
def test_a_text_config_that_is_none_is_refused(folder, value):
    change(folder / "config.json", text_config=value)
    assert "does not describe a llama model" in refused(load_config, folder)


# Files outside of the folder


def shard(folder: Path, name: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "{outside}", "a/../../secret.safetensors"]
)
def test_an_index_names_no_file_outside(folder, name):
    outside = folder.parent / "secret.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    shard(folder, name.format(outside=outside))
    assert "is not a file inside the folder" in refused(load_checkpoint, str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "a.jinja"])
def test_a_link_that_leads_out_is_refused_before_it_is_read(folder, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"key")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    said = refused(find_checkpoint, str(folder))
    assert f"'{name}' is a symbolic link that leads out of the folder" in said


def test_links_within_a_folder_and_in_the_cache_of_the_hub_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (snapshot / "again.json").symlink_to("config.json")
    assert load_checkpoint(str(snapshot)).commit == "c0ffee"
    assert inside(snapshot, "again.json") == snapshot / "again.json"


def test_a_pipe_or_a_folder_is_no_file(folder):
    (folder / "vocab.txt").mkdir()
    assert "'vocab.txt' is not a file" in refused(find_checkpoint, str(folder))
    (folder / "vocab.txt").rmdir()
    os.mkfifo(folder / "chat_template.jinja")  # reading it would wait for ever
    assert "'chat_template.jinja' is not a file" in refused(find_checkpoint, str(folder))


def test_two_sets_of_weights_are_refused(folder):
    index = {"weight_map": {"a": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has both a model.safetensors and an" in refused(weight_files, folder)


def test_a_config_cannot_name_other_weights(folder):
    change(folder / "config.json", transformers_weights="other.safetensors")
    assert "transformers_weights" in refused(load_checkpoint, str(folder))


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/a", "a\0b", "./nowhere"])
def test_a_reference_that_no_folder_can_have(name):
    assert len(refused(find_checkpoint, name)) < 700


# JSON


@pytest.mark.parametrize(
    "text, said",
    [
        (DEEP, "nested more than 100 levels deep"),
        ('{"a":' * 5000, "nested more than 100 levels deep"),
        ("[" * 200 + "]" * 200, "nested more than 100 levels deep"),
        ("9" * 5000, "an integer of 5000 digits"),
        ("9" * 100, "an integer of 100 digits"),
        (b"\xff{}", "not UTF-8 (byte 0)"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ("{", "at column 2"),
        ("{\n  x", "at line 2, column 3"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_json_is_parsed_within_limits(text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_usual_json_is_parsed_as_it_stands():
    value = {
        "model_max_length": 10**30,
        "é": [1.5, None, True, {"a": []}],
        "theta": -1e9,
        "limit": math.inf,
    }
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "text", [DEEP, "null", "[1]", '"a"', "9" * 5000, "", "{"], ids=lambda t: t[:5]
)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "tokenizer.json",
     "generation_config.json"],
)  # fmt: skip
def test_json_of_any_kind_in_any_file_is_two_lines(folder, name, text):
    (folder / name).write_text(text)
    assert refused(load_checkpoint, str(folder))


def test_a_file_of_json_may_be_only_so_large(tmp_path):
    (tmp_path / "a.json").write_text("[" + " " * 2000 + "]")
    assert "is larger than" in refused(read_json, tmp_path / "a.json", "", 1000)


@pytest.mark.parametrize("names", [None, ["a"], "a" * 5000, {}, {"a": 5}, {"a": None}, {"a": ""}])
def test_an_index_of_a_wrong_type(folder, names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "model" in refused(weight_files, folder)


# Counts and sizes


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {"num_hidden_layers": 10**6},
            "'num_hidden_layers' is 1000000, which is more than 256 layers",
        ),
        ({"text_config": {"n_layer": 10**6}}, "'n_layer'"),
        ({"num_labels": 10**9}, "'num_labels' is 1000000000"),
        ({"num_local_experts": 10**9}, "'num_local_experts'"),
        ({"attention_types": [[["global"], 10**9]]}, "'attention_types'"),
    ],
)
def test_counts_are_bounded_before_anything_is_built(folder, values, said):
    change(folder / "config.json", **values)
    assert said in refused(load_checkpoint, str(folder))


def test_counts_that_real_models_have_are_fine(tmp_path):
    values = {
        "num_hidden_layers": 61, "n_routed_experts": 256, "shared_expert_intermediate_size": 20480,
        "vocab_size_per_layer_input": 262144, "max_position_embeddings": 10485760,
        "rope_theta": 10**11, "mlp_only_layers": [0, 1], "eos_token_id": [151645, 151643],
        "layer_types": ["full_attention"] * 61,
    }  # fmt: skip
    check_counts(tmp_path, values, 1000)
    check_counts(tmp_path, {"num_hidden_layers": 300}, 301)


@pytest.mark.parametrize("values", [{"vocab_size": 10**9}, {"intermediate_size": 10**9}])
def test_a_model_far_larger_than_its_weights_is_never_allotted(folder, values):
    change(folder / "config.json", **values)
    said = refused(load_checkpoint, str(folder))
    assert "describes a model with" in said and "the weights have only" in said


def test_a_tokenizer_may_not_count_to_a_billion(folder):
    change(folder / "tokenizer_config.json", extra_ids=10**9)
    assert "'extra_ids' is 1000000000" in refused(load_tokenizer, folder)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"target_modules": "(a+)+$"}, "target_modules is '(a+)+$', but must be a list of names"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern is set"),
        ({"r": 10**9}, "r is 1000000000, but no stored matrix has that rank"),
        ({"r": "8"}, "r is '8'"),
        ({"bias": "evil"}, "bias is 'evil', which peft does not know"),
        ({"bias": ["none"]}, "bias is ['none'], which peft does not know"),
        ({"trainable_token_indices": {"embed_tokens": [True]}}, "must be token ids"),
        ({"trainable_token_indices": 5}, "must be token ids"),
    ],
)
def test_an_adapter_may_not_cost_more_than_its_weights(tmp_path, values, said):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | values))
    (tmp_path / "diffusion.json").write_text('{"diffusion": {"format": 1}}')
    save_file({"a": torch.zeros(2, 8)}, tmp_path / "adapter_model.safetensors")
    assert said in refused(read_spec, tmp_path)


# Chat templates

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set a = namespace(s='x') %}{% for i in range(40) %}{% set a.s = a.s ~ a.s %}{% endfor %}"
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<s>{% endif %}"
)


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% if tools %}" + ENDLESS + "{% endif %}", "runs for more than"),
        (HUGE + "{{ a.s }}", "writes more than"),
        ("{{ 'x' * 10**7 }}", "writes more than"),
        ("{% if false %}{{ 'x' * 10**12 }}{% endif %}", "writes more than"),  # when compiled
    ],
)
def test_a_template_that_costs_too_much_is_cut(monkeypatch, template, said):
    # The others must reach what they write before the time is over, however slow the machine is.
    seconds = 1 if said == "runs for more than" else 600
    monkeypatch.setattr(template_trial, "SECONDS", seconds)
    monkeypatch.setattr(template_trial, "PATIENCE", 600)
    assert said in refused(check_cost, template, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "template", [CHATML, "{{ raise_exception('no') }}", "{{ x.y.z }}", "{% for"]
)
def test_a_template_may_refuse_a_conversation_or_not_parse(template):
    check_cost(template, {})


def test_the_templates_of_a_folder_are_tried_once(folder, monkeypatch):
    (folder / "chat_template.jinja").write_text("{{ 'x' * 10**7 }}{# of this test #}")
    forks, fork = [], os.fork
    monkeypatch.setattr("os.fork", lambda: forks.append(1) or fork())
    for _ in range(2):
        assert "the chat template writes more than" in refused(load_checkpoint, str(folder))
    assert len(forks) == 1


# Advice


def test_a_tokenizer_with_a_token_more_than_the_weights_is_taken(folder):
    added = json.loads((folder / "tokenizer.json").read_text())
    entry = added["added_tokens"][-1] | {"id": 259, "content": "<image>"}
    added["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(added))
    checkpoint = load_checkpoint(str(folder))
    assert len(checkpoint.tokenizer) == 260
    assert checkpoint.model.generation_config.suppress_tokens == [259]
    ids = torch.tensor([checkpoint.tokenizer("a<image>").input_ids])
    assert "token id 259, but the weights have only 259 rows" in refused(checkpoint.model, ids)
    checkpoint.model.resize_token_embeddings(261, mean_resizing=False)  # as for a mask token
    assert checkpoint.model(ids).logits.shape == (1, 3, 261)


def test_architectures_are_inferred_from_the_type(folder):
    change(folder / "config.json", architectures=...)
    assert type(load_checkpoint(str(folder)).model).__name__ == "LlamaForCausalLM"
    change(folder / "config.json", model_type="bert")  # that may be an encoder or a decoder
    assert "a model of type 'bert' is neither a decoder" in refused(load_checkpoint, str(folder))
    change(folder / "config.json", architectures=[3])
    assert "architectures is [3], but must be a list" in refused(load_checkpoint, str(folder))


@pytest.mark.parametrize("kind", ["clip", ["llama"], {}, None, 5, "x" * 10**5])
def test_a_model_type_that_does_not_fit(folder, kind):
    change(folder / "config.json", model_type=kind)
    assert "model_type" in refused(load_checkpoint, str(folder))


@pytest.mark.parametrize(
    "start, library", [(b"\n\x0e", "sentencepiece"), (b"IQ== 0\n", "tiktoken")]
)
def test_a_missing_library_of_a_tokenizer_is_named(folder, monkeypatch, start, library):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(start)
    find = importlib.util.find_spec
    missing = {"sentencepiece", "tiktoken"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n in missing else find(n, *a)
    )
    said = refused(load_tokenizer, folder)
    assert f"{library} is not installed" in said and f"pip install {library}" in said


def test_a_crash_inside_of_the_tokenizer_is_no_bug(folder, monkeypatch, capsys):
    panic = type("PanicException", (BaseException,), {})("index out of bounds\nmore")

    def crash(*arguments: object, **options: object) -> None:
        raise panic

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", crash)
    assert "its tokenizer cannot be loaded (index out of bounds)" in refused(load_tokenizer, folder)
    monkeypatch.setattr("ar2diff.doctor.examine", crash)
    monkeypatch.setattr("sys.argv", ["ar2diff", "doctor"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: the tokenizer crashed (index out of bounds)\n"
    )


def test_an_argument_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ar2diff", "generate", "m", "--prompt", "a\udcff"])
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2
    assert lines[0] == "error: the argument 'a\\udcff' is not valid UTF-8"


@pytest.mark.parametrize("value", [-2, "2", True, [2, None], [[2]], 1.5])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_id_that_is_none_is_named_with_its_file(folder, file, value):
    change(folder / "config.json", eos_token_id=2)
    change(folder / file, eos_token_id=value)
    said = refused(load_checkpoint, str(folder))
    assert file in said and ("eos_token_id" in said)


def test_ids_without_a_row_are_taken_out_of_the_configs(folder):
    change(folder / "generation_config.json", eos_token_id=[2, 128009], bos_token_id=50256)
    change(folder / "config.json", pad_token_id=-1, eos_token_id=50256)
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.end_ids == [2]
    assert checkpoint.model.generation_config.bos_token_id is None
    assert checkpoint.model.config.pad_token_id is checkpoint.model.config.eos_token_id is None


def test_a_model_whose_own_forward_fails_is_not_blamed_on_the_mask(tiny_model, monkeypatch):
    model = tiny_model("llama")

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(model), "forward", fail)
    assert probe(model, tiny_spec()) == [
        "its forward pass fails even without the masks of the spec (mat1 and mat2 shapes cannot be "
        "multiplied)"
    ]


# Dtypes


@pytest.mark.parametrize("dtype", ["stored", "bfloat16", "float32", "float64"])
def test_a_checkpoint_is_loaded_in_the_dtype_that_is_asked_for(folder, dtype):
    file = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    wanted = torch.float16 if dtype == "stored" else getattr(torch, dtype)
    model = load_checkpoint(str(folder), dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", ["int8", "half-ish", "nn"])
def test_a_dtype_that_is_none(folder, dtype):
    assert f"dtype '{dtype}' is not a floating-point type" in refused(
        load_checkpoint, str(folder), dtype=dtype
    )


def test_training_computes_in_bf16_where_the_accelerator_has_it(monkeypatch):
    assert computes_in_bf16("bf16") and not computes_in_bf16("fp32")
    for present, able in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda able=able: able)
        assert computes_in_bf16() is (present and able)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for native in ("avx512_bf16", "amx_bf16", "avx512_f"):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda native=native: {native: True})
        for wanted in (True, False):
            monkeypatch.setattr(precision_module, "ON_CPU", wanted)
            assert computes_in_bf16() is (wanted and native != "avx512_f")


def test_a_spec_names_the_key_and_quotes_little():
    spec = tiny_spec()
    assert refused(replace, spec, noise="x" * 10**6).startswith("diffusion.noise is 'xxx")
    assert len(refused(replace, spec, block_length="x" * 10**6)) < 200


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {"vocab_size": 10**9},
            "the tokenizer has 259 tokens, but the weights have 1000000000 rows",
        ),
        ({"num_key_value_heads": 3}, "its forward pass fails"),
    ],
)
def test_the_estimate_of_memory_builds_no_model_that_cannot_be(folder, values, said):
    change(folder / "config.json", **values)
    assert said in refused(estimate, str(folder), load_recipe(None, ["data.max_length=64"]))
