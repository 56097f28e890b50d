"""The versions of adapters that the engine has loaded, and the folder with their files."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.engine.adapter_archives import unpack
from service.engine.adapters import AdapterFiles, AdapterRefused, Limits, adopt, check_kept
from service.engine.base import Adapter, Engine
from service.trajectory import StoredVersion

Key = tuple[str, str]
"""A version: name and digest."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The base model, or the base model with a version of an adapter, which the engine has loaded.

    name: that of the base model, or of the adapter.
    version: identifies the weights, including those of the adapter.
    adapter, stored: None for the base model.
    """

    name: str
    version: str
    adapter: Adapter | None = None
    stored: StoredVersion | None = None

    @property
    def digest(self) -> str | None:
        """Identifies the adapter's files; None for the base model."""
        return self.stored and self.stored.digest


class LoadedAdapters:
    """Loads versions of adapters into one engine, each once.

    The engine itself evicts adapters that were not used for long, and reads their files again when they are used.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        """`folder` contains the files of each version in a folder that is named by its digest."""
        self._engine = engine
        self._folder = folder
        self._loaded: dict[Key, Policy] = {}
        self._loading = asyncio.Lock()

    @property
    def are_supported(self) -> bool:
        return self._engine.info.max_lora_rank > 0

    @property
    def keys(self) -> set[Key]:
        """The versions that are loaded."""
        return set(self._loaded)

    def get(self, key: Key) -> Policy | None:
        """Returns the version if it is loaded."""
        return self._loaded.get(key)

    def version_of(self, digest: str) -> str:
        """Returns the `policy_version` of an adapter with the base model that is served."""
        return hashlib.sha256(f"{self._engine.info.version}:{digest}".encode()).hexdigest()[:12]

    async def load(self, stored: StoredVersion, *, is_checked: bool = False) -> Policy:
        """Loads a version, unless it is loaded.

        is_checked: whether its files were checked since this engine was started.

        Raises AdapterRefused, EngineUnavailable.
        """
        async with self._loading:
            if policy := self._loaded.get(stored.key):
                return policy
            if not self.are_supported:
                raise AdapterRefused("adapters are disabled (EPISODIC_ADAPTERS)")
            if not is_checked:
                await asyncio.to_thread(partial(check_kept, self._folder, stored.digest, **self._limits()))
            version = self.version_of(stored.digest)
            adapter = Adapter(stored.reference, version, str(self._folder / stored.digest), stored.rank)
            await self._engine.load_adapter(adapter)
            policy = self._loaded[stored.key] = Policy(stored.name, version, adapter, stored)
            return policy

    async def unload(self, key: Key) -> None:
        """Unloads a version, if it is loaded. Acts in flight complete."""
        policy = self._loaded.pop(key, None)
        if policy and policy.adapter:
            await self._engine.unload_adapter(policy.adapter)

    async def adopted(self, source: Path) -> AdapterFiles:
        """Copies the adapter in the folder `source`, and checks it. Raises AdapterRefused."""
        try:
            return await asyncio.to_thread(partial(adopt, source, self._folder, **self._limits()))
        except OSError as error:
            raise AdapterRefused(f"the adapter's files cannot be copied: {error.strerror}") from error

    async def unpacked(self, archive: Path) -> AdapterFiles:
        """Like `adopted`, with the adapter in a tar archive, whose file is deleted."""
        source = archive.with_name("adapter")
        try:
            await asyncio.to_thread(_unpack, archive, source)
        except OSError as error:
            raise AdapterRefused(f"the adapter's files cannot be written: {error.strerror}") from error
        return await self.adopted(source)

    @asynccontextmanager
    async def scratch(self) -> AsyncGenerator[Path]:
        """Creates a folder for an upload, beside the files of the versions, and deletes it at the end."""
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=".upload-", dir=self._folder))
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def files_of(self, stored: StoredVersion) -> AdapterFiles:
        """Returns the files of a version that was loaded."""
        return AdapterFiles(self._folder / stored.digest, stored.digest, stored.rank)

    def _limits(self) -> Limits:
        return {"base": self._engine.info.weight_shapes, "max_rank": self._engine.info.max_lora_rank}


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    unpack(archive, folder)
    archive.unlink()
