"""The demo corpus and the embedded demo checkpoint."""

import json
import random
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.demo import __main__ as demo
from ar2diff.demo import build, corpus

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(build.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(build.MODEL_DIR)


def test_the_same_arguments_give_the_same_documents():
    assert list(corpus.corpus(50, 3)) == list(corpus.corpus(50, 3))
    assert list(corpus.corpus(50, 3)) != list(corpus.corpus(50, 4))


def test_every_level_asked_for_is_drawn_and_no_other():
    assert {e["level"] for e in corpus.corpus(200, 0)} == {1, 2, 3, 4}
    assert {e["level"] for e in corpus.corpus(20, 0, levels=(2,))} == {2}


def test_no_validation_story_is_in_train():
    levels = corpus.PRETRAIN_LEVELS
    train = {e["story"] for e in corpus.corpus(4000, 0, levels)}
    valid = {e["story"] for e in corpus.corpus(1000, 0, levels, split="valid")}
    assert not train & valid
    # Not only by luck: the split follows from the story, whatever the seed.
    assert all(corpus.split_of(e) == "valid" for e in corpus.corpus(50, 9, split="valid"))
    assert all(corpus.split_of(e) == "train" for e in corpus.corpus(50, 9))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        next(corpus.corpus(1, 0, split="test"))


def test_worked_answers_are_arithmetically_right():
    for example in corpus.corpus(2000, 1):
        equations = [
            (int(a), sign, int(b), int(c))
            for a, sign, b, c in EQUATION.findall(example["answer_work"])
        ]
        for a, sign, b, c in equations:
            assert c == (a + b if sign == "+" else a - b)
            assert all(0 <= number <= corpus.MAX_NUMBER for number in (a, b, c))
        assert equations[-1][-1] == int(example["answer"])


def test_worked_answers_use_the_numbers_of_the_story():
    for example in corpus.corpus(500, 2, levels=(1, 2, 3)):
        told = re.findall(r"\d+", example["story"])
        equations = EQUATION.findall(example["answer_work"])
        assert told == [equations[0][0], *(b for _, _, b, _ in equations)]


def test_level_one_adds_once_and_level_two_adds_then_subtracts():
    for level, signs in ((1, "+"), (2, "+-")):
        for example in corpus.corpus(100, 0, levels=(level,)):
            assert "".join(re.findall(r" ([+-]) ", example["answer_work"])) == signs


def test_the_true_answer_scores_one_and_a_wrong_one_zero():
    for example in corpus.corpus(100, 0):
        assert corpus.score(example, " " + example["answer_work"]) == 1.0
        wrong = int(example["answer"]) + 1
        assert corpus.score(example, f"{example['answer_work']} The answer is {wrong}.") == 0.0
        assert corpus.score(example, example["answer"]) == 0.0


def test_a_document_is_its_prompt_and_its_worked_answer():
    example = corpus.example(1, random.Random(0))
    assert corpus.prompt(example).endswith("\nAnswer:")
    assert corpus.text(example) == f"{corpus.prompt(example)} {example['answer_work']}"
    plain = corpus.example(0, random.Random(0))
    assert corpus.text(plain) == corpus.prompt(plain) == plain["story"]


def test_the_shipped_model_is_small_and_complete():
    assert sum(f.stat().st_size for f in build.MODEL_DIR.iterdir()) <= 4_000_000
    generation = json.loads((build.MODEL_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert "max_new_tokens" not in generation


def test_the_tokenizer_round_trips(tokenizer):
    texts = [corpus.text(e) for e in corpus.corpus(100, 5, corpus.PRETRAIN_LEVELS)]
    for text in [*texts, "", " a  b\n\n c", "Käse, 12.5 % ▁ 🙂\t{x}", "can't <0x41>"]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_tokenizer_has_no_pad_and_no_mask(tokenizer, model):
    assert tokenizer.pad_token is None and tokenizer.mask_token is None
    assert len(tokenizer) == tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("1 + 19 = 20.") == ["1", " +", " 1", "9", " =", " 2", "0", "."]


def test_the_shipped_model_knows_its_held_out_corpus(tokenizer, model):
    assert build.held_out_nll(model, tokenizer, n=100) < 0.46  # measured: 0.405 over 500 documents


def test_the_shipped_model_answers_easy_questions(tokenizer, model):
    assert build.accuracy(model, tokenizer, level=1, n=40) > 0.8


def test_the_demo_compares_ways_of_decoding(monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUESTIONS", 1)
    base = load_checkpoint(str(demo.MODEL))
    drafting = load_checkpoint(str(demo.DRAFT))
    converted = demo.adapt_without_training(load_checkpoint(str(demo.MODEL)), load_recipe("demo"))
    demo.print_generations(base, drafting, converted)
    demo.print_infill(converted)
    said = capsys.readouterr().out
    table = said.split("the same text\n")[1].split("\n\n")[0].splitlines()
    plain = [line.split()[-3:-1] for line in table if line.endswith("1.00")]
    assert len(plain) == 2 and plain[0] == plain[1]  # the conversion left the AR mode as it was
    kept = [line.split()[-1] for line in table if line.endswith(("yes", "no"))]
    assert kept == ["yes", "yes"]
    assert f"filled: {demo.GAP[0]}[" in said


def test_a_way_that_writes_another_text_says_no():
    way = demo.Way("a way", None, {}, kept="another")
    way.add(1.0, 6, 2, True)
    assert way.line().split()[2:] == ["1", "6", "2", "3.00", "yes"]
    way.add(1.0, 6, 2, False)
    way.add(1.0, 6, 2, True)
    assert way.line().split()[2:] == ["3", "18", "6", "3.00", "no"]
