"""The dialect of the authors' own HGRN2, ``Hgrn2ForCausalLM`` of hgru2-pytorch.

The recurrence is fla's but for its scale, which is 1. Values, queries and forget
gates come from one projection, ``in_proj``, in this order; the norms are
SimpleRMSNorm (no weight) or LayerNorm; activations of values (``in_act``), queries
(``out_act``) and of the MLP's gate (``glu_act``) can be chosen; head and embedding
are tied unless the config says otherwise.
"""

from typing import Any

from mlx.utils import tree_flatten

from hgrn2_mlx.models.language_model import LanguageModel

from .expected_tensors import ExpectedTensor

NAME = "hgru2-pytorch"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# By their key: ours, and the default (Hgrn2Config in configuration_hgrn2.py).
KEYS = {
    "vocab_size": ("vocab_size", 50272),
    "decoder_embed_dim": ("hidden_size", 1024),
    "decoder_layers": ("num_hidden_layers", 24),
    "expand_ratio": ("expand_ratio", 2),
    "glu_dim": ("intermediate_size", 2816),
    "glu_act": ("hidden_act", "none"),
    "in_act": ("value_act", "none"),
    "out_act": ("query_act", "silu"),
    "bias": ("bias", False),
    "norm_type": ("norm_type", "simplermsnorm"),
    "init_std": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", True),  # transformers' default
}

# Written into every config, and not read by the model's code.
UNUSED_KEYS = {"add_bos_token", "causal"}

# The norms' own defaults; no key of the config changes them.
NORM_EPS = {"simplermsnorm": 1e-6, "layernorm": 1e-5}

# The projections in the order of their rows in in_proj.
STACKED = ("i_proj", "q_proj", "f_proj")

# Their modules by the MLX model's.
MODULES = {
    "model.embeddings.": "model.embed_tokens.",
    "model.norm.": "model.final_norm.",
    ".attn_norm.": ".token_norm.",
    ".attn.i_proj.": ".token_mixer.in_proj.",
    ".attn.q_proj.": ".token_mixer.in_proj.",
    ".attn.f_proj.": ".token_mixer.in_proj.",
    ".attn.g_norm.": ".token_mixer.norm.",
    ".attn.o_proj.": ".token_mixer.out_proj.",
    ".mlp_norm.": ".channel_norm.",
    ".mlp.gate_proj.": ".channel_mixer.l1.",
    ".mlp.up_proj.": ".channel_mixer.l2.",
    ".mlp.down_proj.": ".channel_mixer.l3.",
}


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the MLX model.

    Raises:
        ValueError: If it is not of HGRN2, or of a norm that there is not.
    """
    if config["model_type"] != "hgrn2":
        raise ValueError(
            f"config.json: decoder_embed_dim is a key of the authors' code, of which "
            f"only HGRN2 is supported, not {config['model_type']!r}"
        )
    converted = {
        key: value for key, value in config.items() if key not in KEYS and key not in UNUSED_KEYS
    }
    converted |= {ours: config.get(key, default) for key, (ours, default) in KEYS.items()}
    if converted["norm_type"] not in NORM_EPS:
        raise ValueError(
            f"config.json: norm_type {converted['norm_type']!r} is not known; "
            f"it is one of {', '.join(NORM_EPS)}"
        )
    eps = NORM_EPS[converted["norm_type"]]
    converted |= {"norm_eps": eps, "output_norm_eps": eps, "recurrence_scale": 1.0}
    converted["scale_embeddings"] = not converted.pop("no_scale_embedding", True)
    return converted


def expected_tensors(model: LanguageModel) -> list[ExpectedTensor]:
    """The tensors of a checkpoint, in the model's order.

    The model's parameters are not evaluated, so its size costs no memory.
    """
    shapes = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    weights_of: dict[str, list[str]] = {}
    for name in shapes:
        weights_of.setdefault(_their_name(name), []).append(name)

    tensors = []
    for their_name, names in weights_of.items():
        transform = ""
        if len(names) > 1:
            names.sort(key=lambda name: [STACKED.index(p) for p in STACKED if p in name])
            transform = "split into i, q, f"
        rows = sum(shapes[name][0] for name in names)
        weights = {name: shapes[name] for name in names}
        tensors.append(
            ExpectedTensor(their_name, (rows, *shapes[names[0]][1:]), weights, transform)
        )
    if model.args.tie_word_embeddings:
        shape = shapes["model.embeddings.weight"]
        tied = "tied to the embedding"
        tensors.append(ExpectedTensor(HEAD, shape, {}, tied, copy_of=EMBEDDING))
    return tensors


def _their_name(name: str) -> str:
    for ours, theirs in MODULES.items():
        name = name.replace(ours, theirs)
    return name
