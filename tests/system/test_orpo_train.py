"""orpo_train.py from end to end on tiny models: what it trains, writes, refuses and says."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from on_terminal import on_terminal
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo_train
from conversation import get_conv_template
from preference.data.rows import DataError
from preference.files import NEXT
from preference.integrity import fault
from preference.launch import signals
from preference.train.checkpoints import CheckpointError
from preference.train.output_folder import OutputError
from tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"question": f"What helps against a cold, case {i}?", "response_chosen": f"Rest and drink, {i} cups a day.",
     "response_rejected": f"Who knows {i}."}
    for i in range(12)
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 0  # not the template's stop token, as in many base models
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """run(flag=value, ...) calls main() and returns (output_dir, what was printed)."""
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "eval.jsonl", [dict(row, question="Eval: " + row["question"]) for row in ROWS[:5]])

    def call(**flags):
        defaults = dict(
            model_name_or_path=tiny_folder, train_file_dir=tmp_path / "train.jsonl", output_dir=tmp_path / "out",
            validation_file_dir=tmp_path / "eval.jsonl", template_name="qwen", cache_dir=tmp_path / "cache",
            html_report="false",
            bf16="false", use_cpu="true", use_peft="false", max_steps=2, learning_rate=1e-3, sample_tokens=4,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        words = [f"--{name}={value}" for name, value in (defaults | flags).items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["orpo_train.py", *words])
        orpo_train.main()
        return Path((defaults | flags)["output_dir"]), capsys.readouterr().out

    return call


def result_files(folder: Path) -> dict[str, bytes]:
    """All that describes a result: its folder's files but for the word on which run is at work there."""
    changing = (".lock", ".lock.json", "run_identity.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in changing}


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def test_a_run_leaves_a_model_that_chats_as_it_was_trained(run, tmp_path):
    out, said = run()
    for name in ("all_results.json", "trainer_state.json", "data_report.json", "run.json", "samples.json", "README.md"):
        assert (out / name).stat().st_size > 0, name
    figures = results(out)
    assert figures["eval_loss"] < figures["base_eval_loss"] and figures["train_steps"] == 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = get_conv_template("qwen").get_prompt(ROWS[0]["question"])
    messages = [{"role": "user", "content": ROWS[0]["question"]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]
    assert json.loads((out / "samples.json").read_text())[0].keys() >= {"question", "chosen", "base", "tuned"}
    assert "⟦Rest and drink" in said and "<|im_end|>⟧" in said and "preference accuracy" in said
    assert prompt in said  # the first pair, as the model sees it


def test_a_run_ends_with_its_report(run):
    """And was shown live, where one still sees that it is finished."""
    out, said = run(html_report="true", watch="true")
    assert f"read {out / 'report.html'}" in said
    [url] = re.findall(r"live: watch it at (http://127\.0\.0\.1:\d+)", said)
    with urllib.request.urlopen(f"{url}/state", timeout=20) as answer:
        [told] = json.load(answer)["runs"]
    assert (told["status"], told["step"], told["max_steps"]) == ("finished", 2, 2) and told["report"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "preference accuracy" in page and ROWS[0]["question"] in page and "<svg" in page
    assert {path.name for path in out.iterdir()} >= {"evaluation.json", "worst_pairs.json", "metrics.jsonl"}


@pytest.mark.parametrize("columns, lang", [(80, "en"), (200, "zh")])
def test_a_run_on_a_terminal(run, monkeypatch, columns, lang):
    """A page, a table and what to type next, with no bar but its own and none left in the end."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with on_terminal(columns) as screen:
        out, said = run(html_report="true", logging_steps=1, lang=lang)
    lines = screen.lines()
    commands = [line for line in lines if (line.startswith("  ") and ".py " in line) or "xdg-open" in line]
    assert all(Text(line).cell_len <= columns for line in lines if line not in commands), lines
    python = sys.executable.removeprefix(f"{Path.cwd()}/")
    assert commands[0].startswith(f"  {python} chat.py {out}") and len(commands) == 3  # whole, to be copied
    head = next(n for n, line in enumerate(lines) if " loss " in line and " NLL " in line)
    assert 8 <= head <= 25 and said == "" and "Loading weights" not in screen.raw
    rows = [line.split()[0] for line in lines[head:] if re.match(r" +\d+/2 ", line)]
    assert rows == ["1/2", "2/2"] and not any("\u2501" in line for line in lines) and "\u2501" in screen.raw
    text = "\n".join(lines)
    assert ("接下来" in text and "偏好准确率" in text) if lang == "zh" else "next" in lines[-4]


@pytest.mark.parametrize("loss", ["orpo", "dpo"])
@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_both_engines_agree_before_training(run, tmp_path, loss, use_peft):
    """One evaluation batch holds the whole set, so that TRL's mean per batch is the mean over the set."""
    adapter = dict(target_modules="q_proj,v_proj", lora_rank=4) if use_peft == "true" else {}
    figures = {}
    for engine in ("packed", "trl"):
        flags = dict(loss=loss, engine=engine, use_peft=use_peft, per_device_eval_batch_size=8, max_steps=1, **adapter)
        out, _ = run(output_dir=tmp_path / engine, **flags)
        figures[engine] = results(out)
    for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        if name == "rewards/accuracies" and loss == "dpo":  # all ties: half of them won, none in TRL's counting
            assert (figures["packed"][f"base_eval_{name}"], figures["trl"][f"base_eval_{name}"]) == (0.5, 0.0)
            continue
        mine, theirs = (figures[engine][f"base_eval_{name}"] for engine in ("packed", "trl"))
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), name


def test_an_adapter_loads_over_its_base(run, tiny_folder):
    from peft import PeftModel

    out, _ = run(use_peft="true", lora_rank=4, lora_alpha=8, lora_dropout=0.1, max_steps=3)
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    layers = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # all but the head
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor([[1, 5, 9]])
    before = base(ids).logits
    assert not torch.equal(PeftModel.from_pretrained(base, out)(ids).logits, before)


def test_scoring_alone_gives_what_training_started_from(run, tmp_path):
    trained, _ = run(output_dir=tmp_path / "a")
    not_used = dict.fromkeys(
        ("train_file_dir", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    scored, said = run(output_dir=tmp_path / "b", do_train="false", **not_used)
    assert results(scored)["eval_loss"] == pytest.approx(results(trained)["base_eval_loss"], rel=1e-6)
    assert "preference accuracy" in said and not (scored / "model.safetensors").exists()


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_text"])
def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path, arch):
    """All weights in float32; and, of a model whose layers carry a state, an adapter with dropout in bfloat16."""
    flags, weights = dict(max_steps=4), "model.safetensors"
    if arch != "llama":
        folder, weights = tmp_path / arch, "adapter_model.safetensors"
        tiny_model(arch).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        flags |= dict(model_name_or_path=folder, use_peft="true", bf16="true", lora_dropout=0.1)
    whole, _ = run(output_dir=tmp_path / "whole", save_steps=0.5, **flags)  # a share of the run
    first = tmp_path / "first"
    first.mkdir()
    (whole / "checkpoint-2").rename(first / "checkpoint-2")
    resumed, _ = run(output_dir=first, save_steps=2, resume_from_checkpoint="last", **flags)
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_finished_run_is_replaced_whole_only_when_that_is_asked_for(run, tmp_path, monkeypatch):
    """Refused; then asked for, and stopped by a signal in the first evaluation; then asked for again."""
    out, _ = run(use_peft="true")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    assert not any(str(tmp_path.parent).encode() in (out / name).read_bytes() for name in names)
    before = result_files(out)
    with pytest.raises(OutputError, match="holds a finished run: .*overwrite_output_dir=true"):
        run(use_peft="true")
    again = {"overwrite_output_dir": "true", "learning_rate": "1e-2"}
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopSignals, "install", lambda self: setattr(self, "received", "SIGTERM") or self)
        with pytest.raises(signals.StoppedBySignal, match="after step 0"):
            run(**again)
    assert result_files(out) == before
    with pytest.raises(OutputError, match="an earlier result, which another run began to replace"):
        run(**(again | {"overwrite_output_dir": "false"}))
    run(**again)
    assert (out / "metrics.jsonl").read_bytes() != before["metrics.jsonl"] and not (out / NEXT).exists()
    assert json.loads((out / "run.json").read_text())["learning_rate"] == 1e-2 and fault(out) is None
    assert not (out / "adapter_model.safetensors").exists() and (out / "model.safetensors").exists()


def test_resume_from_nothing_says_so(run):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(resume_from_checkpoint="last")


def test_bad_rows_are_named_and_the_others_train(run, tmp_path):
    file = tmp_path / "dirty.jsonl"
    write(file, ROWS)
    with file.open("ab") as stream:
        stream.write(b'{"question": "no answers"}\n{"broken": \n')
        stream.write(json.dumps(dict(ROWS[0], response_rejected=ROWS[0]["response_chosen"])).encode() + b"\n")
    out, said = run(train_file_dir=file)
    report = json.loads((out / "data_report.json").read_text())
    assert report["rows_read"] == 12 + 3 + 5 and report["rows_kept"] == 12 + 5
    assert sum(report["dropped"].values()) == 3
    places = {(reason, e["file"], e["line"]) for reason, examples in report["examples"].items() for e in examples}
    assert places == {
        ("missing_key", str(file), 13),
        ("broken_json", str(file), 14),
        ("identical_answers", str(file), 15),
    }
    assert f"{file}:14" in said
    with pytest.raises(DataError, match=f"{file}:13"):
        run(train_file_dir=file, data_check="strict", output_dir=tmp_path / "strict")


def test_every_family_of_datasets_trains_as_it_is(run, tmp_path):
    from format_rows import ROWS as FAMILIES

    folder = tmp_path / "families"
    folder.mkdir()
    for i, (name, row) in enumerate(FAMILIES):
        write(folder / f"{i:02}-{name}.jsonl", [row])
    refused = write(folder / "kto.jsonl", [{"prompt": "Why?", "completion": "So.", "label": True}])
    out, said = run(train_file_dir=folder, axis="better", max_steps=1)
    report = json.loads((out / "data_report.json").read_text())
    assert report["train"]["pairs"] == len(FAMILIES) and report["evaluation"]["pairs"] == 5
    assert report["dropped"] == {"not_preference": 1}
    assert [file["format"] for file in report["files"].values()][: len(FAMILIES)] == [name for name, _ in FAMILIES]
    assert report["train_text"]["duplicate_pairs"] > 0 and report["prompts_in_train_and_eval"]["rows"] == 0
    assert {"near_identical_answers", "scripts", "length_bias"} <= report["train_text"].keys()
    assert "control_look_alikes" in report["train"]
    stand = f"{report['train_text']['duplicate_pairs']} pairs stand there more than once"
    for told in (f"{refused} was refused: no preference pairs", "not meant for supervised training", stand):
        assert told in said


def test_nothing_left_stops_with_the_numbers(run, tmp_path):
    with pytest.raises(DataError, match="too_long") as error:
        run(max_source_length=3, max_target_length=2)
    assert "5" in str(error.value)
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["dropped"]["too_long"] == 12


def test_sampled_rows_are_drawn_with_the_seed_and_counted(run, tmp_path):
    def kept(out: Path) -> set[int]:
        left_out = json.loads((out / "data_report.json").read_text())["examples"]["not_sampled"]
        return set(range(1, 13)) - {place["line"] for place in left_out}

    drawn = [
        kept(run(output_dir=tmp_path / str(i), max_train_samples=4, seed=seed)[0]) for i, seed in enumerate((1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4


def test_rows_are_split_off_where_there_are_no_evaluation_files(run):
    out, _said = run(validation_file_dir=None, validation_split_percentage=25)
    assert results(out)["eval_loss"] > 0
    report = json.loads((out / "data_report.json").read_text())
    assert (report["train"]["pairs"], report["evaluation"]["pairs"]) == (9, 3)


def test_a_template_that_does_not_fit_is_refused(run):
    from conversation import ConversationError

    with pytest.raises(ConversationError, match="are not single tokens.*qwen2"):
        run(template_name="llama3")


def test_four_bits_say_what_is_missing(run, monkeypatch):
    from preference.models import loading
    from preference.models.loading import ModelError

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes, or qlora=false"):
        run(qlora="true", use_peft="true")


def test_an_unknown_layer_is_refused_with_those_that_there_are(run):
    from preference.models.loading import ModelError

    with pytest.raises(ModelError, match="no w_pack.*q_proj"):
        run(use_peft="true", target_modules="q_proj,w_pack")
