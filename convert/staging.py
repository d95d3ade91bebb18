"""Outputs that appear complete or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside ``destination`` to write into, renamed to it at the end.

    Whatever ends the block early, an exception or an interrupt, removes it.

    Raises:
        ValueError: If ``destination`` exists or cannot be made.
        OSError: If the folder cannot be renamed.
    """
    destination = destination.absolute()
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists already; remove it or choose another place")
    staging = _beside(destination)
    try:
        try:
            staging.mkdir()
        except OSError as error:
            raise ValueError(f"cannot make {destination}: {error.strerror}") from error
        yield staging
        staging.rename(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def staged_file(destination: Path) -> Iterator[Path]:
    """A new file beside ``destination`` to write, which replaces it at the end.

    It is made at once, so that a place that cannot be written is known before the work. Its
    name has the same ending, by which MLX and others know the format.

    Raises:
        ValueError: If the file cannot be made.
        OSError: If it cannot be renamed.
    """
    destination = destination.absolute()
    if destination.is_dir():
        raise ValueError(f"{destination} is a folder; give the name of a file")
    staging = _beside(destination, destination.suffix)
    try:
        try:
            staging.touch()
        except OSError as error:
            raise ValueError(f"cannot write {destination}: {error.strerror}") from error
        yield staging
        staging.replace(destination)
    except BaseException:
        # Nor is it there to remove if the reason is that it could not be made.
        with suppress(OSError):
            staging.unlink()
        raise


def _beside(destination: Path, ending: str = "") -> Path:
    """A hidden name of its own in the same folder, and so on the same disk."""
    return destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial{ending}")
