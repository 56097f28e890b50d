"""Files that appear only when they are complete."""

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
