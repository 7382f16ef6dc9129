"""Prompts, chats and requests with images, against the stock class and its processor."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from served import ask, in_process
from test_custom_generate import BLOCKER
from test_engine import Reader
from vision import ClassAlbum, llava_folder, llava_tokenizer, picture
from vision_classes import MASK, vision_class

from ar2diff.api.model import DiffusionModel
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.images import codes_of
from ar2diff.core.spec import IMAGE_FORMAT, Spec
from ar2diff.evaluation import check as checking
from ar2diff.generation import complete
from ar2diff.generation.chat import Chat
from ar2diff.generation.complete import begin, load
from ar2diff.generation.events import Answer, Note, Problem
from ar2diff.generation.images import album_of, encode_prompt
from ar2diff.generation.prompts import split_gaps
from ar2diff.serving.engine import Engine
from ar2diff.serving.events import Committed
from ar2diff.serving.jobs import job_of
from ar2diff.serving.service import Service
from ar2diff.training.adapt import adapt

NEW = 10
MASKED = 5  # id of the mask of the Llava
STOCK = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, file = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder)
part = {"type": "image", "image": Image.open(file)}
messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is ?"}]}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
for mode in ("speculative", "diffusion"):
    out = model.generate(**inputs, max_new_tokens=10, mode=mode)
    print(out[0, inputs["input_ids"].shape[1] :].tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted Llava. Never write to it."""
    home = tmp_path_factory.mktemp("seeing")
    base = llava_folder(home / "base", initializer_range=0.6)
    values = ["train.max_steps=0", "convert.block_length=4", "data.max_length=128"]
    adapt(str(base), load_recipe(None, values), home / "model")
    for number in range(4):
        picture(number).save(home / "model" / f"{number}.png")
    return home / "model"


@pytest.fixture(scope="module")
def model(folder):
    return DiffusionModel(load(str(folder)))


def stock(model, text, images):
    """What the stock class writes."""
    processor = model.checkpoint.processor
    inputs = processor(text=[text], images=images, return_tensors="pt")
    options = {"suppress_tokens": model.model.generation_config.suppress_tokens}
    out = type(model.model).generate(
        model.model, **inputs, max_new_tokens=NEW, do_sample=False, **options
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def parts(*images, text="what is ?"):
    given = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*given, {"type": "text", "text": text}]}]


def data_uri(number):
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_prompt_with_images_is_what_its_processor_makes_of_it(model, folder):
    two, several = "{image} and {image} ?", [data_uri(2), picture(3)]
    prompts = ["what is {image} in", "how many ?", two, two, "what is ?"]
    images = [[picture(0)], [str(folder / "1.png")], several, several[::-1], []]
    texts = ["what is <image> in", "<image>how many ?", *["<image> and <image> ?"] * 2, "what is ?"]
    shown = [[picture(0)], [picture(1)], [picture(2), picture(3)], [picture(3), picture(2)], None]
    wanted = [stock(model, text, some) for text, some in zip(texts, shown, strict=True)]
    for mode in ("ar", "speculative"):
        found = model.generate(prompts, images=images, mode=mode, max_new_tokens=NEW)
        assert [result.token_ids for result in found] == wanted
        assert [result.prompt for result in found] == prompts
    denoised = [
        model.generate(p, images=i, mode="diffusion", max_new_tokens=NEW).token_ids
        for p, i in zip(prompts, images, strict=True)
    ]
    found = model.generate(prompts, images=images, mode="diffusion", max_new_tokens=NEW)
    assert [result.token_ids for result in found] == denoised
    other = model.generate(prompts[0], images=[picture(1)], mode="ar", max_new_tokens=NEW)
    assert other.token_ids != wanted[0]
    streamed = model.stream(prompts[1], images=images[1], mode="ar", max_new_tokens=NEW)
    assert "".join(streamed) == prompts[1] + model.tokenizer.decode([9, *wanted[1]], True)[3:]


