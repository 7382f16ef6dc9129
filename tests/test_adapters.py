"""Adapters: what trains and what does not, folders and what they are refused for, the merge."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WIDE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ar2diff.checkpoint.adapters import MaskRow, add_adapter, save_adapter
from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.merge import merge
from ar2diff.checkpoint.output import claimed
from ar2diff.checkpoint.stored import fingerprint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import generate
from ar2diff.evaluation.check import check
from ar2diff.evaluation.evaluate import evaluate
from ar2diff.generation.complete import complete, load
from ar2diff.training.adapt import AdaptTrainer, adapt

WORDS = "the cat sat on a mat and saw one big red dog run to his old house by the sea".split()
METHODS = {
    "lora": [],
    "dora": ["peft.method=dora"],
    "qlora": ["quantization.kind=nf4"],
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
EVERY_METHOD = pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=needs_bitsandbytes) if m == "qlora" else m for m in METHODS],
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    rng = random.Random(0)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(3, 18))) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_base(tiny_model, tiny_tokenizer, tmp_path_factory):
    """Factory: a converted tiny model, its head tied or not. Never write to it."""

    @functools.cache
    def make(kind: str, tied: bool, attention: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        shape = {"vocab_size": len(tiny_tokenizer), "pad_token_id": None}
        shape |= {"n_embd": 64} if kind == "gpt2" else WIDE
        model = tiny_model(kind, dtype=torch.float32, tie_word_embeddings=tied, **shape)
        model.save_pretrained(folder / "ar")
        tiny_tokenizer.save_pretrained(folder / "ar")
        settings = ["train.max_steps=0", "data.max_length=32", f"convert.attention={attention}"]
        block = [] if attention == "full" else ["convert.block_length=4"]
        adapt(str(folder / "ar"), load_recipe(None, settings + block), folder / "converted")
        return folder / "converted"

    return lambda kind="llama", tied=False, attention="causal_context": make(kind, tied, attention)


@pytest.fixture(scope="session")
def recipe(texts):
    """Factory: a short run with an adapter on everything linear."""

    def make(*overrides: str, steps: int = 12):
        settings = [
            f"data.sources=[{texts}]", "data.max_length=32", f"train.max_steps={steps}",
            "train.learning_rate=1e-2", "train.logging_steps=1", "train.save_steps=1000",
            "peft.r=4", "peft.alpha=8",
        ]  # fmt: skip
        return load_recipe(None, [*settings, *overrides])

    return make


@pytest.fixture(scope="session")
def make_adapter(make_base, recipe, tmp_path_factory):
    """Factory: an adapter that was trained on a tiny model, made once. Never write to it."""

    @functools.cache
    def make(method: str, kind: str, tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        adapt(str(make_base(kind, tied)), recipe(*METHODS[method]), folder)
        return folder

    return lambda method="lora", kind="llama", tied=False: make(method, kind, tied)


@pytest.fixture
def copy_of(make_adapter, tmp_path):
    """An adapter that a test may damage."""
    return Path(shutil.copytree(make_adapter(), tmp_path / "copy"))


def wrapped(base: Path, made: object) -> object:
    checkpoint = load_checkpoint(str(base), quantization=made.quantization)
    add_adapter(checkpoint, made)
    return checkpoint


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def losses(folder: Path) -> list[float]:
    state = max(folder.glob("checkpoints/checkpoint-*")) / "trainer_state.json"
    return [row["loss"] for row in json.loads(state.read_text())["log_history"] if "loss" in row]


# What trains


@EVERY_METHOD
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loss_falls_and_the_base_keeps_its_bytes(make_base, recipe, tmp_path, method, tied):
    base = make_base(tied=tied)
    before = {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}
    adapt(str(base), recipe(*METHODS[method], "train.max_steps=20"), tmp_path / "out")
    falling = losses(tmp_path / "out")
    assert sum(falling[-3:]) < 0.8 * sum(falling[:3])
    assert before == {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}


@EVERY_METHOD
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_the_adapter_and_the_mask_row_get_gradients(make_base, recipe, method, tied):
    model = wrapped(make_base(tied=tied), recipe(*METHODS[method])).model
    model(torch.tensor([[1, 5, 259, 7]])).logits.logsumexp(-1).sum().backward()
    kinds = ("lora_", "trainable_tokens_delta")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == any(kind in name for kind in kinds), name
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert [tuple(row.shape) for row in rows] == [(1, 64)]
    assert rows[0].grad.abs().max() > 0


@EVERY_METHOD
def test_before_the_first_step_the_logits_are_the_bases(make_base, recipe, method):
    made = recipe(*METHODS[method])
    base = load_checkpoint(str(make_base(tied=True)), quantization=made.quantization)
    ids = torch.tensor([[1, 5, 259, 7, 259]])
    with torch.no_grad():
        plain = base.model(ids).logits
        assert torch.allclose(plain, wrapped(make_base(tied=True), made).model(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_mask_row_does_what_peft_makes_of_it_and_the_tied_head_follows(
    make_base, recipe, kind, tied
):
    model = wrapped(make_base(kind, tied), recipe()).model
    row = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    torch.nn.init.normal_(row, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 259, 7, 259]])

    def pass_of() -> tuple:
        row.grad = None
        logits = model(ids).logits
        logits.sin().sum().backward()
        return logits.detach(), row.grad.clone()

    ours = pass_of()
    layers = [m for m in model.modules() if isinstance(m, MaskRow)]
    assert len(layers) == 1 + tied
    for layer in layers:
        layer.__class__ = MaskRow.__base__
    for mine, pefts in zip(ours, pass_of(), strict=True):
        assert torch.allclose(mine, pefts, atol=1e-4)
    clean = torch.tensor([[1, 5, 7]])
    base = load_checkpoint(str(make_base(kind, tied))).model(clean).logits
    moved = (model(clean).logits - base).abs().amax((0, 1)) > 1e-3
    assert moved.nonzero().flatten().tolist() == ([259] if tied else [])


def test_dropout_is_what_the_recipe_asks_for_and_the_models_own_is_off(
    make_base, recipe, tmp_path, monkeypatch
):
    seen = []
    step = AdaptTrainer.training_step

    def look(self, model, *args, **kwargs):
        dropouts = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
        seen.append(
            (
                {p for n, p in dropouts.items() if "lora" in n},
                {p for n, p in dropouts.items() if "lora" not in n},
            )
        )
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", look)
    adapt(str(make_base("gpt2")), recipe("peft.dropout=0.25", steps=1), tmp_path / "out")
    assert seen == [({0.25}, {0.0})]


def test_the_embeddings_learning_rate_is_the_mask_rows(make_base, recipe, tmp_path):
    adapt(
        str(make_base()),
        recipe("train.lr_scale.embeddings=0", "train.lr_scale.mlp=0"),
        tmp_path / "out",
    )
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    base = load_file(make_base() / "model.safetensors")["model.embed_tokens.weight"][259:]
    row = next(t for n, t in state.items() if "trainable_tokens_delta" in n)
    assert torch.equal(row, base)
    moved = {n: bool(t.abs().max() > 0) for n, t in state.items() if "lora_B" in n}
    assert all(moved[n] == ("self_attn" in n) for n in moved)


def test_gradient_checkpointing_changes_nothing(make_base, recipe, tmp_path):
    for name, on in (("plain", "false"), ("checkpointed", "true")):
        made = recipe(f"train.gradient_checkpointing={on}", steps=3)
        adapt(str(make_base(tied=True)), made, tmp_path / name)
    one, other = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "checkpointed")
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


# Folders


def test_an_adapter_folder_is_small_and_holds_no_table(make_adapter):
    folder = make_adapter(tied=True)
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "ar2diff.json", "checkpoints",
        "diffusion.json", "log", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    state = load_file(folder / "adapter_model.safetensors")
    rows = [t.shape for n, t in state.items() if "lora_" not in n]
    assert rows == [(1, 64)]
    trained = json.loads((folder / "ar2diff.json").read_text())["trainable_parameters"]
    assert sum(t.numel() for t in state.values()) == trained
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * trained + 8192
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_an_adapter_names_its_converted_base(make_adapter, make_base):
    config = json.loads((make_adapter() / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(make_base())
    known = json.loads((make_adapter() / "diffusion.json").read_text())
    block = json.loads((make_base() / "config.json").read_text())["diffusion"]
    assert known["diffusion"] == known["base"]["diffusion"] == block
    assert len(known["base"]["mask_row_sha256"]) == 64


def test_a_base_from_the_hub_is_named_by_id_and_commit(make_base, recipe, tmp_path):
    commit = "0123456789abcdef"
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    shutil.copytree(make_base(), snapshot)
    with claimed(tmp_path / "out") as output:
        save_adapter(wrapped(snapshot, recipe()), output, {})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", commit)


@EVERY_METHOD
def test_an_adapter_folder_is_a_model(make_adapter, texts, method):
    folder = str(make_adapter(method))
    checkpoint = load(folder)
    assert checkpoint.spec.block_length == 4
    answer = complete(checkpoint, "the cat", max_new_tokens=6)
    assert 0 < answer.new_tokens <= 6
    result = evaluate(checkpoint, str(texts), length=16, samples=2, limit=4)
    assert result.bound.nats_per_token > 0
    found = check(folder)
    assert found.ok, [finding.what for finding in found.findings if not finding.ok]


def test_a_base_that_has_grown_blocks_keeps_its_own(make_base, recipe, tmp_path):
    made = recipe("convert.block_length=8", "objective.ar_weight=0", steps=1)
    adapt(str(make_base()), made, tmp_path / "out")
    spec = load_checkpoint(str(tmp_path / "out")).spec
    assert (spec.block_length, spec.ar_mode) == (8, False)
    merge(str(tmp_path / "out"), tmp_path / "merged")
    assert read_spec(tmp_path / "merged") == spec
    assert read_spec(make_base()).block_length == 4


def test_peft_on_the_folder_with_its_code_denoises_alike(make_adapter, make_base):
    from peft import PeftModel

    ours = load(str(make_adapter(tied=True)))
    ids = ours.tokenizer("the cat", return_tensors="pt").input_ids
    stock = AutoModelForCausalLM.from_pretrained(make_base(tied=True), trust_remote_code=True)
    stock = PeftModel.from_pretrained(stock, make_adapter(tied=True))
    mine = generate(ids, model=ours.model, max_new_tokens=9)
    assert torch.equal(mine, stock.generate(input_ids=ids, max_new_tokens=9))


# Refused


def refused(what: str, call: object, *arguments: object, **more: object) -> Ar2DiffError:
    with pytest.raises(Ar2DiffError, match=what) as error:
        call(*arguments, **more)
    return error.value


def test_an_ar_model_gets_no_adapter(tiny_checkpoint, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)  # it is not loaded
    error = refused("is not converted", adapt, str(tiny_checkpoint), recipe(), tmp_path / "out")
    assert "--max-steps 0" in error.fix
    assert not (tmp_path / "out").exists()


def test_an_adapter_gets_no_adapter(make_adapter, recipe, tmp_path):
    refused("is itself an adapter", adapt, str(make_adapter()), recipe(), tmp_path / "out")
    plain = recipe("peft=null")
    refused("is itself an adapter", adapt, str(make_adapter()), plain, tmp_path / "out")


@pytest.mark.parametrize(
    "targets,said",
    [
        ("[q_porj]", "q_porj does not match any linear layer in the model; did you mean q_proj?"),
        ("[q_proj, embed_tokens]", "embed_tokens does not match any linear layer"),
        ("[lm_head]", "lm_head is the output head"),
    ],
)
def test_targets_that_no_adapter_has(make_base, recipe, tmp_path, targets, said):
    made = recipe(f"peft.targets={targets}")
    refused(said.replace("?", r"\?"), adapt, str(make_base()), made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_named_targets_alone_train(make_base, recipe):
    model = wrapped(make_base(), recipe("peft.targets=[q_proj, mlp.up_proj]")).model
    names = {
        n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if ".lora_A." in n
    }
    assert names == {"q_proj", "up_proj"}


def test_an_adapter_does_not_change_the_attention(make_base, recipe, tmp_path):
    made = recipe(
        "convert.attention=block_causal", "convert.reconvert=true", "objective.ar_weight=0"
    )
    refused("cannot change attention", adapt, str(make_base()), made, tmp_path / "out")


def test_quantisation_without_an_adapter():
    refused("quantization needs a peft section", load_recipe, None, ["quantization.bits=4"])


def test_quantisation_without_bitsandbytes(make_base, recipe, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a)
    )
    made = recipe("quantization.bits=4")
    refused("needs bitsandbytes", adapt, str(make_base()), made, tmp_path / "out")
    made = load_recipe(None, ["train.optimizer=adamw8bit"])
    refused("adamw8bit needs bitsandbytes", adapt, str(make_base()), made, tmp_path / "out")


@needs_bitsandbytes
@pytest.mark.parametrize("kind,layer", [("llama", "layers.0.mlp.down_proj"), ("gpt2", "h.0.attn")])
def test_rows_that_are_no_whole_blocks_of_4_bits_are_refused_before_the_weights_are_read(
    make_base, recipe, tmp_path, monkeypatch, kind, layer
):
    """bitsandbytes would take the wrong scales on one CPU and fail on another."""
    base = Path(shutil.copytree(make_base(kind), tmp_path / "base"))
    change_json(base / "config.json", **{"intermediate_size": 96} if kind == "llama" else {})
    if kind == "gpt2":
        change_json(base / "config.json", n_embd=96)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    made = recipe("quantization.bits=4")
    said = rf"layer \S*{layer}\S* has 96 inputs; on a CPU, 4-bit layers need a multiple of 64"
    error = refused(said, adapt, str(base), made, tmp_path / "out")
    assert "quantization" in error.fix
    assert not (tmp_path / "out").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("answer", [True, False])
def test_a_quantised_layer_stays_itself_once_it_was_read_without_gradients(
    make_base, recipe, monkeypatch, answer
):
    """bitsandbytes asks the CPU for avx512_bf16, and would repack the weights of such a one."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: answer)
    model = wrapped(make_base(), recipe("quantization.kind=nf4")).model
    ids = torch.tensor([[1, 5, 259, 7]])

    def pass_of() -> list[torch.Tensor]:
        logits = model(ids).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        return [logits, *torch.autograd.grad(logits.sin().sum(), trained)]

    before = pass_of()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, before[0])
    assert all(map(torch.equal, before, pass_of()))


