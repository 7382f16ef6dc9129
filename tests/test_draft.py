"""Draft adapters: the batches, the two forwards and the loss that train them, their runs, and the
folders that hold them."""

import copy
import itertools
import json
import math
import re
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, TrainerCallback
from waits import Waits

import ar2diff
from ar2diff.checkpoint.files import read_spec
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.draft import Draft as Settings
from ar2diff.core.attention import PADDING, Slots, model_mask
from ar2diff.core.draft import DraftSpec, new_draft
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.spec import CAUSAL
from ar2diff.data.blocks import BlockCollator
from ar2diff.data.documents import DocumentPart
from ar2diff.diffusion import drafting as drafting_module
from ar2diff.diffusion.cross_entropy import has_plain_head
from ar2diff.diffusion.drafting import Drafting, pace
from ar2diff.training import callbacks
from ar2diff.training.base import Running, checkpoints

ROWS = 64  # of the vocabulary of the tiny models
BLOCK = 4
SUPPRESSED = torch.arange(ROWS) == 7


def parts_of(*lengths: int, epoch: int = 0, seed: int = 0) -> list[DocumentPart]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(8, ROWS, (length,), generator=generator).tolist()
        found.append(DocumentPart(ids, length, 0, epoch, 0))
    return found


def collator(**settings: object) -> BlockCollator:
    wanted = Settings(block_length=BLOCK, **settings)
    return BlockCollator(wanted, ROWS, SUPPRESSED)


def batch_of(**settings: object) -> dict[str, torch.Tensor]:
    """Packed and padded rows."""
    rows = [parts_of(13, 6, seed=1), parts_of(9, seed=2), parts_of(2, 3, 14, seed=3)]
    return collator(**settings)(list(enumerate(rows)))


def draft_of(model: object, head_rank: int = 3, seed: int = 5):
    """A draft adapter whose weights are random and not zero, on all linear layers."""
    head = model.get_output_embeddings()
    names = [
        n for n, m in model.named_modules()
        if m is not head and (hasattr(m, "in_features") or hasattr(m, "nf"))
    ]  # fmt: skip
    table = model.get_input_embeddings().weight
    spec = DraftSpec(1, "base", None, "", *table.shape, BLOCK, tuple(names), 2, head_rank)
    generator = torch.Generator().manual_seed(seed)
    draft = new_draft(model, spec, generator)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return draft


def drafting_of(model: object, loss: dict | None = None, dpace: bool = False, **kwargs: object):
    model = copy.deepcopy(model).requires_grad_(False)  # tests share models
    draft = draft_of(model, **kwargs)
    window = "kept" if getattr(model.config, "sliding_window", None) else None
    spec = draft.spec_for(CAUSAL.__class__(**{**vars(CAUSAL), "local_window": window}))
    plain = has_plain_head(model)
    return Drafting(model, draft, spec, SUPPRESSED, loss or {"kl": 0.3, "tv": 0.7}, dpace, plain)


def test_blocks_begin_anywhere_and_only_their_later_tokens_count():
    starts, epochs = set(), 40
    for epoch in range(epochs):
        (part,) = parts_of(13, epoch=epoch)
        made = collator()([(0, [part])])
        start = made["start"].view(-1, BLOCK)
        assert (start == start[:, :1]).all()
        starts.add(int(start[0, 0]))
        pos = made["noisy_pos"].view(-1, BLOCK)
        assert torch.equal(pos, start + torch.arange(BLOCK))
        predicted = pos[:, 1:][made["weight"][0] > 0]
        begin = int(start[0, 0])
        firsts = set(range(begin, 13, BLOCK))  # which the model itself predicts
        assert set(predicted.tolist()) == set(range(begin, 13)) - firsts
        assert (made["noisy_ids"] == ROWS).all()
    assert starts == set(range(1, BLOCK + 1))


def test_blocks_do_not_depend_on_packing():
    one, two = parts_of(13, 10)
    together = collator(visible=0.9)([(0, [one, two])])
    alone = [collator(visible=0.9)([(n, [part])]) for n, part in enumerate((one, two))]
    for name in ("start", "noisy_ids", "noisy_pos"):
        assert torch.equal(together[name], torch.cat([made[name] for made in alone], 1)), name


