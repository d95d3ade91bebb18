"""Checkpoints of the authors' code (hgru2-pytorch), and telling them from fla's."""

import json
import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import FIXTURES
from mlx_lm.models.cache import make_prompt_cache

from hgrn2_mlx.convert import convert
from hgrn2_mlx.convert.authors import KEYS
from hgrn2_mlx.convert.dialects import find_dialect
from hgrn2_mlx.convert.export import export
from hgrn2_mlx.convert.weight_files import read_weights
from hgrn2_mlx.models.activations import ACTIVATIONS

FIXTURE = FIXTURES / "official-small-bin"

# The activations that the authors' code knows, as it defines them.
THEIR_ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "leak": lambda x: np.where(x > 0, x, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "exp": np.exp,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "1+elu": lambda x: 1 + np.where(x > 0, x, np.expm1(x)),
    "2+elu": lambda x: 2 + np.where(x > 0, x, np.expm1(x)),
}


class AuthorsModel:
    """The authors' HGRN2 by its equations, in float64, with their tensors' names."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: np.array(w, np.float64) for name, w in weights.items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name, x):
        if self.config["norm_type"] == "layernorm":
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
            return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def mix_tokens(self, name, x, lower_bound):
        """``S_t = Diag(f_t) S_{t-1} + (1 - f_t) (x) v_t``, ``o_t = S_t^T q_t``."""

        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.config["expand_ratio"])

        v, q, f = np.split(self.linear(f"{name}.in_proj", x), 3, axis=-1)
        v = heads(THEIR_ACTIVATIONS[self.config["in_act"]](v))
        q = heads(THEIR_ACTIVATIONS[self.config["out_act"]](q))
        f = heads(lower_bound + (1 - lower_bound) / (1 + np.exp(-f)))
        state, outputs = 0.0, []
        for t in range(x.shape[1]):
            state = f[:, t, :, :, None] * state + (1 - f[:, t, :, :, None]) * v[:, t, :, None]
            outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], state))
        output = np.stack(outputs, axis=1).reshape(x.shape)
        return self.linear(f"{name}.out_proj", self.norm(f"{name}.norm", output))

    def mix_channels(self, name, x):
        gate = THEIR_ACTIVATIONS[self.config["glu_act"]](self.linear(f"{name}.l1", x))
        return self.linear(f"{name}.l3", gate * self.linear(f"{name}.l2", x))

    def logits(self, tokens):
        x = self.weights["model.embed_tokens.weight"][np.array(tokens)]
        if not self.config["no_scale_embedding"]:
            x = x * self.config["decoder_embed_dim"] ** 0.5
        shares = np.exp(self.weights["model.lower_bounds"])
        shares = shares / shares.sum(0)
        lower_bounds = shares.cumsum(0) - shares[0]
        for n, lower_bound in enumerate(lower_bounds):
            layer = f"model.layers.{n}"
            y = self.norm(f"{layer}.token_norm", x)
            x = x + self.mix_tokens(f"{layer}.token_mixer", y, lower_bound)
            y = self.norm(f"{layer}.channel_norm", x)
            x = x + self.mix_channels(f"{layer}.channel_mixer", y)
        return self.linear("lm_head", self.norm("model.final_norm", x))


CONFIG = {
    "architectures": ["Hgrn2ForCausalLM"],
    "model_type": "hgrn2",
    "vocab_size": 43,
    "decoder_embed_dim": 32,
    "decoder_layers": 3,
    "expand_ratio": 8,
    "glu_dim": 48,
    "glu_act": "none",
    "in_act": "none",
    "out_act": "silu",
    "bias": False,
    "norm_type": "simplermsnorm",
    "no_scale_embedding": True,
    "init_std": 0.02,
    "causal": True,
    "add_bos_token": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


def random_weights(config):
    rng = np.random.default_rng(0)
    dim, glu_dim, vocab = (config[key] for key in ("decoder_embed_dim", "glu_dim", "vocab_size"))
    weights = {}

    def add_linear(name, outputs, inputs):
        weights[f"{name}.weight"] = 0.3 * rng.normal(size=(outputs, inputs))
        if config["bias"]:
            weights[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)

    def add_norm(name):
        if config["norm_type"] == "layernorm":
            weights[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=dim)
            weights[f"{name}.bias"] = 0.3 * rng.normal(size=dim)

    weights["model.embed_tokens.weight"] = rng.normal(size=(vocab, dim))
    weights["model.lower_bounds"] = 1 + rng.normal(size=(config["decoder_layers"], dim))
    for n in range(config["decoder_layers"]):
        layer = f"model.layers.{n}"
        add_linear(f"{layer}.token_mixer.in_proj", 3 * dim, dim)
        add_linear(f"{layer}.token_mixer.out_proj", dim, dim)
        for norm in ("token_mixer.norm", "token_norm", "channel_norm"):
            add_norm(f"{layer}.{norm}")
        add_linear(f"{layer}.channel_mixer.l1", glu_dim, dim)
        add_linear(f"{layer}.channel_mixer.l2", glu_dim, dim)
        add_linear(f"{layer}.channel_mixer.l3", dim, glu_dim)
    add_norm("model.final_norm")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if not config.get("tie_word_embeddings", True):
        weights["lm_head.weight"] = rng.normal(size=(vocab, dim))
    return {name: mx.array(weight.astype(np.float32)) for name, weight in weights.items()}


def save(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def load(folder):
    return mlx_lm.utils.load_model(folder)[0]


@pytest.fixture
def official(tmp_path):
    """The fixture, converted."""
    convert(FIXTURE, tmp_path / "mlx")
    return load(tmp_path / "mlx")


def test_logits_are_the_authors_(official):
    expected = mx.load(str(FIXTURE / "expected.safetensors"))
    assert mx.abs(official(expected["tokens"]) - expected["logits"]).max() < 1e-4


def test_the_greedy_continuation_is_the_authors_(official):
    expected = json.loads((FIXTURE / "expected.json").read_text())
    cache = make_prompt_cache(official)
    inputs, generated = expected["prompt"], []
    while len(generated) < len(expected["greedy"]):
        inputs = [official(mx.array([inputs]), cache)[0, -1].argmax().item()]
        generated += inputs
    assert generated == expected["greedy"]


def test_the_report_says_whose_checkpoint_it_is_and_why(tmp_path):
    report = convert(FIXTURE, tmp_path / "mlx")
    assert report.dialect == "hgru2-pytorch"
    assert "decoder_embed_dim" in report.reason and "embed_tokens" in report.reason
    transforms = {record.name: record.transform for record in report.tensors}
    assert len(transforms) == 18
    assert transforms["model.layers.0.token_mixer.in_proj.weight"] == "split into i, q, f"
    assert transforms["lm_head.weight"] == "tied to the embedding"


def test_the_converted_config_is_in_the_model_s_own_keys(tmp_path):
    convert(FIXTURE, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert not config.keys() & (KEYS.keys() - {ours for ours, _ in KEYS.values()})
    assert config["hidden_size"] == 64 and config["num_hidden_layers"] == 3
    assert config["recurrence_scale"] == 1.0 and config["norm_type"] == "simplermsnorm"
    assert config["tie_word_embeddings"] and config["model_file"] == "hgrn2.py"


OPTIONS = {
    "defaults": {},
    "scaled embeddings": {"no_scale_embedding": False},
    "layer norms": {"norm_type": "layernorm"},
    "layer norms and biases": {"norm_type": "layernorm", "bias": True},
    "biases": {"bias": True},
    "a head of its own": {"tie_word_embeddings": False},
    "one head": {"expand_ratio": 32},
    "heads of one channel": {"expand_ratio": 1},
    **{f"glu_act {name}": {"glu_act": name} for name in THEIR_ACTIVATIONS},
    **{f"in_act {name}": {"in_act": name} for name in THEIR_ACTIVATIONS},
    **{f"out_act {name}": {"out_act": name} for name in THEIR_ACTIVATIONS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_computes_what_the_equations_say(tmp_path, options):
    config = CONFIG | options
    weights = random_weights(config)
    convert(save(tmp_path / "source", config, weights), tmp_path / "mlx")
    model = load(tmp_path / "mlx")
    tokens = mx.random.randint(0, 43, (2, 70), key=mx.random.key(0))
    expected = AuthorsModel(config, weights).logits(tokens)
    error = np.abs(np.array(model(tokens)) - expected).max()
    assert error < 1e-5 * max(1, np.abs(expected).max())

    cache = make_prompt_cache(model)
    pieces = [model(piece, cache) for piece in mx.split(tokens, [40, 67, 68, 69], axis=1)]
    error = np.abs(np.array(mx.concatenate(pieces, axis=1)) - expected).max()
    assert error < 1e-5 * max(1, np.abs(expected).max())


def test_the_equations_are_the_fixture_s():
    """So that the other tests' reference is the authors' model, too."""
    tensors = read_weights(FIXTURE).tensors
    weights = {name: tensor.load() for name, tensor in tensors.items()}
    config = json.loads((FIXTURE / "config.json").read_text())
    expected = mx.load(str(FIXTURE / "expected.safetensors"))
    logits = AuthorsModel(config, weights).logits(expected["tokens"])
    assert np.abs(logits - np.array(expected["logits"])).max() < 1e-4


def test_our_activations_are_theirs():
    assert ACTIVATIONS.keys() - THEIR_ACTIVATIONS.keys() == {"swish"}
    x = np.linspace(-4, 4, 101).astype(np.float32)
    for name, activation in THEIR_ACTIVATIONS.items():
        ours = np.array(ACTIVATIONS[name](mx.array(x)))
        assert np.abs(ours - activation(x.astype(np.float64))).max() < 1e-5, name


def test_missing_keys_have_the_authors_defaults(tmp_path):
    config = {"model_type": "hgrn2", "vocab_size": 43, "decoder_embed_dim": 32}
    config |= {"decoder_layers": 1, "glu_dim": 48}
    weights = random_weights(CONFIG | config)
    convert(save(tmp_path / "source", config, weights), tmp_path / "mlx")
    expected = AuthorsModel(CONFIG | config | {"expand_ratio": 2}, weights)
    tokens = mx.arange(43)[None]
    logits = np.array(load(tmp_path / "mlx")(tokens))
    assert np.abs(logits - expected.logits(tokens)).max() < 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "hgrn"}, "only HGRN2 is supported"),
        ({"norm_type": "rmsnorm"}, "norm_type 'rmsnorm'"),
        ({"out_act": "tanh"}, "query_act 'tanh'"),
        ({"rope": True}, "unknown key 'rope'"),
        ({"glu_dim": 64}, "wrong shape"),
        ({"decoder_layers": 4}, "missing"),
        ({"norm_type": "layernorm"}, "model.final_norm.bias"),
    ],
)
def test_other_configs_are_refused_by_name(tmp_path, changes, message):
    source = save(tmp_path / "source", CONFIG | changes, random_weights(CONFIG))
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "mlx")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mlx").exists()


def test_a_head_that_is_not_the_embedding_is_refused_when_tied(tmp_path):
    weights = random_weights(CONFIG)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight differs"):
        convert(save(tmp_path / "source", CONFIG, weights), tmp_path / "mlx")


def test_config_and_tensors_must_be_of_one_dialect():
    authors = "model.embed_tokens.weight"
    fla = "model.embeddings.weight"
    assert find_dialect(CONFIG, {authors})[0].NAME == "hgru2-pytorch"
    assert find_dialect({"model_type": "hgrn2"}, {fla})[0].NAME == "flash-linear-attention"
    for config, tensor in ((CONFIG, fla), ({"model_type": "hgrn2"}, authors)):
        with pytest.raises(ValueError, match=f"the embedding is {tensor}"):
            find_dialect(config, {tensor})


def test_quantized_and_cast(tmp_path):
    config = CONFIG | {"decoder_embed_dim": 64, "glu_dim": 64}
    source = save(tmp_path / "source", config, random_weights(config))
    convert(source, tmp_path / "mlx", dtype="bfloat16", quantize=True, q_bits=8)
    model = load(tmp_path / "mlx")
    assert model.model.lower_bounds.dtype == mx.float32
    assert model.model.layers[0].attn.q_proj.bits == 8
    assert mx.isfinite(model(mx.arange(43)[None])).all()


def test_what_fla_cannot_compute_is_not_exported_to_it(tmp_path):
    convert(FIXTURE, tmp_path / "mlx")
    with pytest.raises(ValueError, match="norm_type.*recurrence_scale.*hidden_act"):
        export(tmp_path / "mlx", tmp_path / "fla")
    assert not (tmp_path / "fla").exists()
