"""Runs real flash-linear-attention on a CPU, where its kernels were not meant to run.

Triton's interpreter computes what the kernels say. Three pieces that want a GPU have
exact stand-ins: ``flash_attn_func``, and ``fused_attnres`` and ``chunk_hgrn``, for
which fla itself has others. All of it needs the extra ``hgrn2-mlx[parity]``.
"""

import importlib
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .source import read_json


def is_installed() -> bool:
    """Whether torch, Triton and flash-linear-attention are there to be imported."""
    return all(find_spec(package) for package in ("torch", "triton", "fla"))


def import_fla() -> Any:
    """``fla.models``, made to run on this CPU; a change to the whole process.

    Raises:
        ImportError: If it is not installed.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # Read when Triton is imported.
    warnings.filterwarnings("ignore", "Triton is not supported on current platform")
    from transformers.utils.logging import disable_progress_bar
    from triton.runtime.autotuner import Autotuner

    disable_progress_bar()

    def no_timing(self: Autotuner, *args: Any, config: Any, **kwargs: Any) -> float:
        return 1.0

    Autotuner._bench = no_timing  # The autotuner measures on a GPU only.
    importlib.import_module("fla.layers.attn").flash_attn_func = exact_attention
    naive_attnres = importlib.import_module("fla.ops.attnres").naive_attnres
    for model in ("hgrn", "hgrn2"):
        modeling = importlib.import_module(f"fla.models.{model}.modeling_{model}")
        modeling.fused_attnres = naive_attnres
    layers = importlib.import_module("fla.layers.hgrn")
    layers.chunk_hgrn = layers.fused_recurrent_hgrn
    return importlib.import_module("fla.models")


def exact_attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """``flash_attn_func``: ``[B, T, heads, dim]``, seeing ``window_size[0]`` tokens back."""
    import torch

    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    seen = distance >= 0
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def load_model(folder: Path) -> Any:
    """fla's model of a checkpoint, in float32.

    Raises:
        ValueError: If fla misses a tensor in it, or finds one that it does not know.
    """
    fla_models = import_fla()
    import torch

    model_type = read_json(folder / "config.json")["model_type"]
    model_class = {"hgrn": fla_models.HGRNForCausalLM, "hgrn2": fla_models.HGRN2ForCausalLM}
    # The interpreter cannot run the other kernels.
    model, loading = model_class[model_type].from_pretrained(
        folder, attn_mode="fused_recurrent", dtype=torch.float32, output_loading_info=True
    )
    if problems := {key: names for key, names in loading.items() if names}:
        raise ValueError(f"flash-linear-attention does not load {folder}: {problems}")
    return model.eval()


def logits(folder: Path, tokens: mx.array) -> mx.array:
    """What fla computes with a checkpoint: ``[B, T]`` tokens to ``[B, T, vocab]`` float32."""
    model = load_model(folder)
    import torch

    with torch.no_grad():
        output = model(torch.from_numpy(np.array(tokens, dtype=np.int64))).logits
    return mx.array(output.numpy())
