"""Rows as people have them: every kind of file gives the same rows, every common shape the same
conversations; what cannot be read is named."""

from __future__ import annotations

import copy
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.config.sections import Source
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.chat_template import chat_template
from ar2diff.data.conversations import read_conversations, tokenize_conversations
from ar2diff.data.rows import as_dataset, parse_value, read_file, read_stdin
from ar2diff.data.sources import identity, read_source, read_texts
from ar2diff.data.turns import IGNORED
from ar2diff.rewards.builtin import exact

ROWS = [{"text": "one", "n": "007"}, {"text": 'zwölf ☃, "two"', "n": ""}]
CSV = 'text,n\none,007\n"zwölf ☃, ""two""",\n'


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES,
    "bom.jsonl": "\ufeff" + LINES,
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "a.json": json.dumps(ROWS, indent=1),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "named.json": json.dumps({"version": 1, "data": ROWS}),
    "lines.json": LINES,
    "a.csv": CSV,
    "bom.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "a.parquet": parquet(ROWS),
}
FILES |= {f"{name}.gz": content for name, content in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, FILES[name])
    assert [row for _, row in read_file(path)] == ROWS
    assert [where for where, _ in read_file(path)] == [f"data {path}: row {n}" for n in (1, 2)]


@pytest.mark.parametrize("name", ["a.txt", "bom.txt", "a.txt.gz"])
def test_a_line_of_text_is_a_row(tmp_path, name):
    path = write(tmp_path / name, "\ufeff" * ("bom" in name) + "one\r\n\n\ufeff two \n")
    assert [row for _, row in read_file(path, "prompt")] == [
        {"prompt": "one"}, {"prompt": "\ufeff two "},
    ]  # fmt: skip
    assert read_texts(path, "body") == ["one", "\ufeff two "]


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content.encode())


