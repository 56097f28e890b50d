"""Keeps adapters away from requests that have none, on the CPU.

vLLM 0.32 gives rows without an adapter the index -1. Its operations for the CPU use it as the index of a slot, so these
rows get the adapter in the last slot once all slots are occupied. The Triton kernels for GPUs skip such rows.
"""

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any


def install() -> None:
    """Replaces the first half of the operation, `x @ A`, in this process. Each process of the engine must call it once.

    The second half multiplies its result by B, and then adds nothing.
    """
    operations: Any = importlib.import_module("vllm.lora.ops.torch_ops.lora_ops")
    wrapper: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    if wrapper.bgmv_shrink is operations.bgmv_shrink and not hasattr(operations.bgmv_shrink, "__wrapped__"):
        operations.bgmv_shrink = wrapper.bgmv_shrink = _without_other_rows(operations.bgmv_shrink)


def _without_other_rows(shrink: Callable[..., None]) -> Callable[..., None]:
    @wraps(shrink)
    def shrunk(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output.masked_fill_((indices < 0).unsqueeze(1), 0)

    return shrunk
