"""Tests of API keys: the stored record, the cache of keys, and the creation of the first key at start."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.access.keys import SCOPES, STALE_S, KeyRefused, Keyring, digest, make_known, new_key, record_of
from service.cli.main import app
from service.store.base import StoreUnavailable
from service.store.sql import SQLStore
from service.testing.memory_store import MemoryStore
from service.trajectory import DEFAULT_TENANT, StoredKey


class CountingStore(MemoryStore):
    num_reads = 0
    is_down = False

    async def keys(self) -> list[StoredKey]:
        self.num_reads += 1
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().keys()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the clock: `clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr("service.access.keys.time.monotonic", lambda: now[0])
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


async def test_revoked_key_is_refused_within_a_second(clock: list[float]):
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


async def test_cached_keys_are_used_while_the_store_is_unavailable(clock: list[float]):
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
    with pytest.raises(StoreUnavailable):
        await ring.find(new_key("acme", ["read"], 1.0)[0])
    assert await ring.find("not a key") is None
    clock[0] += STALE_S
    with pytest.raises(StoreUnavailable):
        await ring.find(key)
    with pytest.raises(StoreUnavailable):
        await ring.exists()


class HangingStore(MemoryStore):
    """Answers only while `answers` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_reads = 0

    async def keys(self) -> list[StoredKey]:
        self.num_reads += 1
        await self.answers.wait()
        return await super().keys()


async def test_a_store_that_hangs_delays_no_known_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.access.keys.FRESH_S", 0.0)
    monkeypatch.setattr("service.access.keys._WAIT_S", 0.05)
    store = HangingStore()
    key, record = new_key("acme", ["read"], 1.0)
    revoked, other = new_key("acme", ["read"], 1.0)
    for one in (record, other):
        await store.add_key(one)
    await store.revoke_key(other.key_id, 2.0)
    ring = Keyring(store)
    assert await ring.exists()
    store.answers.clear()
    assert await ring.find(key) == record  # finds out that the store hangs
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    for _ in range(10):
        assert await ring.find(key) == record
        assert await ring.find(revoked) is None
        assert await ring.exists()
    assert not turned.is_set(), "a known key waited"
    store.answers.set()


async def test_a_key_that_is_unknown_while_the_store_hangs_is_not_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.access.keys._WAIT_S", 0.05)
    store = HangingStore()
    store.answers.clear()
    key, record = new_key("acme", ["read"], 1.0)
    await store.add_key(record)
    ring = Keyring(store)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await ring.find(key)
    assert store.num_reads == 1, "one read at a time"
    store.answers.set()
    assert await ring.find(key) == record
    assert await ring.find(new_key("acme", ["read"], 1.0)[0]) is None


# --- keys that are created or added at start


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs `episodic serve` on all addresses, up to the point where it would listen."""
    monkeypatch.setattr("service.cli.serve._serve", lambda settings: 0)
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    monkeypatch.setenv("EPISODIC_HOST", "0.0.0.0")  # noqa: S104

    def run(**settings: str) -> Any:
        return CliRunner().invoke(app, ["serve"], env={f"EPISODIC_{name.upper()}": v for name, v in settings.items()})

    return run


def stored_keys(folder: Path) -> list[StoredKey]:
    async def read() -> list[StoredKey]:
        async with SQLStore(f"sqlite:///{folder / 'episodic.db'}") as store:
            return await store.keys()

    return asyncio.run(read())


def test_only_the_first_start_creates_and_prints_a_key(start: Any, tmp_path: Path):
    first = start(make_key="true")
    assert first.exit_code == 0
    key, usage = first.stdout.splitlines()
    assert "Authorization: Bearer" in usage
    (record,) = stored_keys(tmp_path)
    assert (record.digest, record.tenant, record.scopes) == (digest(key), DEFAULT_TENANT, SCOPES)
    second = start(make_key="true")
    assert (second.exit_code, second.output) == (0, "")
    assert stored_keys(tmp_path) == [record]


def test_no_key_is_created_if_none_is_needed(start: Any, tmp_path: Path):
    assert start(make_key="true", host="127.0.0.1").output == ""
    key = CliRunner().invoke(app, ["keys", "new"]).stdout.strip()
    assert start(make_key="true", admin_key=key).output == ""
    assert [record.digest for record in stored_keys(tmp_path)] == [digest(key)]


def test_admin_key_is_stored_once(start: Any, tmp_path: Path):
    key = CliRunner().invoke(app, ["keys", "new"]).stdout.strip()
    for _ in range(2):
        started = start(admin_key=key, host="127.0.0.1")
        assert (started.exit_code, started.output) == (0, "")
    (record,) = stored_keys(tmp_path)
    assert (record.digest, record.tenant, record.scopes) == (digest(key), DEFAULT_TENANT, SCOPES)


@pytest.mark.parametrize("key", ["", "sesame", "ek_1_2", f"ek_{'0' * 16}_{'0' * 63}", f"ek_{'0' * 16}_{'0' * 64}\n"])
def test_malformed_admin_key_is_refused_with_one_line(start: Any, tmp_path: Path, key: str):
    refused = start(admin_key=key, make_key="true")
    assert refused.exit_code == 2
    assert re.fullmatch(r"Error: EPISODIC_ADMIN_KEY: .*`episodic keys new`.*\n", refused.stderr)
    assert refused.stdout == ""
    assert not key or key not in refused.output
    assert stored_keys(tmp_path) == []


async def test_replicas_that_start_together_make_the_same_key_known(tmp_path: Path):
    record = record_of(new_key("default", SCOPES, 1.0)[0], "default", SCOPES, 1.0)
    async with SQLStore(f"sqlite:///{tmp_path / 'a.db'}") as one, SQLStore(f"sqlite:///{tmp_path / 'a.db'}") as other:
        await asyncio.gather(*(make_known(store, record) for store in (one, other) * 8))
        assert await one.keys() == [record]


async def test_concurrent_start_finds_the_stored_key():
    key, record = new_key("default", SCOPES, 1.0)

    class Raced(MemoryStore):
        async def add_key(self, key: StoredKey) -> None:
            await super().add_key(key)  # as if another replica had added it first
            raise StoreUnavailable("a row with this id exists")

    store = Raced()
    await make_known(store, record)
    assert await Keyring(store).find(key) == record

    class Down(MemoryStore):
        async def add_key(self, key: StoredKey) -> None:
            raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable, match="down"):
        await make_known(Down(), record)


async def test_an_admin_key_that_was_revoked_stays_so():
    store = MemoryStore()
    key, record = new_key("default", SCOPES, 1.0)
    await make_known(store, record)
    await store.revoke_key(record.key_id, 2.0)
    await make_known(store, record)
    assert await Keyring(store).find(key) is None


async def test_an_admin_key_with_the_public_id_of_another_is_refused():
    store = MemoryStore()
    key, record = new_key("default", SCOPES, 1.0)
    await store.add_key(record)
    twin = f"{key[:-1]}{'1' if key[-1] == '0' else '0'}"
    with pytest.raises(KeyRefused, match=record.key_id):
        await make_known(store, record_of(twin, "default", SCOPES, 1.0))
    assert await store.keys() == [record]
