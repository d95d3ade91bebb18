"""A real model end to end."""

import tempfile
from pathlib import Path

from .report import REPORT_IT, Finding, Measurement, Report

PROMPT_TOKENS, GENERATED_TOKENS = 512, 32  # of the measurement of its speed
LOSS_TOLERANCE = 0.01  # nats per token


def check_model(report: Report) -> None:
    """The carried checkpoint: its loss is the one flash-linear-attention measured."""
    import mlx.core as mx
    import mlx_lm

    from ..bench.model_timing import time_generation
    from ..convert import convert
    from ..demo import CHECKPOINT, validation_loss

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        convert(CHECKPOINT, folder, dtype="float32")
        model, tokenizer = mlx_lm.load(str(folder))
    loss = validation_loss(model, tokenizer, CHECKPOINT, windows=1)
    which = "carried checkpoint (6.2M parameters, float32)"
    what = f"{which}: loss of {loss.tokens} tokens (flash-linear-attention {loss.reference:.4f})"
    report.measurements.append(Measurement(what, loss.mlx, "nats"))
    if not abs(loss.mlx - loss.reference) < LOSS_TOLERANCE:
        what = (
            f"{which}: its loss is {loss.mlx:.4f} here and {loss.reference:.4f} where it was made"
        )
        remedy = f"do not trust what this machine computes with HGRN2, and {REPORT_IT}"
        report.problems.append(Finding(what, remedy))
    speed = time_generation(model, PROMPT_TOKENS, GENERATED_TOKENS, batch=1, trials=2)
    for what, seconds, tokens in (
        (f"prefill, {PROMPT_TOKENS} tokens", speed.prefill_seconds, PROMPT_TOKENS),
        (f"a decode step after them, mean of {GENERATED_TOKENS}", speed.step_seconds, 1),
    ):
        figure = Measurement(f"{which}: {what}", tokens / seconds, "tokens/s")
        report.measurements.append(figure)
    mx.clear_cache()
