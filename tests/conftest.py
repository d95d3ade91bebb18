"""What several test files share: reference models, where kernels run, how far arrays are apart."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

# Or an NVIDIA GPU multiplies float32 matrices in TF32, with ten bits of mantissa.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import metal_host
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from hgrn2_mlx import kernels
from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.ops import chunked_kernels, decode, elementwise_scan

ON_GPU = mx.metal.is_available() or mx.cuda.is_available()
FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("hgrn2-default", "hgrn2-short-conv", "hgrn2-hybrid", "hgrn-default")


@dataclass
class Reference:
    """A model and what flash-linear-attention computes with it (fixtures/README.md)."""

    model: nn.Module
    arrays: dict[str, mx.array]
    scalars: dict

    @property
    def tokens(self) -> mx.array:
        return self.arrays["tokens"]

    @property
    def logits(self) -> mx.array:
        return self.arrays["logits"]


def load_reference(name: str) -> Reference:
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    weights = model.sanitize(mx.load(str(folder / "model.safetensors")))
    model.load_weights(list(weights.items()))
    return Reference(
        model=model,
        arrays=mx.load(str(folder / "expected.safetensors")),
        scalars=json.loads((folder / "expected.json").read_text()),
    )


@pytest.fixture(params=NAMES)
def reference(request) -> Reference:
    return load_reference(request.param)


@pytest.fixture
def relative_error():
    """Largest absolute difference, over the largest absolute value expected."""

    def relative_error(actual, expected) -> float:
        actual, expected = (np.asarray(x, dtype=np.float64) for x in (actual, expected))
        assert actual.shape == expected.shape
        return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)

    return relative_error


def executing(**options):
    """Kernels run on the GPU at hand, or else their Metal source on the host."""
    return contextlib.nullcontext() if ON_GPU else metal_host.executing(**options)


@pytest.fixture
def fresh_kernels():
    """What was traced or judged outside the host executor does not count inside, nor after."""
    modules = (kernels.chunk, kernels.state_scan, kernels.decode, kernels.elementwise_scan)
    modules += (chunked_kernels, decode, elementwise_scan)
    caches = [x for module in modules for x in vars(module).values() if hasattr(x, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
