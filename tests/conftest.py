"""What all tests share: no network, the project on the path, the starter model, and the skips that say their reason."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (*sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir()), ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

# Set before anything imports the hub's libraries, and inherited by the programs that tests start.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["LC_ALL"] = "C.UTF-8"  # what a run says is in English
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
light = str(ROOT / "tests" / "without_bitsandbytes")
if light not in os.environ.get("PYTHONPATH", ""):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (light, os.environ.get("PYTHONPATH"))))
if sys.modules.get("bitsandbytes", True) is None:  # a worker of pytest-xdist: its tests may use it
    del sys.modules["bitsandbytes"]

gc.disable()  # until all test files are imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The same examples in every run; `pytest --hypothesis-profile default` draws others, and fuzz.py others all the time.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Files that take long or wait for processes come first, so that the workers end together.
FIRST = ("launch", "train", "system", "serve", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device; torch is imported only if there are such tests."""
    items.sort(key=lambda item: FIRST.index(folder) if (folder := item.path.parent.name) in FIRST else len(FIRST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The starter model's folder. run_tests.sh makes it during the set-up; a plain pytest makes it here, once."""
    from preference.models.starter import STARTER_MODEL, StarterModelError, ensure_starter_model

    try:
        return ensure_starter_model(ROOT / STARTER_MODEL)
    except StarterModelError as error:
        pytest.skip(f"no starter model: {error}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared of real datasets and tokenizers, which not every machine has."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("../shared is not there")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    from tuned import make_base

    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run has left: the folder of an adapter over `base`."""
    from tuned import make_run

    return make_run(tmp_path_factory.mktemp("outputs") / "run", base)


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """Where every request arrives that would leave this machine, and the environment that sends a program's there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {spelt: proxy for name in names for spelt in (name, name.lower())}
        yield listener, environment | {"NO_PROXY": "", "no_proxy": ""}


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_searched_for_garbage():
    """Every training ends with gc.collect(): to walk all that was imported would be half of a tiny one's time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """nanobind would report what is frozen as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_run_is_left():
    """A test that fails while a run of its own is going on takes it along."""
    yield
    if launched := sys.modules.get("launched"):
        launched.end_all()
