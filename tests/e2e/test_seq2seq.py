"""An encoder-decoder model behind the service: the example, and what happens when its worker dies under load."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.client import AsyncClient, Client, Retry
from tests.e2e.server import Server, until

ROOT = Path(__file__).parents[2]
NUM_EPISODES, NUM_STEPS = 16, 6
SPACES = (
    {"type": "discrete", "actions": ["up", "right", "down", "left"]},
    {"type": "text"},
    {"type": "regex", "pattern": "(left|right)( now)?"},
)
PATIENT = Retry(max_retries=1000, total_s=240.0, max_s=1.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("seq2seq")
    started = Server(folder, model="toy-t5", engine_canary_s="6", engine_backoff_s="0.1").start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.kill()


def worker_of(server: Server) -> psutil.Process:
    """The worker: the child with the most memory. The other one tracks resources."""
    assert server.process is not None
    return max(psutil.Process(server.process.pid).children(), key=lambda child: child.memory_info().rss)


def trajectory(server: Server, name: str, format: str) -> Any:
    return httpx.get(f"{server.url}/episode/{name}/trajectory", params={"format": format}).json()


def test_the_example_of_the_source_text_reaches_the_goal(server: Server) -> None:
    environment = {**os.environ, "EPISODIC_URL": server.url}
    command = [sys.executable, str(ROOT / "examples" / "source_text.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("return -13.0\n")


def test_it_says_that_it_has_no_v1(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "toy-t5", "prompt": "row 0"})
    assert answer.status_code == 501
    assert "POST /act" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/version").json()["template"] is None


def test_a_thought_and_a_template_without_an_observation_are_refused(server: Server) -> None:
    for body, words in (
        ({"reasoning": {"max_tokens": 8}}, "cannot write a thought"),
        ({"context": {"template": "{history}"}}, "must contain {observation}"),
    ):
        answer = httpx.post(f"{server.url}/episode", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert words in answer.text


def test_tokens_have_both_streams(server: Server) -> None:
    with Client(server.url) as client:
        episode = client.episode(episode_id="streams", action_space=SPACES[0])
        for step in range(3):
            episode.act(f"row {step}, column 0")
    segments = trajectory(server, "streams", "tokens")["segments"]
    assert [segment["steps"] for segment in segments] == [[0], [1], [2]]
    lengths = [len(segment["encoder_token_ids"]) for segment in segments]
    assert lengths == sorted(set(lengths))
    for segment in segments:
        assert segment["token_ids"][0] == 0
        assert len(segment["token_ids"]) == len(segment["loss_mask"]) == len(segment["support"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_answered_steps_are_stored_exactly_once(server: Server, number: signal.Signals) -> None:
    acknowledged: dict[str, list[Any]] = {}
    worker = worker_of(server)

    async def play(client: AsyncClient, index: int) -> None:
        name = f"{number.name}-{index}"
        sampling = {"temperature": 1.0, "max_tokens": 30}
        space = SPACES[index % len(SPACES)]
        episode = await client.episode(episode_id=name, action_space=space, sampling=sampling)
        for step in range(NUM_STEPS):
            acknowledged.setdefault(name, []).append(await episode.act(f"row {step}, column {index % 12}", reward=1))

    async def strike() -> None:
        while sum(map(len, acknowledged.values())) < NUM_EPISODES:  # noqa: ASYNC110 - other tasks fill it
            await asyncio.sleep(0.005)
        worker.send_signal(number)

    async def run() -> None:
        async with AsyncClient(server.url, retry=PATIENT) as client, asyncio.TaskGroup() as group:
            group.create_task(strike())
            for index in range(NUM_EPISODES):
                group.create_task(play(client, index))

    asyncio.run(run())
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    for name, acts in acknowledged.items():
        stored = trajectory(server, name, "steps")["steps"]
        assert [step["text"] for step in stored] == [act.text for act in acts]
        assert len(stored) == NUM_STEPS


def test_the_worker_ends_with_the_service(server: Server) -> None:
    worker = worker_of(server)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=30)
    until(lambda: not worker.is_running())
