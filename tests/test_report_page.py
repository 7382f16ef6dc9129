"""The page of a report: one file that needs nothing else, read by people, keyboards and screen
readers, at any width, in both shades."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import DRAWING
from PIL import Image
from reports import apart, figure, plain, realistic, report

from ar2diff.core.errors import Ar2DiffError
from ar2diff.reports.compare import merged
from ar2diff.reports.compare import write as compare
from ar2diff.reports.figures import PNG, Missing, Order, Reply, Subject, Text
from ar2diff.reports.figures import Seen as Shown
from ar2diff.reports.page import write
from ar2diff.reports.pictures import thumbnail
from ar2diff.reports.plots import by_report, dominated, plots
from ar2diff.reports.sentences import claims
from ar2diff.reports.serving import serve_command
from ar2diff.reports.summary import markdown, renamed
from ar2diff.reports.svg import DARK, LIGHT

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from speed_table import table

EVIL = "http://evil.example"
HOSTILE = f"</p></td><script>alert(1)</script><img src={EVIL} onerror=alert(2)>$x_1$&amp;"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def hostile():
    """A report in which everything that is text is written by an enemy of pages."""
    given = realistic()
    subject = given.subjects["model"].model_copy(update={"name": HOSTILE})
    return given.model_copy(update={
        "title": HOSTILE, "subjects": given.subjects | {"model": subject},
        "settings": given.settings | {HOSTILE: {"mode": "diffusion", HOSTILE: HOSTILE}},
        "figures": [*given.figures, figure("quality", f"task:{HOSTILE}", 50.0, 2.0, setting="ar")],
        "texts": [Text(question="quality", prompt=HOSTILE, subject="model", setting=HOSTILE,
                       text=HOSTILE)],
        "orders": [Order(prompt=HOSTILE, tokens=[HOSTILE, "\n"], forward=[2, 1],
                         confidence=[0.9, 0.8]), *given.orders],
        "missing": [Missing(question="speed", what=HOSTILE, why=HOSTILE)],
        "seen": [Shown(
            question="quality", prompt=HOSTILE, answer=HOSTILE,
            pictures=[thumbnail(Image.new("RGB", (64, 32), "red"))],
            replies=[Reply(subject="model", setting=HOSTILE, text=HOSTILE, right=False, tokens=6,
                           forwards=4)],
        )],
        "protocol": given.protocol | {"command": HOSTILE, HOSTILE: [HOSTILE]},
    })  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a hostile report, with pictures."""
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        for module in DRAWING:
            patch.setattr(f"ar2diff.{module}.can_draw", lambda: True)
        return write(hostile(), tmp_path_factory.mktemp("page") / "new" / "report.html")


