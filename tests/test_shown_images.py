"""Images in reports, on cards and in published folders."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_card import answer_of, first_block, front_matter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vision import TYPED, ClassAlbum, llava_folder, picture
from vision_classes import IMAGE, vision_class

from ar2diff.checkpoint.files import EXAMPLE as FILE
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core import speculation
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.images import codes_of
from ar2diff.data.conversations import packed
from ar2diff.data.turns import IGNORED
from ar2diff.demo.vision.scenes import right_answer, scenes
from ar2diff.diffusion.likelihood import ar_nll
from ar2diff.evaluation.answers import AnswerJudge
from ar2diff.hub import verify as verifying
from ar2diff.hub.example import PROMPT, coded, example_of
from ar2diff.hub.push import preview, push
from ar2diff.reports import constrained
from ar2diff.reports.compare import compare
from ar2diff.reports.constrained_gaps import cases_of
from ar2diff.reports.figures import MOST_PICTURE, Picture, read_report
from ar2diff.reports.gaps import _in_answer
from ar2diff.reports.material import EYES, material_for
from ar2diff.reports.pictures import SIDE, show, thumbnail
from ar2diff.reports.run import Asked, make_report
from ar2diff.reports.seen import bounds_of
from ar2diff.reports.session import Session, Sizes
from ar2diff.reports.subjects import Held, load_subjects
from ar2diff.training.adapt import adapt

TINY = Sizes(
    batches=(1, 2), timed=2, repeats=2, answer=6, questions=8, texts=8, draws=2,
    temperatures=(), prompts=(8,), answers=(4,), length_repeats=2, long_rows=8, infills=4, edits=2,
)  # fmt: skip
# What shows all there is about images, without all settings.
PARTS = (
    "batch 1", "likelihood", "questions", "texts at temperature 0.0, base", "prompt", "where",
    "gaps, model", "order", "gaps held", "edits, model",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="module")
def model(base) -> Path:
    """The base converted without training. Never write to it."""
    folder = base.with_name("model")
    adapt(str(base), load_recipe(None, ["train.max_steps=0", "convert.block_length=4"]), folder)
    return folder


@pytest.fixture(scope="module")
def data(base) -> Path:
    """Conversations about pictures, the first of which is large and knows where it was taken."""
    folder = base.with_name("data")
    folder.mkdir()
    rows = []
    for number in range(9):
        file = folder / f"{number}.png"
        known = PngInfo()
        known.add_text("place", "SECRET PLACE")
        shown = picture(number)
        shown.resize((900, 700) if number == 0 else shown.size).save(file, pnginfo=known)
        asked = [{"type": "image", "path": file.name}, {"type": "text", "text": "what is ?"}]
        answer = "a b c and d e f"
        rows.append({"messages": [
            {"role": "user", "content": asked}, {"role": "assistant", "content": answer},
            {"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "one"},
        ]})  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def made(base, model, data, tmp_path_factory):
    """A report on the model, and its folder."""
    folder, ticks = tmp_path_factory.mktemp("made") / "report", itertools.count()
    asked = Asked(str(model), str(base), data=str(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "ENOUGH", 0)
        patch.setattr("ar2diff.reports.length.peak_of", lambda *_: None)
        _, found = make_report(
            asked, folder, sizes=TINY, clock=lambda: float(next(ticks)),
            steps=lambda parts: [part for part in parts if part.name.startswith(PARTS)],
        )  # fmt: skip
    return found, folder


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_the_likelihood_of_a_text_is_that_of_the_stock_forward_with_its_images(name):
    seen = vision_class(name)
    album, starts = ClassAlbum(seen), []
    words, rows = ([5, 6], [7, 8, 9]), []
    for number, answer in enumerate(([10, 11, 12], [13, IMAGE, 14, 15, 16])):
        head = [1, *words[number], *codes_of(number, seen.size(number)), 7, *words[number]]
        starts.append(len(head))
        rows.append([*head, *answer])
    suppressed = torch.zeros(64, dtype=torch.bool)
    suppressed[IMAGE] = True
    ids = torch.tensor([token for row in rows for token in row])

    def nats(rows, **more):
        images = album.images_in(ids)
        return ar_nll(
            seen.model, rows, suppressed, "kept", starts=starts, images=images, reach=seen.reach,
            **more,
        ).nats  # fmt: skip

    found = nats(rows)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        clean = [token if token != IMAGE else 0 for token in row]  # that a base wrote, unseen
        read = [("image", number)] if number < 8 else []
        first = next(n for n, token in enumerate(clean) if token < 0)
        last = first + seen.size(number)
        inputs = seen.inputs([[*clean[:first], *read, *clean[last:]]])
        if seen.reach == "prefix":
            inputs["token_type_ids"] = (torch.arange(len(row)) >= start).long()[None]
        with torch.no_grad():
            logits = seen.model(**inputs, use_cache=False).logits[0].float()
        logits[:, IMAGE] = float("-inf")
        logp = logits.log_softmax(-1)
        wanted = -sum(logp[n - 1, row[n]] for n in range(start, len(row)) if row[n] != IMAGE)
        assert float(found[number]) == pytest.approx(float(wanted), rel=1e-4)
    assert nats(rows, batch_size=1).tolist() == pytest.approx(found.tolist(), rel=1e-4)


def test_what_generate_gets_is_what_the_processor_makes(base, model, data):
    checkpoint = load_checkpoint(str(model))
    material = material_for(model, checkpoint, str(data), "text", 8)
    question, other = material.questions[1:3]
    assert question.prompt == "what is ?" and question.answer == "a b c and d e f"
    assert question.score(" a b c and d e f\n") and not question.score("a b c and d e")
    pad = [3] * (len(other.ids) - len(question.ids))
    ids = torch.tensor([[*pad, *question.ids], list(other.ids), list(other.ids)])
    given, inputs = checkpoint.album.given(ids)
    pictures = [picture(1), picture(2), picture(2)]
    texts = [
        f"<s><|user|> <image> {words} <|assistant|>" for words in ["what is ?"] * len(pictures)
    ]
    stock = checkpoint.processor(text=texts, images=pictures, return_tensors="pt")
    assert torch.equal(given, stock["input_ids"])
    assert inputs.keys() == {"pixel_values"}
    assert torch.equal(inputs["pixel_values"], stock["pixel_values"])
    tokenizer = checkpoint.tokenizer
    assert tokenizer.decode(question.reply) == "a b c and d e f </s>"
    # The bound and the AR likelihood are those by which runs on conversations are evaluated.
    held = Held("model", str(model), checkpoint, 31)
    rows = [{"input_ids": [*q.ids, *q.reply], "labels": [*[IGNORED] * len(q.ids), *q.reply]}
            for q in (question, other)]  # fmt: skip
    recipe = load_recipe(None, ["convert.block_length=4", "data.max_length=40"])
    pool = packed(rows, checkpoint.end_ids, tokenizer, recipe)
    judged = AnswerJudge(checkpoint, pool, [0, 1], 4)()
    whole = [row["input_ids"] for row in rows]
    exact = ar_nll(
        checkpoint.model, whole, checkpoint.suppressed, checkpoint.spec.local_window,
        starts=[len(question.ids), len(other.ids)], **held.seen_in(whole),
    )  # fmt: skip
    assert float(exact.nats.sum()) / judged.tokens == pytest.approx(
        judged.ar_nll.nats_per_token, rel=1e-4
    )
    bounds = bounds_of(held, [question, other], 4, 0)
    assert sum(v for v, _ in bounds) / judged.tokens == pytest.approx(
        judged.bound.nats_per_token, rel=1e-4
    )


def test_a_report_on_questions_about_images(made):
    found, folder = made
    for question, metric, subject in (
        ("speed", "tokens_per_second", "base"), ("speed", "tokens_per_forward", "model"),
        ("quality", "bound", "model"), ("quality", "ar_nll", "base"),
        ("quality", "base_nll", "base"), ("quality", "same_as_ar", "model"),
        ("length", "seconds_per_token", "base"), ("length", "stopped", "model"),
        ("control", "infill_exact_match", "model"), ("control", "forced_kept", "model"),
    ):  # fmt: skip
        assert found.of(question, metric, subject=subject), metric
    assert found.of("quality", "same_as_ar", setting="lossless")[0].value == 100
    missing = {miss.what: miss.why for miss in found.missing}
    assert "no one right answer" in missing["exact match"]
    assert not found.of("quality", "exact_match")
    assert "no sums" in missing["revision after an edit"]
    assert {"likelihood by position", "prompts of any length"} <= missing.keys()
    assert "byte-level tokenizer" in missing["gaps held to a regex"]
    assert "the vision tower's time" in found.protocol["images"]
    assert not [miss for miss in found.missing if "features" in miss.why]
    assert read_report(folder) == found


def test_the_page_shows_pictures_small_and_without_what_is_known_of_them(made, tmp_path):
    found, folder = made
    page = (folder / "report.html").read_text()
    assert len(found.seen) == 4
    for seen in found.seen:
        (shown,) = seen.pictures
        assert f'<img src="{shown.data}"' in page
        assert f'alt="what is ? ({shown.width} x {shown.height} pixels)"' in page
        raw = base64.b64decode(shown.data.partition(",")[2])
        assert b"SECRET" not in raw and max(Image.open(io.BytesIO(raw)).size) <= SIDE
        assert {reply.subject for reply in seen.replies} == {"model", "base"}
    assert (found.seen[0].pictures[0].width, found.seen[0].pictures[0].height) == (900, 700)
    noise = Image.frombytes("RGB", (2000, 1500), torch.randint(
        256, (2000 * 1500 * 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy().tobytes())  # fmt: skip
    assert len(thumbnail(noise).data) <= MOST_PICTURE
    for uri in ("data:image/svg+xml;base64,AAAA", 'data:image/png;base64,AA" onload="x', "x"):
        with pytest.raises(ValueError, match="pattern"):
            Picture(data=uri, width=1, height=1)
    other = found.model_copy(update={"title": "another", "seen": []})
    (tmp_path / "other.json").write_text(json.dumps(other.model_dump(mode="json")))
    assert "another" in compare([folder, tmp_path / "other.json"], tmp_path / "c.html").read_text()


def letters() -> object:
    """A tokenizer of bytes, with the special tokens of the tiny Llava."""
    marks = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|reserved_0|>", "<|reserved_1|>"]
    marks += ["<|user|>", "<|assistant|>"]
    known = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(known)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=marks[4:],
    )  # fmt: skip
    found.chat_template = TYPED
    return found


def test_a_number_in_an_answer_is_filled_as_the_constraint_has_it(tmp_path, monkeypatch):
    pytest.importorskip("outlines_core")
    monkeypatch.setattr("vision.llava_tokenizer", letters)
    folder = llava_folder(tmp_path / "base", vocab_size=len(letters()))
    adapt(str(folder), load_recipe(None, ["train.max_steps=0"]), tmp_path / "model")
    rows = []
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
        asked = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "count"}]
        said = {"role": "assistant", "content": f"there are {number + 12} cats"}
        rows.append({"messages": [{"role": "user", "content": asked}, said]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subjects = load_subjects(str(tmp_path / "model"), str(folder), None, ())
    model = subjects["model"].checkpoint
    material = material_for(tmp_path / "model", model, str(tmp_path / "rows.jsonl"), "text", 8)
    show([*subjects.values()], material.shots)
    session = Session(subjects, material, replace(TINY, infills=1))
    form, (case,) = cases_of(session, "regex")
    assert (form.kind, case.true, len(case.gap)) == ("number", "12", 2)
    assert case.left[: len(material.questions[0].ids)] == list(material.questions[0].ids)
    assert min(case.left) < 0 and case.shown == "count there are […] cats"
    found = constrained._measured(session, "regex")
    assert {(row["subject"], row["setting"]) for row in found} == {
        ("model", "diffusion 0.9"), ("base", "ar"), ("base", "ranked ar")
    }  # fmt: skip
    assert all(row["matches"] and len(row["text"]) == 2 and row["nats"] > 0 for row in found)
    hole = _in_answer(material.questions[0])
    text = model.tokenizer.decode([*hole.left[-6:], *hole.true, *hole.right])
    assert text == "there are 12 cats" and hole.shape == (5, 6)


def test_what_a_report_cannot_do_with_images_is_said_in_two_lines(
    base, model, data, run_both, tmp_path, converted, tiny_checkpoint
):
    few = tmp_path / "few.jsonl"
    few.write_text(data.read_text().splitlines()[0].replace('"0.png"', f'"{data.parent}/0.png"'))
    gone = tmp_path / "gone.jsonl"
    gone.write_text(data.read_text())
    for arguments, told in (
        ((model, "--base", base, "--data", few), "1 conversations have an answer"),
        ((model, "--base", base, "--data", gone), "0.png does not exist"),
        ((converted, "--base", tiny_checkpoint, "--data", data), "has no column 'text'"),
        ((model, "--base", tiny_checkpoint, "--data", data), "has another tokenizer"),
        ((model, "--base", base), "there is no held-out text"),
    ):
        code, said, wrong = run_both("report", "--output-dir", tmp_path / "out", *arguments)
        lines = wrong.strip().splitlines()
        assert (code, said, len(lines)) == (2, "", 2) and told in wrong, wrong
    assert not (tmp_path / "out").exists()


def test_a_card_asks_about_a_picture_that_was_drawn_or_given(model, data, tmp_path):
    card = preview(model, license="mit")
    assert front_matter(card)["pipeline_tag"] == "image-text-to-text"
    assert f'<img src="{FILE}" alt="A red circle beside a blue square" width="224">' in card
    assert "was not measured" in card and "| images | `causal`: " in card
    given = data.parent / "0.png"
    result = push(model, "me/m", license="mit", prompt="what is ?", image=given, dry_run=True)
    assert {FILE, "processor_config.json", "chat_template.jinja"} <= result.files.keys()
    assert "drawn" not in result.card and "about this picture" in result.card
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    raw = coded(example_of(load_checkpoint(str(model)), given).picture)
    assert b"SECRET" not in raw and max(Image.open(io.BytesIO(raw)).size) == 512
    (folder / FILE).write_bytes(raw)
    block = first_block(result.card).replace(f"https://huggingface.co/me/m/resolve/main/{FILE}",
                                             str(folder / FILE))  # fmt: skip
    said = answer_of(block, folder)
    shown = result.card.partition("about this picture")[2].split("\n\n")[1].strip()
    assert said.endswith(shown) and "what is ?" in said
    assert PROMPT in card


def test_a_model_that_knows_the_embedded_scenes_is_asked_about_them(model):
    checkpoint = load_checkpoint(str(EYES))
    material = material_for(EYES, checkpoint, None, "text", 8)
    assert material.data == "the embedded scenes" and len(material.questions) == 8
    (row,) = scenes(1, 1, "held_out")
    assert material.questions[0].answer == right_answer(row)
    assert material.questions[0].images and material.questions[0].ids[0] == 1
    example = example_of(checkpoint, None)
    assert example.picture.size == (32, 32) and "CC BY 4.0" in example.origin


def test_a_download_with_another_processor_is_told(model, monkeypatch):
    checkpoint = load_checkpoint(str(model))
    logits, seen = verifying.fixed_logits(checkpoint), verifying.seen_logits(checkpoint)

    def downloaded(change):
        def download(_name, _commit, folder):
            shutil.copytree(model, folder)
            (folder / FILE).write_bytes(coded(example_of(checkpoint, None).picture))
            file = folder / "processor_config.json"
            values = json.loads(file.read_text())
            change(values)
            file.write_text(json.dumps(values))
            return folder

        monkeypatch.setattr(verifying, "download", download)
        return verifying.verify("me/m", "c", logits, {}, seen)

    assert downloaded(lambda values: None) < 1e-4
    with pytest.raises(Ar2DiffError, match="shown an image, has different logits"):
        downloaded(lambda values: values["image_processor"].update(image_mean=[0.1, 0.1, 0.1]))
