"""What a person sees: on terminals of several widths, without one, in both languages; and what ends a run."""

from __future__ import annotations

import ast
import io
import re
import string
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from on_terminal import XTERM, on_terminal
from rich.text import Text
from test_headline import report

from preference.data.headline import SINGLE, show_data
from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.text_stats import shared_prompts
from preference.errors import PreferenceError
from preference.launch import process
from preference.report.facts import Plan, show_plan
from preference.report.outcome import show_outcome
from preference.report.step_table import StepTable, bar_line
from preference.report.tables import side_by_side
from preference.screen import shown
from preference.terminal import failure
from preference.terminal.console import Terminal, elided, terminal, wants_colours
from preference.terminal.language import of_environment, spoken
from preference.terminal.words import WORDS
from preference.tokens.showing import readable_tokens, show_pair
from tiny import tiny_tokenizer

CHINESE = "衬衫上有油渍怎么洗？先滴一滴洗洁精，揉一分钟，用温水冲，再放进洗衣机。"
FACTS = {
    "arguments": {"model_name_or_path": "models/" + "m" * 90, "loss": "orpo", "engine": "packed"},
    "parameters": 139.4e6, "trainable": 4.88e6, "pairs_per_step": 8, "learning_rate": 1e-3, "beta": 0.1,
    "learning_rate_from": "starter model: 2e-4 learned little in a pass, 1e-3 much (benchmarks/LOG.md)",
    "beta_from": "given",
}  # fmt: skip


def pair_of(*texts: str) -> dict:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return {"source": "data/train/zh.jsonl:7"} | dict(
        zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)
    )


def opening(target: Terminal) -> None:
    """What a run says before it trains, with more to say than there is room for."""
    made = report(files=500, **{f"reason_{i}": i + 1 for i in range(9)})
    made.warnings += [f"{CHINESE} {n} " * 9 for n in range(12)]
    made.sections["evaluation"] = made.sections["train"]
    target.rows("where", ["CPU (2 threads), 24 GiB, bfloat16; computing in bfloat16; into outputs/orpo"])
    target.rows("template", ["qwen2, stop text '<|im_end|>'"])
    target.rows("warning", [target.cut("the template is another one " * 30, 2) if target.coloured else "w"])
    show_data(made, target)
    prompt = f"<|im_start|>user\n{CHINESE * 20}<|im_end|>\n<|im_start|>assistant\n"
    show_pair(pair_of(prompt, f"{CHINESE * 9}<|im_end|>", f"{'No. ' * 90}<|im_end|>"), tiny_tokenizer(), target)
    show_plan(FACTS, Plan(240, 30, 61234.5, 63.2, 0.3e12, 1.4 * 2**30, 24 * 2**30), target)


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("lang", ["en_US.UTF-8", "zh_CN.UTF-8"])
def test_a_page_before_training(columns: int, lang: str) -> None:
    with on_terminal(columns, {"LANG": lang}) as screen:
        assert terminal.width == columns
        opening(terminal)
    lines = screen.lines()
    assert len(lines) <= 25 and all(Text(line).cell_len <= columns for line in lines), lines
    text = "\n".join(lines)
    assert "\ufffd" not in text and "(bytes)" not in text and "{" not in text and "█" in text
    assert ("仅凭长度" in text or "条说明" in text) == (lang[:2] == "zh") and "<|im_end|>" in text
    green = re.search(r"\x1b\[32m([^\x1b]*)", screen.raw)
    assert green and green[1].startswith(CHINESE[:4])  # what is learned has a colour of its own


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture) -> None:
    opening(terminal)
    text = capsys.readouterr().out
    assert "\x1b" not in text and "⟦" + CHINESE[:9] in text and "data: 5,045 rows" in text.replace("5,000", "5,045")
    assert "plan: 30 steps of 8 pairs, some 61,23" in text and "no less than 1:03" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("plan")) > 80  # no line is broken


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb"), ("TERM", "")])
def test_a_terminal_whose_user_wants_plain_lines(name: str, value: str) -> None:
    tty = SimpleNamespace(isatty=lambda: True)
    assert wants_colours(tty, XTERM) and not wants_colours(tty, XTERM | {name: value})
    assert not wants_colours(io.StringIO(), XTERM) and not wants_colours(None, XTERM)


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_terminal_that_lacks_characters(encoding: str) -> None:
    with on_terminal(80, {"LANG": "zh_CN"}, encoding) as screen:
        assert spoken() == ("zh" if encoding == "gbk" else "en")
        opening(terminal)
        terminal.draw_bar(bar_line(terminal, "", 5, 10, "loss 1"))
        terminal.say("⟦中⟧ café")
    assert screen.lines()[-1].startswith("\\u27e6")
    assert "\\u2026" not in screen.raw
    assert ("#####" in screen.raw) == (encoding == "ascii")


