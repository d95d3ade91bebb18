"""Makes mlx-lm know HGRN and HGRN2 in this process.

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

from .models import ARCHITECTURES

# By model type, what a converted folder holds under model_file: to the byte, and by that name.
MODEL_FILES = {
    model_type: Path(__file__).parent / "models" / "model_files" / f"{model_type}.py"
    for model_type in ARCHITECTURES
}


def register() -> None:
    """Registers the architectures with mlx-lm; harmless when repeated."""
    for model_type, architecture in ARCHITECTURES.items():
        if model_type not in CONFIG_MAPPING:  # fla registers configs of its own.
            # transformers, which loads the tokenizer, learns that the model type is no mistake.
            config = type("Config", (PreTrainedConfig,), {"model_type": model_type})
            AutoConfig.register(model_type, config)
        sys.modules[f"mlx_lm.models.{model_type}"] = architecture
        setattr(mlx_lm.models, model_type, architecture)
    if not hasattr(mlx_lm.utils.load_model, "__wrapped__"):
        mlx_lm.utils.load_model = _trusting_our_model_files(mlx_lm.utils.load_model)


def _trusting_our_model_files(load_model):
    @functools.wraps(load_model)
    def trusting(model_path, *args, **kwargs):
        if _is_our_model_file(Path(model_path)):
            kwargs["trust_remote_code"] = True
        return load_model(model_path, *args, **kwargs)

    return trusting


def _is_our_model_file(model_path: Path) -> bool:
    """Whether the folder's model file is this package's own, so that running it adds nothing."""
    config = mlx_lm.utils.load_config(model_path)
    name, ours = config.get("model_file"), MODEL_FILES.get(config.get("model_type"))
    if ours is None or not isinstance(name, str) or not (model_path / name).is_file():
        return False
    return (model_path / name).read_bytes() == ours.read_bytes()
