"""`sft` from files to a folder: formats, templates, what stock trl would have done, bad rows."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from ar2diff.cli.main import main
from conftest import build_model
from safetensors.torch import load_file

from ar2diff.checkpoint.custom_generate import FOLDER
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.chat_template import chat_template
from ar2diff.data.conversations import read_conversations
from ar2diff.training.journal import read_metrics
from ar2diff.training.sft import SFT, sft

PAIRS = [{"prompt": f"what is {n}?", "completion": f" it is {n}."} for n in range(12)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": f"{n} it is"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"{n}"},
        ]
    }
    for n in range(12)
]


def recipe_for(data, *overrides):
    recipe = load_recipe(
        None,
        [
            "train.max_steps=3", "train.per_device_train_batch_size=2", "train.save_steps=2",
            "data.max_length=64", "train.learning_rate=1e-3", *overrides,
        ],
    )  # fmt: skip
    return with_values(recipe, data={"sources": [{"path": str(data)}]})


@pytest.mark.parametrize(
    "rows, override", [(PAIRS, "data.packing=true"), (CHATS, "data.chat_template=plain")]
)
def test_a_tuned_folder_is_a_converted_folder(convert_tiny, write_jsonl, tmp_path, rows, override):
    base, data = convert_tiny(), write_jsonl("rows.jsonl", rows)
    record = sft(str(base), recipe_for(data, override), tmp_path / "out")
    assert record.tokens > 0
    tuned = load_checkpoint(str(tmp_path / "out"))
    assert tuned.spec == load_checkpoint(str(base)).spec
    assert (tmp_path / "out" / FOLDER / "generate.py").is_file()
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if rows is CHATS:  # and it can be talked to
        ids = tuned.tokenizer.apply_chat_template(
            CHATS[0]["messages"][:1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert tuned.tokenizer.decode(ids).endswith("User: say 0\nAssistant:")


def test_a_killed_run_goes_on_to_the_same_bits(convert_tiny, write_jsonl, tmp_path, monkeypatch):
    from ar2diff.training.sft import DiffusionSFTTrainer

    base, data = convert_tiny(), write_jsonl("rows.jsonl", PAIRS)
    recipe = recipe_for(data, "train.max_steps=4")
    sft(str(base), recipe, tmp_path / "whole")
    step = DiffusionSFTTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionSFTTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        sft(str(base), recipe, tmp_path / "cut")
    monkeypatch.setattr(DiffusionSFTTrainer, "training_step", step)
    sft(str(base), recipe, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_stock_trl_leaks_where_attention_goes_both_ways():
    """A next-token loss on a bidirectional model: the token to predict is read. Ours: see
    test_turns.test_no_answer_leaks_into_its_own_prediction."""
    moved = {}
    for causal in (True, False):
        model = copy.deepcopy(build_model("llama"))
        model.config.is_causal = causal
        ids = torch.tensor([[1, 17, 42, 5, 33, 8]])
        other = ids.clone()
        other[0, 4] = 34  # the label of position 3
        with torch.no_grad():
            one, two = (model(input_ids=x, use_cache=False).logits[0, 3] for x in (ids, other))
        moved[causal] = float((one - two).abs().max())
    assert moved[True] == 0 and moved[False] > 0.1


BAD = [
    ('{"text": 3}', "neither messages, nor prompt and completion"),
    ('{"prompt": "a", "completion": null}', "completion is null, but must be text"),
    ('{"prompt": "", "completion": ""}', "prompt and completion are empty"),
    ('{"prompt": "a", "completion": "\\ud800"}', "is not valid Unicode"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
        "messages[1]: the content is null, but must be text",
    ),
    ('{"messages": [{"role": "user", "content": "a"}]}', "there is no message from the assistant"),
    ('{"messages": [{"content": "a"}]}', "messages[0]: the message has no role"),
    ('{"messages": []}', "messages has no messages"),
    ('{"prompt": "a"', "is not JSON"),
]


@pytest.mark.parametrize("line, what", BAD)
def test_a_bad_row_is_named(write_jsonl, line, what):
    data = write_jsonl("rows.jsonl", [json.dumps(PAIRS[0]) if "prompt" in line else line, line])
    with pytest.raises(Ar2DiffError) as error:
        read_conversations(recipe_for(data))
    assert what in error.value.what and "row" in error.value.what


GSM = {"question": "2 + 2?", "answer": "4", "prompt": "other", "messages": "no"}
QUESTION = r'data.columns.prompt="Question: {question}\nAnswer:"'
ANSWER = 'data.columns.completion=" {answer}"'


@pytest.mark.parametrize(
    "columns, wanted",
    [
        (
            ["data.columns.prompt=question", "data.columns.completion=answer"],
            {"prompt": "2 + 2?", "completion": "4"},
        ),
        ([QUESTION, ANSWER], {"prompt": "Question: 2 + 2?\nAnswer:", "completion": " 4"}),
    ],
)
def test_columns_say_what_is_prompt_and_completion(write_jsonl, columns, wanted):
    data = write_jsonl("rows.jsonl", [GSM])
    assert read_conversations(recipe_for(data, *columns)).rows == [wanted]


def test_columns_say_where_the_messages_are(write_jsonl):
    data = write_jsonl("rows.jsonl", [{"dialogue": CHATS[0]["messages"], "text": "a"}])
    assert read_conversations(recipe_for(data, "data.columns.messages=dialogue")).rows == CHATS[:1]


@pytest.mark.parametrize(
    "columns, what",
    [
        ("data.columns.prompt=task", "row 1: data.columns.prompt: the row has no column 'task'"),
        ("data.columns.prompt='{task}'", "the row has no column 'task'"),
        ("data.columns.prompt='{none}'", "there is no text in 'none'"),
        ("data.columns.prompt=number", "prompt is a number, but must be text"),
    ],
)
def test_a_column_that_is_not_there_or_no_text_is_named(write_jsonl, columns, what):
    data = write_jsonl("rows.jsonl", [{**GSM, "number": 3, "none": None}])
    with pytest.raises(Ar2DiffError) as error:
        read_conversations(recipe_for(data, columns, "data.columns.completion=answer"))
    assert what in error.value.what


def test_rows_of_several_formats_are_refused(write_jsonl):
    with pytest.raises(Ar2DiffError, match="all rows must have the same"):
        read_conversations(recipe_for(write_jsonl("rows.jsonl", [*PAIRS, *CHATS])))


def test_a_model_that_was_not_converted_is_refused(tiny_checkpoint, write_jsonl, tmp_path):
    data = write_jsonl("rows.jsonl", PAIRS)
    with pytest.raises(Ar2DiffError, match="not converted"):
        sft(str(tiny_checkpoint), recipe_for(data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_that_does_not_mark_the_assistant_is_refused(tiny_tokenizer, make_recipe):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with pytest.raises(Ar2DiffError, match="no chat template"):
        chat_template(tokenizer, make_recipe())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(Ar2DiffError, match="does not mark"):
        chat_template(tokenizer, make_recipe())
    tokenizer.chat_template = "{{ range(10**12) | list }}"  # raises in jinja's sandbox
    with pytest.raises(Ar2DiffError, match="does not mark"):
        chat_template(tokenizer, make_recipe())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    whole = make_recipe(data={"assistant_only": False})
    assert chat_template(tokenizer, whole) == tokenizer.chat_template


def test_the_control_is_the_ar_base_tuned_on_the_same_rows(tiny_checkpoint, write_jsonl, tmp_path):
    data = write_jsonl("rows.jsonl", PAIRS)
    recipe = recipe_for(data, "objective.kind=ar", "train.max_steps=2")
    record = sft(str(tiny_checkpoint), recipe, tmp_path / "out")
    assert record.diffusion is None and not (tmp_path / "out" / FOLDER).exists()
    assert load_checkpoint(str(tmp_path / "out")).spec is None


def test_the_controls_loss_is_that_of_next_tokens_over_the_completions(
    tiny_checkpoint, write_jsonl, tmp_path
):
    recipe = recipe_for(write_jsonl("rows.jsonl", PAIRS[:3]), "objective.kind=ar")
    plan = SFT.prepare(tiny_checkpoint, recipe)
    trainer = plan.make_trainer(plan, tmp_path / "run", [])
    model, tokenizer = plan.checkpoint.model, plan.checkpoint.tokenizer
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    got = trainer.compute_loss(
        model, batch, num_items_in_batch=torch.tensor([1.0, float(batch["ar_divisor"])])
    )
    total, count = 0.0, 0
    for row in PAIRS[:3]:
        prompt = tokenizer(row["prompt"]).input_ids
        whole = tokenizer(row["prompt"] + row["completion"]).input_ids
        ids = [*whole, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        ce = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total, count = total + float(ce[len(prompt) - 1 :].sum()), count + len(ids) - len(prompt)
    assert int(batch["ar_divisor"]) == count
    assert got.item() == pytest.approx(total / count, rel=1e-5)


def test_what_the_turns_are_like_is_said(convert_tiny, write_jsonl, tmp_path, capsys):
    rows = [*PAIRS, {"prompt": "a?", "completion": " b" * 60}]
    sft(str(convert_tiny()), recipe_for(write_jsonl("rows.jsonl", rows)), tmp_path / "out")
    said = capsys.readouterr().err
    assert "answers 13, with a median of 10 tokens and at most 121\n" in said


UNKNOWN_END = (  # a base's end token ends texts, the template's another ends answers
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}"
    "{% generation %}{{ m.content + '<unk>\n' }}{% endgeneration %}"
    "{% else %}{{ 'U: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def test_a_run_logs_the_answers_and_keeps_what_ends_them(convert_tiny, write_jsonl, tmp_path):
    (tmp_path / "a.jinja").write_text(UNKNOWN_END)
    data = write_jsonl("rows.jsonl", CHATS)
    recipe = recipe_for(data, f"data.chat_template={tmp_path / 'a.jinja'}", "train.max_steps=1")
    record = sft(str(convert_tiny()), recipe, tmp_path / "out")
    assert record.answers == {
        "turns": 24,
        "ended": 24,
        "rows_over_max_length": 0,
        "rows_that_teach_nothing": 0,
        # "0 it is" and "0" for each of 10 numbers, one letter more for 10 and 11; an end token each
        "mean_length": pytest.approx((10 * (8 + 2) + 2 * (9 + 3)) / 24),
        "median_length": 8,
        "longest": 9,
    }
    assert json.loads((tmp_path / "out" / "ar2diff.json").read_text())["answers"]["turns"] == 24
    assert 0 < read_metrics(tmp_path / "out")[0]["eos_share"] < 1
    tuned = load_checkpoint(str(tmp_path / "out"))
    assert tuned.end_ids == [2, 0]  # </s> of before, <unk> of the template
    asked = tuned.tokenizer.apply_chat_template(
        CHATS[0]["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<s>U: say 0\nA: "


@pytest.mark.parametrize("launch", [[], ["--launch", "ddp", "--num-processes", "2"]])
def test_a_dry_run_shows_what_is_learned_and_writes_nothing(
    convert_tiny, write_jsonl, tmp_path, monkeypatch, capsys, launch
):
    long = {"messages": [{"role": "user", "content": "x" * 80}, *CHATS[0]["messages"][1:]]}
    data = write_jsonl("rows.jsonl", [long, *CHATS])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    line = ["sft", convert_tiny(), "--data", data, "--output-dir", tmp_path / "out", "--dry-run"]
    line += ["data.chat_template=plain", "data.max_length=64", "data.overlong=drop", *launch]

    def run(*options):
        monkeypatch.setattr("sys.argv", ["ar2diff", *map(str, line), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    plan = json.loads(run("--json"))
    text = "<s>User: say 0\nAssistant:⟦ 0 it is</s>⟧\nUser: again\nAssistant:⟦ 0</s>⟧"
    assert plan["example"] == {"text": text, "tokens": 58, "supervised_tokens": 12}
    assert "26 supervised turns with a median length of 9 tokens, the longest 10" in plan["turns"]
    assert "1 rows longer than data.max_length 64 are dropped" in plan["turns"]
    assert plan["recipe"]["data"]["max_length"] == 64 and "memory" in plan
    assert ("launch" in plan) == bool(launch)
    if not launch:
        assert f"  text: {text}\n  tokens: 58\n  supervised tokens: 12" in run()
    assert sorted(tmp_path.iterdir()) == before
