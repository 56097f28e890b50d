"""kill -9 during 64 concurrent episodes, and a restart: every answered step is stored exactly once."""

import asyncio
import random
import signal
from typing import Any

import httpx
import psutil

from service.client import AsyncClient, Retry
from tests.e2e.server import Server

NUM_EPISODES, NUM_STEPS = 64, 6
ACTIONS = ["left", "down", "right", "up"]


async def play(client: AsyncClient, number: int, acknowledged: dict[str, list[Any]], sent: dict[str, float]) -> None:
    episode = await client.episode(
        episode_id=f"crash-{number}",
        action_space={"type": "discrete", "actions": ACTIONS},
        sampling={"temperature": 1.0},
    )
    generator = random.Random(number)
    for step in range(NUM_STEPS):
        reward = generator.random() if step else None
        act = await episode.act(f"row {step}, column {number % 4}", reward=reward)
        acknowledged.setdefault(episode.id, []).append(act)
        sent[episode.id] = sent.get(episode.id, 0.0) + (reward or 0.0)


async def kill_after(server: Server, acknowledged: dict[str, list[Any]], num_acts: int) -> None:
    while sum(map(len, acknowledged.values())) < num_acts:  # noqa: ASYNC110 - other tasks fill it
        await asyncio.sleep(0.01)
    server.kill()
    await asyncio.to_thread(server.start)


def test_answered_steps_are_stored_exactly_once_after_kill_9(server: Server) -> None:
    acknowledged: dict[str, list[Any]] = {}
    sent: dict[str, float] = {}

    async def run() -> None:
        retry = Retry(max_retries=1000, total_s=240.0, max_s=1.0)
        async with AsyncClient(server.url, retry=retry) as client, asyncio.TaskGroup() as group:
            group.create_task(kill_after(server, acknowledged, NUM_EPISODES * 2))
            for number in range(NUM_EPISODES):
                group.create_task(play(client, number, acknowledged, sent))

    asyncio.run(run())
    assert len(acknowledged) == NUM_EPISODES
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for episode_id, acts in acknowledged.items():
            stored = http.get(f"/episode/{episode_id}/trajectory").json()
            assert [step["step"] for step in stored["steps"]] == list(range(NUM_STEPS))
            assert [step["action"] for step in stored["steps"]] == [act.action for act in acts]
            assert [step["logprob"] for step in stored["steps"]] == [act.logprob for act in acts]
            assert abs(stored["episode"]["episode_return"] - sent[episode_id]) < 1e-9
            onwards = http.post("/act", json={"episode_id": episode_id, "observation": "row 0", "step": NUM_STEPS})
            assert onwards.json()["action"] in ACTIONS


def test_engine_processes_end_after_kill_9_of_the_server(server: Server) -> None:
    started = children(server)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in started)
    server.signal(signal.SIGKILL)
    server.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    server.start()


def children(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(recursive=True)
