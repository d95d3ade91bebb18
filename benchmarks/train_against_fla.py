"""Training from scratch here and in flash-linear-attention, on one NVIDIA GPU in one run.

    python benchmarks/train_against_fla.py [--steps 500] [--json FILE]

Needs MLX's CUDA build, torch and flash-linear-attention. Both sides start from the
same weights, see the same batches of Shakespeare and move with AdamW under the same
schedule, activations in bfloat16 over float32 weights; then both measure the
validation text in float32. The model has the size of the checkpoint that the
package carries, without its regularisation, which flash-linear-attention lacks.

Triton's autotuning of flash-linear-attention's kernels takes minutes; with
--quick-tuning each kernel runs in the first configuration that works, and the
figures say so.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import yaml
from fla.models import HGRN2Config, HGRN2ForCausalLM
from triton.runtime.autotuner import Autotuner

from hgrn2_mlx.models.hgrn2 import Model
from hgrn2_mlx.train import TrainConfig
from hgrn2_mlx.train.batches import TrainingBatches, ValidationBatches
from hgrn2_mlx.train.data import prepare
from hgrn2_mlx.train.optimizer import learning_rate_schedule
from hgrn2_mlx.train.trainer import Trainer

ROOT = Path(__file__).parent.parent
WARM_UP = 20  # steps that compile and are not timed


def read_config(steps: int) -> TrainConfig:
    values = yaml.safe_load((ROOT / "examples" / "train_shakespeare.yaml").read_text())
    values |= {"steps": steps, "precision": "bfloat16", "dropout": 0.0, "token_dropout": 0.0}
    values["data"] |= {
        "train": [str(ROOT / "examples" / "data" / "tinyshakespeare.txt")],
        "tokenizer": str(ROOT / "hgrn2_mlx" / "demo_checkpoint" / "tokenizer.model"),
    }
    return TrainConfig.from_dict(values)


def tune_quickly() -> None:
    """Makes Triton take a kernel's first configuration that works instead of timing all."""
    measure = Autotuner._bench

    def first_that_works(self, *arguments, config, **options):
        if getattr(self, "settled_for", None) is self.nargs:
            return [float("inf")] * 3
        times = measure(self, *arguments, config=config, **options)
        if times[0] < float("inf"):
            self.settled_for = self.nargs
        return times

    Autotuner._bench = first_that_works


def train_mlx(
    config: TrainConfig, weights: dict[str, np.ndarray], batches
) -> tuple[Trainer, float]:
    """The trainer after all steps, and seconds per step."""
    model = Model(config.model_args)
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    trainer = Trainer(model, config)
    for step in range(config.steps):
        if step == WARM_UP:
            start = time.perf_counter()
        trainer.step(step, batches[step])
    return trainer, (time.perf_counter() - start) / (config.steps - WARM_UP)


def train_fla(config: TrainConfig, model: HGRN2ForCausalLM, batches, rates: list[float]) -> float:
    """Trains in place; seconds per step."""
    named = list(model.named_parameters())
    decays = [p for n, p in named if p.ndim == 2 and n != "model.lower_bounds"]
    others = [p for n, p in named if not (p.ndim == 2 and n != "model.lower_bounds")]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": decays, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    for step in range(config.steps):
        if step == WARM_UP:
            torch.cuda.synchronize()
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        batch = torch.from_numpy(batches[step]).long().cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / (config.steps - WARM_UP)


@torch.no_grad()
def evaluate_fla(model: HGRN2ForCausalLM, batches) -> float:
    for layer in model.model.layers:
        layer.attn.mode = "fused_recurrent"  # exact float32; the chunk kernels multiply in TF32
    total = tokens = 0
    for batch in batches:
        batch = torch.from_numpy(batch).long().cuda()
        logits = model(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        total += torch.nn.functional.cross_entropy(
            logits, batch[:, 1:].flatten(), reduction="sum"
        ).item()
        tokens += batch[:, 1:].numel()
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick-tuning", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    if arguments.quick_tuning:
        tune_quickly()
    config = read_config(arguments.steps)
    torch.manual_seed(config.seed)
    fla_model = HGRN2ForCausalLM(HGRN2Config(**config.model)).cuda().train()
    weights = {n: p.detach().cpu().numpy() for n, p in fla_model.named_parameters()}
    windows = (config.batch_size, config.sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = prepare(config.data, config.model_args.vocab_size, Path(scratch) / "tokens")
        batches = TrainingBatches(corpus.train, *windows, config.seed)

        trainer, mlx_seconds = train_mlx(config, weights, batches)
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        rates = [schedule(mx.array(step)).item() for step in range(config.steps)]
        print(f"hgrn2-mlx trained, {mlx_seconds * 1e3:.1f} ms a step", flush=True)
        fla_seconds = train_fla(config, fla_model, batches, rates)
        print(f"fla trained, {fla_seconds * 1e3:.1f} ms a step", flush=True)

        trainer.config.precision = "float32"
        mlx_loss = trainer.evaluate(ValidationBatches(corpus.validation, *windows))
        fla_loss = evaluate_fla(fla_model.eval(), ValidationBatches(corpus.validation, *windows))

    tokens = config.batch_size * config.sequence_length
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "mlx": mx.__version__,
        "torch": torch.__version__,
        "triton_tuning": "first configuration" if arguments.quick_tuning else "full",
        "steps": config.steps,
        "validation_loss": {"hgrn2-mlx": mlx_loss, "fla": fla_loss},
        "tokens_per_second": {"hgrn2-mlx": tokens / mlx_seconds, "fla": tokens / fla_seconds},
        "speed_ratio": fla_seconds / mlx_seconds,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
