"""Fixtures that all test files share: tiny random models, a tiny checkpoint, recipes, real data."""

import copy
import functools
import gc
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import typer
from hypothesis import settings

from ar2diff.config.recipe import Recipe
from ar2diff.core.head import BigramHead
from ar2diff.core.noises import Mask
from ar2diff.core.spec import HEAD_FORMAT, Spec
from ar2diff.distributed import precision
from ar2diff.training.opening import needed_memory

torch.set_num_threads(1)  # the models are tiny; threads would only wait for each other
precision.ON_CPU = False  # what the tests expect was computed in float32

settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

ROOT = Path(__file__).resolve().parents[1]
MASKS = Mask(mask=63, ids=torch.arange(63))  # the noise of the tiny models
MASK = MASKS.mask  # mask token of the tiny models: the last of their 64 rows
CLASSES = ("llama", "qwen3", "gpt2", "mistral", "mistral_window")  # what the tests go over
WINDOW = 3  # sliding window of `mistral_window`
SWITCH = 14  # tokens at which `phi3_longrope` changes its rotary factors
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # weights of 0.3: attention that a wrong mask moves by whole logits
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Rows of whole blocks of 64 weights, which 4-bit layers need on a CPU and real models have.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CONFIGS = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE),
    "gpt2": ("GPT2Config", GPT2),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": None}),
    "mistral_window": ("MistralConfig", SHAPE | {"sliding_window": WINDOW}),
    # layers of two kinds, and a head with a soft cap or a scale
    "qwen3_mixed": (
        "Qwen3Config",
        SHAPE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma2": (
        "Gemma2Config",
        SHAPE
        | {"final_logit_softcapping": 2.0, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    ),
    "granite": ("GraniteConfig", SHAPE | {"logits_scaling": 3.0}),
    # rotary factors that change with the length of the longest row of a forward
    "phi3_longrope": (
        "Phi3Config",
        SHAPE
        | {
            "original_max_position_embeddings": SWITCH,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": SWITCH,
            },
        },
    ),
    "llama_dynamic": (
        "LlamaConfig",
        SHAPE
        | {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
}


@pytest.fixture(autouse=True, scope="session")
def bitsandbytes_cpu():
    """Have bitsandbytes take the CPU for one with avx512_bf16 or without, where `cpus.py` asks."""
    if (answer := os.environ.get("AR2DIFF_TEST_BF16")) is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: answer == "yes")
        yield


DRAWING = ("training.plots", "reports.plots", "reports.page")  # modules that ask whether they can


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """Draw no pictures of runs and reports, which take longer than most of them here; see
    `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in DRAWING:
            patch.setattr(f"ar2diff.{module}.can_draw", lambda: False)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Draw pictures of runs and reports, if matplotlib is installed."""
    pytest.importorskip("matplotlib")
    for module in DRAWING:
        monkeypatch.setattr(f"ar2diff.{module}.can_draw", lambda: True)


