"""What a user sees while a run trains, and the files that keep it.

`attach_progress` replaces transformers' own printing. The first rank then shows a bar on a terminal, a readable line
per logging step, an explanation where a pattern is easily misread (report/hints.py), and writes into the folder
- metrics.jsonl: one record per training log and evaluation, the Trainer's figures with speed and memory;
- answers.jsonl: greedy answers to a few fixed prompts at every evaluation.
A resumed run first cuts both files back to the step that it resumes from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from preference.files import JsonLines, evaluation_sets
from preference.plan.speed import SpeedMeter, compute_dtype, flops_per_token, matmul_rate, peak_memory
from preference.report.hints import hints
from preference.report.tables import greedy_answers
from preference.screen import duration, shown
from preference.train.sharding import takes_all_ranks
from preference.train.trainer import PairTrainer

# metric, its name and format in a line
SHOWN = (
    ("loss", "loss {:.4f}"),
    ("nll_loss", "nll {:.4f}"),
    ("preference/accuracies", "accuracy {:.0%}"),
    ("rewards/margins", "margin {:+.4f}"),
    ("grad_norm", "grad {:.2f}"),
    ("learning_rate", "lr {:.1e}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("pairs_per_second", "{:.2f} pairs/s"),
    ("mfu", "MFU {:.0%}"),
    ("memory_gib", "{:.1f} GiB"),
)


def attach_progress(
    trainer: Any,
    output_dir: str | Path,
    *,
    prompts: Sequence[Mapping[str, Any]] = (),
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 128,
) -> None:
    """Show and keep the progress of `trainer`; call it on every rank, once the adapter is in place.

    Args:
        prompts: answered greedily at every evaluation during training; keys source, question and prompt_ids.
        stop_ids, max_new_tokens: where an answer ends.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress(_speed_meter(trainer), trainer, JsonLines(Path(output_dir) / "metrics.jsonl"))
    ours: list[TrainerCallback] = [progress]
    if prompts:  # ahead of the other, which takes its time out of the training time
        file = JsonLines(Path(output_dir) / "answers.jsonl")
        ours.insert(0, Answers(trainer, file, prompts, stop_ids, max_new_tokens))
    # Ahead of TensorBoard and its like, so that they get the speed as well.
    trainer.callback_handler.callbacks[:0] = ours


def _speed_meter(trainer: Any) -> SpeedMeter:
    pairs = trainer.get_total_train_batch_size(trainer.args)
    if not isinstance(trainer, PairTrainer):  # the Trainer's count is of no use with TRL's batches
        return SpeedMeter(pairs, None, None, None)
    per_token = trainer.floating_point_ops({"num_tokens": 1})
    flops = flops_per_token(trainer.model, head=trainer.objective.needs_prompt)
    return SpeedMeter(pairs, 1 / per_token if per_token else None, flops, None, trainer.args.world_size)


class Progress(TrainerCallback):
    """The bar, the lines and metrics.jsonl; all of it on the first rank."""

    def __init__(self, meter: SpeedMeter, trainer: Any, file: JsonLines) -> None:
        self.meter, self.trainer, self.file = meter, trainer, file
        self.bar: tqdm | None = None
        self.evaluation_bar: tqdm | None = None
        self.explained: set[str] = set()
        self.first_step, self.began = 0, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter.flops_per_token:  # every rank: alone, the first would look faster than it is beside the others
            self.meter.peak = matmul_rate(args.device, compute_dtype(args, self.trainer.model))
        if not state.is_world_process_zero:
            return
        kept = self.file.begin(lambda record: 0 < record.get("step", 0) <= state.global_step)
        if self.meter.peak:
            facts = {"event": "train_begin", "step": state.global_step, "peak_tflops": self.meter.peak / 1e12}
            self.file.append(facts)
        before = max((record.get("seconds") or 0.0 for record in kept), default=0.0)
        self.meter.start(state.global_step, state.total_flos, before)
        self.first_step, self.began = state.global_step, time.perf_counter()
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.touch()
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        if not state.is_world_process_zero or not sys.stderr.isatty() or args.disable_tqdm:
            return
        if self.evaluation_bar is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.evaluation_bar = tqdm(total=total, desc="evaluation", leave=False, dynamic_ncols=True)
        self.evaluation_bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.skip()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.skip()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            logs.update(self.meter.read(state.global_step, state.total_flos))
            memory = peak_memory(args.device)
            logs.update({} if memory is None else {"memory_gib": memory})
            self._postfix(logs)
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
            self.evaluation_bar = None
        self.file.append({"step": state.global_step, "seconds": round(self.meter.seconds, 2), **logs})
        for line in self._lines(logs, state):
            self.say(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(shown(line))
        else:
            print(shown(line), flush=True)

    def _postfix(self, logs: Mapping[str, Any]) -> None:
        if self.bar is not None:
            short = ("loss", "preference/accuracies", "tokens_per_second", "mfu")
            self.bar.set_postfix_str(", ".join(readable(logs, only=short)), refresh=False)

    def _lines(self, logs: Mapping[str, Any], state: Any) -> list[str]:
        step = state.global_step
        if "loss" in logs:
            head = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"
            left = (time.perf_counter() - self.began) / max(step - self.first_step, 1) * (state.max_steps - step)
            lines = ["  ".join([head, f"epoch {logs.get('epoch', 0):.2f}", *readable(logs), f"{duration(left)} left"])]
        elif "train_runtime" in logs:
            lines = [f"trained {step - self.first_step} steps in {duration(logs['train_runtime'])}"]
        else:
            lines = [
                "  ".join([f"{prefix.replace('eval', 'evaluation', 1)} at step {step}:", *readable(logs, prefix)])
                for prefix in evaluation_sets(logs)
            ]
        for name, text in hints(state.log_history, state.max_steps):
            if name not in self.explained:
                self.explained.add(name)
                lines.append(f"note: {text}")
        return lines


class Answers(TrainerCallback):
    """Greedy answers to fixed prompts at every evaluation during training, in answers.jsonl."""

    def __init__(
        self,
        trainer: Any,
        file: JsonLines,
        prompts: Sequence[Mapping[str, Any]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self.trainer, self.file, self.prompts = trainer, file, prompts
        self.stop_ids, self.max_new_tokens = stop_ids, max_new_tokens
        self.answered: int | None = None  # the step whose answers are written; None: not training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.answered = state.global_step
        if state.is_world_process_zero:
            self.file.begin(lambda record: 0 < record.get("step", 0) <= state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.answered = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.answered is None or self.answered == state.global_step:  # once a step, however many evaluation sets
            return
        self.answered = state.global_step
        if not (state.is_world_process_zero or takes_all_ranks(self.trainer)):
            return
        ids = [prompt["prompt_ids"] for prompt in self.prompts]
        tokenizer = self.trainer.processing_class
        answers = greedy_answers(self.trainer.model, tokenizer, ids, self.stop_ids, self.max_new_tokens)
        if state.is_world_process_zero:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                record = {"step": state.global_step, "source": prompt["source"], "question": prompt["question"]}
                self.file.append(record | {"answer": answer})


def readable(logs: Mapping[str, Any], prefix: str = "", only: Sequence[str] = ()) -> list[str]:
    """The metrics of a log that a user follows, each as a few words."""
    values = {name: logs.get(f"{prefix}_{name}" if prefix else name) for name, _ in SHOWN}
    return [form.format(values[name]) for name, form in SHOWN if values[name] is not None and name in (only or values)]
