"""The recurrence that mlx-recurrence has for a model's layers (pypi.org/project/mlx-recurrence).

For HGRN2 ``gla_scan``, which gets queries, keys and gates ready-made, and a single gate per
head, where HGRN2 makes one for each of its channels: it computes less. For HGRN ``rglru_scan``,
which gets the gates and the gated inputs. Both are kernels on an Apple GPU, for as many tokens
and channels as they take; in all other cases the package's references run, loops over tokens.
"""

from importlib.util import find_spec
from typing import Any

import mlx.core as mx

from ..machine import installed_version
from ..models import hgrn2
from .models import Subject
from .participant import CannotTakePart, Participant, Recurrence
from .recurrences import random_array

NAME = "mlx-recurrence"
MULTIPLE = 32  # of tokens and of channels, that its kernels take


def mlx_recurrence(subject: Subject) -> Participant:
    """The package's recurrence at the subject's size.

    Raises:
        CannotTakePart: If it is not installed, or has none of this size.
    """
    if not find_spec("mlx_recurrence"):
        raise CannotTakePart(f"{NAME} is not installed: pip install {NAME}")
    args = subject.args
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    if isinstance(args, hgrn2.ModelArgs):
        if args.forget_dim != args.hidden_size:
            raise CannotTakePart(
                f"{NAME} needs heads of as many keys as values, not of {args.expand_ratio} and "
                f"{args.hidden_size // args.num_heads}"
            )
        kind, note = "gla_scan", "whose heads have one gate each, not one per channel"
        recurrence = gla(args.num_heads, args.expand_ratio, subject.dtype, on_metal)
    else:
        kind, note = "rglru_scan", "with gates and gated inputs ready-made"
        recurrence = rglru(args.forget_dim, subject.dtype, on_metal)
    form = "kernels where they fit" if on_metal else "loops over tokens, as there is no Metal"
    version = installed_version(NAME)
    return Participant(
        NAME, recurrence=recurrence, note=f"{kind} of version {version}, {note}; {form}"
    )


def gla(heads: int, head_dim: int, dtype: mx.Dtype, on_metal: bool) -> Recurrence:
    """Queries, keys and values ``[1, T, heads, head_dim]``, and gates ``[1, T, heads]``."""
    from mlx_recurrence import gla_scan, gla_scan_reference

    def arguments(tokens: int) -> list[mx.array]:
        shapes = [(heads, head_dim)] * 3
        gates = mx.sigmoid(random_array(tokens, (heads,), dtype))
        return [*(random_array(tokens, shape, dtype) for shape in shapes), gates]

    return Recurrence(kernel_or_reference(gla_scan, gla_scan_reference, on_metal), arguments)


def rglru(channels: int, dtype: mx.Dtype, on_metal: bool) -> Recurrence:
    """Gates and inputs ``[1, T, channels]``."""
    from mlx_recurrence import rglru_scan, rglru_scan_reference

    def arguments(tokens: int) -> list[mx.array]:
        gates, inputs = (random_array(tokens, (channels,), dtype) for _ in range(2))
        return [mx.sigmoid(gates), inputs]

    return Recurrence(kernel_or_reference(rglru_scan, rglru_scan_reference, on_metal), arguments)


def kernel_or_reference(kernel: Any, reference: Any, on_metal: bool) -> Any:
    def run(first: mx.array, *others: mx.array) -> mx.array:
        fits = first.shape[1] % MULTIPLE == 0 and first.shape[-1] % MULTIPLE == 0
        return (kernel if on_metal and fits else reference)(first, *others)

    return run
