"""The server at its limits, in this process: too much, too slow, gone, dead."""

from __future__ import annotations

import ctypes
import json
import socket
import threading
import time

import pytest
from conftest import ROOT
from served import ask, in_process, until

pytest.importorskip("fastapi")

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.complete import complete
from ar2diff.serving import server as serving
from ar2diff.serving.engine import Engine
from ar2diff.serving.limits import Limits
from ar2diff.serving.service import Service, set_defaults

PATH = "/v1/completions"
LONG_ONE = {"prompt": "ab", "max_tokens": 40, "mode": "ar"}


@pytest.fixture
def checkpoint(converted):
    return load_checkpoint(str(converted))


@pytest.fixture
def service(checkpoint):
    """Factory: a server of the tiny model; its engine stands still unless it is started."""
    engines = []

    def of(own=checkpoint, start=False, max_batch=32, max_waiting=256, **limits):
        engines.append(Engine(own, max_batch=max_batch, max_waiting=max_waiting))
        if start:
            engines[-1].start()
        return Service(own, engines[-1], "tiny", Limits(**limits))

    yield of
    for engine in engines:
        engine.close(drain=False)


@pytest.fixture
def slow(monkeypatch):
    """Forwards that take 20 ms, so that there is a time while an answer is written."""
    turn = Engine.turn
    monkeypatch.setattr(Engine, "turn", lambda self: time.sleep(0.02) or turn(self))


def post(url, body, **headers):
    status, headers, answer = ask(url, PATH, "POST", body, **headers)
    return status, headers, json.loads(answer)


def raw(url, data):
    """A socket on which something was sent."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=60)
    sock.sendall(data)
    return sock


def received(sock):
    found = b""
    while part := sock.recv(65536):
        found += part
    return found.decode()


def request(body, *more):
    text = json.dumps(body)
    lines = [f"POST {PATH} HTTP/1.1", "host: localhost", f"content-length: {len(text)}", *more]
    return "\r\n".join([*lines, "", text]).encode()


# Too much


def test_what_may_not_wait_is_told_to_come_later(service):
    own = service(max_waiting=2)
    with in_process(own) as url:
        sockets = [raw(url, request(LONG_ONE)) for _ in range(2)]
        until(lambda: own.engine.stats.waiting == 2, "two that wait")
        status, headers, body = post(url, LONG_ONE)
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        status, _, body = post(url, {**LONG_ONE, "n": 3})
        assert status == 429
        for sock in sockets:
            sock.close()


def test_a_body_has_a_limit(service):
    with in_process(service(body=1000)) as url:
        status, _, body = post(url, {**LONG_ONE, "prompt": "a" * 2000})
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = received(raw(url, head.encode() + 3 * chunk + b"0\r\n\r\n"))
        assert " 413 " in answer.splitlines()[0] and "body_too_large" in answer


# Too slow


def test_a_body_that_does_not_arrive_is_waited_for_only_so_long(service):
    with in_process(service(patience=0.2)) as url:
        answer = received(raw(url, request(LONG_ONE)[:-5]))
        assert " 408 " in answer.splitlines()[0] and "slow_body" in answer


def test_headers_that_do_not_arrive_are_waited_for_only_so_long(service):
    with in_process(service(headers=0.2, start=True)) as url:
        assert received(raw(url, b"")) == ""
        assert received(raw(url, b"GET /health HTTP/1.1\r\nhost: local")) == ""
        sock = raw(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /")
        assert received(sock).count("HTTP/1.1 200") == 1


def test_an_answer_ends_where_it_is_when_its_time_is_over(service, checkpoint, slow):
    asked = {**LONG_ONE, "prompt": "ab", "max_tokens": 60}
    whole = complete(checkpoint, "ab", max_new_tokens=60, mode="ar").text
    own = service(start=True, seconds=0.5)
    with in_process(own) as url:
        _, _, answer = post(url, asked)
        (choice,) = answer["choices"]
        assert whole.startswith(choice["text"]) and 0 < len(choice["text"]) < len(whole)
        assert choice["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 60
        events = ask(url, PATH, "POST", {**asked, "stream": True})[2].decode()
        last = [json.loads(e[6:]) for e in events.split("\n\n") if e[6:7] == "{"][-1]
        assert last["choices"][0]["finish_reason"] == "length" and events.endswith("[DONE]\n\n")
        until(lambda: not own.engine.batches, "an engine that has dropped them")


def test_what_was_never_begun_is_told_to_come_later(service, slow):
    own = service(start=True, max_batch=1, seconds=0.5)
    with in_process(own) as url:
        status, headers, body = post(url, {**LONG_ONE, "max_tokens": 60, "n": 2})
        assert (status, body["error"]["code"]) == (503, "timeout") and headers["retry-after"]


# Gone


@pytest.mark.parametrize("stream", [False, True])
def test_the_rows_of_a_client_that_goes_are_dropped(service, stream):
    own = service()
    with in_process(own) as url:
        sock = raw(url, request({**LONG_ONE, "stream": stream, "n": 2}))
        until(lambda: own.engine.stats.waiting == 2, "two rows")
        tickets = [*own.engine._waiting]
        assert not any(ticket.cancelled for ticket in tickets)
        sock.close()
        until(lambda: all(ticket.cancelled for ticket in tickets), "dropped rows")


# Dead


def kill(engine):
    """Raise SystemExit in an engine's thread."""
    ident = ctypes.c_ulong(engine._thread.ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))


