"""The same model in flash-linear-attention, with random weights, on an NVIDIA GPU."""

from functools import partial
from importlib.util import find_spec

import mlx.core as mx

from ..convert import fla_on_cpu
from ..convert.fla import check_expressible
from ..machine import installed_version
from .models import Subject
from .participant import CannotTakePart, Participant

NAME = "fla"
PACKAGE = "flash-linear-attention"


def fla(subject: Subject, device: str = "cuda") -> Participant:
    """The subject's model in flash-linear-attention.

    Args:
        subject: What to build it after.
        device: One of PyTorch's; on ``"cpu"`` the kernels run in Triton's interpreter, which
            says nothing of their speed, and memory is not counted.

    Raises:
        CannotTakePart: If it is not installed, if there is no GPU that both MLX and PyTorch
            use, or if it does not have this model.
    """
    if not fla_on_cpu.is_installed():
        raise CannotTakePart(f"{NAME} is not installed: pip install torch {PACKAGE}")
    if subject.quantization is not None:
        raise CannotTakePart(f"{NAME} has no quantized models: measure it beside one that is not")
    try:
        check_expressible(subject.args)
    except ValueError as error:
        raise CannotTakePart(str(error)) from None
    if device == "cuda" and subject.args.attention_layers and not find_spec("flash_attn"):
        raise CannotTakePart(f"{NAME} needs another package for attention: pip install flash-attn")
    # Asked first, as PyTorch is slow to import.
    if device == "cuda" and not mx.cuda.is_available():
        raise CannotTakePart(
            f"{NAME} is measured on an NVIDIA GPU, and MLX uses none here: "
            "pip install 'hgrn2-mlx[cuda]'"
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CannotTakePart(f"{NAME} is measured on an NVIDIA GPU, and PyTorch sees none here")
    from .fla_timing import measure_fla

    dtype = getattr(torch, str(subject.dtype).removeprefix("mlx.core."))
    versions = f"{PACKAGE} {installed_version(PACKAGE)}, PyTorch {torch.__version__}"
    return Participant(
        NAME, partial(measure_fla, subject.args, dtype, device), subject.parameters, note=versions
    )
