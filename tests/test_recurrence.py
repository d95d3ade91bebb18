"""The gated recurrence against its definition, written out in numpy in float64."""

import mlx.core as mx
import numpy as np
import pytest

from hgrn2_mlx import gated_recurrence
from hgrn2_mlx.ops import chunked, recurrent
from hgrn2_mlx.ops.chunked import SEGMENT_TOKENS

INPUTS = ("q", "f", "v", "lower_bound", "state")
RESULTS = ("outputs", "final state")

# Relative to the largest value of the result.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}

# Below it float16 keeps fewer digits, and the gradient of a closed gate is 1e-9.
SMALLEST_FLOAT16 = 6e-5


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def reference(q, f, v, lower_bound, state, mask=None):
    """Outputs ``[B, T, H, V]`` and all ``T + 1`` states, by the equations."""
    gate = lower_bound + (1 - lower_bound) * sigmoid(f)
    key = (1 - lower_bound) * sigmoid(-f)
    if mask is not None:
        gate = np.where(mask[..., None, None], gate, 1)
        key = np.where(mask[..., None, None], key, 0)
    query = q * sigmoid(q) * q.shape[-1] ** -0.5
    outputs, states = [], [state]
    for t in range(q.shape[1]):
        write = v[:, t, :, :, None] * key[:, t, :, None, :]
        states.append(states[-1] * gate[:, t, :, None, :] + write)
        outputs.append(np.einsum("bhvk,bhk->bhv", states[-1], query[:, t]))
    return np.stack(outputs, axis=1), states


def reference_gradients(q, f, v, lower_bound, state, mask, d_outputs, d_state):
    """Gradients of ``INPUTS``, by walking the recurrence backwards."""
    _, states = reference(q, f, v, lower_bound, state, mask)
    scale = q.shape[-1] ** -0.5
    query = q * sigmoid(q) * scale
    gate = lower_bound + (1 - lower_bound) * sigmoid(f)
    key = (1 - lower_bound) * sigmoid(-f)
    d_query, d_gate_minus_key, d_v = np.zeros_like(q), np.zeros_like(f), np.zeros_like(v)
    for t in reversed(range(q.shape[1])):
        d_query[:, t] = np.einsum("bhv,bhvk->bhk", d_outputs[:, t], states[t + 1])
        d_state = d_state + d_outputs[:, t, :, :, None] * query[:, t, :, None, :]
        # A masked token neither decays nor writes.
        on = 1.0 if mask is None else mask[:, t, None, None]
        d_v[:, t] = on * np.einsum("bhvk,bhk->bhv", d_state, key[:, t])
        d_gate_minus_key[:, t] = on * (
            np.einsum("bhvk,bhvk->bhk", d_state, states[t])
            - np.einsum("bhvk,bhv->bhk", d_state, v[:, t])
        )
        decay = gate[:, t] if mask is None else np.where(on, gate[:, t], 1)
        d_state = d_state * decay[:, :, None, :]
    d_q = d_query * scale * sigmoid(q) * (1 + q * sigmoid(-q))
    d_f = d_gate_minus_key * (1 - lower_bound) * sigmoid(f) * sigmoid(-f)
    d_lower_bound = (d_gate_minus_key * sigmoid(-f)).sum((0, 1))
    return d_q, d_f, d_v, d_lower_bound, d_state


def forget_logits(rng, shape, kind):
    """Logits of forget gates from 1e-9 (-21) to exactly 1 in float32 (+40)."""
    return {
        "usual": lambda: rng.normal(size=shape) * 2 + 2,
        "closed": lambda: np.full(shape, -21.0),
        "open": lambda: np.full(shape, 40.0),
        "mixed": lambda: rng.uniform(-21, 40, size=shape),
        "extremes": lambda: rng.choice([-21.0, 40.0], size=shape),
    }[kind]()


