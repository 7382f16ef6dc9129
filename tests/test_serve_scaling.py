"""Several servers behind one address: the files that the guide gives, as they are."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
import typer
import yaml
from ar2diff.cli.main import app
from conftest import ROOT
from served import Process, ask, chat_model, until

CONFIG, COMPOSE = (ROOT / "docs" / "serving" / name for name in ("haproxy.cfg", "compose.yaml"))
KEY = "a key"
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def haproxy():
    """The proxy's command."""
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    return found


def test_haproxy_takes_its_configuration(haproxy):
    done = subprocess.run([haproxy, "-c", "-f", CONFIG], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr


def test_the_compose_file_gives_the_server_options_that_it_has():
    tree = yaml.safe_load(COMPOSE.read_text())
    assert set(tree["services"]) == {"one", "two", "proxy"}
    one, two, proxy = (tree["services"][name] for name in ("one", "two", "proxy"))
    assert one == two and one["command"][:2] == ["ar2diff", "serve"]
    command = typer.main.get_command(app).commands["serve"]
    given = command.make_context("serve", one["command"][2:]).params
    assert given["model"] == "/model" and one["volumes"][0].endswith(":/model:ro")
    assert str(given["api_key_file"]) == f"/run/secrets/{one['secrets'][0]}"
    assert set(one["secrets"]) == set(tree["secrets"])
    ports = {proxy["environment"][name] for name in ("ONE", "TWO")}
    assert ports == {f"one:{given['port']}", f"two:{given['port']}"}
    named = set(proxy["environment"])
    assert all(f"${{{name}-" in CONFIG.read_text() for name in named)
    assert f"localhost:{given['port']}" in str(one["healthcheck"]).replace("127.0.0.1", "localhost")
    for service in tree["services"].values():  # longer than an answer that was begun may take
        assert int(service["stop_grace_period"].removesuffix("m")) * 60 > given["time_limit"]


# Two servers


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "keys").write_text(KEY)
    model = chat_model(folder / "model")
    with ThreadPoolExecutor(2) as pool:
        options = model, "--api-key-file", folder / "keys", "--max-batch", 4
        both = [*pool.map(lambda _: Process(*options), range(2))]
    yield both
    for server in both:
        server.close()


@contextmanager
def proxied(command, servers):
    """The URL of a proxy before some servers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{free.getsockname()[1]}"
    one, two = (server.url.removeprefix("http://") for server in servers)
    env = {**os.environ, "PROXY": here, "ONE": one, "TWO": two}
    process = subprocess.Popen([command, "-db", "-f", CONFIG], env=env)
    try:
        until(lambda: answers(f"http://{here}"), "the proxy")
        yield f"http://{here}"
    finally:
        process.kill()
        process.wait()


def answers(url):
    try:
        return ask(url, "/health")[0] == 200
    except OSError:
        return False


def asked(number, stream=False, tokens=24):
    return {"prompt": f"Tom had {number} apples", "max_tokens": tokens, "stream": stream}


def text_of(url, number, stream):
    """The text of an answer."""
    status, _, body = post(url, asked(number, stream))
    if status != 200:
        return f"{status}: {body}"
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    *events, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)


def post(url, body, key=KEY):
    return ask(url, PATH, "POST", body, authorization=f"Bearer {key}")


def rows(server, kind):
    text = server.get("/metrics", authorization=f"Bearer {KEY}")[2].decode()
    (line,) = (line for line in text.splitlines() if line.startswith(f"ar2diff_rows_{kind} "))
    return float(line.split()[1])


@pytest.mark.slow
def test_a_proxy_shares_out_requests_and_loses_none_when_a_server_stops(haproxy, servers):
    """The only test of the servers: it stops them."""
    with proxied(haproxy, servers) as url:
        assert post(url, asked(1), key="another")[0] == 401
        assert ask(url, "/v1/models")[0] == 401
        lone = [text_of(url, number, False) for number in range(8)]

        # Parts of a stream come while the rest is being written.
        head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\n"
        body = json.dumps({**asked(1, stream=True, tokens=1500), "min_tokens": 1500})
        with socket.create_connection(url.removeprefix("http://").split(":")) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            found = b""
            while b"data: {" not in found:
                found += client.recv(65536)
            assert sum(rows(server, "running") for server in servers) == 1
        until(lambda: not any(rows(s, "running") for s in servers), "a client that has gone")

        before = [rows(server, "total") for server in servers]
        numbers = count()

        def run(number):
            next(numbers)
            return text_of(url, number % 8, number % 2 == 0)

        with ThreadPoolExecutor(16) as pool:
            found = pool.map(run, range(160))
            until(lambda: rows(servers[0], "total") > before[0] + 20, "requests that are answered")
            assert rows(servers[1], "total") > before[1]
            assert next(numbers) < 150
            assert servers[0].stop() == 0
            assert [*found] == [lone[number % 8] for number in range(160)]
        assert text_of(url, 3, True) == lone[3]
        servers[1].stop()
        status, _, body = post(url, asked(1))
        assert (status, json.loads(body)["error"]["type"]) == (503, "server_error")
