"""The contenders as processes: starts each with the same weights and options, runs cells on it, and stops it."""

import asyncio
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import orjson

from bench.actors import BatchActor, ChatActor, DecisionActor, Lockstep, ServiceActor
from bench.http_client import Connection, UnexpectedStatus
from bench.measure import Sample, WrongAction, measure, process_clock
from bench.workloads import Cell

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_LIMIT_S = 600.0
STOP_LIMIT_S = 30.0

Command = list[str]
HTTPActor = ServiceActor | ChatActor | DecisionActor

_RUN_MODULE: Command = [sys.executable, "-m"]


class Failed(RuntimeError):
    """A contender did not start or has died. The message ends with the end of its log."""


class Contender(Protocol):
    """A contender: something that can run a cell."""

    async def start(self) -> None:
        """Starts it and waits until it is ready. Raises Failed."""
        ...

    async def play(self, cell: Cell, run: int) -> Sample:
        """Runs a cell. `run` is the number of the round. Raises Failed."""
        ...

    async def stop(self) -> None:
        """Stops it, whether it has started or not."""
        ...


class _Program:
    """A process whose output goes to a log file."""

    def __init__(self, command: Command, log: Path, environment: dict[str, str]) -> None:
        self._command = command
        self._log = log
        self._environment = environment
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process, "the process has not been started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, *, piped: bool = False) -> Process:
        pipe = PIPE if piped else None
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, cwd=ROOT, env=self._environment, stdin=pipe, stdout=pipe or log, stderr=log
            )
        return self._process

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        if self._process.stdin:
            self._process.stdin.close()  # the process then closes its engine and exits
        else:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def failure(self, what: str) -> Failed:
        lines = self._log.read_text(errors="replace").splitlines()[-25:]
        return Failed(f"{what}. The end of its log:\n" + "\n".join(lines))


class _Server:
    """A contender with an HTTP API."""

    def __init__(self, program: _Program, port: int, ready_path: str) -> None:
        self._program = program
        self._port = port
        self._ready_path = ready_path

    async def start(self) -> None:
        if self._program.is_running:  # it serves another contender, too
            return
        process = await self._program.start()
        deadline = time.monotonic() + START_LIMIT_S
        while not await self._ready():
            if process.returncode is not None or time.monotonic() > deadline:
                raise self._program.failure(f"{type(self).__name__} did not start")
            await asyncio.sleep(0.25)

    async def stop(self) -> None:
        await self._program.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        return self._program.process.pid

    async def play(self, cell: Cell, run: int) -> Sample:
        return await self.play_with(cell, run, lambda _: self._actor(cell))

    async def play_with(self, cell: Cell, run: int, new: Callable[[int], HTTPActor]) -> Sample:
        """Runs a cell with these actors. `new` makes the one of an episode. Raises Failed."""
        actors: list[HTTPActor] = []

        def make(number: int) -> HTTPActor:
            actors.append(new(number))
            return actors[-1]

        try:
            return await measure(cell, run, make, process_clock(self._program.process.pid))
        except (ConnectionError, UnexpectedStatus, WrongAction) as error:
            raise self._program.failure(f"{type(self).__name__}: {error}") from error
        finally:
            for actor in actors:
                actor.close()

    def connection(self) -> Connection:
        return Connection(HOST, self._port)

    def _actor(self, cell: Cell) -> HTTPActor:
        raise NotImplementedError

    async def _ready(self) -> bool:
        connection = self.connection()
        try:
            await connection.open()
            return (await connection.request("GET", self._ready_path)).status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Service(_Server):
    """(a) `episodic serve` with its default settings: every step is on disk before the response is sent."""

    def __init__(self, model: str, options: dict[str, Any], folder: Path, run_module: Command = _RUN_MODULE) -> None:
        port = _free_port()
        command = [*run_module, "service", "serve", "--model", model, "--port", str(port)]
        for name, value in options.items():
            command += ["--engine", f"{name}={orjson.dumps(value).decode()}"]
        environment = {**_environment(), "EPISODIC_DATA": str(folder)}
        super().__init__(_Program(command, folder / "service.log", environment), port, "/readyz")

    def _actor(self, cell: Cell) -> ServiceActor:
        return ServiceActor(self.connection(), uuid4().hex, cell.workload)


