"""Where a checkpoint is: a local folder, or a repository on the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

from hgrn2_mlx.models import ARCHITECTURES

from .hub import download, is_repository_id


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder or the file of its weights, downloaded if it is a repository id.

    Raises:
        ValueError: If ``source`` neither exists nor is a repository that can be
            downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    if not is_repository_id(str(source)):
        raise ValueError(
            f"{source} does not exist, nor is it a Hugging Face Hub repository id (owner/name)"
        )
    return download(str(source), revision)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ValueError: If it is missing or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not JSON: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name} is not JSON ({error}): it begins with {text[:20]!r}"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    return value


def read_config(folder: Path, quantized: bool = False, name: str = "config.json") -> dict[str, Any]:
    """The ``config.json`` of a checkpoint of HGRN2 or HGRN.

    Args:
        folder: Holds the file.
        quantized: Whether the checkpoint may be quantized.
        name: The file, if it has another name.

    Raises:
        ValueError: If there is none, or it describes something else.
    """
    config = read_json(folder / name)
    # Not in the dictionary itself, which would fail on a list in the file.
    if config.get("model_type") not in list(ARCHITECTURES):
        known = " or ".join(sorted(ARCHITECTURES, reverse=True))
        raise ValueError(f"{name}: model_type is {config.get('model_type')!r}, not {known}")
    for key in ("quantization", "quantization_config"):
        if key in config and not quantized:
            raise ValueError(f"{name}: has {key!r}: the checkpoint is quantized already")
    return config