@pytest.mark.parametrize("environ, language", [
    ({}, "en"), ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "zh_TW", "LC_ALL": "C"}, "en"), ({"LC_ALL": "zh_CN"}, "zh"),
    ({"LANG": "de_DE"}, "en"),
])  # fmt: skip
def test_the_language_of_a_locale(environ: dict[str, str], language: str) -> None:
    assert of_environment(environ) == language


def test_every_message_is_there_in_both_languages_and_used(root: Path) -> None:
    def fields(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text)} - {None}

    for key, (english, chinese) in WORDS.items():
        assert fields(english) == fields(chinese) and english and chinese, key
        assert english.isascii() or not re.search("[\u4e00-\u9fff]", english), key
    code = "\n".join(path.read_text("utf-8") for path in [*(root / "preference").rglob("*.py"), root / "orpo_train.py"]
                     if path.name != "words.py")  # fmt: skip
    told = {node.value for node in ast.walk(ast.parse(code.replace("from __future__ import annotations", "")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    told |= {f"{key}_single" for key in SINGLE}
    unused = {key for key in WORDS if key not in told and not key.startswith(("hint_", "means "))}
    assert not unused and all(key.removeprefix("hint_") in told for key in WORDS if key.startswith("hint_"))


def test_rows_mark_what_is_best_so_far_and_narrow_terminals_lose_the_last_columns() -> None:
    figures = {"loss": 2.0, "nll_loss": 1.5, "preference/accuracies": 0.5, "rewards/margins": 0.01, "left": 65.0}
    with on_terminal(80) as screen:
        table = StepTable(terminal)
        for step, loss in enumerate((2.0, 2.5, 1.75), 1):
            table.row(f"{step}/30", figures | {"loss": loss})
        table.row("eval 3", figures, held_out="eval")
    head, *rows = screen.lines()
    assert len(head) == 80 and head.split()[-1] == "left" and [row[10:18].strip() for row in rows] == [
        "2.0000", "2.5000", "*1.7500", "2.0000"
    ]  # fmt: skip
    assert rows[0].split()[-1] == "1:05"
    with on_terminal(40) as narrow:
        StepTable(terminal).row("1/30", figures)
    with on_terminal(200) as wide:
        StepTable(terminal).row("1/30", figures)
    assert [screen.lines()[0].split()[-1] for screen in (narrow, wide)] == ["acc", "rejected"]
    assert all(len(line) <= 40 for line in narrow.lines())


def test_other_output_stands_above_the_bar_and_no_copy_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(60) as screen:
        for done in range(4):
            terminal.draw_bar(bar_line(terminal, "", done, 4, "中文 loss 2.1"))
            terminal.say(f"line {done}")
        terminal.stop_bar()
        terminal.say("end")
    assert screen.lines() == ["line 0", "line 1", "line 2", "line 3", "end"] and "━" in screen.raw
    assert "\x1b[?25l" not in screen.raw  # a killed run leaves the cursor


@pytest.mark.parametrize("text, columns", [("short", 10), (CHINESE * 3, 30), ("x" * 500, 41), ("é中" * 99, 20)])
def test_what_is_cut_keeps_its_ends(text: str, columns: int) -> None:
    cut = elided(text, columns)
    assert cut.cell_len <= columns and cut.plain[:3] == text[:3] and cut.plain[-3:] == text[-3:]


def test_nothing_is_trained_where_a_model_is_scored(capsys: pytest.CaptureFixture) -> None:
    show_plan(FACTS, None, terminal)
    said = capsys.readouterr().out
    assert "M parameters" in said and "trained" not in said


@pytest.mark.parametrize("environ", [None, XTERM])
def test_single_answers_are_called_so(environ: dict[str, str] | None, capsys: pytest.CaptureFixture) -> None:
    row = pair_of("Well?", CHINESE, "") | {"desirable": 1.0}
    with on_terminal(80, environ) if environ else nullcontext() as screen:
        show_pair(row, tiny_tokenizer(), terminal)
    said = screen.raw if screen else capsys.readouterr().out
    assert ("one answer" if environ else "the first answer, as") in said and "pair" not in said


@pytest.mark.parametrize("environ", [None, XTERM])
def test_prompts_that_are_trained_on_too_are_told_once(
    environ: dict[str, str] | None, capsys: pytest.CaptureFixture
) -> None:
    made = DataReport()
    row = Row("Well?", CHINESE, "No.", file="data/a.jsonl", line=1)
    shared_prompts([row], [row], made)
    with on_terminal(200, environ) if environ else nullcontext() as screen:
        show_data(made, terminal)
    said = screen.raw if screen else capsys.readouterr().out
    assert said.count("evaluation rows") == 1


def test_columns_hold_whatever_a_model_writes() -> None:
    """What acts on a terminal, what takes no room and what takes two columns."""
    text = side_by_side("?", {"base": "\x1b[2J\u05aa word " * 9, "tuned": f"{CHINESE}\x1b\u05aa" * 9}, width=61)
    rows = text.splitlines()[1:]
    assert len(rows) > 4 and all(Text(row).cell_len <= 61 and shown(row) == row for row in rows)
    assert {Text(row.partition("|")[0]).cell_len for row in rows if "|" in row} == {30}


def test_tokens_are_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("油x🙂", add_special_tokens=False)
    found = list(readable_tokens(tokenizer, ids))
    assert "".join(text for text, _ in found) == "油x🙂" and [i for _, group in found for i in group] == ids
    assert [text for text, _ in readable_tokens(tokenizer, ids[:1])] == ["\\ufffd"] or len(ids) == 3


def test_the_table_at_the_end_says_what_is_sure() -> None:
    before = {"eval_loss": 3.0, "eval_preference/accuracies": 0.34, "eval_preference/margins": -0.3}
    after = {"eval_loss": 1.9, "eval_preference/accuracies": 0.8, "eval_preference/margins": -0.2}
    changes = {"preference/accuracies": {"interval": [0.3, 0.6], "significant": True},
               "preference/margins": {"interval": [-0.05, 0.2], "significant": False}}  # fmt: skip
    with on_terminal(80) as screen:
        show_outcome(before, after, changes, terminal)
    rows = {line[:20].strip(): " ".join(line[20:].split()) for line in screen.lines()}
    assert rows["preference accuracy"] == "34.0% 80.0% +46.0 pts +30 to +60 better"
    assert rows["margin per token"] == "-0.3000 -0.2000 +0.1000 -0.05 to +0.20 unclear"


# ---- what ends a run


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """ended(error): what run_script says on a plain standard error when main raises it."""

    def call(error: Exception) -> str:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            process.run_script(main, "orpo_train.py")
        monkeypatch.setattr(process, "error_log", None)
        return capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")

    return call


def test_an_unexpected_error_leaves_its_traceback_in_a_file(ended, tmp_path: Path) -> None:
    process.log_errors_in(tmp_path)
    said = ended(RuntimeError("boom \x1b[2J"))
    text = (tmp_path / "error.log").read_text("utf-8")
    assert said.count("\n") <= 1 and str(tmp_path / "error.log") in said and "boom" in said and "Traceback" not in said
    assert "Traceback" in text and "torch " in text and f"command: {sys.executable}" in text and "\x1b" not in text
    process.log_errors_in(tmp_path)  # the next run clears it away
    assert not list(tmp_path.iterdir())
    process.log_errors_in(tmp_path)
    tmp_path.joinpath("error.log").mkdir()  # it cannot be written
    assert "Traceback" in ended(RuntimeError("boom"))


def test_an_expected_error_is_one_sentence(ended, tmp_path: Path) -> None:
    process.log_errors_in(tmp_path)
    assert ended(PreferenceError("no such file; set x=1")) == "orpo_train.py: PreferenceError: no such file; set x=1"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sentence", [
    "max_steps takes a whole number; got 'x'; did you mean --max_steps 7?", "短句；" * 5, "word " * 300, "中文" * 200,
])  # fmt: skip
@pytest.mark.parametrize("columns", [80, 200])
def test_an_error_is_a_box_of_five_lines(sentence: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(columns) as screen:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        error = DataError.at("data/a.jsonl", 7, "broken", sentence)
        with pytest.raises(SystemExit) as end:
            failure.end_with(
                failure.Failure("orpo_train.py", "DataError", str(error), error.file, error.line), None, XTERM
            )
        monkeypatch.undo()
    lines = screen.lines()
    assert end.value.code == 1 and lines[0].startswith("╭─ orpo_train.py · DataError · data/a.jsonl:7 ")
    height = next(n for n, line in enumerate(lines, 1) if line.startswith("╰"))
    assert height <= 5 and all(Text(line).cell_len <= columns for line in lines)
    if Text(sentence).cell_len > 3 * columns:
        assert "".join(sentence.split()) in "".join("".join(lines[height:]).split())  # whole, below
    else:
        assert len(lines) == height
    assert ("\x1b[1;36m--max_steps 7" in screen.raw) == ("--max_steps" in sentence)


def test_a_picture_of_a_terminal_shows_what_stood_there_in_the_end(capfd: pytest.CaptureFixture) -> None:
    from docs.terminal_picture import final_lines, run

    said = r"printf 'one\n\033[31mbar\033[0m\r\033[2K\033[32mtwo\033[0m\nbar\n\033[1A\033[2Kthree\n'; tty >&2; exit 3"
    status, written = run(["sh", "-c", said], 80)
    lines = [Text.from_ansi(line).plain for line in final_lines(written)]
    assert status == 3 and lines[:3] == ["one", "two", "three"] and lines[3].startswith("/dev/pts/")
    assert "\x1b[32mtwo" in final_lines(written)[1] and "\x1b" in capfd.readouterr().out  # seen while it ran
