"""The diffusion head: what the sampler draws with it, how it is trained, and the folders that hold
it."""

import hashlib
import json
import random
import shutil

import pytest
import torch
from conftest import MASK, build_model, tiny_spec, with_head
from safetensors.torch import load_file, save_file
from test_likelihood import own_mask, raw_logits
from test_samplers import decode
from transformers import AutoModelForCausalLM

from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.conversion.exports import export
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.forward import logits_at
from ar2diff.core.generate import generate
from ar2diff.core.head import UNKNOWN, BigramHead
from ar2diff.core.noises import Mask
from ar2diff.core.samplers import draw
from ar2diff.core.seeds import keyed_generator
from ar2diff.core.spec import HEAD_FILE, Spec
from ar2diff.data.documents import Collator, DocumentPart
from ar2diff.diffusion.task import previous_ids
from ar2diff.evaluation.check import check
from ar2diff.generation.complete import complete
from ar2diff.training.adapt import ADAPT, AdaptTrainer, adapt, make_trainer
from ar2diff.training.rl import rl
from ar2diff.training.sft import sft

PROMPT, NEW = [1, 17, 42, 5, 33], 11
RULES = [
    {"threshold": 0.2},
    {"threshold": 0.9},
    {"threshold": 0.0},
    {"steps_per_block": 2},
    {"steps_per_block": 2, "threshold": 0.2},
    {"entropy_bound": 2.0},
]

# The sampler


def picked(own, number):
    """(token, its probability) of logits [V]: the likeliest, or the one that a number draws."""
    own = own.index_fill(0, torch.tensor([MASK]), float("-inf"))
    token = own.argmax() if number is None else draw(own.softmax(-1)[None], number[None])[0]
    return int(token), float(own.softmax(-1)[token]), own


def wanted(choices, quota, threshold=None, entropy_bound=None, **_):
    """The positions that a rule decides, given {position: choice} without biases of this step."""
    if entropy_bound is not None:
        entropy = {i: float(torch.special.entr(c[2].softmax(-1)).sum()) for i, c in choices.items()}
        order = sorted(choices, key=entropy.get)
        before = [sum(entropy[i] for i in order[:k]) for k in range(len(order))]
        return [i for i, sum_ in zip(order, before, strict=True) if sum_ <= entropy_bound]
    sure = [i for i, c in choices.items() if threshold is not None and c[1] > threshold]
    best = sorted(choices, key=lambda i: -choices[i][1])[: quota or 1]
    return sure if len(sure) >= (quota or 1) else best


def slowly(model, spec, seed=None, **rule):
    """One row by the definition, a position at a time: its ids, and its forwards."""
    head, back = model.diffusion_head, int(spec.prediction == "shift")
    size, ids = spec.block_length or len(PROMPT) + NEW, [*PROMPT, *[MASK] * NEW]
    generator = None if seed is None else keyed_generator(seed, 0, *PROMPT)
    forwards, alone = [], rule.keys() == {"threshold"}
    while MASK in ids:
        start = ids.index(MASK) // size * size
        places = [i for i in range(start, min(start + size, len(ids))) if ids[i] == MASK]
        seen = torch.tensor([ids[: start + size]])
        mask = own_mask(seen.shape[1], start, spec.attention, size)
        logits = raw_logits(model, seen, mask)[0]
        numbers = dict.fromkeys(places)
        if generator is not None:
            drawn = torch.rand(len(places), generator=generator, dtype=torch.double)
            numbers = dict(zip(places, drawn, strict=True))
        choices = {}
        for i in places:
            known = ids[i - 1] != MASK
            bias = head.before[ids[i - 1]] @ head.after if known else 0
            choices[i] = picked(logits[i - back] + bias, numbers[i])
        quota = None
        if steps := rule.get("steps_per_block"):
            total = next((n for s, n in forwards if s == start), len(places))
            quota = total // steps + (total % steps if (start, total) not in forwards else 0)
        forwards.append((start, len(places)))
        decides = wanted(choices, quota, **rule)
        decided = {}
        for i in places:
            if i - 1 in decided and (alone or i in decides):
                bias = head.before[decided[i - 1]] @ head.after
                token, sure, _ = picked(logits[i - back] + bias, numbers[i])
                if not alone or sure > rule["threshold"]:
                    decided[i] = token
            elif i in decides:
                decided[i] = choices[i][0]
        for i, token in decided.items():
            ids[i] = token
    return ids, len(forwards)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
