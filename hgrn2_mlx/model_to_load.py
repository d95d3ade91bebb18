"""Whether mlx-lm can load the model that a command is given, known before anything slow is done."""

from pathlib import Path

from .convert.hub import is_repository_id
from .convert.safetensors_files import read_header
from .convert.source import read_json

# Any of them makes a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model(name: str) -> None:
    """Refuses a model that cannot be loaded, for a reason that mlx-lm would not name.

    Args:
        name: A folder, or the id of a repository on the Hub.

    Raises:
        ValueError: If it does not exist and is no id, has no or a broken ``config.json``,
            truncated weights, or no tokenizer.
        OSError: If it is not a folder, or cannot be read.
    """
    folder = Path(name)
    if not folder.exists():
        if not is_repository_id(name):
            raise ValueError(f"{name} does not exist, nor is it a Hub repository id (owner/name)")
        return
    try:
        read_json(folder / "config.json")
        for file in folder.glob("model*.safetensors"):
            read_header(file)
    except ValueError as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    if not any((folder / tokenizer).is_file() for tokenizer in TOKENIZERS):
        raise ValueError(
            f"{name} has no tokenizer: put that of the original checkpoint beside it and convert "
            f"again, or copy its {TOKENIZERS[0]} and tokenizer_config.json there"
        )
