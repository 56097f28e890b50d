"""Admission control: enforces the quotas of tenants, bounds the act queue, and shares the engine's slots fairly.

Admitted acts wait for a slot here and not in the engine. A tenant with many acts therefore does not delay the others.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from service.errors import TooManyRequests
from service.observability import metrics
from service.settings import Quota

_NUM_MEASURED = 64
"""Number of released slots over which the rate of the engine is measured."""
_MAX_RETRY_AFTER_S = 60


@dataclass(slots=True)
class _Account:
    """The current use of one tenant.

    allowance: calls that the tenant may make at once, at the time `counted_at`; negative after a large batch.
    num_acts: acts that are admitted, whether they wait or run.
    num_running: slots that the tenant occupies.
    waiting: a future for each request that waits for a slot, oldest first.
    """

    allowance: float
    counted_at: float
    num_acts: int = 0
    num_running: int = 0
    waiting: "deque[asyncio.Future[None]]" = field(default_factory=deque)


class Admission:
    """Admits acts, and gives them slots of the engine.

    quota: returns the limits of a tenant.
    max_running: number of slots. Default: the number of requests that the engine batches.
    max_queued: size of the act queue. Default: a quarter of the slots.

    Each active tenant has an equal share of slots and queue. When the queue is full, a tenant below its share is still
    admitted, and a tenant that has used up its share is refused.
    """

    def __init__(
        self,
        quota: Callable[[str], Quota] = lambda _: Quota(),
        *,
        max_running: int | None = None,
        max_queued: int | None = None,
    ) -> None:
        self._max_running, self._max_queued = max_running, max_queued
        self._slots = max_running or 1
        self.quota = quota
        self._accounts: dict[str, _Account] = {}
        self._num_acts = 0
        self._num_running = 0
        self._ends: deque[float] = deque(maxlen=_NUM_MEASURED)

    def set_num_slots(self, num_slots: int) -> None:
        """Sets the number of slots to the number of requests that the engine batches, unless `max_running` is set."""
        self._slots = self._max_running or num_slots

    @property
    def limit(self) -> int:
        """Maximum number of admitted acts: slots plus queue."""
        return self._slots + (self._slots // 4 if self._max_queued is None else self._max_queued)

    def count_calls(self, tenant: str, num_calls: int = 1) -> None:
        """Counts calls against the tenant's rate limit, with a token bucket that holds the calls of one second.

        A batch may be larger than the remaining allowance. The tenant's next calls are then refused until the allowance
        has recovered. Raises TooManyRequests (rate_limited) if less than one call is left.
        """
        rate = self.quota(tenant).calls_per_s
        if rate is None:
            return
        account = self._account(tenant)
        now = time.monotonic()
        account.allowance = min(account.allowance + (now - account.counted_at) * rate, max(rate, 1.0))
        account.counted_at = now
        if account.allowance < 1.0:
            wait_s = (1.0 - account.allowance) / rate
            detail = f"The rate limit of {rate:g} calls per second is exceeded. Retry after the seconds in Retry-After."
            raise TooManyRequests("rate_limited", detail, retry_after_s=wait_s)
        account.allowance -= num_calls

    def check(self, tenant: str, num_acts: int = 1) -> None:
        """Checks whether `num_acts` more acts of the tenant can be admitted now.

        Raises TooManyRequests (quota_exceeded) if the tenant would exceed its quota of concurrent acts. Raises
        TooManyRequests (overloaded) if the act queue is full; a batch needs room for its first act only.
        """
        account = self._account(tenant)
        allowed = self.quota(tenant).concurrent_acts
        if allowed is not None and account.num_acts + num_acts > allowed:
            detail = (
                f"The quota of {allowed} concurrent acts is exceeded. Wait for acts in flight, or send a smaller batch."
            )
            raise _refused("quota_exceeded", detail, 1, num_acts)
        if self._num_acts >= self.limit and account.num_acts >= self._share(account):
            detail = "The act queue is full. Retry after the number of seconds in Retry-After."
            raise _refused("overloaded", detail, self._wait_s(), num_acts)

    @contextmanager
    def admitted(self, tenant: str, num_acts: int = 1) -> Generator[None]:
        """Admits acts: they count as admitted until the context exits. Raises TooManyRequests, as `check` does."""
        self.check(tenant, num_acts)
        account = self._account(tenant)
        account.num_acts += num_acts
        self._num_acts += num_acts
        try:
            yield
        finally:
            account.num_acts -= num_acts
            self._num_acts -= num_acts
            self._forget_idle(tenant)

    def _share(self, account: _Account) -> float:
        """Returns the tenant's share of admitted acts: the limit divided by the number of active tenants."""
        return self.limit / (1 + sum(other.num_acts > 0 for other in self._accounts.values() if other is not account))

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncGenerator[None]:
        """Waits for a slot of the engine, and occupies it until the context exits.

        A slot that becomes free goes to the waiting tenant that occupies the fewest slots.
        """
        account = self._account(tenant)
        if self._num_running < self._slots:
            self._num_running += 1
            account.num_running += 1
        else:
            await self._wait(account)
        try:
            with metrics.RUNNING_ACTS.track_inprogress():
                yield
        finally:
            self._ends.append(time.monotonic())
            self._release(account)
            self._forget_idle(tenant)

    async def _wait(self, account: _Account) -> None:
        turn = asyncio.get_running_loop().create_future()
        account.waiting.append(turn)
        try:
            with metrics.WAITING_ACTS.track_inprogress():
                await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(account)  # it was given the slot just before it was cancelled
            elif turn in account.waiting:
                account.waiting.remove(turn)
            raise

    def _release(self, account: _Account) -> None:
        """Gives the slot to a waiting tenant, or frees it."""
        account.num_running -= 1
        while waiting := [other for other in self._accounts.values() if other.waiting]:
            following = min(waiting, key=lambda other: other.num_running)
            turn = following.waiting.popleft()
            if not turn.done():  # it is done if the waiting request was cancelled
                following.num_running += 1
                turn.set_result(None)
                return
        self._num_running -= 1

    def _wait_s(self) -> float:
        """Estimates the seconds until the queue is empty, from the rate at which slots were recently released."""
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(max(self._num_acts - self._slots, 1) / rate, _MAX_RETRY_AFTER_S)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            burst = max(self.quota(tenant).calls_per_s or 1.0, 1.0)
            account = self._accounts[tenant] = _Account(burst, time.monotonic())
        return account

    def _forget_idle(self, tenant: str) -> None:
        """Removes the account of an idle tenant, so that memory does not grow with the number of tenants ever seen.

        A tenant with a rate limit keeps its account, which contains its allowance.
        """
        account = self._accounts.get(tenant)
        idle = account and not account.num_acts and not account.num_running and not account.waiting
        if idle and self.quota(tenant).calls_per_s is None:
            del self._accounts[tenant]


def _refused(code: str, detail: str, retry_after_s: float, num_acts: int) -> TooManyRequests:
    metrics.ACTS.labels(code).inc(num_acts)
    return TooManyRequests(code, detail, retry_after_s=retry_after_s)
