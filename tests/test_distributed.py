"""Several processes on MLX's ring: they compute what one does, and end when one of them dies."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm.utils import load
from ranks import finish, start
from sharded_logits import all_logits
from test_lora import write_tokenizer

from hgrn2_mlx.convert import convert
from hgrn2_mlx.models import hgrn2

if not mx.distributed.is_available("ring"):
    pytest.skip("this build of MLX has no ring backend", allow_module_level=True)

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
VOCAB = 97


def run(command: list[str], processes: int, folder: Path, seconds: int = 60) -> list[str]:
    """Runs a command in processes that must all succeed; their output."""
    results = finish(start(command, processes, folder), seconds)
    assert [status for status, _ in results] == [0] * processes, results
    return [output for _, output in results]


# Data-parallel training


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    draw = random.Random(0)
    words = "the a cat dog sat ran on in mat park and birds sing rain falls".split()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{' '.join(draw.choices(words, k=8))}.\n" for _ in range(400)))
    return path


def training_run(text: Path, folder: Path, **changes) -> list[str]:
    """The command of a short run without dropout, which differs from process to process."""
    values = {
        "output": str(folder / "run"),
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "expand_ratio": 16,
            "intermediate_size": 64,
        },
        "data": {"train": [str(text)]},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "steps": 12,
        "batch_size": 8,
        "sequence_length": 16,
        "evaluation_interval": 6,
        "checkpoint_interval": 4,
        "sample": {"prompt": "the cat", "tokens": 4},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values | changes))
    return ["-m", "hgrn2_mlx", "train", "--config", str(config)]


def read_log(folder: Path, key: str) -> list[float]:
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one-process")
    run(training_run(text, folder), 1, folder)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_training_computes_what_one_process_does(text, one_process, tmp_path, processes):
    outputs = run(training_run(text, tmp_path), processes, tmp_path)
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert read_log(tmp_path, key) == pytest.approx(read_log(one_process, key), abs=1e-5)
    assert len(read_log(tmp_path, "sample")) == 2
    assert str(tmp_path / "run" / "model") in outputs[0]
    assert not any(output.strip() for output in outputs[1:])


def test_training_goes_on_with_more_processes(text, one_process, tmp_path):
    command = training_run(text, tmp_path)
    shutil.copytree(one_process / "run", tmp_path / "run")
    for done in ("checkpoints/00000012", "model"):
        shutil.rmtree(tmp_path / "run" / done)
    run(command, 2, tmp_path)
    assert read_log(tmp_path, "step") == read_log(one_process, "step")
    assert read_log(tmp_path, "loss") == pytest.approx(read_log(one_process, "loss"), abs=1e-5)


def test_every_process_has_its_own_disk(text, one_process, tmp_path):
    """The first has a checkpoint, the other nothing, not even tokens."""
    shutil.copytree(one_process / "run", tmp_path / "0" / "run")
    (tmp_path / "1").mkdir()
    for done in ("checkpoints/00000012", "model"):
        shutil.rmtree(tmp_path / "0" / "run" / done)
    training_run(text, tmp_path, output="run")
    script = (
        "import os; from hgrn2_mlx.cli import main; "
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['MLX_RANK'])); "
        "raise SystemExit(main(['train', '--config', '../run.yaml']))"
    )
    run(["-c", script], 2, tmp_path)
    losses = read_log(tmp_path / "0", "loss")
    assert losses == pytest.approx(read_log(one_process, "loss"), abs=1e-5)
    assert os.listdir(tmp_path / "1" / "run" / "checkpoints") == []


def test_processes_drop_different_numbers(text, tmp_path):
    """Else the mean over processes would have the noise of one."""
    script = (
        "import mlx.core as mx, numpy as np; from pathlib import Path; "
        "from hgrn2_mlx.train import TrainConfig; from hgrn2_mlx.train.trainer import Trainer; "
        f"config = TrainConfig.load({str(tmp_path / 'run.yaml')!r}); "
        "trainer = Trainer(config.architecture.Model(config.model_args), config); "
        "trainer.step(0, np.ones((1, 5), np.int32)); print(mx.random.uniform().item())"
    )
    training_run(text, tmp_path)
    assert len(set(run(["-c", script], 2, tmp_path))) == 2


@pytest.mark.slow  # MLX runs the C++ compiler on a CPU.
def test_the_compiled_step_is_the_step_on_two_processes(text, tmp_path):
    script = (
        "import json, mlx.core as mx, numpy as np; from hgrn2_mlx.train import TrainConfig; "
        "from hgrn2_mlx.train.initialization import initialize; "
        "from hgrn2_mlx.train.trainer import Trainer; "
        f"config = TrainConfig.load({str(tmp_path / 'run.yaml')!r}); "
        "rank = mx.distributed.init().rank(); "
        "batches = np.random.default_rng(rank).integers(0, 300, (5, 4, 17)); "
        "new = lambda: config.architecture.Model(config.model_args); "
        "models = [new(), new()]; "
        "[(mx.random.seed(0), initialize(model)) for model in models]; "
        "trainers = [Trainer(model, config, c) for model, c in zip(models, (False, True))]; "
        "print(json.dumps([[t.step(*b) for b in enumerate(batches)] for t in trainers]))"
    )
    training_run(text, tmp_path)
    outputs = run(["-c", script], 2, tmp_path, seconds=300)
    assert outputs[0] == outputs[1]
    plain, compiled = np.array(json.loads(outputs[0]))
    assert plain.shape == (5, 2) and len(set(plain[:, 0])) == 5
    assert np.allclose(compiled, plain, rtol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(text, tmp_path):
    command = training_run(text, tmp_path, batch_size=3)
    for status, output in finish(start(command, 2, tmp_path)):
        assert status == 1
        assert output == "hgrn2: error: batch_size: 3 does not divide among 2 processes\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(text, tmp_path, victim):
    ranks = start(training_run(text, tmp_path, steps=100_000), 2, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[victim].send_signal(signal.SIGKILL)
    results = finish(ranks)
    assert results[victim][0] == -signal.SIGKILL
    status, output = results[1 - victim]
    assert status == 1
    newest = max(path for path in checkpoints.iterdir() if path.name.isdigit())
    assert output.splitlines()[-1] == (
        "hgrn2: error: another process has ended or is out of reach: "
        "[ring] connection to a peer was lost; "
        f"the same command goes on from step {int(newest.name)} ({newest})"
    )
    assert load_arrays(newest)


def load_arrays(checkpoint: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(checkpoint / "model.safetensors"))
    mx.eval(arrays, mx.load(str(checkpoint / "optimizer.safetensors")))
    return arrays


# Data-parallel fine-tuning


def fine_tuning_run(model: Path, text: Path, folder: Path, **changes) -> list[str]:
    flags = {
        "model": model,
        "data": text,
        "adapter-path": folder / "adapters",
        "batch-size": 4,
        "max-seq-length": 33,
        "iters": 6,
        "val-batches": 2,
        "steps-per-report": 1,
        "learning-rate": 1e-3,
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["-m", "hgrn2_mlx", "lora", "--train", "--test", *given]


def test_fine_tuning_computes_what_one_process_does(models, text, tmp_path):
    adapters, logs = [], []
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        command = fine_tuning_run(models["hgrn2-default"], text, folder)
        outputs = run(command, processes, folder, seconds=180)
        assert "Test loss" in outputs[0]
        assert not any(output.strip() for output in outputs[1:])
        log = (folder / "adapters" / "losses.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in log])
        adapters.append(mx.load(str(folder / "adapters" / "adapters.safetensors")))
    for key in ("train_loss", "val_loss", "trained_tokens"):
        one, *several = ([entry[key] for entry in log if key in entry] for log in logs)
        assert one and all(values == pytest.approx(one, abs=1e-5) for values in several)
    for adapter in adapters[1:]:
        assert adapter.keys() == adapters[0].keys()
        for name, expected in adapters[0].items():
            assert mx.allclose(adapter[name], expected, atol=1e-4), name


def test_a_process_that_dies_ends_the_fine_tuning(models, text, tmp_path):
    adapters = tmp_path / "adapters"
    command = fine_tuning_run(
        models["hgrn2-default"], text, tmp_path, iters=100_000, save_every=3, steps_per_eval=100_000
    )
    ranks = start(command, 2, tmp_path)
    deadline = time.monotonic() + 60
    while not list(adapters.glob("0*_adapters.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGKILL)
    (status, output), _ = finish(ranks, seconds=180)
    assert status == 1, output
    # What mlx-lm printed on its way may come out after it.
    (line,) = (line for line in output.splitlines() if line.startswith("hgrn2: "))
    assert line.startswith("hgrn2: error: another process has ended or is out of reach: [ring]")
    assert "Traceback" not in output
    mx.eval(mx.load(str(max(adapters.glob("0*_adapters.safetensors")))))


# Tensor-parallel inference


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders by name: the fixtures, quantized ones, and models of four heads."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for name in ("hgrn2-default", "hgrn2-short-conv", "hgrn2-hybrid", "hgrn-default"):
        folder = folders[name] = root / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(FIXTURES / name / file, folder / file)
        write_tokenizer(folder)
    for name in ("hgrn2-short-conv", "hgrn2-hybrid"):
        folders[f"{name}-4bit"] = root / f"{name}-4bit"
        convert(folders[name], root / f"{name}-4bit", quantize=True, q_group_size=32)
    for norm_type in ("rmsnorm", "simplermsnorm", "layernorm"):
        folders[norm_type] = write_four_heads(root / norm_type, norm_type)
    return folders


def write_four_heads(folder: Path, norm_type: str) -> Path:
    """A random model with biases, convolutions and an attention layer."""
    folder.mkdir()
    config = {
        "model_type": "hgrn2",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "expand_ratio": 16,
        "intermediate_size": 96,
        "use_short_conv": True,
        "norm_type": norm_type,
        "bias": True,
        "attn": {"layers": [1], "num_heads": 4, "qkv_bias": True},
    }
    model = hgrn2.Model(hgrn2.ModelArgs.from_dict(config))
    mx.random.seed(0)
    names_and_weights = tree_flatten(model.parameters())
    weights = {n: w + mx.random.normal(w.shape, scale=0.2) for n, w in names_and_weights}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    mx.random.seed(1)
    mx.save_safetensors(str(path), {"tokens": mx.random.randint(0, VOCAB, (2, 48))})
    return path


@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_logits_equal_whole_ones(models, tokens, tmp_path, processes):
    four_heads = {"rmsnorm", "simplermsnorm", "layernorm"}
    folders = [models[name] for name in models if processes == 2 or name in four_heads]
    script = [str(TESTS / "sharded_logits.py"), str(tokens), str(tmp_path)]
    run([*script, *map(str, folders)], processes, tmp_path)
    for folder in folders:
        expected = all_logits(load(str(folder))[0], mx.load(str(tokens))["tokens"])
        for rank in range(processes):
            logits = mx.load(str(tmp_path / f"{folder.name}-{rank}.safetensors"))
            for key in ("whole", "cached"):
                difference = mx.abs(logits[key] - expected[key]).max().item()
                assert difference < 1e-4, (folder.name, rank, key)


def test_generation_on_two_processes(models, tmp_path):
    """mlx-lm's own loop, on every process alike."""
    script = (
        "import sys, hgrn2_mlx; from mlx_lm import generate; "
        "from mlx_lm.utils import load, sharded_load; "
        f"model = {str(models['hgrn2-hybrid'])!r}; "
        "print(*(generate(*f(model), 'the cat', max_tokens=16) for f in (load, sharded_load)), "
        "sep='|')"
    )
    for output in run(["-c", script], 2, tmp_path):
        whole, sharded = output.split("|")
        assert whole.strip() and whole.strip() == sharded.strip()


def test_heads_that_do_not_divide_are_refused(models, tokens, tmp_path):
    script = [str(TESTS / "sharded_logits.py"), str(tokens), str(tmp_path)]
    for _, output in finish(start([*script, str(models["hgrn2-default"])], 4, tmp_path)):
        assert "ValueError: num_heads (2) does not divide among 4 processes" in output
