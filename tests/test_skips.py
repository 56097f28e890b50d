"""In CI a skipped test fails; elsewhere it is skipped and listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIPS = """
import pytest

def test_that_skips():
    pytest.skip("no such program")

@pytest.mark.xfail(strict=True, reason="known fault")
def test_that_fails_as_expected():
    assert False
"""


@pytest.mark.parametrize(("ci", "status", "shown"), [("true", 1, "must not be skipped in CI"), ("", 0, "SKIPPED [1]")])
def test_a_skip(tmp_path: Path, ci: str, status: int, shown: str):
    file = tmp_path / "test_that_skips.py"
    file.write_text(SKIPS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), str(file)]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, env=environment)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert shown in ran.stdout
    assert "no such program" in ran.stdout
    assert "1 xfailed" in ran.stdout or "XFAIL" in ran.stdout