def test_weights_of_tokens_that_are_shown_suppressed_or_decayed():
    part = DocumentPart([8, 9, 10, 7, 11, 12, 13, 14, 15], 9, 0, 0, 0)
    settings = Settings(block_length=BLOCK, decay=2.0)
    made = BlockCollator(settings, ROWS, SUPPRESSED, first=1)([(0, [part])])
    e = math.exp(-0.5)
    # Blocks begin at positions 1 and 5; id 7, at position 3, can never be predicted.
    expected = torch.tensor([[[1, 0, e * e], [1, e, e * e]]])
    assert torch.allclose(made["weight"], expected)
    assert made["divisor"] == made["weight"].double().sum() and made["tokens"] == 9
    shown = set()
    for epoch in range(60):
        part = DocumentPart(list(range(8, 20)), 12, 0, epoch, 0)
        made = collator(visible=0.9, decay=2.0)([(0, [part])])
        for ids, weight in zip(made["noisy_ids"].view(-1, BLOCK), made["weight"][0], strict=True):
            count = int((ids != ROWS).sum())
            shown.add(count)
            assert (ids[:count] != ROWS).all() and (ids[count:] == ROWS).all()
            first = max(count, 1)  # the first token that is drafted has the weight 1
            assert not weight[: first - 1].any()
            if weight.any():
                assert weight[first - 1] == 1
    assert shown == set(range(BLOCK))


def test_a_block_ends_within_the_context():
    (part,) = parts_of(16)
    settings = Settings(block_length=BLOCK)
    made = BlockCollator(settings, ROWS, SUPPRESSED, context=16, first=2)([(0, [part])])
    assert made["noisy_pos"].max() < 16


def in_one_forward(drafting: Drafting, model: object, batch: dict) -> tuple:
    """q and p of every block as logits [B, A, K - 1, V], from one forward of [clean | noisy]."""
    length = batch["x0"].shape[1]
    noisy = torch.cat(
        [torch.zeros_like(batch["doc"]), torch.ones_like(batch["noisy_doc"])], 1
    ).bool()
    slots = Slots(
        torch.cat([batch["doc"], batch["noisy_doc"]], 1),
        torch.cat([batch["pos"], batch["noisy_pos"]], 1),
        noisy,
        torch.cat([batch["pos"], batch["start"]], 1),
    )
    mask = model_mask(model, slots, "causal_context", BLOCK, drafting.spec.local_window)
    states = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: states.append(args[0])
    )
    with drafting.draft.applied(model, slice(length, None)):
        logits = model(
            input_ids=torch.cat([batch["x0"], batch["noisy_ids"]], 1), attention_mask=mask,
            position_ids=slots.pos, use_cache=False,
        ).logits  # fmt: skip
    hook.remove()
    logits = logits.masked_fill(SUPPRESSED, float("-inf"))
    column = batch["column"]
    rows = torch.arange(len(column))[:, None, None]
    own = length + torch.arange(column[0].numel()).view(column.shape[1:])
    q = logits[rows, own[None, :, :-1]]
    if drafting.draft.head is not None:
        before = batch["x0"][rows, column[..., :-1]]
        q = q + bias_of(drafting.draft.head, before, states[0][rows, own[None, :, :-1]])
    return q, logits[rows, column[..., :-1]]


def bias_of(head, before, hidden):
    """(sum_j tanh(d)^(k - j) W1[x_j] * (1 + G h_k)) W2 of the drafts [..., K]."""
    found = []
    for k in range(before.shape[-1]):
        memory = sum(
            head.before[before[..., j]] * head.fade.tanh() ** (k - j) for j in range(k + 1)
        )
        found.append((memory * (1 + hidden[..., k, :] @ head.gate.T)) @ head.after)
    return torch.stack(found, -2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "qwen3_mixed", "gemma2"])
