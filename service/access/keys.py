"""API keys: creates keys, computes the records that the store keeps of them, and looks up valid keys."""

import asyncio
import hashlib
import hmac
import math
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
FRESH_S = 1.0
"""Maximum age in seconds of the cached keys while the store answers."""
STALE_S = 300.0
"""Maximum age in seconds of the cached keys while the store does not answer."""
_WAIT_S = 2.0
"""Maximum time in seconds that a call waits for the keys if the cached ones cannot answer it."""
_SHORT_WAIT_S = 0.2
"""The same if the cached keys can answer it. The store usually answers within this time."""


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
    """Caches the keys of the store, and reads them again in the background.

    While the store answers, a revoked key is refused after at most FRESH_S and the time that reading the keys takes. If
    the store fails or does not answer, known keys stay valid for at most STALE_S after the last successful read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, StoredKey] = {}
        self._read_at = -math.inf
        self._retry_at = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._is_failing = False

    async def exists(self) -> bool:
        """Returns whether a key was ever created, even if it is revoked. Raises StoreUnavailable if that is unknown.

        Without any key the service accepts every local caller. Revoking the last key must not bring that back.
        """
        await self._refresh(self._is_usable)
        if not self._is_usable:
            raise StoreUnavailable("the API keys cannot be read")
        return bool(self._keys)

    async def find(self, key: str) -> StoredKey | None:
        """Returns the record of a valid key; None for any other text.

        Raises StoreUnavailable if the store does not answer and the key is not among the last known ones.
        """
        named = _KEY.fullmatch(key)
        if named is None:
            return None
        await self._refresh(self._is_usable and named[1] in self._keys)
        record = self._keys.get(named[1]) if self._is_usable else None
        if record is None and not self._is_fresh:
            raise StoreUnavailable("the API key is not among the last known ones, and the keys cannot be read")
        if record is None or record.revoked_at is not None:
            return None
        return record if hmac.compare_digest(record.digest, digest(key)) else None

    @property
    def _is_fresh(self) -> bool:
        return time.monotonic() < self._read_at + FRESH_S

    @property
    def _is_usable(self) -> bool:
        return time.monotonic() < self._read_at + STALE_S

    async def _refresh(self, is_known: bool) -> None:
        """Reads the keys again if the cache is too old, and waits for the result.

        `is_known`: whether the cache is enough to answer. Then the wait is short, and there is none while the store
        fails.
        """
        if self._is_fresh:
            return
        if self._reading is None and (not is_known or time.monotonic() >= self._retry_at):
            self._reading = asyncio.create_task(self._read(), name="api-keys")
        reading = self._reading
        if reading is None or (is_known and self._is_failing):
            return
        await asyncio.wait({reading}, timeout=_SHORT_WAIT_S if is_known else _WAIT_S)
        if not reading.done():
            self._is_failing = True

    async def _read(self) -> None:
        try:
            self._keys = {record.key_id: record for record in await self._store.keys()}
            self._read_at, self._is_failing = time.monotonic(), False
        except StoreUnavailable as error:
            self._is_failing, self._retry_at = True, time.monotonic() + FRESH_S
            _log.warning("api_keys_refresh_failed", reason=str(error))
        except Exception:  # noqa: BLE001 - a bug must be seen in the log, and the known keys stay valid
            self._is_failing, self._retry_at = True, time.monotonic() + FRESH_S
            _log.exception("api_keys_refresh_failed")
        finally:
            self._reading = None
