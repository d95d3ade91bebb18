"""HGRN's kernels against its definition in float64, on the host or on the GPU at hand.

Gradients are derivatives of that definition by a complex step, which needs no formula
and has no cancellation. See test_decode_kernel.py for what runs the kernels.
"""

import os

import metal_host
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ON_GPU, executing, load_reference
from metal_host import Mode
from mlx.utils import tree_flatten
from test_model import mean_loss

from hgrn2_mlx import kernels
from hgrn2_mlx.ops import elementwise_recurrence
from hgrn2_mlx.ops import elementwise_scan as scan_form

# A kernel that is left aside is a failure here, unless a test expects it.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:hgrn2-mlx")]

SHAPES = {  # batch, tokens, channels
    "one token": (1, 1, 64),
    "one token in a batch, fewer channels than lanes": (3, 1, 9),
    "part of a run": (2, 5, 33),
    "a run": (1, 8, 32),
    "a token more than a run": (2, 9, 40),
    "a tile": (1, 64, 32),
    "a token more than a tile": (2, 65, 33),
    "several tiles": (2, 205, 70),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
TOLERANCES = {mx.float32: 5e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def as_many_threads_as_are_watched(fresh_kernels, monkeypatch):
    if os.environ.get("METAL_HOST_MODE") == Mode.THREAD.value:
        monkeypatch.setattr(kernels.elementwise_scan, "SIMDGROUPS", 4)


def make_inputs(shape, dtype=mx.float32):
    """Usual gates in half of the channels, from 1e-9 to 1 in the others, some exactly 1."""
    batch, length, dim = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    f = np.where(np.arange(dim) % 2, rng.uniform(-21, 40, shape), rng.normal(1, 2, shape))
    f[rng.uniform(size=shape) < 0.05] = np.inf
    x, f = (mx.array(array, mx.float32).astype(dtype) for array in (x, f))
    lower_bound = mx.array(rng.uniform(0, 0.9, size=dim), mx.float32)
    state = mx.array(rng.normal(size=(batch, dim)), mx.float32)
    return x, f, lower_bound, state


def make_cotangents(shape, dtype=mx.float32):
    batch, _, dim = shape
    out_grad = mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
    return out_grad, mx.random.normal((batch, dim), key=mx.random.key(2))


def as_float64(arrays):
    return [np.array(array.astype(mx.float32), np.float64) for array in arrays]


def definition(x, f, lower_bound, state):
    """Token by token, for numbers of any kind with any dimensions in front of [B, T, D]."""
    states = []
    for t in range(x.shape[-2]):
        opened, closed = 1 / (1 + np.exp(-f[..., t, :])), 1 / (1 + np.exp(f[..., t, :]))
        value = x[..., t, :] / (1 + np.exp(-x[..., t, :]))
        state = (opened + lower_bound * closed) * state + (1 - lower_bound) * closed * value
        states.append(state)
    return np.stack(states, axis=-2)


def expected_results(inputs):
    states = definition(*as_float64(inputs))
    return [states, states[:, -1]]


def expected_gradients(inputs, cotangents):
    """Channels do not meet, so a step at one token gives the derivative of all of them."""
    x, f, lower_bound, state = as_float64(inputs)
    f = np.minimum(f, 700)  # the gate is 1 there, but numbers stay finite
    out_grad, state_grad = as_float64(cotangents)
    step = 1e-30

    def derivative(x, f, lower_bound, state):
        states = definition(x, f, lower_bound, state).imag / step
        return (states * out_grad).sum(-2) + states[..., -1, :] * state_grad

    at_token = 1j * step * np.eye(x.shape[1])[:, None, :, None]
    return [
        np.moveaxis(derivative(x + at_token, f, lower_bound, state), 0, 1),
        np.moveaxis(derivative(x, f + at_token, lower_bound, state), 0, 1),
        derivative(x, f, lower_bound + 1j * step, state).sum(0),
        derivative(x, f, lower_bound, state + 1j * step),
    ]


def assert_close(results, expected, tolerance):
    for result, exact in zip(as_float64(results), expected, strict=True):
        assert np.isfinite(result).all()
        assert np.abs(result - exact).max() / np.abs(exact).max() < tolerance


@every_dtype
@every_shape
def test_results_are_those_of_the_definition(shape, dtype):
    inputs = make_inputs(shape, dtype)
    with executing():
        assert scan_form.can_scan(*inputs[:2])
        states, last = elementwise_recurrence(*inputs)
    assert states.dtype == dtype and last.dtype == mx.float32
    expected = expected_results(inputs)
    assert_close([states], expected[:1], TOLERANCES[dtype])
    assert_close([last], expected[1:], TOLERANCES[mx.float32])
    assert mx.array_equal(states[:, -1], last.astype(dtype))


@every_dtype
@every_shape
def test_gradients_are_those_of_the_definition(shape, dtype):
    inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
    with executing():
        _, gradients = mx.vjp(elementwise_recurrence, inputs, cotangents)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype, mx.float32, mx.float32]
    expected = expected_gradients(inputs, cotangents)
    assert_close(gradients[:2], expected[:2], TOLERANCES[dtype])
    assert_close(gradients[2:], expected[2:], TOLERANCES[mx.float32])


def test_gradients_keep_their_digits_however_far_a_gate_is_open_or_shut():
    """Each by itself, though they are up to 1e17 apart."""
    logits = mx.linspace(-21, 40, 64)
    inputs = (mx.full((1, 1, 64), -1.5), logits[None, None], mx.full((64,), 0.25), mx.ones((1, 64)))
    cotangents = (mx.ones((1, 1, 64)), mx.zeros((1, 64)))
    with executing():
        _, gradients = mx.vjp(elementwise_recurrence, inputs, cotangents)
    expected = expected_gradients(inputs, cotangents)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert np.abs(np.array(gradient, np.float64) / exact - 1).max() < 1e-5


def test_results_alone_have_gradients():
    """Of the states, or of the last one, when the loss depends on nothing else."""
    shape = SHAPES["a token more than a tile"]
    inputs, (out_grad, state_grad) = make_inputs(shape), make_cotangents(shape)
    with executing():
        for index, cotangents in enumerate(
            [(out_grad, mx.zeros_like(state_grad)), (mx.zeros_like(out_grad), state_grad)]
        ):

            def loss(*inputs, index=index, weights=cotangents):
                return (elementwise_recurrence(*inputs)[index] * weights[index]).sum()

            gradients = mx.grad(loss, argnums=range(4))(*inputs)
            assert_close(gradients, expected_gradients(inputs, cotangents), 5e-6)


def test_a_sequence_in_pieces_gives_what_it_gives_whole():
    x, f, lower_bound, state = inputs = make_inputs(SHAPES["several tiles"])
    cuts = [100, 101, 102, 110]
    pieces = []
    with executing():
        for x_piece, f_piece in zip(mx.split(x, cuts, 1), mx.split(f, cuts, 1), strict=True):
            states, state = elementwise_recurrence(x_piece, f_piece, lower_bound, state)
            pieces.append(states)
    expected = expected_results(inputs)
    assert_close([mx.concatenate(pieces, axis=1), state], expected, TOLERANCES[mx.float32])


def test_masked_tokens_leave_the_state_exactly_as_it_was():
    shape = SHAPES["several tiles"]
    inputs = make_inputs(shape)
    mask = np.random.default_rng(1).uniform(size=shape[:2]) < 0.6
    mask[1] = False
    with executing():
        states, last = elementwise_recurrence(*inputs, mx.array(mask))
    assert mx.array_equal(last[1], inputs[-1][1])
    kept = [array[:1, mask[0]] for array in as_float64(inputs[:2])]
    expected = definition(*kept, *as_float64([inputs[2], inputs[3][:1]]))
    assert_close([states[:1, mx.array(np.flatnonzero(mask[0]))]], [expected], 5e-6)


def test_the_same_bits_in_every_run():
    shape = SHAPES["several tiles"]
    inputs, cotangents = make_inputs(shape), make_cotangents(shape)
    runs = []
    for order in ("forward", "reverse", 7):
        with executing(order=order):
            outputs, gradients = mx.vjp(elementwise_recurrence, inputs, cotangents)
            mx.eval(outputs, gradients)
        runs.append([*outputs, *gradients])
    for again in runs[1:]:
        assert all(mx.array_equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("mode", [Mode.ADDRESS, Mode.THREAD, Mode.SPACES], ids=str)
@pytest.mark.skipif(ON_GPU, reason="sanitizers watch the source on the host")
def test_under_sanitizers(monkeypatch, mode):
    if mode is Mode.THREAD:  # it sees so many threads
        monkeypatch.setattr(kernels.elementwise_scan, "SIMDGROUPS", 4)
    shape = (2, 139, 33)
    inputs = make_inputs(shape, mx.bfloat16)
    cotangents = make_cotangents(shape, mx.bfloat16)
    with metal_host.executing(mode=mode, order="reverse"):
        outputs, gradients = mx.vjp(elementwise_recurrence, inputs, cotangents)
    assert_close(outputs, expected_results(inputs), TOLERANCES[mx.bfloat16])
    assert_close(gradients, expected_gradients(inputs, cotangents), TOLERANCES[mx.bfloat16])


@pytest.mark.skipif(ON_GPU, reason="counted on the host")
def test_inputs_and_outputs_cross_device_memory_once():
    batch, length, dim = shape = (1, 512, 32)
    inputs, cotangents = make_inputs(shape, mx.bfloat16), make_cotangents(shape, mx.bfloat16)
    with metal_host.executing():
        assert scan_form.can_scan(*inputs[:2])
    with metal_host.executing(mode=Mode.TRAFFIC) as runs:
        mx.eval(mx.vjp(elementwise_recurrence, inputs, cotangents))
    forward, backward = (run.counters for run in runs[-2:])
    sequence = 2 * batch * length * dim
    for counters, read, written in ((forward, 2, 1), (backward, 3, 2)):
        assert counters.device_bytes_read_once < 1.1 * read * sequence
        assert counters.device_bytes_written < 1.1 * written * sequence
        assert counters.threadgroup_bytes <= 6 * 1024


@pytest.mark.parametrize(
    "changes", [{"x": (2, 20, 7), "f": (2, 20, 7)}, {"dtype": mx.float16}], ids=["narrow", "types"]
)
def test_what_does_not_fit_the_kernels_runs_in_operations(changes):
    shape = changes.get("x", (2, 20, 16))
    inputs = list(make_inputs(shape))
    inputs[1] = inputs[1].astype(changes.get("dtype", mx.float32))
    with executing():
        assert not scan_form.can_scan(*inputs[:2])
        assert_close(elementwise_recurrence(*inputs), expected_results(inputs), 5e-6)


@pytest.mark.parametrize("kernel, result", [("forward", 0), ("backward", 2)])
def test_a_kernel_that_gives_wrong_numbers_is_left_aside_with_a_warning(
    monkeypatch, kernel, result
):
    inputs = make_inputs(SHAPES["part of a run"])
    run = getattr(kernels.elementwise_scan, kernel)

    def wrong(*arguments):
        results = list(run(*arguments))
        results[result] = results[result] + 1
        return tuple(results)

    monkeypatch.setattr(kernels.elementwise_scan, kernel, wrong)
    with executing(), pytest.warns(UserWarning, match="elementwise scan kernel not used, its res"):
        assert_close(elementwise_recurrence(*inputs), expected_results(inputs), 5e-6)


def test_the_model_computes_what_fla_computes(relative_error):
    reference = load_reference("hgrn-default")
    model, tokens = reference.model, reference.tokens
    with executing() as runs:
        logits = model(tokens)
        _, gradients = nn.value_and_grad(model, mean_loss)(model, tokens)
        mx.eval(logits, gradients)
    if not ON_GPU:
        backward = [run for run in runs if "hgrn_scan_backward" in run.kernel.name]
        assert len(backward) == 1 + len(model.layers)  # one to be judged
    assert np.abs(np.array(logits) - np.array(reference.logits)).max() < 1e-4
    for name, gradient in tree_flatten(gradients):
        assert relative_error(gradient, reference.arrays[f"grads.{name}"]) < 1e-4, name
