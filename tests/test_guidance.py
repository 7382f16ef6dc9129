"""A classifier moves the vectors that open slots show, against its gradient by differences."""

import pytest
import torch
from test_noises import IDS, MASK, V, close, double
from test_vectors import spec_of, tiny

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import decoder_of
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.guidance import RATE, Guidance, Texts
from ar2diff.core.noises import Uniform
from ar2diff.core.options import resolve
from ar2diff.generation.steering import steered


def wants(token):
    """A classifier: how many tokens of a text are expected to be this one, behind its prompt."""

    def classifier(p, prompt):
        behind = torch.arange(p.shape[1]) >= prompt[:, None]
        return (p[..., token] * behind).sum(1).clamp(min=1e-6).log()

    return classifier


@pytest.fixture
def slots():
    """Three slots of two rows at two times: what they show, what was drawn, and the logits."""
    _, noise = tiny(0.5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, V, generator=generator, dtype=torch.double)
    logits[:, [2, MASK]] = -torch.inf
    x = noise.state(torch.tensor([-3, -9, -11]))
    t, s = double(0.9, 0.9, 0.7), double(0.6, 0.6, 0.4)
    after = noise.step(x, torch.tensor([0, 1, 3]), t, s, double(0.1, 0.5, 0.7))
    canvas = Canvas.of_prompts([[0, 3], [0]], MASK, max_new_tokens=3, grid=2)
    canvas.ids[1, 1] = 3
    texts = Texts.of(canvas, torch.tensor([0, 0, 1]), torch.tensor([2, 3, 2]), logits)
    return noise, logits, x, t, s, after, texts


def test_a_classifier_reads_what_is_decided_and_what_is_likely_in_open_slots(slots):
    *_, logits, _, _, _, _, texts = slots
    p = logits.softmax(-1)
    rows = texts.with_open(p)
    close(rows[:, 0], torch.eye(V).double()[[0, 0]])
    close(rows[:, 1], torch.eye(V).double()[[3, 3]])
    close(rows[0, 2:4], p[:2])
    close(rows[1, 2:4], torch.stack([p[2], 0 * p[2]]))  # a slot that has not begun
    assert texts.prompt.tolist() == [2, 1]


@pytest.mark.parametrize("token", IDS)
def test_a_step_follows_the_gradient_and_raises_what_the_classifier_says(slots, token):
    noise, logits, x, t, s, after, texts = slots

    def value(z):
        p = (logits + noise.log_likely(torch.cat([z, after[:, 8:]], 1), s)).softmax(-1)
        return wants(token)(texts.with_open(p), texts.prompt).sum()

    z, slope = after[:, :8], torch.zeros(3, 8).double()
    for i in range(24):
        bump = torch.zeros(24).double()
        bump[i] = 1e-5
        slope.view(-1)[i] = (value(z + bump.view(3, 8)) - value(z - bump.view(3, 8))) / 2e-5
    clear = slope.abs() > 1e-4 * slope.abs().max()  # the others are lost in rounding
    for fluency in (0.0, 0.01):  # which is at its best where a step begins
        found = Guidance(wants(token), fluency, 1).moved(noise, logits, x, t, s, after, texts)
        close(found[:, 8:], after[:, 8:])
        moved = found[:, :8] - z
        close(moved[clear], RATE * slope[clear].sign(), atol=1e-4)
    steps = [
        float(
            value(Guidance(wants(token), 0.0, n).moved(noise, logits, x, t, s, after, texts)[:, :8])
        )
        for n in (1, 3)
    ]
    assert float(value(z)) < steps[0] < steps[1]
    held = Guidance(wants(token), 1e9, 3).moved(noise, logits, x, t, s, after, texts)
    close(held, after, atol=1e-6)


def written(model, spec, **call):
    options = resolve(spec, {"mode": "diffusion", "max_new_tokens": 5, "seed": 3, **call})
    canvas = Canvas.of_prompts([[0, 1]] * 40, MASK, max_new_tokens=5, grid=2)
    decoder = decoder_of(model, spec, canvas, options)
    for _ in decoder.run():
        pass
    return canvas.ids[:, 2:7]


def test_a_classifier_steers_the_sampler_and_one_that_says_nothing_changes_no_text():
    model, noise = tiny(0.5)
    spec = spec_of(noise)
    call = {"temperature": 1.0, "steps_per_block": 4, "suppress_tokens": [2]}
    plain = written(model, spec, **call)
    assert torch.equal(
        written(model, spec, classifier=lambda p, _: p.sum((1, 2)) * 0, **call), plain
    )
    gains = [
        int((written(model, spec, classifier=wants(token), **call) == token).sum())
        - int((plain == token).sum())
        for token in IDS
    ]
    assert min(gains) > 0 and sum(gains) > 10
    assert MASK not in plain


MISTAKES = [
    (lambda p: p, "classifier failed: TypeError"),
    (lambda p, n: 3.0, "classifier returned float"),
    (lambda p, n: p[:, 0, 0].sum(), "classifier returned a tensor []"),
    (lambda p, n: p.detach()[:, 0, 0], "returned what has no gradient"),
    (lambda p, n: p[:, -1, 0] * torch.nan, "no numbers or infinite"),
]


@pytest.mark.parametrize(("classifier", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_classifiers_that_fail_or_return_anything_else(classifier, said):
    model, noise = tiny(0.5)
    with pytest.raises(Ar2DiffError) as refused:
        written(model, spec_of(noise), classifier=classifier)
    assert said in refused.value.what and refused.value.fix


REFUSED = [
    ("uniform", {"classifier": wants(0)}, "but this model's noise, uniform in the free form"),
    ("embedding", {"classifier": 3}, "a function of probabilities and lengths of prompts"),
    ("embedding", {"fluency": 0.1}, "is of the guidance by a classifier, and there is none"),
    ("embedding", {"classifier": wants(0), "fluency": -1}, "fluency"),
    ("embedding", {"classifier": wants(0), "mode": "ar"}, "only works with"),
]


@pytest.mark.parametrize(("kind", "call", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_classifiers_that_a_call_cannot_have(kind, call, said):
    spec = spec_of(Uniform("free") if kind == "uniform" else tiny()[1])
    if "mode" in call:
        spec = spec.__class__(**{**vars(spec), "ar_mode": True})
    with pytest.raises(Ar2DiffError) as refused:
        resolve(spec, {"mode": "diffusion"} | call)
    assert said in str(refused.value)


def test_a_classifier_by_name_is_the_function_of_that_file(tmp_path):
    (tmp_path / "mine.py").write_text("def short(p, prompt):\n    return p.sum((1, 2))\n")
    found = steered({"classifier": f"{tmp_path}/mine.py:short"})["classifier"]
    assert float(found(torch.ones(1, 2, 3), None)[0]) == 6
    with pytest.raises(Ar2DiffError, match=r"'mine\.py' names no function"):
        steered({"classifier": "mine.py"})
