"""Many concurrent episodes from one client, with default settings."""

import asyncio
import json
import os
import resource
import sys
from pathlib import Path

import httpx

from service.client import AsyncClient
from service.engine.tokenizer import HFTokenizer
from service.rollout import EnvironmentFactory, rollout
from service.rollout.acting import MAX_REQUESTS
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import HeldEngine, Served, serve

ROOT = Path(__file__).parents[2]


async def num_refused(api: Served) -> float:
    """How many acts have been refused because of too many, in this process."""
    lines = (await api.client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('agent_acts_total{outcome="overloaded"'))


async def test_a_thousand_acts_at_once_are_all_admitted(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    async with serve(tmp_path, HeldEngine(tokenizer)) as api, AsyncClient(api.url) as client, asyncio.timeout(120):
        before = await num_refused(api)
        episodes = await asyncio.gather(*(client.episode() for _ in range(1000)))
        acting = asyncio.gather(*(episode.act("look") for episode in episodes))
        while api.app.state.services.sessions.admission._num_acts < 1000:
            assert not acting.done(), await acting
            await asyncio.sleep(0.01)
        api.engine.release.set()
        assert {act.step for act in await acting} == {0}
        assert await num_refused(api) == before


async def test_a_wide_rollout_is_not_refused_and_sends_few_requests(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    acts: list[str] = []

    async def count(request: httpx.Request) -> None:
        if request.url.path.startswith("/act"):
            acts.append(request.url.path)

    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api, AsyncClient(api.url) as client:
        before = await num_refused(api)
        client._options["event_hooks"] = {"request": [count]}  # pyright: ignore
        factory = EnvironmentFactory("episodic/FrozenLakeRandom-v0", max_episode_steps=4)
        report = await rollout(factory, client, episodes=256, concurrency=256)
        assert (report.failures, report.policy.episodes) == ((), 256)
        assert await num_refused(api) == before
        assert len(acts) < api.engine.num_calls / 4, "acts that are ready together do not share a request"
        assert "/act/batch" in acts


async def test_few_episodes_send_each_act_at_once(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """No act waits for another one as long as there are as many requests as episodes."""
    async with serve(tmp_path, HeldEngine(tokenizer)) as api, AsyncClient(api.url) as client, asyncio.timeout(60):
        factory = EnvironmentFactory("Blackjack-v1")
        playing = asyncio.create_task(rollout(factory, client, episodes=MAX_REQUESTS, concurrency=MAX_REQUESTS))
        while api.engine.num_held < MAX_REQUESTS:
            assert not playing.done(), await playing
            await asyncio.sleep(0.01)
        api.engine.release.set()
        assert (await playing).failures == ()


async def test_the_command_plays_more_episodes_than_the_soft_limit_on_open_files(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    def lower_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    options = ["--env", "Blackjack-v1", "--episodes", "200", "--concurrency", "200", "--retry-s", "0", "--json"]
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        command = [sys.executable, "-m", "service", "rollout", *options, "--url", api.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=environment, preexec_fn=lower_limit, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert json.loads(output)["episodes"] == 200
