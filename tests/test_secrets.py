"""Passwords and API keys never appear in arguments, messages, log lines or responses."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service.access.keys import SCOPES, new_key
from service.api.http.server import config
from service.app import create_app
from service.cli.main import app
from service.settings import Settings, holds_password
from service.testing.memory_store import MemoryStore
from tests.support.serving import serve

PASSWORD = "0pen-sesame"  # noqa: S105 - not a real password
URL = f"postgresql+asyncpg://user:{PASSWORD}@db.invalid:1/episodic"


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        (URL, True),
        ("postgresql+asyncpg://db/e?user=u&password=x", True),
        ("postgresql+asyncpg://user:a@b@db/e", True),
        ("postgresql+asyncpg://user@db:5432/e", False),
        ("sqlite:///a:b.db", False),
    ],
)
def test_where_a_url_holds_a_password(url: str, holds: bool):
    assert holds_password(url) == holds


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_password_among_the_arguments_is_refused(command: str):
    ran = CliRunner().invoke(app, [command, "--store", URL])
    assert ran.exit_code == 2
    assert "EPISODIC_STORE" in ran.output
    assert PASSWORD not in ran.output


@pytest.mark.parametrize("url", [URL, URL.replace("+asyncpg", ""), f"mysql://user:{PASSWORD}@db/e", f":{PASSWORD}@"])
@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_startup_error_does_not_contain_the_password(
    command: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("EPISODIC_STORE", url)
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    monkeypatch.setenv("EPISODIC_PORT", "many")  # an invalid value, so that serve fails
    ran = CliRunner().invoke(app, [command])
    assert ran.exit_code == 2
    assert PASSWORD not in ran.output
    assert PASSWORD not in str(ran.exception)


@pytest.mark.parametrize("command", [["episodes"], ["export"], ["rollout"]])
def test_no_command_has_an_api_key_option(command: list[str]):
    ran = CliRunner().invoke(app, [*command, "--api-key", PASSWORD])
    assert ran.exit_code == 2
    assert "No such option" in ran.output


@pytest.mark.parametrize("command", [["episodes"], ["export"], ["rollout", "--episodes", "1"]])
def test_the_key_is_taken_from_the_environment(command: list[str], monkeypatch: pytest.MonkeyPatch):
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/healthz":  # a public path, called to find out whether a service is there
            sent.append(request.headers["Authorization"])
        return httpx.Response(401, json={"code": "unauthenticated", "detail": "no", "status": 401})

    async def answer_async(_: Any, request: httpx.Request) -> httpx.Response:
        return answer(request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: answer(request))
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer_async)
    monkeypatch.setenv("EPISODIC_API_KEY", PASSWORD)
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 1
    assert set(sent) == {f"Bearer {PASSWORD}"}
    assert PASSWORD not in ran.output


@pytest.mark.parametrize("place", ["environment", "file"])
async def test_admin_key_is_never_printed_or_logged(
    place: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from service.testing.scripted_engine import ScriptedEngine

    caplog.set_level(logging.DEBUG)
    key, record = new_key("default", SCOPES, 1.0)
    secret = key.split("_")[2]
    if place == "file":
        (tmp_path / "episodic_admin_key").write_text(key + "\n")
        monkeypatch.setenv("EPISODIC_SECRETS", str(tmp_path))
    else:
        monkeypatch.setenv("EPISODIC_ADMIN_KEY", key)
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    settings = Settings()
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == key
    texts = [repr(settings), str(settings.model_dump()), settings.model_dump_json(), settings.markdown()]
    texts.append(CliRunner().invoke(app, ["settings"]).output)
    monkeypatch.setattr("service.cli.serve._serve", lambda settings: 0)
    started = await asyncio.to_thread(CliRunner().invoke, app, ["serve", "--host", "0.0.0.0"])  # noqa: S104
    assert started.exit_code == 0
    texts.append(started.output)
    store = MemoryStore()
    await store.add_key(record)
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, admin_key=key) as api:
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            for path in ("/version", "/readyz", "/metrics", "/openapi.json", "/nowhere", "/policy"):
                answer = await api.client.get(path, headers=headers)
                texts.append(answer.text + str(answer.headers))
    ours = [line.getMessage() for line in caplog.records if not line.name.startswith(("httpcore", "httpx"))]
    assert secret not in "\n".join(texts + ours)


@pytest.mark.parametrize("mode", [0o000, 0o755])
def test_unreadable_secrets_are_refused_with_one_line(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "episodic_store").write_text(f"mysql://u:{PASSWORD}@db/e")
    (tmp_path / "episodic_store").chmod(mode)
    monkeypatch.setenv("EPISODIC_SECRETS", str(tmp_path))
    refused = CliRunner().invoke(app, ["serve"])
    assert refused.exit_code == 2
    assert refused.output.startswith("Error: EPISODIC_")
    assert PASSWORD not in refused.output


async def test_secrets_are_not_in_responses_or_logs(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture):
    from service.testing.scripted_engine import ScriptedEngine

    caplog.set_level(logging.DEBUG)
    store = MemoryStore()
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, openai={"chat_template": PASSWORD}) as api:
        api.app.state.services.settings.store = URL
        headers = {"Authorization": f"Bearer {PASSWORD}"}
        texts = []
        for path in ("/version", "/readyz", "/metrics", "/openapi.json", "/nowhere", "/episode", "/policy"):
            answer = await api.client.get(path, headers=headers)
            texts.append(answer.text + str(answer.headers))
        texts.append((await api.post_act(headers=headers)).text)
    assert PASSWORD not in "\n".join(texts)
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpcore", "httpx"))]
    assert PASSWORD not in "\n".join(ours)


def test_the_servers_settings_are_one_for_all():
    made = config(create_app(Settings(), store=MemoryStore()))
    assert (made.server_header, made.proxy_headers, made.ws) == (False, False, "none")
