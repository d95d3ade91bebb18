"""The configuration of a training run: one YAML file, in which every key is checked.

The dataclasses are the schema: their field names are the keys, their types
what a value must be, their defaults what a missing key means.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml

from ..models import ARCHITECTURES
from ..models.typed_values import Condition, read_section, read_value

Count = Annotated[int, Condition(lambda n: n >= 1, "at least 1")]
Seed = Annotated[int, Condition(lambda n: 0 <= n < 2**32, "at least 0 and less than 2^32")]
Positive = Annotated[float, Condition(lambda x: x > 0, "more than 0")]
NotNegative = Annotated[float, Condition(lambda x: x >= 0, "at least 0")]
Fraction = Annotated[float, Condition(lambda x: 0 <= x < 1, "at least 0 and less than 1")]


@dataclass
class DataConfig:
    """The text, in UTF-8 files; paths are relative to the current directory.

    Args:
        train: Files to train on, each held in memory while it is tokenized.
        validation: Files to evaluate on. Without any, the end of every training
            file is set aside.
        validation_share: That end's share of the characters.
        tokenizer: A sentencepiece model; without one, a byte-pair encoding of
            ``model.vocab_size`` pieces is trained on the training text.
    """

    train: list[str]
    validation: list[str] = field(default_factory=list)
    validation_share: Fraction = 0.1
    tokenizer: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW, with a learning rate that rises linearly from 0 and falls as a cosine.

    Args:
        learning_rate: The peak, reached after ``warmup_steps``.
        final_learning_rate: What the cosine falls to at the last step.
        warmup_steps: Steps of the linear rise.
        betas: Decay rates of the gradient's first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of the matrices (linear layers and
            embeddings); norms, biases, convolutions and lower bounds do not decay.
        gradient_clip: Global norm that gradients are scaled down to; ``.inf`` for none.
    """

    learning_rate: Positive
    final_learning_rate: NotNegative = 0.0
    warmup_steps: Count = 100
    betas: list[Fraction] = field(default_factory=lambda: [0.9, 0.95])
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    gradient_clip: Positive = 1.0


@dataclass
class SampleConfig:
    """The text that the model writes at every evaluation.

    Args:
        prompt: What it continues.
        tokens: Length of the continuation.
        temperature: Softmax temperature; 0 for the most likely token.
    """

    prompt: str
    tokens: Count = 100
    temperature: NotNegative = 0.8


@dataclass
class TrainConfig:
    """A training run.

    Args:
        output: Folder of the run: its tokens, checkpoints, log and, in the end,
            its model.
        model: The keys of the model's ``config.json``, and ``initializer_range``.
        data: The text.
        optimizer: How the weights move.
        steps: Updates of the weights.
        batch_size: Sequences in a batch.
        sequence_length: Tokens predicted in each sequence.
        precision: ``"float32"``, or ``"bfloat16"`` for activations and a working
            copy of the weights; the weights themselves, the gradients that reach
            the optimizer, its moments and the loss stay float32.
        seed: Of the initial weights, the order of the batches and the dropout.
        dropout: Share of the numbers zeroed in the embeddings, in what every
            mixer and MLP adds to the residual stream and before the head.
        token_dropout: Share of the tokens whose whole embedding is zeroed.
        evaluation_interval: Steps between evaluations on all validation text.
        checkpoint_interval: Steps between checkpoints.
        checkpoints_kept: How many of the newest checkpoints stay.
        sample: Text to write at every evaluation, if any.
    """

    output: str
    model: dict[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    steps: Count
    batch_size: Count = 16
    sequence_length: Count = 512
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    dropout: Fraction = 0.0
    token_dropout: Fraction = 0.0
    evaluation_interval: Count = 200
    checkpoint_interval: Count = 200
    checkpoints_kept: Count = 2
    sample: SampleConfig | None = None

    def __post_init__(self) -> None:
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is not less "
                f"than steps, {self.steps}"
            )
        if len(self.optimizer.betas) != 2:
            raise ValueError(f"optimizer.betas: expected two numbers, got {self.optimizer.betas}")
        if not self.data.train:
            raise ValueError("data.train: expected at least one file")
        if not self.data.validation and not self.data.validation_share:
            raise ValueError("data.validation_share: 0 leaves nothing to evaluate on")
        if self.sample and not self.sample.prompt:
            raise ValueError("sample.prompt: expected at least one character")
        model_type = self.model.get("model_type", "hgrn2")
        if model_type not in ARCHITECTURES:
            known = " or ".join(sorted(ARCHITECTURES, reverse=True))
            raise ValueError(f"model.model_type: expected {known}, got {model_type!r}")
        self.architecture = ARCHITECTURES[model_type]
        types = get_type_hints(self.architecture.ModelArgs) | {"initializer_range": NotNegative}
        self.model = {
            name: read_value(value, types[name], f"model.{name}") if name in types else value
            for name, value in self.model.items()
        }
        try:
            self.model_args = self.architecture.ModelArgs.from_dict(self.model)
        except ValueError as error:
            raise ValueError(f"model: {str(error).removeprefix('config.json: ')}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Checks every key and value.

        Raises:
            ValueError: One line that begins with the key at fault.
        """
        config: TrainConfig = read_section(values, cls, "")
        return config

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Reads a YAML file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: One line that names the file and the key at fault.
        """
        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
