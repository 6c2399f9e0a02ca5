"""The live view: what it says of runs at work and finished ones, who may ask it, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import time

import pytest
from browser import Browser
from made_run import CHINESE, HOSTILE, analysed, log, make_run

from docs.screenshots import PHONE, find_chromium
from preference.files import NEXT
from preference.report.live import POINTS, Watched, snapshot, thinned
from preference.report.watch import READERS, Server, WatchError, main, serve


def running(folder, upto=30, **changed):
    """A run at work: what it has written at a step of its training."""
    records = [record for record in log() if record.get("step", 0) <= upto]
    records[0] = records[0] | {"max_steps": 60}
    absent = dict.fromkeys(
        ("all_results", "trainer_state", "evaluation", "changes", "samples", "worst_pairs", "best_pairs")
    )
    answers = [{"step": 20, "source": "a.jsonl:1", "question": CHINESE, "answer": f"first {HOSTILE}"}]
    return make_run(folder, **absent | {"metrics": records, "answers": answers} | changed)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    started = serve([running(folder / "now"), make_run(folder / "done")], port=0)
    yield started
    started.stop()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read() if path != "/events" else answer.readline()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


# ---- what is said of a run


def test_a_run_at_work(tmp_path):
    told = snapshot(running(tmp_path / "run"))
    assert (told["status"], told["step"], told["max_steps"]) == ("running", 30, 60)
    assert told["left"] == pytest.approx(120.0) and told["latest"]["tokens_per_second"] == 440.0
    assert told["curves"]["loss"]["training"][0][0] == 2 and list(told["curves"]["loss"]["held_out"]) == ["eval"]
    assert told["answers"][0]["given"] == [["step 20", f"first {HOSTILE}"]] and told["data"]["kept"] == 320
    assert time.time() - told["heard"] < 60 and not told["story"] and not told["report"]


def test_a_finished_run_and_one_that_has_not_begun(tmp_path):
    told = snapshot(make_run(tmp_path / "run"))
    assert told["status"] == "finished" and told["left"] is None and "rose from 25% to 75%" in told["story"]
    assert [when for when, _ in told["answers"][0]["given"]] == ["base", "step 20", "step 40", "step 60", "tuned"]
    assert snapshot(tmp_path / "none")["status"] == "waiting"
    (tmp_path / "empty").mkdir()
    assert snapshot(tmp_path / "empty")["status"] == "waiting"


def test_a_run_that_will_replace_a_finished_one_is_watched_and_not_that(tmp_path):
    run = make_run(tmp_path / "run")
    (run / NEXT).mkdir()
    (run / NEXT / "metrics.jsonl").write_text(
        '{"event": "train_begin", "max_steps": 9, "step": 0}\n{"step": 1, "loss": 7.0}\n'
    )
    told = snapshot(run)
    assert (told["status"], told["step"], told["max_steps"], told["latest"]["loss"]) == ("running", 1, 9, 7.0)


@pytest.mark.parametrize("change, words, bad", [
    (lambda i: {"preference/accuracies": 0.3}, "below chance", True),
    (lambda i: {"loss": 9.0 if i == 25 else 2.0 + 0.01 * (i % 3)}, "jumped to 9", True),
    (lambda i: {"logps/chosen": -1 - 0.1 * i, "logps/rejected": -1 - 0.1 * i, "rewards/margins": 0.1},
     "both fall and", True),
    (lambda i: {"logps/chosen": -1 - 0.1 * i, "logps/rejected": -1 - 0.2 * i, "rewards/margins": 0.1 * i},
     "normal", False),
    (lambda i: {"preference/accuracies": 1.0}, "held-out ones", True),
])  # fmt: skip
def test_alerts(tmp_path, change, words, bad):
    records = [{"step": 2 * i, "seconds": 4.0 * i, "loss": 2.0, **change(i)} for i in range(1, 31)]
    records.append({"step": 60, "eval_loss": 2.0, "eval_preference/accuracies": 0.5})
    told = snapshot(running(tmp_path / "run", metrics=records))
    assert [bad] == [severe for severe, text in told["alerts"] if words in text], told["alerts"]


def test_files_are_read_when_they_change_and_not_else(tmp_path, monkeypatch):
    run = running(tmp_path / "run")
    watched = Watched([run])
    first = watched.look()
    monkeypatch.setattr("preference.report.live.snapshot", lambda folder: {"again": True})
    assert watched.look() == first
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "loss": 1.0}\n{"step": 34, "lo')
    assert watched.look()[0] == first[0] + 1 and watched.look()[1]["runs"] == [{"again": True}]
    monkeypatch.undo()
    assert snapshot(run)["step"] == 32  # a line that is being written waits


def test_long_curves_are_thinned_and_their_ends_kept():
    points = [(i, float(i)) for i in range(10_000)] + [(10_000, float("nan"))]
    thin = thinned(points)
    assert len(thin) <= POINTS + 1 and thin[0] == [0, 0.0] and thin[-1] == [9999, 9999.0]
    assert thinned([]) == [] and thinned(points[:3]) == [[0, 0.0], [1, 1.0], [2, 2.0]]


# ---- who may ask, and for what


def test_paths_and_their_headers(server):
    for path, kind in (("/", "text/html"), ("/watch.js", "text/javascript"), ("/watch.css", "text/css"),
                       ("/state", "application/json"), ("/events", "text/event-stream")):  # fmt: skip
        status, headers, body = ask(server, path)
        assert status == 200 and headers["content-type"].startswith(kind) and body
        assert headers["x-frame-options"] == "DENY" and headers["cache-control"] == "no-store"
    assert "script-src 'self'" in ask(server, "/")[1]["content-security-policy"]
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1", "Origin": "http://evil.example"},
                                     {"Host": "["}])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/state", "/events", "/report/1"])
def test_strangers_get_nothing(server, headers, path):
    status, _, body = ask(server, path, **headers)
    assert status == 403 and b"loss" not in body and CHINESE.encode() not in body


@pytest.mark.parametrize("method, path, status", [
    ("POST", "/", 501), ("PUT", "/state", 501), ("DELETE", "/report/1", 501), ("GET", "/report/9", 404),
    ("GET", "/report/0", 404), ("GET", "/report/-1", 404), ("GET", "/../run.json", 404), ("GET", "/run.json", 404),
    ("GET", "/report/../../etc/passwd", 404), ("HEAD", "/state", 200), ("GET", "/report/%32", 404),
])  # fmt: skip
def test_it_reads_and_only_what_is_its_own(server, method, path, status):
    assert ask(server, path, method)[0] == status


def test_a_finished_report_is_opened(server):
    folder = server.watched.folders[1]
    (folder / "report.html").write_text("<p>the report", encoding="utf-8")
    assert ask(server, "/report/1")[2] == b"<p>the report"


def test_what_no_json_holds(tmp_path):
    run = running(tmp_path / "run", samples=[{"source": "a:1", "question": "broken \ud800 \ufffd", "base": "b"}])
    started = serve([run], port=0)
    _, _, body = ask(started, "/state")
    started.stop()
    question = next(a["question"] for a in json.loads(body)["runs"][0]["answers"] if "broken" in a["question"])
    assert "\ufffd" not in body.decode() and question == "broken \\ud800 \\ufffd"


def test_a_taken_port_is_passed_over_and_too_many_pages_are_refused(tmp_path):
    first = serve([tmp_path], port=0)
    second = serve([tmp_path], port=first.server_address[1])
    assert second.server_address[1] != first.server_address[1]
    for _ in range(READERS):
        second.readers.acquire()
    assert ask(second, "/events")[0] == 503
    first.stop(), second.stop()
    with pytest.raises(WatchError, match="1 to 6 runs"):
        serve([tmp_path] * 7)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])


# ---- in a browser

browser_needed = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with Browser(server.url, tmp_path_factory.mktemp("profile")) as opened:
        opened.wait("document.querySelectorAll('#curves figure').length > 5")
        yield opened
        assert opened.errors == [] and opened.hosts <= {"127.0.0.1"}


@browser_needed
def test_the_page_follows_the_run(server, page):
    text = page.evaluate("document.body.innerText")
    for words in (
        "step 30 of 60",
        "running",
        "finished",
        "rose from 25% to 75%",
        "now: ",
        HOSTILE,
        CHINESE,
        "320 kept",
    ):
        assert words in text, words
    assert (
        "owned" not in page.evaluate("document.title")
        and page.evaluate("document.querySelectorAll('script').length") == 1
    )
    lines = "document.querySelectorAll('#curve-loss .line').length"
    assert page.evaluate(lines) == 4  # two runs, each with training and held-out pairs
    assert (
        page.evaluate(
            "new Set([...document.querySelectorAll('#curve-loss .line')].map(l => l.getAttribute('stroke'))).size"
        )
        == 2
    )
    with (server.watched.folders[0] / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 32, "seconds": 64.0, "loss": 1.5, "tokens_per_second": 777.0}) + "\n")
    with (server.watched.folders[0] / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"step": 32, "source": "a.jsonl:1", "question": CHINESE, "answer": "a later answer"}) + "\n"
        )
    page.wait("document.body.innerText.includes('step 32 of 60') && document.body.innerText.includes('777')", 20)
    page.wait("document.querySelector('.new .text').textContent.includes('a later answer')", 20)
    page.evaluate("document.getElementById('show1').click()")
    page.wait(f"{lines} === 2", 10)
    page.evaluate("document.getElementById('show1').click()")


@browser_needed
def test_values_are_shown_under_the_pointer(page):
    page.evaluate("document.getElementById('curve-loss').scrollIntoView()")
    box = json.loads(page.evaluate("JSON.stringify(document.querySelector('#curve-loss svg').getBoundingClientRect())"))
    page.call(
        "Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2
    )
    page.wait("!document.getElementById('tip').hidden", 10)
    assert "now, training: " in page.evaluate("document.getElementById('tip').textContent")


@browser_needed
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, (1280, 900)], ids=["phone", "desktop"])
def test_it_fits_phones_and_the_dark(page, size, dark):
    page.call(
        "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=size == PHONE
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    page.call("Emulation.setEmulatedMedia", features=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    ground, ink = (sum(map(int, colour[4:-1].split(","))) / 3 for colour in colours)
    assert (ground < 60 and ink > 180) if dark else (ground > 230 and ink < 60)
    widths = page.evaluate("[...document.querySelectorAll('#curves figure')].map(f => f.getBoundingClientRect().width)")
    assert len(widths) >= 8 and all(250 < width <= size[0] for width in widths)


def test_a_port_that_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--port", "65536"])
    assert stop.value.code == 2 and "from 0 to 65535" in capsys.readouterr().err


def test_what_is_told_of_accuracy_is_of_the_run(tmp_path):
    """The story of a run whose evaluation says otherwise says so too."""
    told = snapshot(make_run(tmp_path / "run", evaluation={"all": {"base": analysed(0.25), "tuned": analysed(0.3)}}))
    assert "Length may explain" in told["story"]
