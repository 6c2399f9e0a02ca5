"""Exports in the format of compressed-tensors: read back by transformers, as far from the model as was printed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from exported import export
from safetensors.torch import load_file
from talk import chat_with
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_model
from conversation import get_conv_template
from preference.serve import compressed
from preference.serve.compressed import CompressionError, linear_layers, save_compressed
from preference.serve.generation import Turn
from preference.serve.merging import difference, logits_of, probes
from tiny import tiny_model

needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="no compressed-tensors: pip install -r requirements-dev.txt"
)


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same export in 16 bits."""
    out = tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        export(patch, run, "--output", out, "--dtype", "bfloat16")
    return out


@needs_package
@pytest.mark.parametrize("scheme, kind, limit", [("fp8", torch.float8_e4m3fn, 0.1), ("w4a16", torch.int32, 0.3)])
def test_transformers_computes_what_was_measured(
    scheme: str,
    kind: torch.dtype,
    limit: float,
    run: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    export(monkeypatch, run, "--output", out, "--compressed", scheme)
    lines = capsys.readouterr().out.splitlines()
    (said,) = (line for line in lines if line.startswith(f"compressed to {scheme}"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    questions = probes(get_conv_template("qwen"), tokenizer)
    found = [
        logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), questions)
        for folder in (plain, out)
    ]
    change = difference(*found)
    assert 1e-7 < change.kl < limit
    assert any("changes answers" in line for line in lines) == (change.kl > 0.1) == (scheme == "w4a16")
    assert float(re.search(r"KL divergence (\S+)", said)[1]) == pytest.approx(change.kl, rel=0.06)
    layers = {
        name: weight.dtype
        for name, weight in load_file(out / "model.safetensors").items()
        if "down_proj.weight" in name
    }
    assert kind in layers.values() and torch.bfloat16 in layers.values()
    card = (out / "README.md").read_text()
    assert "compressed" in card and f"{change.kl:.1e}"[-3:] in card
    assert "vllm serve" in (out / "serve.sh").read_text() and "sglang" in (out / "serve.sh").read_text()
    assert chat_with(out).answers([Turn("Name a juice.")], 0) == chat_with(out).answers([Turn("Name a juice.")], 0)


@needs_package
def test_what_would_stay_as_it_is_is_refused(tmp_path: Path) -> None:
    experts = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    with pytest.raises(CompressionError, match="qwen3_moe are in no linear layer"):
        linear_layers(experts)
    odd = tiny_model(hidden_size=48, dtype=torch.bfloat16)
    with pytest.raises(CompressionError, match=r"q_proj has 48 inputs, which fill no groups of 32: --compressed fp8"):
        save_compressed(odd, "w4a16", tmp_path, [([1, 2, 3], 1)], "5GB")
    assert not list(tmp_path.iterdir())


def test_without_the_package_nothing_is_loaded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install compressed-tensors"):
        export(monkeypatch, run, "--output", tmp_path / "out", "--compressed", "fp8")
    assert not list(tmp_path.iterdir())


def test_float32_is_no_type_to_compress(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        export_model.parse_arguments(["run", "--output", "o", "--compressed", "fp8", "--dtype", "float32"])
    assert "drop --dtype float32" in capsys.readouterr().err
