"""The trainer of rl on a tiny converted model: ratios, gradients, references, resuming."""

import inspect
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import TrainerCallback
from trl import GRPOTrainer

from ar2diff.checkpoint.adapters import add_adapter
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, parse_recipe
from ar2diff.config.rl import PRESETS, Rl
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training import grpo
from ar2diff.training import rollouts as rollouts_module
from ar2diff.training.base import checkpoints
from ar2diff.training.estimators import score, views
from ar2diff.training.grpo import Groups, check_reference, rollouts_of
from ar2diff.training.plan import Plan
from ar2diff.training.rl import check_settings, make_trainer
from ar2diff.training.rollouts import sample

BLOCKS, FULL = ("convert.block_length=4",), ("convert.attention=full", "convert.block_length=null")
PROMPTS = ["ab", "hello", "x", "to the end"]
TRAIN = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0,
    "schedule": "constant", "save_steps": 100, "precision": "fp32",
}  # fmt: skip
RL = {"rewards": [{"name": "exact"}], "num_generations": 4, "max_completion_length": 6}
ESTIMATORS = ["one_step", "coupled", "elbo", "spg", "unigrpo", "trajectory", "ar"]
TOKEN = 70  # whose share is the reward
LETTERS = {"suppress_tokens": [*range(3, 60), *range(80, 259)]}  # 20 tokens and the end


def share(completion_ids, **_):
    return [ids.count(TOKEN) / 6 for ids in completion_ids]


