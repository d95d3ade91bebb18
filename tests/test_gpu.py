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
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        a, b = (np.array(x.astype(mx.float32), np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-2
