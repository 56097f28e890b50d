"""How deploy/install.py goes on with a set-up: from the first stage that is not done."""

from pathlib import Path

import pytest

from deploy.install import python_of, set_up


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    python = python_of(tmp_path)
    python.parent.mkdir()
    python.touch()
    return tmp_path


def run(venv: Path, *marks: str, failing: str = "") -> list[str]:
    """The stages that ran, each named by its mark."""
    ran: list[str] = []

    def stage(mark: str) -> None:
        if mark == failing:
            raise SystemExit(1)
        ran.append(mark)

    try:
        set_up(venv, {mark: lambda mark=mark: stage(mark) for mark in marks})
    except SystemExit:
        ran.append("failed")
    return ran


def test_what_is_up_to_date_is_left_alone(venv: Path) -> None:
    assert run(venv, "venv", "lock") == ["venv", "lock"]
    assert run(venv, "venv", "lock") == []


def test_it_goes_on_at_the_stage_that_changed(venv: Path) -> None:
    run(venv, "venv", "lock", "project")
    assert run(venv, "venv", "lock 2", "project") == ["lock 2", "project"]
    assert run(venv, "venv 2", "lock 2", "project") == ["venv 2", "lock 2", "project"]


def test_it_goes_on_at_the_stage_that_failed(venv: Path) -> None:
    assert run(venv, "venv", "lock", "project", failing="lock") == ["venv", "failed"]
    assert run(venv, "venv", "lock", "project") == ["lock", "project"]


def test_an_environment_without_its_interpreter_is_made_anew(venv: Path) -> None:
    run(venv, "venv", "lock")
    python_of(venv).unlink()
    assert run(venv, "venv", "lock") == ["venv", "lock"]
