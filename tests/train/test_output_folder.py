"""output_dir: one run at a time, no input, no finished result unless that is to be replaced; results come whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preference.files import LOGS, NEXT, log_file
from preference.integrity import MANIFEST, fault, write_manifest
from preference.train import checkpoints, output_folder
from preference.train.checkpoints import WRITING, publish_result, recover
from preference.train.output_folder import OutputError, claim, make_folder
from preference.train.run_record import write_run


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(output_folder, "WAIT", 0.1)


def claimed(folder: Path, **changes) -> None:
    """Claim and let go again."""
    options = {"inputs": {}, "train": True, "overwrite": False} | changes
    try:
        claim(folder, options.pop("inputs"), **options)
    finally:
        while output_folder._held:
            output_folder._held.popitem()[1].release()


HOLD = """
import sys, time
from pathlib import Path
from preference.train.output_folder import claim
claim(Path(sys.argv[1]), {}, train=True, overwrite=False)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_naming_the_first_until_that_is_killed(tmp_path, root):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(OutputError, match=f"another run is at work in {tmp_path}: process {first.pid} on "):
        claimed(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    claimed(tmp_path)


def test_an_input_is_no_output(tmp_path):
    model, file = tmp_path / "model", tmp_path / "data" / "rows.jsonl"
    model.mkdir()
    file.parent.mkdir()
    file.touch()
    for output, name in ((model, model), (tmp_path, model), (file.parent, file), (model, tmp_path / "data/../model")):
        with pytest.raises(OutputError, match="is or holds it .*, which is read: set another"):
            claimed(output, inputs={"it": str(name)}, overwrite=True)
    claimed(tmp_path / "out", inputs={"it": str(model), "other": "owner/name", "none": None})
    claimed(model / "out", inputs={"it": str(model)})


def test_what_lies_there_is_replaced_only_when_that_is_asked_for(tmp_path):
    claimed(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OutputError, match=r"a model that no run .* there \(model.safetensors\).*overwrite_outp"):
        claimed(tmp_path)
    claimed(tmp_path, overwrite=True)
    write_run(tmp_path, {"run": "r"}, finished=False)
    with pytest.raises(OutputError, match="an earlier result, which another run began to replace: .*overwrite_output_"):
        claimed(tmp_path)
    write_manifest(tmp_path, {"run": "r"})  # its own, whole but for the last word
    claimed(tmp_path)
    write_run(tmp_path, {"run": "r"}, finished=True)
    with pytest.raises(OutputError, match="a finished run: set another output_dir, or overwrite_output_dir=true"):
        claimed(tmp_path)


def test_scoring_replaces_no_figures_of_a_training(tmp_path):
    """They describe its model, which scoring leaves as it is: asked for or not."""
    for finished, what in ((False, "an unfinished run"), (True, "a finished run")):
        write_run(tmp_path, {"run": "r"}, finished=finished)
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=f"{what}, whose figures scoring would replace: set another"):
                claimed(tmp_path, train=False, overwrite=overwrite)


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), ("file/below", "Not a directory"), ("n" * 300, "File name too long")):
        with pytest.raises(OutputError, match=f"output_dir .*{words}"):
            make_folder(tmp_path / name)


def result(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True)
    for file in (f"{name}.safetensors", "tokenizer.json", "run.json"):
        (folder / file).write_text(f"{file} of {text}")
    write_manifest(folder, {})
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}


def test_a_result_replaces_another_whole_at_whatever_moment_it_dies(tmp_path, monkeypatch):
    """Death before any of its renames and deletions; the next start of a run in the folder ends what was begun.

    What the new run has logged meanwhile takes the place of the earlier logs with its model, and not before.
    """
    outcomes = []
    for moment in range(24):
        output = tmp_path / str(moment)
        publish_result(result(output / WRITING / "the model", "adapter_model", "one"), output)
        (output / "README.md").write_text("card of one")
        for name in LOGS:
            log_file(output, name).write_text("log of one")
        (output / NEXT).mkdir()
        for name in ("metrics.jsonl", "data_report.json"):  # this time no answers were written
            log_file(output, name).write_text("log of two")
        (output / "notes.txt").write_text("the user's")
        before, left = content(output), [moment]
        staged = result(output / WRITING / "the model", "model", "two")

        def dies(function, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink"):
                patch.setattr(Path, name, dies(getattr(Path, name)))
            try:
                publish_result(staged, output)
                done = True
            except KeyboardInterrupt:
                done = False
        recover(output)
        assert fault(output) is None and not (output / WRITING).exists()
        now = content(output)
        new = {f: f"{f} of two" for f in ("model.safetensors", "tokenizer.json", "run.json")}
        new |= {"notes.txt": "the user's", "metrics.jsonl": "log of two", "data_report.json": "log of two"}
        new["answers.jsonl"] = ""
        assert log_file(output, "metrics.jsonl").read_text() == "log of two"  # where the run goes on, done or not
        assert now in (before, new)
        outcomes.append((now == new, done))
    assert outcomes[0] == (False, False) and outcomes[1] == (True, False) and outcomes[-1] == (True, True)


def test_a_full_disk_leaves_the_earlier_result(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from accelerate import Accelerator

    publish_result(result(tmp_path / WRITING / "the model", "model", "one"), tmp_path)
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_total_limit=1)
    writer = checkpoints.CheckpointWriter(args, Accelerator(cpu=True))

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(checkpoints.CheckpointError, match="the model could not be written: OSError.*No space"):
        writer.write_result(save)
    assert fault(tmp_path) is None and not (tmp_path / WRITING).exists()


def test_a_run_does_not_write_among_its_data(tmp_path):
    """The files of the run would be read as data the next time."""
    (tmp_path / "rows").mkdir()
    for flag in ("train_file_dir", "validation_file_dir"):
        with pytest.raises(OutputError, match=f"lies in {flag} .*rows, which is read: set another"):
            claimed(tmp_path / "rows/run", inputs={flag: str(tmp_path / "rows")})
    claimed(tmp_path / "run", inputs={"train_file_dir": str(tmp_path / "rows")})
