"""API keys: creates keys, computes the records that the store keeps of them, and looks up valid keys."""

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
"""Pattern of the names of tenants."""

_PREFIX = "ek"
_KEY = re.compile(rf"{_PREFIX}_([0-9a-f]{{16}})_[0-9a-f]{{64}}")
_FRESH_S = 1.0


class KeyRefused(Exception):
    """The key cannot be added to the store. The message does not contain the key."""


def new_key(tenant: str, scopes: Sequence[Scope], now: float) -> tuple[str, StoredKey]:
    """Creates a key. Returns the key, which must be shown once and not stored, and its record for the store."""
    key = f"{_PREFIX}_{secrets.token_hex(8)}_{secrets.token_hex(32)}"
    return key, record_of(key, tenant, scopes, now)


def record_of(key: str, tenant: str, scopes: Sequence[Scope], now: float) -> StoredKey:
    """Returns the record of a key for the store. Raises KeyRefused if the key does not have the format of `new_key`."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise KeyRefused("invalid key format; use a key that `episodic keys new` prints")
    return StoredKey(found[1], digest(key), tenant, tuple(scopes), now)


async def make_known(store: Store, record: StoredKey) -> None:
    """Adds a key to the store if it is missing. Replicas that start at the same time may all add the same key.

    A revoked key stays revoked. Raises KeyRefused if another key has the same public id, StoreUnavailable.
    """
    known = await _stored_key(store, record.key_id)
    if known is None:
        try:
            return await store.add_key(record)
        except StoreUnavailable:  # it is also raised if another replica has added the key meanwhile
            known = await _stored_key(store, record.key_id)
            if known is None:
                raise
    if not hmac.compare_digest(known.digest, record.digest):
        raise KeyRefused(f"the store has another key with the public id {record.key_id}; create a new key")
    if known.revoked_at is not None:
        _log.warning("admin_key_revoked", key_id=record.key_id)


async def _stored_key(store: Store, key_id: str) -> StoredKey | None:
    return next((record for record in await store.keys() if record.key_id == key_id), None)


def digest(key: str) -> bytes:
    """Returns the SHA-256 digest of a key, 32 bytes.

    A fast digest is safe, because a key has 256 random bits and cannot be guessed. A slow one, as passwords need, would
    only delay each call.
    """
    return hashlib.sha256(key.encode()).digest()


class Keyring:
    """Caches the keys of the store for one second. So a revoked key is accepted for at most one more second."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, StoredKey] | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    async def exists(self) -> bool:
        """Returns whether a key was ever created, even if it is revoked.

        Without any key the service accepts every local caller. Revoking the last key must not bring that back.
        """
        return bool(await self._fresh())

    async def find(self, key: str) -> StoredKey | None:
        """Returns the record of a valid key; None for any other text."""
        prefix, _, rest = key.partition("_")
        record = (await self._fresh()).get(rest.partition("_")[0]) if prefix == _PREFIX else None
        if record is None or record.revoked_at is not None:
            return None
        return record if hmac.compare_digest(record.digest, digest(key)) else None

    async def _fresh(self) -> dict[str, StoredKey]:
        """Returns the keys by id, read again if the cached ones are too old.

        If the store is unavailable, the last keys stay in use. Raises StoreUnavailable if there are none.
        """
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
