"""The checks of the image and the compose stack, and their report. Runs where published ports are reachable."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from service.client import Client
from tests.faults.auditor import Auditor
from tests.faults.campaign import Plan, run
from tests.faults.ledger import Ledger, calling
from tests.lab.engine import READY_LIMIT_S, ROOT, Docker, DockerFailed

IMAGE = "episodic:lab"
PROXY = "http://127.0.0.1:18000"
PROMETHEUS = "http://127.0.0.1:19090"
ALONE_PORT = "18001"
DEPLOYING = (ROOT / "docs" / "deployment.md").read_text()
NUM_EPISODES = 192
GRACE_S = 50
SERVICES = ("db", "service", "proxy", "prometheus")
CONFINED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")  # noqa: S108


@dataclass(slots=True)
class Report:
    """Prints the results, and collects the failed expectations."""

    findings: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def expect(self, passed: bool, what: str) -> None:
        self.say(what if passed else f"FAILED: {what}")
        if not passed:
            self.findings.append(what)


@dataclass(frozen=True, slots=True)
class Lab:
    """The stack, its secrets, and the answers that all players received."""

    docker: Docker
    secrets: Path
    seed: int
    report: Report = field(default_factory=Report)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def api_key(self) -> str:
        return (self.secrets / "episodic_admin_key").read_text().strip()

    @property
    def urls(self) -> list[str]:
        return [PROXY]


# --- the image


def check_image(lab: Lab) -> None:
    image, expect = lab.docker.inspect(IMAGE), lab.report.expect
    config = image["Config"]
    lab.report.say(f"size: {image['Size'] / 1e9:.2f} GB in {len(image['RootFS']['Layers'])} layers")
    expect(int(config["User"].partition(":")[0]) > 0, f"the image runs as user {config['User']}")
    expect(
        config["Entrypoint"][0] == "tini",
        f"the image starts {' '.join(config['Entrypoint'])} {' '.join(config['Cmd'])}",
    )
    expect(
        set(config["Volumes"]) == {"/data", "/models"},
        f"the image's volumes are {', '.join(sorted(config['Volumes']))}",
    )
    labels = [name for name in config["Labels"] if name.startswith("org.opencontainers.image.")]
    expect(len(labels) == 5, f"the image has {len(labels)} OCI labels")
    script = "for c in cc gcc g++ c++ clang ld as make rustc nvcc; do command -v $c; done; true"
    compilers = _in_image(lab, "sh", "-c", script)
    expect(compilers == "", f"the image contains no compiler {compilers}".rstrip())
    caches = "ls -d /root/.cache /tmp/* /src /dist /var/lib/apt/lists/* 2>/dev/null; true"
    expect((left := _in_image(lab, "sh", "-c", caches)) == "", f"the image contains no build leftovers {left}".rstrip())
    code = "import service.app as m; print(open(m.__cached__, 'rb').read(16)[8:] != b'')"
    expect(_in_image(lab, "python", "-c", code) == "True", "the image's Python code is compiled to .pyc files")


def _in_image(lab: Lab, program: str, *words: str) -> str:
    return lab.docker.docker("run", "--rm", "--entrypoint", program, IMAGE, *words).strip()


# --- one container, no stack


def check_alone(lab: Lab) -> None:
    """Runs one container without any options: it creates an API key, prints it once, and serves."""
    expect = lab.report.expect
    with _container(lab, "alone", ALONE_PORT) as (name, ready_s):
        keys, usage = _printed_keys(lab, name)
        expect(len(keys) == 1 and usage, "docker run prints an API key once, and how to use it")
        lab.report.say(f"from docker run to ready: {ready_s:.1f} s")
        expect(lab.docker.becomes_healthy(name), "the container becomes healthy")
        version = _version(ALONE_PORT, keys[0])
        expect(version["policy"] == "toy-text", f"with the key, the service answers: its policy is {version['policy']}")
        status = httpx.get(f"http://127.0.0.1:{ALONE_PORT}/version").status_code
        expect(status == 401, f"without the key, the service answers {status}")
        with Client(f"http://127.0.0.1:{ALONE_PORT}", keys[0]) as client:
            act = client.episode(profile="frozen-lake").act("0: S F\n1: H G\nrow 0, column 0")
        expect(act.action in {"left", "down", "right", "up"}, f"an act returns a legal action: {act.action}")
        wrote = [line for line in lab.docker.docker("diff", name).splitlines() if not line[2:].startswith("/tmp")]  # noqa: S108
        expect(wrote == [], f"the container wrote only to /tmp and its volumes {' '.join(wrote)}".rstrip())
        _check_end(lab, name)
        lab.docker.docker("start", name)
        _wait_ready(ALONE_PORT)
        again, _ = _printed_keys(lab, name)
        expect(again == keys, "a restart prints no other key")
        expect(_version(ALONE_PORT, keys[0])["policy"] == "toy-text", "the first key is valid after the restart")
        lab.docker.docker("kill", name)


def check_confined(lab: Lab) -> None:
    """Runs one container with a read-only root filesystem, without capabilities, and as an arbitrary user."""
    with _container(lab, "confined", ALONE_PORT, *CONFINED, "--user", "54321:0") as (name, ready_s):
        keys, _ = _printed_keys(lab, name)
        with Client(f"http://127.0.0.1:{ALONE_PORT}", keys[0]) as client:
            act = client.episode(profile="frozen-lake").act("0: S F\n1: H G\nrow 0, column 0")
        lab.report.expect(
            bool(act.action),
            f"it serves with a read-only root, without capabilities, as any user; ready in {ready_s:.1f} s",
        )
        _check_end(lab, name)


@contextmanager
def _container(lab: Lab, name: str, port: str, *words: str) -> Iterator[tuple[str, float]]:
    """Starts a container. Yields its name and the seconds until it was ready, and removes it at the end."""
    name = f"episodic-lab-{name}"
    began = time.monotonic()
    lab.docker.docker("run", "--detach", "--name", name, "--publish", f"127.0.0.1:{port}:8000", *words, IMAGE)
    try:
        _wait_ready(port)
        yield name, time.monotonic() - began
    except Exception:
        print("\n".join(lab.docker.logs(name)[1][-30:]))
        raise
    finally:
        lab.docker.docker("rm", "--force", "--volumes", name)


def _printed_keys(lab: Lab, name: str) -> tuple[list[str], bool]:
    out, err = lab.docker.logs(name)
    keys = [line for line in out if re.fullmatch(r"ek_[0-9a-f]{16}_[0-9a-f]{64}", line)]
    return keys, any("Bearer" in line for line in out) and not any(key in line for key in keys for line in err)


def _check_end(lab: Lab, name: str) -> None:
    began = time.monotonic()
    lab.docker.docker("stop", "--time", str(GRACE_S), name)
    took_s, code = time.monotonic() - began, lab.docker.inspect(name)["State"]["ExitCode"]
    lab.report.expect(
        code == 0 and took_s < GRACE_S, f"SIGTERM stops the container in {took_s:.1f} s with exit code {code}"
    )


def _version(port: str, key: str) -> dict[str, str]:
    answer = httpx.get(f"http://127.0.0.1:{port}/version", headers={"Authorization": f"Bearer {key}"})
    return answer.raise_for_status().json()


def _wait_ready(port: str) -> None:
    deadline = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise DockerFailed(f"the service on port {port} was not ready after {READY_LIMIT_S:g} s")


# --- the stack


def check_start(lab: Lab) -> None:
    began = time.monotonic()
    lab.docker.up("--scale", "service=2", *SERVICES)
    replicas = lab.docker.replicas()
    took_s = time.monotonic() - began
    lab.report.expect(
        len(replicas) == 2, f"two replicas start at the same time on an empty database, in {took_s:.0f} s"
    )
    for name in replicas:
        out, _ = lab.docker.logs(name)
        lab.report.expect(out == [], "a replica whose admin key comes from a file prints no key")
    lab.report.say("Grafana is not tested, because not every engine has its image")


def check_rollout(lab: Lab) -> None:
    command = [sys.executable, "-m", "service", "rollout", "--url", PROXY, "--episodes", "100", "--seed", "7", "--json"]
    environment = {**os.environ, "EPISODIC_API_KEY": lab.api_key}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lab.report.expect(ran.returncode == 0, f"`episodic rollout` works through the proxy {ran.stderr[-500:]}".rstrip())
    if ran.returncode == 0:
        figures = json.loads(ran.stdout)
        lab.report.say(f"completion rate {figures['completion_rate']}, {figures['steps_per_s']:.0f} steps/s")


def check_quiet(lab: Lab) -> None:
    """Without faults, all calls of an episode go to the same replica, and each replica serves some episodes."""
    _campaign(lab, "quiet", lambda stack, generator: "no fault")
    seen: dict[str, set[str]] = {}
    for name in lab.docker.replicas():
        for line in lab.docker.logs(name)[1]:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "request" and "episode_id" in event:
                seen.setdefault(event["episode_id"], set()).add(name)
    shares = [sum(names == {name} for names in seen.values()) for name in lab.docker.replicas()]
    num_split = sum(len(names) > 1 for names in seen.values())
    lab.report.expect(num_split == 0 and min(shares) > 0, f"episodes by replica: {shares}, served by both: {num_split}")


def check_kill(lab: Lab) -> None:
    answered: list[int] = []
    name = lab.docker.replicas()[0]  # looked up in advance: it takes a while, and the players would go on

    def strike(stack: Lab, generator: random.Random) -> str:
        stack.docker.docker("kill", "--signal", "KILL", name)
        before = lab.ledger.num_acts
        time.sleep(3)
        answered.append(lab.ledger.num_acts - before)
        stack.docker.docker("start", name)
        stack.docker.wait_healthy(name)
        return "kill -9 and restart of a replica"

    _campaign(lab, "kill", strike)
    lab.report.expect(answered[0] > 0, f"{answered[0]} acts were answered while the replica was down")


def check_drain(lab: Lab) -> None:
    codes: list[int] = []
    plain: Counter[str] = Counter()

    name = lab.docker.replicas()[1]

    def strike(stack: Lab, generator: random.Random) -> str:
        with _plain_calls(stack, plain):
            stack.docker.docker("stop", "--time", str(GRACE_S), name)
            codes.append(stack.docker.inspect(name)["State"]["ExitCode"])
            stack.docker.docker("start", name)
            stack.docker.wait_healthy(name)
        return "SIGTERM and restart of a replica"

    num_retried = lab.ledger.num_retried
    _campaign(lab, "drain", strike)
    lab.report.expect(codes == [0], f"the exit code of the drained replica is {codes}")
    lab.report.expect(lab.ledger.num_retried == num_retried, "no call was rejected or interrupted")
    lab.report.expect(set(plain) == {"201", "200"}, f"answers to a client without retries: {dict(plain)}")


@contextmanager
def _plain_calls(lab: Lab, answers: Counter[str]) -> Iterator[None]:
    """Meanwhile a simple client plays, like curl: without X-Episode-Id and without retries. Counts its answers."""
    over = threading.Event()

    def call() -> None:
        headers = {"Authorization": f"Bearer {lab.api_key}"}
        while not over.is_set():
            name = f"plain-{answers.total()}"
            for path, body in (
                ("episode", {"profile": "frozen-lake"}),
                ("act", {"observation": "Hello", "timeout_s": 30}),
            ):
                try:
                    given = {"episode_id": name, **body}
                    answer = httpx.post(f"{PROXY}/{path}", json=given, headers=headers, timeout=60)
                    answers[f"{answer.status_code} {answer.json().get('code', '')}".strip()] += 1
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield
    finally:
        over.set()
        caller.join()


def _campaign(lab: Lab, kind: str, strike: Callable[[Lab, random.Random], str]) -> None:
    """Runs players against the proxy, injects one fault while they play, and audits all episodes so far."""
    ledger = lab.ledger
    num_acts, num_retried, num_findings = ledger.num_acts, ledger.num_retried, len(ledger.findings)
    run(lab, Plan(kind, "postgresql", lab.seed, 1, NUM_EPISODES), strikes={kind: strike}, ledger=ledger)
    lab.report.say(f"{ledger.num_acts - num_acts} acts, {ledger.num_retried - num_retried} calls retried")
    _expect_none(lab, num_findings, "after the campaign")


def _expect_none(lab: Lab, num_before: int, when: str) -> None:
    found = [str(finding) for finding in lab.ledger.findings[num_before:]]
    lab.report.expect(not found, f"audit of {len(lab.ledger.histories)} episodes {when}: {len(found) or 'no'} findings")
    for finding in found[:10]:
        lab.report.say(finding)


def check_metrics(lab: Lab) -> None:
    """Prometheus discovers both replicas by their DNS name, and its key may read their metrics."""
    deadline, up = time.monotonic() + 60, []
    while time.monotonic() < deadline and up != ["1", "1"]:
        answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": 'up{job="episodic"}'})
        up = [series["value"][1] for series in answer.json()["data"]["result"]]
        time.sleep(1)
    lab.report.expect(up == ["1", "1"], f"Prometheus scrapes both replicas: `up` is {up}")
    query = {"query": 'sum(agent_acts_total{outcome="acted"})'}
    acts = httpx.get(f"{PROMETHEUS}/api/v1/query", params=query).json()["data"]["result"]
    lab.report.expect(
        bool(acts), f"Prometheus has counted {acts[0]['value'][1] if acts else 'no'} acts since the last restarts"
    )


def check_restore(lab: Lab) -> None:
    """Runs the commands in docs/deployment.md. Episodes from before the backup are restored, later ones are gone."""
    with Client(PROXY, lab.api_key) as client:
        before = {episode.episode_id for episode in client.episodes()}
    docker, folder = lab.docker, lab.secrets.parent
    docker.shell(_lines_with("pg_dump"), folder)
    with Client(PROXY, lab.api_key) as client:
        late = client.episode(profile="frozen-lake").id
    docker.shell(_lines_with("pg_restore"), folder)
    docker.up("--scale", "service=2", *SERVICES)
    with Client(PROXY, lab.api_key) as client:
        after = {episode.episode_id for episode in client.episodes()}
    size_mb = (folder / "backup.dump").stat().st_size / 1e6
    lab.report.expect(
        after == before, f"restored {len(after)} of {len(before)} episodes from a backup of {size_mb:.1f} MB"
    )
    lab.report.expect(late not in after, "an episode that was created after the backup is gone")
    _audit(lab, "after the restore")


def check_rollback(lab: Lab) -> None:
    """Runs the commands in docs/deployment.md, but starts the current image again, not an older one."""
    lines = _lines_with("docker compose run ").splitlines()
    lab.docker.shell("\n".join(lines[:2]), lab.secrets.parent)
    query = ["psql", "--username=episodic", "--tuples-only", "--command=SELECT version_num FROM alembic_version"]
    schema = lab.docker.compose("exec", "-T", "db", *query).decode().strip()
    lab.report.expect(lines[1].endswith(f" {schema}"), f"the schema version is {schema}")
    lab.docker.up("--scale", "service=2", *SERVICES)
    _audit(lab, "after the migration back and forth")


def _lines_with(words: str) -> str:
    """Returns the shell block in docs/deployment.md that contains these words."""
    (block,) = [block for block in re.findall(r"```sh\n(.*?)```", DEPLOYING, re.DOTALL) if words in block]
    return block


def _audit(lab: Lab, when: str) -> None:
    """Audits all episodes, and plays one more act in each that has not ended."""

    async def audit() -> None:
        generator = random.Random(lab.seed)
        async with calling(lab.urls, generator, lab.ledger, lab.api_key) as client:
            await Auditor(client, generator, lab.ledger).audit(list(lab.ledger.histories.values()), go_on=True)

    num_findings = len(lab.ledger.findings)
    asyncio.run(audit())
    _expect_none(lab, num_findings, when)


def check_memory(lab: Lab) -> None:
    stats = lab.docker.docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}")
    for line in sorted(stats.splitlines()):
        lab.report.say(line)


CHECKS: dict[str, Callable[[Lab], None]] = {
    "the image": check_image,
    "one container": check_alone,
    "one container, confined": check_confined,
    "the stack with two replicas": check_start,
    "a rollout": check_rollout,
    "routing": check_quiet,
    "kill -9 of a replica": check_kill,
    "drain of a replica": check_drain,
    "metrics": check_metrics,
    "backup and restore": check_restore,
    "an older schema": check_rollback,
    "memory": check_memory,
}


def main(secrets: Path, seed: int, docker: Docker) -> int:
    lab = Lab(docker, secrets, seed)
    began = time.monotonic()
    for name, check in CHECKS.items():
        print(f"{name}:", flush=True)
        try:
            check(lab)
        except (DockerFailed, httpx.HTTPError, TimeoutError) as error:
            lab.report.expect(False, f"{type(error).__name__}: {error}")
    num_bad = len(lab.report.findings)
    print(f"{num_bad} findings in {time.monotonic() - began:.0f} s")
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Docker(next(iter(sys.argv[3:]), None), {})))
