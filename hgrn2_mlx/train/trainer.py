"""The training step: loss, gradients, their mean over the processes, clipping, AdamW."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map_with_path

from ..models.language_model import LanguageModel
from ..processes import from_first_process
from .config import TrainConfig
from .optimizer import build_optimizer, learning_rate_schedule

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class Trainer:
    """A model, its optimizer, and the step that moves both, in every process alike.

    Args:
        model: A model with float32 weights, which stay float32; the forward and
            backward pass run on a copy in the configured precision.
        config: The run.
        compiled: Whether the step is compiled; ``None`` for on an Apple GPU only.
            Elsewhere MLX runs the system's C++ compiler or NVRTC on every fused
            kernel, more than a minute in all, and the step is hardly faster.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, compiled: bool | None = None):
        self.model: LanguageModel = model.train()
        self.config = config
        self.group = mx.distributed.init()
        self.compiled = mx.metal.is_available() if compiled is None else compiled
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        self.optimizer = build_optimizer(config.optimizer, schedule)
        self.optimizer.init(model.trainable_parameters())

    def step(self, step: int, batch: np.ndarray) -> tuple[float, float]:
        """Updates the weights.

        Args:
            step: Updates done so far; with the seed it decides the dropout.
            batch: Token ids ``[B, T + 1]``, the process's share; all but the first of
                each row are predicted.

        Returns:
            The mean loss of all processes before the update, in nats per token, and
            the norm of its gradient before clipping.
        """
        # Every process drops something else, and a single one what it always did.
        place = step * self.group.size() + self.group.rank()
        mx.random.seed((self.config.seed << 32) + place)
        loss, gradient_norm = self._update(mx.array(batch))
        mx.eval(loss, gradient_norm, self.model.state, self.optimizer.state)
        return loss.item(), gradient_norm.item()

    @cached_property
    def _update(self) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
        """A step as a function of the batch; loss and gradient norm not evaluated yet."""

        def update(batch: mx.array) -> tuple[mx.array, mx.array]:
            parameters = self.model.trainable_parameters()
            loss, gradients = mx.value_and_grad(self._loss)(parameters, batch)
            loss = mx.distributed.all_sum(loss) / self.group.size()
            gradients = average_gradients(gradients)
            gradients, norm = optim.clip_grad_norm(gradients, self.config.optimizer.gradient_clip)
            self.model.update(self.optimizer.apply_gradients(gradients, parameters))
            return loss, norm

        if not self.compiled:
            return update
        # Not before the first step: what compiles holds on to the optimizer's
        # state, which loading a checkpoint replaces.
        state = [self.model.state, self.optimizer.state, mx.random.state]
        return mx.compile(update, inputs=state, outputs=state)

    def _loss(self, parameters: dict[str, Any], batch: mx.array) -> mx.array:
        """Leaves the model with the copy of ``parameters`` that it ran on."""
        self.model.update(self.in_precision(parameters))
        logits = self.model(batch[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")

    def in_precision(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """A copy of the model's parameters in the precision that it computes in."""
        dtype = DTYPES[self.config.precision]
        castable = self.model.cast_predicate
        return tree_map_with_path(lambda n, p: p.astype(dtype) if castable(n) else p, parameters)

    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        """The mean loss without dropout, in nats per token.

        Args:
            batches: ``[B, T + 1]`` each, the process's share.
        """
        parameters = self.model.parameters()
        self.model.eval()
        total = tokens = 0.0
        for batch in batches:
            count = batch[:, 1:].size
            total += count * self._loss(parameters, mx.array(batch)).item()
            tokens += count
        self.model.train()
        self.model.update(parameters)
        sums = mx.array([total, tokens], mx.float64)
        total, tokens = mx.distributed.all_sum(sums, stream=mx.cpu).tolist()
        return total / tokens

    def start_from_first_process(self, done: int) -> int:
        """Gives every process the weights and the optimizer that rank 0 has.

        Args:
            done: Updates done by the process's own count.

        Returns:
            Those of rank 0.
        """
        if self.group.size() == 1:
            return done
        self.model.update(from_first_process(self.model.parameters()))
        self.optimizer.state = from_first_process(self.optimizer.state)
        return from_first_process({"done": mx.array(done)})["done"].item()