class _Guest:
    """A contender that uses the process of another one."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()


class Batches(_Guest):
    """(d) The process of (a), called with POST /act/batch: the episodes of a cell step together."""

    async def play(self, cell: Cell, run: int) -> Sample:
        group = Lockstep(cell.num_episodes)  # the sets of a cell are played one after the other
        server = self._server
        return await server.play_with(
            cell, run, lambda _: BatchActor(server.connection(), uuid4().hex, cell.workload, group)
        )


class ScriptedService(Service):
    """The service with a scripted engine, which costs next to nothing."""

    def __init__(self, model: str, folder: Path, run_module: Command = _RUN_MODULE) -> None:
        port = _free_port()
        command = [*run_module, "bench.scripted", model, str(port), str(folder)]
        _Server.__init__(self, _Program(command, folder / "scripted.log", _environment()), port, "/readyz")


class OpenAIServer(_Server):
    """(b) vLLM's own server: chat completions with the whole conversation in each request."""

    def __init__(self, model: str, options: dict[str, Any], folder: Path) -> None:
        port = _free_port()
        command = [sys.executable, "-m", "bench.openai_server", model, orjson.dumps(options).decode(), str(port)]
        super().__init__(_Program(command, folder / "openai.log", _environment()), port, "/health")

    def _actor(self, cell: Cell) -> ChatActor:
        return ChatActor(self.connection(), "bench", cell.workload)


class Logprobs(_Guest):
    """(b) with log-probabilities: the process of (b), which also returns that of each token, as the service does."""

    async def play(self, cell: Cell, run: int) -> Sample:
        server = self._server
        return await server.play_with(
            cell, run, lambda _: ChatActor(server.connection(), "bench", cell.workload, logprobs=True)
        )


class Decisions(_Guest):
    """(e) vLLM's own server, called with POST /v1/systemone: the transcript is the state of one question a step."""

    async def play(self, cell: Cell, run: int) -> Sample:
        server = self._server
        return await server.play_with(cell, run, lambda _: DecisionActor(server.connection(), "bench", cell.workload))


class BareEngine:
    """(c) AsyncLLM without a server, in a process that runs the cells itself."""

    def __init__(self, model: str, options: dict[str, Any], folder: Path, run_module: Command = _RUN_MODULE) -> None:
        command = [*run_module, "bench.bare", model, orjson.dumps(options).decode()]
        self._program = _Program(command, folder / "bare.log", _environment())

    async def start(self) -> None:
        await self._program.start(piped=True)
        await self._answer()

    @property
    def pid(self) -> int:
        return self._program.process.pid

    async def play(self, cell: Cell, run: int) -> Sample:
        order = {
            "workload": cell.workload.name,
            "num_episodes": cell.num_episodes,
            "num_steps": cell.num_steps,
            "num_sets": cell.num_sets,
            "run": run,
        }
        assert self._program.process.stdin
        self._program.process.stdin.write(orjson.dumps(order) + b"\n")
        return Sample(**await self._answer())

    async def stop(self) -> None:
        await self._program.stop()

    async def _answer(self) -> dict[str, Any]:
        assert self._program.process.stdout
        line = await self._program.process.stdout.readline()
        if not line:
            raise self._program.failure("BareEngine exited")
        return orjson.loads(line)


NAMES = ("service", "batch", "openai", "logprobs", "engine", "systemone")


def contenders(model: str, options: dict[str, Any], folder: Path) -> dict[str, Contender]:
    """All contenders with these weights and engine options. They start when `start` is called."""
    service, openai = Service(model, options, folder), OpenAIServer(model, options, folder)
    return {
        "service": service,
        "batch": Batches(service),
        "openai": openai,
        "logprobs": Logprobs(openai),
        "engine": BareEngine(model, options, folder),
        "systemone": Decisions(openai),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    """The caller's environment without EPISODIC_* variables. Otherwise only one contender would use these settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EPISODIC_")}
