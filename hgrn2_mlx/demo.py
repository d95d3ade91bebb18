"""The whole way in one command, on the checkpoint the package carries.

Converts what flash-linear-attention saved, writes text with it, measures the
validation loss beside the one flash-linear-attention measured on the same
weights, and fine-tunes it on a text that every machine has.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import rich
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .convert import convert
from .fine_tuning_demo import fine_tune_demo

CHECKPOINT = Path(__file__).parent / "demo_checkpoint"


@dataclass
class ValidationLoss:
    """Mean cross-entropy in nats per token of the windows measured here, by both programs."""

    mlx: float
    reference: float
    windows: int
    all_windows: int
    tokens: int


def validation_loss(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    folder: Path,
    windows: int | None = None,
    seconds: float = float("inf"),
) -> ValidationLoss:
    """The loss on the held-out text, in the windows flash-linear-attention measured.

    The text is tokenized once and cut into windows that predict every token but
    the first; the state is zero at the start of each.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        folder: The checkpoint, with ``validation.txt`` and ``validation.json``.
        windows: How many to measure, the first ones; ``None`` for all.
        seconds: Stops after the window in which this much time is over. The
            reference is averaged over the same windows.
    """
    reference = json.loads((folder / "validation.json").read_text())
    window = reference["window"]
    text = (folder / "validation.txt").read_bytes().decode()
    tokens = mx.array(tokenizer.encode(text, add_special_tokens=False))
    all_windows = len(reference["window_losses"])

    losses: list[float] = []
    start = time.perf_counter()
    for first in range(0, (windows or all_windows) * window, window):
        logits = model(tokens[None, first : first + window])
        targets = tokens[None, first + 1 : first + window + 1]
        loss = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="mean")
        losses.append(loss.item())
        if time.perf_counter() - start > seconds:
            break
    measured = reference["window_losses"][: len(losses)]
    return ValidationLoss(
        mlx=sum(losses) / len(losses),
        reference=sum(measured) / len(measured),
        windows=len(losses),
        all_windows=all_windows,
        tokens=len(losses) * window,
    )


def run(prompt: str, max_tokens: int, seconds: float) -> None:
    """Converts, generates, measures and fine-tunes, printing each step's figures.

    Args:
        prompt: What the text starts with.
        max_tokens: Tokens to generate.
        seconds: About how long to fine-tune, and five times as long as to measure the
            validation loss; how far they got is reported.
    """
    # MLX multiplies float32 matrices faster than bfloat16 ones on a CPU.
    dtype = "float32" if mx.default_device() == mx.cpu else None
    with tempfile.TemporaryDirectory() as scratch:
        print("1. Convert the checkpoint that flash-linear-attention saved")
        converted = Path(scratch) / "hgrn2-demo"
        rich.print(convert(CHECKPOINT, converted, dtype=dtype))

        print("\n2. Write text\n")
        model, tokenizer = mlx_lm.load(str(converted))
        mx.random.seed(0)
        print(prompt, end="")
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=0.8, top_p=0.95),
        ):
            print(response.text, end="", flush=True)
        print(
            f"\n\n{response.generation_tps:.0f} tokens per second on the {_device()}, "
            f"peak memory {response.peak_memory:.2f} GB"
        )

        print("\n3. Measure the validation loss (held-out Shakespeare)")
        loss = validation_loss(model, tokenizer, CHECKPOINT, seconds=seconds / 5)
        print(
            f"{loss.windows} of {loss.all_windows} windows, {loss.tokens} tokens: "
            f"MLX {loss.mlx:.4f}, flash-linear-attention {loss.reference:.4f} nats per token "
            f"(difference {loss.mlx - loss.reference:+.4f})"
        )

        print("\n4. Fine-tune with LoRA on the documentation strings of Python's standard library")
        tuned = fine_tune_demo(model, tokenizer, seconds=seconds)
        print(
            f"{tuned.steps} steps, {tuned.tokens} tokens, {tuned.adapter_parameters:,} of "
            f"{tuned.parameters:,} parameters in {tuned.seconds:.0f} s: loss on documentation "
            f"held out {tuned.loss_before:.2f} before, {tuned.loss_after:.2f} after"
        )
        for when, sample in (("before", tuned.sample_before), ("after", tuned.sample_after)):
            print(f"  {when}: {tuned.prompt!r} -> {sample!r}")


def _device() -> str:
    return "CPU" if mx.default_device() == mx.cpu else "GPU"