def length(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def trainer_of(convert_tiny, tmp_path):
    """Factory: trainer_of("elbo", train={...}, reward=f, **rl) on the tiny converted model."""

    def make(
        estimator="one_step", *, of=BLOCKS, train=None, peft=None, prompts=PROMPTS, reward=length,
        folder="run", change=lambda checkpoint: None, **rl,
    ):  # fmt: skip
        tree = {"train": TRAIN | (train or {}), "rl": RL | {"estimator": estimator} | rl}
        recipe = parse_recipe(tree | ({"peft": peft} if peft else {}), "test")
        checkpoint = load_checkpoint(str(convert_tiny(*of)))
        change(checkpoint)
        check_settings(recipe, checkpoint.spec)
        add_adapter(checkpoint, recipe)
        rows = [{"prompt": prompt} for prompt in prompts]
        return make_trainer(
            Plan(checkpoint, recipe, rows, make_trainer), [reward], tmp_path / folder, []
        )

    return make


def watch(trainer):
    """What each micro-step computes: new and old log-probabilities, mask, the model's mode."""
    seen, compute = [], trainer._compute_loss

    def noted(model, inputs):
        loss = compute(model, inputs)
        old = inputs.get("old_per_token_logps")
        if old is not None and old.dim() == 3:  # of each update
            old = old[:, trainer._rollouts[0].update]
        new = trainer._logps.detach()
        # Without a KL a row that has no advantage is not scored.
        live = (inputs["advantages"] != 0) | bool(trainer.beta)
        mask = inputs["completion_mask"] * live[:, None]
        seen.append(
            SimpleNamespace(new=new, old=old, mask=mask, mode=model.training, inputs=inputs,
                            loss=loss.detach(), update=trainer._rollouts[0].update)
        )  # fmt: skip
        return loss

    trainer._compute_loss = noted
    return seen


def batch_of(trainer):
    """The first micro-batch, and its rollouts."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return inputs, rollouts_of(inputs["canvas"], inputs["canvas_of"])


def own_logps(trainer, rollouts, inputs, model=None, good=None):
    rl, model = trainer.recipe.rl, model or trainer.checkpoint.model
    width = inputs["completion_ids"].shape[1]
    scores = score(model, rollouts, rl, trainer.spec, trainer.suppressed, width=width)
    return scores.per_token(good)


def shake(model, size=0.05):
    """Move all trainable weights, as some updates would."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)


def test_prompts_do_not_end_where_the_tokenizer_ends_texts(trainer_of):
    def close(checkpoint):
        checkpoint.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert checkpoint.tokenizer("abc").input_ids[-1] == 2

    inputs, rollouts = batch_of(trainer_of(change=close, prompts=["abc"] * 4))
    assert not (inputs["prompt_ids"] == 2).any()
    assert all(rollout.ids[rollout.prompt - 1] != 2 for rollout in rollouts)


# Ratios


EQUAL = ["abc", "xyz", "low", "end"]
PLANS = [  # num_iterations, steps_per_generation, gradient_accumulation_steps, prompts, difference
    (3, 2, 2, EQUAL, 0.0),
    (1, 4, 2, EQUAL, 0.0),
    (2, 2, 1, PROMPTS, 1e-5),  # other widths of a batch: other roundings
]


@pytest.mark.parametrize("iterations, steps, accumulation, prompts, close", PLANS)
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "spg"])
def test_a_policy_that_does_not_move_has_the_ratio_1(
    trainer_of, estimator, iterations, steps, accumulation, prompts, close
):
    """Old and new are scored in other batches, in another order: not a bit may differ."""
    trainer = trainer_of(
        estimator,
        prompts=prompts,
        num_iterations=iterations,
        steps_per_generation=steps,
        train={"gradient_accumulation_steps": accumulation, "max_steps": 6 // accumulation},
    )
    trainer.args.learning_rate = 0.0
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == 6
    if estimator == "unigrpo":
        assert [step.update for step in seen] == [n // steps % iterations for n in range(6)]
    for step in seen:
        assert ((step.new - step.old) * step.mask).abs().max() <= close
        written = step.mask.bool() & ((step.new != 0) | (estimator != "unigrpo"))
        assert written.any() and step.new[written].max() < 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_ratio_is_1_at_first_and_then_moves(trainer_of, estimator):
    trainer = trainer_of(estimator, num_iterations=3, train={"learning_rate": 1e-2})
    seen = watch(trainer)
    trainer.train()
    if estimator == "spg":
        assert all(step.old is None for step in seen)
        return
    first, *later = [((s.new - s.old) * s.mask).abs().max().item() for s in seen]
    assert first == 0 and min(later) > 1e-3


@pytest.mark.parametrize("estimator", ["coupled", "trajectory"])
def test_the_ratio_is_1_in_bfloat16_and_with_checkpointed_gradients(trainer_of, estimator):
    trainer = trainer_of(
        estimator, prompts=EQUAL, num_iterations=2, train={"precision": "bf16", "max_steps": 2,
        "gradient_checkpointing": True},
    )  # fmt: skip
    trainer.args.learning_rate = 0.0
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == 2 and trainer.model.is_gradient_checkpointing
    assert all(torch.equal(step.new, step.old) for step in seen)
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)


def test_completions_are_written_in_the_precision_of_training(trainer_of, monkeypatch):
    precisions, plain = [], grpo.sample

    def sample(*args):
        precisions.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return plain(*args)

    monkeypatch.setattr(grpo, "sample", sample)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", False)):
        batch_of(trainer_of(train={"precision": precision}))
        assert precisions == [dtype]
        precisions.clear()


def test_each_generation_has_noise_of_its_own_and_each_of_its_iterations_the_same(trainer_of):
    trainer = trainer_of("elbo", num_iterations=2, steps_per_generation=1, train={"max_steps": 4})
    seen = watch(trainer)
    trainer.train()
    seeds = [step.inputs["canvas_of"][:, 3].tolist() for step in seen]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3]
    assert len({*seeds[0], *seeds[2]}) == 8
    ids = [step.inputs["completion_ids"].tolist() for step in seen]
    assert len({str(row) for row in ids[0]}) > 1 and ids[0] == ids[1] != ids[2]


# Losses


def masked_sum(values, inputs):
    return (values * inputs["completion_mask"]).sum(1)


