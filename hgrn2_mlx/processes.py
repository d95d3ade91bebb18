"""Several processes at one job, as ``mlx.launch`` starts them; MLX moves the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

# What MLX's errors begin with when a process of the group is gone.
BACKENDS = ("[ring]", "[jaccl]", "[nccl]", "[mpi]")


def wait_for_all() -> None:
    """Returns when every process has called it."""
    # On the CPU: a GPU gives up on work that waits for long.
    mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))


@contextmanager
def first_process_first() -> Iterator[None]:
    """A block that the first process (rank 0) has done before the others begin it."""
    first = mx.distributed.init().rank() == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def from_first_process(tree: Any) -> Any:
    """The arrays that rank 0 has; the others give a tree of the same names, shapes and types."""
    first = mx.distributed.init().rank() == 0
    arrays = []
    # In order of the names and one by one: every process must send the same in turn.
    for name, array in sorted(tree_flatten(tree), key=lambda pair: pair[0]):
        array = mx.distributed.all_sum(array if first else mx.zeros_like(array), stream=mx.cpu)
        mx.eval(array)
        arrays.append((name, array))
    return tree_unflatten(arrays)


@contextmanager
def all_needed() -> Iterator[None]:
    """A block that cannot go on without the other processes.

    Raises:
        ConnectionError: If one of them has ended or is out of reach.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(BACKENDS):
            raise
        raise ConnectionError(f"another process has ended or is out of reach: {error}") from error
