"""A model as a folder that mlx-lm loads."""

import shutil
from pathlib import Path
from typing import Any

from mlx_lm.utils import save_config, save_model
from sentencepiece import SentencePieceProcessor

from ..models.language_model import LanguageModel
from ..registration import MODEL_FILES


def write_model(
    folder: Path, model: LanguageModel, config: dict[str, Any], tokenizer: Path
) -> None:
    """Writes weights, ``config.json``, the model file and the tokenizer's files.

    Args:
        folder: An existing folder.
        config: Keys of ``config.json``; the model type, the model file and the
            ids of the special tokens are added.
        tokenizer: Folder of the tokenizer's files, ``tokenizer.model`` among them.

    Raises:
        OSError: If a file cannot be written.
    """
    save_model(folder, model)
    pieces = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    special = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    present = {name: index for name, index in special.items() if index >= 0}
    model_file = MODEL_FILES[model.model_type]
    added = {"model_type": model.model_type, "model_file": model_file.name} | present
    save_config(config | added, folder / "config.json")
    shutil.copyfile(model_file, folder / model_file.name)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
