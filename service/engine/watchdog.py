"""Owns the question whether an engine hangs: one whose processes live and which answers nothing."""

import asyncio

from service.engine.base import Engine, EngineUnavailable
from service.observability import logs

_log = logs.get(__name__)

_NUM_TICKS = 20


async def hung(engine: Engine, limit_s: float) -> None:
    """Returns once the engine gave no sign of life for `limit_s` seconds.

    Any output of any request is one, so that a full queue or a long prompt is no hang as long as something moves. After
    half of the time in silence, as when nobody asks, the engine is asked for one token. The time is counted in ticks,
    not by the clock: a process that was held up itself has not listened meanwhile.
    """
    asking: asyncio.Task[None] | None = None
    heard, num_silent = engine.heartbeat, 0
    try:
        while num_silent < _NUM_TICKS:
            await asyncio.sleep(limit_s / _NUM_TICKS)
            num_silent = num_silent + 1 if engine.heartbeat == heard else 0
            heard = engine.heartbeat
            if num_silent >= _NUM_TICKS // 2 and (asking is None or asking.done()):
                asking = asyncio.create_task(_ask(engine), name="canary")
    finally:
        if asking:
            asking.cancel()


async def _ask(engine: Engine) -> None:
    try:
        await engine.probe()
    except EngineUnavailable:
        pass  # dead, not hung: who watches it knows
    except Exception as failure:  # noqa: BLE001 - no answer, whatever the reason
        _log.warning("engine_probe_failed", reason=repr(failure))
