"""The recurrence of a layer by itself: HGRN2's and HGRN's, and how any is timed."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ..models import hgrn2
from ..models.activations import ACTIVATIONS
from ..models.language_model import LanguageModelArgs
from ..ops import elementwise_recurrence, gated_recurrence
from .participant import Progress, Recurrence, Values
from .settings import Settings

# A trial has calls for as long as this, so that it counts little to launch and to wait.
TRIAL_SECONDS = 0.1
MOST_CALLS = 100


def recurrence_of(args: LanguageModelArgs, dtype: mx.Dtype) -> Recurrence:
    """What the model's recurrent layers compute from their logits, in a type."""
    uniform = functools.partial(mx.random.uniform, low=0.1, high=0.5)
    if isinstance(args, hgrn2.ModelArgs):
        keys = (args.num_heads, args.expand_ratio)
        values = (args.num_heads, args.hidden_size // args.num_heads)
        settings = {"scale": args.recurrence_scale, "query_act": ACTIVATIONS[args.query_act]}
        return Recurrence(
            lambda *arguments: gated_recurrence(*arguments, **settings)[0],
            lambda tokens: [
                *(random_array(tokens, shape, dtype) for shape in (keys, keys, values)),
                uniform(shape=keys),
            ],
        )
    channels = (args.forget_dim,)
    return Recurrence(
        lambda *arguments: elementwise_recurrence(*arguments)[0],
        lambda tokens: [
            *(random_array(tokens, channels, dtype) for _ in range(2)),
            uniform(shape=channels),
        ],
    )


def random_array(tokens: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """``[1, tokens, *shape]``, normally distributed."""
    return mx.random.normal((1, tokens, *shape)).astype(dtype)


def measure_recurrence(
    recurrence: Recurrence, settings: Settings, progress: Progress
) -> Iterator[Values]:
    """Speed of the outputs, and of outputs and gradients with the most memory they take."""
    for tokens in settings.train_tokens:
        progress(f"the recurrence of {tokens} tokens")
        mx.random.seed(0)
        arguments = recurrence.arguments(tokens)
        output = recurrence.run(*arguments)
        gradient = mx.random.normal(output.shape).astype(output.dtype)
        mx.eval(arguments, gradient)

        def outputs(arguments=arguments) -> mx.array:
            return recurrence.run(*arguments)

        def gradients(arguments=arguments, gradient=gradient) -> Any:
            return mx.vjp(recurrence.run, arguments, [gradient])

        forward = seconds_per_call(outputs, settings.trials)
        both = seconds_per_call(gradients, settings.trials)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(gradients())
        yield {
            ("recurrence", 1, tokens): tokens / forward,
            ("recurrence and gradient", 1, tokens): tokens / both,
            ("recurrence and gradient, peak memory", 1, tokens): mx.get_peak_memory(),
        }


def seconds_per_call(call: Callable[[], Any], trials: int) -> float:
    """Of the fastest of several trials, each of several calls that do not wait for each other."""
    mx.eval(call())  # This one compiles.
    started = time.perf_counter()
    mx.eval(call())
    calls = min(MOST_CALLS, 1 + int(TRIAL_SECONDS / (time.perf_counter() - started)))
    seconds = []
    for _ in range(trials):
        mx.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            mx.async_eval(call())
        mx.synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return min(seconds)
