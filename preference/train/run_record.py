"""run_identity.json: the run that an output_dir belongs to, and whether that is finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preference.integrity import Damaged, read_manifest, read_sealed, write_sealed
from preference.train.checkpoints import checkpoint_folders

RUN_FILE = "run_identity.json"
FACTS = ("run", "identity", "launch")  # what a checkpoint's manifest says of its run as well


def read_run(output_dir: Path) -> tuple[dict[str, Any], str | None]:
    """(what is known of the run in output_dir, {} for nothing; a warning where its file cannot be relied on).

    A checkpoint's manifest says the same of its run, so that a damaged file loses no training.
    """
    try:
        return read_sealed(output_dir / RUN_FILE), None
    except FileNotFoundError:
        return {}, None
    except (OSError, Damaged) as damage:
        manifests = filter(None, map(read_manifest, checkpoint_folders(output_dir)))
        known = next((manifest for manifest in manifests if "run" in manifest), {})
        warning = f"warning: {output_dir / RUN_FILE} is passed over: {damage}"
        if known:
            warning += "; its latest checkpoint says which run it is"
        return {name: known[name] for name in FACTS if name in known}, warning


def write_run(output_dir: Path, run: Mapping[str, Any], *, finished: bool) -> None:
    write_sealed(output_dir / RUN_FILE, {**run, "finished": finished})
