"""Divergences from an AR model's distribution, and the loss that distils it."""

import math

import pytest
import torch
from safetensors.torch import load_file

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, parse_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.forward import logits_at
from ar2diff.data.conversations import Conversations, tokenize_conversations
from ar2diff.diffusion import distillation
from ar2diff.diffusion.distillation import (
    Readout,
    acceptance,
    distillation_loss,
    divergence,
    later_visible,
    mixed_divergence,
    sum_in_parts,
)
from ar2diff.training.adapt import AdaptTrainer, adapt, make_collator
from ar2diff.training.arguments import training_arguments
from ar2diff.training.plan import Plan
from ar2diff.training.sft import make_trainer as make_sft_trainer

KINDS = ["ce", "kl", "tv", "lk"]
SUPPRESSED = (3, 6)


def logits_pair(rows=5, vocabulary=8, dtype=torch.double):
    """Two sets of logits without the suppressed ids, and the targets."""
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, rows, vocabulary, dtype=torch.double, generator=generator) * 2
    q[:, SUPPRESSED], p[:, SUPPRESSED] = -math.inf, -math.inf
    return q.to(dtype), p.to(dtype), torch.arange(rows) % 3


def by_loops(kind, q_logits, p_logits, target):
    """A divergence of one position, from its formula."""
    q, p = (
        [math.exp(x) / sum(map(math.exp, row)) for x in row]
        for row in (q_logits.tolist(), p_logits.tolist())
    )
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    tv = sum(abs(a - b) for a, b in zip(p, q, strict=True))
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    share = math.exp(-3 * accepted)
    ce = -math.log(q[target])
    return {"ce": ce, "kl": kl, "tv": tv, "lk": share * kl + (1 - share) * tv}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_their_formulas(kind):
    q, p, target = logits_pair()
    want = [by_loops(kind, *row) for row in zip(q, p, target.tolist(), strict=True)]
    torch.testing.assert_close(divergence(kind, q, p, target), torch.tensor(want).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences_and_flows_into_q_alone(kind):
    q, p, target = logits_pair(rows=1)
    q.requires_grad_(), p.requires_grad_()
    divergence(kind, q, p, target).sum().backward()
    assert p.grad is None and q.grad.isfinite().all()
    share = None
    if kind == "lk":  # lambda is a constant of the gradient
        accepted = float(acceptance(q.detach(), p.detach()))
        share = math.exp(-3 * accepted)

    def value(logits):
        if share is None:
            return by_loops(kind, logits, p[0].detach(), int(target[0]))
        kl, tv = (by_loops(k, logits, p[0].detach(), int(target[0])) for k in ("kl", "tv"))
        return share * kl + (1 - share) * tv

    for v in range(8):
        if v in SUPPRESSED:
            assert q.grad[0, v] == 0
            continue
        up, down = (q[0].detach().clone() for _ in range(2))
        up[v] += 1e-6
        down[v] -= 1e-6
        slope = (value(up) - value(down)) / 2e-6
        assert float(q.grad[0, v]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "tv", "lk"])
def test_equal_distributions_have_no_divergence(kind):
    q, _, target = logits_pair(dtype=torch.float32)
    shifted = q + 5  # the same distribution
    q.requires_grad_()
    found = divergence(kind, q, shifted, target)
    torch.testing.assert_close(found, torch.zeros(5), atol=1e-6, rtol=0)
    found.sum().backward()
    assert q.grad.abs().max() < 1  # finite; tv has a kink here


def test_the_acceptance_is_one_minus_half_of_tv():
    q, p, target = logits_pair()
    torch.testing.assert_close(acceptance(q, p), 1 - divergence("tv", q, p, target) / 2)


def test_a_mixture_is_the_weighted_sum():
    q, p, target = logits_pair()
    want = 0.1 * divergence("ce", q, p, target) + 0.9 * divergence("tv", q, p, target)
    torch.testing.assert_close(mixed_divergence({"ce": 0.1, "tv": 0.9}, q, p, target), want)


def test_bfloat16_logits_are_compared_in_float32():
    q, p, target = logits_pair(dtype=torch.bfloat16)
    for kind in KINDS:
        found = divergence(kind, q, p, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, divergence(kind, q.float(), p.float(), target), atol=0, rtol=0
        )


