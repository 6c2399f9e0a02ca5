"""What a user sees while a run trains, and the files that keep it.

`attach_progress` replaces transformers' own printing. The first rank then shows a row of a table per logging step over
a bar (elsewhere than on a terminal a line, whose form stays), an explanation where a pattern is easily misread
(report/hints.py), and writes into the folder
- metrics.jsonl: one record per training log and evaluation, the Trainer's figures with speed and memory;
- answers.jsonl: greedy answers to a few fixed prompts at every evaluation.
A resumed run first cuts both files back to the step that it resumes from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from preference.files import JsonLines, evaluation_sets
from preference.plan.speed import SpeedMeter, compute_dtype, flops_per_token, matmul_rate, peak_memory
from preference.report.hints import hints
from preference.report.step_table import StepTable, bar_line
from preference.report.tables import greedy_answers
from preference.screen import duration
from preference.terminal.console import terminal
from preference.terminal.language import tr
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
    titled: bool = False,
) -> Progress:
    """Show and keep the progress of `trainer`; call it on every rank, once the adapter is in place.

    Args:
        prompts: answered greedily at every evaluation during training; keys source, question and prompt_ids.
        stop_ids, max_new_tokens: where an answer ends.
        titled: say in the window's title how far the run is.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress(_speed_meter(trainer), trainer, JsonLines(output_dir, "metrics.jsonl"), titled)
    ours: list[TrainerCallback] = [progress]
    if prompts:  # ahead of the other, which takes its time out of the training time
        file = JsonLines(output_dir, "answers.jsonl")
        ours.insert(0, Answers(trainer, file, prompts, stop_ids, max_new_tokens))
    # Ahead of TensorBoard and its like, so that they get the speed as well.
    trainer.callback_handler.callbacks[:0] = ours
    return progress


def _speed_meter(trainer: Any) -> SpeedMeter:
    pairs = trainer.get_total_train_batch_size(trainer.args)
    if not isinstance(trainer, PairTrainer):  # the Trainer's count is of no use with TRL's batches
        return SpeedMeter(pairs, None, None, None)
    per_token = trainer.floating_point_ops({"num_tokens": 1})
    flops = flops_per_token(trainer.model, head=trainer.objective.needs_prompt)
    return SpeedMeter(pairs, 1 / per_token if per_token else None, flops, None, trainer.args.world_size)


class Progress(TrainerCallback):
    """The bar, the lines and metrics.jsonl; all of it on the first rank."""

    def __init__(self, meter: SpeedMeter, trainer: Any, file: JsonLines, titled: bool = False) -> None:
        self.meter, self.trainer, self.file = meter, trainer, file
        self.terminal, self.titled = terminal, titled
        self.table, self.latest, self.evaluated = StepTable(terminal), dict[str, Any](), 0
        self.explained: set[str] = set()
        self.trained = False
        self.first_step, self.began = 0, time.perf_counter()

    def measure_peak(self) -> None:
        """Once, on every rank: alone, the first would look faster than it is beside the others."""
        if self.meter.flops_per_token and self.meter.peak is None:
            self.meter.peak = matmul_rate(
                self.trainer.args.device, compute_dtype(self.trainer.args, self.trainer.model)
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure_peak()
        if not state.is_world_process_zero:
            return
        kept = self.file.begin(lambda record: 0 < record.get("step", 0) <= state.global_step)
        facts = {"event": "train_begin", "step": state.global_step, "max_steps": state.max_steps}
        self.file.append(facts | ({"peak_tflops": self.meter.peak / 1e12} if self.meter.peak else {}))
        before = max((record.get("seconds") or 0.0 for record in kept), default=0.0)
        self.meter.start(state.global_step, state.total_flos, before)
        self.first_step, self.began = state.global_step, time.perf_counter()
        self._draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.touch()
        if state.is_world_process_zero:
            self._draw(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        if state.is_world_process_zero and self.terminal.coloured:
            self.evaluated += 1
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else self.evaluated
            self.terminal.draw_bar(bar_line(self.terminal, tr("evaluation"), self.evaluated, total, ""))

    def _draw(self, state: Any) -> None:
        """The bar of the training, and the window's title."""
        if not self.terminal.coloured:
            return
        step, left = state.global_step, self._left(state)
        words = readable(self.latest, only=("loss", "preference/accuracies", "tokens_per_second"))
        words += [f"{duration(left)} {tr('left')}"] if step > self.first_step else []
        self.terminal.draw_bar(bar_line(self.terminal, "", step, state.max_steps, "  ".join(words)))
        if self.titled:
            self.terminal.title(f"{step}/{state.max_steps} {' '.join(words)}")

    def _left(self, state: Any) -> float:
        """Seconds, at the speed so far."""
        done = max(state.global_step - self.first_step, 1)
        return (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step)

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
            self.latest = logs
        self.evaluated = 0
        self.file.append({"step": state.global_step, "seconds": round(self.meter.seconds, 2), **logs})
        self._show(logs, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = True
        self.terminal.stop_bar()

    def _show(self, logs: Mapping[str, Any], state: Any) -> None:
        step = state.global_step
        if "loss" in logs:
            left = self._left(state)
            if self.terminal.coloured:
                self.table.row(f"{step}/{state.max_steps}", {**logs, "left": left})
            else:
                head = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"
                words = [head, f"epoch {logs.get('epoch', 0):.2f}", *readable(logs), f"{duration(left)} left"]
                self.terminal.say("  ".join(words))
        elif "train_runtime" in logs:
            self.terminal.say(tr("trained", steps=step - self.first_step, time=duration(logs["train_runtime"])))
        else:
            self._show_evaluations(logs, step)
        for name, text in hints(state.log_history, state.max_steps, each_entry=True):
            if name not in self.explained:
                self.explained.add(name)
                self.terminal.remark(tr("note"), text)

    def _show_evaluations(self, logs: Mapping[str, Any], step: int) -> None:
        for prefix in evaluation_sets(logs):
            name = prefix.replace("eval", tr("evaluation"), 1)
            if self.terminal.coloured and self.trained:
                continue  # the table of before and after says it
            if self.terminal.coloured:
                figures = {key: logs.get(f"{prefix}_{key}") for key in self.table.names}
                self.table.row(f"{tr('eval_row')} {step}", figures, held_out=prefix)
            else:
                self.terminal.say("  ".join([f"{tr('evaluation_at', name=name, step=step)}:", *readable(logs, prefix)]))


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
