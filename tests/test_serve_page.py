"""The page that `serve` shows, in a headless Chromium, against a server with the embedded default.

With `AR2DIFF_AXE` naming an `axe.min.js` (of the npm package axe-core) its accessibility is checked
too.
"""

import asyncio
import json
import os
import re
import shutil
import threading
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from vision import llava_folder, picture

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.demo import __main__ as demo
from ar2diff.training.adapt import adapt

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
if BROWSER is None:
    pytest.skip("there is no chromium", allow_module_level=True)

QUIET = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
FLAGS = [*QUIET.split(), "--disable-sync", "--no-first-run"]
PROMPT = "Zoe had 3 pencils. She found 5 more pencils.\nQuestion: How many?\nAnswer:"
STEPS = "(words) => words.map((word) => word.dataset.step)"
REFUSED = "Failed to load resource"  # what a browser says of an answer that is not 200
SCHEMA = {"type": "object", "properties": {"happy": {"type": "boolean"}}, "required": ["happy"]}


def service_of(checkpoint):
    """A service with its engine, which is stopped afterwards."""
    from ar2diff.serving.engine import Engine
    from ar2diff.serving.service import Service

    engine = Engine(checkpoint)
    engine.start()
    yield Service(checkpoint, engine, "demo")
    engine.close(drain=False)


def address_of(service):
    """Where a server serves it."""
    import uvicorn

    from ar2diff.serving.app import create_app

    config = uvicorn.Config(create_app(service), port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def service():
    """The embedded default, converted in memory without training."""
    converted = demo.adapt_without_training(load_checkpoint(str(demo.MODEL)), load_recipe("demo"))
    yield from service_of(converted)


@pytest.fixture(scope="module")
def address(service):
    """Where it is served."""
    yield from address_of(service)


@pytest.fixture(scope="module")
def drafting():
    """Where the embedded default with its draft adapter is served, whose drafts are good."""
    for service in service_of(load_checkpoint(str(demo.DRAFT))):
        yield from address_of(service)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


class Window:
    """A window of the browser. It notes what the page complains of, and of which hosts it asks."""

    def __init__(self, browser, width=1280, motion="reduce", shade="light", **options):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            reduced_motion=motion,
            color_scheme=shade,
            **options,
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def _hear(self, line):
        if line.type == "error" and not line.text.startswith(REFUSED):
            self.said.append(line.text)

    @contextmanager
    def at(self, address):
        """The page at an address, which must not complain, nor ask anything of another host."""
        self.said, self.hosts = [], set()
        self.page.goto(address)
        expect(
            self.page.locator("#facts:not(:empty), #outage:visible, #key:visible")
        ).to_have_count(1)
        yield self.page
        assert self.said == []
        assert {host.split(":")[0] for host in self.hosts} <= {"127.0.0.1"}


@pytest.fixture(scope="module")
def window(browser):
    """A window on a wide screen, whose user wants little motion."""
    return Window(browser)


@pytest.fixture
def page(window, address):
    """The page in that window."""
    with window.at(address) as page:
        yield page


@pytest.fixture
def visit(browser, address):
    """Factory: the page in a window of its own; `prepare` is called before it is loaded."""
    with ExitStack() as stack:

        def opened(prepare=None, at=address, **options):
            window = Window(browser, **options)
            stack.callback(window.context.close)
            if prepare:
                prepare(window.page)
            return stack.enter_context(window.at(at))

        yield opened


@pytest.fixture
def ask(address):
    """Factory: what the server answers to a request without a stream, its first choice."""

    def asked(**body):
        body = {"model": "demo", "max_tokens": 24, "temperature": 0, **body}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]

    return asked


def settings(page, **values):
    """Set fields of the settings."""
    page.locator("#settings").evaluate("(details) => (details.open = true)")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def run(page):
    """Begin the task that is chosen, and wait until its answer is there."""
    page.click("#run")
    finished(page)


