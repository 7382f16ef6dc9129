"""Training on rows with images: adapt, sft, adapters and controls on a tiny Llava; what is written
beside the weights; which processors do not load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from kills import killed_at_step
from safetensors.torch import load_file
from vision import WORDS, llava_folder, picture_rows

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.merge import merge
from ar2diff.checkpoint.processor import load_processor
from ar2diff.conversion.exports import export
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training.adapt import adapt
from ar2diff.training.closing import closing
from ar2diff.training.draft import draft
from ar2diff.training.sft import DiffusionSFTTrainer, sft

SIZES = ["data.max_length=64", "train.per_device_train_batch_size=4", "train.logging_steps=1"]
CHAT = '[{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a"}]'
FULL = ["convert.attention=full", "convert.block_length=null", "convert.prediction=same"]
FULL += ["objective.ar_weight=0"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_folder(tmp_path_factory.mktemp("llava"), layers=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return picture_rows(tmp_path_factory.mktemp("rows"), 12)


@pytest.fixture(scope="module")
def converted(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    adapt(llava, None, out, max_steps=0, overrides=["data.max_length=64"])
    return out


@pytest.fixture
def train(tmp_path, rows):
    """Run a verb for a few steps; returns its result and the losses."""

    def run(verb, model, *overrides, data=rows, steps=2, out="out"):
        settings = [*SIZES, *overrides]
        result = verb(model, None, tmp_path / out, data=data, max_steps=steps, overrides=settings)
        lines = (tmp_path / out / "log/metrics.jsonl").read_text().splitlines()
        return result, [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    return run


def parts(folder) -> dict[str, torch.Tensor]:
    return load_checkpoint(str(folder)).model.state_dict()


def test_a_conversion_without_steps_keeps_every_bit_and_the_processor(llava, converted):
    record = json.loads((converted / "ar2diff.json").read_text())
    said = closing({**dict.fromkeys(("tokens", "seconds")), "output_dir": "out", **record})
    assert "  ar2diff chat out" in said and not any("Once upon" in line for line in said)
    before, after = parts(llava), parts(converted)
    mask = load_checkpoint(str(converted)).spec.mask_token_id
    for name, x in before.items():
        kept = torch.arange(len(x)) != mask if x.shape[:1] == (len(WORDS),) else slice(None)
        assert torch.equal(x[kept], after[name][kept])
    written = (converted / "processor_config.json").read_bytes()
    assert written == (llava / "processor_config.json").read_bytes()
    stock = hf.AutoProcessor.from_pretrained(converted)
    assert stock.chat_template == load_processor(llava).chat_template


@pytest.mark.parametrize(
    "settings",
    [
        ["eval.rows=2", "eval.steps=1"],
        [*FULL, "eval.rows=2", "eval.steps=1", "objective.weight=1/t"],
        ["objective.distil.target=teacher", "noise.complementary=true"],
        ["objective.kind=ar"],
        ["noise.kind=self", "noise.law=bell", "train.gradient_checkpointing=true"],
        ["convert.attention=block_causal", "objective.ar_weight=0", "noise.kind=uniform",
         "noise.form=free", "eval.rows=2", "eval.steps=1"],
    ],
    ids=["joint", "full", "distilled", "control", "self", "free"],
)  # fmt: skip
def test_adapt_learns_of_images(llava, train, settings):
    result, losses = train(
        adapt, llava, "train.learning_rate=0.01", *settings, steps=4 + 2 * ("free" in settings)
    )
    assert result.data["kind"] == "conversations" and len(losses) == 4
    before, after = parts(llava), parts(result.output_dir)
    for part in ("vision_tower.encoder", "multi_modal_projector", "language_model.layers"):
        names = [n for n in before if part in n and n.endswith("weight") and before[n].dim() > 1]
        assert names and all(not torch.equal(before[n], after[n]) for n in names), part
    if "eval.steps=1" in settings:
        free = "noise.form=free" in settings
        assert ("bound" in result.eval) != free and ("ar_nll" in result.eval) == (
            not free and "objective.ar_weight=0" not in settings
        )
        assert any("bound is not measured" in note for note in result.notes) == free


def test_frozen_parts_and_parts_that_see_nothing_stay(llava, converted, train, tmp_path):
    result, _ = train(sft, converted, "train.frozen=[tower,language_model]")
    moved = {
        n for n, x in parts(converted).items() if not torch.equal(x, parts(result.output_dir)[n])
    }
    assert moved and all("multi_modal_projector" in name for name in moved)
    text = tmp_path / "text.jsonl"
    for name, row in (("text", "a b c d e"), ("messages", json.loads(CHAT))):
        text.write_text("\n".join([json.dumps({name: row})] * 8))
        result, _ = train(adapt, llava, data=text, out=name)
        after = parts(result.output_dir)
        assert all(torch.equal(x, after[n]) for n, x in parts(llava).items() if "vision" in n)
        assert result.trainable_parameters < result.parameters


def test_an_adapter_is_trained_merged_and_exported(converted, train, tmp_path):
    result, _ = train(sft, converted, "peft.r=2", "train.learning_rate=0.01")
    adapter = load_checkpoint(str(result.output_dir))
    assert not any("vision" in n for n, p in adapter.model.named_parameters() if p.requires_grad)
    assert type(adapter.processor).__name__ == "LlavaProcessor" and adapter.album is not None
    merge(str(result.output_dir), tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "plain", "ar")
    for name in ("merged", "plain"):
        assert (tmp_path / name / "processor_config.json").is_file()
    hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    hf.AutoProcessor.from_pretrained(tmp_path / "plain")
    with pytest.raises(Ar2DiffError, match="cannot be exported to sdar"):
        export(str(tmp_path / "merged"), tmp_path / "no", "sdar")


def test_what_conversations_with_images_cannot_have(llava, converted, train):
    for verb, model, settings, said in (
        (adapt, llava, ["anneal.kind=reveal", "anneal.steps=1"], "anneal.kind only works with doc"),
        (adapt, llava, ["noise.spans=2"], "noise.spans only works with adapt"),
        (adapt, llava, ["noise.kind=embedding", *FULL], "is fitted to documents"),
        (adapt, llava, ["data.max_length=16"], "cut in or before an image"),
        (draft, llava, [], "draft trains on documents"),
        (sft, converted, ["train.frozen=[tower,projector,language_model]"], "nothing to train"),
    ):
        with pytest.raises(Ar2DiffError, match=said):
            train(verb, model, *settings)


def test_a_draft_adapter_is_trained_on_texts(converted, train, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{w} b c d e " * 60}) for w in "abcd")
    )
    texts, short = tmp_path / "texts.jsonl", ("eval.length=32", "eval.rows=1")
    _, losses = train(draft, converted, *short, data=texts, steps=1)
    assert len(losses) == 1 and losses[0] > 0


def test_rows_that_a_cut_would_tear_are_counted(converted, tmp_path, capfd):
    rows = picture_rows(tmp_path, 4)
    lines = rows.read_text().splitlines()
    long = json.loads(lines[0])
    long["messages"][1]["content"] = "a " * 40
    long["messages"][2]["content"] = long["messages"][0]["content"]
    rows.write_text("\n".join([*lines, json.dumps(long)]))
    sft(converted, None, tmp_path / "out", data=rows, max_steps=1, overrides=SIZES)
    said = capfd.readouterr().err
    assert "note: 1 rows are left out, because data.max_length 64 would cut their images" in said


def test_resumed_with_other_pictures_is_refused(converted, tmp_path):
    rows = picture_rows(tmp_path, 4)
    settings = [*SIZES, "train.save_steps=1"]
    sft(converted, None, tmp_path / "out", data=rows, max_steps=2, overrides=settings)
    record = json.loads((tmp_path / "out/ar2diff.json").read_text())
    assert set(record["inputs"]) == {"model", "data", "images"}
    shutil.copy(tmp_path / "1.png", tmp_path / "0.png")
    with pytest.raises(Ar2DiffError, match="the content of the images has changed"):
        sft(
            converted,
            None,
            tmp_path / "out",
            data=rows,
            max_steps=2,
            overrides=settings,
            resume=True,
        )


def test_evaluation_does_not_depend_on_the_batch(converted, rows, monkeypatch, tmp_path):
    seen = []
    train = DiffusionSFTTrainer.train
    monkeypatch.setattr(
        DiffusionSFTTrainer, "train", lambda self, **k: seen.append(self) or train(self, **k)
    )
    for size in (1, 3):
        settings = [*SIZES[:1], f"train.per_device_train_batch_size={size}"]
        settings += ["train.learning_rate=1e-9"]
        sft(converted, None, tmp_path / str(size), data=rows, max_steps=1, overrides=settings)
    chats = [json.loads(line) for line in rows.read_text().splitlines()[:4]]
    for number, chat in enumerate(chats):
        chat["messages"][0]["content"][0]["path"] = str(rows.parent / f"{number}.png")
    one, other = (trainer.evaluate(chats)["eval_loss"] for trainer in seen)
    assert one == pytest.approx(other, rel=1e-5)
    for chat in chats:  # other pictures
        chat["messages"][0]["content"][0]["path"] = str(rows.parent / "9.png")
    assert seen[0].evaluate(chats)["eval_loss"] != pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("kind", ["Qwen2VL", "SmolVLM", "InternVL"])
def test_a_processor_that_lacks_a_package_names_it(llava, tmp_path, kind):
    shutil.copytree(llava, tmp_path / "model")
    (tmp_path / "model/processor_config.json").unlink()
    for name, key in (
        ("preprocessor", "image_processor_type"),
        ("video_preprocessor", "video_processor_type"),
    ):
        part = "Image" if key.startswith("image") else "Video"
        values = {"processor_class": f"{kind}Processor", key: f"{kind}{part}Processor"}
        if kind == "InternVL" and part == "Image":
            values[key] = "GotOcr2ImageProcessor"
        (tmp_path / f"model/{name}_config.json").write_text(json.dumps(values))
    try:
        import torchvision  # noqa: F401

        pytest.skip("torchvision is installed")
    except ImportError:
        pass
    with pytest.raises(Ar2DiffError, match="needs the package torchvision, which is not") as error:
        load_processor(tmp_path / "model")
    assert error.value.fix == "pip install torchvision"


def test_a_processor_of_an_unknown_class_is_refused(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "model")
    file = tmp_path / "model/processor_config.json"
    file.write_text(file.read_text().replace("LlavaProcessor", "NoProcessor"))
    with pytest.raises(Ar2DiffError, match="it is a Token"):
        load_processor(tmp_path / "model")


def test_a_torchvision_of_another_build_is_said(llava, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", broken)
    with pytest.raises(Ar2DiffError, match="torchvision does not match torch"):
        load_processor(llava)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(converted, rows, tmp_path, adapter):
    settings = [*SIZES, "train.save_steps=1", "eval.steps=0"]
    settings += ["peft.r=4"] if adapter else ["train.frozen=[]"]

    def run(out, **options):
        return sft(
            converted, None, tmp_path / out, data=rows, max_steps=3, overrides=settings, **options
        )

    run("once")
    killed_at_step(lambda: run("again"), 2)
    assert not list((tmp_path / "again").glob("*.safetensors"))
    run("again", resume=True)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    ours, theirs = (load_file(tmp_path / out / name) for out in ("once", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
