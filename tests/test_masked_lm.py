"""Masked language models as bases: BERT, RoBERTa (whose positions begin after its padding's) and
ModernBERT (whose layers read windows)."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_card import answer_of, first_block, front_matter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedTokenizerFast,
)

from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.kinds import generative_class
from ar2diff.core.attention import PADDING, Slots, model_mask
from ar2diff.core.forward import context_length, logits_at
from ar2diff.core.generate import generate
from ar2diff.core.masked_lm import first_position, is_masked_lm
from ar2diff.core.probe import probe
from ar2diff.core.spec import Spec
from ar2diff.hub.push import preview

KINDS = ("bert", "roberta", "modernbert")
PAD, MASK, ROWS, WINDOW = 1, 3, 260, 2  # the padding of RoBERTa, after whose number it counts
SHAPE = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 66, "initializer_range": 0.3,
    "pad_token_id": PAD, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2,
    "bos_token_id": None, "eos_token_id": None, "cls_token_id": 0, "sep_token_id": 2,
}  # fmt: skip


@functools.cache
def tiny(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a type, as it is before any conversion; copy it before changing it."""
    config = CONFIG_MAPPING[kind]
    known = {*vars(config()), "global_attn_every_n_layers"}
    values = {name: value for name, value in (SHAPE | changes).items() if name in known}
    config = config(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = generative_class(config)(config)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


def spec_of(model: Any) -> Spec:
    windowed = any("sliding" in kind for kind in getattr(model.config, "layer_types", ()))
    return Spec(
        format=1, noise="mask", mask_token_id=MASK, attention="full", block_length=None,
        prediction="same", ar_mode=False, local_window="kept" if windowed else None, max_length=32,
    )  # fmt: skip


@torch.no_grad()
def ours(model: Any, ids: Tensor, doc: Tensor, pos: Tensor) -> Tensor:
    """Logits [B, S, V] of our forward."""
    mask = model_mask(
        model, Slots(doc, pos, torch.ones_like(doc).bool()), "full", None,
        spec_of(model).local_window,
    )  # fmt: skip
    every = torch.arange(ids.numel())
    found = logits_at(model, every, input_ids=ids, attention_mask=mask, position_ids=pos)
    return found.view(*ids.shape, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_our_forward_is_that_of_the_stock_class(kind):
    model, (rows, length) = tiny(kind), (3, 9)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, ROWS, (rows, length), generator=generator)
    ids[:, 3] = MASK
    sizes = torch.tensor([9, 6, 2])
    pos = torch.arange(length).expand(rows, -1)
    real = pos < sizes[:, None]
    ids[~real] = PAD
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=real.long()).logits
    found = ours(model, ids, torch.where(real, 0, PADDING), pos)
    assert (found - stock)[real].abs().max() < 1e-12

    # What is in the padding moves nothing; the last word moves what may read it, and the first too.
    other = ids.masked_fill(~real, 77)
    assert torch.equal(ours(model, other, torch.where(real, 0, PADDING), pos)[real], found[real])
    for place in (0, 8):
        moved = ids.clone()
        moved[0, place] = 78
        away = (ours(model, moved, torch.where(real, 0, PADDING), pos) - found).abs().amax(-1)
        assert (away[0] > 1e-3).all() and (away[1:] == 0).all()

    # Two documents in one row are read as each of them alone.
    doc = (torch.arange(length) >= 4).long()[None]
    packed = ours(model, ids[:1], doc, pos[:1] - 4 * doc)
    for part in (slice(0, 4), slice(4, 9)):
        alone = ours(model, ids[:1, part], 0 * doc[:, part], pos[:1, : part.stop - part.start])
        assert (packed[:, part] - alone).abs().max() < 1e-12
    assert context_length(model) == (64 if kind == "roberta" else 66)


