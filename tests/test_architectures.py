"""Every decoder class through the command line: converted, trained, loaded by transformers alone,
decoded with and without a cache, judged; or refused with the reason, and nothing written."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    BEGIN,
    END,
    MORE,
    NAMED,
    ROUTED,
    ROWS,
    SHAPES,
    WINDOW,
    findings,
    table,
    tiny_model,
    windowed,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import Convert
from ar2diff.conversion.convert import convert
from ar2diff.core.attention import PADDING, Slots, lay_out, model_mask
from ar2diff.core.forward import quiet_routers
from ar2diff.core.spec import ATTENTIONS
from ar2diff.training.adapt import AdaptTrainer

BLOCKWISE = ATTENTIONS[:2]
WINDOWED = ("mistral", "starcoder2", "ministral", "gemma2", "gemma3_text", "cohere2", "gpt_oss")
ROOT = Path(__file__).resolve().parents[1]
LENGTH = 16  # of a row in training, over the windows of 6
TEXT = "the cat sat on the mat and the dog sat on the cat"
PROMPT = "the cat"
CONVERTED = [
    *NAMED,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE),
]


@pytest.fixture
def succeeds(run_both):
    """Run it; it must succeed: what `--json` prints."""

    def call(*arguments: object) -> dict[str, Any]:
        code, out, err = run_both(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of short texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(24)))
    return path


@pytest.fixture(scope="session")
def save_base(tmp_path_factory, tiny_tokenizer):
    """Factory: the folder of a tiny AR model of a type; made once. Never write to it."""

    @functools.cache
    def save(kind: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        tiny_model(kind, **changes).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def trains(succeeds, texts, tmp_path):
    """Factory: a base trained for two steps, or for others: its folder and its record."""

    def train(
        base: Path, attention: str = "causal_context", *settings: str, steps: int = 2
    ) -> tuple[Path, dict]:
        folder = tmp_path / f"{base.parent.name}-{base.name}-{attention}"
        record = succeeds(
            "adapt", base, "--data", texts, "--max-steps", steps, "--output-dir", folder,
            f"convert.attention={attention}",
            f"convert.block_length={'null' if attention == 'full' else 4}",
            f"noise.time={'document' if attention == 'full' else 'block'}",
            f"objective.ar_weight={0.3 if attention == 'causal_context' else 0}",
            f"data.max_length={LENGTH}", "train.per_device_train_batch_size=4",
            "train.learning_rate=1e-3", *settings,
        )  # fmt: skip
        return folder, record

    return train


@functools.cache
def support(kind: str) -> str:
    """What a type can be, as the table says it."""
    return findings([kind])[kind]["as"]


def stock(folder: Path, **kwargs: Any) -> Any:
    """What transformers makes of a folder without our code."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose old rows have moved."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert all(torch.isfinite(tensor).all() for tensor in new.values())
    return {
        name
        for name, was in old.items()
        if not torch.equal(new[name][: len(was)] if was.ndim else new[name], was)
    }


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_class_is_converted_trained_loaded_decoded_and_judged(
    kind, save_base, trains, succeeds, texts, write_jsonl
):
    base = save_base(kind)
    prompts = write_jsonl("prompts.jsonl", [{"prompt": PROMPT}, {"prompt": "a dog sat on"}])
    able = [a for a in ("causal_context", "block_causal", "full") if a in support(kind).split(", ")]
    for attention in [able[0], *(a for a in able[1:] if a == "full")]:
        folder, record = trains(base, attention)
        assert record["tokens"] > 0
        assert len(changed(base, folder)) > 1
        assert read_spec(folder).local_window == ("kept" if windowed(tiny_model(kind)) else None)

        judged = succeeds("eval", folder, "--data", texts, "--length", 12, "--limit", 4)
        assert math.isfinite(judged["bound"]["nats_per_token"])
        assert ("ar_nll" in judged) == (attention == "causal_context")

        model = stock(folder)
        ask = ("generate", folder, "--prompts-file", prompts, "--max-new-tokens", 10)
        ask += ("--mode", "diffusion")
        written = succeeds(*ask, *([] if attention == "full" else ["--check-cache"]))["results"]
        if attention == "full":
            assert_plain_forward_is_full(folder, model)
        else:
            assert max(row["drift"]["largest"] for row in written) < 1e-4  # of the largest logit
            again = succeeds(*ask, "--cache", "none")["results"]
            assert [row["token_ids"] for row in written] == [row["token_ids"] for row in again]
        assert_the_folders_own_code_writes(folder, written[0]["token_ids"])
        if attention == "causal_context":
            assert_plain_generate_is_the_ar_mode(folder, model, succeeds)