class Seen(HTMLParser):
    """Elements of a page with their attributes, and the text that is shown."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        self.text += "" if self._open in ("script", "style") else data

    def attributes(self, *names):
        return [a[n] for _, a in self.elements for n in names if n in a]


def test_nothing_in_the_page_is_asked_of_a_network_or_runs_but_our_script(page):
    text, seen = page.read_text(encoding="utf-8"), Seen(page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in seen.elements].count("script") == 1
    assert not [tag for tag, _ in seen.elements if tag in ("iframe", "object", "base")]
    (picture,) = [values for tag, values in seen.elements if tag == "img"]
    assert picture["src"].startswith(PNG) and picture["alt"] == f"{HOSTILE} (64 x 32 pixels)"
    assert not [name for _, a in seen.elements for name in a if name.startswith("on")]
    for link in seen.attributes("src", "href", "srcset", "data", "action"):
        assert link.startswith(("#", "data:,", PNG)), link
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "@import" not in text and "http" not in text.replace(EVIL, "").replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_texts_are_shown_as_they_were_written(page):
    assert Seen(page.read_text(encoding="utf-8")).text.count(HOSTILE) >= 13


def test_readers_of_any_kind_find_their_way(page):
    seen = Seen(page.read_text(encoding="utf-8"))
    ids = seen.attributes("id")
    assert len(ids) == len(set(ids))
    assert {"speed", "quality", "length", "control", "serve", "missing", "protocol"} <= set(ids)
    for name in itertools.chain(*(v.split() for v in seen.attributes("aria-labelledby"))):
        assert name in ids, name
    for link in seen.attributes("href"):
        assert link[1:] in ids or link == "data:,", link
    for tag, values in seen.elements:
        if tag == "svg":
            assert values["role"] == "img" and values["aria-labelledby"] and "width" not in values
        if tag == "th":
            assert values["scope"] in ("col", "row")
        if values.get("role") == "region":
            assert values["tabindex"] == "0"
    levels = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert seen.elements[0] == ("html", {"lang": "en"})


def test_every_section_begins_with_its_sentence(page):
    text = page.read_text(encoding="utf-8")
    for question, claim in claims(hostile()).items():
        section = text[text.index(f'<section id="{question}"') :]
        first = re.search(r"<p[^>]*>(.*?)</p>", section, re.DOTALL)[1]
        assert html.unescape(first) == claim.first


def test_a_figure_of_quality_without_an_error_is_refused(tmp_path):
    bad = report([figure("quality", "exact_match", 40.0, None, setting="ar")])
    with pytest.raises(Ar2DiffError, match="has no standard error"):
        write(bad, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_the_page_has_no_pictures_and_says_so(tmp_path):
    text = write(realistic(), tmp_path / "report.html").read_text()
    assert "<svg" not in text and "pip install &#39;ar2diff[plot]&#39;" in text


def test_an_empty_report_has_a_page(tmp_path):
    text = write(report([]), tmp_path / "report.html").read_text()
    assert text.count("was not measured.") == 8 and "<table" not in text


# Plots --------------------------------------------------------------------------------------------


def test_the_pictures_have_axes_with_units_and_are_the_same_every_time(pictures, page):
    drawn = {plot.name: plot.svg for group in plots(realistic()).values() for plot in group}
    assert list(drawn) == ["by-batch", "trade-off-1", "trade-off-16", "slots", "temperature",
                           "length-32", "length-128", "position", "order-0"]  # fmt: skip
    labels = {
        "by-batch": ("batch (rows)", "speed (tokens/s)"),
        "trade-off-1": ("speed at batch 1 (tokens/s)", "exact match (%)"),
        "temperature": ("entropy of the text (nats)", "NLL under the base (nats/token)"),
        "length-32": ("answer (tokens)", "time per token (ms)"),
        "position": ("position (tokens)", "NLL or its bound (nats/token)", "training rows end"),
    }
    for name, words in labels.items():
        assert all(f">{word}<" in drawn[name] for word in words), name
    text = page.read_text(encoding="utf-8")
    for name, drawing in drawn.items():
        colors = re.sub(r'(href="|url\()#', "", drawing)
        assert "#" not in colors, f"{name} has a colour that is not the page's"
        assert name.startswith("order") or drawing in text, f"{name} was drawn differently before"


def test_bars_are_two_standard_errors(pictures):
    rows = [figure("speed", "tokens_per_second", 100.0 * b, 10.0, "base", "transformers", batch=b)
            for b in (1, 4)]  # fmt: skip
    (plot,) = plots(report(rows))["speed"]
    number = r"([\d.]+)"
    lines = re.findall(
        rf'<path d="M {number} {number}\nL {number} {number}\n"[^>]*var\(--text', plot.svg
    )
    (x, low, end, high), _, (_, first, _, second) = [list(map(float, line)) for line in lines]
    assert x == end  # the bar at batch 1; the line goes from 100 to 400
    assert (low - high) / (first - second) * 300 == pytest.approx(4 * 10.0, rel=1e-3)


def test_dominated_points_are_those_that_another_beats():
    assert dominated([(1, 5), (2, 5), (3, 1), (3, 1), (2, 0)]) == [True, False, False, False, True]


def luminance(color):
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def contrast(one, two):
    low, high = sorted(
        sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), luminance(c), strict=True))
        for c in (one, two)
    )
    return (high + 0.05) / (low + 0.05)


# What people without one kind of cone see, in linear RGB (Viénot, Brettel and Mollon 1999).
BLIND = {
    "protan": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
    "deutan": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
}


@pytest.mark.parametrize("shade", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_from_the_page_and_by_the_colour_blind_from_each_other(shade):
    assert contrast(shade.text, shade.page) > 12
    assert min(contrast(color, shade.page) for color in shade.colors) >= 4.5
    for matrix in BLIND.values():
        seen = []
        for color in shade.colors:
            linear = luminance(color)
            out = [sum(w * p for w, p in zip(row, linear, strict=True)) for row in matrix]
            seen.append([max(p, 0) ** (1 / 2.4) for p in out])
        for one, two in itertools.pairwise(seen):
            assert sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5 > 0.15


# Elsewhere ----------------------------------------------------------------------------------------


def test_several_reports_are_one_page(tmp_path):
    one = realistic()
    two = one.model_copy(update={
        "title": "runs/other", "protocol": one.protocol | {"threads": 1, "seed": 1},
        "subjects": one.subjects | {"base": Subject(name="b", kind="ar", parameters=1)},
    })  # fmt: skip
    text = Seen(compare([one, two], tmp_path / "compare.html").read_text()).text
    for given in (one, two):
        assert all(claim.first in text for claim in claims(given).values())
        assert f"{given.title}: diffusion 0.9" in text
    for reason in ("number of threads is not", "seed is not", "Their bases differ"):
        assert reason in text
    assert "hardware is not" not in text and "base: transformers" not in text
    with pytest.raises(Ar2DiffError, match="fewer than two different reports"):
        compare([one, realistic()], tmp_path / "again.html")


def test_a_report_of_no_model_is_refused(tmp_path):
    empty = report([]).model_copy(update={"subjects": {}})
    with pytest.raises(Ar2DiffError, match=r"runs/stories3m \(2\) is not of a model"):
        compare([realistic(), empty], tmp_path / "compare.html")


def test_reports_of_the_same_title_are_numbered(tmp_path):
    later = realistic().model_copy(update={"quick": True})
    text = Seen(compare([realistic(), later], tmp_path / "compare.html").read_text()).text
    assert "runs/stories3m (2): diffusion 0.9" in text and "base: transformers" in text


def test_pictures_of_several_reports_show_the_leading_setting_of_each(pictures):
    one = realistic()
    leading = merged({"a": one, "b": one}, leading=True)
    written = {(f.subject, f.setting) for f in leading.figures if f.setting}
    base = {("base", name) for name in ("transformers", "prompt lookup", "ar", "ranked ar")}
    assert written == {("a", "diffusion 0.9"), ("b", "diffusion 0.9")} | base
    (speed,) = by_report(leading, ["a", "b"])["speed"]
    assert speed.title == "Speed at batch 1 by report"
    assert all(f">{words}<" in speed.svg for words in ("a", "b", "speed at batch 1 (tokens/s)"))


def test_a_report_names_the_command_that_serves_its_model(page):
    own = [figure("speed", "tokens_per_second", 800.0, 9.0, setting="lossless", batch=16)]
    faster = [figure("speed", "tokens_per_second", 900.0, 9.0, setting="lossless chain", batch=16)]
    alike = [figure("speed", "tokens_per_second", 820.0, 9.0, setting="ar", batch=16)]
    assert serve_command(report([*own, *alike]), "a b") == "ar2diff serve 'a b'"
    assert serve_command(None, "a/b") == "ar2diff serve a/b"
    chain = "ar2diff serve a/b --mode speculative --draft-length 7"
    assert serve_command(report([*own, *faster]), "a/b") == chain
    assert "ar2diff serve " in Seen(page.read_text(encoding="utf-8")).text


def test_a_card_shows_the_table_under_names_that_others_know():
    given = realistic()
    base = given.subjects["base"].model_copy(update={"name": "/home/me/a|b"})
    given = given.model_copy(update={"subjects": given.subjects | {"base": base}})
    shown = markdown(renamed(given, "stories", None))
    first = "At equal exact match, stories is 1.8x as fast as {} at batch 1"
    assert shown["sentences"][0].startswith(first.format("its base"))
    assert "/home" not in str(shown)
    known = markdown(renamed(given, "stories", "a|b"))["sentences"][0]
    assert known.startswith(first.format("a\\|b"))
    assert shown["table"][0] == ("| setting | tokens/s at batch 1 | tokens/s at batch 16 | exact "
                                 "match (%) | stories cloze (%) |")  # fmt: skip
    assert shown["table"][3].startswith("| lossless chain | 812 ± 10 (1.93 ± 0.03 x base) | ")
    assert shown["missing"] == ["speed: batch 32 and 64", "control: gaps held to a JSON schema"]
    assert shown["place"] == "2026-11-26 with ar2diff 0.1.0 on x86-64"


# In a browser -------------------------------------------------------------------------------------

# Loads the page at two widths, presses headings, and notes what is to be seen.
DRIVER = """<!DOCTYPE html><body><script>
const found = {};
async function open(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.src = "PAGE";
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  const view = frame.contentWindow, page = view.document, root = page.documentElement;
  const table = page.querySelector("#table-speed-batch").closest("table");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2].dataset.value);
  const buttons = [...table.tHead.querySelectorAll("button")], head = table.tHead.rows[0].cells[2];
  const before = column();
  buttons[2].click();
  const up = column(), sorted = head.getAttribute("aria-sort");
  buttons[2].click();
  const down = column(), turned = head.getAttribute("aria-sort");
  buttons[0].click();
  buttons[0].focus();
  found[width] = {
    before, up, down, sorted, turned, after: head.getAttribute("aria-sort"),
    focused: page.activeElement === buttons[0], names: buttons.map((b) => b.textContent.trim()),
    overflow: root.scrollWidth - root.clientWidth,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(
      (text) => parseFloat(view.getComputedStyle(text).fontSize)
        * text.ownerSVGElement.getBoundingClientRect().width
        / text.ownerSVGElement.viewBox.baseVal.width)),
  };
}
open(1280).then(() => open(390)).then(() => {
  document.body.textContent = JSON.stringify(found);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_shows_the_page_without_an_error_or_a_request(page, tmp_path):
    driver = page.with_name("driver.html")
    driver.write_text(DRIVER.replace("PAGE", page.name))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,900",
         "--virtual-time-budget=10000", "--dump-dom", driver.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(html.unescape(re.search(r"<body>(\{.*\})", done.stdout, re.DOTALL)[1]))
    assert list(found) == ["390", "1280"]
    for width, seen in found.items():
        assert seen["requests"] == [] and seen["overflow"] <= 0, width
        values = sorted(map(float, seen["before"]))
        assert list(map(float, seen["up"])) == values != list(map(float, seen["before"]))
        assert list(map(float, seen["down"])) == values[::-1]
        assert (seen["sorted"], seen["turned"], seen["after"]) == ("ascending", "descending", None)
        assert seen["focused"] and seen["names"][:3] == [
            "setting",
            "batch (rows)",
            "speed (tokens/s)",
        ]
        assert seen["smallest"] >= 8, "letters in plots must be readable"


def test_a_bound_beside_an_exact_likelihood_is_neither_better_nor_worse(tmp_path):
    exact = figure("quality", "ar_nll", 1.4, 0.02, "base")
    bound = figure("quality", "bound", 1.9, 0.02, difference=apart(0.5, 0.01, None))
    text = write(report([bound, exact]), tmp_path / "report.html").read_text()
    text = plain(text)
    assert "<small>+0.500 ± 0.010 to base</small>" in text and "worse" not in Seen(text).text


def test_the_table_of_the_readme_is_made_of_reports():
    assert [plain(line) for line in table([realistic()])[::6]] == [
        "| model | how it decodes | tokens a forward | batch 1 | batch 8 | its text |",
        "| stories3m | diffusion 0.9 | 2.70 | 2.21 ± 0.04x | 1.066 ± 0.019x | 39.8 ± 2.2 % right "
        "(base: 41.2 ± 2.2 %) |",
    ]
    given = realistic()
    rest = [f for f in given.figures if f.metric != "exact_match"]
    for who, setting, value in (("model", "ar", 0.5), ("base", "transformers", 0.4)):
        rest.append(figure("quality", "base_nll", value, 0.01, who, setting, temperature=0.0))
    lines = table([given.model_copy(update={"figures": rest})])
    assert lines[2].endswith("0.955 ± 0.017x | 0.954 ± 0.017x | 0.500 ± 0.010 nats/token under the "
                             "base (base: 0.400 ± 0.010 nats/token) |")  # fmt: skip
    assert lines[3].endswith("| that of the AR mode |") and lines[6].endswith("| – |")


def test_texts_that_are_the_same_are_shown_once(tmp_path):
    texts = [Text(question="quality", prompt="p", subject=who, setting=setting, text=text)
             for who, setting, text in (("model", "ar", "one"), ("base", "transformers", "one"),
                                        ("model", "diffusion 0.7", "two"))]  # fmt: skip
    given = report([]).model_copy(update={"texts": texts})
    text = write(given, tmp_path / "report.html").read_text()
    found = re.findall(r"<h3>(.*?)</h3><p>(.*?)</p>", text)
    assert found == [("ar, base: transformers", "one"), ("diffusion 0.7", "two")]


def test_differences_that_are_none_are_called_so(tmp_path):
    rows = [figure("quality", "exact_match", 40.0 + d, 1.0, setting=s, difference=apart(d, 0.5))
            for s, d in (("ar", 0.9), ("diffusion 0.9", -1.1), ("diffusion 0.7", 1.1))]  # fmt: skip
    rows.append(figure("quality", "exact_match", 40.0, 1.0, "base", "transformers"))
    text = write(report(rows), tmp_path / "report.html").read_text()
    cells = re.findall(r"<small>(.*?) <b class=\"(\w+)\">", plain(text))
    assert cells == [("+0.9 ± 0.5 to base", "none"), ("−1.1 ± 0.5 to base", "worse"),
                     ("+1.1 ± 0.5 to base", "better")]  # fmt: skip
