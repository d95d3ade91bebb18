"""The chunked kernels and their gradients against the definition in float64.

Where there is no GPU, ``metal_host`` compiles the very source that MLX would give an
Apple GPU and runs it on the CPU.
"""

import contextlib
import dataclasses
import functools
import os

import mlx.core as mx
import numpy as np
import pytest
from conftest import ON_GPU, executing
from metal_host import Mode

from hgrn2_mlx import gated_recurrence, kernels
from hgrn2_mlx.ops import chunked_kernels as form

# A kernel that is left aside would pass every test of numbers.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:hgrn2-mlx")]

SHAPES = {  # batch, tokens, heads, key dimension, value dimension
    "one token": (1, 1, 1, 16, 16),
    "a chunk and a token": (2, 17, 1, 32, 16),
    "two segments": (1, 150, 2, 64, 32),
    "a batch of odd lengths": (3, 37, 2, 48, 80),
    "the public models' head": (1, 40, 1, 128, 128),
    "more keys than values": (1, 20, 1, 128, 16),
    "more values than keys": (1, 20, 1, 16, 128),
    "the largest head": (1, 20, 1, 256, 256),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
TOLERANCES = {mx.float32: 5e-6, mx.float16: 4e-3, mx.bfloat16: 2e-2}
NAMES = ("output", "state", "q", "f", "v", "lower bound", "initial state")


@pytest.fixture(autouse=True)
def as_many_threads_as_are_watched(fresh_kernels, monkeypatch):
    if os.environ.get("METAL_HOST_MODE") == Mode.THREAD.value:
        narrow = dataclasses.replace(kernels.tiling.METAL, group=4)
        monkeypatch.setattr(kernels.tiling, "METAL", narrow)


def make_inputs(shape, dtype=mx.float32, gates="usual", seed=0):
    """Arrays to call the recurrence with, and cotangents of its results."""
    batch, tokens, heads, key_dim, value_dim = shape
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, tokens, heads, key_dim))
    v, output_gradient = rng.normal(size=(2, batch, tokens, heads, value_dim))
    f = rng.normal(1, 2, size=q.shape)
    if gates == "extreme":  # from 1e-9 to 1
        f = np.where(rng.random(q.shape) < 0.5, rng.uniform(-21, 40, size=q.shape), f)
    lower_bound = rng.uniform(0.02, 0.9, size=(heads, key_dim))
    state, state_gradient = rng.normal(size=(2, batch, heads, value_dim, key_dim))
    q, f, v, output_gradient = (
        mx.array(x, mx.float32).astype(dtype) for x in (q, f, v, output_gradient)
    )
    lower_bound, state, state_gradient = (
        mx.array(x, mx.float32) for x in (lower_bound, state, state_gradient)
    )
    return [q, f, v, lower_bound, state], [output_gradient, state_gradient]


def as_float64(array):
    return np.array(array.astype(mx.float32), np.float64)


def definition(arguments, cotangents, scale):
    """Results and gradients of the recurrence, token by token in float64."""
    q, f, v, lower_bound, state = map(as_float64, arguments)
    output_gradient, state_gradient = map(as_float64, cotangents)
    with np.errstate(over="ignore"):
        opened, closed = 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(f))
        sigmoid = 1 / (1 + np.exp(-q))
    query, key = scale * q * sigmoid, (1 - lower_bound) * closed
    gate = opened + lower_bound * closed

    tokens = range(q.shape[1])
    states, outputs = [state], []
    for t in tokens:
        written = v[:, t, :, :, None] * key[:, t, :, None, :]
        states.append(states[-1] * gate[:, t, :, None, :] + written)
        outputs.append(np.einsum("bhvk,bhk->bhv", states[-1], query[:, t]))

    gradients = {name: np.zeros_like(x) for name, x in (("query", q), ("gate", f), ("key", f))}
    v_gradient, gradient = np.zeros_like(v), state_gradient
    for t in reversed(tokens):
        gradient = gradient + output_gradient[:, t, :, :, None] * query[:, t, :, None, :]
        gradients["query"][:, t] = np.einsum("bhvk,bhv->bhk", states[t + 1], output_gradient[:, t])
        gradients["key"][:, t] = np.einsum("bhvk,bhv->bhk", gradient, v[:, t])
        gradients["gate"][:, t] = (gradient * states[t]).sum(-2)
        v_gradient[:, t] = np.einsum("bhvk,bhk->bhv", gradient, key[:, t])
        gradient = gradient * gate[:, t, :, None, :]

    of_gates = gradients["gate"] - gradients["key"]
    q_gradient = gradients["query"] * scale * sigmoid * (1 + q * (1 - sigmoid))
    f_gradient = of_gates * (1 - lower_bound) * opened * closed
    bound_gradient = (of_gates * closed).sum((0, 1))
    return (
        [np.stack(outputs, 1), states[-1]],
        [q_gradient, f_gradient, v_gradient, bound_gradient, gradient],
    )