def finished(page):
    """Wait until an answer is there, and shown to its end."""
    expect(page.locator("#runs .run")).not_to_have_count(0)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#save")).to_be_visible()
    expect(page.locator("#play")).to_have_text("Play")


def written(page, number=0):
    """What is shown of an answer: its text without the sign of the token that ends it."""
    return page.locator("#runs .text").nth(number).text_content().replace("</s>", "")


def clock(page, number=0):
    """Forwards and tokens of an answer's clock."""
    values = page.locator("#runs .clock").nth(number).locator("dd").all_text_contents()
    return int(values[1]), int(values[2])


def write(page, mode="diffusion", prompt=PROMPT, tokens=24):
    """Write a text in a mode."""
    page.click("#tab-write")
    page.fill("#prompt", prompt)
    page.check(f"[name=mode][value={mode}]")
    settings(page, max_tokens=tokens)
    run(page)


def test_a_typed_text_is_denoised_and_its_clock_is_the_servers(page, ask):
    write(page)
    answer = ask(prompt=PROMPT, mode="diffusion")
    assert written(page) == PROMPT + answer["text"]
    forwards, tokens = clock(page)
    assert forwards == answer["ar2diff"]["forwards"]
    assert tokens / forwards == pytest.approx(answer["ar2diff"]["tokens_per_forward"], abs=1e-3)


def test_tokens_show_their_forward_their_confidence_and_where_blocks_begin(page):
    write(page)
    words = page.locator("#runs .word")
    steps = [int(step) for step in words.evaluate_all(STEPS)]
    assert steps != sorted(steps)  # it is not written from left to right
    assert max(steps) == clock(page)[0]
    for word in words.all():
        sure = int(re.match(r"\d+", word.get_attribute("title"))[0]) / 100
        shade = sum(sure >= bound for bound in (0.5, 0.7, 0.9, 0.99))
        classes = word.get_attribute("class").split()
        assert f"p{shade}" in classes or f"p{shade - 1}" in classes  # the percentage is rounded
    assert page.locator("#runs .opens").count() >= len(steps) // 8


def test_the_table_tells_what_colours_and_numbers_tell(page):
    write(page)
    page.click("#table-fold summary")
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(page.locator("#runs .word").count())
    step = page.locator("#runs .word").first.get_attribute("data-step")
    assert rows.first.locator("td").all_text_contents()[1:3] == ["decided", step]


def test_drafts_that_the_ar_mode_accepts_are_marked_and_refused_ones_shown(visit, drafting):
    page = visit(at=drafting)
    write(page, "speculative", "One day Mia was in the garden.", 40)
    text = written(page)
    refused, accepted = page.locator("#runs del"), page.locator("#runs .word.drafted")
    assert refused.count() == 0
    assert accepted.count() == clock(page)[1] - clock(page)[0]  # each forward writes one token more
    page.locator("#slider").press("Home")
    while not refused.count():
        assert page.locator("#forth").is_enabled()
        page.click("#forth")
    write(page, "ar", "One day Mia was in the garden.", 40)
    assert written(page) == text
    assert accepted.count() == 0


def test_a_gap_is_filled_between_two_texts(page, ask):
    before, behind = "In her bag Zoe had 3 pencils. She found", " by the window."
    page.click("#tab-gap")
    page.fill("#prefix", before)
    page.fill("#suffix", behind)
    page.fill("#length", "3")
    run(page)
    answer = ask(prompt=before, suffix=behind, max_tokens=3, mode="diffusion")
    assert written(page) == before + answer["text"] + behind


def test_words_that_are_selected_are_opened_and_written_anew(page, ask):
    text = "Zoë 😀 had 3 pencils. She found 5 more pencils. She was glad."
    page.click("#tab-rewrite")
    page.fill("#text", text)
    page.locator("#text").press("Control+Home")
    start, length = text.index(" 3 pencils"), len(" 3 pencils")
    for key in [*["ArrowRight"] * start, *["Shift+ArrowRight"] * length]:
        page.locator("#text").press(key)
    page.click("#open-selection")
    expect(page.locator("#marks mark")).to_have_text("3 pencils")
    run(page)
    revise = [[start, start + length]]
    answer = ask(prompt=text, revise=revise, mode="diffusion", max_tokens=None)
    assert written(page) == answer["text"]
    assert written(page).startswith("Zoë 😀 had")
    assert written(page).endswith(". She found 5 more pencils. She was glad.")


