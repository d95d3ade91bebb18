"""What to measure, and at what sizes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# By quantity: its unit, and whether more of it is better.
QUANTITIES = {
    "prefill": ("tokens/s", True),
    "decode": ("tokens/s", True),
    "state or cache": ("bytes", False),
    "generation, peak memory": ("bytes", False),
    "training step": ("tokens/s", True),
    "training step, peak memory": ("bytes", False),
    "LoRA step": ("tokens/s", True),
    "LoRA step, peak memory": ("bytes", False),
    "recurrence": ("tokens/s", True),
    "recurrence and gradient": ("tokens/s", True),
    "recurrence and gradient, peak memory": ("bytes", False),
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        prompt_tokens: Lengths of prompts, at the first of the batch sizes.
        generation_tokens: How many tokens to decode after each.
        batch_sizes: Of which those after the first go with the first length.
        train_tokens: Lengths of sequences to train on, and to run a recurrence on,
            one at a time; empty for neither.
        trials: Of which the fastest counts.

    Raises:
        ValueError: If one of them is less than 1.
    """

    prompt_tokens: Sequence[int] = (512, 2048, 4096)
    generation_tokens: int = 16
    batch_sizes: Sequence[int] = (1, 4)
    train_tokens: Sequence[int] = (512, 1024)
    trials: int = 3

    def __post_init__(self):
        sizes = (*self.prompt_tokens, *self.batch_sizes, *self.train_tokens)
        if min(*sizes, self.generation_tokens, self.trials) < 1:
            raise ValueError("lengths, batch sizes and the number of trials must be at least 1")

    def generations(self) -> Iterator[tuple[int, int]]:
        """Pairs of a batch size and a prompt's length."""
        yield from ((self.batch_sizes[0], tokens) for tokens in self.prompt_tokens)
        yield from ((batch, self.prompt_tokens[0]) for batch in self.batch_sizes[1:])
