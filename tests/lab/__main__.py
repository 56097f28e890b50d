"""Builds the image, starts the database, runs the checks where published ports are reachable, and stops everything."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.make_secrets import main as make_secrets
from deploy.references import read_compose
from tests.lab.engine import ROOT, Docker, DockerFailed

TAG = "lab"
STAND_IN = """
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends haproxy
CMD ["haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
"""
"""A Dockerfile of the proxy with HAProxy from Debian, for an engine without access to a registry."""


def main(
    keep: Annotated[bool, typer.Option(help="Keep the stack and its data at the end.")] = False,
    build: Annotated[bool, typer.Option(help="Build the image first.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 7,
    engine: Annotated[
        str | None, typer.Option(envvar="DOCKER_LAB", help="A program that runs a Docker engine in a separate network.")
    ] = None,
) -> None:
    """Tests the image and the compose stack. Exit code 1 if a check fails."""
    with tempfile.TemporaryDirectory(prefix="episodic-lab-") as folder:
        secrets = Path(folder, "secrets")
        make_secrets(secrets)
        variables = {
            "COMPOSE_PROJECT_NAME": "episodic-lab",
            "EPISODIC_TAG": TAG,
            "EPISODIC_PORT": "18000",
            "PROMETHEUS_PORT": "19090",
            "SECRETS": str(secrets),
        }
        checks = [sys.executable, "-m", "tests.lab.checks", str(secrets), str(seed), *([engine] if engine else [])]
        raise typer.Exit(_run(Docker(engine, variables), checks, keep=keep, build=build))


def _run(docker: Docker, checks: list[str], *, keep: bool, build: bool) -> int:
    try:
        if build:
            began = time.monotonic()
            docker.build("--target", "cpu", "--tag", f"episodic:{TAG}", ".")
            typer.echo(f"built episodic:{TAG} in {time.monotonic() - began:.0f} s")
        if docker.is_apart:
            _build_proxy(docker)
        docker.up("db")  # this also creates the network
        return docker.inside(*checks)
    except DockerFailed as error:
        typer.secho(str(error), fg="red", err=True)
        return 1
    finally:
        if not keep:
            docker.compose("down", "--volumes", "--remove-orphans")


def _build_proxy(docker: Docker) -> None:
    image = read_compose((ROOT / "docker-compose.yml").read_text())["services"]["proxy"]["image"]
    if image not in docker.images():
        with tempfile.TemporaryDirectory(prefix="episodic-lab-") as folder:
            Path(folder, "Dockerfile").write_text(STAND_IN)
            docker.build("--tag", image, folder)


if __name__ == "__main__":
    typer.run(main)
