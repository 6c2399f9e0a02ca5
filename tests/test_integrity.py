"""What a name leads to is on the disk before it has the name: a crash of the machine leaves no half file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from preference import integrity
from preference.integrity import MANIFEST, fault, write_checked, write_manifest, write_sealed


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, name) of every flush and every renaming, in their order."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        seen.append(("flushed", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        seen.append(("renamed", path.name))
        return replace(path, target)

    monkeypatch.setattr(integrity.os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_flushed_before_they_are_renamed_and_their_folder_after(tmp_path, events):
    for write, content in ((write_checked, b"x"), (write_sealed, {"a": 1})):
        events.clear()
        write(tmp_path / "file", content)
        part = f".file.{os.getpid()}.part"
        assert events == [("flushed", part), ("renamed", part), ("flushed", tmp_path.name)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_folder_is_flushed_before_its_manifest_says_that_it_is_whole(tmp_path, events):
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    manifest = events.index(("flushed", f".{MANIFEST}.{os.getpid()}.part"))
    assert {name for what, name in events[:manifest] if what == "flushed"} == {"a", "b", "below"}
    assert fault(tmp_path) is None