def test_the_probe_finds_other_positions_other_attention_and_neighbours(monkeypatch):
    model = copy.deepcopy(tiny("roberta"))
    assert probe(model, spec_of(model)) == []
    with monkeypatch.context() as patch:  # as if its positions began at 0
        patch.setattr("ar2diff.core.forward.first_position", lambda model: 0)
        assert probe(model, spec_of(model)) == [
            "with masks and positions of our own it reads otherwise than without"
        ]
    model.config.is_decoder = model.base_model.config.is_decoder = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    assert probe(model, spec_of(model)), "a decoder's stock forward is causal"
    sizes = ("embedding_size", "true_hidden_size", "intra_bottleneck_size")
    neighbours = tiny("mobilebert", **dict.fromkeys(sizes, 32))
    assert probe(neighbours, spec_of(neighbours)) == ["documents packed in one row see each other"]
    wide = tiny("modernbert", local_attention=64)  # windows over the probe's rows
    spec = spec_of(wide)
    assert probe(wide, spec) == [] and wide.config.local_attention == 64
    narrow = tiny("modernbert")
    dropped = Spec(**vars(spec) | {"local_window": "dropped"})
    assert probe(narrow, dropped) == [  # they are still there
        "with masks and positions of our own it reads otherwise than without"
    ]


# Through the command line


def save_tokenizer(folder: Path, **special: str) -> None:
    """Bytes as BERT's tokenizers have pieces: <s> and </s> around a text, and no eos_token."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    around = [("<s>", 0), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=around
    )
    named = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"} | special
    PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Factory: the folder of a tiny stock model of a type; made once. Never write to it."""

    @functools.cache
    def save(kind: str, **special: str) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        config = tiny(kind).config
        stock = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
        stock.load_state_dict(tiny(kind, torch.float32).state_dict())
        stock.save_pretrained(folder)
        save_tokenizer(folder, **special or {"mask_token": "<mask>"})
        return folder

    return save


