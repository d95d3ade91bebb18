"""The models that the experiments compare, and how each of them is trained.

The training step, its optimizer, the initial weights and the dropout are those of
``hgrn2 train``; here they move mlx-lm's Llama too, so that every model learns alike.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache

from hgrn2_mlx.models import hgrn, hgrn2
from hgrn2_mlx.train.config import OptimizerConfig
from hgrn2_mlx.train.dropout import add_dropout, drop_output
from hgrn2_mlx.train.initialization import initialize
from hgrn2_mlx.train.trainer import Trainer


@dataclass
class Architecture:
    """A model to compare.

    Args:
        kind: ``"hgrn"``, ``"hgrn2"`` or ``"transformer"`` (mlx-lm's Llama).
        expand_ratio: Of HGRN2: numbers of state for each channel.
        lower_bounds: Whether forget gates have learned lower bounds.
    """

    kind: str
    expand_ratio: int | None = None
    lower_bounds: bool = True

    @property
    def name(self) -> str:
        name = {"hgrn": "HGRN", "hgrn2": "HGRN2", "transformer": "transformer"}[self.kind]
        ratio = "" if self.expand_ratio is None else f" ×{self.expand_ratio}"
        return f"{name}{ratio}{'' if self.lower_bounds else ', no lower bounds'}"


@dataclass
class Shape:
    """What all models of a comparison have in common.

    Args:
        vocabulary: Token ids.
        width: Size of the residual stream.
        layers: Token mixers, each followed by an MLP.
        mlp_width: Channels inside the MLP.
        head_width: Of a transformer's heads.
        tied: Whether the head is the embedding's matrix.
    """

    vocabulary: int
    width: int
    layers: int
    mlp_width: int
    head_width: int = 64
    tied: bool = False


class Transformer(llama.Model):
    """mlx-lm's Llama with what the trainer asks of a model."""

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        return lambda name: True


def build(architecture: Architecture, shape: Shape, seed: int, dropout: float = 0.0) -> nn.Module:
    """A model with initial weights and, while it trains, dropout."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.mlp_width,
        "tie_word_embeddings": shape.tied,
    }
    gates = {"use_lower_bound": architecture.lower_bounds}
    if architecture.kind == "hgrn":
        model = hgrn.Model(hgrn.ModelArgs(**sizes, **gates))
    elif architecture.kind == "hgrn2":
        ratio = architecture.expand_ratio
        model = hgrn2.Model(hgrn2.ModelArgs(**sizes, **gates, expand_ratio=ratio))
    else:
        heads = max(1, shape.width // shape.head_width)
        model = Transformer(
            llama.ModelArgs(
                **sizes, model_type="llama", num_attention_heads=heads, rms_norm_eps=1e-6
            )
        )
    mx.random.seed(seed)
    # At the width of fla's models, 2048, this is the 0.02 that fla takes for all.
    initialize(model, initializer_range=shape.width**-0.5)
    if architecture.kind == "transformer":
        for module in (model.model.embed_tokens, model.model):
            drop_output(module, nn.Dropout(dropout))
        for layer in model.layers:
            drop_output(layer.self_attn, nn.Dropout(dropout))
            drop_output(layer.mlp, nn.Dropout(dropout))
    else:
        add_dropout(model, dropout, token_dropout=0.0)
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def cached(cache: list[Any]) -> list[mx.array]:
    """The arrays that a model keeps of a sequence it has read, as far as they are in use."""
    arrays = []
    for layer in cache:
        arrays += layer.keys_and_values() if isinstance(layer, KVCache) else layer.cache
    return arrays


def state_size(model: nn.Module, length: int) -> int:
    """Numbers that a model keeps of one sequence of ``length`` tokens, all layers together."""
    cache = model.make_cache()
    model.eval()
    model(mx.zeros((1, length), mx.int32), cache)
    model.train()
    return sum(array.size for array in cached(cache))


@dataclass
class Plan:
    """What the trainer reads of a run's configuration.

    Args:
        steps: Updates, over which the learning rate rises and falls.
        optimizer: AdamW's settings.
        seed: Of the dropout; initial weights and batches take it too.
        precision: Of the activations, ``"float32"`` or ``"bfloat16"``.
    """

    steps: int
    optimizer: OptimizerConfig
    seed: int
    precision: str = "float32"


def train(
    trainer: Trainer,
    batch: Callable[[int], np.ndarray],
    evaluate: Callable[[], Any],
    interval: int,
    deadline: float,
) -> dict[str, Any]:
    """Trains for all planned steps, or for as long as there is time; then evaluates.

    Args:
        trainer: Model, optimizer and plan.
        batch: The batch of a step (from 0).
        evaluate: Measures the model as it is.
        interval: Steps between evaluations.
        deadline: When to stop, in seconds of ``time.time()``.

    Returns:
        ``steps`` done of those ``planned``, ``seconds`` they took with evaluations,
        and ``evaluations``, pairs of a step and what was measured after it.

    Raises:
        ValueError: If the loss is not finite.
    """
    start = time.time()
    planned = trainer.config.steps
    done = 0
    evaluations = []
    while done < planned and time.time() < deadline:
        loss, _ = trainer.step(done, batch(done))
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done}")
        done += 1
        if done % interval == 0 and done < planned:
            evaluations.append((done, evaluate()))
    if not evaluations or evaluations[-1][0] < done:
        evaluations.append((done, evaluate()))
    return {
        "steps": done,
        "planned": planned,
        "seconds": round(time.time() - start, 1),
        "evaluations": evaluations,
    }
