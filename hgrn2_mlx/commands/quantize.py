"""``hgrn2 quantize``: quantize a converted model, or undo it."""

import argparse
from pathlib import Path

from .arguments import (
    add_quantization_settings,
    check_quantization_settings,
    example,
    says_how_to_quantize,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Quantize the embeddings and projections of a converted model, as mlx-lm does, "
        "in a new folder. (hgrn2 convert -q quantizes while it converts.)",
        **example("--model hgrn2-1.3b --mlx-path hgrn2-1.3b-4bit --q-bits 4"),
    )
    parser.add_argument(
        "--model", "--hf-path", required=True, metavar="FOLDER", help="folder or Hub repository id"
    )
    parser.add_argument(
        "--mlx-path",
        "--save-path",
        default="mlx_model",
        metavar="FOLDER",
        help="folder to write; it must not exist (default: mlx_model)",
    )
    add_quantization_settings(parser)
    parser.add_argument(
        "--quant-predicate",
        choices=("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"),
        help="more bits for the weights that need them most, one of mlx-lm's recipes",
    )
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="undo the model's quantization"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    check_quantization_settings(options)
    if options.dequantize and (options.quant_predicate or says_how_to_quantize(options)):
        raise ValueError("--dequantize goes with no setting of a quantization")
    if options.quant_predicate and options.q_bits:
        raise ValueError("--quant-predicate says how many bits: leave out --q-bits")

    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import dequantize_model, load, quantize_model, save

    from ..convert.staging import staged_folder
    from ..model_to_load import check_model

    check_model(options.model)
    if options.quant_predicate and options.q_mode != "affine":
        raise ValueError("--quant-predicate needs --q-mode affine")
    with staged_folder(Path(options.mlx_path)) as folder:
        model, tokenizer, config = load(options.model, lazy=True, return_config=True)
        quantized = "quantization" in config
        if quantized != options.dequantize:
            raise ValueError(
                f"{options.model} is {'quantized already' if quantized else 'not quantized'}"
            )
        if options.dequantize:
            model = dequantize_model(model)
            for key in ("quantization", "quantization_config"):
                config.pop(key, None)
        else:
            predicate = None
            if options.quant_predicate:
                group_size = options.q_group_size or 64
                predicate = mixed_quant_predicate_builder(
                    options.quant_predicate, model, group_size
                )
            model, config = quantize_model(
                model,
                config,
                options.q_group_size,
                options.q_bits,
                mode=options.q_mode,
                quant_predicate=predicate,
            )
            if not any("scales" in layer for layer in model.modules()):
                raise ValueError(
                    "nothing can be quantized: no layer's input divides into groups of "
                    f"{config['quantization']['group_size']}"
                )
        save(folder, options.model, model, tokenizer, config)
    print(f"written to {options.mlx_path}")
