"""Every query of the dashboard and of the rules finds data in a real Prometheus that scrapes a real, loaded service."""

import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests import prometheus
from tests.deploy.test_monitoring import ALERTS, DASHBOARD, PANELS, RULES
from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened

QUERIES = {
    f"{panel['title']}, {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]
} | {rule["record"]: rule["record"] for rule in RULES if "record" in rule}
CHOICES = [choice["query"]["query"] for choice in DASHBOARD["templating"]["list"] if choice["type"] == "query"]
VALUES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "15s"}
FOUND_LIMIT_S = 90.0


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
    """Prometheus with the rules as they are, and with each alert once more as it fires where its query finds data."""
    folder = tmp_path_factory.mktemp("prometheus")
    again = folder / "always.yml"
    again.write_text(yaml.safe_dump({"groups": [{"name": "always", "rules": [prometheus.always(a) for a in ALERTS]}]}))
    rule_files = [prometheus.FOLDER / "rules.yml", again]
    configured = prometheus.configuration(server.url.removeprefix("http://"), rule_files=rule_files)
    with loaded(http), prometheus.running(folder, configured) as started:
        yield started


@contextmanager
def loaded(http: httpx.Client) -> Iterator[None]:
    """All that a service does, again and again in another thread."""
    overload(http)
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            use(http)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            ended.set()
            working.result()


def use(http: httpx.Client) -> None:
    """An episode with rewards, a stream, completions without an action, a call of /v1, mistakes."""
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
    asked = {"model": "toy-text", "prompt": "row 0", "max_tokens": 8, "ignore_eos": True}
    assert http.post("/v1/completions", json=asked).status_code == 200
    assert http.post("/act", json={"episode_id": "nobody", "observation": "Hm?"}).status_code == 404
    assert http.post("/act", json={"episode_id": talk}).status_code == 422


def overload(http: httpx.Client) -> None:
    """More acts at once than run and wait, until one is refused."""
    parent = opened(http, sampling={"max_tokens": 256})
    names = [uuid.uuid4().hex for _ in range(256)]
    forked = http.post(f"/episode/{parent}/fork", json={"n": len(names), "episode_ids": names})
    assert forked.status_code == 201, forked.text
    acts = [{"episode_id": name, "observation": "Tell me a long story."} for name in names]
    with ThreadPoolExecutor(1) as pool:
        flood = pool.submit(http.post, "/act/batch", json={"acts": acts})
        while http.post("/act", json={"episode_id": parent, "observation": "And me?"}).status_code != 429:
            assert not flood.done(), "the flood was over before an act was refused"
        assert flood.result().status_code == 200


def eventually(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + FOUND_LIMIT_S
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def substituted(expr: str) -> str:
    for name, value in VALUES.items():
        expr = expr.replace(name, value)
    return expr


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_finds_data(scraping: prometheus.Prometheus, name: str) -> None:
    expr = substituted(QUERIES[name])
    assert "$" not in expr
    eventually(lambda: any(not math.isnan(value) for _, value in scraping.query(expr)), expr)


@pytest.mark.parametrize("query", CHOICES)
def test_the_choices_above_the_panels_are_not_empty(scraping: prometheus.Prometheus, query: str) -> None:
    parts = re.fullmatch(r"label_values\((.*), (\w+)\)", substituted(query))
    assert parts is not None
    selected, label = parts.groups()
    eventually(lambda: any(series[label] for series in scraping.get("series", **{"match[]": selected})), selected)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_finds_what_it_compares_and_says_it(scraping: prometheus.Prometheus, rule: dict[str, Any]) -> None:
    def raised() -> list[dict[str, Any]]:
        alerts = scraping.get("alerts")["alerts"]
        return [alert for alert in alerts if alert["labels"]["alertname"] == f"{rule['alert']}Always"]

    eventually(lambda: bool(raised()), prometheus.always(rule)["expr"])
    alert = raised()[0]
    for written, said in zip(rule["annotations"].values(), alert["annotations"].values(), strict=True):
        assert "<error" not in said, said
        assert set(re.findall(r"\$labels\.(\w+)", written)) <= alert["labels"].keys()


def test_an_act_that_was_refused_is_seen(scraping: prometheus.Prometheus) -> None:
    refused = 'agent_acts_total{outcome="overloaded"} > 0'
    eventually(lambda: bool(scraping.query(refused)), refused)


def test_each_metric_that_is_asked_for_is_one_of_the_services(http: httpx.Client) -> None:
    families = text_string_to_metric_families(http.get("/metrics").text)
    scraped = {sample.name for family in families for sample in family.samples}
    expressions = [*QUERIES.values(), *CHOICES, *(rule["expr"] for rule in RULES)]
    asked = {name for expr in expressions for name in re.findall(r"[a-zA-Z_:][\w:]*", expr)}
    asked = {name for name in asked if name.startswith(("agent_", "vllm:", "process_"))}
    assert len(asked) > 30
    assert asked <= scraped
