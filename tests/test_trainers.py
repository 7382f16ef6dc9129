"""`evaluate`, `predict` and `return_outputs` of the three trainers."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward as stock_sdpa
from waits import Waits

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import parse_recipe
from ar2diff.core.attention import PADDING, lay_out, model_mask, reveal_edges
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.conversations import Conversations, tokenize_conversations
from ar2diff.data.sources import Documents
from ar2diff.training.adapt import AdaptTrainer, make_collator
from ar2diff.training.adapt import make_plan as make_adapt_plan
from ar2diff.training.arguments import training_arguments
from ar2diff.training.loss import divisors_of, totals_of
from ar2diff.training.modules import attending_with, flex_in_one_dtype, flex_pays, sdpa_in_parts
from ar2diff.training.own_text import Found
from ar2diff.training.plan import Plan
from ar2diff.training.rl import check_settings
from ar2diff.training.rl import make_trainer as make_rl_trainer
from ar2diff.training.sft import make_trainer as make_sft_trainer

TEXTS = [f"the cat sat on mat {n} and saw {'one ' * n}dog" for n in range(7)]
PAIRS = [{"prompt": f"what is {n}?", "completion": f" it is {n}{'!' * n}."} for n in range(7)]
PROMPTS = [{"prompt": text} for text in ("ab", "hello", "x")]


def recipe_of(batch: int = 3, **sections: dict):
    tree = {
        "data": {"max_length": 32},
        "train": {"max_steps": 1, "per_device_train_batch_size": batch},
        **sections,
    }
    return parse_recipe(tree, "test")


@pytest.fixture
def trainer_of(convert_tiny, tmp_path):
    """Factory: trainer_of("adapt") is a trainer of the tiny converted model."""

    def make(verb: str, batch: int = 3, attention: str = "causal_context", **sections: dict):
        full = attention == "full"
        convert = {"attention": attention, "block_length": None if full else 4}
        checkpoint = load_checkpoint(str(convert_tiny(
            f"convert.attention={attention}", f"convert.block_length={'null' if full else 4}"
        )))  # fmt: skip
        if verb == "adapt":
            recipe = recipe_of(batch, convert=convert, **sections)
            return AdaptTrainer(
                checkpoint, recipe, training_arguments(recipe, tmp_path),
                data_collator=make_collator(recipe, checkpoint.noise),
            )  # fmt: skip
        if verb == "sft":
            recipe = recipe_of(batch, convert=convert, **sections)
            data = Conversations(PAIRS, [""] * len(PAIRS), ())
            rows = tokenize_conversations(data, checkpoint.tokenizer, recipe)
            return make_sft_trainer(Plan(checkpoint, recipe, rows, None), tmp_path, [])
        rl = {
            "rewards": [{"name": "exact"}], "num_generations": 4, "max_completion_length": 6,
            "estimator": "elbo",
        }  # fmt: skip
        recipe = recipe_of(4, rl=rl, convert=convert)
        check_settings(recipe, checkpoint.spec)
        return make_rl_trainer(Plan(checkpoint, recipe, PROMPTS, None), [reward], tmp_path, [])

    return make


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


ROWS = {"adapt": TEXTS, "sft": PAIRS}


@pytest.mark.parametrize("attention", ["causal_context", "full"])
@pytest.mark.parametrize("verb", ROWS)
def test_evaluate_gives_the_training_loss_of_rows_with_fixed_noise(trainer_of, verb, attention):
    found = []
    for batch in (1, 3, 7):
        trainer = trainer_of(verb, batch, attention)
        found.append(trainer.evaluate(ROWS[verb]))
    assert found[0]["eval_loss"] > 1 and 0 <= found[0]["eval_masked_accuracy"] <= 1
    for other in found[1:]:  # batches of other sizes, and another trainer
        assert other["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)
        assert other["eval_masked_accuracy"] == found[0]["eval_masked_accuracy"]
    batch = trainer.data_collator(trainer.fixed_rows(ROWS[verb]))
    divisors = divisors_of(totals_of([batch]))
    with torch.no_grad():  # the loss as it is trained, on all rows together
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=divisors)
    assert loss.item() == pytest.approx(found[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("verb", ROWS)
def test_predict_gives_the_likeliest_ids_at_masked_tokens(trainer_of, verb):
    trainer = trainer_of(verb)
    output = trainer.predict(ROWS[verb])
    found, labels = output.predictions, output.label_ids
    assert found.shape == labels.shape and len(found) == len(trainer.fixed_rows(ROWS[verb]))
    assert ((found == -100) == (labels == -100)).all() and (labels != -100).any()
    masked = labels != -100
    share = (found == labels)[masked].mean()
    assert output.metrics["test_masked_accuracy"] == pytest.approx(share)
    metrics = trainer.evaluate(ROWS[verb])
    assert output.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    mask = trainer.spec.mask_token_id
    assert not (found == mask).any()  # which the model can never mean


WAITING = {
    "nothing else": {},
    "reveal": {"anneal": {"kind": "reveal", "steps": 1}},
    "distil": {"objective": {"distil": {"target": "clean"}}},
    "teacher": {"objective": {"distil": {"target": "teacher"}}},
    "cart": {"objective": {"weight": "cart"}},
}


@pytest.mark.parametrize(
    ("verb", "setting"),
    [*(("adapt", name) for name in WAITING), ("sft", "nothing else"), ("sft", "distil")],
)
def test_the_host_never_waits_for_the_device_in_a_micro_step(trainer_of, verb, setting):
    trainer = trainer_of(verb, **WAITING[setting])
    numbered = trainer.fixed_rows(ROWS[verb])
    batch = trainer.data_collator([(0, parts) for _, parts in numbered])
    assert ("reveal" in batch) == (setting == "reveal")
    assert (len(batch.get("chosen", ())) > 0) == (setting in ("distil", "teacher"))
    trainer.compute_loss(trainer.model, batch)  # finds out once whether the head is plain
    with Waits() as waits:
        batches, divisors = trainer.get_batch_samples(iter([batch, batch]), 2, trainer.args.device)
        for inputs in batches:
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=divisors).backward()
    assert waits.found == []
    assert trainer.tokens_seen() == 2 * int(batch["tokens"])


@pytest.mark.parametrize("verb", ["adapt", "sft"])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(trainer_of, verb, tmp_path):
    trainer = trainer_of(verb)
    assert not trainer.args.logging_nan_inf_filter
    with pytest.raises(Ar2DiffError, match="the loss is nan at step 0"):
        trainer.log({"loss": float("nan")})
    assert trainer.state.log_history  # the line itself was logged
    trainer._tr_loss = torch.tensor(float("inf"))  # of the steps since the last log
    with pytest.raises(Ar2DiffError, match="training has diverged"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_a_gpu_gets_a_fused_optimizer_and_a_worker_that_prepares_batches(monkeypatch, tmp_path):
    def arguments(**train):
        recipe = recipe_of(train={"max_steps": 1, "precision": "fp32", **train})
        given = training_arguments(recipe, tmp_path, kind=dict)
        names = "optim", "dataloader_num_workers", "dataloader_pin_memory"
        return [given[name] for name in names] + [given["accelerator_config"]["non_blocking"]]

    assert arguments() == ["adamw_torch", 0, False, False]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert arguments() == ["adamw_torch_fused", 1, True, True]
    assert arguments(optimizer="adamw8bit")[0] == "adamw_bnb_8bit"


def test_a_worker_gives_the_same_batches(trainer_of, write_jsonl):
    file = write_jsonl("rows.jsonl", [{"text": text} for text in TEXTS])
    trainer = trainer_of("adapt", data={"max_length": 32, "sources": [str(file)]})
    documents = Documents(trainer.recipe.data.sources, "text", 0)
    plan = make_adapt_plan(trainer.checkpoint, trainer.recipe, Found(documents, None))
    trainer.train_dataset = plan.rows
    found = []
    for workers in (0, 1):
        trainer.args.dataloader_num_workers = workers
        found.append(list(islice(trainer.get_train_dataloader(), 3)))
    for one, other in zip(*found, strict=True):
        assert one.pop("step") == other.pop("step")
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_flex_attention_trains_long_rows_on_a_gpu_alone(tiny_model, monkeypatch):
    model, gpu = tiny_model("llama"), torch.device("cuda")
    assert flex_pays(model, 1024, gpu) and not flex_pays(model, 1023, gpu)
    assert not flex_pays(model, 1024, torch.device("cpu"))
    assert not flex_pays(tiny_model("llama", "eager"), 1024, gpu)  # which somebody asked for
    monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    assert not flex_pays(model, 1024, gpu)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_attends_in_its_own_way(trainer_of, checkpointing):
    trainer = trainer_of("adapt", train={"max_steps": 1, "gradient_checkpointing": checkpointing})
    config, kinds = trainer.model.config, []
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda *_: kinds.append(config._attn_implementation)
    )
    batch = trainer.data_collator(trainer.fixed_rows(TEXTS))
    losses = []
    for kind in (None, "eager"):
        trainer.attention = kind
        losses.append(trainer.training_step(trainer.model, dict(batch), None))
    torch.testing.assert_close(*losses)
    assert config._attn_implementation == "sdpa"
    assert Counter(kinds) == {"sdpa": 2 + checkpointing, "eager": 1 + checkpointing}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3_mixed"])
def test_clean_slots_attend_to_the_clean_copy_alone(tiny_model, monkeypatch, kind, checkpointing):
    model, attend = tiny_model(kind).train(), torch.nn.functional.scaled_dot_product_attention
    if checkpointing:
        model.gradient_checkpointing_enable()
    doc = torch.tensor([[0] * 6 + [1] * 7 + [PADDING] * 3, [0] * 16])
    pos = torch.tensor([[*range(6), *range(7), 0, 0, 0], [*range(16)]])
    x0, ways, shapes = torch.arange(3, 35).view(2, 16), [], []

    def recorded(query, key, *args, **kwargs):
        shapes.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **kwargs)

    def read(xt):
        ids, slots = lay_out(xt, x0, doc, pos, "causal_context")
        mask = model_mask(model, slots, "causal_context", 4, "kept", reveal_edges(0.5, 16, 4, 0, 0))
        model.zero_grad()
        inputs = {"attention_mask": mask, "position_ids": slots.pos, "use_cache": False}
        logits = model(input_ids=ids, **inputs).logits
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for register in (sdpa_in_parts, lambda: AttentionInterface.register("sdpa", stock_sdpa)):
        register()
        ways.append((read(x0.flip(1)), read(x0.flip(0)), Counter(shapes)))
        shapes.clear()
    sdpa_in_parts()
    passes = 2 * (2 + 2 * checkpointing)  # of two layers, which are computed again
    (parts, others, calls), (whole, _, whole_calls) = ways
    assert calls == {(16, 32): passes, (16, 16): passes}
    assert whole_calls == {(32, 32): passes}
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(parts[0][:, 16:], others[0][:, 16:])
    assert not torch.equal(parts[0][:, :16], others[0][:, :16])


def test_flex_attention_gets_one_dtype_under_autocast(tiny_model, monkeypatch):
    model, seen = tiny_model("qwen3", "sdpa", torch.float32), []

    def flex(module, query, key, value, mask, **_):
        seen.append((query.dtype, key.dtype, value.dtype))
        return query.transpose(1, 2), None

    monkeypatch.setattr(flex_attention, "flex_attention_forward", flex)
    flex_in_one_dtype()
    with torch.autocast("cpu", torch.bfloat16), attending_with(model, "flex_attention"):
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        model(input_ids=torch.arange(4)[None], attention_mask=mask, use_cache=False)
    assert set(seen) == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize("verb", ROWS)
def test_return_outputs_gives_logits_predictions_and_labels(trainer_of, verb):
    trainer = trainer_of(verb)
    batch = trainer.data_collator(trainer.fixed_rows(ROWS[verb]))
    alone = trainer.compute_loss(trainer.model, batch)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, alone)
    labels, masked = outputs["labels"], batch["scored"]
    target = batch["x0" if verb == "adapt" else "target"]
    assert torch.equal(labels, torch.where(masked, target, -100))
    assert outputs["logits"].shape == (int(masked.sum()), trainer.model.config.vocab_size)
    likeliest = outputs["logits"].masked_fill(trainer.suppressed, float("-inf")).argmax(-1)
    assert torch.equal(outputs["predictions"][masked], likeliest)
    loss.backward()  # and it can be trained on
    assert any(p.grad is not None for p in trainer.model.parameters())


def test_an_evaluation_set_of_the_trainer_is_evaluated_while_it_trains(trainer_of, tmp_path):
    trainer = trainer_of("adapt")
    trainer.eval_dataset = {"some": TEXTS[:3], "ids": [{"input_ids": list(range(3, 20))}]}
    found = trainer.evaluate()
    assert {"eval_some_loss", "eval_ids_loss"} <= found.keys()


def test_rl_evaluates_completions_of_its_own(trainer_of):
    trainer = trainer_of("rl")
    trainer.model.eval()
    found = trainer.evaluate(PROMPTS)
    assert {"eval_loss", "eval_reward", "eval_stop_rate"} <= found.keys()
    before = trainer.model.state_dict()
    output = trainer.predict(PROMPTS)
    assert output.predictions.shape[0] == 4 * len(PROMPTS) and output.label_ids is None
    rewards = [reward([[i for i in row if i != -100]])[0] for row in output.predictions.tolist()]
    assert output.metrics["test_reward"] == pytest.approx(sum(rewards) / len(rewards))
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rl_returns_the_log_probabilities_that_its_loss_is_of(trainer_of):
    trainer = trainer_of("rl")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, inputs))
    assert outputs["logps"].shape == outputs["completion_ids"].shape
    assert (outputs["logps"] <= 0).all() and (outputs["logps"] < 0).any()
