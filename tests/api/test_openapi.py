"""Schemathesis over the whole OpenAPI document, links included: no 5xx, no status or body that it does not name."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.engine.scripted import ScriptedEngine
from service.engine.tokenizer import HFTokenizer
from tests.serving import serve

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
    """The document of a service that runs in a thread of its own."""
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


calls = schemathesis.pytest.from_fixture("schema")


@calls.parametrize()
@settings(max_examples=25, **QUIET)
def test_each_call_answers_as_documented(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


def test_calls_that_follow_each_other_answer_as_documented(schema: Any) -> None:
    machine = schema.as_state_machine()

    class Machine(machine):
        def validate_response(self, response: Any, case: Any, additional_checks: Any = (), **options: Any) -> None:
            case.validate_response(response, checks=CHECKS, **options)

    Machine.run(settings=settings(max_examples=25, stateful_step_count=8, **QUIET))
