"""Owns the way to the Docker engine: this machine's, or one that a program keeps in a network of its own.

Such a program takes `build`, `up`, `compose`, `docker` or `exec-net` as its first word; the last one runs a command
where published ports are reached, the others are Docker's with Docker's words.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

ROOT = Path(__file__).parents[2]
READY_LIMIT_S = 300.0


class DockerFailed(Exception):
    """A command of Docker's that failed, with the end of what it said."""


class Docker:
    """Runs Docker's commands in the project's folder, with `variables` for the compose file."""

    def __init__(self, program: str | None, variables: Mapping[str, str]) -> None:
        self._program = program
        self._variables = dict(variables)

    @property
    def is_apart(self) -> bool:
        """Whether the engine is one that a program keeps."""
        return self._program is not None

    def images(self) -> set[str]:
        """By name and tag."""
        return set(self.docker("images", "--format", "{{.Repository}}:{{.Tag}}").split())

    def build(self, *words: str) -> None:
        self._run([self._program, "build", *words] if self._program else ["docker", "build", *words])

    def up(self, *words: str) -> None:
        """Returns once what was started is healthy."""
        up = ["docker", "compose", "up", "--detach", "--no-build", "--wait"]
        self._run([self._program, "up", *words] if self._program else [*up, *words])

    def compose(self, *words: str, stdin: bytes | None = None) -> bytes:
        return self._run([self._program or "docker", "compose", *words], stdin)

    def docker(self, *words: str) -> str:
        """What the command printed, on both of its streams."""
        return self._run([self._program, "docker", *words] if self._program else ["docker", *words]).decode()

    def shell(self, script: str, folder: Path) -> None:
        """Runs lines as a user would type them beside the compose file; what they write goes into `folder`."""
        if self._program:
            shim = folder / "bin" / "docker"
            shim.parent.mkdir(exist_ok=True)
            words = f'[ "$1" = compose ] && exec {quote(self._program)} "$@"\nexec {quote(self._program)} docker "$@"\n'
            shim.write_text(f"#!/bin/sh\n{words}")
            shim.chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        environment = {**self._environment, "PATH": path, "COMPOSE_FILE": str(ROOT / "docker-compose.yml")}
        words = ["bash", "-euo", "pipefail", "-c", script]
        ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        if ran.returncode != 0:
            raise DockerFailed(f"{script}: {ran.stderr[-3000:]}")

    def inside(self, *command: str) -> int:
        """Runs a command where published ports are reached."""
        words = [self._program, "exec-net", *command] if self._program else list(command)
        return subprocess.run(words, cwd=ROOT, env=self._environment).returncode

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", name))[0]

    def logs(self, name: str) -> tuple[list[str], list[str]]:
        """The lines that a container wrote to its standard output, and those to its standard error."""
        words = [self._program, "docker", "logs", name] if self._program else ["docker", "logs", name]
        ran = subprocess.run(words, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=True)
        return ran.stdout.splitlines(), ran.stderr.splitlines()

    def replicas(self) -> list[str]:
        """The containers of the service, the stopped ones too."""
        return sorted(self.compose("ps", "--all", "--quiet", "service").decode().split())

    def wait_healthy(self, name: str) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        while (state := self.inspect(name)["State"])["Health"]["Status"] != "healthy":
            if state["Status"] != "running" or time.monotonic() > began + READY_LIMIT_S:
                raise DockerFailed(f"{name[:12]} does not get healthy: {self.logs(name)[1][-20:]}")
            time.sleep(0.5)
        return time.monotonic() - began

    @property
    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "DOCKER_LAB"}  # it may mean another thing
        return {**kept, **self._variables}

    def _run(self, words: Sequence[str], stdin: bytes | None = None) -> bytes:
        ran = subprocess.run(words, cwd=ROOT, env=self._environment, input=stdin, capture_output=True)
        if ran.returncode != 0:
            raise DockerFailed(f"{' '.join(words)}: {ran.stderr.decode()[-3000:] or ran.stdout.decode()[-3000:]}")
        return ran.stdout
