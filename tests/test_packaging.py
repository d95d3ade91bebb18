"""The wheel and the source distribution, used as a user uses them: away from the checkout."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import mlx_lm
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
# Where the wheel puts the folders of the checkout that it holds.
PACKAGES = {"hgrn2_mlx": "hgrn2_mlx", "metal": "hgrn2_mlx/metal", "convert": "hgrn2_mlx/convert"}

PROGRAM = """
import mlx.core as mx
import hgrn2_mlx
from hgrn2_mlx.convert import ConversionReport, convert

def recurrence(q: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    return hgrn2_mlx.gated_recurrence(q, q, v, scale=1.0)

report: ConversionReport = convert("a", "b", quantize=True)
hgrn2_mlx.gated_recurrence("q", 1, None)  # type: ignore[arg-type]
"""

pytestmark = pytest.mark.slow


def run(*command, cwd) -> str:
    # Neither the checkout nor this environment's packages may help.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, CHECKOUT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty environment into which only the wheel was installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "pip", "install", "--quiet", wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def converted(environment, tmp_path_factory):
    """The carried checkpoint, converted by the installed command from where it was installed."""
    folder = tmp_path_factory.mktemp("converted")
    (checkpoint,) = environment.glob("lib/python*/site-packages/hgrn2_mlx/demo_checkpoint")
    command = environment / "bin" / "hgrn2", "convert"
    run(*command, "--hf-path", checkpoint, "--mlx-path", "model", "--dtype", "float32", cwd=folder)
    return folder / "model"


def test_the_wheel_holds_every_file_of_the_package_as_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    for folder, package in PACKAGES.items():
        for file in (CHECKOUT / folder).rglob("[!.]*"):
            if file.is_file() and file.suffix != ".pyc":
                name = f"{package}/{file.relative_to(CHECKOUT / folder)}"
                assert held.get(name) == file.read_bytes(), name


def test_the_source_distribution_brings_what_its_tests_need(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tests = (CHECKOUT / "tests").rglob("[!.]*")
    files = {file for file in tests if file.is_file() and file.suffix != ".pyc"}
    assert {str(file.relative_to(CHECKOUT)) for file in files} <= held


@pytest.mark.parametrize("command", ["demo", "convert", "lora", "serve"])
def test_the_installed_command_explains_itself(environment, tmp_path, command):
    assert "usage: hgrn2 " + command in run(
        environment / "bin" / "hgrn2", command, "--help", cwd=tmp_path
    )


def test_the_installed_command_writes_what_the_checkout_writes(environment, converted, tmp_path):
    options = "--prompt", "ROMEO:", "--max-tokens", "12", "--ignore-chat-template"
    command = environment / "bin" / "hgrn2", "generate", "--model", converted
    text = run(*command, *options, cwd=tmp_path)
    model, tokenizer = mlx_lm.load(str(converted))
    assert mlx_lm.generate(model, tokenizer, "ROMEO:", max_tokens=12) in text


def test_a_program_that_uses_the_package_is_type_checked(environment, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    python = environment / "bin" / "python"
    command = sys.executable, "-m", "mypy", "--strict", "--python-executable", python
    run(*command, "program.py", cwd=tmp_path)
