"""Downloads from and uploads to a Hub, by the command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from hub_stand_in import TOKEN, Hub, Repository, commit_of, running_hub
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from mlx_lm.utils import load_model

from hgrn2_mlx.convert import convert

FIXTURE = Path(__file__).parent / "fixtures" / "hgrn2-default"
MODEL = "someone/hgrn2-tiny"
CARD = b"""---
license: apache-2.0
language:
- en
- la
---
# A tiny model
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def repository(hub: Hub) -> Repository:
    """A checkpoint with what must not be downloaded beside it, alone on the hub."""
    files = {name: (FIXTURE / name).read_bytes() for name in ("config.json", "model.safetensors")}
    files |= {"README.md": CARD, "optimizer.pt": b"spam", "pytorch_model.bin": b"spam"}
    hub.repositories = {MODEL: Repository({"main": files})}
    hub.broken, hub.requests = {}, []
    return hub.repositories[MODEL]


@pytest.fixture
def hgrn2(hub: Hub, tmp_path):
    """Runs ``hgrn2 convert``, or another command; downloads are kept as long as the test."""

    def hgrn2(
        *arguments: str, token: str | None = None, command: str = "convert"
    ) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",  # A protocol of the Hub's storage, beside plain HTTP.
        }
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        return subprocess.run(
            [sys.executable, "-m", "hgrn2_mlx", command, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return hgrn2


def one_line_error(result: subprocess.CompletedProcess) -> str:
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("hgrn2: error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_downloads_only_what_is_needed(hub, repository, hgrn2, tmp_path):
    result = hgrn2("--hf-path", MODEL, "--mlx-path", "mlx")
    assert result.returncode == 0, result.stderr
    assert hub.downloads() == {"config.json", "model.safetensors", "README.md"}
    model, _ = load_model(tmp_path / "mlx")
    expected = mx.load(str(FIXTURE / "expected.safetensors"))
    assert mx.abs(model(expected["tokens"]) - expected["logits"]).max().item() < 1e-4

    # Nothing is fetched twice.
    hub.requests.clear()
    assert hgrn2("--hf-path", MODEL, "--mlx-path", "again").returncode == 0
    assert hub.downloads() == set()


@pytest.mark.parametrize("converted", [False, True])
def test_a_repository_is_measured(hub, repository, hgrn2, tmp_path, converted):
    if converted:
        convert(FIXTURE, tmp_path / "mlx", dtype="bfloat16")
        files = {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}
        repository.revisions["main"] = files
    sizes = ("-p", "8", "-b", "1", "-t", "8", "-g", "1", "-n", "1")
    result = hgrn2("--model", MODEL, *sizes, "--peers", "--json", "bench.json", command="bench")
    assert result.returncode == 0, result.stderr
    parameters = json.loads((tmp_path / "bench.json").read_text())["parameters"]
    assert parameters == {"hgrn2": sum(weight.size for weight in original_weights())}
    assert "model.safetensors" in hub.downloads()
    error = one_line_error(hgrn2("--model", "someone/else", command="bench"))
    assert "the Hub has no repository someone/else" in error


def test_pickled_weights_are_downloaded_where_there_are_no_others(hub, repository, hgrn2):
    folder = FIXTURE.parent / "official-small-bin"
    files = {name: (folder / name).read_bytes() for name in ("config.json", "pytorch_model.bin")}
    repository.revisions["main"] = files | {"optimizer.bin": b"spam", "training_args.bin": b"spam"}
    result = hgrn2(MODEL, "mlx")
    assert result.returncode == 0, result.stderr
    assert hub.downloads() == {"config.json", "pytorch_model.bin"}


def test_goes_on_after_a_dropped_connection(hub, repository, hgrn2, tmp_path):
    config = json.loads((FIXTURE / "config.json").read_text()) | {"vocab_size": 11_000}
    weights = mx.load(str(FIXTURE / "model.safetensors"))
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = mx.random.normal((11_000, config["hidden_size"]))
    mx.save_safetensors(str(tmp_path / "large.safetensors"), weights)
    content = (tmp_path / "large.safetensors").read_bytes()
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": content}
    repository.revisions["main"] = files
    chunk = DOWNLOAD_CHUNK_SIZE  # What has arrived is written in chunks of this size.
    assert len(content) > chunk + 1000
    hub.broken["model.safetensors"] = chunk + 1000

    result = hgrn2(MODEL, "mlx")
    assert result.returncode == 0, result.stderr
    ranges = [range for _, path, range in hub.requests if path.endswith(".safetensors")]
    assert ranges[-1] == f"bytes={chunk}-"
    written = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    assert all(mx.array_equal(written[name], weight) for name, weight in weights.items())


def test_revision(hub, repository, hgrn2, tmp_path):
    older = repository.revisions["main"].copy()
    changed = mx.load(str(FIXTURE / "model.safetensors"))
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    mx.save_safetensors(str(tmp_path / "changed.safetensors"), changed)
    older["model.safetensors"] = (tmp_path / "changed.safetensors").read_bytes()
    repository.revisions["v1"] = older
    for number, revision in enumerate(("v1", commit_of(older))):
        result = hgrn2(MODEL, f"mlx{number}", "--revision", revision)
        assert result.returncode == 0, result.stderr
        written = mx.load(str(tmp_path / f"mlx{number}" / "model.safetensors"))
        assert mx.array_equal(written["model.norm.weight"], changed["model.norm.weight"])
    assert "has no revision v2" in one_line_error(hgrn2(MODEL, "mlx", "--revision", "v2"))


def test_what_cannot_be_downloaded(hub, repository, hgrn2, tmp_path):
    error = one_line_error(hgrn2("someone/else", "mlx"))
    assert "the Hub has no repository someone/else, or it is private" in error
    assert "(HTTP status 401)" in error
    repository.gated = True
    assert "it is gated" in (error := one_line_error(hgrn2(MODEL, "mlx")))
    assert "(HTTP status 401)" in error
    assert "(HTTP status 403)" in one_line_error(hgrn2(MODEL, "mlx", token=TOKEN))
    hub.repositories["someone/empty"] = Repository({"main": {"README.md": CARD}})
    assert "has no config.json" in one_line_error(hgrn2("someone/empty", "mlx"))
    assert not list(tmp_path.glob("*mlx*"))


def test_no_connection(hub, hgrn2, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "endpoint", "http://127.0.0.1:9")  # Nobody listens there.
    error = one_line_error(hgrn2(MODEL, "mlx"))
    assert "downloading it from the Hub failed: " in error
    assert not list(tmp_path.glob("*mlx*"))


def test_upload_with_a_card(hub, repository, hgrn2, tmp_path):
    target = "me/hgrn2-tiny-4bit"
    result = hgrn2(MODEL, "mlx", "-q", "--upload-repo", target, token=TOKEN)
    assert result.returncode == 0, result.stderr
    assert f"uploaded to {hub.endpoint}/{target}" in result.stdout
    uploaded = hub.repositories[target].revisions["main"]
    assert uploaded == {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}

    card = huggingface_hub.ModelCard(uploaded["README.md"].decode())
    assert card.data.base_model == MODEL
    assert card.data.base_model_relation == "quantized"
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "la"]
    assert card.data.library_name == "mlx"
    assert {"mlx", "hgrn2"} == set(card.data.tags)
    commit = commit_of(repository.revisions["main"])
    assert f"[{MODEL}](https://huggingface.co/{MODEL}) (commit {commit})" in card.text
    assert "4 bits in groups of 64 (affine)" in card.text
    assert f"| parameters | {sum(w.size for w in original_weights()):,} |" in card.text
    assert f"hgrn2 generate --model {target}" in card.text


def original_weights() -> list[mx.array]:
    return list(mx.load(str(FIXTURE / "model.safetensors")).values())


def test_upload_without_permission_keeps_the_folder(hub, repository, hgrn2, tmp_path):
    result = hgrn2(MODEL, "mlx", "--upload-repo", "me/tiny", token="hf_wrong")
    assert result.returncode == 1
    assert "mlx is complete, but uploading it to me/tiny failed: " in result.stderr
    assert (tmp_path / "mlx" / "model.safetensors").exists()
    assert "me/tiny" not in hub.repositories
    assert "not of the form owner/name" in one_line_error(
        hgrn2(MODEL, "other", "--upload-repo", "tiny")
    )
