"""Measures the memory of GET /export: the RSS of the real service while it streams many trajectories."""

from typing import Annotated

import httpx
import psutil
import typer

from bench.served import served, server_of

_SPACE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
_BATCH = 256
_LOOK_EVERY = 1 << 20


def main(
    num_episodes: Annotated[int, typer.Option(help="Number of episodes to export.")] = 2_048,
    num_steps: Annotated[int, typer.Option(help="Number of steps of each episode.")] = 20,
) -> None:
    """Print, for each format, the size of the export and the growth of the resident set size (RSS) meanwhile."""
    with served() as url, httpx.Client(base_url=url, timeout=120) as http:
        server = server_of(url)
        _play(http, num_episodes, num_steps)
        _export(http, server, "steps")  # warm-up: the first export allocates memory once
        for format in ("steps", "messages", "tokens"):
            num_lines, num_bytes, grown = _export(http, server, format)
            typer.echo(
                f"{format}: {num_lines} trajectories, {num_bytes / 1e6:.1f} MB; RSS grew by {grown / 1e6:.1f} MB"
            )


def _play(http: httpx.Client, num_episodes: int, num_steps: int) -> None:
    for first in range(0, num_episodes, _BATCH):
        names = [f"e{number}" for number in range(first, min(first + _BATCH, num_episodes))]
        for name in names:
            http.post("/episode", json={"episode_id": name, "action_space": _SPACE}).raise_for_status()
        for step in range(num_steps + 1):
            fields = {"truncated": True} if step == num_steps else {"observation": f"row {step}, column 0"}
            acts = [{"episode_id": name, "step": step, **fields} for name in names]
            results = http.post("/act/batch", json={"acts": acts}).raise_for_status().json()["results"]
            assert all("code" not in result for result in results), results


def _export(http: httpx.Client, server: psutil.Process, format: str) -> tuple[int, int, int]:
    before = most = server.memory_info().rss
    num_lines = num_bytes = looked_at = 0
    with http.stream("GET", "/export", params={"format": format}) as answer:
        for chunk in answer.raise_for_status().iter_bytes():
            num_bytes += len(chunk)
            num_lines += chunk.count(b"\n")
            if num_bytes - looked_at > _LOOK_EVERY:
                looked_at, most = num_bytes, max(most, server.memory_info().rss)
    return num_lines, num_bytes, max(most, server.memory_info().rss) - before


if __name__ == "__main__":
    typer.run(main)
