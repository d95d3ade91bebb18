"""Checkpoints that exist whole or not at all, and hold all that a run resumes from.

A checkpoint is a folder that mlx-lm loads (float32 weights), with the
optimizer's state, the step and the configuration beside. Batches and dropout
are functions of the seed and the step, so there is no other state.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..convert.staging import staged_folder
from ..models.language_model import LanguageModel
from .config import TrainConfig
from .model_folder import write_model

# What may change between the start of a run and its continuation. The text has
# a check of its own, by content.
FREE_KEYS = {
    "checkpoint_interval",
    "checkpoints_kept",
    "data",
    "evaluation_interval",
    "output",
    "sample",
}


def save_checkpoint(
    folder: Path,
    step: int,
    config: TrainConfig,
    model: LanguageModel,
    optimizer: optim.Optimizer,
    tokenizer: Path,
) -> None:
    """Writes ``folder/<step>`` and removes the oldest checkpoints.

    Args:
        folder: The run's checkpoints.
        step: Updates done so far.
        tokenizer: Folder of the tokenizer's files.

    Raises:
        OSError: If a file cannot be written.
    """
    with staged_folder(folder / f"{step:08d}") as staging:
        write_model(staging, model, config.model, tokenizer)
        mx.save_safetensors(
            str(staging / "optimizer.safetensors"), dict(tree_flatten(optimizer.state))
        )
        training = {"step": step, "config": asdict(config)}
        (staging / "training.json").write_text(json.dumps(training, indent=4))
        for path in staging.iterdir():
            _flush_to_disk(path)
    for old in list_checkpoints(folder)[: -config.checkpoints_kept]:
        shutil.rmtree(old)


def _flush_to_disk(path: Path) -> None:
    """So that the files' contents are there, should the power fail after the renaming."""
    with open(path, "rb") as file:
        os.fsync(file)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; none if there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def load_checkpoint(
    path: Path, config: TrainConfig, model: LanguageModel, optimizer: optim.Optimizer
) -> int:
    """Puts weights and optimizer back to where they were.

    Returns:
        The updates that were done.

    Raises:
        ValueError: If ``config`` describes another run, naming the first key that differs.
    """
    training = json.loads((path / "training.json").read_text())
    then, now = (
        dict(tree_flatten({key: run[key] for key in sorted(run.keys() - FREE_KEYS)}))
        for run in (training["config"], asdict(config))
    )
    for key in then | now:
        if then.get(key) != now.get(key):
            raise ValueError(
                f"{key}: is {now.get(key)!r}, but was {then.get(key)!r} in the run that "
                f"{config.output} holds; choose another output"
            )
    for file in path.glob("model*.safetensors"):
        model.load_weights(str(file), strict=False)
    optimizer.state = tree_unflatten(list(mx.load(str(path / "optimizer.safetensors")).items()))
    optimizer.init(model.trainable_parameters())
    # Loading is lazy, and the files may be removed before the values are needed.
    mx.eval(model.parameters(), optimizer.state)
    return training["step"]
