"""Detects an engine that hangs: its processes are alive, but it produces no output."""

import asyncio

from service.engine.base import Engine, EngineUnavailable
from service.observability import logs

_log = logs.get(__name__)

_NUM_TICKS = 20


async def hung(engine: Engine, limit_s: float) -> None:
    """Waits until the engine's heartbeat has not changed for `limit_s` seconds.

    Output of any request changes the heartbeat, so a full queue or a long prompt does not count as a hang. If there is
    no output for half of the time, for example because there are no requests, the engine is probed.

    The time is counted in ticks of the event loop, not measured by a clock: while the event loop itself is blocked, it
    cannot see output of the engine, and that time must not count.
    """
    probing: asyncio.Task[None] | None = None
    last_heartbeat, num_silent = engine.heartbeat, 0
    try:
        while num_silent < _NUM_TICKS:
            await asyncio.sleep(limit_s / _NUM_TICKS)
            num_silent = num_silent + 1 if engine.heartbeat == last_heartbeat else 0
            last_heartbeat = engine.heartbeat
            if num_silent >= _NUM_TICKS // 2 and (probing is None or probing.done()):
                probing = asyncio.create_task(_probe(engine), name="canary")
    finally:
        if probing:
            probing.cancel()


async def _probe(engine: Engine) -> None:
    try:
        await engine.probe()
    except EngineUnavailable:
        pass  # the engine is dead, which the supervisor notices by itself
    except Exception as failure:  # noqa: BLE001 - any failure counts as no answer
        _log.warning("engine_probe_failed", reason=repr(failure))
