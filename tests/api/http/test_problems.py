"""Every error over real HTTP: its status, its code, the fields of the problem document, and that it leaks nothing."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import pytest_asyncio

from service.engine.completion import Completion, Scores
from service.engine.tokenizer import HFTokenizer
from service.lifecycle import Phase
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.databases import without_table
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until

MAX_BODY = 64 * 1024


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    database: str, tmp_path_factory: pytest.TempPathFactory, tokenizer: HFTokenizer
) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("data")
    async with serve(folder, ScriptedEngine(tokenizer), max_body_bytes=MAX_BODY) as served:
        yield served


@pytest.fixture
def api(shared: Served) -> Served:
    """The service that all tests of this module share, with another episode id for each test."""
    return replace(shared, name=uuid4().hex)


def assert_problem(answer: httpx.Response, status: int, code: str, **context: Any) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["type"] == f"/problems/{code}"
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem.items() >= context.items()
    assert ("retry-after" in answer.headers) == (status == 503)
    for leak in ("Traceback", 'File "', ".py", "/service/", "/tmp", "sqlite", "SELECT"):  # noqa: S108 - only searched for
        assert leak not in answer.text
    return problem


# --- X-Request-ID


async def test_a_request_id_is_echoed_or_made(api: Served):
    sent = await api.client.get("/nope", headers={"X-Request-ID": "abc-123"})
    assert sent.headers["x-request-id"] == "abc-123"
    made = [(await api.client.get("/healthz")).headers["x-request-id"] for _ in range(2)]
    assert all(made)
    assert len(set(made)) == 2


@pytest.mark.parametrize("request_id", ["has space", "x" * 129, "tab\there"])
async def test_unprintable_request_id_is_replaced(api: Served, request_id: str):
    answer = await api.client.get("/healthz", headers={"X-Request-ID": request_id})
    assert answer.headers["x-request-id"] != request_id


# --- 400


def _deep(levels: int) -> bytes:
    return b'{"episode_id":"e","observation":' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"


MALFORMED = {
    "not json": b"observation=hi",
    "cut": b'{"episode_id": "e"',
    "NaN": b'{"episode_id":"e","observation":"x","reward":NaN}',
    "Infinity": b'{"episode_id":"e","observation":"x","reward":Infinity}',
    "-Infinity": b'{"episode_id":"e","observation":{"x":-Infinity}}',
    "a number that overflows a float": b'{"episode_id":"e","observation":{"x":1e999}}',
    "duplicate key": b'{"episode_id":"e","observation":"x","observation":"y"}',
    "nested duplicate key": b'{"episode_id":"e","observation":{"x":1,"x":2}}',
    "2,000 levels": _deep(2000),
    "30,000 levels of lists": b'{"episode_id":"e","observation":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "not UTF-8": b'{"episode_id":"e","observation":"\xff\xfe"}',
    "UTF-16": '{"episode_id":"e","observation":"x"}'.encode("utf-16"),
    "a surrogate in UTF-8": b'{"episode_id":"e","observation":"\xed\xa0\x80"}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_json(api: Served, body: bytes):
    await api.open()
    body = body.replace(b'"episode_id":"e"', f'"episode_id":"{api.name}"'.encode())
    assert_problem(await api.client.post("/act", content=body), 400, "malformed_json")
    assert_problem(await api.client.post("/episode", content=body), 400, "malformed_json")
    assert_problem(await api.client.post(f"{api.path}/end", content=body), 400, "malformed_json")
    assert (await api.get())["step"] == 0


# --- 404, 405, 410


async def test_an_unknown_episode(api: Served):
    assert_problem(await api.post_act("nobody"), 404, "episode_not_found")
    for method, path in [("GET", ""), ("GET", "/trajectory"), ("DELETE", "")]:
        assert_problem(await api.client.request(method, f"/episode/nobody{path}"), 404, "episode_not_found")
    assert_problem(await api.client.post("/episode/nobody/end", json={}), 404, "episode_not_found")


async def test_a_deleted_episode(api: Served):
    await api.open()
    await api.act()
    assert (await api.client.delete(api.path)).status_code == 204
    assert_problem(await api.post_act(), 410, "episode_deleted")
    assert_problem(await api.post_act(step=0), 410, "episode_deleted")
    for method, path in [("GET", ""), ("GET", "/trajectory"), ("DELETE", "")]:
        assert_problem(await api.client.request(method, f"{api.path}{path}"), 410, "episode_deleted")
    assert_problem(await api.client.post(f"{api.path}/end", json={}), 410, "episode_deleted")
    assert_problem(await api.client.post("/episode", json={"episode_id": api.name}), 410, "episode_deleted")
    assert api.name not in [row["episode_id"] for row in (await api.client.get("/episode")).json()["episodes"]]


@pytest.mark.parametrize("path", ["/acts", "/episode/e/nothing", "/episode/e/trajectory/x", "/../etc/passwd"])
async def test_an_unknown_path(api: Served, path: str):
    assert_problem(await api.client.get(path), 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", "/act"), ("PUT", "/episode/e"), ("DELETE", "/healthz")])
async def test_an_unknown_method(api: Served, method: str, path: str):
    answer = await api.client.request(method, path)
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


# --- 409


@pytest.mark.parametrize("step", [2, 7])
async def test_a_step_that_is_not_the_next(api: Served, step: int):
    await api.open()
    await api.act()
    assert_problem(await api.post_act(step=step), 409, "step_conflict", expected_step=1)
    assert (await api.get())["step"] == 1


async def test_the_same_step_with_another_body(api: Served):
    await api.open()
    await api.act(observation="one", step=0)
    assert_problem(await api.post_act(observation="two", step=0), 409, "idempotency_mismatch")


async def test_the_same_key_with_another_body_or_step(api: Served):
    await api.open()
    key = {"Idempotency-Key": "k"}
    assert (await api.post_act(observation="one", headers=key)).status_code == 200
    assert_problem(await api.post_act(observation="two", headers=key), 409, "idempotency_mismatch")
    assert_problem(await api.post_act(observation="one", headers=key, step=1), 409, "idempotency_mismatch")
    assert (await api.get())["step"] == 1


async def test_the_same_episode_with_another_body(api: Served):
    await api.open(goal="one")
    again = await api.client.post("/episode", json={"episode_id": api.name, "goal": "two"})
    assert_problem(again, 409, "idempotency_mismatch")
    assert (await api.get())["goal"] == "one"


@pytest.mark.parametrize(
    ("ending", "stop_reason"), [({"terminated": True}, "terminated"), ({"truncated": True}, "truncated")]
)
async def test_an_act_on_an_episode_that_ended(api: Served, ending: dict[str, bool], stop_reason: str):
    await api.open()
    await api.act()
    assert (await api.act(observation=None, **ending))["done"]
    assert_problem(await api.post_act(), 409, "episode_ended", stop_reason=stop_reason)
    assert_problem(await api.post_act(step=1), 409, "episode_ended", stop_reason=stop_reason)
    assert_problem(await api.post_act(step=2), 409, "episode_ended", stop_reason=stop_reason)


async def test_an_aborted_episode_has_ended(api: Served):
    await api.open()
    assert (await api.client.post(f"{api.path}/end", json={})).json()["stop_reason"] == "aborted"
    assert_problem(await api.post_act(), 409, "episode_ended", stop_reason="aborted")


async def test_an_observation_that_no_longer_fits(api: Served):
    await api.open(context={"overflow": "error", "max_tokens": 40}, sampling={"max_tokens": 8})
    await api.act(observation="hi")
    problem = await api.post_act(observation="many words " * 20)
    assert_problem(problem, 409, "context_overflow")
    assert (await api.get())["status"] == "active"
    assert (await api.get())["step"] == 1


async def test_another_act_in_flight(tmp_path: Path, tokenizer: HFTokenizer):
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        first = asyncio.create_task(api.post_act(observation="one", step=0))
        await until(lambda: engine.num_held == 1)
        assert_problem(await api.post_act(observation="two"), 409, "episode_busy")
        assert_problem(await api.post_act(observation="two", step=1), 409, "episode_busy")
        assert_problem(await api.post_act(observation="two", step=0), 409, "idempotency_mismatch")
        assert_problem(await api.client.post(f"{api.path}/end", json={}), 409, "episode_busy")
        assert_problem(await api.client.delete(api.path), 409, "episode_busy")
        engine.release.set()
        assert (await first).status_code == 200
        assert (await api.get())["step"] == 1


# --- 413


async def _chunks(size: int) -> AsyncIterator[bytes]:
    yield b'{"episode_id":"e","observation":"'
    for _ in range(size // 65536):
        yield b"x" * 65536
    yield b'"}'


async def test_a_body_over_the_limit(api: Served):
    await api.open()
    huge = json.dumps({"episode_id": api.name, "observation": "x" * 10_000_000}).encode()
    for path in ("/act", "/episode", f"{api.path}/end"):
        answer = await api.client.post(path, content=huge)
        assert_problem(answer, 413, "payload_too_large", max_body_bytes=MAX_BODY)
        answer = await api.client.post(path, content=_chunks(10_000_000))
        assert_problem(answer, 413, "payload_too_large", max_body_bytes=MAX_BODY)
    assert (await api.act())["step"] == 0


async def test_a_body_just_within_the_limit(api: Served):
    await api.open()
    empty = json.dumps({"episode_id": api.name, "info": {"x": ""}, "observation": "x"}).encode()
    body = empty.replace(b'""', b'"' + b"y" * (MAX_BODY - len(empty)) + b'"')
    assert (await api.client.post("/act", content=body)).status_code == 200
    assert_problem(await api.client.post("/act", content=body + b" "), 413, "payload_too_large")


# --- 422

BAD_EPISODES: dict[str, Any] = {
    "a list": [],
    "a string": "e",
    "an unknown field": {"gaol": "typo"},
    "a wrong type": {"goal": 3},
    "a number as text": {"max_steps": "3"},
    "a bool as number": {"max_steps": True},
    "max_steps 0": {"max_steps": 0},
    "an id with a slash": {"episode_id": "a/b"},
    "an id with a dot": {"episode_id": ".."},
    "an id with a newline": {"episode_id": "a\n"},
    "an empty id": {"episode_id": ""},
    "an id of 129": {"episode_id": "x" * 129},
    "an unknown action space": {"action_space": {"type": "dance"}},
    "no type": {"action_space": {"actions": ["a", "b"]}},
    "a field of another space": {"action_space": {"type": "text", "actions": ["a", "b"]}},
    "1 action": {"action_space": {"type": "discrete", "actions": ["a"]}},
    "1,025 actions": {"action_space": {"type": "discrete", "actions": [str(n) for n in range(1025)]}},
    "duplicate actions": {"action_space": {"type": "discrete", "actions": ["a", "b", "a"]}},
    "an empty action": {"action_space": {"type": "discrete", "actions": ["a", ""]}},
    "actions that are numbers": {"action_space": {"type": "discrete", "actions": [1, 2]}},
    "no schema": {"action_space": {"type": "json"}},
    "an invalid schema": {"action_space": {"type": "json", "schema": {"type": 7}}},
    "a schema that is text": {"action_space": {"type": "json", "schema": "{}"}},
    "a schema that refers outside": {"action_space": {"type": "json", "schema": {"$ref": "http://169.254.169.254/"}}},
    "an empty pattern": {"action_space": {"type": "regex", "pattern": ""}},
    "a pattern that does not compile": {"action_space": {"type": "regex", "pattern": "("}},
    "a pattern too long": {"action_space": {"type": "regex", "pattern": "a" * 5000}},
    "a negative temperature": {"sampling": {"temperature": -0.1}},
    "top_p 0": {"sampling": {"top_p": 0}},
    "min_p 2": {"sampling": {"min_p": 2}},
    "a negative seed": {"sampling": {"seed": -1}},
    "an empty stop": {"sampling": {"stop": [""]}},
    "a stop for actions that are chosen": {
        "action_space": {"type": "discrete", "actions": ["a", "b"]},
        "sampling": {"stop": ["a"]},
    },
    "max_tokens 0": {"sampling": {"max_tokens": 0}},
    "max_tokens of the whole context": {"sampling": {"max_tokens": 4096}},
    "an unknown sampling field": {"sampling": {"temprature": 1}},
    "an unknown overflow": {"context": {"overflow": "explode"}},
    "a tiny context": {"context": {"max_tokens": 1}},
    "another policy": {"policy": "somebody-else"},
    "a tag too long": {"tags": ["x" * 129]},
    "a tag with a NUL": {"tags": ["a\0b"]},
    "a group with a NUL": {"group": "a\0b"},
    "tags that are text": {"tags": "a"},
    "metadata that is a list": {"metadata": []},
}


@pytest.mark.parametrize("body", BAD_EPISODES.values(), ids=BAD_EPISODES.keys())
async def test_invalid_episode_options(api: Served, body: Any):
    before = await api.client.get("/episode")
    problem = assert_problem(await api.client.post("/episode", json=body), 422, "invalid_request")
    assert all(set(error) == {"loc", "msg"} for error in problem["errors"])
    assert problem["errors"]
    assert (await api.client.get("/episode")).content == before.content


async def test_actions_with_equal_tokens(tmp_path: Path, tokenizer: HFTokenizer):
    class Uncased(HFTokenizer):
        """Encodes upper and lower case alike, as uncased vocabularies do."""

        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    from transformers import AutoTokenizer

    from tests.conftest import POLICY

    async with serve(tmp_path, ScriptedEngine(Uncased(AutoTokenizer.from_pretrained(POLICY)))) as api:
        actions = {"type": "discrete", "actions": ["Left", "left"]}
        problem = assert_problem(
            await api.client.post("/episode", json={"action_space": actions}), 422, "invalid_request"
        )
        assert "cannot distinguish" in problem["detail"]


BAD_ACTS: dict[str, dict[str, Any]] = {
    "an unknown field": {"observation": "x", "rewrad": 1},
    "no observation": {},
    "observation null": {"observation": None},
    "an image": {"observation": [{"type": "image", "data": "aGk=", "mime": "image/png"}]},
    "a part with an unknown field": {"observation": [{"type": "text", "text": "x", "role": "system"}]},
    "a reward that is text": {"observation": "x", "reward": "x"},
    "a reward that is a number as text": {"observation": "x", "reward": "1"},
    "a reward that is a bool": {"observation": "x", "reward": True},
    "terminated as text": {"observation": "x", "terminated": "true"},
    "success before the end": {"observation": "x", "success": True},
    "info that is a list": {"observation": "x", "info": []},
    "a negative step": {"observation": "x", "step": -1},
    "a step that is text": {"observation": "x", "step": "0"},
    "a step that is a fraction": {"observation": "x", "step": 0.5},
    "timeout_s 0": {"observation": "x", "timeout_s": 0},
    "legal_actions empty": {"observation": "x", "legal_actions": []},
    "legal_actions unknown": {"observation": "x", "legal_actions": ["fly"]},
    "legal_actions twice": {"observation": "x", "legal_actions": ["left", "left"]},
    "legal_actions as text": {"observation": "x", "legal_actions": "left"},
}


@pytest.mark.parametrize("fields", BAD_ACTS.values(), ids=BAD_ACTS.keys())
async def test_invalid_act(api: Served, fields: dict[str, Any]):
    await api.open(action_space=DISCRETE)
    problem = assert_problem(
        await api.client.post("/act", json={"episode_id": api.name, **fields}), 422, "invalid_request"
    )
    assert problem["errors"][0]["msg"]
    assert (await api.get())["step"] == 0
    assert (await api.act(step=0))["action"] in DISCRETE["actions"]


async def test_nonfinite_reward(api: Served):
    await api.open()
    body = b'{"episode_id":"%s","observation":"x","reward":-1e999}' % api.name.encode()
    assert_problem(await api.client.post("/act", content=body), 400, "malformed_json")
    assert math.isfinite((await api.get())["episode_return"])


async def test_legal_actions_of_a_text_space(api: Served):
    await api.open()
    assert_problem(await api.post_act(legal_actions=["left"]), 422, "invalid_request")


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_an_idempotency_key_of_the_wrong_length(api: Served, key: str):
    await api.open()
    assert_problem(await api.post_act(headers={"Idempotency-Key": key}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/episode?limit=0", 422, "invalid_request"),
        ("/episode?limit=many", 422, "invalid_request"),
        ("/episode?status=asleep", 422, "invalid_request"),
        ("/episode?cursor=bm9uc2Vuc2U", 422, "invalid_request"),
        ("/episode?cursor=%00", 422, "invalid_request"),
        ("/episode?cursor=W10", 422, "invalid_request"),
        ("/episode/e/trajectory?format=video", 422, "invalid_request"),
        ("/episode/a.b", 422, "invalid_request"),
        ("/episode/a%2Fb", 404, "not_found"),
        ("/episode/..%2F..%2Fetc%2Fpasswd", 404, "not_found"),
        ("/episode/" + "x" * 129, 422, "invalid_request"),
    ],
)
async def test_invalid_path_or_query(api: Served, path: str, status: int, code: str):
    await api.open()
    assert_problem(await api.client.get(path), status, code)


async def test_errors_have_a_location(api: Served):
    problem = (await api.client.post("/episode", json={"sampling": {"top_p": 7}, "max_steps": -1})).json()
    assert [error["loc"] for error in problem["errors"]] == [["sampling", "top_p"], ["max_steps"]]


# --- 500


class BrokenEngine(ScriptedEngine):
    """Raises an exception that the service does not expect."""

    async def score(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("/secret/path.py is broken")


async def test_internal_error_leaks_and_commits_nothing(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, BrokenEngine(tokenizer)) as api:
        await api.open(action_space=DISCRETE)
        answer = await api.post_act(headers={"X-Request-ID": "find-me"})
        assert_problem(answer, 500, "internal_error")
        assert answer.headers["x-request-id"] == "find-me"
        assert "secret" not in answer.text
        assert (await api.get())["step"] == 0
        assert (await api.client.get("/healthz")).status_code == 200


class SickEngine(ScriptedEngine):
    """Computes probabilities that are not numbers."""

    async def generate(self, *args: Any, **options: Any) -> Completion:
        drawn = await super().generate(*args, **options)
        return replace(drawn, logprobs=(math.nan,) * len(drawn.logprobs))

    async def score(self, prompt_token_ids: Any, candidates: Any, **options: Any) -> Scores:
        return Scores((math.nan,) * len(candidates), 0)


@pytest.mark.parametrize(
    "fields",
    [{}, {"action_space": DISCRETE}, {"action_space": DISCRETE, "reasoning": {"max_tokens": 8}}],
    ids=["text", "choice", "thought"],
)
async def test_a_probability_that_is_no_number_fails_by_name_and_stores_nothing(
    tmp_path: Path, tokenizer: HFTokenizer, fields: dict[str, Any]
):
    async with serve(tmp_path, SickEngine(tokenizer)) as api:
        await api.open(**fields)
        assert_problem(await api.post_act(), 500, "policy_failed")
        assert (await api.get())["step"] == 0
        batch = await api.client.post("/act/batch", json={"acts": [{"episode_id": "e", "observation": "x"}]})
        assert batch.json()["results"][0]["code"] == "policy_failed"


# --- 503, 504


async def test_while_the_policy_loads(tmp_path: Path):
    async with serve(tmp_path, None, store=MemoryStore(), loading=True) as api:
        assert (await api.client.get("/healthz")).status_code == 200
        assert_problem(await api.client.post("/episode", json={}), 503, "engine_unavailable")
        assert_problem(await api.post_act(), 503, "engine_unavailable")


@pytest.mark.parametrize("space", [{"type": "text"}, DISCRETE], ids=["text", "discrete, several passes"])
async def test_when_the_engine_died(tmp_path: Path, tokenizer: HFTokenizer, space: dict[str, Any]):
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open(action_space=space)
        await api.act()
        engine.die()
        assert_problem(await api.post_act(step=1), 503, "engine_unavailable")
        assert (await api.get())["step"] == 1
        assert (await api.act(step=0))["replayed"]


async def test_when_the_store_fails(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open(action_space=DISCRETE)
        await api.act(step=0)
        async with without_table(api.store_url, "steps"):
            assert_problem(await api.post_act(step=1), 503, "store_unavailable")
            assert_problem(await api.client.get("/episode/e/trajectory"), 503, "store_unavailable")
            assert_problem(await api.client.post("/episode/e/end", json={}), 503, "store_unavailable")
        assert (await api.get())["step"] == 1
        assert (await api.act(step=1))["step"] == 1
        async with without_table(api.store_url, "episodes"):
            assert_problem(await api.client.post("/episode", json={}), 503, "store_unavailable")
            assert_problem(await api.client.get("/episode"), 503, "store_unavailable")
            assert_problem(await api.client.get("/episode/unknown"), 503, "store_unavailable")
        assert len((await api.trajectory())["steps"]) == 2


async def test_while_draining(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open()
        api.app.state.services.lifecycle.enter(Phase.DRAINING)
        assert_problem(await api.post_act(), 503, "draining")
        assert_problem(await api.client.post("/episode", json={}), 503, "draining")
        assert (await api.get())["step"] == 0


async def test_a_deadline_that_ran_out_commits_nothing(tmp_path: Path, tokenizer: HFTokenizer):
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        assert_problem(await api.post_act(step=0, timeout_s=0.01), 504, "deadline_exceeded")
        await until(lambda: engine.num_aborted == 1)
        assert (await api.get())["step"] == 0
        assert (await api.trajectory())["steps"] == []
        engine.release.set()
        again = await api.act(step=0, timeout_s=30)
        assert (again["step"], again["replayed"]) == (0, False)