def test_words_of_an_answer_can_be_written_anew(page):
    write(page)
    word = page.locator("#runs .word").nth(2)
    word.evaluate("(word) => document.getSelection().selectAllChildren(word)")
    chosen = word.text_content()
    expect(page.locator("#again")).to_have_text("Rewrite the selected words")
    page.click("#again")
    assert page.input_value("#text") == written(page)
    expect(page.locator("#marks mark")).to_have_text(chosen)
    run(page)


def test_an_answer_is_held_to_a_schema_and_wrong_ones_are_told_by_their_field(page):
    page.click("#form-fold summary")
    page.select_option("#form-kind", "json_schema")
    assert json.loads(page.input_value("#form-rule"))["type"] == "object"  # the example
    told = page.locator("#form-rule-problem")
    for rule, problem in [("{", "not JSON"), ('{"type": "number", "minimum": 3}', "minimum")]:
        page.fill("#form-rule", rule)
        page.click("#run")
        expect(told).to_contain_text(problem)
        expect(page.locator("#form-rule")).to_be_focused()
        expect(page.locator("#form-rule")).to_have_attribute("aria-invalid", "true")
    page.fill("#form-rule", json.dumps(SCHEMA))
    write(page, prompt="Is she happy? ")
    assert isinstance(json.loads(written(page).removeprefix("Is she happy? "))["happy"], bool)
    assert told.count() == 0
    expect(page.locator("#runs .note")).to_contain_text("has the form")


def test_a_wrong_setting_is_told_beside_it(page):
    settings(page, temperature=-1)
    page.click("#run")
    expect(page.locator("#temperature-problem")).to_contain_text("temperature")
    expect(page.locator("#temperature")).to_be_focused()


@pytest.mark.parametrize("order", ["turn", "together"])
def test_the_modes_stand_side_by_side_with_their_clocks(page, ask, order):
    page.click("#tab-compare")
    page.fill("#prompt", PROMPT)
    page.check(f"[name=order][value={order}]")
    settings(page, max_tokens=24)
    run(page)
    for number, mode in enumerate(["ar", "speculative", "diffusion"]):
        answer = ask(prompt=PROMPT, mode=mode)
        assert written(page, number) == answer["text"]
        if mode != "speculative":  # how much is drafted depends on what pays at the moment
            assert clock(page, number)[0] == answer["ar2diff"]["forwards"]
    expect(page.locator("#runs .run").nth(1)).to_contain_text("The same text as AR")


def test_several_runs_are_replayed_by_the_servers_clock(visit, tmp_path):
    page = visit(motion="no-preference")
    page.click("#tab-compare")
    page.locator("#speed").evaluate("(speed) => (speed.value = '600')")
    page.click("#run")
    expect(page.locator("#save")).to_be_visible()
    expect(page.locator("#play")).to_have_text("Pause")  # it is shown again, slowly
    page.click("#play")
    page.locator("#slider").press("Home")
    assert [clock(page, n)[1] for n in range(3)] == [0, 0, 0]
    page.locator("#slider").press("ArrowRight")
    shown = [clock(page, n)[0] for n in range(3)]
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "runs.json")
    runs = [run["frames"] for run in json.loads((tmp_path / "runs.json").read_text())["runs"]]
    first = min(frames[0]["seconds"] for frames in runs)  # of one of them, the first to come
    due = [[f["forward"] for f in frames if f["seconds"] <= first] for frames in runs]
    assert shown == [max(forwards, default=0) for forwards in due] and any(shown)
    page.locator("#slider").press("End")
    assert all(clock(page, n)[1] for n in range(3))


