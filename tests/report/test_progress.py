"""What a run shows and keeps while it trains: lines, metrics.jsonl, answers.jsonl, explanations, speed."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from on_terminal import on_terminal
from training import logged, lora, make_pairs, make_trainer, same_weights, weights_of
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from preference.files import JsonLines, evaluation_sets, read_lines
from preference.plan import speed
from preference.plan.speed import SpeedMeter, flops_per_token, matmul_rate
from preference.report.hints import ENTRIES, hints
from preference.report.page import write_report
from preference.report.progress import attach_progress, readable
from preference.report.tables import greedy_answers
from preference.screen import duration
from tiny import tiny_model

PROMPTS = [
    {"source": "a.jsonl:1", "question": "一?", "prompt_ids": [5, 6, 7]},
    {"source": "a.jsonl:2", "question": "Two?", "prompt_ids": [8, 9]},
]


def run(output, *, engine="packed", attach=True, resume=None, **changes):
    """A tiny run of 6 steps with evaluations at 2, 4 and 6; returns its trainer."""
    options = dict(max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4) | changes
    options.setdefault("eval_pairs", make_pairs(6, seed=1))
    trainer = make_trainer(engine, output, make_pairs(16), **options)
    if attach:
        attach_progress(trainer, output, prompts=PROMPTS, stop_ids=[2], max_new_tokens=6)
    trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, trainer, printed lines) of one run."""
    output = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = run(output)
    return output, trainer, printed.getvalue().splitlines()


def test_a_readable_line_per_log_and_nothing_else(finished):
    _, _, printed = finished
    steps = [line for line in printed if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [f"step {i}/6" for i in range(1, 7)]
    for word in ("loss ", "nll ", "accuracy ", "margin ", "grad ", "lr 1.0e-02", "tok/s", "pairs/s", "MFU", "left"):
        assert word in steps[-1]
    assert steps[-1].endswith("0:00 left")
    rest = [line for line in printed if not line.startswith(("step ", "note: "))]
    heads = [line.partition(":")[0] for line in rest[:-1]]
    assert heads == [f"evaluation at step {i}" for i in (0, 2, 4, 6)] and rest[-1].startswith("trained 6 steps in 0:0")
    assert "loss " in rest[0] and "accuracy " in rest[0]


def test_transformers_own_printing_is_gone(finished):
    _, trainer, printed = finished
    kinds = (ProgressCallback, PrinterCallback)
    assert not [each for each in trainer.callback_handler.callbacks if isinstance(each, kinds)]
    assert not [line for line in printed if line.startswith("{")]


def test_metrics_file_holds_the_log_with_speed(finished):
    output, trainer, _ = finished
    records = read_lines(output / "metrics.jsonl")
    train = [record for record in records if "loss" in record]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [{k: record[k] for k in entry} for record, entry in zip(train, history, strict=True)] == history
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 4, 6]
    for record in train:
        assert record["pairs_per_second"] > 0 and record["tokens_per_second"] > 0 and record["memory_gib"] > 0.05
        assert 0 < record["mfu"] < 1
    assert [record["seconds"] for record in train] == sorted(record["seconds"] for record in train)
    assert records[1]["event"] == "train_begin" and records[1]["peak_tflops"] > 0