def test_a_base_that_is_gone(copy_of):
    change_json(copy_of / "adapter_config.json", base_model_name_or_path="/no/such/folder")
    error = refused("its base was not found", load_checkpoint, str(copy_of))
    assert "adapter_config.json" in error.fix


def test_an_adapter_on_the_ar_base(copy_of, tiny_checkpoint):
    change_json(copy_of / "adapter_config.json", base_model_name_or_path=str(tiny_checkpoint))
    refused("is not a converted model", load_checkpoint, str(copy_of))


def test_a_base_with_another_spec(copy_of, make_base):
    other = str(make_base(attention="full"))
    change_json(copy_of / "adapter_config.json", base_model_name_or_path=other)
    refused("was trained on a base with attention .causal_context.", load_checkpoint, str(copy_of))


def test_a_base_whose_spec_was_changed(copy_of, make_base, tmp_path):
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    block = json.loads((base / "config.json").read_text())["diffusion"]
    change_json(base / "config.json", diffusion={**block, "block_length": 8})
    change_json(copy_of / "adapter_config.json", base_model_name_or_path=str(base))
    said = "trained on a base with block_length 4, but its base .* has 8"
    refused(said, load_checkpoint, str(copy_of))


def test_a_base_with_another_mask_row(copy_of, make_base, tmp_path):
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    state = load_file(base / "model.safetensors")
    state["model.embed_tokens.weight"][259, 0] += 1e-6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    change_json(copy_of / "adapter_config.json", base_model_name_or_path=str(base))
    refused("are not the ones it was trained on", load_checkpoint, str(copy_of))


