"""Generates the Grafana dashboard: `python deploy/grafana/dashboard.py` writes dashboards/episodic.json.

A panel is defined by its title, unit, description and queries. Its id, its position and Grafana's other fields are
generated. This file is a fifth as long as the JSON; a test checks that the JSON is up to date.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "episodic.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
S = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
"""Selects the replicas that are chosen in the menus above the panels. A series without the label matches "All"."""
UP = f'up{{job="episodic", {S}}}'
"""Prometheus's own series for each replica. It exists even if the replica cannot be scraped."""
HEIGHT, FULL_WIDTH = 8, 24
"""The height of a panel and the width of the dashboard, in units of Grafana's grid."""


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard.

    unit: Grafana's id of the unit.
    description: what the panel shows, and what to do about unusual values.
    queries: pairs of a PromQL expression and the legend of its series.
    kind: Grafana's type of panel.
    width: in units of Grafana's grid.
    """

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    top: float | None = None
    """Maximum of the axis, such as 1 for a ratio."""
    below_zero: bool = False
    """Whether the axis includes negative values."""


def quantile(q: float, buckets: str, *by: str) -> str:
    """Returns the query of the quantile `q` (0 to 1) of a histogram, by the labels `by`. `buckets` is a query of the
    rate of its buckets."""
    return f"histogram_quantile({q}, sum by ({', '.join([*by, 'le'])}) ({buckets}))"


def per_second(metric: str, *by: str, where: str = "") -> str:
    """Returns the query of the rate of a counter, summed by the labels `by`. `where` adds label matchers."""
    selected = f"{where}, {S}" if where else S
    total = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{total} (rate({metric}{{{selected}}}[$__rate_interval]))"


ACT_BUCKETS = f"instance_part_le:agent_act_seconds_bucket:rate5m{{{S}}}"
WHOLE_ACT = f'instance_part_le:agent_act_seconds_bucket:rate5m{{part="total_s", {S}}}'
COMMIT_BUCKETS = f"instance_le:agent_store_commit_seconds_bucket:rate5m{{{S}}}"


def acts(outcomes: str) -> str:
    """Returns the query of the rate of acts by outcome. `outcomes` is a regular expression."""
    return f'sum by (outcome) (instance_outcome:agent_acts:rate5m{{outcome=~"{outcomes}", {S}}})'


def tokens(kind: str) -> str:
    return f'sum (instance_kind:agent_tokens:rate5m{{kind="{kind}", {S}}})'


def engine_quantile(q: float, metric: str) -> str:
    """Returns the query of the quantile `q` (0 to 1) of one of the engine's histograms."""
    return quantile(q, f"rate({metric}_bucket{{{S}}}[$__rate_interval])")


