"""What only a real GPU can show; the kernels' own tests run there too (``pytest -m gpu``)."""

import functools
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import hgrn2_mlx
from hgrn2_mlx.convert import convert
from hgrn2_mlx.ops.chunked import chunked
from hgrn2_mlx.ops.chunked_kernels import chunked_kernels

CHECKPOINT = Path(hgrn2_mlx.__file__).parent / "demo_checkpoint"
FIXTURE = Path(__file__).parent / "fixtures" / "demo_checkpoint_logits.safetensors"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (mx.metal.is_available() or mx.cuda.is_available()), reason="no GPU"),
    pytest.mark.filterwarnings("error:hgrn2-mlx"),
]


def test_the_carried_checkpoint_has_the_logits_that_it_has_on_a_cpu(tmp_path):
    convert(CHECKPOINT, tmp_path / "model", dtype="float32")
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    tokens = mx.array([tokenizer.encode((CHECKPOINT / "validation.txt").read_text()[:2000])[:400]])
    expected = mx.load(str(FIXTURE))["logits"]

    whole = model(tokens)
    cache = model.make_cache()
    steps = [model(tokens[:, :350], cache)]
    steps += [model(tokens[:, t : t + 1], cache) for t in range(350, 400)]
    for logits in (whole, mx.concatenate(steps, axis=1)):
        difference = mx.abs(logits[0, 49::50] - expected).max() / mx.abs(expected).max()
        assert difference < 2e-3  # float32 products are TF32 on NVIDIA GPUs


def test_mapping_over_a_kernel_is_refused_in_words():
    q, f, v = mx.random.normal((3, 2, 1, 20, 2, 32))
    with pytest.raises(ValueError, match="vmap.*CustomKernel"):
        mx.vmap(lambda *inputs: hgrn2_mlx.gated_recurrence(*inputs)[0])(q, f, v)


def test_kernels_within_compiled_and_checkpointed_functions():
    q, f, v = mx.random.normal((3, 2, 70, 2, 32), key=mx.random.key(3))

    def loss(q, f, v):
        return hgrn2_mlx.gated_recurrence(q, f, v)[0].square().sum()

    want = mx.grad(loss, argnums=(0, 1, 2))(q, f, v)
    for function in (mx.checkpoint(loss), mx.compile(loss), mx.compile(mx.checkpoint(loss))):
        for got, exact in zip(mx.grad(function, argnums=(0, 1, 2))(q, f, v), want, strict=True):
            assert mx.allclose(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_the_public_models_shape(dtype):
    shape = (2, 1100, 4, 128)
    q, f, v, output_gradient = mx.random.normal((4, *shape), key=mx.random.key(0)).astype(dtype)
    state, state_gradient = mx.random.normal((2, 2, 4, 128, 128), key=mx.random.key(1))
    lower_bound = mx.random.uniform(0.1, 0.6, (4, 128), key=mx.random.key(2))
    arguments, cotangents = [q, f + 2, v, lower_bound, state], [output_gradient, state_gradient]
    got, want = (
        mx.vjp(functools.partial(form, scale=0.1), arguments, cotangents)
        for form in (chunked_kernels, chunked)
    )
    names = ("output", "state", "q", "f", "v", "lower bound", "initial state")
    for name, a, b in zip(names, got[0] + got[1], want[0] + want[1], strict=True):
        a, b = (np.array(x.astype(mx.float32), np.float64) for x in (a, b))
        # The gradient of a lower bound sums differences that 16 bits have rounded.
        tolerance = 5e-2 if name == "lower bound" and dtype != mx.float32 else 1e-2
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < tolerance, name
