"""Speed and memory of prefill, decoding and training, beside other models of the same size.

Each model is measured by itself, one after the other, with the same tokens: reading
prompts of growing length, decoding after them, and LoRA training steps. Speeds are those
of the fastest of a few trials, so that other work on the machine counts little.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mamba2
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from rich.table import Table

from .convert.dialects import find_dialect
from .convert.source import read_config
from .info import format_bytes, read_info
from .machine import describe_machine
from .models import ARCHITECTURES, hgrn2

PREFILL_STEP = 2048  # tokens that mlx-lm reads of a prompt at a time


@dataclass(frozen=True)
class Size:
    """What models to compare have in common."""

    hidden_size: int
    layers: int
    vocabulary: int


def build_hgrn2(size: Size) -> nn.Module:
    return hgrn2.Model(
        hgrn2.ModelArgs(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            expand_ratio=min(128, size.hidden_size),
        )
    )


def build_mamba2(size: Size) -> nn.Module:
    """Inner width twice the hidden size in heads of 64 and a state of 128, as published.

    Raises:
        ValueError: If 32 does not divide the hidden size.
    """
    if size.hidden_size % 32:
        raise ValueError(f"mamba2 needs a hidden size that 32 divides, not {size.hidden_size}")
    return mamba2.Model(
        mamba2.ModelArgs(
            model_type="mamba2",
            num_heads=2 * size.hidden_size // 64,
            head_dim=64,
            vocab_size=size.vocabulary,
            hidden_size=size.hidden_size,
            intermediate_size=2 * size.hidden_size,
            state_size=128,
            num_hidden_layers=size.layers,
            layer_norm_epsilon=1e-5,
            conv_kernel=4,
            n_groups=1,
            use_bias=False,
            use_conv_bias=True,
            tie_word_embeddings=False,
            time_step_limit=(0.0, float("inf")),
            time_step_rank="auto",
        )
    )


def build_llama(size: Size) -> nn.Module:
    """Attention with as many heads for keys and values as for queries, and HGRN2's MLP."""
    heads = max(1, size.hidden_size // 128)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            intermediate_size=256 * -(-size.hidden_size * 8 // (3 * 256)),
            num_attention_heads=heads,
            rms_norm_eps=1e-6,
            vocab_size=size.vocabulary,
            tie_word_embeddings=False,
        )
    )


BUILDERS = {"hgrn2": build_hgrn2, "mamba2": build_mamba2, "llama": build_llama}
PEERS = ("mamba2", "llama")