def test_a_base_that_was_retrained_but_for_its_embeddings(copy_of, make_base, tmp_path):
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] += 1e-6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    change_json(copy_of / "adapter_config.json", base_model_name_or_path=str(base))
    refused("are not the ones it was trained on", load_checkpoint, str(copy_of))


def test_the_same_base_in_other_files_is_the_same(make_base, tmp_path):
    state = load_file(make_base() / "model.safetensors")
    for part in (0, 1):
        tensors = {name: state[name] for name in sorted(state)[part::2]}
        save_file(tensors, tmp_path / f"{part}.safetensors", metadata={"format": "pt"})
    names = {name: f"{n % 2}.safetensors" for n, name in enumerate(sorted(state))}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert fingerprint(tmp_path) == fingerprint(make_base())


@pytest.mark.parametrize(
    "key,value,said",
    [("mask_token_id", 5, "5 in its .* but 259"), ("prediction", "same", "same .* but shift")],
)
def test_an_adapter_whose_spec_was_edited(copy_of, key, value, said):
    known = json.loads((copy_of / "diffusion.json").read_text())
    change_json(copy_of / "diffusion.json", diffusion={**known["diffusion"], key: value})
    refused(f"{key} is {said}", load_checkpoint, str(copy_of))


def test_an_adapter_of_no_diffusion_model(copy_of):
    (copy_of / "diffusion.json").unlink()
    refused("it has no diffusion.json", load_checkpoint, str(copy_of))