@pytest.mark.parametrize("content", [LINES, "\ufeff" + LINES, "\n" + json.dumps(ROWS)])
def test_standard_input_is_read_like_a_file_and_as_often(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", Stdin(content))
    for _ in range(2):
        assert [row for _, row in read_source(Source(path="-"))] == ROWS


def test_standard_input_may_be_lines_of_text_with_gaps_first(monkeypatch):
    monkeypatch.setattr("sys.stdin", Stdin("{mask:3} one\n[two]\n"))
    rows = [row for _, row in read_stdin("prompt")]
    assert rows == [{"prompt": "{mask:3} one"}, {"prompt": "[two]"}]
    monkeypatch.setattr("sys.stdin", Stdin(""))
    with pytest.raises(Ar2DiffError, match="data - is empty"):
        list(read_source(Source(path="-")))


def test_a_hub_data_set_is_rows_like_any_other(monkeypatch):
    import datasets

    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "007"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    recipe = load_recipe(None, ["data.sources=[{path: ana/chats, split: test}]"])
    assert read_conversations(recipe).rows == [{"prompt": "a", "completion": "007"}]
    assert asked == [(("ana/chats", None), {"split": "test", "streaming": False})]

    def fails(*args, **kwargs):
        raise RuntimeError("Dataset 'ana/chats' doesn't exist\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(Ar2DiffError, match=r"not a local file, and .* doesn't exist") as error:
        read_conversations(recipe)
    assert "\n" not in error.value.what


EXACT = ["007", "true", "3.50", "null", '"quoted"', "", "[1]", 7, 7.0, 10**30, True, None, [1, "b"]]


def test_rows_reach_a_trainer_with_the_types_they_have():
    rows = [{"prompt": "a", "answer": value} for value in EXACT]
    rows.append({"prompt": '"quoted"', "late": {"in": [1, "07"], "none": None}})
    found = list(as_dataset(rows))
    assert [(type(row["answer"]), row["answer"]) for row in found[:-1]] == [
        (type(value), value) for value in EXACT
    ]
    assert found[-1] == {**rows[-1], "answer": None}
    assert exact("007", found[0]["answer"]) == 1.0


BIG = "9" * 5000
DEEP = '{"a":' * 100_000
BROKEN = [  # name, content, what is said of it
    ("a.jsonl", '{"text": "a"}\n{"text": "b"', "row 2 is not JSON: Expecting"),
    ("a.jsonl", f'{{"text": "a"}}\n{{"n": {BIG}}}', "row 2 is not JSON: an integer of 5000 digits"),
    ("a.jsonl", DEEP, "row 1 is not JSON: nested more than 100 levels deep"),
    ("a.jsonl", '{"a":' * 200 + "1" + "}" * 200, "row 1 is not JSON: nested more than 100"),
    ("a.jsonl", '{"n": NaN}', "row 1 is not JSON: NaN is not a JSON number"),
    ("a.jsonl", '{"n": -Infinity}', "row 1 is not JSON: -Infinity"),
    ("a.jsonl", '{"text": "\\ud800"}', "row 1 is not JSON: half a surrogate pair"),
    ("a.jsonl", '["b"]', "row 1 is a list, but must be an object with columns"),
    ("a.jsonl", b'{"text": "a"}\n\xff\xfe', "row 2 is not UTF-8 text: invalid start byte"),
    ("a.jsonl", "\n \n", "is empty"),
    ("a.json", "[" * 100_000, "a.json is not JSON: nested more than"),
    ("a.json", f"[{BIG}]", "a.json is not JSON: an integer of 5000 digits"),
    ("a.json", '"text"', "a.json holds text, but must hold a list of rows"),
    ("a.json", '{"text": "a"}', "a.json holds an object, but must hold a list of rows"),
    ("a.json", '[{"text": "a"}, 3]', "row 2 is a number, but must be an object"),
    ("a.json", "[]", "is empty"),
    ("a.csv", "text,text\na,b\n", "the header has an empty or repeated column name"),
    ("a.csv", "text,n\na,1\nb\n", "row 2 has 1 cells, but the header has 2 columns"),
    ("a.csv", 'text\n"a', "row 1 is not CSV: unexpected end of data"),
    ("a.csv", "text,n\n", "is empty"),
    ("a.csv", "", "is empty"),
    ("a.parquet", "nothing", "a.parquet cannot be read: "),
    ("a.txt", b"fine\n\xff\xfe\n", "row 2 is not UTF-8 text"),
    ("a.bin", "x", "a.bin has an unknown file type"),
    ("a.jsonl.gz", None, "a.jsonl.gz cannot be read: "),
]  # fmt: skip


@pytest.mark.parametrize("name, content, said", BROKEN, ids=lambda value: str(value)[:24])
def test_a_file_that_cannot_be_read_is_named_with_its_row(tmp_path, name, content, said):
    path = tmp_path / name
    if content is None:  # cut short
        path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:30])
    else:
        write(path, content)
    with pytest.raises(Ar2DiffError) as error:
        list(read_source(Source(path=str(path))))
    assert str(path) in error.value.what and said in error.value.what and error.value.fix
    assert len(error.value.what) <= 400


@pytest.mark.parametrize(
    "row, what, fix",
    [
        ({"txt": "b"}, "no column 'text' (it has txt); did you mean txt?", "text_field=txt"),
        ({"id": "7", "content": "b"}, "has no column 'text'", "text_field=content"),
        ({"text": 5}, "row 2: column 'text' holds a number, but must hold text", "correct the row"),
        ({"text": None}, "row 2: column 'text' holds null", "correct the row"),
    ],
)  # fmt: skip
def test_a_row_without_text_is_named_with_the_column_to_use(write_jsonl, row, what, fix):
    path = write_jsonl("a.jsonl", [{"text": "a"}, row])
    with pytest.raises(Ar2DiffError) as error:
        read_texts(path, "text")
    assert what in error.value.what and fix in error.value.fix


# Shapes of conversations


def chat(*contents, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return {"messages": messages, **more}


def said(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def weighed(row, *places):
    """The row, with these of its messages not to be learned."""
    messages = [{**m, "weight": 0} if n in places else m for n, m in enumerate(row["messages"])]
    return {**row, "messages": messages}


QA = chat("How many?", "Three.")
TURNS = chat("a", "bad", "b", "good")
PARTS = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]


def calls(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]}


TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]
ASKED = {"role": "user", "content": "a"}
SHAPES = {  # a row, and what is made of it
    "messages": (QA, QA),
    "messages as JSON text": ({"messages": json.dumps(QA["messages"])}, QA),
    "conversations": (
        {"conversations": said("How many?", "Three.")},
        QA,
    ),
    "conversations with a system column": (
        {"system": "s", "conversations": said("a", "b")},
        {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]},
    ),
    "conversations with role and content": ({"conversations": QA["messages"]}, QA),
    "prompt and completion": (
        {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"},
    ),
    "prompt and completion as messages": (
        {"prompt": QA["messages"][:1], "completion": QA["messages"][1:]}, weighed(QA, 0),
    ),
    "a prompt of several messages is not learned": (
        {"prompt": TURNS["messages"][:3], "completion": "good"}, weighed(TURNS, 0, 1, 2),
    ),
    "Alpaca": (
        {"instruction": "Count.", "input": "1 2", "output": "Two."}, chat("Count.\n\n1 2", "Two."),
    ),
    "Alpaca with an empty input": (
        {"instruction": "Say hi.", "input": "", "output": "Hi."}, chat("Say hi.", "Hi."),
    ),
    "Alpaca without input": ({"instruction": "Say hi.", "output": "Hi."}, chat("Say hi.", "Hi.")),
    "text": ({"text": "a"}, {"text": "a"}),
    "content as parts": (
        {"messages": [{"role": "user", "content": PARTS}, QA["messages"][1]]}, QA,
    ),
    "tools as a list": ({**QA, "tools": TOOLS}, {**QA, "tools": TOOLS}),
    "tools as JSON text": ({**QA, "tools": json.dumps(TOOLS)}, {**QA, "tools": TOOLS}),
    "no tools as an empty text": ({**QA, "tools": ""}, QA),
    "arguments as JSON text": (
        calls('{"x": "1"}'),
        calls({"x": "1"}),
    ),
    "arguments as empty text": (
        calls(""),
        calls({}),
    ),
    "weight 0": (
        {"messages": [{**m, "weight": int(n != 1)} for n, m in enumerate(TURNS["messages"])]},
        weighed(TURNS, 1),
    ),
    "train false": (
        {"messages": [{**m, "train": n != 1} for n, m in enumerate(TURNS["messages"])]},
        weighed(TURNS, 1),
    ),
    "chat_template_kwargs": (
        {**QA, "chat_template_kwargs": {"thinking": False}},
        {**QA, "chat_template_kwargs": {"thinking": False}},
    ),
}  # fmt: skip


def recipe_for(path, *overrides):
    recipe = load_recipe(None, overrides)
    return with_values(recipe, data={"sources": [{"path": str(path)}]})


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_conversation_is_read(write_jsonl, name):
    row, wanted = SHAPES[name]
    assert read_conversations(recipe_for(write_jsonl("a.jsonl", [row]))).rows == [wanted]


def test_a_parquet_file_of_messages_has_no_nulls_that_arrow_added(tmp_path):
    rows = [QA, {"messages": [*QA["messages"], {"role": "tool", "content": "3", "name": "f"}]}]
    path = write(tmp_path / "a.parquet", parquet(rows))
    assert read_conversations(recipe_for(path)).rows == rows


BRACES = "data.columns.prompt='{instruction} {input}'"


def test_columns_in_a_text_may_be_empty_or_numbers(write_jsonl):
    rows = [
        {"instruction": "Say hi.", "input": None, "n": 3},
        {"instruction": "a", "input": "b", "n": 4},
    ]
    path = write_jsonl("a.jsonl", rows)
    recipe = recipe_for(path, BRACES, "data.columns.completion='{n}'")
    assert read_conversations(recipe).rows == [
        {"prompt": "Say hi. ", "completion": "3"}, {"prompt": "a b", "completion": "4"},
    ]  # fmt: skip


