"""Drains replicas behind a real HAProxy under load, and counts the calls that were refused or interrupted.

    python -m tests.faults.drains --drains 50

Two replicas with the scripted engine share a PostgreSQL database; the proxy has the rules of deploy/proxy/haproxy.cfg.
Before some drains the replica is stopped for a moment (SIGSTOP), as on a machine that is too slow: the proxy then
notices late that the replica is leaving. The callers do not retry. Needs `haproxy` on PATH, or HAPROXY=path.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import httpx
import typer

from tests.support import postgres

ROOT = Path(__file__).parents[2]
NUM_PLAYERS = 16
DRAIN_DELAY_S = 3.0  # as in docker-compose.yml
STALL_S = 3.2  # longer than the drain delay
NUM_STEPS = 20


class Replica:
    """A replica in a process of its own."""

    def __init__(self, store: str, folder: Path) -> None:
        self.port = postgres.free_port()
        self._words = [sys.executable, "-m", "tests.faults.drains", "serve", str(self.port), store, str(folder)]
        self._log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.process = await asyncio.to_thread(self._launch)
        async with httpx.AsyncClient() as client:
            while not await _is_ready(client, self.port):
                assert self.process.poll() is None, self._log.read_text()[-2000:]
                await asyncio.sleep(0.1)

    def _launch(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(self._words, cwd=ROOT, stdout=log, stderr=log)

    async def drain(self, stall_s: float) -> int:
        """Sends SIGTERM, stops the process for a moment, and returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        if stall_s:
            await asyncio.sleep(0.3)  # the drain delay has begun
            self.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(stall_s)
            self.process.send_signal(signal.SIGCONT)
        return await asyncio.to_thread(self.process.wait, 120)


async def _is_ready(client: httpx.AsyncClient, port: int) -> bool:
    try:
        return (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
    except httpx.TransportError:
        return False


def start_proxy(haproxy: str, folder: Path, replicas: list[int]) -> "tuple[str, subprocess.Popen[bytes]]":
    """Starts HAProxy with the rules of the compose stack, and these replicas. Returns its URL."""
    port, file = postgres.free_port(), folder / "haproxy.cfg"
    text = (ROOT / "deploy" / "proxy" / "haproxy.cfg").read_text()
    text = re.sub(r"^resolvers docker\n(?: .*\n)+", "", text, flags=re.MULTILINE)
    text = text.replace(" resolvers docker init-addr none", "").replace("bind :8080", f"bind 127.0.0.1:{port}")
    servers = "".join(f"    server replica{number} 127.0.0.1:{port}\n" for number, port in enumerate(replicas))
    file.write_text(re.sub(r"^ *server-template .*\n", servers, text, flags=re.MULTILINE))
    process = subprocess.Popen([haproxy, "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return f"http://127.0.0.1:{port}", process


async def play(url: str, name: str, answers: Counter[str], over: asyncio.Event) -> None:
    """Plays episodes without retries until `over` is set. Counts every answer that is not a success by what it was."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        number = 0
        while not over.is_set():
            number += 1
            episode = f"{name}-{number}"
            headers = {"X-Episode-Id": episode} if number % 4 else {}
            actions = {"type": "discrete", "actions": ["left", "right"]}
            calls = [("/episode", {"episode_id": episode, "action_space": actions})]
            calls += [("/act", {"episode_id": episode, "observation": "x", "step": n}) for n in range(NUM_STEPS)]
            for path, body in calls:
                try:
                    answer = await client.post(path, json=body, headers=headers)
                    what = "ok" if answer.is_success else f"{answer.status_code} {answer.text[:200]}"
                except httpx.TransportError as error:
                    what = repr(error)
                answers[what] += 1
                if what != "ok":
                    break


async def _campaign(num_drains: int, seed: int, haproxy: str) -> Counter[str]:
    generator, answers, over = random.Random(seed), Counter[str](), asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="episodic-drains-") as name, postgres.running() as database:
        folders = [Path(name, str(number)) for number in range(2)]
        store = database.new()
        for folder in folders:
            folder.mkdir()
        replicas = [Replica(store, folder) for folder in folders]
        for replica in replicas:
            await replica.start()
        ports = [replica.port for replica in replicas]
        url, proxy = await asyncio.to_thread(start_proxy, haproxy, Path(name), ports)
        await asyncio.sleep(2)  # the proxy checks the replicas
        players = [asyncio.create_task(play(url, f"p{number}", answers, over)) for number in range(NUM_PLAYERS)]
        try:
            for number in range(num_drains):
                replica, stall_s = replicas[number % 2], generator.choice([0.0, 0.0, STALL_S / 2, STALL_S])
                code = await replica.drain(stall_s)
                await replica.start()
                await asyncio.sleep(2)  # the proxy notices that the replica is ready
                failed = answers.total() - answers["ok"]
                typer.echo(
                    f"drain {number}: stalled {stall_s:g} s, exit {code}, {answers['ok']} calls, {failed} failed"
                )
                answers[f"exit code {code}"] += code != 0
        finally:
            over.set()
            await asyncio.gather(*players)
            proxy.kill()
            for replica in replicas:
                if replica.process is not None:
                    replica.process.kill()
    return +answers


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    drains: Annotated[int, typer.Option(help="Number of drains.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the stalls.")] = 7,
    haproxy: Annotated[str, typer.Option(envvar="HAPROXY", help="The HAProxy program.")] = "haproxy",
) -> None:
    """Drains replicas under load. Exit code 1 if a call failed."""
    if context.invoked_subcommand:
        return
    if shutil.which(haproxy) is None:
        raise typer.BadParameter("HAProxy was not found. Install haproxy, or set HAPROXY=path.")
    answers = asyncio.run(_campaign(drains, seed, haproxy))
    typer.echo(f"{drains} drains: {dict(answers)}")
    raise typer.Exit(int(set(answers) != {"ok"}))


@app.command(hidden=True)
def serve(port: int, store: str, folder: Path) -> None:
    """Runs one replica."""
    from transformers import AutoTokenizer

    from service.api.http import server
    from service.api.http.shutdown import DrainingServer
    from service.app import create_app
    from service.engine.tokenizer import HFTokenizer
    from service.settings import Settings
    from service.testing.scripted_engine import ScriptedEngine
    from tests.conftest import POLICY

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = Settings(store=store, data=folder, drain_delay_s=DRAIN_DELAY_S)
    engine = ScriptedEngine(HFTokenizer(AutoTokenizer.from_pretrained(POLICY)), latency_s=0.02)
    configured = server.config(create_app(settings, engine=engine), host="127.0.0.1", port=port, lifespan="off")
    DrainingServer(configured, drain_delay_s=settings.drain_delay_s, drain_s=settings.drain_s).run()


if __name__ == "__main__":
    app()
