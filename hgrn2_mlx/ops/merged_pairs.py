"""The recurrence of HGRN, whose state is one number per channel, in plain MLX operations.

``h_t = f_t h_{t-1} + w_t`` has no matrix product to gain from chunks, but two
tokens are one token: a pair decays the state by ``f_1 f_2`` and writes
``f_2 w_1 + w_2``. So the states after every second token are the same recurrence
over half as many tokens, down to a single one, and those between follow in one
step each. That is 2 T multiplications in 2 log2(T) operations. Nothing is
divided and no logarithm taken: all factors are products of gates in [0, 1], and
an underflow is the correct limit.
"""

import mlx.core as mx
import mlx.nn as nn

from .gates import forget_gates


def merged_pairs(
    x: mx.array, f: mx.array, lower_bound: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """HGRN's recurrence over any number of tokens.

    Arguments and results as in :func:`elementwise_recurrence`.
    """
    forget_gate, input_gate = forget_gates(f, lower_bound)
    states = _scan(forget_gate, input_gate * nn.silu(x.astype(mx.float32)), state)
    return states.astype(x.dtype), states[:, -1]


@mx.custom_function
def _scan(decay: mx.array, write: mx.array, state: mx.array) -> mx.array:
    """``h_t = decay_t h_{t-1} + write_t`` for ``[B, T, D]``, from ``state [B, D]``."""
    return _merge_pairs(decay, write, state)


@_scan.vjp
def _scan_gradients(
    primals: tuple[mx.array, ...], cotangent: mx.array, states: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The same recurrence backwards in time: ``dh_t = do_t + decay_{t+1} dh_{t+1}``.

    It needs the states only, which are the output; the gradient of the merges
    would keep all of their intermediates.
    """
    decay, _, state = primals
    after_last = mx.zeros_like(state)
    decays = mx.concatenate([decay[:, 1:], after_last[:, None]], axis=1)
    grads = _merge_pairs(decays[:, ::-1], cotangent[:, ::-1], after_last)[:, ::-1]
    before = mx.concatenate([state[:, None], states[:, :-1]], axis=1)
    return grads * before, grads, grads[:, 0] * decay[:, 0]


def _merge_pairs(decay: mx.array, write: mx.array, state: mx.array) -> mx.array:
    length = decay.shape[1]
    if length == 1:
        return decay * state[:, None] + write
    pairs = length // 2
    (decay_1, decay_2), (write_1, write_2) = ((x[:, 0::2], x[:, 1::2]) for x in (decay, write))
    second = _merge_pairs(
        decay_2 * decay_1[:, :pairs], decay_2 * write_1[:, :pairs] + write_2, state
    )
    # Of an odd number of tokens the last has no partner, and comes after the last pair.
    entering = mx.concatenate([state[:, None], second], axis=1)[:, : length - pairs]
    first = decay_1 * entering + write_1
    states = mx.stack([first[:, :pairs], second], axis=2).flatten(1, 2)
    return mx.concatenate([states, first[:, pairs:]], axis=1)
