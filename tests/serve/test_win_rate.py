"""Win rates: both orders, ties, lean and length of made-up judges, and a server that judges over HTTP."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import evaluate_model
from preference.serve import judge
from preference.serve.generation import Turn
from preference.serve.judge import NoVerdict, stays_here
from preference.serve.win_rate import judge_all, length_controlled, summary, table
from tiny import tiny_model, tiny_tokenizer


class Made:
    """Favours by a function of the two answers."""

    name, said = "made", ""

    def __init__(self, favours):
        self.rule, self.asked = favours, 0

    def favours(self, turn, first, second):
        self.asked += 1
        return self.rule(first, second)


def figures(judge, before, after):
    turns = [Turn(f"q{i}") for i in range(len(before))]
    scores = judge_all(judge, turns, {"base": before, "tuned": after}, file := io.StringIO())
    longer = np.array([len(b) - len(a) for a, b in zip(before, after, strict=True)])
    return summary(scores, longer), [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_judge_that_knows_and_one_that_only_reads_what_stands_first():
    knows = Made(lambda first, second: 0.5 if first == second else float("good" in first))
    before, after = ["bad", "good", "same", "bad"], ["good", "bad", "same", "good too"]
    found, kept = figures(knows, before, after)
    assert (found["won"], found["tied"], found["lost"]) == (2, 1, 1) and found["win_rate"] == 0.625
    assert found["first_favoured"] == 0.5 and found["turned_by_order"] == 0
    assert knows.asked == 6 and len(kept) == 8  # equal answers are not asked about, and kept all the same
    assert [record["first"] for record in kept[:2]] == ["base", "tuned"]
    assert [record["first_is_favoured"] for record in kept[:2]] == [0.0, 1.0]
    assert kept[0]["answers"] == {"base": "bad", "tuned": "good"} and kept[0]["conversation"] == "[User]\nq0"

    found, _ = figures(Made(lambda first, second: 1.0), ["a", "b"], ["c", "d"])
    assert found["win_rate"] == 0.5 and found["first_favoured"] == 1 and found["turned_by_order"] == 1
    assert "100.0% (50%: no position bias)" in table(found, "made")
    found, _ = figures(knows, ["bad"] * 4, ["good"] * 4)
    assert found["win_rate"] == 1 and found["interval"] == [pytest.approx(0.51, abs=0.01), 1]  # four are few


def test_no_verdict_is_left_out_counted_and_kept():
    def sometimes(first, second):
        if "odd" in first + second:
            raise NoVerdict("it said nothing")
        return float(first == "good")

    found, kept = figures(Made(sometimes), ["bad", "odd"], ["good", "x"])
    assert found["questions"] == 1 and found["without_verdict"] == 1 and found["won"] == 1
    assert kept[2]["first_is_favoured"] is None and kept[2]["said"] == "it said nothing"
    assert "no verdict: 1" in table(found, "made")
    assert summary(np.full((2, 2), np.nan), np.zeros(2)) == {"questions": 0, "without_verdict": 2}


def test_length_is_taken_out():
    """A judge that only likes length is at chance once length is held; one that knows keeps what it says."""
    rng = np.random.default_rng(0)
    longer = rng.normal(60, 80, 400)  # tuned answers are mostly longer
    by_length = 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))
    assert by_length.mean() > 0.7 and length_controlled(by_length, longer) == pytest.approx(0.5, abs=0.03)
    knows = np.full(400, 0.8)
    assert length_controlled(knows, longer) == pytest.approx(0.8, abs=0.03)
    assert length_controlled(np.full(5, 0.7), np.zeros(5)) == pytest.approx(0.7, abs=0.02)


def test_what_is_this_machine():
    assert all(map(stays_here, ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8/v1")))
    assert not any(
        map(stays_here, ("http://10.0.0.2/v1", "https://api.example.com/v1", "http://localhost.example.com"))
    )


@pytest.fixture
def server():
    """An OpenAI-compatible server that favours the longer answer; what it was asked is in `asked`."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"data": [{"id": "stub"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            first, second = (text.split(f"[Answer {x}]")[-1].split(f"[End of answer {x}]")[0] for x in "AB")
            asked.append((self.path, self.headers["Authorization"], body["model"]))
            letter = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "C"
            self.reply({"choices": [{"message": {"content": f"Because. [[{letter}]]"}}]})

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    made.asked = asked
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An adapter over a tiny model, whose answers differ from its base's."""
    folder = tmp_path_factory.mktemp("tuned")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    model.save_pretrained(folder / "run")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "run")
    return folder / "run"


def test_a_server_judges_and_every_judgement_is_kept(server, tuned, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.txt").write_text("What helps?\n怎么办？\n")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    words = ["evaluate_model.py", str(tuned), "--win_rate", str(tmp_path / "questions.txt"), "--judge", url]
    words += ["--max_new_tokens", "6", "--use_cpu", "--judgements", str(tmp_path / "kept.jsonl")]
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    monkeypatch.setattr("sys.argv", words)
    evaluate_model.main()
    said = capsys.readouterr()
    assert f"are sent to {url}, on this machine" in said.err and "win rate, tuned against base" in said.out
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 4
    for record in kept:
        lengths = [len(record["answers"][record[place]]) for place in ("first", "second")]
        assert record["first_is_favoured"] == (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
    differ = [record for record in kept if len(set(record["answers"].values())) == 2]
    assert differ and server.asked == [("/v1/chat/completions", "Bearer secret", "stub")] * len(differ)
    assert differ[0]["said"].startswith("Because.") and differ[0]["judge"] == f"stub@{url}"
    with pytest.raises(SystemExit):
        evaluate_model.main()  # it would replace what was kept
    assert "is there already" in capsys.readouterr().err


def test_a_local_model_judges_by_likelihood(tuned, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.txt").write_text("What helps?\n")
    words = ["evaluate_model.py", str(tuned), "--win_rate", str(tmp_path / "questions.txt"), "--judge", str(tuned)]
    monkeypatch.setattr(
        "sys.argv", [*words, "--max_new_tokens", "6", "--use_cpu", "--judgements", str(tmp_path / "kept.jsonl")]
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluate_model.main()
    said = capsys.readouterr()
    assert "sent to" not in said.err and "judged by" in said.out
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 2


def test_a_judge_without_any_verdict_is_no_success(server, tuned, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.txt").write_text("What helps?\n")
    monkeypatch.setattr(judge.ServerJudge, "complete", lambda *_: "I cannot say.")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    words = ["evaluate_model.py", str(tuned), "--win_rate", str(tmp_path / "questions.txt"), "--judge", url]
    words += ["--max_new_tokens", "6", "--use_cpu", "--judgements", str(tmp_path / "kept.jsonl")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="no verdict on any question"):
        evaluate_model.main()
    assert "left out, as the judge gave no verdict: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ("m", "nothing to evaluate"),
        ("m --win_rate f", "go together"),
        ("m --mcq f --judge_model x", "goes with --judge URL"),
        ("m --win_rate f --judge local --judge_model x", "goes with --judge URL"),
        ("m --win_rate f --judge j --output o", "--output goes with --mcq"),
        ("m --instructions f --max_new_tokens 0", "at least 1"),
        ("m --mcq f --judgements k", "goes with --win_rate"),
    ],
)
def test_words_that_do_not_go_together(words, said, capsys):
    with pytest.raises(SystemExit):
        evaluate_model.parse_arguments(words.split())
    assert said in capsys.readouterr().err
