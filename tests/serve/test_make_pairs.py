"""make_pairs.py: answers drawn with seeds, scored, and made into rows that train; also when it was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import make_pairs
from conversation import get_conv_template
from preference.data.report import DataReport
from preference.data.rows import load_rows
from preference.serve import models as serve_models
from preference.serve import pairs as making
from preference.serve.generation import Turn
from preference.serve.judge import NoVerdict
from preference.serve.pairs import Drawn, best_and_worst, distinct
from preference.serve.rules import Wanted, faults
from preference.serve.scoring import JudgeScorer, Person, RewardScorer, ScoringError
from tiny import SIZES, tiny_tokenizer

QUESTIONS = ["Name a juice.", "What is a noun?", "感冒怎么办？", "Hi."]


def make(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_pairs.py", *map(str, words)])
    make_pairs.main()


def words_of(folder: Path, run: Path, *more: object) -> list[object]:
    questions = folder / "questions.jsonl"
    rows = [{"question": text, "history": [["a", "b"]] if i == 1 else []} for i, text in enumerate(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [questions, "--model", run, "--use_cpu", "--answers", 3, "--batch_size", 2, "--max_new_tokens", 12]
    return [*words, "--rules", "length", *more]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with a chat template."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=512, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = get_conv_template("qwen").jinja()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends an answer: take what it wrote as whole."""
    draw = serve_models.Chat.draw
    monkeypatch.setattr(serve_models.Chat, "draw", lambda *args: [(text, False) for text, _ in draw(*args)])


def test_a_reward_model_makes_rows_that_training_reads(
    run: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: None
) -> None:
    out = tmp_path / "pairs.jsonl"
    make(monkeypatch, *words_of(tmp_path, run, "--reward", reward, "--output", out))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    rows = load_rows([out], report := DataReport())
    assert [row.question for row in rows] == QUESTIONS and not report.dropped and rows[1].history == (("a", "b"),)
    scorer = RewardScorer(str(reward), "cpu", torch.float32)
    for row, turn in zip(found, (Turn(row.question, row.history) for row in rows), strict=True):
        scores = scorer.scores(turn, [row["response_chosen"], row["response_rejected"]])
        assert row["score_margin"] == pytest.approx(scores[0] - scores[1], abs=1e-5) and row["score_margin"] > 0
        assert row["source_scores"] == pytest.approx(scores, abs=1e-5)
        assert row["source_scorer"] == f"reward:{reward}" and row["source_model"] == str(run)
    assert {t for row in found for t in row["source_temperatures"]} == {0.7, 1.0}
    assert not list(tmp_path.glob(".pairs*"))
    with pytest.raises(SystemExit, match="is there already"):
        make(monkeypatch, *words_of(tmp_path, run, "--reward", reward, "--output", out))


KILLED = """
import os, signal, sys
import make_pairs
from preference.serve import generation, pairs
draw, sync = generation.Chat.draw, os.fsync
generation.Chat.draw = lambda *args: [(text, False) for text, _ in draw(*args)]
done = []
def killing(descriptor):
    done.append(sync(descriptor))
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
pairs.os.fsync = killing
make_pairs.main()
"""