def test_gaps_beside_images_are_filled_by_what_they_show(model):
    asked = "what is {image} in {mask:3} ?"
    spec, album = model.spec, album_of(model.checkpoint)
    ids = encode_prompt(model.checkpoint, spec, split_gaps(asked), [picture(0)], album)
    whole = encode_prompt(
        model.checkpoint, spec, ["what is {image} in a a a ?"], [picture(0)], album
    )
    assert ids == [MASKED if n in range(19, 22) else one for n, one in enumerate(whole)]
    one, other = (model.generate(asked, images=[picture(n)]) for n in (0, 1))
    assert one.text == f"what is {{image}} in {one.filled[0]} ?"
    assert one.filled != other.filled
    filled = model.infill("what is", "in {image}", length=[2, 3], images=[picture(0)])
    assert filled.text.endswith("in {image}")


def test_messages_with_images_are_what_the_processor_makes_of_them(model):
    checkpoint = model.checkpoint
    messages = [
        *parts(picture(0), picture(1)),
        {"role": "assistant", "content": "a b"},
        *parts(picture(0), text="and ?"),
    ]
    inputs = checkpoint.processor.apply_chat_template(
        [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m["content"], str)
            else m
            for m in messages
        ],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    out = checkpoint.model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False,
        suppress_tokens=checkpoint.model.generation_config.suppress_tokens,
    )  # fmt: skip
    found = model.chat(messages, mode="ar", max_new_tokens=NEW)
    assert found.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert found.token_ids != model.chat(parts(picture(1)), mode="ar", max_new_tokens=NEW).token_ids


def test_a_file_of_prompts_has_its_images_beside_it(model, folder, run_both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "what is ?", "image": "0.png"},
        {"prompt": "{image} and {image} ?", "images": ["1.png", str(folder / "2.png")]},
        {"prompt": "how many ?"},
    ]
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, said = run_both("generate", folder, "--prompts-file", file, "--mode", "ar",
                               "--max-new-tokens", NEW, "--json")  # fmt: skip
    assert code == 0, said
    images = [[picture(0)], [picture(1), picture(2)], []]
    prompts = [row["prompt"] for row in rows]
    wanted = model.generate(prompts, images=images, mode="ar", max_new_tokens=NEW)
    assert [row["text"] for row in json.loads(out)["results"]] == [r.text for r in wanted]


