"""The weight files of a local model: one whole set of those that transformers reads, or a sentence that says what lies
there instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from preference.models.folder import ANEW, CONFIG, ModelError, first_line, reading

SHOWN = 4  # names in a message
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # by transformers, the first that is there
# Weights in layouts of others, by what lies in the folder
OTHERS = (
    ("*.gguf", "in GGUF, which llama.cpp reads: take the model's folder in safetensors"),
    ("adapter_model.*", f"of an adapter alone, beside a {CONFIG}: take that away, or name the adapter's base"),
    ("*fsdp*/*.distcp", "an FSDP run's shards: accelerate merge-weights makes one model of them"),
    ("*.distcp", "an FSDP run's shards: accelerate merge-weights makes one model of them"),
    ("global_step*", "a DeepSpeed run's shards: zero_to_fp32.py, which lies beside them, makes one model of them"),
    ("consolidated*", "in their makers' own layout: take the same model in the layout of transformers"),
    ("*.pt", "torch's files of unknown layout: take the model in the layout of transformers"),
    ("*.pth", "torch's files of unknown layout: take the model in the layout of transformers"),
    ("*.safetensors", f"by other names than {SINGLE}, and no {INDEX} lists them: {ANEW}"),
    ("*.bin", f"by other names than pytorch_model.bin, and no index lists them: {ANEW}"),
    ("*.h5", "of TensorFlow: take the same model in safetensors"),
    ("*.msgpack", "of Flax: take the same model in safetensors"),
    ("*.onnx", "in ONNX: take the same model in safetensors"),
)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of `folder` from.

    Raises:
        ModelError: there are none, or not all, or two sets of them.
    """
    names = _named_in_config(folder) or READ
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(_what_lies_there(folder))
    if found.name.endswith(".index.json"):
        return _shards(found)
    if found.name == SINGLE and (folder / INDEX).is_file():
        others = [file.name for file in _shards(folder / INDEX) if file != found]
        if others:
            raise ModelError(
                f"{folder} holds the weights twice, in {SINGLE} and in what {INDEX} lists ({some(others)}): take those "
                "away that are not meant, with the index if it is the shards"
            )
    return [found]


def _named_in_config(folder: Path) -> tuple[str, ...]:
    with reading(f"{CONFIG} of {folder}", ANEW):
        file = folder / CONFIG
        name = json.loads(file.read_text(encoding="utf-8")).get("transformers_weights") if file.is_file() else None
    return (str(name),) if name else ()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}: {ANEW}") from error
    gone = [file.name for file in files if not file.is_file()]
    if gone or not files:
        raise ModelError(f"{index} lists {len(files)} files, and {len(gone)} are missing ({some(gone)}): {ANEW}")
    _check_once(files)
    return files


def _check_once(files: list[Path]) -> None:
    """Refuse a tensor that two files hold: transformers takes the one that it reads last."""
    holder: dict[str, Path] = {}
    for file in files if files[0].suffix == ".safetensors" else ():
        for name in tensor_headers(file):
            if (first := holder.setdefault(name, file)) != file:
                raise ModelError(f"{name} is in {first} and in {file.name}, and a tensor is to be in one file: {ANEW}")


def _what_lies_there(folder: Path) -> str:
    for pattern, what in OTHERS:
        if there := sorted(file.name for file in folder.glob(pattern)):
            return f"{folder} has no weights that are read here; what lies there ({some(there)}) are weights {what}"
    return (
        f"{folder} has lost its weights: neither {SINGLE} nor another file of weights lies beside its {CONFIG}: {ANEW}"
    )


def tensor_headers(file: Path) -> dict[str, tuple[str, list[int]]]:
    """(type, shape) of every tensor of a safetensors file, by name, from its header.

    Raises:
        ModelError: the file is no safetensors file, or cut off.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, 1 << 28)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = file.stat().st_size == 8 + size + max(ends, default=0)
        found = {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"}
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): change its permissions, or get it anew") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, IndexError) as error:
        raise ModelError(f"{file} is no safetensors file ({first_line(error)}): get it anew") from error
    if not whole:
        raise ModelError(f"{file} is cut off or damaged, its size is not what its header says: get it anew")
    return found


def some(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
