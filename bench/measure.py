"""Plays a cell's episodes through a contender's actors and measures every step."""

import asyncio
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Protocol

from bench.workloads import Cell, observations


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a step. `timing` has the durations in seconds that the contender itself reports, if any."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    bytes_sent: int = 0
    timing: dict[str, float] = field(default_factory=dict[str, float])


class Actor(Protocol):
    """Plays one episode on a contender."""

    async def open(self, observations: Sequence[str]) -> None:
        """Prepares the episode. This is not part of the measured steps."""
        ...

    async def act(self, step: int) -> Reply:
        """Sends the observation of a step and returns the reply."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender's measurement of one cell.

    Latencies are measured at the client. `open_ms` is the time to open all episodes concurrently, divided by their
    number. `timing_ms` has medians of the durations that the contender itself reports.
    """

    seconds: float
    steps_per_s: float
    tokens_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_step: float
    bytes_per_step: float
    prompt_tokens_per_step: float
    completion_tokens_per_step: float
    open_ms: float
    timing_ms: dict[str, float]


class WrongAction(RuntimeError):
    """A contender returned a text that is not one of the workload's actions."""


async def measure(cell: Cell, run: int, actor: Callable[[int], Actor], cpu_s: Callable[[], float]) -> Sample:
    """Plays the cell once. Raises WrongAction.

    `actor` creates the actor for the episode with the given number. `cpu_s` reads the CPU time of the API process.
    """
    sets = [[actor(first + i) for i in range(cell.num_episodes)] for first in _firsts(cell)]
    actors = [actor for one in sets for actor in one]
    began = time.perf_counter()
    texts = [observations(run, number, cell.num_steps, cell.workload.texts) for number in range(len(actors))]
    await asyncio.gather(*(actor.open(of_episode) for actor, of_episode in zip(actors, texts, strict=True)))
    opened = time.perf_counter()
    latencies: list[float] = []
    replies: list[Reply] = []
    cpu_before, started = cpu_s(), time.perf_counter()
    for one in sets:
        await asyncio.gather(*(_play(actor, cell, latencies, replies) for actor in one))
    seconds, cpu = time.perf_counter() - started, cpu_s() - cpu_before
    latencies.sort()
    return Sample(
        seconds=seconds,
        steps_per_s=len(replies) / seconds,
        tokens_per_s=sum(reply.completion_tokens for reply in replies) / seconds,
        p50_ms=1e3 * percentile(latencies, 0.5),
        p99_ms=1e3 * percentile(latencies, 0.99),
        cpu_ms_per_step=1e3 * cpu / len(replies),
        bytes_per_step=fmean(reply.bytes_sent for reply in replies),
        prompt_tokens_per_step=fmean(reply.prompt_tokens for reply in replies),
        completion_tokens_per_step=fmean(reply.completion_tokens for reply in replies),
        open_ms=1e3 * (opened - began) / len(actors),
        timing_ms={part: 1e3 * median(reply.timing[part] for reply in replies) for part in replies[0].timing},
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values in ascending order."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def process_clock(pid: int) -> Callable[[], float]:
    """Returns a function that reads a process's CPU time in seconds. It includes all threads, but no child processes.

    The resolution is a nanosecond: see clock_getcpuclockid(3). The times in /proc have a resolution of 10 ms, in which
    ten steps can happen.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise ProcessLookupError(error, f"no CPU clock for process {pid}")
    return lambda: time.clock_gettime(clock.value)


def _firsts(cell: Cell) -> range:
    return range(0, cell.num_sets * cell.num_episodes, cell.num_episodes)


async def _play(actor: Actor, cell: Cell, latencies: list[float], replies: list[Reply]) -> None:
    for step in range(cell.num_steps):
        began = time.perf_counter()
        reply = await actor.act(step)
        latencies.append(time.perf_counter() - began)
        replies.append(reply)
        if cell.workload.actions and reply.text not in cell.workload.actions:
            raise WrongAction(f"{cell.name}: {reply.text!r} is not one of the actions")
