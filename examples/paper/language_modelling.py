"""Language modelling on Shakespeare: HGRN, HGRN2 and a transformer of equal size.

    python examples/paper/language_modelling.py [--size small] [--out FOLDER]

Every model reads the same batches in the same order, as characters and as byte pairs.
The full size has nanoGPT's shape for characters (6 layers, width 384, context 256, dropout
0.2, 10.65 million parameters there), so that its published validation loss of 1.4697 is a
mark from outside; nanoGPT trains for 82 million characters, these for less.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import experiment
from shakespeare import Recipe, byte_pairs, characters, train_on
from training import Architecture

NANOGPT = 1.4697  # github.com/karpathy/nanoGPT, README, November 2025


@dataclass
class Settings:
    characters: Recipe
    byte_pairs: Recipe
    vocabulary: int  # of the byte pairs
    expand_ratio: int
    seeds: list[int]


SETTINGS = {
    "tiny": Settings(
        characters=Recipe(16, 2, 32, 16, 2, 4, 1e-2, validation_tokens=64),
        byte_pairs=Recipe(16, 2, 32, 16, 2, 4, 1e-2, validation_tokens=64),
        vocabulary=384,
        expand_ratio=16,
        seeds=[0],
    ),
    "small": Settings(
        characters=Recipe(64, 3, 128, 64, 16, 200, 5e-3, validation_tokens=8192),
        byte_pairs=Recipe(64, 3, 128, 64, 16, 100, 5e-3, validation_tokens=8192),
        vocabulary=512,
        expand_ratio=64,
        seeds=[0, 1, 2],
    ),
    "full": Settings(
        characters=Recipe(384, 6, 1024, 256, 32, 1200, 2e-3, dropout=0.2),
        byte_pairs=Recipe(384, 6, 1024, 256, 32, 600, 2e-3, dropout=0.2),
        vocabulary=1024,
        expand_ratio=128,
        seeds=[0, 1, 2],
    ),
}

UNITS = ("characters", "byte_pairs")


def run(
    architecture: Architecture,
    seed: int,
    unit: str,
    settings: Settings,
    folder: Path,
    deadline: float,
) -> dict:
    """Trains one model on text in one unit; the loss is also given in nats per character."""
    by_character = unit == "characters"
    text = characters() if by_character else byte_pairs(settings.vocabulary, folder)
    result = train_on(text, architecture, seed, getattr(settings, unit), deadline)
    tokens_per_character = (len(text.validation) - 1) / text.validation_characters
    return {"unit": unit, "per_character": result["best"] * tokens_per_character, **result}


def carry_out(settings: Settings, options: experiment.Options) -> Iterable[dict]:
    architectures = (
        Architecture("hgrn"),
        Architecture("hgrn2", settings.expand_ratio),
        Architecture("transformer"),
    )
    if "byte_pairs" in options.parts:
        byte_pairs(settings.vocabulary, options.out)  # Once, for all runs.
    runs = [
        (architecture, seed, unit, settings, options.out)
        for unit in options.parts
        for seed in settings.seeds
        for architecture in architectures
    ]
    yield from experiment.carry_out(run, runs, options)


def draw(record: dict, path: Path) -> None:
    """Validation loss over training for each unit, and the best of it in nats per character."""
    from matplotlib.figure import Figure  # Slow to import.

    runs = experiment.finished(record)
    units = [unit for unit in UNITS if any(run["unit"] == unit for run in runs)]
    figure = Figure(figsize=(4.5 * len(units), 4), layout="constrained")
    panels = figure.subplots(1, len(units), squeeze=False)[0]
    for unit, axes in zip(units, panels, strict=True):
        of_unit = [run for run in runs if run["unit"] == unit]
        lowest = experiment.over_seeds(of_unit, experiment.name, lambda run: run["per_character"])
        for model, (steps, losses, deviations) in sorted(experiment.curves(of_unit).items()):
            mean, deviation, seeds = lowest[model]
            label = f"{model}: {mean:.3f} ± {deviation:.3f} ({seeds} seeds)"
            axes.errorbar(steps, losses, deviations, capsize=2, label=label)
        if unit == "characters":
            axes.axhline(NANOGPT, color="grey", linestyle=":", label=f"nanoGPT: {NANOGPT}")
        axes.set(title=unit.replace("_", " "), xlabel="step", ylabel="validation loss, nats/token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="best, nats per character", fontsize=8)
    figure.savefig(path, format="png", dpi=100)


if __name__ == "__main__":
    experiment.main("language_modelling", __doc__, SETTINGS, carry_out, draw, UNITS)
