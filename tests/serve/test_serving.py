"""serve.sh beside an exported model: llama.cpp's own server answers, streams and stops as the model does here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export
from talk import chat_with
from tuned import write_run_files

from preference.serve.generation import Sampling, Turn
from preference.serve.launcher import serve_script, served_name
from tiny import tiny_model

needs_llama = pytest.mark.skipif(not find_spec("xllamacpp"), reason="no llama.cpp: pip install -r requirements-dev.txt")
QUESTION, LENGTH, STOP = "Name a juice.", 7, 2


def stopping_run(folder: Path) -> Path:
    """A model whose greedy answer to QUESTION has LENGTH tokens and then a stop token."""
    for seed in range(50):
        model = tiny_model(seed=seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
            model.lm_head.weight[:3] = 0  # no stop before the one that is made
        model.save_pretrained(folder)
        write_run_files(folder, str(folder))
        chat = chat_with(folder, Sampling(temperature=0, max_new_tokens=LENGTH))
        prompt = chat.encode(Turn(QUESTION))
        with torch.no_grad():
            ids = chat.model.generate(torch.tensor([prompt]), generation_config=chat.config)
            out = chat.model(ids, output_hidden_states=True)
            hidden, logits = out.hidden_states[-1][0, len(prompt) - 1 :], out.logits[0, len(prompt) - 1 :]
            towards = hidden @ hidden[-1]
            row = hidden[-1] * 1.3 * logits[-1].max() / towards[-1]
            stops = hidden @ row > logits.max(-1).values
            answer = chat.decode(ids[0, len(prompt) :].tolist())
        if stops.tolist() == [False] * LENGTH + [True] and "\ufffd" not in answer and len(answer) > 8:
            with torch.no_grad():
                model.lm_head.weight[STOP] = row
            model.save_pretrained(folder)
            return folder
    raise AssertionError("no seed gives such a model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The exported folder, and the answer that its model gives here."""
    folder = tmp_path_factory.mktemp("serving")
    run = stopping_run(folder / "run")
    chat = chat_with(run, Sampling(temperature=0, max_new_tokens=40))
    (answer, cut) = chat.draw([Turn(QUESTION)], 0)[0]
    assert not cut
    with pytest.MonkeyPatch.context() as monkeypatch:
        export(monkeypatch, run, "--output", folder / "my model", "--gguf", "f16", "--dtype", "float32")
    return folder / "my model", answer


@pytest.fixture(scope="module")
def address(exported: tuple[Path, str], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `sh serve.sh` serves it."""
    program = tmp_path_factory.mktemp("bin") / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{root}/tests/llama_server.py" "$@"\n')
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    environment = os.environ | {"PORT": port, "LLAMA_SERVER": str(program)}
    command = [shutil.which("dash") or "sh", exported[0] / "serve.sh"]
    with subprocess.Popen(
        command, cwd="/", env=environment, stdout=-1, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        line = next((line for line in process.stdout if line.startswith("http")), "")
        try:
            assert line.strip().endswith(f"127.0.0.1:{port}")
            yield line.strip()
        finally:
            process.kill()


def ask(address: str, **values: Any) -> Any:
    body = {"model": "my-model", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0} | values
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


@needs_llama
class TestLlamaCppsServer:
    def test_it_answers_and_stops_where_the_model_does(self, address: str, exported: tuple[Path, str]) -> None:
        answer = json.load(ask(address))
        choice = answer["choices"][0]
        assert choice["message"]["content"].strip() == exported[1] and choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == LENGTH + 1 and answer["model"] == "my-model"

    def test_it_streams(self, address: str, exported: tuple[Path, str]) -> None:
        lines = [line.decode().strip() for line in ask(address, stream=True)]
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
        assert (
            "".join(pieces).strip() == exported[1] and sum(map(bool, pieces)) > 2 and lines[-2:-1] == ["data: [DONE]"]
        )

    def test_a_stop_text_of_the_request_ends_it(self, address: str, exported: tuple[Path, str]) -> None:
        mark = exported[1][4:6]
        choice = json.load(ask(address, stop=[mark]))["choices"][0]
        assert choice["message"]["content"].strip() == exported[1].partition(mark)[0].strip()
        assert choice["finish_reason"] == "stop"


def test_the_script_names_every_server_and_refuses_others(exported: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = exported
    script = (folder / "serve.sh").read_text()
    assert script == serve_script("my model", "my model-f16.gguf", [2])
    for name in ("vllm", "python", "ollama"):  # each says what it was called with
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s|" {name} "$@"\necho\n')
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python"}

    def called(*words: str) -> list[list[str]]:
        done = subprocess.run(
            ["sh", folder / "serve.sh", *words], env=environment, capture_output=True, text=True, check=True
        )
        return [line.strip("|").split("|") for line in done.stdout.splitlines()]

    vllm = called("vllm", "--max-model-len", "99")[0]
    assert vllm[:3] == ["vllm", "serve", "."] and vllm[-2:] == ["--max-model-len", "99"]
    assert json.loads(vllm[vllm.index("--override-generation-config") + 1]) == {"stop_token_ids": [2]}
    assert (folder / vllm[vllm.index("--chat-template") + 1]).is_file() and "127.0.0.1" in vllm
    assert called("sglang")[0][:4] == ["python", "-m", "sglang.launch_server", "--model-path"]
    assert called("ollama") == [["ollama", "create", "my-model", "-f", "Modelfile"], ["ollama", "run", "my-model"]]
    refused = subprocess.run(["sh", folder / "serve.sh", "tgi"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "llama|vllm|sglang|ollama" in refused.stderr
    assert "llama" not in serve_script("x", None, [2]).partition("case")[2]


def test_names_that_every_server_takes() -> None:
    assert [served_name(name) for name in ("my model", "a;b", "..", "感冒")] == ["my-model", "a-b", "tuned", "tuned"]
