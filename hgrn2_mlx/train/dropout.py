"""Dropout, which HGRN2 itself has none of, for text that is small for its model."""

import mlx.core as mx
import mlx.nn as nn

from ..models.language_model import LanguageModel


class TokenDropout(nn.Dropout):
    """Drops whole vectors of ``x [B, T, D]``: all D numbers of a token or none."""

    def __call__(self, x: mx.array) -> mx.array:
        return x * super().__call__(mx.ones_like(x[..., :1]))


def add_dropout(model: LanguageModel, dropout: float, token_dropout: float) -> None:
    """Makes a model drop, while it trains, parts of what flows through its residual stream.

    The names of its parameters stay as they are.

    Args:
        dropout: Share of the numbers dropped from the embeddings, from what each
            mixer and MLP adds and from what the head reads.
        token_dropout: Share of the tokens whose whole embedding is dropped.
    """
    drop_output(model.model.embeddings, TokenDropout(token_dropout), nn.Dropout(dropout))
    for layer in model.layers:
        drop_output(layer.attn, nn.Dropout(dropout))
        drop_output(layer.mlp, nn.Dropout(dropout))
    drop_output(model.model, nn.Dropout(dropout))


def drop_output(module: nn.Module, *dropouts: nn.Dropout) -> None:
    """Gives a module a subclass of its class, whose output passes through ``dropouts``."""

    class WithDropout(type(module)):
        def __call__(self, *args):
            output = super().__call__(*args)
            for dropout in self.dropouts:
                output = dropout(output)
            return output

    module.__class__ = WithDropout
    module.dropouts = list(dropouts)
