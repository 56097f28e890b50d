"""Runs Schemathesis on the whole OpenAPI document and its links: no 5xx, no undocumented status or body."""

import asyncio
import contextlib
import threading
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
from tests.support.serving import serve

CHECKS: Any = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
QUIET: Any = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory, tokenizer: HFTokenizer) -> Iterator[Any]:
    """The OpenAPI document of a service that runs in its own thread."""
    ready, over, urls = threading.Event(), threading.Event(), []

    async def run() -> None:
        async with serve(tmp_path_factory.mktemp("openapi"), ScriptedEngine(tokenizer)) as api:
            urls.append(api.url)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(30)
    yield schemathesis.openapi.from_url(f"{urls[0]}/openapi.json")
    over.set()
    thread.join()


OPERATIONS = [
    (path, method)
    for path, methods in create_app(Settings(), store=MemoryStore()).openapi()["paths"].items()
    for method in methods
]


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


def test_calls_that_follow_each_other_answer_as_documented(schema: Any) -> None:
    machine = schema.as_state_machine()

    class Machine(machine):
        def validate_response(self, response: Any, case: Any, additional_checks: Any = (), **options: Any) -> None:
            case.validate_response(response, checks=CHECKS, **options)

    Machine.run(settings=settings(max_examples=25, stateful_step_count=8, **QUIET))
