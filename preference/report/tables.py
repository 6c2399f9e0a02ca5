"""What a run did to the model: metrics before and after, answers side by side, and the folder that it leaves."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from preference.models.names import public_name

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
    ("eval_logps/chosen", "log-probability of chosen", "{:+.3f}", None),
    ("eval_logps/rejected", "log-probability of rejected", "{:+.3f}", None),
)

MEANINGS = {
    "preference accuracy": "pairs whose chosen answer has the higher log-probability per token (a tie is half a pair)",
    "margin per token": "by how much it is higher, in nats",
    "reward accuracy": "pairs whose chosen answer has the higher reward, as the loss defines it (a tie is half a pair)",
    "reward margin": "by how much that is higher, beta included",
}


def _reward_is_scaled(prefix: str, *results: Mapping[str, float]) -> bool:
    """Whether the rewards are log-probabilities per token times a constant, so that they say nothing of their own."""
    names = (f"{prefix}_preference/margins", f"{prefix}_rewards/margins")
    found = [tuple(figures[name] for name in names) for figures in results if all(name in figures for name in names)]
    ratios = [reward / margin for margin, reward in found if margin]
    return len(ratios) == len(results) and all(math.isclose(r, ratios[0], rel_tol=1e-4) and r for r in ratios)


def comparison(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """A table of evaluation metrics, before -> after (after alone where there is no before); several sets in turn.

    Below it stands what its accuracies and margins mean. Rewards that are the margin per token times beta (orpo, simpo)
    have no lines of their own.
    """
    prefixes = sorted(
        {key[: -len("_loss")] for key in after if key.endswith("_loss") and not key.endswith("_nll_loss")}
    )
    lines: list[str] = []
    shown: set[str] = set()
    for prefix in prefixes:
        title = "evaluation" if prefix == "eval" else prefix.removeprefix("eval_")
        lines.append(f"{title:<32}{'before':>12}{'after':>12}{'change':>12}" if before else title)
        scaled = _reward_is_scaled(prefix, *filter(None, (before, after)))
        for key, label, form, better in ROWS:
            name = prefix + key.removeprefix("eval")
            if name not in after or (scaled and "rewards/" in name):
                continue
            shown.add(label)
            old, new = before.get(name), after[name]
            if old is None:
                lines.append(f"{label:<32}{form.format(new):>12}")
                continue
            change = f"{(new - old) * 100:+.1f} pts" if "%" in form else f"{new - old:+.4f}"
            mark = "" if better is None or new == old else "  better" if (new > old) == better else "  worse"
            lines.append(f"{label:<32}{form.format(old):>12}{form.format(new):>12}{change:>12}{mark}")
    lines += [f"({label}: {meaning})" for label, meaning in MEANINGS.items() if label in shown]
    return "\n".join(lines)


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
    columns = [[name, "-" * min(column, _width(name)), *_wrap(text, column)] for name, text in answers.items()]
    height = max(map(len, columns))
    body = [" | ".join(_pad(c[i] if i < len(c) else "", column) for c in columns).rstrip() for i in range(height)]
    return "\n".join(["> " + line for line in _wrap(question, width - 2)] + body)


def _width(text: str) -> int:
    """Columns of a terminal: East Asian characters take two."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, columns: int) -> str:
    return text + " " * (columns - _width(text))


def _wrap(text: str, columns: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        if _width(paragraph) == len(paragraph):
            lines += textwrap.wrap(paragraph, columns, break_on_hyphens=False) or [""]
            continue
        line = ""
        for char in paragraph:  # scripts without spaces break anywhere
            if _width(line + char) > columns:
                lines.append(line)
                line = ""
            line += char
        lines.append(line)
    return lines


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