@pytest.mark.parametrize("prediction", ["same", "shift"])
@torch.no_grad()
def test_the_sampler_decides_from_left_to_right(rule, attention, prediction):
    model, spec = with_head(build_model("llama"), tiny_spec(attention, prediction=prediction))
    for seed in (None, 3):
        settings = {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}
        settings |= {"eos_token_id": [-1], **rule}
        canvas, _ = decode([PROMPT], model, spec, new=NEW, **settings)
        ids, forwards = slowly(model, spec, seed, **rule)
        assert canvas.ids[0].tolist() == ids
        assert int(canvas.forwards) == forwards
        beside, _ = decode([[1, 9], PROMPT, [1, 8, 7]], model, spec, new=NEW, **settings)
        assert beside.ids[1, : len(ids)].tolist() == ids  # whatever its batch


def test_the_log_probability_of_a_token_is_that_of_what_it_was_drawn_from():
    model, spec = with_head(build_model("llama"), tiny_spec("full"))
    canvas, _ = decode([PROMPT], model, spec, new=3, steps_per_block=1, temperature=1.0, seed=5)
    ids = canvas.ids[0].tolist()
    seen = torch.tensor([[*PROMPT, MASK, MASK, MASK]])
    logits = raw_logits(model, seen, torch.ones(8, 8).bool())[0]
    head = model.diffusion_head
    for i in (5, 6, 7):
        own = (logits[i - 1] + head.before[ids[i - 1]] @ head.after)[:MASK].log_softmax(-1)
        assert float(canvas.logprob[0, i]) == pytest.approx(own[ids[i]].item(), abs=1e-5)


# Training


def test_a_token_knows_the_one_before_where_that_is_visible_or_taken_as_drawn():
    x0 = torch.tensor([[1, 11, 12, 13, 14, 15, 1, 21, 22]])
    pos = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])  # two documents
    masked = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    drawn = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0, 0]]).bool()
    no = UNKNOWN
    for block_length, wanted_ids in (
        (None, [no, 1, no, no, 13, no, no, 1, no]),
        (2, [no, 1, 11, no, 13, no, no, 1, 21]),  # a clean copy shows the block before
    ):
        got = previous_ids(x0, masked, pos, block_length)[0].tolist()
        assert got == wanted_ids
        with_drawn = previous_ids(x0, masked, pos, block_length, drawn)[0].tolist()
        assert with_drawn == [*wanted_ids[:5], 14, *wanted_ids[6:]]


def test_half_of_the_tokens_are_taken_as_drawn_whatever_the_batch(make_recipe):
    recipe = make_recipe(convert={"head_rank": 2}, data={"max_length": 400})
    parts = [DocumentPart([1, *range(40 + n, 239 + n)], 200, 0, 0, n) for n in (0, 1)]
    both, alone = (
        Collator(recipe, Mask(mask=63))([(0, rows)])["drawn"][0] for rows in (parts, parts[1:])
    )
    assert torch.equal(both[200:], alone)
    assert 160 < int(both.sum()) < 240
    other = Collator(make_recipe(data={"max_length": 400}), Mask(mask=63))([(0, parts)])
    assert not other["drawn"].any()


