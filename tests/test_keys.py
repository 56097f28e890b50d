"""Keys: what is kept of one, and how long the ones in memory serve."""

import pytest

from service.keys import Keyring, digest, new_key
from service.store.base import StoreUnavailable
from service.store.memory import MemoryStore
from service.trajectory import KeyRecord


class CountingStore(MemoryStore):
    num_reads = 0
    is_down = False

    async def keys(self) -> list[KeyRecord]:
        self.num_reads += 1
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().keys()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is the time."""
    now = [100.0]
    monkeypatch.setattr("service.keys.time.monotonic", lambda: now[0])
    return now


async def test_a_key_is_found_by_all_of_its_text(clock: list[float]):
    store = CountingStore()
    key, record = new_key("acme", ["act", "read"], 1.0)
    other, _ = new_key("acme", ["act"], 1.0)
    await store.add_key(record)
    ring = Keyring(store)
    assert await ring.find(key) == record
    for wrong in (
        "",
        "ek",
        "ek_",
        key[:-1],
        key + "0",
        key.upper(),
        other,
        f"ek_{record.key_id}_{other.split('_')[2]}",
    ):
        assert await ring.find(wrong) is None, wrong


async def test_the_store_keeps_no_secret():
    key, record = new_key("acme", ["read"], 1.0)
    assert record.digest == digest(key)
    assert key.split("_")[2] not in repr(record)
    assert new_key("acme", ["read"], 1.0)[0] != key


async def test_a_revoked_key_serves_a_second_longer_at_most(clock: list[float]):
    store = CountingStore()
    key, record = new_key("acme", ["read"], 1.0)
    await store.add_key(record)
    ring = Keyring(store)
    assert await ring.find(key)
    await store.revoke_key(record.key_id, 2.0)
    clock[0] += 0.9
    assert await ring.find(key)
    assert store.num_reads == 1
    clock[0] += 0.2
    assert await ring.find(key) is None
    assert await ring.exists()


async def test_the_last_keys_serve_while_the_store_cannot(clock: list[float]):
    store = CountingStore()
    key, record = new_key("acme", ["read"], 1.0)
    await store.add_key(record)
    ring = Keyring(store)
    store.is_down = True
    with pytest.raises(StoreUnavailable):
        await ring.find(key)
    store.is_down = False
    assert await ring.find(key)
    store.is_down = True
    clock[0] += 5.0
    assert await ring.find(key)
