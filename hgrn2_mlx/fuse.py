"""``hgrn2 fuse``: merges an adapter into its model, and may quantize the result."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model, load, quantize_model, save

from .convert.staging import staged_folder
from .model_to_load import check_model


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    save_path: str | Path,
    dequantize: bool = False,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
) -> None:
    """Writes a model folder that needs no adapter any more.

    It works wherever the model's own folder does, the stock ``mlx_lm`` commands
    included, and appears complete or not at all. Merging into a quantized model
    quantizes the sums again, which loses a little of the adapter; ``dequantize``
    does not. In a model that is not quantized, weights keep their type.

    Args:
        model_path: The model that was fine-tuned: a folder or a Hub repository id.
        adapter_path: Folder that ``hgrn2 lora`` wrote.
        save_path: The folder to make; it must not exist.
        dequantize: Whether to turn a quantized model into one that is not.
        quantize: Whether to quantize embeddings and projections after merging.
        q_bits: Bits per weight, and ``q_group_size`` weights per scale; ``None`` for
            the defaults of ``q_mode`` (4 and 64 for ``"affine"``).

    Raises:
        ValueError: If the adapter does not fit the model, the model is quantized
            already, or ``save_path`` exists.
        OSError: If a file is missing or cannot be written.
    """
    adapter = Path(adapter_path)
    if not (adapter / "adapters.safetensors").is_file():
        raise ValueError(f"no adapter to merge: {adapter} has no adapters.safetensors")
    check_model(str(model_path))
    with staged_folder(Path(save_path)) as folder:
        model, tokenizer, config = load(
            str(model_path), adapter_path=str(adapter), return_config=True
        )
        if quantize and "quantization" in config and not dequantize:
            raise ValueError(f"{model_path} is quantized already; give --dequantize as well")

        # DoRA's magnitudes are float32 and would make its sums float32 too.
        dtype = model.model.embeddings(mx.array([0])).dtype
        merged = []
        for name, module in model.named_modules():
            if hasattr(module, "fuse"):
                linear = module.fuse(dequantize=dequantize)
                linear.set_dtype(dtype)
                merged.append((name, linear))
        model.update_modules(tree_unflatten(merged))

        if dequantize:
            model = dequantize_model(model)
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        if quantize:
            model, config = quantize_model(model, config, q_group_size, q_bits, mode=q_mode)
        # Trained on turns, the model needs to see them the same way again.
        settings = json.loads((adapter / "adapter_config.json").read_text())
        if template := settings.get("chat_template"):
            tokenizer.chat_template = template
        save(folder, str(model_path), model, tokenizer, config, donate_model=True)