@pytest.mark.parametrize(
    "change,said",
    [
        ({"modules_to_save": ["lm_head"]}, "contains modules other than LoRA layers"),
        ({"peft_type": "LOHA"}, "is of type .LOHA."),
        (
            {"megatron_config": {"a": 1}, "megatron_core": "os"},
            "contains modules other than LoRA layers",
        ),
        ({"r": 3}, "do not belong together"),
        ({"target_modules": ["q_proj"]}, "do not belong together"),
    ],
    ids=["modules_to_save", "kind", "code", "rank", "targets"],
)
def test_an_adapter_that_is_not_ours_to_read(copy_of, change, said):
    change_json(copy_of / "adapter_config.json", **change)
    refused(said, load_checkpoint, str(copy_of))


def test_a_cut_adapter(copy_of):
    file = copy_of / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refused("incomplete or damaged", load_checkpoint, str(copy_of))


# Merge


ELSEWHERE = """
import sys, torch
sys.modules["ar2diff"] = sys.modules["peft"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model(torch.load(sys.argv[1])).logits, folder + "/logits")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
"""


def test_a_merged_folder_has_the_adapters_logits_where_ar2diff_is_not(make_adapter, tmp_path):
    ids = torch.tensor([[1, 5, 259, 7, 259, 100]])
    torch.save(ids, tmp_path / "ids")
    known = importlib.util.find_spec("bitsandbytes") is not None
    adapters = {
        tmp_path / f"{method}-{tied}": make_adapter(method, tied=tied)
        for method in METHODS
        for tied in (False, True)
        if method != "qlora" or known
    }
    for folder, adapter in adapters.items():
        result = merge(str(adapter), folder)
        assert result.difference < 1e-5
        assert result.rounding == 0
        assert check(str(folder)).ok
    arguments = [sys.executable, "-c", ELSEWHERE, tmp_path / "ids", *adapters]
    subprocess.run(arguments, check=True, cwd=tmp_path, capture_output=True)
    for folder, adapter in adapters.items():
        with torch.no_grad():
            ours = load_checkpoint(str(adapter)).model(ids).logits
        assert (torch.load(folder / "logits") - ours).abs().max() < 1e-5 * ours.abs().max()


