"""Training from scratch: it learns, it resumes to the bit, it refuses what is wrong."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten

from hgrn2_mlx.cli import main
from hgrn2_mlx.models.hgrn2 import Model, ModelArgs
from hgrn2_mlx.train import TrainConfig, train
from hgrn2_mlx.train.batches import TrainingBatches, ValidationBatches
from hgrn2_mlx.train.checkpoint import list_checkpoints
from hgrn2_mlx.train.config import OptimizerConfig
from hgrn2_mlx.train.dropout import add_dropout
from hgrn2_mlx.train.initialization import initialize
from hgrn2_mlx.train.optimizer import decays, learning_rate_schedule
from hgrn2_mlx.train.trainer import Trainer

EXAMPLES = Path(__file__).parent.parent / "examples"

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran in the park",
    "rain falls on the hills",
    "birds sing in the morning",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{draw.choice(SENTENCES)}, and {draw.choice(SENTENCES)}.\n" for _ in range(500))
    path.write_text("".join(lines))
    return path


def small_run(text, folder):
    """The configuration of a run of about two seconds."""
    return {
        "output": str(folder / "run"),
        "model": {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "expand_ratio": 16,
            "intermediate_size": 64,
        },
        "data": {"train": [str(text)]},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "steps": 60,
        "batch_size": 4,
        "sequence_length": 32,
        "dropout": 0.1,
        "token_dropout": 0.05,
        "evaluation_interval": 20,
        "checkpoint_interval": 10,
        "sample": {"prompt": "the cat", "tokens": 8},
    }


@pytest.fixture
def values(text, tmp_path):
    return small_run(text, tmp_path)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    train(TrainConfig.from_dict(small_run(text, folder)))
    return folder / "run"


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def validation_losses(run):
    return [entry["validation_loss"] for entry in read_log(run) if "validation_loss" in entry]


def without_timing(log):
    """What must not differ between two runs of one configuration."""
    measured = ("tokens_per_second", "peak_memory")
    return [{k: v for k, v in entry.items() if k not in measured} for entry in log]


def test_it_learns(finished):
    tokens = np.fromfile(finished / "tokens" / "validation.bin", np.uint16)
    counts = np.array(list(Counter(tokens.tolist()).values())) / len(tokens)
    unigram_entropy = -(counts * np.log(counts)).sum()
    losses = [
        entry["validation_loss"] for entry in read_log(finished) if "validation_loss" in entry
    ]
    assert losses[-1] < 0.25 * unigram_entropy
    assert losses == sorted(losses, reverse=True)


def test_the_log_has_every_step_once(finished):
    log = read_log(finished)
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 61))
    for entry in steps:
        assert entry["tokens_per_second"] > 0 and entry["peak_memory"] > 0
        assert math.isfinite(entry["gradient_norm"])
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert steps[0]["learning_rate"] == 0 and steps[5]["learning_rate"] == pytest.approx(1e-2)
    samples = [entry for entry in log if "sample" in entry]
    assert [entry["step"] for entry in samples] == [20, 40, 60]
    assert all(entry["sample"].startswith("the cat") for entry in samples)


def test_the_newest_checkpoints_are_kept_and_load_as_models(finished):
    checkpoints = list_checkpoints(finished / "checkpoints")
    assert [path.name for path in checkpoints] == ["00000050", "00000060"]
    model, _ = mlx_lm.load(str(checkpoints[0]))
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 320)


def test_the_finished_folder_generates_through_mlx_lm(finished):
    model, tokenizer = mlx_lm.load(str(finished / "model"))
    text = mlx_lm.generate(model, tokenizer, "the cat sat", max_tokens=12)
    assert "mat" in text
    assert tokenizer.eos_token_id == 2 and tokenizer.decode(tokenizer.encode("a\n b")) == "a\n b"
    assert {weight.dtype for _, weight in tree_flatten(model.parameters())} == {mx.float32}


def test_a_finished_run_is_left_as_it_is(finished, text):
    before = (finished / "log.jsonl").read_bytes()
    train(TrainConfig.from_dict(small_run(text, finished.parent)))
    assert (finished / "log.jsonl").read_bytes() == before


# A run in a process of its own, which ends itself after a number of calls of a function.
KILLED_RUN = """
import os, signal, sys
from hgrn2_mlx.train import TrainConfig, checkpoint, train, trainer

