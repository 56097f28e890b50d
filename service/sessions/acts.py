"""Acts: the request for an act, an act in flight, and the result of an act."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import field
from types import TracebackType
from typing import Self

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


class Deadline:
    """Cancels a block at the deadline of a request, if it has one. Raises DeadlineExceeded then."""

    __slots__ = ("_limit", "_timeout_s")

    def __init__(self, request: ActRequest) -> None:
        self._timeout_s = request.timeout_s
        left_s = request.timeout_s and request.timeout_s - (time.perf_counter() - request.arrived)
        self._limit = None if left_s is None else asyncio.timeout(left_s)

    def has_passed(self) -> bool:
        return self._limit is not None and self._limit.expired()

    async def __aenter__(self) -> Self:
        if self._limit:
            await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._limit:
            return
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as timeout:
            raise self._exceeded() from timeout
        if isinstance(error, TimeoutError) and self.has_passed():
            raise self._exceeded() from error

    def _exceeded(self) -> DeadlineExceeded:
        detail = f"The timeout of {self._timeout_s:g} s expired before the commit. Retry with a larger timeout_s."
        return DeadlineExceeded("deadline_exceeded", detail)


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

    async def join(self, deadline: Deadline) -> ActResult:
        """Waits for the result. If the deadline passes after the commit has begun, continues to wait."""
        try:
            return await self._result()
        except asyncio.CancelledError:
            if self.is_committing and deadline.has_passed():
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