def assert_plain_forward_is_full(folder: Path, model: Any) -> None:
    ids = torch.arange(3, 3 + 2 * WINDOW)[None]
    pos = torch.arange(ids.shape[1])[None]
    slots = Slots(torch.zeros_like(pos), pos, torch.ones_like(pos, dtype=torch.bool))
    mask = model_mask(model, slots, "full", None, read_spec(folder).local_window)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        ours = model(
            input_ids=ids, attention_mask=mask, position_ids=pos, **quiet_routers(model)
        ).logits
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def assert_the_folders_own_code_writes(folder: Path, token_ids: list[int]) -> None:
    model = stock(folder, trust_remote_code=True)
    assert model.generate.func.__module__.startswith("transformers_modules.")
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=10, mode="diffusion")
    written = written[0, prompt.shape[1] :].tolist()
    assert written[: len(token_ids)] == token_ids


def assert_plain_generate_is_the_ar_mode(
    folder: Path, model: Any, succeeds: Callable[..., dict]
) -> None:
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=10, do_sample=False)
    ask = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 10, "--mode", "ar")
    assert succeeds(*ask)["token_ids"] == written[0, prompt.shape[1] :].tolist()


# Embeddings, heads, vocabularies, mask tokens


# Kind (phi's head has a bias), tied head, padding and mask token. Rows are added where there is
# neither a mask token nor padding: to every kind of head. Of the rest, every pair of values.
VOCABULARIES = [
    *((kind, tied, 0, "none") for kind in ("llama", "phi") for tied in (False, True)),
    ("phi", True, 41, "none"),
    ("phi", False, 0, "reserved"),
    ("llama", True, 41, "reserved"),
    ("llama", True, 0, "own"),
    ("phi", False, 41, "own"),
]


@pytest.mark.parametrize("kind,tied,padding,mask", VOCABULARIES)
def test_tied_heads_biases_padded_vocabularies_and_mask_tokens(
    kind, tied, padding, mask, tiny_tokenizer, trains, succeeds, tmp_path
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if mask == "reserved":
        names = [f"<|reserved_{i}|>" for i in range(2)]
        tokenizer.add_special_tokens({"extra_special_tokens": names})
    if mask == "own":
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    base, rows = tmp_path / "base", len(tokenizer) + padding
    tiny_model(kind, vocab_size=rows, tie_word_embeddings=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)

    folder, record = trains(base)
    spec = read_spec(folder)
    token = {"none": "<|mask|>", "reserved": "<|reserved_0|>", "own": "[MASK]"}[mask]
    assert record["mask_token"] == token
    assert spec.mask_token_id == ROWS  # the first behind the words, in all three
    model = stock(folder)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert len(inputs.weight) == len(head.weight) == max(rows, ROWS + 1)
    assert (head.weight is inputs.weight) == tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    assert (kind == "phi") == (getattr(head, "bias", None) is not None)
    if kind == "phi":
        assert len(head.bias) == len(head.weight)
    assert succeeds("check", folder)["ok"]
    written = succeeds("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 16)
    assert max(written["token_ids"]) < len(tokenizer)
    assert spec.mask_token_id not in written["token_ids"]


# Routers of mixtures of experts


def switch_loss(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor, top: int) -> float:
    """Experts * sum_e f_e P_e over the real tokens of all layers (Fedus et al. 2022, eq. 4)."""
    p = torch.cat([logits[real.flatten()] for logits in router_logits]).double().softmax(-1)
    share = torch.zeros_like(p).scatter_(1, p.topk(top).indices, 1).mean(0)
    return float(p.shape[1] * (share * p.mean(0)).sum())


@pytest.mark.parametrize("kind", [kind for kind, own in NAMED.items() if own == ROUTED])
def test_the_routers_loss_is_in_the_training_loss(kind, save_base, trains, monkeypatch):
    seen, compute = [], AdaptTrainer.compute_loss

    def noted(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        seen.append((copy.deepcopy(inputs), loss.item()))
        return loss

    monkeypatch.setattr(AdaptTrainer, "compute_loss", noted)
    settings = ("train.gradient_accumulation_steps=2", "data.packing=false")
    losses = {}
    for factor in (0.0, 50.0):
        base = save_base(kind, router_aux_loss_coef=factor)
        trains(base, "causal_context", *settings, steps=1)
        losses[factor] = [loss for _, loss in seen]
        batches = [inputs for inputs, _ in seen[:2]]  # of the first step
        seen.clear()
    start = load_checkpoint(str(base))
    spec = convert(start, Convert(block_length=4), LENGTH, True, 0)
    model = start.model
    for number, inputs in enumerate(batches):
        x0, doc, pos = inputs["x0"], inputs["doc"], inputs["pos"]
        ids, slots = lay_out(inputs["xt"], x0, doc, pos, "causal_context")
        mask = model_mask(model, slots, "causal_context", 4, spec.local_window)
        with torch.no_grad():
            routed = model.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=slots.pos,
                output_router_logits=True,
            ).router_logits
        assert (slots.doc == PADDING).any()
        want = switch_loss(routed, slots.doc != PADDING, 2)
        got = (losses[50.0][number] - losses[0.0][number]) / 50 * 2  # of two micro-batches
        assert got == pytest.approx(want, rel=1e-3)


# Sliding windows


@pytest.mark.parametrize("length", [WINDOW, 2 * WINDOW])
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_kept_where_rows_are_longer_and_dropped_elsewhere(
    kind, length, save_base, trains
):
    """A token moves what the first layer makes of another token only inside its window."""
    base = save_base(kind)
    sizes = ("convert.block_length=2", f"data.max_length={length}")
    folder, _ = trains(base, "causal_context", *sizes, steps=0)
    kept = length > WINDOW
    assert read_spec(folder).local_window == ("kept" if kept else "dropped")
    model = stock(folder)
    assert model.config.architectures == [type(model).__name__]
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, folder))
    assert before.get("layer_types") == after.get("layer_types")
    ids = torch.arange(3, 3 + 3 * WINDOW).repeat(2, 1)
    ids[1, 0] = 99
    pos = torch.arange(ids.shape[1]).expand_as(ids)
    slots = Slots(torch.zeros_like(pos), pos, torch.zeros_like(pos, dtype=torch.bool))
    mask = model_mask(model, slots, "causal_context", 2, read_spec(folder).local_window)
    for way in ({}, {"attention_mask": mask, "position_ids": pos}):  # stock's own mask, and ours
        with torch.no_grad():
            first = model(
                input_ids=ids, output_hidden_states=True, use_cache=False,
                **(way and way | quiet_routers(model)),
            ).hidden_states[1]  # fmt: skip
        moved = (first[0] - first[1]).abs().amax(-1) > 0
        assert moved.tolist() == [not kept or at < WINDOW for at in range(ids.shape[1])]


