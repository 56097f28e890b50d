"""Measures acts whose callers disconnect: how soon the act stops, and whether anything leaks."""

import asyncio
import statistics
import time
from typing import Annotated

import httpx
import typer

from bench.served import served, server_of

_NUM_LANES = 16
_SETTLE_S = 12.0
"""Seconds until the engine's metrics are certainly up to date."""
_ENDLESS = {"type": "regex", "pattern": "[a-z]{2000}"}


async def _measure(url: str, num_aborts: int) -> None:
    process = server_of(url)
    async with _client(url) as http:
        for lane in range(_NUM_LANES):
            body = {"episode_id": f"e{lane}", "action_space": _ENDLESS, "sampling": {"max_tokens": 1500}}
            (await http.post("/episode", json=body)).raise_for_status()
        latencies_s = [await _leave_and_watch(http) for _ in range(10)]
    await _abort(url, 1024)  # warm-up: the first aborts allocate memory once
    before = process.num_fds(), process.memory_info().rss
    await _abort(url, num_aborts)
    fds, rss = process.num_fds() - before[0], process.memory_info().rss - before[1]
    async with _client(url) as http:
        running = await _metric(http, "vllm:num_requests_running") + await _metric(http, "vllm:num_requests_waiting")
        steps = [(await http.get(f"/episode/e{lane}")).json()["step"] for lane in range(_NUM_LANES)]
    typer.echo(
        f"an act stops {statistics.median(latencies_s) * 1e3:.0f} ms (median), {max(latencies_s) * 1e3:.0f} ms (max)"
        f" after its caller disconnects; after {num_aborts} aborted acts: {sum(steps)} committed, "
        f"{running:.0f} requests left in the engine, {fds:+d} file descriptors, {rss / 1e6:+.1f} MB RSS"
    )


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))


async def _abort(url: str, num_aborts: int) -> None:
    async with _client(url) as http:
        await asyncio.gather(*(_lane(http, lane, num_aborts // _NUM_LANES) for lane in range(_NUM_LANES)))
        await _until_free(http)
    await asyncio.sleep(_SETTLE_S)


async def _lane(http: httpx.AsyncClient, lane: int, num_aborts: int) -> None:
    for number in range(num_aborts):
        headers = {"Accept": "text/event-stream"} if number % 2 else {}
        call = http.post("/act", json={"episode_id": f"e{lane}", "observation": "x"}, headers=headers)
        try:
            await asyncio.wait_for(call, 0.02)
        except TimeoutError:
            continue
        # No timeout: the service answered that the episode is busy, because the previous act is still being aborted.


async def _leave_and_watch(http: httpx.AsyncClient) -> float:
    call = asyncio.create_task(http.post("/act", json={"episode_id": "e0", "observation": "x"}))
    await asyncio.sleep(0.3)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    began = time.perf_counter()
    await _until_free(http)
    return time.perf_counter() - began


async def _until_free(http: httpx.AsyncClient) -> None:
    while await _metric(http, "agent_active_acts"):  # noqa: ASYNC110 - another process's state
        await asyncio.sleep(0.005)


async def _metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def main(num_aborts: Annotated[int, typer.Option(help="Number of acts to abort.")] = 5_000) -> None:
    """Print how soon an act stops after its caller has disconnected, and what many of them leak."""
    with served() as url:
        asyncio.run(_measure(url, num_aborts))


if __name__ == "__main__":
    typer.run(main)
