"""Rows that join others between two forwards, and leave them, write what they write alone."""

import pytest
import torch
from conftest import CLASSES, build_model, tiny_spec

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.options import resolve

PROMPTS = [
    [1, 17, 42, 5, 9, 60, 33, 8, 21, 3, 44, 50, 7],
    [1, 8],
    [1, 33, 21, 4],
    [1, 50, 50, 50, 50],
    [1, 9, 9, 30, 31, 32, 60],
]
NEW = [23, 9, 14, 3, 18]
ARRIVALS = [0, 2, 2, 3, 9]  # forwards that the first row has made by then
MODES = {
    "ar": {"mode": "ar"},
    "ar sampled": {"mode": "ar", "temperature": 1.0, "seed": 5},
    "ar uncached": {"mode": "ar", "cache_implementation": "none"},
    "chains": {"mode": "speculative", "draft_length": 3},
    "trees": {"mode": "speculative", "draft_length": 2, "draft_nodes": 6},
    "drafts as they pay": {"mode": "speculative"},
    "drafts sampled": {"mode": "speculative", "draft_length": 2, "temperature": 0.9, "seed": 5},
    "diffusion": {"mode": "diffusion", "threshold": 0.2},
    "diffusion sampled": {"mode": "diffusion", "threshold": 0.1, "temperature": 1.2, "seed": 5},
    "steps": {"mode": "diffusion", "steps_per_block": 3, "order": "random", "seed": 1},
    "remasking": {"mode": "diffusion", "steps_per_block": 4, "remask": 0.4},
}
LOSSLESS = [name for name, settings in MODES.items() if settings["mode"] != "diffusion"]
DENOISING = [name for name in MODES if name not in LOSSLESS]


def begun(model, spec, row, settings, ends):
    options = resolve(spec, {"max_new_tokens": NEW[row], "eos_token_id": ends, **settings})
    grid = options.block_length if options.mode == "diffusion" else 1
    canvas = Canvas.of_prompts(
        [PROMPTS[row]],
        spec.mask_token_id,
        max_new_tokens=NEW[row],
        grid=grid or 1,
        end_ids=ends,
    )
    return decoder_of(model, spec, canvas, options)


def written(decoder, row):
    canvas = decoder.canvas
    return canvas.new_ids(row), int(canvas.forwards[row]), bool(canvas.over[row])


def alone(model, spec, settings, ends=()):
    found = []
    for row in range(len(PROMPTS)):
        decoder = begun(model, spec, row, settings, ends)
        for _ in decoder.run():
            pass
        found.append(written(decoder, 0))
    return found


def together(model, spec, settings, ends=()):
    """The same, where rows come at `ARRIVALS` and those that are over leave when one comes."""
    found, host, numbers, forwards = {}, None, [], 0
    for row in range(len(PROMPTS)):
        while host is not None and forwards < ARRIVALS[row] and host.canvas.unfinished:
            host.step()
            forwards += 1
        new = begun(model, spec, row, settings, ends)
        new.step()
        if new.canvas.over[0]:
            found[row] = written(new, 0)
            continue
        if host is None:
            host, numbers = new, [row]
            continue
        assert host.joins and new.joins
        over = [place for place, done in enumerate(host.canvas.over) if done]
        found |= {numbers[place]: written(host, place) for place in over}
        left = [place for place in range(len(numbers)) if place not in over]
        if not left:
            host, numbers = new, [row]
            continue
        if over:
            host.select(left)
        host.join(new)
        numbers = [*(numbers[place] for place in left), row]
    for _ in host.run():
        pass
    found |= {row: written(host, place) for place, row in enumerate(numbers)}
    return [found[row] for row in range(len(PROMPTS))]


def same(first, second, forwards):
    """With drafts, the number of forwards depends on what a batch can afford to draft."""
    return [x if forwards else (x[0], x[2]) for x in first] == [
        x if forwards else (x[0], x[2]) for x in second
    ]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in CLASSES
        for name in (MODES if kind in ("llama", "mistral_window") else ("ar", "chains", "steps"))
    ],
)
def test_rows_that_join_write_what_they_write_alone(kind, name):
    model, spec, settings = build_model(kind), tiny_spec(), MODES[name]
    ends, forwards = (7, 12, 25), settings["mode"] != "speculative"
    assert same(together(model, spec, settings, ends), alone(model, spec, settings, ends), forwards)


@pytest.mark.parametrize("name", DENOISING)
@pytest.mark.parametrize("prediction", ["same", "shift"])
@pytest.mark.parametrize("attention", ["block_causal", "full"])
def test_so_they_do_under_other_attention(attention, prediction, name):
    block = None if attention == "full" else 4
    spec, model = tiny_spec(attention, block, prediction), build_model("llama")
    settings = MODES[name]
    assert together(model, spec, settings) == alone(model, spec, settings)


@pytest.mark.parametrize("name", ["ar", "chains"])
def test_so_they_do_where_rotary_factors_depend_on_the_length(name):
    model, spec, settings = build_model("phi3_longrope"), tiny_spec(), MODES[name]
    assert same(together(model, spec, settings), alone(model, spec, settings), forwards=False)


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        *(("causal_context", name) for name in ("ar", "chains", "diffusion", "steps")),
        *(("block_causal", name) for name in ("diffusion", "steps")),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_a_row_that_resumes_from_a_known_context_writes_the_same(kind, attention, name):
    model, spec, settings = build_model(kind), tiny_spec(attention), MODES[name]
    whole = begun(model, spec, 0, settings, ())
    for _ in whole.run():
        pass
    first = begun(model, spec, 0, settings, ())
    first.step()
    first.step()
    context = first.context(0)
    grain = 1 if attention == "causal_context" else 4
    assert context[0][0].shape[2] >= 12
    for count in range(grain, 12, grain):
        again = begun(model, spec, 0, settings, ())
        assert again.resumes
        again.resume([[(keys[:, :, :count], values[:, :, :count]) for keys, values in context]])
        for _ in again.run():
            pass
        assert written(again, 0) == written(whole, 0)


def test_a_row_that_is_closed_is_not_written_further():
    model, spec = build_model("llama"), tiny_spec()
    decoder = begun(model, spec, 0, MODES["ar"], ())
    decoder.step()
    decoder.canvas.close(0)
    assert decoder.canvas.over == [True] and decoder.canvas.unfinished == 0
    assert len(decoder.canvas.new_ids(0)) == 1


def test_what_a_canvas_holds_is_padded_and_cut_to_its_longest_row():
    first = Canvas.of_prompts([[1, 2, 3]], 63, max_new_tokens=5)
    second = Canvas.of_prompts([[1, 4]], 63, max_new_tokens=1)
    both = first.joined(second)
    assert both.ids.tolist() == [[1, 2, 3, 63, 63, 63, 63, 63], [1, 4, 63, 63, 63, 63, 63, 63]]
    assert both.given.sum(1).tolist() == [3, 2] and both.unfinished == 2
    assert torch.equal(both.selected([1]).ids, second.ids)
