"""Makes mlx-lm know HGRN2 in this process.

mlx-lm finds an architecture as the module ``mlx_lm.models.<model_type>``, or
in a Python file that the folder's ``config.json`` names under ``model_file``,
which it runs only with ``trust_remote_code``. Converted folders carry such a
file for the stock commands; with this package imported, no trust is needed.
"""

import functools
import sys
from pathlib import Path

import mlx_lm.models
import mlx_lm.utils
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .models import hgrn2

# What a converted folder's model_file holds, to the byte.
MODEL_FILE = Path(__file__).parent / "models" / "model_file.py"


class HGRN2Config(PreTrainedConfig):
    """Tells transformers, which loads the tokenizer, that the model type is no mistake."""

    model_type = "hgrn2"


def register() -> None:
    """Registers the architectures with mlx-lm; harmless when repeated."""
    if HGRN2Config.model_type not in CONFIG_MAPPING:  # fla registers a config of its own.
        AutoConfig.register(HGRN2Config.model_type, HGRN2Config)
    sys.modules["mlx_lm.models.hgrn2"] = hgrn2
    mlx_lm.models.hgrn2 = hgrn2
    if not hasattr(mlx_lm.utils.load_model, "__wrapped__"):
        mlx_lm.utils.load_model = _trusting_our_model_file(mlx_lm.utils.load_model)


def _trusting_our_model_file(load_model):
    @functools.wraps(load_model)
    def trusting(model_path, *args, **kwargs):
        if _is_our_model_file(Path(model_path)):
            kwargs["trust_remote_code"] = True
        return load_model(model_path, *args, **kwargs)

    return trusting


def _is_our_model_file(model_path: Path) -> bool:
    """Whether the folder's model file is this package's own, so that running it adds nothing."""
    name = mlx_lm.utils.load_config(model_path).get("model_file")
    if not isinstance(name, str) or not (model_path / name).is_file():
        return False
    return (model_path / name).read_bytes() == MODEL_FILE.read_bytes()
