"""Both clients over a real socket: steps are taken exactly once despite faults, and problems become errors."""

import asyncio
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
from starlette.responses import PlainTextResponse

from service.client import (
    ApiError,
    AsyncClient,
    Client,
    ConnectionFailed,
    EpisodeEnded,
    EpisodeNotFound,
    InvalidResponse,
    Retry,
    StepConflict,
    Unavailable,
)
from tests.client.fake_service import (
    FakeService,
    answer,
    decoded,
    drop_after,
    drop_before,
    overloaded,
    problem,
    serve,
    stall_after,
)

QUICK = Retry(max_retries=5, total_s=5.0, first_s=0.001, max_s=0.01)
GRID = {"type": "discrete", "actions": ["left", "right"]}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeService, str]]:
    fake = FakeService()
    with serve(fake) as url:
        yield fake, url


@pytest.fixture
def url(served: tuple[FakeService, str]) -> str:
    return served[1]


@pytest.fixture
def fake(served: tuple[FakeService, str]) -> FakeService:
    served[0].clear()
    return served[0]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, "secret", timeout_s=0.5, retry=QUICK) as client:
        yield client


def test_an_episode_from_reset_to_end(client: Client, fake: FakeService) -> None:
    episode = client.episode(instructions="Walk.", action_space=GRID, tags=["t"])
    act = episode.act("you are at 0")
    assert (act.action, act.step, act.done, episode.step) == ("left", 0, False, 1)
    assert act.usage is not None
    assert act.usage.cached_tokens == 8
    assert episode.act({"at": 1}, reward=0.5, legal_actions=["right"]).action == "right"
    last = episode.act("home", reward=1.0, terminated=True, success=True)
    assert (last.action, last.done, episode.done, episode.step) == (None, True, True, 2)
    resource = episode.refresh()
    assert (resource.status, resource.stop_reason, resource.success) == ("ended", "terminated", True)
    assert (resource.episode_return, resource.step, resource.instructions) == (1.5, 2, "Walk.")
    assert [step["action"] for step in episode.trajectory()["steps"]] == ["left", "right", None]
    assert [found.episode_id for found in client.list_episodes(status="ended", limit=9).episodes] == [episode.id]
    assert client.list_episodes(status="active").episodes == ()
    assert client.version() == {"version": "0.1.0"}