SURROGATES = {  # of A * log p, [B, C]: what has the gradient of a loss at ratio 1
    "grpo": lambda v, i: -(masked_sum(v, i) / i["completion_mask"].sum(1)).mean(),
    "sapo": lambda v, i: -(masked_sum(v, i) / i["completion_mask"].sum(1)).mean(),
    "bnpo": lambda v, i: -masked_sum(v, i).sum() / i["completion_mask"].sum(),
    "dr_grpo": lambda v, i: -masked_sum(v, i).sum() / (4 * 6),
    "dapo": lambda v, i: -masked_sum(v, i).sum() / i["num_items_in_batch"],
    "cispo": lambda v, i: -masked_sum(v, i).sum() / i["num_items_in_batch"],
    "vespo": lambda v, i: -masked_sum(v, i).sum() / i["num_items_in_batch"],
    "luspo": lambda v, i: -masked_sum(v, i).mean(),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_gradients(trainer, inputs, want, rtol=1e-4):
    model = trainer.model
    got = gradients(model, trainer._compute_loss(model, inputs))
    for one, two in zip(got, gradients(model, want), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in got) > 1e-4


ENDING = {"temperature": 2.0}  # some completions end early


@pytest.mark.parametrize("loss_type", SURROGATES)
def test_the_gradient_is_that_of_advantage_times_log_p(trainer_of, loss_type):
    high = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    trainer = trainer_of("elbo", loss_type=loss_type, sampler=ENDING, **high)
    inputs, rollouts = batch_of(trainer)
    assert inputs["advantages"].abs().max() > 0.5
    logps = own_logps(trainer, rollouts, inputs)
    want = SURROGATES[loss_type](inputs["advantages"][:, None] * logps, inputs)
    assert_gradients(trainer, inputs, want)


@pytest.mark.parametrize("of", [BLOCKS, FULL], ids=["blocks", "full"])
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "spg"])
def test_the_gradient_of_each_estimator_is_that_of_its_log_p(trainer_of, estimator, of):
    if estimator == "ar" and of is FULL:
        pytest.skip("full attention has no AR mode")
    trainer = trainer_of(estimator, loss_type="grpo", of=of)
    inputs, rollouts = batch_of(trainer)
    logps = own_logps(trainer, rollouts, inputs)
    assert_gradients(
        trainer, inputs, SURROGATES["grpo"](inputs["advantages"][:, None] * logps, inputs)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_update_of_unigrpo_is_its_clipped_ratios_and_k3(trainer_of, level):
    """The second of three updates, after the first moved the model: at its own share of masks."""
    trainer = trainer_of(
        "unigrpo", loss_type="grpo", num_iterations=3, beta=0.1, level=level, of=FULL,
    )  # fmt: skip
    inputs, rollouts = batch_of(trainer)
    assert inputs["old_per_token_logps"].shape[:2] == (4, 3)
    trainer._step = 1
    shake(trainer.model)
    rows = [replace(rollout, update=1) for rollout in rollouts]
    masked = torch.stack([
        torch.nn.functional.pad(
            (views(r, trainer.recipe.rl, trainer.spec)[1] > 0)[0, r.prompt :][: r.answer],
            (0, inputs["completion_ids"].shape[1] - r.answer),
        )
        for r in rows
    ])  # fmt: skip
    assert 0 < masked.sum() < inputs["completion_mask"].sum()
    new = own_logps(trainer, rows, inputs)
    old = own_logps(trainer, rows, inputs, model=trainer.ref_model).detach()
    length = inputs["completion_mask"].sum(1)
    ratio = (new - old).exp()
    if level == "sequence":  # the values hold what makes their mean that of the masked tokens
        weight = (length / masked.sum(1))[:, None]
        means = ((new - old) / weight * masked).sum(1) / masked.sum(1)
        ratio = means.exp()[:, None]
    assert ((ratio < 0.8) | (ratio > 1.2)).any()
    advantage = inputs["advantages"][:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (old - new).exp() - (old - new) - 1
    of_tokens = -surrogate * (masked if level == "token" else inputs["completion_mask"]) + 0.1 * kl
    want = (of_tokens * inputs["completion_mask"]).sum(1) / length
    assert_gradients(trainer, inputs, want.mean(), rtol=1e-3)


def earned_by_some(completion_ids, prompts, **_):
    """The completions of two prompts are told apart, those of the others are not."""
    numbers = range(len(completion_ids))
    return [float(n % 3 == 0 and p in PROMPTS[:2]) for n, p in zip(numbers, prompts, strict=True)]


@pytest.mark.parametrize("estimator, iterations", [("elbo", 2), ("spg", 1), ("trajectory", 1)])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_a_row_without_an_advantage_is_not_scored_and_changes_nothing(
    trainer_of, estimator, iterations, loss_type, monkeypatch
):
    trainer = trainer_of(
        estimator, reward=earned_by_some, loss_type=loss_type, num_iterations=iterations,
        train={"per_device_train_batch_size": 16},
    )  # fmt: skip
    inputs, rollouts = batch_of(trainer)
    advantage = inputs["advantages"]
    assert (advantage == 0).sum() == 8
    good = advantage > 0 if estimator == "spg" else None
    logps = own_logps(trainer, rollouts, inputs, good=good)
    want = SURROGATES[loss_type](advantage[:, None] * logps, inputs)
    scored = []
    monkeypatch.setattr(grpo, "score", lambda m, r, *a: scored.append(len(r)) or score(m, r, *a))
    assert_gradients(trainer, inputs, want)
    assert scored == [8]


def test_where_no_row_has_an_advantage_one_is_scored_and_nothing_is_learned(trainer_of):
    trainer = trainer_of(reward=lambda completion_ids, **_: [1.0] * len(completion_ids))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    after = trainer.model.parameters()
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_the_ratio_of_sequences_is_that_of_means(trainer_of):
    """After a move: exp of the mean difference, clipped, times the advantage."""
    trainer = trainer_of("elbo", level="sequence", loss_type="grpo", num_iterations=2, epsilon=0.01)
    inputs, rollouts = batch_of(trainer)
    shake(trainer.model)
    mask = inputs["completion_mask"]
    difference = own_logps(trainer, rollouts, inputs) - inputs["old_per_token_logps"]
    ratio = ((difference * mask).sum(1) / mask.sum(1)).exp()
    assert ((ratio - 1).abs() > 0.01).any()
    advantage = inputs["advantages"]
    want = -torch.minimum(ratio * advantage, ratio.clamp(0.99, 1.01) * advantage).mean()
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(want.item(), 1e-4)


def test_spg_scores_good_and_bad_completions_by_their_own_bounds(trainer_of):
    trainer = trainer_of("spg", samples=2, num_iterations=4, loss_type="bnpo")
    inputs, rollouts = batch_of(trainer)
    advantage = inputs["advantages"]
    assert "old_per_token_logps" not in inputs and advantage.min() < 0 < advantage.max()
    logps = own_logps(trainer, rollouts, inputs, good=advantage > 0)
    assert_gradients(trainer, inputs, SURROGATES["bnpo"](advantage[:, None] * logps, inputs))
    other = own_logps(trainer, rollouts, inputs)
    differ = ((other - logps).abs() > 1e-4).any(1)
    assert torch.equal(differ, advantage <= 0)


def test_the_end_tokens_of_the_sampler_are_those_of_the_trainer(trainer_of):
    trainer = trainer_of(sampler=LETTERS | {"eos_token_id": [TOKEN, TOKEN + 1]})
    _, rollouts = batch_of(trainer)
    ended = [rollout.answer_ids[-1] in (TOKEN, TOKEN + 1) for rollout in rollouts]
    assert trainer.eos_token_ids == [TOKEN, TOKEN + 1] and any(ended)
    assert trainer._metrics["train"]["stop_rate"][-1] == sum(ended) / 4
    assert trainer._metrics["train"]["completions/clipped_ratio"][-1] == 1 - sum(ended) / 4


def test_completions_without_an_end_do_not_count_where_that_is_asked_for(trainer_of):
    trainer = trainer_of("one_step", mask_truncated_completions=True, sampler=ENDING)
    inputs, rollouts = batch_of(trainer)
    ended = torch.tensor([rollout.answer_ids[-1] == 2 for rollout in rollouts])
    assert torch.equal(inputs["completion_mask"].sum(1) > 0, ended)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.isfinite()


# The reference


@pytest.mark.parametrize("kl", ["k3", "k2"])
def test_the_kl_is_that_to_the_model_as_it_began(trainer_of, kl):
    trainer = trainer_of("elbo", beta=0.3, kl=kl, loss_type="grpo")
    inputs, rollouts = batch_of(trainer)
    shake(trainer.model)
    with torch.no_grad():
        reference = own_logps(trainer, rollouts, inputs, trainer.ref_model)
    torch.testing.assert_close(inputs["ref_per_token_logps"], reference, rtol=0, atol=1e-5)
    logps, mask = own_logps(trainer, rollouts, inputs), inputs["completion_mask"]
    advantage = inputs["advantages"][:, None] * (logps - logps.detach()).exp()
    if kl == "k3":
        each = (reference - logps).exp() - (reference - logps) - 1
        divergence = ((each * mask).sum(1) / mask.sum(1)).mean()
    else:
        whole = ((logps - reference) * mask).sum(1)
        divergence = (whole**2 / 2 / mask.sum(1)).mean()
    want = SURROGATES["grpo"](advantage, inputs) + 0.3 * divergence
    loss = trainer._compute_loss(trainer.model, inputs)
    assert divergence.item() > 0.01 and trainer.beta == 0.3
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert trainer._metrics["train"]["kl"][-1] > 0
    assert_gradients(trainer, inputs, want, rtol=1e-3)


@pytest.mark.parametrize("kl", ["k3", "k2"])
@pytest.mark.parametrize("estimator", ["one_step", "elbo", "trajectory"])
def test_a_policy_that_has_not_moved_has_no_kl(trainer_of, estimator, kl):
    trainer = trainer_of(estimator, beta=0.3, kl=kl)
    inputs, _ = batch_of(trainer)
    trainer._compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(0, abs=1e-9)


def test_the_kl_counts_once_whatever_the_accumulation(trainer_of):
    losses = []
    for steps in (1, 2):
        trainer = trainer_of(
            "one_step", beta=0.5, kl="k2", train={"gradient_accumulation_steps": steps}
        )
        inputs, _ = batch_of(trainer)
        shake(trainer.model)
        loss = trainer._compute_loss(trainer.model, inputs)
        trainer.beta = 0.0
        losses.append((loss - trainer._compute_loss(trainer.model, inputs)).item() * steps)
        assert losses[-1] == pytest.approx(0.5 * trainer._metrics["train"]["kl"][-1], rel=1e-4)


def test_the_reference_of_an_adapter_is_the_model_under_it(trainer_of, convert_tiny):
    """The mask token's row, which trains beside the adapter, is off too."""
    trainer = trainer_of("one_step", beta=0.3, peft={"r": 4, "alpha": 8.0})
    shake(trainer.model)
    inputs, rollouts = batch_of(trainer)
    base = load_checkpoint(str(convert_tiny(*BLOCKS))).model
    with torch.no_grad():
        want, now = (own_logps(trainer, rollouts, inputs, model) for model in (base, None))
    torch.testing.assert_close(inputs["ref_per_token_logps"], want, rtol=0, atol=1e-5)
    assert trainer.ref_model is None and (now - want).abs().max() > 0.1


def test_an_ar_model_is_no_reference(trainer_of, tiny_checkpoint, converted):
    causal, ours = load_checkpoint(str(tiny_checkpoint)), load_checkpoint(str(converted))
    check_reference(None, ours)
    check_reference(load_checkpoint(str(converted)).model, ours)
    with pytest.raises(Ar2DiffError, match="reference model is not the converted model"):
        check_reference(causal.model, ours)

    def forget(checkpoint):
        checkpoint.model.config._name_or_path = str(tiny_checkpoint)

    with pytest.raises(Ar2DiffError, match="reference model is not the converted model"):
        trainer_of("one_step", beta=0.1, change=forget)


# Rollouts


def test_rollouts_are_written_in_eval_mode_and_scored_in_train_mode(trainer_of):
    trainer, modes = trainer_of(), []
    model = trainer.checkpoint.model
    model.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_grad_enabled(), model.training))
    )
    batch, _ = batch_of(trainer)
    rollout_modes = set(modes)
    modes.clear()
    trainer._compute_loss(trainer.model, batch)
    assert rollout_modes == {(False, False)} and set(modes) == {(True, True)}
    assert trainer.model.training


