"""Whose checkpoint it is: the names in a config and of the tensors tell."""

from collections.abc import Container
from types import ModuleType
from typing import Any

from . import authors, fla


def find_dialect(config: dict[str, Any], tensors: Container[str]) -> tuple[ModuleType, str]:
    """The module that knows the dialect of a checkpoint, and how it was seen.

    Args:
        config: The checkpoint's ``config.json``.
        tensors: The names of its tensors.

    Raises:
        ValueError: If the config is of one dialect and the tensors are of another.
    """
    key = "decoder_embed_dim"
    if key in config:
        dialect, other, reason = authors, fla, f"config.json has the key {key}"
    else:
        dialect, other, reason = fla, authors, f"config.json's model_type is {config['model_type']}"
    if dialect.EMBEDDING in tensors:
        return dialect, f"{reason}, the embedding is {dialect.EMBEDDING}"
    if other.EMBEDDING in tensors:
        raise ValueError(
            f"{reason}, which is {dialect.NAME}, but the embedding is {other.EMBEDDING}, "
            f"which is {other.NAME}"
        )
    return dialect, reason