def test_two_forwards_equal_one_of_noisy_and_clean_rows(tiny_model, name):
    kind = "eager" if name == "gemma2" else "sdpa"
    drafting, batch = drafting_of(tiny_model(name, kind, torch.float32)), batch_of(visible=0.7)
    model = drafting.base
    kept = (batch["weight"] > 0).any(-1)
    with torch.no_grad():
        q, p = (found[kept].flatten(0, 1) for found in in_one_forward(drafting, model, batch))
        found = drafting.predictions(batch)
        bias = bias_of(drafting.draft.head, found.previous, found.hidden).flatten(0, 1)
        torch.testing.assert_close(drafting.logits(found.q) + bias, q, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(drafting.logits(found.p), p, atol=1e-4, rtol=1e-5)


DENSE = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "phi3", "gpt_neox", "cohere2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "sdpa") for kind in DENSE if kind != "gemma2"), *((kind, "eager") for kind in DENSE)],
)
def test_the_logits_of_clean_slots_are_the_models_to_the_bit(kind, implementation, dtype):
    """Nothing that is in noisy slots reaches the clean ones: neither the adapter nor their ids.
    (In a mixture of experts the noisy tokens change the shapes of its products.)"""
    model = architectures.tiny_model(kind, implementation).to(dtype)
    draft, rows = draft_of(model), model.config.vocab_size
    clean, known, starts = 10, 6, (5, 8)
    doc = torch.zeros(2, clean, dtype=torch.long)
    doc[1, :3] = PADDING
    pos = (torch.arange(clean) - torch.tensor([[0], [3]])).clamp(min=0)
    start = torch.tensor(starts).repeat_interleave(BLOCK).expand(2, -1)
    slots = Slots(
        torch.cat([doc, torch.zeros_like(start)], 1),
        torch.cat([pos, start + torch.arange(BLOCK).repeat(2)], 1),
        torch.arange(clean + start.shape[1]).expand(2, -1) >= clean,
        torch.cat([pos, start], 1),
    )
    ids = torch.randint(8, rows, slots.pos.shape, generator=torch.Generator().manual_seed(0))
    masked = torch.where(slots.noisy, rows, ids)
    window = "kept" if architectures.windowed(model) else None

    def logits(ids: torch.Tensor, on: bool, first: int) -> torch.Tensor:
        """Of the slots from `first` on, those before read into a cache."""
        cache = DynamicCache() if first else None
        for part in [slice(0, first), slice(first, None)] if first else [slice(0, None)]:
            held = range(slots.pos.shape[1])[part]
            seen = Slots(*(x[:, : held.stop] for x in vars(slots).values() if x is not None))
            mask = model_mask(model, seen, "causal_context", BLOCK, window, queries=held)
            noisy = slice(clean - held.start, None) if held.stop > clean else slice(0, 0)
            with draft.applied(model, noisy) if on else nullcontext():
                found = model(
                    input_ids=ids[:, part], attention_mask=mask, position_ids=slots.pos[:, part],
                    past_key_values=cache, use_cache=cache is not None,
                ).logits  # fmt: skip
        return found

    with torch.no_grad():
        for first in (0, known):
            with_it, without = logits(masked, True, first), logits(ids, False, first)
            real = (doc != PADDING)[:, first:]
            width = clean - first
            assert torch.equal(with_it[:, :width][real], without[:, :width][real])
            assert not torch.isclose(with_it[:, width:], without[:, width:]).all(-1).any()


