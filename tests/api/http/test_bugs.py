"""Bugs in the code that writes to the store, and libraries that cancel calls: one call fails, and others go on."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from sqlalchemy.exc import CompileError
from structlog.testing import LogCapture

from service.access import keys
from service.access.keys import new_key
from service.api.http import problems
from service.engine.base import Constraint, EngineUnavailable
from service.engine.completion import Completion, Scores
from service.engine.tokenizer import HFTokenizer
from service.store import changes
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Step
from tests.support.serving import DISCRETE, Served, serve

T = TypeVar("T")


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError, AssertionError, CompileError, StopIteration])
async def test_a_bug_in_a_commit_is_reported_as_one_and_harms_no_other_act(
    api: Served, bug: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    row_of = changes.step_row

    def broken(step: Step) -> dict[str, Any]:
        if step.episode_id == "b":
            raise bug("a bug in the code")
        return row_of(step)

    for name in "abc":
        await api.open(name)
    monkeypatch.setattr(changes, "step_row", broken)
    logged = LogCapture()
    monkeypatch.setattr(problems, "_log", structlog.wrap_logger(None, processors=[logged]))
    answers = await asyncio.gather(*(api.post_act(name, step=0) for name in "abc"))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["code"] == "internal_error"
    (failure,) = [event for event in logged.entries if event["event"] == "unexpected_failure"]
    error = failure["exc_info"].__cause__ if bug is StopIteration else failure["exc_info"]
    assert isinstance(error, bug)
    assert "broken" in _names(error)
    monkeypatch.undo()
    assert (await api.post_act("b", step=0)).status_code == 200
    assert [len((await api.trajectory(name))["steps"]) for name in "abc"] == [1, 1, 1]


async def test_a_row_that_violates_a_constraint_is_a_bug_and_no_conflict(api: Served, monkeypatch: pytest.MonkeyPatch):
    row_of = changes.step_row
    for name in "ab":
        await api.open(name)
    monkeypatch.setattr(changes, "step_row", lambda step: {**row_of(step), "answer": None})
    assert (await api.post_act("a", step=0)).json()["code"] == "internal_error"
    monkeypatch.undo()
    assert (await api.post_act("a", step=0)).status_code == 200


async def test_a_driver_that_cancels_a_commit_stops_no_later_one(api: Served, monkeypatch: pytest.MonkeyPatch):
    def cancelled(*_: Any) -> None:
        raise asyncio.CancelledError

    await api.open("a")
    monkeypatch.setattr(changes, "_advance", cancelled)
    assert (await api.post_act("a", step=0)).json()["code"] == "store_unavailable"
    monkeypatch.undo()
    assert (await api.post_act("a", step=0)).status_code == 200


class CancellingEngine(ScriptedEngine):
    """Cancels requests by itself, as an engine may that shuts down."""

    cancels = True

    async def generate(self, *args: Any, **options: Any) -> Completion:
        return await self._unless_cancelled(super().generate(*args, **options))

    async def score(self, *args: Any, **options: Any) -> Scores:
        return await self._unless_cancelled(super().score(*args, **options))

    async def check_constraint(self, constraint: Constraint) -> None:
        await self._unless_cancelled(super().check_constraint(constraint))

    async def _unless_cancelled(self, call: Coroutine[None, None, T]) -> T:
        if self.cancels:
            call.close()
            raise asyncio.CancelledError
        return await call


async def test_an_engine_that_cancels_requests_is_unavailable(tmp_path: Path, tokenizer: HFTokenizer):
    engine = CancellingEngine(tokenizer)
    regex = {"episode_id": "r", "action_space": {"type": "regex", "pattern": "a+"}}
    async with serve(tmp_path, engine) as api:
        await api.open("text", reasoning={"max_tokens": 9})
        await api.open("discrete", action_space=DISCRETE)
        acts = [{"episode_id": name, "observation": "look", "step": 0} for name in ("text", "discrete")]
        calls = [("/episode", regex), *(("/act", act) for act in acts)]
        answers = [(await api.client.post(path, json=body)).json() for path, body in calls]
        answers += (await api.client.post("/act/batch", json={"acts": acts})).json()["results"]
        assert [answer.get("code") for answer in answers] == ["engine_unavailable"] * 5
        stream = await api.post_act("text", headers={"Accept": "text/event-stream"})
        assert "engine_unavailable" in stream.text
        engine.cancels = False
        for path, body in calls:
            assert (await api.client.post(path, json=body)).status_code in (200, 201)


def _names(error: BaseException) -> list[str]:
    """Returns the names of the functions in the traceback."""
    found, frame = [], error.__traceback__
    while frame is not None:
        found.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    return found


class FailingApp(ScriptedEngine):
    """An engine whose app for /v1 raises `failure`."""

    failure: BaseException = EngineUnavailable("dead")

    async def openai_app(self) -> Any:
        async def app(*_: Any) -> None:
            raise self.failure

        return app


@pytest.mark.store("sqlite")
async def test_an_engine_that_fails_during_a_v1_call_is_unavailable_in_openais_format(
    tmp_path: Path, tokenizer: HFTokenizer
):
    engine = FailingApp(tokenizer)
    async with serve(tmp_path, engine) as api:
        for engine.failure in (EngineUnavailable("dead"), asyncio.CancelledError()):
            answer = await api.client.post("/v1/completions", json={"prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


@pytest.mark.store("sqlite")
async def test_known_keys_stay_valid_while_a_bug_prevents_reading_the_keys(
    api: Served, monkeypatch: pytest.MonkeyPatch
):
    async def broken() -> Any:
        raise KeyError("a bug in the code")

    key, record = new_key("default", ("read",), 0.0)
    await api.app.state.services.sessions.store.add_key(record)
    monkeypatch.setattr(keys, "FRESH_S", 0.0)
    known = {"Authorization": f"Bearer {key}"}
    assert (await api.client.get("/policy", headers=known)).status_code == 200
    monkeypatch.setattr(api.app.state.services.sessions.store, "keys", broken)
    for _ in range(2):
        assert (await api.client.get("/policy", headers=known)).status_code == 200