def test_a_run_is_replayed_forward_by_forward(page):
    write(page)
    whole, last = written(page), clock(page)[0]
    slider = page.locator("#slider")
    slider.press("Home")
    assert page.locator("#runs .word").count() == 0
    assert 1 <= page.locator("#runs .slot").count() <= 8  # the rest of the prompt's block
    for forward in range(1, last + 1):
        slider.press("ArrowRight")
        assert clock(page)[0] == forward
        steps = page.locator("#runs .word.fresh").evaluate_all(
            "(a) => a.map((w) => w.dataset.step)"
        )
        assert set(steps) <= {str(forward)}
        assert slider.get_attribute("aria-valuetext") == f"forward {forward} of {last}"
    assert written(page) == whole
    page.click("#play")  # from the beginning, as it came
    expect(page.locator("#play")).to_have_text("Play")
    assert written(page) == whole


@pytest.fixture(scope="module")
def saved(window, address, tmp_path_factory):
    """A run that was saved as a file, and its text."""
    path = tmp_path_factory.mktemp("saved") / "run.json"
    with window.at(address) as page:
        write(page)
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(path)
        return path, written(page)


def offline(page):
    """Have the server's interface fail."""
    page.route("**/v1/**", lambda route: route.abort())


def test_a_saved_run_is_replayed_without_the_server(saved, visit):
    path, text = saved
    page = visit(prepare=offline)
    expect(page.locator("#outage")).to_contain_text("does not answer")
    page.set_input_files("#file", path)
    expect(page.locator("#runs .text")).to_have_count(1)  # reading a file takes its time
    page.locator("#slider").press("End")
    assert written(page) == text
    page.locator("#slider").press("Home")
    page.locator("#slider").press("ArrowRight")
    assert clock(page)[0] == 1


def test_damaged_and_hostile_files_get_a_sentence(saved, page, tmp_path):
    path, text = saved
    whole = json.loads(path.read_text())

    def changed(*steps, value):
        copy = json.loads(json.dumps(whole))
        place = copy
        for step in steps[:-1]:
            place = place[step]
        place[steps[-1]] = value
        return json.dumps(copy)

    token = ("runs", 0, "frames", 0, "tokens", 0)
    files = [
        "", "{", "[]", "null", path.read_text()[:-40], "[" * 100_000,
        changed("version", value=2),
        changed("runs", value=[]),
        changed("runs", value={"length": 3}),
        changed("runs", 0, "mode", value="__proto__"),
        changed("runs", 0, "frames", 0, value=None),
        changed("runs", 0, "frames", 0, "start", value=5),
        changed("runs", 0, "frames", 0, "start", value=-1),
        changed("runs", 0, "frames", 1, "forward", value=0.5),
        changed("runs", 0, "segments", value=[{"text": "a", "gap": True}]),
        changed("runs", 0, "summary", value={}),
        changed("runs", 0, "text", value=3),
        changed(*token, value=None),
        changed(*token, "state", value="fresh"),
        changed(*token, "text", value={}),
        changed(*token, "p", value=-1),
    ]  # fmt: skip
    page.set_input_files("#file", path)
    for number, content in enumerate(files):
        bad = tmp_path / f"{number}.json"
        bad.write_text(content)
        page.set_input_files("#file", bad)
        expect(page.locator("#show-problem")).to_contain_text("This file")
        page.locator("#slider").press("End")
        assert written(page) == text  # what was there stays
        page.set_input_files("#file", path)
        expect(page.locator("#show-problem")).to_be_hidden()


