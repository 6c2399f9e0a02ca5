"""The newcomer's hour: the commands of README and docs/serving.md, typed one after the other, and nothing else.

Settings make it small: a tiny model, few steps. It is left out of the suite for its length; run it with
FIRST_HOUR=1 pytest tests/system/test_first_hour.py
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FIRST_HOUR"), reason="takes minutes: FIRST_HOUR=1 runs it"),
]
SMALL = {
    "template_name": "qwen", "max_train_samples": "16", "max_eval_samples": "8", "max_steps": "2",
    "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2", "OMP_NUM_THREADS": "1",
}  # fmt: skip
QUESTIONS = ("Name a juice.", "How do I boil an egg?", "What is a noun?", "感冒怎么办？", "Hi.", "And you?")
TALK = [line for text in QUESTIONS for line in ("/reset", text, "/regen", "/better 2", "/good")]
TALK = ["/both Name a drink.", "/better 2", *TALK, "/save {}"]


PLACE: dict[str, Any] = {
    "cwd": ROOT,
    "env": os.environ | {"PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
}


def typed(command: str, lines: str = "", **settings: str) -> str:
    """Type a command line in the project's folder; its output."""
    place = PLACE | {"env": PLACE["env"] | settings}
    done = subprocess.run(["sh", "-c", command], **place, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def watched(command: str, **settings: str) -> tuple[str, list[dict[str, Any]]]:
    """Type a command line that says an address, and follow the run there; its output, and what was told meanwhile."""
    place = PLACE | {"env": PLACE["env"] | settings}
    said, told = "", []

    def follow(address: str) -> None:
        assert b"watching" in urllib.request.urlopen(address).read()
        with urllib.request.urlopen(f"{address}/events") as events:
            told.extend(json.loads(line[6:])["runs"][0] for line in events if line.startswith(b"data: "))

    with subprocess.Popen(["sh", "-c", command], **place, stdout=-1, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout or ():
            if not said.count("http://127.0.0.1") and (found := re.search(r"http://127\.0\.0\.1:\d+", line)):
                threading.Thread(target=follow, args=(found[0],), daemon=True).start()
            said += line
    assert run.returncode == 0, f"{command}\n{said[-3000:]}"
    return said, told


def written(command: str) -> str:
    """`command`, which has to stand in README or in the serving page as it is."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/serving.md"))
    assert command in text, f"{command} is in no page that a newcomer reads"
    return command


def test_the_newcomers_hour(tmp_path: Path) -> None:
    run, again, merged = (tmp_path / name for name in ("run", "again", "merged"))
    model = str(tmp_path / "model")
    tiny = tiny_model(max_position_embeddings=4096)
    with torch.no_grad():
        tiny.lm_head.weight[2] *= 25  # the stop token is likely now and then, so that answers end
    tiny.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    settings = SMALL | {"model_name_or_path": model, "cache_dir": str(tmp_path / "cache")}
    small = "--sample_answers 2 --use_cpu true"

    said = typed(written("sh run_orpo.sh --dry_run true") + f" {small}", output_dir=str(run), **settings)
    assert "GB" in said and not (run / "adapter_model.safetensors").exists()

    command = f"{written('sh run_orpo.sh')} {written('--watch true')} --logging_steps 1 {small}"
    said, told = watched(command, output_dir=str(run), **settings | {"max_steps": "8"})
    assert (run / "adapter_model.safetensors").is_file() and "preference accuracy" in said
    assert any(state["status"] == "running" and state["step"] > 0 and state["curves"] for state in told), told
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report or "<img" in report

    collected = tmp_path / "collected"
    chat = written("chat.py outputs/run").replace("outputs/run", str(run))
    lines = "\n".join(TALK).format(tmp_path / "talk.md") + "\n"
    flags = f"--use_cpu --temperature 1 --top_p 1 --max_new_tokens 700 --collect {collected}"
    said = typed(f"python {chat} {flags}", lines)
    assert "1 base" in said and (tmp_path / "talk.md").is_file()
    pairs, labels = (
        (collected / name / "chat.jsonl").read_text(encoding="utf-8").splitlines() for name in ("pairs", "labels")
    )
    assert len(pairs) >= 3 and len(labels) >= 2 and "for loss=kto" in said

    command = written("train_file_dir=collected/pairs sh run_orpo.sh").replace("collected", str(collected))
    longer = {"max_steps": "1", "max_source_length": "1024", "max_target_length": "2048"}
    typed(f"{command} {small}", output_dir=str(again), **{**settings, **longer})
    files = json.loads((again / "data_report.json").read_text())["files"]
    (kept,) = (counts["rows_kept"] for name, counts in files.items() if name.startswith(str(collected)))
    assert kept == len(pairs)

    export = written("python export_model.py outputs/run --output exported --gguf q4_k_m")
    typed(export.replace("outputs/run", str(run)).replace("exported", str(merged)))
    assert (merged / "merged-q4_k_m.gguf").is_file()
    answers(merged, tmp_path)


def answers(merged: Path, folder: Path) -> None:
    """`sh exported/serve.sh` answers a question."""
    program = folder / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/llama_server.py" "$@"\n')
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = written("sh exported/serve.sh").replace("exported", str(merged))
    environment = os.environ | {"PORT": port, "LLAMA_SERVER": str(program)}
    with subprocess.Popen(["sh", "-c", f"exec {command}"], env=environment, stdout=-1, text=True) as server:
        try:
            assert server.stdout and any(line.startswith("http") for line in server.stdout)
            (body,) = re.findall(r"-d '(\{.*\})'", (merged / "serve.sh").read_text())
            headers = {"Content-Type": "application/json"}
            values = json.loads(body) | {"max_tokens": 8}
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            request = urllib.request.Request(url, json.dumps(values).encode(), headers)
            answer = json.load(urllib.request.urlopen(request, timeout=60))
        finally:
            server.kill()
    assert answer["usage"]["completion_tokens"] > 0 and answer["model"] == "merged"
