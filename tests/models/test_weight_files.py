"""A folder's weights are one whole set of files, or it is said what lies there, in a dry run as in a run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from handed_in import make_plain, variant
from safetensors.torch import load_file, save_file

from preference.models.folder import ModelError
from preference.models.look import load_weights, look_on_paper
from preference.models.weight_files import weight_files
from tiny import tiny_model

OTHERS = {
    "model-Q4_K_M.gguf": "in GGUF, which llama.cpp reads",
    "adapter_model.safetensors": "of an adapter alone",
    "consolidated.00.pth": "in their makers' own layout",
    "model.pt": "torch's files of unknown layout",
    "model.fp16.safetensors": "by other names than model.safetensors",
    "tf_model.h5": "of TensorFlow",
    "pytorch_model_fsdp_0/__0_0.distcp": "an FSDP run's shards",
    "global_step20/mp_rank_00_model_states.pt": "a DeepSpeed run's shards",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("files") / "plain", num_hidden_layers=1)


def refused(folder, match):
    """By a run and a dry run alike."""
    for look in (lambda: load_weights(str(folder), dtype=torch.float32), lambda: look_on_paper(str(folder))):
        with pytest.raises(ModelError, match=match):
            look()


@pytest.mark.parametrize("file", OTHERS)
def test_what_lies_there_instead_is_said(plain, tmp_path, file):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"weights")
    refused(folder, f"has no weights that are read here; what lies there .* are weights {OTHERS[file]}")


def sharded(folder, tensors, shards):
    """`folder` with its weights in shards: names of tensors each; the index lists the first that has one."""
    names = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] + number * 0.01 for name in held}, folder / file, metadata={"format": "pt"})
        names = dict.fromkeys(held, file) | names
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards_are_one_set(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    names = sorted(tensors)
    folder = shutil.copytree(plain, tmp_path / "both")
    sharded(folder, tensors, (names[:5], names[5:]))
    refused(folder, "holds the weights twice, in model.safetensors and in what .* lists .model-00001-of-00002")
    (folder / "model.safetensors").unlink()
    assert len(weight_files(folder)) == 2 and look_on_paper(str(folder)) is not None
    sharded(folder, tensors, (names[:6], names[5:]))
    refused(folder, f"{names[5]} is in .*model-00001-of-00002.safetensors and in model-00002")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "lists 2 files, and 1 are missing .model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "index.json cannot be read: KeyError: 'weight_map'")


def test_an_index_that_lists_the_one_file_is_no_second_set(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    names = load_file(plain / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(folder) == [folder / "model.safetensors"]
    file = (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert weight_files(variant(tmp_path / "named", folder, transformers_weights=file.name)) == [
        tmp_path / "named" / file.name
    ]


def test_a_folder_of_torch_files_is_read(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    loaded = load_weights(str(tmp_path), dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
