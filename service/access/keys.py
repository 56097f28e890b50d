"""Owns API keys: how one is made, what is kept of it, and which of the store's are valid now."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from typing import Literal, get_args

from service.observability import logs
from service.store.base import Store, StoreUnavailable
from service.trajectory import StoredKey

_log = logs.get(__name__)

Scope = Literal["act", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
TENANT = r"[a-z0-9][a-z0-9_-]{0,63}"
"""What a tenant may be called."""

_PREFIX = "ek"
_KEY = re.compile(rf"{_PREFIX}_([0-9a-f]{{16}})_[0-9a-f]{{64}}")
_FRESH_S = 1.0


class KeyRefused(Exception):
    """A key that cannot be made known; the message does not hold it."""


def new_key(tenant: str, scopes: Sequence[Scope], now: float) -> tuple[str, StoredKey]:
    """A key to hand out, shown once, and what the store keeps of it."""
    key = f"{_PREFIX}_{secrets.token_hex(8)}_{secrets.token_hex(32)}"
    return key, record_of(key, tenant, scopes, now)


def record_of(key: str, tenant: str, scopes: Sequence[Scope], now: float) -> StoredKey:
    """What the store keeps of a key. Raises KeyRefused for one that `new_key` cannot have made."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise KeyRefused("it is not of the form that `episodic keys new` prints")
    return StoredKey(found[1], digest(key), tenant, tuple(scopes), now)


async def make_known(store: Store, record: StoredKey) -> None:
    """Adds a key that was made elsewhere, unless it is there; replicas that start together may all call it. One that
    was revoked stays so. Raises KeyRefused if another key has its public id, StoreUnavailable."""
    known = await _kept(store, record.key_id)
    if known is None:
        try:
            return await store.add_key(record)
        except StoreUnavailable:  # or another replica was first
            known = await _kept(store, record.key_id)
            if known is None:
                raise
    if not hmac.compare_digest(known.digest, record.digest):
        raise KeyRefused(f"another key has the public id {record.key_id}")
    if known.revoked_at is not None:
        _log.warning("admin_key_revoked", key_id=record.key_id)


async def _kept(store: Store, key_id: str) -> StoredKey | None:
    return next((record for record in await store.keys() if record.key_id == key_id), None)


def digest(key: str) -> bytes:
    """SHA-256, 32 bytes. A key holds 256 random bits, so nobody finds it by trying, however fast the digest is; a slow
    one, as passwords need, would only slow down each call."""
    return hashlib.sha256(key.encode()).digest()


class Keyring:
    """The store's keys in memory, read again when they are a second old: so long may a revoked key still serve."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, StoredKey] | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    async def exists(self) -> bool:
        """Whether a key was ever made. A revoked one counts: to revoke the last key must not open the door."""
        return bool(await self._fresh())

    async def find(self, key: str) -> StoredKey | None:
        """The record of a valid key; None for any other text."""
        prefix, _, rest = key.partition("_")
        record = (await self._fresh()).get(rest.partition("_")[0]) if prefix == _PREFIX else None
        if record is None or record.revoked_at is not None:
            return None
        return record if hmac.compare_digest(record.digest, digest(key)) else None

    async def _fresh(self) -> dict[str, StoredKey]:
        """Raises StoreUnavailable if the keys were never read; later on the last ones serve while the store cannot."""
        if self._keys is not None and time.monotonic() < self._read_at + _FRESH_S:
            return self._keys
        async with self._reading:
            if self._keys is None or time.monotonic() >= self._read_at + _FRESH_S:
                await self._read()
        assert self._keys is not None
        return self._keys

    async def _read(self) -> None:
        try:
            self._keys = {record.key_id: record for record in await self._store.keys()}
        except StoreUnavailable as error:
            if self._keys is None:
                raise
            _log.warning("api_keys_refresh_failed", reason=str(error))
        self._read_at = time.monotonic()
