"""The elementwise recurrence of HGRN against its definition, and converting the model.

The model itself is tested with HGRN2's (test_model.py, test_mlx_lm.py, test_parity.py).
"""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import FIXTURES, load_reference
from mlx.utils import tree_flatten, tree_map

from hgrn2_mlx.convert import convert
from hgrn2_mlx.lora import TARGETS
from hgrn2_mlx.models import hgrn
from hgrn2_mlx.ops import elementwise_recurrence
from hgrn2_mlx.ops.gates import forget_gates

LENGTHS = [1, 2, 3, 5, 8, 63, 64, 65, 200]


def silu(x):
    return x / (1 + np.exp(-x))


def reference(x, f, lower_bound, state, mask=None):
    """``h_t = f_t h_{t-1} + (1 - f_t) silu(x_t)``, step by step in float64."""
    x, f, lower_bound, state = (np.array(a, np.float64) for a in (x, f, lower_bound, state))
    forget_gate = lower_bound + (1 - lower_bound) / (1 + np.exp(-f))
    write = (1 - lower_bound) / (1 + np.exp(f)) * silu(x)
    states = []
    for t in range(x.shape[1]):
        after = forget_gate[:, t] * state + write[:, t]
        state = after if mask is None else np.where(np.array(mask)[:, t, None], after, state)
        states.append(state)
    return np.stack(states, axis=1)


def step_by_step(x, f, lower_bound, state):
    """The same in MLX, for its gradients."""
    forget_gate, input_gate = forget_gates(f, lower_bound)
    write = input_gate * x * mx.sigmoid(x)
    states = []
    for t in range(x.shape[1]):
        state = forget_gate[:, t] * state + write[:, t]
        states.append(state)
    return mx.stack(states, axis=1)


def random_inputs(length, gate_scale=4.0, batch=2, dim=7):
    keys = mx.random.split(mx.random.key(length), 4)
    x = mx.random.normal((batch, length, dim), key=keys[0])
    f = gate_scale * mx.random.normal((batch, length, dim), key=keys[1])
    lower_bound = mx.random.uniform(0, 1, (dim,), key=keys[2])
    state = mx.random.normal((batch, dim), key=keys[3])
    return x, f, lower_bound, state