def test_compared_and_streamed_with_an_image(model, folder, run_both):
    image = folder / "0.png"
    code, out, _ = run_both("generate", folder, "--prompt", "what is {image} in", "--image", image,
                            "--compare", "--max-new-tokens", NEW)  # fmt: skip
    text = model.generate("what is {image} in", images=[image], mode="ar", max_new_tokens=NEW).text
    assert (code, out) == (0, f"what is {{image}} in{text}\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "{image} ?"], "the prompt has 1 {image}, but there are no images"),
        (["--prompt", "?", "--image", "0", "--prompt", "{image} {image}"], "but there is 1 image"),
        (["--prompt", "?", "--image", "none"], "none.png does not exist"),
        (["--prompt", "?", "--image", "broken"], "broken.png is no image of a known format"),
        (["--prompt", "?", "--image", "huge"], "has 9000 x 9000 pixels, more than"),
        (["--prefix", "{image}", "--length", "2"], "the prompt has 1 {image}"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    folder, run_both, monkeypatch, tmp_path, arguments, told
):
    def loaded(*_, **__):
        raise AssertionError

    monkeypatch.setattr("ar2diff.load", loaded)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    from PIL import Image

    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    picture(0).save(tmp_path / "0.png")
    names = ("0", "none", "broken", "huge")
    arguments = [tmp_path / f"{a}.png" if a in names else a for a in arguments]
    code, _, said = run_both("generate", folder, *arguments)
    assert code == 2 and told in said and said.count("\n") == 2
    code, _, said = run_both("generate", "ar2diff/demo/model", "--mode", "ar", "--prompt", "?",
                             "--image", tmp_path / "0.png")  # fmt: skip
    assert code == 2 and "reads text alone" in said


def test_a_text_that_names_the_placeholder_is_refused(model):
    for call in (
        lambda: model.generate("<image> ?", images=[picture(0)]),
        lambda: model.generate("<image> ?"),
        lambda: model.chat(parts(picture(0), text="<image>")),
        lambda: model.chat([{"role": "user", "content": "<image>"}]),
        lambda: model.generate(["?", "?"], images=[[picture(0)]]),
    ):
        with pytest.raises(Ar2DiffError, match=r"contains <image>|1 entries for 2 prompts"):
            call()


def test_a_chat_keeps_its_images_and_gives_them_back(model, folder, tmp_path):
    chat = Chat(model.checkpoint, {"max_new_tokens": NEW, "mode": "ar", "eos_token_id": [-1]})

    def say(line):
        return [event for event in chat.events(line) if isinstance(event, Answer | Note | Problem)]

    assert "none.png does not exist" in say("/image none.png")[0].what
    image = str(folder / "0.png")
    say(f"/image {image}")
    first = say("what is ?")[-1].result.text
    settings = {"mode": "ar", "max_new_tokens": NEW, "eos_token_id": [-1]}
    assert first == model.chat(parts(picture(0)), **settings).text
    second = say("and ?")[-1].result.text
    talk = [
        *parts(picture(0)),
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and ?"},
    ]
    assert second == model.chat(talk, **settings).text
    say("/undo")
    assert "its images go with your next message" in say("/undo")[0].text
    assert say("how many ?")[-1].result.text == model.chat(
        parts(picture(0), text="how many ?"), **settings
    ).text  # fmt: skip
    say(f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert saved[0]["content"] == [
        {"type": "image", "image": image},
        {"type": "text", "text": "how many ?"},
    ]
    assert model.chat(saved[:1], **settings).text == saved[1]["content"]


@pytest.fixture(scope="module")
def server(model):
    engine = Engine(model.checkpoint)
    engine.start()
    service = Service(model.checkpoint, engine, "seeing")
    with in_process(service) as url:
        yield SimpleNamespace(url=url, engine=engine, service=service)
    engine.close(drain=False)


def asked(*urls, text="what is ?", **more):
    given = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*given, {"type": "text", "text": text}]}]
    return {"messages": messages, "max_tokens": NEW, **more}


def test_a_server_answers_about_images_and_confuses_none(server, model):
    listed = json.loads(ask(server.url, "/v1/models")[2])["data"][0]["ar2diff"]
    assert listed["images"] is True
    for mode in ("speculative", "diffusion"):
        for numbers in ((0,), (1,), (0, 1), (1, 0), (), (0,)):  # whose placeholders are alike
            body = asked(*map(data_uri, numbers), mode=mode, n=2)
            choices = json.loads(ask(server.url, "/v1/chat/completions", "POST", body)[2])[
                "choices"
            ]
            wanted = model.chat(parts(*map(picture, numbers)), mode=mode, max_new_tokens=NEW).text
            assert [choice["message"]["content"] for choice in choices] == [wanted, wanted]
    assert server.engine.stats.reused > 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (asked("https://a.b/c.png"), "names an image on the web, but this server fetches none"),
        (asked("/etc/passwd"), "names an image elsewhere"),
        (asked("file:///etc/passwd"), "names an image elsewhere"),
        (asked("data:image/png;base64,AAAA"), "no image of a known format"),
        (asked("data:image/png;base64,A-A"), "not valid base64"),
        (asked(*[data_uri(0)] * 17), "has 17 images, of which a request may have 16"),
        (asked(data_uri(0), text="<image>"), "contains <image>"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "contains <image>"),
    ],
)
def test_a_server_refuses_what_is_no_image_or_too_much(server, body, told):
    status, _, answer = ask(server.url, "/v1/chat/completions", "POST", body)
    error = json.loads(answer)["error"]
    assert status == 400 and told in error["message"] and error["param"].startswith("messages")


