"""What must not change a run: batch split, accumulation, packing, ranks, a kill and a resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kills import killed_at_step
from safetensors.torch import load_file, save_file

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, parse_recipe
from ar2diff.conversion.convert import convert
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.noises import Mask
from ar2diff.data.documents import Collator, DocumentPart, PackedDocuments, document_parts
from ar2diff.data.sources import Documents
from ar2diff.distributed import precision
from ar2diff.training.adapt import ADAPT, AdaptTrainer, adapt, make_trainer
from ar2diff.training.modules import parameter_kinds
from ar2diff.training.plan import Plan

WORDS = "the cat sat on a mat and saw one big red dog run to his old house by the sea".split()


def stories(path: Path, count: int = 120) -> Path:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 18))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories(tmp_path_factory.mktemp("text") / "stories.jsonl")


def recipe_of(text_file: Path, **sections: dict) -> object:
    tree = {
        "convert": {"block_length": 4},
        "data": {"sources": [str(text_file)], "max_length": 32},
        "train": {
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "schedule": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "logging_steps": 1000,
            "save_steps": 1000,
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_recipe(tree, "test")


def train(checkpoint_dir: Path, recipe: object, folder: Path, dtype: torch.dtype = torch.float32):
    """Train in this process; the trained weights and the trainer."""
    torch.manual_seed(0)
    checkpoint = load_checkpoint(str(checkpoint_dir))
    spec = convert(checkpoint, recipe.convert, recipe.data.max_length, True, 0)
    checkpoint.model.to(dtype)
    documents = Documents(recipe.data.sources, "text", recipe.train.seed)
    rows = PackedDocuments(documents, checkpoint.tokenizer, 2, recipe)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        trainer = make_trainer(Plan(checkpoint, recipe, rows, make_trainer), folder, [])
        trainer.train()
    finally:
        torch.set_default_dtype(default)
    assert spec.attention == recipe.convert.attention
    return {n: p.detach().clone() for n, p in checkpoint.model.named_parameters()}, trainer


def far_apart(a: dict, b: dict) -> float:
    """Largest difference of weights in parts of the largest weight of the tensor."""
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max()).item() for n in a)


def test_noise_does_not_depend_on_batch_split_packing_or_epoch_order(tiny_checkpoint, text_file):
    checkpoint = load_checkpoint(str(tiny_checkpoint))

    def noise_by_document(packing: bool, batch: int) -> dict:
        recipe = recipe_of(text_file, data={"packing": packing})
        rows = iter(
            PackedDocuments(
                Documents(recipe.data.sources, "text", 0), checkpoint.tokenizer, 2, recipe
            )
        )
        collate, seen = Collator(recipe, Mask(mask=5)), {}
        while len(seen) < 80:
            numbered = [next(rows) for _ in range(batch)]
            made = collate(numbered)
            for r, (_, row) in enumerate(numbered):
                start = 0
                for piece in row:
                    end = start + len(piece.ids)
                    seen[piece.epoch, tuple(piece.ids)] = made["scored"][r, start:end].tolist()
                    start = end
        return seen

    runs = [
        noise_by_document(packing, batch) for packing, batch in ((True, 1), (True, 8), (False, 3))
    ]
    common = set.intersection(*(set(run) for run in runs))
    assert len(common) > 40
    assert all(run[key] == runs[0][key] for key in common for run in runs)


@pytest.mark.parametrize("normaliser", ["tokens", "masked", "sequence", "masked+ar"])
def test_loss_and_gradient_do_not_depend_on_accumulation(
    tiny_checkpoint, text_file, tmp_path, normaliser
):
    weights, losses = [], []
    for batch, accumulation in ((8, 1), (1, 8)):
        recipe = recipe_of(
            text_file,
            objective={"normaliser": normaliser},
            train={
                "per_device_train_batch_size": batch,
                "max_steps": 8,
                "logging_steps": 1,
                "gradient_accumulation_steps": accumulation,
            },
        )
        got, trainer = train(tiny_checkpoint, recipe, tmp_path / f"a{accumulation}")
        weights.append(got)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert far_apart(*weights) < 1e-5


def test_gradient_of_accumulation_agrees_to_1e_6_in_float64(tiny_checkpoint, text_file, tmp_path):
    weights = []
    for batch, accumulation in ((8, 1), (2, 4)):
        recipe = recipe_of(
            text_file,
            train={
                "per_device_train_batch_size": batch,
                "max_steps": 1,
                "gradient_accumulation_steps": accumulation,
            },
        )
        got, _ = train(tiny_checkpoint, recipe, tmp_path / f"a{accumulation}", torch.float64)
        weights.append(got)
    start = {
        n: p.double() for n, p in load_checkpoint(str(tiny_checkpoint)).model.named_parameters()
    }
    # One SGD step: the change of the weights is the gradient times the learning rate.
    for name in start:
        rows = start[name].shape[0]
        a, b = (w[name][:rows] - start[name] for w in weights)
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=str)
@pytest.mark.parametrize("kind", ["none", "reveal"])
def test_loss_and_gradient_do_not_depend_on_packing(
    tiny_checkpoint, text_file, tmp_path, dtype, tolerance, kind
):
    anneal = {"kind": kind, "steps": 10 if kind == "reveal" else 0}
    recipe = recipe_of(text_file, anneal=anneal, train={"max_steps": 10})
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    convert(checkpoint, recipe.convert, 32, True, 0)
    checkpoint.model.to(dtype)
    rows = PackedDocuments(
        Documents(recipe.data.sources, "text", 0), checkpoint.tokenizer, 2, recipe
    )
    trainer = make_trainer(Plan(checkpoint, recipe, rows, make_trainer), tmp_path, [])
    parts = [piece for _, (_, row) in zip(range(6), rows, strict=False) for piece in row]
    half = len(parts) // 2
    layouts = {
        "alone": [[(40 + i, [piece]) for i, piece in enumerate(parts)]],
        "packed": [[(40, parts)]],
        "two micro-batches": [[(40, parts[:half])], [(41, [piece]) for piece in parts[half:]]],
    }
    collate = Collator(
        recipe, checkpoint.noise, rows_per_step=8
    )  # row 40 is of step 5: half the edges
    losses, gradients = [], []
    for batches in layouts.values():
        made = [collate(batch) for batch in batches]
        divisors = torch.stack(
            [sum(b["divisor"] for b in made), sum(b["ar_divisor"] for b in made)]
        )
        checkpoint.model.zero_grad()
        loss = sum(
            trainer.compute_loss(checkpoint.model, b, num_items_in_batch=divisors) for b in made
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in checkpoint.model.named_parameters()})
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=tolerance)
    assert max(far_apart(gradients[0], other) for other in gradients[1:]) < tolerance


def test_two_ranks_train_as_one(tiny_checkpoint, text_file, tmp_path):
    """Under torchrun, without `--launch`."""
    common = [
        f"data.sources=[{text_file}]",
        "convert.block_length=4",
        "data.max_length=32",
        "train.precision=fp32",
        "train.max_steps=20",
        "train.optimizer=sgd",
        "train.learning_rate=0.1",
        "train.schedule=constant",
        "train.weight_decay=0",
        "train.max_grad_norm=0",
    ]
    alone = load_recipe(None, [*common, "train.per_device_train_batch_size=8"])
    adapt(str(tiny_checkpoint), alone, tmp_path / "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    verb = ["-m", "ar2diff.cli", "adapt", tiny_checkpoint, "--output-dir", tmp_path / "2"]
    subprocess.run(
        [*torchrun, *verb, *common, "train.per_device_train_batch_size=4"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    assert far_apart(one, two) < 1e-5


def kill_and_resume(
    checkpoint: Path, text_file: Path, folder: Path, seed: int, kills: int, max_steps: int = 240
) -> None:
    """Run `adapt` with kills at random times; at the end it must equal the uninterrupted run."""
    settings = [
        f"data.sources=[{text_file}]",
        "convert.block_length=4",
        "data.max_length=32",
        f"train.max_steps={max_steps}",
        "train.precision=fp32",
        "train.per_device_train_batch_size=4",
        "train.save_steps=3",
        "train.logging_steps=1",
        "train.learning_rate=0.003",
        "anneal.kind=reveal",
        f"anneal.steps={max_steps * 5 // 6}",
        "eval.steps=50",
        "eval.length=8",
        "eval.rows=4",
    ]
    recipe = load_recipe(None, settings)
    adapt(str(checkpoint), recipe, folder / "whole")
    rng, run_dir = random.Random(seed), folder / "killed" / "checkpoints"
    steps = sorted(rng.sample(range(2, max_steps - 4), kills))
    print(
        f"kill seed {seed}: SIGKILL after steps {steps}, every second one while a file is written"
    )
    for number, step in enumerate(steps):
        killed_at_step(
            lambda: adapt(str(checkpoint), recipe, folder / "killed", resume=True),
            step,
            run_dir if number % 2 else None,  # saving comes every third step
        )
        for saved in run_dir.glob("checkpoint-*"):
            assert (saved / "trainer_state.json").is_file()
            assert load_file(saved / "model.safetensors")
            torch.load(saved / "optimizer.pt", weights_only=True)
    adapt(str(checkpoint), recipe, folder / "killed", resume=True)
    whole, resumed = ((folder / n / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert whole == resumed


def test_a_killed_run_resumes_to_the_same_bits(tiny_checkpoint, text_file, tmp_path):
    kill_and_resume(tiny_checkpoint, text_file, tmp_path, 11, 2, max_steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_twenty_kills_resume_to_the_same_bits(tiny_checkpoint, text_file, tmp_path, seed):
    kill_and_resume(tiny_checkpoint, text_file, tmp_path, seed=seed, kills=2)


class _Killed(Exception):
    pass


def test_a_streamed_run_resumes_to_the_same_bits(tiny_checkpoint, tmp_path, monkeypatch):
    import datasets

    def texts():
        rng = random.Random(3)
        for _ in range(40):
            yield {"text": " ".join(rng.choices(WORDS, k=8))}

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args, streaming, **kwargs: datasets.IterableDataset.from_generator(texts),
    )
    recipe = parse_recipe(
        {
            "convert": {"block_length": 4},
            "data": {"sources": ["some/stream"], "max_length": 32, "streaming": True},
            "train": {
                "max_steps": 9,
                "save_steps": 4,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 2,
            },
        },
        "test",
    )
    adapt(str(tiny_checkpoint), recipe, tmp_path / "whole")

    step = AdaptTrainer.training_step

    def killed_in_step_6(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", killed_in_step_6)
    with pytest.raises(_Killed):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "killed")
    monkeypatch.setattr(AdaptTrainer, "training_step", step)
    adapt(str(tiny_checkpoint), recipe, tmp_path / "killed", resume=True)
    whole, resumed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    records = [json.loads((tmp_path / n / "ar2diff.json").read_text()) for n in ("whole", "killed")]
    assert records[0]["tokens"] == records[1]["tokens"]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 2},
        {"precision": "bf16"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_settings_of_training_run(tiny_checkpoint, text_file, tmp_path, settings):
    recipe = recipe_of(text_file, train={"max_steps": 5, "logging_steps": 1, **settings})
    weights, trainer = train(tiny_checkpoint, recipe, tmp_path)
    assert {p.dtype for p in weights.values()} == {torch.float32}
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    if settings.get("schedule") == "warmup_stable_decay":
        assert rates[1:4] == [0.1] * 3
        assert rates[4] < 0.1


def test_ranks_take_turns_in_one_stream(tiny_checkpoint, text_file):
    from accelerate.data_loader import IterableDatasetShard

    checkpoint = load_checkpoint(str(tiny_checkpoint))
    recipe = recipe_of(text_file)
    rows = PackedDocuments(
        Documents(recipe.data.sources, "text", 0), checkpoint.tokenizer, 2, recipe
    )

    def first(dataset, count):
        return [row for row, _ in zip(dataset, range(count), strict=False)]

    both = [
        first(IterableDatasetShard(rows, batch_size=4, num_processes=2, process_index=rank), 8)
        for rank in range(2)
    ]
    one = first(rows, 16)
    assert [*both[0][:4], *both[1][:4], *both[0][4:], *both[1][4:]] == one
    collate = Collator(recipe, Mask(mask=5), rows_per_step=8)
    assert [int(collate(part)["step"]) for part in (one[:4], one[4:8], one[8:12])] == [0, 0, 1]


def test_a_document_judged_while_training_is_not_trained_on(tiny_checkpoint, text_file):
    recipe = recipe_of(text_file, eval={"steps": 1, "rows": 4, "length": 20})
    plan = ADAPT.prepare(tiny_checkpoint, recipe)
    judged = {tuple(row) for row in plan.eval_rows}
    assert len(judged) == 4
    rows = iter(plan.rows)
    trained = {tuple(p.ids[:20]) for _ in range(200) for p in next(rows)[1]}
    assert not judged & trained


def test_resume_with_another_recipe_is_refused(tiny_checkpoint, text_file, tmp_path):
    recipe = recipe_of(text_file, train={"max_steps": 1})
    adapt(str(tiny_checkpoint), recipe, tmp_path / "out")
    other = recipe_of(text_file, train={"max_steps": 1, "learning_rate": 0.2})
    with pytest.raises(Ar2DiffError, match=r"train.learning_rate was 0.1, but is now 0.2"):
        adapt(str(tiny_checkpoint), other, tmp_path / "out", resume=True)
    record = json.loads((tmp_path / "out" / "ar2diff.json").read_text())
    record["recipe"]["train"]["former"] = 7  # a key of an older version
    (tmp_path / "out" / "ar2diff.json").write_text(json.dumps(record))
    with pytest.raises(Ar2DiffError, match=r"train\.former was 7, but is now None"):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "out", resume=True)


CHANGES = {  # of what a path holds, and what is said of it
    "model": "the content of the model",
    "tokenizer": "the content of the model",
    "data": "the content of the data",
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_notices_that_a_path_holds_something_else(tiny_checkpoint, tmp_path, what):
    base, data = tmp_path / "base", stories(tmp_path / "data.jsonl", 20)
    shutil.copytree(tiny_checkpoint, base)
    recipe = recipe_of(data, train={"max_steps": 1})
    adapt(str(base), recipe, tmp_path / "out")
    adapt(str(base), recipe, tmp_path / "out", resume=True)  # all is as it was
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    if what == "model":
        weights = load_file(base / "model.safetensors")
        save_file({name: 2 * t for name, t in weights.items()}, base / "model.safetensors")
    elif what == "tokenizer":
        with (base / "tokenizer.json").open("a") as file:
            file.write("\n")
    else:
        lines = data.read_text().splitlines()
        data.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(Ar2DiffError, match=CHANGES[what]):
        adapt(str(base), recipe, tmp_path / "out", resume=True)
    after = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    assert after == before


def test_a_resumed_run_keeps_its_precision_on_another_cpu(
    tiny_checkpoint, text_file, tmp_path, monkeypatch
):
    recipe = recipe_of(text_file, train={"max_steps": 3, "save_steps": 1, "precision": "auto"})
    computed, step = [], AdaptTrainer.training_step

    def noted(self, *args, **kwargs):
        computed.append(self.args.bf16)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", noted)
    monkeypatch.setattr(precision, "ON_CPU", True)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "out")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    adapt(str(tiny_checkpoint), recipe, tmp_path / "out", resume=True)
    assert computed == [True] * 4
    assert json.loads((tmp_path / "out" / "ar2diff.json").read_text())["precision"] == "bf16"
    adapt(str(tiny_checkpoint), recipe, tmp_path / "new")  # there it is another
    assert computed[4:] == [False] * 3


def test_resume_with_another_batch_is_refused(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    recipe = recipe_of(text_file, train={"max_steps": 1})
    adapt(str(tiny_checkpoint), recipe, tmp_path / "out")
    monkeypatch.setattr("ar2diff.training.plan.rows_per_step", lambda train: 16)
    with pytest.raises(Ar2DiffError, match="its number of rows per step was 8, but is now 16"):
        adapt(str(tiny_checkpoint), recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
@pytest.mark.parametrize("kind", ["none", "reveal", "grow", "wsd"])
def test_every_attention_trains_under_every_anneal(
    tiny_checkpoint, text_file, tmp_path, attention, kind
):
    anneal = {
        "kind": kind,
        "steps": 4 if kind != "none" else 0,
        "lengths": {"grow": [1, 2], "wsd": [1, 32, 8]}.get(kind, []),
    }
    block = None if attention == "full" else 4
    recipe = recipe_of(
        text_file,
        anneal=anneal,
        convert={"attention": attention, "block_length": block},
        train={"max_steps": 8, "logging_steps": 1, "learning_rate": 0.05},
    )
    _, trainer = train(tiny_checkpoint, recipe, tmp_path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8
    assert all(0 < loss < 20 for loss in losses)


def test_gradient_checkpointing_changes_nothing(tiny_checkpoint, text_file, tmp_path):
    runs = [
        train(
            tiny_checkpoint,
            recipe_of(text_file, train={"max_steps": 3, "gradient_checkpointing": on}),
            tmp_path / str(on),
        )[0]
        for on in (False, True)
    ]
    assert far_apart(*runs) < 1e-6


@pytest.mark.slow
def test_compiled_layers_change_nothing_and_share_one_graph(tiny_checkpoint, text_file, tmp_path):
    from torch._dynamo.utils import counters

    made = []
    for on in (False, True):
        counters.clear()
        settings = {"max_steps": 3, "compile": on}
        recipe = recipe_of(text_file, train=settings)
        made.append(train(tiny_checkpoint, recipe, tmp_path / str(on)))
        assert counters["stats"]["unique_graphs"] == int(on)  # of two layers
    assert far_apart(made[0][0], made[1][0]) < 1e-5


def test_learning_rate_scale_zero_freezes_that_kind_alone(tiny_checkpoint, text_file, tmp_path):
    recipe = recipe_of(
        text_file, train={"max_steps": 3, "lr_scale": {"attention": 1, "mlp": 0, "embeddings": 0.5}}
    )
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    convert(checkpoint, recipe.convert, 32, True, 0)
    before = {n: p.detach().clone() for n, p in checkpoint.model.named_parameters()}
    kinds = parameter_kinds(checkpoint.model)
    names = {n: kinds[p] for n, p in checkpoint.model.named_parameters()}
    after, trainer = train(tiny_checkpoint, recipe, tmp_path)
    groups = trainer.optimizer.param_groups
    rates = [group["initial_lr"] for group in groups]
    for group in groups:
        group["lr"] = group["initial_lr"]
    trainer.create_optimizer()  # as under DeepSpeed, where it is asked for twice
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates
    moved = {n: not torch.equal(before[n], after[n]) for n in before}
    assert set(names.values()) == {"attention", "mlp", "embeddings", "other"}
    assert all(moved[n] == (names[n] != "mlp") for n in names)


def test_what_is_logged(tiny_checkpoint, text_file, tmp_path):
    _, trainer = train(
        tiny_checkpoint, recipe_of(text_file, train={"max_steps": 2, "logging_steps": 1}), tmp_path
    )
    row = trainer.state.log_history[0]
    wanted = {
        "loss",
        "ce_t1",
        "masked_accuracy",
        "eos_share",
        "ar_loss",
        "tokens_per_second",
        "tokens",
    }
    assert wanted <= set(row)
    assert 0 < row["eos_share"] < 1


def test_a_piece_cut_from_a_document_has_no_eos_run(text_file):
    recipe = recipe_of(text_file)
    first, last = document_parts(list(range(3, 42)), 0, 2, recipe, 0)
    assert (first.run, len(first.ids)) == (0, 32)
    assert isinstance(last, DocumentPart)
    assert last.run == 1


@pytest.mark.parametrize("normaliser", ["tokens", "masked+ar"])
def test_a_controls_loss_is_that_of_the_next_tokens_of_documents(
    tiny_checkpoint, text_file, tmp_path, normaliser
):
    recipe = recipe_of(
        text_file, data={"max_length": 96}, objective={"kind": "ar", "normaliser": normaliser}
    )
    plan = ADAPT.prepare(tiny_checkpoint, recipe)
    trainer = plan.make_trainer(plan, tmp_path / "run", [])
    numbered = list(zip(range(3), (row for _, row in plan.rows), strict=False))
    batch = trainer.data_collator(numbered)
    assert max(len(row) for _, row in numbered) > 1  # several documents in a row
    total, count = 0.0, 0
    for ids in (part.ids[: part.real] for _, row in numbered for part in row):
        with torch.no_grad():
            logits = plan.checkpoint.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ce = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]))
        total, count = total + float(ce) * (len(ids) - 1), count + len(ids) - 1
    assert trainer.compute_loss(plan.checkpoint.model, batch).item() == pytest.approx(
        total / count, rel=1e-5
    )
    assert plan.checkpoint.spec is None


def test_a_control_is_an_ar_model_and_shows_nothing_denoised(tiny_checkpoint, text_file, tmp_path):
    recipe = recipe_of(
        text_file,
        objective={"kind": "ar"},
        eval={"steps": 1, "rows": 2, "length": 16, "panel_steps": 1},
        train={"max_steps": 2},
    )
    result = adapt(str(tiny_checkpoint), recipe, tmp_path / "out")
    assert result.diffusion is None
    assert [*result.after] == ["eval_ar_nll"]
    assert load_checkpoint(str(tmp_path / "out")).spec is None


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"noise": {"on_policy": 0.5}}, "masks no tokens"),
        ({"train": {"max_steps": 0}}, "trains nothing"),
        ({"convert": {"head_rank": 8}}, "adds the diffusion head"),
    ],
)
def test_what_a_control_cannot_use_is_refused(tiny_checkpoint, text_file, sections, said):
    recipe = recipe_of(text_file, objective={"kind": "ar"}, **sections)
    with pytest.raises(Ar2DiffError, match=said):
        ADAPT.prepare(tiny_checkpoint, recipe)
