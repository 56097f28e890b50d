"""Runs Schemathesis on the whole OpenAPI document and its links: no 5xx, no undocumented status or body."""

import asyncio
import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.app import create_app
from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.action_spaces import action_spaces
from tests.support.serving import Served, serve


def no_unexpected_server_error(context: Any, response: Any, case: Any) -> Any:
    """Allows 504, which is the documented answer to a `timeout_s` that is too short."""
    return None if response.status_code == 504 else not_a_server_error(context, response, case)


CHECKS: Any = (
    no_unexpected_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
QUIET: Any = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: HFTokenizer) -> Iterator[Served]:
    """A service that runs in its own thread."""
    ready, over, running = threading.Event(), threading.Event(), []

    async def run() -> None:
        folder = tmp_path_factory.mktemp("openapi")
        async with serve(folder, ScriptedEngine(tokenizer), store=MemoryStore()) as api:
            running.append(api)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(30)
    yield running[0]
    over.set()
    thread.join()


@pytest.fixture(scope="module")
def schema(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def forget_episodes(served: Served) -> None:
    """Empties the service's store, which no call uses meanwhile."""
    sessions = served.app.state.services.sessions
    for name in list(sessions.store._episodes):
        sessions._cache.drop(name)
    sessions.store.__init__()


OPERATIONS = [
    (path, method)
    for path, methods in create_app(Settings(), store=MemoryStore()).openapi()["paths"].items()
    for method in methods
]


def with_space(case: Any, space: dict[str, Any]) -> Any:
    """Gives a call that opens an episode this action space, and removes the fields that must name what exists."""
    drawn: dict[str, Any] = case.body if isinstance(case.body, dict) else {}
    case.body = {name: drawn[name] for name in drawn.keys() & {"goal", "tags", "metadata"}} | {"action_space": space}
    return case


def test_action_spaces_that_people_have_open_episodes(schema: Any) -> None:
    statuses: Counter[tuple[str, int]] = Counter()

    @settings(max_examples=80, **QUIET)
    @given(case=schema["/episode"]["POST"].as_strategy(), space=action_spaces())
    def call(case: Any, space: dict[str, Any]) -> None:
        response = with_space(case, space).call_and_validate(checks=CHECKS)
        statuses[space["type"], response.status_code] += 1
        if response.status_code == 422:
            assert re.search("'.+'|^the pattern is refused: ", response.json()["detail"]), "the refusal names nothing"

    call()
    assert {kind for kind, status in statuses if status == 201} == {"json", "regex", "tools"}
    assert sum(number for (_, status), number in statuses.items() if status == 201) > statuses.total() / 2, statuses


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_each_call_answers_as_documented(schema: Any, path: str, method: str) -> None:
    @settings(max_examples=40, **QUIET)
    @given(case=schema[path][method].as_strategy())
    def call(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    @settings(max_examples=20, **QUIET)
    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def call_wrongly(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    call()
    with contextlib.suppress(Unsatisfiable):  # a call without parameters has no invalid input
        call_wrongly()


def test_calls_that_follow_each_other_answer_as_documented(schema: Any, served: Served) -> None:
    machine = schema.as_state_machine()

    class Machine(machine):
        def setup(self) -> None:
            forget_episodes(served)  # hypothesis needs the same answers each time it repeats calls

        def validate_response(self, response: Any, case: Any, additional_checks: Any = (), **options: Any) -> None:
            case.validate_response(response, checks=CHECKS, **options)

    Machine.run(settings=settings(max_examples=25, stateful_step_count=8, **QUIET))