def test_a_merge_writes_the_bases_dtype_and_says_what_it_rounds(make_base, recipe, tmp_path):
    base = Path(shutil.copytree(make_base(tied=True), tmp_path / "base"))
    state = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    change_json(base / "config.json", dtype="bfloat16")
    adapt(str(base), recipe(steps=2), tmp_path / "adapter")
    result = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert result.difference < 1e-5 < result.rounding < 0.1
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in merged


def test_a_merge_that_changes_logits_is_refused(make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("ar2diff.checkpoint.merge.MERGED", 0.0)
    refused("merging changes the logits", merge, str(make_adapter()), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_takes_a_base_that_has_moved(copy_of, make_base, tmp_path):
    change_json(copy_of / "adapter_config.json", base_model_name_or_path="/no/such/folder")
    merge(str(copy_of), tmp_path / "merged", base=str(make_base()), dry_run=True)
    assert not (tmp_path / "merged").exists()


def test_a_merge_of_no_adapter_or_into_a_full_folder(make_adapter, make_base, tmp_path):
    refused("is not an adapter", merge, str(make_base()), tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("is not empty", merge, str(make_adapter()), tmp_path / "full")
    refused("contains the input", merge, str(make_adapter()), make_base(), overwrite=True)


# A kill and a resume


class _Killed(Exception):
    pass


@EVERY_METHOD
def test_a_stopped_run_resumes_to_the_same_bits(make_base, recipe, tmp_path, monkeypatch, method):
    made = recipe(*METHODS[method], "train.save_steps=4", "peft.dropout=0.1", steps=9)
    base = str(make_base(tied=True))
    adapt(base, made, tmp_path / "whole")
    step = AdaptTrainer.training_step

    def killed_in_step_6(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", killed_in_step_6)
    with pytest.raises(_Killed):
        adapt(base, made, tmp_path / "killed")
    saved = tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    assert not (saved / "model.safetensors").exists()
    assert (saved / "adapter_model.safetensors").stat().st_size < 60_000
    monkeypatch.setattr(AdaptTrainer, "training_step", step)
    adapt(base, made, tmp_path / "killed", resume=True)
    whole, killed = (tmp_path / n / "adapter_model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
