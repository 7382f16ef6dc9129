"""Conversations by hand: what of each is learned, on which canvas; and the templates that say so.

The tokenizer has a token a byte, so that a place in the text is a place in the row; `<s>` and
`</s>` are one token each. What is learned stands between ⟦ and ⟧.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from ar2diff.config.recipe import load_recipe, with_values
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.chat_template import TEMPLATES, asked_otherwise, chat_template, rendered, turn_end
from ar2diff.data.turns import PackedConversations
from ar2diff.training.sft import SFT

ATTENTIONS = ("causal_context", "block_causal", "full")
EPOCHS = 40  # draws of noise: enough to mask whatever can be
CUT = 64  # data.max_length
# As Qwen's and Gemma's, it marks the line's end behind the end token, which nobody is to write.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ 'Tools: ' + tools[0].function.name + '\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token + '\n' }}{% endgeneration %}"
    "{% else %}{{ (m.role | upper)[0] + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def chat(*said, **more):
    """`chat("U a", "A b")`: roles by their letter; a dict is the arguments of a call of f."""
    roles = {"U": "user", "A": "assistant", "S": "system", "T": "tool"}
    messages = []
    for turn in said:
        if isinstance(turn, dict):
            call = {"type": "function", "function": {"name": "f", "arguments": turn}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            messages.append({"role": roles[turn[0]], "content": turn[2:]})
    return {"messages": messages, **more}


TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "description": "d"}}]}

# The row, what is learned of it, and its turns in blocks of 4: where the noisy copy begins, where
# the turn begins and ends, and where its canvas stops, filled with the end token.
TABLE = {
    "one turn": (
        chat("U a", "A b"),
        "<s>U: a\nA: ⟦b</s>⟧\n",
        [(8, 9, 11, 12)],
    ),
    "system prompt": (
        chat("S s", "U a", "A bc"),
        "<s>S: s\nU: a\nA: ⟦bc</s>⟧\n",
        [(12, 14, 17, 20)],
    ),
    "system prompt and answer alone": (
        chat("S s", "A b"),
        "<s>S: s\nA: ⟦b</s>⟧\n",
        [(8, 9, 11, 12)],
    ),
    "tools: a call, its result, an answer": (
        chat("U a", {"x": 1}, "T 3", "A b", **TOOLS),
        '<s>Tools: f\nU: a\nA: ⟦f{"x": 1}</s>⟧\nT: 3\nA: ⟦b</s>⟧\n',
        [(16, 18, 28, 28), (36, 37, 39, 40)],
    ),
    "tools: other arguments of another type": (
        chat("U a", {"x": "s", "y": 2}, **TOOLS),
        '<s>Tools: f\nU: a\nA: ⟦f{"x": "s", "y": 2}</s>⟧\n',
        [(16, 18, 38, 40)],
    ),
    "several turns": (
        chat("U a", "A b", "U c", "A de"),
        "<s>U: a\nA: ⟦b</s>⟧\nU: c\nA: ⟦de</s>⟧\n",
        [(8, 9, 11, 12), (20, 20, 23, 24)],
    ),
    "the user has the last word": (
        chat("U a", "A b", "U c"),
        "<s>U: a\nA: ⟦b</s>⟧\nU: c\n",
        [(8, 9, 11, 12)],
    ),
    "empty answer": (
        chat("U a", "A "),
        "<s>U: a\nA: ⟦</s>⟧\n",
        [(8, 9, 10, 12)],
    ),
    "empty answer, then another": (
        chat("U a", "A ", "U b", "A c"),
        "<s>U: a\nA: ⟦</s>⟧\nU: b\nA: ⟦c</s>⟧\n",
        [(8, 9, 10, 12), (16, 19, 21, 24)],
    ),
    "answer that ends with a block": (
        chat("U a", "A bc"),
        "<s>U: a\nA: ⟦bc</s>⟧\n",
        [(8, 9, 12, 12)],
    ),
    "answer within its own block": (
        chat("U abcd", "A b"),
        "<s>U: abcd\nA: ⟦b</s>⟧\n",
        [(12, 12, 14, 16)],
    ),
    "two of the user in a row": (
        chat("U a", "U b", "A c"),
        "<s>U: a\nU: b\nA: ⟦c</s>⟧\n",
        [(12, 14, 16, 16)],
    ),
    "two of the assistant in a row": (
        chat("U a", "A bc", "A d"),
        "<s>U: a\nA: ⟦bc</s>⟧\nA: ⟦d</s>⟧\n",
        [(8, 9, 12, 12), (16, 16, 18, 20)],
    ),
    "prompt and completion": (
        {"prompt": "ab", "completion": "cd"},
        "<s>ab⟦cd</s>⟧",
        [(0, 3, 6, 8)],
    ),
    "empty completion": (
        {"prompt": "ab", "completion": ""},
        "<s>ab⟦</s>⟧",
        [(0, 3, 4, 4)],
    ),
    "empty prompt": (
        {"prompt": "", "completion": "cd"},
        "<s>⟦cd</s>⟧",
        [(0, 1, 4, 4)],
    ),
    "text": (
        {"text": "abcd"},
        "<s>⟦abcd</s>⟧",
        [(0, 1, 6, 8)],
    ),
}
# Longer than a row: 9 tokens of prompt and 60 x. What was cut does not end.
LONG = chat("U a", "A " + "x" * 60)
LONG_TEXT = "<s>U: a\nA: ⟦" + "x" * 55 + "⟧" + "x" * 5 + "</s>\n"
LONG_TURNS = [(8, 9, 64, 64)]


def kind_of(row):
    return next(name for name in ("messages", "prompt", "text") if name in row)


@pytest.fixture(scope="module")
def prepared(convert_tiny, tmp_path_factory):
    """Factory: the stream of a run on all rows of the table that are of a kind, as `sft` makes it
    from a file, and the collator. Made once for an attention and a kind."""

    @functools.cache
    def prepare(attention, kind):
        folder = tmp_path_factory.mktemp("prepared")
        (folder / "a.jinja").write_text(TEMPLATE)
        rows = [row for row, *_ in TABLE.values() if kind_of(row) == kind]
        rows += [LONG] if kind == "messages" else []
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        length = [] if attention == "full" else ["convert.block_length=4"]
        base = convert_tiny(f"convert.attention={attention}", *length)
        recipe = load_recipe(None, [f"data.max_length={CUT}", "data.packing=false"])
        if kind == "messages":
            recipe = with_values(recipe, data={"chat_template": str(folder / "a.jinja")})
        recipe = with_values(recipe, data={"sources": [{"path": str(folder / "rows.jsonl")}]})
        plan = SFT.prepare(base, recipe)
        trainer = plan.make_trainer(plan, folder / "run", [])
        return trainer.train_dataset, trainer.data_collator, plan.checkpoint.tokenizer

    return prepare


def alone(stream, number, **data):
    """The stream of one of its rows."""
    recipe = with_values(stream.recipe, data=data)
    return PackedConversations(stream.rows.select([number]), stream.ends, recipe, stream.blank)


def number_of(name):
    """Which row of its kind a case of the table is."""
    kind = kind_of(TABLE[name][0])
    return [n for n, (row, *_) in TABLE.items() if kind_of(row) == kind].index(name)


def draws(stream, collator, turns):
    """{first position of a canvas's learned tokens: (positions of the noisy copy, all that was ever
    masked, all that the AR loss covers)} of EPOCHS passes over a row."""
    rows = iter(stream)
    seen = {}
    for _ in range(EPOCHS * (len(turns) if collator.recipe.convert.block_length is None else 1)):
        _, parts = next(rows)
        batch = {name: x[0] for name, x in collator([(0, parts)]).items() if x.ndim == 2}
        noisy, masked = batch["noisy"], batch["scored"]
        covered = set(batch["pos"][batch["ar"]].tolist())
        starts = [turn.start for part in parts for turn in part.turns]
        for n, start in enumerate(starts):
            # A turn's copy is its own run of positions.
            own = noisy & (turn_of(batch) == n)
            copy_, hidden, ar = seen.setdefault(start, ([], set(), set()))
            copy_.append(tuple(batch["pos"][own].tolist()))
            hidden |= set(batch["pos"][masked & own].tolist())
            ar |= covered
        assert not (masked & ~noisy).any()
    return seen


def turn_of(batch):
    """Number of the turn that each noisy slot belongs to: copies stand one behind the other."""
    pos = batch["pos"]
    jump = (pos[1:] != pos[:-1] + 1).long().cumsum(0)
    return jump.new_zeros(len(pos)).index_copy_(0, jump.new_tensor(range(1, len(pos))), jump)


def with_marks(tokenizer, ids, learned):
    """The text, token by token, with what is learned between marks."""
    text, inside = "", False
    for place, token in enumerate(ids):
        if (place in learned) != inside:
            inside = not inside
            text += "⟦" if inside else "⟧"
        text += tokenizer.decode([token])
    return text + ("⟧" if inside else "")


def check(stream, collator, tokenizer, attention, text, turns):
    seen = draws(stream, collator, turns)
    assert sorted(seen) == [start for _, start, _, _ in turns]
    learned = {place for _, start, end, _ in turns for place in range(start, end)}
    for first, start, end, stop in turns:
        copies, hidden, ar = seen[start]
        if attention == "full":  # a row from its first token on, with a tail of any length
            stops = {copy_[-1] + 1 for copy_ in copies}
            assert all(copy_ == tuple(range(copy_[-1] + 1)) for copy_ in copies)
            if stop == CUT:
                assert stops == {stop}
            else:
                assert min(stops) >= end and max(stops) <= CUT and len(stops) > 5
            assert set(range(start, end)) <= hidden <= set(range(start, max(stops)))
            assert not ar  # there is no clean copy
        else:
            assert set(copies) == {tuple(range(first, stop))}
            assert hidden == set(range(start, stop))
            assert ar == learned
    ids = stream.rows[0]["input_ids"]
    hidden = set().union(*(hidden for _, hidden, _ in seen.values()))
    ends = {
        place
        for _, _, end, stop in turns
        for place in range(end, CUT if attention == "full" else stop)
    }
    assert with_marks(tokenizer, ids, hidden - (ends - learned)) == text


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", TABLE)
def test_what_is_learned_of_a_conversation(prepared, name, attention):
    row, text, turns = TABLE[name]
    stream, collator, tokenizer = prepared(attention, kind_of(row))
    check(alone(stream, number_of(name)), collator, tokenizer, attention, text, turns)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_conversation_over_the_length_is_cut_or_left_out(prepared, attention):
    stream, collator, tokenizer = prepared(attention, "messages")
    long = len(stream.rows) - 1
    check(alone(stream, long), collator, tokenizer, attention, LONG_TEXT, LONG_TURNS)
    assert stream.answers().cut == 1 and stream.answers().barren == 0
    dropped = alone(stream, long, overlong="drop")
    assert dropped.example() is None and dropped.answers().barren == 1


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_conversations_in_a_row_keep_apart(prepared, attention):
    stream, collator, _ = prepared(attention, "messages")
    one, two = (next(iter(alone(stream, number_of(n))))[1] for n in ("one turn", "several turns"))
    batch = {name: x[0] for name, x in collator([(0, [*one, *two])]).items() if x.ndim == 2}
    slots = list(zip(batch["doc"].tolist(), batch["pos"].tolist(), strict=True))
    noisy = batch["noisy"].tolist()
    copies = [slot for slot, is_noisy in zip(slots, noisy, strict=True) if is_noisy]
    clean = [slot for slot, is_noisy in zip(slots, noisy, strict=True) if not is_noisy]
    if attention == "full":  # a turn is a row's part
        assert {doc for doc, _ in copies} == {0, 1} and clean == []
        return
    assert copies == [(0, 8), (0, 9), (0, 10), (0, 11)] + [
        (1, place) for place in (8, 9, 10, 11, 20, 21, 22, 23)
    ]
    assert clean == [(0, place) for place in range(12)] + [(1, place) for place in range(24)]
    covered = [slot for slot, is_ar in zip(slots, batch["ar"].tolist(), strict=True) if is_ar]
    assert covered == [(0, 9), (0, 10), (1, 9), (1, 10), (1, 20), (1, 21), (1, 22)]


# Templates

SPECIAL = ["<|eot_id|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"]
CHATML = (  # as many models have it
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """With the special tokens of Llama 3 and ChatML."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def shipped(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


