"""Time and memory of a model in MLX: generating, and training steps."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from .participant import Progress, Values
from .settings import Settings

PREFILL_STEP = 2048  # tokens that mlx-lm reads of a prompt at a time
LEARNING_RATE = 1e-5


def measure_model(
    build: Callable[[], nn.Module], quantized: bool, settings: Settings, progress: Progress
) -> Iterator[Values]:
    """Every quantity of a model at every size.

    Args:
        build: Makes the model.
        quantized: Whether it is, so that not all of its weights can be trained.
        settings: At what sizes.
        progress: Is told what is measured next.
    """
    mx.random.seed(0)
    model = build()
    mx.eval(model.parameters())
    for batch, tokens in settings.generations():
        progress(f"a prompt of {tokens} tokens, batch {batch}")
        timed = time_generation(model, tokens, settings.generation_tokens, batch, settings.trials)
        yield {
            ("prefill", batch, tokens): batch * tokens / timed.prefill_seconds,
            ("decode", batch, tokens): batch / timed.step_seconds,
            ("state or cache", batch, tokens): timed.cache_bytes,
            ("generation, peak memory", batch, tokens): timed.peak_bytes,
        }
    if not quantized and fits_training(model):
        model.train()
        adamw = optim.AdamW(LEARNING_RATE)
        yield from measure_training("training step", model, adamw, settings, progress)
        del adamw  # Or the next step's peak would count its averages.
    add_lora(model)
    adam = optim.Adam(LEARNING_RATE)
    yield from measure_training("LoRA step", model, adam, settings, progress)


def measure_training(
    kind: str,
    model: nn.Module,
    optimizer: optim.Optimizer,
    settings: Settings,
    progress: Progress,
) -> Iterator[Values]:
    for tokens in settings.train_tokens:
        progress(f"a {kind} of {tokens} tokens")
        seconds, peak_bytes = time_training(model, optimizer, tokens, settings.trials)
        yield {(kind, 1, tokens): tokens / seconds, (f"{kind}, peak memory", 1, tokens): peak_bytes}


def fits_training(model: nn.Module) -> bool:
    """Whether weights, gradients and AdamW's two averages fit in memory.

    Where they do not, a Mac would not fail but swap, for hours.
    """
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    memory = mx.device_info().get("max_recommended_working_set_size", float("inf"))
    return 4 * weights < memory


@dataclass(frozen=True)
class Generation:
    """Generating after a prompt, for a whole batch at once.

    Args:
        prefill_seconds: For reading the prompt, up to the first token.
        step_seconds: For each token after it, of every sequence.
        cache_bytes: State, or keys and values, of the batch in the end.
        peak_bytes: The most memory that MLX held, the weights included.
    """

    prefill_seconds: float
    step_seconds: float
    cache_bytes: int
    peak_bytes: int


def time_generation(
    model: nn.Module, prompt_tokens: int, generated_tokens: int, batch: int, trials: int
) -> Generation:
    """Reads a random prompt as mlx-lm does, and decodes greedily; the fastest of trials."""
    shape = (batch, prompt_tokens)
    prompt = mx.random.randint(0, model.args.vocab_size, shape, key=mx.random.key(0))
    mx.eval(prompt)
    mx.clear_cache()
    mx.reset_peak_memory()
    prefills, steps = [], []
    for _ in range(trials):
        cache = make_prompt_cache(model)
        started = time.perf_counter()
        # Of all but the last token, no logits are computed.
        for start in range(0, prompt_tokens - 1, PREFILL_STEP):
            end = min(start + PREFILL_STEP, prompt_tokens - 1)
            model(prompt[:, start:end], cache)
            mx.eval([layer.state for layer in cache])
        token = mx.argmax(model(prompt[:, -1:], cache), axis=-1)
        mx.eval(token)
        prefills.append(time.perf_counter() - started)

        started = time.perf_counter()
        for _ in range(generated_tokens):
            token = mx.argmax(model(token, cache), axis=-1)
            mx.async_eval(token)
        mx.eval(token, [layer.state for layer in cache])
        steps.append((time.perf_counter() - started) / generated_tokens)
    return Generation(
        prefill_seconds=min(prefills),
        step_seconds=min(steps),
        cache_bytes=sum(layer.nbytes for layer in cache),
        peak_bytes=mx.get_peak_memory(),
    )


def add_lora(model: nn.Module) -> None:
    """Adapters on every linear layer, with mlx-lm's settings."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()


def time_training(
    model: nn.Module, optimizer: optim.Optimizer, length: int, trials: int
) -> tuple[float, int]:
    """Steps of mlx-lm's loss on one random sequence, for what the model has to train.

    Returns:
        Seconds of the fastest step, and the most memory that MLX held, in bytes, the
        weights included.
    """
    loss_and_gradients = nn.value_and_grad(model, default_loss)
    tokens = mx.random.randint(0, model.args.vocab_size, (1, length + 1), key=mx.random.key(0))
    mx.eval(tokens)
    mx.clear_cache()
    mx.reset_peak_memory()

    def step() -> None:
        (loss, _), gradients = loss_and_gradients(model, tokens, mx.array([[0, length + 1]]))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)

    return fastest(step, trials), mx.get_peak_memory()


def fastest(run: Callable[[], Any], trials: int) -> float:
    """Seconds of the fastest of several runs; the first also compiles."""
    seconds = []
    for _ in range(trials):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