def make_inputs(length, batch=1, heads=2, key_dim=8, value_dim=6, gates="mixed", dtype=mx.float32):
    """Random inputs in the order of ``INPUTS``, and cotangents of both results."""
    rng = np.random.default_rng(length)
    keys, values = (batch, length, heads, key_dim), (batch, length, heads, value_dim)
    state = (batch, heads, value_dim, key_dim)
    q, v, d_outputs = (rng.normal(size=shape) for shape in (keys, values, values))
    q, f, v = (
        mx.array(x, mx.float32).astype(dtype) for x in (q, forget_logits(rng, keys, gates), v)
    )
    lower_bound = mx.array(rng.uniform(0, 0.9, size=(heads, key_dim)), mx.float32)
    state, d_state = (mx.array(rng.normal(size=state), mx.float32) for _ in range(2))
    return (q, f, v, lower_bound, state), (mx.array(d_outputs, mx.float32), d_state)


def in_float64(arrays):
    return [np.array(x.astype(mx.float32), dtype=np.float64) for x in arrays]


def gradients(function, inputs, cotangents, mask=None):
    """Gradients of ``INPUTS`` where ``cotangents`` weigh the results."""

    def loss(*inputs):
        return sum(
            (weight * result.astype(mx.float32)).sum()
            for weight, result in zip(cotangents, function(*inputs, mask), strict=True)
        )

    return mx.grad(loss, argnums=range(len(inputs)))(*inputs)


def assert_close(actual, expected, tolerance, names):
    for name, array, exact in zip(names, actual, expected, strict=True):
        (result,) = in_float64([array])
        assert np.isfinite(result).all(), name
        least = SMALLEST_FLOAT16 if array.dtype == mx.float16 else 1e-37
        error = np.abs(result - exact).max() / max(np.abs(exact).max(), least)
        assert error < tolerance, f"{name}: {error:.1e}"


def check(function, inputs, cotangents, mask=None):
    """Results and gradients against the reference."""
    tolerance = TOLERANCE[inputs[0].dtype]
    exact = in_float64(inputs)
    exact_mask = None if mask is None else np.array(mask)
    if mask is not None:
        cotangents = (cotangents[0] * mask[..., None, None], cotangents[1])

    outputs, state = function(*inputs, mask)
    assert outputs.dtype == inputs[2].dtype and state.dtype == mx.float32
    expected, states = reference(*exact, exact_mask)
    if mask is not None:
        outputs, expected = outputs * mask[..., None, None], expected * exact_mask[..., None, None]
    assert_close([outputs], [expected], tolerance, RESULTS[:1])
    assert_close([state], [states[-1]], TOLERANCE[mx.float32], RESULTS[1:])

    actual = gradients(function, inputs, cotangents, mask)
    assert [x.dtype for x in actual] == [x.dtype for x in inputs]
    expected = reference_gradients(*exact, exact_mask, *in_float64(cotangents))
    assert_close(actual, expected, tolerance, INPUTS)


def form(function):
    """One form with the arguments of ``gated_recurrence``, which masks by infinite gate logits."""

    def run(q, f, v, lower_bound, state, mask=None):
        if mask is not None:
            f = mx.where(mask[..., None, None], f, mx.array(mx.inf, f.dtype))
        return function(q, f, v, lower_bound, state, q.shape[-1] ** -0.5)

    return run


FORMS = {
    "gated_recurrence": gated_recurrence,
    "recurrent": form(recurrent.recurrent),
    "chunked": form(chunked.chunked),
}
every_form = pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)


def test_the_reference_gradients_are_those_of_the_reference():
    inputs, cotangents = make_inputs(5, heads=1, key_dim=3, value_dim=2, gates="usual")
    inputs, cotangents = in_float64(inputs), in_float64(cotangents)
    mask = np.array([[True, True, False, True, True]])

    def loss(*inputs):
        outputs, states = reference(*inputs, mask)
        return (outputs * cotangents[0]).sum() + (states[-1] * cotangents[1]).sum()

    for n, gradient in enumerate(reference_gradients(*inputs, mask, *cotangents)):
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(inputs[n])
            step[index] = 1e-6
            above, below = (
                loss(*inputs[:n], inputs[n] + sign * step, *inputs[n + 1 :]) for sign in (1, -1)
            )
            assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-8)