def assert_right(results, expected, tolerance, names=NAMES):
    """Differences are relative to the largest element of each array."""
    for name, result, exact in zip(names, results, expected, strict=True):
        result = as_float64(result)
        assert np.isfinite(result).all(), name
        difference = np.abs(result - exact).max() / max(np.abs(exact).max(), 1e-30)
        # The gradient of a lower bound divides by gates as small as the bound.
        assert difference < tolerance * (20 if name == "lower bound" else 1), (name, difference)


def check(shape, dtype=mx.float32, gates="usual", **options):
    arguments, cotangents = make_inputs(shape, dtype, gates)
    scale = shape[3] ** -0.5
    function = functools.partial(form.chunked_kernels, scale=scale)
    with executing(**options) as runs:
        assert kernels.chunked.fits(*arguments[:3])
        results, gradients = mx.vjp(function, arguments, cotangents)
        mx.eval(results, gradients)
    assert [x.dtype for x in results] == [dtype, mx.float32]
    assert [x.dtype for x in gradients] == [dtype] * 3 + [mx.float32] * 2
    expected = definition(arguments, cotangents, scale)
    assert_right(results + gradients, expected[0] + expected[1], TOLERANCES[dtype])
    return runs


@every_shape
def test_results_and_gradients_are_those_of_the_definition(shape):
    check(shape)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_16_bit_types(dtype):
    check(SHAPES["two segments"], dtype)
    check(SHAPES["the public models' head"], dtype)


def test_the_widest_heads():
    check((1, 20, 1, 256, 256), mx.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gates_from_closed_to_open(dtype):
    check(SHAPES["two segments"], dtype, "extreme")


def test_gates_that_are_all_closed_or_all_open():
    arguments, cotangents = make_inputs(SHAPES["a chunk and a token"])
    function = functools.partial(form.chunked_kernels, scale=0.2)
    for logit in (-80.0, 80.0):
        arguments[1] = mx.full(arguments[1].shape, logit)
        with executing():
            got = mx.vjp(function, arguments, cotangents)
            mx.eval(got)
        expected = definition(arguments, cotangents, 0.2)
        assert_right(got[0] + got[1], expected[0] + expected[1], 5e-6)


def test_gates_that_underflow_without_a_lower_bound():
    """The gradient of the bound, which divides by them, is finite, the others are exact."""
    arguments, cotangents = make_inputs(SHAPES["a chunk and a token"])
    arguments[1] = mx.where(arguments[1] < 1, -200.0, arguments[1])
    arguments[3] = mx.zeros_like(arguments[3])
    function = functools.partial(form.chunked_kernels, scale=0.2)
    with executing():
        results, gradients = mx.vjp(function, arguments, cotangents)
        mx.eval(results, gradients)
    expected = definition(arguments, cotangents, 0.2)
    of_bound = NAMES.index("lower bound")
    got, exact = results + gradients, expected[0] + expected[1]
    assert np.isfinite(as_float64(got[of_bound])).all()
    exact[of_bound] = as_float64(got[of_bound])
    assert_right(got, exact, 5e-6)


@pytest.mark.parametrize(
    ("length", "mode"), [(256, None), (300, None), (385, None), (256, Mode.THREAD)], ids=str
)
def test_a_long_sequence_is_cut_into_parts(monkeypatch, length, mode):
    monkeypatch.setattr(kernels.tiling, "PART_TOKENS", 128)
    runs = check((2, length, 1, 32, 16), mode=mode)
    if not ON_GPU:
        names = [run.kernel.name for run in runs]
        assert sum("join_parts" in name for name in names) == 3  # forward, and twice backward


def test_a_masked_token_changes_nothing():
    """The state after a row's padding, on either side, is exactly that of the row alone."""
    (q, f, v, lower_bound, state), _ = make_inputs((2, 21, 2, 32, 16))
    mask = mx.array([[False] * 5 + [True] * 16, [True] * 21])
    with executing():
        output, end = gated_recurrence(q, f, v, lower_bound, state, mask)
        alone, alone_end = gated_recurrence(q[:1, 5:], f[:1, 5:], v[:1, 5:], lower_bound, state[:1])
        nothing, unchanged = gated_recurrence(q, f, v, lower_bound, state, mx.zeros_like(mask))
        mx.eval(output, end, alone, alone_end, unchanged)
    np.testing.assert_allclose(output[:1, 5:], alone, atol=2e-6)
    np.testing.assert_allclose(end[:1], alone_end, atol=2e-6)
    assert mx.array_equal(unchanged, state)


def test_a_sequence_may_be_split_anywhere():
    (q, f, v, lower_bound, state), _ = make_inputs((1, 45, 2, 32, 16))
    with executing():
        whole, end = gated_recurrence(q, f, v, lower_bound, state)
        first, middle = gated_recurrence(q[:, :19], f[:, :19], v[:, :19], lower_bound, state)
        second, split_end = gated_recurrence(q[:, 19:], f[:, 19:], v[:, 19:], lower_bound, middle)
        mx.eval(whole, end, first, second, split_end)
    np.testing.assert_allclose(mx.concatenate([first, second], axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(split_end, end, atol=2e-6)


def test_gradients_are_the_same_bits_every_time():
    arguments, cotangents = make_inputs(SHAPES["a batch of odd lengths"], mx.bfloat16)
    function = functools.partial(form.chunked_kernels, scale=0.2)
    runs = []
    for order in ("forward", "reverse"):
        with executing(order=order):
            runs.append(mx.vjp(function, arguments, cotangents))
            mx.eval(runs[-1])
    for first, second in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert mx.array_equal(first, second)


@pytest.mark.skipif(ON_GPU, reason="sanitizers watch the source on the host")
@pytest.mark.parametrize("mode", [Mode.ADDRESS, Mode.THREAD, Mode.SPACES], ids=str)
def test_under_sanitizers(mode):
    check((2, 19, 1, 32, 16), mx.bfloat16, mode=mode, order="reverse")


@pytest.mark.skipif(ON_GPU, reason="Apple GPUs have memory for two chunks at once")
def test_scans_with_memory_for_one_chunk(monkeypatch):
    small = dataclasses.replace(kernels.tiling.METAL, buffers=1)
    monkeypatch.setattr(kernels.tiling, "METAL", small)
    check((1, 19, 1, 32, 16), mode=Mode.THREAD, order="reverse")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 9, 1, 24, 16), mx.float32),
        ((1, 9, 1, 16, 8), mx.float32),
        ((1, 9, 1, 272, 16), mx.bfloat16),
    ],
    ids=str,
)
def test_what_does_not_fit_the_kernels_runs_in_operations(shape, dtype):
    arguments, _ = make_inputs(shape, dtype)
    with executing() as runs:
        assert not form.can_run(*arguments[:3])
        results = gated_recurrence(*arguments)
        mx.eval(results)
    assert not runs
    expected, _ = definition(arguments, make_inputs(shape, dtype)[1], shape[3] ** -0.5)
    assert_right(results, expected, TOLERANCES[dtype], NAMES[:2])