def sum_of_returns(sign: str) -> str:
    """Returns the query of the sum of positive or negative returns within 15 minutes, by profile."""
    return f'sum by (profile) (increase(agent_returns_total{{sign="{sign}", {S}}}[15m]))'


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Ready replicas",
            "none",
            "ready: replicas that serve acts. up: replicas that Prometheus can scrape. found: replicas that it "
            "discovers. If ready is less than up, agent_readiness shows why. If up is less than found, read the logs "
            "of the replicas. If none is ready, callers get 503, or no answer.",
            (
                (f'sum (agent_readiness{{state="ready", {S}}}) or vector(0)', "ready"),
                (f"sum ({UP}) or vector(0)", "up"),
                (f"count ({UP}) or vector(0)", "found"),
            ),
            kind="stat",
            width=4,
        ),
        Panel(
            "What is served",
            "none",
            "Version and policy of each replica. Differences are normal only during a rollout.",
            ((f"agent_info{{{S}}}", ""),),
            kind="table",
            width=12,
        ),
        Panel(
            "Uptime",
            "s",
            "Time since each process started. If it is always short, the process exits by itself: its log says why.",
            ((f"time() - process_start_time_seconds{{{S}}}", "{{instance}}"),),
            kind="stat",
        ),
        Panel(
            "Acts",
            "reqps",
            "Answered acts per second. acted: answered with an action. done: ended its episode. replayed: a retry, "
            "answered with the stored answer. Many replays: answers are lost in the network, or the callers' timeouts "
            "are too short.",
            ((acts("acted|done|replayed"), "{{outcome}}"),),
        ),
        Panel(
            "Acts in flight",
            "none",
            "acts in flight: acts that are not answered yet. in the engine and waiting: acts and calls of /v1 that "
            "hold a slot of the engine, or wait for one. If the queue is never empty, the engine is full: add "
            "replicas.",
            (
                (f"sum (agent_active_acts{{{S}}})", "acts in flight"),
                (f"sum (agent_running_acts{{{S}}})", "in the engine"),
                (f"sum (agent_waiting_acts{{{S}}})", "waiting"),
            ),
        ),
        Panel(
            "HTTP requests by route",
            "reqps",
            "All HTTP requests, /v1 and probes included. If only one route grows, find out who calls it.",
            ((per_second("agent_http_requests_total", "route"), "{{route}}"),),
        ),
    ],
    "Latency by part": [
        Panel(
            "Duration of an act",
            "s",
            "From the request to the answer, measured by the service. If it grows, the next panel shows in which part.",
            tuple((quantile(q, WHOLE_ACT), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
        ),
        Panel(
            "p99 by part",
            "s",
            "The wait for a slot of the engine (queue_s), the engine (engine_s) and the commit (store_s). If queue_s "
            "grows, add replicas. engine_s: longer prompts, or fewer hits in the prefix cache. store_s: the disk or "
            "the database.",
            ((quantile(0.99, ACT_BUCKETS, "part"), "{{part}}"),),
        ),
        Panel(
            "Distribution of durations",
            "s",
            "Number of acts by duration. Two bands are two kinds of acts, such as discrete actions and long texts.",
            (
                (
                    f'sum by (le) (increase(agent_act_seconds_bucket{{part="total_s", {S}}}[$__rate_interval]))',
                    "{{le}}",
                ),
            ),
            kind="heatmap",
        ),
    ],
    "Tokens and cache hits": [
        Panel(
            "Tokens of acts",
            "cps",
            "Tokens per second: prompt (the whole context window), cached (the part of the prompt that the prefix "
            "cache had) and completion. Prompt is usually far above completion, because every prompt contains the "
            "history of its episode.",
            ((f"sum by (kind) (instance_kind:agent_tokens:rate5m{{{S}}})", "{{kind}}"),),
        ),
        Panel(
            "Prompt tokens from the cache",
            "percentunit",
            "The share of prompt tokens that the prefix cache had. It falls if episodes move between replicas (route "
            "by X-Episode-Id), if the KV cache is too small, or if many episodes are new.",
            ((f"{tokens('cached')} / {tokens('prompt')}", "cached"),),
            top=1,
        ),
        Panel(
            "Tokens per act",
            "none",
            "Mean length of prompts and completions. Longer prompts make acts slower: limit them with "
            "context.max_tokens.",
            tuple(
                (f"{tokens(kind)} / sum ({acts('acted')})", kind)  # acts that end an episode have no tokens
                for kind in ("prompt", "completion")
            ),
        ),
    ],
    "Episodes and returns": [
        Panel(
            "Episodes started and ended",
            "cps",
            "Episodes per second; those that ended by stop reason. idle_ttl: callers abandon them. max_steps and "
            "context_overflow: they reach a limit. aborted: a caller ends them early.",
            (
                (per_second("agent_episodes_started_total"), "started"),
                (per_second("agent_episodes_ended_total", "stop_reason"), "{{stop_reason}}"),
            ),
        ),
        Panel(
            "Active episodes",
            "none",
            "active: episodes in the store that have not ended. in memory: episodes that the replicas cache. If "
            "active only grows, callers do not end their episodes: set idle_ttl_s. If active exceeds the cache and "
            "acts are slow, raise EPISODIC_MAX_LIVE_EPISODES.",
            (
                # The replicas of an installation share a store, and each reports the number of the whole store.
                (f"sum (max by (namespace, job) (agent_active_episodes{{{S}}}))", "active"),
                (f"sum (agent_live_episodes{{{S}}})", "in memory"),
            ),
        ),
        Panel(
            "Length of episodes",
            "none",
            "Steps of ended episodes, by profile: the median (p50), and the length that 5 % of the episodes exceed "
            "(p95).",
            tuple(
                (
                    quantile(q, f"rate(agent_episode_steps_bucket{{{S}}}[15m])", "profile"),
                    f"{{{{profile}}}} p{q * 100:g}",
                )
                for q in (0.5, 0.95)
            ),
        ),
        Panel(
            "Mean return",
            "short",
            "Mean return of the episodes that ended within 15 minutes, by profile. If it falls after a change of the "
            "policy, the policy is the reason. Otherwise it is the environment, or episodes that reach a limit.",
            (
                (
                    f"({sum_of_returns('positive')} - {sum_of_returns('negative')})\n"
                    f"/ sum by (profile) (increase(agent_episode_return_count{{{S}}}[15m]))",
                    "{{profile}}",
                ),
            ),
            width=12,
            below_zero=True,
        ),
        Panel(
            "Episodes with a return above 0",
            "percentunit",
            "Share of such episodes, by profile. In tasks that only reward success, this is the success rate.",
            (
                (
                    f'1 - sum by (profile) (increase(agent_episode_return_bucket{{le="0.0", {S}}}[15m]))\n'
                    f"/ sum by (profile) (increase(agent_episode_return_count{{{S}}}[15m]))",
                    "{{profile}}",
                ),
            ),
            width=12,
            top=1,
        ),
    ],
    "Errors and refusals": [
        Panel(
            "Failed acts",
            "reqps",
            "By error code. engine_unavailable: the engine died or is loading. store_unavailable: the database or its "
            "disk. draining: a replica is shutting down. deadline_exceeded: acts take longer than the callers' "
            "deadlines. internal_error: a bug in the service.",
            ((acts("engine_unavailable|store_unavailable|draining|deadline_exceeded|internal_error"), "{{outcome}}"),),
        ),
        Panel(
            "Acts refused with 429",
            "reqps",
            "overloaded: the act queue is full; add replicas. quota_exceeded: a tenant has reached its quota.",
            ((acts("overloaded|quota_exceeded"), "{{outcome}}"),),
        ),
        Panel(
            "Invalid acts",
            "reqps",
            "Mistakes of callers. step_conflict and episode_busy: two callers act in the same episode. episode_ended "
            "and episode_not_found: the episode has ended or does not exist. idempotency_mismatch: a retry with a "
            "different body.",
            (
                (
                    acts("step_conflict|idempotency_mismatch|episode_.*|context_overflow|invalid_request"),
                    "{{outcome}}",
                ),
            ),
        ),
        Panel(
            "Answers by status",
            "reqps",
            "All routes except the probes and /metrics. More 401 and 403: a key was revoked, or somebody guesses "
            "keys. 499: callers disconnect before the answer. 500: a bug in the service; search the log for "
            "unexpected_failure.",
            (
                (
                    per_second("agent_http_requests_total", "status", where='route!~"/readyz|/healthz|/metrics"'),
                    "{{status}}",
                ),
            ),
        ),
        Panel(
            "Completions without an action",
            "cps",
            "By kind. length: max_tokens cuts completions short. json and schema: the policy does not follow the "
            "action space.",
            ((per_second("agent_parse_failures_total", "kind"), "{{kind}}"),),
        ),
        Panel(
            "Engine failures",
            "none",
            "Times within an hour that an engine died, hung or could not be loaded. The service loads it again. The "
            "log says why it failed; the most frequent cause is a lack of memory.",
            ((f"sum by (instance) (increase(agent_engine_failures_total{{{S}}}[1h]))", "{{instance}}"),),
        ),
    ],
    "Store": [
        Panel(
            "Duration of a commit",
            "s",
            "Every act waits for its commit. If it grows, check the disk's write latency, other writers, and "
            "PostgreSQL's checkpoints.",
            tuple((quantile(q, COMMIT_BUCKETS), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        Panel(
            "Commits",
            "cps",
            "Commits per second. Concurrent acts share a commit, so under load there are fewer commits than acts.",
            ((per_second("agent_store_commits_total"), "commits"),),
        ),
        Panel(
            "Changes per commit",
            "none",
            "Mean number of acts and new episodes that share a commit. It grows with the load, and with a slow disk.",
            ((f"{per_second('agent_store_batch_size_sum')}\n/ {per_second('agent_store_batch_size_count')}", "mean"),),
        ),
    ],
    "Engine": [
        Panel(
            "Requests in the engine",
            "none",
            "Requests that vLLM runs, and requests that wait inside it, /v1 included. If requests wait here, vLLM's "
            "batch or KV cache is full: reduce EPISODIC_MAX_RUNNING_ACTS.",
            (
                (f"sum (vllm:num_requests_running{{{S}}})", "running"),
                (f"sum (vllm:num_requests_waiting{{{S}}})", "waiting"),
            ),
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            "Near 1 requests are preempted and computed again: give the engine more memory, or run fewer acts at once.",
            ((f"max by (instance) (vllm:kv_cache_usage_perc{{{S}}})", "{{instance}}"),),
            top=1,
        ),
        Panel(
            "Preempted requests",
            "cps",
            "Preemptions per second. The KV cache ran out during a request, which then starts again. Should be 0.",
            ((per_second("vllm:num_preemptions_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Tokens of the engine",
            "cps",
            "Prompt tokens and generated tokens per second. If both are 0 while requests run, the engine hangs.",
            (
                (per_second("vllm:prompt_tokens_total"), "prompt"),
                (per_second("vllm:generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Time to the first token",
            "s",
            "Since the request arrived in the engine. It grows with uncached prompts, and with vLLM's internal queue.",
            tuple((engine_quantile(q, "vllm:time_to_first_token_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        Panel(
            "Time between tokens",
            "s",
            "The speed of a stream for its reader. It grows with the batch: with fewer running acts each is faster.",
            tuple((engine_quantile(q, "vllm:inter_token_latency_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            "The share of prompt tokens that the prefix cache had, /v1 included. It falls if episodes move between "
            "replicas, or if the KV cache is too small.",
            (
                (
                    f"{per_second('vllm:prefix_cache_hits_total')}\n/ {per_second('vllm:prefix_cache_queries_total')}",
                    "hits",
                ),
            ),
            width=12,
            top=1,
        ),
        Panel(
            "Requests by finish reason",
            "reqps",
            "stop: the model ended. length: cut by max_tokens. abort: the caller disconnected, or a deadline passed. "
            "error: see the log. A discrete action takes one or more requests that end with length.",
            ((per_second("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),),
            width=12,
        ),
    ],
    "Process": [
        Panel(
            "CPU",
            "percentunit",
            "CPU cores that the HTTP process uses; the engine runs in another process. Near 1 the HTTP process is the "
            "bottleneck: add replicas on this machine.",
            ((f"rate(process_cpu_seconds_total{{{S}}}[$__rate_interval])", "{{instance}}"),),
            width=6,
        ),
        Panel(
            "Memory",
            "bytes",
            "Resident memory of the HTTP process. It grows until the cache of episodes is full. If it continues to "
            "grow, there is a leak.",
            ((f"process_resident_memory_bytes{{{S}}}", "{{instance}}"),),
            width=6,
        ),
        Panel(
            "File descriptors",
            "percentunit",
            "Open file descriptors relative to the limit. Each connection uses one. Near 1 connections are refused: "
            "raise the limit (ulimit -n).",
            ((f"process_open_fds{{{S}}} / process_max_fds{{{S}}}", "{{instance}}"),),
            width=6,
            top=1,
        ),
        Panel(
            "Tasks of the event loop",
            "none",
            "About a dozen, plus 3 to 7 for each in-flight act. If the minimum grows from hour to hour, there is a "
            "leak.",
            ((f"agent_tasks{{{S}}}", "{{instance}}"),),
            width=6,
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "episodic",
        "title": "Episodic",
        "description": "Traffic, latency, store, engine and process. Generated by deploy/grafana/dashboard.py.",
        "tags": ["episodic"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                choice("namespace", "Namespace", 'up{job="episodic"}'),
                choice("job", "Service", 'up{job="episodic", namespace=~"$namespace"}'),
                choice("instance", "Replica", 'up{job="episodic", namespace=~"$namespace", job=~"$job"}'),
            ]
        },
        "panels": panels(),
    }


def choice(name: str, label: str, series: str) -> dict[str, Any]:
    """Returns a menu with the values of the label `name` in `series`. If no series has the label, the only entry is
    "All", which matches all series."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": name},
        "refresh": 2,  # update when the time range changes, because replicas come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def panels() -> list[dict[str, Any]]:
    """Returns all rows and panels with their positions. The panels of a row are laid out from left to right, in as many
    lines as needed."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row, (title, content) in enumerate(ROWS.items(), 1):
        place = {"x": 0, "y": y, "w": FULL_WIDTH, "h": 1}
        placed.append(
            {"id": row * 100, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += 1
        x = 0
        for number, panel in enumerate(content, 1):
            if x + panel.width > FULL_WIDTH:
                x, y = 0, y + HEIGHT
            placed.append(rendered(panel, row * 100 + number, {"x": x, "y": y, "w": panel.width, "h": HEIGHT}))
            x += panel.width
        y += HEIGHT
    return placed


def rendered(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    forms = {"table": {"format": "table", "instant": True}, "heatmap": {"format": "heatmap"}, "stat": {"instant": True}}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expr,
            "legendFormat": legend,
            **forms.get(panel.kind, {"range": True}),
        }
        for index, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": field(panel), "overrides": []},
        "options": OPTIONS[panel.kind],
        **({"transformations": [TABLE_COLUMNS]} if panel.kind == "table" else {}),
        "targets": targets,
    }


def field(panel: Panel) -> dict[str, Any]:
    config: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        config["color"] = {"mode": "palette-classic"}
        config["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
        if not panel.below_zero:
            config["min"] = 0
        if panel.top is not None:
            config["max"] = panel.top
    return config


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value_and_name",
        "orientation": "auto",
        "justifyMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "fill": "blue"},
        "yAxis": {"unit": "s", "axisPlacement": "left"},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    },
}
TABLE_COLUMNS = {
    "id": "organize",
    "options": {
        "excludeByName": {"Time": True, "Value": True, "__name__": True},
        "indexByName": {"namespace": 0, "job": 1, "instance": 2, "version": 3, "policy": 4, "policy_version": 5},
        "renameByName": {"policy_version": "policy version"},
    },
}


def text() -> str:
    """Returns the dashboard as JSON text."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