def recipe_of(data, *overrides):
    return load_recipe(
        None,
        [
            f"data.sources=[{data}]", "data.max_length=32", "convert.block_length=4",
            "convert.head_rank=5", "train.max_steps=4", "train.learning_rate=0.05",
            "train.per_device_train_batch_size=4", "train.save_steps=2", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    words = "the cat sat on a mat and saw one big red dog run to his old house by the sea".split()
    rng, file = random.Random(0), tmp_path_factory.mktemp("text") / "stories.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=9))}) for _ in range(60)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def headed(tiny_checkpoint, texts, tmp_path_factory):
    """A folder with a trained head. Never write to it."""
    folder = tmp_path_factory.mktemp("headed") / "model"
    adapt(str(tiny_checkpoint), recipe_of(texts), folder)
    return folder


@pytest.fixture
def copied(headed, tmp_path):
    return shutil.copytree(headed, tmp_path / "copied")


def test_the_loss_and_its_gradients_are_those_of_logits_with_the_bias(
    tiny_checkpoint, texts, tmp_path
):
    plan = ADAPT.prepare(tiny_checkpoint, recipe_of(texts))
    trainer = make_trainer(plan, tmp_path, [])
    model = plan.checkpoint.model.train()
    model.diffusion_head.after.data.normal_(generator=torch.Generator().manual_seed(0))
    rows = iter(plan.rows)
    batch = trainer.data_collator([next(rows) for _ in range(3)])
    task = trainer.task_of(batch)
    # The definition: a plain forward, the bias of what is known, and torch's cross-entropy
    index = torch.cat([task.task.index, task.ar_index])
    logits = logits_at(model, index, **task.task.inputs(model, None))
    n, known = len(task.coef), task.task.previous != UNKNOWN
    assert 0.4 < known.double().mean() < 0.95
    head, before = model.diffusion_head, task.task.previous.clamp(min=0)
    own = logits[:n] + known[:, None] * (head.before[before] @ head.after)
    own = own.masked_fill(trainer.suppressed, float("-inf"))
    entropy = torch.nn.functional.cross_entropy
    want = (task.coef * entropy(own, task.task.target, reduction="none")).sum() / batch["divisor"]
    want = want + 0.3 * entropy(logits[n:], task.ar_target)
    gradients = torch.autograd.grad(want, [*model.parameters()])
    assert gradients[-1].abs().max() > 0
    for fused in (True, False):
        trainer._fused = fused
        loss = trainer.compute_loss(model, batch)
        found = [loss, *torch.autograd.grad(loss, [*model.parameters()])]
        torch.testing.assert_close(found, [want, *gradients], rtol=1e-4, atol=1e-6)


def test_a_learning_rate_of_its_own_moves_the_head(tiny_checkpoint, texts, tmp_path):
    sizes = []
    for scale in (0, 0.5, 20):
        recipe = with_values(recipe_of(texts), train={"lr_scale": {"diffusion_head": scale}})
        adapt(str(tiny_checkpoint), recipe, tmp_path / str(scale))
        head = load_file(tmp_path / str(scale) / HEAD_FILE)
        sizes.append(float(head["after"].abs().max()))
    assert sizes[0] == 0 and 0 < 10 * sizes[1] < sizes[2]


def test_a_killed_run_resumes_to_the_same_head(
    headed, tiny_checkpoint, texts, tmp_path, monkeypatch
):
    step = AdaptTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        adapt(str(tiny_checkpoint), recipe_of(texts), tmp_path / "out")
    monkeypatch.setattr(AdaptTrainer, "training_step", step)
    adapt(str(tiny_checkpoint), recipe_of(texts), tmp_path / "out", resume=True)
    for name in (HEAD_FILE, "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (headed / name).read_bytes()


# Folders


def test_a_folder_names_its_head_and_keeps_it_apart_from_the_weights(headed, converted):
    spec, content = read_spec(headed), (headed / HEAD_FILE).read_bytes()
    assert (spec.format, spec.head.rank) == (2, 5)
    assert spec.head.sha256 == hashlib.sha256(content).hexdigest()
    record = json.loads((headed / "ar2diff.json").read_text())
    assert record["diffusion"] == spec.to_dict() and HEAD_FILE in record["files"]
    tensors = load_file(headed / HEAD_FILE)
    assert {name: (*x.shape,) for name, x in tensors.items()} == {
        "before": (260, 5),
        "after": (5, 260),
    }
    assert all(x.abs().max() > 0.01 for x in tensors.values())  # trained
    assert (
        load_file(headed / "model.safetensors").keys()
        == load_file(converted / "model.safetensors").keys()
    )
    plain = json.loads((converted / "config.json").read_text())["diffusion"]
    assert plain["format"] == 1 and "head" not in plain


def test_a_folder_that_is_converted_on_keeps_its_head_to_the_bit(headed, tmp_path):
    adapt(str(headed), load_recipe(None, ["train.max_steps=0"]), tmp_path / "on")
    for name in (HEAD_FILE, "model.safetensors"):
        assert (tmp_path / "on" / name).read_bytes() == (headed / name).read_bytes()
    assert read_spec(tmp_path / "on").head == read_spec(headed).head


def test_sft_trains_the_head_along(headed, tmp_path, write_jsonl):
    rows = [{"prompt": "the cat sat", "completion": " on a mat by the sea"}] * 4
    overrides = [
        "train.max_steps=2", "data.max_length=32", "train.learning_rate=0.05", "train.save_steps=2",
    ]  # fmt: skip
    out, data = tmp_path / "out", write_jsonl("rows.jsonl", rows)
    sft(str(headed), output_dir=out, data=data, overrides=overrides)
    assert read_spec(out).head.rank == 5
    before, after = (load_file(folder / HEAD_FILE) for folder in (headed, out))
    assert not torch.equal(before["after"], after["after"])
    assert check(str(out)).ok


def test_a_folder_denoises_alike_with_its_own_code(headed, monkeypatch):
    theirs = AutoModelForCausalLM.from_pretrained(headed, trust_remote_code=True).eval()
    ours = load_checkpoint(str(headed)).model
    ids = torch.tensor([[1, 40, 41, 42]])
    asked = {"max_new_tokens": 24, "threshold": 0.05, "eos_token_id": [-1]}
    text = theirs.generate(ids, **asked)
    assert torch.equal(text, generate(ids, model=ours, **asked))
    assert "diffusion_head" not in dict(theirs.named_modules())  # save_pretrained stays stock
    assert type(theirs.diffusion_head).__module__.startswith("transformers_modules")
    for parameter in ours.diffusion_head.parameters():
        parameter.data.mul_(-20)
    assert not torch.equal(text, generate(ids, model=ours, **asked))


def test_the_ar_mode_has_no_bias(headed, tmp_path):
    checkpoint = load_checkpoint(str(headed))
    asked = {"mode": "ar", "max_new_tokens": 12}
    before = complete(checkpoint, "the cat", **asked).token_ids
    export(str(headed), tmp_path / "ar", "ar")
    assert not (tmp_path / "ar" / HEAD_FILE).exists()
    ar = load_checkpoint(str(tmp_path / "ar"))
    assert complete(ar, "the cat", **asked).token_ids == before
    for parameter in checkpoint.model.diffusion_head.parameters():
        parameter.data.mul_(-20)
    assert complete(checkpoint, "the cat", **asked).token_ids == before


def other_head(folder):
    save_file({"before": torch.ones(260, 5), "after": torch.ones(5, 260)}, folder / HEAD_FILE)


def other_rank(folder):
    content = BigramHead(260, 3).to_bytes()
    (folder / HEAD_FILE).write_bytes(content)
    name_in_config(folder, rank=5, sha256=hashlib.sha256(content).hexdigest())


def name_in_config(folder, **head):
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"]["head"] = head
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda folder: (folder / HEAD_FILE).unlink(), "is missing|was not found"),
        (other_head, "is not the diffusion head that config.json names"),
        (other_rank, "does not hold two float32 matrices of rank 5 for 260 tokens"),
        (lambda folder: name_in_config(folder, rank=0, sha256="0" * 64), "head.rank is 0"),
        (lambda folder: name_in_config(folder, rank=5, sha256="abc"), "head.sha256 is 'abc'"),
        (lambda folder: name_in_config(folder, rank=5), "diffusion.head is"),
    ],
)
def test_a_head_that_is_not_the_folders_is_refused(copied, change, said):
    model = AutoModelForCausalLM.from_pretrained(copied).eval()
    change(copied)
    with pytest.raises(Ar2DiffError, match=said):
        load_checkpoint(str(copied))
    model.config.diffusion = json.loads((copied / "config.json").read_text())["diffusion"]
    with pytest.raises(Ar2DiffError, match=said):
        generate(torch.tensor([[1, 40]]), model=model, max_new_tokens=4, mode="diffusion")


