"""The environment in which vLLM and torch are imported."""

import subprocess
import sys

PROGRAM = """
import logging
from service.engine.vllm.loading import prepare_environment

prepare_environment({})
import torch

assert not logging.getLogger("torch._library.triton").isEnabledFor(logging.WARNING)
"""


def test_torch_writes_no_warnings_into_the_log() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