def test_an_engine_that_dies_is_told_to_all_who_wait(service, slow):
    own, found = service(start=True), {}
    with in_process(own) as url:
        assert ask(url, "/health")[0] == 200

        def run(stream):
            found[stream] = ask(url, PATH, "POST", {**LONG_ONE, "stream": stream})

        threads = [threading.Thread(target=run, args=[stream]) for stream in (False, True)]
        for thread in threads:
            thread.start()
        until(lambda: own.engine.stats.running == 2, "two rows")
        kill(own.engine)
        for thread in threads:
            thread.join()
        status, headers, body = found[False]
        assert (status, json.loads(body)["error"]["code"]) == (503, "engine_gone")
        assert headers["x-should-retry"] == "false"
        *_, error, done, end = found[True][2].decode().split("\n\n")
        assert json.loads(error[6:])["error"]["code"] == "engine_gone"
        assert (done, end) == ("data: [DONE]", "")
        assert ask(url, "/health")[0] == 503
        assert post(url, LONG_ONE)[0] == 503
        assert ask(url, "/v1/models")[0] == 200


def test_what_nobody_has_foreseen_is_told_in_the_form_of_other_errors(service, monkeypatch):
    def broken(self):
        raise ZeroDivisionError("a path, a prompt")

    monkeypatch.setattr("ar2diff.serving.batch.Batch.step", broken)
    with in_process(service(start=True)) as url:
        status, _, body = ask(url, PATH, "POST", LONG_ONE)
        *_, error, done, end = (
            ask(url, PATH, "POST", {**LONG_ONE, "stream": True})[2].decode().split("\n\n")
        )
        assert (status, done, end) == (500, "data: [DONE]", "")
        for told in (json.loads(body)["error"], json.loads(error[6:])["error"]):
            assert told["type"] == "server_error" and "a path" not in told["message"]
        assert ask(url, "/health")[0] == 200


# Who may ask


