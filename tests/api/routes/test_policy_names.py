"""The name of the model: callers see its served name, may use its path or hub id, and never see a path."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve

OLD = "/srv/models/scripted"


async def bodies(api: Served) -> str:
    """Returns what the service answers to every call that shows an episode or a policy."""
    answers: list[httpx.Response] = [
        await api.client.get(path)
        for path in (
            *("/version", "/policy", "/metrics", "/episode", "/episode/e", "/episode/e/trajectory?format=steps"),
            *("/episode/e/trajectory?format=messages", "/export?status=active", "/openapi.json"),
        )
    ]
    answers.append(await api.client.post("/episode/e/fork", json={"episode_ids": ["copy"]}))
    assert all(answer.is_success for answer in answers)
    return "".join(answer.text for answer in answers)


async def test_both_names_open_an_episode_of_the_served_name(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), model=OLD) as api:
        for name, fields in {"e": {"policy": OLD}, "f": {"policy": "scripted"}, "g": {}}.items():
            assert (await api.open(name, **fields))["policy"] == "scripted"
        await api.act()
        assert "/srv" not in await bodies(api)
        for name in (OLD, "scripted"):
            listed = (await api.client.get("/episode", params={"policy": name})).json()["episodes"]
            assert {episode["episode_id"] for episode in listed} >= {"e", "f", "g"}
        refused = await api.client.put("/policy/scripted", json={"path": "x"})
        assert refused.status_code == 422


async def test_an_episode_under_the_old_name_goes_on(tmp_path: Path, tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    engine.info = replace(engine.info, model=OLD)  # as in older versions, where the setting was the name
    async with serve(tmp_path, engine, model=OLD) as api:
        await api.open()
        await api.act()
    async with serve(tmp_path, ScriptedEngine(tokenizer), model=OLD) as api:
        assert (await api.act())["step"] == 1
        assert (await api.get())["policy"] == "scripted"
        assert "/srv" not in await bodies(api)
        listed = (await api.client.get("/episode", params={"policy": "scripted"})).json()["episodes"]
        assert [episode["episode_id"] for episode in listed] == ["copy", "e"]
    async with serve(tmp_path, ScriptedEngine(tokenizer), model="/srv/other") as api:
        answer = await api.post_act()
        assert answer.status_code == 503
        assert "/srv" not in answer.text


@pytest.mark.parametrize(
    ("given", "name", "aliases"),
    [
        ({}, "toy-text", ()),
        ({"model": "Qwen/Qwen3-4B"}, "Qwen3-4B", ("Qwen/Qwen3-4B",)),
        ({"model": "/srv/models/mine/"}, "mine", ("/srv/models/mine/",)),
        ({"model": "/srv/mine", "model_name": "agent"}, "agent", ("/srv/mine", "mine")),
    ],
)
def test_the_served_name(given: dict[str, Any], name: str, aliases: tuple[str, ...]):
    settings = Settings(**given)
    assert (settings.served_name, settings.model_aliases) == (name, aliases)


def test_a_folder_keeps_its_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for model in (".", "../mine", str(folder)):
        settings = Settings(model=model)
        assert settings.served_name == "mine"
        assert str(folder) in settings.model_aliases


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 200])
def test_a_name_that_no_url_can_hold_is_refused(name: str):
    with pytest.raises(ValueError, match="model_name"):
        Settings(model_name=name)
