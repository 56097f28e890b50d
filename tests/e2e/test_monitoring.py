"""Every query of the dashboard and of the rules finds data in a real Prometheus that scrapes a service under load."""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.test_monitoring import ALERTS, DASHBOARD, PANELS, RULES
from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened
from tests.support import prometheus

QUERIES = {
    f"{panel['title']}, {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]
} | {rule["record"]: rule["record"] for rule in RULES if "record" in rule}
CHOICES = [choice["query"]["query"] for choice in DASHBOARD["templating"]["list"] if choice["type"] == "query"]
VALUES = {"$namespace": ".*", "$job": ".*", "$instance": ".*", "$__rate_interval": "15s"}
NOT_CAUSED = {
    "Acts in flight, C",  # waiting acts: there are some only for a moment, while acts are refused
    "Requests in the engine, B",
    "Failed acts, A",
    "job:agent_acts_failed:rate5m",
    "job:agent_http_requests_failed:rate5m",
    "Engine failures, A",
    "Preempted requests, A",
    "instance:agent_tasks_spare:min30m",  # negative while many acts are in flight
}
"""Queries that the load does not make positive. They must find data, but its value may be 0."""
FOUND_LIMIT_S = 90.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that a few acts overload."""
    started = Server(tmp_path_factory.mktemp("overloaded"), max_running_acts="2", max_queued_acts="2").start()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    if reason := prometheus.missing():
        pytest.skip(reason)
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def scraping(
    server: Server, http: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[prometheus.Prometheus]:
    """Prometheus with the rules, and with a copy of each alert that fires as soon as its query finds data."""
    folder = tmp_path_factory.mktemp("prometheus")
    always = folder / "always.yml"
    always.write_text(yaml.safe_dump({"groups": [{"name": "always", "rules": [prometheus.always(a) for a in ALERTS]}]}))
    rule_files = [prometheus.FOLDER / "rules.yml", always]
    configured = prometheus.configuration(server.url.removeprefix("http://"), rule_files=rule_files)
    with prometheus.running(folder, configured) as started:
        eventually(lambda: bool(started.query("agent_acts_total")), "Prometheus scrapes no metrics of the service")
        with loaded(http):
            yield started


@contextmanager
def loaded(http: httpx.Client) -> Iterator[None]:
    """Repeats all kinds of calls, and an overload, in another thread until the block ends."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            use(http)
            overload(http)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            working.result()


def use(http: httpx.Client) -> None:
    """Makes one call of each kind: an episode with rewards, a stream, a completion without an action, /v1, errors."""
    walk = opened(http, profile="frozen-lake")
    acted(http, walk, "row 0, column 0", step=0)
    acted(http, walk, "row 0, column 1", step=1, reward=-0.5)
    acted(http, walk, "row 0, column 1", step=1, reward=-0.5)
    acted(http, walk, "row 0, column 2", step=2, reward=1.0, terminated=True)
    talk = opened(http, sampling={"max_tokens": 8})
    with http.stream(
        "POST", "/act", json={"episode_id": talk, "observation": "Hello."}, headers={"Accept": "text/event-stream"}
    ) as stream:
        assert "event: act" in stream.read().decode()
    cut = opened(http, action_space={"type": "json", "schema": {"type": "object"}}, sampling={"max_tokens": 1})
    assert acted(http, cut, "One.")["parse_failure"]["kind"] == "length"
    completion = {"model": "toy-text", "prompt": "row 0", "max_tokens": 8, "ignore_eos": True}
    assert http.post("/v1/completions", json=completion).status_code == 200
    assert http.post("/act", json={"episode_id": "nobody", "observation": "Hm?"}).status_code == 404
    assert http.post("/act", json={"episode_id": talk}).status_code == 422


def overload(http: httpx.Client) -> None:
    """Sends more acts at once than can run and wait, until one is refused with 429."""

    def one_is_refused() -> bool:
        acts = [{"episode_id": opened(http, sampling={"max_tokens": 64}), "observation": "A story."} for _ in range(32)]
        with ThreadPoolExecutor(len(acts)) as pool:
            return 429 in pool.map(lambda act: http.post("/act", json=act).status_code, acts)

    eventually(one_is_refused, "no act was refused")


def eventually(condition: Callable[[], bool], message: str) -> None:
    """Waits until the condition is true. Fails with the message after FOUND_LIMIT_S seconds."""
    deadline = time.monotonic() + FOUND_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.2)


def substituted(expr: str) -> str:
    for name, value in VALUES.items():
        expr = expr.replace(name, value)
    return expr


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_sees_the_load(scraping: prometheus.Prometheus, name: str) -> None:
    expr = substituted(QUERIES[name])
    assert "$" not in expr
    above = -math.inf if name in NOT_CAUSED else 0.0
    eventually(lambda: any(value > above for _, value in scraping.query(expr)), f"{expr} > {above}")


def test_what_the_load_does_not_cause_is_asked_for() -> None:
    assert QUERIES.keys() >= NOT_CAUSED


@pytest.mark.parametrize("query", CHOICES)
def test_the_choices_above_the_panels_are_those_there_are(
    server: Server, scraping: prometheus.Prometheus, query: str
) -> None:
    parts = re.fullmatch(r"label_values\((.*), (\w+)\)", substituted(query))
    assert parts is not None
    selected, label = parts.groups()
    # As in the compose stack, the series have no label `namespace`.
    expected = {"namespace": None, "job": "episodic", "instance": server.url.removeprefix("http://")}
    found = [series.get(label) for series in scraping.get("series", **{"match[]": selected})]
    assert found == [expected[label]]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_finds_what_it_compares_and_says_it(scraping: prometheus.Prometheus, rule: dict[str, Any]) -> None:
    def raised() -> list[dict[str, Any]]:
        alerts = scraping.get("alerts")["alerts"]
        return [alert for alert in alerts if alert["labels"]["alertname"] == f"{rule['alert']}Always"]

    eventually(lambda: bool(raised()), prometheus.always(rule)["expr"])
    alert = raised()[0]
    for template, text in zip(rule["annotations"].values(), alert["annotations"].values(), strict=True):
        assert "<error" not in text, text
        assert set(re.findall(r"\$labels\.(\w+)", template)) <= alert["labels"].keys()


def test_each_metric_that_is_asked_for_is_one_of_the_services(http: httpx.Client) -> None:
    families = text_string_to_metric_families(http.get("/metrics").text)
    scraped = {sample.name for family in families for sample in family.samples}
    expressions = [*QUERIES.values(), *CHOICES, *(rule["expr"] for rule in RULES)]
    used = {name for expr in expressions for name in re.findall(r"[a-zA-Z_:][\w:]*", expr)}
    used = {name for name in used if name.startswith(("agent_", "vllm:", "process_"))}
    assert len(used) > 30
    assert used <= scraped
