"""Beyond the training length: loss by position, and what a token costs late in a text.

    python examples/paper/length.py [--size small] [--out FOLDER]

HGRN2 and a transformer of equal size are trained on short sequences and read sequences eight
times as long. Then, in one process and with nothing beside it, both decode after longer and
longer contexts: HGRN2 keeps a state of constant size, the transformer keys and values of
every token.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import experiment
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from shakespeare import Recipe, Text, characters, train_on
from training import Architecture, Shape, build, cached

TIMES = 8  # the training length


@dataclass
class Settings:
    recipe: Recipe
    expand_ratio: int
    seeds: list[int]
    contexts: list[int]  # before the tokens whose decoding is measured
    decode_batch: int  # sequences decoded at once
    decode_tokens: int


SETTINGS = {
    "tiny": Settings(
        Recipe(16, 2, 32, 16, 2, 4, 1e-2, validation_tokens=64), 16, [0], [8, 16], 1, 2
    ),
    "small": Settings(
        Recipe(64, 3, 128, 64, 16, 200, 5e-3, validation_tokens=8192),
        expand_ratio=64,
        seeds=[0, 1],
        contexts=[64, 256, 1024, 4096, 8192],
        decode_batch=1,
        decode_tokens=32,
    ),
    "full": Settings(
        Recipe(384, 6, 1024, 256, 32, 800, 2e-3, dropout=0.2),
        expand_ratio=128,
        seeds=[0, 1, 2],
        contexts=[256, 1024, 4096, 8192, 16384, 32768],
        decode_batch=16,
        decode_tokens=64,
    ),
}


def loss_by_position(model: nn.Module, text: Text, context: int) -> list[float]:
    """Mean loss in nats of every quarter of a training length, over windows of eight lengths."""
    length = TIMES * context
    windows = [
        text.validation[start : start + length + 1]
        for start in range(0, len(text.validation) - length, length)
    ]
    losses = []
    for window in windows[:64]:
        tokens = mx.array(window.astype(np.int32))[None]
        losses.append(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))
        mx.eval(losses[-1])
    means = mx.concatenate(losses).mean(axis=0)
    return means.reshape(-1, context // 4).mean(axis=1).tolist()


def run(architecture: Architecture, seed: int, settings: Settings, deadline: float) -> dict:
    text = characters()

    def measure(model: nn.Module) -> dict:
        return {"loss_by_position": loss_by_position(model, text, settings.recipe.context)}

    return train_on(text, architecture, seed, settings.recipe, deadline, measure)


def measure_decoding(architecture: Architecture, settings: Settings) -> dict:
    """Median seconds per token and bytes of a sequence's state, after every context.

    The weights are random: neither depends on them.
    """
    recipe = settings.recipe
    shape = Shape(characters().vocabulary, recipe.width, recipe.layers, recipe.mlp_width)
    model = build(architecture, shape, seed=0).eval()
    cache = model.make_cache()
    tokens = mx.zeros((settings.decode_batch, 1), mx.int32)
    read = 0
    decoding = []
    for context in settings.contexts:
        while read < context:
            piece = min(256, context - read)
            mx.eval(model(mx.repeat(tokens, piece, axis=1), cache))
            read += piece
        seconds = []
        for _ in range(settings.decode_tokens):
            start = time.perf_counter()
            tokens = mx.argmax(model(tokens, cache)[:, -1:], axis=-1)
            mx.eval(tokens)
            seconds.append(time.perf_counter() - start)
            read += 1
        held = sum(array.nbytes for array in cached(cache)) // settings.decode_batch
        decoding.append({"context": context, "seconds": np.median(seconds), "bytes": held})
    mx.clear_cache()
    return {"architecture": asdict(architecture), "decoding": decoding}


def carry_out(settings: Settings, options: experiment.Options) -> Iterable[dict]:
    architectures = (Architecture("hgrn2", settings.expand_ratio), Architecture("transformer"))
    for architecture in architectures:
        yield measure_decoding(architecture, settings)
    runs = [(a, seed, settings) for seed in settings.seeds for a in architectures]
    yield from experiment.carry_out(run, runs, options)


def draw(record: dict, path: Path) -> None:
    """Loss by position, time per token and memory."""
    from matplotlib.figure import Figure  # Slow to import.

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_position, time_per_token, memory = figure.subplots(1, 3)
    context = record["settings"]["recipe"]["context"]
    trained = [run for run in experiment.finished(record) if "loss_by_position" in run]
    curves = experiment.over_seeds(trained, experiment.name, lambda run: run["loss_by_position"])
    for name, (means, deviations, _) in curves.items():
        positions = (np.arange(len(means)) + 0.5) / 4
        by_position.errorbar(positions, means, deviations, capsize=2, label=name)
    by_position.axvline(1, color="grey", linestyle=":")
    by_position.set(xlabel=f"position, in training lengths of {context} characters")
    by_position.set(ylabel="validation loss, nats per character")
    for run in record["runs"]:
        for axes, value, unit in ((time_per_token, "seconds", 1e3), (memory, "bytes", 1e-6)):
            points = [(at["context"], unit * at[value]) for at in run.get("decoding", ())]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=experiment.name(run))
    batch = record["settings"]["decode_batch"]
    time_per_token.set(ylabel=f"decoding, ms a token (batch {batch})", ylim=(0, None))
    memory.set(ylabel="kept of a sequence, MB", yscale="log")
    for axes in (time_per_token, memory):
        axes.set(xscale="log", xlabel="context, tokens")
    for axes in (by_position, time_per_token, memory):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    experiment.main("length", __doc__, SETTINGS, carry_out, draw)
