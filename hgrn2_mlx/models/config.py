"""Reading ``config.json``: every key is either understood or refused.

A key that changes the computation and is silently dropped gives a model that
runs and is wrong, so a model's arguments list what they understand and this
file lists what is known to change nothing.
"""

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from mlx_lm.models.base import BaseModelArgs

from .typed_values import read_value

# How fla runs the same computation, and how it trains: no effect on the logits.
FLA_IMPLEMENTATION = {
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "initializer_range",
    "max_position_embeddings",
    "use_l2warp",
}

# What mlx-lm adds to a converted folder, or in loading it, and acts on itself.
MLX_LM = {
    "model_file",
    "quantization",
    "quantization_config",
    "quantize_activations",
    "tokenizer_config",
}

# What transformers writes beside any model (4.x wrote all of it, 5.x what differs).
TRANSFORMERS = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
}

WITHOUT_EFFECT = FLA_IMPLEMENTATION | MLX_LM | TRANSFORMERS


@dataclass
class CheckedModelArgs(BaseModelArgs):
    """Model arguments that refuse what they do not understand."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "CheckedModelArgs":
        """Builds the arguments from a ``config.json``.

        Raises:
            ValueError: For a key that is neither an argument nor known to have no
                effect, one that is missing, or a value of another type; the message
                names the key.
        """
        types = get_type_hints(cls)
        for key, value in params.items():
            if key not in types and key not in WITHOUT_EFFECT:
                raise ValueError(
                    f"config.json: unknown key {key!r} (value {value!r}): "
                    "it may change what the model computes, and this version cannot honour it"
                )
        for field in fields(cls):
            if field.default is MISSING and field.name not in params:
                raise ValueError(f"config.json: key {field.name!r} is missing")
        return cls(
            **{
                key: read_value(value, types[key], f"config.json: {key}")
                for key, value in params.items()
                if key in types
            }
        )

    def require_positive(self, *names: str) -> None:
        """Refuses a size below 1 by its name; ``None`` passes."""
        for name in names:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"config.json: {name} must be at least 1, got {size!r}")

    def require_one_of(self, name: str, choices: Collection[str]) -> None:
        """Refuses a choice that there is not, naming those that there are."""
        if (value := getattr(self, name)) not in choices:
            raise ValueError(
                f"config.json: {name} {value!r} is not known; it is one of {', '.join(choices)}"
            )
