"""The folder of an unfinished run, OUT.partial: the checkpoint, and the export if it came from a service."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.files import exclusive
from service.learning import TrainingRefused

CHECKPOINT, RUN, EXPORT = "checkpoint.pt", "run.json", "trajectories.ndjson"
_LOCK = "lock"


def partial_folder(out: Path) -> Path:
    """The folder of an unfinished run."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def working_folder(out: Path, *, resume: bool) -> Generator[Path]:
    """Makes the folder of a run, which only one process may use. At the end removes it, unless it has a checkpoint.

    Files of others stay. So do folders above it that existed before. Raises TrainingRefused and OSError.
    """
    work = partial_folder(out)
    if work.exists() and not resume:
        raise TrainingRefused(f"an unfinished run is in {work}. Continue it with --resume, or remove the folder.")
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        busy = TrainingRefused(f"another process is training in {work}. Wait for it, or choose another --out.")
        with exclusive(work / _LOCK, busy):
            try:
                yield work
            finally:
                if not (work / CHECKPOINT).exists():  # there is nothing to continue from
                    clear(work)
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def clear(work: Path) -> None:
    """Removes the files of a run, and its folder if nothing else is in it."""
    for name in (CHECKPOINT, RUN, EXPORT, _LOCK):
        for path in (work / name, work / f"{name}.partial"):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        work.rmdir()
