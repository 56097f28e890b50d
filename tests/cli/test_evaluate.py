"""`episodic evaluate`: tables, JSON and Markdown of a running service, and its exit codes."""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.cli import evaluate
from service.cli.main import app

GROUP = {
    "value": "base [red]",
    "episodes": 1200,
    "ended": 1199,
    "excluded": {"active": 1},
    "completion": {"rate": 0.25, "low": 0.2, "high": 0.3, "n": 1199},
    "return": {"mean": -3.5, "low": None, "high": None, "iqm": 1.0, "n": 1199},
    "pass_at": {"1": 0.25, "4": 0.5},
}
REPORT = {
    "by": "group",
    "level": 0.9,
    "groups": [GROUP, {"value": None, "episodes": 2, "ended": 2}],
    "comparisons": [
        {
            **{"a": "x\u001b[31m", "b": "base [red]", "metric": "completion", "pairs": 12, "delta": 0.5, "low": 0.25},
            **{"high": 0.75, "p": 0.001, "p_adjusted": 0.002, "method": "mcnemar_exact", "verdict": "better"},
        }
    ],
    "warnings": [{"code": "few_episodes", "detail": "Fewer than 30. Groups: [red]."}],
}


class Service(BaseHTTPRequestHandler):
    status: ClassVar = 200
    queries: ClassVar[list[dict[str, list[str]]]] = []

    def do_GET(self) -> None:
        is_markdown = self.headers["Accept"] == "text/markdown"
        body = b"### Evaluation\n" if is_markdown else json.dumps(REPORT).encode()
        if self.path != "/healthz":
            self.queries.append(parse_qs(urlsplit(self.path).query))
        self.send_response(self.status)
        self.send_header("Content-Type", "text/markdown; charset=utf-8" if is_markdown else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    Service.queries.clear()
    with HTTPServer(("127.0.0.1", 0), Service) as service:
        thread = Thread(target=service.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()
        thread.join()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *arguments])


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_the_terminal(url: str, width: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "Console", lambda **_: Console(width=width, file=sys.stdout, highlight=False))
    ran = run("--by", "group", "--url", url)
    assert ran.exit_code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert max(map(len, lines[:4])) <= width
    assert ("pass@k" in lines[0]) == (width > 80)
    assert "0.250 [0.200, 0.300]" in ran.stdout
    assert "base [red]" in ran.stdout


def test_tables_show_comparisons_and_warnings(url: str):
    ran = run("--by", "group", "--baseline", "base [red]", "--url", url)
    header, base, none, level, compared, row, warning = ran.stdout.splitlines()
    assert header.startswith("group")
    assert base.split()[:3] == ["base", "[red]", "1,200"]
    assert none.startswith("none")
    assert level == "0.9 confidence intervals."
    assert "verdict" in compared
    assert row.startswith("x\N{REPLACEMENT CHARACTER}[31m")
    assert "0.500 [0.250, 0.750]" in row
    assert row.split()[-1] == "better"
    assert warning == "few_episodes: Fewer than 30. Groups: [red]."


def test_options_become_the_query(url: str):
    options = ["--by", "tag", "--baseline", "b", "--metric", "return", "--level", "0.9", "--tag", "t", "--success"]
    ran = run(*options, "--metadata", "seed=7", "--json", "--url", url)
    assert json.loads(ran.stdout)["groups"][0]["return"]["mean"] == -3.5
    named = {"by": "tag", "baseline": "b", "metric": "return", "level": "0.9", "tag": "t", "success": "true"}
    assert Service.queries == [{name: [value] for name, value in {**named, "metadata.seed": "7"}.items()}]


def test_markdown_is_printed_as_it_is(url: str):
    assert run("--markdown", "--url", url).stdout == "### Evaluation\n"


def test_exit_codes(url: str, monkeypatch: pytest.MonkeyPatch):
    assert run("--by", "seed", "--url", url).exit_code == 2
    assert run("--json", "--markdown", "--url", url).exit_code == 2
    monkeypatch.setattr(Service, "status", 401)
    refused = run("--url", url)
    assert refused.exit_code == 1
    assert "EPISODIC_API_KEY" in refused.stderr
    nothing = run("--url", "http://127.0.0.1:9")
    assert (nothing.exit_code, nothing.stdout) == (1, "")
