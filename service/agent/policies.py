"""Manages the policies: the base model, and versions of LoRA adapters, which aliases point to.

The store has the versions and the aliases. Replicas share it, and each reads it again once it has changed. A version is
loaded into the engine when an alias points to it, or else when an episode first needs it.
"""

import asyncio
import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from service.agent.loaded_adapters import LoadedAdapters, Policy
from service.agent.policy_names import PolicyUnknown, resolve
from service.engine.adapters import AdapterFiles, AdapterRefused
from service.engine.base import Engine, EngineUnavailable
from service.errors import Conflict, NotFound, Unprocessable
from service.observability import logs
from service.settings import policy_name
from service.store.base import Store, StoreUnavailable
from service.trajectory import Catalog, StoredVersion

_log = logs.get(__name__)

_STORE_RETRY_S = 1.0
SYNC_S = 1.0
"""Seconds between two looks at whether another replica has changed the policies."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from. None leaves what is stored."""

    parent: str | None = None
    round: int | None = None
    evaluation: str | None = None


class Policies:
    """The policies of one engine.

    source: the folder from which adapters may be loaded; None if there is none.
    kept: the folder for copies of the loaded adapters.
    aliases: further names of the base model.
    default: the policy of new episodes that name none, unless the store has another one; None for the base model.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        source: Path | None = None,
        kept: Path = Path("adapters"),
        aliases: Iterable[str] = (),
        default: str | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._source = source
        self._adapters = LoadedAdapters(engine, kept)
        self.base = Policy(engine.info.model, engine.info.version)
        self._base_names = {self.base.name, *aliases}
        self._default = self.base.name if default is None or default in self._base_names else default
        self._catalog, self._marks = Catalog(), object()
        self._ready: dict[tuple[str, str | None], Policy] = {}
        self._changing = asyncio.Lock()

    @property
    def catalog(self) -> Catalog:
        """The stored policies, as they were read last."""
        return self._catalog

    @property
    def default(self) -> str:
        """The policy of new episodes that name none."""
        return self._catalog.default or self._default

    def __iter__(self) -> Iterator[Policy]:
        """Yields the base model, and the version of each alias that is loaded."""
        pointed = (self._adapters.get(key) for key in sorted(self._catalog.aliases.items()))
        return iter([self.base, *(policy for policy in pointed if policy)])

    @property
    def listing(self) -> str:
        """The names of the policies, for error messages; at most 20."""
        names = [policy.name for policy in self]
        return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")

    def version_of(self, digest: str) -> str:
        """Returns the `policy_version` of an adapter with the base model that is served."""
        return self._adapters.version_of(digest)

    def ready(self, name: str, pin: str | None) -> Policy | None:
        """Returns what `get` returns, if it is known and loaded."""
        return self._ready.get((name, pin))

    async def get(self, name: str, pin: str | None = None) -> Policy:
        """Returns the policy of an episode, and loads it if necessary.

        name: the name of the base model, an alias, or `name@digest`.
        pin: what identifies the version of the episode; see `EpisodeConfig.policy_pin`. None for the current version.

        Raises PolicyUnknown, and EngineUnavailable if the version cannot be loaded now.
        """
        if policy := self._ready.get((name, pin)):
            return policy
        catalog = self._catalog
        policy = self.base if name in self._base_names else await self._serving(await self._find(name, pin))
        if catalog is self._catalog:  # otherwise the alias may have moved while the version was loaded
            self._ready[name, pin] = policy
        return policy

    async def _find(self, name: str, pin: str | None) -> StoredVersion:
        """Finds the version of an episode. Reads the store if this replica does not know it."""
        try:
            return resolve(self._catalog, name, pin, self.listing)
        except PolicyUnknown:
            await self.refresh()
            return resolve(self._catalog, name, pin, self.listing)

    async def _serving(self, stored: StoredVersion) -> Policy:
        """Returns the policy of a version, and loads it into the engine at the first call. Raises EngineUnavailable."""
        if policy := self._adapters.get(stored.key):
            return policy
        try:
            policy = await self._adapters.load(stored)
        except AdapterRefused as error:
            raise EngineUnavailable(f"the policy {stored.reference!r} cannot be loaded: {error}") from error
        self._show()
        return policy

    async def restore(self) -> None:
        """Loads the versions that the stored aliases point to. One that cannot be loaded is logged and skipped.

        Waits while the store is unavailable, because without it no act can be served either.
        """
        while True:
            try:
                await self.refresh()
                return await self._check_default()
            except StoreUnavailable as error:
                _log.error("store_unavailable", reason=str(error))
                await asyncio.sleep(_STORE_RETRY_S)

    async def _check_default(self) -> None:
        """Logs a warning if the default policy is not served."""
        try:
            await self.get(self.default)
        except (PolicyUnknown, EngineUnavailable) as error:
            _log.warning("default_policy_not_served", policy=policy_name(self.default), reason=str(error))

    async def follow(self) -> None:
        """Reads the policies again whenever another replica has changed them, until it is cancelled."""
        while True:
            await asyncio.sleep(SYNC_S)
            try:
                if await self._store.catalog_marks() != self._marks:
                    await self.refresh()
            except (StoreUnavailable, EngineUnavailable):
                pass  # acts report it
            except Exception:  # noqa: BLE001 - this task must not end while the service runs
                _log.exception("policies_not_read")

    async def refresh(self) -> None:
        """Reads the policies from the store. Loads the versions that aliases point to, and unloads removed ones.

        Raises StoreUnavailable.
        """
        async with self._changing:
            marks = await self._store.catalog_marks()
            await self._take(await self._store.catalog())
            self._marks = marks

    async def _take(self, catalog: Catalog) -> None:
        """Replaces the catalog by a newer one."""
        is_moved = (catalog.aliases, len(catalog.versions)) != (self._catalog.aliases, len(self._catalog.versions))
        self._catalog = catalog
        self._ready.clear()
        for key in self._adapters.keys:
            if catalog.find(key) is None:
                await self._adapters.unload(key)
        for key in catalog.aliases.items() if is_moved else ():
            await self._load_or_log(catalog.find(key))
        self._show()

    async def _load_or_log(self, version: StoredVersion | None) -> None:
        assert version is not None  # the catalog has the version of each alias
        if not self._adapters.are_supported:
            _log.warning("adapter_not_served", policy=version.name)
            return
        try:
            await self._adapters.load(version)
        except AdapterRefused as error:
            _log.error("adapter_load_failed", policy=version.reference, reason=str(error))

    def _show(self) -> None:
        adapters = {policy.name: policy.adapter for policy in self if policy.adapter}
        self._engine.show_adapters(adapters)

    async def load(self, name: str, path: str, lineage: Lineage, *, move_alias: bool) -> tuple[Policy, bool]:
        """Loads an adapter as a version of this name. Acts in flight and pinned episodes are not affected.

        path: the adapter's folder, relative to `source`.
        move_alias: whether the name points to this version from now on.

        Returns the policy, and whether the alias is new, or without `move_alias` the version. Raises Unprocessable,
        EngineUnavailable, StoreUnavailable.
        """
        self.check_name(name)
        if self._source is None:
            detail = "there is no folder of adapters to load from; set EPISODIC_ADAPTERS to one"
            raise Unprocessable(detail, "path")
        folder = _below(self._source, path)
        with _refused("path"):
            return await self._add(name, await self._adapters.adopted(folder), lineage, move_alias=move_alias)

    def scratch(self) -> AbstractAsyncContextManager[Path]:
        """Returns a context manager that creates a folder for an upload, and deletes it at the end."""
        return self._adapters.scratch()

    async def load_archive(
        self, name: str, archive: Path, lineage: Lineage, *, move_alias: bool
    ) -> tuple[Policy, bool]:
        """Like `load`, with an adapter in a tar archive in a `scratch` folder."""
        self.check_name(name)
        with _refused("body"):
            return await self._add(name, await self._adapters.unpacked(archive), lineage, move_alias=move_alias)

    async def point(self, name: str, reference: str, lineage: Lineage, *, move_alias: bool) -> tuple[Policy, bool]:
        """Like `load`, with the files of a version that is stored. It may belong to another name."""
        self.check_name(name)
        try:
            if "@" not in reference:
                raise PolicyUnknown(f"{reference[:200]!r} is no version: write NAME@DIGEST")
            found = await self._find(reference, None)
        except PolicyUnknown as error:
            raise Unprocessable(str(error), "version") from error
        await self._serving(found)
        with _refused("version"):
            return await self._add(name, self._adapters.files_of(found), lineage, move_alias=move_alias)

    async def roll_back(self, name: str) -> Policy:
        """Lets an alias point to the version before the current one. Raises NotFound, Conflict, StoreUnavailable."""
        async with self._changing:
            await self._take(await self._store.catalog())
            if name not in self._catalog.aliases:
                raise self._not_found(name)
            stored = await self._store.roll_back(name)
            if stored is None:
                detail = f"The policy {name!r} has no earlier version to roll back to. GET /policy shows `previous`."
                raise Conflict("no_previous_version", detail)
            await self._take(await self._store.catalog())
        _log.info("policy_moved", policy=name, version=stored.reference, rolled_back=True)
        return await self._serving(stored)

    async def set_default(self, name: str | None) -> None:
        """Chooses the policy of new episodes that name none; None leaves it to the settings.

        Raises Unprocessable, EngineUnavailable, StoreUnavailable.
        """
        if name is not None:
            try:
                policy = await self.get(name)
            except PolicyUnknown as error:
                raise Unprocessable(str(error), "policy") from error
            name = name if policy.adapter else policy.name
        async with self._changing:
            await self._store.set_default_policy(name)
            await self._take(await self._store.catalog())

    async def remove(self, name: str) -> None:
        """Removes an alias. Its versions stay.

        Raises NotFound, Conflict for the default policy, Unprocessable for the base model, StoreUnavailable.
        """
        if name in self._base_names:
            raise Unprocessable(f"{name!r} is the base model and cannot be removed", "name")
        async with self._changing:
            await self._take(await self._store.catalog())
            if name == self.default and name in self._catalog.aliases:
                detail = f"The policy {name!r} is the default of new episodes. Choose another default first."
                raise Conflict("policy_in_use", detail)
            is_removed = await self._store.delete_alias(name)
            await self._take(await self._store.catalog())
        if not is_removed:
            raise self._not_found(name)

    def _not_found(self, name: str) -> NotFound:
        return NotFound("policy_not_found", f"There is no policy {name!r}. The policies are {self.listing}.")

    def check_name(self, name: str) -> None:
        """Checks whether an adapter may be loaded under this name. Raises Unprocessable."""
        if not self._adapters.are_supported:
            detail = "adapters are disabled; set EPISODIC_ADAPTERS to the folder that contains them"
            raise Unprocessable(detail, "name")
        if name in self._base_names:
            raise Unprocessable(f"{name!r} is a name of the base model; choose another name", "name")

    async def _add(self, name: str, files: AdapterFiles, lineage: Lineage, *, move_alias: bool) -> tuple[Policy, bool]:
        """Loads an adapter, stores it as a version, and moves the alias. Raises AdapterRefused."""
        version = self.version_of(files.digest)
        given = StoredVersion(name, files.digest, version, files.rank, time.time(), **asdict(lineage))
        async with self._changing:
            before = self._catalog
            stored = await self._put(given, move_alias=move_alias)
        if move_alias and before.aliases.get(name) != stored.digest:
            _log.info("policy_moved", policy=name, version=stored.reference, rolled_back=False)
        is_new = name not in before.aliases if move_alias else before.find(stored.key) is None
        return await self._serving(stored), is_new

    async def _put(self, given: StoredVersion, *, move_alias: bool) -> StoredVersion:
        """Loads a version and stores it. One that cannot be stored is unloaded: a restart would not load it."""
        was_loaded = self._adapters.get(given.key) is not None
        await self._adapters.load(self._catalog.find(given.key) or given, is_checked=True)
        try:
            stored = await self._store.put_version(given, move_alias=move_alias)
            await self._take(await self._store.catalog())
        except BaseException:
            if not was_loaded:
                await self._adapters.unload(given.key)
            raise
        return stored


@contextlib.contextmanager
def _refused(field: str) -> Generator[None]:
    """Turns the refusal of an adapter into that of a request field."""
    try:
        yield
    except AdapterRefused as error:
        raise Unprocessable(str(error), field) from error


def _below(source: Path, path: str) -> Path:
    """Returns the folder `path` below `source`. Raises Unprocessable if there is no such folder."""
    root = source.resolve()
    with contextlib.suppress(OSError, ValueError):  # the path is too long, or contains a NUL
        folder = (root / path).resolve()
        if folder.is_relative_to(root) and folder.is_dir():
            return folder
    raise Unprocessable(f"there is no folder {path[:200]!r} in EPISODIC_ADAPTERS", "path")