UNREADABLE = [  # a row, what is said of it, and how it can be read or fixed
    (
        {"question": "a", "answer": "b"}, "it has question, answer",
        "data.columns.prompt=question data.columns.completion=answer",
    ),
    ({"dialog": QA["messages"]}, "it has dialog", "data.columns.messages=dialog"),
    ({"story": "a"}, "it has story", "data.text_field=story"),
    ({"prompt": "a", "completion": 4}, "is a number", "data.columns.completion={completion}"),
    ({"prompt": "a", "completion": True}, "completion is a boolean", "correct or remove"),
    ({"messages": {"a": 1}}, "messages has no messages", "correct"),
    ({"messages": "[{"}, "messages is a text that is not JSON", "correct"),
    ({"messages": ["a"]}, "messages[0] is text, but must be a message", "correct"),
    ({"messages": [{"role": 3, "content": "a"}]}, "messages[0]: the message has no", "correct"),
    (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "the role 'narrator' is unknown",
        "human",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]},
        "messages[0].content[0] is a part of type 'video'", "correct",
    ),
    (weighed(QA, 1) | {"tools": "x"}, "tools is a text that is not JSON", "correct"),
    ({**QA, "tools": {"a": 1}}, "tools is an object, but must be a list", "correct"),
    ({**QA, "chat_template_kwargs": [1]}, "chat_template_kwargs is a list", "correct"),
    ({"messages": [{**QA["messages"][0], "weight": 0.5}]}, "messages[0].weight is 0.5", "0 or 1"),
    ({"messages": [{**QA["messages"][0], "train": "no"}]}, "messages[0].train is 'no'", "true"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input is a number", "correct"),
]  # fmt: skip


@pytest.mark.parametrize("row, what, fix", UNREADABLE, ids=lambda value: str(value)[:30])
def test_a_row_that_cannot_be_read_is_named_with_what_would_read_it(write_jsonl, row, what, fix):
    with pytest.raises(Ar2DiffError) as error:
        read_conversations(recipe_for(write_jsonl("a.jsonl", [row])))
    assert "row 1" in error.value.what and what in error.value.what and fix in error.value.fix


# What is learned of them

