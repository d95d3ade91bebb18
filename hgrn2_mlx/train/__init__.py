"""Training from scratch: a YAML file describes a run, ``train`` carries it out."""

from .config import TrainConfig
from .run import how_to_resume, train

__all__ = ["TrainConfig", "how_to_resume", "train"]
