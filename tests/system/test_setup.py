"""setup.sh in a folder of its own, with a tiny package in the place of torch and its kin: no network, a real venv."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("dash") or "sh"
SCRIPTS = [p for pattern in ("*.sh", "torchrun/*.sh", ".ci/run") for p in sorted(ROOT.glob(pattern))]


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of the package `tinypin` with one module."""
    info = f"tinypin-{version}.dist-info"
    files = {
        "tinypin.py": f"VERSION = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tinypin\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"tinypin-{version}-py3-none-any.whl", "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record + f"{info}/RECORD,,\n"}).items():
            archive.writestr(name, text)


class Checkout:
    """A folder with setup.sh and requirements of its own, an empty home, and a PATH whose only Python is a bare one."""

    def __init__(self, folder: Path) -> None:
        self.here = folder / "a checkout"  # with a space, as users have them
        self.bin = folder / "bin"
        self.wheels = folder / "wheels"
        for path in (self.here, self.bin, folder / "home"):
            path.mkdir()
        write_wheel(self.wheels, "1.0")
        shutil.copy(ROOT / "setup.sh", self.here)
        (self.here / "requirements-dev.txt").write_text("-r requirements.txt\n")
        self.pin("1.0")
        base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.add_python("python3", base if base.exists() else Path(sys.executable))
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
        }

    def add_python(self, name: str, python: Path, pythonpath: str = "") -> Path:
        wrapper = self.bin / name
        path = f"PYTHONPATH='{pythonpath}' " if pythonpath else ""
        wrapper.write_text(f'#!/bin/sh\n{path}exec "{python}" "$@"\n')
        wrapper.chmod(0o755)
        return wrapper

    def add_python_with(self, name: str, version: str) -> Path:
        """An interpreter that has `tinypin` in that version."""
        site = self.bin.parent / f"site-{version}"
        write_wheel(self.wheels.parent / "elsewhere", version)
        with zipfile.ZipFile(self.wheels.parent / "elsewhere" / f"tinypin-{version}-py3-none-any.whl") as archive:
            archive.extractall(site)
        return self.add_python(name, Path(sys.executable), str(site))

    def pin(self, version: str) -> None:
        (self.here / "requirements.txt").write_text(f'# pins\ntinypin=={version}\nold==1; python_version < "3.0"\n')

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [SHELL, str(self.here / "setup.sh"), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.env | env, text=True, cwd=self.bin.parent, **pipes)

    def setup(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    @property
    def python(self) -> Path:
        return self.here / ".venv" / "bin" / "python"

    def version(self) -> str:
        command = [str(self.python), "-c", "import tinypin; print(tinypin.VERSION)"]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_parse(script: Path) -> None:
    shell = "bash" if script.name == "run" else SHELL
    subprocess.run([shell, "-n", str(script)], check=True)


def test_the_environment_is_made_once_and_follows_the_requirements(checkout: Checkout) -> None:
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.python}\n"  # nothing else on stdout: a caller takes it as the interpreter
    assert "making .venv" in first.stderr and "installing requirements.txt" in first.stderr
    assert checkout.version() == "1.0"

    start = os.times()
    second = checkout.setup(PIP_FIND_LINKS="")  # with nowhere to install from
    end = os.times()
    # under a second of work; the clock on the wall would measure what else the machine does
    assert end.children_user + end.children_system - start.children_user - start.children_system < 1
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "installing" not in second.stderr

    tests = checkout.setup("requirements-dev.txt")
    assert tests.returncode == 0 and "installing requirements-dev.txt" in tests.stderr and "making" not in tests.stderr

    write_wheel(checkout.wheels, "1.1")
    checkout.pin("1.1")
    third = checkout.setup()
    assert third.returncode == 0 and "installing" in third.stderr and "making" not in third.stderr
    assert checkout.version() == "1.1"

    # An installation that was killed half-way: no copy of the requirements yet, a package without all its files.
    (checkout.here / ".venv" / "requirements.txt").unlink()
    site = next((checkout.here / ".venv").glob("lib/python*/site-packages"))
    (site / "tinypin.py").unlink()
    (site / "tinypin-1.1.dist-info" / "INSTALLER").unlink()
    assert checkout.setup().returncode == 0
    assert checkout.version() == "1.1"

    # A failure leaves no mark of completion, and says what to do.
    checkout.pin("9.9")
    failed = checkout.setup()
    assert failed.returncode == 1 and failed.stdout == "" and "could not install" in failed.stderr
    assert checkout.setup().returncode == 1


def test_two_at_once_install_once(checkout: Checkout) -> None:
    runs = [checkout.start() for _ in range(2)]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert [out for out, _ in results] == [f"{checkout.python}\n"] * 2
    assert sum("installing" in err for _, err in results) == 1
    assert sum("waiting for another" in err for _, err in results) == 1


def test_the_active_environment_is_used_when_it_has_the_pinned_versions(checkout: Checkout) -> None:
    checkout.add_python_with("python3", "1.0+local")  # the way torch 2.13.0+cpu is torch 2.13.0
    result = checkout.setup()
    assert result.stdout == f"{checkout.bin / 'python3'}\n", result.stderr
    assert "active environment" in result.stderr
    assert not checkout.python.exists()


def test_the_active_environment_is_left_alone_when_it_has_other_versions(checkout: Checkout) -> None:
    checkout.add_python_with("python", "0.9")
    result = checkout.setup()
    assert result.stdout == f"{checkout.python}\n", result.stderr
    assert "tinypin 0.9 (pinned: 1.0)" in result.stderr and "set PYTHON" in result.stderr


def test_python_names_an_environment(checkout: Checkout) -> None:
    lagging = checkout.add_python_with("lagging", "0.9")
    warned = checkout.setup(PYTHON="lagging")
    assert warned.stdout == f"{lagging}\n", warned.stderr
    assert "warning: other versions: tinypin 0.9 (pinned: 1.0)" in warned.stderr

    relative = checkout.setup(PYTHON="bin/lagging")
    assert Path(relative.stdout.strip()).is_absolute() and Path(relative.stdout.strip()).samefile(lagging)

    bare = checkout.setup(PYTHON=str(checkout.bin / "python3"))
    assert bare.returncode == 1 and bare.stdout == "" and "missing: tinypin==1.0" in bare.stderr

    absent = checkout.setup(PYTHON="/no/such/python")
    assert absent.returncode == 1 and "/no/such/python is not there" in absent.stderr
    assert not checkout.python.exists()


def test_no_python_and_no_venv_are_told(checkout: Checkout) -> None:
    for tool in ("sh", "dirname", "cmp"):
        (checkout.bin / tool).symlink_to(str(shutil.which(tool)))
    (checkout.bin / "python3").write_text('#!/bin/sh\ncase "$*" in *ensurepip*|"- "*) exit 1;; esac\nexit 0\n')
    without_venv = checkout.setup(PATH=str(checkout.bin))
    assert without_venv.returncode == 1 and "python3-venv" in without_venv.stderr, without_venv.stderr
    (checkout.bin / "python3").unlink()
    without_python = checkout.setup(PATH=str(checkout.bin))
    assert without_python.returncode == 1 and "no Python 3.10 or newer" in without_python.stderr


def test_every_requirement_is_a_pin_that_setup_understands() -> None:
    here = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    result = subprocess.run([SHELL, str(ROOT / "setup.sh")], env=here, text=True, capture_output=True)
    assert result.returncode == 0 and result.stdout == f"{sys.executable}\n", result.stderr
