"""Every log event has a fixed name, and the reference lists them all."""

import ast
import re
from pathlib import Path

import service

SERVICE = Path(service.__file__).parent
REFERENCE = (SERVICE.parent / "docs" / "reference.md").read_text()
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


def events() -> set[str]:
    found: set[str] = set()
    for path in SERVICE.rglob("*.py"):
        if path.parent in (SERVICE / "client", SERVICE / "rollout"):
            continue  # they log in their user's program
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("_log.", "(_log.")):
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: the name of an event must be a literal"
                found.add(name.value)
    return found


def test_an_event_is_a_name_that_can_be_searched_for():
    assert {name for name in events() if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name)} == set()


def test_the_reference_lists_every_event():
    section = REFERENCE.split("## Log events")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == events()
