"""`ar2diff serve` as a process of its own, asked by the official client and by hostile ones."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from served import LONG, Process, ask, chat_model, until

import ar2diff

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("outlines_core")

KEY = "a key for tests, and no other"
MIA = "One day Mia"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Does something.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["home", "school"]}},
                "required": ["place"],
            },
        },
    }
    for name in ("go", "leave")
]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("served") / "mia")


@pytest.fixture(scope="module")
def model(folder):
    """The same model in this process: what it writes alone."""
    return ar2diff.load(folder)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\nanother key\n")
    process = Process(folder, "--api-key-file", keys, "--max-tokens", 600, "--max-batch", 12)
    yield process
    process.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=LONG)


@pytest.fixture
def complete(client):
    """Factory: complete(prompt, n=2) is what the server makes of it."""

    def of(prompt=MIA, max_tokens=12, extra_body=None, **fields):
        if extra_body:
            fields["extra_body"] = extra_body
        return client.completions.create(
            model="mia", prompt=prompt, max_tokens=max_tokens, **fields
        )

    return of


@pytest.fixture
def chat(client):
    def of(messages=HI, max_tokens=60, **fields):
        return client.chat.completions.create(
            model="mia", messages=messages, max_tokens=max_tokens, **fields
        )

    return of


def joined(stream):
    """The text of a stream, why it ended, and its chunks."""
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason, chunks


# Models


def test_models_are_listed_with_what_they_can(client):
    (model,) = client.models.list().data
    about = client.models.retrieve("mia").ar2diff
    assert model.id == "mia" and model.ar2diff == about
    assert about["modes"] == ["diffusion", "speculative", "ar"] and about["context"] == 2048
    assert about["chat"] and about["tools"] and about["max_tokens"] == 600


# Completions


@pytest.mark.parametrize("mode", ["speculative", "ar", "diffusion"])
def test_a_completion_is_what_python_writes(complete, model, mode):
    result = model.generate(MIA, max_new_tokens=12, mode=mode)
    answer = complete(extra_body={"mode": mode})
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (result.text, "length")
    assert choice.ar2diff["mode"] == mode and choice.ar2diff["forwards"] > 0
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)
    assert joined(complete(stream=True, extra_body={"mode": mode}))[:2] == (result.text, "length")


def test_prompts_have_four_forms(complete, model):
    ids = model.tokenizer(MIA).input_ids
    texts = [
        [choice.text for choice in complete(prompt).choices]
        for prompt in (MIA, [MIA, "A soft"], ids, [ids, ids])
    ]
    assert texts[0] == texts[2] == texts[1][:1] == texts[3][:1] == texts[3][1:]
    assert texts[1][1] == model.generate("A soft", max_new_tokens=12).text


def test_several_answers_are_drawn_as_python_draws_them(complete, model):
    drawn = {"temperature": 1.0, "seed": 3}
    answer = complete([MIA, "A soft"], n=3, **drawn)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts[:3])) > 1
    assert texts[0] == model.generate(MIA, max_new_tokens=12, **drawn).text
    assert texts == [choice.text for choice in complete([MIA, "A soft"], n=3, **drawn).choices]
    assert complete([MIA], n=2, **drawn).usage.completion_tokens == 24


def test_a_stop_string_ends_an_answer(complete, model):
    whole = model.generate(MIA, max_new_tokens=12).text
    stop = whole[9:13]
    answer = complete(stop=["never", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:9], "stop")
    text, reason, chunks = joined(complete(stop=stop, stream=True))
    assert (text, reason) == (whole[:9], "stop")
    assert not any(stop[:1] in chunk.choices[0].text[-1:] for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_tokens(complete, stream):
    if stream:
        _, _, chunks = joined(complete(stream=True, logprobs=1))
        found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        tokens, values, offsets = (
            [x for part in found for x in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "text_offset")
        )
        text = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        (choice,) = complete(logprobs=1).choices
        text, found = choice.text, choice.logprobs
        tokens, values, offsets = found.tokens, found.token_logprobs, found.text_offset
        assert found.top_logprobs == [
            {t: pytest.approx(v, abs=1e-5)} for t, v in zip(tokens, values, strict=True)
        ]
    assert len(tokens) == 12 and "".join(tokens) == text
    assert all(text[at:].startswith(t) for at, t in zip(offsets, tokens, strict=True))
    assert all(value <= 0 for value in values)


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
def test_alternatives_are_the_likeliest_tokens(complete, mode):
    (choice,) = complete(logprobs=3, extra_body={"mode": mode}).choices
    found = choice.logprobs
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 3 and max(top, key=top.get) == token  # greedy
        assert top[token] == value and sum(map(math.exp, top.values())) < 1.001


def test_an_echo_has_the_log_probabilities_of_the_ar_mode(complete, model):
    from ar2diff.diffusion.likelihood import ar_nll

    (choice,) = complete(echo=True, logprobs=1, max_tokens=3).choices
    found = choice.logprobs
    assert choice.text.startswith(MIA) and len(found.tokens) == 7
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    row = model.tokenizer(choice.text).input_ids
    nats = ar_nll(model.model, [row], model.checkpoint.suppressed).nats.item()
    assert -sum(found.token_logprobs[1:]) == pytest.approx(nats, abs=1e-3)
    best = [max(top, key=top.get) for top in found.top_logprobs[4:]]
    assert best == found.tokens[4:]  # greedy
    (choice,) = complete(echo=True, max_tokens=0).choices
    assert (choice.text, choice.finish_reason) == (MIA, "length")
    assert joined(complete(echo=True, max_tokens=2, stream=True))[0].startswith(MIA)


def test_a_suffix_makes_a_gap_that_is_filled(complete, model):
    result = model.infill(MIA, " was glad.", length=5)
    (choice,) = complete(suffix=" was glad.", max_tokens=5).choices
    assert (choice.text, choice.finish_reason) == (result.filled[0], "stop")
    stream = complete(suffix=" was glad.", max_tokens=5, stream=True)
    assert joined(stream)[:2] == (result.filled[0], "stop")


def test_spans_of_a_text_are_written_anew(client, model):
    text = "One day Mia was at the beach. She was glad."
    result = model.revise(text, "Mia", "the beach")
    spans = [[text.index(part), text.index(part) + len(part)] for part in ("Mia", "the beach")]
    asked = {"model": "mia", "prompt": text, "extra_body": {"revise": spans}}
    (choice,) = client.completions.create(**asked).choices
    assert choice.text == result.text != text
    assert joined(client.completions.create(**asked, stream=True))[0] == result.text


@pytest.mark.parametrize(
    "constraint",
    [{"regex": "[0-9]{2,4}!"}, {"choice": [" yes", " no"]}, {"json_schema": SCHEMA}],
)
def test_an_answer_matches_its_constraint(complete, model, constraint):
    (choice,) = complete(max_tokens=24, extra_body=constraint).choices
    assert choice.text == model.generate(MIA, max_new_tokens=24, **constraint).text
    assert choice.ar2diff["matches"] is True


@pytest.mark.parametrize("mode", ["diffusion", "speculative"])
def test_drafts_show_an_answer_while_it_is_denoised(complete, mode):
    stream = complete(stream=True, extra_body={"drafts": True, "mode": mode})
    text, _, chunks = joined(stream)
    shown, forwards = [], []
    for chunk in chunks:
        if draft := getattr(chunk, "draft", None):
            assert draft["index"] == 0 and draft["start"] <= len(shown)
            del shown[draft["start"] :]
            shown += draft["tokens"]
            forwards.append(draft["forward"])
    assert "".join(token["text"] for token in shown) == text
    assert {token["state"] for token in shown} <= {"decided", "drafted"}
    assert all(0 < token["p"] <= 1 and token["step"] for token in shown)
    assert forwards == sorted(forwards)
    assert "draft" not in json.dumps([c.model_dump() for c in complete(stream=True)])


def test_a_stream_ends_with_usage_if_it_is_asked_for(complete):
    _, _, chunks = [*joined(complete(stream=True))]
    assert all(chunk.choices and not chunk.usage for chunk in chunks)
    chunks = list(complete(stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 4 + 24


# Chats


def test_a_chat_is_answered_by_the_template(chat, model):
    result = model.chat(HI, max_new_tokens=20)
    answer = chat(max_tokens=20)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", result.text)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert chat(parts, max_tokens=20).choices[0].message.content == result.text
    chunks = list(chat(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == result.text
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].usage == answer.usage


def test_an_answer_is_as_long_as_the_context_allows_unless_told(client):
    long = [{"role": "user", "content": "a " * 1000}]
    answer = client.chat.completions.create(model="mia", messages=long, n=1)
    assert answer.usage.total_tokens <= 2048


def test_a_chat_is_held_to_a_schema(chat):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    answer = chat(response_format=form, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert json.loads(choice.message.content)["a"] in (1, 2)
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(choice.message.content)
    assert bytes(b for token in tokens for b in token.bytes).decode().startswith("{")
    for (
        token
    ) in tokens:  # the model's own distribution, which would rather have said something else
        first, second = token.top_logprobs
        assert token.logprob <= first.logprob and second.logprob <= first.logprob


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ("go", "leave")), ({"type": "function", "function": {"name": "leave"}}, "leave")],
)
def test_a_forced_call_fits_its_parameters(chat, choice, names):
    (answer,) = chat(tools=TOOLS, tool_choice=choice).choices
    (call,) = answer.message.tool_calls
    assert call.function.name in names and answer.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["place"] in ("home", "school")
    chunks = list(chat(tools=TOOLS, tool_choice=choice, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == call.function.name and calls[0].id
    assert "".join(c.function.arguments for c in calls) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_tools_are_optional_and_their_results_are_read(chat):
    called = {"name": "go", "arguments": '{"place": "home"}'}
    messages = [
        *HI,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "c1", "type": "function", "function": called}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]  # fmt: skip
    (with_tools,) = chat(messages, tools=TOOLS, max_tokens=10).choices
    assert with_tools.message.content and not with_tools.message.tool_calls
    answer = chat(HI, tools=TOOLS, tool_choice="none", max_tokens=10)
    assert answer.usage.prompt_tokens == chat(HI, max_tokens=10).usage.prompt_tokens


# Wrong requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"promt": "a"}}, "promt"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 601}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "a " * 3000}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "a", "stop": "b"}, "stop"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"echo": True, "extra_body": {"mode": "diffusion"}}, "mode"),
        ({"extra_body": {"mode": "ar", "steps_per_block": 2}}, "steps_per_block"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"regex": "a", "choice": ["a"]}}, "regex"),
        ({"extra_body": {"json_schema": {"minimum": 3}}}, "json_schema"),
        ({"max_tokens": None, "extra_body": {"revise": [[0, 999]]}}, "revise"),
    ],
)
def test_a_wrong_completion_names_its_field(complete, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(**fields)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error" and ";" in error.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema":
          {"name": "a", "schema": SCHEMA}}}, "response_format"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"tools": TOOLS, "tool_choice": "required", "max_tokens": 5}, "tools"),
    ],
)  # fmt: skip
def test_a_wrong_chat_names_its_field(chat, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(**fields)
    assert error.value.param == param


def test_errors_come_before_a_stream_begins(complete):
    with pytest.raises(openai.BadRequestError):
        complete(stream=True, temperature=-1)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY} "])
def test_a_wrong_key_is_refused(server, key):
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key.strip() + "x", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    assert server.get("/metrics")[0] == 401
    assert server.get("/")[0] == 200 and server.get("/health")[0] == 200


def test_paths_and_methods_that_are_not_there(server):
    bearer = {"authorization": f"Bearer {KEY}"}
    for method, path, status in (
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/x", 404),
        ("GET", "/../server.py", 404), ("GET", "/%2e%2e/server.py", 404), ("OPTIONS", "/", 405),
    ):  # fmt: skip
        found, headers, body = server.get(path, method, **bearer)
        assert (found, json.loads(body)["error"]["param"]) == (status, None), (method, path)
        assert "access-control-allow-origin" not in headers


def test_every_answer_tells_browsers_to_be_careful(server):
    for path in ("/", "/health", "/v1/models", "/nothing"):
        headers = server.get(path)[1]
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_logs_and_metrics_tell_numbers_and_no_texts(server, complete):
    said = "A secret word"
    complete(said, max_tokens=5, user="someone")
    until(lambda: server.told("request")[-1]["path"] == "/v1/completions", "a line of the log")
    last = server.told("request")[-1]
    assert (last["status"], last["tokens"]) == (200, 5) and last["forwards"] > 0
    everything = "".join(server.raw)
    assert not any(word in everything for word in (said, "secret", KEY, "someone"))
    numbers = metrics(server)
    assert numbers['ar2diff_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert numbers["ar2diff_tokens_total"] >= 5 and numbers["ar2diff_engine_alive"] == 1


def metrics(server):
    text = server.get("/metrics", authorization=f"Bearer {KEY}")[2].decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in pairs}


# The guide


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydantic, about fields that are ours
def test_the_snippets_of_the_guide_run(server, tmp_path, capsys):
    """In the order of the page, since later ones use what earlier ones have made."""
    page = (ROOT / "docs" / "guides" / "serve.md").read_text(encoding="utf-8")
    page = page.replace("http://127.0.0.1:8000", server.url).replace(
        'api_key="none"', f'api_key="{KEY}"'
    )
    names: dict[str, object] = {}
    for language, code in re.findall(r"^```(python|console)\n(.*?)^```", page, re.M | re.S):
        if language == "python":
            exec(code, names)
            assert capsys.readouterr().out.strip(), code
        for command in re.findall(r"^\$ (curl .*)$", code, re.M):
            words = [*shlex.split(command), "--fail", "-H", f"Authorization: Bearer {KEY}"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=LONG)
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
    assert names["filled"].choices[0].finish_reason == "stop"
    assert names["revised"].choices[0].text.endswith(" It is good to share.")
    assert len(names["tokens"]) == 24 and names["chosen"].choices[0].text in ("yes", "no")
    assert json.loads(names["call"].function.arguments)["place"] in ("home", "school")
    assert names["scored"].usage.completion_tokens == 0


# Many at once


def requests(count, seed):
    """Requests of all kinds."""
    draw = random.Random(seed)
    for _ in range(count):
        yield {
            "prompt": draw.choice([MIA, "A soft wind", "The sun was", "Ben had 3 apples."]),
            "max_tokens": draw.randrange(4, 40),
            "mode": draw.choice(["ar", "speculative", "diffusion"]),
            "temperature": draw.choice([0.0, 1.0]),
            "seed": draw.randrange(100),
        }


def alone(model, asked):
    """What Python writes."""
    asked = dict(asked)
    options = {"max_new_tokens": asked.pop("max_tokens"), **asked}
    return model.generate(options.pop("prompt"), **options).text


def answer_of(url, asked, stream):
    headers = {"authorization": f"Bearer {KEY}"}
    status, _, body = ask(url, "/v1/completions", "POST", {**asked, "stream": stream}, **headers)
    if status != 200:
        return f"{status} {body}"
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_32_at_once_each_get_what_they_would_get_alone(server, model):
    asked = list(requests(32, 1))
    with ThreadPoolExecutor(32) as pool:
        found = list(
            pool.map(lambda n: answer_of(server.url, asked[n], n % 2 == 0), range(len(asked)))
        )
    assert found == [alone(model, one) for one in asked]


def test_sigterm_under_load_loses_nothing_and_mixes_nothing_up(server, model):
    """The last test: it ends the server."""
    asked = [{**one, "max_tokens": 150} for one in requests(16, 2)]
    before = taken(server)
    with ThreadPoolExecutor(len(asked)) as pool:
        found = pool.map(lambda n: answer_of(server.url, asked[n], n % 2 == 0), range(len(asked)))
        until(lambda: taken(server) == before + len(asked), "all requests")
        assert server.stop() == 0
        assert list(found) == [alone(model, one) for one in asked]
    assert server.told("closed")


def taken(server):
    """How many answers were asked of the engine."""
    numbers = metrics(server)
    return sum(numbers[f"ar2diff_rows_{name}"] for name in ("running", "waiting", "total"))
