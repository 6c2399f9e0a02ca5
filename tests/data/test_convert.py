"""data/convert.py: the command line, the triples it writes, the report, what it refuses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from format_rows import BAD, CHAT, GOOD, PAIR, PKU, ROWS, SHP, USER, real_samples
from reading import lines, read, triple, write

from preference.tokens import convert as script

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "datasets"


def convert(capsys, *args) -> tuple[int, list[dict], dict, str]:
    """(exit status, triples written, report, what was printed) of data/convert.py with --output and --report added."""
    folder = Path(args[0]).parent
    output, report = folder / "out.jsonl", folder / "report.json"
    for old in (output, report):
        old.unlink(missing_ok=True)
    status = script.main([*map(str, args), "--output", str(output), "--report", str(report)])
    written = [json.loads(line) for line in output.read_text().split("\n")[:-1]] if output.exists() else []
    content = json.loads(report.read_text()) if report.exists() else {}
    if content:
        assert content["rows_read"] == content["rows_written"] + sum(content["dropped"].values())
        assert content["rows_written"] == len(written)
        assert set(content["examples"]) == set(content["dropped"])
    printed = capsys.readouterr()
    return status, written, content, printed.out + printed.err


@pytest.fixture
def source(tmp_path):
    def make(*rows, name="rows.jsonl"):
        (tmp_path / "in").mkdir(exist_ok=True)
        return write(tmp_path / "in", lines(*rows), name)

    return make


def test_command_as_the_readme_gives_it(tmp_path):
    path = write(tmp_path, lines(triple(1), triple(2, question=""), triple(3)))
    command = [sys.executable, "data/convert.py", str(path), "--output", str(tmp_path / "new" / "out.jsonl")]
    done = subprocess.run([*command, "--report", str(tmp_path / "r.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triple" in done.stderr and "because 3 of the first 3 rows" in done.stderr
    assert "3 read, 2 kept, 1 dropped" in done.stdout and "2 triples written" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report)[:3] == ["format", "rows_read", "rows_written"] and report["format"] == "triple"
    assert report["dropped"] == {"empty_prompt": 1}
    assert report["examples"] == {"empty_prompt": [{"file": str(path), "line": 2, "detail": ""}]}
    assert len(read(tmp_path / "new" / "out.jsonl")[0]) == 2


@pytest.mark.parametrize("name, row", ROWS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ROWS)])
def test_every_family_becomes_the_triple(source, capsys, name, row):
    status, written, report, _ = convert(capsys, source(row))
    triple = {"system": "", "history": [], "question": USER, "response_chosen": GOOD, "response_rejected": BAD}
    assert (status, written, report["format"]) == (0, [triple], name)


def test_a_string_prompt_is_a_question_or_stays_as_it_stands(source, capsys):
    _, written, report, _ = convert(capsys, source({"prompt": " " + USER, **PAIR}))
    assert written[0]["question"] == USER and report["notes"]["prompt_is_question"] == 1
    unknown = {"prompt": "<|mine|>Hi<|yours|>", **PAIR}
    _, written, report, _ = convert(capsys, source(unknown))
    assert written == [unknown] and report["notes"] == {"prompt_as_it_stands": 1}
    _, written, _, _ = convert(capsys, source(unknown), "--prompt-is-rendered", "false")
    assert written[0]["question"] == unknown["prompt"]
    _, written, _, _ = convert(capsys, source({"prompt": USER, **PAIR}), "--prompt-is-rendered", "true")
    assert written == [{"prompt": USER, **PAIR}]


def test_converting_the_output_again_changes_nothing(source, capsys):
    rows = [triple(1, system="S", history=[["a", "b"]]), triple(2, question='a\u2028b\n 发烧😀 \\u0000 "')]
    _, once, _, _ = convert(capsys, source(*rows))
    _, twice, _, _ = convert(capsys, source(*once))
    assert once == twice and once[0]["history"] == [["a", "b"]] and once[1]["question"] == rows[1]["question"]


def test_columns(source, capsys):
    path = source({"QUERY": USER, "GOOD": [{"role": "assistant", "content": GOOD}], "BAD": BAD, "SYS": "S"})
    _, written, report, _ = convert(capsys, path, "--columns", "question=QUERY,chosen=GOOD,rejected=BAD,system=SYS")
    assert written[0] | {"history": None} == {
        "system": "S", "history": None, "question": USER, "response_chosen": GOOD, "response_rejected": BAD,
    }  # fmt: skip
    assert report["format"] == "columns"


def test_axis_is_asked_for(source, capsys):
    path = source(PKU | {"better_response_id": 1, "safer_response_id": 0})
    status, written, report, text = convert(capsys, path)
    assert status == 1 and not written and report["dropped"] == {"choice_needed": 1}
    assert "disagree in 1 of 1 rows" in text and "nothing written" in text
    assert convert(capsys, path, "--axis", "safer")[1][0]["response_chosen"] == BAD


def test_dedup_and_max_per_prompt(source, capsys):
    rows = [triple(1), triple(1, question="QUESTION  1")]
    rows += [triple(1, response_chosen="x"), triple(1, response_chosen="y")]
    _status, written, report, _ = convert(capsys, source(*rows), "--dedup")
    assert len(written) == 3 and report["dropped"] == {"duplicate": 1} and report["text"]["rows"] == 3
    _, written, report, _ = convert(capsys, source(*rows), "--max-per-prompt", "2")
    assert len(written) == 2 and report["dropped"] == {"over_max_per_prompt": 2}
    assert report["examples"]["over_max_per_prompt"][0]["line"] == 3


def test_gap_and_pairs(source, capsys):
    _, written, report, _ = convert(capsys, source(SHP, SHP | {"score_ratio": 1.2}), "--min-score-gap", "2")
    assert len(written) == 1 and report["dropped"] == {"score_gap": 1}
    ranked = source({"instruction": USER, "history": [], "output": ["1", "2", "3"]})
    assert [row["response_rejected"] for row in convert(capsys, ranked)[1]] == ["3"]
    assert len(convert(capsys, ranked, "--pairs", "all")[1]) == 3
    picked = [convert(capsys, ranked, "--pairs", "best-random", "--seed", seed)[1] for seed in range(9)]
    assert {rows[0]["response_rejected"] for rows in picked} == {"2", "3"}


def test_folder_with_a_refused_file_writes_the_rest(tmp_path, source, capsys):
    source(triple(1), name="a.jsonl")
    kto = source({"prompt": USER, "completion": GOOD, "label": True}, name="b.jsonl")
    source(CHAT, name="c.jsonl")
    status, written, report, text = convert(capsys, tmp_path / "in")
    assert status == 0 and len(written) == 2 and report["dropped"] == {"not_preference": 1}
    assert report["format"] == "triple+trl-implicit-messages" and f"{kto} was refused" in text
    status, written, _, _ = convert(capsys, kto, tmp_path / "in" / "a.jsonl")
    assert status == 1 and len(written) == 1  # refused although it was named


def test_output_is_whole_or_not_there(tmp_path, source, capsys):
    output = write(tmp_path, b"old\n", "out.jsonl")
    kto = source({"prompt": USER, "completion": GOOD, "label": True})
    assert script.main([str(kto), "--output", str(output)]) == 1
    assert output.read_text() == "old\n" and not list(tmp_path.glob("*.part"))


def test_output_inside_the_input_folder_is_not_read(tmp_path, capsys):
    write(tmp_path, lines(triple(1)))
    for _ in range(2):
        assert script.main([str(tmp_path), "--output", str(tmp_path / "z.jsonl")]) == 0
    assert len((tmp_path / "z.jsonl").read_text().splitlines()) == 1
    own = write(tmp_path, lines({**triple(1), "note": "the user's"}), "rows.jsonl").read_bytes()
    for words in (["--output", "rows.jsonl"], ["--output", "z.jsonl", "--report", "rows.jsonl"]):
        paths = [str(tmp_path / word) if not word.startswith("--") else word for word in words]
        for folder in (str(tmp_path), f"{tmp_path}:0.5"):  # with a share too
            assert script.main([folder, *paths]) == 2 and "name another file" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == own


def test_output_that_is_no_file_is_written_to_not_replaced(tmp_path, capsys):
    import os
    import threading

    path, pipe = write(tmp_path, lines(triple(1))), tmp_path / "pipe"
    os.mkfifo(pipe)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    assert script.main([str(path), "--output", str(pipe)]) == 0
    reader.join()
    assert json.loads(heard[0])["question"] == "question 1" and pipe.is_fifo()


def test_compressed_output(tmp_path):
    path = write(tmp_path, lines(triple(1)))
    assert script.main([str(path), "--output", str(tmp_path / "out.jsonl.gz")]) == 0
    assert json.loads(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()))["question"] == "question 1"


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["--format", "nonsense"], 2, "there are: alpaca, "),
        (["--columns", "a=b"], 2, "columns must say question"),
        (["--max-per-prompt", "-1"], 2, "negative"),
        (["--format", "columns"], 2, "needs the columns"),
        (["--format", "Triples"], 2, "did you mean triple"),
        (["--format", "orca", "--columns", "question=a,chosen=b,rejected=c"], 2, "not together with 'orca'"),
        (["--min-score-gap", "nan"], 2, "must be a number"),
    ],
)
def test_wrong_options(source, capsys, args, status, message):
    assert convert(capsys, source(triple(1)), *args)[0] == status
    script.main([str(source(triple(1))), "--output", "never-written.jsonl", *args])
    assert message in capsys.readouterr().err


def test_output_that_cannot_be(tmp_path, capsys):
    path = write(tmp_path, lines(triple(1)))
    for output, report, message in (
        (path, "r.json", "both INPUT and OUTPUT"),
        (tmp_path, "r.json", "must name a file"),
        (tmp_path / "o.jsonl", tmp_path, "must name a file"),
        (path / "o.jsonl", "r.json", "rows.jsonl"),
    ):
        assert script.main([str(path), "--output", str(output), "--report", str(tmp_path / report)]) in (1, 2)
        assert message in capsys.readouterr().err and path.read_bytes() == lines(triple(1))


def test_a_disk_that_takes_nothing_is_said_on_a_line_of_its_own(tmp_path, capsys, monkeypatch):
    """Read-only: the file can neither be made nor removed."""
    path = write(tmp_path, lines(triple(1)))

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("preference.tokens.convert._open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    assert script.main([str(path), "--output", str(tmp_path / "out.jsonl")]) == 1
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("error: Read-only file system: ") and "set --output to a place" in last


def test_report_in_a_new_folder_and_of_an_input_that_is_not_there(tmp_path, capsys):
    path, report = write(tmp_path, lines(triple(1))), tmp_path / "new" / "er" / "r.json"
    assert script.main([str(path), "--output", str(tmp_path / "o.jsonl"), "--report", str(report), "--seed", "3"]) == 0
    assert "--seed has no effect" in json.loads(report.read_text())["warnings"][0]
    assert script.main([str(tmp_path / "no"), "--output", str(tmp_path / "p.jsonl"), "--report", str(report)]) == 1
    content = json.loads(report.read_text())
    assert content["rows_read"] == content["rows_written"] == 0 and "not_found" in content["warnings"][0]


def test_lengths_in_tokens(tmp_path, capsys, monkeypatch):
    from preference.tokens import lengths
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(lengths, "ROWS_PER_BATCH", 2)
    rows = [triple(i, response_chosen="Rest. " * i, system="Be kind." * (i == 3)) for i in (1, 2, 3)]
    path = write(tmp_path, lines(*rows, triple(4, question="")))
    _, written, report, text = convert(capsys, path, "--tokenizer", tmp_path / "tokenizer")
    tokens = report["tokens"]
    assert len(written) == 3 and "tokens: tokenizer" in text

    def count(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    lengths = [count(row["response_chosen"]) for row in written]
    assert (tokens["chosen"]["min"], tokens["chosen"]["p50"], tokens["chosen"]["max"]) == tuple(sorted(lengths))
    assert tokens["prompt"]["max"] == count("Be kind.\nquestion 3")
    longer = sum(length > count(row["response_rejected"]) for length, row in zip(lengths, written, strict=True))
    assert tokens["length_bias"]["chosen_longer"] == round(longer / 3, 4)
    assert script.main([str(path), "--output", str(tmp_path / "p.jsonl"), "--tokenizer", str(tmp_path / "no")]) == 1
    assert "no" in capsys.readouterr().err and not (tmp_path / "p.jsonl").exists()


def test_missing_input_and_unknown_flag(tmp_path, capsys):
    assert script.main([str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "o.jsonl")]) == 1
    assert "not_found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["x", "--output", "y", "--fromat", "hh"])


def test_memory_stays_flat(tmp_path):
    """60 MB of rows go through in a process whose memory grows by a small part of that."""
    import resource

    row = json.dumps(triple(1, system="x" * 1000)).encode() + b"\n"
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        for _ in range(60):
            file.write(row * 1000)
    script.main([str(write(tmp_path, row, "one.jsonl")), "--output", str(tmp_path / "out.jsonl")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert script.main([str(path), "--output", str(tmp_path / "out.jsonl")]) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 25_000, f"{grown} KB"  # 40 bytes a row are 3 MB


def test_commands_and_formats_of_the_readme_exist():
    import re
    import shlex

    from preference.data.formats import FORMATS

    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(python data/convert\.py [^`]+)`", text)
    assert len(commands) > 25
    for command in commands:
        script.options_of(script.arguments(shlex.split(command)[2:]))
    named = {name for cell in re.findall(r"`([a-z][a-z0-9-]+)`", text) for name in [cell] if name in FORMATS}
    assert named == set(FORMATS)
    table = text.split("## Datasets")[1].split("### Shapes")[0]
    for dataset in ("ChiMed-DPO", "FineMed", "KoMeP", "MedicalGPT", "UltraFeedback", "UltraMix", "UltraChat DPO",
                    "Anthropic HH", "SHP"):  # fmt: skip
        assert f"| {dataset}" in table


def readme_commands() -> list[tuple[str, str]]:
    """(formats named, command) of each row of the tables of datasets."""
    import re

    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("\n") if line.startswith("|") and "`python data/convert.py" in line]
    return [(cells[-4], re.search(r"`(python [^`]+)`", cells[-2])[1]) for cells in (row.split("|") for row in rows)]


@pytest.mark.parametrize("formats, command", readme_commands(), ids=[row[1].split()[2] for row in readme_commands()])
def test_command_of_the_readme_runs_on_a_row_of_its_dataset(tmp_path, formats, command):
    import re
    import shlex

    args = shlex.split(command)[2:]
    name = "columns" if "--columns" in args else re.findall(r"`([^`]+)`", formats)[0]
    rows = dict(ROWS) | {"columns": {"Q": USER, "A": GOOD, "B": BAD}}
    full = {"ultramix": {"chosen_instruct_reward": 3.0}, "pku-saferlhf": {"safer_response_id": 0}}
    row = rows[name] | full.get(name, {})
    args[0] = str(write(tmp_path, lines(row)))
    output = args.index("--output") + 1
    args[output] = str(tmp_path / "out.jsonl")
    assert script.main([*args, "--report", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["format"], report["rows_written"]) == (name, 1)
    assert not any("no effect" in warning for warning in report["warnings"])


@real_samples
def test_real_hh(tmp_path, capsys):
    report = tmp_path / "r.json"
    sample = SHARED / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    assert script.main([str(sample), "--output", str(tmp_path / "o.jsonl"), "--report", str(report)]) == 0
    content = json.loads(report.read_text())
    assert (content["format"], content["rows_read"], content["rows_written"]) == ("hh", 2312, 2299)
    assert content["dropped"] == {"irregular_turns": 5, "empty_answer": 4, "same_role_turns": 4}
    assert content["examples"]["empty_answer"][0]["line"] == 87
    assert "not meant for supervised training" in content["warnings"][0]
    assert len(read(tmp_path / "o.jsonl")[0]) == 2299


def test_caps_and_shares_take_rows_by_the_seed(capsys, tmp_path):
    """`a.jsonl:3,b.jsonl:0.5`: so many rows of a file, or such a share; alike whenever it is done again."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*(triple(i) | {"question": f"{name} {i}"} for i in range(10))))
    both = f"{tmp_path}/a.jsonl:3,{tmp_path}/b.jsonl:0.5"

    def taken(*options):
        out = tmp_path / "out" / "o.jsonl"
        assert script.main([both, "--output", str(out), *options]) == 0
        return [json.loads(line)["question"] for line in out.read_text().splitlines()]

    first = taken()
    assert [question[0] for question in first] == ["a"] * 3 + ["b"] * 5 and first == taken() != taken("--seed", "7")
    said = capsys.readouterr().out
    assert script.main([f"{tmp_path}/a.jsonl:3", "--output", f"{tmp_path}/a.jsonl"]) == 2
    (tmp_path / "c.jsonl").write_bytes(lines({"instruction": "q", "output": "a"}))
    assert script.main([f"{tmp_path}/a.jsonl,{tmp_path}/c.jsonl", "--output", f"{tmp_path}/out/o.jsonl"]) == 1
    assert "12 not_sampled" in said and "no effect" not in said and "20 read, 8 kept" in said
