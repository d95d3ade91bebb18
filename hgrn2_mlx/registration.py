"""Makes mlx-lm know HGRN and HGRN2 in this process, and imports it no sooner than it is used.

mlx-lm finds an architecture as the module ``mlx_lm.models.<model_type>``, or
in a Python file that the folder's ``config.json`` names under ``model_file``,
which it runs only with ``trust_remote_code``. Converted folders carry such a
file for the stock commands; with this package imported, no trust is needed.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# By model type, what a converted folder holds under model_file: to the byte, and by that name.
MODEL_FILES = {
    file.stem: file for file in sorted((Path(__file__).parent / "models/model_files").glob("*.py"))
}


def register() -> None:
    """Registers the architectures with mlx-lm, or as soon as it is imported.

    Harmless when repeated.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if utils := sys.modules.get("mlx_lm.utils"):
        _register_with(utils)


class _Finder(MetaPathFinder):
    """Finds our architectures among mlx-lm's, and the moment when mlx-lm itself is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, model_type = name.rpartition(".")
        if package == "mlx_lm.models" and model_type in MODEL_FILES:
            return ModuleSpec(name, _ArchitectureLoader())
        if name == "mlx_lm.utils":
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _followed_by(spec.loader.exec_module, _register_with)
            return spec
        return None


class _ArchitectureLoader(Loader):
    """Gives this package's module under mlx-lm's name for it."""

    def exec_module(self, module: ModuleType) -> None:
        model_type = module.__name__.rpartition(".")[2]
        ours = importlib.import_module(f"{__package__}.models.{model_type}")
        sys.modules[module.__name__] = ours  # What the import system then takes.


def _followed_by(
    execute: Callable[[ModuleType], None], then: Callable[[ModuleType], None]
) -> Callable[[ModuleType], None]:
    def execute_both(module: ModuleType) -> None:
        execute(module)
        then(module)

    return execute_both


def _register_with(utils: ModuleType) -> None:
    """Prepares what loads a folder: transformers its tokenizer, ``mlx_lm.utils`` its model."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    for model_type in MODEL_FILES:
        if model_type not in CONFIG_MAPPING:  # fla registers configs of its own.
            # So that transformers does not take the model type for a mistake.
            config = type("Config", (PreTrainedConfig,), {"model_type": model_type})
            AutoConfig.register(model_type, config)
    if not hasattr(utils.load_model, "__wrapped__"):
        utils.load_model = _trusting_our_model_files(utils.load_model, utils.load_config)


def _trusting_our_model_files(
    load_model: Callable[..., Any], load_config: Callable[[Path], dict[str, Any]]
) -> Callable[..., Any]:
    @functools.wraps(load_model)
    def trusting(model_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_path)
        if _is_our_model_file(folder, load_config(folder)):
            kwargs["trust_remote_code"] = True
        return load_model(model_path, *args, **kwargs)

    return trusting


def _is_our_model_file(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder's model file is this package's own, so that running it adds nothing."""
    name, ours = config.get("model_file"), MODEL_FILES.get(config.get("model_type"))
    if ours is None or not isinstance(name, str) or not (folder / name).is_file():
        return False
    return (folder / name).read_bytes() == ours.read_bytes()
