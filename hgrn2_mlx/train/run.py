"""A run from its configuration to a model: whatever was done before is not done again.

The run's folder holds

    tokens/         the text as token ids, and its tokenizer
    checkpoints/    the newest checkpoints, each a folder that mlx-lm loads
    log.jsonl       a line for every update and evaluation
    model/          the trained model; it appears last

Of several processes, each reads the text, there or on a disk of its own; the first
(rank 0) writes the rest, and the others take weights and optimizer from it.
"""

import math
import shutil
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer, maybe_set_recommended_wired_limit

from ..convert.staging import staged_folder
from ..models.language_model import LanguageModel
from ..processes import all_needed, first_process_first, wait_for_all
from .batches import TrainingBatches, ValidationBatches
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import SampleConfig, TrainConfig
from .data import Corpus, prepare
from .dropout import add_dropout
from .initialization import INITIALIZER_RANGE, initialize
from .log import RunLog
from .model_folder import write_model
from .trainer import Trainer


def train(config: TrainConfig) -> Path:
    """Trains a model, or goes on from the newest checkpoint in ``config.output``.

    A run that was interrupted at any moment and goes on has the same losses, on
    a CPU to the bit, as one that was not. Several processes (``mlx.launch``) share
    every batch, and may be more or fewer when the run goes on.

    Returns:
        The folder of the trained model, for ``mlx_lm.load``.

    Raises:
        ConnectionError: If another process of the run has ended.
        ValueError: If the text does not suit the configuration, ``config.output``
            holds another run, or the loss is not finite any more.
        OSError: If a file cannot be read or written.
    """
    maybe_set_recommended_wired_limit()
    with all_needed():
        return _train(config, mx.distributed.init())


def _train(config: TrainConfig, group: mx.distributed.Group) -> Path:
    if config.batch_size % group.size():
        raise ValueError(
            f"batch_size: {config.batch_size} does not divide among {group.size()} processes"
        )
    output = Path(config.output)
    checkpoints = output / "checkpoints"
    with first_process_first():
        checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (output, checkpoints):
            _remove_unfinished(folder)

        trainer = Trainer(_initial_model(config), config)
        saved = list_checkpoints(checkpoints)
        done = 0
        if saved:
            done = load_checkpoint(saved[-1], config, trainer.model, trainer.optimizer)
        corpus = prepare(config.data, config.model_args.vocab_size, output / "tokens")
    done = trainer.start_from_first_process(done)

    first = group.rank() == 0
    with RunLog(output / "log.jsonl", done, config.steps, silent=not first) as log:
        log.say(f"{output}: step {done} of {config.steps}")
        _run_steps(done, trainer, corpus, checkpoints, log)
    if first and not (output / "model").exists():
        trainer.model.update(trainer.in_precision(trainer.model.parameters()))
        with staged_folder(output / "model") as folder:
            write_model(folder, trainer.model, config.model, corpus.tokenizer)
    wait_for_all()
    return output / "model"


def how_to_resume(config: TrainConfig) -> str:
    """What to tell who interrupted the run."""
    saved = list_checkpoints(Path(config.output) / "checkpoints")
    if not saved:
        return "no checkpoint yet; the same command starts again"
    return f"the same command goes on from step {int(saved[-1].name)} ({saved[-1]})"


def _remove_unfinished(folder: Path) -> None:
    """What a killed process was still writing."""
    for staging in folder.glob(".*.partial"):
        shutil.rmtree(staging)


def _initial_model(config: TrainConfig) -> LanguageModel:
    model: LanguageModel = config.architecture.Model(config.model_args)
    mx.random.seed(config.seed)
    initialize(model, config.model.get("initializer_range", INITIALIZER_RANGE))
    add_dropout(model, config.dropout, config.token_dropout)
    return model


def _run_steps(done: int, trainer: Trainer, corpus: Corpus, checkpoints: Path, log: RunLog) -> None:
    config = trainer.config
    tokenizer = load_tokenizer(corpus.tokenizer)
    windows = (config.batch_size, config.sequence_length)
    rank, processes = trainer.group.rank(), trainer.group.size()
    batches = TrainingBatches(corpus.train, *windows, config.seed, rank, processes)
    validation = ValidationBatches(corpus.validation, *windows, rank, processes)
    for step in range(done, config.steps):
        start = time.perf_counter()
        loss, gradient_norm = trainer.step(step, batches[step])
        seconds = time.perf_counter() - start
        done = step + 1
        log.step(
            done,
            loss=loss,
            learning_rate=trainer.optimizer.learning_rate.item(),
            gradient_norm=gradient_norm,
            tokens_per_second=config.batch_size * config.sequence_length / seconds,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {done}; lower optimizer.learning_rate. "
                f"The checkpoints in {checkpoints} are from before"
            )
        if done % config.evaluation_interval == 0 or done == config.steps:
            validation_loss = trainer.evaluate(validation)
            sample = _sample(trainer.model, tokenizer, config.sample) if rank == 0 else None
            log.evaluation(done, validation_loss, sample)
        if rank == 0 and (done % config.checkpoint_interval == 0 or done == config.steps):
            save_checkpoint(
                checkpoints, done, config, trainer.model, trainer.optimizer, corpus.tokenizer
            )


def _sample(
    model: LanguageModel, tokenizer: TokenizerWrapper, sample: SampleConfig | None
) -> str | None:
    """Text written by the model."""
    if sample is None:
        return None
    model.eval()
    responses = stream_generate(
        model,
        tokenizer,
        sample.prompt,
        max_tokens=sample.tokens,
        sampler=make_sampler(temp=sample.temperature),
    )
    text = sample.prompt + "".join(response.text for response in responses)
    model.train()
    return text
