"""kill -9 of the server during 64 concurrent episodes, and a restart: every answered step is stored exactly once."""

import asyncio
import random
import signal
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from service.client import AsyncClient, Retry
from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened

NUM_EPISODES, NUM_STEPS = 64, 6
ACTIONS = ["left", "down", "right", "up"]
DISCRETE = {"type": "discrete", "actions": ACTIONS}


async def play(client: AsyncClient, number: int, acknowledged: dict[str, list[Any]], sent: dict[str, float]) -> None:
    episode = await client.episode(
        episode_id=f"crash-{number}",
        action_space=DISCRETE,
        sampling={"temperature": 1.0},
    )
    generator = random.Random(number)
    for step in range(NUM_STEPS):
        reward = generator.random() if step else None
        act = await episode.act(f"row {step}, column {number % 4}", reward=reward)
        acknowledged.setdefault(episode.id, []).append(act)
        sent[episode.id] = sent.get(episode.id, 0.0) + (reward or 0.0)


@dataclass
class Crash:
    """What happened before and during a crash.

    acknowledged, sent: the answered acts and the sum of the rewards, by episode.
    survivors: processes that the server had started and that did not end by themselves.
    fork, twin_action: a fork that has not acted yet, and what another fork did at the same step.
    """

    acknowledged: dict[str, list[Any]] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    survivors: list[psutil.Process] = field(default_factory=list)
    fork: str = ""
    twin_action: Any = None


@pytest.fixture(scope="module")
def crash(server: Server) -> Crash:
    """Kills the server's process during the episodes, and starts it again."""
    crash = Crash()
    with httpx.Client(base_url=server.url, timeout=120) as http:
        crash.fork, crash.twin_action = fork(http)

    async def run() -> None:
        retry = Retry(max_retries=1000, total_s=240.0, max_s=1.0)
        async with AsyncClient(server.url, retry=retry) as client, asyncio.TaskGroup() as group:
            group.create_task(kill_after(server, crash, NUM_EPISODES * 2))
            for number in range(NUM_EPISODES):
                group.create_task(play(client, number, crash.acknowledged, crash.sent))

    asyncio.run(run())
    return crash


def fork(http: httpx.Client) -> tuple[str, Any]:
    """Forks an episode with a recorded action twice. Returns one fork, and the action of the other one."""
    episode = opened(http, action_space=DISCRETE, sampling={"temperature": 0})
    acted(http, episode, "row 0", step=0)
    body = {"observation": "row 1", "action": "up", "step": 1}
    assert http.post(f"/episode/{episode}/action", json=body).status_code == 200
    forks = [http.post(f"/episode/{episode}/fork", json={"n": 1}).json()["episodes"][0] for _ in range(2)]
    return forks[0]["episode_id"], acted(http, forks[1]["episode_id"], "row 2", step=2)["action"]


async def kill_after(server: Server, crash: Crash, num_acts: int) -> None:
    while sum(map(len, crash.acknowledged.values())) < num_acts:  # noqa: ASYNC110 - other tasks fill it
        await asyncio.sleep(0.01)
    assert server.process is not None
    started = psutil.Process(server.process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in started)
    server.signal(signal.SIGKILL)
    server.wait()
    _, crash.survivors = await asyncio.to_thread(psutil.wait_procs, started, timeout=30)
    await asyncio.to_thread(server.start)


def test_answered_steps_are_stored_exactly_once(server: Server, crash: Crash) -> None:
    assert len(crash.acknowledged) == NUM_EPISODES
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for episode_id, acts in crash.acknowledged.items():
            stored = http.get(f"/episode/{episode_id}/trajectory").json()
            assert [step["step"] for step in stored["steps"]] == list(range(NUM_STEPS))
            assert [step["action"] for step in stored["steps"]] == [act.action for act in acts]
            assert [step["logprob"] for step in stored["steps"]] == [act.logprob for act in acts]
            assert abs(stored["episode"]["episode_return"] - crash.sent[episode_id]) < 1e-9
            onwards = http.post("/act", json={"episode_id": episode_id, "observation": "row 0", "step": NUM_STEPS})
            assert onwards.json()["action"] in ACTIONS


def test_the_engines_processes_end_after_the_server(crash: Crash) -> None:
    assert crash.survivors == []


def test_forks_and_recorded_actions_survive(server: Server, crash: Crash) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        answer = acted(http, crash.fork, "row 2", step=2)
        assert answer["action"] == crash.twin_action
        steps = http.get(f"/episode/{crash.fork}/trajectory").json()["steps"]
        assert [step["observation"] for step in steps] == ["row 0", "row 1", "row 2"]
        assert steps[1]["action"] == "up"
