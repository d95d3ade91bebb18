"""Where a checkpoint is: a local folder, or a repository on the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# What a conversion reads, and so all that is downloaded.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first if ``source`` is a repository id.

    Raises:
        ValueError: If ``source`` is neither a folder nor a repository that can be
            downloaded.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder that holds config.json")
    if not _is_repository_id(str(source)):
        raise ValueError(
            f"{source} does not exist, nor is it a Hugging Face Hub repository id (owner/name)"
        )
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # The client's errors share no base class.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source} is not a folder, and downloading it from the Hub failed: {reason}"
        ) from error


def _is_repository_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


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


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of an HGRN2 checkpoint that is not quantized.

    Raises:
        ValueError: If there is none, or it describes something else.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "hgrn2":
        raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, not 'hgrn2'")
    for key in ("quantization", "quantization_config"):
        if key in config:
            raise ValueError(f"config.json: has {key!r}: the checkpoint is quantized already")
    return config
