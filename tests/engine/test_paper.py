"""What a step on a GPU would do, followed on paper: its operators, memory, and that it never waits for the card."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import Objective, Totals, objective_share
from preference.train.scores import PairScores
from tiny import tiny_model


def test_a_step_on_paper_keeps_to_its_budget(root: Path, tmp_path: Path) -> None:
    """64 HH pairs through Qwen2.5-0.5B with LoRA; the dry run tells the same memory."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed: it compiles the device on paper")
    command = [sys.executable, str(root / "benchmarks/paper_gpu.py"), "--model=qwen0.5b", "--load=hh", "--pairs=64"]
    run = subprocess.run(
        [*command, "--peft=lora", f"--json={tmp_path / 'out.json'}"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["layer_ops"] <= 60
    assert found["head_ops"] <= 40
    assert found["syncs"] == 0
    assert found["mfu_h100"] >= 0.33
    assert found["loss_ops"] <= 120
    assert found["estimated_peak_gb"] == pytest.approx(found["peak_gb"], rel=0.1)
    assert found["ms_h100_trl"] > 3 * found["ms_h100"]


@pytest.mark.parametrize("loss", ["orpo", "dpo"])
def test_no_value_is_read_on_the_host_in_a_micro_batch(loss: str) -> None:
    model, objective = tiny_model("llama"), Objective(loss=loss)
    prepare_model(model)
    pairs = [dict(prompt_ids=[*range(3, 9 + i)], chosen_ids=[5, 6, 7], rejected_ids=[8, 9]) for i in range(3)]
    batch = pack_pairs(pairs, prompt_logps=objective.needs_prompt)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), 3) for p in pairs])
    reference = (torch.zeros(3), torch.zeros(3)) if objective.needs_reference else None
    scores = PairScores(3, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        logps = pair_logps(model, batch)
        objective_share(objective, logps, totals, reference)[0].backward()
        scores.add(torch.arange(3), logps)
    reads = {event.key for event in seen.key_averages()} & {"aten::item", "aten::nonzero", "aten::_local_scalar_dense"}
    assert not reads


def test_the_campaign_calls_wrong_what_is_wrong_and_not_what_is_slow(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.syspath_prepend(root / "benchmarks")
    from gpu_step import faults

    good = dict(loss=1.0, shared=True, waits=0, peak_gb=10.0, estimated_peak_gb=10.9, compile=False, ms=1e6)
    assert faults(good) == []
    for change in (
        {"loss": float("nan")},
        {"shared": False},
        {"waits": 1},
        {"estimated_peak_gb": 11.1},
        {"estimated_peak_gb": 8.9},
    ):
        assert len(faults(good | change)) == 1, change


def test_every_file_that_the_campaign_names_is_there(root: Path) -> None:
    script = (root / "benchmarks/gpu_campaign.sh").read_text()
    named = set(re.findall(r"\b(?:data|benchmarks|tests)/[\w/.]+\.(?:py|jsonl)", script))
    assert len(named) >= 6 and all((root / path).exists() for path in named)


def test_the_campaigns_report_stops_at_a_wrong_number(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(root / "benchmarks")
    import gpu_report

    def run(name: str, *losses: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        history = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return str(folder)

    good, near, far, short = run("a", 2.0, 1.0), run("b", 2.0, 1.01), run("c", 2.0, 1.1), run("d", 2.0)
    assert gpu_report.same(good, near, 0.02) == pytest.approx(0.01)
    for other in (far, short, run("e", 2.0, float("nan"))):
        with pytest.raises(SystemExit, match="WRONG"):
            gpu_report.same(good, other, 0.02)
    row = {"seconds_per_step": 1.0, "matmul_share": 0.5, "peak_memory_bytes": 1e9, "useful_tokens_per_second": 10.0}
    result = {"engines": {"trl": row | {"losses": [2.0, 1.0]}, "packed": row | {"losses": [2.0, 1.001]}}}
    for change, wrong in (
        ({"grad_rel_err": 0.01}, False),
        ({"grad_rel_err": 0.2}, True),
        ({"engines": result["engines"] | {"packed": row | {"losses": [2.0, 1.2]}}}, True),
    ):
        (tmp_path / "engines.json").write_text(json.dumps(result | change))
        if wrong:
            with pytest.raises(SystemExit, match="WRONG"):
                gpu_report.engines(str(tmp_path / "engines.json"))
        else:
            gpu_report.engines(str(tmp_path / "engines.json"))
    assert "packed" in gpu_report.table(str(tmp_path)) and (tmp_path / "campaign.json").exists()
