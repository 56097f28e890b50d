"""Failures of a SQLite file: what is refused at the start and with which message, locks, and recovery."""

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from service.store.base import StoreRefused, StoreUnavailable
from service.store.connections import Patience
from service.store.sql import SQLStore
from tests.store.test_stores import commit, record

ROOT = Path(__file__).parents[2]
IMPATIENT = Patience(lock_s=0.05)


def file(folder: Path) -> Path:
    return folder / "episodic.db"


def stored(folder: Path, patience: Patience = IMPATIENT) -> SQLStore:
    return SQLStore(f"sqlite:///{file(folder)}", patience=patience)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLStore]:
    async with stored(tmp_path) as opened:
        yield opened


async def filled(folder: Path) -> bytes:
    """Makes a store with a hundred steps. Returns the bytes of its file."""
    store = stored(folder)
    await store.open()
    await store.create(record())
    for index in range(100):
        await store.commit(commit(index))
    await store.close()
    return file(folder).read_bytes()


async def test_the_folder_is_made(tmp_path: Path):
    store = stored(tmp_path / "made" / "on the way")
    await store.open()
    await store.create(record())
    await store.close()


async def test_a_commit_is_on_disk_when_it_returns(store: SQLStore, tmp_path: Path):
    """Another process can read it at once, and the write-ahead log is synced, so that it survives a power cut."""
    await store.create(record())
    await store.commit(commit(0))
    with sqlite3.connect(file(tmp_path)) as other:
        assert other.execute("SELECT count(*) FROM steps").fetchone() == (1,)
    other.close()
    for name, value in (("journal_mode", "wal"), ("synchronous", 2)):
        statement = f"PRAGMA {name}"
        setting = await store._connections.write(
            lambda connection, statement=statement: connection.exec_driver_sql(statement).scalar()
        )
        assert setting == value


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "not a database": lambda _: b"this is not a database" * 100,
    "truncated": lambda data: data[: len(data) // 2],
    "truncated in the header": lambda data: data[:50],
    "overwritten": lambda data: data[:8192] + b"\xff" * 8192 + data[16384:],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damaged_file_is_refused_with_recovery_command(tmp_path: Path, damage: str):
    data = await filled(tmp_path)
    file(tmp_path).write_bytes(DAMAGES[damage](data))
    damaged = file(tmp_path).read_bytes()
    with pytest.raises(StoreRefused, match=r"episodic\.db.*Restore a backup.*sqlite3 .*episodic\.db \.recover"):
        await stored(tmp_path).open()
    assert file(tmp_path).read_bytes() == damaged, "the file is not changed, so that it can be recovered"


async def test_a_folder_is_refused(tmp_path: Path):
    file(tmp_path).mkdir()
    with pytest.raises(StoreRefused, match=r"episodic\.db.*must be a file"):
        await stored(tmp_path).open()


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreRefused, match=r"file/under/episodic\.db.*must be able to"):
        await stored(tmp_path / "file" / "under").open()


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() == 0:  # root may write to any folder, but not to a read-only file system
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
        yield tmp_path
        subprocess.run(["umount", tmp_path], check=True)
    else:
        tmp_path.chmod(0o500)
        yield tmp_path
        tmp_path.chmod(0o700)


async def test_a_folder_that_may_not_be_written_is_refused(locked_folder: Path):
    with pytest.raises(StoreRefused, match=r"episodic\.db.*must be able to"):
        await stored(locked_folder).open()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A second connection to the file, like that of another process."""
    connection = sqlite3.connect(file(tmp_path), isolation_level=None)
    yield connection
    connection.close()


async def test_a_file_that_another_process_holds_is_refused_at_the_start(tmp_path: Path, holder: sqlite3.Connection):
    holder.execute("PRAGMA journal_mode=WAL")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreRefused, match="Another process"):
        await stored(tmp_path).open()
    holder.execute("ROLLBACK")


async def test_locked_file_causes_503_until_unlocked(store: SQLStore, holder: sqlite3.Connection):
    await store.create(record())
    holder.execute("BEGIN EXCLUSIVE")
    changes = [store.commit(commit(0)), store.create(record("f")), store.delete("e")]
    results = await asyncio.gather(*changes, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert "locked" in str(results[0])
    assert await store.steps("e") == [], "a read does not wait for the lock"
    holder.execute("ROLLBACK")
    await store.commit(commit(0))
    assert await store.episode("f") is None
    assert len(await store.steps("e")) == 1


async def test_a_short_lock_is_waited_out(tmp_path: Path, holder: sqlite3.Connection):
    store = stored(tmp_path, Patience())
    await store.open()
    await store.create(record())
    holder.execute("BEGIN EXCLUSIVE")
    waiting = asyncio.create_task(store.commit(commit(0)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    holder.execute("ROLLBACK")
    await waiting
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def commit_until_full(store: SQLStore) -> int:
    """Commits steps until the disk is full. Returns the number of committed steps."""
    for index in range(10_000):
        try:
            await store.commit(commit(index))
        except StoreUnavailable as error:
            assert re.search(r"full|disk I/O", str(error))  # noqa: PT017 - which call raises it is not known
            return index
    raise AssertionError("the disk does not fill up")


async def test_full_disk_causes_503_until_space_is_free(small_disk: Path):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"0" * 400_000)
    store = stored(small_disk)
    await store.open()
    await store.create(record())
    num_steps = await commit_until_full(store)
    assert num_steps > 0
    assert len(await store.steps("e")) == num_steps, "reads still work, and no step is stored partially"
    with pytest.raises(StoreUnavailable):
        await asyncio.gather(*(store.create(record(f"f{number}", goal="x" * 10_000)) for number in range(100)))
    ballast.unlink()
    await store.commit(commit(num_steps))
    assert await store.num_active() == 1
    await store.close()
    again = stored(small_disk)
    await again.open()
    assert len(await again.steps("e")) == num_steps + 1
    await again.close()


async def test_full_disk_at_startup_is_reported(small_disk: Path):
    (small_disk / "ballast").write_bytes(b"0" * (1 << 20))
    with pytest.raises(StoreRefused, match=r"episodic\.db.*The disk is full"):
        await stored(small_disk).open()


async def test_online_backup_is_consistent(store: SQLStore, tmp_path: Path):
    """Runs the command that docs/deployment.md gives for backups."""
    (line,) = re.findall(
        r"^\.venv/bin/python -c .*backup.*$", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE
    )
    line = line.replace(".venv/bin/python", sys.executable).replace("data/episodic.db", str(file(tmp_path)))
    await store.create(record())
    for index in range(200):
        await store.commit(commit(index))
    (tmp_path / "copy").mkdir()
    copying = await asyncio.create_subprocess_shell(line, cwd=tmp_path / "copy")
    exited, num_steps = asyncio.create_task(copying.wait()), 200
    while not exited.done():
        await store.commit(commit(num_steps))
        num_steps += 1
    assert await exited == 0
    async with SQLStore(f"sqlite:///{tmp_path / 'copy' / 'backup.db'}") as copy:
        found = await copy.trajectory("e")
        assert found is not None
        assert 200 <= found[0].state.step == len(found[1]) <= num_steps
        await copy.commit(commit(len(found[1])))