MARKED = (  # as `plain`, with a variable, and without what tools say
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% elif m.role == 'user' %}U{{ mark }}:{{ m.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def learned(tiny_tokenizer, write_jsonl):
    """What is learned of each row, as text; and the notes."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = MARKED

    def run(rows, *overrides):
        recipe = recipe_for(write_jsonl("a.jsonl", rows), *overrides)
        found = tokenize_conversations(read_conversations(recipe), tokenizer, recipe)
        pairs = zip(found.ids, found.labels, strict=True)
        texts = [
            "".join(
                tokenizer.decode([i]) if label != IGNORED else "."
                for i, label in zip(*pair, strict=True)
            )
            for pair in pairs
        ]
        return texts, [tokenizer.decode(ids) for ids in found.ids], found.notes

    return run


def test_an_answer_of_weight_0_is_read_and_not_learned(learned):
    texts, whole, notes = learned([weighed(TURNS, 1), TURNS])
    assert texts[0].strip(".") == "good</s>" and texts[1].count("bad</s>") == 1
    assert whole[0] == whole[1] == "U:aA:bad</s>U:bA:good</s>" and notes == ()
    with pytest.raises(Ar2DiffError, match="row 1: a message is excluded from learning, but"):
        learned([weighed(TURNS, 1)], "data.assistant_only=false")


def test_a_prompt_of_messages_is_never_learned(learned):
    row = {"prompt": QA["messages"][:1], "completion": QA["messages"][1:]}
    assert learned([row])[0][0].strip(".") == "Three.</s>"
    with pytest.raises(Ar2DiffError, match="row 1: a message is excluded from learning, but"):
        learned([row], "data.assistant_only=false")


def test_tokens_take_a_few_bytes_each(tiny_tokenizer, write_jsonl):
    recipe = recipe_for(write_jsonl("a.jsonl", [{"text": "a b c"}]))
    found = tokenize_conversations(read_conversations(recipe), tiny_tokenizer, recipe)
    assert found.ids[0].itemsize == found.labels[0].itemsize == 4
    assert found.dataset()[0]["labels"] == found.ids[0].tolist()


def test_template_variables_of_a_row_reach_the_template(learned):
    _, whole, _ = learned([{**QA, "chat_template_kwargs": {"mark": "!"}}, QA])
    assert whole == ["U!:How many?A:Three.</s>", "U:How many?A:Three.</s>"]
    for name in ("tokenize", "chat_template", "add_generation_prompt", "messages"):
        with pytest.raises(
            Ar2DiffError, match=f"row 1: chat_template_kwargs must not set '{name}'"
        ):
            learned([{**QA, "chat_template_kwargs": {name: "x"}}])


def test_what_is_not_used_is_said(learned):
    tool = {"role": "tool", "content": "3"}
    row = {"messages": [*QA["messages"], tool], "tools": TOOLS, "id": 7, "source": "x"}
    _, _, notes = learned([QA, row])
    assert sorted(note.split(": ", 1)[1] for note in notes) == [
        "the chat template of the tokenizer drops messages of role tool",
        "the chat template of the tokenizer drops the column tools",
        "these columns of the data are not used: id, source",
    ]


def test_a_template_that_refuses_a_row_is_quoted(learned, tiny_tokenizer, tmp_path):
    refusing = MARKED.replace("{% for", "{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for", 1)  # fmt: skip
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = refusing
    rows = {"messages": [{"role": "system", "content": "s"}, *QA["messages"]]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(QA) + "\n" + json.dumps(rows))
    recipe = recipe_for(path)
    with pytest.raises(Ar2DiffError, match=r"row 2: .*: System role not supported"):
        tokenize_conversations(read_conversations(recipe), tiny_tokenizer, recipe)
    for template, said in (
        (MARKED.replace("m.content }}", "m.content | nosuch }}"), "No filter named 'nosuch'"),
        ("{% for m in messages %}{{ m.content ", "is not valid: "),
        (
            "{{ documents[0].title }}" + MARKED,
            "cannot render a question and its answer: None has",
        ),
        (MARKED.replace("</s>", ""), "does not end answers with an end token"),
    ):
        tiny_tokenizer.chat_template = template
        with pytest.raises(Ar2DiffError) as error:
            chat_template(tiny_tokenizer, recipe)
        assert said in error.value.what and "tokenizer" in error.value.what


def test_a_template_of_the_recipe_is_tried_like_one_of_a_folder(tiny_tokenizer, tmp_path):
    (tmp_path / "a.jinja").write_text(MARKED + "{# " + "x" * (1 << 20) + " #}")
    recipe = load_recipe(None, [f"data.chat_template={tmp_path / 'a.jinja'}"])
    with pytest.raises(Ar2DiffError, match="the chat template has 1048"):
        chat_template(tiny_tokenizer, recipe)


# Identity


def test_the_identity_of_data_follows_its_content(tmp_path, monkeypatch):
    import datasets

    path, template = tmp_path / "a.txt", tmp_path / "a.jinja"
    path.write_text("one")
    template.write_text("a")
    recipe = load_recipe(None, [f"data.sources=[{path}, ana/x]", f"data.chat_template={template}"])
    hashes = iter("abc")
    builder = type("Builder", (), {"hash": property(lambda self: next(hashes))})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder())
    first = identity(recipe)
    assert set(first) == {str(path), "ana/x", "data.chat_template"} and first["ana/x"] == "a"
    path.write_text("two")
    second = identity(recipe)
    assert {name for name in first if first[name] != second[name]} == {str(path), "ana/x"}


def test_json_is_read_exactly():
    text = (
        '{"a": 9007199254740993, "b": "007", "c": 1.5, "d": "\\ud83d\\ude00", "e": 1'
        + "0" * 60
        + "}"
    )
    assert parse_value(text) == {
        "a": 9007199254740993, "b": "007", "c": 1.5, "d": "😀", "e": 10**60,
    }  # fmt: skip
