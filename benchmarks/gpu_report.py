"""What gpu_campaign.sh checks and shows: curves, engines that agree, and one table of all JSON files of a folder.

    python benchmarks/gpu_report.py curve RUN [--json OUT]         its losses are finite
    python benchmarks/gpu_report.py same RUN OTHER --within 0.02   their losses agree
    python benchmarks/gpu_report.py engines FILE                   the engines of bench_engines.py agree
    python benchmarks/gpu_report.py table FOLDER                   the table; writes FOLDER/campaign.json

Exit status 1 and a line with WRONG where a number is wrong rather than slow.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

GRADIENTS = 0.05  # by which two engines' gradients may differ in bfloat16
LOSSES = 0.02


class Wrong(SystemExit):
    def __init__(self, text: str) -> None:
        super().__init__(f"WRONG: {text}")


def losses(run: str) -> dict[int, float]:
    """Step -> loss of a run's folder."""
    history = json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def curve(run: str) -> dict[int, float]:
    found = losses(run)
    if len(found) < 2 or not all(map(math.isfinite, found.values())):
        raise Wrong(f"the losses of {run} are {list(found.values())}")
    return found


def same(run: str, other: str, within: float) -> float:
    """The largest relative difference of the losses of steps that both have."""
    a, b = curve(run), curve(other)
    steps = sorted(set(a) & set(b))
    if not steps or max(a) != max(b):
        raise Wrong(f"{run} has steps {sorted(a)} and {other} {sorted(b)}")
    worst = max(abs(a[step] - b[step]) / abs(a[step]) for step in steps)
    if not worst <= within:
        raise Wrong(f"the losses of {run} and {other} differ by {worst:.2g}, over {within:g}")
    return worst


def engines(file: str) -> None:
    result = json.loads(Path(file).read_text())
    rows = list(result["engines"].values())
    first = rows[0]["losses"]
    for row in rows:
        if not all(map(math.isfinite, row["losses"])):
            raise Wrong(f"losses {row['losses']} in {file}")
        off = max(abs(x - y) / abs(x) for x, y in zip(first, row["losses"], strict=True))
        if off > LOSSES:
            raise Wrong(f"the losses of two engines differ by {off:.2g} in {file}")
    if result.get("grad_rel_err", 0.0) > GRADIENTS:
        raise Wrong(f"the gradients of two engines differ by {result['grad_rel_err']:.2g} in {file}")


def rows_of(name: str, found: Any) -> list[list[str]]:
    """What the table says of a JSON file: name, milliseconds, MFU, GB, GB that were said, the rest."""
    if "engines" in found:
        more = (
            f"x{found['speedup']:.2f} of its first engine, memory x{found['memory_ratio']:.2f}"
            if "speedup" in found
            else ""
        )
        return [
            [f"{name} {engine}", f"{1e3 * row['seconds_per_step']:.1f}", f"{row['matmul_share']:.1%}",
             f"{row['peak_memory_bytes'] / 1e9:.2f}", "", f"{row['useful_tokens_per_second']:,.0f} tokens/s {more}"]
            for engine, row in found["engines"].items()
        ]  # fmt: skip
    if "host_ms" in found:
        return [[name, f"{found['ms']:.1f}", f"{found['mfu_of_h100']:.1%}", f"{found['peak_gb']:.2f}",
                 f"{found['estimated_peak_gb']:.2f}",
                 f"{found['tokens']:,} tokens, host {found['host_ms']:.1f} ms, waits {found['waits']}"]]  # fmt: skip
    return [[name, "", "", "", "", ", ".join(f"{key} {value}" for key, value in found.items())]]


def table(folder: str) -> str:
    files = sorted(path for path in Path(folder).glob("*.json") if path.name != "campaign.json")
    found = {path.stem: json.loads(path.read_text()) for path in files}
    if not found:
        raise SystemExit(f"{folder} holds no JSON of a campaign")
    (Path(folder) / "campaign.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [["", "ms", "MFU", "GB", "said", ""], *(row for name, one in found.items() for row in rows_of(name, one))]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "same", "engines", "table"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--within", type=float, default=LOSSES)
    parser.add_argument("--json", help="write what was found to this file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.what == "curve":
        values = list(curve(args.paths[0]).values())
        found = {"first loss": values[0], "last loss": values[-1]}
    elif args.what == "same":
        found = {"losses differ by": same(args.paths[0], args.paths[1], args.within)}
    elif args.what == "engines":
        engines(args.paths[0])
    else:
        print(table(args.paths[0]))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
