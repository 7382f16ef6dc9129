"""A conversation without a terminal: answers, history, commands, a full context."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.chat import COMMANDS, Chat, Exchange, complete_chat
from ar2diff.generation.chat_settings import parse_settings
from ar2diff.generation.complete import complete
from ar2diff.generation.events import Answer, End, Note, Problem, Step

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain(converted):
    return load_checkpoint(str(converted))


@pytest.fixture(scope="module")
def templated(plain):
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return replace(plain, tokenizer=tokenizer)


def say(chat, line):
    """The events of a line, by kind."""
    events = list(chat.events(line))
    return {kind: [e for e in events if isinstance(e, kind)] for kind in {*map(type, events)}}


def answer(chat, line):
    return say(chat, line)[Answer][0].result


def test_a_line_leads_to_steps_and_an_answer(plain):
    chat = Chat(plain, {"max_new_tokens": 9, "mode": "diffusion"})
    states, events = [], []
    for event in chat.events("the cat"):
        events.append(event)
        if isinstance(event, Step):
            states.append(event.writings[0].state())
    assert [type(event) for event in events] == [Step] * len(states) + [Answer]
    result = events[-1].result
    assert [state.forwards for state in states] == list(range(1, result.forwards + 1))
    assert result.text == complete(plain, "the cat", max_new_tokens=9, mode="diffusion").text
    assert result.new_tokens == 9
    assert not events[-1].stopped
    assert "9 tokens, " in events[-1].summary


def test_a_line_that_is_not_utf_8_is_a_problem_and_the_chat_goes_on(plain):
    chat = Chat(plain, {"max_new_tokens": 2})
    for line in ("a\udcff", "/set a\udcff=1"):
        assert "is not valid UTF-8" in say(chat, line)[Problem][0].what
    assert answer(chat, "the cat").new_tokens == 2


def test_without_a_template_the_text_goes_on(plain):
    chat = Chat(plain, {"max_new_tokens": 8})
    assert any("no chat template" in note.text for note in chat.greeting())
    first = answer(chat, "the cat").text
    text = f"the cat{first} and so"
    second = answer(chat, " and so").text
    assert second == complete(plain, text, max_new_tokens=8).text
    third = answer(chat, "").text  # an empty line: go on
    text += second
    assert third == complete(plain, text, max_new_tokens=8).text


def test_a_word_is_set_apart_from_the_answer_before_it(plain):
    chat = Chat(plain, {"max_new_tokens": 8, "stop_strings": ["x"]})
    chat.exchanges = [Exchange("a", "b", False)]
    assert answer(chat, "c").text == complete(plain, "ab c", max_new_tokens=8).text
    chat.exchanges = [Exchange("a", "b", True)]  # that text has ended: another begins
    assert answer(chat, "c").text == complete(plain, "c", max_new_tokens=8).text


def test_with_a_template_the_history_is_in_it(templated, plain):
    chat = Chat(templated, {"max_new_tokens": 8}, system="be brief")
    assert not any("no chat template" in note.text for note in chat.greeting())
    first = answer(chat, "hello").text
    text = "<system>be brief<user>hello<assistant>"
    assert first == complete(plain, text, max_new_tokens=8).text
    second = answer(chat, "and?").text
    text += f"{first}<user>and?<assistant>"
    assert second == complete(plain, text, max_new_tokens=8).text
    assert say(chat, " ") == {Note: [Note("type a message, or /help")]}


def test_messages_are_answered_as_the_template_renders_them(templated, plain):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    result = complete_chat(templated, messages, max_new_tokens=8)
    text = "<system>be brief<user>hello<assistant>"
    assert result.text == complete(plain, text, max_new_tokens=8).text
    assert (result.new_tokens, result.prompt) == (8, None)
    assert "prompt" not in result.to_dict()
    with pytest.raises(Ar2DiffError, match="has no chat template"):
        complete_chat(plain, messages)
    with pytest.raises(Ar2DiffError, match="rejects the conversation"):
        complete_chat(templated, [{"role": "user"}, "hello"])


def test_a_template_that_refuses_is_no_crash(plain):
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    (problem,) = say(Chat(replace(plain, tokenizer=tokenizer), {}), "hello")[Problem]
    assert "no such role" in problem.what


def test_text_that_spells_the_mask(plain, templated):
    for checkpoint in (plain, templated):
        (problem,) = say(Chat(checkpoint, {}), "a <|mask|> b")[Problem]
        assert "contains the mask token" in problem.what


def test_an_answer_can_be_stopped_and_the_talk_goes_on(plain):
    chat = Chat(plain, {"max_new_tokens": 60, "mode": "ar"})
    events = chat.events("the cat")
    assert isinstance(next(events), Step)
    assert isinstance(next(events), Step)
    chat.stop()
    (end,) = list(events)
    assert end.stopped
    assert end.result.forwards == end.result.new_tokens == 2
    assert chat.exchanges[0].answer == end.result.text
    assert not say(chat, " and")[Answer][0].stopped


def test_stopping_before_anything_is_decided_without_a_gap_keeps_noExchange(plain):
    chat = Chat(plain, {"max_new_tokens": 60, "steps_per_block": 8, "seed": 1, "order": "random"})
    for seed in range(9):
        chat.settings["seed"] = seed
        events = chat.events("the cat")
        assert isinstance(next(events), Step)
        chat.stop()
        (end,) = list(events)
        if not end.result.new_tokens:
            break
        chat.exchanges.clear()
    assert end.result.new_tokens == 0
    assert chat.exchanges == []


def test_settings_are_checked_before_they_hold(plain):
    chat = Chat(plain, {"max_new_tokens": 4})
    for line, what in (
        ("/set thresold=0.5", "there is no option 'thresold'"),
        ("/set steps_per_block=many", "steps_per_block is 'many'"),
        ("/set steps_per_block=2.5", "steps_per_block is 2.5"),
        ("/set temperature=-1", "temperature is -1"),
        ("/set cache=dual", "cache 'dual' does not work with causal_context attention"),
        (
            "/set steps_per_block=2 entropy_bound=1",
            "entropy_bound cannot be combined with threshold or steps_per_block",
        ),
        ("/set block_length=99", "block_length=99 is above the model's block length of 8"),
        ("/set", "/set needs key=value"),
        ("/set steps", "'steps' is not of the form key=value"),
        ('/set stop="a', "cannot be read"),
        ("/mode sideways", "mode is 'sideways'"),
        ("/seed x", "seed is 'x'"),
        ("/seed 2.5", "seed is 2.5"),
        ("/save", "/save needs a file name"),
        (f"/save {'a' * 999}", "not a file name"),
        ("/undo", "there is nothing to undo"),
        ("/hepl", "there is no command /hepl"),
    ):
        events = say(chat, line)
        assert list(events) == [Problem], line
        assert what in events[Problem][0].what
        assert 0 < len(events[Problem][0].fix) < 100  # it fits into a line
        assert chat.settings == {"max_new_tokens": 4}
    for typed, meant in (("hepl", "help"), ("exit", "quit"), ("clear", "reset")):
        assert f"did you mean /{meant}?" in say(chat, f"/{typed}")[Problem][0].what


def test_settings_hold_for_the_answers_that_follow(plain):
    chat = Chat(plain, {"max_new_tokens": 4})
    say(chat, "/set max-new-tokens=12 steps_per_block=2")
    assert answer(chat, "the cat").new_tokens == 12
    say(chat, "/set steps_per_block= max_new_tokens=3")
    assert chat.settings == {"max_new_tokens": 3}
    say(chat, "/mode ar")
    result = answer(chat, "the cat")
    assert result.forwards == result.new_tokens == 3
    (shown,) = say(chat, "/show")[Note]
    assert "max_new_tokens       3  (yours)" in shown.text
    assert "2 in a context of 512 tokens" in shown.text


def test_an_answer_is_compared_with_the_ar_mode(plain):
    chat = Chat(plain, {"max_new_tokens": 12, "mode": "diffusion"}, compare=True)
    events = say(chat, "the cat")
    (end,) = events[Answer]
    assert len(events[Step]) == end.result.forwards + end.beside.forwards
    assert end.beside.text == complete(plain, "the cat", max_new_tokens=12, mode="ar").text
    assert chat.exchanges == [Exchange("the cat", end.result.text, False)]
    assert "no comparison" in say(chat, "/compare")[Note][0].text
    assert say(chat, " and")[Answer][0].beside is None
    say(chat, "/mode ar")
    assert "the mode is already ar" in say(chat, "/compare")[Problem][0].what


def test_values_of_set():
    assert parse_settings('steps_per_block=4 threshold=0.5 stop="a\\nb" order=margin seed=') == {
        "steps_per_block": 4,
        "threshold": 0.5,
        "stop_strings": ["a\nb"],
        "order": "margin",
        "seed": None,
    }


def test_the_same_seed_writes_the_same_again(plain):
    chat = Chat(plain, {"max_new_tokens": 12, "temperature": 1.0})
    say(chat, "/seed 5")
    first = answer(chat, "the cat").text
    say(chat, "/undo")
    assert answer(chat, "the cat").text == first
    say(chat, "/reset")
    say(chat, "/seed 6")
    assert answer(chat, "the cat").text != first


def test_conversation_is_saved_once(templated, tmp_path):
    chat = Chat(templated, {"max_new_tokens": 4})
    text = answer(chat, "hello").text
    assert say(chat, f"/save {tmp_path}/chat.json")[Note] == [Note(f"wrote {tmp_path}/chat.json")]
    assert json.loads((tmp_path / "chat.json").read_text()) == {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": text},
        ]
    }
    assert "exists" in say(chat, f"/save {tmp_path}/chat.json")[Problem][0].what
    assert "No such file" in say(chat, f"/save {tmp_path}/none/chat.json")[Problem][0].what


def test_help_names_every_command_and_each_is_there(plain):
    chat = Chat(plain, {})
    (note,) = say(chat, "/help")[Note]
    assert "goes on in the next line" in note.text
    for name, (usage, _) in COMMANDS.items():
        assert usage in note.text
        assert usage.startswith(f"/{name}")
        assert list(chat.events(f"/{name}"))
    assert say(chat, "/quit") == {End: [End()]}


def test_two_slashes_begin_a_text_with_one(plain):
    chat = Chat(plain, {"max_new_tokens": 4})
    assert answer(chat, "//quit").text == complete(plain, "/quit", max_new_tokens=4).text


@pytest.mark.parametrize("kind", ("plain", "templated"))
def test_a_full_context_drops_the_oldest_exchanges(request, kind):
    checkpoint = request.getfixturevalue(kind)
    chat = Chat(checkpoint, {"max_new_tokens": 60, "min_new_tokens": 60, "mode": "ar"})
    notes = []
    for _ in range(8):
        events = say(chat, "a" * 60)
        assert events[Answer][0].result.new_tokens == 60
        notes += [note.text for note in events.get(Note, [])]
    assert 0 < chat.dropped < 8
    assert len(chat.exchanges) == 8
    assert any("were dropped" in note for note in notes)
    say(chat, "/undo")
    (problem,) = say(chat, "b" * 600)[Problem]
    assert "your message has 6" in problem.what
    assert "only has room for 512" in problem.what


def test_room_for_less_than_asked_for_is_said(plain):
    chat = Chat(plain, {"max_new_tokens": 600, "mode": "speculative"})
    events = say(chat, "the cat")
    assert events[Note][0] == Note("the context has room for only 504 of 600 new tokens")
    assert events[Answer][0].result.new_tokens <= 504


def test_a_model_that_is_not_converted_talks_left_to_right(tiny_checkpoint):
    base = load_checkpoint(str(tiny_checkpoint))
    with pytest.raises(Ar2DiffError, match="is not converted"):
        Chat(base, {})
    chat = Chat(base, {"mode": "ar", "max_new_tokens": 5})
    assert answer(chat, "the cat").forwards == 5
    assert "is not converted" in say(chat, "/mode diffusion")[Problem][0].what
