"""The folder that export_model.py makes: whole or not at all, over nothing that may not go, pushed only when asked."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from exported import adapted, export, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from tuned import make_base, write_run_files

from conversation import get_conv_template
from preference.models.starter import STARTER_MODEL
from preference.serve import merging
from preference.serve.card import hub_id
from preference.serve.loading import LoadingError
from tiny import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("models") / "base")
    (folder / "LICENSE").write_text("Apache")
    (folder.parent / "secret").write_text("of this machine")
    (folder / "NOTICE").symlink_to(folder.parent / "secret")
    return folder


def test_the_folder_holds_all_that_serving_needs(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(monkeypatch, run, "--output", out, "--max_shard_size", "50KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - adapted(run, base)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(out).chat_template == get_conv_template("qwen").jinja()
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 0]
    assert (out / "LICENSE").read_text() == "Apache" and not (out / "NOTICE").exists()  # a link is not followed
    assert not [file for file in (*out.glob("*.json"), out / "README.md") if str(base.parent) in file.read_text()]
    card = (out / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- orpo\n---\n", card)
    assert "7 rows read, 5 kept" in card and "2 empty_answer" in card and "| train.jsonl | 5 | 3 |" in card
    assert "| data/more.jsonl | 2 | 2 |" in card
    assert "| eval_rewards/accuracies | 0.875 |" in card and "/home/someone" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_run_and_sampling_values_are_exported(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    tiny_model("qwen2", dtype=torch.bfloat16).save_pretrained(folder)
    write_run_files(folder, str(base), "chatml")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6}))
    export(monkeypatch, folder, "--output", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert found.generation_config.temperature == 0.6
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"  # the base's, as the run's folder has none


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for words, message in (((), "not empty"), (("--overwrite",), "holds no model")):
        with pytest.raises(SystemExit, match=message):
            export(monkeypatch, run, "--output", out, *words)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    (out / "config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    export(monkeypatch, run, "--output", out, "--overwrite")
    assert not (out / "letter.txt").exists() and not list(out.glob("model-*"))
    assert (out / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_read_is_never_replaced(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in (run, base, base.parent):
        with pytest.raises(SystemExit, match="which is read"):
            export(monkeypatch, run, "--output", output, "--overwrite")
    assert (base / "model.safetensors").is_file() and (run / "adapter_model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LoadingError("no")

    monkeypatch.setattr(merging, "load_merged", fail)
    with pytest.raises(SystemExit, match="export_model.py: no"):
        export(monkeypatch, run, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_base_models_in_the_card_are_hub_ids(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id(STARTER_MODEL) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert [hub_id(name) for name in (None, str(base), "/data/models/x", "../x/y", "gpt2")] == [None] * 5
    monkeypatch.chdir(base.parents[1])
    assert hub_id(f"{base.parent.name}/base") is None  # a folder here, though it looks like an id


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_pushing_is_private_and_only_when_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str
) -> None:
    calls = []

    class Api:
        def create_repo(self, name: str, **options: object) -> None:
            calls.append((name, options.get("private", options.get("visibility"))))

        def upload_folder(self, repo_id: str, folder_path: object, commit_message: str) -> None:
            calls.append((repo_id, Path(folder_path).name))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", types.ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", types.SimpleNamespace(HubApi=Api))
    export(monkeypatch, run, "--output", tmp_path / "a")
    assert calls == []
    export(monkeypatch, run, "--output", tmp_path / "b", "--push_to_hub", "me/model", "--hub", hub)
    assert calls == [("me/model", True if hub == "huggingface" else "private"), ("me/model", "b")]
