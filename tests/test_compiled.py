"""Forwards through torch.compile: the same tokens, from few graphs that outlive the call.

Dynamo captures the graphs, and they run as they were captured (its backend `eager`). One slow test
has inductor translate them; CUDA graphs are for `make gpu`.
"""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from fakedev import build
from fakedev.decoding import SETTINGS, Setting, models, states
from torch._dynamo.utils import counters

from ar2diff.core import compiled
from ar2diff.core.cache import FREE, MOST_FREE
from ar2diff.core.candidates import CandidateReader
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.options import resolve

COMPILE = torch.compile
AR = Setting(options={"mode": "ar"})
CHAIN = Setting(options={"draft_length": 3}, drafted=True)
WAYS = {
    "ar, windows in some layers": Setting(options={"mode": "ar"}, kind="gemma2"),
    "draft adapter": SETTINGS["draft drawn"],
    "diffusion": SETTINGS["threshold same"],
}
MORE = {
    "ar": SETTINGS["ar"],
    "ar, windows": Setting(options={"mode": "ar"}, kind="mistral_window"),
    "chain": SETTINGS["speculative"],
    "tree": SETTINGS["speculative tree"],
    "single row": SETTINGS["threshold alone"],
    "diffusion, windows": SETTINGS["threshold window"],
    "diffusion, windows in some layers": SETTINGS["eager"],
    "block_causal": SETTINGS["block_causal"],
    "fixed steps": Setting(options={"mode": "diffusion", "steps_per_block": 2}),
    "guided": SETTINGS["guided"],
    "headed": SETTINGS["headed"],
    "gaps": SETTINGS["gaps"],
}
TESTED = [*WAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def captured(forward, *, mode, **settings):
    """torch.compile without a compiler."""
    assert mode == "reduce-overhead"
    return COMPILE(forward, backend="eager", **settings)


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were captured since the start of the test."""
    monkeypatch.setattr(torch, "compile", captured)
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled is called as it is."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)


def written(setting, model, spec, draft=None, **options):
    """The text of each row, and how many forwards it took."""
    changed = replace(setting, options={**setting.options, **options})
    canvas, forwards = states(changed, model, spec, draft)
    for _ in forwards:
        pass
    whole = setting.gaps
    texts = [canvas.ids[n].tolist() if whole else canvas.new_ids(n) for n in range(setting.rows)]
    return texts, canvas.forwards.tolist()


@pytest.mark.parametrize("name", TESTED)
def test_a_compiled_decoder_writes_the_same_tokens_from_few_graphs(graphs, name):
    setting = (WAYS | MORE)[name]
    found = next(models(setting, None))
    plain = written(setting, *found)
    assert graphs() == 0
    assert written(setting, *found, compile=True) == plain
    # A token, or fixed candidates; a block, and one behind the block before it.
    blocks = setting.options.get("mode") == "diffusion" or setting.attention == "block_causal"
    assert 1 <= graphs() <= 1 + blocks


def test_graphs_serve_later_calls_and_other_lengths_of_prompts(graphs):
    model, spec, _ = next(models(AR, None))
    shorter = replace(AR, options={"mode": "ar", "max_new_tokens": 5})
    for setting in (AR, AR, shorter, replace(AR, rows=2), AR):
        written(setting, model, spec, compile=True)
    assert graphs() == 2  # for three rows, and for two
    written(AR, model, spec, compile=True, max_new_tokens=compiled.LEAST_COLUMNS)
    assert graphs() == 3


def test_a_call_takes_the_cache_of_an_earlier_one(uncompiled):
    model, spec, _ = next(models(AR, None))
    places = []
    for rows in (3, 3, 2, 1, 3):
        written(replace(AR, rows=rows), model, spec, compile=True)
        places.append({key: id(stock) for key, stock in FREE[model].items()})
    three = [found.get((3, compiled.LEAST_COLUMNS, False)) for found in places]
    assert three[0] == three[1] == three[2] and three[3] is None
    assert all(len(found) <= MOST_FREE for found in places)


def test_two_calls_at_a_time_have_caches_of_their_own(uncompiled):
    model, spec, _ = next(models(AR, None))
    texts, _ = written(AR, model, spec)
    fast = replace(AR, options={"mode": "ar", "compile": True})
    (first, one), (second, other) = (states(fast, model, spec, None) for _ in range(2))
    for _ in one:
        next(other)
        assert "forward" not in vars(model.get_decoder())
    assert [first.new_ids(n) for n in range(3)] == texts == [second.new_ids(n) for n in range(3)]


def test_a_graph_reads_the_weights_of_the_adapter_that_it_is_called_with(graphs, monkeypatch):
    model, spec, draft = next(models(CHAIN, None))
    other, read, ahead = copy.deepcopy(draft), CandidateReader.read, []
    for weights in other.parameters():
        weights.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))

    def noted(*args):
        found = read(*args)
        ahead.append(found[1].clone())
        return found

    monkeypatch.setattr(CandidateReader, "read", noted)
    seen = []
    for adapter in (draft, other, draft):
        for fast in (False, True):
            ahead.clear()
            # A growing cache would drop rows that have finished.
            written(CHAIN, model, spec, adapter, compile=fast, cache_implementation="static")
            seen.append(ahead[:])
        torch.testing.assert_close(seen[-1], seen[-2], rtol=0, atol=1e-4)
    assert graphs() == 1
    assert (seen[0][0] - seen[2][0]).abs().max() > 1e-2


def test_shapes_beyond_the_limit_are_read_by_the_plain_decoder(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    model, spec, _ = next(models(AR, None))
    for setting in (AR, replace(AR, rows=2)):
        assert written(setting, model, spec, compile=True) == written(setting, model, spec)
    assert graphs() == 1


def test_a_model_that_cannot_be_captured_is_refused(graphs, monkeypatch):
    model, spec, _ = next(models(AR, None))
    norm = model.get_decoder().norm
    plain = norm.forward

    def prints(states):
        print("", end="")
        return plain(states)

    monkeypatch.setattr(norm, "forward", prints)
    with pytest.raises(Ar2DiffError, match=r"cannot be compiled .*leave out compile"):
        written(AR, model, spec, compile=True)
    assert "forward" not in vars(model.get_decoder())
    assert written(AR, model, spec)[1] == [32, 32, 32]


def test_a_model_whose_rotary_factors_change_is_refused():
    setting = SETTINGS["switching"]
    model, spec, _ = next(models(setting, None))
    with pytest.raises(Ar2DiffError, match=r"rotary factors .*leave out compile"):
        written(setting, model, spec, compile=True)


@pytest.mark.parametrize(
    ("attention", "given", "message"),
    [
        ("full", {}, "compile needs a static cache.*leave out compile"),
        (
            "causal_context",
            {"cache_implementation": "dynamic"},
            "needs a static cache, not .dynamic.*leave out cache_impl",
        ),
        (
            "causal_context",
            {"use_cache": False},
            "use_cache=False asks for none.*leave out compile",
        ),
        ("causal_context", {"mode": "speculative"}, "set draft_length, or use mode=ar"),
    ],
)
def test_what_has_no_fixed_shape_is_refused(attention, given, message):
    spec = next(models(Setting(attention), None))[1]
    with pytest.raises(Ar2DiffError, match=message):
        resolve(spec, {"compile": True, **given})


@pytest.mark.slow
@pytest.mark.parametrize("setting", [AR, CHAIN, SETTINGS["threshold same"]], ids=str)
def test_inductor_writes_the_same_tokens(setting):
    if shutil.which(build.COMPILER) is None:
        pytest.skip("there is no C++ compiler, which inductor needs")
    found = next(models(setting, None))
    assert written(setting, *found, compile=True) == written(setting, *found)