@pytest.mark.parametrize("gate_scale", [0.1, 4.0, 40.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_states_are_those_of_the_definition(length, gate_scale):
    inputs = random_inputs(length, gate_scale)
    states, last = elementwise_recurrence(*inputs)
    assert np.abs(np.array(states) - reference(*inputs)).max() < 1e-5
    assert mx.array_equal(last, states[:, -1])


@pytest.mark.parametrize("gate_scale", [0.1, 4.0, 40.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_are_those_of_the_definition(length, gate_scale, relative_error):
    inputs = random_inputs(length, gate_scale)
    weights = mx.random.normal(inputs[0].shape, key=mx.random.key(1))
    last_weights = mx.random.normal(inputs[3].shape, key=mx.random.key(2))

    def value(recurrence):
        def weighted(*inputs):
            states, last = recurrence(*inputs)
            return (states * weights).sum() + (last * last_weights).sum()

        return mx.grad(weighted, argnums=(0, 1, 2, 3))(*inputs)

    def definition(*inputs):
        states = step_by_step(*inputs)
        return states, states[:, -1]

    for gradient, expected in zip(value(elementwise_recurrence), value(definition), strict=True):
        assert relative_error(gradient, expected) < 1e-4


def test_no_lower_bound_and_no_state_are_zeros():
    x, f, lower_bound, state = random_inputs(20)
    states, _ = elementwise_recurrence(x, f)
    expected = reference(x, f, mx.zeros_like(lower_bound), mx.zeros_like(state))
    assert np.abs(np.array(states) - expected).max() < 1e-5


@pytest.mark.parametrize("cuts", [[1], [7, 8], [3, 4, 5, 19]])
def test_a_sequence_in_pieces_gives_what_it_gives_whole(cuts):
    x, f, lower_bound, state = random_inputs(20)
    whole, last = elementwise_recurrence(x, f, lower_bound, state)
    pieces = []
    for x_piece, f_piece in zip(mx.split(x, cuts, axis=1), mx.split(f, cuts, axis=1), strict=True):
        states, state = elementwise_recurrence(x_piece, f_piece, lower_bound, state)
        pieces.append(states)
    assert mx.allclose(mx.concatenate(pieces, axis=1), whole, atol=1e-6)
    assert mx.allclose(state, last, atol=1e-6)


def test_masked_tokens_leave_the_state_as_it_was():
    inputs = random_inputs(20)
    mask = mx.random.bernoulli(0.6, (2, 20), key=mx.random.key(0))
    mask[1, 12:] = False
    states, last = elementwise_recurrence(*inputs, mask)
    assert np.abs(np.array(states) - reference(*inputs, mask)).max() < 1e-5
    assert mx.allclose(last[1], states[1, 11], atol=1e-6)


def test_gates_of_exactly_zero_and_one():
    x, f, _, state = random_inputs(64)
    shut, open_ = (mx.full(f.shape, value) for value in (-mx.inf, mx.inf))
    states, _ = elementwise_recurrence(x, shut, None, state)
    assert np.abs(np.array(states) - silu(np.array(x))).max() < 1e-6
    states, _ = elementwise_recurrence(x, open_, None, state)
    assert mx.array_equal(states, mx.broadcast_to(state[:, None], states.shape))

    def total(*inputs):
        return elementwise_recurrence(*inputs)[0].sum()

    for f in (shut, open_):
        gradients = mx.grad(total, argnums=(0, 1, 3))(x, f, mx.zeros(7), state)
        assert all(mx.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_arithmetic_and_state_are_float32(dtype):
    x, f, lower_bound, state = random_inputs(50)
    x, f = x.astype(dtype), f.astype(dtype)
    states, last = elementwise_recurrence(x, f, lower_bound, state)
    expected, expected_last = elementwise_recurrence(
        x.astype(mx.float32), f.astype(mx.float32), lower_bound, state
    )
    assert states.dtype == dtype and last.dtype == mx.float32
    assert mx.array_equal(states, expected.astype(dtype))
    assert mx.array_equal(last, expected_last)


def test_memory_of_the_gradient_grows_with_the_inputs_alone():
    """The gradient holds some arrays of the inputs' size, not one for every merge."""

    def peak(length):
        x, f = mx.random.normal((2, 1, length, 64))
        gradient = mx.grad(lambda x: elementwise_recurrence(x, f)[0].sum())
        mx.eval(x, f)
        mx.clear_cache()
        mx.reset_peak_memory()
        others = mx.get_active_memory()  # what other tests have left, too
        mx.eval(gradient(x))
        return (mx.get_peak_memory() - others) / x.nbytes

    assert peak(32768) < 1.3 * peak(2048) < 40


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"x": (2, 5)}, "x"),
        ({"f": (2, 5, 6)}, "f"),
        ({"x": (2, 0, 7), "f": (2, 0, 7)}, "no tokens"),
        ({"x": (0, 2, 7), "f": (0, 2, 7)}, "no tokens"),
        ({"lower_bound": (1, 7)}, "lower_bound"),
        ({"state": (2, 7, 1)}, "state"),
        ({"mask": (2, 4)}, "mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, named):
    shapes = {"x": (2, 5, 7), "f": (2, 5, 7)} | changes
    with pytest.raises(ValueError, match=named):
        elementwise_recurrence(**{name: mx.zeros(shape) for name, shape in shapes.items()})


def test_the_state_is_one_number_per_channel():
    cache = load_reference("hgrn-default").model.make_cache()
    load_reference("hgrn-default").model(mx.zeros((3, 9), mx.int32), cache)
    assert [layer_cache[0].shape for layer_cache in cache] == [(3, 64)] * 3


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True, "expand_ratio": 2}])
def test_a_checkpoint_converts_to_a_folder_that_loads(tmp_path, options):
    """Convolutions of torch's shape among the tensors."""
    config = json.loads((FIXTURES / "hgrn-default" / "config.json").read_text()) | options
    model = hgrn.Model(hgrn.ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: mx.random.normal(p.shape), model.parameters()))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    weights = {
        name: weight.swapaxes(1, 2) if "conv1d" in name else weight
        for name, weight in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(source / "model.safetensors"), weights)

    report = convert(source, tmp_path / "mlx")
    assert report.dialect == "flash-linear-attention" and "hgrn" in report.reason
    assert {record.name for record in report.tensors} == weights.keys()
    loaded, written = mlx_lm.utils.load_model(tmp_path / "mlx")
    assert written == config | {"model_file": "hgrn.py"}
    tokens = mx.random.randint(0, config["vocab_size"], (2, 30))
    assert mx.array_equal(loaded(tokens), model(tokens))


def test_the_converted_fixture_computes_what_fla_computes(tmp_path):
    convert(FIXTURES / "hgrn-default", tmp_path / "mlx")
    expected = load_reference("hgrn-default")
    model, _ = mlx_lm.utils.load_model(tmp_path / "mlx")
    assert mx.abs(model(expected.tokens) - expected.logits).max() < 1e-4


def test_lora_adapts_every_projection_of_a_layer():
    layer = load_reference("hgrn-default").model.layers[0]
    projections = {name for name, module in layer.named_modules() if name.endswith("_proj")}
    assert projections <= set(TARGETS)
