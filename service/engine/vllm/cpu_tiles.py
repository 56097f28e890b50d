"""Asks Linux for the CPU's matrix tiles (Intel AMX), or makes vLLM do without them.

Linux ends a process with SIGILL if it uses tiles without permission
(https://docs.kernel.org/arch/x86/xstate.html). vLLM 0.32 uses them for attention on every CPU that has them, and never
asks. oneDNN asks before its own first use, but a small model may not need oneDNN before its first attention.
"""

import importlib
from typing import Any


def install() -> None:
    """Asks for the permission. Each process of the engine must call it once, before the model runs.

    torch has no public functions for these.
    """
    features: Any = importlib.import_module("torch.cpu")
    if not features._init_amx():
        features._is_amx_tile_supported = _no


def _no() -> bool:
    return False
