"""Manages the policies: the base model, and LoRA adapters that are loaded, replaced and removed at run time."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.engine.adapters import AdapterRefused, adopt
from service.engine.base import Adapter, Engine, EngineUnavailable
from service.errors import NotFound, Unprocessable
from service.observability import logs
from service.settings import policy_name
from service.store.base import Store, StoreUnavailable
from service.trajectory import StoredPolicy

_log = logs.get(__name__)

_STORE_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The base model, or the base model with an adapter.

    version: identifies the weights, including those of the adapter.
    adapter: None for the base model.
    loaded_at: Unix seconds; None for the base model.
    """

    name: str
    version: str
    adapter: Adapter | None = None
    loaded_at: float | None = None


class Policies:
    """The policies of one engine.

    source: the folder from which adapters are loaded; None disables adapters.
    kept: the folder for copies of the loaded adapters.
    aliases: further names of the base model.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        source: Path | None = None,
        kept: Path = Path("adapters"),
        aliases: Iterable[str] = (),
    ) -> None:
        self._engine = engine
        self._store = store
        self._source = source
        self._kept = kept
        self._base = Policy(engine.info.model, engine.info.version)
        self._base_names = {self._base.name, *aliases}
        self._adapters: dict[str, Policy] = {}
        self._changing = asyncio.Lock()

    def __iter__(self) -> Iterator[Policy]:
        return iter([self._base, *self._adapters.values()])

    @property
    def base(self) -> Policy:
        return self._base

    def get(self, name: str) -> Policy:
        """Returns the policy with this name. Raises EngineUnavailable if it is not, or no longer, served."""
        if name in self._base_names:
            return self._base
        if name not in self._adapters:
            shown = policy_name(name)
            raise EngineUnavailable(
                f"the policy {shown!r} of the episode is not served; GET /policy lists the policies"
            )
        return self._adapters[name]

    @property
    def listing(self) -> str:
        """The names of the policies, for error messages; at most 20."""
        names = [policy.name for policy in self]
        return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")

    def __contains__(self, name: str) -> bool:
        return name in self._base_names or name in self._adapters

    async def restore(self) -> None:
        """Loads the adapters that are in the store. One that cannot be loaded is logged and skipped.

        Waits while the store is unavailable, because without it no act can be served either.
        """
        for record in await self._stored():
            if self._source is None:
                _log.warning("adapter_not_served", policy=record.name)
                continue
            try:
                checked = await self._copy_checked(record.name, self._kept / record.digest, record.loaded_at)
                self._adapters[record.name] = await self._load(checked)
            except AdapterRefused as error:
                _log.error("adapter_load_failed", policy=record.name, reason=str(error))

    async def _stored(self) -> list[StoredPolicy]:
        while True:
            try:
                return await self._store.policies()
            except StoreUnavailable as error:
                _log.error("store_unavailable", reason=str(error))
                await asyncio.sleep(_STORE_RETRY_S)

    async def load(self, name: str, path: str) -> tuple[Policy, bool]:
        """Loads an adapter, or replaces the one with this name. Acts in flight complete with the previous weights.

        path: the adapter's folder, relative to `source`.

        Returns the policy, and whether its name is new. Raises Unprocessable, EngineUnavailable, StoreUnavailable.
        """
        if self._source is None:
            raise Unprocessable("adapters are disabled; set EPISODIC_ADAPTERS to the folder that contains them", "path")
        if name in self._base_names:
            raise Unprocessable(f"{name!r} is a name of the base model; choose another name", "name")
        folder = _below(self._source, path)
        async with self._changing:
            try:
                record = await self._copy_checked(name, folder, time.time())
                known = self._adapters.get(name)
                if known and known.version == record.version:
                    return known, False
                policy = await self._load(record)
            except AdapterRefused as error:
                raise Unprocessable(str(error), "path") from error
            try:
                await self._store.put_policy(record)
            except BaseException:
                await self._unload(policy)  # an adapter that is not stored would be missing after a restart
                raise
            self._adapters[name] = policy
            if known:
                await self._unload(known)
        return policy, known is None

    async def remove(self, name: str) -> None:
        """Removes an adapter. Raises NotFound, Unprocessable for the base model, StoreUnavailable."""
        if name in self._base_names:
            raise Unprocessable(f"{name!r} is the base model and cannot be removed", "name")
        async with self._changing:
            policy = self._adapters.get(name)
            if policy is None:
                raise NotFound("policy_not_found", f"There is no policy {name!r}. The policies are {self.listing}.")
            await self._store.delete_policy(name)
            del self._adapters[name]
            await self._unload(policy)

    async def _copy_checked(self, name: str, folder: Path, loaded_at: float) -> StoredPolicy:
        """Copies the adapter and checks it against the base model, which may have changed since the last start."""
        info = self._engine.info
        try:
            shapes, max_rank = info.weight_shapes, info.max_lora_rank
            found = await asyncio.to_thread(adopt, folder, self._kept, base=shapes, max_rank=max_rank)
        except OSError as error:
            raise AdapterRefused(f"the adapter's files cannot be copied: {error.strerror}") from error
        version = hashlib.sha256(f"{info.version}:{found.digest}".encode()).hexdigest()[:12]
        return StoredPolicy(name, found.digest, version, found.rank, loaded_at)

    async def _load(self, record: StoredPolicy) -> Policy:
        adapter = Adapter(record.name, record.version, str(self._kept / record.digest), record.rank)
        await self._engine.load_adapter(adapter)
        return Policy(record.name, record.version, adapter, record.loaded_at)

    async def _unload(self, policy: Policy) -> None:
        assert policy.adapter is not None
        await self._engine.unload_adapter(policy.adapter)


def _below(source: Path, path: str) -> Path:
    """Returns the folder `path` below `source`. Raises Unprocessable if there is no such folder."""
    root = source.resolve()
    with contextlib.suppress(OSError, ValueError):  # the path is too long, or contains a NUL
        folder = (root / path).resolve()
        if folder.is_relative_to(root) and folder.is_dir():
            return folder
    raise Unprocessable(f"there is no folder {path[:200]!r} in EPISODIC_ADAPTERS", "path")