def test_kernels_that_give_wrong_numbers_are_left_aside_with_a_warning(monkeypatch):
    arguments, cotangents = make_inputs(SHAPES["a chunk and a token"])
    right = kernels.chunked.backward

    def wrong(*arguments):
        q_gradient, *others = right(*arguments)
        return q_gradient * 1.1, *others

    monkeypatch.setattr(kernels.chunked, "backward", wrong)
    with (
        executing(),
        pytest.warns(UserWarning, match="chunked kernel not used, its result differs"),
    ):
        got = mx.vjp(gated_recurrence, arguments, cotangents)
        mx.eval(got)
    expected = definition(arguments, cotangents, 32**-0.5)
    assert_right(got[0] + got[1], expected[0] + expected[1], 5e-6)


def test_a_size_that_the_gpu_refuses_is_left_aside_and_others_are_not(monkeypatch):
    forward = kernels.chunked.forward

    def refuses_64_keys(q, *others):
        if q.shape[-1] == 64:
            raise ValueError("Thread group size (256) is greater than the maximum allowed threads")
        return forward(q, *others)

    monkeypatch.setattr(kernels.chunked, "forward", refuses_64_keys)
    with executing():
        for keys, taken in ((64, False), (32, True)):
            shape = (1, 19, 1, keys, 16)
            arguments, cotangents = make_inputs(shape)
            expected = definition(arguments, cotangents, keys**-0.5)
            warns = contextlib.nullcontext() if taken else pytest.warns(match="does not run")
            with warns:
                assert form.can_run(*arguments[:3]) == taken
            got = mx.vjp(gated_recurrence, arguments, cotangents)
            assert_right(got[0] + got[1], expected[0] + expected[1], 5e-6)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_check_before_the_first_use_accepts_every_type(dtype):
    with executing():
        assert form._kernels_are_right(2, 32, 16, dtype)