@pytest.fixture
def succeeds(run_both):
    def call(*arguments: object) -> Any:
        code, out, err = run_both(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def denoised(folder: Path, text: str, **settings: Any) -> str:
    """What a folder writes without ar2diff, by its own code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.models.")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :-1]  # without the end of the text
    code = GenerationMixin.load_custom_generate(None, str(folder), trust_remote_code=True)
    assert code is not generate
    return tokenizer.decode(code(model=model, input_ids=ids, **settings)[0, 1:])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_base_is_converted_bit_for_bit_and_denoises_without_ar2diff(
    kind, bases, succeeds, tmp_path
):
    base, folder = bases(kind), tmp_path / "out"
    succeeds("adapt", base, "--max-steps", 0, "--output-dir", folder)
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    spec, config = read_spec(folder), json.loads((folder / "config.json").read_text())
    said = (spec.attention, spec.block_length, spec.prediction, spec.ar_mode, spec.mask_token_id)
    assert said == ("full", None, "same", False, MASK)
    assert spec.max_length == (64 if kind == "roberta" else 66)
    assert config["architectures"] == [type(tiny(kind)).__name__]
    own = json.loads((folder / "generation_config.json").read_text())
    assert (own["mode"], own["bos_token_id"], own["eos_token_id"]) == ("diffusion", 0, 2)
    found = succeeds("generate", folder, "--prompt", "the {mask:3} sat", "--seed", 1)
    assert found["text"].startswith("the ") and found["text"].endswith(" sat")
    assert found["new_tokens"] == 3 and len(found["filled"]) == 1
    plain = denoised(folder, "the <mask><mask><mask> sat", max_new_tokens=0)
    assert plain == found["text"]


def test_a_base_is_trained_judged_tuned_checked_and_published(
    bases, succeeds, tmp_path, write_jsonl
):
    data = write_jsonl("a.jsonl", [{"text": f"{n} the cat sat on the mat"} for n in range(24)])
    folder, lora = tmp_path / "out", tmp_path / "lora"
    steps = ("--data", data, "--max-steps", 2, "data.max_length=32")
    record = succeeds("adapt", bases("roberta"), *steps, "--output-dir", folder, "eval.steps=2",
                      "eval.rows=2", "eval.length=8")  # fmt: skip
    assert record["tokens"] > 0 and record["eval"]["bound"]["nats_per_token"] > 0
    kept = json.loads((folder / "ar2diff.json").read_text())
    assert "its base is a masked language model" in kept["text"]["not_measured"]
    assert "base_ar_nll" not in (folder / "log" / "metrics.jsonl").read_text()
    judged = succeeds("eval", folder, "--data", data, "--length", 8, "--limit", 2)
    assert judged["bound"]["nats_per_token"] > 0 and "ar_nll" not in judged
    checked = succeeds("check", folder)
    assert checked["ok"] and checked["masked_lm"]
    assert not any("causal_context" in text for text in checked["elsewhere"].values())

    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    talk = write_jsonl("chat.jsonl", [{"messages": turns}] * 4)
    asked = ("peft.r=2", "data.chat_template=plain", "data.max_length=64")
    tuned = succeeds("sft", folder, "--data", talk, "--max-steps", 1, "--output-dir", lora, *asked)
    assert 0 < tuned["trainable_parameters"] < tuned["parameters"]
    assert succeeds("generate", lora, "--prompt", "the {mask:2}")["new_tokens"] == 2

    card = preview(folder, license="mit")
    assert front_matter(card)["pipeline_tag"] == "fill-mask"
    assert "Its base is a masked language model, not an autoregressive one" in card
    assert "| AR mode | no |" in card and "from left to right:" not in card
    written = answer_of(first_block(card), folder)
    prompt = card.partition("greedy answer to ")[2].partition(", at most")[0]
    assert written.startswith(json.loads(prompt))


REFUSED = {
    "convert.attention=block_causal": "it reads in both directions",
    "convert.prediction=shift": "predicts each token at its own position",
    "anneal.kind=reveal anneal.steps=1": "it has no causal attention to begin with",
    "objective.kind=ar": "it has no AR mode to train",
    "objective.ar_weight=0.3": "it has no AR mode to keep",
    "objective.distil.target=clean": "it has no AR mode to learn from",
    "data.max_length=72": "more than the model's context of 66 tokens",
    'convert.mask_token="<s>"': "was trained with <mask>",
}


def test_what_takes_an_ar_model_is_refused_in_two_lines(bases, run_both, tmp_path, write_jsonl):
    base, none = bases("bert"), bases("bert", unk_token="<s>")
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 8)

    def refused(*arguments: object) -> str:
        code, out, err = run_both(*arguments)
        lines = err.strip().splitlines()
        assert (code, out, len(lines)) == (2, "", 2), err
        assert lines[1].startswith("  fix: ") and not (tmp_path / "no").exists()
        return lines[0]

    asked = ("--data", data, "--max-steps", 1, "--output-dir", tmp_path / "no")
    for settings, reason in REFUSED.items():
        assert reason in refused("adapt", base, *asked, *settings.split())
    assert "has no mask token" in refused("adapt", none, *asked)
    assert "no AR mode that could verify drafts" in refused("draft", base, *asked)
    assert "no AR mode that could write text" in refused("adapt", base, *asked, "data.self={}")
    unconverted = "it writes and scores no text before it is converted"
    assert unconverted in refused("generate", base, "--prompt", "a", "--mode", "ar")
    assert unconverted in refused("eval", base, "--data", data)
    run_both("adapt", base, "--max-steps", 0, "--output-dir", tmp_path / "out")
    again = ("convert.attention=causal_context", "convert.reconvert=true")
    assert "it reads in both directions" in refused("adapt", tmp_path / "out", *asked, *again)
    ask = ("generate", tmp_path / "out", "--prompt", "a")
    assert "needs an AR mode" in refused(*ask, "--mode", "speculative")
    assert "keeps keys and values" in refused(*ask, "--cache", "dual")
    assert "exceed the model's context of 66" in refused(*ask, "--max-new-tokens", 90)


def test_an_adapter_and_odd_configs_make_no_masked_lm_of_a_decoder():
    """The embeddings, of as many rows as positions, are no table of positions."""
    model = build_model("llama", vocab_size=64, max_position_embeddings=64, pad_token_id=0)
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]})
    adapted = get_peft_model(model, rows)
    assert first_position(adapted) == first_position(adapted.get_base_model()) == 0
    for odd in (None, 5, [[1]], "BertForMaskedLM", ["LlamaForCausalLM"]):
        assert not is_masked_lm(odd)
