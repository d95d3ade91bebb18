"""Real flash-linear-attention, run on the CPU, against this package with the same weights.

fla's recurrence, norms, activations and convolutions run as they are, in Triton's
interpreter. Two pieces want a GPU and have exact stand-ins: ``flash_attn_func`` and
``fused_attnres``, for which fla itself has a plain reference.
"""

import inspect
import os
import random
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hgrn2_mlx.models.attention import AttentionArgs
from hgrn2_mlx.models.config import WITHOUT_EFFECT
from hgrn2_mlx.models.hgrn2 import Model, ModelArgs

pytestmark = pytest.mark.parity

os.environ["TRITON_INTERPRET"] = "1"  # read when fla is imported
REASON = "needs real flash-linear-attention: pip install 'hgrn2-mlx[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
autotuner = pytest.importorskip("triton.runtime.autotuner", reason=REASON)
fla = pytest.importorskip("fla", reason=REASON)
fla_attention = pytest.importorskip("fla.layers.attn", reason=REASON)
fla_attnres = pytest.importorskip("fla.ops.attnres", reason=REASON)
fla_config = pytest.importorskip("fla.models.configuration_utils", reason=REASON)
fla_hgrn2 = pytest.importorskip("fla.models.hgrn2.modeling_hgrn2", reason=REASON)

VOCAB = 41


def exact_attention(q, k, v, causal, window_size):
    """``flash_attn_func``: ``[B, T, heads, dim]``, seeing ``window_size[0]`` tokens back."""
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    seen = distance >= 0
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


@pytest.fixture(autouse=True)
def fla_on_a_cpu(monkeypatch):
    def no_timing(self, *args, config, **kwargs):
        return 1.0

    monkeypatch.setattr(autotuner.Autotuner, "_bench", no_timing)
    monkeypatch.setattr(fla_attention, "flash_attn_func", exact_attention)
    monkeypatch.setattr(fla_hgrn2, "fused_attnres", fla_attnres.naive_attnres)


def draw_attention(draw: random.Random, layers: int):
    """Nothing, one specification of attention layers, or two."""
    specs = [
        {
            "layers": [layer],
            "num_heads": draw.choice([2, 4]),
            "num_kv_heads": draw.choice([None, 1, 2]),
            "qkv_bias": draw.choice([False, True]),
            "window_size": draw.choice([None, 2, 6]),
            "rope_theta": draw.choice([100.0, 10000.0]),
        }
        for layer in draw.sample(range(layers), 2)
    ]
    return draw.choice([None, specs[0], specs[:1], specs])


def draw_options(seed: int) -> dict:
    draw = random.Random(seed)
    layers = draw.choice([2, 3, 4])
    expand_ratio, num_heads = draw.choice([(8, None), (12, None), (32, 5), (None, 2), (None, 4)])
    return {
        "hidden_size": 32,
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "expand_ratio": expand_ratio,
        "num_heads": num_heads,
        "use_short_conv": draw.choice([False, True]),
        "conv_size": draw.choice([2, 3, 4]),
        # A lower bound needs keys as large as values, which 12 does not give.
        "use_lower_bound": expand_ratio != 12 and draw.choice([True, True, False]),
        "hidden_ratio": draw.choice([None, 2, 4]),
        "intermediate_size": draw.choice([None, 40]),
        "hidden_act": draw.choice(["swish", "powlu"]),
        "elementwise_affine": draw.choice([True, False]),
        "norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.choice([False, True]),
        "attn": draw_attention(draw, layers),
        "attnres_block_size": draw.choice([None, 1, 2, 4]),
        "fuse_norm": draw.choice([False, True]),
        "fuse_swiglu": draw.choice([False, True]),
        "attn_mode": "fused_recurrent",
    }


def random_fla_model(options: dict, seed: int):
    """fla's model with random values in every parameter, the gates' spread wide."""
    torch.manual_seed(seed)
    model = fla_hgrn2.HGRN2ForCausalLM(fla_hgrn2.HGRN2Config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (1.0 if "f_proj" in name else 0.2)
            if "lower_bounds" in name:
                parameter *= 5
    return model


def to_mlx(tensors, model: Model) -> dict[str, mx.array]:
    return model.sanitize({name: mx.array(x.detach().numpy()) for name, x in tensors})


@pytest.mark.parametrize("seed", range(14))
def test_logits_and_every_gradient_are_fla_s(seed, relative_error):
    options = draw_options(seed)
    theirs = random_fla_model(options, seed)
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(2, 27 + 2 * seed))

    their_logits = theirs(torch.from_numpy(tokens)).logits
    their_loss = torch.nn.functional.cross_entropy(
        their_logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens)[:, 1:].flatten()
    )
    their_loss.backward()

    ours = Model(ModelArgs.from_dict(theirs.config.to_dict()))
    ours.load_weights(list(to_mlx(theirs.state_dict().items(), ours).items()))

    def loss(model, tokens):
        logits = model(tokens)
        losses = nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction="mean")
        return losses, logits

    (our_loss, our_logits), gradients = nn.value_and_grad(ours, loss)(ours, mx.array(tokens))
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert np.abs(np.array(our_logits) - their_logits.detach().numpy()).max() < 1e-4

    gradients = dict(tree_flatten(gradients))
    # A parameter that fla does not reach has no gradient there, and zeros here.
    named = dict(theirs.named_parameters())
    expected = to_mlx(
        ((n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in named.items()), ours
    )
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_the_defaults_are_fla_s():
    defaults = inspect.signature(fla_hgrn2.HGRN2Config.__init__).parameters
    for field in fields(ModelArgs):
        if field.name != "model_type":
            assert field.default == defaults[field.name].default, field.name


def test_every_key_of_fla_s_config_is_known():
    known = {field.name for field in fields(ModelArgs)} | WITHOUT_EFFECT
    named = inspect.signature(fla_hgrn2.HGRN2Config.__init__).parameters.keys()
    saved = fla_hgrn2.HGRN2Config().to_dict().keys()
    assert (named - {"self", "kwargs"}) | saved <= known


def test_every_key_of_fla_s_attention_is_known():
    specification = fla_config.AttentionSpec.__annotations__
    assert specification.keys() == {field.name for field in fields(AttentionArgs)}