# Refusals


@pytest.fixture
def refuses(run_both, save_base, texts, tmp_path):
    """Factory: the reason why a class is not converted: two lines, exit 2, nothing written."""

    def call(kind: str, attention: str, *settings: str, **changes: Any) -> str:
        code, out, err = run_both(
            "adapt", save_base(kind, **changes), "--data", texts, "--max-steps", 1, *settings,
            "--output-dir", tmp_path / "out", f"convert.attention={attention}",
            f"convert.block_length={'null' if attention == 'full' else 4}", "noise.time=document",
            f"objective.ar_weight={0.3 if attention == 'causal_context' else 0}",
            f"data.max_length={LENGTH}",
        )  # fmt: skip
        lines = err.strip().splitlines()
        assert (code, out, len(lines)) == (2, "", 2), err
        assert lines[1].startswith("  fix: ")
        assert not (tmp_path / "out").exists()
        said = lines[0].partition(f" cannot be converted to {attention} attention: ")[2]
        assert said, lines[0]
        return said

    return call


CAUSAL = "attention stays causal: later tokens are not read"
LEAK = "a token is read where the mask forbids it"
NO_MASK = r"its forward does not accept the spec's attention masks \(.*\)"
BLOCK = re.escape("a block in [noisy | clean] differs from the block alone")
PLAIN = "is_causal=false is ignored: a forward without a mask stays causal"
REASONS = [
    *(("gpt_neo", attention, CAUSAL) for attention in ATTENTIONS),
    *(("bloom", attention, NO_MASK) for attention in ATTENTIONS),
    *(("mpt", attention, BLOCK) for attention in BLOCKWISE),
    ("mpt", "full", NO_MASK),
    *((kind, "full", PLAIN) for kind in ("stablelm", "nemotron")),
    *(
        (kind, attention, LEAK)
        for kind in ("jamba", "recurrent_gemma", "qwen3_next", "falcon_h1")
        for attention in BLOCKWISE
    ),
    ("mamba", "causal_context", NO_MASK),
    *((kind, "causal_context", LEAK) for kind in ("lfm2", "minimax", "olmo_hybrid")),
    ("rwkv", "full", CAUSAL),
    ("doge", "causal_context", BLOCK),  # reads its likeliest tokens alone
    ("llama4_text", "causal_context", "the clean half differs from the model's own .*"),  # chunks
    ("minimax_m3_vl_text", "block_causal", "it does not decode from a cache .*"),
]


@pytest.mark.parametrize("kind,attention,reason", REASONS)
def test_what_cannot_be_exact_is_refused_with_the_reason(refuses, kind, attention, reason):
    assert re.fullmatch(reason, refuses(kind, attention))


def test_alibi_is_refused(refuses):
    """With it a falcon counts distances between slots, whatever positions it is told."""
    assert re.fullmatch(NO_MASK, refuses("falcon", "causal_context", alibi=True))


def test_who_stays_causal_under_sdpa_is_converted_with_eager(save_base, trains):
    eager = "train.attn_implementation=eager"
    folder, _ = trains(save_base("stablelm"), "full", eager, steps=1)
    assert read_spec(folder).attention == "full"


# The table of the documentation


@pytest.mark.slow
def test_the_documentation_has_the_table_of_what_the_classes_can_be():
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert BEGIN in page
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(findings(SHAPES)), "python tests/architectures.py prints it"
