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
_QUEUED_PER_SLOT, _MIN_QUEUED = 4, 1024


@dataclass(slots=True)
class _Account:
    """The current use of one tenant.

    allowance: calls that the tenant may make at once, at the time `counted_at`; negative after a large batch.
    num_acts: acts that are admitted, whether they wait or run.
    num_running: slots that the tenant occupies.
    arriving: a future for each act of a batch that waits until the quota of concurrent acts admits it, oldest first.
    waiting: a future for each request that waits for a slot, oldest first.
    """

    quota: Quota
    allowance: float
    counted_at: float
    num_acts: int = 0
    num_running: int = 0
    arriving: "deque[asyncio.Future[None]]" = field(default_factory=deque)
    waiting: "deque[asyncio.Future[None]]" = field(default_factory=deque)

    @property
    def may_enter(self) -> bool:
        """Whether the quota of concurrent acts allows one more act."""
        return self.quota.concurrent_acts is None or self.num_acts < self.quota.concurrent_acts

    @property
    def may_run(self) -> bool:
        """Whether the quota of concurrent acts allows one more request to the model."""
        return self.quota.concurrent_acts is None or self.num_running < self.quota.concurrent_acts

    @property
    def is_idle(self) -> bool:
        return not (self.num_acts or self.num_running or self.arriving or self.waiting)


