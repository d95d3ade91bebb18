"""Multi-query associative recall: what a model remembers, against the size of its state.

    python examples/paper/recall.py [--size small] [--out FOLDER]

The task is that of Zoology (arXiv 2312.04927): a sequence begins with pairs of a key and a
value; then the keys come again, each once, at places that are likelier the sooner they are,
and the model has to say the value that stood after it. Nothing but memory helps: keys and
values are drawn anew for every sequence, so the training set has no end.

All models have one width and two layers, and so nearly the same number of parameters.
They learn from all tasks in turn and are asked each of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiment
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from training import Architecture, Plan, Shape, build, count_parameters, state_size, train

from hgrn2_mlx.train.config import OptimizerConfig
from hgrn2_mlx.train.trainer import Trainer


@dataclass
class Settings:
    vocabulary: int  # half of it keys, the other half values
    tasks: list[tuple[int, int]]  # length of a sequence and its number of pairs
    width: int
    expand_ratios: list[int]  # of HGRN2
    steps: int
    tokens: int  # in a batch, however long its sequences are
    learning_rate: float
    seeds: list[int]
    test_sequences: int  # of every task


SETTINGS = {
    "tiny": Settings(32, [(16, 2)], 16, [16], 4, 64, 1e-2, [0], 4),
    "small": Settings(
        vocabulary=256,
        tasks=[(32, 4)],
        width=64,
        expand_ratios=[8, 64],
        steps=2500,
        tokens=2048,
        learning_rate=5e-3,
        seeds=[0],
        test_sequences=256,
    ),
    "full": Settings(
        vocabulary=8192,
        tasks=[(64, 4), (128, 8), (256, 16), (512, 64)],
        width=128,
        expand_ratios=[8, 32, 128],
        steps=4000,
        tokens=16384,
        learning_rate=3e-3,
        seeds=[0, 1, 2],
        test_sequences=512,
    ),
}

# The exponent of Zoology's power law for the gap before a key's second appearance.
POWER = 0.01


def draw_sequences(
    generator: np.random.Generator, count: int, length: int, pairs: int, vocabulary: int
) -> np.ndarray:
    """Sequences and what is asked of them, ``[count, 3, length]`` int32.

    The three rows are the tokens; the positions of the questions; and the answers at
    these positions, 0 where there are no more questions.
    """

    def draw(choices: int, weights: np.ndarray | None = None) -> np.ndarray:
        """``pairs`` different numbers below ``choices`` for every sequence."""
        rows = (generator.choice(choices, pairs, False, weights) for _ in range(count))
        return np.stack(list(rows))

    keys = 1 + draw(vocabulary // 2 - 1)
    values = vocabulary // 2 + draw(vocabulary // 2)
    gaps = length // 2 - pairs
    nearness = np.arange(1, gaps + 1) ** (POWER - 1.0)
    asked = 2 * pairs + 2 * draw(gaps, nearness / nearness.sum())
    sequences = np.zeros((count, 3, length), np.int32)
    sequences[:, 0, 0 : 2 * pairs : 2] = keys
    sequences[:, 0, 1 : 2 * pairs : 2] = values
    np.put_along_axis(sequences[:, 0], asked, keys, axis=1)
    sequences[:, 1, :pairs] = asked
    sequences[:, 2, :pairs] = values
    return sequences


class RecallTrainer(Trainer):
    """The trainer with a loss on the answers alone."""

    def answer(self, sequences: mx.array) -> tuple[mx.array, mx.array]:
        """Logits for every question, and the answers."""
        tokens = sequences[:, 0]
        asked, answers = (sequences[:, n, : tokens.shape[1] // 4] for n in (1, 2))
        hidden = mx.take_along_axis(self.model.model(tokens), asked[..., None], axis=1)
        names = dict(self.model.model.children())
        embedding = names["embeddings" if "embeddings" in names else "embed_tokens"]
        return embedding.as_linear(hidden), answers

    def _loss(self, parameters: dict[str, Any], batch: mx.array) -> mx.array:
        self.model.update(self.in_precision(parameters))
        logits, answers = self.answer(batch)
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), answers)
        return (losses * (answers > 0)).sum() / (answers > 0).sum()

    def accuracy(self, sequences: np.ndarray) -> float:
        """Share of the questions that are answered right."""
        self.model.eval()
        right = questions = 0
        for part in np.array_split(sequences, -(-len(sequences) // 64)):
            logits, answers = self.answer(mx.array(part))
            right += ((mx.argmax(logits, axis=-1) == answers) & (answers > 0)).sum().item()
            questions += (answers > 0).sum().item()
        self.model.train()
        return right / questions


def run(architecture: Architecture, seed: int, settings: Settings, deadline: float) -> dict:
    """Trains a model on all tasks and asks it every one of them."""
    shape = Shape(
        settings.vocabulary, settings.width, layers=2, mlp_width=2 * settings.width, tied=True
    )
    model = build(architecture, shape, seed)
    optimizer = OptimizerConfig(settings.learning_rate, warmup_steps=max(1, settings.steps // 10))
    trainer = RecallTrainer(model, Plan(settings.steps, optimizer, seed))

    def batch(step: int) -> np.ndarray:
        length, pairs = settings.tasks[step % len(settings.tasks)]
        generator = np.random.default_rng([seed, step])
        count = settings.tokens // length
        return draw_sequences(generator, count, length, pairs, settings.vocabulary)

    generator = np.random.default_rng(2**32)  # of no training batch
    tests = [
        draw_sequences(generator, settings.test_sequences, *task, settings.vocabulary)
        for task in settings.tasks
    ]
    outcome = train(
        trainer,
        batch,
        lambda: [trainer.accuracy(test) for test in tests],
        interval=max(1, settings.steps // 10),
        deadline=deadline,
    )
    sizes = [state_size(model, length) for length, _ in settings.tasks]
    return outcome | {"parameters": count_parameters(model), "state": sizes}


def carry_out(settings: Settings, options: experiment.Options) -> Iterable[dict]:
    architectures = [
        Architecture("hgrn"),
        *(Architecture("hgrn2", ratio) for ratio in settings.expand_ratios),
        Architecture("transformer"),
    ]
    runs = [(a, seed, settings) for seed in settings.seeds for a in architectures]
    yield from experiment.carry_out(run, runs, options)


def draw(record: dict, path: Path) -> None:
    """Accuracy against state size, a panel for every task."""
    from matplotlib.figure import Figure  # Slow to import.

    tasks = record["settings"]["tasks"]
    figure = Figure(figsize=(3 + 3 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    runs = experiment.finished(record)
    points = experiment.over_seeds(
        runs,
        key=lambda run: (experiment.name(run), tuple(run["state"])),
        value=lambda run: run["evaluations"][-1][1],
    )
    for index, ((length, pairs), axes) in enumerate(zip(tasks, panels, strict=True)):
        for (name, state), (mean, deviation, _) in points.items():
            axes.errorbar(
                state[index], mean[index], deviation[index], marker="o", capsize=3, label=name
            )
        # A model has found out or has not, so a mean alone would mislead.
        for run in runs:
            accuracy = run["evaluations"][-1][1][index]
            axes.plot(run["state"][index], accuracy, marker="x", color="grey", zorder=3)
        axes.set(title=f"{pairs} pairs, {length} tokens", xscale="log", ylim=(-0.02, 1.02))
        axes.set_xlabel("numbers of state")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    experiment.main("recall", __doc__, SETTINGS, carry_out, draw)
