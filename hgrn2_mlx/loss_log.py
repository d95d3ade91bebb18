"""The losses of a fine-tuning run: a line of JSON for each report, and a picture of them."""

import json
from pathlib import Path
from typing import Any

from mlx_lm.cli_ui import make_console
from mlx_lm.tuner.callbacks import TrainingCallback


class LossLog(TrainingCallback):
    """Appends what mlx-lm's trainer reports to a file, one JSON object a line.

    Keys are mlx-lm's: ``iteration`` with ``train_loss`` (nats per token),
    ``learning_rate``, ``iterations_per_second``, ``tokens_per_second``,
    ``trained_tokens`` and ``peak_memory`` (GB), or with ``val_loss`` and
    ``val_time`` (seconds). Peak memory, which mlx-lm reports but does not show,
    is printed as it grows.

    Args:
        path: The file; its folder must exist by the time of the first report.
        resumed: Whether to go on with the file and its iterations, if there is one.
        wrapped_callback: Is passed all reports too.
    """

    def __init__(
        self, path: Path, resumed: bool = False, wrapped_callback: TrainingCallback | None = None
    ):
        self._path = path
        self._wrapped = wrapped_callback or TrainingCallback()
        self._peak_memory = 0.0
        self._first = 0
        if resumed and path.exists():
            self._first = max((entry["iteration"] for entry in _read(path)), default=0)
        else:
            path.unlink(missing_ok=True)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._append(train_info)
        peak_memory = round(train_info["peak_memory"], 2)
        if peak_memory > self._peak_memory:
            self._peak_memory = peak_memory
            make_console().print(f"          [ui.muted]peak memory {peak_memory:.2f} GB[/ui.muted]")
        self._wrapped.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._append(val_info)
        self._wrapped.on_val_loss_report(val_info)

    def _append(self, info: dict[str, Any]) -> None:
        entry = info | {"iteration": self._first + info["iteration"]}
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_losses(log: Path, picture: Path) -> None:
    """Draws the curves of a :class:`LossLog`'s file.

    Args:
        log: The file of losses.
        picture: The PNG to write.
    """
    from matplotlib.figure import Figure  # Slow to import.

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        points = [(entry["iteration"], entry[key]) for entry in _read(log) if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    print(f"Losses drawn in {picture}")
