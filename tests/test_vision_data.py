"""Rows with images: how they are read and tokenized, laid out and trained on."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle

import pytest
import torch
import transformers as hf
from accelerate.utils import send_to_device
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from vision import ClassAlbum, llava_folder, picture, picture_rows
from vision_classes import CONFIGS, IMAGE, MASK, VisionClass, vision_class

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.processor import take_tokenizer
from ar2diff.config.recipe import Recipe
from ar2diff.core.attention import PADDING
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.forward import output_at
from ar2diff.core.images import codes_of, keys_in, seeing
from ar2diff.core.noises import Mask
from ar2diff.core.spec import IMAGE_FORMAT, Spec
from ar2diff.data.album import Album
from ar2diff.data.conversations import Conversations, read_conversations, tokenize_conversations
from ar2diff.data.documents import Collator, DocumentPart
from ar2diff.data.images import Shot, Shots
from ar2diff.data.turns import PackedConversations, TurnCollator, conversation_parts
from ar2diff.diffusion.task import turn_task

BLOCK = 4
ENDS = frozenset([2])


def recipe_of(**sections) -> Recipe:
    values = {"convert": {"block_length": BLOCK}, "data": {"max_length": 128}} | sections
    return Recipe.model_validate(values)


def chat(album: ClassAlbum) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation with two images and two answers, the first of which begins
    in the block that its image ends in."""
    one, two = (codes_of(key, album.header(key).size) for key in (0, 1))
    head = [1, *[8] * (-(1 + len(one) + 2) % BLOCK + 2), *one, 5]
    head = head if len(head) % BLOCK else [1, 8, *head[1:]]
    ids = [*head, 7, 9, 2, 6, *two, 10, 11, 12, 13, 14, 2]
    labels = [-100] * len(ids)
    for start, size in ((len(head), 3), (len(ids) - 5, 5)):
        labels[start : start + size] = ids[start : start + size]
    return ids, labels


@pytest.fixture(scope="module", params=list(CONFIGS))
def seen(request) -> VisionClass:
    return vision_class(request.param)


def spec_of(seen: VisionClass) -> Spec:
    typed = getattr(seen.model.config.get_text_config(), "sliding_window", None)
    return Spec(
        IMAGE_FORMAT, "mask", MASK, "causal_context", BLOCK, "same", True,
        None if typed is None else "kept", 128, images=seen.reach,
    )  # fmt: skip


def read(seen: VisionClass, batch: dict) -> torch.Tensor:
    """Logits [B, S, V] of all slots of a batch."""
    task, (rows, slots) = turn_task(batch, spec_of(seen)), batch["input_ids"].shape
    with torch.no_grad(), seeing(task.images):
        found = output_at(
            seen.model, torch.arange(rows * slots), **task.inputs(seen.model, "kept")
        ).logits
    return found.view(rows, slots, -1)


def batch_of(seen: VisionClass, album: ClassAlbum, chats, recipe=None) -> dict:
    recipe = recipe or recipe_of()
    parts = [
        part for ids, labels in chats for part in conversation_parts(ids, labels, 0, ENDS, recipe)
    ]
    noise = Mask(mask=MASK, ids=torch.arange(55))
    return TurnCollator(recipe, noise, album, seen.reach)([(0, parts)])


def test_the_clean_copy_is_the_stock_forward_and_noise_sees_its_own_image(seen):
    album = ClassAlbum(seen)
    ids, labels = chat(album)
    plain = [1, 5, 6, 7, 9, 2]
    text = plain, [-100] * 3 + plain[3:]
    batch = batch_of(seen, album, [text, (ids, labels)])
    found = read(seen, batch)[0]
    clean = ~batch["noisy"][0] & (batch["doc"][0] == 1)
    start = next(n for n, label in enumerate(labels) if label != -100)
    words = [IMAGE if one < 0 else one for one in ids]
    inputs = {"input_ids": torch.tensor([words]), **seen.pixels([0, 1])}
    if seen.is_qwen:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if seen.reach == "image":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if seen.reach == "prefix":
        inputs["token_type_ids"] = (torch.arange(len(ids)) >= start).long()[None]
    with torch.no_grad():
        stock = seen.model(**inputs, use_cache=False).logits[0]
    assert torch.allclose(found[clean], stock, atol=1e-4 * float(stock.abs().max()))
    own = batch["noisy"][0] & (batch["doc"][0] == 1)
    assert (batch["input_ids"][0][own] < 0).any()  # the grid begins within an image
    assert not (batch["scored"] & (batch["input_ids"] < 0)).any()
    assert not (batch["ar"] & (batch["target"] == IMAGE)).any()
    assert batch["target"].min() >= 0
    # Another second image moves what is behind it alone.
    codes = codes_of(1, album.header(1).size)
    if album.header(1).size == album.header(4).size:
        other = [codes_of(4, len(codes))[codes.index(i)] if i in codes else i for i in ids]
        moved = read(seen, batch_of(seen, album, [text, (other, labels)]))[0] - found
        moved = (moved.abs().amax(-1) > 1e-5 * found.abs().max()) & (batch["doc"][0] == 1)
        behind = batch["pos"][0] >= (len(ids) - 5) // BLOCK * BLOCK
        assert moved[own & behind].all() and not moved[own & ~behind].any()