config, name, number = sys.argv[1:]
owner = {"step": trainer.Trainer, "write_model": checkpoint}[name]
function, calls = getattr(owner, name), []

def counted(*args, **kwargs):
    result = function(*args, **kwargs)
    calls.append(name)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, counted)
train(TrainConfig.load(config))
"""


@pytest.mark.parametrize(
    "function, calls",
    [("step", 27), ("write_model", 3)],
    ids=["between checkpoints", "while a checkpoint is written"],
)
def test_a_killed_run_goes_on_to_the_same_losses(function, calls, values, finished, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", KILLED_RUN, str(config), function, str(calls)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    run = tmp_path / "run"
    assert list_checkpoints(run / "checkpoints")[-1].name == "00000020"
    assert read_log(run)[-1]["step"] > 20
    train(TrainConfig.load(config))
    assert without_timing(read_log(run)) == without_timing(read_log(finished))
    weights, expected = (
        mx.load(str(folder / "model" / "model.safetensors")) for folder in (run, finished)
    )
    assert all(mx.array_equal(weights[name], expected[name]) for name in expected)
    assert not list(run.rglob(".*.partial"))


def test_an_interrupt_is_one_line_that_says_how_to_go_on(values, tmp_path):
    config, log = tmp_path / "config.yaml", tmp_path / "run" / "log.jsonl"
    config.write_text(yaml.safe_dump(values | {"steps": 1_000_000}))
    command = [sys.executable, "-m", "hgrn2_mlx", "train", "--config", str(config)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell started in the background ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not (log.exists() and '"step": 15' in log.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert errors.splitlines()[-1] == (
        "hgrn2: error: interrupted; the same command goes on "
        f"from step {int(newest.name)} ({newest})"
    )
    assert "Traceback" not in errors
    mlx_lm.load(str(newest))


def test_a_run_does_not_go_on_with_another_configuration(values):
    train(TrainConfig.from_dict(values | {"steps": 10}))
    values["optimizer"]["weight_decay"] = 0.2
    with pytest.raises(ValueError, match=r"^optimizer.weight_decay: is 0.2, but was 0.1"):
        train(TrainConfig.from_dict(values | {"steps": 10}))


def test_a_run_does_not_go_on_with_other_text(values, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(open(values["data"]["train"][0], "rb").read())
    values = values | {"data": {"train": [str(text)]}, "steps": 10}
    train(TrainConfig.from_dict(values))
    text.write_text(text.read_text().replace("cat", "cow"))
    with pytest.raises(ValueError, match="made of other text"):
        train(TrainConfig.from_dict(values))


def test_a_loss_that_is_not_finite_ends_the_run(values):
    values["optimizer"] |= {"learning_rate": 1e30, "warmup_steps": 1}
    with pytest.raises(ValueError, match=r"^the loss is \w+ at step \d+; lower optimizer"):
        train(TrainConfig.from_dict(values))


def test_bfloat16_keeps_float32_weights_and_learns_as_well(values, finished, tmp_path):
    train(TrainConfig.from_dict(values | {"precision": "bfloat16"}))
    run = tmp_path / "run"
    weights = mx.load(str(run / "checkpoints" / "00000060" / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {mx.float32}
    trained = mx.load(str(run / "model" / "model.safetensors"))
    kept = [name for name, weight in trained.items() if weight.dtype == mx.float32]
    assert kept == ["model.lower_bounds"]
    assert validation_losses(run)[-1] == pytest.approx(validation_losses(finished)[-1], abs=0.1)


@pytest.mark.slow
def test_the_compiled_step_is_the_step(values):
    config = TrainConfig.from_dict(values)
    batches = TrainingBatches(np.arange(1000) % 320, 4, 32, seed=0)

    def losses(compiled):
        model = Model(config.model_args)
        mx.random.seed(0)
        initialize(model)
        add_dropout(model, config.dropout, config.token_dropout)
        trainer = Trainer(model, config, compiled)
        return np.array([trainer.step(step, batches[step]) for step in range(10)])

    assert np.allclose(losses(compiled=True), losses(compiled=False), rtol=1e-4)


def test_the_example_trains_a_model_of_the_embedded_size():
    config = TrainConfig.load(EXAMPLES / "train_shakespeare.yaml")
    parameters = tree_flatten(Model(config.model_args).parameters())
    assert sum(weight.size for _, weight in parameters) == pytest.approx(6.2e6, rel=0.02)
    assert all((EXAMPLES.parent / path).is_file() for path in config.data.train)


TOKENS = np.arange(1000)


def test_batches_are_a_function_of_the_seed_and_the_step():
    batches = TrainingBatches(TOKENS, 4, 16, seed=1)
    later = [batches[step] for step in (40, 3, 17)]
    again = TrainingBatches(TOKENS, 4, 16, seed=1)
    assert all(np.array_equal(again[step], x) for step, x in zip((40, 3, 17), later, strict=True))
    assert not np.array_equal(TrainingBatches(TOKENS, 4, 16, seed=2)[3], batches[3])


def test_an_epoch_visits_every_window_once_and_the_next_cuts_elsewhere():
    batches = TrainingBatches(TOKENS, 1, 16, seed=0)
    epochs = [
        np.stack([batches[epoch * batches.windows + n][0] for n in range(batches.windows)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert epoch.shape == (61, 17) and epoch.dtype == np.int32
        assert np.array_equal(np.diff(epoch, axis=1), np.ones((61, 16)))
        starts = np.sort(epoch[:, 0])
        assert np.array_equal(np.diff(starts), np.full(60, 16))
        assert not np.array_equal(starts, epoch[:, 0])
    assert epochs[0][:, 0].min() != epochs[1][:, 0].min()


@pytest.mark.parametrize("length", [17, 18, 33, 40, 49, 100])
def test_every_length_of_at_least_one_window_gives_batches(length):
    batches = TrainingBatches(np.arange(length), 3, 16, seed=0)
    assert all(batches[step].shape == (3, 17) for step in range(20))


def test_validation_predicts_every_token_but_the_first_once():
    batches = list(ValidationBatches(np.arange(161), 4, 16))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert np.concatenate([batch[:, 1:].flatten() for batch in batches]).tolist() == list(
        range(1, 161)
    )


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    rate = learning_rate_schedule(config, steps=110)
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.1 + 0.45 * (1 + 0.5**0.5), 60: 0.55, 110: 0.1}
    for step, value in expected.items():
        assert rate(mx.array(step, mx.uint64)).item() == pytest.approx(value, abs=1e-5)


ARGS = ModelArgs(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    expand_ratio=16,
    use_short_conv=True,
    attn={"layers": [1], "num_heads": 2, "qkv_bias": True},
    attnres_block_size=2,
)


def test_matrices_are_drawn_and_decay_and_all_else_starts_neutral():
    model = Model(ARGS)
    mx.random.seed(0)
    initialize(model, 0.02)
    neutral = {"norm": 1, "bias": 0, "lower_bounds": 0, "res_proj": 0}
    for name, weight in tree_flatten(model.parameters()):
        value = next((v for key, v in neutral.items() if key in name), None)
        if value is None:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(weight.mean().item()) < 0.005, name
            assert decays(name, weight) == ("conv1d" not in name), name
        else:
            assert mx.all(weight == value), name
            assert not decays(name, weight), name


def test_dropout_changes_only_training_and_no_names():
    plain, dropping = Model(ARGS), Model(ARGS)
    add_dropout(dropping, dropout=0.2, token_dropout=0.1)
    weights = tree_flatten(plain.parameters())
    dropping.load_weights(weights)
    assert [name for name, _ in tree_flatten(dropping.parameters())] == [n for n, _ in weights]

    tokens = mx.arange(200)[None]
    assert mx.array_equal(dropping.eval()(tokens), plain(tokens))
    dropping.train()
    assert not mx.array_equal(dropping(tokens), plain(tokens))
    embeddings = dropping.model.embeddings(mx.arange(300)[None])
    zeros = (embeddings == 0).astype(mx.float32)
    assert zeros.min(axis=-1).mean().item() == pytest.approx(0.1, abs=0.06)
    assert zeros.mean().item() == pytest.approx(1 - 0.9 * 0.8, abs=0.06)


def with_key(values, key, value):
    """A copy with one dotted key set, or removed if the value is ``...``."""
    first, _, rest = key.partition(".")
    if rest:
        return values | {first: with_key(values.get(first, {}), rest, value)}
    if value is ...:
        return {name: v for name, v in values.items() if name != first}
    return values | {first: value}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("steps", 0, "at least 1, got 0"),
        ("steps", 2.5, "a whole number, got 2.5"),
        ("steps", True, "a whole number, got True"),
        ("steps", ..., "missing"),
        ("setps", 3, "unknown key; known are output, "),
        ("precision", "float16", "one of float32, bfloat16, got 'float16'"),
        ("seed", -1, "at least 0"),
        ("dropout", 1, "less than 1, got 1"),
        ("output", 7, "text, got 7"),
        ("data", ["text.txt"], "keys and values"),
        ("data.train", "text.txt", "a list, got 'text.txt'"),
        ("data.train", [], "at least one file"),
        ("data.validation_share", 0, "nothing to evaluate on"),
        ("data.train", ..., "missing"),
        ("optimizer.learning_rate", "fast", "a number, got 'fast'"),
        ("optimizer.learning_rate", 0, "more than 0, got 0"),
        ("optimizer.betas", [0.9], "two numbers"),
        ("optimizer.warmup_steps", 60, "not less than steps"),
        ("sample.prompt", "", "at least one character"),
        ("model.hidden_size", "wide", "a whole number, got 'wide'"),
        ("model", {"hidden_size": -32}, "hidden_size must be at least 1, got -32"),
        ("model.initializer_range", "wide", "a number, got 'wide'"),
        ("model.initializer_range", -1, "at least 0, got -1"),
        ("model.model_type", "mamba2", "expected hgrn2"),
        ("model", {"hidden_dim": 3}, "unknown key 'hidden_dim'"),
        ("model", {"hidden_size": 32, "expand_ratio": 24}, "multiple of expand_ratio (24)"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(
    key, value, message, values, tmp_path, capsys
):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(with_key(values, key, value)))
    assert main(["train", "--config", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hgrn2: error: {config}: {key}")
    assert message in line


def test_numbers_of_the_model_are_numbers_however_yaml_reads_them(values):
    values["model"] |= {"norm_eps": "1e-5", "initializer_range": "2e-2"}
    config = TrainConfig.from_dict(values)
    assert config.model_args.norm_eps == config.model["norm_eps"] == 1e-5
    assert config.model["initializer_range"] == 2e-2


@pytest.mark.parametrize("contents", ["steps: [1", "- steps", ""])
def test_a_file_that_is_no_configuration_is_refused(contents, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(contents)
    assert main(["train", "--config", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hgrn2: error: {config}: ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.vocab_size": 2000}, r"model.vocab_size: .*too high"),
        ({"model.vocab_size": 200}, r"model.vocab_size: .*smaller than required"),
        ({"sequence_length": 100_000}, "data.train: .* tokens do not fill one window"),
        ({"data.validation_share": 1e-9}, "data.validation: 0 tokens do not fill one window"),
        ({"sequence_length": 2000}, "data.validation: .* tokens do not fill one window"),
    ],
)
def test_text_that_does_not_suit_the_configuration_is_refused(changes, message, values):
    for key, value in changes.items():
        values = with_key(values, key, value)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.from_dict(values))


def test_text_that_is_not_utf8_is_refused(values, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    values["data"] = {"train": [str(tmp_path / "latin.txt")]}
    with pytest.raises(ValueError, match="latin.txt: not UTF-8"):
        train(TrainConfig.from_dict(values))


def test_a_given_tokenizer_and_validation_file_are_used(values, finished, text, tmp_path):
    tokenizer = finished / "tokens" / "tokenizer" / "tokenizer.model"
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("the cat sat on the mat.\n" * 30)
    values["data"] |= {"tokenizer": str(tokenizer), "validation": [str(held_out)]}
    train(TrainConfig.from_dict(values | {"steps": 10}))
    run = tmp_path / "run"
    assert (run / "model" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    _, loaded = mlx_lm.load(str(run / "model"))
    for name, path in {"train": text, "validation": held_out}.items():
        tokens = np.fromfile(run / "tokens" / f"{name}.bin", np.uint16).tolist()
        assert loaded.decode(tokens[:-1]) == path.read_text() and tokens[-1] == 2
