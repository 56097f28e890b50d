"""Owns the end of the engine's processes: with the one that started them, as a vLLM plugin that each of them loads, or
at once.

vLLM's engine process waits for work for ever after its parent was killed with -9, and keeps the accelerator's memory.
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


def register() -> None:
    """Ends this process as soon as its parent has ended, and not at Ctrl-C, which a terminal sends to both: the parent
    drains first. Does nothing in a process that multiprocessing did not start.

    Named as an entry point in the group `vllm.general_plugins`, which vLLM calls in every process it starts.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        Thread(target=_end_with, args=[parent.sentinel], name="lifeline", daemon=True).start()


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)  # nobody is left to hand anything to, and the main thread may be deep in a forward pass


def cut() -> None:
    """Kills the processes that multiprocessing started here, and theirs: a stopped one takes no other signal."""
    started = [child.pid for child in multiprocessing.active_children() if child.pid]
    for pid in [*started, *(grandchild for child in started for grandchild in _below(child))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _below(pid: int) -> Iterator[int]:
    """All that a process started, and what these did (Linux)."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                yield child
                yield from _below(child)
