"""Rotary factors that depend on the length of a row: a text is that of its row alone, read anew."""

import copy
import math

import pytest
import torch
from conftest import MASK, SWITCH, build_model, tiny_spec

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.forward import rope_regime, rope_switches
from ar2diff.core.options import resolve

LENGTHS = (3, 9, 21, 12, 14, 15)  # some cross the switch, some begin after it
NEW = 10
KINDS = ("phi3_longrope", "llama_dynamic")


def prompt_of(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, MASK, (length,), generator=generator).tolist()


PROMPTS = [prompt_of(length) for length in LENGTHS]


def decode(kind, prompts, spec, **settings):
    """Answers and forwards of rows."""
    options = resolve(spec, settings)
    blocks = options.mode == "diffusion" and spec.attention != "full"
    canvas = Canvas.of_prompts(
        prompts, MASK, max_new_tokens=NEW, grid=options.block_length if blocks else 1,
        end_ids=[5, 6],
    )  # fmt: skip
    for _ in denoise(build_model(kind), spec, canvas, options):
        pass
    return [(canvas.new_ids(row), int(canvas.forwards[row])) for row in range(len(prompts))]


WAYS = [
    ({}, "causal_context"),
    ({"cfg_scale": 1.0, "threshold": 0.2}, "causal_context"),
    ({"temperature": 1.0, "seed": 3}, "block_causal"),
    ({"block_length": 4, "steps_per_block": 2}, "full"),
    ({"mode": "ar"}, "causal_context"),
    ({"mode": "speculative", "draft_length": 3}, "causal_context"),
    ({"mode": "speculative", "draft_length": 1, "temperature": 1.0, "seed": 3}, "causal_context"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings,attention", WAYS, ids=str)
def test_a_batch_and_a_cache_change_no_text_across_the_switch(kind, settings, attention):
    spec = tiny_spec(attention)
    exact = {**settings, "cache_implementation": "none"}
    alone = [decode(kind, [prompt], spec, **exact)[0] for prompt in PROMPTS]
    assert decode(kind, PROMPTS, spec, **exact) == alone
    for cache in () if attention == "full" else ("dynamic", "static"):
        assert decode(kind, PROMPTS, spec, **settings, cache_implementation=cache) == alone
    for cache in ("prefix", "dual") if attention == "full" else ():
        cached = {**settings, "cache_implementation": cache}
        alone = [decode(kind, [prompt], spec, **cached)[0] for prompt in PROMPTS]
        assert decode(kind, PROMPTS, spec, **cached) == alone


def ar_greedy(model, prompt, new):
    """One plain forward for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and not (len(ids) > len(prompt) and ids[-1] in (5, 6)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[MASK] = -math.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("mode", ["ar", "speculative"])
@pytest.mark.parametrize("kind", KINDS)
def test_lossless_modes_write_what_plain_forwards_write(kind, mode):
    want = [ar_greedy(build_model(kind), prompt, NEW) for prompt in PROMPTS]
    assert [ids for ids, _ in decode(kind, PROMPTS, tiny_spec(), mode=mode)] == want


def test_the_switch_matters():
    """Factors of the other side give other texts, so that the tests above can fail."""
    model = copy.deepcopy(build_model("phi3_longrope"))
    want = [ar_greedy(model, prompt, NEW) for prompt in PROMPTS]
    model.config.rope_parameters["original_max_position_embeddings"] = 512
    assert [ar_greedy(model, prompt, NEW) for prompt in PROMPTS] != want


def test_switches_are_read_from_the_config():
    assert rope_switches(build_model("phi3_longrope").config) == (SWITCH,)
    assert rope_switches(build_model("llama").config) == ()
    assert rope_switches(build_model("gpt2").config) == ()
    config = copy.deepcopy(build_model("qwen3_mixed").config)
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 9}
    config.rope_parameters = {"full_attention": longrope, "sliding_attention": None}
    assert rope_switches(config) == (9,)
    assert rope_regime(torch.tensor([9, 10, 99]), (9, 20)).tolist() == [0, 1, 2]
