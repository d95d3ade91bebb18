"""``hgrn2 lora``: mlx-lm's fine-tuning, with the defaults, data and checks that HGRN2 users need.

The trainer, its flags and its adapters are mlx-lm's (``mlx_lm/lora.py``,
``LORA.md`` there): LoRA, DoRA or all weights, QLoRA when the model is quantized.
Added here are the layers to adapt, plain text as data, a record and a picture
of the losses, and that a run which cannot work ends before it writes anything.
"""

import argparse
import json
import math
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.lora
import numpy as np
import yaml
from mlx.utils import tree_flatten
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load

from .lora_data import load_data
from .loss_log import LossLog, draw_losses
from .model_to_load import check_model
from .processes import all_needed, wait_for_all

# Every projection of a layer; k and v are those of a hybrid's attention layers, g is HGRN's.
# Not adapted: embeddings and head, norms, convolutions, lower bounds and pseudo-queries.
TARGETS = [
    "attn.q_proj",
    "attn.f_proj",
    "attn.i_proj",
    "attn.g_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]

# mlx-lm's, but for the model and the data, which must be given, and for what is adapted:
# its 16 layers would refuse smaller models.
DEFAULTS = mlx_lm.lora.CONFIG_DEFAULTS | {
    "model": None,
    "data": None,
    "num_layers": -1,
    "lora_parameters": {**mlx_lm.lora.CONFIG_DEFAULTS["lora_parameters"], "keys": TARGETS},
}

# What only a configuration file can say: where mlx-lm finds an example's parts.
DATA_SETTINGS = {
    "chat_feature",
    "completion_feature",
    "hf_dataset",
    "prompt_feature",
    "text_feature",
}


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's flags; those not given are ``None``."""
    parser = mlx_lm.lora.build_parser()
    parser.set_defaults(clear_cache_threshold=None, trust_remote_code=None)
    return parser


def read_settings(given: dict[str, Any]) -> types.SimpleNamespace:
    """Settings of a run: flags before the configuration file before :data:`DEFAULTS`.

    Args:
        given: Settings by name, as in ``DEFAULTS``; ``None`` if not given, others ignored.

    Raises:
        ValueError: If the file is not YAML, or a setting is unknown or out of range.
        OSError: If the file cannot be read.
    """
    given = {name: given[name] for name in DEFAULTS if given.get(name) is not None}
    config = {}
    if "config" in given:
        config = _read_config(given["config"])
    settings = DEFAULTS | config | given
    settings["lora_parameters"] = {
        **DEFAULTS["lora_parameters"],
        **(settings["lora_parameters"] or {}),
    }
    args = types.SimpleNamespace(**settings)

    if not args.train and not args.test:
        raise ValueError("nothing to do: give --train, --test or both")
    if args.model is None:
        raise ValueError("fine-tune what? give --model")
    if args.data is None and not getattr(args, "hf_dataset", None):
        raise ValueError("fine-tune on what? give --data")
    for name, choices in (
        ("fine_tune_type", ("lora", "dora", "full")),
        ("optimizer", tuple(DEFAULTS["optimizer_config"])),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} {getattr(args, name)!r} is not one of {', '.join(choices)}")
    for name, smallest in (
        ("batch_size", 1),
        ("grad_accumulation_steps", 1),
        ("iters", 1),
        ("max_seq_length", 2),
        ("save_every", 1),
        ("steps_per_eval", 1),
        ("steps_per_report", 1),
    ):
        value = getattr(args, name)
        if not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value!r}")
    for name in ("num_layers", "val_batches"):
        value = getattr(args, name)
        if not isinstance(value, int) or (value < 1 and value != -1):
            raise ValueError(f"{name} must be at least 1, or -1 for all, got {value!r}")
    rate = args.learning_rate
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"learning_rate must be a number more than 0, got {rate!r}")
    return args


