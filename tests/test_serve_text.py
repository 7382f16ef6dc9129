"""What the server makes of tokens, templates and requests, without a server."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from served import ROOT, TEMPLATE
from transformers import AutoTokenizer

pytest.importorskip("fastapi")

from ar2diff.config.safe_json import parse_json
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.tokens import text_after
from ar2diff.serving.conversation import ChatRequest
from ar2diff.serving.events import Committed, Draft, Mailbox
from ar2diff.serving.protocol import CompletionRequest, read_request
from ar2diff.serving.refusal import Refusal
from ar2diff.serving.text import Stops, Text
from ar2diff.serving.tools import layout_of

WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ tools | tojson if tools else '' }}"
    "{{ m.content }}[/INST]{% elif m.tool_calls %}<s>[{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "ar2diff" / "demo" / "model")


def drawn_ids(tokenizer, seed, count=60):
    """Ids of text with umlauts, emoji and broken bytes."""
    draw = random.Random(seed)
    texts = ["Mia saw a dog.", "Grüße!", "🙂", " ", "\n", "<tool", "0123", "\ud7a3"]
    ids = []
    while len(ids) < count:
        ids += tokenizer(draw.choice(texts), add_special_tokens=False).input_ids
        if draw.random() < 0.2:
            ids.append(draw.randrange(len(tokenizer)))
    return ids[:count]


# Text


@pytest.mark.parametrize("seed", range(8))
def test_parts_of_a_text_are_the_whole_and_never_change(tokenizer, seed):
    ids = drawn_ids(tokenizer, seed)
    before, new = ids[:7], ids[7:]
    text, shown, draw = Text(tokenizer, before), "", random.Random(seed)
    while new:
        size = draw.randrange(1, 6)
        part, new = new[:size], new[size:]
        shown += text.add(part)
        assert "\ufffd" not in shown[-1:]
    whole = text_after(tokenizer, before, ids[7:])
    assert shown + text.end(SimpleNamespace(text=whole), False) == whole == text.shown
    pieces = [token.text for token in text.ready(0, True)]
    assert "".join(pieces) == whole and len(pieces) == len(ids) - 7


def written(tokenizer, prompt, answer, stops):
    """What is shown of an answer that is written token by token until a stop string ends it."""
    before = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + answer).input_ids[len(before) :]
    ends, text, shown = Stops(tokenizer, stops, len(before)), Text(tokenizer, before, stops), []
    for count in range(1, len(ids) + 1):
        shown.append(text.add(ids[count - 1 : count]))
        if ends(0, torch.tensor([*before, *ids[:count]])):
            break
    whole = text_after(tokenizer, before, ids[:count])
    shown.append(text.end(SimpleNamespace(text=whole), True))
    return shown


@pytest.mark.parametrize("stop", [".", "She", "e was", " b", "each. S", "Grüße", "zz"])
def test_a_text_ends_before_a_stop_string_no_part_of_which_is_shown(tokenizer, stop):
    answer = " was at the beach. She was glad. Grüße"
    place = answer.find(stop)
    wanted = answer if place < 0 else answer[:place]
    shown = written(tokenizer, "One day Mia", answer, [stop, "never"])
    assert "".join(shown) == wanted
    assert all(wanted.startswith("".join(shown[:n])) for n in range(len(shown)))


def test_a_stop_string_does_not_begin_in_the_prompt(tokenizer):
    assert "".join(written(tokenizer, "One day Mia", " was here", ["a w", "zz"])) == " was here"


def test_what_stands_before_a_stop_string_comes_at_once(tokenizer):
    shown = written(tokenizer, "One day", " a dog saw a bird.", ["bird"])
    assert "".join(shown[:3]) == " a dog saw"


def test_a_slow_reader_loses_drafts_and_no_text():
    box = Mailbox(lambda: None)
    for n in range(5):
        box.put(Committed([n], [0.0], [n + 1], n + 1))
        box.put(Draft(n, [n, 9], [0.0] * 2, [n + 1, 0], [False] * 2, [], n + 1, 0.0))
    *text, draft = box.take()
    assert [e.ids for e in text] == [[n] for n in range(5)]
    assert (draft.start, draft.ids, box.take()) == (0, [0, 1, 2, 3, 4, 9], [])


# Tools


@pytest.fixture(scope="module")
def layouts(tokenizer):
    """Factory: the layout of calls in a template."""

    def of(template):
        own = AutoTokenizer.from_pretrained(ROOT / "ar2diff" / "demo" / "model")
        own.chat_template = template
        return layout_of(own)

    return of


@pytest.mark.parametrize(
    "text",
    [
        'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>',
        'Hm.<tool_call>{"name":"weather","arguments":{"city":"Bonn"}}</tool_call>',
        'Hm. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}',
    ],
)
def test_a_call_is_read_in_the_layout_of_the_template(layouts, text):
    layout = layouts(TEMPLATE.read_text())
    content, (call,) = layout.calls(text, ["weather", "weathers"])
    assert (content, call.name, json.loads(call.arguments)) == ("Hm.", "weather", {"city": "Bonn"})
    assert all(layout.begins(text[:n]) <= 3 for n in range(len(text)))


def test_several_calls_are_read(layouts):
    one = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
    cities = "Bonn", 'Rom {"}'
    text = "\n".join(one % json.dumps({"city": city}) for city in cities)
    content, calls = layouts(TEMPLATE.read_text()).calls(text, ["weather"])
    assert content == ""
    assert [json.loads(call.arguments)["city"] for call in calls] == [*cities]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": ',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        "<tool_call>",
        "I would call weather.",
    ],
)
def test_what_is_no_call_stays_text(layouts, text):
    assert layouts(TEMPLATE.read_text()).calls(text, ["weather"]) == (text, [])


def test_a_forced_call_matches_and_is_read(layouts):
    layout = layouts(TEMPLATE.read_text())
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    assert layout.opening()[0] == ""
    assert re.fullmatch(layout.pattern([WEATHER]), text)
    assert not re.fullmatch(layout.pattern([WEATHER]), text.replace("city", "town"))


def test_special_tokens_and_ids_of_a_layout_are_no_text_of_the_model(layouts):
    layout = layouts(MISTRAL)
    assert layout.opening()[0] == "<s>"
    text = '[{"name": "weather", "arguments": {"city": "Bonn"}, "id": "aB3dE6gH9"}]'
    assert re.fullmatch(layout.pattern([WEATHER]), text)
    both = text[:-1] + ', {"name": "weather", "arguments": {}, "id": "aB3dE6gH1"}]'
    assert [call.arguments for call in layout.calls(both, ["weather"])[1]] == [
        '{"city": "Bonn"}', "{}",
    ]  # fmt: skip


def test_what_stands_before_every_answer_is_no_part_of_a_call(layouts):
    thinking = TEMPLATE.read_text().replace(
        "{%- if message.content %}",
        "{%- if message.role == 'assistant' %}{{ '\n<think>\n</think>' }}{% endif %}"
        "{%- if message.content %}",
    )
    layout = layouts(thinking)
    assert layout.lead == layout.opening()[0] == "<think>\n</think>\n"
    assert layout.head == '<tool_call>\n{"name": "'


def test_a_template_may_want_arguments_as_a_text(layouts):
    text = TEMPLATE.read_text().replace("arguments | tojson", "arguments + ''")
    layout = layouts(text)
    assert layout.as_text and layout.head == layouts(TEMPLATE.read_text()).head
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = read_request(ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    for as_text, wanted in ((True, '{"a": 1}'), (False, {"a": 1})):
        rendered = message.messages[0].rendered(as_text)
        assert rendered["tool_calls"][0]["function"]["arguments"] == wanted


def test_a_template_that_renders_no_tools_has_no_layout(layouts):
    assert layouts((ROOT / "ar2diff/data/templates/chatml.jinja").read_text()) is None
    shouts = "{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert layouts(shouts) is None
    assert layouts((ROOT / "ar2diff/data/templates/llama3.2.jinja").read_text()) is not None


def test_a_schema_that_is_not_carried_is_refused_for_a_forced_call(layouts):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
    with pytest.raises(Ar2DiffError, match="minimum"):
        layouts(TEMPLATE.read_text()).pattern([{"name": "f", "parameters": schema}])


# Requests

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("kind", "value", "param"),
    [
        (CompletionRequest, {"prompt": 3}, "prompt"),
        (CompletionRequest, {"prompt": ["a", 3]}, "prompt"),
        (CompletionRequest, {"prompt": [[1], []]}, "prompt"),
        (CompletionRequest, {"prompt": [True]}, "prompt"),
        (CompletionRequest, {}, "prompt"),
        (CompletionRequest, {"prompt": "a", "max_tokens": "3"}, "max_tokens"),
        (CompletionRequest, {"prompt": "a", "max_tokens": 3.0}, "max_tokens"),
        (CompletionRequest, {"prompt": "a", "max_tokens": True}, "max_tokens"),
        (CompletionRequest, {"prompt": "a", "stop": [""]}, "stop"),
        (CompletionRequest, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias"),
        (CompletionRequest, {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        (CompletionRequest, {"prompt": "a", "presence_penalty": False}, "presence_penalty"),
        (CompletionRequest, {"prompt": "a", "messages": []}, "messages"),
        (CompletionRequest, {"prompt": "a", "revise": [[1]]}, "revise[0]"),
        (CompletionRequest, {"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "messages[0]"),
        (ChatRequest, {**HI, "functions": []}, "functions"),
        (ChatRequest, {**HI, "response_format": {"type": "json_object"}}, "response_format"),
        (ChatRequest, {**HI, "tool_choice": "some"}, "tool_choice"),
        (ChatRequest, {**HI, "tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools[0].function.name"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(kind, value, param):
    with pytest.raises(Refusal) as refusal:
        read_request(kind, value)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_a_part_of_a_message_that_is_no_text_is_named_with_its_type():
    parts = [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {"data": "x"}}]
    with pytest.raises(Refusal, match="input_audio") as refusal:
        read_request(ChatRequest, {"messages": [{"role": "user", "content": parts}]})
    assert refusal.value.param == "messages[0].content[1]"


def test_neutral_fields_of_other_clients_pass():
    neutral = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "top_p": 1, "service_tier": "auto", "stop": None, "n": None,
    }  # fmt: skip
    request = read_request(CompletionRequest, {"prompt": "a", **neutral})
    assert request.settings() == {}
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": []}
    read_request(ChatRequest, {"messages": [answer], "modalities": ["text"], "tools": []})


def test_a_hostile_body_is_refused_at_its_first_fault():
    bodies = [
        (ChatRequest, {"messages": [{}] * 300_000}),
        (ChatRequest, {str(n): 1 for n in range(300_000)}),
        (CompletionRequest, {"prompt": "a", "choice": [1] * 300_000}),
    ]
    for kind, value in bodies:
        with pytest.raises(ValidationError) as error:
            kind.model_validate(value)
        assert error.value.error_count() == 1


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": 1e999}', '{"a": NaN}'])
def test_json_that_two_readers_could_read_differently_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text, constants=False, twice=False)
