"""The paper's experiments at their tiny size: every program from its command to its plot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

PAPER = Path(__file__).parent.parent / "examples" / "paper"


@pytest.fixture
def examples(monkeypatch):
    """The folder of the experiments on the path, as it is when Python runs one of them."""
    monkeypatch.syspath_prepend(str(PAPER))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What run_all.sh writes, two runs side by side and with time enough."""
    folder = tmp_path_factory.mktemp("paper")
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": scripts, "JOBS": "2", "MINUTES": "10"}
    command = [str(PAPER / "run_all.sh"), str(folder), "tiny"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {path.stem.removesuffix("-tiny"): path for path in folder.glob("*.json")}


@pytest.mark.parametrize("name", ["recall", "language_modelling", "expand_ratio", "length"])
def test_an_experiment_writes_its_record_and_its_plot(records, name):
    record = json.loads(records[name].read_text())
    assert record["machine"]["description"]["device_name"]
    assert record["versions"]["mlx"] == mx.__version__
    assert record["settings"]["seeds"] == [0]
    trained = [run for run in record["runs"] if "steps" in run]
    assert trained and not any("failed" in run for run in record["runs"])
    assert all(run["steps"] == run["planned"] for run in trained)
    assert records[name].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_models_of_a_comparison_are_of_equal_size(records):
    for path in records.values():
        runs = json.loads(path.read_text())["runs"]
        for unit in {run.get("unit") for run in runs}:
            of_unit = [run for run in runs if run.get("unit") == unit]
            sizes = [run["parameters"] for run in of_unit if "parameters" in run]
            assert max(sizes) < 1.05 * min(sizes)


def test_the_expand_ratio_multiplies_the_state(records):
    runs = json.loads(records["expand_ratio"].read_text())["runs"]
    # Two layers of width 16, and nothing else.
    assert {(run["architecture"]["expand_ratio"], run["state"]) for run in runs} == {
        (4, 2 * 16 * 4),
        (16, 2 * 16 * 16),
    }


def test_only_the_transformer_keeps_more_of_a_longer_context(records):
    runs = json.loads(records["length"].read_text())["runs"]
    kept = {
        run["architecture"]["kind"]: [at["bytes"] for at in run["decoding"]]
        for run in runs
        if "decoding" in run
    }
    tokens = [8 + 2, 16 + 2]
    assert kept["hgrn2"] == [4 * 2 * 16 * 16] * 2
    assert kept["transformer"] == [4 * 2 * 2 * 16 * n for n in tokens]


def test_recall_asks_for_what_the_sequence_says(examples):
    from recall import draw_sequences

    sequences = draw_sequences(np.random.default_rng(0), 20, 64, 8, 100)
    for tokens, asked, answers in sequences:
        pairs = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(pairs) == 8
        assert all(0 < key < 50 <= value < 100 for key, value in pairs.items())
        assert [pairs[tokens[position]] for position in asked[:8]] == list(answers[:8])
        assert not answers[8:].any() and np.count_nonzero(tokens) == 16 + 8
        assert asked[:8].min() >= 16


def test_byte_pairs_are_compared_by_the_character(tmp_path):
    command = [sys.executable, str(PAPER / "language_modelling.py"), "--size", "tiny"]
    command += ["--parts", "byte_pairs", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    runs = json.loads((tmp_path / "language_modelling-tiny.json").read_text())["runs"]
    tokens = np.fromfile(tmp_path / "tokens-384" / "validation.bin", np.uint16)
    text = (PAPER.parent / "data" / "tinyshakespeare.txt").read_text()
    for run in runs:
        total = run["best"] * (len(tokens) - 1)
        assert run["per_character"] == pytest.approx(total / (0.1 * len(text)), rel=1e-4)


def test_training_ends_when_the_time_is_up(examples, tmp_path):
    command = [sys.executable, str(PAPER / "recall.py"), "--size", "tiny", "--minutes", "0"]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    runs = json.loads((tmp_path / "recall-tiny.json").read_text())["runs"]
    assert {run["failed"] for run in runs} == {"no time left"}