@pytest.mark.parametrize(
    ("loss", "dpace"),
    [({"kl": 0.3, "tv": 0.7}, False), ({"ce": 0.1, "tv": 0.9}, True), ({"lk": 1.0}, False)],
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_and_gradients_equal_brute_force(tiny_model, monkeypatch, name, loss, dpace):
    model = tiny_model(name, "eager" if name == "gemma2" else "sdpa", torch.float64)
    drafting, batch = drafting_of(model, loss, dpace), batch_of(decay="dpace" if dpace else 3.0)
    model = drafting.base
    drafting.double()
    monkeypatch.setattr(drafting_module, "PART", 2 * ROWS * (BLOCK - 1))  # two blocks at a time
    divisor = torch.tensor(5.0, dtype=torch.double)
    with Waits() as waits:
        total, _ = drafting(batch, divisor)
        total.backward()
    assert waits.found == []
    got = {n: p.grad.clone() for n, p in drafting.named_parameters()}
    drafting.zero_grad()

    q, p = in_one_forward(drafting, model, batch)
    expected = 0.0
    for b, blocks in enumerate(batch["weight"]):
        for a, weights in enumerate(blocks.tolist()):
            tokens = batch["x0"][b, batch["column"][b, a, 1:]]
            share, shares = 1.0, []
            for k, weight in enumerate(weights):
                if weight:
                    share *= 0.5 + 0.5 * q[b, a, k].detach().softmax(-1)[tokens[k]].item()
                shares.append(share if weight else 0.0)
            for k, weight in enumerate(weights):
                if not weight:
                    continue
                lq, lp = (x[b, a, k].log_softmax(-1)[~SUPPRESSED] for x in (q, p.detach()))
                tv = (lq.exp() - lp.exp()).abs().sum()
                kl = (lp.exp() * (lp - lq)).sum()
                mix = math.exp(-3 * (1 - tv.item() / 2))
                kinds = {
                    "ce": -q[b, a, k].log_softmax(-1)[tokens[k]],
                    "kl": kl,
                    "tv": tv,
                    "lk": mix * kl + (1 - mix) * tv,
                }
                term = sum(factor * kinds[kind] for kind, factor in loss.items())
                expected = expected + weight * (sum(shares[k:]) if dpace else 1.0) * term
    expected = expected / divisor
    torch.testing.assert_close(total, expected)
    expected.backward()
    assert got.keys() == {n for n, _ in drafting.named_parameters()}
    for name, parameter in drafting.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_pace_counts_the_drafts_that_are_kept():
    right = torch.tensor([[0.0, 1.0, 0.5]])
    counted = torch.tensor([[True, True, True]])
    # shares 0.5, 1, 0.75: products 0.5, 0.5, 0.375
    assert torch.allclose(pace(right, counted), torch.tensor([[1.375, 0.875, 0.375]]))
    counted = torch.tensor([[False, True, True]])
    assert torch.allclose(pace(right, counted), torch.tensor([[0.0, 1.75, 0.75]]))


def test_what_is_counted(tiny_model):
    drafting, batch = drafting_of(tiny_model("llama", dtype=torch.float32)), batch_of()
    model = drafting.base
    with torch.no_grad():
        _, sums = drafting(batch, torch.tensor(1.0))
        q, p = in_one_forward(drafting, model, batch)
    counted = batch["weight"] > 0
    q, p = q.softmax(-1), p.softmax(-1)
    accepted = 1 - (q - p).abs().sum(-1) / 2
    same = q.argmax(-1) == p.argmax(-1)
    blocks = [(b, a) for b, a in counted.all(-1).nonzero().tolist()]
    runs = 0
    for b, a in blocks:
        run = 1
        for right in same[b, a].tolist():
            if not right:
                break
            run += 1
        runs += run
    slots = [(x * counted).flatten(0, 1).sum(0) for x in (counted, accepted, same)]
    expected = [*torch.cat(slots).tolist()]
    assert sums[:9].tolist() == pytest.approx(expected, abs=1e-4)
    assert sums[-2:].tolist() == [len(blocks), runs]


def recipe_of(data: object, **values: object) -> list[str]:
    settings = {
        "data.max_length": 32,
        "train.max_steps": 6,
        "train.warmup_steps": 0,
        "train.save_steps": 3,
        "train.logging_steps": 1,
        "draft.block_length": 4,
        "draft.rank": 4,
        "draft.head_rank": 4,
        "eval.steps": 0,
    } | values
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    words = "a cat sat on the big red mat and saw it".split()
    rows = [" ".join(words[(i * j) % len(words)] for j in range(3 + i % 9)) for i in range(60)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def drafted(tiny_checkpoint, texts, tmp_path_factory):
    """A trained draft adapter on the tiny checkpoint. Never write to it."""
    folder = tmp_path_factory.mktemp("drafted") / "draft"
    values = recipe_of(texts, **{"eval.steps": 3, "eval.length": 16, "eval.rows": 3})
    ar2diff.draft(tiny_checkpoint, None, folder, data=texts, overrides=values)
    return folder


def test_a_run_leaves_the_base_alone_and_writes_a_folder_that_only_ar2diff_loads(
    tiny_checkpoint, texts, tmp_path
):
    before = {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()}
    result = ar2diff.draft(
        tiny_checkpoint, None, tmp_path / "out", data=texts,
        overrides=recipe_of(texts, **{"eval.steps": 3, "eval.length": 16, "eval.rows": 3}),
    )  # fmt: skip
    assert {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()} == before
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"draft.json", "draft.safetensors", "tokenizer.json", "custom_generate"} <= names
    assert not names & {"config.json", "adapter_config.json", "model.safetensors"}
    assert result.eval["tokens_per_forward"] >= 1 and result.eval["ar_nll"]["nats_per_token"] > 0
    trained = load_file(tmp_path / "out" / "draft.safetensors")
    assert sum(t.numel() for t in trained.values()) == result.trainable_parameters
    assert all(tensor.any() for tensor in trained.values())
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with pytest.raises(Exception, match="adapter_config"):
        PeftModel.from_pretrained(base, tmp_path / "out")
    with pytest.raises(Exception, match=r"config\.json|model_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_folder_loads_on_its_base_alone(drafted, tiny_checkpoint, tmp_path):
    checkpoint = load_checkpoint(str(drafted))
    assert checkpoint.spec is None and checkpoint.draft.spec.block_length == 4
    held = load_file(drafted / "draft.safetensors")
    assert all(torch.equal(checkpoint.draft.tensors()[name], held[name]) for name in held)
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    moved = tmp_path / "moved"
    shutil.copytree(drafted, moved)
    config = json.loads((moved / "draft.json").read_text())
    (moved / "draft.json").write_text(json.dumps({**config, "base": "../other"}))
    with pytest.raises(Ar2DiffError, match="not the ones it was trained for"):
        load_checkpoint(str(moved))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda d, out: ar2diff.merge(d, out), "cannot be merged"),
        (lambda d, out: ar2diff.adapt(d, None, out, data="x"), "adapt trains whole models"),
        (lambda d, out: ar2diff.draft(d, None, out, data="x"), "draft trains whole models"),
        (lambda d, out: ar2diff.export(d, out, "sdar"), "no other engine reads"),
    ],
)
def test_other_verbs_refuse_a_draft_adapter(drafted, tmp_path, call, said):
    with pytest.raises(Ar2DiffError, match=said):
        call(str(drafted), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_describes_a_draft_adapter(drafted):
    found = ar2diff.check(drafted)
    assert found.ok and found.draft.rank == 4
    for said in ("same bits", "8 of 8 texts of 16 tokens"):
        assert any(said in finding.what for finding in found.findings)
    assert found.default.mode == "speculative" and "verified" in found.default.why


def test_eval_gives_what_the_run_recorded(drafted, texts, run_both):
    """On the same rows: the first that are long enough."""
    recorded = json.loads((drafted / "ar2diff.json").read_text())["eval"]
    limits = ("--length", 16, "--limit", 3)
    code, out, _ = run_both("eval", drafted, "--data", texts, *limits, "--json")
    found = json.loads(out)
    assert code == 0 and found["drafts"].pop("blocks") == recorded.pop("blocks")
    assert found["ar_nll"] == pytest.approx(recorded.pop("ar_nll"))
    for name, value in recorded.items():
        assert found["drafts"][name] == pytest.approx(value), name


def test_accumulation_changes_nothing(tiny_checkpoint, texts, tmp_path):
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        values = {
            "train.optimizer": "sgd", "train.max_grad_norm": 0.0,
            "train.per_device_train_batch_size": batch,
            "train.gradient_accumulation_steps": accumulation, "draft.visible": 0.5,
        }  # fmt: skip
        folder = tmp_path / str(batch)
        overrides = recipe_of(texts, **values)
        found.append(
            load_file(
                ar2diff.draft(
                    tiny_checkpoint, None, folder, data=texts, overrides=overrides
                ).output_dir
                + "/draft.safetensors"
            )
        )
    one, other = found
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-4)


