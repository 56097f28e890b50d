"""`episodic episodes`: a table that fits the terminal, JSON as the API has it, and a wrong URL reported at once."""

import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.cli import episodes, options
from service.cli.main import app

ID = "0198c2f4-5b7e-7c3a-9d21-4f6e8a1b2c3d"
CREATED = 1_790_000_000.5
EPISODE = {
    "episode_id": ID,
    "status": "ended",
    "stop_reason": "terminated",
    "success": True,
    "step": 12,
    "episode_return": -13.5,
    "policy": "toy-text",
    "group": "a-group",
    "created_at": CREATED,
    "metadata": {"env": "CliffWalking-v1", "seed": 7},
}


class Service(BaseHTTPRequestHandler):
    status: ClassVar = 200
    episodes: ClassVar[list[Any]] = [EPISODE]

    def do_GET(self) -> None:
        body = json.dumps({"episodes": self.episodes, "next_cursor": None}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Service) as service:
        thread = Thread(target=service.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()
        thread.join()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.parametrize(("width", "columns"), [(80, 6), (160, 9)])
def test_table_fits_the_terminal(url: str, width: int, columns: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(episodes, "Console", lambda **_: Console(width=width, file=sys.stdout))
    header, row = run("episodes", "--url", url).output.splitlines()
    assert max(len(header), len(row)) <= width
    assert row.startswith(f"{ID} terminated")
    assert len(header.replace("created UTC", "created").split()) == columns
    assert ("toy-text" in row) == ("CliffWalking-v1" in row) == ("2026-09-21 14:13:20" in row) == (width > 80)
    assert "09-21 14:13" in row


def test_table_is_not_folded_if_it_is_not_written_to_a_terminal(url: str):
    _, row = run("episodes", "--url", url).output.splitlines()
    assert ID in row
    assert "a-group" in row


def test_a_list_without_episodes_says_so(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Service, "episodes", [])
    listed = run("episodes", "--url", url)
    assert (listed.exit_code, listed.stdout, listed.stderr) == (0, "", "no episodes\n")


@pytest.mark.parametrize(
    "command", [("episodes",), ("export",), ("rollout", "--env", "CartPole-v1", "--episodes", "1")]
)
def test_a_command_without_a_key_names_the_variable(
    url: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Service, "status", 401)
    refused = run(*command, "--url", url)
    assert refused.exit_code == 1
    assert "EPISODIC_API_KEY" in refused.stderr


def test_commands_that_are_shown_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "bin" / "episodic"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/episodic", "rollout"])
    assert options.program() == "bin/episodic"
    assert "bin/episodic serve" in run("episodes", "--url", "http://127.0.0.1:9").stderr
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(script), "rollout"])
    assert options.program() == "episodic"


def test_json_has_the_times_of_the_api(url: str):
    printed = json.loads(run("episodes", "--json", "--url", url).output)
    assert printed.items() >= {"episode_id": ID, "created_at": CREATED, "ended_at": None}.items()


@pytest.mark.parametrize("command", ["episodes", "export"])
def test_url_without_a_service_is_reported_in_one_line(command: str):
    ran = run(command, "--url", "http://127.0.0.1:9")
    assert ran.exit_code == 1
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: no service answers at http://127.0.0.1:9 (")
    assert "EPISODIC_URL" in line