def test_format_2_alone_has_a_head(headed):
    config = json.loads((headed / "config.json").read_text())
    for change, said in (
        ({"format": 1}, "unknown key, 'head'"),
        ({"format": 3}, "unknown key, 'head'"),
        ({"format": 5}, "format is 5; this version of ar2diff reads formats up to 4"),
    ):
        with pytest.raises(Ar2DiffError, match=said):
            Spec.from_config(config | {"diffusion": config["diffusion"] | change})
    del config["diffusion"]["head"]
    with pytest.raises(Ar2DiffError, match=r"diffusion\.head is missing"):
        Spec.from_config(config)


def test_what_a_head_cannot_be_combined_with_is_refused(headed, texts, tmp_path):
    out = tmp_path / "out"
    for call, said in (
        (lambda: adapt(str(headed), recipe_of(texts, "convert.head_rank=9"), out), "of rank 5"),
        (lambda: adapt(str(headed), load_recipe(None, ["peft.r=2"]), out), "adapters do not train"),
        (lambda: load_recipe(None, ["peft.r=2", "convert.head_rank=4"]), "cannot be combined"),
        (
            lambda: rl(
                str(headed), None, out, data=texts, overrides=["rl.rewards=[{name: exact}]"]
            ),
            "estimators of rl do not know",
        ),
        (
            lambda: sft(str(headed), output_dir=out, data=texts, overrides=["convert.head_rank=9"]),
            "of rank 5",
        ),
        (lambda: export(str(headed), out, "sdar"), "cannot be exported to sdar"),
    ):
        with pytest.raises(Ar2DiffError, match=said):
            call()
    assert not out.exists()


def test_check_loads_the_head(headed):
    said = check(str(headed))
    assert said.ok and said.spec.head.rank == 5