def test_hostile_texts_are_shown_as_texts(page, saved, tmp_path):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    write(page, prompt=evil)
    assert written(page).startswith(evil)
    whole = json.loads(saved[0].read_text())
    for run in whole["runs"]:
        run["messages"] = [{"role": evil, "content": evil}]
        for frame in run["frames"]:  # whichever is shown
            frame["refused"] = [evil]
            frame["tokens"] = [
                {**token, "text": evil, "state": "decided", "step": 1, "p": 1}
                for token in frame["tokens"]
            ]
    bad = tmp_path / "evil.json"
    bad.write_text(json.dumps(whole))
    page.set_input_files("#file", bad)
    expect(page.locator("#runs .turn")).to_contain_text(evil)
    page.locator("#slider").press("Home")
    page.locator("#slider").press("ArrowRight")
    expect(page.locator("#runs .turn")).to_contain_text(evil)
    assert evil in page.locator("#runs .word").first.text_content()
    assert page.locator("main img, main script").count() == 0


def test_everything_is_reached_by_the_keyboard(page):
    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.locator(selector).evaluate("(e) => e === document.activeElement"):
                return
        raise AssertionError(f"Tab does not lead to {selector}")

    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    tab_to("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("Mia was glad.")
    tab_to("[name=mode][value=diffusion]")
    page.keyboard.press("ArrowDown")
    expect(page.locator("[name=mode][value=speculative]")).to_be_checked()
    page.keyboard.press("Control+Enter")
    finished(page)
    assert written(page).startswith("Mia was glad.")
    tab_to("#play")
    tab_to("#slider")
    page.keyboard.press("Home")
    expect(page.locator("#moment")).to_contain_text("forward 0 of")
    tab_to("#again")
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("Control+Home")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    tab_to("#open-selection")
    page.keyboard.press("Space")
    expect(page.locator("#marks mark")).to_have_text("Mia")
    page.keyboard.press("Control+Enter")
    finished(page)
    page.locator("#tab-rewrite").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-gap")).to_be_focused()
    expect(page.locator("#prefix")).to_be_visible()


def test_decided_text_alone_is_announced(page, ask):
    write(page)
    answer = ask(prompt=PROMPT, mode="diffusion")
    assert page.locator("#said").text_content() == answer["text"]
    lives = page.locator("[aria-live]").evaluate_all("(all) => all.map((node) => node.id)")
    assert lives == ["said"]


def test_an_answer_is_stopped_by_a_key(page, service):
    going = threading.Event()
    service.engine.call(going.wait)  # no forward until then
    try:
        page.click("#run")
        expect(page.locator("#run")).to_have_text("Writing…")
        page.keyboard.press("Escape")
        expect(page.locator("#run")).to_have_text("Write")
        expect(page.locator("#stop")).to_be_disabled()
    finally:
        going.set()
    write(page)


def test_motion_is_reduced_where_that_is_wanted(page, visit):
    assert page.input_value("#speed") == "0"
    assert visit(motion="no-preference").input_value("#speed") != "0"


def test_a_key_is_asked_for_and_kept_in_memory_alone(visit):
    def locked(page):
        def answer(route):
            if route.request.headers.get("authorization") == "Bearer secret":
                return route.continue_()
            return route.fulfill(status=401, json={"error": {"message": "the API key is wrong"}})

        page.route("**/v1/**", answer)

    page = visit(prepare=locked)
    expect(page.locator("#form-problem")).to_have_text("the API key is wrong")
    page.fill("#key", "secret")
    page.locator("#key").press("Enter")
    expect(page.locator("#key-field")).to_be_hidden()
    write(page, tokens=4)
    kept = page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert kept == "[{},{}]"
    assert page.context.cookies() == []


def test_what_a_model_lacks_is_not_offered(visit):
    about = {"modes": ["ar"], "chat": False, "constraints": False, "max_tokens": 32}
    listed = {"data": [{"id": "base", "ar2diff": about}]}
    page = visit(prepare=lambda page: page.route("**/v1/models", lambda r: r.fulfill(json=listed)))
    expect(page.locator("#facts")).to_contain_text("base")
    for gone in ("#tab-rewrite", "#tab-gap", "#tab-compare", "#form-fold", "#threshold-field"):
        expect(page.locator(gone)).to_be_hidden()
    assert page.locator("#modes label:visible").count() == 1
    assert page.input_value("#max_tokens") == "32"


@pytest.fixture
def talking(service, monkeypatch):
    """Where the model is served with a chat template."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    monkeypatch.setattr(service.checkpoint.tokenizer, "chat_template", template)
    yield from address_of(type(service)(service.checkpoint, service.engine, "demo"))


def test_a_model_with_a_chat_template_is_talked_to(visit, talking):
    page = visit(at=talking)
    settings(page, max_tokens=8)
    for message in ("Hello.", "And then?"):
        page.fill("#prompt", message)
        page.click("#run")
        expect(page.locator("#runs .turn").last).to_contain_text(message)
        finished(page)
    assert page.locator("#runs .turn").count() == 3  # the second question follows the first answer
    expect(page.locator("#runs .turn").first).to_contain_text("Hello.")
    assert page.input_value("#prompt") == ""
    page.click("#fresh")
    assert page.locator("#runs .turn").count() == 0


def test_nothing_is_cut_off_on_a_narrow_screen(visit):
    page = visit(width=390)
    page.click("#tab-compare")
    run(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(("width", "shade"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(visit, width, shade):
    """With the script that AR2DIFF_AXE names."""
    if not (axe := os.environ.get("AR2DIFF_AXE")):
        pytest.skip("AR2DIFF_AXE does not name an axe.min.js")
    page = visit(width=width, shade=shade, bypass_csp=True)
    page.add_script_tag(content=Path(axe).read_text(encoding="utf-8"))

    def check():
        found = page.evaluate("() => axe.run()")["violations"]
        assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []

    check()
    settings(page, temperature=-1)
    page.click("#run")
    expect(page.locator("#temperature-problem")).to_be_visible()
    page.click("#form-fold summary")
    page.select_option("#form-kind", "json_schema")
    check()
    page.select_option("#form-kind", "")
    settings(page, temperature=0)
    write(page)
    page.click("#table-fold summary")
    check()
    for task in ("gap", "rewrite", "compare"):
        page.click(f"#tab-{task}")
        if task == "rewrite":
            page.fill("#text", "Mia was glad. Ben was sad.")
            page.locator("#text").evaluate("(text) => text.setSelectionRange(3, 12)")
        run(page)
        check()


def test_pictures_go_with_a_message_where_the_model_sees_them(visit, page, tmp_path):
    expect(page.locator("#attach")).to_be_hidden()  # of a model of text
    values = ["train.max_steps=0", "convert.block_length=4", "data.max_length=128"]
    adapt(str(llava_folder(tmp_path / "base")), load_recipe(None, values), tmp_path / "model")
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for service in service_of(load_checkpoint(str(tmp_path / "model"))):
        for address in address_of(service):
            page = visit(at=address)
            page.set_input_files("#picture", [tmp_path / "0.png", tmp_path / "no.png"])
            expect(page.locator("#pictures canvas")).to_have_attribute("aria-label", "0.png")
            expect(page.locator("#picture-problem")).to_contain_text("no.png is no picture")
            page.check("[name=kind][value=text]")
            expect(page.locator("#attach")).to_be_hidden()
            page.check("[name=kind][value=chat]")
            page.fill("#prompt", "what is ?")
            settings(page, max_tokens=8)
            run(page)
            size = "(canvas) => [canvas.width, canvas.height]"
            assert page.locator("#runs .turn canvas").evaluate(size) == [24, 20]
            expect(page.locator("#pictures li")).to_have_count(0)
            with page.expect_download() as download:
                page.click("#save")
            download.value.save_as(tmp_path / "run.json")
            page.fill("#prompt", "and ?")
            run(page)
            expect(page.locator("#runs .turn canvas")).to_have_count(1)  # it is remembered
            page.set_input_files("#file", tmp_path / "run.json")
            expect(page.locator("#runs .turn")).to_have_count(1)
            assert page.locator("#runs .turn canvas").evaluate(size) == [24, 20]
