"""The guard of the engine's processes acts in processes of this service only."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import multiprocessing, signal
from service.engine import orphan_guard

def child():
    orphan_guard.register()
    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests may run where it is ignored
    {arm}
    started = multiprocessing.get_context("spawn").Process(target=child)
    started.start()
    started.join()
"""


@pytest.mark.parametrize(("arm", "ignores"), [("orphan_guard.arm()", "True"), ("", "False")])
def test_only_processes_of_this_service_are_guarded(tmp_path, arm: str, ignores: str):
    """Another program may run vLLM in the same environment, where vLLM calls `register` too."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(arm=arm))
    # An engine that an earlier test loaded in this process has armed it.
    unarmed = {name: value for name, value in os.environ.items() if not name.startswith("_EPISODIC")}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=60, env=unarmed)
    assert ran.stdout.strip() == ignores
