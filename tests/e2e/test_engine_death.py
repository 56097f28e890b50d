"""The engine's process is killed or stopped during episodes: the server process and the episodes continue."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from service.client import AsyncClient, Retry
from tests.e2e.server import Server

NUM_EPISODES, NUM_STEPS = 16, 6
ACTIONS = ["left", "down", "right", "up"]
CHAT = {"model": "toy-text", "messages": [{"role": "user", "content": "row 0"}]}
PATIENT = Retry(max_retries=1000, total_s=240.0, max_s=1.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("death")
    started = Server(folder, engine_canary_s="6", engine_backoff_s="0.1").start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.kill()


def engine_of(server: Server) -> psutil.Process:
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def reason(server: Server) -> str:
    """Returns why the server is not ready, or "ready"."""
    answer = httpx.get(f"{server.url}/readyz").json()
    return answer.get("reason") or answer["status"]


async def openai_call_fails(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_answered_steps_are_stored_exactly_once(server: Server, number: signal.Signals) -> None:
    acknowledged: dict[str, list[Any]] = {}
    reasons: list[str] = []
    assert server.process is not None
    before, engine = server.process.pid, engine_of(server)

    async def play(client: AsyncClient, name: str) -> None:
        space = {"type": "discrete", "actions": ACTIONS}
        episode = await client.episode(episode_id=name, action_space=space, sampling={"temperature": 1.0})
        for step in range(NUM_STEPS):
            acknowledged.setdefault(name, []).append(await episode.act(f"row {step}"))

    async def strike() -> None:
        while sum(map(len, acknowledged.values())) < NUM_EPISODES:  # noqa: ASYNC110 - other tasks fill it
            await asyncio.sleep(0.005)
        engine.send_signal(number)
        if number == signal.SIGSTOP:
            await openai_call_fails(server)
        while not reasons or reasons[-1] != "ready" or "engine_unavailable" not in reasons:
            reasons.append(await asyncio.to_thread(reason, server))
            await asyncio.sleep(0.05)

    async def run() -> None:
        async with AsyncClient(server.url, retry=PATIENT) as client, asyncio.TaskGroup() as group:
            group.create_task(strike())
            for episode in range(NUM_EPISODES):
                group.create_task(play(client, f"{number.name}-{episode}"))

    asyncio.run(run())
    assert server.process.poll() is None
    assert server.process.pid == before
    assert not engine.is_running()
    assert engine_of(server).pid != engine.pid
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for name, acts in acknowledged.items():
            stored = http.get(f"/episode/{name}/trajectory").json()["steps"]
            assert [step["step"] for step in stored] == list(range(NUM_STEPS))
            assert [step["action"] for step in stored] == [act.action for act in acts]
            assert [step["logprob"] for step in stored] == [act.logprob for act in acts]


def test_whole_service_uses_the_new_engine(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        assert (
            http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4}).json()["usage"]["completion_tokens"] > 0
        )
        go = {"properties": {"go": {"enum": ["left", "up"]}}, "required": ["go"], "additionalProperties": False}
        http.post(
            "/episode",
            json={"episode_id": "json", "action_space": {"type": "json", "schema": {"type": "object", **go}}},
        )
        act = http.post("/act", json={"episode_id": "json", "observation": "row 0"}).json()
        assert act["action"]["go"] in ("left", "up")
        metrics = http.get("/metrics").text
    assert "agent_engine_failures_total 2.0" in metrics
    assert metrics.count("# TYPE vllm:num_requests_running gauge") == 1


def test_the_third_failure_ends_the_process(server: Server) -> None:
    """The first two failures happened in the tests above."""
    engine_of(server).kill()
    assert server.wait() == 1