@pytest.fixture(autouse=True, scope="session")
def no_estimates():
    """Do not say how much memory a run will need, which takes a fifth of most runs here; see
    `estimates`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ar2diff.training.run.needed_memory", lambda path, recipe: None)
        yield


@pytest.fixture
def estimates(monkeypatch):
    """Say how much memory a run will need, as runs do outside the tests."""
    monkeypatch.setattr("ar2diff.training.run.needed_memory", needed_memory)


@pytest.fixture(autouse=True, scope="session")
def quick_disk():
    """Wait for no disk: only a power cut could tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_command_line():
    """Build the parsers of all commands once, and not for each command line that a test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_searched_for_garbage():
    """Hide what lives already from the garbage collector: accelerate collects at the begin of each
    run, and would go through everything that was imported."""
    gc.collect()
    gc.freeze()


def _rms_norm(self, x):
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@functools.cache
def build_model(kind, attn_implementation="sdpa", dtype=torch.float64, seed=0, **changes):
    """A random model in eval mode; the same weights for the same kind, seed and changes. Shared
    between tests: deepcopy it before changing it."""
    name, values = CONFIGS[kind]
    config = getattr(transformers, name)(**(values | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation, dtype=torch.float32
        )
    model.to(dtype).eval()
    for module in model.modules() if dtype == torch.float64 else ():
        # The stock RMSNorm computes in float32 whatever it is given: no identity holds to 1e-10.
        if hasattr(module, "variance_epsilon"):
            module.__class__ = type("RMSNorm64", (type(module),), {"forward": _rms_norm})
    return model


@pytest.fixture(scope="session")
def tiny_model():
    """Factory: tiny_model(kind, attn_implementation="sdpa", dtype=torch.float64, **config)."""
    return build_model


@pytest.fixture(scope="session")
def make_recipe():
    """Factory of recipes: make_recipe("full", noise={"time": "document"}, data={...})."""

    def make(attention="causal_context", block_length=4, **sections):
        full = attention == "full"
        tree = {
            "convert": {"attention": attention, "block_length": None if full else block_length},
            "noise": {"time": "document" if full else "block"},
            "objective": {"ar_weight": 0.3 if attention == "causal_context" else 0.0},
            "data": {"max_length": 16},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return Recipe.model_validate(tree)

    return make


@pytest.fixture
def sft_recipe(make_recipe):
    """Factory of recipes for conversations: sft_recipe("full", "same", data={...})."""

    def make(attention="causal_context", prediction="shift", **sections):
        sections = {"data": {"max_length": 32, "overlong": "truncate"}, **sections}
        convert = {"prediction": prediction, **sections.pop("convert", {})}
        return make_recipe(attention, convert=convert, **sections)

    return make


@pytest.fixture(scope="session")
def shared_data():
    """Factory: path of real data (`$AR2DIFF_DATA`, else `../shared/data`); skips without it."""
    root = Path(os.environ.get("AR2DIFF_DATA") or ROOT.parent / "shared" / "data")

    def find(name=""):
        if not (root / name).exists():
            pytest.skip(f"real data {root / name} is not here; set AR2DIFF_DATA")
        return root / name

    return find


@pytest.fixture(scope="session")
def sandboxed():
    """Skip where bubblewrap cannot make a sandbox; fail there in `make sandbox-test`."""
    reason = "bubblewrap is not installed: apt-get install bubblewrap"
    if shutil.which("bwrap"):
        trial = "bwrap --unshare-all --unshare-user --disable-userns --ro-bind / / true".split()
        user = {} if os.geteuid() else {"user": 65534, "group": 65534, "extra_groups": []}
        done = subprocess.run(trial, capture_output=True, text=True, cwd="/", check=False, **user)
        reason = f"bubblewrap does not work here: {done.stderr}" if done.returncode else ""
    if reason and os.environ.get("AR2DIFF_SANDBOX") == "required":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def run_both(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout and stderr."""
    from ar2diff.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def besides_progress(said: str) -> list[str]:
    """The lines of a run's stderr besides those that tell what it will do and how far it is: its
    errors, warnings and notes."""
    told = re.compile(r"(adapt|draft|sft|rl): |step \d|  (?!fix: )")
    return [line for line in said.strip().splitlines() if not told.match(line)]


@pytest.fixture
def write_jsonl(tmp_path):
    """Factory: write_jsonl("a.jsonl", rows) writes dicts, or strings as raw lines."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer of 259 tokens, `<unk> <s> </s>` first, that adds its BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer):
    """Folder of an AR LLaMA (hidden 32, 2 layers, 259 tokens) as `save_pretrained` leaves it:
    float32, no mask and no pad token, `len(tokenizer) == vocab_size`. Never write to it."""
    return _save_llama(tmp_path_factory.mktemp("tiny") / "llama", tiny_tokenizer)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory, tiny_tokenizer):
    """The tiny checkpoint in a shape that can be held in 4 bits. Never write to it."""
    return _save_llama(tmp_path_factory.mktemp("wide") / "llama", tiny_tokenizer, **WIDE)


def _save_llama(folder, tokenizer, **shape):
    model = build_model(
        "llama",
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        pad_token_id=None,
        architectures=None,
        **shape,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def convert_tiny(tiny_checkpoint, tmp_path_factory):
    """Factory: convert_tiny("convert.attention=full") is a folder of the tiny checkpoint converted
    without training; made once. Never write to it."""
    return _converter(tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def convert_wide(wide_checkpoint, tmp_path_factory):
    """Factory: the same of the wide checkpoint."""
    return _converter(wide_checkpoint, tmp_path_factory)


def _converter(checkpoint, tmp_path_factory):
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    @functools.cache
    def convert(*overrides):
        folder = tmp_path_factory.mktemp("converted") / "model"
        adapt(str(checkpoint), load_recipe(None, ["train.max_steps=0", *overrides]), folder)
        return folder

    return convert


@pytest.fixture(scope="session")
def converted(convert_tiny):
    """The tiny checkpoint with the default conversion: causal_context."""
    return convert_tiny()


def tiny_spec(attention="causal_context", block_length=4, prediction="shift", mask_token_id=MASK):
    """The spec of a tiny model."""
    return Spec(
        format=1,
        noise="mask",
        mask_token_id=mask_token_id,
        attention=attention,
        block_length=None if attention == "full" else block_length,
        prediction=prediction,
        ar_mode=attention == "causal_context",
        local_window=None,
        max_length=64,
    )


def with_head(model, spec, rank=3, spread=2.0):
    """A copy of a model that carries a random diffusion head, and the spec that names it."""
    generator = torch.Generator().manual_seed(7)
    head = BigramHead(model.config.vocab_size, rank)
    for parameter in head.parameters():
        parameter.data.normal_(std=spread, generator=generator)
    model = copy.deepcopy(model)
    model.diffusion_head = head.to(model.dtype)
    return model, replace(spec, format=HEAD_FORMAT, head=head.described())
