"""Owns who may act now: the tenants' quotas, the bound on acts that wait for the engine, and whose turn is next.

An act that is not refused waits here, not in the engine, so that one tenant's flood is not before another's act.
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

_MEASURED = 64
"""Acts whose ends give the drain rate."""
_LONGEST_WAIT_S = 60


@dataclass(slots=True)
class _Account:
    """One tenant now. `allowance`: calls that it may make at once, as of `counted_at`."""

    allowance: float
    counted_at: float
    num_acts: int = 0
    num_running: int = 0
    waiting: "deque[asyncio.Future[None]]" = field(default_factory=deque)


class Admission:
    """Admits acts up to `max_running` in the engine (unset: as many as it batches) and `max_queued` that wait for a
    place (unset: a quarter as many).

    Of a full queue each tenant has its share: below it a tenant is admitted still, above it refused.
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
        self._ends: deque[float] = deque(maxlen=_MEASURED)

    def set_num_slots(self, num_slots: int) -> None:
        """The engine batches this many requests at once."""
        self._slots = self._max_running or num_slots

    @property
    def limit(self) -> int:
        """Acts that run and wait together."""
        return self._slots + (self._slots // 4 if self._max_queued is None else self._max_queued)

    def count_calls(self, tenant: str, num_calls: int = 1) -> None:
        """Raises TooManyRequests (rate_limited) when the tenant's calls come faster than its quota has it. A second's
        worth may come at once; more than that, as a large batch does, is paid off before the next call."""
        rate = self.quota(tenant).calls_per_s
        if rate is None:
            return
        account = self._account(tenant)
        now = time.monotonic()
        account.allowance = min(account.allowance + (now - account.counted_at) * rate, max(rate, 1.0))
        account.counted_at = now
        if account.allowance < 1.0:
            wait_s = (1.0 - account.allowance) / rate
            raise TooManyRequests("rate_limited", f"More than {rate:g} calls a second.", retry_after_s=wait_s)
        account.allowance -= num_calls

    def check(self, tenant: str, num_acts: int = 1) -> None:
        """Raises TooManyRequests: quota_exceeded for more acts at once than the tenant may have; overloaded when there
        is no place for the first of them."""
        account = self._account(tenant)
        allowed = self.quota(tenant).concurrent_acts
        if allowed is not None and account.num_acts + num_acts > allowed:
            raise _refused("quota_exceeded", f"More than {allowed} acts at once.", 1, num_acts)
        if self._num_acts >= self.limit and account.num_acts >= self._share(account):
            raise _refused("overloaded", "As many acts wait as may; try later.", self._wait_s(), num_acts)

    @contextmanager
    def admitted(self, tenant: str, num_acts: int = 1) -> Generator[None]:
        """Counts acts as long as they last. Raises as `check` does."""
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
        """The acts that this tenant may have while the others want theirs."""
        return self.limit / (1 + sum(other.num_acts > 0 for other in self._accounts.values() if other is not account))

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncGenerator[None]:
        """A place in the engine, once it is the tenant's turn: of those who wait, the one with the fewest there."""
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
            self._leave(account)
            self._forget_idle(tenant)

    async def _wait(self, account: _Account) -> None:
        turn = asyncio.get_running_loop().create_future()
        account.waiting.append(turn)
        try:
            with metrics.WAITING_ACTS.track_inprogress():
                await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(account)  # its turn came as its caller left
            elif turn in account.waiting:
                account.waiting.remove(turn)
            raise

    def _leave(self, account: _Account) -> None:
        """Hands the place on, or frees it."""
        account.num_running -= 1
        while waiting := [other for other in self._accounts.values() if other.waiting]:
            following = min(waiting, key=lambda other: other.num_running)
            turn = following.waiting.popleft()
            if not turn.done():  # else its caller has left
                following.num_running += 1
                turn.set_result(None)
                return
        self._num_running -= 1

    def _wait_s(self) -> float:
        """Seconds until what waits has gone to the engine, at the rate of the last acts."""
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(max(self._num_acts - self._slots, 1) / rate, _LONGEST_WAIT_S)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            burst = max(self.quota(tenant).calls_per_s or 1.0, 1.0)
            account = self._accounts[tenant] = _Account(burst, time.monotonic())
        return account

    def _forget_idle(self, tenant: str) -> None:
        """So that memory does not grow with every tenant there ever was; one with a rate keeps its allowance."""
        account = self._accounts.get(tenant)
        idle = account and not account.num_acts and not account.num_running and not account.waiting
        if idle and self.quota(tenant).calls_per_s is None:
            del self._accounts[tenant]


def _refused(code: str, detail: str, retry_after_s: float, num_acts: int) -> TooManyRequests:
    metrics.ACTS.labels(code).inc(num_acts)
    return TooManyRequests(code, detail, retry_after_s=retry_after_s)