# By quantity: its unit, and whether more of it is better.
QUANTITIES = {
    "prefill": ("tokens/s", True),
    "decode": ("tokens/s", True),
    "state or cache": ("bytes", False),
    "generation, peak memory": ("bytes", False),
    "LoRA step": ("tokens/s", True),
    "LoRA step, peak memory": ("bytes", False),
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        prompt_tokens: Lengths of prompts, at the first of the batch sizes.
        generation_tokens: How many tokens to decode after each.
        batch_sizes: Of which those after the first go with the first length.
        train_tokens: Lengths of sequences to train on, one at a time.
        trials: Of which the fastest counts.
    """

    prompt_tokens: Sequence[int] = (512, 2048, 4096)
    generation_tokens: int = 16
    batch_sizes: Sequence[int] = (1, 4)
    train_tokens: Sequence[int] = (512, 1024)
    trials: int = 3

    def __post_init__(self):
        sizes = (*self.prompt_tokens, *self.batch_sizes, *self.train_tokens)
        if min(*sizes, self.generation_tokens, self.trials) < 1:
            raise ValueError("lengths, batch sizes and the number of trials must be at least 1")

    def generations(self) -> Iterator[tuple[int, int]]:
        """Pairs of a batch size and a prompt's length."""
        yield from ((self.batch_sizes[0], tokens) for tokens in self.prompt_tokens)
        yield from ((batch, self.prompt_tokens[0]) for batch in self.batch_sizes[1:])


@dataclass(frozen=True)
class Row:
    """One quantity at one size, in every model."""

    quantity: str
    batch: int
    tokens: int
    values: dict[str, float]

    def ratios(self) -> dict[str, float]:
        """How many times better the first model is: faster, or with less memory."""
        (_, first), *others = self.values.items()
        more_is_better = QUANTITIES[self.quantity][1]
        return {name: first / x if more_is_better else x / first for name, x in others}


@dataclass(frozen=True)
class Results:
    """What :func:`bench` measured.

    Args:
        machine: As :func:`describe_machine` has it, with MLX's device.
        dtype: Type that all of the models compute in.
        quantization: Bits and group size of all of them, if they are quantized.
        size: Of all of the models.
        parameters: Of each, before quantization.
        settings: What was asked for.
        rows: The figures.
    """

    machine: dict[str, Any]
    dtype: str
    quantization: dict[str, Any] | None
    size: Size
    parameters: dict[str, int]
    settings: Settings
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        rows = [
            asdict(row) | {"unit": QUANTITIES[row.quantity][0], "ratios": row.ratios()}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}

    def __rich__(self) -> Table:
        """For a terminal: ``rich.print(results)``."""
        bits = f", {self.quantization['bits']} bits" if self.quantization else ""
        first = next(iter(self.parameters))
        table = Table(
            title=f"width {self.size.hidden_size}, depth {self.size.layers}, "
            f"{self.dtype}{bits}, on {self.machine['device']}",
            caption=f"fastest of {self.settings.trials} trials; in brackets, "
            f"how many times faster, or with how many times less memory, {first} is",
            box=None,
            header_style="bold",
        )
        for heading in ("", "batch", "tokens"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, count in self.parameters.items():
            table.add_column(f"{name}\n{count / 1e6:.1f}M parameters", justify="right")
        previous = None
        for row in self.rows:
            ratios = row.ratios()
            unit, _ = QUANTITIES[row.quantity]
            cells = [
                (format_bytes(int(value)) if unit == "bytes" else f"{value:,.0f} {unit}")
                + (f" ({ratios[name]:.2f}x)" if name in ratios else "")
                for name, value in row.values.items()
            ]
            quantity = "" if row.quantity == previous else row.quantity
            table.add_row(quantity, str(row.batch), f"{row.tokens:,}", *cells)
            previous = row.quantity
        return table


@dataclass(frozen=True)
class Subject:
    """The model that peers are built after.

    Args:
        name: For the report.
        build: Makes it.
        size: Its size.
        parameters: How many it has, before quantization.
        dtype: The type that it computes in.
        quantization: ``bits``, ``group_size`` and ``mode``; ``None`` for none.
    """

    name: str
    build: Callable[[], nn.Module]
    size: Size
    parameters: int
    dtype: mx.Dtype
    quantization: dict[str, Any] | None = None


def random_subject(size: Size, dtype: mx.Dtype | None = None) -> Subject:
    """HGRN2 with random weights, on a CPU in float32, which it multiplies fastest."""
    if dtype is None:
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    parameters = count_parameters(build_hgrn2(size))
    return Subject("hgrn2", lambda: build_hgrn2(size), size, parameters, dtype)


def count_parameters(model: nn.Module) -> int:
    """Of a model that is not quantized."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def read_subject(path: Path, dtype: mx.Dtype | None = None) -> Subject:
    """A converted folder's model, or that of a ``config.json``, with random weights.

    Args:
        path: The folder or the file.
        dtype: Type to compute in; ``None`` for the model's own.

    Raises:
        ValueError: If it is neither.
    """
    info = read_info(path)
    folder, file = (path, "config.json") if path.is_dir() else (path.parent, path.name)
    config = read_config(folder, quantized=True, name=file)
    quantization = config.get("quantization")
    if quantization is not None:
        names = ("bits", "group_size", "mode")
        quantization = {name: quantization[name] for name in names if name in quantization}
    config = find_dialect(config, ())[0].mlx_config(config)
    architecture = ARCHITECTURES[info.model_type]
    args = architecture.ModelArgs.from_dict(config)

    def build() -> nn.Module:
        return load_model(path)[0] if path.is_dir() else architecture.Model(args)

    return Subject(
        name=info.model_type,
        build=build,
        size=Size(args.hidden_size, args.num_hidden_layers, args.vocab_size),
        parameters=info.parameters,
        dtype=dtype or getattr(mx, info.dtype),
        quantization=quantization,
    )


def bench(
    subject: Subject,
    peers: Sequence[str],
    settings: Settings,
    progress: Callable[[str], None] = lambda what: None,
) -> Results:
    """Measures the subject and its peers, which are as wide, as deep and of the same type.

    Args:
        subject: What to measure.
        peers: Names of ``BUILDERS``, with random weights.
        settings: At what lengths and batch sizes.
        progress: Is told what is measured next.

    Raises:
        ValueError: If a peer cannot have this size.
    """
    measured: dict[str, dict[tuple[str, int, int], float]] = {}
    # Nothing is computed yet, but a peer that cannot be is refused before the work.
    parameters = {name: count_parameters(BUILDERS[name](subject.size)) for name in peers}
    parameters = {subject.name: subject.parameters, **parameters}
    for name in (subject.name, *peers):
        mx.random.seed(0)
        if name == subject.name:
            model = subject.build()
        else:
            model = BUILDERS[name](subject.size)
        model.set_dtype(subject.dtype)
        if subject.quantization and name != subject.name:
            quantize(model, subject.quantization)
        mx.eval(model.parameters())
        measured[name] = {}
        for case in measure(model, settings, lambda what, name=name: progress(f"{name}: {what}")):
            measured[name].update(case)
        del model  # Or the next one's peak would count it.
    sizes = sorted(measured[subject.name], key=lambda size: list(QUANTITIES).index(size[0]))
    return Results(
        machine=describe_machine() | {"device": mx.device_info()["device_name"]},
        dtype=str(subject.dtype).removeprefix("mlx.core."),
        quantization=subject.quantization,
        size=subject.size,
        parameters=parameters,
        settings=settings,
        rows=[
            Row(*size, {name: values[size] for name, values in measured.items()}) for size in sizes
        ],
    )


def measure(
    model: nn.Module, settings: Settings, progress: Callable[[str], None]
) -> Iterator[dict[tuple[str, int, int], float]]:
    """Every quantity of a model at every size, by quantity, batch size and tokens.

    The model has adapters afterwards.
    """
    for batch, tokens in settings.generations():
        progress(f"a prompt of {tokens} tokens, batch {batch}")
        timed = time_generation(model, tokens, settings.generation_tokens, batch, settings.trials)
        yield {
            ("prefill", batch, tokens): batch * tokens / timed.prefill_seconds,
            ("decode", batch, tokens): batch / timed.step_seconds,
            ("state or cache", batch, tokens): timed.cache_bytes,
            ("generation, peak memory", batch, tokens): timed.peak_bytes,
        }
    add_lora(model)
    for tokens in settings.train_tokens:
        progress(f"a training step of {tokens} tokens")
        step = time_training(model, tokens, settings.trials)
        yield {
            ("LoRA step", 1, tokens): tokens / step.seconds,
            ("LoRA step, peak memory", 1, tokens): step.peak_bytes,
        }


def quantize(model: nn.Module, quantization: dict[str, Any]) -> None:
    """All layers that can be, as mlx-lm does by default."""

    def fits(_: str, layer: nn.Module) -> bool:
        return hasattr(layer, "to_quantized") and not layer.weight.shape[-1] % group_size

    group_size = quantization["group_size"]
    nn.quantize(model, **quantization, class_predicate=fits)


@dataclass(frozen=True)
class Generation:
    """Generating after a prompt, for a whole batch at once.

    Args:
        prefill_seconds: For reading the prompt, up to the first token.
        step_seconds: For each token after it, of every sequence.
        cache_bytes: State, or keys and values, of the batch in the end.
        peak_bytes: The most memory that MLX held, the weights included.
    """

    prefill_seconds: float
    step_seconds: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class TrainingStep:
    """A LoRA step: time, and the most memory that MLX held, the weights included."""

    seconds: float
    peak_bytes: int


def time_generation(
    model: nn.Module, prompt_tokens: int, generated_tokens: int, batch: int, trials: int
) -> Generation:
    """Reads a random prompt as mlx-lm does, and decodes greedily; the fastest of trials."""
    shape = (batch, prompt_tokens)
    prompt = mx.random.randint(0, model.args.vocab_size, shape, key=mx.random.key(0))
    mx.eval(prompt)
    mx.clear_cache()
    mx.reset_peak_memory()
    prefills, steps = [], []
    for _ in range(trials):
        cache = make_prompt_cache(model)
        started = time.perf_counter()
        for start in range(0, prompt_tokens, PREFILL_STEP):
            logits = model(prompt[:, start : start + PREFILL_STEP], cache)
            mx.eval(logits[:, -1], [layer.state for layer in cache])
        token = mx.argmax(logits[:, -1:], axis=-1)
        mx.eval(token)
        prefills.append(time.perf_counter() - started)

        started = time.perf_counter()
        for _ in range(generated_tokens):
            token = mx.argmax(model(token, cache), axis=-1)
            mx.async_eval(token)
        mx.eval(token, [layer.state for layer in cache])
        steps.append((time.perf_counter() - started) / generated_tokens)
    return Generation(
        prefill_seconds=min(prefills),
        step_seconds=min(steps),
        cache_bytes=sum(layer.nbytes for layer in cache),
        peak_bytes=mx.get_peak_memory(),
    )


def add_lora(model: nn.Module) -> None:
    """Adapters on every linear layer, with mlx-lm's settings."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()


def time_training(model: nn.Module, length: int, trials: int) -> TrainingStep:
    """Steps of mlx-lm's loss and Adam on one random sequence, for a model with adapters."""
    optimizer = optim.Adam(learning_rate=1e-5)
    loss_and_gradients = nn.value_and_grad(model, default_loss)
    tokens = mx.random.randint(0, model.args.vocab_size, (1, length + 1), key=mx.random.key(0))
    mx.eval(tokens)
    mx.clear_cache()
    mx.reset_peak_memory()

    def step() -> None:
        (loss, _), gradients = loss_and_gradients(model, tokens, mx.array([[0, length + 1]]))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)

    return TrainingStep(fastest(step, trials), mx.get_peak_memory())


def fastest(run: Callable[[], Any], trials: int) -> float:
    """Seconds of the fastest of several runs; the first also compiles."""
    seconds = []
    for _ in range(trials):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def draw(results: Results, picture: Path, format: str) -> None:
    """Every quantity against the number of tokens, at the first batch size.

    Args:
        results: What to draw.
        picture: The file to write.
        format: Such as ``"png"`` or ``"svg"``.
    """
    from matplotlib.figure import Figure  # Slow to import.

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    all_axes = figure.subplots(2, 3).T.flatten()
    for axes, (quantity, (unit, _)) in zip(all_axes, QUANTITIES.items(), strict=True):
        batch = 1 if quantity.startswith("LoRA") else results.settings.batch_sizes[0]
        rows = [row for row in results.rows if (row.quantity, row.batch) == (quantity, batch)]
        scale, unit = (1e6, "MB") if unit == "bytes" else (1, unit)
        for name in results.parameters:
            points = [(row.tokens, row.values[name] / scale) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=f"{quantity}, batch {batch}", xlabel="tokens", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    all_axes[0].legend(frameon=False)
    figure.savefig(picture, dpi=150, format=format)