def test_a_block_with_noise_reads_what_decoding_reads(seen):
    """Each noisy block, alone behind its clean context."""
    album = ClassAlbum(seen)
    ids, labels = chat(album)
    batch = batch_of(seen, album, [(ids, labels)])
    found = read(seen, batch)[0]
    noisy, clean = (batch["noisy"][0]).nonzero()[:, 0], (~batch["noisy"][0]).nonzero()[:, 0]
    for first in range(0, len(noisy), BLOCK):
        own = noisy[first : first + BLOCK]
        start = int(batch["pos"][0, own[0]])
        if seen.reach == "prefix" and start < len(ids) - 8:
            continue  # the prefix is read to its end, which is in the block
        if seen.reach == "image" and (batch["input_ids"][0, own] < 0).any():
            continue
        kept = torch.cat([own, clean[:start]])
        alone = {
            name: x[:, kept] if name in ALONG_SLOTS and x.dim() > 1 else x
            for name, x in batch.items()
        }
        if "until" in alone:
            alone["until"] = (
                alone["until"].clamp(max=max(start - 1, 0)) if start else alone["until"]
            )
        assert torch.allclose(
            read(seen, alone)[0, :BLOCK], found[own], atol=1e-4 * float(found.abs().max())
        )


ALONG_SLOTS = ("input_ids", "doc", "pos", "noisy", "start", "block", "until", "places", "reads",
               "target", "previous")  # fmt: skip


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load_checkpoint(str(llava_folder(tmp_path_factory.mktemp("llava"))))


@pytest.fixture
def album(llava):
    """The album of a run of its own."""
    return Album(llava.processor, llava.model)


def rows_of(tmp_path, *rows: dict) -> Conversations:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_conversations(recipe_of(data={"sources": [str(file)]}))


def asked(*parts: object, answer: str = "a b") -> dict:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": answer},
        ]
    }


