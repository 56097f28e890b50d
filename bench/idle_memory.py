"""Measures the memory of idle episodes: opens many episodes, acts once in each, and reads the RSS."""

import asyncio
import gc
import tempfile
from pathlib import Path
from typing import Annotated

import psutil
import typer
from transformers import AutoTokenizer

from service.engine.tokenizer import HFTokenizer
from service.sessions.acts import ActRequest
from service.sessions.sessions import Sessions
from service.settings import Settings
from service.store.sql import SQLStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Message

_SPACE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
_CONCURRENCY = 256


async def _play(sessions: Sessions, first: int, count: int) -> None:
    async def one(number: int) -> None:
        episode_id = f"episode-{number}"
        await sessions.create(episode_id, {"instructions": "Walk.", "action_space": _SPACE}, b"0" * 16)
        await sessions.act(episode_id, ActRequest(Message(observation=f"row {number % 4}, column 0"), b"1" * 16))

    for start in range(first, first + count, _CONCURRENCY):
        await asyncio.gather(*(one(number) for number in range(start, min(start + _CONCURRENCY, first + count))))


async def _measure(num_episodes: int) -> None:
    settings = Settings()
    tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(settings.model_path))
    engine = ScriptedEngine(tokenizer)
    process = psutil.Process()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = SQLStore(f"sqlite:///{Path(folder) / 'idle.db'}")
        await store.open()
        sessions = Sessions(store, max_cached_episodes=settings.max_live_episodes)
        sessions.serve(engine)
        await _play(sessions, 0, 512)  # warm-up: the first episodes allocate memory once
        gc.collect()
        before = process.memory_info().rss
        await _play(sessions, 512, num_episodes)
        engine.prompts.clear()
        gc.collect()
        grown = process.memory_info().rss - before
        await store.close()
    cached = f"at most {settings.max_live_episodes} cached"
    typer.echo(f"{num_episodes} idle episodes, {cached}: RSS grew by {grown / 1e6:.1f} MB")


def main(num_episodes: Annotated[int, typer.Option(help="Number of idle episodes.")] = 100_000) -> None:
    """Print the growth of the resident set size (RSS)."""
    asyncio.run(_measure(num_episodes))


if __name__ == "__main__":
    typer.run(main)
