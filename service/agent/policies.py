"""Owns the policies: the base model and its LoRA adapters, which are loaded, replaced and removed while it serves."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.engine.adapters import AdapterRefused, adopt
from service.engine.base import Adapter, Engine, EngineUnavailable
from service.errors import NotFound, Unprocessable
from service.observability import logs
from service.store.base import Store
from service.trajectory import StoredPolicy

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What acts: the base model (`adapter` None), or it with an adapter."""

    name: str
    version: str
    adapter: Adapter | None = None
    loaded_at: float | None = None


class Policies:
    """The policies of one engine. Adapters come from `source`, unset: none do; their copies are kept in `kept`."""

    def __init__(
        self, engine: Engine, store: Store, *, source: Path | None = None, kept: Path = Path("adapters")
    ) -> None:
        self._engine = engine
        self._store = store
        self._source = source
        self._kept = kept
        self._base = Policy(engine.info.model, engine.info.version)
        self._adapters: dict[str, Policy] = {}
        self._changing = asyncio.Lock()

    def __iter__(self) -> Iterator[Policy]:
        return iter([self._base, *self._adapters.values()])

    @property
    def base(self) -> Policy:
        return self._base

    def get(self, name: str) -> Policy:
        """Raises EngineUnavailable for a policy that is not served (any more)."""
        if name == self._base.name:
            return self._base
        if name not in self._adapters:
            raise EngineUnavailable(f"the episode belongs to the policy {name!r}, which is not served here")
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name == self._base.name or name in self._adapters

    async def restore(self) -> None:
        """Loads the adapters that were there when the service was last up; one that cannot be is logged and left."""
        for record in await self._store.policies():
            if self._source is None:
                _log.warning("adapter_not_served", policy=record.name)
                continue
            try:
                checked = await self._adopted(record.name, self._kept / record.digest, record.loaded_at)
                self._adapters[record.name] = await self._load(checked)
            except AdapterRefused as error:
                _log.error("adapter_load_failed", policy=record.name, reason=str(error))

    async def load(self, name: str, path: str) -> tuple[Policy, bool]:
        """Loads or replaces an adapter from a folder below the source; returns it and whether its name is new. Acts in
        flight end under the weights they began with. Raises Unprocessable."""
        if self._source is None:
            raise Unprocessable("adapters are off: name their folder in EPISODIC_ADAPTERS", "path")
        if name == self._base.name:
            raise Unprocessable(f"{name!r} is the base model", "name")
        folder = _below(self._source, path)
        async with self._changing:
            try:
                record = await self._adopted(name, folder, time.time())
                known = self._adapters.get(name)
                if known and known.version == record.version:
                    return known, False
                policy = await self._load(record)
            except AdapterRefused as error:
                raise Unprocessable(str(error), "path") from error
            try:
                await self._store.put_policy(record)
            except BaseException:
                await self._unload(policy)  # what is not kept is not served: it would be gone at the next start
                raise
            self._adapters[name] = policy
            if known:
                await self._unload(known)
        return policy, known is None

    async def remove(self, name: str) -> None:
        """Raises NotFound, Unprocessable for the base model."""
        if name == self._base.name:
            raise Unprocessable(f"{name!r} is the base model", "name")
        async with self._changing:
            policy = self._adapters.get(name)
            if policy is None:
                raise NotFound("policy_not_found", f"There is no policy {name!r}.")
            await self._store.delete_policy(name)
            del self._adapters[name]
            await self._unload(policy)

    async def _adopted(self, name: str, folder: Path, loaded_at: float) -> StoredPolicy:
        """Checked against the base model that is served now, which may be another than when it was first loaded."""
        info = self._engine.info
        try:
            shapes, max_rank = info.weight_shapes, info.max_lora_rank
            found = await asyncio.to_thread(adopt, folder, self._kept, base=shapes, max_rank=max_rank)
        except OSError as error:
            raise AdapterRefused(f"its files cannot be copied: {error.strerror}") from error
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
    """The folder of this path among the adapters. Raises Unprocessable."""
    root = source.resolve()
    with contextlib.suppress(OSError, ValueError):  # too long a name, a NUL in it
        folder = (root / path).resolve()
        if folder.is_relative_to(root) and folder.is_dir():
            return folder
    raise Unprocessable(f"there is no folder {path[:200]!r} among the adapters", "path")
