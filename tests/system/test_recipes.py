"""Every recipe resolves to flags that orpo_train.py takes together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preference.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.sh")))
def test_recipe(recipe, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "torchrun", tmp_path / "torchrun")
    (tmp_path / "preference").symlink_to(ROOT / "preference")  # torchrun/launch.py imports it
    shutil.copy(ROOT / "run_orpo.sh", tmp_path)
    (tmp_path / "setup.sh").write_text('echo "$PYTHON"\n')
    (tmp_path / "orpo_train.py").write_text("import json, sys\nprint('WORDS', json.dumps(sys.argv[1:]))\n")
    (tmp_path / "make_pairs.py").write_text("import sys\nassert '--output' in sys.argv\n")
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    command = [shutil.which("dash") or "sh", str(tmp_path / "recipes" / recipe), "--seed", "5"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (words,) = [line.removeprefix("WORDS ") for line in done.stdout.splitlines() if line.startswith("WORDS ")]
    args = parse_arguments(json.loads(words))
    assert args.run.seed == 5 and args.run.output_dir != "outputs/orpo"
    assert args.model.model_name_or_path != "models/SmolLM2-135M-Instruct"
