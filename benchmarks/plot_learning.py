"""The curves of several runs in one picture, from their trainer_state.json.

python benchmarks/plot_learning.py outputs/packed outputs/trl --output docs/learning.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CURVES = (("loss", "loss"), ("rewards/accuracies", "preference accuracy"), ("rewards/margins", "reward margin"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders")
    parser.add_argument("--output", required=True, help="the PNG file to write")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 3.4), layout="constrained")
    for folder in args.folders:
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        steps = [entry for entry in history if "loss" in entry]
        for axis, (name, title) in zip(axes, CURVES, strict=True):
            axis.plot([entry["step"] for entry in steps], [entry[name] for entry in steps], label=folder.name)
            axis.set(title=title, xlabel="step")
    axes[0].legend()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
