"""Hostile input of every kind, made at random for as long as it may take: each ends well or with one sentence.

    python tests/system/faults/fuzz.py --minutes 60              all kinds, in turns
    python tests/system/faults/fuzz.py --minutes 5 --only rows   one: rows, flags, config, foreign, prompts, exams or
                                                                 models

A traceback, an answer after more than 20 seconds of CPU, a message of several lines or with a control character is a
finding: it is printed with the seed that makes it again (--seed N --only KIND --times 1), and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "data"), str(ROOT / "tests" / "serve"), str(ROOT)]

from preference.errors import PreferenceError  # noqa: E402  the path is set above
from preference.screen import ACTING, shown  # noqa: E402

SLOW = 20.0  # CPU seconds
ODD = [
    None, True, 0, -1, 1.5, 1e308, 10**30, float("nan"), "", " ", "x", "\0", "\ud800", "\x1b]0;t\x07", "\u202eabc",
    "é" * 300, "{{", "{% for i in range(10**9) %}x{% endfor %}", "../../etc/passwd", [], {}, [[]], [None], {"a": {}},
    [1, "a"], "1e400", "<|im_end|>", "<s>", "a,b:c", "--seed", "\u200b", "٣", "[" * 3000, "9" * 5000,
]  # fmt: skip
TEMPLATES = ["{{", "{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 9**9**9 }}", "{{ messages }}", ""]
Kind = Callable[[random.Random, Path], None]


def odd_json(draw: random.Random, value: object, depth: int = 0) -> object:
    """A JSON value with some of its parts replaced by odd ones, left out or doubled."""
    if draw.random() < 0.12:
        return draw.choice(ODD)
    if isinstance(value, dict) and depth < 4:
        kept = {key: odd_json(draw, inner, depth + 1) for key, inner in value.items() if draw.random() > 0.05}
        return kept | ({draw.choice(["", "x", "system", "history"]): draw.choice(ODD)} if draw.random() < 0.1 else {})
    if isinstance(value, list) and depth < 4:
        return [odd_json(draw, inner, depth + 1) for inner in value] * draw.choice([1, 1, 1, 2])
    return value


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes with a few flips, cuts and insertions."""
    from test_fuzz_data import mutated

    return mutated(content, draw.randrange(1 << 40))


def odd_file(draw: random.Random, path: Path, value: object, lines: bool = False) -> None:
    """A JSON file of a value made odd, or damaged in its bytes."""
    if draw.random() < 0.6:
        value = [odd_json(draw, row) for row in value] if lines else odd_json(draw, value)
    rows = value if lines and isinstance(value, list) else [value]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(damaged(draw, content) if draw.random() < 0.5 else content)


# ---- kinds of input


def rows(draw: random.Random, work: Path) -> None:
    """Data files of every family and container, with random choices of how to read them."""
    from format_rows import ROWS
    from test_fuzz_data import corpus, read

    from preference.data.formats import FORMATS, Options, checked

    chosen = {
        "format": draw.choice(["auto", "auto", *(name for name in FORMATS if name != "columns")]),
        "rendered": draw.choice([None, "keep", "strict", "split"]),
        "pairs": draw.choice(["best-worst", "all", "best-random"]),
    }
    try:
        choice = checked(Options(**chosen))
    except ValueError as error:  # choices that do not go together
        raise PreferenceError(str(error)) from error
    if draw.random() < 0.5:
        container, content = draw.choice(corpus())
        path = work / container
        path.write_bytes(damaged(draw, content))
    else:
        path = work / "rows.jsonl"
        odd_file(draw, path, [draw.choice(ROWS)[1] for _ in range(draw.randint(1, 6))], lines=True)
    read(path, choice, draw.choice(["drop", "strict"]))


def _words(draw: random.Random) -> list[tuple[str, str]]:
    from preference.arguments import FLAGS

    odd = [str(value) for value in ODD if not isinstance(value, (list, dict))] + ["auto", "true", "1", "0.5", "1e-4"]
    names = [*FLAGS, "config", "x", "lora-rank", "learning_rte", "bf-16"]
    return [(draw.choice(names), draw.choice(odd)) for _ in range(draw.randint(1, 5))]


