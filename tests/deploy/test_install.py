"""deploy/install.py: what it does to an environment that is up to date, out of date, or for another device."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """deploy/install.py as it is run, by itself, over a project folder of the test's; `steps` records what it does."""
    monkeypatch.syspath_prepend(ROOT / "deploy")
    import install

    steps: list[str] = []

    def create(venv: Path) -> None:
        steps.append("create")
        install.python_of(venv).parent.mkdir(parents=True, exist_ok=True)
        install.python_of(venv).touch()

    (tmp_path / "pyproject.toml").write_text("[project]\n")
    locks = {name: [tmp_path / f"{name}.lock"] for name in install.LOCKS}
    for name in locks:
        (tmp_path / f"{name}.lock").write_text(f"{name}-package==1\n")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "LOCKS", locks)
    monkeypatch.setattr(install, "create", create)
    monkeypatch.setattr(install, "install", lambda venv, what: steps.append(f"install {what}"))
    install.steps = steps
    return install


def test_an_environment_that_is_up_to_date_is_left_alone(install: Any) -> None:
    install.main("cpu")
    assert install.steps == ["create", "install cpu"]
    install.main("cpu")
    assert install.steps == ["create", "install cpu"]


def test_another_set_up_of_the_same_folder_waits(install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    def say(line: str) -> None:
        if line.startswith("Waiting"):
            install.steps.append("wait")
            os.close(other)  # the other one is done

    monkeypatch.setattr(install, "say", say)
    install.main("cpu")
    assert install.steps == ["wait", "create", "install cpu"]


@pytest.mark.parametrize("file", ["cpu.lock", "pyproject.toml"])
def test_a_changed_lock_is_installed_into_the_same_environment(install: Any, tmp_path: Path, file: str) -> None:
    install.main("cpu")
    (tmp_path / file).write_text("changed")
    install.main("cpu")
    assert install.steps == ["create", "install cpu", "install cpu"]


def test_another_device_gets_a_new_environment(install: Any) -> None:
    install.main("cpu")
    install.main("gpu")
    assert install.steps == ["create", "install cpu", "create", "install gpu"]


def test_the_tools_of_check_deploy_have_an_environment_of_their_own(install: Any, tmp_path: Path) -> None:
    install.main("cpu")
    install.main("deploy")
    install.main("cpu")
    assert install.steps == ["create", "install cpu", "create", "install deploy"]
    assert {path.name for path in tmp_path.glob(".venv*")} == {".venv", ".venv-deploy"}


def test_a_failed_set_up_is_repeated(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = install.install

    def broken(venv: Path, what: str) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(install, "install", broken)
    with pytest.raises(SystemExit):
        install.main("cpu")
    monkeypatch.setattr(install, "install", whole)
    install.main("cpu")
    assert install.steps[-1] == "install cpu"


def test_an_environment_without_its_interpreter_is_made_again(install: Any, tmp_path: Path) -> None:
    install.main("cpu")
    install.python_of(tmp_path / ".venv").unlink()
    install.main("cpu")
    assert install.steps == ["create", "install cpu", "create", "install cpu"]


@pytest.mark.parametrize("lock", ["bootstrap", "cpu", "deploy", "gpu", "torch-cpu"])
def test_every_locked_package_has_a_hash(lock: str) -> None:
    """The installers refuse a package without one; here it is found before anybody installs."""
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    requirements = [part for part in text.split("\n") if part and part[0].isalnum()]
    assert requirements
    assert all(requirement.endswith(" \\") for requirement in requirements)
    assert "://" not in text or lock == "torch-cpu", "a lock names no package index"


def test_pips_configuration_reaches_uv(install: Any, tmp_path: Path) -> None:
    import run_uv

    python = tmp_path / "python"
    printed = ["global.index-url='https://a/simple'", "global.extra-index-url='https://b/simple https://c/simple'"]
    printed += [r":env:.find-links='/d\n/e'", "global.timeout='5'"]
    python.write_text("#!/bin/sh\ncat <<'EOF'\n" + "\n".join(printed) + "\nEOF\n")
    python.chmod(0o755)
    assert run_uv.environment(python) == {
        "UV_DEFAULT_INDEX": "https://a/simple",
        "UV_INDEX": "https://b/simple https://c/simple",
        "UV_FIND_LINKS": "/d,/e",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
