"""The decode kernel against MLX's operations: the Metal source on the host, or on the GPU at hand.

Where there is no GPU, ``metal_host`` compiles the very source that MLX would give
an Apple GPU and runs it on the CPU, each lane's reads, writes and simdgroup
functions as Metal defines them.
"""

import os

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from conftest import ON_GPU, executing
from metal_host import Mode

from hgrn2_mlx import gated_recurrence, kernels
from hgrn2_mlx.ops import decode as decode_form
from hgrn2_mlx.ops.recurrent import recurrent

pytestmark = pytest.mark.gpu

SHAPES = {  # batch, tokens, heads, key dimension, value dimension
    "one token": (1, 1, 2, 64, 64),
    "the public models' head": (1, 1, 1, 128, 128),
    "several tokens": (2, 3, 2, 32, 16),
    "more keys than values": (1, 4, 1, 256, 16),
    "more values than keys": (3, 2, 1, 32, 96),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
TOLERANCES = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def as_many_threads_as_are_watched(fresh_kernels, monkeypatch):
    if os.environ.get("METAL_HOST_MODE") == Mode.THREAD.value:
        monkeypatch.setattr(kernels.decode, "SIMDGROUPS", 4)


def make_inputs(shape, dtype=mx.float32):
    """Logits of gates from 1e-9 to 1 among usual ones; a few tokens masked by infinity."""
    batch, tokens, heads, key_dim, value_dim = shape
    rng = np.random.default_rng(0)
    q, v = (rng.normal(size=(batch, tokens, heads, dim)) for dim in (key_dim, value_dim))
    f = rng.uniform(-21, 40, size=q.shape)
    q, f, v = (mx.array(x, mx.float32).astype(dtype) for x in (q, f, v))
    lower_bound = mx.array(rng.uniform(0, 0.9, size=(heads, key_dim)), mx.float32)
    state = mx.array(rng.normal(size=(batch, heads, value_dim, key_dim)), mx.float32)
    return q, f, v, lower_bound, state


def assert_close(results, expected, tolerance):
    for result, exact in zip(results, expected, strict=True):
        result, exact = (np.array(x.astype(mx.float32), np.float64) for x in (result, exact))
        assert np.isfinite(result).all()
        assert np.abs(result - exact).max() / np.abs(exact).max() < tolerance


@every_dtype
@every_shape
def test_decode_equals_the_definition(shape, dtype):
    inputs = make_inputs(shape, dtype)
    scale = shape[3] ** -0.5
    with executing():
        assert decode_form.can_decode(*inputs[:3])
        output, state = gated_recurrence(*inputs)
        expected = recurrent(*inputs, scale)
        assert output.dtype == dtype and state.dtype == mx.float32
        assert_close([output], expected[:1], TOLERANCES[dtype])
        assert_close([state], expected[1:], 2e-6)


def test_decode_leaves_the_state_of_a_masked_row_exactly_as_it_was():
    inputs = make_inputs(SHAPES["several tokens"])
    mask = mx.array([[False] * 3, [True] * 3])
    with executing():
        _, state = gated_recurrence(*inputs, mask)
        assert mx.array_equal(state[0], inputs[-1][0])
        assert not mx.array_equal(state[1], inputs[-1][1])


def test_decode_has_the_gradient_of_the_definition():
    inputs = make_inputs(SHAPES["several tokens"])

    def loss(function):
        def weighted_sum(*inputs):
            output, state = function(*inputs)
            return (output * mx.cos(mx.arange(output.size).reshape(output.shape))).sum() + (
                state * mx.sin(mx.arange(state.size).reshape(state.shape))
            ).sum()

        return mx.grad(weighted_sum, argnums=range(5))

    with executing():
        actual = loss(gated_recurrence)(*inputs)
        expected = loss(lambda *inputs: recurrent(*inputs, inputs[0].shape[-1] ** -0.5))(*inputs)
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("mode", [Mode.ADDRESS, Mode.THREAD, Mode.SPACES], ids=str)
@pytest.mark.skipif(ON_GPU, reason="sanitizers watch the source on the host")
def test_decode_under_sanitizers(monkeypatch, mode):
    if mode is Mode.THREAD:  # it sees so many threads
        monkeypatch.setattr(kernels.decode, "SIMDGROUPS", 4)
    inputs = make_inputs(SHAPES["several tokens"], mx.bfloat16)
    with metal_host.executing(mode=mode, order="reverse"):
        output, _ = gated_recurrence(*inputs)
        assert_close([output], recurrent(*inputs, 32**-0.5)[:1], TOLERANCES[mx.bfloat16])


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 16, 16), (1, 1, 1, 320, 64), (1, 1, 2, 64, 24), (1, 5, 2, 64, 64)], ids=str
)
def test_what_does_not_fit_the_kernel_runs_in_operations(shape):
    inputs = make_inputs(shape)
    with executing():
        assert not decode_form.can_decode(*inputs[:3])
        assert_close(gated_recurrence(*inputs), recurrent(*inputs, shape[3] ** -0.5), 2e-6)


def test_a_kernel_that_gives_wrong_numbers_is_left_aside_with_a_warning(monkeypatch):
    inputs = make_inputs(SHAPES["one token"])
    run = kernels.decode.decode

    def wrong(*arguments):
        output, state = run(*arguments)
        return output + 1, state

    monkeypatch.setattr(kernels.decode, "decode", wrong)
    with executing(), pytest.warns(UserWarning, match="decode kernel not used, its result differs"):
        assert_close(gated_recurrence(*inputs), recurrent(*inputs, 64**-0.5), 2e-6)


def test_a_kernel_that_does_not_compile_is_left_aside_with_a_warning(monkeypatch):
    inputs = make_inputs(SHAPES["one token"])

    def broken(*arguments):
        raise RuntimeError("no function named simd_sum")

    monkeypatch.setattr(kernels.decode, "decode", broken)
    with executing(), pytest.warns(UserWarning, match="it does not run: no function named"):
        assert_close(gated_recurrence(*inputs), recurrent(*inputs, 64**-0.5), 2e-6)