def test_tokens_are_those_of_the_processor(llava, album, tmp_path):
    recipe = recipe_of(data={"sources": [str(picture_rows(tmp_path, 3))]})
    data = read_conversations(recipe)
    rows = tokenize_conversations(data, llava.tokenizer, recipe, album)
    for number, (ids, labels) in enumerate(zip(rows.ids, rows.labels, strict=True)):
        raw = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[number])["messages"]
        typed = [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m["content"], str)
            else {**m, "content": [{"type": "image", "image": picture(number)}, m["content"][1]]}
            for m in raw
        ]
        stock = llava.processor.apply_chat_template(
            typed, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        (wanted,), (learned,) = stock["input_ids"], stock["assistant_masks"]
        assert [4 if one < 0 else one for one in ids.tolist()] == wanted
        assert [int(one != -100) for one in labels] == learned and sum(learned) == 7
        key = keys_in(torch.tensor(ids))
        assert len(key) == 1 and ids[ids < 0].tolist() == codes_of(key[0], 16)
        pixels = llava.processor(text="<image>", images=[picture(number)], return_tensors="pt")
        assert torch.equal(album.picture(key[0]).inputs["pixel_values"], pixels["pixel_values"])
    assert ids.dtype.itemsize == 8
    text = rows_of(tmp_path, asked({"type": "text", "text": "what is ?"}))
    assert not len(text.shots)
    assert tokenize_conversations(text, llava.tokenizer, recipe, album).ids[0].dtype.itemsize == 4


def test_images_stand_in_their_order_and_are_never_learned(llava, album, tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    one, two, three = ({"type": "image", "path": f"{n}.png"} for n in range(3))
    words = {"type": "text", "text": "what ?"}
    chat = asked(one, words, two)
    chat["messages"] += [
        {"role": "user", "content": [three]},
        {"role": "assistant", "content": "c"},
    ]
    prompt = {"prompt": "<image> a <image> ", "completion": "b", "images": ["2.png", "0.png"]}
    recipe = recipe_of(data={"assistant_only": False})
    keys = []
    for row in (chat, prompt):
        data = rows_of(tmp_path, row)
        (ids,), (labels,) = (
            x for x in vars(tokenize_conversations(data, llava.tokenizer, recipe, album)).values()
            if isinstance(x, list)
        )  # fmt: skip
        keys.append(keys_in(torch.tensor(ids)))
        assert (labels[ids < 0] == -100).all() and (labels[-2:] == ids[-2:]).all()
    known = [Shots().add(Shot(tmp_path / f"{n}.png"), "") for n in range(3)]
    assert keys == [known, [known[2], known[0]]]
    sizes = [album.shots.sizes[key] for key in known]
    assert sizes == [picture(n).size for n in range(3)]


def test_the_same_picture_is_one_image_in_every_form(llava, album, tmp_path):
    image, coded = picture(0), io.BytesIO()
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    image.save(coded, "WEBP", lossless=True)
    data = base64.b64encode(coded.getvalue()).decode()
    url, words = f"data:image/webp;base64,{data}", {"type": "text", "text": "what ?"}
    other = {"role": "assistant", "content": "a b"}
    rows = [
        asked({"type": "image", "path": "a.png"}, words),
        asked({"type": "image", "image": str(tmp_path / "b.bmp")}, words),
        asked({"type": "image", "url": (tmp_path / "a.png").as_uri()}, words),
        asked({"type": "image", "base64": data}, words),
        asked({"type": "image_url", "image_url": {"url": url}}, words),
        asked({"type": "image"}, words) | {"images": ["a.png"]},
        {"image": "b.bmp", "conversations": [
            {"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a b"},
        ]},
        {"images": [{"bytes": None, "path": "a.png"}],
         "messages": [{"role": "user", "content": "<image>what ?"}, other]},
    ]  # fmt: skip
    found = rows_of(tmp_path, *rows)
    assert len(found.shots) == 1 and not found.unread
    ids = tokenize_conversations(found, llava.tokenizer, recipe_of(), album).ids
    assert all(row.tolist() == ids[0].tolist() for row in ids)
    assert rows_of(tmp_path, asked({"type": "image", "path": "a.png"})).shots.sizes == {
        next(iter(found.shots)): image.size
    }


def test_rows_of_parquet_and_prompts_with_images(llava, album, tmp_path):
    import datasets

    image = picture(1)
    rows = datasets.Dataset.from_dict(
        {"image": [image, image], "q": ["what ?", "how ?"], "a": "ab"}
    )
    rows.to_parquet(tmp_path / "data.parquet")
    recipe = recipe_of(
        data={
            "sources": [str(tmp_path / "data.parquet")],
            "columns": {"prompt": "<s> {image} {q} ", "completion": "a"},
        }
    )
    data = read_conversations(recipe)
    found = tokenize_conversations(data, llava.tokenizer, recipe, album)
    whole = llava.processor(text="<s> <image> how ? b</s>", images=[image])["input_ids"][0]
    assert [4 if one < 0 else one for one in found.ids[1].tolist()] == whole
    learned = found.labels[1][found.labels[1] != -100].tolist()
    assert llava.tokenizer.decode(learned) == "b </s>"


def test_turned_and_moving_pictures_are_read_as_they_are_seen(tmp_path):
    turned = picture(2)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    turned.save(tmp_path / "a.png", exif=exif)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    assert Shot(tmp_path / "a.png").pixels().size == turned.size[::-1]
    assert Shot(tmp_path / "b.gif").pixels().getpixel((0, 0)) == (255, 0, 0)
    grey = Image.new("I;16", (8, 8), 128 << 8)  # of 16 bits
    grey.save(tmp_path / "c.png")
    assert Shot(tmp_path / "c.png").pixels().getpixel((0, 0)) == (128, 128, 128)


def bomb(path, width=15_000):
    """A picture of many megapixels in a few hundred bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, 10_000, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_images_that_cannot_be_read_are_named(tmp_path):
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    picture(0).save(tmp_path / "exotic.tiff")
    bomb(tmp_path / "bomb.png")
    bomb(tmp_path / "larger.png", 60_000)
    for value, said in (
        ("none.png", "none.png does not exist"),
        ("cut.png", "cut.png is broken"),
        ("text.png", "text.png is no image of a known format"),
        ("exotic.tiff", "exotic.tiff is no image of a known format"),
        ("bomb.png", "bomb.png has 15000 x 10000 pixels"),
        ("larger.png", "larger.png has more pixels than"),
        ("~nobody-of-that-name/a.png", "a.png does not exist"),
        ("https://a.b/c.png", "is on the web"),
        ("data:image/png;base64,??", "not valid base64"),
        (7, "an image is a number"),
    ):
        with pytest.raises(Ar2DiffError, match="row 2") as refused:
            rows_of(
                tmp_path, asked({"type": "image", "path": "good.png"}),
                asked({"type": "image", "image": value}),
            )  # fmt: skip
        assert said in refused.value.what and refused.value.fix


def test_rows_whose_images_have_no_place_are_refused(llava, album, tmp_path):
    picture(0).save(tmp_path / "0.png")
    named = {"type": "image", "path": "0.png"}
    for row, said in (
        (asked({"type": "image"}), "0 images in its columns, but 1 places"),
        (asked({"type": "image"}, {"type": "image"}) | {"images": ["0.png"]}, "1 images"),
        (asked({"type": "video", "path": "0.mp4"}), "only reads text and images"),
        (asked({"type": "image_url"}), "names no image"),
        (asked({"type": "text", "text": "a"}) | {"image": "0.png"}, "no place for one"),
        (asked({"type": "text", "text": "<image>"}), "cannot render it|1 placeholder"),
        (asked(named, {"type": "text", "text": "<image>"}), "cannot render it|placeholder"),
    ):
        with pytest.raises(Ar2DiffError, match=said) as refused:
            data = rows_of(tmp_path, row)
            tokenize_conversations(data, llava.tokenizer, recipe_of(), album)
        assert "row 1" in refused.value.what
    changed = Album(llava.processor, llava.model)
    tokenize_conversations(data := rows_of(tmp_path, asked(named)), llava.tokenizer, recipe_of(),
                           changed)  # fmt: skip
    picture(1).save(tmp_path / "0.png")
    with pytest.raises(Ar2DiffError, match="has changed since it was read"):
        changed.pixels(*data.shots)
    with pytest.raises(Ar2DiffError, match="row 1: the model's processor refuses it"):
        changed.read("<image><image>", (), "row 1")
    with pytest.raises(Ar2DiffError, match="the model reads text alone"):
        tokenize_conversations(rows_of(tmp_path, asked(named)), llava.tokenizer, recipe_of())
    ignored = rows_of(tmp_path, asked({"type": "text", "text": "a"}) | {"image": "0.png"})
    assert len(tokenize_conversations(ignored, llava.tokenizer, recipe_of())) == 1


def test_a_cut_never_loses_an_image():
    image = codes_of(5, 6)
    ids = [1, 5, 6, 7, 2, *image, 8, 9, 2]
    labels = [-100, -100, -100, 7, 2, *[-100] * 7, 9, 2]
    for length in (4, 8, 12, 16):  # before the image, in it, and behind it twice
        recipe = recipe_of(data={"max_length": length, "overlong": "truncate"})
        parts = conversation_parts(ids, labels, 0, ENDS, recipe)
        assert bool(parts) == (length > 8)
        rows = PackedConversations([{"input_ids": ids, "labels": labels}], ENDS, recipe)
        assert rows.answers().torn == (length <= 8)


def test_batches_go_through_workers_and_keys_tell_pictures_apart(llava, album, tmp_path):
    recipe = recipe_of(data={"sources": [str(picture_rows(tmp_path, 3))], "max_length": 64})
    rows = tokenize_conversations(read_conversations(recipe), llava.tokenizer, recipe, album)
    collator = TurnCollator(recipe, Mask(mask=5, ids=torch.arange(6, 31)), album, "causal")
    packed = PackedConversations(rows.dataset(), ENDS, recipe)
    items = [(n, packed.parts(n, 0)) for n in range(3)]
    batch, again = collator(items), pickle.loads(pickle.dumps(collator))(items)
    for name, x in batch.items():
        assert name == "images" or torch.equal(x, again[name])
    numbers = -batch["input_ids"][~batch["noisy"] & (batch["input_ids"] < 0)]
    assert numbers.tolist() == [*range(1, 49)] and batch["images"].count == 48
    sent = send_to_device(batch, torch.device("cpu"))
    assert sent["images"] is batch["images"]
    assert len({tuple(ids[ids < 0].tolist()) for ids in rows.ids}) == 3


def test_a_batch_without_images_gets_one_that_nothing_reads(llava, album, tmp_path):
    picture(0).save(tmp_path / "0.png")
    data = rows_of(
        tmp_path,
        asked({"type": "text", "text": "what ?"}),
        asked({"type": "image", "path": "0.png"}),
    )
    recipe = recipe_of()
    rows = tokenize_conversations(data, llava.tokenizer, recipe, album)
    packed = PackedConversations(rows.dataset(), ENDS, recipe)
    ghost = keys_in(torch.tensor(rows.ids[1]))[0]
    noise = Mask(mask=5, ids=torch.arange(6, 31))
    plain, haunted = (
        TurnCollator(recipe, noise, album, "causal", key)([(0, packed.parts(0, 0))])
        for key in (None, ghost)
    )
    length = plain["doc"].shape[1]
    assert "images" not in plain and haunted["images"].count == 16
    assert (haunted["doc"][:, length:] == PADDING).all()
    for name in ("scored_at", "ar_at", "divisor", "tokens"):
        assert torch.equal(plain[name], haunted[name])
    with_images = TurnCollator(recipe, noise, album, "causal", ghost)([(0, packed.parts(1, 0))])
    assert with_images["images"].count == 16


def test_what_stands_for_images_is_never_hidden_in_a_text_that_names_it(tmp_path):
    """No slot can hold it, so its loss would be infinite."""
    noise = Mask(mask=MASK, ids=torch.tensor([n for n in range(55) if n != IMAGE]))
    ids = [1, 8, IMAGE, 9, IMAGE, 7, 10, 2]
    parts = conversation_parts(ids, [-100, *ids[1:]], 0, ENDS, recipe_of())
    made = TurnCollator(recipe_of(), noise)([(0, parts)])
    assert made["scored"].any() and not (made["scored"] & (made["target"] == IMAGE)).any()
    document = DocumentPart(ids, len(ids), 0, 0, 0)
    made = Collator(recipe_of(), noise)([(0, [document])])
    assert made["scored"].any() and not (made["scored"] & (made["x0"] == IMAGE)).any()


def test_a_processor_that_writes_the_first_token_itself_is_not_told_twice(tmp_path):
    """PaliGemma's: images, <bos>, the prompt, a line break, the answer."""
    words = ["<unk>", "<bos>", "<eos>", "<pad>", *"abcdef", "\n"]
    words += [f"<{n}>" for n in range(IMAGE - len(words))] + ["<image>"]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|[a-f]|\n| "), "isolated")
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    sized = hf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    sized.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(sized, copy.deepcopy(tokenizer))
    asked = {"text": "<image>ab", "images": [picture(0)]}
    alone, whole = (processor(**asked, suffix=end)["input_ids"][0] for end in (None, "cd"))
    assert tokenizer("a").input_ids[0] == 1 and alone.count(1) == 1
    for _ in range(2):
        take_tokenizer(processor, tokenizer)
        assert processor(**asked)["input_ids"][0] == alone
    album, row = Album(processor, vision_class("paligemma").model), {"image": "0.png"}
    picture(0).save(tmp_path / "0.png")
    data = rows_of(tmp_path, row | {"prompt": "<image>ab", "completion": "cd"})
    rows = tokenize_conversations(data, tokenizer, recipe_of(), album)
    assert [IMAGE if one < 0 else one for one in rows.ids[0].tolist()] == whole
    assert rows.labels[0].tolist() == [-100] * len(alone) + whole[len(alone) :]