def flags(draw: random.Random, work: Path) -> None:
    """Command lines."""
    from preference.arguments import parse_arguments

    shapes = ("--{}={}", "--no-{}", "--{}", "-{}", "{}={}")
    parse_arguments([draw.choice(shapes).format(*pair) for pair in _words(draw)], environ={})


def config(draw: random.Random, work: Path) -> None:
    """YAML files of flags."""
    from preference.arguments import parse_arguments

    parse_arguments(["--config", str(odd_yaml(draw, work / "run.yaml", _words(draw)))], environ={})


def odd_yaml(draw: random.Random, path: Path, words: list[tuple[str, str]]) -> Path:
    """A YAML file of names and values, and of a line that means harm."""
    lines = [f"{name}: {value}" for name, value in words]
    odd = ["a: &x [*x]", "- 1", "? {}", "!!python/object:os.system {}", "\t", "{" * 50, "---", "seed: 0x1"]
    doubled = [f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, draw.choice([2, 8, 60]))]
    lines += [draw.choice([*odd, "<<: *b", "\n".join(["b0: &b0 x", *doubled, f"seed: *b{len(doubled)}"])])]
    draw.shuffle(lines)
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(draw, content) if draw.random() < 0.4 else content)
    return path


def foreign(draw: random.Random, work: Path) -> None:
    """Configs of other toolkits, translated."""
    from preference.arguments.migration import TOOLS, migrate, read_foreign

    keys = sorted({key for tool in TOOLS.values() for key in tool} | {"learning_rate", "lora_rank", "beta", "bf16"})
    values = [str(value) for value in ODD if not isinstance(value, dict)] + ["dpo", "lora", "4", "[a, b]", "steps"]
    words = [(draw.choice(keys), draw.choice(values)) for _ in range(draw.randint(1, 6))]
    path = work / "c.json"
    if draw.random() < 0.3:
        odd_file(draw, path, dict(words))
    else:
        path = odd_yaml(draw, work / "c.yaml", words)
    for flag, text in migrate(read_foreign(str(path))).flags.items():
        if ACTING.search(text) or "\0" in text:
            raise AssertionError(f"--{flag} holds a control character")


@functools.cache
def tokenizer_of_tests() -> Any:
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


def prompts(draw: random.Random, work: Path) -> None:
    """Files of prompts for chat.py, and what becomes of each row."""
    from conversation import get_conv_template
    from preference.serve.answer_file import read_prompts, to_turn

    row = {"question": "Hi <|im_end|>?", "history": [["a", "b"]], "system": "s"}
    odd_file(draw, work / "p.jsonl", [row, {"prompt": "x"}, row], lines=True)
    conv, tokenizer = get_conv_template("qwen"), tokenizer_of_tests()
    for each in read_prompts(str(work / "p.jsonl")):
        turn = to_turn(each)
        tokenizer(conv.get_prompt(turn.question, history=turn.history, system=turn.system))


