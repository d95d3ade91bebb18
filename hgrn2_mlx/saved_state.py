"""The state after a text in a file: a few MB however long the text, to go on from at any time.

The file is a prompt cache of mlx-lm, whose metadata also says which model it
belongs to: a state means nothing to other weights.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from .convert.staging import staged_file
from .models.language_model import LanguageModel

FORMAT = "hgrn2 state"
VERSION = "1"


def save_state(file: str | Path, cache: list[Any], model: LanguageModel, tokens: int) -> None:
    """Writes what ``cache`` holds; the file appears complete or not at all.

    Args:
        file: Its name must end in ``.safetensors``.
        cache: Of ``model.make_cache()``, after some text, a single sequence.
        model: The model that read the text.
        tokens: How many tokens it has read.

    Raises:
        ValueError: If the file's name is not right, or it cannot be written.
    """
    check_name(file)
    metadata = {"format": FORMAT, "version": VERSION, "tokens": str(tokens)}
    with staged_file(Path(file)) as staging:
        save_prompt_cache(str(staging), cache, metadata | _identity(model))


def load_state(file: str | Path, model: LanguageModel) -> tuple[list[Any], int]:
    """The cache to go on with, and how many tokens it has read.

    Raises:
        ValueError: If the file is not a saved state, or is another model's.
        OSError: If there is no such file.
    """
    check_name(file)
    Path(file).stat()  # MLX's error is the same for a missing and for a broken file.
    try:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a saved state, or is damaged: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is a prompt cache, but not a state that hgrn2 saved")
    if metadata["version"] != VERSION:
        raise ValueError(
            f"{file} has version {metadata['version']} of the format; this program reads "
            f"version {VERSION}"
        )
    if difference := _difference(metadata, _identity(model)):
        raise ValueError(f"{file} is the state of another model: {difference}")
    return cache, int(metadata["tokens"])


def check_name(file: str | Path) -> None:
    """Refuses a name that MLX would not read.

    Raises:
        ValueError: If it does not end in ``.safetensors``.
    """
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"{file}: the name of a saved state must end in .safetensors")


def _identity(model: LanguageModel) -> dict[str, str]:
    """The model's configuration, and a fingerprint of its weights, adapters included.

    The fingerprint is of the sums of every parameter's bytes: it takes no longer than
    to read the weights once, no memory, and no fine-tuning leaves all sums as they were.
    """
    sums = {}
    for name, array in tree_flatten(model.parameters()):
        total = mx.view(array.reshape(-1), mx.uint8).sum().item()  # Modulo 2^32.
        sums[name] = [str(array.dtype), array.shape, total]
    return {
        "config": json.dumps(dataclasses.asdict(model.args), sort_keys=True),
        "weights": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
    }


def _difference(saved: dict[str, str], present: dict[str, str]) -> str | None:
    """In what way a state's model is not the one at hand."""
    if saved["config"] != present["config"]:
        theirs, ours = (json.loads(identity["config"]) for identity in (saved, present))
        keys = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
        values = (f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys)
        return ", ".join(values)
    if saved["weights"] != present["weights"]:
        return "its weights (or adapter, or quantization) are not these"
    return None