def _read_config(path: str) -> dict[str, Any]:
    with open(path) as file:
        try:
            config = yaml.load(file, mlx_lm.lora.yaml_loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold settings (name: value)")
    if unknown := sorted(config.keys() - DEFAULTS.keys() - DATA_SETTINGS):
        raise ValueError(f"{path}: unknown setting {', '.join(map(str, unknown))}")
    return config


def run(args: types.SimpleNamespace) -> None:
    """Trains an adapter, measures the loss on the test data, or both.

    Writes into the folder ``args.adapter_path`` what mlx-lm does (``adapters.safetensors``,
    numbered copies of it and ``adapter_config.json``), and ``losses.jsonl`` and ``loss.png``.
    Several processes (``mlx.launch``) share every batch.

    Args:
        args: From :func:`read_settings`.

    Raises:
        ValueError: If the data, the model and the settings do not fit together, or
            the folder holds an adapter already and none is resumed. Nothing has
            been written then.
        ConnectionError: If another process of the run has ended.
        OSError: If a file cannot be read or written.
    """
    with all_needed():
        _run(args)


def _run(args: types.SimpleNamespace) -> None:
    folder = Path(args.adapter_path)
    adapter = folder / "adapters.safetensors"
    if args.train and args.resume_adapter_file is None and adapter.exists():
        raise ValueError(
            f"{folder} holds an adapter already: go on from it with --resume-adapter-file "
            f"{adapter}, or give another --adapter-path"
        )
    if not args.train and args.adapter_path and not adapter.exists():
        raise ValueError(f"no adapter to test: {adapter} does not exist")
    check_model(args.model)

    processes = mx.distributed.init().size()
    if args.batch_size % processes:
        raise ValueError(
            f"batch_size ({args.batch_size}) is not a multiple of {processes} processes"
        )

    np.random.seed(args.seed)
    model, tokenizer = load(
        args.model,
        tokenizer_config={"trust_remote_code": args.trust_remote_code},
        trust_remote_code=args.trust_remote_code,
    )
    if args.num_layers < 1:
        args.num_layers = len(model.layers)
    train_set, valid_set, test_set = load_data(args, tokenizer)

    if args.train:
        _check_trainable(args, model)
        log = _open_log(args, folder)
        wait_for_all()  # mlx-lm now writes over a configuration that others may be reading.
        mlx_lm.lora.train_model(args, model, train_set, valid_set, log)
        rprint(f"Adapter written to {folder}")
        if mx.distributed.init().rank() == 0:
            draw_losses(folder / "losses.jsonl", folder / "loss.png")
    elif args.adapter_path:
        load_adapters(model, args.adapter_path)
    if args.test:
        mlx_lm.lora.evaluate_model(args, model, test_set)


def _open_log(args: types.SimpleNamespace, folder: Path) -> LossLog | None:
    reporting = get_reporting_callbacks(
        args.report_to,
        project_name=args.project_name,
        log_dir=args.adapter_path,
        config=vars(args),
    )
    if mx.distributed.init().rank() > 0:
        return reporting
    resumed = args.resume_adapter_file is not None
    return LossLog(folder / "losses.jsonl", resumed=resumed, wrapped_callback=reporting)


def _check_trainable(args: types.SimpleNamespace, model: nn.Module) -> None:
    """Refuses what mlx-lm would train without effect, or resume as something else."""
    if args.num_layers > len(model.layers):
        raise ValueError(
            f"num_layers is {args.num_layers}, but the model has {len(model.layers)} layers"
        )
    quantized = any(isinstance(module, nn.QuantizedLinear) for module in model.modules())
    if args.fine_tune_type == "full" and quantized:
        raise ValueError(
            f"{args.model} is quantized, and full fine-tuning cannot change quantized weights; "
            "use --fine-tune-type lora"
        )
    # The same model without its weights, which are never evaluated.
    trained = type(model)(model.args)
    trained.freeze()
    if args.fine_tune_type == "full":
        for layer in trained.layers[-args.num_layers :]:
            layer.unfreeze()
    else:
        use_dora = args.fine_tune_type == "dora"
        linear_to_lora_layers(trained, args.num_layers, args.lora_parameters, use_dora)
    expected = {name: array.shape for name, array in tree_flatten(trained.trainable_parameters())}
    if not expected:
        raise ValueError(f"no layer has any of the keys {', '.join(args.lora_parameters['keys'])}")
    if args.resume_adapter_file is not None:
        _check_resumable(args, expected)


def _check_resumable(args: types.SimpleNamespace, expected: dict[str, tuple[int, ...]]) -> None:
    file = Path(args.resume_adapter_file)
    if not file.is_file():
        raise ValueError(f"nothing to resume: {file} does not exist")
    config = file.with_name("adapter_config.json")
    if config.is_file():
        saved = _adapter_settings(json.loads(config.read_text()))
        asked = _adapter_settings(vars(args))
        for name in saved | asked:
            if saved.get(name) != asked.get(name):
                raise ValueError(
                    f"{file} was trained with {name} {saved.get(name)!r}, not "
                    f"{asked.get(name)!r}: resume with the same"
                )
    found = {name: array.shape for name, array in mx.load(str(file)).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{file} does not fit {args.model}: {name} is {found.get(name, 'missing')} "
                f"in it, {expected.get(name, 'missing')} in the model"
            )


def _adapter_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's tensors depend on."""
    settings = {name: config.get(name) for name in ("fine_tune_type", "num_layers")}
    if settings["fine_tune_type"] != "full":
        settings |= config["lora_parameters"]
    return settings
