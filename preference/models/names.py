"""What a model or a file is called where others read it."""

from __future__ import annotations

import json
from pathlib import Path

from preference.models.starter import ROOT


def public_name(name: str) -> str:
    """`name` without the folders of this machine: relative to the project or the working folder, or its last part.

    Model cards, adapters and exports travel; a home folder is nobody's business. Hub ids and relative paths stay.
    """
    path = Path(name).expanduser()
    if not path.is_absolute():
        return name
    for folder in (ROOT, Path.cwd()):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name


def strip_folders(folder: Path) -> None:
    """Leave no folder of this machine in what PEFT has written of an adapter: its config, and the blank of a card."""
    path = folder / "adapter_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = public_name(config.get("base_model_name_or_path") or "")
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (folder / "README.md").unlink(missing_ok=True)  # a run writes a card of its own once it has results