class _Killed(Exception):
    pass


class _End(TrainerCallback):
    """Ends the run during its fifth step: as a kill would, or by SIGTERM."""

    def __init__(self, how: str):
        self.how = how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            if self.how == "kill":
                raise _Killed
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_is_stopped_resumes_to_the_same_bits(
    tiny_checkpoint, texts, tmp_path, monkeypatch
):
    call = {"data": texts, "overrides": recipe_of(texts)}
    ar2diff.draft(tiny_checkpoint, None, tmp_path / "whole", **call)
    train = Running.train
    for how, newest in (("kill", 3), ("SIGTERM", 5)):

        def stopped(self, *args, how=how, **kwargs):
            self.add_callback(_End(how))
            return train(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(Running, "train", stopped)
            with pytest.raises(_Killed if how == "kill" else SystemExit):
                ar2diff.draft(tiny_checkpoint, None, tmp_path / how, **call)
        assert checkpoints(tmp_path / how / "checkpoints")[-1].name == f"checkpoint-{newest}"
        ar2diff.draft(tiny_checkpoint, None, tmp_path / how, resume=True, **call)
        one, other = (tmp_path / run / "draft.safetensors" for run in ("whole", how))
        assert one.read_bytes() == other.read_bytes(), how


def test_the_time_that_is_left_is_said_once_it_is_known(
    tiny_checkpoint, texts, tmp_path, monkeypatch, capsys
):
    clock = itertools.count(0, 1000)  # seconds; read at each step
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps = {"train.max_steps": 5, "train.logging_steps": 4, "train.save_steps": 5}
    overrides = recipe_of(texts, **steps)
    ar2diff.draft(tiny_checkpoint, None, tmp_path / "out", data=texts, overrides=overrides)
    lines = [li for li in capsys.readouterr().err.splitlines() if li.startswith("step ")]
    first, log = lines[1:3]
    assert re.fullmatch(r"step 3/5: about 33 min left, [\d.]+ GB of memory at the peak", first)
    assert log.startswith("step 4/5: loss") and log.endswith("  17 min left")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("convert.block_length=8", "sets convert"),
        ("objective.ar_weight=1.0", "sets objective"),
        ("peft.r=4", "sets peft"),
        ("train.compile=true", "train.compile"),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing"),
        ("train.lr_scale.mlp=0.5", "train.lr_scale"),
        ("eval.panel_steps=5", "eval.panel_steps"),
        ("train.max_steps=0", "trains nothing"),
        ("draft.targets=[o_prj]", "does not match any linear layer"),
        ("draft.targets=[lm_head]", "output head"),
        ("draft.targets=o_proj", "targets must be"),
        ("draft.block_length=1", "greater than 1"),
        ("draft.loss={kl: 0}", "weights above 0"),
        ("draft.loss={js: 1}", "js"),
        ("draft.decay=-1", "decay"),
        ("draft.visible=1", "less than 1"),
        ("data.max_length=9999", "context"),
    ],
)
def test_what_a_run_refuses(tiny_checkpoint, texts, tmp_path, value, said):
    with pytest.raises(Ar2DiffError) as refused:
        ar2diff.draft(
            tiny_checkpoint, None, tmp_path / "out", data=texts,
            overrides=[*recipe_of(texts), value],
        )  # fmt: skip
    assert said in refused.value.what and refused.value.fix
    assert len(str(refused.value).splitlines()) <= 2 and not (tmp_path / "out").exists()


