"""The model card of an exported model: the run's own, and what this copy of it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preference.models.folder import reading
from preference.models.starter import ROOT, STARTER_MODEL
from preference.serve.loading import Source
from preference.serve.merging import Difference

_STARTER_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Copy:
    """What was done to a model when it was exported: merged, rounded to `dtype`, its linear layers compressed (to what,
    in words), each with the change that was measured; `files` are those besides the checkpoint (GGUF)."""

    dtype: str
    merged: Difference | None
    rounded: Difference | None
    compressed: tuple[str, Difference] | None
    files: Sequence[str]


def export_card(source: Source, copy: Copy, output: str) -> str:
    """README.md of the exported folder."""
    front, body = _split(_card(source))
    head = _front_matter(source, front)
    if not body:
        body = f"# {Path(output).name}\n\nA copy of {Path(source.name).name} for serving.\n"
    return "\n".join(
        [
            head,
            body.rstrip(),
            "",
            *_data(source),
            *(_results(source) if "## Evaluation" not in body else []),
            *_copy(source, copy),
        ]
    )


def check_described(source: Source) -> None:
    """Before the work: whether what a run says of itself can be read. Raises ModelError."""
    for name, read in (("README.md", _card), ("data_report.json", _data), ("all_results.json", _results)):
        with reading(f"{name} of {source.name}", "delete it to export without it, or get it anew"):
            read(source)


def _card(source: Source) -> str:
    path = source.file("README.md") if source.run else None  # without a run it is the base model's or PEFT's blank form
    return path.read_text(encoding="utf-8") if path else ""


def _split(text: str) -> tuple[str, str]:
    match = re.match(r"---\n(.*?)\n---\n+(.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("", text)


def _front_matter(source: Source, front: str) -> str:
    """The run's metadata for a plain model. A base_model that is no hub id would be refused by the hub: left out."""
    kept = [line for line in front.splitlines() if not re.match(r"(base_model|library_name|pipeline_tag):", line)]
    base = hub_id(source.base)
    lines = [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join(["---", *lines, "library_name: transformers", "pipeline_tag: text-generation", *kept, "---", ""])


def hub_id(base: str | None) -> str | None:
    """The hub id of a base model; None for one that lies in a folder of this machine."""
    if base in (STARTER_MODEL, str(ROOT / STARTER_MODEL)):
        return _STARTER_ID
    if base is None or Path(base).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        return None
    return base


def _json(source: Source, name: str) -> Mapping[str, Any]:
    path = source.file(name)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _data(source: Source) -> list[str]:
    report = _json(source, "data_report.json")
    if not report:
        return []
    dropped = ", ".join(f"{count} {reason}" for reason, count in report.get("dropped", {}).items())
    lines = [f"{report.get('rows_read', 0)} rows read, {report.get('rows_kept', 0)} kept."]
    lines += [f"Left out: {dropped}."] if dropped else []
    lines += ["", "| file | rows | kept |", "|---|---|---|"] if report.get("files") else []
    for file, counts in report.get("files", {}).items():
        name = Path(file).name if Path(file).is_absolute() else file  # a home folder is nobody's business
        lines.append(f"| {name} | {counts['rows_read']} | {counts['rows_kept']} |")
    return ["## Data", "", *lines, ""]


def _results(source: Source) -> list[str]:
    results = _json(source, "all_results.json")
    rows = [f"| {name} | {value:.6g} |" for name, value in results.items() if isinstance(value, (int, float))]
    return ["## Results", "", "| metric | value |", "|---|---|", *rows, ""] if rows else []


def _copy(source: Source, copy: Copy) -> list[str]:
    merged, files = copy.merged, copy.files
    lines = ["## This copy", ""]
    if merged:
        lines.append(
            f"- The LoRA adapter is merged into the weights; logits differ by {merged.logits:.1e} at most, "
            f"{merged.share:.0e} of the largest (both computed in {merged.computed_in})."
        )
    if source.arguments.get("qlora") or source.arguments.get("load_in_4bit"):
        lines.append("- The adapter was trained over 4-bit weights and is merged into the unquantized ones.")
    if copy.rounded:
        lines.append(
            f"- Weights are {copy.dtype}; rounding them changes next-token distributions by {_nats(copy.rounded)}."
        )
    else:
        lines.append(f"- Weights are {copy.dtype}, as trained.")
    if copy.compressed:
        words, change = copy.compressed
        lines.append(
            f"- Linear layers but the output head are compressed ({words}; format compressed-tensors, which vLLM and "
            f"SGLang read, and transformers with that package); that changes them by {_nats(change)} more."
        )
    lines += [f"- `{name}` holds the same model for llama.cpp and Ollama (`Modelfile`)." for name in files]
    lines += [
        "- Answers end at the tokens in generation_config.json; the chat template is the one trained with.",
        "",
        "```sh",
        *(["sh serve.sh          # llama.cpp's server", "sh serve.sh ollama"] if files else []),
        "sh serve.sh vllm     # or sglang",
        "```",
        "",
    ]
    return lines


def _nats(change: Difference) -> str:
    return f"{change.kl:.1e} nats a token (mean KL divergence over three answers)"
