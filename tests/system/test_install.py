"""`pip install .` gives a package that is whole: every module imports, every command runs, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny import tiny_model, tiny_tokenizer

TRAIN_AND_IMPORT_ALL = """
import importlib, pkgutil, runpy, sys
site = sys.argv.pop(1)
sys.argv[0] = site + "/bin/preference-train"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
import preference
names = [m.name for m in pkgutil.walk_packages(preference.__path__, "preference.") if not m.name.endswith("__main__")]
for name in [*names, "orpo_train", "conversation", "chat", "export_model"]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(site), module.__file__
print("modules:", len(names))
"""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of this checkout was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    with zipfile.ZipFile(wheel) as content:
        assert not [name for name in content.namelist() if name.startswith(("tests/", "data/", "benchmarks/"))]
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_the_commands_of_the_wheel_run_and_every_module_imports(installed: Path, tmp_path: Path, root: Path) -> None:
    """Training first, in the same process: nothing is there then that it does not import itself."""
    for command in ("preference-train", "preference-convert", "preference-chat", "preference-export"):
        done = run(installed, tmp_path, installed / "bin" / command, "--help")
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    rows = '{"question": "What %d?", "response_chosen": "Good %d.", "response_rejected": "Bad."}\n'
    (tmp_path / "rows.jsonl").write_text("".join(rows % (i, i) for i in range(12)), encoding="utf-8")
    make_model(tmp_path / "model")
    flags = {
        "model_name_or_path": "model", "train_file_dir": "rows.jsonl", "output_dir": "out", "dry_run": "true",
        "use_cpu": "true", "template_name": "qwen",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = run(installed, tmp_path, "-c", TRAIN_AND_IMPORT_ALL, str(installed), *words)
    assert done.returncode == 0 and "the first pair, as the model sees it" in done.stdout, done.stderr
    modules = [path for path in (root / "preference").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert int(done.stdout.rpartition("modules: ")[2]) >= len(modules)


def make_model(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
