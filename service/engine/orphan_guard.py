"""Ends the engine's processes when the service's process ends, so that none is left behind as an orphan.

If the service is killed by SIGKILL, vLLM's engine process would wait for work forever and occupy the GPU's memory.
Therefore each process that vLLM starts loads `register` as a vLLM plugin. `cut` kills these processes directly.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

from service.engine.vllm import cpu_adapters, cpu_tiles, structured_outputs

_MARK = "_EPISODIC_ENGINE"
"""Environment variable that marks this service's process and the processes that it starts. It is no setting."""


def arm() -> None:
    """Activates `register` in the processes that this process starts from now on."""
    os.environ[_MARK] = "1"


def register() -> None:
    """Makes this process end when its parent ends.

    Does nothing in a process that multiprocessing did not start, or that does not belong to this service: other
    programs that use vLLM may run in the same Python environment.

    The process also gets the service's changes to vLLM (structured outputs; adapters and tiles on the CPU), and it
    ignores SIGINT. On Ctrl-C, a terminal sends it to both parent and child, but the parent still needs the engine while
    it drains.

    pyproject.toml registers this function as an entry point of the group `vllm.general_plugins`. vLLM calls these entry
    points in every process that it starts.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and _MARK in os.environ:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        Thread(target=_exit_after, args=[parent.sentinel], name="lifeline", daemon=True).start()
        structured_outputs.install()
        cpu_adapters.install()
        cpu_tiles.install()


def _exit_after(parent: int) -> None:
    wait([parent])
    os._exit(1)  # immediately, because the main thread may be busy with a forward pass


def cut() -> None:
    """Kills the processes that this process started with multiprocessing, and all their descendants.

    The signal is SIGKILL, because a stopped process does not react to any other.
    """
    started = [child.pid for child in multiprocessing.active_children() if child.pid]
    for pid in [*started, *(grandchild for child in started for grandchild in _descendants(child))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    """Yields the ids of all descendants of a process (Linux only)."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                yield child
                yield from _descendants(child)