def test_a_server_has_limits_of_its_own(server, monkeypatch):
    limits = server.service.limits
    monkeypatch.setattr(server.service, "limits", type(limits)(pixels=400))
    status, _, answer = ask(server.url, "/v1/chat/completions", "POST", asked(data_uri(0)))
    assert status == 400 and b"480" not in answer and b"24 x 20 pixels, more than 400" in answer
    monkeypatch.setattr(server.service, "limits", type(limits)(all_pixels=900))
    for count, wanted in ((1, 200), (2, 400)):  # as often as it is named
        body = asked(*[data_uri(0)] * count)
        status, _, answer = ask(server.url, "/v1/chat/completions", "POST", body)
        assert status == wanted
    assert b"the images have too many pixels together" in answer


@pytest.mark.parametrize("cached", [True, False])  # without, images are read in each forward
def test_rows_join_and_leave_a_batch_and_take_their_images_along(model, cached):
    checkpoint, settings = model.checkpoint, {"mode": "ar", "eos_token_id": [-1]}
    settings |= {} if cached else {"cache_implementation": "none"}
    engine, album = Engine(checkpoint, prefix_bytes=0), album_of(checkpoint)
    rows, readers, wanted = [], [], []
    for number, length in enumerate((4, 12, 7, 9)):
        images = [picture(n) for n in ((0,), (1, 2), (), (2,))[number]]
        text = "{image} " * len(images) + "what is ?"
        ids = encode_prompt(checkpoint, checkpoint.read_as, [text], images, album)
        job = job_of(checkpoint, ids, {**settings, "max_new_tokens": length}, album=album)
        wanted.append(model.generate(text, images=images, max_new_tokens=length, **settings))
        rows.append(job)
        readers.append(Reader())
    for job, reader in zip(rows, readers, strict=True):
        engine.submit([job], [reader])
        engine.turn()
    held = []
    while engine.batches or engine.stats.waiting:
        engine.turn()
        for batch in engine.batches:
            batch.compact()
            sight = batch.decoder.canvas.sight
            held.append(0 if sight is None else len(sight.images.pictures))
    assert [r.result.token_ids for r in readers] == [w.token_ids for w in wanted]
    assert max(held) <= 2 < 4  # of the second row; picture 2 is held once, and gone ones not at all


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen2_vl"])
def test_beginnings_that_are_read_in_both_directions_are_not_mixed_up(name):
    seen = vision_class(name)
    window = "dropped" if seen.reach == "prefix" else "kept" if name == "gemma3" else None
    spec = Spec(IMAGE_FORMAT, "mask", MASK, "causal_context", 4, "same", True, window, 128,
                images=seen.reach)  # fmt: skip
    seen.model.config.diffusion, seen.model.config.mask_token_id = spec.to_dict(), MASK
    checkpoint = Checkpoint(None, seen.model, llava_tokenizer(), spec, {})
    checkpoint._token_ids = frozenset(range(57)) - {0, 1, 2}
    album = ClassAlbum(seen)
    album.shots._digests = {n: bytes([n]) * 16 for n in range(8)}

    def shown(number):
        return codes_of(number, album.header(number).size)

    head = [1, *[7] * 25]
    prompts = [
        [*head, *shown(0), *shown(1), 8],  # in Gemma 3 the first image reads the second one
        [*head, *shown(0), 8, 9],
        [*head, *shown(0), 8, 10],
        [*head, *shown(1), 8, 9],
        [*head, *shown(0), 8, 9],
    ]
    engine, wanted = Engine(checkpoint, prefix_bytes=1 << 24), []
    reused = []
    for ids in prompts:
        settings = {"mode": "ar", "max_new_tokens": 12, "eos_token_id": [-1]}
        options = complete.settings_of(checkpoint, settings)
        canvas, states = begin(checkpoint, *options, [ids], album=album)
        for _ in states:
            pass
        reader = Reader()
        engine.submit([job_of(checkpoint, ids, settings, album=album)], [reader])
        before = engine.stats.reused
        while engine.batches or engine.stats.waiting:
            engine.turn()
        assert reader.result.token_ids == canvas.new_ids(0)
        sure = [x for e in reader.events if isinstance(e, Committed) for x in e.logprobs]
        assert sure == pytest.approx(canvas.logprob[0, len(ids) :][: len(sure)].tolist(), abs=1e-4)
        wanted.append(canvas.new_ids(0))
        reused.append(engine.stats.reused - before)
    assert len({*map(tuple, wanted)}) > 2
    size, start = len(shown(0)), len(head)
    if seen.reach == "prefix":  # of which no part is the same in another prompt
        assert reused == [0] * 5
    else:
        assert reused[4] >= start + size
        cut = [count for count in reused if start < count < start + size]
        assert seen.reach == "causal" or not cut


