"""`episodic serve`: what is wrong at the start is said at once, in one line that names the setting."""

import errno
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from service.api.http import server
from service.cli.main import app
from tests.support.postgres import free_port

ROOT = str(Path(__file__).parents[2])
SCRIPT = "import sys; from service.cli.main import app\ntry: app()\nfinally: print('vllm' in sys.modules)"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("EPISODIC_")]:
        monkeypatch.delenv(name)


def start(*arguments: str, **variables: str) -> Any:
    """Starts the service with settings that must fail."""
    return CliRunner().invoke(app, ["serve", *arguments], env={"EPISODIC_PORT": str(free_port()), **variables})


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"EPISODIC_PORT": "many"}, "EPISODIC_PORT: the value should be a valid integer"),
        ({"EPISODIC_PORT": ""}, "EPISODIC_PORT: the value should be a valid integer"),
        ({"EPISODIC_MODEL_NAME": "a/b"}, "EPISODIC_MODEL_NAME: the value should match pattern"),
        ({"EPISODIC_LOG_FORMAT": "xml"}, "EPISODIC_LOG_FORMAT: the value should be 'console' or 'json'"),
        ({"EPISODIC_ENGINE": "x"}, "EPISODIC_ENGINE: the value should be JSON"),
        ({"EPISODIC_MEDIA_HOSTS": '["a.b"'}, "EPISODIC_MEDIA_HOSTS: it begins as a JSON list, but is not valid JSON"),
        (
            {"EPISODIC_QUOTA__CALLS": "1"},
            "EPISODIC_QUOTA__CALLS: there is no setting 'calls'; did you mean 'calls_per_s'?",
        ),
        (
            {"EPISODIC_TENANTS__ACME__CALLS_PER_S": "0"},
            "EPISODIC_TENANTS__ACME__CALLS_PER_S: the value should be greater",
        ),
        ({"EPISODIC_CONFIG": "no.toml"}, "EPISODIC_CONFIG: file no.toml not found"),
        ({"EPISODIC_SECRETS": "nowhere"}, "EPISODIC_SECRETS: folder nowhere not found"),
        ({"EPISODIC_PROFILES": "nowhere"}, "EPISODIC_PROFILES: the folder nowhere does not exist"),
        ({"EPISODIC_ADAPTERS": "nowhere"}, "EPISODIC_ADAPTERS: the folder nowhere does not exist"),
        ({"EPISODIC_DATA": "/proc/x"}, "EPISODIC_DATA: the store /proc/x/episodic.db: "),
        ({"EPISODIC_STORE": "sqlite:////proc/x"}, "EPISODIC_STORE: the store /proc/x: "),
        ({"EPISODIC_STORE": "mysql://u@h/d"}, "EPISODIC_STORE: the store must be a SQLite file"),
        ({"EPISODIC_HOST": "0.0.0.0"}, "EPISODIC_HOST: 0.0.0.0 is not allowed: without API keys"),  # noqa: S104
        ({"EPISODIC_ADMIN_KEY": "sesame"}, "EPISODIC_ADMIN_KEY: invalid key format"),
    ],
)
def test_wrong_setting_is_named_in_one_line(variables: dict[str, str], line: str):
    refused = start(**variables)
    assert refused.exit_code == 2, refused.output
    assert refused.stdout == ""
    (said,) = refused.stderr.splitlines()
    assert said.startswith(f"Error: {line}")


def test_each_wrong_setting_has_a_line():
    refused = start(EPISODIC_PORT="many", EPISODIC_DRAIN_S="-1")
    assert [line.split(":")[1] for line in refused.stderr.splitlines()] == [" EPISODIC_PORT", " EPISODIC_DRAIN_S"]


