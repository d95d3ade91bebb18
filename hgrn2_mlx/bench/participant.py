"""What takes part in a comparison: a model, a recurrence by itself, or both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .settings import Settings

# A figure for each quantity, batch size and number of tokens.
Values = dict[tuple[str, int, int], float]
Progress = Callable[[str], None]


class CannotTakePart(ValueError):
    """Why a peer cannot be measured here or beside this model, and what to do about it."""


@dataclass(frozen=True)
class Recurrence:
    """What a layer does between its projections.

    Args:
        run: Gives the outputs; differentiable in all of its arguments.
        arguments: Random ones for a number of tokens, batch 1.
    """

    run: Callable[..., mx.array]
    arguments: Callable[[int], list[mx.array]]


@dataclass(frozen=True)
class Participant:
    """What is measured.

    Args:
        name: For the report.
        measure: Yields figures of a model; ``None`` for what is none.
        parameters: How many the model has, before quantization.
        recurrence: Measured by itself, if another participant has one too.
        note: What it is, where the name does not say it.
    """

    name: str
    measure: Callable[[Settings, Progress], Iterator[Values]] | None = None
    parameters: int | None = None
    recurrence: Recurrence | None = None
    note: str | None = None
