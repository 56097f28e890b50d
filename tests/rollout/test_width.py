"""Many concurrent episodes from one client, with default settings."""

import asyncio
import json
import os
import resource
import sys
from pathlib import Path

from service.client import AsyncClient
from service.engine.tokenizer import HFTokenizer
from service.rollout import EnvironmentFactory, rollout
from tests.support.serving import HeldEngine, serve

ROOT = Path(__file__).parents[2]


async def test_a_thousand_acts_at_once_are_all_admitted(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    async with serve(tmp_path, HeldEngine(tokenizer)) as api, AsyncClient(api.url) as client:
        admission = api.app.state.services.sessions.admission
        factory = EnvironmentFactory("Blackjack-v1")
        playing = asyncio.create_task(rollout(factory, client, episodes=1000, concurrency=1000))
        async with asyncio.timeout(120):
            while admission._num_acts < 1000:
                assert not playing.done(), await playing
                await asyncio.sleep(0.01)
            api.engine.release.set()
            report = await playing
        assert report.failures == ()
        assert report.policy.episodes == 1000
        metrics = (await api.client.get("/metrics")).text
        refused = [
            line for line in metrics.splitlines() if line.startswith("agent_acts_total") and "overloaded" in line
        ]
        assert not refused or refused[0].endswith(" 0.0")


async def test_the_command_plays_more_episodes_than_the_soft_limit_on_open_files(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    def lower_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    options = ["--env", "Blackjack-v1", "--episodes", "200", "--concurrency", "200", "--retry-s", "20", "--json"]
    async with serve(tmp_path, HeldEngine(tokenizer)) as api:
        command = [sys.executable, "-m", "service", "rollout", *options, "--url", api.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=environment, preexec_fn=lower_limit, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(120):
            while api.app.state.services.sessions.admission._num_acts < 200:
                assert process.returncode is None
                await asyncio.sleep(0.01)
            api.engine.release.set()
            output, _ = await process.communicate()
        assert process.returncode == 0
        assert json.loads(output)["episodes"] == 200
