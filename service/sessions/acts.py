"""Acts: the request for an act, an act in flight, and the result of an act."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.engine.base import TextSink
from service.errors import DeadlineExceeded
from service.trajectory import JsonValue, Message, Step


@dataclass(frozen=True, slots=True)
class RecordedAction:
    """An action that the caller chose instead of the policy."""

    value: JsonValue


@dataclass(frozen=True, slots=True)
class ActRequest:
    """A request for one act.

    digest: digest of the request body. A retry has the same one.
    step, idempotency_key: identify a retry, if given. An act with another `step` than the next one is refused.
    timeout_s: seconds after which the caller gives up; None for no timeout.
    recorded: an action that the caller chose; None if the policy decides.
    sink: receives streamed text. A retry that joins an act in flight receives only the result.
    on_wait: called when the act begins to wait for the engine. What could be wrong with the request is known then.
    arrived: value of `time.perf_counter()` when the request arrived. The timeout starts then.
    """

    message: Message
    digest: bytes
    step: int | None = None
    idempotency_key: str | None = None
    timeout_s: float | None = None
    recorded: RecordedAction | None = None
    sink: TextSink | None = None
    on_wait: Callable[[], None] = lambda: None
    arrived: float = field(default_factory=time.perf_counter)


@asynccontextmanager
async def before_deadline(request: ActRequest) -> AsyncGenerator[asyncio.Timeout]:
    """Cancels the block at the deadline of the request. Raises DeadlineExceeded then."""
    left_s = request.timeout_s and request.timeout_s - (time.perf_counter() - request.arrived)
    limit = asyncio.timeout(left_s)
    try:
        async with limit:
            yield limit
    except TimeoutError as error:
        if not limit.expired():
            raise
        detail = f"The timeout of {request.timeout_s:g} s expired before the commit. Retry with a larger timeout_s."
        raise DeadlineExceeded("deadline_exceeded", detail) from error


@dataclass(frozen=True, slots=True)
class ActResult:
    """The result of an act: the committed step.

    timing: duration of each part of the act in seconds.
    replayed: whether another replica committed the step, for a retry of the same request.
    """

    step: Step
    timing: dict[str, float]
    replayed: bool = False


@dataclass(slots=True)
class InFlightAct:
    """The act in flight of an episode. Retries join it.

    If the last waiting caller leaves before the commit has begun, the act is cancelled. A commit is never cancelled.
    """

    request: ActRequest
    task: "asyncio.Task[ActResult]"
    num_waiters: int = 0
    is_committing: bool = False

    async def join(self, limit: asyncio.Timeout) -> ActResult:
        """Waits for the result. If the limit expires after the commit has begun, continues to wait."""
        self.num_waiters += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.is_committing and limit.expired():
                return await asyncio.shield(self.task)
            raise
        finally:
            self.num_waiters -= 1
            if not self.num_waiters and not self.is_committing:
                self.task.cancel()
