"""Any call of `generate`: an answer in the layout of transformers, or an Ar2DiffError."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import MASK, build_model, tiny_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.forward import logits_at
from ar2diff.core.generate import generate

CONTEXT = 32
SPECS = [
    (attention, prediction)
    for attention in ("causal_context", "block_causal", "full")
    for prediction in ("same", "shift")
]
PAD = 7


@cache
def converted(attention="causal_context", prediction="shift"):
    spec = tiny_spec(attention, 4, prediction)
    model = build_model("llama", dtype=torch.float32, max_position_embeddings=CONTEXT)
    model = deepcopy(model)
    model.config.diffusion, model.config.mask_token_id = spec.to_dict(), MASK
    if attention != "causal_context":
        model.config.is_causal = False
    model.generation_config.suppress_tokens = [MASK]
    return model


def call(attention="causal_context", prediction="shift", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(model=converted(attention, prediction), **kwargs)


# Random calls


def sometimes(good, bad=()):
    """Mostly a good value, now and then one that is none."""
    return st.sampled_from([*good, *good, *good, *bad])


BAD_NUMBERS = (-1, float("nan"), "much", True, [1], 1e400)
BAD_COUNTS = (0, -3, 2.5, "two", float("nan"), float("inf"), [2], True, 10**30)
OPTIONS = {
    "max_new_tokens": sometimes((0, 1, 3, 5, 9, 40, 10**30), (-1, 2.5, "two", True, [3])),
    "max_length": sometimes((12, 40), (1, -1, "long")),
    "min_new_tokens": sometimes((0, 1, 4, 99), (-1, "one", 0.5)),
    "mode": sometimes(("diffusion", "ar", "speculative"), ("draft", 3, ["ar"])),
    "block_length": sometimes((1, 2, 3, 4), (0, 5, 10**30, "all", 2.5)),
    "threshold": sometimes((0, 0.05, 0.3, 0.9, 1, 2.0), BAD_NUMBERS),
    "steps_per_block": sometimes((1, 2, 3, 50, 10**30), BAD_COUNTS),
    "entropy_bound": sometimes((0, 0.3, 4.0, 1e400), BAD_NUMBERS[:-1]),
    "order": sometimes(("prob", "margin", "entropy", "random"), ("best", 1, None)),
    "remask": sometimes((0, 0.4, 1), (1.2, *BAD_NUMBERS)),
    "cfg_scale": sometimes((0, 0.5, 3), BAD_NUMBERS),
    "draft_length": sometimes((1, 2, 3), (4, 50, *BAD_COUNTS)),
    "cache_implementation": sometimes(
        ("dynamic", "static", "prefix", "dual", "none"), ("quantized", 1, {})
    ),
    "check_cache": sometimes((True, False)),
    "use_cache": sometimes((True, False)),
    "do_sample": sometimes((True, False)),
    "temperature": sometimes((0, 0.0, 1e-3, 0.7, 1.0, 5, 1e9), (1e-320, *BAD_NUMBERS)),
    "repetition_penalty": sometimes((0.5, 1.0, 1.3, 100.0), (0, *BAD_NUMBERS)),
    "top_k": sometimes((0, 1, 5, 1000, 10**30), (-1, 2.5, "few")),
    "top_p": sometimes((1e-9, 0.3, 1.0), (0, 1.5, *BAD_NUMBERS)),
    "min_p": sometimes((0, 0.1, 1.0), BAD_NUMBERS),
    "typical_p": sometimes((0.2, 1.0), (0, *BAD_NUMBERS)),
    "epsilon_cutoff": sometimes((0, 0.01, 0.9), (1.0, *BAD_NUMBERS)),
    "eta_cutoff": sometimes((0, 0.01, 0.9), (1.0, *BAD_NUMBERS)),
    "top_h": sometimes((0.2, 1.0), (0, *BAD_NUMBERS)),
    "sequence_bias": sometimes(
        ([[[5], 3.0]], {(5,): -2.0, (9,): 1.0}, None),
        ([[[5, 6], 1.0]], {(5, 6): 1.0}, {(999,): 1.0}, "words", [], {5: 1.0}, [[[5], "a"]]),
    ),
    "eos_token_id": sometimes((2, [2, 9], list(range(3, 40)), []), (999, -1, "end", [[2]], 2.5)),
    "suppress_tokens": sometimes(([], [5, 6], [999]), ([-1], "none", list(range(64)), [[2]], 3)),
    "pad_token_id": sometimes((0, PAD), ("pad", [1])),
    "bos_token_id": sometimes((1,), ("bos", 999, -1, [1])),
    "num_return_sequences": sometimes((1, 2, 3), BAD_COUNTS[:-1]),
    "return_dict_in_generate": sometimes((True, False)),
    "max_time": sometimes((1e9, 0, 1e-9), BAD_NUMBERS[:-1]),
    "seed": sometimes((0, 1, -5, 2**70, [3, 4]), ("dice", 1.5, [], [[1]], ["a"])),
    "stop_strings": sometimes(("",), (["."], 3, [4])),
    "num_beams": sometimes((1,), (4, "two")),
    "logits_to_keep": sometimes((0, 1)),
    "no_such_option": sometimes((1,)),
    "token_type_ids": sometimes((None,)),
}
RARE = ("no_such_option", "num_beams", "stop_strings", "bos_token_id", "max_length", "max_time")


@st.composite
def requests(draw):
    rows = draw(st.integers(1, 16) | st.sampled_from([1, 2]))
    longest = draw(st.sampled_from([0, 1, 3, 4, 5, 8, 11, CONTEXT - 4, CONTEXT - 1, CONTEXT]))
    length_of_a_row = st.integers(1, max(1, longest))
    shorter = draw(st.lists(length_of_a_row, min_size=rows - 1, max_size=rows - 1))
    lengths = [longest, *(min(length, longest) for length in shorter)]
    word = st.integers(3, MASK - 1)
    if draw(st.sampled_from([False, False, True])):
        word = word | st.just(MASK)
    if draw(st.integers(0, 40)) == 0:
        word = word | st.sampled_from([64, -1])
    left, pad = draw(st.booleans()), draw(st.sampled_from([PAD, PAD, 2, MASK]))
    ids = torch.full((rows, longest), pad)
    real = torch.zeros(rows, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = draw(st.lists(word, min_size=length, max_size=length))
        words[:1] = [draw(sometimes((1,), words[:1]))] if words else []
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[row, place] = torch.tensor(words, dtype=torch.long)
        real[row, place] = 1
    kwargs = {"inputs": draw(st.sampled_from([ids, ids, ids, ids.int()]))}
    if longest and (len(set(lengths)) > 1 or draw(st.booleans())):
        kwargs["attention_mask"] = real
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=8, unique=True))
    rare = draw(st.integers(0, 5)) == 0
    kwargs |= {name: draw(OPTIONS[name]) for name in names if rare or name not in RARE}
    return (*draw(st.sampled_from(SPECS)), kwargs)


OUTCOMES = []


def assert_an_answer_or_an_error(request):
    attention, prediction, kwargs = request
    ids, real = kwargs["inputs"], kwargs.get("attention_mask")
    try:
        out = call(attention, prediction, **kwargs)
    except Ar2DiffError as error:
        assert error.what and error.fix
        OUTCOMES.append(error.what)
        return
    OUTCOMES.append(None)
    sequences = out.sequences if hasattr(out, "sequences") else out
    copies, width = kwargs.get("num_return_sequences") or 1, ids.shape[1]
    ids = ids.long().repeat_interleave(copies, 0)
    if not width:
        assert sequences[:, 0].tolist() == [1] * len(ids)  # the BOS
        ids, width = sequences[:, :1], 1
        real = None
    assert sequences.shape[0] == len(ids)
    new = sequences[:, width:]
    if isinstance(most := kwargs.get("max_new_tokens"), int):
        assert new.shape[1] <= most
    assert new.shape[1] <= CONTEXT
    given_ones = sequences[:, :width]
    real = torch.ones_like(ids) if real is None else real.repeat_interleave(copies, 0)
    holes = (ids == MASK) & (real == 1)
    assert torch.equal(given_ones[~holes], ids[~holes])  # padding included
    assert not (given_ones[holes] == MASK).any() and not (new == MASK).any()
    allowed = set(range(64)) - {MASK}
    assert set(sequences[sequences != MASK].tolist()) <= allowed | {-1, 999, PAD}
    ends = kwargs.get("eos_token_id")
    ends = [2] if ends is None else ends if isinstance(ends, list) else [ends]
    pad = kwargs.get("pad_token_id")
    pad = pad[0] if isinstance(pad, list) else pad
    for row in new.tolist():
        end = next((i for i, word in enumerate(row) if word in ends), len(row))
        if pad is not None:
            assert set(row[end + 1 :]) <= {pad}
    if hasattr(out, "sequences"):
        assert out.logprobs.shape == out.steps.shape == new.shape
        assert bool((out.logprobs <= 0).all()) and not out.logprobs.isnan().any()
        assert (out.steps >= 0).all() and (out.steps <= out.forwards[:, None]).all()


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=70, **QUICK)
@given(requests())
def test_a_random_call_gets_an_answer_or_an_ar2diff_error(request):
    assert_an_answer_or_an_error(request)


@pytest.mark.slow
@settings(max_examples=1000, **QUICK)
@given(requests())
def test_a_random_call_gets_an_answer_or_an_ar2diff_error_a_thousand_times(request):
    assert_an_answer_or_an_error(request)


# Calls that random ones seldom make


IDS = torch.tensor([[1, 17, 42, 5, 9]])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"inputs": torch.tensor([[1, 64]])},
        {"inputs": torch.tensor([[1, -1]])},
        {"inputs": IDS.float()},
        {"inputs": IDS[None]},
        {"inputs": IDS.tolist()},
        {"inputs": IDS[:0]},
        {"inputs": torch.tensor([[MASK, 5]])},
        {"attention_mask": torch.zeros(1, 5)},
        {"attention_mask": torch.ones(2, 5)},
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])},
        {"attention_mask": [[1, 1, 1, 1, 1]]},
        {"temperature": 1e300},
        {"cfg_scale": 1e38},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"sequence_bias": {(999,): 1.0}},
        {"sequence_bias": [[[5, 6], 1.0]]},
        {"sequence_bias": {(5,): 1e308}},
        {"suppress_tokens": list(range(64))},
        {"min_new_tokens": 2, "eos_token_id": list(range(64))},
        {"seed": [1, 2]},
        {"seed": [[1]], "temperature": 1.0},
        {"epsilon_cutoff": 1.0},
        {"stop_strings": [4]},
        {"mode": "speculative", "draft_length": 4},
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_an_ar2diff_error(kwargs):
    with pytest.raises(Ar2DiffError):
        call(**{"inputs": IDS, "max_new_tokens": 6, "temperature": 1.0} | kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 1e-300},
        {"steps_per_block": 10**30},
        {"block_length": 10**30, "attention": "full"},
        {"max_new_tokens": 10**30},
        {"eos_token_id": -1, "min_new_tokens": 3},
        {"eos_token_id": 999, "min_new_tokens": 3},
        {"sequence_bias": {(5,): float("-inf")}},
        {"suppress_tokens": [-1, 999]},
        {"max_time": 0},
        {"seed": np.int64(3), "temperature": 1.0},
        {"seed": torch.tensor([3]), "temperature": 1.0},
    ],
    ids=str,
)
def test_what_can_be_honoured_gets_an_answer(kwargs):
    out = call(**{"inputs": IDS, "max_new_tokens": 6} | kwargs)
    assert out.shape[1] > 5 and not (out == MASK).any()


@pytest.mark.parametrize("left", [True, False])
def test_padding_that_is_the_mask_token_is_no_gap(left):
    ids, real = torch.tensor([[1, 17, MASK, 5]]), torch.ones(1, 4, dtype=torch.long)
    alone = call(inputs=ids, attention_mask=real, max_new_tokens=3)
    pad, none = torch.full((1, 2), MASK), torch.zeros(1, 2, dtype=torch.long)
    order = 1 if left else -1
    padded = call(
        inputs=torch.cat([pad, ids][::order], 1),
        attention_mask=torch.cat([none, real][::order], 1),
        max_new_tokens=3,
    )
    pad_at, real_at = (slice(0, 2), slice(2, 6)) if left else (slice(4, 6), slice(0, 4))
    assert padded[0, pad_at].tolist() == [MASK, MASK]
    assert padded[0, real_at].tolist() == alone[0, :4].tolist()
    assert padded[0, 6:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize(("attention", "prediction"), SPECS)
def test_left_and_right_padding_are_the_rows_alone(attention, prediction):
    rows = [[1, 17, 42, 5, 9, 60], [1, 8], [1, 33, 21, 4]]
    alone = [
        call(attention, prediction, inputs=torch.tensor([row]), max_new_tokens=5)[0, len(row) :]
        for row in rows
    ]
    for left in (True, False):
        ids, real = torch.full((3, 6), PAD), torch.zeros(3, 6, dtype=torch.long)
        for line, row in enumerate(rows):
            place = slice(6 - len(row), 6) if left else slice(0, len(row))
            ids[line, place], real[line, place] = torch.tensor(row), 1
        out = call(attention, prediction, inputs=ids, attention_mask=real, max_new_tokens=5)
        assert torch.equal(out[:, :6], ids)
        for line, want in enumerate(alone):
            assert out[line, 6 : 6 + len(want)].tolist() == want.tolist()


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_calls_leave_nothing_behind(mode):
    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    hooks = len(converted().lm_head._forward_pre_hooks)
    kwargs = {"inputs": IDS.repeat(4, 1), "max_new_tokens": 9, "temperature": 1.0, "mode": mode}
    call(**kwargs)
    before = tensors()
    for seed in range(10):
        call(seed=seed, **kwargs)
    assert tensors() == before
    assert len(converted().lm_head._forward_pre_hooks) == hooks


# Where it is called from


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_threads_that_share_a_model_do_not_meet(mode):
    prompts = [torch.tensor([[1, 17 + n, 42, 5 + n, 9]]) for n in range(4)]
    kwargs = {"max_new_tokens": 24, "mode": mode, "eos_token_id": []}
    alone = [call(inputs=prompt, **kwargs).tolist() for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            answers = pool.map(lambda prompt: call(inputs=prompt, **kwargs).tolist(), prompts)
            assert list(answers) == alone


def test_a_head_is_read_by_its_own_thread_alone():
    model = converted()
    whole = model(input_ids=IDS, use_cache=False).logits
    with ThreadPoolExecutor(1) as pool:

        def meet(_module, _args):
            handle.remove()
            other = pool.submit(lambda: model(input_ids=IDS, use_cache=False).logits).result()
            assert torch.equal(other, whole)
            met.append(True)

        met: list[bool] = []
        handle = model.model.norm.register_forward_pre_hook(meet)
        logits = logits_at(model, torch.tensor([3]), input_ids=IDS)
    assert met and torch.allclose(logits[0], whole[0, 3], atol=1e-5)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static", "none"])
def test_a_model_in_training_writes_as_in_evaluation_and_goes_on_training(cache_implementation):
    model = deepcopy(converted())
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    want = call(inputs=IDS, max_new_tokens=9)
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()
    kwargs = {"max_new_tokens": 9, "cache_implementation": cache_implementation}
    assert torch.equal(generate(IDS, model=model, **kwargs), want)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_a_cache_of_the_generation_config_that_is_none_of_ours_is_passed_over():
    model = deepcopy(converted())
    model.generation_config.cache_implementation = "hybrid"  # Gemma's
    assert torch.equal(
        generate(IDS, model=model, max_new_tokens=6), call(inputs=IDS, max_new_tokens=6)
    )
    with pytest.raises(Ar2DiffError):
        generate(IDS, model=model, max_new_tokens=6, cache_implementation="hybrid")


def test_pads_of_a_batch_without_a_mask_are_no_text():
    model = converted()
    rows, pad = [[1, 17, 42, 5], [1, 9]], 0
    padded = torch.tensor([rows[0], [pad, pad, *rows[1]]])
    kwargs = {"pad_token_id": pad, "eos_token_id": 2, "max_new_tokens": 6}
    want = generate(padded, model=model, attention_mask=(padded != pad).long(), **kwargs)
    assert torch.equal(generate(padded, model=model, **kwargs), want)
    as_text = generate(padded, model=model, attention_mask=torch.ones_like(padded), **kwargs)
    assert not torch.equal(as_text, want)


def test_a_configs_temperature_alone_does_not_sample():
    model = converted()
    ids = torch.tensor([[1, 17, 42]])
    config = GenerationConfig(temperature=5.0)
    texts = {
        tuple(generate(ids, config, model=model, max_new_tokens=8)[0].tolist()) for _ in range(4)
    }
    assert texts == {tuple(generate(ids, model=model, max_new_tokens=8)[0].tolist())}
    kwargs = {"model": model, "max_new_tokens": 8, "temperature": 5.0}
    assert not torch.equal(generate(ids, seed=1, **kwargs), generate(ids, seed=2, **kwargs))
