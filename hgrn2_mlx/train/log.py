"""What a run reports: one JSON object a line in a file, and a progress bar."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunLog:
    """The log of a run, as a context manager.

    Args:
        path: A JSONL file to continue; lines of steps after ``done`` are removed
            from it, as the run is about to write them again.
        done: Steps done so far.
        steps: Steps in all.
        silent: Whether to write and print nothing, as all processes but one.
    """

    def __init__(self, path: Path, done: int, steps: int, silent: bool = False):
        self.path = path
        self.silent = silent
        self.done = done
        console = Console(stderr=True, highlight=False, quiet=silent)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=silent or not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=done, figures="")

    def __enter__(self) -> "RunLog":
        if not self.silent:
            _forget_steps_after(self.path, self.done)
        self.file = open(os.devnull if self.silent else self.path, "a", encoding="utf-8")
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.file.close()

    def step(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        tokens_per_second: float,
        peak_memory: float,
    ) -> None:
        """Logs an update: loss in nats per token, peak memory in GB; steps count from 1."""
        self._write(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_second=tokens_per_second,
            peak_memory=peak_memory,
        )
        self.progress.update(
            self.task,
            completed=step,
            figures=f"loss {loss:.3f} · {tokens_per_second:,.0f} tokens/s · {peak_memory:.2f} GB",
        )

    def evaluation(self, step: int, validation_loss: float, sample: str | None) -> None:
        """Logs and prints an evaluation: the loss in nats per token and the text, if any."""
        self._write(step=step, validation_loss=validation_loss)
        self.say(f"step {step}: validation loss {validation_loss:.4f}")
        if sample is not None:
            self._write(step=step, sample=sample)
            self.say(sample + "\n")

    def say(self, line: str) -> None:
        """Prints above the progress bar."""
        self.progress.console.print(line, markup=False)

    def _write(self, **entry: Any) -> None:
        # Flushed, so that the log is never behind a checkpoint.
        print(json.dumps(entry), file=self.file, flush=True)


def _forget_steps_after(path: Path, done: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # The run was killed while it wrote its last line.
        if entry["step"] <= done:
            kept.append(line + "\n")
    shortened = path.with_suffix(".partial")
    shortened.write_text("".join(kept), encoding="utf-8")
    os.replace(shortened, path)