def test_misspelt_key_of_the_file_gets_a_suggestion(tmp_path: Path):
    (tmp_path / "a.toml").write_text("prot = 1")
    assert (
        "Error: EPISODIC_CONFIG: there is no setting 'prot'; did you mean 'port'?" in start("--config", "a.toml").stderr
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EPISODIC_PROT", "EPISODIC_PORT"),
        ("episodic_hots", "EPISODIC_HOST"),
        ("EPISODIC_ENGINE_MAX_NUM_SEQS", "EPISODIC_ENGINE__MAX_NUM_SEQS"),
        ("EPISODIC_ENGIN__MAX_NUM_SEQS", "EPISODIC_ENGINE__MAX_NUM_SEQS"),
        ("EPISODIC_PORT__X", "EPISODIC_PORT"),
        ("EPISODIC_APIKEY", "EPISODIC_API_KEY"),
        ("EPISODIC_ZZZZZZZZ", "None"),
    ],
)
def test_unknown_variable_warns_with_a_suggestion(name: str, meant: str):
    said = start(EPISODIC_MODEL="./no-model", **{name: "1"}).output
    (warning,) = [line for line in said.splitlines() if "unknown_setting" in line]
    assert re.search(rf"name={name}\b", warning)
    assert re.search(rf"did_you_mean={meant}(?!\w)", warning)


def test_known_variables_and_secret_files_do_not_warn(tmp_path: Path):
    (tmp_path / "secrets").mkdir()
    for file in ("episodic_port", "postgres_password"):
        (tmp_path / "secrets" / file).write_text("1")
    names = ("EPISODIC_URL", "EPISODIC_API_KEY", "EPISODIC_TAG", "EPISODIC_ENGINE__SEED", "EPISODIC_QUOTA__CALLS_PER_S")
    known = dict.fromkeys(names, "1")
    assert "unknown_setting" not in start(EPISODIC_MODEL="./none", EPISODIC_SECRETS="secrets", **known).output
    (tmp_path / "secrets" / "episodic_stroe").write_text("x")
    assert "did_you_mean=EPISODIC_STORE" in start(EPISODIC_MODEL="./none", EPISODIC_SECRETS="secrets").output


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("./missing", "EPISODIC_MODEL: the folder missing does not exist."),
        ("/missing/folder", "EPISODIC_MODEL: the folder /missing/folder does not exist."),
        ("a/b/c", "EPISODIC_MODEL: the folder a/b/c does not exist."),
        (".", "EPISODIC_MODEL: the folder . has no config.json."),
        ("org/unknown", "EPISODIC_MODEL: there is no folder and no packaged policy 'org/unknown'"),
        ("toy-tex", "EPISODIC_MODEL: there is no folder and no packaged policy 'toy-tex'"),
    ],
)
def test_missing_model_is_found_before_vllm_is_imported(model: str, line: str):
    environment = {**os.environ, "EPISODIC_MODEL": model, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "serve"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"Error: {line}")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == "False\n", "vLLM was imported"


def serve_from_hub(endpoint: str) -> str:
    """Starts the service with an unknown model; what it prints."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "EPISODIC_MODEL": "org/unknown"}
    environment = {**os.environ, **hub, "PYTHONPATH": ROOT}
    command = [sys.executable, "-m", "service", "serve"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    return line


def test_hub_that_cannot_be_reached_is_reported_at_once():
    assert "http://127.0.0.1:9 cannot be reached" in serve_from_hub("http://127.0.0.1:9")


class EmptyHub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_model_that_the_hub_does_not_have_is_reported_at_once():
    with HTTPServer(("127.0.0.1", 0), EmptyHub) as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        line = serve_from_hub(f"http://127.0.0.1:{hub.server_port}")
        hub.shutdown()
        thread.join()
    assert re.search(r"EPISODIC_MODEL: .*'org/unknown', and http://127.0.0.1:\d+ has no such model", line)


def test_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = start(EPISODIC_PORT=str(port))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"Error: EPISODIC_PORT: 127.0.0.1:{port} is in use.")


def test_address_of_another_machine_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "listen", _refuse)
    refused = start(EPISODIC_HOST="localhost", EPISODIC_PORT="8000")
    assert "EPISODIC_HOST: cannot listen on localhost:8000" in refused.stderr


def _refuse(*_: Any) -> Any:
    raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")


def test_free_port_is_the_same_on_every_address_of_the_host():
    sockets = server.listen("localhost", 0)
    assert len({listening.getsockname()[1] for listening in sockets}) == 1
    for listening in sockets:
        listening.close()


def test_options_of_serve_are_in_groups():
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    titles = re.findall(r"^╭─ ([\w ]+?) ─", text, re.MULTILINE)
    assert titles == ["Options", "Model", "Network", "Storage", "Settings and logs"]


def test_version_is_printed():
    ran = CliRunner().invoke(app, ["--version"])
    assert (ran.exit_code, ran.output) == (0, f"episodic {importlib.metadata.version('episodic')}\n")
