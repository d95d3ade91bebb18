"""The models against flash-linear-attention, and against themselves in every way of running."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, BatchKVCache, BatchRotatingKVCache, KVCache

from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.models.hgrn2 import ModelArgs

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 41, "expand_ratio": 8}
HGRN = {"model_type": "hgrn", "expand_ratio": 1}
ATTENTION = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2}

CONFIGS = {
    "plain": {},
    "num_heads instead of expand_ratio": {"expand_ratio": None, "num_heads": 2},
    "keys smaller than values": {"expand_ratio": 12, "use_lower_bound": False},
    "no lower bound": {"use_lower_bound": False},
    "intermediate_size": {"intermediate_size": 48},
    "hidden_ratio": {"hidden_ratio": 20},
    "tied embeddings": {"tie_word_embeddings": True},
    "output norm without weight": {"elementwise_affine": False},
    "powlu": {"hidden_act": "powlu"},
    "attention residuals, block 1": {"attnres_block_size": 1},
    "attention residuals, block 2": {"attnres_block_size": 2},
    "attention residuals, block 4": {"attnres_block_size": 4},
    "short convolution of 1": {"use_short_conv": True, "conv_size": 1},
    "short convolution of 2": {"use_short_conv": True, "conv_size": 2},
    "short convolution of 3": {"use_short_conv": True, "conv_size": 3},
    "short convolution of 4": {"use_short_conv": True, "conv_size": 4},
    "attention": {"attn": ATTENTION},
    "attention in a window": {"attn": ATTENTION | {"window_size": 5, "qkv_bias": True}},
    "attention of two kinds": {
        "attn": [
            {"layers": [0], "num_heads": 2, "window_size": 3, "rope_theta": 100.0},
            {"layers": [2], "num_heads": 4},
        ]
    },
    "everything": {
        "attn": ATTENTION | {"window_size": 5},
        "use_short_conv": True,
        "attnres_block_size": 2,
        "tie_word_embeddings": True,
    },
    "norms without weight": {"norm_type": "simplermsnorm"},
    "layer norms and biases": {"norm_type": "layernorm", "bias": True, "attnres_block_size": 2},
    "other activations": {"hidden_act": "gelu", "query_act": "1+elu", "value_act": "sigmoid"},
    "other scales": {"recurrence_scale": 1.0, "scale_embeddings": True, "output_norm_eps": 0.1},
    "HGRN": HGRN,
    "HGRN of twice the width": HGRN | {"expand_ratio": 2},
    "HGRN without lower bound": HGRN | {"use_lower_bound": False},
    "HGRN with short convolutions": HGRN | {"use_short_conv": True, "conv_size": 3},
    "HGRN with layer norms and biases": HGRN | {"norm_type": "layernorm", "bias": True},
    "HGRN with everything": HGRN
    | {
        "attn": ATTENTION | {"window_size": 5},
        "use_short_conv": True,
        "attnres_block_size": 2,
        "tie_word_embeddings": True,
        "elementwise_affine": False,
        "expand_ratio": 2,
    },
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def random_model(options) -> nn.Module:
    """A model whose parameters are all random, and whose gates differ between layers."""
    mx.random.seed(0)
    architecture = ARCHITECTURES[options.get("model_type", "hgrn2")]
    model = architecture.Model(architecture.ModelArgs.from_dict(SMALL | options))
    model.update(tree_map(lambda p: p + 0.3 * mx.random.normal(p.shape), model.parameters()))
    return model


def random_tokens(*shape) -> mx.array:
    return mx.random.randint(0, SMALL["vocab_size"], shape, key=mx.random.key(1))


def mean_loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def test_logits_are_fla_s(reference):
    assert mx.abs(reference.model(reference.tokens) - reference.logits).max() < 1e-4


def test_loss_and_every_gradient_are_fla_s(reference, relative_error):
    model = reference.model
    loss, gradients = nn.value_and_grad(model, mean_loss)(model, reference.tokens)
    assert loss.item() == pytest.approx(reference.scalars["loss"], abs=1e-5)

    prefix = "grads."
    expected = model.sanitize(
        {k.removeprefix(prefix): v for k, v in reference.arrays.items() if k.startswith(prefix)}
    )
    gradients = dict(tree_flatten(gradients))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_states_after_100_tokens_are_fla_s(reference):
    cache = reference.model.make_cache()
    reference.model(reference.tokens[:, :100], cache)
    for layer, layer_cache in enumerate(cache):
        if isinstance(layer_cache, ArraysCache):
            expected = reference.arrays[f"states.{layer}"]
            assert mx.abs(layer_cache[0] - expected).max() < 1e-4, layer


def test_the_greedy_continuation_is_fla_s(reference):
    cache = reference.model.make_cache()
    inputs, generated = reference.scalars["prompt"], []
    while len(generated) < len(reference.scalars["greedy"]):
        logits = reference.model(mx.array([inputs]), cache)
        inputs = [logits[0, -1].argmax().item()]
        generated += inputs
    assert generated == reference.scalars["greedy"]


@pytest.mark.parametrize("prefill", [[], [1], [3], [40, 26], [1, 2, 60], [64], [136]])
def test_prefill_in_pieces_and_decoding_equal_one_pass(reference, prefill):
    """Pieces of the sizes in ``prefill``, then token by token."""
    length = reference.tokens.shape[1]
    cuts = np.cumsum([*prefill, *[1] * (length - sum(prefill))])[:-1].tolist()
    cache = reference.model.make_cache()
    pieces = [reference.model(piece, cache) for piece in mx.split(reference.tokens, cuts, axis=1)]
    assert mx.abs(mx.concatenate(pieces, axis=1) - reference.logits).max() < 1e-4


@every_config
def test_every_option_runs_in_pieces_as_in_one_pass(options):
    model, tokens = random_model(options), random_tokens(2, 21)
    cache = model.make_cache()
    pieces = [model(piece, cache) for piece in mx.split(tokens, [9, 16, 17, 18, 19, 20], axis=1)]
    assert mx.allclose(mx.concatenate(pieces, axis=1), model(tokens), atol=1e-4, rtol=1e-4)


@every_config
def test_every_option_has_finite_gradients_for_every_parameter(options):
    model = random_model(options)
    _, gradients = nn.value_and_grad(model, mean_loss)(model, random_tokens(2, 20))
    gradients = dict(tree_flatten(gradients))
    assert gradients.keys() == dict(tree_flatten(model.parameters())).keys()
    for name, gradient in gradients.items():
        assert mx.isfinite(gradient).all(), name
        # The first sublayer mixes one source only: its query changes nothing.
        if not name.startswith("model.layers.0.attn_res_"):
            assert mx.abs(gradient).max() > 0, name


@every_config
def test_no_token_sees_a_later_one(options):
    model, tokens = random_model(options), random_tokens(1, 20)
    changed = mx.concatenate([tokens[:, :12], (tokens[:, 12:] + 1) % 41], axis=1)
    before, after = model(tokens), model(changed)
    assert mx.allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert not mx.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


def batch_cache(model, rows, left_padding=None):
    """The cache of a batch as mlx-lm makes it, every kind by its own rule."""

    def of_batch(cache):
        if isinstance(cache, ArraysCache):
            return ArraysCache(len(cache.cache), left_padding=left_padding)
        padding = left_padding or [0] * rows
        if isinstance(cache, KVCache):
            return BatchKVCache(padding)
        return BatchRotatingKVCache(cache.max_size, padding)

    return [of_batch(cache) for cache in model.make_cache()]


@every_config
def test_left_padded_rows_give_what_each_gives_alone(options):
    model, lengths, longest = random_model(options), [13, 4, 9], 13
    tokens = random_tokens(3, longest + 6)
    rows = [tokens[n, : length + 6] for n, length in enumerate(lengths)]
    padding = [longest - length for length in lengths]
    padded = mx.stack([mx.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)])

    cache = batch_cache(model, len(rows), padding)
    pieces = [model(piece, cache) for piece in mx.split(padded, [8, 13, 14, 15, 17], axis=1)]
    logits = mx.concatenate(pieces, axis=1)
    for row, pad, actual in zip(rows, padding, logits, strict=True):
        assert mx.allclose(actual[pad:], model(row[None])[0], atol=1e-4, rtol=1e-4)


@every_config
@pytest.mark.parametrize("prefill_step", [13, 5])
def test_right_padded_prompts_continue_as_each_does_alone(options, prefill_step):
    model, lengths, longest = random_model(options), [13, 4, 9], 13
    tokens = random_tokens(3, longest + 6)
    prompts = [
        mx.pad(tokens[n, :length], (0, longest - length)) for n, length in enumerate(lengths)
    ]

    cache = batch_cache(model, len(lengths))
    for layer_cache in cache:
        padding = [longest - length for length in lengths]
        layer_cache.prepare(lengths=lengths, right_padding=padding)
    for piece in mx.split(mx.stack(prompts), range(prefill_step, longest, prefill_step), axis=1):
        model(piece, cache)
    for layer_cache in cache:
        layer_cache.finalize()

    more = tokens[:, longest:]
    logits = mx.concatenate([model(more[:, t : t + 1], cache) for t in range(6)], axis=1)
    for n, length in enumerate(lengths):
        alone = model(mx.concatenate([tokens[n, :length], more[n]])[None])[0, length:]
        assert mx.allclose(logits[n], alone, atol=1e-4, rtol=1e-4)


@every_config
def test_a_second_padded_prompt_continues_a_batch(options):
    """As in a chat server: rows of different length, then a turn of different length each."""
    model, tokens = random_model(options), random_tokens(2, 20)
    first, second = [7, 2], [3, 8]
    cache = batch_cache(model, 2)
    for starts, lengths in (([0, 0], first), (first, second)):
        longest = max(lengths)
        for layer_cache in cache:
            padding = [longest - length for length in lengths]
            layer_cache.prepare(lengths=lengths, right_padding=padding)
        turn = [
            mx.pad(tokens[n, start : start + length], (0, longest - length))
            for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
        model(mx.stack(turn), cache)
        for layer_cache in cache:
            layer_cache.finalize()

    logits = model(tokens[:, 10:11], cache)
    assert mx.allclose(logits[:, 0], model(tokens[:, :11])[:, -1], atol=1e-4, rtol=1e-4)


def test_in_bfloat16_the_state_and_the_lower_bounds_stay_float32():
    model = random_model({"use_short_conv": True})
    bounds = model.model.layer_lower_bounds()
    model.apply(lambda p: p.astype(mx.bfloat16))
    cache = model.make_cache()
    assert model(random_tokens(1, 9), cache).dtype == mx.bfloat16
    assert model(random_tokens(1, 1), cache).dtype == mx.bfloat16
    assert all(c[0].dtype == mx.float32 for c in cache)
    assert all(c[1].dtype == mx.bfloat16 for c in cache)
    for half, full in zip(model.model.layer_lower_bounds(), bounds, strict=True):
        assert half.dtype == mx.float32
        assert mx.allclose(half, full, atol=1e-2)


def test_lower_bounds_rise_from_zero_and_stay_below_one():
    bounds = random_model({}).model.layer_lower_bounds()
    assert mx.array_equal(bounds[0], mx.zeros(SMALL["hidden_size"]))
    for below, above in zip(bounds[:-1], bounds[1:], strict=True):
        assert (below < above).all() and (above < 1).all()


def test_convolutions_are_turned_from_torch_s_layout_whatever_their_size():
    model = random_model({"use_short_conv": True, "conv_size": 1})
    name = "model.layers.0.attn.q_conv1d.weight"
    weight = mx.random.normal((32, 1, 4))
    turned = model.sanitize({name: weight})[name]
    assert turned.shape == (32, 4, 1)
    assert mx.array_equal(turned[..., 0], weight[:, 0])
    assert mx.array_equal(model.sanitize({name: turned})[name], turned)


def test_a_saved_head_is_dropped_when_tied():
    model = random_model({"tie_word_embeddings": True})
    assert model.sanitize({"lm_head.weight": mx.zeros((41, 32))}) == {}


@pytest.mark.parametrize(
    "options, key",
    [
        ({"use_forget_bias": True}, "use_forget_bias"),
        ({"attn": ATTENTION | {"qk_norm": True}}, "qk_norm"),
    ],
)
def test_an_unknown_key_is_refused_in_one_line_that_names_it(options, key):
    with pytest.raises(ValueError, match=key) as error:
        ModelArgs.from_dict(SMALL | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, key",
    [
        ({"expand_ratio": None}, "num_heads"),
        ({"expand_ratio": 64}, "expand_ratio"),
        ({"expand_ratio": 12}, "expand_ratio"),
        ({"expand_ratio": None, "num_heads": 64}, "num_heads"),
        ({"hidden_act": "softplus"}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size: expected a whole number, got '32'"),
        ({"hidden_size": 32.0}, "hidden_size: expected a whole number, got 32.0"),
        ({"hidden_size": None}, "hidden_size: expected a whole number, got None"),
        ({"hidden_size": -32}, "hidden_size must be at least 1"),
        ({"vocab_size": True}, "vocab_size: expected a whole number, got True"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1"),
        ({"hidden_ratio": -4}, "intermediate_size must be at least 1"),
        ({"norm_eps": "small"}, "norm_eps: expected a number, got 'small'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
        ({"hidden_act": None}, "hidden_act: expected text, got None"),
        ({"attn": 1}, "attn: expected keys and values, got 1"),
        ({"attn": ["softmax"]}, "expected keys and values, got 'softmax'"),
        ({"attn": ATTENTION | {"layers": 1}}, "layers: expected a list, got 1"),
        ({"attn": ATTENTION | {"layers": ["1"]}}, "expected a whole number, got '1'"),
        ({"attnres_block_size": 3}, "attnres_block_size"),
        ({"attnres_block_size": 0}, "attnres_block_size"),
        ({"attn": ATTENTION | {"layers": [4]}}, "layer 4"),
        ({"attn": [ATTENTION, ATTENTION]}, "layer 1"),
        ({"attn": ATTENTION | {"num_heads": 3, "num_kv_heads": 3}}, "num_heads"),
        ({"attn": ATTENTION | {"num_kv_heads": 3}}, "num_kv_heads"),
        ({"attn": ATTENTION | {"window_size": 0}}, "window_size"),
        ({"attn": {"layers": [1]}}, "num_heads"),
        ({"attn": {"num_heads": 4}}, "layers"),
        ({"conv_size": 0, "use_short_conv": True}, "conv_size"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"query_act": "softplus"}, "query_act"),
        ({"value_act": None}, "value_act"),
        (HGRN | {"expand_ratio": None}, "expand_ratio"),
        (HGRN | {"expand_ratio": 0}, "expand_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(options, key):
    with pytest.raises(ValueError, match=key) as error:
        random_model(options)
    assert "\n" not in str(error.value)
