"""`make audit`: the report and the exit code for each kind of result of pip-audit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "deploy" / "audit.py")
assert _SPEC is not None
assert _SPEC.loader is not None
audit: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(audit)

SAFE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([SAFE], 0, "0 advisories for 1 packages; not in the database: none"),
        ([SAFE, UNKNOWN], 0, "not in the database: c"),
        ([SAFE, BAD, UNKNOWN], 1, "b 2: X-1, fixed in 3"),
        ([UNKNOWN], 3, "cannot be used: it returned no result for any package"),
        ([], 3, "cannot be used: no route"),
    ],
)
def test_its_report(packages: list[Any], code: int, words: str, capsys: pytest.CaptureFixture[str]):
    assert audit.report("cpu.lock", packages, "a traceback\nno route\n") == code
    assert words in capsys.readouterr().out