def exams(draw: random.Random, work: Path) -> None:
    """Files of multiple-choice questions."""
    from preference.serve.exam_files import read_exam

    made = [
        {"question": "q", "A": "1", "B": "2", "answer": "B"},
        {"question": "q", "options": {"A": "1", "B": "2"}, "answer": "A"},
        {"question": "q", "choices": {"label": ["A", "B"], "text": ["1", "2"]}, "answerKey": "B"},
        {"question": "q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 1},
    ]
    path = work / draw.choice(["e.json", "e.jsonl", "e.csv"])
    odd_file(draw, path, [draw.choice(made) for _ in range(3)], lines=draw.random() < 0.5)
    read_exam(path)


_FOLDERS: dict[str, Path] = {}


def models(draw: random.Random, work: Path) -> None:
    """Folders of models and adapters, exported, chatted with or trained from."""
    from tuned import make_base, make_run

    import chat
    import export_model
    import orpo_train

    if not _FOLDERS:
        home = Path(tempfile.mkdtemp(prefix="fuzz-"))
        _FOLDERS["base"] = make_base(home / "base")
        _FOLDERS["run"] = make_run(home / "run", home / "base")
    model = shutil.copytree(draw.choice(list(_FOLDERS.values())), work / "m")
    for path in draw.sample(sorted(model.iterdir()), draw.randint(1, 2)):
        if path.suffix == ".json" and draw.random() < 0.7:
            value = odd_json(draw, json.loads(path.read_text())) if path.stat().st_size < 20_000 else {}
            path.write_text(json.dumps(value))
        elif path.suffix == ".jinja" and draw.random() < 0.5:
            path.write_text(draw.choice(TEMPLATES))
        else:
            path.write_bytes(damaged(draw, path.read_bytes()))
    (work / "rows.jsonl").write_text('{"question": "a", "response_chosen": "b", "response_rejected": "c"}\n')
    train = [
        "orpo_train.py", "--model_name_or_path", model, "--train_file_dir", work / "rows.jsonl", "--html_report=false",
        "--output_dir", work / "o", "--cache_dir", work / "c", "--use_cpu", "true", "--bf16", "false",
        "--do_eval", "false", "--max_steps", "1", "--template_name", draw.choice(["auto", "qwen"]),
        "--dry_run", draw.choice(["true", "false"]),
    ]  # fmt: skip
    main, words = draw.choice([
        (chat.main, ["chat.py", model, "--prompts", work / "rows.jsonl", "--use_cpu", "--max_new_tokens", "2"]),
        (export_model.main, ["export_model.py", model, "--output", work / "e"]),
        (orpo_train.main, train),
    ])  # fmt: skip
    sys.argv = list(map(str, words))
    main()


KINDS: dict[str, Kind] = {kind.__name__: kind for kind in (rows, flags, config, foreign, prompts, exams, models)}


# ---- the campaign


def outcome(kind: str, seed: int) -> tuple[str, str | None]:
    """(how one input ended: well or refused; what is wrong with that, None for nothing)."""
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            began, said, fault = time.process_time(), "", None
            try:
                KINDS[kind](random.Random(f"{kind} {seed}"), Path(work))
            except (PreferenceError, ValueError, OSError) as error:
                said = f"{type(error).__name__}: {error}"
                if isinstance(error, PreferenceError):
                    said = shown(str(error))  # as run_script says it
                if not isinstance(error, PreferenceError):
                    fault = "".join(traceback.format_exception(error))
            except SystemExit as end:
                said = str(end.code or "")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                said, fault = "raised", "".join(traceback.format_exception(error))
        spent = time.process_time() - began
    seen = f"{said}\n{out.getvalue()}\n{err.getvalue()}"
    if "Traceback" in seen:
        fault = fault or seen
    if spent > SLOW:
        fault = fault or f"took {spent:.0f} CPU seconds"
    if kind == "models" and ACTING.search(seen.replace("\r", "")):  # scripts print it; elsewhere the printer cleans it
        fault = fault or f"a control character is shown: {ACTING.search(seen.replace(chr(13), ''))}"
    return ("refused" if said else "well"), fault


def campaign(minutes: float, seed: int, only: str | None, times: int | None = None) -> tuple[Counter, int]:
    """(inputs by kind and outcome, findings). Runs until the time is over, or `times` inputs were tried."""
    end, tried, found = time.monotonic() + 60 * minutes, Counter(), 0
    kinds = [only] if only else list(KINDS)
    number = 0
    while time.monotonic() < end and (times is None or number < times):
        kind = kinds[number % len(kinds)]
        how, fault = outcome(kind, seed + number)
        tried[kind, how] += 1
        if fault:
            found += 1
            print(f"FINDING --seed {seed + number} --only {kind}\n{fault[-1500:]}", flush=True)
        number += 1
    return tried, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="the first of the seeds (default: by the clock)")
    parser.add_argument("--only", choices=KINDS, help="one kind of input")
    parser.add_argument("--times", type=int, help="stop after so many inputs")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time()) * 1000
    tried, found = campaign(args.minutes, seed, args.only, args.times)
    for kind in KINDS:
        if counts := {how: count for (of, how), count in tried.items() if of == kind}:
            print(f"{kind}: {sum(counts.values())} tried, {counts}")
    print(f"{tried.total()} inputs from seed {seed}, {found} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