class Admission:
    """Admits acts, and gives them slots of the engine.

    quota: returns the limits of a tenant.
    max_running: number of slots. Default: the number of requests that the engine batches.
    max_queued: size of the act queue. Default: four times the slots, and at least 1,024.

    An act is admitted once. It then occupies one slot for each request to the model that it has in flight: a discrete
    act may have hundreds. Each active tenant has an equal share of slots and queue. When the queue is full, a tenant
    below its share is still admitted, and a tenant that has used up its share is refused.
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
        self._fill_slots()

    @property
    def limit(self) -> int:
        """Maximum number of admitted acts: slots plus queue."""
        default = max(_QUEUED_PER_SLOT * self._slots, _MIN_QUEUED)
        return self._slots + (default if self._max_queued is None else self._max_queued)

    def count_call(self, tenant: str) -> None:
        """Counts a call against the tenant's rate limit, with a token bucket that holds the calls of one second.

        Raises TooManyRequests (rate_limited) if less than one call is left.
        """
        account = self._account(tenant)
        rate = account.quota.calls_per_s
        if rate is None:
            return
        now = time.monotonic()
        account.allowance = min(account.allowance + (now - account.counted_at) * rate, max(rate, 1.0))
        account.counted_at = now
        if account.allowance < 1.0:
            wait_s = (1.0 - account.allowance) / rate
            detail = f"The rate limit of {rate:g} calls per second is exceeded. Retry after the seconds in Retry-After."
            raise TooManyRequests("rate_limited", detail, retry_after_s=wait_s)
        account.allowance -= 1.0

    def count_rest(self, tenant: str, num_calls: int) -> None:
        """Counts the other calls of a batch, after `count_call` has counted the first one.

        A batch may be larger than the remaining allowance. The tenant's next calls are then refused until the allowance
        has recovered.
        """
        self._account(tenant).allowance -= num_calls

    def check(self, tenant: str) -> None:
        """Checks whether one more act of the tenant can be admitted now.

        Raises TooManyRequests (quota_exceeded) if the tenant would exceed its quota of concurrent acts. Raises
        TooManyRequests (overloaded) if the act queue is full.
        """
        account = self._account(tenant)
        if not account.may_enter:
            allowed = account.quota.concurrent_acts
            detail = f"The quota of {allowed} concurrent acts is exceeded. Wait until an act in flight has completed."
            raise _refused("quota_exceeded", detail, 1)
        if self._num_acts >= self.limit and account.num_acts >= self._share(account):
            detail = "The act queue is full. Retry after the number of seconds in Retry-After."
            raise _refused("overloaded", detail, self._wait_s())

    @contextmanager
    def admitted(self, tenant: str) -> Generator[None]:
        """Admits an act: it counts as admitted until the context exits. Raises TooManyRequests, as `check` does."""
        self.check(tenant)
        self._enter(self._account(tenant))
        try:
            yield
        finally:
            self.leave(tenant)

    async def enter_in_turn(self, tenant: str) -> None:
        """Admits an act of a batch, which `check` has let in as a whole, until `leave`.

        Waits while the tenant's quota of concurrent acts is used up. So a larger batch runs in waves.
        """
        account = self._account(tenant)
        if account.may_enter:
            self._enter(account)
        else:
            await _turn(account.arriving, lambda: self._leave(account))

    def leave(self, tenant: str) -> None:
        """Ends an admitted act."""
        self._leave(self._account(tenant))
        self._forget_idle(tenant)

    def _enter(self, account: _Account) -> None:
        account.num_acts += 1
        self._num_acts += 1

    def _leave(self, account: _Account) -> None:
        account.num_acts -= 1
        self._num_acts -= 1
        while account.may_enter and _give_turn(account.arriving):
            self._enter(account)

    def _share(self, account: _Account) -> float:
        """Returns the tenant's share of admitted acts: the limit divided by the number of active tenants."""
        return self.limit / (1 + sum(other.num_acts > 0 for other in self._accounts.values() if other is not account))

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncGenerator[None]:
        """Waits for a slot of the engine, and occupies it until the context exits. See `acquire`."""
        await self.acquire(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    async def acquire(self, tenant: str) -> None:
        """Waits for a slot of the engine, and occupies it until `release`.

        A slot that becomes free goes to the waiting tenant that occupies the fewest slots. A tenant never occupies more
        slots than its quota of concurrent acts.
        """
        account = self._account(tenant)
        if self._num_running < self._slots and account.may_run:
            self._occupy(account)
        else:
            metrics.WAITING_ACTS.inc()
            try:
                await _turn(account.waiting, lambda: self._release(account))
            finally:
                metrics.WAITING_ACTS.dec()
        metrics.RUNNING_ACTS.inc()

    def release(self, tenant: str) -> None:
        """Frees a slot that `acquire` has given."""
        metrics.RUNNING_ACTS.dec()
        self._ends.append(time.monotonic())
        self._release(self._account(tenant))
        self._forget_idle(tenant)

    def _occupy(self, account: _Account) -> None:
        account.num_running += 1
        self._num_running += 1

    def _release(self, account: _Account) -> None:
        account.num_running -= 1
        self._num_running -= 1
        self._fill_slots()

    def _fill_slots(self) -> None:
        """Gives free slots to waiting tenants."""
        while self._num_running < self._slots:
            waiting = [account for account in self._accounts.values() if account.waiting and account.may_run]
            if not waiting:
                return
            following = min(waiting, key=lambda account: account.num_running)
            if _give_turn(following.waiting):
                self._occupy(following)

    def _wait_s(self) -> float:
        """Estimates the seconds until the queue is empty, from the rate at which slots were recently released."""
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
        num_waiting = sum(len(account.waiting) for account in self._accounts.values())
        return min(max(self._num_acts - self._slots, num_waiting, 1) / rate, _MAX_RETRY_AFTER_S)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            quota = self.quota(tenant)
            burst = max(quota.calls_per_s or 1.0, 1.0)
            account = self._accounts[tenant] = _Account(quota, burst, time.monotonic())
        return account

    def _forget_idle(self, tenant: str) -> None:
        """Removes the account of an idle tenant, so that memory does not grow with the number of tenants ever seen.

        A tenant with a rate limit keeps its account, which contains its allowance.
        """
        account = self._accounts.get(tenant)
        if account and account.is_idle and account.quota.calls_per_s is None:
            del self._accounts[tenant]


async def _turn(line: "deque[asyncio.Future[None]]", give_back: Callable[[], None]) -> None:
    """Waits in a line until `_give_turn` gives this caller its turn.

    give_back: called if the caller is cancelled just after it was given its turn.
    """
    turn = asyncio.get_running_loop().create_future()
    line.append(turn)
    try:
        await turn
    except asyncio.CancelledError:
        if turn.done() and not turn.cancelled():
            give_back()
        elif turn in line:
            line.remove(turn)
        raise


def _give_turn(line: "deque[asyncio.Future[None]]") -> bool:
    """Gives the oldest caller in the line its turn. Returns False if there is none that still waits."""
    while line:
        turn = line.popleft()
        if not turn.done():  # it is done if its caller was cancelled
            turn.set_result(None)
            return True
    return False


def _refused(code: str, detail: str, retry_after_s: float) -> TooManyRequests:
    metrics.ACTS.labels(code).inc()
    return TooManyRequests(code, detail, retry_after_s=retry_after_s)
