"""An output folder that appears complete or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
    staging = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
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
