"""Owns the end of the engine's processes when the one that started them is gone: a vLLM plugin, loaded by each of them.

vLLM's engine process waits for work for ever after its parent was killed with -9, and keeps the accelerator's memory.
"""

import multiprocessing
import os
from multiprocessing.connection import wait
from threading import Thread


def register() -> None:
    """Ends this process as soon as its parent has ended; does nothing in a process that multiprocessing did not start.

    Named as an entry point in the group `vllm.general_plugins`, which vLLM calls in every process it starts.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_with, args=[parent.sentinel], name="lifeline", daemon=True).start()


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)  # nobody is left to hand anything to, and the main thread may be deep in a forward pass
