"""`make learn`: its options are those of `episodic learn`, and it uses a service that is named. It is played in
tests/e2e/test_adapters.py with a smaller game."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from training.corrections import TRAIN
from training.learn import LESSON, service

NOWHERE = "http://127.0.0.1:9"


def test_the_options_of_the_lesson_are_accepted(tmp_path: Path):
    done = CliRunner().invoke(app, ["learn", *LESSON, "--out", str(tmp_path / "out"), "--url", NOWHERE])
    assert "no service answers" in " ".join(done.stderr.split())
    assert done.exit_code == 1


def test_the_options_of_the_corrections_are_accepted(tmp_path: Path):
    export = tmp_path / "export.ndjson"
    export.touch()
    done = CliRunner().invoke(app, ["train", *TRAIN, "--from", str(export), "--out", str(tmp_path / "out")])
    assert "is empty" in " ".join(done.stderr.split())
    assert done.exit_code == 1


def test_a_named_service_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_URL", NOWHERE)
    with service(tmp_path) as url:
        assert url == NOWHERE
    assert not list(tmp_path.iterdir())
