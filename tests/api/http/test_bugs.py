"""A bug in the code that writes to the store: one call fails with 500 and a traceback in the log, and others go on."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy.exc import CompileError
from structlog.testing import LogCapture

from service.api.http import problems
from service.engine.tokenizer import HFTokenizer
from service.store import changes
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Step
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError, AssertionError, CompileError])
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
    assert isinstance(failure["exc_info"], bug)
    assert "broken" in _names(failure["exc_info"])
    monkeypatch.undo()
    assert (await api.post_act("b", step=0)).status_code == 200
    assert [len((await api.trajectory(name))["steps"]) for name in "abc"] == [1, 1, 1]


def _names(error: BaseException) -> list[str]:
    """Returns the names of the functions in the traceback."""
    found, frame = [], error.__traceback__
    while frame is not None:
        found.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    return found
