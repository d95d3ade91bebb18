"""Decoding through the compiled step equals decoding without it."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from hgrn2_mlx.models import compiled_step, hgrn, hgrn2

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "expand_ratio": 32}


@pytest.fixture
def compiled(monkeypatch):
    """Compiles on the CPU too, and records what was."""
    recorded = []
    compile_step = compiled_step.compile_step

    def recording(model, logits):
        def traced(*arguments):
            recorded.append(model)
            return logits(*arguments)

        return compile_step(model, traced)

    monkeypatch.setattr(compiled_step, "on_gpu", lambda: True)
    monkeypatch.setattr("hgrn2_mlx.models.language_model.compile_step", recording)
    return recorded


def make_model(architecture=hgrn2, seed=0, **options):
    mx.random.seed(seed)
    sizes = SIZES if architecture is hgrn2 else SIZES | {"expand_ratio": 1}
    model = architecture.Model(architecture.ModelArgs(**sizes, **options))
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    model.eval()
    return model


def decode(model, tokens, prompt=3):
    cache = model.make_cache()
    logits = [model(tokens[:, :prompt], cache)]
    logits += [model(tokens[:, t : t + 1], cache) for t in range(prompt, tokens.shape[1])]
    return mx.concatenate(logits, axis=1)


TOKENS = mx.array([[1, 7, 3, 9, 4, 44, 2], [5, 6, 2, 8, 30, 1, 1]])


@pytest.mark.parametrize("architecture", [hgrn, hgrn2])
@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}], ids=str)
def test_steps_equal_the_whole(compiled, architecture, options):
    model = make_model(architecture, **options)
    np.testing.assert_allclose(decode(model, TOKENS), model(TOKENS), atol=1e-5)
    assert len(compiled) == 1  # once for four steps


def test_other_batches_are_recorded_anew(compiled):
    model = make_model()
    for batch in (TOKENS, TOKENS[:1], TOKENS):
        np.testing.assert_allclose(decode(model, batch), model(batch), atol=1e-5)
    assert len(compiled) == 2


def test_weights_and_layers_may_change(compiled):
    model, other = make_model(), make_model(seed=1)
    before = decode(model, TOKENS)
    model.update(other.parameters())
    assert mx.abs(decode(model, TOKENS) - before).max() > 0.1
    np.testing.assert_allclose(decode(model, TOKENS), other(TOKENS), atol=1e-5)

    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 9.0, "dropout": 0.0})
    for layer in model.layers:
        layer.attn.o_proj.lora_b = mx.ones_like(layer.attn.o_proj.lora_b)
    assert mx.abs(model(TOKENS) - other(TOKENS)).max() > 0.1
    np.testing.assert_allclose(decode(model, TOKENS), model(TOKENS), atol=1e-5)


def test_padding_and_attention_do_without(compiled):
    hybrid = make_model(attn={"layers": [1], "num_heads": 2})
    np.testing.assert_allclose(decode(hybrid, TOKENS), hybrid(TOKENS), atol=1e-5)

    model = make_model()
    cache = model.make_cache()
    for layer in cache:
        layer.left_padding = mx.array([2, 0])
    model(TOKENS[:, :3], cache)
    model(TOKENS[:, 3:4], cache)
    assert not compiled