def of_trl(name):
    """The template of a family as its models have it, which trl keeps for comparison."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


WRITTEN = [  # template, conversation, what it writes
    (
        "llama3.1",
        chat("S s", "U  a\n", "A b ", "U c", "A "),
        "<s><|start_header_id|>system<|end_header_id|>\n\n" + LLAMA_DATE + "s<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<|eot_id|>⟧",
    ),
    (
        "llama3.1",
        chat("U a", {"x": 1}, "T 3", "A b"),
        "<s><|start_header_id|>system<|end_header_id|>\n\n" + LLAMA_DATE + "<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "f", "parameters": {"x": 1}}'
        '<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧",
    ),
    (
        "chatml",
        chat("S s", "U a", "A b ", "U c", "A "),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n⟦b <|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n⟦<|im_end|>⟧\n",
    ),
    (
        "plain",
        chat("S s", "U a", "U b", "A c", "U d", "A "),
        "<s>s\nUser: a\nUser: b\nAssistant:⟦ c</s>⟧\nUser: d\nAssistant:⟦</s>⟧",
    ),
]


@pytest.mark.parametrize("name, row, text", WRITTEN, ids=lambda value: str(value)[:20])
def test_what_a_template_writes_and_marks(tokenizer, name, row, text):
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        chat_template=shipped(name),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learned = {place for place, one in enumerate(encoded["assistant_masks"]) if one}
    assert with_marks(tokenizer, encoded["input_ids"], learned) == text


PROMPTS = {
    "llama3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.2": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>assistant\n",
    "plain": "Assistant:",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_template_asks_for_an_answer_where_training_had_one(tokenizer, name):
    before, whole = chat("U a")["messages"], chat("U a", "A b")["messages"]
    asked = rendered(tokenizer, shipped(name), before, add_generation_prompt=True)
    assert asked.endswith(PROMPTS[name])
    answer = " b" if name == "plain" else "b"
    assert rendered(tokenizer, shipped(name), whole).startswith(asked + answer)


@pytest.mark.parametrize("space, otherwise", [("before the marks", 1), ("within the marks", 0)])
def test_a_prompt_whose_end_the_answer_swallows_is_noticed(space, otherwise):
    """Tokens begin at spaces, as in sentencepiece."""
    words = {"▁Q:": 0, "▁a": 1, "▁A:": 2, "▁b": 3, "▁": 4}
    backend = Tokenizer(WordLevel(words, unk_token="▁"))
    backend.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    outside, inside = (" ", "") if space == "before the marks" else ("", " ")
    tokenizer.chat_template = (
        "{%- for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content }}{% else %}"
        f"{{{{ ' A:{outside}' }}}}{{% generation %}}{{{{ '{inside}' + m.content }}}}"
        "{% endgeneration %}{% endif %}{% endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{ ' A:{outside}' }}}}{{% endif %}}"
    )
    assert asked_otherwise(tokenizer, [chat("U a", "A b")]) == otherwise


TOOL_ROW = chat("U a", {"x": [1, "é"]}, "T {}", "A b", **TOOLS)


@pytest.mark.parametrize("row", [chat("S s", "U a", "A b"), chat("A b", "U c"), TOOL_ROW])
@pytest.mark.parametrize("name, family", [("llama3.1", "llama3_1"), ("llama3.2", "llama3_2")])
def test_llama_templates_write_what_the_models_own_do(tokenizer, name, family, row):
    tools = row.get("tools")
    ours, own = (
        rendered(tokenizer, template, row["messages"], tools)
        for template in (shipped(name), of_trl(family))
    )
    assert ours == own and ours is not None


CHOSEN = [  # the tokenizer's own, tools in the rows, the one that is taken
    (of_trl("llama3_1"), False, shipped("llama3.1")),
    (of_trl("llama3_1"), True, shipped("llama3.1")),
    (of_trl("llama3_2"), True, shipped("llama3.2")),
    (CHATML, False, shipped("chatml")),
    (of_trl("qwen3"), True, of_trl("qwen3_training")),
    (of_trl("llama3"), False, of_trl("llama3_training")),
    (TEMPLATE, True, TEMPLATE),
]


@pytest.mark.parametrize("own, tools, chosen", CHOSEN)
def test_a_template_without_marks_is_replaced_by_one_that_writes_the_same(
    tokenizer, make_recipe, own, tools, chosen
):
    tokenizer.chat_template = own
    assert chat_template(tokenizer, make_recipe(), tools) == chosen
    assert tokenizer.chat_template == own


REFUSED = [
    (CHATML.replace("'\n'}}", "' \n'}}"), False),  # a space more
    (CHATML, True),  # it drops calls of tools, ours refuses them
    (of_trl("llama3_1").replace("26 Jul", "27 Jul"), False),
]


@pytest.mark.parametrize("own, tools", REFUSED)
def test_a_template_that_writes_otherwise_is_not_replaced(tokenizer, make_recipe, own, tools):
    tokenizer.chat_template = own
    with pytest.raises(Ar2DiffError, match="does not mark what the assistant says") as error:
        chat_template(tokenizer, make_recipe(), tools)
    assert "data.chat_template" in error.value.fix


def test_the_end_of_a_turn_is_the_templates(tokenizer, tiny_tokenizer, make_recipe):
    ends = {"llama3.1": "<|eot_id|>", "chatml": "<|im_end|>", "plain": "</s>"}
    for name, end in ends.items():
        assert turn_end(tokenizer, shipped(name)) == tokenizer.convert_tokens_to_ids(end)
    # A tokenizer to which it is text, no token: the end of an answer could not be told.
    with pytest.raises(Ar2DiffError, match="does not end answers with an end token"):
        chat_template(tiny_tokenizer, make_recipe(data={"chat_template": "chatml"}))


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_template_without_tools_drops_no_call(tokenizer, name):
    assert rendered(tokenizer, shipped(name), TOOL_ROW["messages"]) is None
