"""Files that appear only when they are complete, and files that only one process may hold."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def complete_file(path: Path) -> Generator[BinaryIO]:
    """Opens a file for writing under a temporary name. At the end it is on disk and gets its own name.

    If the block raises, the old file stays, and the temporary one is removed. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, refusal: Exception) -> Generator[None]:
    """Locks a file while the block runs. Raises `refusal` if another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal from error
        yield