def test_every_call_about_an_episode_carries_its_id_and_the_key(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    episode.act("o")
    episode.end(truncated=True)
    episode.refresh()
    episode.trajectory("tokens")
    episode.delete()
    assert len(fake.received) == 6
    assert {headers["x-episode-id"] for _, _, headers, _ in fake.received} == {episode.id}
    assert {headers["authorization"] for _, _, headers, _ in fake.received} == {"Bearer secret"}
    assert json.loads(fake.received[0][3])["episode_id"] == episode.id


@pytest.mark.parametrize(
    "fault",
    [drop_before, drop_after, stall_after(1.0), overloaded(503), overloaded(429), overloaded(502)],
    ids=["drop_before", "drop_after", "timeout", "503", "429", "502"],
)
def test_a_fault_at_any_call_takes_the_step_once(client: Client, fake: FakeService, fault: object) -> None:
    fake.script("/episode", fault)
    episode = client.episode(action_space=GRID)
    fake.script("/act", fault)
    assert episode.act("o0").step == 0
    assert episode.act("o1", reward=1.0).step == 1
    fake.script(f"/episode/{episode.id}/end", fault)
    assert episode.end(reward=1.0, terminated=True).episode_return == 2.0
    fake.script(f"/episode/{episode.id}", fault)
    episode.delete()

    first, retried, second = fake.bodies("/act")
    assert first == retried
    assert [body["step"] for body in decoded([first, second])] == [0, 1]
    assert len(fake.episodes) == 1
    assert [body["observation"] for body, _ in fake.episodes[episode.id].acts] == ["o0", "o1"]


def test_a_lost_answer_comes_back_as_a_replay(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    fake.script("/act", drop_after, drop_after)
    assert episode.act("o").replayed


async def test_asyncio_takes_the_step_once_too(url: str, fake: FakeService) -> None:
    async with AsyncClient(url, timeout_s=0.5, retry=QUICK) as client:
        fake.script("/episode", drop_after)
        episode = await client.episode(action_space=GRID)
        fake.script("/act", drop_after, stall_after(1.0), overloaded())
        assert (await episode.act("o0")).replayed
        await episode.act("o1", reward=1.0)
        assert (await episode.end(truncated=True)).stop_reason == "truncated"
        assert [step["action"] for step in (await episode.trajectory())["steps"]] == ["left", "left"]
        assert (await client.resume(episode.id)).done
        await episode.delete()
        with pytest.raises(ApiError, match="episode_deleted"):
            await episode.refresh()
    assert [body["step"] for body in decoded(fake.bodies("/act"))] == [0, 0, 0, 0, 1]
    assert len(fake.episodes) == 1


async def test_acts_at_the_same_time_share_no_more_connections_than_they_need(url: str, fake: FakeService) -> None:
    async def play(client: AsyncClient) -> list[int]:
        episode = await client.episode(action_space=GRID)
        return [(await episode.act("o")).step for _ in range(4)]

    async with AsyncClient(url, retry=QUICK) as client:
        played = await asyncio.gather(*(play(client) for _ in range(8)))
        assert played == [[0, 1, 2, 3]] * 8
        assert len(fake.received) == 40
        assert 1 < len(fake.peers) <= 8


def test_the_step_stays_where_it_was_after_a_call_that_failed(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    fake.script("/act", *[drop_after] * (QUICK.max_retries + 1))
    with pytest.raises(ConnectionFailed, match="/act"):
        episode.act("o")
    assert episode.act("o").replayed
    assert episode.step == 1
    assert len(fake.episodes[episode.id].acts) == 1


def test_a_step_that_is_out_of_turn_is_a_conflict(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    episode.act("o0")
    episode.step = 3
    with pytest.raises(StepConflict) as conflict:
        episode.act("o3")
    assert conflict.value.expected_step == 1
    episode.refresh()
    assert episode.act("o1").step == 1


def test_problems_become_errors(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    episode.end(truncated=True)
    with pytest.raises(EpisodeEnded) as ended:
        episode.act("o")
    assert (ended.value.status, ended.value.code, ended.value.request_id) == (409, "episode_ended", "req-7")
    assert ended.value.stop_reason == "truncated"
    with pytest.raises(EpisodeNotFound, match="About episode_not_found"):
        client.resume("nobody")
    fake.script("/episode", answer(problem(422, "invalid_request", errors=[{"loc": ["goal"], "msg": "no"}])))
    with pytest.raises(ApiError) as invalid:
        client.episode(goal="")
    assert invalid.value.context == {"errors": [{"loc": ["goal"], "msg": "no"}]}


def test_a_final_problem_is_not_retried(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    fake.script("/act", answer(problem(504, "deadline_exceeded")), answer(problem(500, "internal")))
    with pytest.raises(ApiError, match="deadline_exceeded"):
        episode.act("o", timeout_s=0.1)
    with pytest.raises(ApiError, match="internal"):
        episode.act("o")
    assert len(fake.bodies("/act")) == 2


def test_retries_end(url: str, fake: FakeService) -> None:
    with Client(url, retry=Retry(total_s=0.2, first_s=0.001, max_s=0.01)) as client:
        episode = client.episode(action_space=GRID)
        fake.script("/act", *[overloaded(429, "overloaded")] * 1000)
        with pytest.raises(Unavailable, match="overloaded"):
            episode.act("o")
    assert len(fake.bodies("/act")) > 12


def test_a_call_outlasts_a_restart_of_the_service(caplog: pytest.LogCaptureFixture) -> None:
    """The port refuses connections, then the service loads, then it serves. None of this uses up attempts."""
    fake = FakeService()
    with serve(fake) as url, Client(url, retry=Retry(max_retries=0, total_s=60.0, max_s=0.05)) as client:
        episode = client.episode(action_space=GRID)
    with Client(url, retry=Retry(max_retries=0, total_s=60.0, max_s=0.05)) as client, ThreadPoolExecutor() as threads:
        with serve(fake, port=int(url.rpartition(":")[2])):
            episode = client.resume(episode.id)
        acting = threads.submit(episode.act, "o")
        while not any("retrying" in record.getMessage() for record in caplog.records):
            time.sleep(0.01)
        fake.script("/act", *[overloaded()] * 20)
        with serve(fake, port=int(url.rpartition(":")[2])):
            assert acting.result(timeout=60).step == 0


def test_wait_beyond_total_s_is_not_started(client: Client, fake: FakeService) -> None:
    fake.script("/episode", overloaded(429, "quota_exceeded", retry_after="3600"))
    with pytest.raises(Unavailable, match="quota_exceeded"):
        client.episode()
    assert len(fake.received) == 1


def test_what_is_no_answer_of_the_service_is_named_as_such(client: Client, fake: FakeService) -> None:
    fake.script("/episode", answer(PlainTextResponse("<html>hello</html>")), answer(PlainTextResponse("no", 500)))
    with pytest.raises(InvalidResponse, match="POST /episode"):
        client.episode()
    with pytest.raises(ApiError, match="http_500"):
        client.episode()
    fake.script("/version", answer(PlainTextResponse("<html>")))
    with pytest.raises(InvalidResponse, match="GET /version"):
        client.version()


def test_waits_until_ready(client: Client, fake: FakeService) -> None:
    fake.script("/readyz", overloaded(503, "loading"), drop_before, overloaded(503, "loading"))
    client.wait_ready(timeout_s=20.0)
    assert len(fake.received) == 4
    fake.script("/readyz", overloaded(503, "loading"))
    with pytest.raises(Unavailable, match="loading"):
        client.wait_ready(timeout_s=0.0)


def test_a_service_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionFailed, match=f"cannot connect to http://127.0.0.1:{port} .*check the URL"):
            client.version()
        with pytest.raises(ConnectionFailed, match=str(port)):
            client.wait_ready(timeout_s=0.1)
    with pytest.raises(ValueError, match="http://"):
        Client("localhost:8000")


def test_url_and_key_come_from_the_environment(url: str, fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPISODIC_URL", url)
    monkeypatch.setenv("EPISODIC_API_KEY", "from outside")
    with Client() as client:
        assert client.version() == {"version": "0.1.0"}
    with Client(url, "given") as client:
        client.version()
    assert [headers["authorization"] for _, _, headers, _ in fake.received] == ["Bearer from outside", "Bearer given"]
    monkeypatch.delenv("EPISODIC_URL")
    assert "http://127.0.0.1:8000" in repr(Client())


def test_reprs_say_what_matters(client: Client, url: str, fake: FakeService) -> None:
    episode = client.episode(episode_id="walk", action_space=GRID)
    act = episode.act("o")
    assert repr(client) == f"Client('{url}')"
    assert repr(episode) == "Episode('walk', step=1, done=False)"
    assert repr(act).startswith("Act(episode_id='walk', step=0, action='left', usage=Usage(prompt_tokens=9")
    assert "None" not in repr(act)


def test_a_parameter_that_does_not_exist_is_refused_before_the_call(client: Client, fake: FakeService) -> None:
    call: Any = client.episode
    with pytest.raises(TypeError, match="instruction"):
        call(instruction="typo")
    assert fake.received == []


def test_a_field_that_is_left_out_is_not_sent_and_none_is_null(client: Client, fake: FakeService) -> None:
    client.episode(episode_id="e", goal=None, action_space=GRID)
    client.resume("e").act("o", terminated=False, success=None)
    created, acted = decoded([body for _, _, _, body in fake.received if body])
    assert created == {"episode_id": "e", "goal": None, "action_space": GRID}
    assert acted == {"episode_id": "e", "step": 0, "observation": "o"}


@pytest.mark.parametrize("observation", [[0.5, -1], 3, 0.25, True, "text", {"a": [1]}, numpy.arange(3), numpy.int64(4)])
def test_an_observation_is_any_json_value(client: Client, fake: FakeService, observation: Any) -> None:
    client.episode(action_space=GRID).act(observation)
    (body,) = decoded(fake.bodies("/act"))
    assert body["observation"] == (observation.tolist() if hasattr(observation, "tolist") else observation)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_json_lacks_is_not_sent(client: Client, fake: FakeService, number: float) -> None:
    episode = client.episode(action_space=GRID)
    with pytest.raises(ValueError, match="JSON"):
        episode.act("o", reward=number)
    with pytest.raises(ValueError, match="JSON"):
        episode.act({"deep": [{"er": numpy.float32(number)}]})
    assert fake.bodies("/act") == []
    assert episode.step == 0


def test_numpy_values_travel_as_plain_ones(client: Client, fake: FakeService) -> None:
    episode = client.episode(action_space=GRID)
    episode.act({"grid": numpy.eye(2, dtype=numpy.int8)}, reward=numpy.float32(0.5), info={"n": numpy.int64(3)})
    (body,) = decoded(fake.bodies("/act"))
    assert body["observation"] == {"grid": [[1, 0], [0, 1]]}
    assert (body["reward"], body["info"]) == (0.5, {"n": 3})


@pytest.mark.parametrize("episode_id", ["", "a/b", "../act", "x" * 129, "ä", "a\n"])
def test_an_id_that_would_change_the_path_is_refused(client: Client, fake: FakeService, episode_id: str) -> None:
    with pytest.raises(ValueError, match="episode id"):
        client.resume(episode_id)
    assert fake.received == []


def test_importing_the_client_imports_no_server() -> None:
    heavy = ["vllm", "torch", "fastapi", "sqlalchemy", "gymnasium", "numpy"]
    code = f"import sys, episodic; print([m for m in {heavy} if m in sys.modules])"
    code += "; print(sorted(m for m in sys.modules if m.startswith('service') and not m.startswith('service.client')))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:2] == ["[]", "['service', 'service.filters']"]
