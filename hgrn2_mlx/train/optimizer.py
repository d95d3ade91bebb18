"""AdamW as PyTorch defines it, on mlx.optimizers: which weights decay, and the learning rate."""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from .config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[mx.array], mx.array]:
    """From 0 to the peak in a line, and on to the final learning rate at ``steps`` in a cosine."""
    warmup = optim.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    decay = optim.cosine_decay(
        config.learning_rate, steps - config.warmup_steps, config.final_learning_rate
    )
    return optim.join_schedules([warmup, decay], [config.warmup_steps])


def decays(name: str, weight: mx.array) -> bool:
    """Whether weight decay applies: to the matrices that multiply activations."""
    return weight.ndim == 2 and not name.endswith(("lower_bounds", "res_proj.weight"))


def build_optimizer(
    config: OptimizerConfig, learning_rate: float | Callable[[mx.array], mx.array]
) -> optim.MultiOptimizer:
    """AdamW with bias correction, without weight decay on what does not :func:`decay <decays>`."""

    def adamw(weight_decay: float) -> optim.AdamW:
        return optim.AdamW(
            learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=weight_decay,
            bias_correction=True,
        )

    return optim.MultiOptimizer([adamw(config.weight_decay), adamw(0.0)], [decays])
