"""Language models of Shakespeare: the text as tokens, and a model trained on it.

The last tenth of the text is for validation, as in nanoGPT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from training import Architecture, Plan, Shape, build, count_parameters, state_size, train

from hgrn2_mlx.train.batches import TrainingBatches, ValidationBatches
from hgrn2_mlx.train.config import DataConfig, OptimizerConfig
from hgrn2_mlx.train.data import prepare
from hgrn2_mlx.train.trainer import Trainer

FILE = Path(__file__).parent.parent / "data" / "tinyshakespeare.txt"


@dataclass
class Text:
    """Token ids and, to compare tokens of different lengths, characters of the validation text."""

    vocabulary: int
    train: np.ndarray
    validation: np.ndarray
    validation_characters: int


def characters() -> Text:
    """One token a character; the 65 of the text are the vocabulary."""
    alphabet, tokens = np.unique(list(FILE.read_text(encoding="utf-8")), return_inverse=True)
    held_out = round(0.1 * len(tokens))
    return Text(len(alphabet), tokens[:-held_out], tokens[-held_out:], held_out)


def byte_pairs(vocabulary: int, folder: Path) -> Text:
    """Byte-pair encoding trained on the training part, kept in ``folder``."""
    corpus = prepare(DataConfig([str(FILE)]), vocabulary, folder / f"tokens-{vocabulary}")
    held_out = round(0.1 * len(FILE.read_text(encoding="utf-8")))
    return Text(vocabulary, corpus.train, corpus.validation, held_out)


@dataclass
class Recipe:
    width: int
    layers: int
    mlp_width: int
    context: int  # tokens of a training sequence
    batch_size: int
    steps: int
    learning_rate: float  # at its peak; it falls to a tenth
    dropout: float = 0.0
    evaluations: int = 10
    validation_tokens: int | None = None  # from the start of the validation text; None for all


def train_on(
    text: Text,
    architecture: Architecture,
    seed: int,
    recipe: Recipe,
    deadline: float,
    measure: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
) -> dict[str, Any]:
    """Trains a model and measures its validation loss on the way, in nats per token.

    Args:
        measure: What else to know of the trained model.

    Returns:
        What :func:`training.train` does, with ``best``, the lowest of the losses,
        ``parameters`` and ``state``, the numbers of state after a whole context.
    """
    shape = Shape(text.vocabulary, recipe.width, recipe.layers, recipe.mlp_width)
    model = build(architecture, shape, seed, recipe.dropout)
    optimizer = OptimizerConfig(
        recipe.learning_rate,
        final_learning_rate=recipe.learning_rate / 10,
        warmup_steps=max(1, recipe.steps // 10),
        betas=[0.9, 0.99],
    )
    trainer = Trainer(model, Plan(recipe.steps, optimizer, seed))
    windows = (recipe.batch_size, recipe.context)
    batches = TrainingBatches(text.train, *windows, seed)
    validation = ValidationBatches(text.validation[: recipe.validation_tokens], *windows)
    outcome = train(
        trainer,
        batches.__getitem__,
        lambda: trainer.evaluate(validation),
        max(1, recipe.steps // recipe.evaluations),
        deadline,
    )
    model.eval()
    return {
        **outcome,
        "best": min(loss for _, loss in outcome["evaluations"]),
        "parameters": count_parameters(model),
        "state": state_size(model, recipe.context),
        **measure(model),
    }
