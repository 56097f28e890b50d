"""Measures forks of a long episode on the real engine: the latency of the call, and the reuse of the prefix cache."""

import statistics
import time
from typing import Annotated

import httpx
import typer

from bench.served import served

_SPACE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
_BLOCK = 32


def main(
    num_steps: Annotated[int, typer.Option(help="Number of steps of the forked episode.")] = 100,
    num_forks: Annotated[int, typer.Option(help="Number of forks per call.")] = 64,
    num_rounds: Annotated[int, typer.Option(help="Number of calls.")] = 9,
) -> None:
    """Print the latency of POST /episode/{id}/fork, and the fraction of cacheable prompt tokens found in the cache."""
    with served() as url, httpx.Client(base_url=url, timeout=120) as http:
        opened = {"episode_id": "parent", "action_space": _SPACE}
        http.post("/episode", json=opened).raise_for_status()
        for step in range(num_steps):
            body = {"episode_id": "parent", "observation": f"row {step}, column 3: a long corridor", "step": step}
            http.post("/act", json=body).raise_for_status()
        times_ms, shares = [], []
        for _ in range(num_rounds):
            began = time.perf_counter()
            forked = http.post("/episode/parent/fork", json={"n": num_forks}).raise_for_status()
            times_ms.append((time.perf_counter() - began) * 1e3)
            acts = [{"episode_id": fork["episode_id"], "observation": "on"} for fork in forked.json()["episodes"]]
            for result in http.post("/act/batch", json={"acts": acts}).raise_for_status().json()["results"]:
                usage = result["usage"]
                shares.append(usage["cached_tokens"] / ((usage["prompt_tokens"] - 1) // _BLOCK * _BLOCK))
    typer.echo(
        f"{num_forks} forks of {num_steps} steps: median {statistics.median(times_ms):.1f} ms, "
        f"max {max(times_ms):.1f} ms; first acts found {min(shares):.1%} or more of the cacheable tokens in the cache"
    )


if __name__ == "__main__":
    typer.run(main)
