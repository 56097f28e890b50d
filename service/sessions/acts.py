"""Acts: a request for one, the one that is in flight, and its result."""

import asyncio
import time
from dataclasses import dataclass, field

from service.engine.base import TextSink
from service.trajectory import JsonValue, Message, Step


@dataclass(frozen=True, slots=True)
class RecordedAction:
    """An action that somebody other than the policy chose."""

    value: JsonValue


@dataclass(frozen=True, slots=True)
class ActRequest:
    """One act as it arrived: the message, what identifies a retry of it (digest, step, key), and its deadline.

    recorded: the action, if somebody else chose it. sink: receives streamed text; a retry that joins an act in flight
    gets its result only.
    """

    message: Message
    digest: bytes
    step: int | None = None
    idempotency_key: str | None = None
    timeout_s: float | None = None
    recorded: RecordedAction | None = None
    sink: TextSink | None = None
    arrived: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class ActResult:
    """A committed step, and the seconds that its parts took. `replayed`: another replica had committed it for the same
    request."""

    step: Step
    timing: dict[str, float]
    replayed: bool = False


@dataclass(slots=True)
class InFlightAct:
    """The act in flight of an episode. Retries join it. It is cancelled when the last waiter leaves before the commit
    began."""

    request: ActRequest
    task: "asyncio.Task[ActResult]"
    num_waiters: int = 0
    is_committing: bool = False

    async def join(self, timeout_s: float | None) -> ActResult:
        """Waits for the result. Raises TimeoutError if the time ran out and nothing was committed."""
        self.num_waiters += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.task)
        except TimeoutError:
            if self.is_committing:
                return await asyncio.shield(self.task)
            raise
        finally:
            self.num_waiters -= 1
            if not self.num_waiters and not self.is_committing:
                self.task.cancel()