def test_a_model_without_an_ar_mode_is_refused(convert_tiny, texts, tmp_path):
    with pytest.raises(Ar2DiffError, match="no AR mode"):
        ar2diff.draft(
            convert_tiny("convert.attention=block_causal"), None, tmp_path / "o", data=texts
        )


def test_a_converted_model_takes_a_draft_adapter(converted, texts, tmp_path):
    overrides = recipe_of(texts, **{"draft.targets": "attention-output"})
    ar2diff.draft(converted, None, tmp_path / "out", data=texts, overrides=overrides)
    checkpoint = load_checkpoint(str(tmp_path / "out"))
    assert checkpoint.spec == read_spec(tmp_path / "out") == read_spec(converted)
    assert [name.rpartition(".")[2] for name in checkpoint.draft.spec.targets] == ["o_proj"] * 2


def test_a_draft_adapter_has_masks_of_its_own_beside_a_base_without(convert_tiny, texts, tmp_path):
    base = convert_tiny("noise.kind=uniform", "noise.form=free")
    ar2diff.draft(base, None, tmp_path / "out", data=texts, overrides=recipe_of(texts))
    settings = {"max_new_tokens": 12, "temperature": 0}
    drafted = ar2diff.load(str(tmp_path / "out")).generate("the cat", **settings)
    assert drafted.text == ar2diff.load(str(base)).generate("the cat", mode="ar", **settings).text
    assert ar2diff.check(str(tmp_path / "out")).ok


def test_the_other_verbs_do_not_take_the_section(tiny_checkpoint, texts, tmp_path):
    with pytest.raises(Ar2DiffError, match="draft"):
        ar2diff.adapt(
            tiny_checkpoint, None, tmp_path / "out", data=texts, overrides=["draft.rank=4"]
        )