def test_tokens_are_those_of_the_packed_rows(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("preference.report.progress.matmul_rate", lambda device, dtype: 1e9)
    counted = []

    class Tick(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            now[0] += 2.0

        def on_evaluate(self, *args, **kwargs):
            now[0] += 100.0

        def on_save(self, *args, **kwargs):
            now[0] += 50.0

    pairs = make_pairs(16)
    trainer = make_trainer(
        "packed", tmp_path, pairs, eval_pairs=make_pairs(4), max_steps=4, logging_steps=2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    step = trainer.training_step

    def count(model, inputs, *rest):
        counted.append(inputs["num_tokens"])
        return step(model, inputs, *rest)

    trainer.training_step = count
    attach_progress(trainer, tmp_path)
    trainer.callback_handler.callbacks.insert(0, Tick())
    trainer.train()
    records = [record for record in read_lines(tmp_path / "metrics.jsonl") if "loss" in record]
    # logging_first_step is off: logs at 2 and 4; evaluations and checkpoints cost nothing
    assert [record["step"] for record in records] == [2, 4] and len(counted) == 4
    assert [record["tokens_per_second"] for record in records] == [sum(counted[:2]) / 4, sum(counted[2:]) / 4]
    assert [record["pairs_per_second"] for record in records] == [2.0, 2.0]
    flops = flops_per_token(trainer.model, head=True)
    assert records[0]["mfu"] == pytest.approx(sum(counted[:2]) * flops / 4 / 1e9)
    assert records[-1]["seconds"] == 8.0


def test_answers_at_every_evaluation(finished):
    output, trainer, _ = finished
    records = read_lines(output / "answers.jsonl")
    assert [(record["step"], record["source"]) for record in records] == [
        (step, prompt["source"]) for step in (2, 4, 6) for prompt in PROMPTS
    ]
    ids = [prompt["prompt_ids"] for prompt in PROMPTS]
    assert [record["answer"] for record in records[-2:]] == greedy_answers(
        trainer.model, trainer.processing_class, ids, [2], 6
    )
    assert records[0]["question"] == "一?" and "一" in (output / "answers.jsonl").read_text(encoding="utf-8")


def test_answers_once_a_step_with_several_sets(tmp_path):
    sets = {"one": make_pairs(4, seed=1), "two": make_pairs(4, seed=2)}
    run(tmp_path, eval_pairs=sets, max_steps=2)
    assert [record["step"] for record in read_lines(tmp_path / "answers.jsonl")] == [2, 2]
    records = read_lines(tmp_path / "metrics.jsonl")
    for name in ("eval_one_loss", "eval_two_loss"):
        assert [record["step"] for record in records if name in record] == [0, 2]


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_watching_changes_nothing(tmp_path, engine):
    weights = []
    for attach in (True, False):
        model = lora(tiny_model("llama"), dropout=0.3)  # dropout draws from the global random numbers
        trainer = run(tmp_path / str(attach), engine=engine, attach=attach, model=model, eval_pairs=make_pairs(4))
        weights.append(weights_of(trainer.model))
    assert same_weights(*weights)


def test_resuming_cuts_the_files_back(tmp_path):
    run(tmp_path)
    whole = [(tmp_path / name).read_text(encoding="utf-8") for name in ("metrics.jsonl", "answers.jsonl")]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 77.0}\n{"step": 5, "lo')  # a crash in the middle of a line
    trainer = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))

    def figures(text):
        keep = ("step", "loss", "eval_loss", "rewards/margins")
        records = [json.loads(line) for line in text.splitlines()]
        return sorted(json.dumps({k: r[k] for k in keep if k in r}) for r in records if "event" not in r)

    metrics, answers = ((tmp_path / name).read_text(encoding="utf-8") for name in ("metrics.jsonl", "answers.jsonl"))
    assert figures(metrics) == figures(whole[0]) and answers == whole[1]
    seconds = [record["seconds"] for record in read_lines(tmp_path / "metrics.jsonl") if "loss" in record]
    assert seconds == sorted(seconds) and len(logged(trainer, "loss")) == 6
    run(tmp_path, max_steps=2)  # a new run in an old folder
    assert {record["step"] for record in read_lines(tmp_path / "metrics.jsonl")} == {0, 1, 2}
    assert {record["step"] for record in read_lines(tmp_path / "answers.jsonl")} == {2}


def test_trl_engine_is_shown_without_tokens(tmp_path):
    run(tmp_path, engine="trl", max_steps=2)
    train = [record for record in read_lines(tmp_path / "metrics.jsonl") if "loss" in record]
    assert all(record["pairs_per_second"] > 0 and "tokens_per_second" not in record for record in train)


def test_report_of_a_real_run(finished):
    output, trainer, _ = finished
    trainer.save_state()
    text = write_report(output).read_text(encoding="utf-8")
    assert text.count("<figure") == 10 and "一?" in text and "step 4" in text and "Not in this run" not in text


def test_only_the_first_rank_shows_and_writes(tmp_path, capsys):
    trainer = make_trainer("packed", tmp_path, make_pairs(8), eval_pairs=make_pairs(4), eval_strategy="steps")
    attach_progress(trainer, tmp_path, prompts=PROMPTS, stop_ids=[2], max_new_tokens=2)
    ours = trainer.callback_handler.callbacks[:2]
    trainer.state.is_world_process_zero = False
    arguments = (trainer.args, trainer.state, trainer.control)
    for callback in ours:
        callback.on_train_begin(*arguments)
        trainer.state.global_step = 1
        callback.on_step_end(*arguments)
        callback.on_log(*arguments, logs={"loss": 1.0})
        callback.on_evaluate(*arguments)
        callback.on_train_end(*arguments)
    assert not list(tmp_path.glob("*.jsonl")) and capsys.readouterr().out == ""


def test_a_bar_and_a_table_on_a_terminal(tmp_path):
    """A head, a row per log and evaluation, and at the end of it neither a bar nor a copy of one."""
    with on_terminal(80) as screen:
        run(tmp_path, max_steps=2, logging_steps=1).evaluate()  # once trained, another table says it
    lines = screen.lines()
    assert [line.split() for line in lines if line.split()[:1] == ["step"]] == [
        "step loss NLL acc margin grad lr tok/s MFU GiB left".split()
    ]
    assert [line.split()[0] for line in lines if "/2 " in line] == ["1/2", "2/2"], lines
    assert [line.split()[:2] for line in lines].count(["eval", "2"]) == 1 and not any(
        "\u2501" in line for line in lines
    )
    assert all(len(line) <= 80 for line in lines) and "\u2501" in screen.raw
    assert lines[-1].startswith("trained 2 steps in 0:0")


def test_other_loggers_get_the_speed(tmp_path):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer("packed", tmp_path, make_pairs(8), max_steps=1, callbacks=[Logger()])
    attach_progress(trainer, tmp_path)
    trainer.train()
    assert seen[0]["tokens_per_second"] > 0


# ---- files


def test_lines_wait_until_the_run_knows_where_it_starts(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n[1]\nnot json\n{"step": 9}\n{"st')
    file = JsonLines(path.parent, path.name)
    file.append({"step": 0, "value": float("nan"), "text": "中"})
    assert read_lines(path) == [{"step": 1}, {"step": 9}]
    assert file.begin(lambda record: record["step"] < 5)[0] == {"step": 1}
    file.append({"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 0, "value": None, "text": "中"}, {"step": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_evaluation_sets():
    assert evaluation_sets({"eval_loss": 1, "eval_nll_loss": 1, "eval_runtime": 2, "loss": 3}) == ["eval"]
    assert evaluation_sets({"eval_zh_loss": 1, "eval_zh_nll_loss": 1}) == ["eval_zh"]


def test_words():
    assert readable({"loss": 1.5, "preference/accuracies": 0.5, "odd": 3}) == ["loss 1.5000", "accuracy 50%"]
    assert readable({"eval_zh_loss": 2.0}, "eval_zh") == ["loss 2.0000"]
    assert [duration(s) for s in (0, 65.4, 3600, 11045)] == ["0:00", "1:05", "1:00:00", "3:04:05"]


# ---- speed


def test_speed_meter_leaves_out_what_is_no_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    meter = SpeedMeter(8, tokens_per_count=0.5, flops_per_token=10.0, peak=1000.0, ranks=2)
    meter.start(0, 0.0, seconds=30.0)
    now[0] += 4
    meter.touch()
    now[0] += 60  # an evaluation between two steps
    meter.skip()
    now[0] += 6
    meter.touch()
    figures = meter.read(10, 400.0)
    assert figures == {"pairs_per_second": 8.0, "tokens_per_second": 20.0, "mfu": 0.1}
    assert meter.seconds == 40.0
    now[0] += 5
    assert meter.read(11, 400.0)["pairs_per_second"] == 1.6


def test_operations_per_token_by_hand():
    model = tiny_model("llama")
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    layers = 2 * (attention + 3 * 32 * 64)
    head = 512 * 32
    assert flops_per_token(model, head=True) == 6 * (layers + head)
    assert flops_per_token(model, head=False) == 6 * layers
    assert flops_per_token(tiny_model("llama", tie_word_embeddings=True), head=True) == 6 * (layers + head)
    tuned = lora(model)
    adapters = sum(p.numel() for name, p in tuned.named_parameters() if "lora_" in name)
    assert flops_per_token(tuned, head=True) == 4 * (layers + head) + 6 * adapters
    assert flops_per_token(tiny_model("mixtral"), head=True) is None


def test_peak_is_measured_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e15 and torch.equal(before, torch.get_rng_state())


# ---- explanations


def course(count=16, every=10, nll=None, **metrics):
    """A training log whose metrics go straight from one value to another."""
    ends = {name.replace("_", "/"): pair for name, pair in metrics.items()} | ({"nll_loss": nll} if nll else {})
    return [
        {"step": every * (i + 1), "loss": 1.0, **{k: a + (b - a) * i / (count - 1) for k, (a, b) in ends.items()}}
        for i in range(count)
    ]


def evaluated(accuracy):
    return [{"step": 160, "eval_loss": 1.0, "eval_preference/accuracies": accuracy}]


def names(history, max_steps=160):
    return [name for name, _ in hints(history, max_steps)]


FALL = dict(logps_chosen=(-1.0, -1.5), logps_rejected=(-1.0, -2.0))


@pytest.mark.parametrize(
    "history, expected",
    [
        ([], []),
        (course(), []),
        (course(**FALL, rewards_margins=(0.0, 0.05)), ["both_fall"]),
        (course(**FALL, rewards_margins=(0.0, -0.05)), ["both_fall_alone"]),
        (course(count=7, **FALL, rewards_margins=(0.0, 0.05)), []),
        (course(logps_chosen=(-1, -0.8), logps_rejected=(-1, -2), rewards_margins=(0, 1)), []),
        (course(nll=(2.0, 2.4)), ["nll_rises"]),
        (course(nll=(2.0, 2.02)), []),
        (course(preference_accuracies=(0.5, 0.5)), ["at_chance"]),
        (course(preference_accuracies=(0.5, 0.5), every=1), []),
        (course(preference_accuracies=(0.4, 0.54)), []),
        ([{"step": 0, "eval_loss": 1.0, "eval_preference/accuracies": 0.19}], ["below_half"]),
        ([{"step": 0, "eval_loss": 1.0, "eval_preference/accuracies": 0.6}], []),
        ([{"step": i, "eval_loss": v} for i, v in ((0, 2.0), (10, 1.5), (20, 1.6))], ["eval_rises"]),
        ([{"step": i, "eval_loss": v} for i, v in ((0, 2.0), (10, 1.5), (20, 1.51))], []),
        (course(preference_accuracies=(0.5, 1.0)) + evaluated(0.6), ["gap"]),
        (course(preference_accuracies=(0.5, 1.0)) + evaluated(0.9), []),
    ],
)
def test_explanations(history, expected):
    assert names(history) == expected


@pytest.mark.parametrize("at", [0, 5, 12, 39])
def test_a_jump_of_the_loss_is_seen_at_every_entry_as_in_the_whole_log(at):
    history = course(count=40)
    history[at] |= {"loss": 9.0}
    grown = {name for n in range(len(history)) for name, _ in hints(history[: n + 1], 160, each_entry=True)}
    assert grown == set(names(history)) == ({"spike"} if at >= ENTRIES else set())


def test_an_explanation_is_printed_once(tmp_path, capsys):
    trainer = make_trainer("packed", tmp_path, make_pairs(8), eval_pairs=make_pairs(8), max_steps=1)
    attach_progress(trainer, tmp_path)
    progress = trainer.callback_handler.callbacks[0]
    for step in (0, 0, 1):
        entry = {"step": step, "eval_loss": 1.0, "eval_preference/accuracies": 0.1}
        trainer.state.log_history.append(entry)
        progress.on_log(trainer.args, trainer.state, trainer.control, logs=dict(entry))
    assert capsys.readouterr().out.count("note: accuracy starts at 10%") == 1
