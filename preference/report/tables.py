"""What a run did to the model: metrics before and after, answers side by side, and the folder that it leaves."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from transformers import PreTrainedTokenizerBase

from preference.models.names import public_name
from preference.screen import padded_left, shown, wrapped
from preference.terminal.language import tr

HALF = (torch.float16, torch.bfloat16)
# metric, its name in the table, its format, whether more is better (None: neither)
ROWS = (
    ("eval_loss", "loss", "{:.4f}", False),
    ("eval_nll_loss", "NLL of chosen", "{:.4f}", False),
    ("eval_preference/accuracies", "preference accuracy", "{:.1%}", True),
    ("eval_preference/margins", "margin per token", "{:+.4f}", True),
    ("eval_log_odds_chosen", "log odds, chosen over rejected", "{:+.4f}", True),
    ("eval_rewards/accuracies", "reward accuracy", "{:.1%}", True),
    ("eval_rewards/margins", "reward margin", "{:+.4f}", True),
    ("eval_kl", "KL estimate", "{:.4f}", None),
    ("eval_logps/chosen", "log-probability of chosen", "{:+.3f}", None),
    ("eval_logps/rejected", "log-probability of rejected", "{:+.3f}", None),
)

MEANINGS = ("preference accuracy", "margin per token", "reward accuracy", "reward margin", "KL estimate")


def _reward_is_scaled(prefix: str, *results: Mapping[str, float]) -> bool:
    """Whether the rewards are log-probabilities per token times a constant, so that they say nothing of their own."""
    names = (f"{prefix}_preference/margins", f"{prefix}_rewards/margins")
    found = [tuple(figures[name] for name in names) for figures in results if all(name in figures for name in names)]
    ratios = [reward / margin for margin, reward in found if margin]
    return len(ratios) == len(results) and all(math.isclose(r, ratios[0], rel_tol=1e-4) and r for r in ratios)


@dataclass(frozen=True)
class Compared:
    """A metric before and after, as it is written.

    Attributes:
        label: its name in English. better: whether the change is (None: neither, or there is none).
        interval: 95%, of the change; "" where single pairs have no figures. significant: whether that leaves out 0.
    """

    label: str
    before: str
    after: str
    change: str = ""
    better: bool | None = None
    interval: str = ""
    significant: bool = True


def compared(
    before: Mapping[str, float], after: Mapping[str, float], changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[tuple[str, list[Compared]]]:
    """(evaluation set, its metrics). `changes` are those of `paired_changes`, which belong to the only set.

    Rewards that are the margin per token times beta (orpo, simpo) are left out.
    """
    prefixes = {key[: -len("_loss")] for key in after if key.endswith("_loss") and not key.endswith("_nll_loss")}
    for prefix in sorted(prefixes):
        scaled, rows = _reward_is_scaled(prefix, *filter(None, (before, after))), []
        for key, label, form, better in ROWS:
            name = prefix + key.removeprefix("eval")
            if name not in after or (scaled and "rewards/" in name):
                continue
            old, new = before.get(name), after[name]
            if old is None:
                rows.append(Compared(label, "", form.format(new)))
                continue
            change = f"{(new - old) * 100:+.1f} pts" if "%" in form else f"{new - old:+.4f}"
            found = (changes or {}).get(name.removeprefix("eval_"), {}) if prefix == "eval" else {}
            scale, digits = (100, 0) if "%" in form else (1, 2)
            ends = [f"{value * scale:+.{digits}f}" for value in found.get("interval", ())]
            good = None if better is None or new == old else (new > old) == better
            told = " to ".join(ends)
            rows.append(
                Compared(label, form.format(old), form.format(new), change, good, told, found.get("significant", True))
            )
        yield ("evaluation" if prefix == "eval" else prefix.removeprefix("eval_")), rows


def comparison(
    before: Mapping[str, float], after: Mapping[str, float], changes: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """`compared` as plain lines; below them stands what accuracies and margins mean."""
    lines: list[str] = []
    labels: set[str] = set()
    for title, rows in compared(before, after, changes):
        title = tr("metric") if title == "evaluation" else title
        heads = (tr("before"), tr("after"), tr("change")) if before else ()
        lines.append(_pad(title, 32) + "".join(padded_left(head, 12) for head in heads))
        for row in rows:
            labels.add(row.label)
            cells = (row.before, row.after, row.change) if row.before else (row.after,)
            verdict = verdict_of(row)
            told = f"  {verdict}" if verdict else ""
            told += f"  ({row.interval})" if row.interval else ""
            lines.append(_pad(tr(row.label), 32) + "".join(f"{cell:>12}" for cell in cells) + told)
    lines += [f"({tr(label)}: {tr(f'means {label}')})" for label in MEANINGS if label in labels]
    return "\n".join(lines)


def verdict_of(row: Compared) -> str:
    """Whether it got better, in a word of the language that is spoken."""
    if row.better is None:
        return ""
    return tr("better" if row.better else "worse") if row.significant else tr("unsure")


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """The model's most likely answer to each prompt (a list of token ids), without its stop token."""
    training = model.training
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        with _one_type(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=list(stop_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = out[0, len(prompt) :].tolist()
        if answer and answer[-1] in stop_ids:
            answer.pop()
        # the end may lie inside a character of several tokens, which is then no text yet
        answers.append(tokenizer.decode(answer, skip_special_tokens=False).rstrip("\ufffd").strip())
    model.train(training)
    return answers


def _one_type(model: Any) -> AbstractContextManager[Any]:
    """Autocast, where layers that are trained whole in float32 stand among frozen ones in 16 bits: a forward pass of
    training has it, but generation goes past that.
    """
    halves = [p.dtype for p in model.parameters() if not p.requires_grad and p.dtype in HALF]
    whole = any(p.requires_grad and "lora_" not in name for name, p in model.named_parameters())
    return torch.autocast(model.device.type, halves[0]) if halves and whole else contextlib.nullcontext()


def side_by_side(question: str, answers: Mapping[str, str], width: int | None = None) -> str:
    """A question and the answers of several models in columns, for a terminal."""
    width = width or min(160, shutil.get_terminal_size((120, 24)).columns)
    column = (width - 3 * (len(answers) - 1)) // len(answers)
    columns = [[name, "-" * min(column, cell_len(name)), *_wrap(text, column)] for name, text in answers.items()]
    height = max(map(len, columns))
    body = [" | ".join(_pad(c[i] if i < len(c) else "", column) for c in columns).rstrip() for i in range(height)]
    return "\n".join(["> " + line for line in _wrap(question, width - 2)] + body)


def _pad(text: str, columns: int) -> str:
    return text + " " * (columns - cell_len(text))


def _wrap(text: str, columns: int) -> list[str]:
    """Lines as a terminal shows them: what acts on one takes the room of the picture that stands for it."""
    return [line for paragraph in text.splitlines() or [""] for line in wrapped(shown(paragraph), columns)]


def model_card(base_model: str, facts: Mapping[str, Any], results: Mapping[str, float], table: str) -> str:
    """A README.md for the saved folder, in the Hub's form: metadata, then what was trained on what and how well.

    `facts` is what run.json holds, `results` what the training returned.
    """
    flags = facts["arguments"]
    loss, adapter = flags["loss"], flags["use_peft"]
    weights = f"LoRA adapter, rank {flags['lora_rank']}" if adapter else "all weights"
    base_model = public_name(base_model)
    data = flags["dataset_name"] or public_name(flags["train_file_dir"])
    head = {"base_model": base_model, "library_name": "peft" if adapter else "transformers"}
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items())]
    lines += ["tags:", "- preference-tuning", f"- {loss}", "---", ""]
    lines += [f"# {Path(base_model).name}, tuned with {loss.upper()}", ""]
    lines += [
        f"- **Weights**: {weights}, {facts['trainable']:,} of {facts['parameters']:,} parameters trained",
        f"- **Objective**: {loss}, beta {facts['beta']:g}"
        + (f", NLL over {flags['nll_scope'] or 'sequence'}" if loss == "orpo" else ""),
        f"- **Data**: {data}; at most {flags['max_source_length'] + flags['max_target_length']} tokens a row",
        f"- **Steps**: {results.get('train_steps', 0):.0f} of {facts['pairs_per_step']} pairs, "
        f"peak learning rate {facts['learning_rate']:g} ({flags['lr_scheduler_type']}), seed {flags['seed']}",
        f"- **Prompt format**: {facts['template']}, saved as the tokenizer's chat template",
        f"- **Made with**: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}",
        "",
    ]
    if table:
        lines += ["## Evaluation", "", "```", table, "```", ""]
    lines += ["Answers can be wrong; do not take them as medical, legal or financial advice.", ""]
    return "\n".join(lines)