@every_form
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 31, 63, 64, 65, 127, 200])
def test_equals_the_definition_at_any_length(function, length):
    check(function, *make_inputs(length))


@every_form
@pytest.mark.parametrize("gates", ["usual", "closed", "open", "mixed", "extremes"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition_for_gates_from_nearly_0_to_1_in_every_type(function, gates, dtype):
    check(function, *make_inputs(70, gates=gates, dtype=dtype))


@pytest.mark.parametrize("key_dim, value_dim", [(1, 1), (3, 7), (16, 4), (4, 16)])
def test_equals_the_definition_when_keys_and_values_differ_in_size(key_dim, value_dim):
    check(gated_recurrence, *make_inputs(33, batch=3, key_dim=key_dim, value_dim=value_dim))


@pytest.mark.parametrize("batch, length", [(1, SEGMENT_TOKENS + 77), (32, 64 * 12 + 5)])
def test_equals_the_definition_across_segments(batch, length):
    inputs = make_inputs(length, batch=batch, heads=1, key_dim=4, value_dim=3, gates="usual")
    check(gated_recurrence, *inputs)


def test_no_lower_bound_and_no_state_mean_zeros():
    (q, f, v, lower_bound, state), _ = make_inputs(20)
    zeros = gated_recurrence(q, f, v, mx.zeros_like(lower_bound), mx.zeros_like(state))
    for actual, expected in zip(gated_recurrence(q, f, v), zeros, strict=True):
        assert mx.array_equal(actual, expected)


def test_the_scale_multiplies_the_outputs():
    (q, f, v, *_), _ = make_inputs(20)
    once, _ = gated_recurrence(q, f, v, scale=1.0)
    thrice, _ = gated_recurrence(q, f, v, scale=3.0)
    assert mx.allclose(3 * once, thrice, rtol=1e-5)


MASKS = {
    "left": lambda t, length: t >= length // 3,
    "right": lambda t, length: t < length - length // 3,
    "holes": lambda t, length: t % 3 != 1,
}


@every_form
@pytest.mark.parametrize("length", [1, 7, 70, 130])
@pytest.mark.parametrize("where", MASKS)
def test_masked_tokens_are_as_if_absent(function, length, where):
    mask = mx.stack([MASKS[where](mx.arange(length), length), mx.arange(length) >= 0])
    check(function, *make_inputs(length, batch=2), mask=mask)


@every_form
@pytest.mark.parametrize("length", [1, 70])
def test_a_masked_row_leaves_its_state_exactly_as_it_was(function, length):
    inputs, _ = make_inputs(length, batch=2)
    mask = mx.stack([mx.zeros(length), mx.ones(length)]).astype(mx.bool_)
    _, state = function(*inputs, mask)
    assert mx.array_equal(state[0], inputs[-1][0])
    assert not mx.array_equal(state[1], inputs[-1][1])


@pytest.mark.parametrize("cuts", [[1], [37], [64], [69], [20, 21, 40], list(range(1, 70))])
def test_calls_that_hand_on_the_state_equal_one_call(cuts):
    (q, f, v, lower_bound, state), _ = make_inputs(70, batch=2)
    whole, final = gated_recurrence(q, f, v, lower_bound, state)
    outputs = []
    for piece in zip(*(mx.split(x, cuts, axis=1) for x in (q, f, v)), strict=True):
        output, state = gated_recurrence(*piece, lower_bound, state)
        outputs.append(output)
    assert_close(
        [mx.concatenate(outputs, axis=1), state], in_float64([whole, final]), 1e-5, RESULTS
    )


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("q", mx.zeros((2, 3, 2))),
        ("f", mx.zeros((2, 3, 2, 9))),
        ("v", mx.zeros((2, 4, 2, 6))),
        ("lower_bound", mx.zeros((2, 6))),
        ("state", mx.zeros((2, 2, 8, 6))),
        ("mask", mx.zeros((3, 2), mx.bool_)),
    ],
)
def test_a_wrong_shape_is_refused_by_name(name, replacement):
    inputs, _ = make_inputs(3, batch=2)
    arguments = dict(zip(INPUTS, inputs, strict=True)) | {name: replacement}
    with pytest.raises(ValueError, match=rf"{name}.*\({replacement.shape[0]}, "):
        gated_recurrence(**arguments)


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 3)])
def test_no_tokens_at_all_are_refused(batch, length):
    with pytest.raises(ValueError, match="no tokens"):
        gated_recurrence(*(mx.zeros((batch, length, 2, 4)) for _ in range(3)))


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("transform", [mx.compile, mx.checkpoint])
def test_results_and_gradients_are_the_same_under(transform, length):
    inputs, cotangents = make_inputs(length, batch=2)
    mask = MASKS["holes"](mx.arange(2 * length).reshape(2, length), length)
    transformed = transform(lambda *inputs: gated_recurrence(*inputs))
    expected, actual = (
        [*function(*inputs, mask), *gradients(function, inputs, cotangents, mask)]
        for function in (gated_recurrence, transformed)
    )
    assert_close(actual, in_float64(expected), 1e-6, [*RESULTS, *INPUTS])


