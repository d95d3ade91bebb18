"""Time and memory of a model in flash-linear-attention; imported where that takes part.

Its model class, loss and cache, and PyTorch's fused AdamW: what its users run. The clock is
the one that MLX is timed by, read when the GPU has done its work.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_flatten

from ..convert import fla_on_cpu
from ..convert.export import FLA_CLASSES
from ..convert.fla import NOT_IN_FLA
from ..models.language_model import LanguageModelArgs
from .model_timing import LEARNING_RATE
from .participant import Progress, Values
from .settings import Settings


def measure_fla(
    args: LanguageModelArgs,
    dtype: torch.dtype,
    device: str,
    settings: Settings,
    progress: Progress,
) -> Iterator[Values]:
    """What ``measure_model`` measures, but for LoRA steps, as fla has no adapters."""
    mx.clear_cache()  # PyTorch's allocator is another one.
    model = build_fla_model(args, device).to(device, dtype)
    for batch, tokens in settings.generations():
        progress(f"a prompt of {tokens} tokens, batch {batch}")
        yield measure_generation(model.eval(), tokens, batch, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    for tokens in settings.train_tokens:
        progress(f"a training step of {tokens} tokens")
        yield measure_training_step(model.train(), optimizer, tokens, settings.trials)
    del model, optimizer
    torch.cuda.empty_cache()  # Does nothing where there is no GPU.


def build_fla_model(args: LanguageModelArgs, device: str) -> Any:
    """fla's model of this configuration, with random weights."""
    config = {key: value for key, value in asdict(args).items() if key not in NOT_IN_FLA}
    model_type = config.pop("model_type")
    if device == "cpu":
        models = fla_on_cpu.import_fla()
        # What the interpreter can run.
        config |= {"attn_mode": "fused_recurrent", "fuse_cross_entropy": False}
    else:
        from fla import models
    model_class = getattr(models, FLA_CLASSES[model_type])
    torch.manual_seed(0)
    return model_class(model_class.config_class(**config))


def measure_generation(model: Any, tokens: int, batch: int, settings: Settings) -> Values:
    """Reads a random prompt, and decodes greedily; the fastest of trials."""
    prompt = random_tokens(model, batch, tokens)
    memory = PeakMemory(model.device)
    prefills, steps = [], []
    with torch.no_grad():
        for _ in range(settings.trials):
            started = now(model.device)
            output = model(prompt, use_cache=True, logits_to_keep=1)
            token = output.logits.argmax(-1)
            prefills.append(now(model.device) - started)

            started = now(model.device)
            for _ in range(settings.generation_tokens):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits.argmax(-1)
            steps.append((now(model.device) - started) / settings.generation_tokens)
    states = [array for _, array in tree_flatten(list(output.past_key_values))]
    return {
        ("prefill", batch, tokens): batch * tokens / min(prefills),
        ("decode", batch, tokens): batch / min(steps),
        ("state or cache", batch, tokens): sum(x.nbytes for x in states if torch.is_tensor(x)),
        **memory.values("generation, peak memory", batch, tokens),
    }


def measure_training_step(model: Any, optimizer: Any, tokens: int, trials: int) -> Values:
    """Steps on one random sequence; the fastest of trials."""
    sequence = random_tokens(model, 1, tokens)
    memory = PeakMemory(model.device)
    seconds = []
    for _ in range(trials):
        started = now(model.device)
        model(sequence, labels=sequence).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(model.device) - started)
    return {
        ("training step", 1, tokens): tokens / min(seconds),
        **memory.values("training step, peak memory", 1, tokens),
    }


class PeakMemory:
    """The most memory that PyTorch holds on a GPU from now on, in bytes, the weights included."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def values(self, *case: Any) -> Values:
        return {case: torch.cuda.max_memory_allocated()} if self.on_gpu else {}


def random_tokens(model: Any, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)


def now(device: torch.device) -> float:
    """The time, in seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
