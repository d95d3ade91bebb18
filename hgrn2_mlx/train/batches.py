"""Windows of a token array: shuffled for training, in order for evaluation."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np


class TrainingBatches:
    """Batches that are a pure function of the seed and the step.

    So a run that resumes needs no state of the data: it asks for the next step.
    An epoch cuts the tokens into windows that share one token with the next,
    from a random start, and visits them in a random order; a batch may begin in
    one epoch and end in the next.

    Args:
        tokens: Token ids, ``[N]``.
        batch_size: Windows in a batch.
        sequence_length: Tokens predicted in a window, which has one more.
        seed: Of starts and orders.
        rank: Which process this is, of ``processes`` that share every batch.
        processes: Their number, which divides ``batch_size``.

    Raises:
        ValueError: If the tokens do not fill one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ):
        _check_fills_a_window(tokens, sequence_length, "train")
        self.tokens = tokens
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.share = slice(rank, None, processes)
        # A window fewer than would fit leaves room for the random start.
        self.windows = max(1, len(tokens) // sequence_length - 1)
        self._starts = lru_cache(maxsize=2)(self._draw_starts)

    def _draw_starts(self, epoch: int) -> np.ndarray:
        """Where the epoch's windows start in ``tokens``, in the order of their visit."""
        generator = np.random.default_rng([self.seed, epoch])
        first = generator.integers(len(self.tokens) - self.windows * self.sequence_length)
        return first + self.sequence_length * generator.permutation(self.windows)

    def __getitem__(self, step: int) -> np.ndarray:
        """The process's share of the batch of a step (from 0).

        Returns:
            ``[batch_size / processes, sequence_length + 1]``, int32.
        """
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)[self.share]
        starts = [self._starts(n // self.windows)[n % self.windows] for n in positions]
        return _windows(self.tokens, starts, self.sequence_length)


class ValidationBatches:
    """All whole windows in order, so that every token but the first is predicted once.

    Args and errors as for :class:`TrainingBatches`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        processes: int = 1,
    ):
        _check_fills_a_window(tokens, sequence_length, "validation")
        self.tokens = tokens
        self.batch_size = batch_size // processes
        self.sequence_length = sequence_length
        self.share = slice(rank, None, processes)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches ``[B, sequence_length + 1]`` of the process's share of the windows, int32.

        B is ``batch_size / processes``, less in the last.
        """
        starts = range(0, len(self.tokens) - self.sequence_length, self.sequence_length)
        starts = starts[self.share]
        for n in range(0, len(starts), self.batch_size):
            yield _windows(self.tokens, starts[n : n + self.batch_size], self.sequence_length)


def _windows(tokens: np.ndarray, starts: Sequence[int], sequence_length: int) -> np.ndarray:
    windows = [tokens[start : start + sequence_length + 1] for start in starts]
    return np.stack(windows).astype(np.int32)


def _check_fills_a_window(tokens: np.ndarray, sequence_length: int, name: str) -> None:
    if len(tokens) <= sequence_length:
        raise ValueError(
            f"data.{name}: {len(tokens):,} tokens do not fill one window of "
            f"sequence_length + 1 = {sequence_length + 1:,}"
        )
