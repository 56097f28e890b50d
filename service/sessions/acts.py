"""Acts: the request for an act, an act in flight, and the result of an act."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import field

from service.engine.base import TextSink
from service.errors import DeadlineExceeded
from service.trajectory import JsonValue, Message, Step
from service.values import immutable


@immutable
class RecordedAction:
    """An action that the caller chose instead of the policy."""

    value: JsonValue


@immutable
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


@immutable
class ActResult:
    """The result of an act: the committed step.

    timing: duration of each part of the act in seconds.
    replayed: whether another replica committed the step, for a retry of the same request.
    """

    step: Step
    timing: dict[str, float]
    replayed: bool = False


class InFlightAct:
    """The act in flight of an episode. Retries join it.

    If the last waiting caller leaves before the commit has begun, the act is cancelled. A commit is never cancelled.
    """

    __slots__ = ("_waiting", "is_committing", "request", "task")

    def __init__(self, request: ActRequest, task: "asyncio.Task[ActResult]") -> None:
        self.request = request
        self.task = task
        self.is_committing = False
        self._waiting: list[asyncio.Future[ActResult]] = []

    @property
    def num_waiters(self) -> int:
        return len(self._waiting)

    async def join(self, limit: asyncio.Timeout) -> ActResult:
        """Waits for the result. If the limit expires after the commit has begun, continues to wait."""
        try:
            return await self._result()
        except asyncio.CancelledError:
            if self.is_committing and limit.expired():
                return await self._result()
            raise

    async def _result(self) -> ActResult:
        """Waits for the task. If the caller is cancelled, the task is not, unless it was the last caller.

        Does what asyncio.shield does, with one callback instead of three: `settle`.
        """
        if self.task.done():
            return self.task.result()
        waiter: asyncio.Future[ActResult] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        finally:
            self._waiting.remove(waiter)
            if not self._waiting and not self.is_committing:
                self.task.cancel()

    def settle(self) -> None:
        """Passes on the result of the task, which is done, to the waiting callers."""
        failure = None if self.task.cancelled() else self.task.exception()
        for waiter in self._waiting:
            if waiter.done():
                continue
            if self.task.cancelled():
                waiter.cancel()
            elif failure:
                waiter.set_exception(failure)
            else:
                waiter.set_result(self.task.result())