def test_a_process_without_ar2diff_answers_about_a_picture(model, folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    out = subprocess.run(
        [sys.executable, "-c", STOCK, folder, folder / "0.png"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    one, other = (
        model.chat(parts(picture(0)), mode=mode, max_new_tokens=NEW).token_ids
        for mode in ("speculative", "diffusion")
    )
    assert out.stdout == f"{one}\n{other}\n"
    assert one != other


def test_check_tells_how_images_are_read_and_which_package_is_missing(folder, monkeypatch):
    found = {finding.what: finding.ok for finding in checking.check(folder).findings}
    (seen,) = (what for what in found if "it sees images" in what)
    assert seen == (
        "it sees images (causal: read from left to right, as text), prepared by LlavaProcessor"
    )
    (lossless,) = (what for what in found if "the lossless mode" in what)
    assert "10 of 10 texts" in lossless and "2 of them follow an image" in lossless
    assert found[seen] and found[lossless]

    def missing(*_, **__):
        raise ImportError("requires the num2words library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing)
    result = checking.check(folder)
    (told,) = (finding.what for finding in result.findings if "it sees images" in finding.what)
    assert "needs the package num2words" in told and not result.ok


def test_likeness_of_the_next_token_in_a_golden_run_is_that_of_the_ar_mode(model):
    from ar2diff.evaluation.lossless import _scores

    checkpoint, album = model.checkpoint, album_of(model.checkpoint)
    ids = encode_prompt(checkpoint, model.spec, ["{image} what"], [picture(0)], album)
    spec, options = complete.settings_of(checkpoint, {"mode": "ar", "max_new_tokens": 3})
    canvas, states = begin(checkpoint, spec, options, [ids], album=album)
    canvas.alternatives = 2
    for _ in states:
        pass
    new = canvas.new_ids(0)
    scores = _scores(checkpoint, ids, new[:2], album).masked_fill(checkpoint.suppressed, -1e9)
    found = torch.log_softmax(scores, -1).topk(2)
    assert found.indices.tolist() == [one for one, _ in canvas.likeliest[0][len(ids) + 2]]


def test_answers_about_images_are_counted(model, folder, run_both):
    asked = [parts(f"{n}.png") for n in (0, 1, 2)]
    wanted = [
        model.chat(parts(picture(n)), mode="ar", max_new_tokens=NEW).text
        for n in (0, 1, 1)  # the last is another picture's
    ]
    assert wanted[1] not in model.chat(parts(picture(2)), mode="ar", max_new_tokens=NEW).text
    rows = [
        {"messages": [*question, {"role": "assistant", "content": text.strip()}]}
        for question, text in zip(asked, wanted, strict=True)
    ]
    file = folder / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, said = run_both("eval", folder, "--answers", file, "--max-new-tokens", NEW, "--json")
    assert code == 0, said
    found = json.loads(out)
    assert (found["rows"], found["exact"], found["mode"]) == (3, 2, "speculative")
    code, _, said = run_both("eval", "ar2diff/demo/model", "--answers", file, "--mode", "ar")
    assert code == 2 and "reads text alone" in said
