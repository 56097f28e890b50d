"""A real Prometheus for tests, with the configuration and the rules of deploy/prometheus."""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy import promtools
from tests.support.postgres import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
START_LIMIT_S = 60.0


def missing() -> str | None:
    """Returns why Prometheus cannot run here, or None if it can."""
    try:
        promtools.program("prometheus")
        promtools.program("promtool")
    except promtools.Missing as reason:
        return str(reason)
    return None


def rules() -> list[dict[str, Any]]:
    """Returns every rule of rules.yml, in order."""
    return [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]


def configuration(target: str, key_file: Path | None = None, rule_files: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns prometheus.yml with changes for a test: one target, its API key file, and intervals of one second."""
    document = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    document["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    document["rule_files"] = [str(path) for path in rule_files]
    (scraped,) = document["scrape_configs"]
    del scraped["dns_sd_configs"]
    scraped["static_configs"] = [{"targets": [target]}]
    if key_file is None:
        del scraped["authorization"]
    else:
        scraped["authorization"]["credentials_file"] = str(key_file)
    return document


def always(rule: dict[str, Any]) -> dict[str, Any]:
    """Returns the alert with comparisons that are always true: it fires wherever its query finds data.

    A subquery with a step of a minute finds data only at the next full minute. The copy has a step of 5 seconds.
    """
    literals = r'"[^"]*"|\{[^}]*\}'  # strings and selectors stay unchanged
    expr = re.sub(rf"({literals})|([<>=!]=|[<>])", lambda m: m[1] or f"{m[2]} bool", rule["expr"])
    expr = expr.replace(":1m]", ":5s]")
    fields = {name: value for name, value in rule.items() if name != "for"}
    return {**fields, "alert": f"{rule['alert']}Always", "expr": expr.replace("absent(", "count(")}


class Prometheus:
    """A client of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Returns the labels and the current value of each series."""
        return [(series["metric"], float(series["value"][1])) for series in self.get("query", query=expr)["result"]]

    def get(self, call: str, **parameters: str) -> Any:
        answer = self._http.get(f"/api/v1/{call}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def running(folder: Path, configured: dict[str, Any]) -> Iterator[Prometheus]:
    """Starts a Prometheus with this configuration and its data in `folder`."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configured))
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "warn",
    }
    command = [promtools.program("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not client.is_ready():
            log_tail = (folder / "prometheus.log").read_text()[-2000:]
            assert process.poll() is None, log_tail
            assert time.monotonic() < deadline, log_tail
            time.sleep(0.05)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(30)