# In parts


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["kl", "tv", "lk"])
@pytest.mark.parametrize("through", ["head", "head without bias", "logits"])
def test_in_parts_the_loss_and_its_gradient_are_those_of_torch(monkeypatch, through, kind, size):
    monkeypatch.setattr(distillation, "PART", size * 8)
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 8, bias=through == "head", dtype=torch.double)
    width = 8 if through == "logits" else 6
    rows, others = torch.randn(2, 7, width, dtype=torch.double, generator=generator)
    rows.requires_grad_(), others.requires_grad_()
    coef, target = torch.rand(7, dtype=torch.double, generator=generator), torch.arange(7) % 3
    suppressed = torch.zeros(8, dtype=torch.bool).index_fill_(0, torch.tensor(SUPPRESSED), True)
    if through == "logits":
        q, p, inputs, logits = Readout(rows), Readout(others), [rows], (rows, others)
    else:
        q, p = Readout.of_head(head, rows), Readout.of_head(head, others)
        inputs, logits = [rows, *head.parameters()], (head(rows), head(others))
    own, other = (x.masked_fill(suppressed, -math.inf) for x in logits)
    want = divergence(kind, own, other, target)
    right = torch.autograd.grad(7 * (coef * want).sum(), inputs)
    total, terms = distillation_loss(kind, q, p, target, coef, suppressed)
    (7 * total).backward()
    torch.testing.assert_close(terms, want, rtol=0, atol=1e-12)
    torch.testing.assert_close([x.grad for x in inputs], list(right), rtol=0, atol=1e-12)
    assert others.grad is None and not terms.requires_grad


def test_a_frozen_head_gets_no_gradient_and_no_position_no_loss():
    head = torch.nn.Linear(6, 8).requires_grad_(False)
    inputs, none = torch.randn(4, 6, requires_grad=True), torch.zeros(8, dtype=torch.bool)
    readout = Readout.of_head(head, inputs)
    for count in (4, 0):
        target, coef = torch.zeros(count, dtype=torch.long), torch.ones(count)
        p = Readout(torch.randn(count, 8))
        total, terms = distillation_loss("kl", readout[:count], p, target, coef, none)
        total.backward()
        assert len(terms) == count and head.weight.grad is None
    assert inputs.grad.any()


def test_parts_share_what_all_rows_need():
    """As a bigram head's factors: the terms of a part depend on them too."""
    rows = torch.arange(5.0, dtype=torch.double, requires_grad=True)
    factor = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    coef = torch.arange(1.0, 6, dtype=torch.double)
    total, terms = sum_in_parts(
        lambda _rows, part, shared: part[0] ** 2 * shared[0], coef, 2, (rows,), (factor,)
    )
    total.backward()
    assert torch.equal(terms, 2 * torch.arange(5.0) ** 2)
    assert torch.equal(rows.grad, 4 * coef * rows.detach())
    assert factor.grad == (coef * rows.detach() ** 2).sum()


