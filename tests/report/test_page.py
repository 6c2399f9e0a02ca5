"""The report of a run: what it shows, what it says is missing, and that data in it stays text."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import sys
import warnings
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_run import CHINESE, HOSTILE, STEPS, analysed, figures, log, make_run
from on_terminal import XTERM, on_terminal
from PIL import Image

from preference.report import page as pages
from preference.report.drawing import draw, ticks, written
from preference.report.evaluation import Evaluation
from preference.report.figures import Curve, Plot, running_mean
from preference.report.page import CURVES, main, write_comparison, write_report
from preference.report.results import write_results
from preference.report.run_folder import INPUTS, Run
from preference.report.story import story
from preference.screen import ACTING
from preference.terminal.console import terminal
from preference.tokens.statistics import TokenStats

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of styles; fails at tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def no_plots(monkeypatch):
    """Pages with empty plots, in a tenth of the time, for tests of the rest."""
    monkeypatch.setattr(pages, "draw", lambda plot: "<svg></svg>")
    monkeypatch.setattr(Plot, "save_png", lambda plot, folder: folder)


def test_shows_all_that_a_run_leaves(run):
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    words = [
        "models/starter", "2.13.0", "CPU (2 threads)", "25.0% → 75.0%", "+50.0 pts", CHINESE, "多休息。", "第40步",
        "empty_answer", "data/train/a.jsonl:9", "one_sided_space", "260 pairs", "62%", "0.25 TFLOP/s", "2.50 GiB",
        "margin -0.900", "margin +1.250", "+30 to +70", "rose from 25% to 75%",
        "75.0% (65 to 85%)", "62.6% (52 to 72%)", "60 steps of 8 pairs",
    ]  # fmt: skip
    assert [word for word in words if word not in page.text] == []
    assert "Every file of the run was found." in page.text
    assert page.text.index("margin -0.900") < page.text.index("margin -0.400")
    assert page.count("svg") == page.count("figure") == len(CURVES) + 1
    pictures = sorted(path.stem for path in (run / "report_figures").iterdir())
    assert pictures == sorted([name for name, *_ in CURVES] + ["lengths_train"])
    for path in (run / "report_figures").iterdir():
        picture = Image.open(path).convert("RGB")
        assert picture.width > 500 and len(picture.getcolors(1 << 20)) > 30


def test_data_stays_text_and_nothing_is_loaded(run):
    write_report(run)
    page = Page(run / "report.html")
    assert page.count("script") == 0 and page.count("style") == 1
    assert page.text.count(HOSTILE) > 10
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    for _, values in page.elements:
        for name in ("src", "href", "xlink:href"):
            link = values.get(name) or "#"
            assert link.startswith(("#", "data:")) and (link in ("#", "data:,") or link[1:] in ids)
        assert not [name for name in values if name.startswith("on")]
    policy = [values.get("content") for _, values in page.elements if values.get("http-equiv")]
    assert policy and policy[0].startswith("default-src 'none'")
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert "url(http" not in raw and "@import" not in raw and "#0000f" not in raw and "\ufffd" not in raw


def test_an_empty_folder_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path))
    assert [name for name in INPUTS if f"no {name}" not in page.text] == []
    assert "This run has no evaluation." in page.text and page.count("figure") == 0


@pytest.mark.parametrize("name", INPUTS)
def test_any_file_may_be_missing_or_broken(tmp_path, name, no_plots):
    run = make_run(tmp_path / "run", **{name.partition(".")[0]: None})
    assert f"no {name}" in Page(write_report(run)).text
    (run / name).write_bytes(b'{"cut sho')
    text = Page(write_report(run)).text
    assert f"no {name}" in text or f"{name} cannot be read" in text


def test_an_evaluation_alone(tmp_path, no_plots):
    left_out = dict.fromkeys(("trainer_state", "metrics", "answers")) | {"evaluation": {}, "worst_pairs": []}
    samples = [{"source": "a:1", "question": "Q", "chosen": "C", "model": "the model's answer"}]
    run = make_run(tmp_path / "run", all_results=figures(9, "eval_"), samples=samples, **left_out)
    text = Page(write_report(run)).text
    assert "the model's answer" in text and "32.5%" in text and "→" not in text
    assert "None was kept." in text and "no worst_pairs.json" not in text and "equal length" not in text


def test_what_a_loss_does_not_have_is_named(tmp_path, no_plots):
    records = [
        {k: v for k, v in record.items() if "nll" not in k and "odds" not in k and "logps" not in k} for record in log()
    ]
    run = make_run(tmp_path / "run", metrics=records, all_results={})
    page = Page(write_report(run))
    assert page.count("figure") == len(CURVES) + 1 - 4
    assert "Not in this run's log: Likelihood part" in page.text and "Log odds ratio" in page.text


def test_points_of_training_and_evaluation(run):
    data = Run.read(run)
    assert [step for step, _ in data.points("loss")] == list(range(2, STEPS + 1, 2))
    assert data.points("preference/accuracies", "eval")[0] == (0, 0.25)
    assert [step for step, _ in data.points("loss", "eval")] == [0, 20, 40, 60]
    step, part = data.points("preference_part")[3]
    assert part == pytest.approx(figures(step)["loss"] - figures(step)["nll_loss"]) and part > 0
    assert data.speed["tokens_per_second"] == 441 and data.speed["memory_gib"] == 2.5
    (run / "metrics.jsonl").unlink()
    assert Run.read(run).points("loss") == data.points("loss")


def test_cpo_weighs_its_likelihood(tmp_path):
    arguments = {"arguments": {"loss": "cpo", "cpo_alpha": 0.5}}
    data = Run.read(make_run(tmp_path / "run", run=arguments))
    assert data.points("preference_part")[0][1] == pytest.approx(figures(2)["loss"] - 0.5 * figures(2)["nll_loss"])


def test_a_step_logged_twice_counts_once(tmp_path, no_plots):
    not_finite = {"step": 4, "loss": None, "nll_loss": 1.0}
    records = [{"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0}, not_finite, {"step": 6, "loss": 0.5}]
    data = Run.read(make_run(tmp_path / "run", metrics=records))
    assert data.points("loss") == [(2, 1.0), (6, 0.5)]
    write_report(tmp_path / "run")


def test_several_evaluation_sets_and_names_no_font_can_write(tmp_path):
    sets = ("eval_english", "eval_中文")
    results = {
        f"{head}{name}": value
        for prefix in sets
        for head, step in (("base_", 0), ("", STEPS))
        for name, value in figures(step, f"{prefix}_").items()
    }
    run = make_run(tmp_path / "run", metrics=log(sets), all_results=results)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that its font lacks
        text = Page(write_report(run)).text
    assert "english" in text and "中文" in text and "set 2" in text
    assert text.count("+50.0 pts") == 2


def test_comparison(tmp_path):
    slow = {"arguments": {"loss": "orpo", "learning_rate": 1e-7}, "versions": {"torch": "2.13.0"}}
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / HOSTILE[:8], run=slow), make_run(tmp_path / "three")]
    path = write_comparison(folders, tmp_path / "pages" / "compared.html")
    page = Page(path)
    assert "1e-07" in page.text and "learning_rate" in page.text and CHINESE in page.text
    assert "started" not in page.text
    assert page.count("figure") == len(CURVES) == len(list((tmp_path / "pages" / "compared_figures").iterdir()))
    text = path.read_text(encoding="utf-8")
    assert all(f'stroke="var(--f{i})"' in text for i in range(3))
    for count in (1, 7):
        with pytest.raises(ValueError, match="2 to 6 runs"):
            write_comparison(folders[:1] * count, path)


def test_command_line(run, tmp_path, capsys, monkeypatch, no_plots):
    main([str(run)])
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    monkeypatch.chdir(tmp_path)
    main(["--compare", str(run), str(run)])
    assert Path("comparison.html").is_file()
    for wrong in ([], [str(run), "--compare", str(run)], ["no/such/folder"], ["--compare", str(run)],
                  [str(run), "--output", "other.html"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


@pytest.mark.parametrize("module", ["page", "watch"])
def test_a_module_that_is_run_does_something(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "no/such/folder"])
    monkeypatch.delitem(sys.modules, f"preference.report.{module}", raising=False)  # runpy warns of one that is there
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"preference.report.{module}", run_name="__main__")
    assert stop.value.code == 2 and "no/such/folder is not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("environ", [None, XTERM])
def test_a_run_without_evaluation_says_where_it_is_and_no_empty_lines(tmp_path, environ, capsys):
    args = SimpleNamespace(run=SimpleNamespace(output_dir=tmp_path, do_train=False, html_report=False))
    evaluation = Evaluation(None, None, {})
    with on_terminal(80, environ) if environ else nullcontext() as screen:
        write_results(args, "base", {}, {}, evaluation, SimpleNamespace(records=[]), terminal)
    said = "\n".join(screen.lines()) if environ else capsys.readouterr().out
    assert f"savedin{tmp_path}" in "".join(said.split()) and "\n\n" not in said  # wrapped where the path is long


def test_text_that_is_no_utf8_or_acts_on_a_terminal_is_shown(tmp_path, no_plots):
    """A page may be looked at with `cat`; a direction that one cell sets ends with it."""
    samples = [{"source": "a\x1b]0;t\x07:1", "question": "broken \ud800 text \u202eabc", "base": "b\x9b", "tuned": "t"}]
    page = Page(write_report(make_run(tmp_path / "run", samples=samples)))
    assert "broken \\ud800 text \\u202eabc" in page.text and "a␛]0;t␇:1" in page.text
    raw = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not ACTING.search(raw) and "td, th, summary { unicode-bidi: isolate; }" in raw


def test_a_drawing_shows_its_values_where_the_pointer_is():
    """Every value of a short line, an evaluation and a histogram is told by the element at its place."""
    points = [(1, 2.0), (2, 3.25), (3, float("nan")), (4, 1.5)]
    plot = Plot("p", "A <b>title", "r", [Curve("", points, {"evaluation": [(2, 2.5)]}), Curve("B", [], {}, 1)])
    text = draw(plot)
    told = re.findall(r"<title>(.*?)</title>", text)
    assert told == [
        "training: 2 at optimizer step 1", "training: 3.25 at optimizer step 2", "training: 1.5 at optimizer step 4",
        "evaluation: 2.5 at optimizer step 2",
    ]  # fmt: skip
    places = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert places[0][0] < places[1][0] < places[2][0] and places[1][1] < places[0][1] < places[2][1]
    assert "nan" not in text and "<b>" not in text and "evaluation</text>" in text
    bars = draw(Plot("h", "t", "r", bars={"chosen": [3, 0, 5]}, edges=[0, 10, 20, 30], x="tokens"))
    assert "chosen: 5 of 20 to 29 tokens" in bars
    long = draw(Plot("l", "t", "r", [Curve("", [(i, float(i)) for i in range(5000)])]))
    assert 100 <= long.count("<circle") <= 130 and "training: 4999 at" in long
    assert "<path" not in draw(Plot("n", "t", "r", [Curve("", [(1, float("nan"))])]))


@pytest.mark.parametrize("low, high, expected", [
    (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (2.9, 3.1, [2.9, 2.95, 3.0, 3.05, 3.1]), (-12, 7, [-10, -5, 0, 5]),
    (5.0, 5.0, [5.0]), (0.0, 4e-6, [0.0, 1e-6, 2e-6, 3e-6, 4e-6]),
])  # fmt: skip
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
    assert all(value == round(value) for value in ticks(0, 3, 6, whole=True))


def test_values_are_written_short():
    values = (0.25, 3.14159, 12345.0, 5e-6, 250000.0, 0.0)
    assert [written(value) for value in values] == ["0.25", "3.142", "12,345", "5e-06", "2.5e+05", "0"]
    assert written(0.8026, percent=True) == "80.26%"


PARTLY = analysed(0.9) | {
    "length_controlled_accuracy": 0.45,
    "interval": {"accuracy": [0.8, 0.95], "length_controlled_accuracy": [0.35, 0.55]},
}  # at equal length surely better than before, but by less than half of what was gained


def changed(low, high):
    return {"preference/accuracies": {"change": 0.5, "interval": [low, high], "significant": low > 0 or high < 0}}


@pytest.mark.parametrize("files, told, untold", [
    ({}, ["rose from 25% to 75% (+50 points, 95% interval +30 to +70)", "not explained by length", "NLL of the chosen",
          "fell from 3.40 to 2.20", "still falling"], ["unclear"]),
    ({"changes": changed(-0.1, 0.9)}, ["did not change beyond chance"], ["length"]),
    ({"evaluation": {"all": {"base": analysed(0.25), "tuned": analysed(0.3)}}}, ["Length may explain"],
     ["not explained"]),
    ({"evaluation": {"all": {"base": analysed(0.25), "tuned": PARTLY}}}, ["Length may explain"], ["not explained"]),
    ({"changes": changed(-0.6, -0.4), "all_results": figures(0, "eval_") | figures(STEPS, "base_eval_")},
     ["fell from 75% to 25%", "rose from 2.20 to 3.40", "lower learning_rate"], ["length", "falling"]),
    ({"metrics": None, "trainer_state": {}}, ["too short"], []),
    ({"metrics": [{"step": i, "loss": 2.0} for i in range(1, 20)]}, ["had stopped falling"], []),
    ({"all_results": {}}, [], ["Preference"]),
])  # fmt: skip
def test_the_story_of_a_run(tmp_path, files, told, untold):
    text = story(Run.read(make_run(tmp_path / "run", **files)))
    assert [words for words in told if words not in text] == [] and not [words for words in untold if words in text], (
        text
    )
    assert bool(text) == bool(told)


def test_running_mean_keeps_lines_and_ends():
    line = [2.0 * i for i in range(30)]
    assert running_mean(line, 5) == pytest.approx(line)
    assert running_mean([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]


def test_a_plot_is_the_same_each_time():
    plot = Plot("p", "Title", "Reading.", [Curve("", [(1, 2.0), (2, 3.0)], {"evaluation": [(1, 2.5)]})])
    assert draw(plot) == draw(plot) and not plot.empty
    assert Plot("p", "t", "r", [Curve("", [], {"evaluation": []})]).empty


def test_the_page_says_what_the_data_report_found(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for said in ("100.0%", "remark <span", "en 68.5%, zh 31.5%", "2 pairs are judged both ways round"):
        assert said in page
    lengths = {"p50": 3}
    single = {"pairs": 6, "single_answers": 6, "prompt": lengths, "chosen": lengths, "rejected": lengths}
    texts = {"single_answers": 6, "contradicting_pairs": 1, "repeated_prompts": 4}
    run = make_run(tmp_path / "single", data_report={"train": single, "train_text": texts})
    page = write_report(run).read_text(encoding="utf-8")
    for said in (
        "6 single answers",
        "<td>bad</td>",
        "1 answers are judged both ways: good",
        "4 rows repeat an earlier",
    ):
        assert said in page


def test_histogram_of_the_data_report(tmp_path):
    stats = TokenStats(1024, 512, truncate=False)
    lengths = [(3 + i, 2 + i % 40, 250 - i) for i in range(100)]
    for each in lengths:
        stats.keep(*each)
    section = json.loads(json.dumps(stats.outcome()["section"]))
    bins = section["histogram"]
    assert all(a["to"] == b["from"] for a, b in itertools.pairwise(bins))
    for i, side in enumerate(("prompt", "chosen", "rejected")):
        for each in bins:
            assert each[side] == sum(each["from"] <= length[i] < each["to"] for length in lengths)
        assert sum(each[side] for each in bins) == 100
    run = make_run(tmp_path / "run", data_report={"rows_read": 1, "rows_kept": 1, "evaluation": section})
    write_report(run)
    assert (run / "report_figures" / "lengths_evaluation.png").is_file()
