"""The files for Prometheus and Grafana: they are complete, every alert is tested, and a scrape sends its API key.

tests/e2e/test_monitoring.py tests the queries against a service under load.
"""

import asyncio
import json
import re
import shutil
import subprocess
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import promtools
from deploy.grafana import dashboard
from service.access.keys import Scope, new_key
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support import prometheus
from tests.support.serving import serve

GRAFANA = prometheus.ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads(dashboard.OUT.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = prometheus.rules()
ALERTS = [rule for rule in RULES if "alert" in rule]
TESTS: list[dict[str, Any]] = yaml.safe_load((prometheus.FOLDER / "rules_test.yml").read_text())["tests"]
TESTED = [(query["expr"], bool(query["exp_samples"])) for test in TESTS for query in test["promql_expr_test"]]


@pytest.fixture(scope="module")
def needs_prometheus() -> None:
    if reason := prometheus.missing():
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_prometheus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint-fatal", "rules.yml"),
        ("check", "config", "--syntax-only", "--lint-fatal", "prometheus.yml"),  # the file with the key does not exist
        ("test", "rules", "rules_test.yml"),
    ],
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    command = [promtools.program("promtool"), *arguments]
    result = subprocess.run(command, cwd=prometheus.FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("needs_prometheus")
def test_the_rules_hold_where_windows_exclude_their_left_end(tmp_path: Path) -> None:
    """Prometheus 3 excludes the left end of a window. Samples are at whole seconds, so a window that is a millisecond
    shorter gives the same result in Prometheus 2."""
    unit_ms = {"m": 60_000, "h": 3_600_000}

    def shorter(window: re.Match[str]) -> str:
        return f"[{int(window[1]) * unit_ms[window[2]] - 1}ms"

    original = (prometheus.FOLDER / "rules.yml").read_text()
    changed, num_windows = re.subn(r"\[(\d+)([mh])", shorter, original)
    assert num_windows > 20
    (tmp_path / "rules.yml").write_text(changed)
    shutil.copy(prometheus.FOLDER / "rules_test.yml", tmp_path)
    command = [promtools.program("promtool"), "test", "rules", "rules_test.yml"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_is_healthy_has_all_that_the_rules_ask_for_and_outlasts_them() -> None:
    healthy = TESTS[-1]
    given = {series["series"].split("{")[0] for series in healthy["input_series"]}
    used = {name for rule in RULES for name in re.findall(r"\b(?:agent_|vllm:|process_|up\b)\w*", rule["expr"])}
    recorded = {rule["record"].split(":")[1] for rule in RULES if "record" in rule}
    assert used - recorded <= given
    assert {query["expr"] for query in healthy["promql_expr_test"]} == {
        'ALERTS{alertname=~"Episodic.*", alertstate="firing"}'
    }
    assert not any(query["exp_samples"] for query in healthy["promql_expr_test"])
    last = max(int(query["eval_time"].removesuffix("m")) for query in healthy["promql_expr_test"])
    assert last > 60 + max(
        int(rule["for"].removesuffix("m")) for rule in ALERTS if "for" in rule
    )  # a window of an hour, and the longest `for`


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_keeps_the_installations_of_a_cluster_apart(rule: dict[str, Any]) -> None:
    expr = rule["expr"]
    groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)
    assert all(labels.startswith("namespace, job") for labels in groups)
    assert len(re.findall(r"\b(?:sum|count|max|group)\b", expr)) == expr.count("by (")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_have_a_remedy_and_firing_and_silent_tests(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description"}
    results = {fires for expr, fires in TESTED if f'ALERTS{{alertname="{rule["alert"]}"' in expr}
    assert results == {True, False}


def test_each_recorded_series_is_used_and_tested() -> None:
    used = " ".join([*(rule["expr"] for rule in RULES), *(t["expr"] for p in PANELS for t in p["targets"])])
    for rule in RULES:
        if name := rule.get("record"):
            assert name in used
            assert any(name in expr and fires for expr, fires in TESTED), name


def test_prometheus_finds_replicas_by_dns_and_shows_a_key() -> None:
    (scraped,) = yaml.safe_load((prometheus.FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped["job_name"] == "episodic"
    assert scraped["dns_sd_configs"] == [{"names": ["service"], "type": "A", "port": 8000, "refresh_interval": "5s"}]


@pytest.mark.usefixtures("needs_prometheus")
async def test_a_scrape_asks_for_a_key_of_scope_admin(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    scopes: dict[str, tuple[Scope, ...]] = {"admin": ("admin",), "others": ("act", "read")}

    def targets(server: prometheus.Prometheus) -> dict[str, tuple[str, str]]:
        found = server.get("targets")["activeTargets"]
        return {target["labels"]["job"]: (target["health"], target["lastError"]) for target in found}

    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        jobs: list[Any] = []
        for name, allowed in scopes.items():
            key, record = new_key("monitoring", allowed, time.time())
            await api.app.state.services.sessions.store.add_key(record)
            (tmp_path / name).write_text(f"{key}\n")
            configured = prometheus.configuration(api.url.removeprefix("http://"), tmp_path / name)
            jobs.append({**configured["scrape_configs"][0], "job_name": name})
        expected = {"admin": ("up", ""), "others": ("down", "server returned HTTP status 403 Forbidden")}
        with prometheus.running(tmp_path, {**configured, "scrape_configs": jobs}) as server:
            async with asyncio.timeout(60):
                while await asyncio.to_thread(targets, server) != expected:  # noqa: ASYNC110 - state of a process
                    await asyncio.sleep(0.1)


def test_the_dashboard_is_what_its_module_makes() -> None:
    assert dashboard.OUT.read_text() == dashboard.text(), "run `python deploy/grafana/dashboard.py`"


def test_the_dashboard_has_a_place_for_each_panel() -> None:
    everything = DASHBOARD["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in everything]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_have_a_description_and_data_source(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("timeseries", "stat", "table", "heatmap")
    assert len(panel["description"]) > 40
    assert panel["fieldConfig"]["defaults"]["unit"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == source
    references = [target["refId"] for target in panel["targets"]]
    assert references
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == source
        chosen = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"}'
        assert target["expr"].count("{") == target["expr"].count(chosen) > 0
        assert target["legendFormat"] or panel["type"] == "table"


def test_the_dashboard_has_the_rows_and_choices_that_operators_ask_for() -> None:
    assert DASHBOARD["uid"] == "episodic"
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        *("Traffic", "Latency by part", "Tokens and cache hits", "Episodes and returns", "Errors and refusals"),
        *("Store", "Engine", "Process"),
    ]
    source, *choices = DASHBOARD["templating"]["list"]
    assert source["name"] == "datasource"
    assert [choice["name"] for choice in choices] == ["namespace", "job", "instance"]
    assert all(choice["allValue"] == ".*" and choice["current"]["value"] == ["$__all"] for choice in choices)
    used = set(re.findall(r"\$\{?(\w+)", dashboard.OUT.read_text()))
    assert used == {"datasource", "namespace", "job", "instance", "__rate_interval", "__all"}


def test_grafana_is_provisioned_with_prometheus_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    scraped = yaml.safe_load((prometheus.FOLDER / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/episodic.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
