"""Runs the shell examples of docs/api.md against the real server, and compares their answers with those on the page."""

import json
import re
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from service.api.http.security import scope_of
from tests.e2e.server import Server
from tests.e2e.test_readme import ROOT, shell

GUIDE = (ROOT / "docs" / "api.md").read_text()


def documents(text: str) -> list[Any]:
    """Returns the JSON documents that are concatenated in `text`."""
    decoder = json.JSONDecoder()
    found: list[Any] = []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def contains(actual: Any, expected: Any) -> bool:
    """Returns whether `actual` has everything that is in `expected`.

    An object may have more members, and a list may have more items. Floats may differ by 0.001.
    """
    match expected:
        case dict():
            members = cast("dict[str, Any]", expected)
            return all(name in actual and contains(actual[name], value) for name, value in members.items())
        case list():
            items = cast("list[Any]", expected)
            return len(actual) >= len(items) and all(map(contains, actual, items))
        case float():
            return actual == pytest.approx(expected, abs=1e-3)
        case _:
            return actual == expected


def test_the_examples_work_in_their_order_and_answer_what_the_page_shows(server: Server, tmp_path: Path) -> None:
    blocks = re.findall(r"^```(sh|json)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    answer, num_shown, printed = "", 0, ""
    for language, block in blocks:
        if language == "sh":
            answer = shell(block, server, tmp_path)
            printed += answer
            continue
        (expected,) = documents(block)
        actual = documents(answer)[-1]
        assert contains(actual, expected), f"the page shows {block}, and the server answered {json.dumps(actual)}"
        num_shown += 1
    assert num_shown >= 15
    assert "event: text" in printed
    assert "event: act" in printed
    assert '"loss_mask"' in printed


def test_the_table_of_calls_is_complete_and_names_the_scopes(server: Server) -> None:
    listed = re.findall(r"^\| `([A-Z]+) (/\S*)` \| (\w+) \|", GUIDE, re.MULTILINE)
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    served = [(method.upper(), path.replace("{episode_id}", "{id}")) for path in paths for method in paths[path]]
    assert sorted(listed) == sorted((method, path, scope_of(method, path) or "none") for method, path in served)
