"""Fine-tunes a small model on a text that every machine has: Python's own documentation.

The last step of ``hgrn2 demo``, with mlx-lm's trainer and the layers that
``hgrn2 lora`` adapts.
"""

import importlib
import inspect
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, evaluate, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from .lora import TARGETS
from .lora_data import TokenDataset, cut_windows

# Modules of the standard library with much to say, on all systems.
MODULES = (
    "argparse collections configparser contextlib csv datetime decimal difflib fractions functools "
    "heapq inspect io itertools json logging math os pathlib pickle queue random re shutil socket "
    "string subprocess tempfile threading time timeit unittest urllib.parse uuid zipfile"
).split()
HELD_OUT_MODULES = ("statistics", "textwrap")

PROMPT = "Return the "
WINDOW = 65  # Tokens of an example: 64 are predicted. Short, as updates count for more here.
HELD_OUT_WINDOWS = 8
ADAPTER = {"rank": 16, "scale": 4.0, "dropout": 0.0, "keys": TARGETS}
LEARNING_RATE = 3e-4
BETAS = [0.9, 0.99]


@dataclass
class FineTuning:
    """What a short fine-tuning did.

    Args:
        loss_before: Mean cross-entropy of the held-out text in nats per token.
        loss_after: The same after training.
        sample_before: How the model went on from ``prompt``; ``sample_after``, how it does now.
        steps: Updates of the adapter.
        tokens: Tokens trained on, and ``held_out_tokens`` that the losses are of.
        adapter_parameters: Numbers that were trained, of ``parameters`` in the model.
        seconds: Time that the training took.
    """

    loss_before: float
    loss_after: float
    prompt: str
    sample_before: str
    sample_after: str
    steps: int
    tokens: int
    held_out_tokens: int
    adapter_parameters: int
    parameters: int
    seconds: float


def fine_tune_demo(
    model: nn.Module, tokenizer: TokenizerWrapper, seconds: float = 60, most_steps: int = 600
) -> FineTuning:
    """Trains a LoRA adapter on docstrings, which stays in the model.

    The same steps with the same Python and device give the same numbers.

    Args:
        model: An HGRN2 model that is not fine-tuned yet.
        tokenizer: Its tokenizer.
        seconds: About how long to train; a slow machine takes fewer steps.
        most_steps: Steps that are enough.

    Raises:
        ValueError: If Python runs without docstrings (``-OO``).
    """
    train_set, held_out = (
        TokenDataset(cut_windows(tokenizer.encode("\n\n\n".join(map(docstrings, modules))), WINDOW))
        for modules in (MODULES, HELD_OUT_MODULES)
    )
    if len(train_set) == 0:
        raise ValueError("Python's documentation strings are missing: run without -OO")
    parameters = sum(x.size for _, x in tree_flatten(model.parameters()))

    loss_before = _loss(model, held_out)
    sample_before = _sample(model, tokenizer)

    mx.random.seed(0)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), ADAPTER)
    with _compiled_on_gpu_only():
        steps = max(1, min(most_steps, int(seconds / _step_seconds(model, train_set))))
        np.random.seed(0)  # The order of the batches.
        started = time.perf_counter()
        _train(model, train_set, steps)
        took = time.perf_counter() - started
    return FineTuning(
        loss_before=loss_before,
        loss_after=_loss(model, held_out),
        prompt=PROMPT,
        sample_before=sample_before,
        sample_after=_sample(model, tokenizer),
        steps=steps,
        tokens=steps * (WINDOW - 1),
        held_out_tokens=HELD_OUT_WINDOWS * (WINDOW - 1),
        adapter_parameters=sum(x.size for _, x in tree_flatten(model.trainable_parameters())),
        parameters=parameters,
        seconds=took,
    )


def _step_seconds(model: nn.Module, dataset: TokenDataset) -> float:
    """Time of the gradient of one example, most of a training step; the gradient is not used."""
    example = next(iterate_batches(dataset, 1, WINDOW))
    gradient = nn.value_and_grad(model.train(), default_loss)
    for _ in range(2):  # The first does what is done once, such as compiling kernels.
        started = time.perf_counter()
        mx.eval(gradient(model, *example))
        seconds = time.perf_counter() - started
    return seconds


def _train(model: nn.Module, dataset: TokenDataset, steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model,
            optim.Adam(learning_rate=LEARNING_RATE, betas=BETAS),
            dataset,
            args=TrainingArgs(
                batch_size=1,
                iters=steps,
                steps_per_report=max(1, steps // 5),
                steps_per_save=steps + 1,  # Only at the end.
                max_seq_length=WINDOW,
                adapter_file=Path(scratch) / "adapters.safetensors",
            ),
        )


@contextmanager
def _compiled_on_gpu_only() -> Iterator[None]:
    """On a CPU, MLX compiles with the system's C++ compiler, longer than it would save."""
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        mx.disable_compile()
    try:
        yield
    finally:
        if on_cpu:
            mx.enable_compile()


def docstrings(name: str) -> str:
    """Documentation of a module and its public functions, classes and methods, by name.

    Spaces are single: else indentation is most of what a short training learns.
    """
    module = importlib.import_module(name)
    documented = [module]
    for item in _public(module):
        documented.append(item)
        if inspect.isclass(item):
            documented += _public(item)
    texts = (item.__doc__ for item in documented if isinstance(item.__doc__, str))
    # One function may have several names.
    return re.sub(" +", " ", "\n\n".join(dict.fromkeys(map(inspect.cleandoc, texts))))


def _public(namespace: object) -> list:
    items = [item for name, item in sorted(vars(namespace).items()) if not name.startswith("_")]
    return [item for item in items if inspect.isclass(item) or inspect.isroutine(item)]


def _loss(model: nn.Module, dataset: TokenDataset) -> float:
    np.random.seed(0)  # The same windows each time.
    return evaluate(model, dataset, 1, HELD_OUT_WINDOWS, max_seq_length=WINDOW)


def _sample(model: nn.Module, tokenizer: TokenizerWrapper) -> str:
    model.eval()
    mx.random.seed(0)
    sampler = make_sampler(temp=0.6, top_p=0.9)
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=48, sampler=sampler)