def test_a_killed_run_ends_in_the_same_bytes(
    run: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: None
) -> None:
    """Ended after every line that it writes down, the last one cut in the middle each time; once by a real SIGKILL."""

    class Killed(BaseException):
        """Nothing of the program runs after it but `finally`, of which the journal has none."""

    expected, out = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    words = words_of(tmp_path, run, "--reward", reward)
    make(monkeypatch, *words, "--output", expected)
    sync, kills = os.fsync, 0
    loaded = serve_models.open_chat
    chats: list[object] = []
    monkeypatch.setattr(serve_models, "open_chat", lambda *args: chats.append(loaded(*args)) or chats[-1])

    def kill(descriptor: int) -> None:
        sync(descriptor)
        if os.fstat(descriptor).st_size > 40 and "output" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.truncate(descriptor, os.fstat(descriptor).st_size - 7 * (kills % 2))
            raise Killed

    monkeypatch.setattr(making.os, "fsync", kill)
    while not out.exists():
        try:
            make(monkeypatch, *words, "--output", out)
        except Killed:
            kills += 1
            serve_models.open_chat = lambda *args: chats[0]  # loaded once is enough here
    assert kills > 8 and out.read_bytes() == expected.read_bytes()
    monkeypatch.setattr(making.os, "fsync", sync)
    real = tmp_path / "real.jsonl"
    child = [sys.executable, "-c", KILLED, *map(str, words), "--output", str(real)]
    done = subprocess.run(child, cwd=Path(make_pairs.__file__).parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len((tmp_path / ".real.jsonl.work" / "answers.jsonl").read_text().splitlines()) == 3 and not real.exists()
    make(monkeypatch, *words, "--output", real)
    assert real.read_bytes() == expected.read_bytes()
    left = tmp_path / "left.jsonl"
    folder = making.open_workplace(left, {"seed": 1})
    with pytest.raises(making.MakingError, match="another seed"):
        making.open_workplace(left, {"seed": 2})
    assert folder == making.open_workplace(left, {"seed": 1})


def answers(*given: tuple[str, tuple[str, ...]]) -> list[Drawn]:
    return [Drawn(text, 0.7, broken) for text, broken in given]


def test_the_best_without_a_fault_over_the_worst() -> None:
    found = answers(("a", ()), ("b", ("length",)), ("c", ()), ("d", ()))
    assert best_and_worst(found, [0.2, 0.9, 0.7, 0.7], 0) == (2, 1, pytest.approx(0.8))  # a fault costs one
    assert best_and_worst(found[2:], [0.7, 0.7], 0) == "no clear difference"
    assert best_and_worst(found[::2], [0.2, 0.7], 0.5) == "no clear difference"
    assert best_and_worst(found[::2], [0.2, 0.7], 0.4)[:2] == (1, 0)
    assert best_and_worst(answers(("a", ("cut",)), ("b", ("length",))), [1, 0], 0) == "no answer without a fault"
    assert best_and_worst(found, [None] * 4, 0) == "nobody chose"


def test_texts_count_once() -> None:
    assert [a.text for a in distinct(answers(("a", ()), ("", ()), ("b", ()), ("a", ()), ("c\0", ())))] == ["a", "b"]


LOOP = "I like this juice very much. " * 9
ENGLISH = "Rest, drink plenty of water, and see a doctor if the fever lasts for more than three days or gets worse."
GERMAN = (
    "Ruhen Sie sich aus, trinken Sie viel Wasser und gehen Sie zum Arzt, wenn das Fieber länger als drei Tage anhält."
)


@pytest.mark.parametrize(
    "question, answer, wanted, expected",
    [
        ("What helps against a fever?", ENGLISH, Wanted(), []),
        ("What helps against a fever?", "多休息，多喝水，必要时看医生。", Wanted(), ["language"]),
        (
            "What helps against a fever that does not go away when there is no doctor to ask?",
            GERMAN,
            Wanted(),
            ["language"],
        ),
        ("Say it in German: what helps against a fever?", GERMAN, Wanted(), []),
        ("发烧怎么办？", ENGLISH, Wanted(), ["language"]),
        ("把这句话翻译成英文：发烧怎么办？", "What helps against a fever?", Wanted(), []),
        ("How do I print?", "```python\nprint(1)\n```", Wanted(), []),
        ("How do I print?", "```python\nprint(1)", Wanted(), ["format"]),
        ("Give me JSON.", '```json\n{"a": 1}\n```', Wanted(form="json"), []),
        ("Give me JSON.", "{'a': 1}", Wanted(form="json"), ["format"]),
        ("Name two.", "- one\n- two", Wanted(form="plain"), ["format"]),
        ("Name two.", "1. one", Wanted(form=r"^\d\."), []),
        ("Name two.", LOOP, Wanted(), ["repetition"]),
        ("推荐果汁", "我喜欢苹果汁。" * 9, Wanted(), ["repetition"]),
        ("推荐果汁", "苹果汁、橙汁、胡萝卜汁，都很适合夏天喝。", Wanted(), []),
        ("How?", "I'm sorry, but I can’t help with that.", Wanted(), ["refusal"]),
        ("How?", "As an AI, I cannot provide medical advice.", Wanted(), ["refusal"]),
        ("怎么办？", "很抱歉，我无法提供医疗建议。", Wanted(), ["refusal"]),
        ("怎么办？", "作为一个人工智能，我无法回答。", Wanted(), ["refusal"]),
        ("How?", "I can not only show you, I will.", Wanted(), []),
        ("How?", "Short.", Wanted(shortest=20), ["length"]),
        ("How?", "Short.", Wanted(longest=3, rules=("format",)), []),
    ],
)
def test_rules(question: str, answer: str, wanted: Wanted, expected: list[str]) -> None:
    assert faults(question, answer, False, wanted) == expected
    assert faults(question, answer, True, wanted) == ["cut", *expected]


def test_a_judge_meets_every_pair_of_answers_in_both_orders() -> None:
    asked: list[tuple[str, str]] = []

    class Longer:
        name = "longer"

        def favours(self, turn: Turn, one: str, two: str) -> float:
            asked.append((one, two))
            return float(len(one) > len(two))

    assert JudgeScorer(Longer()).scores(Turn("?"), ["aa", "a", "aaa"]) == [0.5, 0.0, 1.0]
    assert len({*asked}) == len(asked) == 6


def test_a_question_without_a_verdict_ends_nothing(capsys: pytest.CaptureFixture) -> None:
    class Unsure:
        name = "unsure"

        def favours(self, turn: Turn, one: str, two: str) -> float:
            raise NoVerdict("it cannot say")

    assert JudgeScorer(Unsure()).scores(Turn("?"), ["a", "b"]) == [None, None]
    assert "it cannot say" in capsys.readouterr().err


def test_an_answer_that_the_reward_model_cannot_read_has_no_score(reward: Path) -> None:
    scorer = RewardScorer(str(reward), "cpu", torch.float32)
    long, short = scorer.scores(Turn("Hi?"), ["juice " * 9000, "juice"])
    assert long is None and short is not None


def test_a_person_names_best_and_worst() -> None:
    lines = iter(["what?", "1 1", "9 1", "3 1", "", "q"])
    out = io.StringIO()
    read: Callable[[str], str] = lambda _: next(lines)  # noqa: E731
    person = Person(read, out)
    texts: Sequence[str] = ["one", "two\x1b[2J", "three"]
    assert person.scores(Turn("Hi?"), texts) == [0.0, None, 1.0]
    assert out.getvalue().count(Person.HELP) == 3 and "\x1b" not in out.getvalue() and "[3] three" in out.getvalue()
    assert person.scores(Turn("Hi?"), texts) == [None] * 3
    with pytest.raises(KeyboardInterrupt):
        person.scores(Turn("Hi?"), texts)


def test_a_person_is_told_what_cannot_be_the_best_and_stops(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    with pytest.raises(SystemExit) as end:
        make(monkeypatch, *words_of(tmp_path, run, "--person", "--output", tmp_path / "o.jsonl"))
    said = capsys.readouterr().err
    assert end.value.code == 130 and "12 of 12 answers are cut or break a rule" in said and "goes on from here" in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--answers", "1"], "at least 2"),
        (["--temperature", "0"], "all are the same"),
        (["--temperature", "warm"], "temperature"),
        (["--rules", "beauty"], "takes names of"),
        (["--format", "(", "--rules", "format"], "regular expression"),
        (["--format", "json", "--rules", "length"], "for --rules with format"),
        (["--judge_model", "x"], "for --judge URL"),
        (["--judge", "local", "--judge_model", "x"], "for --judge URL"),
        (["--rules", "", "--min_length", "5"], "for --rules with length"),
        (["--seed", "-1"], "from 0 to"),
        (["--judge", "a", "--reward", "b"], "not allowed with"),
    ],
)
def test_settings_that_cannot_be_meant(more: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        make_pairs.parse_arguments(["q.txt", "--model", "m", "--output", "o", *more])
    assert message in capsys.readouterr().err


def test_what_cannot_be_done_is_said(run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no question gave a pair \(4 no answer without a fault\)"):
        make(monkeypatch, *words_of(tmp_path, run, "--output", tmp_path / "o.jsonl"))  # all are cut
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(SystemExit, match="1: not JSON"):
        make(monkeypatch, tmp_path / "bad.jsonl", "--model", run, "--output", tmp_path / "p.jsonl")
    with pytest.raises(ScoringError, match="no weights for"):
        RewardScorer(str(base), "cpu", torch.float32)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_pairs, "make", stopped)
    with pytest.raises(SystemExit) as end:
        make(monkeypatch, "q.txt", "--model", "m", "--output", "o")
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
