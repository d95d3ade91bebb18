"""What a model can be compared with, by the names that ``hgrn2 bench --peers`` takes."""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.nn as nn

from .fla_peer import fla
from .mlx_recurrence_peer import mlx_recurrence
from .model_timing import measure_model
from .models import Size, Subject, build_llama, build_mamba2, count_parameters, in_type
from .participant import CannotTakePart, Participant


def mlx_model(name: str, build: Callable[[Size], nn.Module], subject: Subject) -> Participant:
    """A model of mlx-lm, as wide, as deep and of the same type as the subject.

    Raises:
        ValueError: If it cannot have this size.
    """
    quantization = subject.quantization
    return Participant(
        name,
        partial(
            measure_model,
            lambda: in_type(build(subject.size), subject.dtype, quantization),
            quantization is not None,
        ),
        count_parameters(build(subject.size)),  # Of which nothing is computed.
    )


PEERS: dict[str, Callable[[Subject], Participant]] = {
    "mamba2": partial(mlx_model, "mamba2", build_mamba2),
    "llama": partial(mlx_model, "llama", build_llama),
    "mlx-recurrence": mlx_recurrence,
    "fla": fla,
}


def find_peers(subject: Subject, names: Sequence[str] | None) -> list[Participant]:
    """The peers of these names, or all that can be measured here.

    Raises:
        ValueError: If one that is named is not installed, or cannot be measured here or at
            the subject's size; if one is not known.
    """
    if names is None:
        return [peer for name in PEERS if (peer := _if_possible(name, subject))]
    return [PEERS[name](subject) for name in names]


def _if_possible(name: str, subject: Subject) -> Participant | None:
    try:
        return PEERS[name](subject)
    except CannotTakePart:
        return None
