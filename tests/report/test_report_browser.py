"""The report in a real browser, at phone and desktop widths, light and dark. Skipped where there is no Chromium."""

from __future__ import annotations

import html
import json
import re

import pytest
from made_run import make_run

from docs.screenshots import PHONE, chromium, find_chromium, in_frame, screenshot
from preference.report.page import CURVES, write_comparison, write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")

# Runs in a copy of the page from which the policy against scripts is taken out; the page itself has none.
PROBE = """<script>
const boxes = [...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const lines = [...svg.querySelectorAll("path")].filter(path => path.getTotalLength() > 20);
  return [box.width, box.height, lines.length, svg.querySelectorAll("text").length];
});
const colour = name => getComputedStyle(document.body)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
const ink = getComputedStyle(document.querySelector("figure svg text")).fill;
const result = {width: innerWidth, scroll: document.documentElement.scrollWidth, boxes, ink,
  page: colour("backgroundColor"), text: colour("color"), title: document.title};
(window.frameElement ? parent : window).document.title = "measured " + JSON.stringify(result);
</script>"""
ERROR = re.compile(r"CONSOLE|Refused|Uncaught|net::ERR|ERR_FILE|Content Security Policy", re.I)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    one, two = make_run(folder / "one"), make_run(folder / "two", run={"arguments": {"learning_rate": 1e-7}})
    return {"report": write_report(one), "comparison": write_comparison([one, two], folder / "comparison.html")}


def measure(page, tmp_path, size, dark):
    """What the browser made of a page: its probe's figures, and what it logged."""
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    assert count == 1
    text = text.replace("</body>", PROBE + "</body>")
    narrow = size[0] < 500
    copy = tmp_path / "copy.html"
    copy.write_text(in_frame(text, *size) if narrow else text, encoding="utf-8")
    window = (1000, 900) if narrow else size
    dump, log = chromium(copy, "--dump-dom", "--virtual-time-budget=5000", size=window, dark=dark)
    title = re.search(r"<title>measured (.*?)</title>", dump.decode("utf-8"), re.S)
    assert title, log[-2000:]
    return json.loads(html.unescape(title[1])), log


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, (1280, 900)], ids=["phone", "desktop"])
def test_every_figure_is_drawn_and_nothing_sticks_out(pages, tmp_path, size, dark):
    seen, log = measure(pages["report"], tmp_path, size, dark)
    assert seen["width"] == size[0] and seen["scroll"] <= size[0]
    assert len(seen["boxes"]) == len(CURVES) + 1
    for width, height, lines, texts in seen["boxes"]:
        assert min(260, size[0]) <= width <= size[0] and 0.5 < height / width < 0.8
        assert lines >= 3 and texts >= 5
    page, text = sum(seen["page"]) / 3, sum(seen["text"]) / 3
    assert (page < 60 and text > 180) if dark else (page > 230 and text < 60)
    assert seen["ink"] == f"rgb({', '.join(f'{value:.0f}' for value in seen['text'])})"
    assert "owned" not in seen["title"]  # the script in the made-up data
    assert not ERROR.search(log), log


def test_comparison_on_a_phone(pages, tmp_path):
    seen, log = measure(pages["comparison"], tmp_path, PHONE, dark=False)
    assert seen["scroll"] <= PHONE[0] and len(seen["boxes"]) == len(CURVES)
    assert not ERROR.search(log), log


def test_the_page_as_it_is_logs_no_error(pages, tmp_path):
    for page in pages.values():
        dump, log = chromium(page, "--dump-dom", size=(1280, 900))
        assert dump.count(b"</figure>") >= len(CURVES) and not ERROR.search(log), log
    broken = tmp_path / "broken.html"
    broken.write_text('<script>nothing()</script><img src="no.png">', encoding="utf-8")
    assert ERROR.search(chromium(broken, "--dump-dom", size=(1280, 900))[1])  # an error would have been seen


def test_it_prints(pages, tmp_path):
    paper = tmp_path / "report.pdf"
    chromium(pages["report"], f"--print-to-pdf={paper}", size=(1280, 900), dark=True)
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 30_000


def test_screenshots(pages, tmp_path):
    from PIL import Image

    for dark in (False, True):
        picture = tmp_path / "picture.png"
        picture.write_bytes(screenshot(pages["report"], PHONE, dark=dark, scale=2, frame=True))
        with Image.open(picture) as image:
            assert image.size == (2 * PHONE[0], 2 * PHONE[1])
            assert (image.convert("L").getpixel((2, 2)) < 60) == dark