def test_autocast_computes_as_it_does_with_logits():
    head = torch.nn.Linear(64, 64)
    inputs = torch.randn(40, 64, requires_grad=True)
    p, none = Readout(torch.randn(40, 64)), torch.zeros(64, dtype=torch.bool)
    asked = p, torch.zeros(40, dtype=torch.long), torch.ones(40) / 40, none
    found = []
    for way in ("head", "logits"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q = Readout.of_head(head, inputs) if way == "head" else Readout(head(inputs))
            total, _ = distillation_loss("kl", q, *asked)
        assert total.dtype == torch.float32
        found.append([total, *torch.autograd.grad(total, [inputs, *head.parameters()])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


# Where the AR prediction is a valid target


def test_later_visible_is_what_a_loop_finds():
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(6, 13, generator=generator) < 0.4
    block = torch.cat([torch.arange(12) // 4, torch.tensor([2])]).expand(6, 13)
    found = later_visible(visible, block)
    for row in range(6):
        for i in range(13):
            want = any(visible[row, j] for j in range(i + 1, 13) if block[row, j] == block[row, i])
            assert found[row, i] == want


# In training

TEXTS = ["the cat sat", "a dog ran to the old house", "one red mat by the sea", "so"]
CASES = [
    ("causal_context", "shift", "clean", "left"),
    ("causal_context", "same", "clean", "any"),
    ("causal_context", "shift", "teacher", "any"),
    ("block_causal", "shift", "teacher", "left"),
    ("full", "shift", "teacher", "any"),
]


@pytest.fixture
def trainer_of(convert_tiny, tmp_path):
    """Factory: a trainer of the tiny model, whose weights have moved since it was made."""

    def make(attention="causal_context", prediction="shift", move=0.05, **distil):
        full = attention == "full"
        convert = {
            "attention": attention, "block_length": None if full else 4, "prediction": prediction,
        }  # fmt: skip
        overrides = [f"convert.{key}={'null' if v is None else v}" for key, v in convert.items()]
        tree = {
            "convert": convert,
            "objective": {"distil": distil, "normaliser": "masked"},
            "data": {"max_length": 32},
            "train": {"max_steps": 1},
        }
        checkpoint, recipe = load_checkpoint(str(convert_tiny(*overrides))), parse_recipe(tree, "")
        checkpoint.model.double()
        trainer = AdaptTrainer(
            checkpoint, recipe, training_arguments(recipe, tmp_path),
            data_collator=make_collator(recipe, checkpoint.noise),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in checkpoint.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
                parameter += move * noise * parameter.std()
        return trainer

    return make


def packed(trainer):
    """A batch of two rows, the first of two documents."""
    rows = [part for _, (part,) in trainer.fixed_rows(TEXTS)]
    return trainer.data_collator([(0, [rows[0], rows[3]]), (1, [rows[1]]), (2, [rows[2]])])


def ar_logits(model, ids):
    """What an AR model predicts after some tokens. The mask is for a teacher with the config of a
    converted model, whose default is another."""
    causal = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
    return model(input_ids=ids[None], attention_mask=causal, use_cache=False).logits[0, -1]


def denoiser_logits(trainer, before, block, place):
    """What the model predicts for a token of a noised block, given the clean tokens before it, by a
    mask written out for this block alone."""
    spec = trainer.spec
    ids, clean = torch.cat([before, block]), len(before)
    size = spec.block_length or len(ids)
    i = torch.arange(len(ids))
    edge = i[None, :] <= i[:, None]
    if spec.attention != "causal_context":
        edge = i[None, :] // size <= i[:, None] // size
    edge[clean:] = True
    logits = trainer.model(
        input_ids=ids[None], attention_mask=edge[None, None], use_cache=False
    ).logits[0]
    return logits[clean + place - (spec.prediction == "shift")]


def by_document(trainer, batch):
    """(row, column, whether it is distilled, coefficient, target, q, p) of each masked token, from
    forward passes on its document alone."""
    distil = trainer.recipe.objective.distil
    size, suppressed = trainer.spec.block_length, trainer.suppressed
    ar_model = trainer.teacher if distil.target == "teacher" else trainer.model
    for row, column in batch["scored"].nonzero().tolist():
        place = int(batch["pos"][row, column])
        begin = column - place  # of the document
        same = (batch["doc"][row] == batch["doc"][row, begin]).nonzero()[:, 0]
        first = place // size * size if size else 0
        last = min(first + size, len(same)) if size else len(same)
        x0, xt, masked = (batch[name][row, same] for name in ("x0", "xt", "scored"))
        q = denoiser_logits(trainer, x0[:first], xt[first:last], place - first)
        with torch.no_grad():
            p = ar_logits(ar_model, x0[:place])
        written = bool(batch["ar"][row, column])
        seen = bool((~masked[place + 1 : last]).any())
        clean = place == first > 0 and trainer.spec.prediction == "shift"
        chosen = written and (distil.visible == "any" or clean or not seen)
        chosen = chosen and not (clean and distil.target == "clean")
        q, p = (x.masked_fill(suppressed, -math.inf) for x in (q, p))
        yield row, column, chosen, batch["coef"][row, column], x0[place], q, p


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(("attention", "prediction", "target", "visible"), CASES)
def test_the_loss_and_its_gradient_are_those_of_one_document_at_a_time(
    trainer_of, attention, prediction, target, visible, weight
):
    kind = {1.0: "kl", 0.3: "tv"}[weight]
    trainer = trainer_of(
        attention, prediction, target=target, visible=visible, weight=weight, loss=kind
    )
    batch, model = packed(trainer), trainer.model.eval()
    total, chosen = torch.zeros((), dtype=torch.double), []
    for _, _, distilled, coef, token, q, p in by_document(trainer, batch):
        term = divergence("ce", q[None], q[None], token[None])[0]
        if distilled:
            term = (1 - weight) * term + weight * divergence(kind, q[None], p[None], token[None])[0]
        total, chosen = total + coef * term, [*chosen, distilled]
    assert any(chosen) and not all(chosen)
    total = total / batch["divisor"]
    ar = [(r, c) for r, c in batch["ar"].nonzero().tolist()]
    for row, column in ar if attention == "causal_context" else ():
        begin = column - int(batch["pos"][row, column])
        logits = ar_logits(model, batch["x0"][row, begin:column])
        term = -logits.log_softmax(-1)[batch["x0"][row, column]]
        total = total + 0.3 * term / len(ar)
    want = torch.autograd.grad(total, list(model.parameters()))
    for logits in (False, True):  # through the head, and with all logits
        model.zero_grad()
        found = trainer.compute_loss(model, batch, return_outputs=logits)
        loss = found[0] if logits else found
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        loss.backward()
        for parameter, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["shift", "same"])
def test_only_a_token_that_no_later_one_moves_is_distilled(trainer_of, prediction):
    """Every visible token after a masked one is replaced: a distilled token's prediction stays, and
    its target too; the prediction of any other masked token moves."""
    trainer = trainer_of(prediction=prediction, target="teacher", visible="left", move=0.0)
    batch, model = packed(trainer), trainer.model.eval()
    wanted = trainer.task_of(batch)
    places, read = batch["scored"].nonzero().tolist(), []
    for number, (row, column) in enumerate(places):
        changed = dict(batch)
        later = torch.zeros_like(batch["scored"])
        later[row, column + 1 :] = batch["doc"][row, column + 1 :] == batch["doc"][row, column]
        other = torch.where(later, (batch["x0"] + 7) % 200 + 3, batch["x0"])
        changed["x0"] = other
        changed["xt"] = torch.where(batch["scored"], batch["xt"], other)
        rows = []
        for inputs in (batch, changed):
            task = trainer.task_of(inputs)
            with torch.no_grad():
                made = [
                    logits_at(of, asked.index, **asked.inputs(of, None))
                    for of, asked in ((model, task.task), (trainer.teacher, task.source))
                ]
            rows.append(torch.cat(made))
        apart = (rows[0] - rows[1]).abs().amax(1)
        distilled = bool(wanted.distilled[number])
        if distilled:
            own = len(places) + int(wanted.distilled[:number].sum())
            assert apart[number] < 1e-9 and apart[own] < 1e-9
        elif batch["ar"][row, column]:
            assert apart[number] > 1e-6
        read.append(distilled)
    assert 3 < sum(read) < len(read)


class Killed(Exception):
    pass


@pytest.fixture
def data_file(write_jsonl):
    return write_jsonl("rows.jsonl", [{"text": f"{text} {n}"} for n, text in enumerate(TEXTS * 6)])


def run(base, data, folder, *overrides, **flags):
    """Adapt a model in four steps, with a checkpoint after two."""
    sizes = ["train.max_steps=4", "train.save_steps=2", "train.logging_steps=1",
             "data.max_length=32", "train.learning_rate=0.01"]  # fmt: skip
    return adapt(str(base), load_recipe(None, [*sizes, *overrides]), folder, data=data, **flags)


def test_the_teacher_is_the_model_before_training_also_when_resumed(
    tiny_checkpoint, data_file, tmp_path, monkeypatch
):
    trainers, step = [], AdaptTrainer.training_step

    def killed_in_step_4(self, *args, **kwargs):
        trainers.append(self)
        if self.state.global_step == 3 and self.args.output_dir.startswith(str(tmp_path / "b")):
            raise Killed
        return step(self, *args, **kwargs)

    base = load_checkpoint(str(tiny_checkpoint)).model
    ids = torch.arange(3, 20)[None]
    teaching = ["objective.distil.target=teacher", "noise.on_policy=0.5"]
    monkeypatch.setattr(AdaptTrainer, "training_step", killed_in_step_4)
    run(tiny_checkpoint, data_file, tmp_path / "a", *teaching)
    own, teacher = trainers[-1].model, trainers[-1].teacher
    with torch.no_grad():
        want, rows = base(input_ids=ids).logits, base.config.vocab_size
        torch.testing.assert_close(teacher(input_ids=ids).logits[..., :rows], want)
        assert not torch.allclose(own(input_ids=ids).logits[..., :rows], want)
    assert teacher.config is not own.config
    assert not any(p.requires_grad for p in teacher.parameters())
    logged = [row for row in trainers[-1].state.log_history if "divergence" in row]
    assert len(logged) == 4 and logged[0]["divergence"] > 0
    with pytest.raises(Killed):
        run(tiny_checkpoint, data_file, tmp_path / "b", *teaching)
    monkeypatch.setattr(AdaptTrainer, "training_step", step)
    run(tiny_checkpoint, data_file, tmp_path / "b", *teaching, resume=True)
    whole, resumed = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_sft_distils_the_answers_own_tokens(convert_tiny, tmp_path):
    distil = {"target": "clean", "visible": "left"}
    tree = {
        "convert": {"block_length": 4},
        "objective": {"distil": distil},
        "data": {"max_length": 64},
    }
    checkpoint, recipe = (
        load_checkpoint(str(convert_tiny("convert.block_length=4"))),
        parse_recipe(tree, ""),
    )
    checkpoint.model.double()
    pairs = [{"prompt": f"what is {n}?", "completion": f" it is {n}{'!' * n}."} for n in range(5)]
    rows = tokenize_conversations(Conversations(pairs, [""] * 5, ()), checkpoint.tokenizer, recipe)
    trainer = make_sft_trainer(Plan(checkpoint, recipe, rows, None), tmp_path, [])
    batch, model = trainer.data_collator(trainer.fixed_rows(pairs)), trainer.model.eval()
    wanted = trainer.task_of(batch)
    with torch.no_grad():
        found = logits_at(model, wanted.source.index, **wanted.source.inputs(model, None))
    size, number, kept = 4, 0, []
    for n, (row, slot) in enumerate(batch["scored"].nonzero().tolist()):
        place, block = int(batch["pos"][row, slot]), batch["block"][row, slot]
        clean = (~batch["noisy"][row] & (batch["doc"][row] == 0)).nonzero()[:, 0]
        ids = batch["target"][row, clean]
        block = (batch["noisy"][row] & (batch["block"][row] == block)).nonzero()[:, 0]
        later = block[batch["pos"][row, block] > place]
        valid = place < len(ids) and not (~batch["scored"][row, later]).any() and place % size
        assert bool(wanted.distilled[n]) == bool(valid) and len(block) == size
        kept.append(bool(valid))
        if valid:
            with torch.no_grad():
                torch.testing.assert_close(found[number], ar_logits(model, ids[:place]))
            assert wanted.source.target[number] == ids[place]
            number += 1
    assert any(kept) and not all(kept)
    trainer.compute_loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.distil.weight=0"], "greater than 0"),
        (["objective.distil.loss=ce"], "'kl', 'tv' or 'lk'"),
        (["objective.distil={}", "objective.ar_weight=0"], "needs objective.ar_weight above 0"),
        (["objective.distil={}", "convert.attention=block_causal"], "needs attention causal_cont"),
        (["objective.distil={}", "objective.kind=ar"], "cannot be used with objective.kind ar"),
        (["objective.distil={}", "rl={}"], "cannot be used with rl"),
        (["noise.law=bell", "rl={}"], "noise.law must be uniform with rl"),
        (["noise.law=all", "noise.complementary=true"], "cannot be used with law all"),
        (["noise.on_policy=0.5", "rl={}"], "cannot be used with rl"),
        (["noise.on_policy=0.5", "noise.complementary=true"], "cannot be used with on_policy"),
        (["noise.on_policy=0.5", "convert.attention=full"], "needs an attention with blocks"),
        (["noise.on_policy=0.5", "objective.weight=cart"], "cannot be used with objective.weight"),
        (["noise.law=all", "noise.all_share=1.5"], "less than or equal to 1"),
        (["objective.normaliser=masked+ar", "objective.ar_weight=0"], "objective.ar_weight above"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(overrides, said):
    with pytest.raises(Ar2DiffError) as caught:
        load_recipe(None, overrides)
    assert said in caught.value.what


def test_a_model_without_an_ar_mode_teaches_nothing(convert_tiny, data_file, tmp_path):
    blocks = convert_tiny("convert.attention=block_causal")
    with pytest.raises(Ar2DiffError, match="has no AR mode"):
        run(blocks, data_file, tmp_path / "out", "objective.distil.target=teacher",
            "objective.ar_weight=0", "convert.attention=block_causal")  # fmt: skip
    assert not (tmp_path / "out").exists()