def test_the_compiled_gradient_is_the_gradient():
    inputs, cotangents = make_inputs(70)
    expected = gradients(gated_recurrence, inputs, cotangents)
    compiled = mx.compile(lambda *inputs: gradients(gated_recurrence, inputs, cotangents))
    assert_close(compiled(*inputs), in_float64(expected), 1e-6, INPUTS)


@pytest.mark.parametrize("length", [1, 70])
def test_vmap_maps_over_a_new_axis(length):
    inputs, _ = make_inputs(length, batch=6)
    stacked = [x if x.ndim == 2 else mx.unflatten(x, 0, (3, 2)) for x in inputs]
    axes = [None if x.ndim == 2 else 0 for x in inputs]
    mask = MASKS["holes"](mx.arange(6 * length).reshape(6, length), length)
    stacked.append(mx.unflatten(mask, 0, (3, 2)))
    mapped = mx.vmap(lambda *inputs: gated_recurrence(*inputs), in_axes=(*axes, 0))(*stacked)
    expected = in_float64(gated_recurrence(*inputs, mask))
    assert_close([x.flatten(0, 1) for x in mapped], expected, 1e-6, RESULTS)


def test_vmap_of_a_gradient_is_refused_rather_than_wrong():
    inputs, _ = make_inputs(70)
    gradient = mx.grad(lambda *inputs: gated_recurrence(*inputs)[0].sum())
    with pytest.raises(ValueError, match="vmap"):
        mx.vmap(gradient)(*(mx.stack([x, x]) for x in inputs))


@pytest.mark.parametrize("length", [5, 70])
def test_a_loss_of_gradients_has_the_gradient_of_the_definition(length):
    inputs, cotangents = make_inputs(length, gates="usual")

    def second_order(function):
        def penalty(*inputs):
            return sum((g**2).sum() for g in gradients(function, inputs, cotangents))

        return mx.grad(penalty, argnums=range(5))(*inputs)

    expected = in_float64(second_order(FORMS["recurrent"]))
    assert_close(second_order(gated_recurrence), expected, 1e-4, INPUTS)


def test_the_gradient_needs_little_memory_and_only_linearly_more():
    heads, size = 1, 64

    def peak(length):
        (q, f, v, *_), _ = make_inputs(length, heads=heads, key_dim=size, value_dim=size)
        mx.eval(q, f, v)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loss = mx.grad(lambda *x: gated_recurrence(*x)[0].sum(), argnums=(0, 1, 2))
        mx.eval(loss(q, f, v))
        return mx.get_peak_memory() - before

    length = 16 * SEGMENT_TOKENS
    every_state = length * heads * size * size * 4
    assert peak(length) < every_state / 4
    assert peak(2 * length) < 2.5 * peak(length)