def test_a_server_without_keys_answers_no_page_of_another_host(service):
    with in_process(service(start=True)) as url:
        for headers, status in (
            ({"host": "evil.example"}, 403),
            ({"host": "[::1"}, 403),
            ({"origin": "http://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"host": "localhost:80"}, 200),
            ({"origin": url}, 200),
        ):
            assert ask(url, "/health", **headers)[0] == status, headers


def test_what_is_not_http_is_refused(service):
    with in_process(service()) as url:
        for data in (b"\x16\x03\x01\n\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 100_000):
            answer = received(raw(url, data))
            assert answer.startswith("HTTP/1.1 400") and '"error"' in answer


def test_another_host_needs_a_key_before_the_model_is_loaded(run_both):
    code, _, said = run_both("serve", "no-such-model", "--host", "0.0.0.0", "--port", 0)
    assert code == 2 and "--api-key-file" in said and "no-such-model" not in said


def test_a_key_lets_other_hosts_in():
    serving.listen("0.0.0.0", 0, has_keys=True).close()


def test_a_port_that_is_taken_is_told(run_both):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, said = run_both("serve", "no-such-model", "--port", port)
    assert code == 2 and f"--port {port}" in said


@pytest.mark.parametrize("text", [None, "", "\n \n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(Ar2DiffError, match="api_key_file"):
        serving.read_keys(file)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Ar2DiffError, match=r"ar2diff\[serve\]"):
        serving.serve("model")


# Models


def test_a_model_without_a_template_takes_no_messages(service):
    with in_process(service(start=True)) as url:
        body = {"messages": [{"role": "user", "content": "a"}]}
        status, _, answer = ask(url, "/v1/chat/completions", "POST", body)
        error = json.loads(answer)["error"]
        assert (status, error["param"], error["code"]) == (400, "messages", "no_chat_template")


def test_a_model_without_an_ar_mode_has_no_echo(service, convert_tiny):
    own = load_checkpoint(str(convert_tiny("convert.attention=full")))
    with in_process(service(own, start=True)) as url:
        status, _, body = post(url, {"prompt": "ab", "echo": True, "logprobs": 1})
        assert (status, body["error"]["param"]) == (400, "echo")
        assert post(url, {"prompt": "ab", "max_tokens": 4})[0] == 200


def test_an_unconverted_model_is_served_by_its_ar_mode(service, tiny_checkpoint):
    own = load_checkpoint(str(tiny_checkpoint))
    with in_process(service(own, start=True)) as url:
        about = json.loads(ask(url, "/v1/models")[2])["data"][0]["ar2diff"]
        assert (about["modes"], about["default_mode"]) == (["ar"], "ar")
        _, _, body = post(url, {"prompt": "ab", "max_tokens": 4})
        own_text = complete(own, "ab", max_new_tokens=4, mode="ar").text
        assert body["choices"][0]["text"] == own_text
        status, _, body = post(url, {"prompt": "ab", "mode": "diffusion"})
        assert (status, body["error"]["param"]) == (400, "mode")


def test_settings_of_the_server_hold_where_a_request_has_none(service, checkpoint):
    set_defaults(checkpoint, {"threshold": 0.5, "max_new_tokens": 5})
    with in_process(service(start=True)) as url:
        body = post(url, {"prompt": "ab"})[2]
        assert body["choices"][0]["ar2diff"]["mode"] == "diffusion"
        assert body["usage"]["completion_tokens"] == 5
        body = post(url, {"prompt": "ab", "mode": "ar", "max_tokens": 3})[2]
        assert body["choices"][0]["ar2diff"]["mode"] == "ar"
        assert body["usage"]["completion_tokens"] == 3
        assert post(url, {"prompt": "ab", "steps_per_block": 2})[0] == 200
    drawn = {"mode": "ar", "temperature": 1.5, "seed": 5}
    whole = complete(checkpoint, "ab", max_new_tokens=20, **drawn).text
    set_defaults(checkpoint, {**drawn, "max_new_tokens": 20})
    with in_process(service(start=True)) as url:
        assert post(url, {"prompt": "ab"})[2]["choices"][0]["text"] == whole
        greedy = complete(checkpoint, "ab", max_new_tokens=20, mode="ar", temperature=0).text
        body = post(url, {"prompt": "ab", "temperature": 0})[2]
        assert body["choices"][0]["text"] == greedy != whole
    with pytest.raises(Ar2DiffError, match="threshold"):
        set_defaults(checkpoint, {"threshold": -1})


def test_the_page_is_served(service):
    page = (ROOT / "ar2diff" / "serving" / "page" / "index.html").read_bytes()
    with in_process(service(start=True)) as url:
        status, headers, body = ask(url, "/")
        assert (status, body) == (200, page) and headers["cache-control"] == "no-cache"