def test_only_right_completions_are_rewarded_for_the_forwards_they_save(trainer_of):
    def right(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    trainer = trainer_of("trajectory", reward=right, fewer_forwards=0.5, sampler={"threshold": 0.0})
    rewarded, compute = [], trainer._calculate_rewards

    def noted(*args):
        rewarded.append((compute(*args), list(trainer._rollouts)))
        return rewarded[-1][0]

    trainer._calculate_rewards = noted
    trainer.train()
    assert trainer.reward_func_names[-1] == "fewer_forwards"
    assert trainer.reward_weights.tolist() == [1.0, 0.5]
    saved = 0
    for rewards, rollouts in rewarded:
        for (verified, extra), rollout in zip(rewards.tolist(), rollouts, strict=True):
            share = 1 - rollout.forwards / rollout.answer
            assert extra == pytest.approx(share if verified else 0.0)
            saved += extra > 0
    assert saved


@pytest.mark.parametrize("rl", [{"estimator": "ar"}, {"sampler": {"steps_per_block": 2}}])
def test_a_reward_for_fewer_forwards_needs_forwards_that_vary(rl):
    with pytest.raises(Ar2DiffError, match="fewer_forwards needs"):
        parse_recipe({"rl": RL | {"fewer_forwards": 0.5} | rl}, "test")


@pytest.fixture
def recorded(monkeypatch):
    """{seed: log-probabilities} that the sampler recorded of each rollout's answer."""
    seen, original = {}, rollouts_module.of_canvas

    def of_canvas(canvas, row, spec, seed):
        rollout = original(canvas, row, spec, seed)
        end = rollout.prompt + rollout.answer
        seen[seed] = canvas.logprob[row, rollout.prompt : end].clone()
        return rollout

    monkeypatch.setattr(rollouts_module, "of_canvas", of_canvas)
    return seen


def dropout(checkpoint):
    for module in checkpoint.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5


@pytest.mark.parametrize("change", [lambda _: None, dropout], ids=["as it is", "dropout"])
@pytest.mark.parametrize("of", [BLOCKS, FULL], ids=["blocks", "full"])
@pytest.mark.parametrize("estimator", ["trajectory", "ar"])
def test_what_the_trainer_scores_is_what_the_sampler_recorded(
    trainer_of, recorded, estimator, of, change
):
    """Prompts of unlike length in one batch, decoded together: no padding, no dropout, no other
    canvas, no token that only one of them can mean stands between the two."""
    if estimator == "ar" and of is FULL:
        pytest.skip("full attention has no AR mode")
    settings = LETTERS | ({"threshold": 0.1} if estimator == "trajectory" else {})
    trainer = trainer_of(
        estimator, of=of, sampler=settings, change=change, steps_per_generation=4,
        train={"max_steps": 4},
    )  # fmt: skip
    seen = watch(trainer)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert len({step.inputs["canvas_of"][n, 1].item() for step in seen for n in range(4)}) > 2
    for step in seen:
        rows = zip(step.new, step.mask, step.inputs["canvas_of"].tolist(), strict=True)
        scored = [(new, answer, seed) for new, live, (_, _, answer, seed) in rows if live.any()]
        for new, answer, seed in scored:
            want = recorded[seed]
            torch.testing.assert_close(new[:answer], want[:answer], rtol=0, atol=1e-4)
    assert scored


@pytest.mark.parametrize("sampler, temperature", [({}, 1.0), ({"temperature": 0.7}, 0.7)])
def test_rollouts_are_drawn_at_the_temperature_of_the_scores(
    trainer_of, monkeypatch, sampler, temperature
):
    seen = []
    monkeypatch.setattr(grpo, "sample", lambda *args: seen.append(args[3]) or sample(*args))
    trainer = trainer_of(sampler=sampler)
    batch_of(trainer)
    assert seen == [{"temperature": temperature, "max_new_tokens": 6, "mode": "diffusion"}]
    assert trainer.args.temperature == temperature


def test_a_rollout_is_a_function_of_its_seed_and_not_of_its_batch(convert_tiny):
    checkpoint = load_checkpoint(str(convert_tiny(*BLOCKS)))
    prompts, seeds = [[1, 70, 71], [1, 72], [1, 70, 71], [1] * 9], [3, 4, 5, 6]
    settings = {"temperature": 1.0, "max_new_tokens": 6, "mode": "diffusion"}
    together = sample(checkpoint, prompts, seeds, settings, 32)
    torch.manual_seed(7)
    pairs = sample(checkpoint, prompts[::-1], seeds[::-1], settings, 2)[::-1]
    for one, two in zip(together, pairs, strict=True):
        assert one.ids.tolist() == two.ids.tolist() and one.seed == two.seed
        assert one.step.tolist() == two.step.tolist() and one.forwards == two.forwards
    assert together[0].answer_ids != together[2].answer_ids
    assert [len(rollout.ids) % 4 for rollout in together] == [0] * 4


def test_generations_neither_repeat_a_prompt_nor_mix_its_completions():
    def groups(generations=6, seed=0):
        return list(Groups(5, groups=2, size=3, repeats=2, seed=seed, generations=generations))

    stream = groups()
    assert len(stream) == len(Groups(5, groups=2, size=3, repeats=2, seed=0, generations=6)) == 72
    parts = [stream[n : n + 6] for n in range(0, 72, 6)]
    assert parts[::2] == parts[1::2]  # each generation twice
    assert all(len(set(part[:3])) == len(set(part[3:])) == 1 for part in parts)
    chosen = [part[n] for part in parts[::2] for n in (0, 3)]
    assert Counter(chosen[:5]) == Counter(chosen[5:10]) == Counter(range(5))
    assert groups(3) == stream[:36] and groups(seed=1) != stream


# A run


def test_completions_are_shown_when_it_is_time(trainer_of, capsys):
    trainer = trainer_of(show_steps=2, train={"max_steps": 3, "logging_steps": 1})
    trainer.train()
    shown = capsys.readouterr()
    assert shown.err.count("step 2") == 1 and "step 1" not in shown.err and not shown.out
    assert "advantage" in shown.err and "length" in shown.err
    logs = trainer.state.log_history[1]
    assert {"stop_rate", "tokens_per_forward", "generation_share", "reward"} <= set(logs)
    assert len(set(trainer.figures) & set(logs)) >= 3 and 0 < logs["generation_share"] < 1
    assert logs["tokens_per_forward"] > 0.5


def test_a_reward_is_learned(trainer_of):
    """A letter among twenty: from its twentieth to most of the completion."""
    trainer = trainer_of(
        "one_step", reward=share, sampler=LETTERS | {"threshold": 0.5}, num_generations=8,
        train={"per_device_train_batch_size": 32, "max_steps": 30, "learning_rate": 1e-2,
               "logging_steps": 1},
    )  # fmt: skip
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert len(rewards) == 30 and first < 0.2 and last > 0.6


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    "estimator, rl",
    [
        ("elbo", {"beta": 0.1}),
        ("trajectory", {}),
        ("one_step", {"beta": 0.1, "peft": {"r": 4, "alpha": 8.0}}),
    ],
    ids=["elbo", "trajectory", "adapter"],
)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(trainer_of, estimator, rl):
    """Killed at update 5, resumed at update 3, in the middle of a generation of four."""

    def make(folder):
        return trainer_of(
            estimator, folder=folder, num_iterations=2, steps_per_generation=2, **rl,
            train={"max_steps": 7, "save_steps": 3, "schedule": "cosine"},
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    killed = make("killed")
    killed.add_callback(Killed())
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    resumed = make("killed")
    shake(resumed.model, 1.0)
    (last,) = checkpoints(Path(resumed.args.output_dir))
    resumed.train(resume_from_checkpoint=str(last))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    start = make("start").model
    moved = zip(whole.model.parameters(), start.parameters(), strict=True)
    assert max((one - two).abs().max().item() for one, two in moved) > 1e-3


# Settings


PUBLISHED = {  # what trl is told of each preset
    "d1": {"num_iterations": 12, "epsilon": 0.5, "beta": 0.04, "loss_type": "bnpo"},
    "coupled": {"num_iterations": 2, "epsilon": 0.5, "beta": 0.01, "loss_type": "bnpo"},
    "espo": {"num_iterations": 8, "epsilon": 0.2, "beta": 1e-3, "loss_type": "grpo",
             "importance_sampling_level": "sequence"},
    "spg": {"num_iterations": 4, "beta": 0.0, "loss_type": "bnpo"},
    "unigrpo": {"num_iterations": 5, "epsilon": 0.2, "beta": 0.01, "loss_type": "grpo",
                "importance_sampling_level": "token"},
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_reaches_trl_and_runs(trainer_of, preset):
    estimator, of = PRESETS[preset]["estimator"], FULL if preset == "d1" else BLOCKS
    trainer = trainer_of(estimator, of=of, preset=preset, train={"max_steps": 1})
    args = trainer.args
    assert {name: getattr(args, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]
    scaled = "group" if preset == "unigrpo" else "none"
    assert args.scale_rewards == scaled and not args.use_bias_correction_kl
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=10)


def test_what_a_recipe_says_stands_above_its_preset():
    assert Rl(preset="espo").kl == "k2" and Rl(preset="espo").samples == 2
    assert Rl(preset="espo", kl="k3", epsilon=0.1).model_dump().items() >= {
        "kl": "k3", "epsilon": 0.1, "estimator": "elbo", "level": "sequence",
    }.items()  # fmt: skip
    assert Rl(preset="d1").prompt_mask == 0.15 and Rl(preset="coupled").estimator == "coupled"


BATCHES = ["rl.steps_per_generation=2", "train.gradient_accumulation_steps=4"]
REFUSED = [  # overrides, attention, part of the message
    (["rl.rewards=[]"], BLOCKS, "rl.rewards is empty"),
    (["rl.sampler.mode=ar"], BLOCKS, "rl.sampler.mode 'ar' cannot be scored"),
    (["rl.estimator=ar", "rl.sampler.mode=diffusion"], BLOCKS, "mode 'diffusion' cannot be scored"),
    (["rl.estimator=ar"], FULL, "rl.estimator=ar needs an AR mode"),
    (["objective.kind=ar"], BLOCKS, "rl.estimator trajectory needs a diffusion model"),
    (["rl.estimator=one_step", "rl.prompt_mask=0.1"], BLOCKS, "rl.prompt_mask has no effect with"),
    (["rl.sampler.block_length=2"], BLOCKS, "rl.sampler.block_length differs"),
    (
        ["rl.estimator=trajectory", "rl.sampler={remask: 0.1, steps_per_block: 4}"],
        BLOCKS,
        "lets a token be decided twice",
    ),
    (["peft.r=2", "peft.dropout=0.1"], BLOCKS, "peft.dropout"),
    (["rl.sampler.nonsense=1"], BLOCKS, "rl.sampler.nonsense is not an option"),
    (["rl.sampler.top_p=2"], BLOCKS, "rl.sampler.top_p is 2"),
    (["rl.estimator=spg", "rl.beta=0.1"], BLOCKS, "rl.beta cannot be used with the spg"),
    (["rl.loss_type=cispo"], BLOCKS, "rl.epsilon_high must be at least 1"),
    (["train.per_device_train_batch_size=6"], BLOCKS, "a generation step produces 6 completions"),
    (
        ["rl.steps_per_generation=2", "train.gradient_accumulation_steps=3"],
        BLOCKS,
        "one update would mix completions from different generation steps",
    ),
    (
        [*BATCHES, "rl.num_iterations=2"],
        BLOCKS,
        "several iterations would fall into one update",
    ),
]


@pytest.mark.parametrize("overrides, of, message", REFUSED)
def test_check_settings_refuses(convert_tiny, overrides, of, message):
    plain = ["rl.rewards=[{name: exact}]", "rl.num_generations=4"]
    recipe = load_recipe(None, [*plain, *overrides])
    spec = load_checkpoint(str(convert_tiny(*of))).spec
    with pytest.raises(Ar2DiffError, match=message):
        check_settings(recipe, spec)


ALLOWED = [
    ([], BLOCKS),
    (["rl.estimator=ar"], BLOCKS),
    (["rl.estimator=ar", "rl.sampler.mode=speculative"], BLOCKS),
    (["rl.estimator=one_step", "rl.prompt_mask=0.1"], FULL),
    (["rl.sampler.block_length=2"], FULL),
    (["rl.sampler.block_length=4"], BLOCKS),
    (["rl.estimator=elbo", "rl.sampler={remask: 0.1, steps_per_block: 4}"], FULL),
    (["rl.steps_per_generation=4", "train.gradient_accumulation_steps=2"], BLOCKS),
    (BATCHES, BLOCKS),
]


@pytest.mark.parametrize("overrides, of", ALLOWED)
def test_check_settings_lets_pass(convert_tiny, overrides, of):
    plain = ["rl.rewards=[{name: exact}]", "rl.num_generations=4"]
    recipe = load_recipe(None, [*plain, *overrides])
    check_settings(recipe, load_checkpoint(str(convert_tiny(*of))).spec)


BAD_SECTIONS = [
    ({"prompt_mask": 0.1, "estimator": "elbo"}, "prompt_mask can only be set"),
    ({"samples": 2}, "samples can only be set"),
    ({"segments": 2, "estimator": "elbo"}, "segments can only be set"),
    ({"sampler": {"temperature": 0}}, "temperature must be above 0"),
    ({"sampler": {"max_new_tokens": 4}}, "max_new_tokens cannot be set"),
    ({"sampler": {"repetition_penalty": 1.1}}, "repetition_penalty cannot be set"),
    ({"num_generations": 1}, "greater than 1"),
]


@pytest.mark.parametrize("settings, message", BAD_SECTIONS)
def test_sections_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rl(**settings)


# trl's private methods


OVERRIDDEN = {
    "_generate_single_turn": (
        "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
    ),
    "_tokenize_prompts": ("self", "prompts"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
        "compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images",
        "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids",
        "mm_token_type_ids", "image_position_ids",
    ),
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_train_sampler": ("self", "dataset"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "_prepare_inputs": ("self", "generation_batch"),
    "log": ("self", "logs", "start_time"),
}  # fmt: skip
STATE = ("_step", "_buffered_inputs", "_metrics", "_logs", "_current_train_step_time", "beta",
         "current_gradient_accumulation_steps", "eos_token_ids", "ref_model", "_dist")  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trls_methods_are_those_that_we_override(name):
    found = getattr(GRPOTrainer, name, None)
    got = tuple(inspect.signature(found).parameters) if found else None
    assert got == OVERRIDDEN[name], (
        f"trl's GRPOTrainer.{name} takes {got}, not {OVERRIDDEN[name]}: training/grpo.py overrides "
        "it as it was in trl==1.16.*, which pyproject.toml must pin"
    )


def test_trls_private_state_is_where_we_look_for_it():
    source = inspect.getsource(GRPOTrainer)
    missing = [name for name in STATE if f"self.{name}" not in source]
    assert not missing, f"GRPOTrainer has no {missing} any more: training/grpo.py is of trl==1.16.*"


def test_trl_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "trl==1.16.*" in project["dependencies"]
