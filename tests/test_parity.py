"""Real flash-linear-attention, run on the CPU, against this package with the same weights.

fla's recurrences, norms, activations and convolutions run as they are, in Triton's
interpreter (convert/fla_on_cpu.py).
"""

import inspect
import random
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hgrn2_mlx.convert import fla_on_cpu
from hgrn2_mlx.convert.fla import NOT_IN_FLA
from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.models.attention import AttentionArgs
from hgrn2_mlx.models.config import WITHOUT_EFFECT

pytestmark = pytest.mark.parity

if not fla_on_cpu.is_installed():
    reason = "needs real flash-linear-attention: pip install 'hgrn2-mlx[parity]'"
    pytest.skip(reason, allow_module_level=True)

fla_models = fla_on_cpu.import_fla()
torch = pytest.importorskip("torch")
fla_config = pytest.importorskip("fla.models.configuration_utils")

VOCAB = 41
FLA = {
    "hgrn": (fla_models.HGRNConfig, fla_models.HGRNForCausalLM),
    "hgrn2": (fla_models.HGRN2Config, fla_models.HGRN2ForCausalLM),
}
every_architecture = pytest.mark.parametrize("model_type", FLA)


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


def draw_options(model_type: str, seed: int) -> dict:
    draw = random.Random(seed)
    layers = draw.choice([2, 3, 4])
    if model_type == "hgrn":
        state = {"expand_ratio": draw.choice([1, 1, 2, 3])}
    else:
        sizes = [(8, None), (12, None), (32, 5), (None, 2), (None, 4)]
        state = dict(zip(("expand_ratio", "num_heads"), draw.choice(sizes), strict=True))
    return state | {
        "hidden_size": 32,
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "use_short_conv": draw.choice([False, True]),
        "conv_size": draw.choice([2, 3, 4]),
        # A lower bound needs keys as large as values, which 12 does not give.
        "use_lower_bound": state["expand_ratio"] != 12 and draw.choice([True, True, False]),
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


def random_fla_model(model_type: str, options: dict, seed: int):
    """fla's model with random values in every parameter, the gates' spread wide."""
    torch.manual_seed(seed)
    config, model = FLA[model_type]
    model = model(config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (1.0 if "f_proj" in name else 0.2)
            if "lower_bounds" in name:
                parameter *= 5
    return model


def to_mlx(tensors, model: nn.Module) -> dict[str, mx.array]:
    return model.sanitize({name: mx.array(x.detach().numpy()) for name, x in tensors})


@pytest.mark.parametrize(
    "model_type, seed",
    [("hgrn2", seed) for seed in range(14)] + [("hgrn", seed) for seed in range(14)],
)
def test_logits_and_every_gradient_are_fla_s(model_type, seed, relative_error):
    options = draw_options(model_type, seed)
    theirs = random_fla_model(model_type, options, seed)
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(2, 27 + 2 * seed))

    their_logits = theirs(torch.from_numpy(tokens)).logits
    their_loss = torch.nn.functional.cross_entropy(
        their_logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens)[:, 1:].flatten()
    )
    their_loss.backward()

    architecture = ARCHITECTURES[model_type]
    ours = architecture.Model(architecture.ModelArgs.from_dict(theirs.config.to_dict()))
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


@every_architecture
def test_the_defaults_are_fla_s(model_type):
    config, _ = FLA[model_type]
    defaults = inspect.signature(config.__init__).parameters
    for field in fields(ARCHITECTURES[model_type].ModelArgs):
        if field.name not in NOT_IN_FLA | {"model_type"}:
            assert field.default == defaults[field.name].default, field.name


@every_architecture
def test_every_key_of_fla_s_config_is_known(model_type):
    config, _ = FLA[model_type]
    known = {field.name for field in fields(ARCHITECTURES[model_type].ModelArgs)}
    named = inspect.signature(config.__init__).parameters.keys()
    assert (named - {"self", "kwargs"}) | config().to_dict().keys() <= known | WITHOUT_EFFECT
    assert not named & NOT_IN_FLA


def test_every_key_of_fla_s_attention_is_known():
    specification = fla_config.AttentionSpec.__annotations__
    assert specification.keys() == {field.name for field in fields(AttentionArgs)}
