"""What HGRN2 owes to its expand ratio and to the lower bounds of its forget gates.

    python examples/paper/expand_ratio.py [--size small] [--out FOLDER]

The expand ratio multiplies the state and leaves the number of parameters as it is; so the
validation loss against the state's size is what state alone is worth. Beside it, HGRN2
without lower bounds, and the forget gates that both have learned, layer by layer: the paper
speaks of a hierarchy, in which higher layers remember for longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import experiment
import mlx.core as mx
import numpy as np
from shakespeare import Recipe, Text, characters, train_on
from training import Architecture

from hgrn2_mlx.models.hgrn2 import Model
from hgrn2_mlx.ops.gates import forget_gates


@dataclass
class Settings:
    recipe: Recipe
    expand_ratios: list[int]
    seeds: list[int]


SETTINGS = {
    "tiny": Settings(Recipe(16, 2, 32, 16, 2, 4, 1e-2, validation_tokens=64), [4, 16], [0]),
    "small": Settings(
        Recipe(64, 3, 128, 64, 16, 200, 5e-3, validation_tokens=8192), [4, 16, 64], [0, 1]
    ),
    "full": Settings(
        Recipe(256, 4, 512, 256, 32, 1200, 3e-3, dropout=0.1), [16, 32, 64, 128], [0, 1, 2]
    ),
}


def mean_gates(model: Model, text: Text, length: int) -> list[list[float]]:
    """Of every layer and channel, its forget gate averaged over 16 windows of validation text."""
    tokens = mx.array(text.validation[: 16 * length].reshape(-1, length).astype(np.int32))
    x = model.model.embeddings(tokens)
    means = []
    for layer, lower_bound in zip(model.layers, model.model.layer_lower_bounds(), strict=True):
        logits = layer.attn.f_proj(layer.attn_norm(x))
        gates, _ = forget_gates(logits, mx.zeros(1) if lower_bound is None else lower_bound)
        means.append([round(mean, 4) for mean in gates.mean(axis=(0, 1)).tolist()])
        x = layer(x, lower_bound, None)
    return means


def run(architecture: Architecture, seed: int, settings: Settings, deadline: float) -> dict:
    text = characters()

    def measure(model: Model) -> dict:
        return {"gates": mean_gates(model, text, settings.recipe.context)}

    return train_on(text, architecture, seed, settings.recipe, deadline, measure)


def carry_out(settings: Settings, options: experiment.Options) -> Iterable[dict]:
    architectures = [
        *(Architecture("hgrn2", ratio) for ratio in settings.expand_ratios),
        Architecture("hgrn2", settings.expand_ratios[-1], lower_bounds=False),
    ]
    runs = [(a, seed, settings) for seed in settings.seeds for a in architectures]
    yield from experiment.carry_out(run, runs, options)


def draw(record: dict, path: Path) -> None:
    """Loss against state size; and the gates of the largest ratio, with and without bounds."""
    from matplotlib.figure import Figure  # Slow to import.

    runs = experiment.finished(record)
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes, *maps = figure.subplots(1, 3)
    for bounds, panel in zip((True, False), maps, strict=True):
        label = "with lower bounds" if bounds else "without lower bounds"
        chosen = [run for run in runs if run["architecture"]["lower_bounds"] == bounds]
        points = experiment.over_seeds(chosen, lambda run: run["state"], lambda run: run["best"])
        if not points:
            continue
        states = sorted(points)
        means, deviations, _ = zip(*(points[state] for state in states), strict=True)
        axes.errorbar(states, means, deviations, marker="o", capsize=3, label=label)

        largest = max(chosen, key=lambda run: (run["state"], -run["seed"]))
        gates = np.sort(largest["gates"], axis=1)
        image = panel.imshow(gates, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        panel.set(title=f"{experiment.name(largest)}", xlabel="channel, in order of its gate")
        panel.set(ylabel="layer", yticks=range(len(gates)))
        figure.colorbar(image, ax=panel, label="forget gate, mean over tokens")
    axes.set(xscale="log", xlabel="numbers of state", ylabel="validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    experiment.main("expand_ratio", __doc__, SETTINGS, carry_out, draw)
