"""The pictures of the embedded vision model, their questions, and the model that answers them."""

import json
import random
import re

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ar2diff.demo.vision import architecture, build, digits, scenes

NUMBERS = {tile.tobytes(): i for i, tile in enumerate(digits.sheet()[0])}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(build.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(build.MODEL_DIR)


def drawn(image: Image.Image) -> dict[str, int]:
    """Which digit of the sheet stands where, read from the pixels alone."""
    found = {}
    for column, letter in enumerate("abcd"):
        for row in range(4):
            box = (8 * column, 8 * row, 8 * column + 8, 8 * row + 8)
            tile = np.asarray(image.crop(box))[..., 0]
            if tile.any():
                found[f"{letter}{row + 1}"] = NUMBERS[tile.tobytes()]
    return found


def image_of(row: dict) -> Image.Image:
    return row["messages"][0]["content"][0]["image"]


def texts_of(row: dict) -> list[str]:
    return [part["text"] for m in row["messages"] for part in m["content"] if "text" in part]


def check(kind: str, question: str, answer: str, cells: dict[str, int]) -> bool:
    """Whether an answer says what the cells show."""
    values = list(cells.values())
    if kind == "count":
        return int(answer) == len(cells)
    if kind == "which":
        return answer == str(cells.get(question[-3:-1], "none"))
    if kind == "sum":
        terms, total = answer.split(" = ")
        return sorted(map(int, terms.split(" + "))) == sorted(values) and int(total) == sum(values)
    if kind == "caption":
        named = re.findall(r"(an?) (\d) at ([a-d][1-4])", answer)
        articles = all((article == "an") == (value == "8") for article, value, _ in named)
        return articles and {p: int(v) for _, v, p in named} == cells
    if kind == "json":
        return json.loads(answer) == cells
    shown = [line.split(" ") for line in answer.split("\n")]
    return all(
        shown[int(p[1]) - 1]["abcd".index(p[0])] == str(cells.get(p, "-")) for p in scenes.PLACES
    )


def test_the_same_arguments_give_the_same_scenes():
    assert list(scenes.scenes(20, 3, turns=2)) == list(scenes.scenes(20, 3, turns=2))
    assert list(scenes.scenes(20, 3)) != list(scenes.scenes(20, 4))


def test_answers_say_what_the_pixels_show():
    for row in scenes.scenes(400, 1, turns=3, digits=(1, 9)):
        cells = {place: int(digits.sheet()[1][i]) for place, i in drawn(image_of(row)).items()}
        texts = texts_of(row)
        assert row["digits"] == cells
        for kind, question, answer in zip(row["kinds"], texts[::2], texts[1::2], strict=True):
            assert check(kind, question, answer, cells), (question, answer, cells)


def test_no_handwriting_of_a_held_out_picture_is_in_train():
    train, held_out = (
        {i for row in scenes.scenes(1500, 0, split) for i in drawn(image_of(row)).values()}
        for split in digits.SPLITS
    )
    assert max(train) < 1497 <= min(held_out) and max(held_out) < 1797 == len(NUMBERS)


def test_digits_and_kinds_asked_for_are_drawn_and_no_others():
    rows = list(scenes.scenes(60, 0, kinds=["count", "json"], digits=(5, 7)))
    assert {len(row["digits"]) for row in rows} == {5, 6, 7}
    assert {kind for row in rows for kind in row["kinds"]} == {"count", "json"}


def test_a_written_file_names_its_pictures(tmp_path):
    file = tmp_path / "new" / "scenes.jsonl"
    scenes.write_scenes(file, 3, 0, "held_out")
    for line, row in zip(open(file), scenes.scenes(3, 0, "held_out"), strict=True):
        written = json.loads(line)
        path = written["messages"][0]["content"][0]["path"]
        assert Image.open(file.parent / path).tobytes() == image_of(row).tobytes()
        assert texts_of(written) == texts_of(row) and written["digits"] == row["digits"]


def test_the_processor_writes_a_picture_as_sixteen_tokens_and_marks_the_answers(processor):
    row = next(scenes.scenes(1, 0, turns=2))
    found = processor.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = found["input_ids"][0], found["assistant_masks"][0]
    assert ids.count(architecture.IMAGE) == 16 and architecture.IMAGE == processor.image_token_id
    assert processor.tokenizer.unk_token_id not in ids
    texts = texts_of(row)
    answers = [i for i, inside in zip(ids, mask, strict=True) if inside]
    assert processor.decode(answers) == f"{texts[1]}</s>{texts[3]}</s>"


def test_training_rows_are_what_the_processor_makes(processor):
    found = build.batch(processor, random.Random(0))
    rng = random.Random(0)
    for ids, labels in zip(found["input_ids"], found["labels"], strict=True):
        scene, messages = build.draw_conversation(rng)
        messages[0]["content"][0]["image"] = scene.image()
        want = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        length = len(want["input_ids"][0])
        assert ids[:length].tolist() == want["input_ids"][0]
        assert (labels >= 0).int().tolist()[:length] == want["assistant_masks"][0]
        assert (ids == labels)[labels >= 0].all() and not (labels[length:] >= 0).any()
        plain = build.cells(scene_row(scene), vary=False)[0].numpy()
        assert np.abs(plain - want["pixel_values"][0]).max() < 1e-6


def scene_row(scene: scenes.Scene) -> np.ndarray:
    row = np.full((1, 16), -1)
    row[0, list(scene.drawn)] = list(scene.drawn.values())
    return row


def test_the_shipped_model_answers_held_out_scenes(model, processor):
    rows = list(scenes.scenes(40, 1, "held_out"))
    said = build.replies(model, processor, rows)
    right = [a == scenes.right_answer(row) for a, row in zip(said, rows, strict=True)]
    assert sum(right) >= 34, [(r["digits"], a) for a, r in zip(said, rows, strict=True)]


def test_the_shipped_folder_is_small():
    assert sum(f.stat().st_size for f in build.MODEL_DIR.iterdir()) <= 3_000_000
    assert digits.SHEET.stat().st_size <= 100_000
