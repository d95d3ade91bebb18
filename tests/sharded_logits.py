"""What one process of a tensor-parallel group computes; test_distributed.py runs it.

Arguments: file of tokens, folder to write logits into, folders of models.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import sharded_load

import hgrn2_mlx  # noqa: F401  Registers the architectures.


def all_logits(model: nn.Module, tokens: mx.array) -> dict[str, mx.array]:
    """Of a whole sequence, and of the same read in two parts and then token by token."""
    cache = model.make_cache()
    length = tokens.shape[1]
    ends = [0, length // 3, *range(length - 8, length + 1)]
    parts = [model(tokens[:, start:end], cache) for start, end in zip(ends, ends[1:])]
    return {"whole": model(tokens), "cached": mx.concatenate(parts, axis=1)}


if __name__ == "__main__":
    tokens, output, *folders = sys.argv[1:]
    rank = mx.distributed.init().rank()
    for folder in folders:
        model, _ = sharded_load(folder, tensor_group=mx.distributed.init())
        logits = all_logits(model, mx.load(tokens)["tokens"])
        mx.save_safetensors(f"{output}/{Path(folder).name}-{rank}.safetensors", logits)
