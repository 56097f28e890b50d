"""Tests of admission control: quotas, the bound on the act queue, fairness, and the release of slots."""

import asyncio
from contextlib import ExitStack, suppress

import pytest

from service.access.admission import Admission
from service.errors import TooManyRequests
from service.settings import Quota


def refusal(admission: Admission, tenant: str = "a") -> str | None:
    """Returns the code with which an act would be refused now; None if it would be admitted."""
    try:
        with admission.admitted(tenant):
            return None
    except TooManyRequests as error:
        return error.code


class Turns:
    """Starts acts that occupy a slot until the test ends them. `order` lists their tenants in the order of starting."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[asyncio.Event] = []

    async def begin(self, tenant: str) -> "asyncio.Task[None]":
        end = asyncio.Event()

        async def act() -> None:
            with self.admission.admitted(tenant):
                async with self.admission.slot(tenant):
                    self.order.append(tenant)
                    self.ends.append(end)
                    await end.wait()

        task = asyncio.create_task(act())
        self.tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def end(self, place: int) -> None:
        """Ends the act number `place`, in the order of starting."""
        self.ends[place].set()
        for _ in range(3):
            await asyncio.sleep(0)

    async def end_all(self) -> None:
        while not all(task.done() for task in self.tasks):
            for end in self.ends:
                end.set()
            await asyncio.sleep(0)


async def test_the_queue_is_bounded():
    admission = Admission(max_running=2, max_queued=1)
    turns = Turns(admission)
    for _ in range(3):
        await turns.begin("a")
    assert turns.order == ["a", "a"]
    assert refusal(admission) == "overloaded"
    await turns.end(0)
    assert turns.order == ["a", "a", "a"]
    assert refusal(admission) is None
    await turns.end_all()


async def test_unset_bounds_come_from_the_engine():
    admission = Admission()
    admission.set_num_slots(8)
    assert admission.limit == 8 + 1024
    admission.set_num_slots(512)
    assert admission.limit == 512 + 4 * 512
    admission = Admission(max_running=2, max_queued=0)
    admission.set_num_slots(8)
    assert admission.limit == 2


async def test_free_slot_goes_to_the_tenant_with_the_fewest_slots():
    turns = Turns(Admission(max_running=2, max_queued=10))
    for tenant in "aaaabb":
        await turns.begin(tenant)
    for place in range(4):
        await turns.end(place)
    assert "".join(turns.order) == "aababa"
    await turns.end_all()


async def test_a_tenant_below_its_share_is_admitted_to_a_full_queue():
    admission = Admission(max_running=1, max_queued=3)
    turns = Turns(admission)
    for _ in range(4):
        await turns.begin("flood")
    assert refusal(admission, "flood") == "overloaded"
    for _ in range(2):  # its share: half of the limit of four
        assert refusal(admission, "other") is None
        await turns.begin("other")
    assert refusal(admission, "other") == "overloaded"
    await turns.end_all()


async def test_cancelled_waiter_gets_no_slot():
    turns = Turns(Admission(max_running=1, max_queued=10))
    for tenant in "abc":
        await turns.begin(tenant)
    turns.tasks[1].cancel()
    await turns.end(0)
    assert turns.order == ["a", "c"]
    await turns.end(1)
    assert turns.admission._num_running == turns.admission._num_acts == 0
    assert turns.admission._accounts == {}


async def test_slot_given_to_a_cancelled_waiter_is_passed_on():
    turns = Turns(Admission(max_running=1, max_queued=10))
    for tenant in "abc":
        await turns.begin(tenant)
    turns.ends[0].set()
    await asyncio.sleep(0)  # the first act ends, and its slot is given to b
    turns.tasks[1].cancel()
    for _ in range(4):
        await asyncio.sleep(0)
    assert turns.order[-1] == "c"
    await turns.end_all()
    assert turns.admission._num_running == turns.admission._num_acts == 0


async def test_concurrent_acts_quota():
    admission = Admission(lambda tenant: Quota(concurrent_acts=2) if tenant == "a" else Quota(), max_running=8)
    with ExitStack() as stack:
        stack.enter_context(admission.admitted("a"))
        stack.enter_context(admission.admitted("a"))
        assert refusal(admission, "a") == "quota_exceeded"
        assert refusal(admission, "b") is None
    assert refusal(admission, "a") is None


async def test_batch_is_admitted_if_its_first_act_fits():
    admission = Admission(max_running=2, max_queued=2)
    for _ in range(100):
        await admission.enter_in_turn("a")
    assert refusal(admission, "a") == "overloaded"
    for _ in range(100):
        admission.leave("a")
    assert refusal(admission, "a") is None


async def test_calls_per_second_limit(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("service.access.admission.time.monotonic", lambda: now)
    admission = Admission(lambda _: Quota(calls_per_s=2.0))
    admission.count_call("a")
    admission.count_call("a")
    with pytest.raises(TooManyRequests, match="2 calls per second") as refused:
        admission.count_call("a")
    assert (refused.value.code, refused.value.headers["Retry-After"]) == ("rate_limited", "1")
    admission.count_call("b")
    now += 0.5
    admission.count_call("a")
    with suppress(TooManyRequests):
        admission.count_call("a")
    now += 10.0
    admission.count_call("a")
    admission.count_rest("a", 7)  # a batch may exceed the allowance, which becomes negative
    now += 2.0
    with pytest.raises(TooManyRequests):
        admission.count_call("a")
    now += 2.0
    admission.count_call("a")


async def test_retry_after_is_estimated_from_the_measured_rate(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("service.access.admission.time.monotonic", lambda: now)
    admission = Admission(max_running=1, max_queued=12)
    for _ in range(11):
        async with admission.slot("a"):
            now += 0.5
    with ExitStack() as stack:
        for _ in range(13):
            stack.enter_context(admission.admitted("a"))
        with pytest.raises(TooManyRequests) as refused:
            stack.enter_context(admission.admitted("a"))
    assert refused.value.headers["Retry-After"] == "6"
