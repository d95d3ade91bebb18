"""The files of a model folder beside its weights."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm.utils import save_config

from hgrn2_mlx.registration import MODEL_FILES

from .source import read_json
from .special_tokens import reconcile
from .tokenizer import convert_tokenizer


class Settings(NamedTuple):
    """What a folder's settings are, for the report.

    Args:
        tokenizer: File that the tokenizer came from; ``None`` if there is none.
        tokens: Ids that have a token; ``None`` without a tokenizer.
        warnings: What a user should know.
    """

    tokenizer: str | None
    tokens: int | None
    warnings: list[str]


def write_settings(source: Path, config: dict[str, Any], vocab_size: int, folder: Path) -> Settings:
    """Writes configuration and tokenizer of the folder ``source``, and what else they name.

    Args:
        config: The ``config.json`` to write. One with a ``model_file`` is for mlx-lm.
        vocab_size: Rows of the embedding.
        folder: An existing folder.

    Raises:
        ValueError: If a file is corrupt, or the tokenizer does not fit the model.
        OSError: If a file cannot be read or written.
    """
    tokenizer = convert_tokenizer(source, folder, vocab_size)
    files = {"config.json": config}
    if (source / "generation_config.json").is_file():
        files["generation_config.json"] = read_json(source / "generation_config.json")
    files, warnings = reconcile(files, tokenizer, vocab_size)

    save_config(files.pop("config.json"), folder / "config.json")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    if "model_file" in config:
        shutil.copyfile(MODEL_FILES[config["model_type"]], folder / config["model_file"])
    if tokenizer is None:
        warnings.append("no tokenizer found: only the weights were converted")
        return Settings(None, None, warnings)
    return Settings(tokenizer.origin, len(tokenizer.vocabulary), warnings)
