"""Runs Docker commands: on this machine's engine, or through a program that runs an engine in a separate network.

The first argument of such a program is `build`, `up`, `compose`, `docker` or `exec-net`. With `exec-net` it runs a
command in the network where published ports are reachable. The others run the Docker command with the given arguments.
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
    """A Docker command failed. The message includes the end of its output."""


class Docker:
    """Runs Docker commands in the project's folder, with `variables` as environment variables for the compose file."""

    def __init__(self, program: str | None, variables: Mapping[str, str]) -> None:
        self._program = program
        self._variables = dict(variables)

    @property
    def is_apart(self) -> bool:
        """Whether the engine is reached through a program."""
        return self._program is not None

    def images(self) -> set[str]:
        """Returns the images of the engine, as `name:tag`."""
        return set(self.docker("images", "--format", "{{.Repository}}:{{.Tag}}").split())

    def build(self, *words: str) -> None:
        self._run([self._program, "build", *words] if self._program else ["docker", "build", *words])

    def up(self, *words: str) -> None:
        """Starts services, and returns when they are healthy."""
        up = ["docker", "compose", "up", "--detach", "--no-build", "--wait"]
        self._run([self._program, "up", *words] if self._program else [*up, *words])

    def compose(self, *words: str, stdin: bytes | None = None) -> bytes:
        return self._run([self._program or "docker", "compose", *words], stdin)

    def docker(self, *words: str) -> str:
        """Runs a Docker command, and returns what it printed on stdout."""
        return self._run([self._program, "docker", *words] if self._program else ["docker", *words]).decode()

    def shell(self, script: str, folder: Path) -> None:
        """Runs shell commands as a user would type them, but in `folder`, so that their files are written there."""
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
        """Runs a command in the network where published ports are reachable. Returns its exit code."""
        words = [self._program, "exec-net", *command] if self._program else list(command)
        return subprocess.run(words, cwd=ROOT, env=self._environment).returncode

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", name))[0]

    def logs(self, name: str) -> tuple[list[str], list[str]]:
        """Returns the lines that a container wrote to stdout, and those that it wrote to stderr."""
        words = [self._program, "docker", "logs", name] if self._program else ["docker", "logs", name]
        ran = subprocess.run(words, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=True)
        return ran.stdout.splitlines(), ran.stderr.splitlines()

    def replicas(self) -> list[str]:
        """Returns the ids of the service's containers, including stopped ones."""
        return sorted(self.compose("ps", "--all", "--quiet", "service").decode().split())

    def wait_healthy(self, name: str) -> None:
        """Waits until a container is healthy. Raises DockerFailed if it ends, or takes too long."""
        if not self.becomes_healthy(name):
            raise DockerFailed(f"the container {name[:12]} did not become healthy: {self.logs(name)[1][-20:]}")

    def becomes_healthy(self, name: str) -> bool:
        """Waits until a container is healthy. Returns False if it ends, or takes too long."""
        began = time.monotonic()
        while (state := self.inspect(name)["State"])["Health"]["Status"] != "healthy":
            if state["Status"] != "running" or time.monotonic() > began + READY_LIMIT_S:
                return False
            time.sleep(0.5)
        return True

    @property
    def _environment(self) -> dict[str, str]:
        # The program itself may use a variable DOCKER_LAB in another meaning.
        inherited = {name: value for name, value in os.environ.items() if name != "DOCKER_LAB"}
        return {**inherited, **self._variables}

    def _run(self, words: Sequence[str], stdin: bytes | None = None) -> bytes:
        ran = subprocess.run(words, cwd=ROOT, env=self._environment, input=stdin, capture_output=True)
        if ran.returncode != 0:
            raise DockerFailed(f"{' '.join(words)}: {ran.stderr.decode()[-3000:] or ran.stdout.decode()[-3000:]}")
        return ran.stdout
